"""Checkpoint to graph: load, write, simplify, check, and only then put it under its name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from cdkd_edge.errors import GraphError, NumericalCheckError, SchemaError, UsageError
from cdkd_edge.export.check import MIN_AGREEMENT, check_graph
from cdkd_edge.export.derive import fp16_path, outdated_graphs, write_fp16
from cdkd_edge.export.graph import DEFAULT_OPSET, build_graph
from cdkd_edge.export.qgis import QGIS_OPSET, QgisGraph, qgis_path, require_gsd, require_own_qgis, write_qgis
from cdkd_edge.export.simplify import simplify_graph
from cdkd_edge.export.stac import require_own_stac, stac_item, stac_path, write_stac
from cdkd_edge.files import whole_file
from cdkd_edge.labels import LabelSchema, load_schema, numbered_schema
from cdkd_edge.manifest import (
    FileRecord,
    GraphManifest,
    Preprocessing,
    library_versions,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD
from cdkd_edge.scenery import sample_tiles

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
