"""SmoothQuant: outliers move from activations, where one scale serves all channels, into weights, where it need not.

Xiao et al., "SmoothQuant", ICML 2023, https://arxiv.org/abs/2211.10438, eq. 4: channel j of a layer's input is divided
by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), row j of its weight multiplied by it. The division costs nothing where a
constant makes the channel: in LayerNorm before qkv and fc1 and, beyond the paper, in the value rows of qkv
before proj (attention mixes tokens, not channels). The graph computes the same function, node for node.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cdkd_edge.graph.int8.layers import Array, QuantizableLayer
from cdkd_edge.graph.int8.ranges import Observation

ALPHA = 0.5


def smooth(
    model: onnx.ModelProto,
    layers: list[QuantizableLayer],
    observations: Mapping[str, Observation],
    alpha: float = ALPHA,
) -> dict[str, npt.NDArray[np.float64]]:
    """Fold the factors into the weights of an FP32 graph, in place.

    Returns:
        The factors ``[K]`` by which each smoothed layer's input is now smaller.
    """
    weights = _Weights(model)
    by_name = {layer.name: layer for layer in layers}
    nodes = {node.name: node for node in model.graph.node}
    factors = {}
    for layer in layers:
        block = re.match(r"(blocks\.\d+)\.(attn\.qkv|mlp\.fc1|attn\.proj)$", layer.name)
        if not block:
            continue
        makers = _makers(model, layer, by_name.get(f"{block[1]}.attn.qkv"))
        if not makers:
            continue
        scale = _factors(observations[layer.name].channel_max, weights[layer.weight], alpha)
        weights.multiply(nodes[layer.node], 1, scale[:, None])
        for node, position, start in makers:
            width = weights[node.input[position]].shape[-1]
            weights.multiply(node, position, np.pad(1 / scale, (start, width - start - len(scale)), constant_values=1))
        factors[layer.name] = scale
    weights.store()
    return factors


def _factors(channel_max: Array, weight: Array, alpha: float) -> npt.NDArray[np.float64]:
    """s of eq. 4, ``[K]``, as powers of two; 1 for a channel that is always zero or has no weight.

    Multiplying by a power of two rounds nothing, and magnitudes that differ in their last digits, as those of two CPUs
    do, give the same power: the same weights come out, to the last bit.
    """
    activation = channel_max.astype(np.float64)
    row = np.abs(weight).max(axis=1).astype(np.float64)
    usable = (activation > 0) & (row > 0)
    scale = np.ones_like(activation)
    scale[usable] = activation[usable] ** alpha / row[usable] ** (1 - alpha)
    powers: npt.NDArray[np.float64] = np.exp2(np.clip(np.rint(np.log2(scale)), -13, 13))
    return powers


def _makers(
    model: onnx.ModelProto, layer: QuantizableLayer, qkv: QuantizableLayer | None
) -> list[tuple[onnx.NodeProto, int, int]]:
    """What makes the layer's input: node, which of its inputs is the constant, the first column of it that counts."""
    constants = {item.name for item in model.graph.initializer}
    if layer.name.endswith("attn.proj"):
        if qkv is None:
            return []
        bias = next((node for node in model.graph.node if node.op_type == "Add" and qkv.product in node.input), None)
        width = next(item.dims[1] for item in model.graph.initializer if item.name == qkv.weight)
        first = width - width // 3
        product = next(node for node in model.graph.node if node.name == qkv.node)
        makers = [(product, 1, first)]
        if bias is not None:
            makers += [(bias, position, first) for position, name in enumerate(bias.input) if name in constants]
        return makers
    norm = next((node for node in model.graph.node if layer.input in node.output), None)
    if norm is None or norm.op_type != "LayerNormalization":
        return []
    return [(norm, position, 0) for position, name in enumerate(norm.input) if position and name in constants]


class _Weights:
    """Initialisers by name, in FP64 once they change, written back at the end."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._items = {item.name: item for item in model.graph.initializer}
        self._users = Counter(name for node in model.graph.node for name in node.input)
        self._changed: dict[str, npt.NDArray[np.float64]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._changed[name] if name in self._changed else numpy_helper.to_array(self._items[name])

    def multiply(self, node: onnx.NodeProto, position: int, factor: npt.NDArray[np.float64]) -> None:
        """Multiply the constant that is an input of a node, for this node alone."""
        name = node.input[position]
        value = self[name].astype(np.float64) * factor
        if self._users[name] > 1:  # simplification stores equal constants once
            self._users[name] -= 1
            name = f"{node.name}.smoothed_{position}"
            self._items[name] = self._model.graph.initializer.add()
            self._users[name] = 1
            node.input[position] = name
        self._changed[name] = value

    def store(self) -> None:
        """Put what changed into the graph."""
        for name, value in self._changed.items():
            self._items[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
