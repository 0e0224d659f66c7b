"""Checkpoint to graph: load, write, simplify, check, and only then put it under its name.

Is the graph the same function as the network? Asked of every export, on tiles that look real.

Graph clean-up by onnxsim, and the two things it must not do to this graph.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from cdkd_edge.core.errors import GraphError, MissingExtraError, NumericalCheckError, SchemaError, UsageError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import LabelSchema, load_schema, numbered_schema
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphCheck,
    GraphManifest,
    Preprocessing,
    library_versions,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.build import DEFAULT_OPSET, LOGITS, build_graph
from cdkd_edge.graph.derive import fp16_path, outdated_graphs, write_fp16
from cdkd_edge.graph.qgis import QGIS_OPSET, QgisGraph, qgis_path, require_gsd, require_own_qgis, write_qgis
from cdkd_edge.graph.stac import require_own_stac, stac_item, stac_path, write_stac
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD
from cdkd_edge.model.network import SegmentationNetwork

MIN_AGREEMENT = 0.9999
"""Share of pixels that must get the same label. The rest is rounding at the border of two classes."""

MAX_LOGIT_ERROR = 1e-4
"""Largest difference of a logit, as a share of the largest logit; FP32 rounding stays far below. Needed because a
network that sees one class everywhere gives the same labels whatever the graph computes."""


def check_graph(graph: Path, network: SegmentationNetwork, tiles: npt.NDArray[np.uint8], batch: int = 1) -> GraphCheck:
    """Run the graph in ONNX Runtime and the network in PyTorch on the same tiles.

    Args:
        graph: an exported FP32 graph.
        network: the network it was made from, in evaluation mode.
        tiles: uint8 ``[M, 3, T, T]``, M a multiple of ``batch``.
        batch: the graph's static batch.

    Raises:
        NumericalCheckError: a logit differs by more than rounding.
    """
    model = onnx.load(graph)
    model.graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    del model

    worst, largest, agreeing = 0.0, 0.0, 0
    labels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    for start in range(0, len(tiles), batch):
        chunk = tiles[start : start + batch]
        labels, logits = session.run(["labels", LOGITS], {"image": chunk})
        with torch.inference_mode():
            expected = network(torch.from_numpy(chunk))
            expected_labels = network.upsample(expected).argmax(dim=1)
        worst = float(np.maximum(worst, np.abs(logits - expected.numpy()).max()))  # keeps NaN, unlike max()
        largest = max(largest, float(expected.abs().max()))
        agreeing += int(np.count_nonzero(labels == expected_labels.numpy()))
    if not worst <= MAX_LOGIT_ERROR * largest:
        raise NumericalCheckError(
            f"the graph's logits differ from PyTorch's by up to {worst:.2g}, where the largest is {largest:.2g}",
            hint="please report this checkpoint's layout; no graph was written",
        )
    return GraphCheck(
        tiles=len(tiles),
        max_logit_error=worst,
        label_agreement=agreeing / _pixels(tiles.shape),
        network_runtime=f"torch {torch.__version__}",
        graph_runtime=f"onnxruntime {onnxruntime.__version__}",
    )


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * shape[2] * shape[3]


# TensorRT and ONNX Runtime both keep [N, L, D] tokens fastest as MatMul + Add. onnxsim would turn them
# into rank-2 Gemms between Reshapes: more nodes, and a form that TensorRT compiles worse in FP16.
SKIPPED_PASSES = (
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_transpose_into_gemm",
    "fuse_qkv",
)


def simplify_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what contributes nothing (dead ends, no-ops, duplicate constants); check the result.

    Returns:
        The simplified graph, or ``model`` itself if simplification made it larger.

    Raises:
        MissingExtraError: onnxsim is not installed.
        GraphError: the simplified graph is not valid ONNX.
    """
    try:
        import onnxsim
    except ImportError:
        raise MissingExtraError("onnxsim", "export", "simplifying the graph") from None
    simplified: onnx.ModelProto
    simplified, valid = onnxsim.simplify(model, skipped_optimizers=list(SKIPPED_PASSES))
    if not valid:
        raise GraphError("onnxsim changed what the graph computes")
    if len(simplified.graph.node) > len(model.graph.node):
        simplified = model
    # onnxsim leaves a diary in the metadata; a deployed graph carries facts about the network only.
    del simplified.metadata_props[:]
    simplified.producer_name, simplified.producer_version = model.producer_name, model.producer_version
    try:
        onnx.checker.check_model(simplified, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {error}") from None
    return simplified


CHECK_TILES = 2


@dataclass(frozen=True)
class ExportOptions:
    """What a user may say about an export; defaults are the checkpoint's own."""

    tile: int | None = None
    batch: int = 1
    opset: int = DEFAULT_OPSET
    schema: str | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    fp16: bool | None = False
    """Also write the FP16 graph: True, or it is an error; None, if it passes its check; False, not."""
    min_agreement: float | None = None
    """Judge FP16 by the share of labels that stay the same, 0..1; default: see :func:`check_half`."""
    qgis: bool = False
    """Also write the graph for the QGIS plugin Deepness; ``gsd`` must be given."""
    stac: bool = False
    """Also write a STAC item."""
    gsd: float | None = None
    """Metres per pixel of the imagery that the network was trained on."""
    weights: str | None = None
    """``raw``, ``ema`` or a name, where the checkpoint holds several sets of weights."""


@dataclass(frozen=True)
class ExportResult:
    """An exported, checked graph."""

    path: Path
    manifest: GraphManifest
    report: CheckpointReport
    nodes_written: int
    """Nodes before simplification."""
    seconds: float
    half: GraphManifest | None = None
    """Of the FP16 graph beside it."""
    half_refused: str | None = None
    """Why there is none, where one was tried."""
    outdated: tuple[Path, ...] = ()
    """What lies beside it and was made from an earlier graph of that name: FP16, INT8, QGIS, STAC."""
    qgis: QgisGraph | None = None
    """The graph for QGIS beside it."""
    stac: Path | None = None
    """The STAC item beside it."""


def export_checkpoint(
    checkpoint: Path,
    destination: Path,
    options: ExportOptions = ExportOptions(),
    progress: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Write ``destination`` (``.onnx``) and its manifest from a checkpoint, and beside it what else is asked for.

    Args:
        checkpoint: any file :func:`cdkd_edge.model.checkpoint.load_checkpoint` reads.
        destination: final path of the graph; nothing is left there unless every check passed.
        options: tile, batch, opset, label schema and what the checkpoint does not say.
        progress: called with the name of each step.

    Raises:
        CheckpointError, SchemaError, GraphError: the input cannot be exported.
        UsageError: the ground sample distance is none, or missing.
        ManifestError: a destination is a file that no export wrote.
        NumericalCheckError: graph and network disagree on more than 1 pixel in 10,000, or a logit differs by
            more than rounding.
    """
    started = time.perf_counter()
    require_replaceable(destination)
    if options.fp16 is not False:
        require_replaceable(fp16_path(destination))
    _require_sound(options, destination)
    progress("loading the checkpoint")
    network, report = load_checkpoint(
        checkpoint,
        tile=options.tile,
        heads=options.heads,
        layer_norm_eps=options.layer_norm_eps,
        weights=options.weights,
    )
    schema = _schema(options.schema, report)
    config = network.config

    progress("writing the graph")
    weights = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    written = build_graph(weights, config, batch=options.batch, opset=options.opset)
    nodes_written = len(written.graph.node)
    progress("simplifying")
    model = simplify_graph(written)
    del written, weights
    nodes = len(model.graph.node)
    _describe(model, schema)

    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        del model
        progress("checking against PyTorch")
        tiles = sample_tiles(config.tile, CHECK_TILES * options.batch)
        check = check_graph(temporary, network, tiles, options.batch)
        if check.label_agreement < MIN_AGREEMENT:
            raise NumericalCheckError(
                f"the graph gives another label than PyTorch on {1 - check.label_agreement:.3%} of the pixels "
                f"(at most {1 - MIN_AGREEMENT:.2%} is rounding); largest logit difference {check.max_logit_error:.2g}",
                hint="please report this checkpoint's layout; no graph was written",
            )
        manifest = GraphManifest(
            name=destination.stem,
            precision="fp32",
            artefact=FileRecord.of(temporary, destination.name),
            checkpoint=FileRecord.of(checkpoint),
            layout=report.layout,
            labels=schema.to_document(),
            preprocessing=Preprocessing("RGB", PIXEL_MEAN, PIXEL_STD),
            tile=config.tile,
            batch=options.batch,
            opset=options.opset,
            network=dataclasses.asdict(config),
            nodes=nodes,
            check=check,
            libraries=library_versions(("torch", "onnx", "onnxsim", "onnxruntime", "numpy")),
            training=dict(report.training),
        )
        write_manifest(destination, manifest)  # before the graph gets its name: no graph without a manifest
    half, refused = None, None
    if options.fp16 is not False:
        try:
            half = write_fp16(destination, fp16_path(destination), least=options.min_agreement, progress=progress)
        except (GraphError, NumericalCheckError) as error:
            if options.fp16:
                raise
            refused = error.message
    qgis, item = None, None
    if options.qgis and options.gsd is not None:
        progress("writing the graph for QGIS")
        weights = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
        model = simplify_graph(build_graph(weights, config, batch=1, opset=QGIS_OPSET))
        qgis = write_qgis(model, qgis_path(destination), destination, schema, config.tile, options.gsd)
    if options.stac:
        item = stac_path(destination)
        parameters = sum(tensor.numel() for tensor in network.parameters())
        write_stac(stac_item(manifest, parameters, half, qgis, options.gsd), item)
    seconds = time.perf_counter() - started
    outdated = list(outdated_graphs(destination, manifest))
    outdated += [
        path
        for path, made in ((qgis_path(destination), qgis), (stac_path(destination), item))
        if not made and path.exists()
    ]
    return ExportResult(
        destination, manifest, report, nodes_written, seconds, half, refused, tuple(outdated), qgis, item
    )


def _require_sound(options: ExportOptions, destination: Path) -> None:
    """Find what would fail after minutes."""
    if options.gsd is not None:
        require_gsd(options.gsd)
    if options.qgis:
        if options.gsd is None:
            raise UsageError(
                "a graph for QGIS has to say how large a pixel is",
                hint="--gsd METRES of the imagery it was trained on, e.g. 0.5 for DeepGlobe, 0.3 for LoveDA",
            )
        require_own_qgis(qgis_path(destination))
    if options.stac:
        require_own_stac(stac_path(destination))


def _schema(name: str | None, report: CheckpointReport) -> LabelSchema:
    classes = report.config.classes
    schema = load_schema(name) if name else report.schema or numbered_schema(classes)
    if len(schema) != classes:
        raise SchemaError(
            f"label schema {schema.name!r} has {len(schema)} classes, the network {classes}",
            hint="give the schema the network was trained with (--schema)",
        )
    return schema


def _describe(model: onnx.ModelProto, schema: LabelSchema) -> None:
    model.doc_string = "Land-cover segmentation: uint8 RGB tiles [N,3,T,T] to uint8 class labels [N,T,T]."
    entry = model.metadata_props.add()
    entry.key, entry.value = "classes", ", ".join(schema.class_names)
