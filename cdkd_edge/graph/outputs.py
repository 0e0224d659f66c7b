"""Graphs that give more than labels: confidence, probabilities, and the graph for QGIS.

The nodes that lead to the labels stay; a branch is added from the logits at full resolution ``[N, K, T, T]``::

    scores -> (FP32) - max -> exp -> e    confidence    = round(100 / sum(e))
                                          probabilities = round(255 e / sum(e))

This is softmax (its largest term is exp(0) = 1), in FP32 whatever the graph's precision is: in FP16 the probability of
a sure label would move in steps of 1/2048. It is written in elementary operators, because a Softmax node would count
as an attention that the compiler did not fuse.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError, NumericalCheckError, UsageError
from cdkd_edge.core.files import require_own, whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import (
    CONFIDENCE,
    LABELS,
    OUTPUT_KINDS,
    PERCENT,
    PROBABILITIES,
    PROBABILITY_ONE,
    FileRecord,
    GraphManifest,
    output_shapes,
    read_manifest,
    require_replaceable,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.cpu import cpu_session, open_session
from cdkd_edge.graph.files import read_graph, save_derived
from cdkd_edge.graph.layers import scores_of
from cdkd_edge.graph.nodes import NodeWriter, Note, copy_of, opset_of, replace_nodes

CHECK_SIDE = 64  # side of the map of random logits on which a new branch is compared with NumPy


def with_output(model: onnx.ModelProto, kind: str, classes: int) -> onnx.ModelProto:
    """A copy of a graph of any precision that gives labels alone (or GraphError), which also gives ``kind``, uint8."""
    grown = copy_of(model)
    graph = grown.graph
    half = any(item.data_type == TensorProto.FLOAT16 for item in graph.initializer)
    branch = output_branch(scores_of(grown), kind, opset_of(grown), half=half)
    graph.node.extend(branch.nodes)
    graph.initializer.extend(branch.constants.values())
    batch, side, _ = (size.dim_value for size in graph.output[0].type.tensor_type.shape.dim)
    shape = output_shapes(kind, batch, side, classes)[kind]
    graph.output.append(helper.make_tensor_value_info(kind, TensorProto.UINT8, shape))
    return grown


def output_branch(scores: str, kind: str, opset: int, *, half: bool) -> NodeWriter:
    """The nodes and constants from logits ``[N, K, T, T]``, in FP16 if ``half``, to a uint8 output called ``kind``."""
    writer = NodeWriter()

    def add(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        return writer.add(op, f"{kind}.{name}", *inputs, **attributes)

    def constant(name: str, value: npt.ArrayLike, dtype: type) -> str:
        return writer.constant(f"{kind}.{name}", np.array(value, dtype))

    wide = add("Cast", "wide", scores, to=TensorProto.FLOAT) if half else scores
    axes = constant("classes", [1], np.int64)
    if opset >= 18:  # before, axes are an attribute
        largest = add("ReduceMax", "largest", wide, axes, keepdims=1)
    else:
        largest = add("ReduceMax", "largest", wide, axes=[1], keepdims=1)
    shares = add("Exp", "shares", add("Sub", "below", wide, largest))  # the label's own share is 1
    if kind == CONFIDENCE:
        total = add("ReduceSum", "total", shares, axes, keepdims=0)
        value = add("Div", "percent", constant("hundred", PERCENT, np.float32), total)
    else:
        total = add("ReduceSum", "total", shares, axes, keepdims=1)
        scale = add("Div", "scale", constant("one", PROBABILITY_ONE, np.float32), total)
        value = add("Mul", "scaled", shares, scale)
    writer.add("Cast", kind, add("Round", "rounded", value), to=TensorProto.UINT8)
    return writer


def write_variant(source: Path, destination: Path, kind: str, note: Note = lambda text: None) -> GraphManifest:
    """Write the graph with ``confidence`` or ``probabilities`` of a graph that gives labels alone, and its manifest.

    Raises:
        ManifestError: the source is not what its manifest says, or the destination is not ours to replace.
        GraphError: the source gives more than labels, or does not end in them.
        NumericalCheckError: the new branch does not compute softmax on this machine.
    """
    require_replaceable(destination)
    manifest = read_manifest(source, GraphManifest)
    if kind not in OUTPUT_KINDS or kind == LABELS:
        raise GraphError(f"there is no graph with {kind!r} beside the labels")
    if manifest.output != LABELS:
        raise GraphError(f"{source} gives {manifest.output} already; {kind} are made from the graph with labels alone")
    note(f"adding {kind} to {source.name}")
    classes = len(manifest.schema)
    model = with_output(read_graph(source, manifest), kind, classes)
    check_branch(kind, classes, opset_of(model), half=manifest.precision != "fp32")
    return save_derived(model, destination, manifest, output=kind)


def check_branch(kind: str, classes: int, opset: int, *, half: bool) -> float:
    """Compare a branch alone on random logits with :func:`expected_output`.

    Returns:
        Share of values that differ, each by one step: FP32 rounds to the other side of a half.
    """
    kinds = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    branch = output_branch("scores", kind, opset, half=half)
    shape = (1, classes, CHECK_SIDE, CHECK_SIDE)
    wanted = {kind: (TensorProto.UINT8, output_shapes(kind, 1, CHECK_SIDE, classes)[kind])}
    model = branch.model("branch", {"scores": (kinds, shape)}, wanted, opset)
    # From classes that are equally likely to one beyond doubt, and one logit far from all others.
    scores = np.random.default_rng(0).standard_normal(shape) * np.geomspace(1e-2, 30, CHECK_SIDE)
    scores[0, 0, 0] = 1e3
    scores = scores.astype(np.float16 if half else np.float32)
    (found,) = cpu_session(model).run([kind], {"scores": scores})
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


# The graph for QGIS: what the Deepness plugin loads. The plugin hands over float tiles (pixels / 255), takes
# probabilities per class and reads its settings from the file's metadata_props, each value JSON:
# https://qgis-plugin-deepness.readthedocs.io/en/latest/creators/creators_add_metadata_to_model.html
#
#     image float32 [1,3,S,S] in 0..1 --> probabilities float32 [1,K,S,S]
#
# Pixels become whole numbers again before the first layer, so the labels are those of the graph for engines.

QGIS_OPSET = 17  # the plugin asks for ONNX Runtime 1.12.1 to 1.17; 1.12 ends at this opset
MIN_AGREEMENT = 0.9999  # share of pixels with the label of the graph for engines; the rest are equally likely classes
GSD_RANGE = (0.001, 1000.0)  # metres per pixel that are accepted; beyond, a unit was mixed up


@dataclass(frozen=True)
class QgisGraph:
    """A graph for the plugin that was written."""

    path: Path
    artefact: FileRecord
    gsd: float  # metres per pixel
    label_agreement: float  # share of a sample tile's pixels with the label of the graph for engines, 0..1


def require_gsd(gsd: float) -> None:
    """Make sure that a ground sample distance is plausible; UsageError if it is not."""
    least, most = GSD_RANGE
    if not least <= gsd <= most:
        raise UsageError(
            f"--gsd must be between {least:g} and {most:g} m, got {gsd:g}", hint="for pixels of 50 cm, type --gsd 0.5"
        )


def deepness_metadata(schema: LabelSchema, tile: int, gsd: float) -> dict[str, str]:
    """The plugin's settings by key; every value is JSON.

    ``gsd`` is metres per pixel of the imagery that the network was trained on; the plugin resamples to it.
    """
    values: dict[str, Any] = {
        "model_type": "Segmentor",
        "class_names": {str(label): name for label, name in enumerate(schema.class_names)},
        "resolution": round(100 * gsd, 6),  # cm/px
        "tile_size": tile,  # read by the plugin's ModelBase
        "tiles_size": tile,  # named by the plugin's manual
        "tiles_overlap": overlap_percent(tile),
        # Normalisation is inside the graph; older releases of the plugin have none.
        "standardization_mean": [0.0, 0.0, 0.0],
        "standardization_std": [1.0, 1.0, 1.0],
        # Off: probabilities below the threshold would become 0 before argmax, small segments would be blurred away.
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    return {key: json.dumps(value) for key, value in values.items()}


def overlap_percent(tile: int) -> int:
    """The overlap of `cdkd-edge segment` (128 px, or a quarter of small tiles), in whole per cent of the tile."""
    return math.ceil(100 * min(128, tile // 4) / tile)


def qgis_graph(model: onnx.ModelProto, schema: LabelSchema, tile: int, gsd: float) -> onnx.ModelProto:
    """Turn an FP32 graph of batch 1 into one with float pixels and probabilities; changed in place and returned."""
    graph = model.graph
    scores = scores_of(model)
    cast = next(node for node in graph.node if node.op_type == "Cast" and node.input[0] == "image")
    writer, ending = NodeWriter(), {scores}  # what is made from the scores
    for node in graph.node:
        if node.output[0] == cast.output[0]:
            scaled = writer.add("Mul", "image", "image", "full_scale", outputs=["image.scaled"])
            writer.add("Round", "image", scaled, outputs=[cast.output[0]])
        elif ending.isdisjoint(node.input):
            writer.nodes.append(node)
        else:
            ending.update(node.output)
    writer.add("Softmax", PROBABILITIES, scores, axis=1)
    replace_nodes(graph, writer.nodes)
    del graph.input[:], graph.output[:], graph.value_info[:], model.metadata_props[:]
    graph.initializer.append(numpy_helper.from_array(np.array(255, np.float32), "full_scale"))
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, tile, tile]))
    shape = [1, len(schema), tile, tile]
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape))
    model.doc_string = "Land-cover segmentation for the QGIS plugin Deepness: RGB in 0..1 to class probabilities."
    helper.set_model_props(model, deepness_metadata(schema, tile, gsd))
    return model


def write_qgis(
    model: onnx.ModelProto, destination: Path, plain: Path, schema: LabelSchema, tile: int, gsd: float
) -> QgisGraph:
    """Turn a graph of batch 1 and :data:`QGIS_OPSET` into one for the plugin, and write it.

    Raises:
        ManifestError: the destination exists and is not a graph for QGIS that cdkd-edge wrote.
        NumericalCheckError: more than 1 label in 10,000 differs from ``plain``, the graph for engines.
    """
    require_own_qgis(destination)
    model = qgis_graph(model, schema, tile, gsd)
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        del model
        agreement = _qgis_agreement(temporary, plain, tile)
        if agreement < MIN_AGREEMENT:
            raise NumericalCheckError(
                f"the graph for QGIS gives another label than {plain.name} on {1 - agreement:.3%} of the pixels",
                hint="please report this checkpoint's layout; no graph was written",
            )
        artefact = FileRecord.of(temporary, destination.name)
    return QgisGraph(destination, artefact, gsd, agreement)


def require_own_qgis(path: Path) -> None:
    """Make sure that a graph for QGIS replaces nothing but an earlier one; ManifestError if it would."""

    def is_own(path: Path) -> bool:
        model = onnx.load(path, load_external_data=False)
        return model.producer_name == "cdkd-edge" and any(item.key == "model_type" for item in model.metadata_props)

    require_own(path, is_own)


def _qgis_agreement(graph: Path, plain: Path, tile: int) -> float:
    """Share of the pixels of a sample tile that get the same label when it is handed over as the plugin does."""
    pixels = sample_tiles(tile, 1)[0]
    (probabilities,) = open_session(str(graph)).run(None, {"image": np.float32(pixels[None] * 1.0 / 255.0)})
    labels = probabilities[0].argmax(axis=0)
    del probabilities
    session = open_session(str(plain))
    batch = session.get_inputs()[0].shape[0]
    (expected,) = session.run([LABELS], {"image": np.repeat(pixels[None], batch, axis=0)})
    return float((labels == expected[0]).mean())
