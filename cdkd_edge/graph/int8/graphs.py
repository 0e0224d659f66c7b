"""The INT8 graph: FP16 with explicit Q/DQ on the input and the weights of the layers that become INT8.

Precision is in the graph, so that TensorRT 10.3 and 11 compile the same arithmetic: Q/DQ on inputs only, because Q/DQ
on outputs keeps epilogues from being fused; biases in floating point, because the parser takes no others.
The twin for a CPU is made from the same file (:mod:`cdkd_edge.graph.cpu`).

Operators: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph.fp16 import to_fp16
from cdkd_edge.graph.int8.layers import QuantizableLayer, weight_of, weight_only_layers
from cdkd_edge.graph.int8.ranges import LayerScales, quantize_weight, weight_scales

MIN_OPSET = 19
"""First with FP16 scales."""


def int8_graph(
    model: onnx.ModelProto, layers: Sequence[QuantizableLayer], scales: Mapping[str, LayerScales]
) -> onnx.ModelProto:
    """Quantise an FP32 graph.

    Args:
        model: the (smoothed) FP32 graph; left as it is.
        layers: its quantisable layers.
        scales: of those that become INT8, by name; the others stay FP16.

    Raises:
        GraphError: the graph's opset has no FP16 scales.
    """
    opset = next(item.version for item in model.opset_import if item.domain == "")
    if opset < MIN_OPSET:
        raise GraphError(
            f"INT8 needs a graph of opset {MIN_OPSET} or newer; this one has opset {opset}",
            hint="export the checkpoint again with --opset 20",
        )
    edit = _Edit(to_fp16(model))
    for layer in layers:
        if layer.name in scales:
            weight, own = weight_of(model, layer.weight), scales[layer.name]
            edit.quantize_input(layer.node, layer.name, layer.input, own.activation)
            edit.quantize_weight(layer.node, layer.name, weight, own.weight, layer.output_axis)
    for node, name in weight_only_layers(model):
        weight = weight_of(model, name)
        edit.quantize_weight(node, node.rsplit("/", 1)[0], weight, weight_scales(weight, 1), 1)
    return edit.finish()


class _Edit:
    """Collects nodes to be inserted; drops what nothing uses in the end."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._nodes = {node.name: node for node in model.graph.node}
        self._new: dict[str, onnx.TensorProto] = {}

    def quantize_input(self, node: str, name: str, value: str, scale: float) -> None:
        """``Q -> DQ`` before a node's first input."""
        zero = self._constant("int8_zero", np.zeros((), np.int8))
        stored = self._constant(f"{name}.input_scale", np.array(scale, np.float16))
        self._before.setdefault(node, []).extend(
            (
                _node("QuantizeLinear", f"{name}.input_int8", value, stored, zero),
                _node("DequantizeLinear", f"{name}.input", f"{name}.input_int8", stored, zero),
            )
        )
        self._nodes[node].input[0] = f"{name}.input"

    def quantize_weight(self, node: str, name: str, weight: np.ndarray, scales: np.ndarray, axis: int) -> None:
        """``DQ`` of integers in place of a node's weight."""
        integers = self._constant(f"{name}.weight_int8", quantize_weight(weight, scales, axis))
        per_channel = self._constant(f"{name}.weight_scale", scales.astype(np.float16))
        zeros = self._constant(f"int8_zeros_{len(scales)}", np.zeros(len(scales), np.int8))
        self._before.setdefault(node, []).append(
            _node("DequantizeLinear", f"{name}.weight_real", integers, per_channel, zeros, axis=axis)
        )
        self._nodes[node].input[1] = f"{name}.weight_real"

    def finish(self) -> onnx.ModelProto:
        """The edited graph."""
        graph = self._model.graph
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes += self._before.get(node.name, [])
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        used = {name for node in nodes for name in node.input}
        kept = [item for item in (*graph.initializer, *self._new.values()) if item.name in used]
        copies = [onnx.TensorProto.FromString(item.SerializeToString()) for item in kept]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(copies)
        return self._model

    def _constant(self, name: str, value: np.ndarray) -> str:
        # A scale per tensor has no dimension. With one of size 1 it counts as per axis, and compilers then compute
        # the layer in FP16.
        if name not in self._new:
            self._new[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name


def _node(op: str, output: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes)
