"""Which nodes of a graph are which layers of the network: the one place that knows names and forms of :mod:`.build`.

Whoever changes the operators there changes here how attention, linears, convolutions and logits are found. INT8, FP16,
the CPU's fused attention, further outputs and the roofline ask these functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.core.manifest import LABELS
from cdkd_edge.graph.nodes import GraphIndex, attribute_of

Array = npt.NDArray[np.float32]

_AGAIN = "export the checkpoint again with this release"
_BLOCK_LINEAR = re.compile(r"(blocks\.\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$")


@dataclass(frozen=True)
class QuantizableLayer:
    """A ``MatMul`` or ``Conv`` of an exported FP32 graph, with constant weights."""

    name: str  # of the module, e.g. ``blocks.3.mlp.fc1`` or ``fuse``
    node: str  # name of the node
    op: str
    input: str  # the value that is quantised: tokens ``[N, L, K]``, or a map ``[N, C, G, G]``
    weight: str  # the initialiser: ``[K, M]`` of a MatMul, ``[M, C, 3, 3]`` of a Conv
    product: str  # the node's output, ``[N, L, M]`` or ``[N, M, G, G]``
    macs: int  # multiply-accumulates per tile

    @property
    def output_axis(self) -> int:
        """Axis of the weight along which every output channel has its own scale."""
        return 1 if self.op == "MatMul" else 0


def quantizable_layers(model: onnx.ModelProto) -> list[QuantizableLayer]:
    """The layers that INT8 is for, in the order of computation: linears of attention and MLP, 3x3 convolutions.

    Attention's own products stay FP16: TensorRT fuses INT8 attention only up to 512 tokens, and these tiles have 4096.
    Residual sums, LayerNorm, softmax and GELU lose most and gain nothing. The rest (1x1 convolutions, pyramid pooling)
    is 2 % of the work.

    Raises:
        GraphError: the graph has none; :mod:`cdkd_edge.graph.build` did not write it.
    """
    constants = {item.name: item for item in model.graph.initializer}
    patch_embedding = next((node for node in model.graph.node if node.op_type == "Conv"), None)
    if patch_embedding is None:
        raise GraphError("the graph has no patch embedding", hint=_AGAIN)
    tile = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    cells = (tile // attribute_of(patch_embedding, "kernel_shape")[0]) ** 2
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Conv") or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        name = node.name.rsplit("/", 1)[0].removesuffix(".product")
        if node.op_type == "MatMul":
            quantizable = bool(_BLOCK_LINEAR.match(name)) and len(weight.dims) == 2
        else:
            quantizable = list(weight.dims[2:]) == [3, 3]
            name = name.removesuffix(".conv")
        if quantizable:
            values = (node.input[0], node.input[1], node.output[0])
            layers.append(QuantizableLayer(name, node.name, node.op_type, *values, cells * math.prod(weight.dims)))
    if not layers:
        raise GraphError("the graph has no layer that INT8 is for", hint=_AGAIN)
    return layers


def weight_only_layers(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Matrices stored as INT8 and multiplied in FP16: the node and the initialiser of each.

    This is the bottleneck's share of the pyramid: a fifth of the 3x3 convolution's weights, used on 50 cells per tile.
    INT8 arithmetic would gain nothing there, but the file becomes 2.4 MB smaller.
    """
    constants = {item.name for item in model.graph.initializer}
    taps = [node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith("context.taps/")]
    return [(node.name, node.input[1]) for node in taps if node.input[1] in constants]


def weight_of(model: onnx.ModelProto, name: str) -> Array:
    """An initialiser as FP32."""
    item = next(item for item in model.graph.initializer if item.name == name)
    return numpy_helper.to_array(item).astype(np.float32)


def input_makers(
    model: onnx.ModelProto, layer: QuantizableLayer, layers: Sequence[QuantizableLayer]
) -> list[tuple[onnx.NodeProto, int, int]]:
    """The constants by which SmoothQuant divides a layer's input; empty where no constant makes it.

    For qkv and fc1: LayerNorm's scale and shift. For proj: qkv's value rows, because attention mixes tokens only.
    Of each the node, which of its inputs it is, and how many columns come before those that make the layer's input.
    """
    found = _BLOCK_LINEAR.match(layer.name)
    if not found or found[2] == "mlp.fc2":
        return []
    index = GraphIndex(model.graph)

    def makers(node: onnx.NodeProto, before: float) -> list[tuple[onnx.NodeProto, int, int]]:
        found = [(at, index.constants[name].dims[-1]) for at, name in enumerate(node.input) if name in index.constants]
        return [(node, at, round(columns * before)) for at, columns in found]

    if found[2] != "attn.proj":
        norm = index.maker.get(layer.input)
        return makers(norm, 0) if norm is not None and norm.op_type == "LayerNormalization" else []
    qkv = next((one for one in layers if one.name == f"{found[1]}.attn.qkv"), None)
    if qkv is None:
        return []
    bias = [node for node in index.users.get(qkv.product, []) if node.op_type == "Add"]
    return [maker for node in (index.maker[qkv.product], *bias[:1]) for maker in makers(node, 2 / 3)]


@dataclass(frozen=True)
class AttentionBlock:
    """An attention in the form of :mod:`.build`, from ``qkv`` ``[N, L, 3 D]`` to ``joined`` ``[N, L, D]``."""

    qkv: str
    joined: str
    heads: int
    width: int
    nodes: frozenset[str]  # the first outputs of its nodes; they identify nodes, which compare by value


def attention_blocks(model: onnx.ModelProto) -> list[AttentionBlock | None]:
    """One entry per softmax: the attention around it, or None if it has another form."""
    index = GraphIndex(model.graph)
    found: list[AttentionBlock | None] = []
    for node in model.graph.node:
        if node.op_type == "Softmax":
            try:
                found.append(_attention_around(index, node))
            except _MismatchError:
                found.append(None)
    return found


class _MismatchError(Exception):
    """The softmax is not in an attention of the known form."""


def _require(condition: bool) -> None:
    if not condition:
        raise _MismatchError


def _attention_around(index: GraphIndex, softmax: onnx.NodeProto) -> AttentionBlock:
    def of_form(node: onnx.NodeProto | None, op: str, attributes: dict[str, object]) -> onnx.NodeProto:
        if node is None or node.op_type != op:
            raise _MismatchError
        _require(all(attribute_of(node, name) == value for name, value in attributes.items()))
        return node

    def maker(value: str, op: str, **attributes: object) -> onnx.NodeProto:
        return of_form(index.maker.get(value), op, attributes)

    def user(node: onnx.NodeProto, op: str, **attributes: object) -> onnx.NodeProto:
        return of_form(index.only_user(node.output[0]), op, attributes)

    def sizes(node: onnx.NodeProto, count: int) -> list[int]:
        """The constant sizes that are a node's second input: ``count`` positive numbers."""
        _require(len(node.input) == 2 and node.input[1] in index.constants)
        found: list[int] = numpy_helper.to_array(index.constants[node.input[1]]).ravel().tolist()
        _require(len(found) == count and min(found) > 0)
        return found

    _require(attribute_of(softmax, "axis", -1) in (-1, 3))
    scores = maker(softmax.input[0], "MatMul")
    split = maker(scores.input[0], "Split", axis=1)
    keys = maker(scores.input[1], "Transpose", perm=[0, 1, 3, 2])
    by_head = maker(split.input[0], "Transpose", perm=[0, 2, 1, 3])
    heads_shape = maker(by_head.input[0], "Reshape")
    mixed = user(softmax, "MatMul")
    by_token = user(mixed, "Transpose", perm=[0, 2, 1, 3])
    joined = user(by_token, "Reshape")
    _require(list(split.output) == [scores.input[0], keys.input[0], mixed.input[1]])
    _require(mixed.input[0] == softmax.output[0])

    inner = (heads_shape, by_head, split, keys, scores, softmax, mixed, by_token)
    nodes = frozenset(node.output[0] for node in (*inner, joined))
    inside = [output for node in inner for output in node.output]
    _require(index.outputs.isdisjoint(inside))
    _require(all(node.output[0] in nodes for output in inside for node in index.users.get(output, [])))
    batch, length, parts, width = sizes(heads_shape, 4)
    heads = parts // 3
    _require(sizes(split, 3) == [heads] * 3)
    _require(sizes(joined, 3) == [batch, length, heads * width])
    return AttentionBlock(heads_shape.input[0], joined.output[0], heads, heads * width, nodes)


def scores_of(model: onnx.ModelProto) -> str:
    """The name of the logits at full resolution, ``[N, K, T, T]``, if the graph ends in ArgMax over them and a cast."""
    makers = GraphIndex(model.graph).maker
    cast = makers.get(LABELS)
    best = makers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
    if [output.name for output in model.graph.output] != [LABELS] or best is None or best.op_type != "ArgMax":
        raise GraphError(
            "the graph does not end in labels alone, as ArgMax of its logits",
            hint="use the graph that `cdkd-edge export` wrote",
        )
    return str(best.input[0])


def logits_of(model: onnx.ModelProto) -> str:
    """The name of the logits as the network computes them, ``[N, K, G, G]``, if the graph up-samples these."""
    resize = GraphIndex(model.graph).maker.get(scores_of(model))
    if resize is None or resize.op_type != "Resize":
        raise GraphError("the graph does not end in up-sampled logits", hint="export the checkpoint again")
    return str(resize.input[0])


def position_embedding(graph: onnx.GraphProto) -> tuple[onnx.TensorProto, onnx.TensorProto, int] | None:
    """The patch embedding's bias, the position embedding, and the first token that gets both; None if not found."""
    constants = {item.name: item for item in graph.initializer}
    bias, positions = constants.get("patch_embed.bias"), constants.get("pos_embed")
    convolution = next((node for node in graph.node if node.op_type == "Conv"), None)
    if not bias or not positions or not convolution or list(convolution.input[2:]) != [bias.name]:
        return None
    class_token = any(node.op_type == "Concat" and "cls_token" in node.input for node in graph.node)
    return bias, positions, int(class_token)
