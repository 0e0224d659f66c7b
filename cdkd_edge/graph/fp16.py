"""The FP16 graph: convert the FP32 graph, check it on a CPU (:mod:`.fp16_simulation`), write it.

Every weight and activation becomes FP16. Two casts remain: uint8 pixels become FP16 at the input, class numbers uint8
at the output. LayerNorm stays one operator, so that compilers keep its sums in FP32. In attention they may not
(:mod:`.fp16_attention`): blocks that FP16 sums would break are changed during the check.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError, NumericalCheckError
from cdkd_edge.core.manifest import (
    ConversionCheck,
    GraphManifest,
    Refusal,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.cpu import cpu_session, fuse_attention
from cdkd_edge.graph.files import read_graph, save_derived, sizes_of
from cdkd_edge.graph.fp16_attention import AttentionWatch, change_attention
from cdkd_edge.graph.fp16_simulation import (
    FP16_MAX,
    IN_FP32,
    OutOfRangeError,
    RangeWatch,
    UInt8Array,
    extreme_tiles,
    fp16_on_cpu,
    longest_rounding,
    rounding_share,
    run_session,
)
from cdkd_edge.graph.layers import compare_classes, logits_of, scores_of
from cdkd_edge.graph.nodes import Note, batch_of, copy_of, retype, show_values

CHECK_TILES = 2
_BEST = "best_two"
_INSTEAD = "deploy it in FP32, or say which share of labels must stay the same (--min-agreement 99)"


class WeightRangeError(GraphError):
    """A weight is too large for FP16."""


def write_fp16(
    plain: Path,
    destination: Path,
    *,
    tiles: Iterable[UInt8Array] | None = None,
    imagery: str = "sample",
    least: float | None = None,
    note: Note = lambda text: None,
) -> GraphManifest:
    """Make the FP16 graph of an exported FP32 graph, check it, write it and its manifest.

    ``tiles``, ``imagery`` and ``least`` are as for :func:`check_fp16`. Default: two sample tiles.

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is not ours to replace.
        GraphError: it is not an FP32 graph, or a weight does not fit FP16.
        NumericalCheckError: FP16 breaks the network. The FP32 graph's manifest records what holds for every request.
    """
    require_replaceable(destination)
    source = read_manifest(plain, GraphManifest)
    if source.precision != "fp32":
        raise GraphError(f"{plain} is an {source.precision} graph; FP16 is made from the FP32 graph")
    note("casting the graph to FP16")
    model = read_graph(plain, source)
    chosen = sample_tiles(source.tile, CHECK_TILES) if tiles is None else tiles
    try:
        half = to_fp16(model)
        del model
        check = check_fp16(plain, half, chosen, imagery, note, least=least)
    except (WeightRangeError, NumericalCheckError) as error:
        out_of_range = isinstance(error, (WeightRangeError, OutOfRangeError))
        if out_of_range or (tiles is None and least is None):
            _record_refusal(plain, source, Refusal(error.message, out_of_range))
        raise
    if source.fp16_refused:
        _record_refusal(plain, source, None)
    return save_derived(half, destination, source, precision="fp16", conversion=check)


def _record_refusal(plain: Path, source: GraphManifest, refusal: Refusal | None) -> None:
    with contextlib.suppress(OSError):  # in a read-only folder the check is simply repeated next time
        write_manifest(plain, dataclasses.replace(source, fp16_refused=refusal))


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an FP32 graph of :mod:`.build` in FP16; inputs, outputs and names stay the same.

    Raises:
        GraphError: a weight does not fit FP16 (WeightRangeError), or this is not an exported FP32 graph.
    """
    half = copy_of(model)
    graph = half.graph
    if {item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)} != {TensorProto.UINT8}:
        raise GraphError("only a graph with uint8 tiles and labels can be made FP16", hint="export it with cdkd-edge")
    if len(graph.output) != 1:
        raise GraphError("the graph gives more than labels; FP16 is made from the graph with labels alone")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        raise GraphError("the graph is quantised already; FP16 is made from the FP32 graph")
    # ONNX wants Resize's scales in FP32 whatever the data are.
    scales = {node.input[2] for node in graph.node if node.op_type == "Resize" and len(node.input) > 2}
    for item in graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in scales:
            largest = np.abs(numpy_helper.to_array(item)).max(initial=0)
            if not largest <= FP16_MAX:
                what = f"weight {item.name} holds {largest:.3g}; FP16 ends at {FP16_MAX:.0f}"
                raise WeightRangeError(what, hint=IN_FP32)
    retype(graph, TensorProto.FLOAT, TensorProto.FLOAT16, keep=scales)
    compare_classes(half)
    del graph.value_info[:]
    return half


def logit_tolerance(roundings: int, largest: float) -> float:
    """How far FP16 may move a logit, if the largest has the magnitude ``largest``.

    For the paper's network (134 roundings) that is 1.6 %; networks with random and with trained weights were off by
    0.05 to 0.3 % of the largest logit.
    """
    return rounding_share(roundings) * largest


def check_fp16(
    plain: Path,
    half: onnx.ModelProto,
    tiles: Iterable[UInt8Array],
    imagery: str,
    note: Note = lambda text: None,
    *,
    least: float | None = None,
) -> ConversionCheck:
    """Compare an FP16 graph, with or without INT8 layers, with the FP32 graph it was made from.

    FP16 breaks a network if a value leaves its range, also on tiles that are all 0, all 255, a checkerboard and noise;
    if a logit moves by more than rounding explains (:func:`logit_tolerance`); or if a label changes where FP32's best
    score is ahead by more than twice that. Where the lead is smaller, it is a tie: counted, but no fault.

    Attention is no reason to refuse a network: blocks that FP16 sums would break are changed in ``half``, which is then
    checked again. Queries are rehearsed on the first tile, bounds hold for every query of every tile.

    Args:
        plain, half: the FP32 graph, and the FP16 graph, whose attention may be changed.
        tiles: uint8 ``[3, T, T]`` tiles; each takes a few seconds at 1024 px.
        imagery: what they are, for the manifest.
        least: judge labels by the share of pixels that must keep theirs, in place of logits and ties, as INT8 needs.

    Raises:
        NumericalCheckError: FP16 breaks the network, or fewer pixels keep their label.
        GraphError, ValueError: ONNX Runtime does not run it; there is no tile.
    """
    shown = list(tiles)
    if not shown:
        raise ValueError("there is no tile to check FP16 on")
    model = onnx.load(plain)
    size = batch_of(model)
    padded = shown + [shown[-1]] * (-len(shown) % size)
    batches = [np.stack(padded[start : start + size]) for start in range(0, len(padded), size)]
    logits = [] if least is not None else [_add_best_scores(model)]
    fuse_attention(model)
    note("labels of the FP32 graph")
    session = cpu_session(model)
    del model
    wanted = ["labels", *logits, _BEST] if logits else ["labels"]
    expected = [run_session(session, wanted, batch) for batch in batches]
    del session

    note("labels in FP16")
    found, roundings, attention = _run_fp16(half, batches, logits, note)
    if changes := attention.changes():
        change_attention(half, changes)
        note(f"labels in FP16 with other attention in {', '.join(one.block for one in changes)}")
        found, roundings, attention = _run_fp16(half, batches, logits, note)
        if remaining := attention.changes():
            raise OutOfRangeError(f"FP16 cannot hold attention: {remaining[0]}", hint=IN_FP32)
    moved = [_require_near(*pair, roundings, imagery) for pair in zip(found, expected, strict=True)] if logits else []
    same = np.concatenate([labels == exact for (labels, *_), (exact, *_) in zip(found, expected, strict=True)])
    agreement = float(same[: len(shown)].mean())
    if least is not None and agreement < least:
        hint = "deploy it in FP32, or allow more with --min-agreement"
        if any(node.op_type == "QuantizeLinear" for node in half.graph.node):
            hint = "keep more layers in FP16 (--auto with a higher --min-agreement), or build --fp16"
        raise NumericalCheckError(
            f"in lower precision the network gives another label on {1 - agreement:.2%} of the pixels of {imagery} "
            f"tiles (at most {1 - least:.1%} is allowed)",
            hint=hint,
        )
    return ConversionCheck(
        tiles=len(shown),
        imagery=imagery,
        label_agreement=agreement,
        finite=True,
        runtime=f"onnxruntime {onnxruntime.__version__}, values rounded to FP16",
        max_logit_error=max((error for error, _ in moved), default=None),
        logit_tolerance=max((allowed for _, allowed in moved), default=None),
        attention_error=attention.error,
        attention=changes,
    )


def _run_fp16(
    half: onnx.ModelProto, batches: list[UInt8Array], logits: list[str], note: Note
) -> tuple[list[list[Any]], int, AttentionWatch]:
    """Run an FP16 graph on batches of tiles and on extreme tiles; OutOfRangeError if a value leaves FP16's range.

    Returns:
        Labels, and logits if they are named, of each batch; how many roundings lead to a label; what attention was
        seen to do.
    """
    simulation = fp16_on_cpu(half)
    roundings = longest_rounding(simulation)
    show_values(simulation, logits)
    attention = AttentionWatch(simulation, half)
    watch = RangeWatch(simulation)
    del simulation

    def run(batch: UInt8Array, what: str, *, rehearsal: bool = False) -> list[Any]:
        outputs, names = ["labels", *logits], attention.outputs(rehearsal=rehearsal)
        values = watch.run([*outputs, *names], batch, what)
        attention.see(dict(zip(names, values[len(outputs) :], strict=True)), what, rehearsal=rehearsal)
        return values[: len(outputs)]

    found = [run(batch, "the imagery", rehearsal=not at) for at, batch in enumerate(batches)]
    note("extreme tiles in FP16")
    size, _, side, _ = batches[0].shape
    for name, tile in extreme_tiles(side).items():
        run(np.repeat(tile[None], size, axis=0), name)
    return found, roundings, attention


def _add_best_scores(model: onnx.ModelProto) -> str:
    """Make the logits and the two best scores of each pixel outputs of an FP32 graph; returns the logits' name."""
    graph = model.graph
    scores, logits = scores_of(model), logits_of(model)
    count = min(2, sizes_of(model, "the graph")[scores][1][1])
    graph.initializer.append(helper.make_tensor(f"{_BEST}.count", TensorProto.INT64, [1], [count]))
    # values and labels ``[N, 2, T, T]``
    graph.node.append(helper.make_node("TopK", [scores, f"{_BEST}.count"], [_BEST, f"{_BEST}.labels"], axis=1))
    show_values(model, (logits, _BEST))
    return logits


def _require_near(found: list[Any], exact: list[Any], roundings: int, imagery: str) -> tuple[float, float]:
    """Make sure that FP16 moves logits and labels no further than rounding does.

    Args:
        found: labels ``[N, T, T]`` and logits ``[N, K, G, G]`` in FP16.
        exact: the same in FP32, and its two best scores ``[N, 2, T, T]``.
        roundings, imagery: see :func:`logit_tolerance`, :func:`check_fp16`.

    Returns:
        The largest difference of a logit, and the tolerance.
    """
    labels, logits, best = exact
    largest = float(np.abs(logits).max())
    allowed = logit_tolerance(roundings, largest)
    worst = float(np.abs(found[1] - logits).max())
    if not worst <= allowed:
        raise NumericalCheckError(
            f"in FP16 logits of {imagery} tiles differ by up to {worst:.3g}, where the largest is {largest:.3g}; "
            f"rounding explains {allowed:.3g}",
            hint=_INSTEAD,
        )
    sure = best[:, 0] - best[:, -1] > 2 * allowed
    if lost := int(np.count_nonzero((found[0] != labels) & sure)):
        raise NumericalCheckError(
            f"in FP16 {lost} pixels of {imagery} tiles have another label, though FP32's score is ahead by more than "
            f"rounding explains ({2 * allowed:.3g})",
            hint=_INSTEAD,
        )
    return worst, allowed
