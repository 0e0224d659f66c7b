"""What is shown of a checkpoint, an export and the demonstration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.cli.show.table import Report, plain, plural
from cdkd_edge.core.labels import NAME_THEM, nameless

if TYPE_CHECKING:
    from cdkd_edge.demo.run import DemoResult
    from cdkd_edge.graph.export import ExportResult


def describe_checkpoint(path: Path, *, tile: int | None, heads: int | None, weights: str | None) -> Report:
    """``cdkd-edge info``."""
    from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder
    from cdkd_edge.model.device import network_cost

    network: Any
    network, report = load_encoder(path, tile=tile, heads=heads, weights=weights)
    if report.has_head:
        network, report = load_checkpoint(path, tile=tile, heads=heads, weights=weights)
    config, cost = report.config, network_cost(network)
    classes = ", ".join(report.schema.class_names) if report.schema else "no names; export --schema gives them"
    rows = [
        ("layout", report.layout + (f" ({' > '.join(report.unwrapped)})" if report.unwrapped else "")),
        (
            "encoder",
            f"ViT, patch {config.patch}, {config.depth} blocks, width {config.embed_dim}, {config.heads} heads"
            + (", class token" if config.class_token else ""),
        ),
        ("head", f"UPerNet, {config.head_channels} channels" if report.has_head else "none: an encoder alone"),
        ("classes", f"{config.classes} ({classes})" if report.has_head else "none"),
        ("tile", f"{config.tile} x {config.tile} px"),
        (
            "parameters",
            f"{cost.parameters / 1e6:.3f} M, of which position embedding {cost.position_parameters / 1e6:.3f} M "
            f"(without it {(cost.parameters - cost.position_parameters) / 1e6:.3f} M)",
        ),
        ("MACs as the paper counts", f"{cost.conv_linear_macs / 1e9:.2f} G (convolutions and linear layers)"),
        ("attention MACs", f"{cost.attention_macs / 1e9:.2f} G"),
        ("MACs in full", f"{cost.total_macs / 1e9:.2f} G = {2 * cost.total_macs / 1e9:.2f} GFLOP per tile"),
        *(("dropped", f"{d.what}: {plural(d.tensors, 'tensor')} (e.g. {d.example})") for d in report.dropped),
        *(("note", note) for note in report.notes),
    ]
    if not report.has_head:
        rows.append(("next", "tune a decoder on labelled tiles: cdkd-edge finetune"))
    data = {
        "path": str(path),
        "layout": report.layout,
        "config": dataclasses.asdict(config),
        "has_head": report.has_head,
        "averaged": report.averaged,
        "classes": list(report.schema.class_names) if report.schema else None,
        "cost": {**dataclasses.asdict(cost), "total_macs": cost.total_macs},
        "dropped": [dataclasses.asdict(d) for d in report.dropped],
        "notes": list(report.notes),
        "training": dict(report.training),
    }
    return Report(str(path), tuple(rows), data)


def describe_export(result: ExportResult) -> Report:
    """``cdkd-edge export``."""
    manifest = result.manifest
    names = [c["name"] for c in manifest.labels["classes"]]
    rows = [
        ("layout", manifest.layout),
        *(("dropped", f"{d.what}: {plural(d.tensors, 'tensor')}") for d in result.report.dropped),
        *(("note", note) for note in result.report.notes),
        ("nodes", f"{result.nodes_written} written, {manifest.nodes} after simplification"),
        ("size", f"{manifest.artefact.bytes / 1e6:.1f} MB, opset {manifest.opset}"),
        ("tiles", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px, uint8 in, uint8 labels out"),
        ("classes", ", ".join(names)),
        *([("note", NAME_THEM)] if nameless(names) else []),
        (
            "check",
            f"labels agree with PyTorch on {manifest.check.label_agreement:.4%} of the pixels, "
            f"largest logit difference {manifest.check.max_logit_error:.1e}",
        ),
        *_half_rows(result),
        *_interchange_rows(result),
        *(("warning", f"{path.name} was made from an earlier graph; make it anew") for path in result.outdated),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    data = {
        "path": str(result.path),
        "fp16": plain(result.half) if result.half else None,
        "fp16_refused": result.half_refused,
        "qgis": plain(result.qgis) if result.qgis else None,
        "stac": str(result.stac) if result.stac else None,
        "outdated": [str(path) for path in result.outdated],
        "nodes_written": result.nodes_written,
        "seconds": result.seconds,
        "dropped": [dataclasses.asdict(d) for d in result.report.dropped],
        "notes": list(result.report.notes),
        "manifest": plain(manifest),
    }
    return Report(f"graph {result.path}", tuple(rows), data)


def _half_rows(result: ExportResult) -> list[tuple[str, str]]:
    half = result.half
    if half is None:
        return [("no FP16", result.half_refused)] if result.half_refused else []
    check = half.conversion
    text = f"{half.artefact.file}, {half.artefact.bytes / 1e6:.1f} MB"
    if check:
        text += f", {check.label_agreement:.3%} of the pixels of {check.tiles} {check.imagery} tiles keep their label"
        if check.max_logit_error is not None and check.logit_tolerance is not None:
            ties = ", the others are ties" if check.label_agreement < 1 else ""
            text += f"{ties}; logits differ by up to {check.max_logit_error:.2g} (allowed: {check.logit_tolerance:.2g})"
    return [("FP16", text)]


def _interchange_rows(result: ExportResult) -> list[tuple[str, str]]:
    rows = []
    if result.qgis:
        text = f"{result.qgis.artefact.file}, {100 * result.qgis.gsd:g} cm per pixel, "
        rows.append(("QGIS", text + f"{result.qgis.label_agreement:.3%} of a drawn tile's labels are the same"))
    if result.stac:
        rows.append(("STAC", result.stac.name))
    return rows


def describe_demo(result: DemoResult) -> Report:
    """``cdkd-edge demo``."""
    from cdkd_edge.bench.describe import bench_rows
    from cdkd_edge.cli.show.segment import segment_data

    segment = result.segment
    check, skipped = result.export.manifest.check, getattr(result.export, "skipped", None)
    total = max(1, segment.height * segment.width)
    rows = [
        ("graph", f"{result.export.path}  ({result.export.manifest.nodes} nodes)"),
        ("skipped", skipped)
        if skipped
        else ("check", f"labels agree with PyTorch on {check.label_agreement:.4%} of the pixels"),
        ("engine", f"{result.engine_path}  ({result.engine.attention_fused} attention blocks fused)"),
        ("label map", f"{segment.output}  ({segment.tiles} tiles in {segment.seconds:.1f} s)"),
        ("classes", ", ".join(f"{name} {count / total:.1%}" for name, count in segment.class_pixels.items())),
        *([("accuracy", f"mIoU {result.mean_iou:.1%} on the drawn scene")] if result.mean_iou is not None else []),
        ("picture", str(result.quicklook)),
        *bench_rows(result.bench),
        ("results", str(result.bench_folder)),
    ]
    data = plain(dataclasses.replace(result, segment=dataclasses.replace(segment, row_class_pixels=None)))
    return Report("cdkd-edge demo", tuple(rows), {**data, "segment": segment_data(segment)})
