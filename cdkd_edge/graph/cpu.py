"""The CPU twin of an INT8 graph: the same integers and scales, in operators that ONNX Runtime has kernels for.

The INT8 graph is written for TensorRT: FP16, Q/DQ on inputs, floating-point biases. ONNX Runtime on a CPU runs that
far slower than FP32. Its integer kernel for a product without a quantised result is ``MatMulIntegerToFloat`` (domain
``com.microsoft``), and only unsigned activations are fast there: the twin stores ``q + 128`` as uint8, the same number.
Weights are stored so too on a CPU whose products with signed ones are wrong
(:func:`cdkd_edge.graph.session.signed_weights_are_exact`).
A 3x3 convolution becomes such a product too, on the nine shifted copies of its uint8 map side by side: ONNX Runtime's
own integer convolutions either round their result to 8 bits, which TensorRT does not, or take four times as long
as FP32. Everything else is FP32, with the weights of the INT8 graph.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph.fuse import CONTRIB_DOMAIN
from cdkd_edge.graph.session import signed_weights_are_exact

_ZERO = 128
"""The uint8 that stands for 0."""
_END = np.iinfo(np.int64).max


def cpu_twin(int8: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime computes on a CPU in place of an INT8 graph.

    Args:
        int8: a graph that :mod:`cdkd_edge.quantization` wrote; left as it is.

    Raises:
        GraphError: it has no quantised layer.
    """
    twin = to_fp32(int8)
    graph = twin.graph
    writer = _Writer({item.name: item for item in graph.initializer})
    matcher = _Matcher(graph)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        layer = matcher.quantized_layer(node)
        if layer:
            replaced[node.output[0]] = writer.linear(layer) if node.op_type == "MatMul" else writer.convolution(layer)
            if layer.bias_node:
                replaced[layer.output] = []
    if not replaced:
        raise GraphError("the graph has no quantised layer", hint="make it again: cdkd-edge build --int8")
    nodes = []
    for node in graph.node:
        nodes += replaced.get(node.output[0], [_copy(node)])
    needed = _needed(nodes, [output.name for output in graph.output])
    used = {name for node in needed for name in node.input}
    constants = [_copy_tensor(item) for name, item in writer.constants.items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(needed)
    graph.initializer.extend(constants)
    twin.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return twin


def to_fp32(half: onnx.ModelProto) -> onnx.ModelProto:
    """An FP16 graph with its constants and casts widened to FP32."""
    model = onnx.ModelProto()
    model.CopyFrom(half)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT16:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    return model


@dataclass(frozen=True)
class _Layer:
    """``Q -> DQ -> MatMul or Conv (DQ of integers) -> Add``, a convolution's bias being its own input."""

    input: str
    input_scale: str
    weight: str
    weight_scale: str
    bias: str
    bias_node: bool
    """Whether an ``Add`` of its own adds the bias."""
    output: str


class _Matcher:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._maker = {output: node for node in graph.node for output in node.output}
        self._constants = {item.name: item for item in graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def quantized_layer(self, node: onnx.NodeProto) -> _Layer | None:
        """The layer around a node; None if its input or its weight is not quantised."""
        if node.op_type not in ("MatMul", "Conv"):
            return None
        real, weight = (self._maker.get(name) for name in node.input[:2])
        if real is None or weight is None or {real.op_type, weight.op_type} != {"DequantizeLinear"}:
            return None
        quantized = self._maker.get(real.input[0])
        if quantized is None or quantized.op_type != "QuantizeLinear" or weight.input[0] not in self._constants:
            return None
        parts = quantized.input[0], quantized.input[1], weight.input[0], weight.input[1]
        output = node.output[0]
        if node.op_type == "Conv":
            if list(self._constants[weight.input[0]].dims[2:]) != [3, 3] or not _is_same_size(node):
                return None
            return _Layer(*parts, node.input[2] if len(node.input) > 2 else "", False, output)
        following = self._users.get(output, [])
        if len(following) == 1 and following[0].op_type == "Add":
            found = [name for name in following[0].input if name in self._constants]
            if found:
                return _Layer(*parts, found[0], True, following[0].output[0])
        return _Layer(*parts, "", False, output)


class _Writer:
    """Makes the nodes of quantised layers, and the constants they need."""

    def __init__(self, constants: dict[str, onnx.TensorProto]) -> None:
        self.constants = constants
        self._constant("uint8_zero", np.array(_ZERO, np.uint8))

    def linear(self, layer: _Layer) -> list[onnx.NodeProto]:
        """``[N, L, K]`` to ``[N, L, M]``."""
        add, nodes = _collect(layer.output)
        integers = add("QuantizeLinear", "uint8", [layer.input, layer.input_scale, "uint8_zero"])
        nodes.append(self._product(integers, layer.weight, layer, layer.output))
        return nodes

    def convolution(self, layer: _Layer) -> list[onnx.NodeProto]:
        """``[N, C, G, G]`` to ``[N, M, G, G]``, 3x3, zero-padded."""
        add, nodes = _collect(layer.output)
        kernel = numpy_helper.to_array(self.constants[layer.weight])  # [M, C, 3, 3]
        rows = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))  # [9 C, M], tap by tap
        weight = self._constant(f"{layer.weight}.rows", rows)
        integers = add("QuantizeLinear", "uint8", [layer.input, layer.input_scale, "uint8_zero"])
        last = add("Transpose", "channels_last", [integers], perm=[0, 2, 3, 1])
        pads = self._constant("pad_map", np.array([0, 1, 1, 0, 0, 1, 1, 0], np.int64))
        padded = add("Pad", "padded", [last, pads, "uint8_zero"])  # [N, G + 2, G + 2, C]
        axes = self._constant("map_axes", np.array([1, 2], np.int64))
        taps = []
        for down in range(3):
            for right in range(3):
                first = self._constant(f"tap_{down}_{right}", np.array([down, right], np.int64))
                ends = [_END if start == 2 else start - 2 for start in (down, right)]
                end = self._constant(f"tap_end_{down}_{right}", np.array(ends, np.int64))
                taps.append(add("Slice", f"tap_{down}_{right}", [padded, first, end, axes]))
        shifted = add("Concat", "taps", taps, axis=3)  # [N, G, G, 9 C]
        product = f"{layer.output}.product"
        nodes.append(self._product(shifted, weight, layer, product))
        nodes.append(
            helper.make_node("Transpose", [product], [layer.output], name=f"{product}/Transpose", perm=[0, 3, 1, 2])
        )
        return nodes

    def _product(self, integers: str, weight: str, layer: _Layer, output: str) -> onnx.NodeProto:
        zero = ""
        if not signed_weights_are_exact():
            signed = numpy_helper.to_array(self.constants[weight]).astype(np.int16)
            weight, zero = self._constant(f"{weight}.unsigned", (signed + _ZERO).astype(np.uint8)), "uint8_zero"
        inputs = [integers, weight, layer.input_scale, layer.weight_scale, "uint8_zero", zero]
        return helper.make_node(
            "MatMulIntegerToFloat",
            [*inputs, layer.bias] if layer.bias else inputs,
            [output],
            name=f"{output}/MatMulIntegerToFloat",
            domain=CONTRIB_DOMAIN,
        )

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name


def _collect(prefix: str) -> tuple[Callable[..., str], list[onnx.NodeProto]]:
    """A list of nodes, and what appends to it and returns the new value's name."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{prefix}.{name}"
        nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    return add, nodes


def _needed(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """Nodes that something still uses, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _is_same_size(node: onnx.NodeProto) -> bool:
    """Whether a 3x3 convolution is zero-padded, dense, of one group and without a stride."""
    attributes = _attributes(node)
    plain = all(set(np.ravel(attributes.get(name, 1))) == {1} for name in ("strides", "dilations", "group"))
    return plain and attributes.get("pads") == [1, 1, 1, 1]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _copy_tensor(item: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(item)
    return copy
