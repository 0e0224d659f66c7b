"""``cdkd-edge distill``: a student comes closer to its teacher without labels, and says what it learned."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.windows import Window

torch = pytest.importorskip("torch")

from commands import assert_answer, assert_wrong_usage, run  # noqa: E402
from distill_helpers import (  # noqa: E402
    FEATURES,
    LOOP,
    MASKED,
    distilled,
    identical,
    network_of,
    state_of,
    write_encoder,
    write_network,
    write_sam,
    write_scenes,
)
from scene_helpers import write_raster  # noqa: E402
from training_helpers import CONFIG, blocks, painted, write_dataset  # noqa: E402

from cdkd_edge.core.errors import NumericalCheckError  # noqa: E402
from cdkd_edge.core.files import sha256_of  # noqa: E402
from cdkd_edge.distillation.distiller import CHECK_TILES, Distiller  # noqa: E402
from cdkd_edge.distillation.metrics_log import read_log  # noqa: E402
from cdkd_edge.distillation.networks import Distillation  # noqa: E402
from cdkd_edge.distillation.recipe import WITHOUT_ADAPTERS, DistillRecipe  # noqa: E402
from cdkd_edge.distillation.tiles import SceneTiles  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def weights(make_weights):
    return make_weights(CONFIG)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, weights):
    return write_network(tmp_path_factory.mktemp("teacher") / "teacher.pt", weights)


@pytest.fixture(scope="module")
def student(teacher):
    """The teacher with windows and pooled keys."""
    path = teacher.with_name("student.pt")
    assert run("convert", teacher, "--attention", "window4/pooled2@1,3", "-o", path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam") / "sam.pth")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_weights):
    """An encoder with other weights than the teacher's."""
    return write_encoder(tmp_path_factory.mktemp("plain") / "plain.pt", make_weights(CONFIG, seed=1))


@pytest.fixture(scope="module")
def recovered(scenes, teacher, student, tmp_path_factory):
    """A run of method features: its folder and its record. Not to be changed."""
    folder = tmp_path_factory.mktemp("recovered")
    return folder, distilled(scenes, "--teacher", teacher, "--student", student, "-o", folder / "out.pt", *FEATURES)


@pytest.fixture(scope="module")
def masked(scenes, sam, plain, tmp_path_factory):
    """A run of method masked with SAM as teacher: its folder and its record. Not to be changed."""
    folder = tmp_path_factory.mktemp("masked")
    words = (scenes, "--teacher", sam, "--student", plain, "-o", folder / "out.pt", *MASKED, "--steps", 40)
    return folder, distilled(*words)


# --- features: a converted network comes back -----------------------------------------------------


def test_a_converted_network_comes_back_to_its_teacher(recovered, teacher, student):
    folder, record = recovered
    before, after = record["before"], record["after"]
    assert (record["recipe"]["projection"], record["method"]) == ("none", "features")
    assert after["distillation"] < 0.7 * before["distillation"]
    assert after["distillation"] == pytest.approx(np.mean(after["missed"]), rel=1e-5)
    assert len(after["missed"]) == 4
    assert all(now < 0.7 * then for then, now in zip(before["missed"], after["missed"], strict=True))
    assert after["classes"] < 0.8 * before["classes"]
    # Seen from outside, on pixels that it never saw.
    tiles = torch.from_numpy(np.stack([painted(blocks(64, 64, seed)) for seed in (9, 10, 11)]))
    with torch.inference_mode():
        truth, first, last = (load_checkpoint(path)[0].encoder(tiles) for path in (teacher, student, folder / "out.pt"))
    then, now = (
        sum(float((ours - theirs).square().mean()) for ours, theirs in zip(maps, truth, strict=True))
        for maps in (first, last)
    )
    assert now < 0.8 * then


def test_teacher_and_head_stay_and_every_weight_of_the_encoder_moves(recovered, teacher, student):
    folder, record = recovered
    before, after = state_of(student), state_of(folder / "out.pt")
    assert record["teacher"]["sha256"] == sha256_of(teacher)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in after if key.startswith("encoder.")}


def test_what_the_student_had_is_kept(recovered, student):
    _, before = load_checkpoint(student)
    _, after = load_checkpoint(recovered[0] / "out.pt")
    assert (after.config, after.schema) == (before.config, before.schema)
    assert after.training["tool"] == "someone's"
    assert after.training["converted"] == before.training["converted"]
    assert after.training["distilled"] == recovered[1]


def test_without_class_probabilities_the_features_alone_count(scenes, teacher, student, tmp_path):
    words = (scenes, "--teacher", teacher, "--student", student, "-o", tmp_path / "a.pt", *FEATURES)
    record = distilled(*words, "--logits", 0, "--steps", 20)
    assert (record["before"]["classes"], record["after"]["classes"]) == (0, 0)
    assert record["after"]["distillation"] < record["before"]["distillation"]
    assert "logits" not in (tmp_path / "a.md").read_text(encoding="utf-8").partition("## Training")[2]


def test_on_other_tiles_the_position_embedding_stays(scenes, teacher, student, tmp_path):
    """Resampled there and back it would lose what the student knows of its own tiles."""
    words = (scenes, "--teacher", teacher, "--student", student, "-o", tmp_path / "a.pt", *FEATURES)
    record = distilled(*words, "--tile", 96, "--steps", 3)
    before, after = state_of(student), state_of(tmp_path / "a.pt")
    assert torch.equal(before["encoder.pos_embed"], after["encoder.pos_embed"])
    assert not torch.equal(before["encoder.blocks.0.attn.qkv.weight"], after["encoder.blocks.0.attn.qkv.weight"])
    assert load_checkpoint(tmp_path / "a.pt")[1].config.tile == 64
    assert any("trained on tiles of 96 px, used with 64 px" in note for note in record["notes"])


def test_zeros_of_a_sparse_student_stay_zeros(scenes, teacher, tmp_path):
    assert run("convert", teacher, "--sparse", "-o", tmp_path / "sparse.pt").exit_code == 0
    words = (scenes, "--teacher", teacher, "--student", tmp_path / "sparse.pt", "-o", tmp_path / "a.pt", *FEATURES)
    distilled(*words, "--steps", 5, "--mean-decay", 0.9)
    before, after = state_of(tmp_path / "sparse.pt"), state_of(tmp_path / "a.pt")
    for index in range(CONFIG.depth):
        key = f"encoder.blocks.{index}.mlp.fc1.weight"
        assert torch.equal(before[key] == 0, after[key] == 0)
        assert not torch.equal(before[key], after[key])


def test_encoders_alone_learn_and_stay_encoders(scenes, weights, tmp_path):
    encoder = write_encoder(tmp_path / "encoder.pt", weights)
    assert run("convert", encoder, "--attention", "window4", "-o", tmp_path / "s.pt").exit_code == 0
    words = (scenes, "--teacher", encoder, "--student", tmp_path / "s.pt", "-o", tmp_path / "a.pt", *FEATURES)
    record = distilled(*words, "--steps", 30)
    assert record["after"]["distillation"] < 0.8 * record["before"]["distillation"]
    assert not load_encoder(tmp_path / "a.pt")[1].has_head


def test_a_student_like_its_teacher_has_nothing_to_learn(weights, scenes):
    recipe = DistillRecipe(method="features", steps=1, projection="none", precision="fp32")
    networks = Distillation(network_of(weights), network_of(weights), recipe)
    distiller = Distiller(networks, SceneTiles([str(scenes)], 64), recipe)
    distiller.measure_teacher()
    found = distiller.compare()
    assert (found["distillation"], found["agreement"]) == (pytest.approx(0, abs=1e-9), 1.0)


def test_check_tiles_are_not_trained_on(weights, scenes):
    tiles, recipe = SceneTiles([str(scenes)], 64), DistillRecipe(method="mae", steps=1)
    distiller = Distiller(Distillation(network_of(weights).encoder, None, recipe), tiles, recipe)
    assert (len(distiller.check), distiller.places, CHECK_TILES) == (2, 18, 16)
    assert not set(distiller.check) & set(distiller._training)


def test_tiles_that_cannot_be_used_are_not_kept_out_to_check_on(weights, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "some")
    recipe = DistillRecipe(method="mae", steps=1, precision="fp32")
    networks = Distillation(network_of(weights).encoder, None, recipe)

    def distiller():
        return Distiller(networks, SceneTiles([str(tmp_path / "some")], 64), recipe)

    unlucky = [distiller().tiles.places[index] for index in distiller().check]
    for place in unlucky:  # they could only take each other's places
        path = tmp_path / "some" / f"{'ab'[place.image]}.tif"
        with rasterio.open(path, "r+") as image:
            image.write(np.zeros((3, 64, 64), np.uint8), window=Window(place.column, place.row, 64, 64))
    found = distiller()
    assert len(found.check) == 2
    assert not {found.tiles.places[index] for index in found.check} & set(unlucky)
    assert sorted([*found.check, *found._training]) == list(range(20))
    assert np.isfinite(found.compare()["student_pixels"])


# --- masks ----------------------------------------------------------------------------------------


def test_a_student_learns_from_sam_by_masks(masked, plain):
    folder, record = masked
    before, after = record["before"], record["after"]
    assert (record["recipe"]["projection"], record["recipe"]["pairs"]) == ("linear", [[1, 1], [2, 2], [3, 3]])
    assert record["teacher"]["layout"] == "SAM"
    assert before["spread"] != after["spread"]
    assert all(0.5 < one < 2 for one in before["spread"])
    for name in ("distillation", "teacher_pixels", "student_pixels"):
        assert after[name] < 0.9 * before[name], name
    changed = {
        key for key, value in state_of(folder / "out.pt").items() if not torch.equal(value, state_of(plain)[key])
    }
    assert changed == set(state_of(plain))


def test_files_beside_the_student(masked):
    folder, record = masked
    best = ["out.best.pt"] if record["run"]["best_step"] < 40 else []
    names = sorted([*best, "out.curves.png", "out.md", "out.pt", "out.steps.csv", "out.tiles.png"])
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = read_log(folder / "out.steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert {row["stage"] for row in rows} == {"early"}
    assert float(rows[0]["distillation"]) > float(rows[-1]["distillation"])
    weights = [float(rows[0][f"weight_{name}"]) for name in ("distillation", "teacher_pixels", "student_pixels")]
    parts = [float(rows[0][name]) for name in ("distillation", "teacher_pixels", "student_pixels")]
    assert weights == [0.2, 0.4, 0.4]
    assert float(rows[0]["loss"]) == pytest.approx(np.dot(weights, parts), rel=1e-4)
    history = record["run"]["history"]
    assert [row["step"] for row in history] == list(range(2, 41, 2))
    assert history[0]["loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows[:2]]), rel=1e-4)
    assert Image.open(folder / "out.tiles.png").size == (4 * 68 - 4, 2 * 68 - 4)
    assert Image.open(folder / "out.curves.png").size[0] > 500


def test_the_output_is_an_encoder_that_finetune_takes(masked, tmp_path):
    output = masked[0] / "out.pt"
    result = run("info", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["training"]["distilled"] == masked[1]
    data = write_dataset(tmp_path / "data", {"a_0": (128, 128), "b_0": (64, 64)})
    words = ("--data", data, "--schema", "dubai", "--val-scenes", "b", "--tile", 64, "--epochs", 1, "--batch", 2)
    result = run("finetune", output, *words, "--head-channels", 16, "--device", "cpu", "-o", tmp_path / "tuned.pt")
    assert result.exit_code == 0, result.stderr
    ours, theirs = state_of(output), state_of(tmp_path / "tuned.pt")
    assert all(torch.equal(value, theirs[f"encoder.{key}"]) for key, value in ours.items())


def test_any_encoder_can_teach_and_adapters_can_be_left_out(scenes, teacher, plain, tmp_path):
    words = (scenes, "--teacher", teacher, "--student", plain, *MASKED, "--steps", 6)
    adapted = distilled(*words, "-o", tmp_path / "a.pt", "--gate", "convex", "--mask", "grid", "--feedback", "student")
    assert adapted["after"]["teacher_pixels"] < adapted["before"]["teacher_pixels"]
    bare = distilled(*words, "-o", tmp_path / "b.pt", "--adapters", "none", "--target", "raw")
    assert bare["after"]["teacher_pixels"] == 0
    assert bare["after"]["distillation"] < bare["before"]["distillation"]
    (row, *_), (other, *_) = (read_log(tmp_path / f"{name}.steps.csv") for name in "ab")
    assert (row["stage"], other["stage"]) == ("early", "")
    weights = [float(other[f"weight_{name}"]) for name in ("distillation", "teacher_pixels", "student_pixels")]
    assert tuple(weights) == WITHOUT_ADAPTERS


def test_a_masked_autoencoder_needs_no_teacher(scenes, plain, tmp_path):
    words = (scenes, "--method", "mae", "--student", plain, "-o", tmp_path / "a.pt", *LOOP)
    record = distilled(*words, "--lr", 0.002, "--steps", 12, "--pixels", "patch")
    assert record["after"]["student_pixels"] < record["before"]["student_pixels"]
    assert "teacher" not in record
    assert record["after"]["missed"] == []
    assert Image.open(tmp_path / "a.tiles.png").size[0] == 3 * 68 - 4


def test_a_preset_starts_from_random_weights_and_keeps_its_tile(scenes, sam, tmp_path):
    words = (scenes, "--teacher", sam, "--student", "preset:tiny", "--tile", 64, *MASKED, "--steps", 2)
    record = distilled(*words, "-o", tmp_path / "a.safetensors")
    assert record["student"] == {"file": "preset:tiny", "sha256": "", "layout": "random weights"}
    _, report = load_encoder(tmp_path / "a.safetensors")
    assert (report.config.tile, report.config.embed_dim, report.has_head) == (64, 128, False)


def test_a_running_mean_is_saved_and_does_not_disturb_what_is_trained(scenes, tmp_path):
    """Steps end with a comparison and a new best file each."""
    words = (scenes, "--method", "mae", "--student", "preset:tiny", "--tile", 64, *LOOP, "--steps", 4, "--lr", 0.002)
    for name, more in (("plain", ()), ("mean", ("--mean-decay", 0.9))):
        distilled(*words, "-o", tmp_path / f"{name}.pt", *more)
    one, other = (read_log(tmp_path / f"{name}.steps.csv") for name in ("plain", "mean"))
    assert [row["student_pixels"] for row in one] == [row["student_pixels"] for row in other]
    assert not identical(tmp_path / "plain.pt", tmp_path / "mean.pt")


def test_a_probe_is_scored_and_chooses_the_best(scenes, plain, tmp_path):
    data = write_dataset(tmp_path / "data", {"a_0": (128, 128), "b_0": (64, 64)})
    words = (scenes, "--method", "mae", "--student", plain, "-o", tmp_path / "a.pt", *LOOP, "--steps", 3, "--lr", 0.05)
    record = distilled(*words, "--probe", data, "--schema", "dubai", "--val-scenes", "b")
    scores = [row["check"]["probe"]["mean_iou"] for row in record["run"]["history"]]
    assert len(scores) == 3
    assert record["before"]["probe"]["iou"].keys() == record["after"]["probe"]["iou"].keys() >= {"water"}
    best = record["run"]["best_step"]
    assert scores[best - 1] == max(scores)
    assert (tmp_path / "a.best.pt").exists() == (best < 3)
    card = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "mIoU of a linear probe" in card
    assert "The linear probe learns and is scored on other images" in card  # not on the tiles kept out


def test_the_best_file_is_kept_only_if_it_is_not_the_last(scenes, plain, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 3.0, 2.0, 1.0])  # of the steps of two runs; less is better

    def compare(self):
        found = dict.fromkeys(("distillation", "teacher_pixels", "classes", "agreement"), 0.0)
        by_pair = {"missed": [], "spread": []}
        return {**found, **by_pair, "student_pixels": next(scores, 0.0) if self.progress.step else 9.0}

    monkeypatch.setattr(Distiller, "compare", compare)
    words = (scenes, "--method", "mae", "--student", plain, *LOOP, "--steps", 3, "--lr", 0.002)
    record = distilled(*words, "-o", tmp_path / "a.pt")
    assert record["run"]["best_step"] == 2
    kept = load_encoder(tmp_path / "a.best.pt")[1].training["distilled"]
    assert (kept["run"]["steps"], kept["after"]["student_pixels"]) == (2, 1.0)
    assert not identical(tmp_path / "a.pt", tmp_path / "a.best.pt")
    assert distilled(*words, "-o", tmp_path / "b.pt")["run"]["best_step"] == 3
    assert not (tmp_path / "b.best.pt").exists()


# --- the card -------------------------------------------------------------------------------------


def test_the_card_says_what_was_done_and_gained(recovered, masked):
    folder, record = recovered
    card = (folder / "out.md").read_text(encoding="utf-8")
    assert "attention: window 4 in blocks 0, 2; pooled 2 in blocks 1, 3" in card
    assert f"| missed of the teacher's features | {record['before']['distillation']:.4g} |" in card
    assert "On 2 tiles that it did not train on, of the same scenes." in card
    assert "- teacher: `teacher.pt`" in card
    assert "- 18 tiles, and 2 to check on, of:" in card
    assert "2 images, 20 tiles, 320 x 128 px, 3 x uint8" in card
    assert "- pairs: 1:1, 2:2, 3:3, 4:4" in card
    rows = card.splitlines()[-20:]
    assert [int(row.split("|")[1]) for row in rows] == list(range(3, 61, 3))
    assert float(rows[-1].split("|")[2]) < float(rows[0].split("|")[2])
    card = (masked[0] / "out.md").read_text(encoding="utf-8")
    assert "![Losses against the step](out.curves.png)" in card
    assert "![Reconstructions](out.tiles.png)" in card
    assert "- loss weights: in three stages" in card


@pytest.mark.parametrize(
    ("method", "read", "unread"),
    [
        ("masked", {"gate", "feedback", "mask", "pairs"}, {"logits", "accumulate", "epochs"}),
        ("features", {"pairs", "projection", "target", "logits"}, {"gate", "mask", "pixels", "loss weights"}),
        ("mae", {"mask", "pixels", "decoder depth"}, {"adapters", "gate", "pairs", "target", "loss weights"}),
    ],
)
def test_the_card_lists_what_the_method_reads(method, read, unread, masked, recovered, scenes, plain, tmp_path):
    folder = {"masked": masked[0], "features": recovered[0]}.get(method, tmp_path)
    if method == "mae":
        distilled(scenes, "--method", "mae", "--student", plain, "-o", folder / "out.pt", *LOOP, "--steps", 1)
    card = (folder / "out.md").read_text(encoding="utf-8")
    listed = {line[2:].partition(":")[0] for line in card.splitlines() if line.startswith("- ")}
    assert read <= listed
    assert not unread & listed
    assert ("*Missed*" in card) == (method != "mae")


def test_the_teachers_patches_become_the_students_unless_others_are_asked_for(masked, scenes, sam, plain, tmp_path):
    resampled = "teacher: patch embedding resampled from 4 to 8 px patches"
    assert resampled in masked[1]["notes"]
    words = (scenes, "--teacher", sam, "--student", plain, *LOOP, "--method", "features", "--steps", 1)
    own = distilled(*words, "--teacher-patch", 4, "-o", tmp_path / "own.pt")
    assert not any("patch embedding" in note for note in own["notes"])


# --- wrong inputs ---------------------------------------------------------------------------------


def test_methods_and_teachers_must_fit(scenes, sam, plain, tmp_path):
    words = ("distill", scenes, "--student", plain, "-o", tmp_path / "a.pt", *LOOP, "--steps", 1)
    assert_answer(run(*words), 2, "method masked needs a --teacher")
    assert_answer(run(*words, "--method", "mae", "--teacher", sam), 2, "method mae has no teacher")
    other = run(*words, "--teacher", sam, "--teacher-patch", 16)
    assert_answer(other, 3, "4 x 4 patches for the teacher and 8 x 8 for the student.*leave out --teacher-patch")
    for words_of_probe in (("--schema", "dubai"), ("--val-scenes", "a"), ("--val-list", sam)):
        assert_answer(run(*words, "--method", "mae", *words_of_probe), 2, "are for a linear probe.*--probe DATA")
    assert_answer(
        run(*words, "--teacher", plain, "--cell", 3), 2, "cells of 3 x 3 patches do not fit a tile of 8 x 8.*--cell"
    )
    assert_answer(run(*words, "--teacher", tmp_path / "gone.pth"), 3, "gone.pth does not exist")
    assert_answer(run(*words, "--teacher", sam, "--student", "preset:huge"), 3, "no preset 'huge'.*paper")
    assert list(tmp_path.iterdir()) == []


def test_networks_that_cannot_be_compared_are_refused(scenes, teacher, student, tmp_path, make_weights):
    wide = write_network(
        tmp_path / "wide.pt", make_weights(config := dataclasses.replace(CONFIG, embed_dim=48)), config
    )
    words = ("distill", scenes, "--teacher", teacher, *FEATURES, "--steps", 1, "-o", tmp_path / "a.pt")
    answer = run(*words, "--student", wide, "--projection", "none")
    assert_answer(answer, 3, "the student's features are 48 wide, the teacher's 32.*--projection linear")
    few = write_network(tmp_path / "few.pt", make_weights(config := dataclasses.replace(CONFIG, classes=3)), config)
    assert_answer(run(*words, "--student", few), 2, "knows 3 classes, the teacher's 5.*--logits 0")
    assert run(*words, "--student", few, "--logits", 0).exit_code == 0
    masks = ("distill", scenes, "--teacher", teacher, *MASKED, "-o", tmp_path / "b.pt")
    assert_answer(run(*masks, "--student", student), 2, "masks need global attention in the student.*distill first")
    answer = run("distill", scenes, "--teacher", student, *MASKED, "--student", wide, "-o", tmp_path / "b.pt")
    assert_answer(answer, 2, "masks need global attention in the teacher.*--method features")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", -1), "--steps must be 0 or more, got -1"),
        (("--logits", -1), "--logits must be 0 or more"),
        (("--precision", "int8"), "--precision must be one of auto, fp32, bf16, fp16"),
        (("--scale", 2, 1), "--scale must be two numbers"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--method", "magic"), "--method must be one of masked, features, mae, got magic"),
        (("--gate", "open"), "--gate must be one of identity, convex"),
        (("--mask", "holes"), "--mask must be one of cells, grid"),
        (("--cell", 1), "--cell must be 2 to 8"),
        (("--pairs", "0:1"), "--pairs must be blocks from 1 on"),
        (("--pairs", "5:1"), "--pairs names block 5 of the teacher, which has 4"),
        (("--pairs", "1:1,2:9"), "--pairs names block 9 of the student, which has 4"),
        (("--loss-weights", "1,2"), "--loss-weights must be three numbers, not all 0"),
        (("--loss-weights", "0,0,0"), "--loss-weights must be three numbers, not all 0"),
        (("--decoder-width", 12), "width 12 cannot have 8 heads.*--decoder-width takes a multiple of 8"),
    ],
)
def test_wrong_values_are_named(scenes, teacher, plain, tmp_path, option, message):
    words = ("distill", scenes, "--teacher", teacher, "--student", plain, "-o", tmp_path / "a.pt", *LOOP, *option)
    assert_answer(run(*words), 2, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--pairs", "6-3"), "blocks of teacher and student, counted from 1: 6:3,12:6,18:9"),
        (("--loss-weights", "a,b,c"), "three numbers with commas"),
        (("--adapters", "some"), "multiscale or none"),
    ],
)
def test_values_that_cannot_be_read_are_wrong_usage(scenes, teacher, plain, tmp_path, option, message):
    words = ("distill", scenes, "--teacher", teacher, "--student", plain, "-o", tmp_path / "a.pt", *option)
    assert_wrong_usage(run(*words), message)


def test_no_images_and_a_broken_one_are_named(scenes, plain, tmp_path):
    words = ("--method", "mae", "--student", plain, "-o", tmp_path / "a.pt", *LOOP, "--steps", 1)
    (tmp_path / "empty").mkdir()
    assert_answer(run("distill", tmp_path / "empty", *words), 10, "empty holds no")
    assert_answer(run("distill", tmp_path / "gone.tif", *words), 10, "gone.tif does not exist")
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    (broken / "b.tif").write_bytes((scenes / "b.tif").read_bytes()[:5000])
    assert_answer(run("distill", broken, *words, "--strict"), 10, r"broken/b\.tif")
    write_raster(tmp_path / "deep.tif", np.zeros((3, 64, 64), np.uint16))
    assert_answer(run("distill", tmp_path / "deep.tif", *words), 10, "uint16.*--stretch")
    write_raster(tmp_path / "blank.tif", np.full((3, 128, 640), 7, np.uint8))
    assert_answer(run("distill", tmp_path / "blank.tif", *words), 10, "none can be used: 1000 blank")
    assert not list(tmp_path.glob("a.*"))
    record = distilled(broken, *words)
    assert any("b.tif" in note for note in record["notes"])


def test_outputs_and_sources_are_not_overwritten(scenes, teacher, student, recovered, tmp_path):
    folder, _ = recovered
    words = ("distill", scenes, "--teacher", teacher, *FEATURES, "--steps", 1)
    assert_answer(run(*words, "--student", student, "-o", folder / "out.pt"), 2, "out.pt exists.*--overwrite")
    for source in (teacher, student):
        answer = run(*words, "--student", student, "-o", source, "--overwrite")
        assert_answer(answer, 2, "is a checkpoint that training reads")
    shutil.copy(student, tmp_path / "a.best.pt")
    answer = run(*words, "--student", student, "-o", tmp_path / "a.pt")
    assert_answer(answer, 2, "a.best.pt exists.*--overwrite")
    assert_answer(run(*words, "--student", student, "-o", tmp_path / "a.onnx"), 2, "no suffix of a checkpoint")


def test_a_loss_that_is_no_number_ends_the_run(weights, scenes):
    weights = {**weights, "encoder.blocks.0.mlp.fc1.bias": np.full(64, np.nan, np.float32)}
    recipe = DistillRecipe(method="mae", steps=1, precision="fp32")
    distiller = Distiller(
        Distillation(network_of(weights).encoder, None, recipe), SceneTiles([str(scenes)], 64), recipe
    )
    with pytest.raises(NumericalCheckError, match="the loss is nan at step 0"):
        distiller.run_epoch()
