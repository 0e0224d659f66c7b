"""Attention with FP16 sums: what it computes, when it breaks a network, and what is changed in the graph then.

The cases are reports about TensorRT: NaN from end to end (NVIDIA/TensorRT#4742), almost one class everywhere (#4723),
NaN with 65,536 keys (tier4/autoware-ml#95).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from quantization_helpers import (
    CLASS_TOKEN,
    CONFIG,
    NECK,
    NORMED,
    ROTARY,
    WINDOWS,
    casts,
    centred,
    constants,
    tiles_of,
    values,
)

from cdkd_edge.core.errors import NumericalCheckError
from cdkd_edge.core.manifest import AttentionChange, EngineManifest, GraphManifest, read_manifest
from cdkd_edge.graph.attention import attention_blocks
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import cpu_session, fuse_attention
from cdkd_edge.graph.fp16 import check_fp16, to_fp16, write_fp16
from cdkd_edge.graph.fp16_attention import QUERIES, attention_error, change_attention, rehearse
from cdkd_edge.graph.fp16_simulation import FP16_MAX, extreme_tiles, fp16_on_cpu
from cdkd_edge.graph.int8 import calibrate, int8_graph
from cdkd_edge.graph.nodes import copy_of, show_values

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not (BENCHMARKS / "fp16_attention.py").exists():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import fp16_attention as script  # noqa: E402


def parts(heads=2, queries=5, keys=200, width=32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (heads, queries, width), (heads, keys, width), (heads, keys, width)
    return tuple(rng.standard_normal(shape).astype(np.float16).astype(np.float32) for shape in shapes)


def exact(q, k, v):
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return share @ v / share.sum(axis=-1, keepdims=True)


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("width", [8, 16, 40])
def test_the_rehearsal_is_attention_but_for_rounding(keys, width):
    q, k, v = parts(keys=keys, width=width)
    found, wanted = rehearse(q / np.float32(4), k, v), exact(q / np.float32(4), k, v)
    np.testing.assert_array_equal(found, found.astype(np.float16))
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(v).mean(), rtol=0.005)


def test_its_sums_are_rounded():
    """The result is as far from the exact one as FP16 sums are; in FP32 only shares and the second product round."""
    q, k, v = parts(keys=1000, width=64)
    q *= 4  # scores of about 30
    errors = [np.abs(rehearse(q, k, v, fp32_scores=wide) - exact(q, k, v)).max() for wide in (False, True)]
    assert 0.01 < errors[0] < 0.5
    assert errors[1] < errors[0] / 5


def test_the_error_is_that_of_the_worst_head():
    q, k, v = parts(heads=3, queries=40, width=64)
    calm = attention_error(q / np.float32(8), k, v)
    assert 1e-5 < calm < 2e-3
    q[1] *= 64
    assert attention_error(q / np.float32(8), k, v) > 10 * calm


def test_the_longest_queries_are_among_those_that_are_rehearsed():
    q, k, v = parts(heads=4, queries=3000, keys=64, width=16)
    q /= 8
    assert 10 * QUERIES < 4 * 3000
    q[2, 1234] = 30000 * np.sign(k[2, 0])
    assert not np.isfinite(attention_error(q, k, v))


def test_scores_beyond_fp16_are_nan():
    q, k, v = parts(width=64)
    assert np.abs(q @ k.transpose(0, 2, 1)).max() * 128**2 > FP16_MAX
    assert not np.isfinite(rehearse(q * 128, k * 128, v)).all()
    scaled = rehearse(q * np.float32(128**2), k, v, fp32_scores=True)
    np.testing.assert_allclose(scaled, exact(q * 128, k * 128, v), rtol=1e-3, atol=1e-3)


def test_values_that_add_up_beyond_fp16_overflow():
    q, k, v = parts(keys=1000)
    q *= 0  # all keys count the same
    v = np.abs(v) * 128
    assert v.sum(axis=1).max() > FP16_MAX
    assert not np.isfinite(rehearse(q, k, v)).all()
    np.testing.assert_allclose(rehearse(q, k, v / 2), exact(q, k, v / 2), rtol=0.02)


@pytest.mark.parametrize(("keys", "holds"), [(4096, True), (16384, True), (65600, False)])
def test_equal_scores_of_many_keys(keys, holds):
    """Beyond 65504 keys their sum is infinite, and beyond 32768 the second product does not grow any more."""
    q, k = np.zeros((1, 1, 8), np.float32), np.zeros((1, keys, 8), np.float32)
    v = np.full_like(k, 0.25)
    assert np.allclose(rehearse(q, k, v), 0.25, rtol=0.01) is holds
    assert np.allclose(rehearse(q, k, v, fp32_scores=True), 0.25, rtol=0.01) is holds
    assert np.isfinite(rehearse(q, k, v, fp32_scores=True)).all()


# --- networks that it breaks ----------------------------------------------------------------------


ROTARY_WINDOWS = dataclasses.replace(WINDOWS, rotary_base=20.0, attention=("global", "global", "window 3", "window 3"))
POOLED = dataclasses.replace(CONFIG, attention=("global", "global", "global", "pooled 2"))


def with_loud(weights, config, block, *, scores=1.0, values_=1.0):
    """Queries, keys and values of a block made larger; proj makes up for values."""
    loud, dim = {name: value.copy() for name, value in weights.items()}, config.embed_dim
    for name in ("weight", "bias"):
        qkv = loud[f"encoder.blocks.{block}.attn.qkv.{name}"]
        qkv[: 2 * dim] *= np.float32(scores)
        qkv[2 * dim :] *= np.float32(values_)
    loud[f"encoder.blocks.{block}.attn.proj.weight"] /= np.float32(values_)
    return centred(loud, config)


WIDE = dataclasses.replace(CONFIG, embed_dim=64, heads=2)
"""Heads of 32: their scores take two steps of 16 products."""


def with_cancelling(weights, config, block):
    """A part of the scores cancels, but only after FP16 has rounded it: the first of two steps adds it."""
    loud, dim, width = dict(weights), config.embed_dim, config.embed_dim // config.heads
    names = [f"encoder.blocks.{block}.attn.qkv.{part}" for part in ("weight", "bias")]
    loud |= {name: weights[name].copy() for name in names}
    weight, bias = (loud[name] for name in names)
    for first in range(0, dim, width):
        for channel, sign in ((first, 1), (first + 16, -1)):
            weight[channel], bias[channel] = 0, sign * 200
            weight[dim + channel] = 0
            weight[dim + channel, 0] = 200
    return centred(loud, config)


SCORES, VALUES = {"scores": 300}, {"scores": 0.01, "values_": 3000}  # with small scores, all keys count alike
CASES = {
    "scores that overflow": (CONFIG, SCORES, r"scores in FP32, divided by \d+ before, because scores may reach \d"),
    "the same with a class token": (CLASS_TOKEN, SCORES, r"scores in FP32, divided by 64 before"),
    "the same with pooled keys": (POOLED, SCORES, r"scores in FP32, divided by \d+ before"),
    "the same with rotary positions": (ROTARY, SCORES, r"scores in FP32, divided by \d+ before"),
    "values that overflow": (CONFIG, VALUES, r"values divided by 16, because values may sum to \d"),
    "rotary values of windows that overflow": (
        ROTARY_WINDOWS,
        {"values_": 10000},
        r"values divided by \d+, because values may sum",
    ),
    "values of windows that overflow": (WINDOWS, {"values_": 10000}, r"values divided by \d+, because values may sum"),
}


@pytest.fixture
def checked(tmp_path):
    """Checks the FP16 graph of weights; returns the graph before, the graph after, and the finding."""

    def check(weights, config, least=None, **options):
        plain = build_graph(weights, config, **options)
        onnx.save(plain, tmp_path / "plain.onnx")
        before = to_fp16(plain)
        after = copy_of(before)
        found = check_fp16(tmp_path / "plain.onnx", after, tiles_of(2), "sample", least=least)
        return before, after, found

    return check


def fp32_labels(model, tile):
    model = copy_of(model)
    fuse_attention(model)
    return cpu_session(model).run(["labels"], {"image": tile})[0]


@pytest.mark.parametrize("case", CASES)
def test_a_network_that_fp16_sums_break_is_found_and_mended(make_weights, checked, tmp_path, case):
    config, factors, what = CASES[case]
    # Such scores choose one key of many, now and then another in FP16: labels are judged, and no single logit.
    broken = with_loud(make_weights(config), config, 3, **factors)
    before, after, found = checked(broken, config, least=0.99)
    (change,) = found.attention
    assert change.block == "blocks.3.attn"
    assert re.search(what, str(change)), str(change)
    onnx.checker.check_model(after, full_check=True)
    assert found.label_agreement > 0.99

    tile = tiles_of(1)
    exact_labels = fp32_labels(onnx.load(tmp_path / "plain.onnx"), tile)
    broken, mended = (script.labels_with(graph, tile, rehearse) for graph in (before, after))
    assert (broken == exact_labels).mean() < 0.7, "FP16 sums did break it"
    assert (mended == exact_labels).mean() > 0.97


def test_scores_that_fp16_does_not_resolve(make_weights, checked, tmp_path):
    """Nothing overflows, and the labels are wrong all the same."""
    before, after, found = checked(with_cancelling(make_weights(WIDE), WIDE, 3), WIDE)
    (change,) = found.attention
    assert change.scores_in_fp32
    assert (change.scores_divided_by, change.values_divided_by) == (1, 1)
    assert re.search(r"FP16 sums move it by \d+\.\d%, \d\.\d% are allowed", change.reason)
    tile = tiles_of(1)
    exact_labels = fp32_labels(onnx.load(tmp_path / "plain.onnx"), tile)
    broken, mended = (script.labels_with(graph, tile, rehearse) for graph in (before, after))
    assert (broken == exact_labels).mean() < 0.97
    assert (mended == exact_labels).mean() > 0.99


@pytest.mark.parametrize(
    ("config", "batch", "opset"), [(CONFIG, 2, 17), (WINDOWS, 2, 20), (ROTARY, 1, 18), (NORMED, 2, 20), (NECK, 1, 17)]
)
def test_healthy_networks_stay_as_they_are(make_weights, checked, config, batch, opset):
    before, after, found = checked(centred(make_weights(config), config), config, batch=batch, opset=opset)
    assert found.attention == ()
    assert 1e-5 < found.attention_error < 2e-3
    assert after.SerializeToString() == before.SerializeToString()


@pytest.mark.parametrize(("batch", "opset"), [(2, 17), (1, 18)])
def test_bounds_hold_for_every_query_and_value(make_weights, checked, batch, opset):
    """What is told is the longest query times the longest key of a head, and the largest sum of magnitudes."""
    weights = with_loud(make_weights(CLASS_TOKEN), CLASS_TOKEN, 3, scores=300, values_=3000)
    before, _, found = checked(weights, CLASS_TOKEN, 0, batch=batch, opset=opset)
    (change,) = found.attention
    told = [float(number) for number in re.findall(r"(?:reach|sum to) (\S+) on", change.reason)]
    names = [f"blocks.3.attn.{part}" for part in "qkv"]
    tiles = [*tiles_of(2), *extreme_tiles(48).values()]
    seen = [values(fp16_on_cpu(before), names, np.repeat(tile[None], batch, axis=0)) for tile in tiles]
    heads, width = CLASS_TOKEN.heads, CLASS_TOKEN.embed_dim // CLASS_TOKEN.heads
    scores, sums = 0.0, 0.0
    for one in seen:
        q, k = (one[name].reshape(batch, -1, heads, width).astype(np.float64) for name in names[:2])
        lengths = [np.linalg.norm(part, axis=-1).max(axis=(0, 1)) for part in (q, k)]
        scores = max(scores, (lengths[0] * lengths[1]).max())
        sums = max(sums, np.abs(one[names[2]].astype(np.float64)).sum(axis=1).max())
    assert told == pytest.approx([scores, sums], rel=0.01)


# --- what is changed ------------------------------------------------------------------------------

BOTH = AttentionChange("blocks.1.attn", "it is a test", 8, True, 4)


LAYER_NORMED = dataclasses.replace(CONFIG, query_key_norm="layer")


@pytest.mark.parametrize(
    ("config", "opset"), [(CONFIG, 17), (WINDOWS, 20), (ROTARY, 18), (NORMED, 20), (LAYER_NORMED, 17)]
)
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_changed_graph_computes_the_same(make_weights, config, opset, kind):
    """Powers of two are exact, and the simulation has FP32 sums anyway."""
    opset = max(opset, 19) if kind == "int8" else opset
    plain = build_graph(make_weights(config), config, opset=opset)
    half = to_fp16(plain)
    if kind == "int8":
        found = calibrate(plain, tiles_of(2))
        half = int8_graph(found.model, found.layers, found.scales)
    changed = copy_of(half)
    change_attention(changed, [BOTH])
    onnx.checker.check_model(changed, full_check=True)
    more = casts(changed) - casts(half)
    assert more == {"FLOAT": 1, "FLOAT16": 1}
    blocks = attention_blocks(changed)
    assert [block.fp32_softmax for block in blocks] == [False, True, False, False]
    assert [block.scale for block in blocks] == [1, 4, 1, 1]
    image = tiles_of(1)
    before, after = (values(fp16_on_cpu(graph), ["logits", "blocks.1.out"], image) for graph in (half, changed))
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=2e-3, atol=2e-3 * np.abs(before[name]).max())
    name, own = ("qkv", 2) if config.rotary_base else ("v", ...)
    small, large = (constants(graph)[f"blocks.1.attn.{name}.weight"].astype(float) for graph in (changed, half))
    np.testing.assert_allclose(8 * small[own], large[own], atol=2e-6)
    if config.rotary_base:
        np.testing.assert_array_equal(small[1], large[1])
    inside = [values(graph, [blocks[1].q, blocks[1].v], image) for graph in (half, changed)]
    for name, factor in ((blocks[1].q, 4), (blocks[1].v, 8)):
        exact = inside[0][name].astype(float)
        np.testing.assert_allclose(inside[1][name] * factor, exact, rtol=1e-2, atol=1e-2 * np.abs(exact).max())


def test_only_the_block_is_changed_where_constants_are_shared(make_weights):
    """Simplification stores equal constants once."""
    weights = make_weights(CONFIG)
    for block in (0, 2, 3):
        for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"):
            weights[f"encoder.blocks.{block}.{name}"] = weights[f"encoder.blocks.1.{name}"]
    half = to_fp16(build_graph(weights, CONFIG))
    for node in half.graph.node:
        for part in ("attn.q", "attn.k", "attn.v", "attn.proj"):
            if node.op_type == "MatMul" and re.fullmatch(rf"blocks\.\d\.{part}(\.product)?", node.output[0]):
                node.input[1] = f"blocks.0.{part}.weight"
    kept = [item for item in half.graph.initializer if not re.match(r"blocks\.[123]\.attn\.\w+\.weight", item.name)]
    kept = [copy_of(item) for item in kept]
    del half.graph.initializer[:]
    half.graph.initializer.extend(kept)
    onnx.checker.check_model(half)
    before = constants(half)
    changed = copy_of(half)
    change_attention(changed, [BOTH])
    after = constants(changed)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert {name: after[name].dtype for name in set(after) - set(before)} == {
        "blocks.1.attn.v/MatMul.scaled_1": np.float16,
        "blocks.1.attn.q/MatMul.scaled_1": np.float16,
        "blocks.1.attn.proj.product/MatMul.scaled_1": np.float16,
        "scores_times_4": np.float32,
    }


def test_a_changed_graph_is_not_changed_again(make_weights, checked, tmp_path):
    weights = with_loud(make_weights(CONFIG), CONFIG, 3, **SCORES)
    _, after, _ = checked(weights, CONFIG, least=0.99)
    again = copy_of(after)
    found = check_fp16(tmp_path / "plain.onnx", again, tiles_of(2), "sample", least=0.99)
    assert found.attention == ()
    assert again.SerializeToString() == after.SerializeToString()


def test_an_int8_graph_is_mended_as_well(make_weights, tmp_path):
    weights = with_loud(make_weights(CONFIG), CONFIG, 2, scores=300)
    plain = build_graph(weights, CONFIG)
    onnx.save(plain, tmp_path / "plain.onnx")
    found = calibrate(plain, tiles_of(3))
    graph = int8_graph(found.model, found.layers, found.scales)
    check = check_fp16(tmp_path / "plain.onnx", graph, tiles_of(2), "sample", least=0.5)
    assert [change.block for change in check.attention] == ["blocks.2.attn"]
    assert attention_blocks(graph)[2].fp32_softmax


def test_what_cannot_be_mended_is_refused(make_weights, checked, monkeypatch):
    monkeypatch.setattr("cdkd_edge.graph.fp16.change_attention", lambda half, changes: None)
    weights = with_loud(make_weights(CONFIG), CONFIG, 2, values_=3000)
    with pytest.raises(NumericalCheckError, match=r"FP16 cannot hold attention: blocks\.2\.attn: values") as caught:
        checked(weights, CONFIG)
    assert "FP32" in caught.value.hint


# --- what is said ---------------------------------------------------------------------------------


def test_the_manifest_says_what_was_changed(tmp_path, make_graph, make_weights):
    graph = make_graph(tmp_path, with_loud(make_weights(CONFIG), CONFIG, 2, values_=3000), CONFIG)
    told = []
    write_fp16(graph, tmp_path / "small.fp16.onnx", note=told.append)
    assert "labels in FP16 with other attention in blocks.2.attn" in told
    manifest = read_manifest(tmp_path / "small.fp16.onnx", GraphManifest)
    (change,) = manifest.conversion.attention
    assert (change.block, change.scores_in_fp32, change.scores_divided_by) == ("blocks.2.attn", False, 1)
    assert change.values_divided_by >= 2
    ours = {"runtime": "tensorrt", "artefact": manifest.artefact, "device": "Orin", "libraries": {}}
    counts = {"attention_blocks": 4, "attention_fused": 4, "build_seconds": 1.0}
    assert EngineManifest.of_graph(manifest, **ours, **counts).attention_changes == (change,)


def test_values_of_fp16_type_are_shown(make_weights):
    model = to_fp16(build_graph(make_weights(CONFIG), CONFIG))
    show_values(model, ["blocks.0.attn.q"], TensorProto.FLOAT16)
    (q,) = cpu_session(model).run(["blocks.0.attn.q"], {"image": tiles_of(1)})
    assert q.dtype == np.float16
