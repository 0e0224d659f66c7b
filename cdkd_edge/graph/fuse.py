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
    """Replace, in place, every attention written as in :mod:`cdkd_edge.graph.build`.

    Returns:
        Attention blocks fused, and attention blocks (softmax nodes) there were.
    """
    graph = model.graph
    matcher = _Matcher(graph)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    blocks = [block for node in softmaxes if (block := matcher.match(node))]
    if blocks:
        _replace(graph, blocks)
        if all(entry.domain != CONTRIB_DOMAIN for entry in model.opset_import):  # a twin of INT8 has it already
            model.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return len(blocks), len(softmaxes)


class _MismatchError(Exception):
    """This softmax is not in an attention of the known form."""


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
        try:
            return self._match(softmax)
        except _MismatchError:
            return None

    def _match(self, softmax: onnx.NodeProto) -> _AttentionBlock:
        _require(_attribute(softmax, "axis", -1) in (-1, 3))
        scores = self.maker(softmax.input[0], "MatMul")
        split = self.maker(scores.input[0], "Split", axis=1)
        keys = self.maker(scores.input[1], "Transpose", perm=[0, 1, 3, 2])
        by_head = self.maker(split.input[0], "Transpose", perm=[0, 2, 1, 3])
        heads_shape = self.maker(by_head.input[0], "Reshape")
        mixed = self.user(softmax, "MatMul")
        by_token = self.user(mixed, "Transpose", perm=[0, 2, 1, 3])
        joined = self.user(by_token, "Reshape")
        _require(list(split.output) == [scores.input[0], keys.input[0], mixed.input[1]])
        _require(mixed.input[0] == softmax.output[0])

        inner = (heads_shape, by_head, split, keys, scores, softmax, mixed, by_token)
        replaced = frozenset(node.output[0] for node in (*inner, joined))
        _require(not any(self.escapes(node, replaced) for node in inner))
        batch, length, parts, width = self.sizes(heads_shape, 4)
        heads = parts // 3
        _require(self.sizes(split, 3) == [heads] * 3)
        _require(self.sizes(joined, 3) == [batch, length, heads * width])
        return _AttentionBlock(heads_shape.input[0], joined.output[0], heads, heads * width, replaced)

    def maker(self, value: str, op: str, **attributes: object) -> onnx.NodeProto:
        """The node that makes a value, if it is an ``op`` with these attributes."""
        node: onnx.NodeProto | None = self.producer.get(value)
        if node is None or not _is(node, op, attributes):
            raise _MismatchError
        return node

    def user(self, node: onnx.NodeProto, op: str, **attributes: object) -> onnx.NodeProto:
        """The only node that uses a node's output, if it is an ``op`` with these attributes."""
        users = self.consumers.get(node.output[0], [])
        if len(users) != 1 or not _is(users[0], op, attributes):
            raise _MismatchError
        return users[0]

    def sizes(self, node: onnx.NodeProto, count: int) -> list[int]:
        """The constant sizes that are a node's second input, if they are so many and all given."""
        _require(len(node.input) == 2 and node.input[1] in self.constants)
        sizes: list[int] = numpy_helper.to_array(self.constants[node.input[1]]).ravel().tolist()
        _require(len(sizes) == count and min(sizes) > 0)
        return sizes

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


def _require(condition: bool) -> None:
    if not condition:
        raise _MismatchError


def _is(node: onnx.NodeProto, op: str, attributes: dict[str, object]) -> bool:
    return node.op_type == op and all(_attribute(node, name, None) == value for name, value in attributes.items())


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            return value
    return default
