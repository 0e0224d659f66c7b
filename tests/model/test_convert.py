"""Other attention with the same weights: what the network then computes, and what `convert` writes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from commands import assert_answer, run  # noqa: E402
from reference import reference_features, reference_logits  # noqa: E402

from cdkd_edge.core.errors import CheckpointError  # noqa: E402
from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint  # noqa: E402
from cdkd_edge.model.config import PRESETS, NetworkConfig, attention_of  # noqa: E402
from cdkd_edge.model.network import Encoder, SegmentationNetwork  # noqa: E402

pytestmark = pytest.mark.needs_torch

CONFIG = NetworkConfig(tile=64, patch=8, embed_dim=32, depth=4, heads=2, mlp_dim=64, classes=5, head_channels=16)
KINDS = {
    "window4/global": ("global", "global", "global", "global"),  # four blocks: each feeds the head
    "window4": ("window 4",) * 4,
    "pooled2": ("pooled 2",) * 4,
    "window4/pooled2@1,3": ("window 4", "pooled 2", "window 4", "pooled 2"),
    "window4,window 2,pooled4,global": ("window 4", "window 2", "pooled 4", "global"),
}


def stored(folder, weights, config=CONFIG, name="ckpt.pt", **header):
    """A checkpoint in our layout."""
    network = SegmentationNetwork(config)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)
    save_checkpoint(network, folder / name, **header)
    return folder / name


@pytest.fixture
def weights(make_weights):
    return make_weights(CONFIG)


@pytest.mark.parametrize("text", KINDS)
def test_converted_networks_compute_what_an_independent_one_computes(tmp_path, weights, small_tiles, text):
    converted = tmp_path / "converted.pt"
    result = run("convert", stored(tmp_path, weights), "--attention", text, "-o", converted)
    assert result.exit_code == 0, result.stderr
    network, report = load_checkpoint(converted)
    assert (report.config.attention or ("global",) * 4) == KINDS[text]
    kinds = {"heads": 2, "eps": CONFIG.layer_norm_eps, "attention": KINDS[text]}
    with torch.inference_mode():
        tiles = torch.from_numpy(small_tiles[:2])
        maps, logits = network.encoder(tiles), network(tiles)
    for ours, expected in zip(maps, reference_features(weights, small_tiles[:2], **kinds), strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(logits.numpy(), reference_logits(weights, small_tiles[:2], **kinds), atol=2e-4)
    # Attention matters here: with global attention the logits are others.
    if set(KINDS[text]) != {"global"}:
        plain = reference_logits(weights, small_tiles[:2], **{**kinds, "attention": ()})
        assert np.abs(logits.numpy() - plain).max() > 0.02


def test_weights_schema_notes_and_head_are_kept(tmp_path, weights):
    schema = load_schema("dubai")
    source = stored(tmp_path, weights, schema=schema, training={"tool": "someone's", "epochs": 3})
    found = json.loads(
        run("convert", source, "--attention", "window4/pooled2", "-o", tmp_path / "a.safetensors", "--json").stdout
    )
    assert found["attention"] == ["pooled 2"] * 4
    assert found["macs"] < found["macs_before"]
    network, report = load_checkpoint(tmp_path / "a.safetensors")
    before, _ = load_checkpoint(source)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.state_dict().items())
    assert report.schema == schema
    assert {key: report.training[key] for key in ("tool", "epochs")} == {"tool": "someone's", "epochs": 3}
    made = report.training["converted"]
    assert made["attention"] == "pooled 2 in every block"
    assert (made["from"]["file"], made["from"]["attention"]) == ("ckpt.pt", "global")


def test_and_back_again(tmp_path, weights):
    source = stored(tmp_path, weights)
    run("convert", source, "--attention", "window4", "-o", tmp_path / "windows.pt")
    run("convert", tmp_path / "windows.pt", "--attention", "global", "-o", tmp_path / "back.pt")
    first, report = load_checkpoint(tmp_path / "back.pt")
    assert report.config == CONFIG
    assert all(
        torch.equal(value, first.state_dict()[key]) for key, value in load_checkpoint(source)[0].state_dict().items()
    )


def test_a_class_token_is_dropped_and_that_is_said(tmp_path, make_weights, small_tiles):
    config = dataclasses.replace(CONFIG, class_token=True)
    weights = make_weights(config)
    source = stored(tmp_path, weights, config)
    result = run("convert", source, "--attention", "window4", "-o", tmp_path / "a.pt")
    assert result.exit_code == 0
    assert "class token dropped" in " ".join(result.stdout.split())
    encoder, report = load_encoder(tmp_path / "a.pt")
    assert not report.config.class_token
    without = {key: value for key, value in weights.items() if key != "encoder.cls_token"}
    without["encoder.pos_embed"] = weights["encoder.pos_embed"][:, 1:]
    expected = reference_features(without, small_tiles[:1], heads=2, eps=1e-5, attention=("window 4",) * 4)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder(torch.from_numpy(small_tiles[:1]))[3].numpy(), expected[3], atol=2e-4)


def test_it_is_dropped_for_global_attention_too(tmp_path, make_weights):
    config = dataclasses.replace(CONFIG, class_token=True)
    source = stored(tmp_path, make_weights(config), config)
    assert run("convert", source, "--attention", "global", "-o", tmp_path / "a.pt").exit_code == 0
    assert load_encoder(tmp_path / "a.pt")[1].config == CONFIG


def test_an_encoder_alone_stays_one(tmp_path, weights):
    encoder = Encoder(CONFIG)
    names = {key.removeprefix("encoder."): torch.from_numpy(value) for key, value in weights.items()}
    encoder.load_state_dict({key: value for key, value in names.items() if not key.startswith("head.")})
    save_checkpoint(encoder, tmp_path / "encoder.pt")
    assert run("convert", tmp_path / "encoder.pt", "--attention", "pooled4", "-o", tmp_path / "a.pt").exit_code == 0
    found, report = load_encoder(tmp_path / "a.pt")
    assert not report.has_head
    assert report.config.attention == ("pooled 4",) * 4
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_another_tile_comes_first(tmp_path, weights):
    """Windows of 12 tokens fit tiles of 96 px and not those of 64 px, which the checkpoint has."""
    source = stored(tmp_path, weights)
    words = ("convert", source, "--attention", "window12", "-o", tmp_path / "a.pt")
    assert_answer(run(*words), 3, r"squares of 12 x 12 tokens do not fit into 8 x 8 tokens.*64 px has 8 x 8 tokens")
    assert run(*words, "--tile", 96).exit_code == 0
    assert load_checkpoint(tmp_path / "a.pt")[1].config.tile == 96


@pytest.mark.parametrize(
    ("text", "message"),
    [("windows4", "is no kind of attention"), ("window4,global", "of 2 blocks; the network has 4"), ("", "no kind")],
)
def test_a_wrong_spec_is_an_error(tmp_path, weights, text, message):
    result = run("convert", stored(tmp_path, weights), "--attention", text, "-o", tmp_path / "a.pt")
    assert_answer(result, 3, message)
    assert not (tmp_path / "a.pt").exists()


def test_nothing_is_overwritten_unasked(tmp_path, weights):
    source = stored(tmp_path, weights)
    (tmp_path / "a.pt").write_text("mine")
    words = ("convert", source, "--attention", "window4", "-o")
    assert_answer(run(*words, tmp_path / "a.pt"), 2, "a.pt exists.*--overwrite")
    assert (tmp_path / "a.pt").read_text() == "mine"
    assert run(*words, tmp_path / "a.pt", "--overwrite").exit_code == 0
    assert_answer(run(*words, source, "--overwrite"), 2, "is a checkpoint that training reads")
    assert_answer(run(*words, tmp_path / "a.onnx"), 2, "has no suffix of a checkpoint")


def test_windows_do_not_outlive_a_tile_that_they_do_not_fit(tmp_path, weights):
    run("convert", stored(tmp_path, weights), "--attention", "window4", "-o", tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_checkpoint(tmp_path / "a.pt", tile=48)


def test_the_fast_preset_is_what_make_makes():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    (text,) = re.findall(r"convert out/dubai\.pt --attention (\S+)", makefile)
    fast = PRESETS["paper-fast"]
    assert fast.attention == attention_of(text, fast.depth, fast.taps)
    assert dataclasses.replace(fast, attention=()) == PRESETS["paper"]
