"""The FP16 graph, and a graph that shows on a CPU what FP16 does to it. Needs neither torch nor a GPU.

:func:`to_fp16` turns every weight and activation of an exported graph into FP16. Two casts remain, and both
have a reason: uint8 pixels become FP16 at the input, ArgMax's int64 becomes uint8 at the output. LayerNorm
is one operator and softmax stays inside attention, so that compilers keep their sums in FP32.

:func:`fp16_on_cpu` exists because running the FP16 graph itself in ONNX Runtime on a CPU proves nothing about
its activations: operators without an FP16 kernel run in FP32, and the casts between them are removed at every
optimisation level, so a value of 9,000,000 passes through an FP16 tensor unharmed (measured with 1.31). Explicit
pairs of casts are kept. They round every value that a TensorRT engine stores, and overflow as it would.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph.cpu import to_fp32
from cdkd_edge.graph.fuse import fuse_attention

FP16_MAX = 65504.0
SUFFIX = "fp16"

_MOVES_ONLY = frozenset({"Reshape", "Transpose", "Split", "Concat", "Slice", "Relu"})
"""Operators whose outputs need no rounding if their inputs were rounded."""

_NOT_FP16 = frozenset({"Cast", "ArgMax", "QuantizeLinear", "DequantizeLinear"})
"""Operators whose outputs are integers, or integers times a scale, which multiplications take as they are."""


class WeightRangeError(GraphError):
    """A weight is too large for FP16."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 graph of :mod:`cdkd_edge.graph.build` in FP16, inputs, outputs and names unchanged.

    Returns:
        A new graph; ``model`` is left as it is.

    Raises:
        GraphError: a weight does not fit FP16, or the graph is not one that was exported in FP32.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    if {item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)} != {TensorProto.UINT8}:
        raise GraphError("only a graph with uint8 tiles and labels can be made FP16", hint="export it with cdkd-edge")
    if len(graph.output) != 1:
        raise GraphError("the graph gives more than labels; FP16 is made from the graph with labels alone")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        raise GraphError("the graph is quantised already; FP16 is made from the FP32 graph")
    # ONNX wants Resize's scales in FP32 whatever the data are.
    scales = {node.input[2] for node in graph.node if node.op_type == "Resize" and len(node.input) > 2}
    _give_rounding_to_positions(graph)
    for item in graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in scales:
            item.CopyFrom(numpy_helper.from_array(_rounded(item), item.name))
    for node in graph.node:
        if node.op_type == "Cast" and _cast_type(node).i == TensorProto.FLOAT:
            _cast_type(node).i = TensorProto.FLOAT16
    del graph.value_info[:]
    return half


def fp16_on_cpu(half: onnx.ModelProto) -> onnx.ModelProto:
    """A graph in FP32 that computes on a CPU what an FP16 engine computes.

    Weights are those of the FP16 graph. Every value is rounded to FP16 (to infinity beyond 65504) where an
    engine stores it. Not rounded are what kernels hold in FP32: the product before a bias, and what is inside
    normalisation, softmax and fused attention; nor what the graph itself computes in FP32.

    Args:
        half: what :func:`to_fp16` returned; also with Q/DQ, which are computed as they stand.
    """
    wide = _wide_values(half.graph)
    model = to_fp32(half)
    fuse_attention(model)

    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    constants = {item.name for item in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if node.output[0] in wide or not _stored(node, users, constants):
            continue
        name = node.output[0]
        copy.output[0] = f"{name}.exact"
        nodes.append(
            helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], name=f"{name}/Round", to=TensorProto.FLOAT16)
        )
        nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}/Widen", to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def rounded_values(rehearsal: onnx.ModelProto) -> list[str]:
    """The values that a graph of :func:`fp16_on_cpu` rounds, in the order of computation."""
    return [node.output[0] for node in rehearsal.graph.node if node.name.endswith("/Widen")]


def longest_rounding(rehearsal: onnx.ModelProto) -> int:
    """How many values are rounded one after the other, at most, on the way to a label."""
    rounded = set(rounded_values(rehearsal))
    before: dict[str, int] = {}
    for node in rehearsal.graph.node:
        most = max((before.get(name, 0) for name in node.input), default=0)
        before |= {name: most + (name in rounded) for name in node.output}
    return before["labels"]


def casts(model: onnx.ModelProto) -> Counter[str]:
    """How many casts a graph has, by what they cast to (``FLOAT16``, ``UINT8``, ...)."""
    return Counter(TensorProto.DataType.Name(_cast_type(node).i) for node in model.graph.node if node.op_type == "Cast")


def _rounded(item: onnx.TensorProto) -> np.ndarray:
    values = numpy_helper.to_array(item)
    largest = float(np.abs(values).max()) if values.size else 0.0
    if not largest <= FP16_MAX:
        raise WeightRangeError(
            f"weight {item.name} holds {largest:.3g}; FP16 ends at {FP16_MAX:.0f}",
            hint="deploy this network in FP32",
        )
    return values.astype(np.float16)


def _stored(node: onnx.NodeProto, users: dict[str, list[onnx.NodeProto]], constants: set[str]) -> bool:
    """Whether an engine writes the node's output to memory as a value that may need rounding."""
    if node.op_type in _MOVES_ONLY or node.op_type in _NOT_FP16:
        return False
    following = users.get(node.output[0], [])
    if node.op_type == "MatMul" and len(following) == 1 and following[0].op_type == "Add":
        return not any(name in constants for name in following[0].input)
    return True


def _wide_values(graph: onnx.GraphProto) -> set[str]:
    """What an FP16 graph computes in FP32: behind a cast to it, as confidence is."""
    wide: set[str] = set()
    for node in graph.node:  # in the order of computation
        if (node.op_type == "Cast" and _cast_type(node).i == TensorProto.FLOAT) or (
            node.op_type != "Cast" and wide & set(node.input)
        ):
            wide |= set(node.output)
    return wide


def _give_rounding_to_positions(graph: onnx.GraphProto) -> None:
    """Add to the position embedding what rounding takes from the patch embedding's bias.

    The bias holds the mean of the pixels and is far larger than what it is added to. Its rounding error is the same in
    every token and does not average out; as part of the position embedding, which is rounded token by token, it does.
    Exact before rounding: the two are added anyway.
    """
    constants = {item.name: item for item in graph.initializer}
    if not {"patch_embed.bias", "pos_embed"} <= constants.keys():
        return  # not as it was written: left as it is
    convolution = next((node for node in graph.node if node.op_type == "Conv"), None)
    if convolution is None or list(convolution.input[2:]) != ["patch_embed.bias"]:
        return
    bias = numpy_helper.to_array(constants["patch_embed.bias"]).astype(np.float64)
    taken = bias - bias.astype(np.float16).astype(np.float64)
    positions = numpy_helper.to_array(constants["pos_embed"]).astype(np.float64)
    if positions.shape[-1:] != taken.shape or not np.isfinite(taken).all():
        return
    first = 1 if any(node.op_type == "Concat" and "cls_token" in node.input for node in graph.node) else 0
    positions[:, first:] += taken  # the class token has no bias
    constants["pos_embed"].CopyFrom(numpy_helper.from_array(positions.astype(np.float32), "pos_embed"))


def _cast_type(node: onnx.NodeProto) -> onnx.AttributeProto:
    attribute: onnx.AttributeProto = next(item for item in node.attribute if item.name == "to")
    return attribute
