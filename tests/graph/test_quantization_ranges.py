"""From activations to scales: what is observed, which range is chosen, and smoothing that changes no function."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantization_helpers import (
    CLASS_TOKEN,
    CONFIG,
    NECK,
    NORMED,
    ROTARY,
    WINDOWS,
    constants,
    nodes_of,
    set_constant,
    tiles_of,
    values,
)

from cdkd_edge.core.errors import GraphError, UsageError
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.int8 import CalibrationOptions, calibrate, smooth
from cdkd_edge.graph.int8_ranges import (
    BINS,
    Observation,
    activation_scale,
    magnitudes,
    observe,
    quantize_weight,
    weight_scales,
)
from cdkd_edge.graph.layers import QuantizableLayer, quantizable_layers, weight_of, weight_only_layers
from cdkd_edge.graph.nodes import simplify_graph

BIN = 1 / 128
"""Relative width of a bin: 7 bits of mantissa."""
FP16 = 1 / 1024
"""Relative distance of FP16 numbers."""


@pytest.fixture(scope="module")
def plain(make_weights):
    """An FP32 graph. Not to be changed."""
    return build_graph(make_weights(CONFIG), CONFIG)


def copy_of(model):
    return onnx.ModelProto.FromString(model.SerializeToString())


# --- which layers ---------------------------------------------------------------------------------

LAYERS = [
    *(f"blocks.{index}.{part}" for index in range(4) for part in ("attn.proj", "mlp.fc1", "mlp.fc2")),
    "bottleneck",
    *(f"smooth.{index}" for index in (2, 1, 0)),
    "fuse",
]


@pytest.mark.parametrize(("config", "opset"), [(CONFIG, 17), (WINDOWS, 20), (CLASS_TOKEN, 19), (NECK, 20)])
def test_linears_of_blocks_and_3x3_convolutions_and_nothing_else(make_weights, config, opset):
    model = build_graph(make_weights(config), config, opset=opset)
    layers = quantizable_layers(model)
    assert [layer.name for layer in layers] == LAYERS
    dim, tokens, head = config.embed_dim, config.grid**2 + config.extra_tokens, config.head_channels
    *_, deepest = sides = config.map_sides
    by_name = {layer.name: layer for layer in layers}
    assert by_name["blocks.1.attn.proj"].macs == tokens * dim**2
    assert by_name["blocks.1.mlp.fc2"].macs == tokens * dim * config.mlp_dim
    assert by_name["bottleneck"].macs == deepest**2 * dim * head * 9
    assert by_name["fuse"].macs == sides[0] ** 2 * 4 * head * head * 9
    for layer in layers:
        outputs = weight_of(model, layer.weight).shape[layer.output_axis]
        assert outputs == {"proj": dim, "fc1": config.mlp_dim, "fc2": dim}.get(layer.name.rpartition(".")[2], head)
    ((node, name),) = weight_only_layers(model)
    assert (node, name) == ("context.taps/MatMul", "context.weight")


def test_a_graph_of_another_tool_has_none():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense/MatMul")]
    conv = helper.make_node("Conv", ["image", "k"], ["x"], name="stem/Conv", kernel_shape=[8, 8], strides=[8, 8])
    graph = helper.make_graph(
        [conv, *nodes],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 48, 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=[
            numpy_helper.from_array(np.zeros((4, 3, 8, 8), np.float32), "k"),
            numpy_helper.from_array(np.zeros((6, 6), np.float32), "w"),
        ],
    )
    with pytest.raises(GraphError, match="no layer that INT8 is for"):
        quantizable_layers(helper.make_model(graph))


# --- observing ------------------------------------------------------------------------------------


def pixels_graph(batch=1):
    """``image`` minus 128.5, in thirds, as tokens and as a map; what is observed is known exactly."""
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["real", "middle"], ["centred"]),
        helper.make_node("Div", ["centred", "three"], ["map"]),
        helper.make_node("Reshape", ["map", "shape"], ["tokens"]),
        helper.make_node("ReduceSum", ["map"], ["labels"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("labels", TensorProto.FLOAT, None)],
        initializer=[
            numpy_helper.from_array(np.float32(128.5), "middle"),
            numpy_helper.from_array(np.float32(3), "three"),
            numpy_helper.from_array(np.array([batch, 24, 8], np.int64), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


AS_TOKENS = QuantizableLayer("t", "t", "MatMul", "tokens", "", "", 1)
AS_MAP = QuantizableLayer("m", "m", "Conv", "map", "", "", 1)


def histogram_of(value):
    """By comparison with the bins' edges, not by looking at bits."""
    return np.bincount(np.searchsorted(magnitudes(), np.abs(value).ravel().astype(np.float64)), minlength=BINS)


def observation_of(value, channels=1):
    value = np.asarray(value, np.float32)
    return Observation(np.abs(value).reshape(-1, channels).max(axis=0), histogram_of(value))


@pytest.mark.parametrize("batch", [1, 3])
def test_maxima_and_histogram_are_numpys(batch):
    tiles = np.random.default_rng(1).integers(0, 256, (4, 3, 8, 8), np.uint8)
    tiles[:, 1] = tiles[:, 1] // 3  # a channel of negative values alone
    seen = observe(pixels_graph(batch), [AS_TOKENS, AS_MAP], tiles)
    exact = (tiles.astype(np.float32) - np.float32(128.5)) / np.float32(3)
    np.testing.assert_array_equal(seen["m"].channel_max, np.abs(exact).max(axis=(0, 2, 3)))
    np.testing.assert_array_equal(seen["t"].channel_max, np.abs(exact.reshape(4, 24, 8)).max(axis=(0, 1)))
    for observation in seen.values():
        np.testing.assert_array_equal(observation.histogram, histogram_of(exact))
        assert observation.histogram.sum() == exact.size
        assert np.abs(exact).max() <= observation.max <= np.abs(exact).max() * (1 + BIN)


def test_the_inputs_of_all_layers_are_observed(plain):
    tiles = tiles_of(2)
    layers = quantizable_layers(plain)
    seen = observe(plain, layers, tiles)
    both = [values(plain, [layer.input for layer in layers], tile[None]) for tile in tiles]
    for layer in layers:
        found = np.stack([each[layer.input] for each in both])
        axes = (0, 1, 2) if layer.op == "MatMul" else (0, 1, 3, 4)
        expected = np.abs(found).max(axis=axes)
        np.testing.assert_allclose(seen[layer.name].channel_max, expected, rtol=1e-3, atol=1e-4 * expected.max())
        assert seen[layer.name].histogram.sum() == found.size
        for share in (0.5, 0.9, 0.999):
            ours = magnitudes()[np.searchsorted(seen[layer.name].histogram.cumsum(), share * found.size)]
            exact = np.quantile(np.abs(found), share, method="inverted_cdf")
            assert ours == pytest.approx(exact, rel=BIN + 1e-3, abs=1e-4 * float(expected.max()))


def test_bins_are_narrow_at_every_magnitude():
    edges = magnitudes()
    assert len(edges) == BINS
    normal = edges[(edges > 1e-37) & (edges < 3e38)]
    assert (np.diff(normal) > 0).all()
    assert (np.diff(normal) / normal[:-1]).max() <= BIN * 1.001
    assert np.isfinite(edges).all()


def test_one_tile_is_held_at_a_time():
    """So that memory does not grow with the number of tiles."""
    alive, most = [], 0

    def source():
        nonlocal most
        for _ in range(20):
            tile = np.zeros((3, 8, 8), np.uint8)
            alive.append(weakref.ref(tile))
            yield tile
            del tile
            most = max(most, sum(reference() is not None for reference in alive))

    seen = observe(pixels_graph(), [AS_TOKENS], source())
    assert (len(alive), most) == (20, 1)
    assert seen["t"].histogram.shape == (BINS,)


def test_without_tiles_there_is_nothing_to_observe(plain):
    with pytest.raises(ValueError, match="no tile"):
        observe(plain, quantizable_layers(plain), [])
    with pytest.raises(ValueError, match="no tile"):
        calibrate(plain, [])


# --- ranges ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-6, 6e6))
def test_max_is_rounded_up_to_the_end_of_its_bin_and_the_next_fp16_number(largest):
    scale = activation_scale(observation_of([largest, -largest / 2]), "max")
    assert float(np.float16(scale)) == scale
    exact = float(np.float32(largest)) / 127
    assert scale >= exact
    assert scale <= max(exact * (1 + BIN + FP16), np.finfo(np.float16).tiny)


def test_zero_everywhere_has_a_scale_all_the_same():
    for calibrator in ("max", "percentile", "mse"):
        scale = activation_scale(observation_of(np.zeros(100)), calibrator)
        assert 0 < scale < 1e-3
        assert np.isfinite(1 / np.float16(scale))


def heavy_tailed(seed=0, size=200_000):
    generator = np.random.default_rng(seed)
    value = generator.laplace(0, 1, size)
    value[:5] = [900, -700, 500, 400, -300]
    return value.astype(np.float32)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999])
def test_percentile_is_numpys_within_a_bin(percentile):
    value = heavy_tailed()
    kept = 127 * activation_scale(observation_of(value), "percentile", percentile)
    exact = np.quantile(np.abs(value), percentile / 100, method="inverted_cdf")
    assert exact * (1 - 1e-6) <= kept <= exact * (1 + BIN + FP16)


def test_the_whole_range_is_100_per_cent():
    value = heavy_tailed()
    assert activation_scale(observation_of(value), "percentile", 100) == activation_scale(observation_of(value), "max")
    assert 127 * activation_scale(observation_of(value), "max") == pytest.approx(900, rel=BIN + FP16)


@pytest.mark.parametrize(
    ("value", "clips"),
    [
        (heavy_tailed(), True),
        (np.random.default_rng(0).normal(0, 1, 100_000), True),
        (np.random.default_rng(0).uniform(-1, 1, 100_000), False),
    ],
    ids=["heavy tailed", "normal", "uniform"],
)
def test_mse_is_near_the_best_range_of_all(value, clips):
    value = np.asarray(value, np.float32)

    def error(scale):
        return float(np.mean((np.clip(np.rint(value / scale), -128, 127) * scale - value) ** 2))

    largest = activation_scale(observation_of(value), "max")
    found = activation_scale(observation_of(value), "mse")
    best = min(error(largest * part) for part in np.linspace(0.01, 1, 150))
    reachable = min(error(largest * part) for part in np.linspace(0.05, 1, 96))
    assert error(found) <= 1.05 * reachable
    assert error(found) <= (1.05 if not clips else 2) * best
    assert (found < 0.98 * largest) == clips


def test_an_unknown_calibrator_and_senseless_options():
    for options in (
        {"calibrator": "kl"},
        {"percentile": 50.0},
        {"percentile": 100.1},
        {"percentile": float("nan")},
        {"alpha": 0.0},
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"calibrator": "max", "percentile": 99.9},
        {"calibrator": "mse", "percentile": 99.9},
    ):
        with pytest.raises(UsageError):
            CalibrationOptions(**options)
    CalibrationOptions(percentile=99.9)
    CalibrationOptions("max", alpha=None)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((12, 30), 1), ((30, 12, 3, 3), 0)])
def test_weights_have_a_scale_per_output_channel(shape, axis):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    channel = np.moveaxis(weight, axis, 0)  # a view
    channel[7] *= 1000
    channel[8] = 0
    channel[9] = -np.abs(channel[9])
    scales = weight_scales(weight, axis)
    assert scales.shape == (30,)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
    exact = np.abs(channel.reshape(30, -1)).max(axis=1) / 127
    assert (scales >= exact).all()
    used = np.arange(30) != 8
    assert (scales[used] <= exact[used] * (1 + FP16)).all()
    assert scales[8] > 0

    integers = quantize_weight(weight, scales, axis)
    assert integers.dtype == np.int8
    assert integers.shape == weight.shape
    assert integers.min() >= -127
    back = np.moveaxis(integers, axis, 0) * scales.reshape(30, *[1] * (weight.ndim - 1))
    assert (np.abs(back - channel).reshape(30, -1).max(axis=1) <= 0.501 * scales).all()
    assert (np.abs(np.moveaxis(integers, axis, 0)[used].reshape(29, -1)).max(axis=1) >= 126).all()
    assert not np.moveaxis(integers, axis, 0)[8].any()


def test_calibrated_scales_are_those_of_the_graph(plain):
    tiles = tiles_of(3)
    found = calibrate(plain, tiles, CalibrationOptions("max", alpha=None))
    assert found.smoothed == ()
    assert found.model.SerializeToString() == plain.SerializeToString()
    assert list(found.scales) == LAYERS
    for layer in found.layers:
        inputs = [np.abs(values(plain, [layer.input], tile[None])[layer.input]).max() for tile in tiles]
        assert 127 * found.scales[layer.name].activation == pytest.approx(max(inputs), rel=BIN + 2 * FP16)
        weight = weight_of(plain, layer.weight)
        np.testing.assert_array_equal(found.scales[layer.name].weight, weight_scales(weight, layer.output_axis))


def test_progress_tells_the_number_of_tiles(plain):
    told = []
    calibrate(plain, tiles_of(5), note=told.append)
    assert told == [f"{what}: tile {n} of 5" for what in ("channel maxima", "ranges") for n in range(1, 6)]


# --- smoothing ------------------------------------------------------------------------------------

SMOOTHED = [name for name in LAYERS if name.endswith(("fc1", "proj"))]


def smoothed(model, alpha=0.5, tiles=None):
    """A smoothed copy, the factors, and what was observed before."""
    model = copy_of(model)
    layers = quantizable_layers(model)
    tiles = tiles_of(3) if tiles is None else tiles
    seen = observe(model, layers, tiles)
    return model, smooth(model, layers, seen, alpha), seen


def assert_same_function(model, other, batch=1):
    image = tiles_of(batch, seed=7)
    expected = values(model, ["logits"], image)["logits"]
    found = values(other, ["logits"], image)["logits"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("config", "opset", "batch"), [(CONFIG, 20, 1), (WINDOWS, 17, 2), (ROTARY, 19, 2), (NORMED, 20, 1), (NECK, 20, 2)]
)
def test_the_function_stays_and_the_ranges_move(make_weights, config, opset, batch, alpha):
    model = build_graph(make_weights(config), config, opset=opset, batch=batch)
    weights = constants(model)
    before = model.SerializeToString()
    other, factors, seen = smoothed(model, alpha)
    assert model.SerializeToString() == before
    assert_same_function(model, other, batch)
    assert list(factors) == SMOOTHED
    after = observe(other, quantizable_layers(other), tiles_of(3))
    for name, factor in factors.items():
        row = np.abs(weights[f"{name}.weight"]).max(axis=1).astype(np.float64)
        exact = seen[name].channel_max ** alpha / row ** (1 - alpha)
        assert (np.abs(np.log2(factor / exact)) < 0.501).all()
        assert (np.frexp(factor)[0] == 0.5).all(), "powers of two round nothing"
        assert exact.max() > 1.2 * exact.min()
        np.testing.assert_allclose(after[name].channel_max, seen[name].channel_max / factor, rtol=2e-3)
    for name in set(LAYERS) - set(SMOOTHED):
        np.testing.assert_allclose(after[name].channel_max, seen[name].channel_max, rtol=2e-3, atol=1e-5)


def test_at_alpha_1_all_channels_have_one_range_but_for_a_power_of_two(plain):
    other, _, _ = smoothed(plain, 1.0)
    after = observe(other, quantizable_layers(other), tiles_of(3))
    for name in SMOOTHED:
        assert (np.abs(np.log2(after[name].channel_max)) < 0.501).all()


def test_outliers_move_into_weights(make_weights):
    """What smoothing is for: one loud channel no longer takes the resolution of all others."""
    weights = make_weights(CONFIG)
    weights["encoder.blocks.1.norm2.weight"][5] = 40
    model = build_graph(weights, CONFIG)
    _, factors, seen = smoothed(model)
    spread = seen["blocks.1.mlp.fc1"].channel_max
    less = spread / factors["blocks.1.mlp.fc1"]
    assert less.max() / np.median(less) < 0.5 * spread.max() / np.median(spread)


def test_silent_channels_are_left_alone(make_weights):
    weights = make_weights(CONFIG)
    weights["encoder.blocks.0.norm2.weight"][3] = weights["encoder.blocks.0.norm2.bias"][3] = 0
    weights["encoder.blocks.0.mlp.fc1.weight"][:, 4] = 0
    weights["encoder.blocks.2.norm2.weight"][:] = weights["encoder.blocks.2.norm2.bias"][:] = 0
    model = build_graph(weights, CONFIG)
    other, factors, _ = smoothed(model)
    assert factors["blocks.0.mlp.fc1"][3] == factors["blocks.0.mlp.fc1"][4] == 1
    assert factors["blocks.0.mlp.fc1"][5] != 1
    assert (factors["blocks.2.mlp.fc1"] == 1).all()
    assert_same_function(model, other)


def share_equal_constants(model):
    """As onnxsim does: equal constants are stored once."""
    first, renamed = {}, {}
    for item in model.graph.initializer:
        key = (item.data_type, tuple(item.dims), numpy_helper.to_array(item).tobytes())
        renamed[item.name] = first.setdefault(key, item.name)
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    kept = [copy for copy in model.graph.initializer if renamed[copy.name] == copy.name]
    kept = [onnx.TensorProto.FromString(item.SerializeToString()) for item in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def test_constants_that_nodes_share_are_not_spoilt(make_weights):
    """Norms of two blocks share scale and bias, one has a scale that is its bias, two blocks share all linears.

    All norms before attention share their constants anyway.
    """
    weights = make_weights(CONFIG)
    for part in ("weight", "bias"):
        for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1"):
            weights[f"encoder.blocks.1.{name}.{part}"] = weights[f"encoder.blocks.0.{name}.{part}"]
    weights["encoder.blocks.2.norm2.bias"] = weights["encoder.blocks.2.norm2.weight"]
    separate = build_graph(weights, CONFIG)
    shared = share_equal_constants(copy_of(separate))
    assert len(shared.graph.initializer) <= len(separate.graph.initializer) - 11
    other, factors, _ = smoothed(shared)
    assert list(factors) == SMOOTHED
    assert not np.allclose(factors["blocks.0.mlp.fc1"], factors["blocks.1.mlp.fc1"], rtol=1e-2)
    assert_same_function(separate, shared)
    assert_same_function(separate, other)
    found = calibrate(shared, tiles_of(3))
    assert_same_function(separate, found.model)


def test_biases_that_are_not_there(make_weights):
    """Simplification removes the addition of zeros."""
    pytest.importorskip("onnxsim")
    weights = make_weights(CONFIG)
    for index in range(4):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
            weights[f"encoder.blocks.{index}.{name}.bias"][:] = 0
    model = build_graph(weights, CONFIG)
    simple = simplify_graph(copy_of(model))
    assert len(nodes_of(simple, "Add")) < len(nodes_of(model, "Add"))
    layers = quantizable_layers(simple)
    assert [layer.name for layer in layers] == LAYERS
    other, factors, _ = smoothed(simple)
    assert list(factors) == SMOOTHED
    assert_same_function(model, other)


def test_few_tiles_are_enough_for_smoothing(plain):
    """Of 40 tiles at least 16, spread over all of them, are looked at before smoothing."""
    told = []
    calibrate(plain, tiles_of(40), note=told.append)
    first = [step for step in told if step.startswith("channel maxima")]
    assert 16 <= len(first) <= 32
    assert first[-1].endswith(f"tile {len(first)} of {len(first)}")
    assert sum(step.startswith("ranges") for step in told) == 40


def test_a_layer_is_a_value(plain):
    """Layers of two readings of a graph are equal, so that results can be compared."""
    assert quantizable_layers(plain) == quantizable_layers(copy_of(plain))
    assert dataclasses.replace(AS_MAP, name="x") != AS_MAP
    changed = copy_of(plain)
    set_constant(changed, "fuse.weight", constants(plain)["fuse.weight"] * 2)
    assert quantizable_layers(changed) == quantizable_layers(plain)
