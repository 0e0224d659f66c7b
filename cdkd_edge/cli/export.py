"""``cdkd-edge export``: checkpoint to ONNX graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from typer import BadParameter, Option

from cdkd_edge.cli.inspect import change_rows
from cdkd_edge.cli.options import (
    CHECKPOINT,
    HEADS,
    JSON,
    NORM_EPS,
    POOL_SCALES,
    TAPS,
    WEIGHTS,
    WORKSPACE,
    require_package,
    stem_of,
)
from cdkd_edge.cli.progress import steps
from cdkd_edge.cli.report import Report, Rows, fields_of, plural
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, NAME_THEM, nameless
from cdkd_edge.core.numbers import duration, percent, significant, size
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.graph.export import ExportResult

_SCHEMAS = ", ".join(f"{name} ({len(schema)})" for name, schema in BUILTIN_SCHEMAS.items())


@dataclasses.dataclass(frozen=True)
class GraphOptions:
    """The fields of :class:`~cdkd_edge.graph.export.ExportOptions` about the graph."""

    schema: str | None = Option(None, help=f"Classes: {_SCHEMAS}, or a .toml file. Default: the checkpoint's.")
    tile: int | None = Option(None, help="Side of a tile, px. Default: the checkpoint's.", min=1)
    batch: int = Option(1, help="Tiles per run; the graph takes exactly so many.", min=1)
    opset: int = Option(20, help="ONNX opset.", min=17, max=20)
    heads: int | None = HEADS
    layer_norm_eps: float | None = NORM_EPS
    taps: str | None = TAPS
    pool_scales: str | None = POOL_SCALES
    weights: str | None = WEIGHTS


@dataclasses.dataclass(frozen=True)
class CompanionOptions:
    """What is written beside the graph."""

    fp16: bool | None = Option(None, "--fp16/--no-fp16", help="Also NAME.fp16.onnx. Default: if it passes its check.")
    min_agreement: float | None = Option(
        None, help="Smallest share of pixels that keep their label in FP16, per cent. Default: all but ties."
    )
    qgis: bool = Option(False, help="Also write NAME.qgis.onnx for the QGIS plugin Deepness; needs --gsd.")
    stac: bool = Option(False, help="Also write NAME.stac.json: a STAC item with the MLM extension.")
    gsd: float | None = Option(None, help="Pixel size of training images, for --qgis and --stac.", metavar="METRES")

    def require_sense(self) -> None:
        """Refuse options that have no effect."""
        if self.gsd is not None and not (self.qgis or self.stac):
            raise BadParameter("it has no effect without --qgis or --stac", param_hint="--gsd")
        if self.min_agreement is not None and self.fp16 is False:
            raise BadParameter("it has no effect with --no-fp16", param_hint="--min-agreement")


def export(
    checkpoint: Path = CHECKPOINT,
    *,
    output: Path | None = Option(None, "--output", "-o", help="The graph. Default: export/CHECKPOINT.onnx."),
    graph: GraphOptions,
    beside: CompanionOptions,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Write a checkpoint as an ONNX graph, checked against PyTorch.

    Writes export/NAME.onnx, NAME.fp16.onnx and their manifests.
    """
    require_package("torch", "export", "exporting a checkpoint")
    from cdkd_edge.graph.export import ExportOptions, export_checkpoint
    from cdkd_edge.precision.int8_gate import Int8Gate

    destination = output or Workspace(workspace).graphs / f"{stem_of(checkpoint)}.onnx"
    if destination.suffix != ".onnx":
        raise BadParameter("a graph is an .onnx file", param_hint="--output")
    beside.require_sense()
    least = None if beside.min_agreement is None else Int8Gate(beside.min_agreement / 100).agreement
    options = ExportOptions(**dataclasses.asdict(graph), **{**dataclasses.asdict(beside), "min_agreement": least})
    with steps() as step:
        result = export_checkpoint(checkpoint, destination, options, step)
    _describe(result).show(as_json)


def _describe(result: ExportResult) -> Report:
    manifest, check = result.manifest, result.manifest.check
    names = [c["name"] for c in manifest.labels["classes"]]
    same, error = percent(check.label_agreement, 2), significant(check.max_logit_error, 2)
    rows: Rows = [
        ("layout", manifest.layout),
        *(("dropped", f"{d.what}: {plural(d.tensors, 'tensor')}") for d in result.report.dropped),
        *(("note", note) for note in result.report.notes),
        ("nodes", f"{result.nodes_written} written, {manifest.nodes} after simplification"),
        ("size", f"{size(manifest.artefact.bytes)}, opset {manifest.opset}"),
        ("tiles", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px, uint8 in, uint8 labels out"),
        ("classes", ", ".join(names)),
        *([("note", NAME_THEM)] if nameless(names) else []),
        ("check", f"{same} of the pixels have PyTorch's label, largest logit difference {error}"),
        *_fp16_rows(result),
    ]
    if result.qgis:
        same = percent(result.qgis.label_agreement, 2)
        text = f"{result.qgis.artefact.file}, {100 * result.qgis.gsd:g} cm per pixel, {same} of a tile's labels agree"
        rows.append(("QGIS", text))
    if result.stac:
        rows.append(("STAC", result.stac.name))
    rows += [("warning", f"{path.name} was made from an earlier graph; make it again") for path in result.outdated]
    rows.append(("time", duration(result.seconds)))
    data = {
        **fields_of(result, "path", "qgis", "stac", "outdated", "nodes_written", "seconds", "manifest"),
        **fields_of(result.report, "dropped", "notes"),
        "fp16": result.half,
        "fp16_refused": result.half_refused,
    }
    return Report(f"graph {result.path}", rows, data)


def _fp16_rows(result: ExportResult) -> Rows:
    half = result.half
    if half is None:
        return [("no FP16", result.half_refused)] if result.half_refused else []
    check = half.conversion
    text = f"{half.artefact.file}, {size(half.artefact.bytes)}"
    if check:
        same = percent(check.label_agreement, 2)
        text += f", {same} of the pixels of {check.tiles} {check.imagery} tiles keep their label"
        if check.max_logit_error is not None and check.logit_tolerance is not None:
            ties = ", the others are ties" if check.label_agreement < 1 else ""
            found, allowed = significant(check.max_logit_error, 2), significant(check.logit_tolerance, 2)
            text += f"{ties}; logits differ by up to {found} (allowed: {allowed})"
    return [("FP16", text), *change_rows(check.attention if check else ())]
