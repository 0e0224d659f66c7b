"""Attention whose sums are FP16: rehearsed and bounded on a CPU, and changed where it would fail.

A fused kernel goes through the keys in blocks and may add in FP16 what it multiplies in FP16. TensorRT-RTX 1.7.1 does:
its engines hold the source of the kernel that they run, ``fmha::Ampere_hmma_fp16_traits`` for both products. From
TensorRT 11.3 on FP32 sums can be asked for (release notes, "FP32 accumulation for FP16 fused attention"); reports of
wrong labels and NaN are NVIDIA/TensorRT#4723 and #4742 and tier4/autoware-ml#95. Which kernel a board picks is not
known here, so all sums are taken to be FP16.

Three things can break then, and each has its change in the graph:

- the sum of values weighted by up to 1 overflows: v is divided and proj multiplied by a power of two, which is exact;
- scores, or their softmax's sum, overflow, or their rounding changes the result: softmax is written in FP32. That is
  two casts, which TensorRT-RTX fuses all the same, with FP32 sums in the first product. Where scores overflow, q is
  divided by a power of two, and scores are multiplied by it in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from cdkd_edge.core.manifest import AttentionChange
from cdkd_edge.graph.fp16_simulation import FP16_MAX, longest_rounding, rounding_share
from cdkd_edge.graph.layers import attention_blocks, constant_users, multiply_constant
from cdkd_edge.graph.nodes import GraphIndex, NodeWriter, attribute_of, opset_of, show_values

KEYS = 64  # keys of a block: ``kv_loop_step`` in the engines of TensorRT-RTX 1.7.1
TERMS = 16  # products that a tensor core adds to an FP16 sum before it rounds: mma.m16n8k16 of the PTX ISA
QUERIES = 256  # that are rehearsed of each attention; all of them would take longer than the rest of an export

Array = npt.NDArray[np.float32]


def rehearse(q: Array, k: Array, v: Array, *, fp32_scores: bool = False) -> Array:
    """Attention as a kernel computes it with FP16 sums; infinite or NaN where it overflows.

    Args:
        q, k, v: FP16 numbers ``[H, R, d]``, ``[H, M, d]`` and ``[H, M, d]``; q is scaled already.
        fp32_scores: scores, softmax and its sum are FP32. The second product is FP16 all the same.

    Returns:
        ``[H, R, d]``.
    """
    heads, rows, width = q.shape
    keys = np.ascontiguousarray(k.transpose(0, 2, 1))
    rounded = np.asarray if fp32_scores else _half
    largest = np.full((heads, rows, 1), -np.inf, np.float32)
    total = np.zeros((heads, rows, 1), np.float32)
    mixed = np.zeros((heads, rows, width), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, k.shape[1], KEYS):
            block = slice(first, first + KEYS)
            scores = q @ keys[:, :, block] if fp32_scores else _sum_of_products(None, q, keys[:, :, block])
            before, largest = largest, np.maximum(largest, scores.max(axis=-1, keepdims=True))
            share = _half(np.exp(rounded(scores - largest)))
            faded = rounded(np.exp(rounded(before - largest)))
            added = share.sum(axis=-1, keepdims=True) if fp32_scores else _sum_in_pairs(share)
            total = rounded(rounded(total * faded) + added)
            mixed = _sum_of_products(_half(mixed * faded), share, v[:, block])
        return _half(mixed / total)


def _half(x: npt.NDArray[Any]) -> Array:
    return x.astype(np.float16).astype(np.float32)


def _sum_of_products(total: Array | None, a: Array, b: Array) -> Array:
    """``total + a @ b``, rounded after every :data:`TERMS` products."""
    for first in range(0, a.shape[-1], TERMS):
        part = a[..., first : first + TERMS] @ b[:, first : first + TERMS]
        total = _half(part if total is None else total + part)
    assert total is not None
    return total


def _sum_in_pairs(share: Array) -> Array:
    """The sums of rows ``[H, R, N]``, ``[H, R, 1]``."""
    while (count := share.shape[-1]) > 1:
        odd = share[..., count - count % 2 :]
        share = np.concatenate([_half(share[..., : count - count % 2 : 2] + share[..., 1::2]), odd], axis=-1)
    return share


def attention_error(q: Array, k: Array, v: Array, *, fp32_scores: bool = False) -> float:
    """How far FP16 sums move attention, as a share of the mean magnitude of what it adds: rms of the worst head.

    Of each head some queries are rehearsed (:data:`QUERIES` of all heads together): the longest, whose scores are the
    largest, and others that are spread over the map.

    Args:
        q, k, v, fp32_scores: as for :func:`rehearse`, with all queries.
    """
    count = min(-(-QUERIES // len(q)), q.shape[1])
    spread = np.linspace(0, q.shape[1] - 1, -(-count // 2)).astype(int)
    longest = np.argsort(-np.linalg.norm(q, axis=-1), axis=-1, kind="stable")[:, : count // 2]
    rows = np.concatenate([np.broadcast_to(spread, (len(q), len(spread))), longest], axis=-1)[..., None]
    chosen = np.take_along_axis(q, rows, axis=1)
    scores = chosen.astype(np.float64) @ k.transpose(0, 2, 1)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    size = share @ np.abs(v)
    error = np.abs(rehearse(chosen, k, v, fp32_scores=fp32_scores) - share @ v) / np.maximum(
        size, np.finfo(np.float16).tiny
    )
    return float(np.sqrt((error**2).mean(axis=(1, 2)).max()))


def _divisor(bound: float) -> int:
    """The power of two that brings what may leave FP16's range into half of it, as other tiles may reach further."""
    return 1 if bound <= FP16_MAX else 2 ** math.ceil(math.log2(2 * bound / FP16_MAX))


@dataclass
class _Watched:
    """An attention of a graph that is watched, and what was seen of it."""

    block: str
    heads: int
    scale: float  # of scores in FP32
    bounds: tuple[str, str]  # outputs: how large scores and sums of values may become
    parts: tuple[str, str, str]  # outputs: q, k and v of the first tile of a batch
    scores: tuple[float, str] = (0.0, "")  # the largest bound, and on what
    values: tuple[float, str] = (0.0, "")
    keys: int = 0
    error: float | None = None  # None where it was not rehearsed


class AttentionWatch:
    """Bounds and rehearses every attention of a graph of :func:`.fp16_simulation.fp16_on_cpu`.

    Bounds hold for every query. A score is at most the longest query times the longest key of its head, in whatever
    order its products are added (Cauchy-Schwarz); a sum of values weighted by up to 1 at most the sum of magnitudes.
    """

    def __init__(self, simulation: onnx.ModelProto, half: onnx.ModelProto) -> None:
        """Add what is watched to the outputs of the graph, which is changed; ``half`` is what it was made from."""
        self._seen: list[_Watched] = []
        self._in_fp32 = {_name_of(block.joined) for block in attention_blocks(half) if block and block.fp32_softmax}
        self._limit = rounding_share(longest_rounding(simulation))  # attention may be off by as much as a logit
        writer = NodeWriter()
        for node in simulation.graph.node:
            if node.op_type == "MultiHeadAttention":
                self._seen.append(_add_outputs(writer, node, opset_of(simulation)))
            writer.nodes.append(node)
        writer.replace_nodes(simulation)
        show_values(simulation, (name for one in self._seen for name in one.bounds))
        show_values(simulation, (name for one in self._seen for name in one.parts), TensorProto.FLOAT16)

    def outputs(self, *, rehearsal: bool) -> list[str]:
        """The outputs that :meth:`see` needs."""
        return [name for one in self._seen for name in (*one.bounds, *(one.parts if rehearsal else ()))]

    def see(self, found: Mapping[str, npt.NDArray[Any]], what: str, *, rehearsal: bool) -> None:
        """Take in the outputs of a batch of tiles, which is ``what``; rehearse attention of its first tile."""
        for one in self._seen:
            scores, values = (float(found[name].max()) for name in one.bounds)
            one.scores, one.values = max(one.scores, (scores, what)), max(one.values, (values, what))
            if rehearsal:
                q, k, v = (_by_head(found[name], one.heads) for name in one.parts)
                one.keys = k.shape[1]
                q, v = q * np.float32(one.scale), _half(v / np.float32(_divisor(values)))
                if scores <= FP16_MAX:
                    one.error = attention_error(q, k, v, fp32_scores=one.block in self._in_fp32)

    @property
    def error(self) -> float | None:
        """The largest error that was rehearsed; None if there is none."""
        return max((one.error for one in self._seen if one.error is not None), default=None)

    def changes(self) -> tuple[AttentionChange, ...]:
        """What has to be changed for FP16 sums to hold, block by block."""
        found = []
        for one in self._seen:
            reasons = []
            if one.scores[0] > FP16_MAX:
                reasons.append(f"scores may reach {one.scores[0]:.3g} on {one.scores[1]}")
            elif one.keys > FP16_MAX and one.block not in self._in_fp32:
                reasons.append(f"softmax may sum {one.keys} keys to as much")
            elif one.error is not None and not one.error <= self._limit:
                moved = f"move it by {one.error:.1%}" if math.isfinite(one.error) else "overflow"
                reasons.append(f"FP16 sums {moved}, {self._limit:.1%} are allowed")
            wide = bool(reasons)
            if one.values[0] > FP16_MAX:
                reasons.append(f"values may sum to {one.values[0]:.3g} on {one.values[1]}")
            if reasons:
                divisors = _divisor(one.values[0]), wide, _divisor(one.scores[0])
                found.append(AttentionChange(one.block, " and ".join(reasons), *divisors))
        return tuple(found)


def _name_of(joined: str) -> str:
    """The name of a block's attention, e.g. ``blocks.3.attn``, by that of its result."""
    return joined.removesuffix(".joined")


def _by_head(values: npt.NDArray[np.float16], heads: int) -> Array:
    """``[1, L, D]`` as ``[H, L, D/H]``."""
    split = values[0].reshape(values.shape[1], heads, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(split, np.float32)


def _add_outputs(writer: NodeWriter, attention: onnx.NodeProto, opset: int) -> _Watched:
    """Write what bounds an attention and what a rehearsal needs of it."""
    heads = attribute_of(attention, "num_heads")
    name = _name_of(attention.output[0].removesuffix(".exact").removesuffix(".by_window"))

    def reduce(op: str, label: str, value: str, axes: list[int]) -> str:
        label = f"{name}.watched.{label}"
        if opset < 18 and op != "ReduceSum":  # axes are an attribute
            return writer.add(op, label, value, axes=axes, keepdims=0)
        return writer.add(op, label, value, writer.constant(f"{label}.axes", np.array(axes, np.int64)), keepdims=0)

    longest = []
    for side, value in zip("qk", attention.input[:2], strict=True):
        shape = writer.constant(f"{name}.watched.heads", np.array([0, 0, heads, -1], np.int64))
        split = writer.add("Reshape", f"{name}.watched.{side}_heads", value, shape)
        longest.append(reduce("ReduceMax", f"{side}_length", reduce("ReduceL2", f"{side}_norms", split, [3]), [0, 1]))
    scores = writer.add("Mul", f"{name}.watched.scores", *longest)
    values = reduce("ReduceMax", "values", reduce("ReduceL1", "magnitudes", attention.input[2], [1]), [0, 1])
    ends = [writer.constant(f"watched.{label}", np.array([at], np.int64)) for label, at in (("0", 0), ("1", 1))]
    parts = []
    for part, value in zip("qkv", attention.input[:3], strict=True):
        tile = writer.add("Slice", f"{name}.watched.{part}_tile", value, *ends, ends[0])
        parts.append(writer.add("Cast", f"{name}.watched.{part}", tile, to=TensorProto.FLOAT16))
    return _Watched(name, heads, attribute_of(attention, "scale"), (scores, values), (parts[0], parts[1], parts[2]))


def change_attention(half: onnx.ModelProto, changes: Iterable[AttentionChange]) -> None:
    """Make changes of attention in an FP16 graph, with or without INT8 layers, in place."""
    wanted = {change.block: change for change in changes}
    found = {_name_of(block.joined): block for block in attention_blocks(half) if block is not None}
    index, users = GraphIndex(half.graph), constant_users(half)

    def multiply(node: onnx.NodeProto, position: int, factor: float) -> None:
        if factor != 1:
            multiply_constant(half, users, node, position, factor)

    wide: dict[str, tuple[str, AttentionChange]] = {}  # by the value that is cast, to what
    for name, change in wanted.items():
        block = found[name]
        multiply(index.maker[block.v], 1, 1 / change.values_divided_by)
        for node in index.users[block.joined]:
            if node.op_type == "QuantizeLinear":  # of an INT8 layer: its scales take part in place of its integers
                real = index.users[node.output[0]][0]
                product = index.users[real.output[0]][0]
                for quantizer in (node, real):
                    multiply(quantizer, 1, 1 / change.values_divided_by)
                multiply(index.maker[product.input[1]], 1, change.values_divided_by)
            else:
                multiply(node, 1, change.values_divided_by)
        if change.scores_in_fp32:
            multiply(index.maker[block.q], 1, 1 / change.scores_divided_by)
            wide |= {block.scores: ("FLOAT", change), block.share: ("FLOAT16", change)}
    writer = NodeWriter()
    for node in half.graph.node:
        name = node.output[0]
        writer.nodes.append(node)
        if name in wide:
            kind, change = wide[name]
            node.output[0] = f"{name}.cast"
            scaled = kind == "FLOAT" and change.scores_divided_by > 1
            cast = f"{name}.divided" if scaled else name
            writer.add("Cast", cast, node.output[0], to=TensorProto.DataType.Value(kind))
            if scaled:
                by = change.scores_divided_by
                writer.add("Mul", name, cast, writer.constant(f"scores_times_{by}", np.array(by, np.float32)))
    writer.replace_nodes(half)
