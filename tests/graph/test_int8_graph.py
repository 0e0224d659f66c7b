"""The INT8 graph, its twin for a CPU, and the noise of its layers: what is where, and that both compute the same."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
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
    nodes_of,
    session_of,
    set_constant,
    tiles_of,
    values,
)
from reference import _conv as convolution

from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import cpu_twin, fuse_attention, signed_weights_are_exact, to_fp32
from cdkd_edge.graph.fp16_simulation import fp16_on_cpu
from cdkd_edge.graph.int8 import CalibrationOptions, calibrate, int8_graph
from cdkd_edge.graph.int8_ranges import NOISELESS, signal_to_noise
from cdkd_edge.graph.layers import quantizable_layers, weight_of
from cdkd_edge.graph.nodes import CONTRIB_DOMAIN, simplify_graph

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
Q, DQ = "QuantizeLinear", "DequantizeLinear"

QUANTISED = {
    *(f"blocks.{i}.{part}.product/MatMul" for i in range(4) for part in ("attn.proj", "mlp.fc1", "mlp.fc2")),
    "bottleneck.conv/Conv",
    "smooth.0.conv/Conv",
    "smooth.1.conv/Conv",
    "smooth.2.conv/Conv",
    "fuse.conv/Conv",
}
WEIGHT_ONLY = {"context.taps/MatMul"}


def quantised(model, tiles=None, keep=(), **options):
    """A calibrated graph, and its INT8 graph."""
    found = calibrate(model, tiles_of(4) if tiles is None else tiles, CalibrationOptions(**options))
    scales = {name: scale for name, scale in found.scales.items() if name not in keep}
    return found, int8_graph(found.model, found.layers, scales)


@pytest.fixture(scope="module")
def plain(make_weights):
    """An FP32 graph. Not to be changed."""
    return build_graph(centred(make_weights(CONFIG), CONFIG), CONFIG)


@pytest.fixture(scope="module")
def made(plain):
    """Calibrated, and its INT8 graph. Not to be changed."""
    return quantised(plain)


def makers(model):
    return {output: node for node in model.graph.node for output in node.output}


# --- where Q and DQ are ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "opset", "batch"), [(CONFIG, 19, 1), (WINDOWS, 20, 2), (ROTARY, 20, 2), (NORMED, 20, 1), (NECK, 20, 2)]
)
def test_q_and_dq_are_on_inputs_of_the_layers_for_int8_and_nowhere_else(make_weights, config, opset, batch):
    _, graph = quantised(build_graph(make_weights(config), config, opset=opset, batch=batch))
    onnx.checker.check_model(graph, full_check=True)
    made_by = makers(graph)
    activations, weights = set(), set()
    for node in graph.graph.node:
        if node.op_type in (Q, DQ):
            continue
        for position, name in enumerate(node.input):
            maker = made_by.get(name)
            if maker is None or maker.op_type not in (Q, DQ):
                continue
            assert maker.op_type == DQ, f"{node.name} takes integers"
            before = made_by.get(maker.input[0])
            if position == 0:
                assert before.op_type == Q
                assert before.input[1:] == maker.input[1:]
                activations.add(node.name)
            else:
                assert position == 1, f"{node.name}: only weights, no biases"
                assert before is None
                weights.add(node.name)
    assert activations == QUANTISED
    assert weights == QUANTISED | WEIGHT_ONLY
    ops = Counter(node.op_type for node in graph.graph.node)
    assert ops[Q] == len(QUANTISED)
    assert ops[DQ] == 2 * len(QUANTISED) + len(WEIGHT_ONLY)
    users = Counter(name for node in graph.graph.node for name in node.input)
    assert all(users[node.output[0]] == 1 for node in graph.graph.node if node.op_type in (Q, DQ))
    for op in ("LayerNormalization", "Softmax", "Gelu", "Add", "Relu", "Concat", "Resize", "Split", "Transpose"):
        for node in nodes_of(graph, op):
            assert not any(made_by[name].op_type in (Q, DQ) for name in node.input if name in made_by), node.name


def test_attention_is_still_fused(made):
    graph = onnx.ModelProto.FromString(made[1].SerializeToString())
    assert fuse_attention(graph) == (4, 4)


def test_what_is_stored_and_in_which_type(made, plain):
    found, graph = made
    stored, made_by = constants(graph), makers(graph)
    assert {value.dtype.name for value in stored.values()} == {"int8", "float16", "int64", "float32"}
    assert [name for name, value in stored.items() if value.dtype == np.float32] == [
        nodes_of(graph, "Resize")[0].input[2]
    ]
    for layer in found.layers:
        node = next(item for item in graph.graph.node if item.name == layer.node)
        on_input, on_weight = made_by[node.input[0]], made_by[node.input[1]]
        scale, zero = (stored[name] for name in on_input.input[1:])
        # A scale of one dimension counts as per axis; TensorRT then computes the layer in FP16, without a word.
        assert (scale.shape, scale.dtype, zero.shape, zero.dtype) == ((), np.float16, (), np.int8)
        assert zero == 0
        assert float(scale) == found.scales[layer.name].activation
        integers, scales, zeros = (stored[name] for name in on_weight.input)
        assert layer.output_axis == {"MatMul": 1, "Conv": 0}[node.op_type]
        outputs = integers.shape[layer.output_axis]
        assert (integers.dtype, scales.dtype, zeros.dtype) == (np.int8, np.float16, np.int8)
        assert scales.shape == zeros.shape == (outputs,)
        assert not zeros.any()
        assert [item.i for item in on_weight.attribute if item.name == "axis"] == [layer.output_axis]
        assert not on_input.attribute  # per tensor: no axis
        exact = np.moveaxis(weight_of(found.model, layer.weight), layer.output_axis, -1)
        back = np.moveaxis(integers, layer.output_axis, -1) * scales.astype(np.float32)
        assert (np.abs(back - exact) <= 0.501 * scales.astype(np.float32)).all()
        assert integers.min() >= -127
        if node.op_type == "Conv":
            assert stored[node.input[2]].dtype == np.float16  # the bias
        else:
            (add,) = [item for item in graph.graph.node if node.output[0] in item.input]
            assert add.op_type == "Add"
            assert {stored[name].dtype for name in add.input if name in stored} == {np.dtype(np.float16)}
    assert casts(graph) == {"FLOAT16": 1, "UINT8": 1}
    for name in (layer.weight for layer in quantizable_layers(plain)):
        assert name not in stored  # not kept beside the integers
    assert len(graph.SerializeToString()) < 0.5 * len(plain.SerializeToString())


def test_the_context_matrix_is_stored_as_integers_only(made):
    graph = made[1]
    (node,) = [item for item in graph.graph.node if item.name == "context.taps/MatMul"]
    dequantise = makers(graph)[node.input[1]]
    assert constants(graph)[dequantise.input[0]].dtype == np.int8
    assert makers(graph)[node.input[0]].op_type == "Relu"


def test_kept_layers_stay_fp16(plain):
    keep = ("blocks.0.mlp.fc2", "fuse")
    found, graph = quantised(plain, keep=keep)
    ops = Counter(node.op_type for node in graph.graph.node)
    assert ops[Q] == len(QUANTISED) - 2
    stored = constants(graph)
    for layer in found.layers:
        if layer.name in keep:
            node = next(item for item in graph.graph.node if item.name == layer.node)
            assert list(node.input[:2]) == [layer.input, layer.weight]
            assert stored[layer.weight].dtype == np.float16
    onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize("opset", [17, 18])
def test_opsets_without_fp16_scales_are_refused(make_weights, opset):
    with pytest.raises(GraphError, match=rf"opset 19 or newer; this one has opset {opset}") as caught:
        quantised(build_graph(make_weights(CONFIG), CONFIG, opset=opset))
    assert "--opset 20" in caught.value.hint


def test_the_fp32_graph_stays_as_it_is(plain):
    before = plain.SerializeToString()
    found, _ = quantised(plain)
    calibrated = found.model.SerializeToString()
    int8_graph(found.model, found.layers, found.scales)
    assert plain.SerializeToString() == before
    assert found.model.SerializeToString() == calibrated


# --- the twin -------------------------------------------------------------------------------------


def agreement(first, second):
    return float((first == second).mean())


@pytest.mark.parametrize(
    ("config", "opset", "batch"), [(CONFIG, 20, 1), (WINDOWS, 19, 2), (ROTARY, 20, 2), (NORMED, 20, 1), (NECK, 20, 2)]
)
def test_the_twin_computes_what_the_graph_computes(make_weights, config, opset, batch):
    """The graph with its Q/DQ in FP32: integers and scales are the same, so only sums in another order differ."""
    _, graph = quantised(build_graph(centred(make_weights(config), config), config, opset=opset, batch=batch))
    image = tiles_of(batch, seed=11)
    names = ["labels", "logits", "blocks.0.attn.proj"]
    exact, found = values(to_fp32(graph), names, image), values(cpu_twin(graph), names, image)
    projected = exact["blocks.0.attn.proj"]
    assert np.abs(found["blocks.0.attn.proj"] - projected).max() < 1e-5 * np.abs(projected).max()
    # further on, a rounding more or less in FP32 may move a value by a whole step
    error = np.abs(found["logits"] - exact["logits"])
    assert error.mean() < 5e-3 * np.abs(exact["logits"]).max()
    assert agreement(found["labels"], exact["labels"]) > 0.98


def test_the_twin_is_the_fp16_graph_but_for_rounding(made):
    """ONNX Runtime runs the graph for TensorRT as it is, Q/DQ in FP16.

    In the first layer FP16 changes far less than INT8 does. Later a value here and there falls on the other side of
    a quantiser's step; both graphs are then INT8's noise away from FP32, and no farther from each other.
    """
    graph = made[1]
    image = tiles_of(1, seed=11)
    names = ["labels", "logits", "blocks.0.attn.proj"]
    exact, rounded = values(graph, names, image), values(fp16_on_cpu(graph), names, image)
    found, wide = values(cpu_twin(graph), names, image), values(made[0].model, names, image)
    # ONNX Runtime 1.23 (the last for Python 3.10) computes the FP16 graph with Q/DQ farther from FP32 than INT8 is, and
    # as far from the same graph with every value rounded: it is no reference there.
    trusted = (exact, rounded) if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24) else (rounded,)
    for other in trusted:
        for name, part in (("logits", 1.6), ("blocks.0.attn.proj", 0.5)):
            error = np.abs(found[name] - other[name].astype(np.float32)).mean()
            assert error < part * np.abs(found[name] - wide[name]).mean()
            assert np.abs(found[name] - wide[name]).mean() < 0.02 * np.abs(wide[name]).max()
        assert agreement(found["labels"], other["labels"]) > 0.95


def test_the_twin_is_in_integers(made):
    twin = cpu_twin(made[1])
    ops = Counter(node.op_type for node in twin.graph.node)
    assert ops["MatMulIntegerToFloat"] == ops[Q] == len(QUANTISED)
    assert ops["Conv"] == ops["ArgMax"] == 1  # classifier and the best class
    assert ops[DQ] == len(WEIGHT_ONLY)
    assert casts(twin) == {"FLOAT": 1, "UINT8": 1}
    stored = constants(twin)
    assert not any(value.dtype == np.float16 for value in stored.values())
    used = {name for node in twin.graph.node for name in node.input}
    assert set(stored) <= used
    for node in nodes_of(twin, "MatMulIntegerToFloat"):
        assert stored[node.input[1]].dtype == (np.int8 if signed_weights_are_exact() else np.uint8)
        assert int(stored[node.input[4]]) == 128
    fuse_attention(twin)
    assert sorted(item.domain for item in twin.opset_import) == ["", CONTRIB_DOMAIN]


def test_the_graph_itself_is_not_changed(made):
    before = made[1].SerializeToString()
    cpu_twin(made[1])
    assert made[1].SerializeToString() == before


def test_a_graph_without_int8_has_no_twin(plain):
    with pytest.raises(GraphError, match="no quantised layer"):
        cpu_twin(plain)
    found = calibrate(plain, tiles_of(1))
    with pytest.raises(GraphError, match="no quantised layer"):
        cpu_twin(int8_graph(found.model, found.layers, {}))


def test_biases_that_simplification_removed(make_weights):
    pytest.importorskip("onnxsim")
    weights = centred(make_weights(CONFIG), CONFIG)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        weights[f"encoder.blocks.1.{name}.bias"][:] = 0
    model = simplify_graph(build_graph(weights, CONFIG))
    assert len(nodes_of(model, "Add")) < len(nodes_of(build_graph(weights, CONFIG), "Add"))
    _, graph = quantised(model)
    onnx.checker.check_model(graph, full_check=True)
    image = tiles_of(1, seed=11)
    exact, found = (values(each, ["labels", "logits"], image) for each in (to_fp32(graph), cpu_twin(graph)))
    assert np.abs(found["logits"] - exact["logits"]).mean() < 5e-3 * np.abs(exact["logits"]).max()
    ops = Counter(node.op_type for node in cpu_twin(graph).graph.node)
    assert ops["MatMulIntegerToFloat"] == len(QUANTISED)


def one_layer(op, weight, bias, shape, scale):
    """A single quantised layer on FP32 values made of pixels, as the graph for TensorRT has it, in FP32."""
    axis = 1 if op == "MatMul" else 0
    scales = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / 127
    spread = [1] * weight.ndim
    spread[axis] = -1
    integers = np.rint(weight / scales.reshape(spread)).astype(np.int8)
    stored = {
        "middle": np.float32(100),
        "shape": np.array(shape, np.int64),
        "s": np.float32(scale),
        "z": np.int8(0),
        "w": integers,
        "ws": scales.astype(np.float32),
        "wz": np.zeros(len(scales), np.int8),
    }
    inputs = ["x", "weight"]
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=FLOAT),
        helper.make_node("Sub", ["real", "middle"], ["centred"]),
        helper.make_node("Reshape", ["centred", "shape"], ["value"]),
        helper.make_node(Q, ["value", "s", "z"], ["q"]),
        helper.make_node(DQ, ["q", "s", "z"], ["x"]),
        helper.make_node(DQ, ["w", "ws", "wz"], ["weight"], axis=axis),
    ]
    if bias is not None:
        stored["bias"] = bias.astype(np.float32)
    if op == "Conv":
        inputs += ["bias"] if bias is not None else []
        nodes.append(helper.make_node("Conv", inputs, ["y"], kernel_shape=[3, 3], pads=[1] * 4))
    else:
        nodes.append(helper.make_node("MatMul", inputs, ["y" if bias is None else "product"]))
        if bias is not None:
            nodes.append(helper.make_node("Add", ["product", "bias"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, list(shape))],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        initializer=[numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    dequantised = integers * scales.reshape(spread)
    return model, dequantised.astype(np.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "side"), [(1, 1, 1, 3), (1, 5, 7, 6), (2, 16, 24, 9), (3, 3, 4, 1)]
)
def test_a_convolution_as_a_product_is_the_convolution(batch, inputs, outputs, side, bias):
    """Borders are zeros, not the smallest integer; values beyond the range are cut off at -128 and 127 steps."""
    generator = np.random.default_rng(inputs)
    weight = generator.normal(0, 1, (outputs, inputs, 3, 3)).astype(np.float32)
    own = generator.normal(0, 10, outputs) if bias else None
    shape, scale = (batch, inputs, side, side), 0.75
    model, dequantised = one_layer("Conv", weight, own, shape, scale)
    image = generator.integers(0, 256, shape, np.uint8)
    image.ravel()[:2] = 0, 255
    x = np.clip(np.rint((image - 100.0) / scale), -128, 127) * scale
    assert x.min() == -128 * scale  # cut off on both sides
    assert x.max() == 127 * scale
    expected = convolution(x, dequantised) + (0 if own is None else own.reshape(-1, 1, 1))
    twin = cpu_twin(model)
    assert not nodes_of(twin, "Conv")
    (found,) = session_of(twin).run(["y"], {"image": image})
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    (graph,) = session_of(model).run(["y"], {"image": image})
    np.testing.assert_allclose(found, graph, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("strides", [2, 2]), ("dilations", [2, 2]), ("pads", [0] * 4), ("pads", None), ("group", 2)],
)
def test_other_convolutions_are_left_alone(attribute, value):
    """They cannot be written as that product; a wrong one would be worse than a slow one."""
    weight = np.ones((4, 2 if attribute == "group" else 4, 3, 3), np.float32)
    model, _ = one_layer("Conv", weight, None, (1, 4, 6, 6), 1.0)
    (node,) = nodes_of(model, "Conv")
    kept = [item for item in node.attribute if item.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(attribute, value))
    with pytest.raises(GraphError, match="no quantised layer"):
        cpu_twin(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 1, 1), 1), ((1, 9, 16), 40), ((2, 37, 10), 6)])
def test_a_linear_in_integers_is_the_linear(shape, outputs, bias):
    generator = np.random.default_rng(outputs)
    weight = generator.normal(0, 1, (shape[-1], outputs)).astype(np.float32)
    own = generator.normal(0, 10, outputs) if bias else None
    model, dequantised = one_layer("MatMul", weight, own, shape, 0.5)  # 0.5: many values lie between two steps
    image = generator.integers(0, 256, shape, np.uint8)
    x = np.clip(np.rint((image - 100.0) / 0.5), -128, 127) * 0.5
    expected = x @ dequantised + (0 if own is None else own)
    (found,) = session_of(cpu_twin(model)).run(["y"], {"image": image})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_residual_sum_is_not_taken_for_a_bias(plain):
    """Without a bias, what follows the product adds tokens; that sum must stay."""
    pytest.importorskip("onnxsim")
    model = onnx.ModelProto.FromString(plain.SerializeToString())
    for index in range(4):
        for part in ("attn.proj", "mlp.fc2"):
            name = f"blocks.{index}.{part}.bias"
            set_constant(model, name, np.zeros_like(constants(model)[name]))
    simple = simplify_graph(model)
    _, graph = quantised(simple)
    residual = [node.output[0] for node in nodes_of(graph, "Add") if not set(node.input) & set(constants(graph))]
    assert len(residual) >= 8
    kept = {node.output[0] for node in nodes_of(cpu_twin(graph), "Add")}
    assert set(residual) <= kept


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "batch"), [(CONFIG, 1), (CLASS_TOKEN, 2)])
def test_signal_to_noise_is_numpys(make_weights, config, batch):
    model = build_graph(make_weights(config), config, batch=batch)
    tiles = tiles_of(2, seed=21)
    found, _ = quantised(model)
    ours = signal_to_noise(found.model, found.layers, found.scales, tiles)
    assert list(ours) == [layer.name for layer in found.layers]
    for layer in found.layers:
        own = found.scales[layer.name]
        weight = weight_of(found.model, layer.weight).astype(np.float64)
        spread = [1] * weight.ndim
        spread[layer.output_axis] = -1
        per_channel = own.weight.astype(np.float64).reshape(spread)
        coarse = np.clip(np.rint(weight / per_channel), -127, 127) * per_channel
        signal = noise = 0.0
        for tile in tiles:
            image = np.repeat(tile[None], batch, axis=0)
            x = values(found.model, [layer.input], image)[layer.input].astype(np.float64)
            rounded = np.clip(np.rint(x / own.activation), -128, 127) * own.activation
            exact = x @ weight if layer.op == "MatMul" else convolution(x, weight)
            noisy = rounded @ coarse if layer.op == "MatMul" else convolution(rounded, coarse)
            signal += (exact**2).sum()
            noise += ((exact - noisy) ** 2).sum()
        decibels = 10 * math.log10(signal / noise)
        assert ours[layer.name] == pytest.approx(decibels, abs=0.1)
        assert 10 < decibels < 60


def test_a_bias_hides_no_noise(make_weights):
    """It is part of no product: convolutions, which have it inside, are measured as linears are."""
    weights = make_weights(CONFIG)
    model = build_graph(weights, CONFIG)
    found, _ = quantised(model)
    before = signal_to_noise(found.model, found.layers, found.scales, tiles_of(1))["fuse"]
    louder = onnx.ModelProto.FromString(found.model.SerializeToString())
    set_constant(louder, "fuse.bias", constants(louder)["fuse.bias"] + 100)
    after = signal_to_noise(louder, found.layers, found.scales, tiles_of(1))["fuse"]
    assert after == pytest.approx(before, abs=0.1)


def test_only_layers_with_scales_are_measured(made):
    found = made[0]
    two = {name: found.scales[name] for name in ("fuse", "blocks.1.mlp.fc1")}
    assert list(signal_to_noise(found.model, found.layers, two, tiles_of(1))) == ["blocks.1.mlp.fc1", "fuse"]


def test_a_coarser_layer_is_noisier(made):
    """And no other is: everything before a layer is in FP32."""
    found = made[0]
    before = signal_to_noise(found.model, found.layers, found.scales, tiles_of(1))
    own = found.scales["blocks.1.mlp.fc1"]
    coarse = {**found.scales, "blocks.1.mlp.fc1": type(own)(own.activation * 8, own.weight)}
    after = signal_to_noise(found.model, found.layers, coarse, tiles_of(1))
    assert after.pop("blocks.1.mlp.fc1") < before.pop("blocks.1.mlp.fc1") - 10
    assert after == pytest.approx(before, abs=1e-3)


def test_a_layer_that_gives_zeros_has_no_noise(make_weights):
    """It is not the noisiest; and its number is one that JSON can hold."""
    weights = make_weights(CONFIG)
    weights["encoder.blocks.2.mlp.fc2.weight"][:] = 0
    found, _ = quantised(build_graph(weights, CONFIG))
    noise = signal_to_noise(found.model, found.layers, found.scales, tiles_of(1))
    assert noise["blocks.2.mlp.fc2"] == NOISELESS == max(noise.values())
    json.dumps(noise, allow_nan=False)
