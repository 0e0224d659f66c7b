"""The layers that become INT8: linears of attention and MLP, 3x3 convolutions of the decoder. Nothing else.

Attention's own products stay FP16: TensorRT fuses INT8 attention up to 512 tokens only, and these tiles have 4096.
Residual sums, LayerNorm, softmax and GELU lose most and gain nothing. What is left, 1x1 convolutions and
pyramid pooling, is 2 % of the work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cdkd_edge.core.errors import GraphError

Array = npt.NDArray[np.float32]

_LINEAR = re.compile(r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$")


@dataclass(frozen=True)
class QuantizableLayer:
    """A ``MatMul`` or ``Conv`` of an exported FP32 graph, with constant weights."""

    name: str
    """Of the module, e.g. ``blocks.3.mlp.fc1`` or ``fuse``."""
    node: str
    """Of the node."""
    op: str
    input: str
    """The value that is quantised: tokens ``[N, L, K]``, or a map ``[N, C, G, G]``."""
    weight: str
    """The initialiser: ``[K, M]`` of a MatMul, ``[M, C, 3, 3]`` of a Conv."""
    product: str
    """The node's output, ``[N, L, M]`` or ``[N, M, G, G]``."""
    macs: int
    """Multiply-accumulates per tile."""

    @property
    def output_axis(self) -> int:
        """Axis of the weight along which every output channel has its own scale."""
        return 1 if self.op == "MatMul" else 0


def quantizable_layers(model: onnx.ModelProto) -> list[QuantizableLayer]:
    """The layers of an exported graph that INT8 is for, in the order of computation.

    Raises:
        GraphError: the graph has none; it was not written by :mod:`cdkd_edge.graph.build`.
    """
    constants = {item.name: item for item in model.graph.initializer}
    image = model.graph.input[0].type.tensor_type.shape.dim
    grid = _grid(model, image[-1].dim_value)
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Conv") or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        name = node.name.rsplit("/", 1)[0].removesuffix(".product")
        if node.op_type == "MatMul":
            wanted = bool(_LINEAR.match(name)) and len(weight.dims) == 2
        else:
            wanted = list(weight.dims[2:]) == [3, 3]
            name = name.removesuffix(".conv")
        if wanted:
            macs = grid * grid * int(np.prod(weight.dims))
            layers.append(
                QuantizableLayer(name, node.name, node.op_type, node.input[0], node.input[1], node.output[0], macs)
            )
    if not layers:
        raise GraphError(
            "the graph has no layer that INT8 is for", hint="export the checkpoint again with this release"
        )
    return layers


def weight_only_layers(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Matrices that are stored as INT8 and computed with in FP16: node and initialiser of each.

    The bottleneck's share of the pyramid: a fifth of the 3x3 convolution's weights, used on 50 cells per tile. INT8
    arithmetic would gain nothing there; 2.4 MB less in the file is what it is for.
    """
    constants = {item.name for item in model.graph.initializer}
    return [
        (node.name, node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.name.startswith("context.taps/") and node.input[1] in constants
    ]


def weight_of(model: onnx.ModelProto, name: str) -> Array:
    """An initialiser as FP32."""
    item = next(item for item in model.graph.initializer if item.name == name)
    return numpy_helper.to_array(item).astype(np.float32)


def _grid(model: onnx.ModelProto, tile: int) -> int:
    """Tokens along a tile's side."""
    for node in model.graph.node:
        if node.op_type == "Conv":
            kernel = next(list(item.ints) for item in node.attribute if item.name == "kernel_shape")
            return tile // int(kernel[0])
    raise GraphError("the graph has no patch embedding")
