"""Graphs that give confidence or probabilities beside the labels, from any finished graph of this package.

Only the end of the graph grows. What leads to the labels keeps its nodes, so the labels are the same; added is a branch
from the logits at full resolution ``[N, K, T, T]``::

    scores -> (FP32) - max -> exp -> e    confidence    = round(100 / sum(e))
                                          probabilities = round(255 e / sum(e))

This is softmax (its largest term is exp(0) = 1), written out in FP32 whatever the graph's precision is: in FP16 the
probability of a sure label would move in steps of 1/2048, and an operator called Softmax would count as attention that
no compiler fused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError, ManifestError, NumericalCheckError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphManifest,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.output_kinds import (
    CONFIDENCE,
    LABELS,
    OUTPUT_KINDS,
    PERCENT,
    PROBABILITIES,
    PROBABILITY_ONE,
    output_shapes,
)
from cdkd_edge.graph.read import read_graph

CHECK_SIDE = 64
"""Side of the map of drawn logits on which a new branch is compared with NumPy."""


def variant_path(graph: Path, kind: str) -> Path:
    """Where a graph with more outputs lies: ``ckpt.fp16.onnx`` has ``ckpt.fp16.confidence.onnx`` beside it."""
    return graph.with_name(f"{graph.stem}.{kind}.onnx")


def with_output(model: onnx.ModelProto, kind: str, classes: int) -> onnx.ModelProto:
    """A graph that also gives ``confidence`` or ``probabilities``, both uint8.

    Args:
        model: a graph of this package in FP32, FP16 or INT8 that gives labels alone; left as it is.
        kind: one of :data:`cdkd_edge.core.output_kinds.OUTPUT_KINDS`; for ``labels`` the result is a copy.
        classes: K.

    Raises:
        GraphError: it is no such graph.
    """
    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    if kind == LABELS:
        return grown
    graph = grown.graph
    scores = scores_of(grown)
    half = any(item.data_type == TensorProto.FLOAT16 for item in graph.initializer)
    nodes, constants = branch(scores, kind, opset_of(grown), half=half)
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    batch, side, _ = (size.dim_value for size in graph.output[0].type.tensor_type.shape.dim)
    shape = output_shapes(kind, batch, side, classes)[kind]
    graph.output.append(helper.make_tensor_value_info(kind, TensorProto.UINT8, shape))
    return grown


def scores_of(model: onnx.ModelProto) -> str:
    """The name of the logits at full resolution, ``[N, K, T, T]``.

    Raises:
        GraphError: the graph does not end in ArgMax over them and a cast to uint8 labels, its only output.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    cast = makers.get(LABELS)
    best = makers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
    if [output.name for output in model.graph.output] != [LABELS] or best is None or best.op_type != "ArgMax":
        raise GraphError(
            "the graph does not end in labels alone; its logits cannot be told",
            hint="make it from the graph that `cdkd-edge export` wrote",
        )
    return str(best.input[0])


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a graph uses."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def branch(scores: str, kind: str, opset: int, *, half: bool) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes and constants from the logits to a uint8 output called ``kind``.

    Args:
        scores: name of the logits ``[N, K, T, T]``.
        kind: ``confidence`` or ``probabilities``.
        opset: of the graph; 18 made ReduceMax's axes an input.
        half: the logits are FP16.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def add(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        output = name if name == kind else f"{kind}.{name}"
        nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes))
        return output

    def constant(name: str, value: npt.ArrayLike, dtype: type) -> str:
        constants.append(numpy_helper.from_array(np.array(value, dtype), f"{kind}.{name}"))
        return constants[-1].name

    wide = add("Cast", "wide", scores, to=TensorProto.FLOAT) if half else scores
    axes = constant("classes", [1], np.int64)
    if opset >= 18:
        largest = add("ReduceMax", "largest", wide, axes, keepdims=1)
    else:
        largest = add("ReduceMax", "largest", wide, axes=[1], keepdims=1)
    shares = add("Exp", "shares", add("Sub", "below", wide, largest))  # the label's own is 1
    if kind == CONFIDENCE:
        total = add("ReduceSum", "total", shares, axes, keepdims=0)
        value = add("Div", "percent", constant("hundred", PERCENT, np.float32), total)
    else:
        total = add("ReduceSum", "total", shares, axes, keepdims=1)
        scale = add("Div", "scale", constant("one", PROBABILITY_ONE, np.float32), total)
        value = add("Mul", "scaled", shares, scale)
    add("Cast", kind, add("Round", "rounded", value), to=TensorProto.UINT8)
    return nodes, constants


def write_variant(
    source: Path, destination: Path, kind: str, progress: Callable[[str], None] = lambda step: None
) -> GraphManifest:
    """Make the graph with ``confidence`` or ``probabilities`` of a graph that gives labels alone, and its manifest.

    Args:
        source: a graph of any precision, with its manifest.
        destination: final path of the new graph; see :func:`variant_path`.
        kind: what it gives besides the labels.
        progress: called with the name of each step.

    Raises:
        ManifestError: the source is not what its manifest says, or the destination is not ours to replace.
        GraphError: the source is no graph of ours, or gives more than labels already.
        NumericalCheckError: the new branch does not compute softmax here.
    """
    require_replaceable(destination)
    manifest = read_manifest(source, GraphManifest)
    if kind not in OUTPUT_KINDS or kind == LABELS:
        raise GraphError(f"there is no graph with {kind!r} beside the labels")
    if manifest.output != LABELS:
        raise GraphError(f"{source} gives {manifest.output} already; {kind} are made from the graph with labels alone")
    progress(f"adding {kind} to {source.name}")
    classes = len(manifest.schema)
    model = with_output(read_graph(source, manifest), kind, classes)
    check_branch(kind, classes, opset_of(model), half=manifest.precision != "fp32")
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        grown = manifest.derived(FileRecord.of(temporary, destination.name), len(model.graph.node), output=kind)
        write_manifest(destination, grown)  # before the graph gets its name: no graph without a manifest
    return grown


def is_variant_of(variant: Path, graph: Path, kind: str) -> bool:
    """Whether a graph is whole, gives ``kind`` and was made from another."""
    try:
        made, source = read_manifest(variant, GraphManifest), read_manifest(graph, GraphManifest)
    except ManifestError:
        return False
    return made.output == kind and made.parent is not None and made.parent.sha256 == source.artefact.sha256


def check_branch(kind: str, classes: int, opset: int, *, half: bool) -> float:
    """Run a branch alone in ONNX Runtime on drawn logits and compare it with softmax in NumPy and FP64.

    The rest of the graph is not touched, so there is nothing else to check.

    Returns:
        Share of values that differ, each by one step: FP32 rounds to the other side of a half.

    Raises:
        NumericalCheckError: a value differs by more than one step, or one in a thousand by one.
    """
    kinds = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes, constants = branch("scores", kind, opset, half=half)
    side = CHECK_SIDE
    graph = helper.make_graph(
        nodes,
        "branch",
        [helper.make_tensor_value_info("scores", kinds, [1, classes, side, side])],
        [helper.make_tensor_value_info(kind, TensorProto.UINT8, output_shapes(kind, 1, side, classes)[kind])],
        initializer=constants,
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    # From all classes alike to one beyond doubt, and a logit that is far from all others.
    scores = rng.standard_normal((1, classes, side, side)) * np.geomspace(1e-2, 30, side)
    scores[0, 0, 0] = 1e3
    scores = scores.astype(np.float16 if half else np.float32)
    (found,) = session.run([kind], {"scores": scores})
    difference = np.abs(found.astype(int) - expected_output(scores, kind))
    share = float((difference > 0).mean())
    if difference.max() > 1 or share > 1e-3:
        raise NumericalCheckError(
            f"{kind} differ from softmax by up to {difference.max()} steps here, {share:.2%} of the values",
            hint="please report the version of onnxruntime; no graph was written",
        )
    return share


def expected_output(scores: npt.NDArray[np.floating], kind: str) -> npt.NDArray[np.int64]:
    """What a graph gives for logits ``[N, K, T, T]``, by softmax in FP64."""
    exact = scores.astype(np.float64)
    shares = np.exp(exact - exact.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    exact = PROBABILITY_ONE * shares if kind == PROBABILITIES else PERCENT * shares.max(axis=1)
    values: npt.NDArray[np.int64] = np.rint(exact).astype(np.int64)
    return values
