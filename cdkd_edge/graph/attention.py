"""Attention in a graph: found by what computes it, whatever makes its queries, keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import numpy_helper

from cdkd_edge.graph.files import inferred_sizes
from cdkd_edge.graph.nodes import GraphIndex, Sizes, attribute_of


@dataclass(frozen=True)
class AttentionBlock:
    """An attention in the form of :mod:`.build`: q ``[N, L, D]``, k and v ``[N, M, D]`` to ``joined`` ``[N, L, D]``.

    In W windows, all are views of ``[N, L/W, W D]`` or ``[N, M/W, W D]``, with W times as many heads. Where something
    comes between projections and scores, as rotary positions do, q, k and v are taken ``by_head``: ``[N W, H, L/W, d]``
    and ``[N W, H, M/W, d]``.
    """

    q: str
    k: str
    v: str
    scores: str  # the product of q and k, ``[N W, H, L/W, M/W]``
    share: str  # softmax's output as it is multiplied by v, of the same shape
    joined: str
    scale: float  # by which scores are multiplied before softmax
    fp32_softmax: bool  # whether softmax lies between casts
    heads: int  # of all windows together
    width: int  # W D
    windows: int  # W
    by_head: bool
    nodes: frozenset[str]  # the first outputs of its nodes; they identify nodes, which compare by value


def attention_blocks(model: onnx.ModelProto) -> list[AttentionBlock | None]:
    """One entry per softmax: the attention around it, or None if it has another form."""
    index = GraphIndex(model.graph)
    sizes = functools.cache(lambda: inferred_sizes(model))
    found: list[AttentionBlock | None] = []
    for node in model.graph.node:
        if node.op_type == "Softmax":
            try:
                found.append(_Around(index, node).block(sizes))
            except _MismatchError:
                found.append(None)
    return found


class _MismatchError(Exception):
    """The softmax is not in an attention of the known form."""


def _require(condition: bool) -> None:
    if not condition:
        raise _MismatchError


class _Around:
    """The nodes around a softmax, from the product of queries and keys to the tokens; _MismatchError if others."""

    def __init__(self, index: GraphIndex, softmax: onnx.NodeProto) -> None:
        self.index = index
        _require(attribute_of(softmax, "axis", -1) in (-1, 3))
        # Scores may be cast to FP32 and scaled up before softmax, see `fp16_attention.change_attention`.
        self.inner, before, self.share, self.scale = [softmax], softmax.input[0], softmax, 1.0
        for op in ("Mul", "Cast"):
            node = index.maker.get(before)
            if node is not None and node.op_type == op:
                self.inner.append(node)
                before = node.input[0]
                if op == "Mul":
                    _require(node.input[1] in index.constants and not index.constants[node.input[1]].dims)
                    self.scale = float(numpy_helper.to_array(index.constants[node.input[1]]))
        self.scores = self._maker(before, "MatMul")
        after = index.only_user(self.share.output[0])
        if after is not None and after.op_type == "Cast":
            self.share = after
            self.inner.append(after)
        self.fp32_softmax = self.share is not softmax
        self.keys = self._maker(self.scores.input[1], "Transpose", perm=[0, 1, 3, 2])
        self.mixed = self._user(self.share, "MatMul")
        _require(self.mixed.input[0] == self.share.output[0])
        # By window and head, [N W, H, L/W, d], and back: the middle Reshape is there only with windows.
        after = index.only_user(self.mixed.output[0])
        self.by_window = after if after is not None and after.op_type == "Reshape" else None
        perm = [0, 2, 1, 3] if self.by_window is None else [0, 3, 1, 2, 4]
        by_token = self._user(self.mixed if self.by_window is None else self.by_window, "Transpose", perm=perm)
        self.joined = self._user(by_token, "Reshape")
        self.inner += [self.keys, self.scores, self.mixed, by_token]
        if self.by_window is not None:
            self.inner.append(self.by_window)

    def block(self, inferred: Callable[[], Sizes]) -> AttentionBlock:
        """The attention; ``inferred`` gives sizes of values, and is called only if they are needed."""
        operands = (self.scores.input[0], self.keys.input[0], self.mixed.input[1])
        try:
            seen = [self._by_token(value) for value in operands]
            nodes = self._closed([node for _, _, made in seen for node in made])
            values, shapes, by_head = [value for value, _, _ in seen], [shape for _, shape, _ in seen], False
        except _MismatchError:
            nodes, values, by_head = self._closed([]), list(operands), True
            shapes = [self._by_head(value, inferred()) for value in operands]
        (batch, length, windows, heads, width), keys_shape, values_shape = shapes
        _require(keys_shape == values_shape and [keys_shape[0], *keys_shape[2:]] == [batch, windows, heads, width])
        if self.by_window is not None:
            _require(self._sizes(self.by_window, 5) == [batch, windows, heads, length, width])
        _require(self._sizes(self.joined, 3) == [batch, length * windows, heads * width])
        q, k, v = values
        return AttentionBlock(
            q, k, v, self.scores.output[0], self.share.output[0], self.joined.output[0], self.scale, self.fp32_softmax,
            windows * heads, windows * heads * width, windows, by_head, nodes,
        )  # fmt: skip

    def _by_token(self, value: str) -> tuple[str, list[int], list[onnx.NodeProto]]:
        """The tokens that a value by head is a view of, ``[N, L/W, W, H, d]``, and the nodes between them."""
        nodes = []
        if self.by_window is not None:
            nodes.append(self._maker(value, "Reshape"))
            value = nodes[-1].input[0]
        windowed = self.by_window is not None
        by_head = self._maker(value, "Transpose", perm=[0, 2, 3, 1, 4] if windowed else [0, 2, 1, 3])
        split = self._maker(by_head.input[0], "Reshape")
        shape = self._sizes(split, 5 if windowed else 4)
        return split.input[0], shape if windowed else [*shape[:2], 1, *shape[2:]], [*nodes, by_head, split]

    def _by_head(self, value: str, sizes: Sizes) -> list[int]:
        """``[N, L/W, W, H, d]`` of a value ``[N W, H, L/W, d]``."""
        _, shape = sizes.get(value, (0, ()))
        _require(len(shape) == 4)
        windows = 1 if self.by_window is None else self._sizes(self.by_window, 5)[1]
        return [shape[0] // windows, shape[2], windows, shape[1], shape[3]]

    def _closed(self, more: list[onnx.NodeProto]) -> frozenset[str]:
        """The nodes of the attention, if none of their values is used elsewhere; by their first outputs."""
        inner = [*self.inner, *more]
        nodes = frozenset(node.output[0] for node in (*inner, self.joined))
        inside = [output for node in inner for output in node.output]
        _require(self.index.outputs.isdisjoint(inside))
        _require(all(node.output[0] in nodes for output in inside for node in self.index.users.get(output, [])))
        return nodes

    def _maker(self, value: str, op: str, **attributes: object) -> onnx.NodeProto:
        return _of_form(self.index.maker.get(value), op, attributes)

    def _user(self, node: onnx.NodeProto, op: str, **attributes: object) -> onnx.NodeProto:
        return _of_form(self.index.only_user(node.output[0]), op, attributes)

    def _sizes(self, node: onnx.NodeProto, count: int) -> list[int]:
        """The constant sizes that are a node's second input: ``count`` positive numbers."""
        _require(len(node.input) == 2 and node.input[1] in self.index.constants)
        found: list[int] = numpy_helper.to_array(self.index.constants[node.input[1]]).ravel().tolist()
        _require(len(found) == count and min(found) > 0)
        return found


def _of_form(node: onnx.NodeProto | None, op: str, attributes: dict[str, object]) -> onnx.NodeProto:
    if node is None or node.op_type != op:
        raise _MismatchError
    _require(all(attribute_of(node, name) == value for name, value in attributes.items()))
    return node
