"""Is the FP16 graph good enough to build? Asked on a CPU, on imagery and on tiles made to break it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from cdkd_edge.core.errors import GraphError, NumericalCheckError
from cdkd_edge.core.manifest import ConversionCheck
from cdkd_edge.graph.fp16 import FP16_MAX, fp16_on_cpu, longest_rounding, rounded_values
from cdkd_edge.graph.fuse import fuse_attention
from cdkd_edge.graph.outputs import scores_of
from cdkd_edge.graph.read import sizes_of
from cdkd_edge.graph.session import cpu_session

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

ROUNDOFF = 2.0**-11
"""FP16 moves a number by this share of it at most."""

SPREADS = 5.0
"""Standard deviations that a logit may be off, so that none of a million is off by chance."""


class OutOfRangeError(NumericalCheckError):
    """A value is too large for FP16."""


def logit_tolerance(roundings: int, largest: float) -> float:
    """How far FP16 may move a logit.

    Each of the n values that are rounded one after the other is moved by up to u = 2^-11 of itself, with a standard
    deviation of u / sqrt(3) where all errors up to u are as likely. Errors are independent, so n of them have
    sqrt(n) times that: 5 sqrt(n / 3) u of the largest logit is allowed. Of the paper's network (n = 134) that is 1.6 %;
    networks with random and with trained weights were off by 0.05 to 0.3 % of the largest logit.

    Args:
        roundings: n.
        largest: the largest magnitude of a logit.
    """
    return SPREADS * ROUNDOFF * math.sqrt(roundings / 3) * largest


def check_half(
    plain: Path,
    half: onnx.ModelProto,
    tiles: Iterable[UInt8Array],
    imagery: str,
    progress: Callable[[str], None] = lambda step: None,
    *,
    least: float | None = None,
) -> ConversionCheck:
    """Compare an FP16 graph, with or without INT8 layers, with the FP32 graph it was made from.

    FP16 breaks a network whose values leave its range, whose logits move by more than rounding explains
    (:func:`logit_tolerance`), or that gives another label where FP32's best score is ahead by more than twice that. A
    label that changes nearer than that is a tie: it is counted, and no fault. (Where two scores are as good, either
    label is; random weights make many of them.)

    Args:
        plain: the FP32 graph.
        half: the FP16 graph.
        tiles: uint8 ``[3, T, T]`` tiles; as many as the caller has time for, a few seconds each at 1024 px.
        imagery: what they are, for the manifest.
        progress: called with the name of each step.
        least: judge labels by the share of pixels that must keep theirs, in place of logits and ties. INT8 needs that.

    Raises:
        NumericalCheckError: as said; or fewer pixels keep their label. Values are also looked at on tiles that are all
            0, all 255, a checkerboard and noise.
        GraphError: ONNX Runtime does not run it.
        ValueError: there is no tile.
    """
    model = onnx.load(plain)
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    shown = list(tiles)
    if not shown:
        raise ValueError("there is no tile to check FP16 on")
    batches = list(_batches(shown, shape[0]))
    logits = [] if least is not None else [_add_best(model)]
    fuse_attention(model)
    progress("labels of the FP32 graph")
    session = cpu_session(model, in_order=True)
    del model
    expected = [_run(session, ["labels", *logits, *([_BEST] if logits else [])], batch) for batch in batches]
    del session

    rehearsal = fp16_on_cpu(half)
    roundings = longest_rounding(rehearsal)
    rehearsal.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in logits)
    probes = _add_probes(rehearsal)
    # In ONNX Runtime's own order probes run last, and keep what they look at.
    session = cpu_session(rehearsal, in_order=True)
    del rehearsal

    def half_of(batch: UInt8Array, what: str) -> list[npt.NDArray[Any]]:
        found = _run(session, ["labels", *logits, *probes.sums, *probes.bounds], batch)
        _require_range(what, probes, found[1 + len(logits) :])
        return found[: 1 + len(logits)]

    progress("labels in FP16")
    agreeing, left = 0, len(shown)
    worst: float | None = None
    tolerance: float | None = None
    for batch, exact in zip(batches, expected, strict=True):
        labels, *rounded = half_of(batch, "the imagery")
        agreeing += int(np.count_nonzero((labels == exact[0])[:left]))
        left -= len(batch)
        if rounded:
            true_labels, true_logits, best = exact
            tolerance = max(tolerance or 0.0, logit_tolerance(roundings, float(np.abs(true_logits).max())))
            off = _require_near(labels, rounded[0], true_labels, true_logits, best, roundings, imagery)
            worst = max(worst or 0.0, off)
    progress("extreme tiles in FP16")
    for name, tile in extreme_tiles(shape[-1]).items():
        half_of(np.repeat(tile[None], shape[0], axis=0), name)
    agreement = agreeing / (len(shown) * shape[-1] ** 2)
    if least is not None and agreement < least:
        raise NumericalCheckError(
            f"in lower precision the network gives another label on {1 - agreement:.2%} of the pixels of {imagery} "
            f"tiles (at most {1 - least:.1%} is allowed)",
            hint="keep more layers in FP16 (--auto with a higher --min-agreement), or build --fp16"
            if any(node.op_type == "QuantizeLinear" for node in half.graph.node)
            else "deploy it in FP32, or allow more with --min-agreement",
        )
    return ConversionCheck(
        tiles=len(shown),
        imagery=imagery,
        label_agreement=agreement,
        finite=True,
        runtime=f"onnxruntime {onnxruntime.__version__}, values rounded to FP16",
        max_logit_error=worst,
        logit_tolerance=tolerance,
    )


_BEST = "best_two"


def _add_best(model: onnx.ModelProto) -> str:
    """Make logits and the two best scores of each pixel outputs of an FP32 graph; returns the name of the logits.

    Raises:
        GraphError: it does not end as graphs of this package do.
    """
    graph = model.graph
    scores = scores_of(model)
    resize = next((node for node in graph.node if scores in node.output), None)
    if resize is None or resize.op_type != "Resize":
        raise GraphError("the graph does not end in logits that are made larger", hint="export it again")
    count = min(2, sizes_of(model, "the graph")[scores][1][1])
    graph.initializer.append(helper.make_tensor(f"{_BEST}.count", TensorProto.INT64, [1], [count]))
    graph.node.append(
        helper.make_node("TopK", [scores, f"{_BEST}.count"], [_BEST, f"{_BEST}.labels"], axis=1)  # [N, 2, T, T]
    )
    for name in (resize.input[0], _BEST):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return str(resize.input[0])


def _require_near(
    labels: UInt8Array,
    rounded: Float32Array,
    exact_labels: UInt8Array,
    exact: Float32Array,
    best: Float32Array,
    roundings: int,
    imagery: str,
) -> float:
    """Make sure that FP16 moves logits and labels no further than rounding does; returns the largest difference.

    Args:
        labels, exact_labels: in FP16 and FP32, ``[N, T, T]``.
        rounded, exact: logits in FP16 and FP32, ``[N, K, G, G]``.
        best: the two best scores in FP32, ``[N, 2, T, T]``.
        roundings: as for :func:`logit_tolerance`.
        imagery: what the tiles are.
    """
    largest = float(np.abs(exact).max())
    allowed = logit_tolerance(roundings, largest)
    worst = float(np.abs(rounded - exact).max())
    if not worst <= allowed:
        raise NumericalCheckError(
            f"in FP16 logits of {imagery} tiles differ by up to {worst:.3g}, where the largest is {largest:.3g}; "
            f"rounding explains {allowed:.3g}",
            hint=_INSTEAD,
        )
    sure = best[:, 0] - best[:, -1] > 2 * allowed
    if lost := int(np.count_nonzero((labels != exact_labels) & sure)):
        raise NumericalCheckError(
            f"in FP16 {lost} pixels of {imagery} tiles have another label, though FP32's score is ahead by more than "
            f"rounding explains ({2 * allowed:.3g})",
            hint=_INSTEAD,
        )
    return worst


_INSTEAD = "deploy it in FP32, or say what share of labels must stay the same (--min-agreement 99)"


def extreme_tiles(tile: int) -> dict[str, UInt8Array]:
    """Tiles that no scene holds and every network must survive, uint8 ``[3, T, T]``."""
    squares = np.indices((tile, tile)).sum(axis=0) % 2 * np.uint8(255)
    return {
        "a black tile": np.zeros((3, tile, tile), np.uint8),
        "a white tile": np.full((3, tile, tile), 255, np.uint8),
        "a checkerboard": np.repeat(squares[None].astype(np.uint8), 3, axis=0),
        "noise": np.random.default_rng(0).integers(0, 256, (3, tile, tile), np.uint8),
    }


def _batches(tiles: Iterable[UInt8Array], size: int) -> Iterator[UInt8Array]:
    """Tiles in batches; the last tile fills up the last batch."""
    batch: list[UInt8Array] = []
    for tile in tiles:
        batch.append(tile)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch + [batch[-1]] * (size - len(batch)))


@dataclass(frozen=True)
class _Probes:
    """Outputs of a graph that tell whether all its values are in FP16's range."""

    sums: dict[str, str]
    """By name of the output, the value that it is the sum of."""
    bounds: dict[str, str]
    """By name of the output, the attention that it bounds the scores of."""


def _add_probes(model: onnx.ModelProto) -> _Probes:
    """Sums of all values that an engine stores, and bounds of what fused attention never shows, as outputs.

    A sum is finite if and only if all its terms are (FP16's largest number, ten million times, is far from FP32's end).
    Finite logits prove nothing: a quantiser makes 127 of infinity and -128 of NaN. What ReLU alone takes is looked at
    behind it, where -infinity has become 0 as it should.
    """
    graph = model.graph
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    watched = set()
    for name in rounded_values(model):
        following = users.get(name, [])
        only_relu = len(following) == 1 and following[0].op_type == "Relu"
        watched.add(following[0].output[0] if only_relu else name)
    probes = _Probes({}, {})
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "MultiHeadAttention":
            nodes += _score_bound(model, node)
            probes.bounds[nodes[-1].output[0]] = node.output[0].removesuffix(".exact")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if node.output[0] in watched:
            made = f"{node.output[0]}.sum_of_all"
            nodes.append(helper.make_node("ReduceSum", [node.output[0]], [made], keepdims=0))
            probes.sums[made] = node.output[0]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*probes.sums, *probes.bounds)
    )
    return probes


def _score_bound(model: onnx.ModelProto, attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that bound the scores of fused attention; the last gives one float per head.

    No score of a head exceeds its longest query times its longest key (Cauchy-Schwarz).
    """
    graph = model.graph
    by_attribute = next(item.version for item in model.opset_import if item.domain == "") < 18
    heads = next(item.i for item in attention.attribute if item.name == "num_heads")
    nodes, sides = [], []
    for side, value in zip(("q", "k"), attention.input[:2], strict=True):
        name = f"{attention.output[0]}.{side}_length"
        graph.initializer.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [4], [0, 0, heads, -1]))
        nodes.append(helper.make_node("Reshape", [value, f"{name}.shape"], [f"{name}.heads"]))
        for op, source, made, axes in (
            ("ReduceL2", f"{name}.heads", f"{name}.norms", [3]),
            ("ReduceMax", f"{name}.norms", name, [0, 1]),
        ):
            if by_attribute:
                nodes.append(helper.make_node(op, [source], [made], axes=axes, keepdims=0))
                continue
            graph.initializer.append(helper.make_tensor(f"{made}.axes", TensorProto.INT64, [len(axes)], axes))
            nodes.append(helper.make_node(op, [source, f"{made}.axes"], [made], keepdims=0))
        sides.append(name)
    return [*nodes, helper.make_node("Mul", sides, [f"{attention.output[0]}.score_bound"])]


def _require_range(what: str, probes: _Probes, values: list[npt.NDArray[np.float32]]) -> None:
    """Values are those of the sums, then those of the bounds."""
    for name, value in zip(probes.sums.values(), values, strict=False):
        if not np.isfinite(value):
            raise OutOfRangeError(f"on {what} {name} leaves FP16's range", hint="deploy this network in FP32")
    for name, value in zip(probes.bounds.values(), values[len(probes.sums) :], strict=True):
        if not (value <= FP16_MAX).all():
            raise OutOfRangeError(
                f"on {what} attention scores ({name}) may reach {value.max():.3g}, beyond FP16's {FP16_MAX:.0f}",
                hint="deploy this network in FP32",
            )


def _run(session: Any, outputs: list[str], batch: UInt8Array) -> list[npt.NDArray[Any]]:
    try:
        values: list[npt.NDArray[Any]] = session.run(outputs, {"image": batch})
    except Exception as error:  # ONNX Runtime's own types share no base but Exception
        raise GraphError(f"ONNX Runtime does not run the graph: {' '.join(str(error).split())[:300]}") from None
    return values
