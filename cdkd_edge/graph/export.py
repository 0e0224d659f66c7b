"""From a checkpoint to a graph: load it, write the graph, simplify it, check it, and only then give it its name."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import helper

from cdkd_edge.core.errors import (
    GraphError,
    ManifestError,
    NumericalCheckError,
    SchemaError,
    UsageError,
)
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import LabelSchema, load_schema, numbered_schema
from cdkd_edge.core.machine import library_versions
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphCheck,
    GraphManifest,
    Preprocessing,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.build import DEFAULT_OPSET, LOGITS, build_graph
from cdkd_edge.graph.cpu import cpu_session
from cdkd_edge.graph.files import derived_path
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.nodes import Note, show_values, simplify_graph
from cdkd_edge.graph.outputs import QGIS_OPSET, QgisGraph, require_gsd, require_own_qgis, write_qgis
from cdkd_edge.graph.stac import require_own_stac, stac_item, stac_path, write_stac
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint
from cdkd_edge.model.network import SegmentationNetwork

MIN_AGREEMENT = (
    0.9999  # share of pixels that must get the same label; the rest is rounding at the border of two classes
)
# Largest difference of a logit, as a share of the largest logit; FP32 rounding stays far below. Labels alone prove
# nothing for a network that sees one class everywhere.
MAX_LOGIT_ERROR = 1e-4
CHECK_TILES = 2
_REPORT = "please report this checkpoint's layout; no graph was written"


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose about an export; defaults are the checkpoint's own."""

    tile: int | None = None
    batch: int = 1
    opset: int = DEFAULT_OPSET
    schema: str | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    taps: str | None = None  # blocks that feed the head, and sizes that it pools to, with commas
    pool_scales: str | None = None
    fp16: bool | None = False  # also write the FP16 graph: True, an error if it fails its check; None, if it passes
    min_agreement: float | None = (
        None  # of FP16: share of labels that stay the same, 0..1; see :func:`.fp16.check_fp16`
    )
    qgis: bool = False  # also write the graph for the QGIS plugin Deepness; ``gsd`` must be given
    stac: bool = False  # also write a STAC item
    gsd: float | None = None  # metres per pixel of the imagery that the network was trained on
    weights: str | None = None  # ``raw``, ``ema`` or a name, where the checkpoint holds several sets of weights


@dataclass(frozen=True)
class ExportResult:
    """An exported, checked graph."""

    path: Path
    manifest: GraphManifest
    report: CheckpointReport
    nodes_written: int  # nodes before simplification
    seconds: float
    half: GraphManifest | None = None  # manifest of the FP16 graph beside it
    half_refused: str | None = None  # why there is no FP16 graph, where one was tried
    outdated: tuple[Path, ...] = ()  # FP16, INT8, QGIS, STAC beside it that were made from an earlier graph of its name
    qgis: QgisGraph | None = None  # the graph for QGIS beside it
    stac: Path | None = None  # the STAC item beside it


def export_checkpoint(
    checkpoint: Path,
    destination: Path,
    options: ExportOptions = ExportOptions(),
    note: Note = lambda text: None,
) -> ExportResult:
    """Write ``destination`` (``.onnx``) and its manifest from a checkpoint, and the other files that options ask for.

    Args:
        checkpoint: any file :func:`cdkd_edge.model.checkpoint.load_checkpoint` reads.
        destination: final path of the graph; nothing is left there unless every check passed.
        options: tile, batch, opset, label schema and what the checkpoint does not say.

    Raises:
        CheckpointError, SchemaError, GraphError: the input cannot be exported.
        UsageError: the ground sample distance is implausible, or missing.
        ManifestError: a destination exists and no export wrote it.
        NumericalCheckError: graph and network disagree on more than 1 pixel in 10,000, or by more than rounding.
    """
    started = time.perf_counter()
    _check_early(options, destination)
    note("loading the checkpoint")
    network, report = load_checkpoint(
        checkpoint,
        tile=options.tile,
        heads=options.heads,
        layer_norm_eps=options.layer_norm_eps,
        taps=options.taps,
        pool_scales=options.pool_scales,
        weights=options.weights,
    )
    classes = report.config.classes
    schema = load_schema(options.schema) if options.schema else report.schema or numbered_schema(classes)
    if len(schema) != classes:
        raise SchemaError(
            f"label schema {schema.name!r} has {len(schema)} classes, the network {classes}",
            hint="give the schema the network was trained with (--schema)",
        )
    manifest, nodes_written = _write_plain(network, report, schema, checkpoint, destination, options, note)
    half, refused = _write_half(destination, options, note)
    qgis, item = None, None
    if options.qgis and options.gsd is not None:
        note("writing the graph for QGIS")
        model = simplify_graph(build_graph(_weights(network), network.config, batch=1, opset=QGIS_OPSET))
        path = derived_path(destination, "qgis")
        qgis = write_qgis(model, path, destination, schema, network.config.tile, options.gsd)
    if options.stac:
        item = stac_path(destination)
        parameters = sum(tensor.numel() for tensor in network.parameters())
        write_stac(stac_item(manifest, parameters, half, qgis, options.gsd), item)
    seconds = time.perf_counter() - started
    outdated = _outdated(destination, manifest, qgis=qgis is None, stac=item is None)
    return ExportResult(destination, manifest, report, nodes_written, seconds, half, refused, outdated, qgis, item)


def _check_early(options: ExportOptions, destination: Path) -> None:
    """Raise the errors that would otherwise come after minutes of work."""
    require_replaceable(destination)
    if options.fp16 is not False:
        require_replaceable(derived_path(destination, "fp16"))
    if options.gsd is not None:
        require_gsd(options.gsd)
    if options.qgis:
        if options.gsd is None:
            raise UsageError(
                "a graph for QGIS needs the size of a pixel",
                hint="--gsd METRES of the imagery it was trained on, e.g. 0.5 for DeepGlobe, 0.3 for LoveDA",
            )
        require_own_qgis(derived_path(destination, "qgis"))
    if options.stac:
        require_own_stac(stac_path(destination))


def _weights(network: SegmentationNetwork) -> dict[str, npt.NDArray[np.float32]]:
    return {key: tensor.numpy() for key, tensor in network.state_dict().items()}


def _write_plain(
    network: SegmentationNetwork,
    report: CheckpointReport,
    schema: LabelSchema,
    checkpoint: Path,
    destination: Path,
    options: ExportOptions,
    note: Note,
) -> tuple[GraphManifest, int]:
    """Write the checked FP32 graph; returns its manifest and the number of nodes before simplification."""
    config = network.config
    note("writing the graph")
    written = build_graph(_weights(network), config, batch=options.batch, opset=options.opset)
    nodes_written = len(written.graph.node)
    note("simplifying")
    model = simplify_graph(written)
    del written
    nodes = len(model.graph.node)
    model.doc_string = "Land-cover segmentation: uint8 RGB tiles [N,3,T,T] to uint8 class labels [N,T,T]."
    helper.set_model_props(model, {"classes": ", ".join(schema.class_names)})
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        del model
        note("checking against PyTorch")
        tiles = sample_tiles(config.tile, CHECK_TILES * options.batch)
        check = check_graph(temporary, network, tiles, options.batch)
        if check.label_agreement < MIN_AGREEMENT:
            raise NumericalCheckError(
                f"the graph gives another label than PyTorch on {1 - check.label_agreement:.3%} of the pixels "
                f"(at most {1 - MIN_AGREEMENT:.2%} is rounding); largest logit difference {check.max_logit_error:.2g}",
                hint=_REPORT,
            )
        manifest = GraphManifest(
            name=destination.stem,
            precision="fp32",
            artefact=FileRecord.of(temporary, destination.name),
            checkpoint=FileRecord.of(report.path),
            layout=report.layout,
            labels=schema.to_document(),
            preprocessing=Preprocessing("RGB", config.pixel_mean, config.pixel_std),
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
    return manifest, nodes_written


def _write_half(plain: Path, options: ExportOptions, note: Note) -> tuple[GraphManifest | None, str | None]:
    """Write the FP16 graph if it is asked for; returns its manifest, or why there is none."""
    if options.fp16 is False:
        return None, None
    try:
        return write_fp16(plain, derived_path(plain, "fp16"), least=options.min_agreement, note=note), None
    except (GraphError, NumericalCheckError) as error:
        if options.fp16:
            raise
        return None, error.message


def _outdated(plain: Path, manifest: GraphManifest, *, qgis: bool, stac: bool) -> tuple[Path, ...]:
    """Files beside a new FP32 graph that were made from an earlier one of its name: FP16, INT8, ``qgis``, ``stac``."""
    found = []
    for path in (derived_path(plain, "fp16"), derived_path(plain, "int8")):
        try:
            parent = read_manifest(path, GraphManifest, verify=False).parent
        except ManifestError:  # no graph, or not one of ours
            continue
        if parent is not None and parent.sha256 != manifest.artefact.sha256:
            found.append(path)
    others = [derived_path(plain, "qgis")] * qgis + [stac_path(plain)] * stac
    return (*found, *(path for path in others if path.exists()))


def check_graph(graph: Path, network: SegmentationNetwork, tiles: npt.NDArray[np.uint8], batch: int = 1) -> GraphCheck:
    """Compare an FP32 graph in ONNX Runtime with PyTorch on tiles ``[M, 3, T, T]``, M a multiple of ``batch``."""
    model = onnx.load(graph)
    show_values(model, [LOGITS])
    session = cpu_session(model)
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
            hint=_REPORT,
        )
    return GraphCheck(
        tiles=len(tiles),
        max_logit_error=worst,
        label_agreement=agreeing / tiles[:, 0].size,
        network_runtime=f"torch {torch.__version__}",
        graph_runtime=f"onnxruntime {onnxruntime.__version__}",
    )
