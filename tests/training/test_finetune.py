"""``cdkd-edge finetune``: an encoder and labelled images become a checkpoint that scores what its card says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from scene_helpers import names_in  # noqa: E402
from training_helpers import CONFIG, SCHEMA, blocks, student, write_dataset, write_pair  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from cdkd_edge import cli  # noqa: E402
from cdkd_edge.cli.finetune import TrainingLines, live_training  # noqa: E402
from cdkd_edge.cli.options import command_line  # noqa: E402
from cdkd_edge.core.labels import NO_LABEL  # noqa: E402
from cdkd_edge.model.checkpoint import (  # noqa: E402
    load_checkpoint,
    load_encoder,
    resample_patches,
    resample_position,
    save_checkpoint,
)
from cdkd_edge.model.config import NetworkConfig  # noqa: E402
from cdkd_edge.training import finetune as module  # noqa: E402
from cdkd_edge.training.recipe import NetworkSettings, starting_network  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

SMALL = ("--device", "cpu", "--tile", 64, "--head-channels", 16, "--batch", 3, "--epochs", 2, "--lr", 0.01)
HEADS = ("--heads", 2)
SPLIT = ("--schema", "dubai", "--val-scenes", "b")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


def run(*arguments):
    runner = CliRunner()
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def tune(source, data, output, *more, split=SPLIT):
    """A run that must succeed; what ``--json`` prints."""
    result = run("finetune", source, "--data", data, "-o", output, *SMALL, *split, *more, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def assert_answer(result, code, pattern):
    """One line that begins with ``error:``, the documented exit code, and nothing else."""
    assert result.exit_code == code, (result.exception, result.stdout, result.stderr)
    assert isinstance(result.exception, SystemExit), "an answer, not a traceback"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert re.match(r"error: ", lines[0])
    assert re.search(pattern, lines[0]), lines[0]
    assert result.stdout == ""


def weights_of(path):
    return load_checkpoint(path)[0].state_dict()


def identical(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scene a: six places, two batches. Scene b: validation."""
    sizes = {"a_0": (128, 128), "a_1": (128, 64), "b_0": (64, 100)}
    return write_dataset(tmp_path_factory.mktemp("data"), sizes)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, make_weights):
    """As the Mask-CDKD student's file names it; 16-wide heads, which no file says."""
    path = tmp_path_factory.mktemp("encoder") / "student.pt"
    torch.save(student(make_weights(CONFIG)), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, encoder):
    """A whole run: its folder, and what it printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(
        "finetune", encoder, "--data", data, "-o", folder / "tuned.pt", *SMALL, *SPLIT, *HEADS, "--json"
    )  # fmt: skip
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, result


@pytest.fixture
def tuned(finished, tmp_path):
    """A copy of the checkpoint and its card."""
    for name in ("tuned.pt", "tuned.md"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    return tmp_path / "tuned.pt"


# --- a whole run ----------------------------------------------------------------------------------


def test_the_record_is_in_the_checkpoint_and_on_stdout(finished):
    folder, result = finished
    document = json.loads(result.stdout)
    network, report = load_checkpoint(folder / "tuned.pt")
    assert document["path"] == str(folder / "tuned.pt")
    assert document["card"] == str(folder / "tuned.md")
    assert document["training"] == report.training
    assert report.schema.class_names == SCHEMA.class_names
    assert network.config == CONFIG
    training = report.training
    assert training["training_images"] == ["a_0", "a_1"]
    assert training["validation_images"] == ["b_0"]
    assert training["data"]["training_tiles"] == 6
    assert sum(training["data"]["training_pixels"]) == 128 * 192
    assert sum(training["data"]["validation_pixels"]) == 64 * 100
    assert training["run"]["epochs_done"] == 2
    assert [row["epoch"] for row in training["run"]["history"]] == [1, 2]
    assert training["recipe"]["learning_rate"] == 0.01
    assert training["source"]["file"] == "student.pt"
    assert re.fullmatch("[0-9a-f]{64}", training["source"]["sha256"])


def test_the_encoder_is_the_one_it_came_from(finished, encoder):
    ours, _ = load_encoder(finished[0] / "tuned.pt")
    theirs, _ = load_encoder(encoder, heads=2)
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_evaluate_gives_exactly_the_score_of_the_card(finished, data):
    folder, _ = finished
    checkpoint = folder / "tuned.pt"
    scores = next(iter(load_checkpoint(checkpoint)[1].training["scores"].values()))
    result = run("evaluate", checkpoint, "--data", data, "--scenes", "b", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    judged = json.loads(result.stdout)
    assert judged["mean_iou"] == scores["mean_iou"]
    assert judged["overall_accuracy"] == scores["overall_accuracy"]
    assert judged["mean_f1"] == scores["mean_f1"]
    assert {row["name"]: row["iou"] for row in judged["classes"]} == scores["iou"]
    assert f"| {100 * scores['mean_iou']:.1f} |" in (folder / "tuned.md").read_text(encoding="utf-8")


def test_the_checkpoint_becomes_a_graph_with_the_same_scores(tuned, data, tmp_path):
    result = run("export", tuned, "-o", tmp_path / "tuned.onnx", "--no-fp16")
    assert result.exit_code == 0, result.stderr
    scores = []
    for subject in (tuned, tmp_path / "tuned.onnx"):
        result = run("evaluate", subject, "--data", data, "--scenes", "b", "--json")
        assert result.exit_code == 0, result.stderr
        scores.append(json.loads(result.stdout)["mean_iou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # a pixel between two classes may fall either way


def test_evaluating_on_what_was_trained_on_is_pointed_out(finished, data):
    result = run("evaluate", finished[0] / "tuned.pt", "--data", data, "--scenes", "a", "--json")
    assert any("that the network was trained on" in note for note in json.loads(result.stdout)["notes"])


def test_the_card_says_what_one_needs_to_know(finished):
    text = (finished[0] / "tuned.md").read_text(encoding="utf-8")
    assert text.startswith("# `tuned.pt`\n")
    for part in (
        "64 px tiles, patch 8, 4 blocks of width 32",
        "building, land, road, vegetation, water",
        "nearest mean",
        "colour histogram",
        "split: validation by scene b",
        "| training | 2 | 6 | a |",
        "from `student.pt` (Mask-CDKD student, SHA-256 `",
        "- learning_rate: 0.01\n",
        "| epoch | loss | validation mIoU |",
    ):
        assert part in text
    assert "not finished" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_progress_is_on_stderr_one_line_an_epoch_with_the_time_left(finished):
    lines = finished[1].stderr.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"epoch 1/2  loss \d\.\d{3,}  validation mIoU \d+\.\d\d % \(best \S+ %\)  [\d.]+ (ms|s|min).* left", lines[0]
    )
    assert re.fullmatch(r"epoch 2/2  loss \d\.\d{3,}  validation mIoU \S+ % \(best \S+ %\)", lines[1])


def test_a_long_line_of_progress_stays_one_line(capsys):
    """Logs are read by programs, too."""
    with live_training(TrainingLines) as listener:
        listener.epoch({"epoch": 100, "loss": 10.12345, "mean_iou": 1.0}, 1000, 1.0, 123_456.0)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_else_is_left_behind(finished):
    assert sorted(path.name for path in finished[0].iterdir()) == ["tuned.features", "tuned.md", "tuned.pt"]
    assert not [name for name in names_in(finished[0]) if name.endswith(".part") or "/." in name]


def test_the_same_seed_gives_the_same_weights(finished, data, encoder, tmp_path):
    again = tune(encoder, data, tmp_path / "again.pt", *HEADS)
    tune(encoder, data, tmp_path / "other.pt", *HEADS, "--seed", 1, "--epochs", 1)
    assert identical(finished[0] / "tuned.pt", tmp_path / "again.pt")
    assert not identical(finished[0] / "tuned.pt", tmp_path / "other.pt")
    assert again["training"]["scores"] == json.loads(finished[1].stdout)["training"]["scores"]


def test_features_are_shared_by_runs(data, encoder, tmp_path):
    """Other epochs, another learning rate, other classes: the encoder has seen the tiles already."""
    shared = ("--features", tmp_path / "shared", "--views", 1)
    first = tune(encoder, data, tmp_path / "one.pt", *HEADS, *shared)["training"]["run"]["tiles_encoded"]
    second = tune(encoder, data, tmp_path / "two.pt", *HEADS, *shared, "--lr", 0.002)["training"]["run"]
    assert first == 6 + 2  # places, and tiles of the validation image
    assert second["tiles_encoded"] == 0
    assert not (tmp_path / "one.features").exists()
    third = tune(encoder, data, tmp_path / "three.pt", *HEADS, "--views", 1, "--no-remember")["training"]["run"]
    assert third["tiles_encoded"] == 2 * first
    assert not (tmp_path / "three.features").exists()


# --- what it starts from --------------------------------------------------------------------------


def foundation(make_weights, *, scale, patch, side, dim=128):
    """A ViT with class token, final norm and, like DINOv2's, LayerScale and a mask token."""
    config = NetworkConfig(
        tile=patch * side, patch=patch, embed_dim=dim, depth=4, heads=2, mlp_dim=64, classes=5, head_channels=16,
        class_token=True,
    )  # fmt: skip
    state = student(make_weights(config))
    state["norm.weight"], state["norm.bias"] = torch.ones(dim), torch.zeros(dim)
    if scale:
        state["mask_token"] = torch.zeros(1, dim)
        for block in range(4):
            for layer in (1, 2):
                state[f"blocks.{block}.ls{layer}.gamma"] = torch.full((dim,), 0.5)
    return state


@pytest.mark.parametrize(
    ("scale", "patch", "more", "expected"),
    [
        (False, 8, (), (64, 8)),
        (True, 14, ("--tile", 112), (112, 14)),
        (True, 14, ("--tile", 96), (96, 16)),
        (True, 14, ("--patch", 8), (64, 8)),
    ],
    ids=["timm", "DINOv2", "DINOv2, a tile for other patches", "DINOv2, other patches"],
)
def test_other_encoders_become_checkpoints(tmp_path, data, make_weights, scale, patch, more, expected):
    torch.save(foundation(make_weights, scale=scale, patch=patch, side=7), tmp_path / "vit.pth")
    document = tune(tmp_path / "vit.pth", data, tmp_path / "out.safetensors", *more, "--epochs", 1, "--views", 1)
    network, report = load_checkpoint(tmp_path / "out.safetensors")
    assert (network.config.tile, network.config.patch) == expected
    assert network.config.class_token
    notes = " ".join(document["training"]["notes"])
    assert ("LayerScale folded into 8 linear layers" in notes) == scale
    assert (f"patch embedding resampled from 14 to {expected[1]} px" in notes) == (expected[1] != patch)
    assert "position embedding resampled (bicubic)" in notes
    assert document["training"]["source"]["layout"] == ("DINOv2" if scale else "timm ViT")
    result = run("evaluate", tmp_path / "out.safetensors", "--data", data, "--scenes", "b", "--json")
    assert json.loads(result.stdout)["mean_iou"] == next(iter(report.training["scores"].values()))["mean_iou"]
    result = run("export", tmp_path / "out.safetensors", "-o", tmp_path / "out.onnx", "--no-fp16")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(("old", "new"), [(14, 16), (8, 12), (4, 32)])
def test_an_enlarged_patch_has_the_token_it_had(old, new):
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(6, 3, old, old, generator=generator, dtype=torch.float64)
    patches = torch.randn(9, 3, old, old, generator=generator, dtype=torch.float64)
    larger = torch.nn.functional.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    before = torch.einsum("dchw,nchw->nd", kernel, patches)
    after = torch.einsum("dchw,nchw->nd", resample_patches(kernel, new), larger)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_resampling_to_the_same_size_changes_nothing():
    kernel, position = torch.randn(4, 3, 8, 8), torch.randn(1, 50, 4)
    torch.testing.assert_close(resample_patches(kernel, 8), kernel)
    torch.testing.assert_close(resample_position(position, 7, class_token=True), position)


def test_a_smaller_patch_keeps_the_token_of_a_flat_color():
    """Of a kernel that is smooth, as trained ones are; what is finer than the new patch is lost."""
    coarse = torch.rand(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = torch.nn.functional.interpolate(coarse, size=(14, 14), mode="bicubic")
    small = resample_patches(kernel, 8)
    assert small.shape == (4, 3, 8, 8)
    torch.testing.assert_close(small.sum(dim=(2, 3)), kernel.sum(dim=(2, 3)), rtol=0.01, atol=0)


def test_a_checkpoint_keeps_its_head(tuned, data, tmp_path):
    document = tune(tuned, data, tmp_path / "more.pt", "--lr", 1e-6, "--epochs", 1)
    assert not any("head was replaced" in note for note in document["training"]["notes"])
    before, after = weights_of(tuned), weights_of(tmp_path / "more.pt")
    key = "head.classifier.weight"
    assert not torch.equal(before[key], after[key])
    torch.testing.assert_close(before[key], after[key], atol=1e-5, rtol=0)  # two steps of a millionth
    assert document["training"]["source"]["layout"] == "cdkd-edge"


def test_a_checkpoint_knows_its_classes_and_tile(tuned, data, tmp_path):
    split = ("--val-scenes", "b")
    small = ("--device", "cpu", "--epochs", 1, "--batch", 6, "--views", 1)
    result = run("finetune", tuned, "--data", data, "-o", tmp_path / "more.pt", *small, *split)
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(tmp_path / "more.pt")[0].config == CONFIG


@pytest.mark.parametrize("why", ["asked", "classes", "names"])
def test_a_head_that_does_not_fit_is_replaced_and_said_so(tuned, data, tmp_path, why):
    lines = ['name = "other"', "ignore_colors = [[0, 0, 0]]"]
    for index, cls in enumerate(SCHEMA.classes):
        name = f"kind {index}" if why == "names" else cls.name
        lines += ["[[classes]]", f'name = "{name}"', f"color = {list(cls.color)}"]
    if why == "classes":
        lines += ["[[classes]]", 'name = "sixth"', "color = [1, 1, 1]"]
    (tmp_path / "other.toml").write_text("\n".join(lines), encoding="utf-8")
    split = ("--schema", tmp_path / "other.toml", "--val-scenes", "b")
    more = ("--new-head",) if why == "asked" else ()
    document = tune(tuned, data, tmp_path / "more.pt", "--lr", 1e-6, "--epochs", 1, *more, split=split)
    (note,) = [note for note in document["training"]["notes"] if "head was replaced" in note]
    assert {"asked": "as asked", "classes": "5 classes, the data 6", "names": "building, land"}[why] in note
    network, _ = load_checkpoint(tmp_path / "more.pt")
    assert network.config.classes == (6 if why == "classes" else 5)
    before = weights_of(tuned)["head.fuse.conv.weight"]
    assert (network.state_dict()["head.fuse.conv.weight"] - before).abs().max() > 1e-3


def test_a_random_encoder_that_is_frozen_is_pointed_out_at_once(data, tmp_path):
    result = run("finetune", "preset:tiny", "--data", data, "-o", tmp_path / "a.pt", *SMALL, "--epochs", 1, *SPLIT)
    assert result.exit_code == 0, result.stderr
    assert "note: the encoder has random weights and is frozen" in result.stderr.splitlines()[0]
    assert "--encoder-lr" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_a_preset_starts_from_nothing(data, tmp_path):
    more = ("--encoder-lr", 1e-3, "--epochs", 1, "--views", 0)
    document = tune("preset:tiny", data, tmp_path / "scratch.pt", *more)
    assert document["training"]["source"] == {
        "file": "preset:tiny",
        "sha256": "",
        "layout": "preset tiny, random weights",
    }
    assert document["training"]["run"]["tiles_encoded"] == 0
    assert not any("random weights and is frozen" in note for note in document["training"]["notes"])
    assert not (tmp_path / "scratch.features").exists()
    assert load_checkpoint(tmp_path / "scratch.pt")[0].config.tile == 64


@pytest.mark.parametrize("source", ["encoder", "checkpoint", "preset"])
def test_a_new_head_has_the_channels_that_were_asked_for(data, encoder, tuned, tmp_path, source):
    start = {"encoder": encoder, "checkpoint": tuned, "preset": "preset:tiny"}[source]
    more = {"encoder": HEADS, "checkpoint": ("--new-head",), "preset": HEADS}[source]
    tune(start, data, tmp_path / "out.pt", *more, "--head-channels", 8, "--epochs", 1, "--views", 1)
    assert load_checkpoint(tmp_path / "out.pt")[0].config.head_channels == 8


@pytest.mark.parametrize(("source", "expected"), [("encoder", 256), ("checkpoint", 16), ("preset:tiny", 64)])
def test_channels_of_a_new_head_by_default(encoder, tuned, source, expected):
    start = {"encoder": encoder, "checkpoint": tuned}.get(source, source)
    heads = 2 if source == "encoder" else None
    network = starting_network(start, SCHEMA, NetworkSettings(tile=64, heads=heads, new_head=True), seed=0).network
    assert network.config.head_channels == network.head.classifier.in_channels == expected


def test_a_distilled_encoder_keeps_its_tile_and_one_of_others_gets_the_papers(encoder, tmp_path):
    theirs, report = load_encoder(encoder, heads=2)
    save_checkpoint(theirs, tmp_path / "distilled.pt")
    for source, tile in ((encoder, 1024), (tmp_path / "distilled.pt", report.config.tile)):
        start = starting_network(source, SCHEMA, NetworkSettings(heads=2, head_channels=8), seed=0)
        assert start.network.config.tile == tile


def test_half_stores_half(data, encoder, tmp_path, finished):
    document = tune(encoder, data, tmp_path / "half.pt", *HEADS, "--half")
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (finished[0] / "tuned.pt").stat().st_size
    for one, other in zip(
        weights_of(tmp_path / "half.pt").values(), weights_of(finished[0] / "tuned.pt").values(), strict=True
    ):
        assert torch.equal(one, other.half().float()) or one.dtype == torch.int64
    result = run("evaluate", tmp_path / "half.pt", "--data", data, "--scenes", "b", "--json")
    scores = next(iter(document["training"]["scores"].values()))
    assert json.loads(result.stdout)["mean_iou"] == scores["mean_iou"]


def test_features_that_are_no_numbers_end_the_run(data, tmp_path, make_weights):
    weights = make_weights(CONFIG)
    weights["encoder.blocks.3.mlp.fc2.bias"] = np.full(32, 1e38, np.float32)
    torch.save(student(weights), tmp_path / "loud.pt")
    result = run("finetune", tmp_path / "loud.pt", "--data", data, "-o", tmp_path / "out.pt", *SMALL, *SPLIT, *HEADS)
    assert_answer(result, 8, "the loss is nan at step 0 — lower the learning rate")
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "out.state.pt").exists()


def test_other_precision_and_stretch_score_what_the_record_says(data, encoder, tmp_path):
    """Training computes in bfloat16; the checkpoint is judged as anybody would judge it."""
    document = tune(encoder, data, tmp_path / "out.pt", *HEADS, "--precision", "bf16", "--stretch")
    scores = next(iter(document["training"]["scores"].values()))
    result = run("evaluate", tmp_path / "out.pt", "--data", data, "--scenes", "b", "--stretch", "--json")
    assert json.loads(result.stdout)["mean_iou"] == scores["mean_iou"]


# --- the data -------------------------------------------------------------------------------------


def test_a_split_by_lists(data, encoder, tmp_path):
    (tmp_path / "val.txt").write_text("a_1.png  # the small one\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("images/a_0.png\n", encoding="utf-8")
    split = ("--schema", "dubai", "--train-list", tmp_path / "train.txt", "--val-list", tmp_path / "val.txt")
    training = tune(encoder, data, tmp_path / "out.pt", *HEADS, "--epochs", 1, split=split)["training"]
    assert (training["training_images"], training["validation_images"]) == (["a_0"], ["a_1"])
    assert training["data"]["rule"] == "training by list train.txt; validation by list val.txt"
    assert any("share the scene a" in note for note in training["notes"])


def test_a_pipe_is_no_number_in_the_card(monkeypatch):
    typed = ["cdkd-edge", "finetune", "--val-list", "/dev/fd/63", "--train-list=/proc/self/fd/7", "-o", "/dev/fdx.pt"]
    monkeypatch.setattr(sys, "argv", typed)
    assert command_line() == "cdkd-edge finetune --val-list LIST --train-list=LIST -o /dev/fdx.pt"


def test_classes_that_do_not_occur_are_named_and_have_no_score(encoder, tmp_path):
    """Water is nowhere in training, vegetation nowhere in validation nor in what is predicted there."""
    write_pair(tmp_path / "data", "a_0", blocks(128, 64, classes=4))
    write_pair(tmp_path / "data", "b_0", np.where(blocks(64, 64, classes=3, seed=1) == 0, 4, 1).astype(np.uint8))
    document = tune(encoder, tmp_path / "data", tmp_path / "out.pt", *HEADS, "--class-weights", "balanced")
    notes = document["training"]["notes"]
    assert "no training pixel is water" in notes
    assert "no validation pixel is building, road, vegetation" in notes
    card = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "no training pixel is water" in card
    (row,) = [line for line in card.splitlines() if line.startswith("| nearest mean |")]
    scores = document["training"]["scores"]["nearest mean"]["iou"]
    assert [cell.strip() for cell in row.split("|")[2:7]] == [
        "–" if value is None else f"{100 * value:.1f}" for value in scores.values()
    ]
    assert "–" in row


def nothing_labelled(folder):
    write_pair(folder, "b_0", np.full((64, 100), NO_LABEL, np.uint8))


def wrong_color(folder):
    mask = np.array(Image.open(folder / "masks" / "b_0.png"))
    mask[3, 4] = 9, 8, 7
    Image.fromarray(mask).save(folder / "masks" / "b_0.png")


def wrong_size(folder):
    write_pair(folder, "other", blocks(64, 90))
    (folder / "images" / "other.png").replace(folder / "images" / "b_0.png")
    (folder / "masks" / "other.png").unlink()


def not_an_image(folder):
    (folder / "images" / "b_0.png").write_bytes(b"no")


def no_mask(folder):
    (folder / "masks" / "b_0.png").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "pattern"),
    [
        (nothing_labelled, 13, "no pixel of the 1 validation masks has a label"),
        (wrong_color, 4, r"b_0\.png holds the color \(9, 8, 7\)"),
        (wrong_size, 13, r"b_0\.png is 90 x 64 px, its mask b_0\.png 100 x 64"),
        (not_an_image, 13, r"b_0\.png"),
        (no_mask, 13, "have no mask"),
    ],
)
def test_bad_validation_data_is_found_before_training(encoder, tmp_path, monkeypatch, damage, code, pattern):
    data = write_dataset(tmp_path / "data", {"a_0": (64, 64), "b_0": (64, 100)})
    damage(data)
    monkeypatch.setattr(module.Trainer, "run_epoch", None)
    result = run("finetune", encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *SPLIT, *HEADS)
    assert_answer(result, code, pattern)
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "out.md").exists()


@pytest.mark.parametrize(
    ("options", "code", "pattern"),
    [
        (("--val-scenes", "b"), 4, "nothing says how the masks .* encode classes"),
        (("--schema", "dubai"), 13, "no split into training and validation"),
        (("--schema", "dubai", "--val-scenes", "c"), 13, "has no scene c"),
        (("--schema", "dubai", "--val-scenes", "a,b"), 13, "leaves nothing for training"),
        (("--schema", "dubai", "--val-scenes", "b", "--train-scenes", "a,b"), 13, "in training and in validation"),
        (("--schema", "dubai", "--val-list", "gone.txt"), 13, "list gone.txt cannot be read"),
        (("--schema", "loveda", "--val-scenes", "b"), 4, "holds the color"),
        (("--schema", "mars", "--val-scenes", "b"), 4, "unknown label schema 'mars'"),
    ],
    ids=str,
)
def test_data_that_cannot_be_used(data, encoder, tmp_path, options, code, pattern):
    result = run("finetune", encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *HEADS, *options)
    assert_answer(result, code, pattern)
    assert not (tmp_path / "out.pt").exists()


# --- numbers that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--batch", 1), "--batch must be at least 2: .* got 1"),
        (("--epochs", 0), "--epochs must be .*, got 0"),
        (("--epochs", -3), "--epochs must be .*, got -3"),
        (("--lr", 0), "--lr must be .*, got 0"),
        (("--lr", -0.1), "--lr must be .*, got -0.1"),
        (("--lr", "nan"), "--lr must be .*, got nan"),
        (("--lr", "fast"), "--lr"),
        (("--weight-decay", -1), "--weight-decay"),
        (("--encoder-lr", -1e-5), "--encoder-lr"),
        (("--warm-up", -1), "--warm-up"),
        (("--mean-decay", 1), "--mean-decay"),
        (("--views", -1), "--views"),
        (("--seed", 1 << 64), "--seed"),
        (("--schedule", "linear"), "--schedule must be .*, got linear"),
        (("--precision", "int8"), "--precision must be .*, got int8"),
        (("--scale", 2, 0.5), "--scale"),
        (("--scale", 0, 1), "--scale"),
        (("--light", 2), "--light"),
        (("--class-weights", "1,2"), "--class-weights 1,2"),
        (("--class-weights", "heavy"), "--class-weights heavy"),
        (("--validate-every", 0), "--validate-every"),
        (("--views", 0, "--remember"), "nothing to remember"),
        (("--encoder-lr", 1e-5, "--remember"), "nothing to remember"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used"),
        (("--output", "out.onnx"), r"out\.onnx has no suffix of a checkpoint"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line(data, encoder, tmp_path, options, pattern):
    arguments = ["finetune", encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *SPLIT, *HEADS, *options]
    assert_answer(run(*arguments), 2, pattern)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("source", "options", "pattern"),
    [
        ("gone.pt", (), "gone.pt does not exist"),
        ("preset:huge", (), "there is no preset 'huge'"),
        (None, (), "state it with --heads"),
        (None, ("--heads", 5), "embed_dim .* is not divisible by heads 5"),
        (None, (*HEADS, "--tile", 60), "a tile of 60 px is a multiple of neither"),
        (None, (*HEADS, "--tile", 32), "pool_scales .* must be 1 to"),
        (None, (*HEADS, "--patch", 7), "multiple"),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_used(data, encoder, tmp_path, source, options, pattern):
    result = run("finetune", source or encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *SPLIT, *options)
    assert_answer(result, 3, pattern)


def test_heads_that_are_given_are_not_asked_for(data, encoder, tmp_path):
    result = run(
        "finetune", encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *HEADS, "--val-scenes", "b"
    )  # fmt: skip
    assert_answer(result, 4, "nothing says how the masks")


# --- files in the way -----------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tuned, data, encoder):
    before = tuned.read_bytes(), tuned.with_suffix(".md").read_bytes()
    arguments = ("finetune", encoder, "--data", data, "-o", tuned, *SMALL, *SPLIT, *HEADS)
    assert_answer(run(*arguments), 2, r"tuned\.pt exists")
    assert_answer(run(*arguments, "--resume"), 2, "is finished; there is nothing to resume")
    assert before == (tuned.read_bytes(), tuned.with_suffix(".md").read_bytes())
    tuned.unlink()
    assert_answer(run(*arguments), 2, r"tuned\.md exists")


def test_overwriting_when_asked(tuned, data, encoder):
    before = tuned.read_bytes()
    tune(encoder, data, tuned, *HEADS, "--overwrite", "--seed", 3, "--epochs", 1)
    assert tuned.read_bytes() != before
    assert load_checkpoint(tuned)[1].training["recipe"]["seed"] == 3


def test_a_folder_is_not_overwritten(data, encoder, tmp_path, monkeypatch):
    (tmp_path / "out.pt").mkdir()
    monkeypatch.setattr(module.Trainer, "run_epoch", None)
    arguments = ("finetune", encoder, "--data", data, "-o", tmp_path / "out.pt", *SMALL, *SPLIT, *HEADS)
    assert_answer(run(*arguments, "--overwrite"), 2, r"out\.pt is a folder")


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_a_checkpoint_is_never_written_over_its_source(tuned, data, more, tmp_path):
    before = tuned.read_bytes()
    (tmp_path / "link.pt").symlink_to(tuned)
    for output in (tuned, tmp_path / "link.pt"):
        result = run("finetune", tuned, "--data", data, "-o", output, *SMALL, *SPLIT, *more)
        assert_answer(result, 2, "is a checkpoint that training reads")
    assert tuned.read_bytes() == before


# --- runs that are cut off ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from cdkd_edge import cli
from cdkd_edge.training import finetune

finetune._SAVE_STATE_EVERY_S = 0.0
after_batch, cut = finetune._Tuning._after_batch, int(sys.argv.pop(1))

def die(run):
    after_batch(run)
    if run.trainer.progress.step == cut:
        os.kill(os.getpid(), signal.SIGKILL)

finetune._Tuning._after_batch = die
cli.app()
"""


def test_a_run_that_was_killed_goes_on_and_ends_as_it_would_have(finished, data, encoder, tmp_path):
    output = tmp_path / "tuned.pt"
    arguments = ["finetune", encoder, "--data", data, "-o", output, *SMALL, *SPLIT, *HEADS]
    root = str(Path(cli.__file__).parents[2])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "3", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "tuned.state.pt").exists()
    assert load_checkpoint(output)[1].training["run"]["epochs_done"] == 1
    assert "**Training is not finished: epoch 1 so far.**" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert_answer(run(*arguments), 2, r"tuned\.state\.pt holds an unfinished run — continue it with --resume")
    document = tune(encoder, data, output, *HEADS, "--resume")
    assert identical(output, finished[0] / "tuned.pt")
    assert document["training"]["scores"] == json.loads(finished[1].stdout)["training"]["scores"]
    assert [row["loss"] for row in document["training"]["run"]["history"]] == [
        row["loss"] for row in json.loads(finished[1].stdout)["training"]["run"]["history"]
    ]
    assert not (tmp_path / "tuned.state.pt").exists()
    assert "not finished" not in output.with_suffix(".md").read_text(encoding="utf-8")


def interrupt(monkeypatch, step):
    """Ctrl-C after a step; states are saved after each."""
    real = module._Tuning._after_batch

    def after_batch(self):
        real(self)
        if self.trainer.progress.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "_SAVE_STATE_EVERY_S", 0.0)
    monkeypatch.setattr(module._Tuning, "_after_batch", after_batch)


@pytest.fixture(scope="module")
def cut_once(data, encoder, tmp_path_factory):
    """What Ctrl-C in the second epoch left behind."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3)
        result = run("finetune", encoder, "--data", data, "-o", folder / "tuned.pt", *SMALL, *SPLIT, *HEADS)
    assert result.exit_code == 130, (result.stderr, result.exception)
    return folder


@pytest.fixture
def cut(cut_once, data, encoder, tmp_path):
    """A copy of that, and the arguments of the run."""
    folder = tmp_path / "cut"
    shutil.copytree(cut_once, folder)
    return folder, ["finetune", encoder, "--data", data, "-o", folder / "tuned.pt", *SMALL, *SPLIT, *HEADS]


def test_an_interruption_says_what_is_kept_and_how_to_go_on(data, encoder, tmp_path, monkeypatch):
    arguments = ["finetune", encoder, "--data", data, "-o", tmp_path / "tuned.pt", *SMALL, *SPLIT, *HEADS]
    with monkeypatch.context() as patch:
        patch.setattr(module, "starting_network", lambda *_: signal.raise_signal(signal.SIGINT))
        result = run(*arguments)
    assert (result.exit_code, "there is nothing to resume yet" in result.stderr) == (130, True)
    interrupt(monkeypatch, 3)
    result = run(*arguments)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("interrupted; ")]
    assert f"the run is kept in {tmp_path / 'tuned.state.pt'}, its best so far in {tmp_path / 'tuned.pt'}" in line
    assert "with --resume continues it" in line


def test_ctrl_c_leaves_a_state_to_resume_and_no_half_file(cut, finished):
    folder, arguments = cut
    assert sorted(path.name for path in folder.iterdir()) == [
        "tuned.features", "tuned.md", "tuned.pt", "tuned.state.pt",
    ]  # fmt: skip
    assert not [name for name in names_in(folder) if name.endswith(".part") or "/." in name]
    assert run(*arguments, "--resume").exit_code == 0
    assert identical(folder / "tuned.pt", finished[0] / "tuned.pt")


def test_ctrl_c_in_the_first_epoch(data, encoder, tmp_path, finished, monkeypatch):
    arguments = ["finetune", encoder, "--data", data, "-o", tmp_path / "tuned.pt", *SMALL, *SPLIT, *HEADS]
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert run(*arguments).exit_code == 130
    assert not (tmp_path / "tuned.pt").exists()
    assert run(*arguments, "--resume").exit_code == 0
    assert identical(tmp_path / "tuned.pt", finished[0] / "tuned.pt")


def test_ctrl_c_right_after_a_checkpoint_was_written(data, encoder, tmp_path, finished, monkeypatch):
    """A checkpoint of an unfinished run never lies there without its state, or it would pass for finished."""
    arguments = ["finetune", encoder, "--data", data, "-o", tmp_path / "tuned.pt", *SMALL, *SPLIT, *HEADS]
    real = module._Tuning._write

    def write(self, network, record):
        real(self, network, record)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module._Tuning, "_write", write)
        assert run(*arguments).exit_code == 130
    assert (tmp_path / "tuned.pt").exists()
    result = run(*arguments, "--resume", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert identical(tmp_path / "tuned.pt", finished[0] / "tuned.pt")
    history, expected = (json.loads(text)["training"]["run"]["history"] for text in (result.stdout, finished[1].stdout))
    assert history == expected


def test_ctrl_c_after_training_leaves_only_the_judging(data, encoder, tmp_path, finished, monkeypatch):
    arguments = ["finetune", encoder, "--data", data, "-o", tmp_path / "tuned.pt", *SMALL, *SPLIT, *HEADS]

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_color_rules", interrupted)
        assert run(*arguments).exit_code == 130
    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "run_epoch", None)
        result = run(*arguments, "--resume")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert identical(tmp_path / "tuned.pt", finished[0] / "tuned.pt")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--lr", 0.02), r"other recipe: learning_rate was 0\.01, now 0\.02"),
        (("--epochs", 3), "other recipe: epochs was 2, now 3"),
        (("--light", 0.5), "other recipe: augmentation"),
        (("--head-channels", 8), "other network: head_channels was 16, now 8"),
        (("--train-list", "LIST"), "other training images, labelled pixels: 2 then, 1 now"),
        (("--bands", "3,2,1"), "other reading"),
    ],
    ids=str,
)
def test_a_state_is_not_resumed_with_other_options(cut, data, options, pattern):
    folder, arguments = cut
    (folder / "list.txt").write_text("a_0\n", encoding="utf-8")
    options = [str(folder / "list.txt") if option == "LIST" else option for option in options]
    before = (folder / "tuned.state.pt").read_bytes()
    assert_answer(run(*arguments, *options, "--resume"), 2, pattern)
    assert (folder / "tuned.state.pt").read_bytes() == before


def test_a_state_is_not_resumed_from_another_encoder(cut, make_weights):
    folder, arguments = cut
    torch.save(student(make_weights(CONFIG, seed=9)), folder / "other.pt")
    arguments[1] = folder / "other.pt"
    assert_answer(run(*arguments, "--resume"), 2, "other source")


@pytest.mark.parametrize("content", [b"", b"not a state", None], ids=["empty", "text", "half"])
def test_a_damaged_state_is_refused(cut, content):
    folder, arguments = cut
    state = folder / "tuned.state.pt"
    state.write_bytes(state.read_bytes()[:5000] if content is None else content)
    assert_answer(run(*arguments, "--resume"), 3, "cannot be read.*start again with --overwrite")


def test_overwriting_an_unfinished_run_starts_again(cut, finished):
    folder, arguments = cut
    result = run(*arguments, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert identical(folder / "tuned.pt", finished[0] / "tuned.pt")
    assert not (folder / "tuned.state.pt").exists()


@pytest.mark.parametrize("wrong", [("--data", "gone"), ("--class-weights", "1,2"), ("--heads", 5)], ids=str)
def test_a_mistake_does_not_cost_the_state(cut, wrong):
    """--overwrite means to replace what lies there, once there is something to replace it with."""
    folder, arguments = cut
    before = {name: (folder / name).read_bytes() for name in ("tuned.pt", "tuned.md", "tuned.state.pt")}
    assert run(*arguments, "--overwrite", *wrong).exit_code in (2, 3, 13)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_resuming_where_there_is_nothing_starts(data, encoder, tmp_path, finished):
    tune(encoder, data, tmp_path / "tuned.pt", *HEADS, "--resume")
    assert identical(tmp_path / "tuned.pt", finished[0] / "tuned.pt")


# --- which weights are kept -----------------------------------------------------------------------


def test_the_best_epoch_is_kept_and_the_last_is_told(data, encoder, tmp_path, monkeypatch):
    """Scores fall after the first epoch, so the first one's weights stay."""
    scores = iter([0.5, 0.25, 0.125])
    real = module.scores_of

    def falling(*arguments):
        score = next(scores, None)
        return real(*arguments) | ({} if score is None else {"mean_iou": score})

    monkeypatch.setattr(module, "scores_of", falling)
    training = tune(encoder, data, tmp_path / "out.pt", *HEADS, "--epochs", 3)["training"]
    monkeypatch.undo()
    tune(encoder, data, tmp_path / "one.pt", *HEADS, "--epochs", 1)
    assert identical(tmp_path / "out.pt", tmp_path / "one.pt")
    assert training["run"]["best_epoch"] == 1
    assert list(training["scores"])[:2] == ["this checkpoint (epoch 1)", "epoch 3, the last"]
    assert training["scores"]["epoch 3, the last"]["mean_iou"] == 0.125


def test_validating_less_often(data, encoder, tmp_path):
    training = tune(encoder, data, tmp_path / "out.pt", *HEADS, "--epochs", 3, "--validate-every", 2)["training"]
    assert [row["mean_iou"] is None for row in training["run"]["history"]] == [True, False, False]
    rows = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()[-3:]
    assert rows[0].endswith("| – |")
