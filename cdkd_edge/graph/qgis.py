"""The graph for QGIS: what the Deepness plugin loads, with all that it asks for in the file itself.

The plugin hands over float tiles (pixels / 255), takes probabilities per class and reads its settings from the ONNX
file's ``metadata_props``, each value JSON. Keys and types are those of its page "Adding metadata to ONNX model"
(https://qgis-plugin-deepness.readthedocs.io/en/latest/creators/creators_add_metadata_to_model.html) and of its
``ModelBase``, which reads ``tile_size`` where that page says ``tiles_size``; both are written.

    image float32 [1,3,S,S] in 0..1 --> probabilities float32 [1,K,S,S]

Pixels become whole numbers again before the first layer, so the labels are those of the graph for engines.
Normalisation is inside, too: the plugin's own standardisation stays off, which older releases do not have.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import NumericalCheckError, UsageError
from cdkd_edge.core.files import require_own, whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.outputs import scores_of

QGIS_OPSET = 17
"""The plugin asks for ONNX Runtime 1.12.1 to 1.17; 1.12 ends at this opset."""

MIN_AGREEMENT = 0.9999
"""Share of pixels with the label of the graph for engines; the rest are classes that are equally likely."""

GSD_RANGE = (0.001, 1000.0)
"""Metres per pixel that make sense; beyond, a unit was mixed up."""


@dataclass(frozen=True)
class QgisGraph:
    """A graph for the plugin that was written."""

    path: Path
    artefact: FileRecord
    gsd: float
    """Metres per pixel."""
    label_agreement: float
    """Share of a drawn tile's pixels with the label of the graph for engines, 0..1."""


def qgis_path(graph: Path) -> Path:
    """Where it lies: ``ckpt.onnx`` has ``ckpt.qgis.onnx`` beside it."""
    return graph.with_name(f"{graph.stem}.qgis.onnx")


def require_gsd(gsd: float) -> None:
    """Make sure that a ground sample distance is one.

    Raises:
        UsageError: it is not.
    """
    least, most = GSD_RANGE
    if not least <= gsd <= most:
        raise UsageError(f"a pixel of {gsd:g} m makes no sense", hint="--gsd is in metres, e.g. 0.5 for 50 cm")


def deepness_metadata(schema: LabelSchema, tile: int, gsd: float) -> dict[str, str]:
    """What the plugin reads, by key; every value is JSON.

    Args:
        schema: class names.
        tile: S, px.
        gsd: metres per pixel of the imagery that the network was trained on; the plugin resamples to it.
    """
    values: dict[str, Any] = {
        "model_type": "Segmentor",
        "class_names": {str(label): name for label, name in enumerate(schema.class_names)},
        "resolution": round(100 * gsd, 6),  # cm/px
        "tile_size": tile,
        "tiles_size": tile,
        "tiles_overlap": overlap_percent(tile),
        "standardization_mean": [0.0, 0.0, 0.0],
        "standardization_std": [1.0, 1.0, 1.0],
        # Probabilities below the threshold become 0 before argmax, and small segments are blurred away: neither.
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    return {key: json.dumps(value) for key, value in values.items()}


def overlap_percent(tile: int) -> int:
    """The overlap of `cdkd-edge segment` (128 px, or a quarter of small tiles), in whole per cent of the tile."""
    return math.ceil(100 * min(128, tile // 4) / tile)


def qgis_graph(model: onnx.ModelProto, schema: LabelSchema, tile: int, gsd: float) -> onnx.ModelProto:
    """An FP32 graph with labels made into one with float pixels and probabilities; changed in place and returned.

    Args:
        model: of batch 1.
        schema, tile, gsd: see :func:`deepness_metadata`.

    Raises:
        GraphError: it does not end as graphs of this package do.
    """
    graph = model.graph
    scores = scores_of(model)
    cast = next(node for node in graph.node if node.op_type == "Cast" and node.input[0] == "image")
    nodes = []
    for node in graph.node:
        if node.output[0] == cast.output[0]:
            nodes.append(helper.make_node("Mul", ["image", "full_scale"], ["image.scaled"], name="image/Mul"))
            nodes.append(helper.make_node("Round", ["image.scaled"], [cast.output[0]], name="image/Round"))
        elif node.op_type != "ArgMax" and "labels" not in node.output:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    nodes.append(helper.make_node("Softmax", [scores], ["probabilities"], name="probabilities/Softmax", axis=1))
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:], model.metadata_props[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array(255, np.float32), "full_scale"))
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, tile, tile]))
    shape = [1, len(schema), tile, tile]
    graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape))
    model.doc_string = "Land-cover segmentation for the QGIS plugin Deepness: RGB in 0..1 to class probabilities."
    for key, value in deepness_metadata(schema, tile, gsd).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model


def write_qgis(
    model: onnx.ModelProto, destination: Path, plain: Path, schema: LabelSchema, tile: int, gsd: float
) -> QgisGraph:
    """Write the graph for the plugin if its labels are those of the graph for engines.

    Args:
        model: the FP32 graph, of batch 1 and :data:`QGIS_OPSET`; it is changed.
        destination: final path.
        plain: the exported graph, to compare with.
        schema, tile, gsd: see :func:`deepness_metadata`.

    Raises:
        ManifestError: something that is not ours is in the destination's place.
        NumericalCheckError: more than 1 label in 10,000 differs.
    """
    require_own_qgis(destination)
    model = qgis_graph(model, schema, tile, gsd)
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        del model
        agreement = _agreement(temporary, plain, tile)
        if agreement < MIN_AGREEMENT:
            raise NumericalCheckError(
                f"the graph for QGIS gives another label than {plain.name} on {1 - agreement:.3%} of the pixels",
                hint="please report this checkpoint's layout; no graph was written",
            )
        artefact = FileRecord.of(temporary, destination.name)
    return QgisGraph(destination, artefact, gsd, agreement)


def require_own_qgis(path: Path) -> None:
    """Make sure that writing a graph replaces nothing but an earlier one.

    Raises:
        ManifestError: it would.
    """

    def is_own(path: Path) -> bool:
        model = onnx.load(path, load_external_data=False)
        return model.producer_name == "cdkd-edge" and any(item.key == "model_type" for item in model.metadata_props)

    require_own(path, is_own)


def _agreement(graph: Path, plain: Path, tile: int) -> float:
    """Share of the pixels with the same label, on one sample tile that is handed over as the plugin does."""
    pixels = sample_tiles(tile, 1)[0]
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": np.float32(pixels[None] * 1.0 / 255.0)})
    labels = probabilities[0].argmax(axis=0)
    del session, probabilities
    session = onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    (expected,) = session.run(["labels"], {"image": np.repeat(pixels[None], batch, axis=0)})
    return float((labels == expected[0]).mean())
