"""Distillation: a student comes closer to its teacher, without labels, and a killed run ends as it would have ended."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from commands import assert_answer, run  # noqa: E402
from reference import reference_features, reference_logits  # noqa: E402
from scene_helpers import noise, write_raster  # noqa: E402
from training_helpers import CONFIG, blocks, painted  # noqa: E402

from cdkd_edge.core.errors import NumericalCheckError  # noqa: E402
from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.distillation import distill as module  # noqa: E402
from cdkd_edge.distillation.align import CHECK_TILES, Aligner, AlignRecipe  # noqa: E402
from cdkd_edge.distillation.tiles import SceneTiles  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint  # noqa: E402
from cdkd_edge.model.network import Encoder, SegmentationNetwork  # noqa: E402
from cdkd_edge.training.views import Augmentation, TilePlace, View  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

KINDS = ("window 4", "pooled 2", "window 4", "pooled 2")
SMALL = (
    *("--device", "cpu", "--precision", "fp32", "--batch", 3, "--steps", 60, "--lr", 0.002, "--warm-up", 4),
    *("--views", 1, "--no-flips", "--scale", 1, 1, "--light", 0),
)
SCHEMA = load_schema("dubai")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


def network_of(weights, config=CONFIG):
    network = SegmentationNetwork(config)
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=False)
    return network.eval()


@pytest.fixture(scope="module")
def weights(make_weights):
    return make_weights(CONFIG)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twenty places of 64 px in two GeoTIFFs: two are kept out of training."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed, name in enumerate("ab"):
        image = painted(blocks(128, 320, seed)).astype(int) + noise(128, 320, seed=seed) // 8
        write_raster(folder / f"{name}.tif", np.clip(image, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save_checkpoint(network_of(weights), path, schema=SCHEMA, training={"tool": "someone's"})
    return path


@pytest.fixture(scope="module")
def student(teacher):
    path = teacher.with_name("student.pt")
    assert run("convert", teacher, "--attention", "window4/pooled2@1,3", "-o", path).exit_code == 0
    return path


def words(scenes, teacher, student, output, *more):
    return ["distill", scenes, "--teacher", teacher, "--student", student, "-o", output, *SMALL, *more]


@pytest.fixture(scope="module")
def finished(scenes, teacher, student, tmp_path_factory):
    """A whole run: its folder, and what it printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(*words(scenes, teacher, student, folder / "out.pt", "--json"))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, json.loads(result.stdout)["distilled"]


def state_of(path):
    return load_checkpoint(path)[0].state_dict()


def identical(one, other):
    one, other = state_of(one), state_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- learning -------------------------------------------------------------------------------------


def test_a_converted_network_comes_back_to_its_teacher(finished, teacher, student, scenes):
    folder, record = finished
    assert record["after"]["loss"] < 0.7 * record["before"]["loss"]
    missed = zip(record["before"]["missed"], record["after"]["missed"], strict=True)
    assert all(after < 0.7 * before for before, after in missed)
    assert record["after"]["divergence"] < 0.8 * record["before"]["divergence"]
    # Seen from outside, on pixels that it never saw.
    tiles = torch.from_numpy(np.stack([painted(blocks(64, 64, seed)) for seed in (9, 10, 11)]))
    with torch.inference_mode():
        truth, first, last = (load_checkpoint(path)[0].encoder(tiles) for path in (teacher, student, folder / "out.pt"))
    before, after = (
        [float((ours - theirs).square().mean()) for ours, theirs in zip(maps, truth, strict=True)]
        for maps in (first, last)
    )
    assert sum(after) < 0.8 * sum(before)


def test_features_alone_need_no_heads(scenes, teacher, student, tmp_path):
    result = run(*words(scenes, teacher, student, tmp_path / "a.pt", "--logits", 0, "--json"))
    record = json.loads(result.stdout)["distilled"]
    assert "divergence" not in record["before"]
    assert record["after"]["loss"] == pytest.approx(np.mean(record["after"]["missed"]))
    assert record["after"]["loss"] < 0.6 * record["before"]["loss"]


@pytest.mark.parametrize("logits", [0.0, 2.0])
def test_the_loss_is_what_an_independent_network_says(weights, scenes, logits):
    """Variance of the teacher's channels on the training tiles; differences, divergence of classes: in NumPy."""
    tiles = SceneTiles([str(scenes)], 64)
    config = dataclasses.replace(CONFIG, attention=KINDS)
    recipe = AlignRecipe(steps=1, logits=logits, precision="fp32")
    aligner = Aligner(network_of(weights, config), network_of(weights), tiles, recipe)
    aligner.measure_teacher()
    kinds = {"heads": 2, "eps": CONFIG.layer_norm_eps}
    measured = [place for index, place in enumerate(tiles.places) if index not in aligner.check]
    assert len(measured) == 18
    plain = np.stack([tiles.read(place, View()) for place in measured])
    variance = [maps.var(axis=(0, 2, 3))[:, None, None] for maps in reference_features(weights, plain, **kinds)]
    tile = plain[:2]
    theirs, ours = (reference_features(weights, tile, **kinds, attention=kind) for kind in ((), KINDS))
    expected = np.mean([np.mean((a - b) ** 2 / v) for a, b, v in zip(ours, theirs, variance, strict=True)])
    one, two = (
        np.exp(reference_logits(weights, tile, **kinds, attention=kind)).astype(np.float64) for kind in (KINDS, ())
    )
    one, two = one / one.sum(1, keepdims=True), two / two.sum(1, keepdims=True)
    expected += logits * np.sum(two * np.log(two / one), axis=1).mean()
    assert aligner.loss(torch.from_numpy(tile)).item() == pytest.approx(expected, rel=1e-3)


def test_a_student_like_its_teacher_has_nothing_to_learn(weights, scenes):
    aligner = Aligner(network_of(weights), network_of(weights), SceneTiles([str(scenes)], 64), AlignRecipe(steps=1))
    aligner.measure_teacher()
    found = aligner.compare(aligner.student)
    assert (found["loss"], found["agreement"]) == (pytest.approx(0, abs=1e-9), 1.0)


def test_teacher_and_head_stay_and_every_weight_of_the_encoder_moves(finished, teacher, student):
    folder, record = finished
    before, after = state_of(student), state_of(folder / "out.pt")
    assert record["teacher"]["sha256"] == module.sha256_of(teacher)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in after if key.startswith("encoder.")}


def test_what_the_student_had_is_kept(finished, student):
    _, before = load_checkpoint(student)
    _, after = load_checkpoint(finished[0] / "out.pt")
    assert (after.config, after.schema) == (before.config, before.schema)
    assert after.training["tool"] == "someone's"
    assert after.training["converted"] == before.training["converted"]
    assert after.training["distilled"] == finished[1]


def test_the_teacher_is_not_trained(weights, scenes):
    guide = network_of(weights)
    config = dataclasses.replace(CONFIG, attention=KINDS)
    aligner = Aligner(network_of(weights, config), guide, SceneTiles([str(scenes)], 64), AlignRecipe(steps=3))
    aligner.measure_teacher()
    aligner.run_epoch()
    plain = network_of(weights).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in guide.state_dict().items())
    assert not any(parameter.requires_grad for parameter in guide.parameters())


def test_on_other_tiles_the_position_embedding_stays(scenes, teacher, student, tmp_path):
    """Resampled there and back it would lose what the student knows of its own tiles."""
    result = run(*words(scenes, teacher, student, tmp_path / "a.pt", "--tile", 96, "--steps", 3))
    assert result.exit_code == 0, result.stderr
    before, after = state_of(student), state_of(tmp_path / "a.pt")
    assert torch.equal(before["encoder.pos_embed"], after["encoder.pos_embed"])
    assert not torch.equal(before["encoder.blocks.0.attn.qkv.weight"], after["encoder.blocks.0.attn.qkv.weight"])
    assert load_checkpoint(tmp_path / "a.pt")[1].config.tile == 64
    assert "trained on tiles of 96 px, used with 64 px" in " ".join(result.stdout.split())


def test_encoders_alone_learn_and_stay_encoders(scenes, weights, tmp_path):
    encoder = Encoder(CONFIG)
    encoder.load_state_dict(network_of(weights).encoder.state_dict())
    save_checkpoint(encoder, tmp_path / "encoder.pt")
    assert run("convert", tmp_path / "encoder.pt", "--attention", "window4", "-o", tmp_path / "s.pt").exit_code == 0
    result = run(*words(scenes, tmp_path / "encoder.pt", tmp_path / "s.pt", tmp_path / "a.pt", "--json"))
    record = json.loads(result.stdout)["distilled"]
    assert record["after"]["loss"] < 0.6 * record["before"]["loss"]
    assert not load_encoder(tmp_path / "a.pt")[1].has_head


def test_a_running_mean_is_saved(scenes, teacher, student, tmp_path, finished):
    run(*words(scenes, teacher, student, tmp_path / "a.pt", "--mean-decay", 0.9))
    assert not identical(tmp_path / "a.pt", finished[0] / "out.pt")


# --- tiles ----------------------------------------------------------------------------------------


def test_tiles_are_the_scenes_pixels(tmp_path):
    image = noise(70, 200)
    write_raster(tmp_path / "a.tif", image)
    tiles = SceneTiles([str(tmp_path)], 64)
    assert len(tiles) == 2 * 4
    for place in tiles.places:
        found = tiles.read(place, View())
        rows = np.arange(place.row, place.row + 64)
        columns = np.arange(place.column, place.column + 64)
        inside = image[:, np.clip(rows, 0, 69)][:, :, np.clip(columns, 0, 199)]
        known = ((rows >= 0) & (rows < 70))[:, None] & ((columns >= 0) & (columns < 200))
        assert np.array_equal(found[:, known], inside[:, known])


def test_views_turn_and_scale_what_the_tile_shows(tmp_path):
    image = painted(blocks(256, 256, 3))
    write_raster(tmp_path / "a.tif", image)
    tiles = SceneTiles([str(tmp_path)], 64, Augmentation(light=1.0))
    place = TilePlace(0, 64, 64)
    plain = tiles.read(place, View())
    assert np.array_equal(tiles.read(place, View(quarters=1, mirrored=True)), np.rot90(plain, 1, (1, 2))[..., ::-1])
    wide = tiles.read(place, View(scale=0.5))
    assert np.abs(wide.astype(int) - image[:, 32:160:2, 32:160:2]).mean() < 30
    assert not np.array_equal(tiles.read(place, View(light=5)), plain)


def test_check_tiles_are_not_trained_on(weights, scenes):
    tiles = SceneTiles([str(scenes)], 64)
    aligner = Aligner(network_of(weights), network_of(weights), tiles, AlignRecipe(steps=1))
    assert (len(aligner.check), aligner.places) == (2, 18)
    trained = {tiles.places[index] for index in aligner._training}
    assert not trained & {tiles.places[index] for index in aligner.check}
    assert CHECK_TILES == 16


# --- interruptions --------------------------------------------------------------------------------


def interrupt(patch, step):
    """Ctrl-C after a step."""
    real = module._Distillation._after_batch

    def after(self):
        real(self)
        if self.aligner.progress.step == step:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(module._Distillation, "_after_batch", after)


@pytest.mark.parametrize("step", [1, 6, 13, 59])
def test_a_resumed_run_ends_as_if_nothing_had_happened(scenes, teacher, student, tmp_path, finished, monkeypatch, step):
    """Six steps are an epoch."""
    arguments = words(scenes, teacher, student, tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        result = run(*arguments)
    assert result.exit_code == 130, (result.stderr, result.exception)
    assert f"the run is kept in {tmp_path / 'out.state.pt'}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.state.pt"]
    assert_answer(run(*arguments), 2, "holds an unfinished run.*--resume")
    result = run(*arguments, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert identical(tmp_path / "out.pt", finished[0] / "out.pt")
    record = json.loads(result.stdout)["distilled"]
    for name in ("before", "after"):
        assert record[name] == finished[1][name]
    assert record["run"]["history"] == finished[1]["run"]["history"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.md", "out.pt"]


def test_a_state_of_another_run_is_refused(scenes, teacher, student, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        run(*words(scenes, teacher, student, tmp_path / "out.pt"))
    words_now = words(scenes, teacher, student, tmp_path / "out.pt", "--resume")
    assert_answer(
        run(*words_now, "--lr", 0.1), 2, "belongs to a run with other recipe: learning_rate was 0.002, now 0.1"
    )
    assert_answer(run(*words(scenes / "a.tif", *words_now[2:3], student, tmp_path / "out.pt")), 2, ".")


# --- wrong inputs ---------------------------------------------------------------------------------


def test_networks_of_other_width_are_refused(scenes, teacher, tmp_path, make_weights):
    config = dataclasses.replace(CONFIG, embed_dim=48)
    save_checkpoint(network_of(make_weights(config), config), tmp_path / "wide.pt")
    answer = run(*words(scenes, teacher, tmp_path / "wide.pt", tmp_path / "a.pt"))
    assert_answer(answer, 3, "the student's features are 48 wide, the teacher's 32")


def test_networks_of_other_patches_are_refused(scenes, teacher, tmp_path, make_weights):
    config = dataclasses.replace(CONFIG, patch=16, pool_scales=(1, 2, 3, 4))
    save_checkpoint(network_of(make_weights(config), config), tmp_path / "other.pt")
    answer = run(*words(scenes, teacher, tmp_path / "other.pt", tmp_path / "a.pt"))
    assert_answer(answer, 3, "patches of 16 px, the teacher of 8 px")


def test_heads_of_other_classes_are_compared_only_if_asked(scenes, teacher, tmp_path, make_weights):
    config = dataclasses.replace(CONFIG, classes=3)
    save_checkpoint(network_of(make_weights(config), config), tmp_path / "other.pt")
    arguments = words(scenes, teacher, tmp_path / "other.pt", tmp_path / "a.pt", "--steps", 2)
    assert_answer(run(*arguments), 2, "knows 3 classes, the teacher's 5.*--logits 0")
    assert run(*arguments, "--logits", 0).exit_code == 0


def test_no_images_and_a_broken_one_are_named(scenes, teacher, student, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_answer(run(*words(empty, teacher, student, tmp_path / "a.pt")), 10, "empty holds no raster")
    assert_answer(
        run(*words(tmp_path / "gone.tif", teacher, student, tmp_path / "a.pt")), 10, "gone.tif does not exist"
    )
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    (broken / "b.tif").write_bytes((scenes / "b.tif").read_bytes()[:5000])
    assert_answer(run(*words(broken, teacher, student, tmp_path / "a.pt", "--strict")), 10, r"broken/b\.tif")
    result = run(*words(broken, teacher, student, tmp_path / "a.pt", "--steps", 2, "--json"))
    assert re.search(r"note: passed over: .*broken/b\.tif", result.stderr)
    assert json.loads(result.stdout)["distilled"]["skipped"]["images_damaged"] == 1
    write_raster(tmp_path / "deep.tif", np.zeros((3, 64, 64), np.uint16))
    assert_answer(run(*words(tmp_path / "deep.tif", teacher, student, tmp_path / "b.pt")), 10, "uint16.*--stretch")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--logits", -1), "--logits must be 0 or more"),
        (("--precision", "int8"), "--precision must be one of fp32, bf16, fp16"),
        (("--scale", 2, 1), "--scale must be two numbers"),
        (("--batch", 0), "--batch must be at least 1"),
    ],
)
def test_wrong_values_are_named(scenes, teacher, student, tmp_path, option, message):
    assert_answer(run(*words(scenes, teacher, student, tmp_path / "a.pt", *option)), 2, message)


def test_an_output_is_not_overwritten(scenes, teacher, student, finished):
    folder, _ = finished
    assert_answer(run(*words(scenes, teacher, student, folder / "out.pt")), 2, "out.pt exists.*--overwrite")
    assert_answer(run(*words(scenes, teacher, student, teacher, "--overwrite")), 2, "is the checkpoint that")


def test_a_loss_that_is_no_number_ends_the_run(weights, scenes):
    weights = {**weights, "encoder.blocks.0.mlp.fc1.bias": np.full(64, np.nan, np.float32)}
    aligner = Aligner(network_of(weights), network_of(weights), SceneTiles([str(scenes)], 64), AlignRecipe(steps=1))
    aligner.measure_teacher()
    with pytest.raises(NumericalCheckError, match="the loss is nan at step 0"):
        aligner.run_epoch()


# --- the card -------------------------------------------------------------------------------------


def test_the_card_says_what_was_done_and_gained(finished):
    folder, record = finished
    card = (folder / "out.md").read_text(encoding="utf-8")
    assert "attention: window 4 in blocks 0, 2; pooled 2 in blocks 1, 3" in card
    assert f"| loss | {record['before']['loss']:.4g} |" in card
    assert "On 2 tiles that it did not train on, of the same scenes." in card
    assert "- teacher: `teacher.pt`" in card
    assert "- 18 tiles, and 2 to check on, of:" in card
    assert ": 2 images, 20 tiles, 320 x 128 px, 3 x uint8" in card
    assert "- steps: 60" in card
    rows = card.splitlines()[-20:]
    assert [int(row.split("|")[1]) for row in rows] == list(range(3, 61, 3))
    assert float(rows[-1].split("|")[2]) < float(rows[0].split("|")[2])
