"""Attention as one operator, for ONNX Runtime on the CPU.

ONNX Runtime's own optimiser does not find attention in ViT graphs, so a 4096-token block materialises
its 6 x 4096 x 4096 scores (402 MB in FP32). ``com.microsoft.MultiHeadAttention`` has a flash kernel on
the CPU that never does. The operator exists only in ONNX Runtime, which is why this rewrite belongs
to building an engine and not to the exported graph.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONTRIB_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _AttentionBlock:
    """One matched attention: ``qkv`` ``[N, L, 3 D]`` in, ``joined`` ``[N, L, D]`` out."""

    qkv: str
    joined: str
    heads: int
    width: int
    replaced: frozenset[str]
    """The first outputs of the nodes it is made of; they identify nodes, which compare by value."""


def fuse_attention(model: onnx.ModelProto) -> tuple[int, int]:
    """Replace, in place, every attention written as in :mod:`cdkd_edge.export.graph`.

    Returns:
        Attention blocks fused, and attention blocks (softmax nodes) there were.
    """
    graph = model.graph
    matcher = _Matcher(graph)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    blocks = [block for node in softmaxes if (block := matcher.match(node))]
    if blocks:
        _replace(graph, blocks)
        model.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return len(blocks), len(softmaxes)


class _Matcher:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producer = {output: node for node in graph.node for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in graph.output}
        self.constants = {item.name: item for item in graph.initializer}

    def match(self, softmax: onnx.NodeProto) -> _AttentionBlock | None:
        """The attention around a softmax, or None if anything differs from the expected form."""
        scores = self.producer.get(softmax.input[0])
        mixed = self.only_consumer(softmax)
        if not (_is(scores, "MatMul") and _is(mixed, "MatMul") and _attribute(softmax, "axis", -1) in (-1, 3)):
            return None
        assert scores is not None and mixed is not None
        keys = self.producer.get(scores.input[1])
        split = self.producer.get(scores.input[0])
        if not (_is(keys, "Transpose", perm=[0, 1, 3, 2]) and _is(split, "Split", axis=1)):
            return None
        assert keys is not None and split is not None
        if list(split.output) != [scores.input[0], keys.input[0], mixed.input[1]] or mixed.input[0] != softmax.output[0]:
            return None
        by_head = self.producer.get(split.input[0])
        heads_shape = self.producer.get(by_head.input[0]) if by_head is not None else None
        by_token = self.only_consumer(mixed)
        joined = self.only_consumer(by_token)
        if not (
            _is(by_head, "Transpose", perm=[0, 2, 1, 3])
            and _is(heads_shape, "Reshape")
            and _is(by_token, "Transpose", perm=[0, 2, 1, 3])
            and _is(joined, "Reshape")
        ):
            return None
        assert by_head is not None and heads_shape is not None and by_token is not None and joined is not None
        inner = (heads_shape, by_head, split, keys, scores, softmax, mixed, by_token)
        replaced = frozenset(node.output[0] for node in (*inner, joined))
        if any(self.escapes(node, replaced) for node in inner):
            return None
        shape = self.constants.get(heads_shape.input[1])
        if shape is None:
            return None
        _, _, parts, width = numpy_helper.to_array(shape).tolist()
        heads = parts // 3
        return _AttentionBlock(heads_shape.input[0], joined.output[0], heads, heads * width, replaced)

    def only_consumer(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        consumers = self.consumers.get(node.output[0], []) if node is not None else []
        return consumers[0] if len(consumers) == 1 else None

    def escapes(self, node: onnx.NodeProto, block: frozenset[str]) -> bool:
        """Whether a value of the node is used outside the block."""
        return any(
            output in self.outputs or any(user.output[0] not in block for user in self.consumers.get(output, []))
            for output in node.output
        )


def _replace(graph: onnx.GraphProto, blocks: list[_AttentionBlock]) -> None:
    replaced: dict[str, _AttentionBlock] = {name: block for block in blocks for name in block.replaced}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        block = replaced.get(node.output[0])
        if block is None:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        elif node.output[0] == block.joined:  # the last of its nodes, so all inputs exist by now
            nodes += _fused(graph, block)
    del graph.node[:]
    graph.node.extend(nodes)


def _fused(graph: onnx.GraphProto, block: _AttentionBlock) -> list[onnx.NodeProto]:
    name = block.joined
    sizes = f"{name}.sizes"
    graph.initializer.append(numpy_helper.from_array(np.array([block.width] * 3, np.int64), sizes))
    parts = [f"{name}.{part}" for part in "qkv"]
    return [
        helper.make_node("Split", [block.qkv, sizes], parts, name=f"{name}/Split", axis=2),
        helper.make_node(
            "MultiHeadAttention",
            parts,
            [name],
            name=f"{name}/MultiHeadAttention",
            domain=CONTRIB_DOMAIN,
            num_heads=block.heads,
            # The query scale is folded into the projection; the default, 0, would apply it again.
            scale=1.0,
        ),
    ]


def _is(node: onnx.NodeProto | None, op: str, **attributes: object) -> bool:
    if node is None or node.op_type != op:
        return False
    return all(_attribute(node, name, None) == value for name, value in attributes.items())


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            return value
    return default
