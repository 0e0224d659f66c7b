"""Checkpoints of every layout become the network they describe; everything else is refused with a reason.

What a checkpoint computes is decided by the NumPy reference, never by this package's own network.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import tarfile
import time
import tracemalloc
import types
import warnings
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from commands import loading_refused  # noqa: E402
from reference import MEAN, STD, reference_features, reference_logits  # noqa: E402

from cdkd_edge.core.errors import CheckpointError, EncoderOnlyError, SchemaError  # noqa: E402
from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint  # noqa: E402
from cdkd_edge.model.config import NetworkConfig  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402
from cdkd_edge.model.resample import resample_position  # noqa: E402

pytestmark = pytest.mark.needs_torch

CONFIG = NetworkConfig(tile=48, patch=8, embed_dim=128, depth=4, heads=2, mlp_dim=96, classes=5, head_channels=8)
OWN_EPS = STUDENT_EPS = 1e-5
TIMM_EPS = OPENMMLAB_EPS = 1e-6
BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def weights(make_weights):
    """The network under its own names, FP32 arrays; tests rename it."""
    return make_weights(CONFIG, seed=1)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(5).integers(0, 256, (1, 3, CONFIG.tile, CONFIG.tile), np.uint8)


# --- other projects' names, written down from those projects ---------------------------------------


def tensors(arrays):
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def student(weights):
    """``student_vit_mae.py``: the encoder without a prefix."""
    return tensors({key[len("encoder.") :]: value for key, value in weights.items() if key.startswith("encoder.")})


def autoencoder(dim=128):
    """The branch of the masked autoencoder that lies beside the student's encoder."""
    state = {
        "mask_token": torch.ones(1, 1, 32),
        "pos_embed_decoder": torch.ones(1, 36, 32),
        "decoder_embed.weight": torch.ones(32, dim),
        "decoder_embed.bias": torch.ones(32),
    }
    for part in BLOCK_PARTS:
        state[f"decoder.blocks.0.{part}.weight"] = torch.ones(32)
    for part in ("norm", "head"):
        state[f"decoder.{part}.weight"] = torch.ones(32)
        state[f"decoder.{part}.bias"] = torch.ones(32)
    return state


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def teacher():
    return {f"teacher.image_encoder.blocks.{i}.attn.qkv.weight": torch.ones(2) for i in range(3)}


MM_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn.attn.in_proj",
    "attn.proj": "attn.attn.out_proj",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}


def openmmlab(weights, *, timm_names):
    """mmsegmentation's ViT (or a timm one inside it) with UPerHead and an auxiliary FCNHead."""
    state = {}
    for key, value in weights.items():
        if key.startswith("encoder.") and timm_names:
            name = "backbone." + key[len("encoder.") :]
        elif match := re.fullmatch(r"encoder\.blocks\.(\d)\.(.+)\.(weight|bias)", key):
            name = f"backbone.layers.{match[1]}.{MM_BLOCK[match[2]]}"
            name += f"_{match[3]}" if match[2] == "attn.qkv" else f".{match[3]}"
        elif key.startswith("encoder."):
            name = "backbone." + key[len("encoder.") :].replace("patch_embed.proj", "patch_embed.projection")
        else:
            name = (
                key.replace("head.pooled.", "decode_head.psp_modules.")
                .replace("head.bottleneck", "decode_head.bottleneck")
                .replace("head.laterals", "decode_head.lateral_convs")
                .replace("head.smooth", "decode_head.fpn_convs")
                .replace("head.fuse", "decode_head.fpn_bottleneck")
                .replace("head.classifier", "decode_head.conv_seg")
            )
            name = re.sub(r"psp_modules\.(\d)\.", r"psp_modules.\1.1.", name)
            if name.endswith("running_var"):
                state[name.replace("running_var", "num_batches_tracked")] = np.array(1000)
        state[name] = value
    state["auxiliary_head.conv_seg.weight"] = np.ones((5, 8, 1, 1), np.float32)
    state["auxiliary_head.convs.0.bn.running_mean"] = np.ones(8, np.float32)
    return tensors(state)


# --- helpers --------------------------------------------------------------------------------------


def exact(network):
    """In FP64, so that the comparison is sharp."""
    network = network.double()
    for module in network.modules():
        if hasattr(module, "mean"):
            module.mean = torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
            module.std = torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
    return network


def assert_computes(network, weights, image, *, heads=CONFIG.heads, eps, atol=1e-8):
    with torch.inference_mode():
        found = exact(network)(torch.from_numpy(image))
    if isinstance(found, list):
        expected = reference_features(weights, image, heads=heads, eps=eps)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, atol=atol)
    else:
        np.testing.assert_allclose(found.numpy(), reference_logits(weights, image, heads=heads, eps=eps), atol=atol)


def saved(path, document):
    torch.save(document, path)
    return path


def refusal(path, load=load_checkpoint, **options):
    return loading_refused(load, path, **options)


# --- this package's own ---------------------------------------------------------------------------


def network_of(weights):
    network = SegmentationNetwork(CONFIG)
    network.load_state_dict(tensors(weights), strict=False)
    return network


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_own_checkpoint_round_trip(tmp_path, weights, image, suffix, dtype):
    path = tmp_path / f"own{suffix}"
    schema = load_schema("dubai")
    save_checkpoint(network_of(weights), path, schema=schema, training={"steps": 3, "data": ["a"]}, dtype=dtype)
    network, report = load_checkpoint(path)
    assert not network.training
    assert report.config == network.config == CONFIG
    assert report.schema == schema
    assert report.training == {"steps": 3, "data": ["a"]}
    assert report.layout == "cdkd-edge"
    assert report.has_head
    assert report.dropped == ()
    assert report.notes == ()  # nothing had to be assumed
    assert all(p.dtype == torch.float32 for p in network.parameters())
    stored = {key: value.astype(np.float16 if dtype == torch.float16 else np.float32) for key, value in weights.items()}
    assert_computes(network, stored, image, eps=OWN_EPS)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if dtype == torch.float16:
        assert path.stat().st_size < sum(value.nbytes for value in weights.values()) * 0.7


def test_own_configuration_wins_over_assumptions(tmp_path, make_weights):
    config = NetworkConfig(
        tile=16, patch=8, embed_dim=48, depth=4, heads=3, mlp_dim=96, classes=2, head_channels=8, pool_scales=(1, 2),
        layer_norm_eps=1e-3, class_token=True,
    )  # fmt: skip
    weights = make_weights(config)
    network = SegmentationNetwork(config)
    network.load_state_dict(tensors(weights), strict=False)
    save_checkpoint(network, tmp_path / "own.pt")
    loaded, report = load_checkpoint(tmp_path / "own.pt")
    assert loaded.config == config
    assert report.schema is None
    error = refusal(tmp_path / "own.pt", heads=2)
    assert "3 attention heads" in error.message
    refusal(tmp_path / "own.pt", layer_norm_eps=1e-6)


def test_own_names_without_our_header(tmp_path, weights, image):
    network, report = load_checkpoint(saved(tmp_path / "bare.pth", tensors(weights)))
    assert report.layout == "cdkd-edge"
    assert network.config == CONFIG
    assert any("2 attention heads assumed" in note for note in report.notes)
    assert any("eps 1e-05 assumed" in note for note in report.notes)
    assert_computes(network, weights, image, eps=OWN_EPS)


def own_document(weights, **changes):
    config = {
        "tile": 48, "patch": 8, "embed_dim": 128, "depth": 4, "heads": 2, "mlp_dim": 96, "classes": 5,
        "head_channels": 8, "pool_scales": [1, 2, 3, 6], "layer_norm_eps": 1e-5, "class_token": False,
    }  # fmt: skip
    document = {"format": "cdkd-edge checkpoint", "version": 1, "config": config, "schema": None, "training": {}}
    return {**document, "state_dict": tensors(weights), **changes}


def test_the_file_format_is_the_documented_one(tmp_path, weights, image):
    network, report = load_checkpoint(saved(tmp_path / "own.pt", own_document(weights)))
    assert report.unwrapped == ("state_dict",)
    assert_computes(network, weights, image, eps=OWN_EPS)


def with_config(**changes):
    return {"config": {**own_document({})["config"], **changes}}


DAMAGED_HEADERS = {
    "other version": ({"version": 2}, "version 2"),
    "incomplete configuration": ({"config": {"tile": 48}}, "damaged configuration"),
    "no configuration": ({"config": None}, "damaged configuration"),
    "unknown setting": (with_config(colour=1), "damaged configuration"),
    "text for a number": (with_config(depth="4"), "damaged configuration"),
    "fraction for a count": (with_config(embed_dim=128.0), ""),
    "not a number": (with_config(layer_norm_eps=float("nan")), ""),
    "no network": (with_config(heads=3), "damaged configuration"),
    "more blocks than weights": (with_config(depth=5), ""),
    "larger tile than weights": (with_config(tile=64), ""),
    "more than memory": (with_config(mlp_dim=10**12), ""),  # must be noticed before it is allocated
    "other classes": ({"schema": load_schema("deepglobe").to_document()}, "6 classes, its classifier 5"),
    "fraction for the heads": (with_config(heads=2.0), ""),
    "fraction for a pool": (with_config(pool_scales=[1, 2.0, 3, 6]), ""),
    "training notes": ({"training": 5}, ""),
    "training notes that JSON cannot hold": ({"training": {"loss": torch.tensor(0.1)}}, ""),
}


@pytest.mark.parametrize(("changes", "words"), DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS.keys())
def test_a_damaged_header_is_refused(tmp_path, weights, changes, words):
    assert words in refusal(saved(tmp_path / "own.pt", own_document(weights, **changes))).message


@pytest.mark.parametrize("schema", [5, "dubai", {"classes": 3}, {"name": "x"}], ids=str)
def test_a_damaged_schema_is_refused(tmp_path, weights, schema):
    with pytest.raises((CheckpointError, SchemaError)):
        load_checkpoint(saved(tmp_path / "own.pt", own_document(weights, schema=schema)))


@pytest.mark.parametrize("change", [None, torch.ones(1, 50, 128)], ids=["missing", "other size"])
def test_a_damaged_position_embedding_is_refused_before_it_is_resampled(tmp_path, weights, change):
    document = own_document(weights)
    document["state_dict"]["encoder.pos_embed"] = change
    if change is None:
        del document["state_dict"]["encoder.pos_embed"]
    assert "pos" in refusal(saved(tmp_path / "own.pt", document), tile=96).message


# --- the Mask-CDKD student ------------------------------------------------------------------------

STUDENT_FILES = {
    "bare": lambda s: s,
    "autoencoder": lambda s: s | autoencoder(),
    "distiller": lambda s: prefixed("student.", s | autoencoder()) | teacher(),
    "module": lambda s: prefixed("module.", s),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s | autoencoder(), "optimizer": {"state": {}}},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "model and module": lambda s: {"model": prefixed("module.", s | autoencoder())},
    "everything": lambda s: {
        "epoch": 3,
        "state_dict": prefixed("module.", prefixed("student.", s | autoencoder()) | teacher()),
    },
    "student wrapped before the distiller": lambda s: prefixed("student.module.", s) | teacher(),
    "two dicts": lambda s: {"student": s | autoencoder(), "teacher": {"a": torch.ones(1), "b": torch.ones(1)}},
    "state_dict in model": lambda s: {"model": {"state_dict": prefixed("model.", s)}},
}


@pytest.mark.parametrize("wrap", STUDENT_FILES.values(), ids=STUDENT_FILES.keys())
def test_student_in_every_wrapping(tmp_path, weights, image, wrap):
    document = wrap(student(weights))
    encoder, report = load_encoder(saved(tmp_path / "student.pth", document))
    assert report.layout == "Mask-CDKD student"
    assert not report.has_head
    assert not encoder.training
    assert_computes(encoder, weights, image, eps=STUDENT_EPS)
    names = str(document.keys()) + str([v.keys() for v in document.values() if isinstance(v, dict)])
    dropped = {part.what: part for part in report.dropped}
    if "decoder_embed" in names:
        assert dropped["masked-autoencoder branch"].tensors == len(autoencoder())
        assert dropped["masked-autoencoder branch"].example == "mask_token"
    if "teacher" in names:
        part = dropped["teacher beside the student"]
        assert part.tensors == (2 if "'b'" in names or document.get("teacher") else 3)
        assert part.example.startswith("teacher.")
    assert len(dropped) == ("decoder_embed" in names) + ("teacher" in names)


def test_what_was_unwrapped_is_reported_from_the_outside_in(tmp_path, weights):
    document = {"state_dict": prefixed("module.student.", student(weights))}
    _, report = load_encoder(saved(tmp_path / "student.pth", document))
    assert report.unwrapped == ("state_dict", "module.", "student.")


def test_tensors_beside_student_and_teacher_are_not_ignored(tmp_path, weights):
    document = prefixed("student.", student(weights)) | {"adapter.a": torch.ones(1), "adapter.b": torch.ones(1)}
    message = refusal(saved(tmp_path / "d.pth", document), load_encoder).message
    assert "adapter.a" in message
    assert "adapter.b" in message


def test_an_encoder_alone_points_to_decoder_tuning(tmp_path, weights):
    path = saved(tmp_path / "student.pth", student(weights) | autoencoder())
    error = refusal(path)
    assert isinstance(error, EncoderOnlyError)
    assert error.exit_code == 3
    assert "no segmentation head" in error.message
    assert "train a decoder" in error.hint


def test_the_epsilon_can_be_stated(tmp_path, weights, image):
    path = saved(tmp_path / "student.pth", student(weights))
    encoder, report = load_encoder(path, layer_norm_eps=0.1)
    assert report.config.layer_norm_eps == 0.1
    assert not any("eps" in note for note in report.notes)
    assert_computes(encoder, weights, image, eps=0.1)


# --- timm -----------------------------------------------------------------------------------------


def timm(weights, *, scale="ls{}.gamma", bias=True, no_embed_class=False):
    """timm's ViT with class token, final norm, classifier and LayerScale; also what the reference needs."""
    rng = np.random.default_rng(8)
    truth = dict(weights)
    truth["encoder.cls_token"] = rng.standard_normal((1, 1, 128)).astype(np.float32)
    if not no_embed_class:
        first = rng.standard_normal((1, 1, 128)).astype(np.float32)
        truth["encoder.pos_embed"] = np.concatenate([first, weights["encoder.pos_embed"]], axis=1)
    state = student(truth)
    for index in range(CONFIG.depth):
        if not bias:
            del state[f"blocks.{index}.attn.qkv.bias"], truth[f"encoder.blocks.{index}.attn.qkv.bias"]
        if scale:
            for which in (1, 2):
                gamma = rng.uniform(0.3, 2, 128).astype(np.float32)
                truth[f"encoder.blocks.{index}.scale{which}"] = gamma
                state[f"blocks.{index}.{scale.format(which)}"] = torch.from_numpy(gamma)
    for name in ("norm", "head"):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(128), torch.ones(128)
    return state, truth


@pytest.mark.parametrize(
    "options",
    [
        {"scale": None},
        {"scale": "ls{}.gamma"},
        {"scale": "gamma_{}"},
        {"scale": None, "bias": False},
        {"scale": None, "no_embed_class": True},
        {"scale": "ls{}.gamma", "bias": False, "no_embed_class": True},
    ],
    ids=str,
)
def test_timm_names(tmp_path, weights, image, options):
    state, truth = timm(weights, **options)
    encoder, report = load_encoder(saved(tmp_path / "vit.bin", state))
    assert report.layout == "timm ViT"
    assert report.config.class_token
    assert report.config.tile == CONFIG.tile
    assert_computes(encoder, truth, image, eps=TIMM_EPS, atol=2e-5 if options["scale"] else 1e-8)  # folded in FP32
    dropped = {part.what: part.tensors for part in report.dropped}
    assert dropped == {"classifier, after the last block": 2, "final norm, after the last block": 2}
    said = " ".join(report.notes)
    assert ("LayerScale folded into 8" in said) == bool(options["scale"])
    assert ("no bias of attn.qkv in any block: zeros" in said) != options.get("bias", True)
    assert ("DeiT III" in said) == (options["scale"] == "gamma_{}")
    assert "eps 1e-06 assumed" in said
    assert "2 attention heads assumed" in said


def test_layer_scale_of_half_precision_weights_is_folded_in_single_precision(tmp_path, weights, image):
    state, truth = timm(weights)
    halves = {key: value.half() for key, value in state.items()}
    rounded = {key: value.astype(np.float16) for key, value in truth.items()}
    encoder, _ = load_encoder(saved(tmp_path / "vit.pt", halves))
    assert_computes(encoder, rounded, image, eps=TIMM_EPS, atol=2e-5)


def test_layer_scale_without_its_layer_is_refused(tmp_path, weights):
    state, _ = timm(weights)
    del state["blocks.1.mlp.fc2.weight"]
    message = refusal(saved(tmp_path / "vit.pt", state), load_encoder).message
    assert "encoder.blocks.1.mlp.fc2.weight" in message


def test_layer_scale_of_another_width_is_refused(tmp_path, weights):
    state, _ = timm(weights)
    state["blocks.1.ls2.gamma"] = torch.ones(96)
    assert "encoder.blocks.1" in refusal(saved(tmp_path / "vit.pt", state), load_encoder).message


# --- OpenMMLab ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timm_names", [False, True], ids=["backbone.layers", "backbone.blocks"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"meta": {"epoch": 1}, "state_dict": s}], ids=["bare", "meta"])
def test_openmmlab_names(tmp_path, weights, image, timm_names, wrap):
    state = openmmlab(weights, timm_names=timm_names)
    assert len([key for key in state if key.startswith("decode_head.")]) == 12 * 6 + 2
    network, report = load_checkpoint(saved(tmp_path / "mm.pth", wrap(state)))
    assert report.layout == "OpenMMLab ViT, OpenMMLab UPerHead"
    assert report.has_head
    dropped = {part.what: part.tensors for part in report.dropped}
    assert dropped == {"training counters": 12, "auxiliary head, used only in training": 2}
    assert_computes(network, weights, image, eps=OPENMMLAB_EPS)


# --- averaged weights -----------------------------------------------------------------------------

SWAPPED_BY_MMENGINE = {"meta": {"mmengine_version": "0.10.4"}, "message_hub": {}}
LISTED = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(2, 2)], "collected_params": None}


def learnt(state):
    """Parameters alone: what some means are of."""
    return {key: value for key, value in state.items() if "running_" not in key}


def flat(prefix, state, between):
    return {prefix + key.replace(".", between): value for key, value in learnt(state).items()}


def averaged_model(state):
    """torch.optim.swa_utils.AveragedModel's state."""
    return {"n_averaged": torch.tensor(5), **prefixed("module.", state)}


BESIDE = {
    "model_ema": lambda raw, mean: {"model": raw, "model_ema": mean, "optimizer": {"state": {0: torch.ones(2, 2)}}},
    "ema": lambda raw, mean: {"model": raw, "ema": mean},
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": prefixed("module.", mean)},
    "module_ema": lambda raw, mean: {"module": raw, "module_ema": mean},
    "ema_state_dict": lambda raw, mean: {"state_dict": raw, "ema_state_dict": mean},
    "ModelEMA": lambda raw, mean: {"Model": raw, "ModelEMA": mean},
    "swa": lambda raw, mean: {"model": raw, "swa_model": averaged_model(mean)},
    "deeper": lambda raw, mean: {"model": raw, "ema": {"decay": 0.9, "shadow": mean}},
    "mmengine": lambda raw, mean: {"state_dict": mean, "ema_state_dict": averaged_model(raw), **SWAPPED_BY_MMENGINE},
    "Lightning's callback": lambda raw, mean: {
        "state_dict": prefixed("net.", raw),
        "callbacks": {
            "EMACallback{'decay': 0.9}": {"ema_state_dict": prefixed("net.", mean)},
            "Other": {"a": 1, "seen": torch.ones(2, 2)},
        },
    },
    "Lightning's WeightAveraging": lambda raw, mean: {
        "state_dict": prefixed("net.", mean),
        "current_model_state": prefixed("net.", raw),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "a module of the network": lambda raw, mean: {
        "state_dict": prefixed("model.", raw) | prefixed("ema_model.", averaged_model(mean))
    },
    "names without dots": lambda raw, mean: {
        "state_dict": prefixed("model.", raw) | flat("model_ema.", mean, "") | {"model_ema.decay": torch.tensor(0.9)}
    },
}


@pytest.fixture(scope="module")
def raw_and_mean(weights):
    raw = tensors(weights)
    return raw, {key: value * 2 for key, value in raw.items()}


def taken_from(path, raw, mean, **options):
    """Which weights a file gives."""
    network, report = load_checkpoint(path, **options)
    found = dict(network.state_dict())
    for name, state in (("raw", raw), ("mean", mean)):
        if all(torch.equal(found[key], value) for key, value in learnt(state).items()):
            return name, report
    return "neither", report


@pytest.mark.parametrize("write", BESIDE.values(), ids=BESIDE.keys())
def test_averaged_weights_are_taken_and_said_and_raw_ones_on_request(tmp_path, raw_and_mean, write):
    path = saved(tmp_path / "x.pth", write(*raw_and_mean))
    name, report = taken_from(path, *raw_and_mean)
    assert name == "mean"
    assert report.averaged
    assert "averaged weights" in report.taken[0]
    assert "--weights raw" in report.notes[0]
    assert taken_from(path, *raw_and_mean, weights="ema")[0] == "mean"
    name, report = taken_from(path, *raw_and_mean, weights="raw")
    assert name == "raw"
    assert not report.averaged
    assert "raw weights taken" in report.taken[0]


def test_a_mean_of_the_parameters_gets_the_statistics_of_the_raw_weights(tmp_path, raw_and_mean):
    raw, mean = raw_and_mean
    network, report = load_checkpoint(saved(tmp_path / "x.pth", {"model": raw, "ema": learnt(mean)}))
    assert torch.equal(network.head.fuse.bn.running_var, raw["head.fuse.bn.running_var"])
    assert torch.equal(network.head.fuse.bn.weight, mean["head.fuse.bn.weight"])
    assert "24 statistics of BatchNorm" in report.taken[1]


@pytest.mark.parametrize("write", [averaged_model, lambda mean: {"ema": mean}], ids=["AveragedModel", "ema"])
def test_averaged_weights_alone_are_taken(tmp_path, raw_and_mean, write):
    path = saved(tmp_path / "x.pth", write(raw_and_mean[1]))
    name, report = taken_from(path, *raw_and_mean)
    assert (name, report.averaged) == ("mean", True)
    assert "averaged weights alone" in refusal(path, weights="raw").message


AMBIGUOUS = {
    "two means": (lambda raw, mean: {"model": raw, "ema_0.9": mean, "ema_0.99": mean}, "--weights ema_0.99"),
    "two networks": (lambda raw, mean: {"model": raw, "discriminator": mean}, "--weights discriminator"),
    "a teacher like the student": (lambda raw, mean: {"student": raw, "teacher": mean}, "--weights teacher"),
    "buffers": (lambda raw, mean: {"state_dict": {**raw, **flat("ema_", mean, "_")}}, "--weights raw"),
    "no names": (lambda raw, mean: {"model": raw, "ema": LISTED}, "--weights raw"),
    "half a mean": (lambda raw, mean: {"model": raw, "ema": {"encoder.pos_embed": torch.ones(1, 36, 128)}}, "raw"),
}


@pytest.mark.parametrize(("write", "words"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_weights_that_could_be_meant_are_listed_never_guessed(tmp_path, raw_and_mean, write, words):
    document = write(*raw_and_mean)
    path = saved(tmp_path / "x.pth", document)
    error = refusal(path)
    assert words in error.hint
    for name in re.findall(r"--weights (\S+)", error.hint):
        assert taken_from(path, *raw_and_mean, weights=name)[0] in ("raw", "mean")


def test_an_array_among_the_weights_is_refused(tmp_path, raw_and_mean):
    message = refusal(saved(tmp_path / "x.pt", raw_and_mean[0] | {"adapter.weight": np.ones((2, 2))})).message
    assert message.endswith("NumPy arrays among its weights: adapter.weight")


@pytest.mark.parametrize("name", ["ema", "blah", "__class__"])
def test_weights_that_are_not_there_are_refused(tmp_path, raw_and_mean, name):
    message = refusal(saved(tmp_path / "x.pth", {"model": raw_and_mean[0]}), weights=name).message
    assert "no averaged weights" in message if name == "ema" else repr(name) in message


class HistoryBuffer:
    """As mmengine's: with arrays and, by name, its own methods."""

    def __init__(self):
        self.log = np.arange(3.0)
        self.methods = {"mean": HistoryBuffer.mean}

    def mean(self):
        return self.log.mean()


HistoryBuffer.__module__ = "mmengine.logging.history_buffer"


def test_what_training_scripts_leave_beside_the_weights_is_not_read(tmp_path, raw_and_mean, monkeypatch):
    raw, mean = raw_and_mean
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        document = {
            "model": raw,
            "model_ema": mean,
            "args": argparse.Namespace(lr=0.1, out=tmp_path),
            "best": np.float64(3),
        }
        document["message_hub"] = {"log_scalars": {"loss": HistoryBuffer()}, "seen": np.arange(4)}
        path = saved(tmp_path / "x.pth", document)
    assert "mmengine" not in sys.modules
    assert taken_from(path, raw, mean)[0] == "mean"


# --- wrappers and what only training needs --------------------------------------------------------

WRAPPED = {
    "a compiled encoder": ("_orig_mod.", lambda key: key.replace("encoder.", "encoder._orig_mod.")),
    "compiled in DDP in a Lightning module": ("_orig_mod.", lambda key: f"net.module._orig_mod.{key}"),
    "compiled around DDP": ("module.", lambda key: f"model._orig_mod.module.{key}"),
    "compiled blocks": ("_orig_mod.", lambda key: re.sub(r"(blocks\.\d)", r"\1._orig_mod", key)),
    "sharded blocks": ("_fsdp_wrapped_module.", lambda key: re.sub(r"(blocks\.\d)", r"\1._fsdp_wrapped_module", key)),
    "an attribute of any name": ("segmentor.", lambda key: f"segmentor.{key}"),
}


@pytest.mark.parametrize(("said", "rename"), WRAPPED.values(), ids=WRAPPED.keys())
def test_wrappers_are_taken_off_wherever_they_are(tmp_path, raw_and_mean, said, rename):
    raw, mean = raw_and_mean
    name, report = taken_from(saved(tmp_path / "x.pt", {rename(k): v for k, v in raw.items()}), raw, mean)
    assert name == "raw"
    assert said in report.unwrapped


def test_what_only_training_needs_is_dropped_by_name(tmp_path, raw_and_mean):
    raw, mean = raw_and_mean
    extras = dict.fromkeys(("criterion.weight", "head.loss_decode.class_weight", "aux_loss.scale"), torch.ones(5))
    extras |= {
        "train_metrics.confmat": torch.ones(5, 5),
        "val_iou.confmat": torch.ones(5, 5),
        "ce_weight": torch.ones(5),
    }
    extras |= {"global_step": torch.tensor(7), "ema_updates": torch.tensor(3.0)}
    document = {"state_dict": prefixed("model.", raw) | extras, "lr_scheduler": {"x": torch.ones(2, 2)}, "epoch": 3}
    document |= {"rng_state": torch.ones(9, 9, dtype=torch.uint8), "class_weights": torch.ones(5)}
    name, report = taken_from(saved(tmp_path / "x.pt", document), raw, mean)
    assert name == "raw"
    dropped = {part.what: (part.tensors, part.example) for part in report.dropped}
    assert dropped == {"used only in training": (9, "lr_scheduler.x"), "training counters": (2, "global_step")}


def test_a_rate_of_averaging_is_no_set_of_weights(tmp_path, raw_and_mean):
    raw, mean = raw_and_mean
    averages = prefixed("module.", mean) | {"n_averaged": torch.tensor(5)}
    document = {"model": raw, "swa_model": averages, "swa_lr": torch.tensor(0.1)}
    assert taken_from(saved(tmp_path / "x.pt", document), raw, mean)[0] == "mean"


def test_an_error_names_the_culprit_and_a_dozen_keys_at_most(tmp_path, raw_and_mean):
    message = refusal(
        saved(tmp_path / "x.pt", prefixed("model.", raw_and_mean[0]) | {"foo.bar": torch.ones(2)})
    ).message
    assert message.endswith("beside model: foo.bar")
    many = {f"adapter.{i}.weight": torch.ones(2) for i in range(300)}
    message = refusal(saved(tmp_path / "x.pt", raw_and_mean[0] | many)).message
    assert "300 unexpected tensors: adapter.0.weight, adapter.1.weight" in message
    assert message.count("adapter.") == 12
    assert "(300 in all)" in message
    message = refusal(saved(tmp_path / "x.pt", {"encoder.blocks.0.norm1.weight": torch.ones(2), **many})).message
    assert len(message) < 500


# --- class names of OpenMMLab ---------------------------------------------------------------------

NAMES, COLORS = ("a", "b", "c", "d", "e"), [[i, 0, 9] for i in range(5)]
ENDLESS: list = []
for _ in range(40):
    ENDLESS = [ENDLESS] * 10
METAS = {
    "mmcv": ({"CLASSES": NAMES, "PALETTE": COLORS}, NAMES, (1, 0, 9), "names and colours"),
    "mmengine": ({"dataset_meta": {"classes": NAMES, "palette": COLORS}}, NAMES, (1, 0, 9), "names and colours"),
    "tuples": ({"CLASSES": list(NAMES), "PALETTE": tuple(map(tuple, COLORS))}, NAMES, (1, 0, 9), "names and colours"),
    "no colours": ({"CLASSES": NAMES, "PALETTE": None}, NAMES, None, "class names"),
    "a colour twice": ({"CLASSES": NAMES, "PALETTE": [[1, 2, 3]] * 5}, NAMES, None, "twice"),
    "colours of another kind": ({"CLASSES": NAMES, "PALETTE": "random"}, NAMES, None, "no list of colours"),
    "endless colours": ({"CLASSES": NAMES, "PALETTE": [ENDLESS] * 5}, NAMES, None, "colours"),
    "a tensor of colours": ({"CLASSES": NAMES, "PALETTE": torch.ones(5, 3)}, NAMES, None, "colours"),
    "another count": ({"CLASSES": NAMES[:4]}, None, None, "4 class names for 5 classes"),
    "a name twice": ({"CLASSES": ("a",) * 5}, None, None, "twice"),
    "a colour of other kinds": (
        {"CLASSES": NAMES, "PALETTE": [[0.5, 1, 2]] * 5},
        NAMES,
        None,
        "expected int, got float",
    ),
    "a name without end": ({"CLASSES": (*NAMES[:4], "e" * 10_000)}, None, None, "1 to 200 printable characters"),
    "a hostile name": ({"CLASSES": (*NAMES[:4], "\x1b[31m")}, None, None, "1 to 200 printable characters"),
    "names of other kinds": ({"CLASSES": (1, None, [], {}, "e")}, None, None, "classes[0].name: expected str, got int"),
    "text": ({"CLASSES": "abcde"}, None, None, "no list of class names"),
    "a list": ([NAMES], None, None, None),
    "nothing": ({"epoch": 3}, None, None, None),
}


@pytest.mark.parametrize(("meta", "names", "color", "words"), METAS.values(), ids=METAS.keys())
def test_class_names_of_openmmlab_are_used_where_they_fit(tmp_path, weights, meta, names, color, words):
    state = openmmlab(weights, timm_names=False)
    _, report = load_checkpoint(saved(tmp_path / "mm.pth", {"meta": meta, "state_dict": state}))
    assert (report.schema and report.schema.class_names) == names
    if color:
        assert report.schema.classes[1].color == color
    said = [note for note in report.notes if "class names" in note or "colours" in note]
    assert words in " ".join(said) if words else not said


# --- another tile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [96, 56])
@pytest.mark.parametrize("class_token", [False, True])
def test_position_embedding_is_resampled_as_its_project_does(tmp_path, weights, tile, class_token):
    state, truth = timm(weights, scale=None) if class_token else (student(weights), dict(weights))
    encoder, report = load_encoder(saved(tmp_path / "vit.pt", state), tile=tile)
    assert report.config.tile == tile
    assert any(f"from 48 to {tile} px" in note for note in report.notes)
    position = torch.from_numpy(truth["encoder.pos_embed"])
    first, cells = position[:, : int(class_token)], position[:, int(class_token) :]
    maps = cells.transpose(1, 2).reshape(1, 128, 6, 6)
    resampled = torch.nn.functional.interpolate(
        maps,
        size=(tile // 8, tile // 8),
        mode="bicubic",
        align_corners=False,
        antialias=class_token,  # timm's resample_abs_pos_embed does, Mask-CDKD's student has its own
    )
    truth["encoder.pos_embed"] = torch.cat([first, resampled.flatten(2).transpose(1, 2)], dim=1).numpy()
    image = np.random.default_rng(6).integers(0, 256, (1, 3, tile, tile), np.uint8)
    assert_computes(encoder, truth, image, eps=TIMM_EPS if class_token else STUDENT_EPS)


def test_resampling_to_the_same_grid_changes_nothing():
    position = torch.randn(1, 1 + 36, 8)
    torch.testing.assert_close(resample_position(position, 6, True), position)


@pytest.mark.parametrize("tile", [50, 16, 0, -48])
def test_a_tile_that_does_not_fit_is_refused(tmp_path, weights, tile):
    refusal(saved(tmp_path / "own.pt", own_document(weights)), tile=tile)
    refusal(saved(tmp_path / "student.pt", student(weights)), load_encoder, tile=tile)


# --- heads ----------------------------------------------------------------------------------------


def test_heads_that_are_not_64_wide_must_be_stated(tmp_path, make_weights):
    config = NetworkConfig(tile=48, patch=8, embed_dim=48, depth=4, heads=3, mlp_dim=96, classes=5, head_channels=8)
    narrow = make_weights(config)
    path = saved(tmp_path / "narrow.pt", tensors(narrow))
    error = refusal(path)
    assert "48" in error.message
    assert "--heads" in error.hint
    network, report = load_checkpoint(path, heads=3)
    assert report.config == config
    image = np.random.default_rng(5).integers(0, 256, (1, 3, 48, 48), np.uint8)
    assert_computes(network, narrow, image, heads=3, eps=OWN_EPS)
    refusal(path, heads=5)


def test_stated_heads_win_over_the_assumption(tmp_path, weights, image):
    encoder, report = load_encoder(saved(tmp_path / "s.pt", student(weights)), heads=8)
    assert not any("heads assumed" in note for note in report.notes)
    assert_computes(encoder, weights, image, heads=8, eps=STUDENT_EPS)


# --- weights that do not fit ----------------------------------------------------------------------


def test_all_unknown_keys_are_listed(tmp_path, weights):
    extra = [f"blocks.{i}.attn.{norm}_norm.weight" for i in range(4) for norm in "qk"]
    state = student(weights) | {key: torch.ones(1) for key in extra}
    error = refusal(saved(tmp_path / "normed.pt", state), load_encoder)
    assert all(key in error.message for key in extra)
    assert "8 unexpected tensors" in error.message
    assert error.hint


def test_an_unknown_layout_shows_what_it_found_and_what_is_known(tmp_path):
    state = {f"layer{i}.conv.weight": torch.ones(1) for i in range(9)}
    error = refusal(saved(tmp_path / "resnet.pt", state))
    assert "9 tensors: layer0.conv.weight, " in error.message
    assert "OpenMMLab" in error.hint


def test_all_missing_tensors_are_listed(tmp_path, weights):
    gone = ["encoder.blocks.3.norm2.bias", "encoder.patch_embed.proj.bias", "head.fuse.bn.running_var"]
    state = {key: value for key, value in tensors(weights).items() if key not in gone}
    message = refusal(saved(tmp_path / "gap.pt", state)).message
    assert "missing: " + ", ".join(gone) in message


def test_a_missing_block_is_named(tmp_path, weights):
    state = {key: value for key, value in student(weights).items() if not key.startswith("blocks.2.")}
    assert "lacks transformer blocks [2] of 4" in refusal(saved(tmp_path / "gap.pt", state), load_encoder).message


@pytest.mark.parametrize(
    "key", ["encoder.patch_embed.proj.weight", "encoder.pos_embed", "encoder.blocks.0.mlp.fc1.weight"]
)
def test_a_tensor_that_gives_the_shape_must_be_there_and_have_its_rank(tmp_path, weights, key):
    state = tensors(weights)
    for broken in ({k: v for k, v in state.items() if k != key}, {**state, key: torch.ones(3)}):
        assert key in refusal(saved(tmp_path / "x.pt", broken)).message


def test_all_misshapen_tensors_are_listed_with_both_shapes(tmp_path, weights):
    state = tensors(weights)
    state["encoder.blocks.1.mlp.fc2.weight"] = torch.ones(96, 128)
    state["head.laterals.0.conv.weight"] = torch.ones(8, 128, 3, 3)
    message = refusal(saved(tmp_path / "x.pt", state)).message
    assert "encoder.blocks.1.mlp.fc2.weight is (96, 128) instead of (128, 96)" in message
    assert "head.laterals.0.conv.weight is (8, 128, 3, 3) instead of (8, 128, 1, 1)" in message


@pytest.mark.parametrize("shape", [(1, 35, 128), (1, 38, 128), (1, 0, 128), (2, 36, 128), (1, 36, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"tile": 96}], ids=str)
@pytest.mark.parametrize("class_token", [False, True])
def test_positions_that_do_not_fit_are_refused(tmp_path, weights, shape, options, class_token):
    state = timm(weights, scale=None)[0] if class_token else student(weights)
    path = saved(tmp_path / "x.pt", state | {"pos_embed": torch.ones(shape)})
    message = refusal(path, load_encoder, **options).message
    assert "position" in message
    assert str(shape[1]) in message


@pytest.mark.parametrize("number", ["1000000", "9" * 5000], ids=["million", "5000 digits"])
def test_a_block_number_is_no_reason_to_allocate(tmp_path, weights, number):
    path = saved(tmp_path / "x.pt", student(weights) | {f"blocks.{number}.norm1.weight": torch.ones(128)})
    tracemalloc.start()
    try:
        message = refusal(path, load_encoder).message
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert "blocks" in message


@pytest.mark.parametrize("shape", [(128, 4, 8, 8), (128, 3, 8, 4)])
def test_patches_must_be_square_rgb(tmp_path, weights, shape):
    state = student(weights) | {"patch_embed.proj.weight": torch.ones(shape)}
    assert str(shape) in refusal(saved(tmp_path / "x.pt", state), load_encoder).message


def test_two_names_for_one_tensor_are_refused(tmp_path, weights):
    state, _ = timm(weights)
    state["blocks.0.gamma_1"] = state["blocks.0.ls1.gamma"]
    assert "blocks.0.gamma_1" in refusal(saved(tmp_path / "x.pt", state), load_encoder).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, weights, value):
    state = tensors(weights)
    state["head.smooth.1.conv.weight"][3, 2, 1, 0] = value
    message = refusal(saved(tmp_path / "x.pt", state)).message
    assert "head.smooth.1.conv.weight" in message
    assert "not finite" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_weights_must_be_floating_point(tmp_path, weights, dtype):
    state = tensors(weights)
    state["encoder.blocks.2.attn.proj.weight"] = torch.ones(128, 128).to(dtype)
    message = refusal(saved(tmp_path / "x.pt", state)).message
    assert "encoder.blocks.2.attn.proj.weight" in message
    assert str(dtype) in message


STRANGE = {
    "sparse": lambda: torch.eye(128).to_sparse(),
    "meta": lambda: torch.ones(128, 128, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_weights_must_be_dense(tmp_path, weights, make):
    state = tensors(weights)
    state["encoder.blocks.2.attn.proj.weight"] = make()
    assert "encoder.blocks.2.attn.proj.weight" in refusal(saved(tmp_path / "x.pt", state)).message


def test_a_scalar_for_a_matrix_is_refused(tmp_path, weights):
    state, _ = timm(weights, scale=None, bias=False)
    state["blocks.1.attn.qkv.weight"] = torch.tensor(1.0)
    assert "blocks.1.attn.qkv.weight" in refusal(saved(tmp_path / "x.pt", state), load_encoder).message


def test_bfloat16_is_read(tmp_path, weights, image):
    rounded = {key: value.bfloat16() for key, value in tensors(weights).items()}
    network, _ = load_checkpoint(saved(tmp_path / "x.pt", rounded))
    assert_computes(network, {k: v.float().numpy() for k, v in rounded.items()}, image, eps=OWN_EPS)


# --- files that are no checkpoint -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_missing_empty_and_directory(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert "does not exist" in refusal(path).message
    path.touch()
    assert "is empty" in refusal(path).message
    path.unlink()
    path.mkdir()
    assert "not a file" in refusal(path).message


@pytest.mark.parametrize("name", ["model_best.pth.tar", "BEST.PTH", "best.pt.zip", "best", "best.weights", "v1.5"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_content_decides_not_the_suffix(tmp_path, raw_and_mean, name, form):
    path = tmp_path / name
    if form == "safetensors":
        safetensors_torch.save_file(raw_and_mean[0], path)
    else:
        torch.save(raw_and_mean[0], path, _use_new_zipfile_serialization=form == "zip")
    assert taken_from(path, *raw_and_mean)[0] == "raw"


@pytest.mark.parametrize("pack", ["zip", "tar", "gzip"])
def test_a_packed_checkpoint_is_to_be_unpacked(tmp_path, raw_and_mean, pack):
    inner, path = saved(tmp_path / "best.pt", raw_and_mean[0]), tmp_path / f"best.pt.{pack}"
    if pack == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(inner, "best.pt")
    elif pack == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(inner, "best.pt")
    else:
        path.write_bytes(gzip.compress(inner.read_bytes()))
    error = refusal(path)
    assert f"{pack} archive" in error.message
    assert "unpack" in error.hint


FOREIGN = {
    "a.pt.xz": (b"\xfd7zXZ\0" + bytes(99), "xz archive"),
    "a.bin.zst": (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd archive"),
    "a.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    "model-00001-of-00003.safetensors": (b"anything", "one part of a checkpoint"),
    "pytorch_model-00002-of-00002.bin": (b"PK", "one part of a checkpoint"),
    "model.safetensors.index.json": (b"{}", "one part of a checkpoint"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_file_is_instead_is_said(tmp_path, name):
    content, said = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert said in error.message
    assert error.hint


def test_one_file_of_one_is_whole(tmp_path, raw_and_mean):
    raw, mean = raw_and_mean
    assert taken_from(saved(tmp_path / "model-00001-of-00001.bin", raw), raw, mean)[0] == "raw"


def test_blocks_that_share_their_storage_are_not_set_up(tmp_path, raw_and_mean):
    blocks = {f"encoder.blocks.{i}.norm1.weight": torch.ones(1).expand(128) for i in range(3000)}
    path = saved(tmp_path / "x.pt", raw_and_mean[0] | blocks)
    started = time.process_time()
    assert "depth 3000 is not" in refusal(path).message
    assert time.process_time() - started < 5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_an_error_of_the_system(tmp_path, weights, suffix):
    path = tmp_path / f"own{suffix}"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1][1]))
    try:
        with pytest.raises(OSError, match="disk full") as caught:
            save_checkpoint(network_of(weights), path)
    finally:
        signal.signal(signal.SIGXFSZ, before[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


# --- larger inside than outside -------------------------------------------------------------------


def archive(pickled, method=zipfile.ZIP_STORED):
    """torch.save's archive around a pickle."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + pickled + b".")
        file.writestr("x/version", "3\n")
    return target.getvalue()


def packed_again(state):
    target = io.BytesIO()
    torch.save(state, target)
    with zipfile.ZipFile(target) as before, zipfile.ZipFile(again := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        for name in before.namelist():
            file.writestr(name, before.read(name))
    return again.getvalue()


def overlapping(count):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02}.")
        file.writestr("x/data/0", bytes(100_000))
        file.filelist += [file.getinfo("x/data/0")] * count
    return target.getvalue()


def safetensors_header(document, length=None):
    header = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header


def in_zip(document):
    target = io.BytesIO()
    torch.save(document, target)
    return target.getvalue()


LARGE = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
ONE = torch.zeros(1024, 1024)
BOMBS = {
    "a deflated pickle": lambda s: archive(b"](" + b"}" * 50_000_000 + b"e", zipfile.ZIP_DEFLATED),
    "deflated tensors": lambda s: packed_again({"a": torch.zeros(10**7)}),
    "many dicts": lambda s: archive(b"](" + b"}" * 5_000_000 + b"e"),
    "many keys": lambda s: archive(b"}(" + b"X\x05\x00\x00\x00abcdeK\x01" * 510_000 + b"u"),
    "deep tuples": lambda s: archive(b"})" + b"\x85" * 400_000 + b"K\x01s"),
    "tuples of tuples": lambda s: archive(b"})" + b"q\x01h\x01\x86" * 40 + b"K\x01s"),
    "deep lists": lambda s: archive(b"}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s"),
    "a bytearray": lambda s: archive(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"),
    "a tensor by size": lambda s: archive(b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R"),
    "overlapping entries": lambda s: overlapping(500),
    "many entries": lambda s: overlapping(60_000) + b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 9, 9, 1 << 30, 0, 0),
    "an expanded tensor": lambda s: in_zip(s | {"encoder.pos_embed": LARGE}),
    "an expanded mean": lambda s: in_zip({"model": s, "ema": dict.fromkeys(s, LARGE)}),
    "one storage for all": lambda s: in_zip(
        prefixed("encoder.", {f"blocks.{i}.norm1.weight": ONE for i in range(500)}) | {"encoder.pos_embed": ONE}
    ),
    "endless lists": lambda s: in_zip({"format": "cdkd-edge checkpoint", "version": 1, "training": {"a": ENDLESS}}),
    "an endless version": lambda s: in_zip({"format": "cdkd-edge checkpoint", "version": ENDLESS, "state_dict": s}),
    "a header of 2^60 bytes": lambda s: safetensors_header(b"{}", 1 << 60),
    "a header without end": lambda s: safetensors_header(b'{"a":' * 200_000),
    "many names": lambda s: safetensors_header(
        {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(140_000)}
    ),
    "a shape larger than its bytes": lambda s: safetensors_header(
        {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}
    ) + bytes(4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS.keys())
def test_a_file_that_is_larger_inside_than_outside_is_refused_soon(tmp_path, raw_and_mean, make):
    path = tmp_path / "x.pt"
    path.write_bytes(make(raw_and_mean[0]))
    peak, seconds, message = measured_refusal(path)
    assert peak < 500e6
    assert seconds < 10  # of the processor; an idle one takes less than 4
    assert len(message) < 1000


def measured_refusal(path):
    """Bytes and seconds that a refusal takes in a process of its own, beyond imports; the message."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF)
            try:
                load_checkpoint(path)
                message = "not refused"
            except CheckpointError as error:
                message = f"{error.message} {error.hint}"
            after = resource.getrusage(resource.RUSAGE_SELF)
            peak = 1024 * (after.ru_maxrss - before.ru_maxrss)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            os.write(writer, json.dumps([peak, seconds, message[:2000]]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer, "the process was killed"
    peak, seconds, message = json.loads(answer)
    assert message != "not refused"
    return peak, seconds, message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_damaged(tmp_path, weights, share, suffix):
    path = tmp_path / f"x{suffix}"
    save_checkpoint(network_of(weights), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged" in refusal(path).message


def test_text_is_no_checkpoint(tmp_path):
    for number, text in enumerate(
        ("hello world\n", "<!DOCTYPE html><html>404: Not Found</html>", "{}", "version https")
    ):
        path = tmp_path / f"{number}.pt"
        path.write_text(text)
        assert "not a PyTorch checkpoint" in refusal(path).message
        path = path.rename(path.with_suffix(".safetensors"))
        assert "not a safetensors file" in refusal(path).message


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_code_in_a_pickle_is_never_run(tmp_path, weights, form):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    document = {"extra": Payload(marker), "state_dict": tensors(weights)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(document, protocol=int(form[-1])))
    else:
        torch.save(document, path, _use_new_zipfile_serialization=form == "zip")
    error = refusal(path)
    assert not marker.exists()
    if form != "pickle 5":  # its opcodes are refused before any name is read
        assert "refused" in error.message
        assert f"{os.system.__module__}.system" in error.message
    if form.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # the payload was live


def test_a_whole_module_is_refused(tmp_path):
    error = refusal(saved(tmp_path / "module.pt", torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in error.message
    assert "state_dict" in error.hint


@pytest.mark.parametrize(
    ("thing", "name"), [(torch.ones(3), "Tensor"), ([torch.ones(3)], "list"), (5, "int")], ids=["tensor", "list", "int"]
)
def test_something_else_than_a_mapping_is_refused(tmp_path, thing, name):
    assert f"holds a {name}, not a state dict" in refusal(saved(tmp_path / "x.pt", thing)).message


@pytest.mark.parametrize(
    "document",
    [{}, {"epoch": 3}, {"state_dict": {}}, {"model": {"state_dict": {"epoch": 3}}}, {"weights": {}}],
    ids=str,
)
def test_a_mapping_without_tensors_is_refused(tmp_path, document):
    assert "holds no state dict" in refusal(saved(tmp_path / "x.pt", document)).message


def test_a_mapping_that_holds_itself_is_refused(tmp_path):
    def give_up(*_):
        raise TimeoutError("still unwrapping")

    document = {}
    document["state_dict"] = document
    path = saved(tmp_path / "x.pt", document)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        assert "no state dict" in refusal(path).message
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_torchscript_is_refused_with_advice(tmp_path):
    path = tmp_path / "scripted.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    error = refusal(path)
    assert "TorchScript" in error.message
    assert "state_dict" in error.hint


def test_safetensors_with_a_damaged_header_or_foreign_metadata(tmp_path, weights, image):
    path = tmp_path / "x.safetensors"
    safetensors_torch.save_file(tensors(weights), path, metadata={"format": "pt"})
    network, _ = load_checkpoint(path)
    assert_computes(network, weights, image, eps=OWN_EPS)

    safetensors_torch.save_file(tensors(weights), path, metadata={"cdkd-edge": "{not json"})
    assert "damaged" in refusal(path).message
    safetensors_torch.save_file(tensors(weights), path, metadata={"cdkd-edge": json.dumps({"version": 99})})
    assert "version 99" in refusal(path).message

    content = bytearray(path.read_bytes())
    content[:8] = struct.pack("<Q", 1 << 40)  # a header longer than the file
    path.write_bytes(content)
    assert "damaged" in refusal(path).message


def test_a_failed_save_leaves_the_old_file(tmp_path, weights, monkeypatch):
    path = tmp_path / "own.pt"
    path.write_text("old")

    def disk_full(document, file):
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(network_of(weights), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["own.pt"]
