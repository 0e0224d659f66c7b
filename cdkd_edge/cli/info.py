"""``cdkd-edge info``: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from cdkd_edge.cli.options import CHECKPOINT, HEADS, JSON, POOL_SCALES, TAPS, WEIGHTS, require_package
from cdkd_edge.cli.report import Report, Rows, fields_of, plural
from cdkd_edge.core.numbers import significant

if TYPE_CHECKING:
    from cdkd_edge.model.checkpoint import CheckpointReport
    from cdkd_edge.model.device import Cost


def info(
    checkpoint: Path = CHECKPOINT,
    tile: int | None = Option(None, help="Count for tiles of this side, px. Default: the checkpoint's.", min=1),
    heads: int | None = HEADS,
    taps: str | None = TAPS,
    pool_scales: str | None = POOL_SCALES,
    weights: str | None = WEIGHTS,
    as_json: bool = JSON,
) -> None:
    """Show what a checkpoint holds: layout, parameters, multiply-accumulates, classes."""
    require_package("torch", "export", "reading a checkpoint")
    from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder
    from cdkd_edge.model.device import network_cost
    from cdkd_edge.model.sparsity import sparse_weights, sparsifiable

    network: Any
    reading: dict[str, Any] = {"tile": tile, "heads": heads, "taps": taps, "pool_scales": pool_scales}
    network, report = load_encoder(checkpoint, **reading, weights=weights)
    if report.has_head:
        network, report = load_checkpoint(checkpoint, **reading, weights=weights)
    sparse = len(sparse_weights(network)), len(sparsifiable(network))
    _describe(checkpoint, report, network_cost(network), sparse).show(as_json)


def _no_head(report: CheckpointReport) -> str:
    return f"{report.other_head}: no UPerNet, not read" if report.other_head else "none: an encoder alone"


def _describe(path: Path, report: CheckpointReport, cost: Cost, sparse: tuple[int, int]) -> Report:
    from cdkd_edge.model.config import attention_text, encoder_text, head_text

    def scaled(count: int, unit: float) -> str:
        return significant(count / unit, 5)

    config = report.config
    classes = ", ".join(report.schema.class_names) if report.schema else "no names; export --schema gives them"
    rest, position = cost.parameters - cost.position_parameters, f"{scaled(cost.position_parameters, 1e6)} M"
    embedded = f", of which position embedding {position} (without it {scaled(rest, 1e6)} M)"
    rows: Rows = [
        ("layout", report.layout + (f" ({' > '.join(report.unwrapped)})" if report.unwrapped else "")),
        ("encoder", encoder_text(config)),
        ("attention", attention_text(config.attention)),
        *([("sparsity", f"2:4 in {sparse[0]} of {sparse[1]} layers (proj, fc1, fc2)")] if sparse[0] else []),
        ("head", head_text(config) if report.has_head else _no_head(report)),
        ("classes", f"{config.classes} ({classes})" if report.has_head else "none"),
        ("tile", f"{config.tile} x {config.tile} px"),
        ("parameters", f"{scaled(cost.parameters, 1e6)} M" + (embedded if cost.position_parameters else "")),
        ("MACs as the paper counts", f"{scaled(cost.conv_linear_macs, 1e9)} G (convolutions and linear layers)"),
        ("attention MACs", f"{scaled(cost.attention_macs, 1e9)} G"),
        ("MACs in full", f"{scaled(cost.total_macs, 1e9)} G = {scaled(2 * cost.total_macs, 1e9)} GFLOP per tile"),
        *(("dropped", f"{d.what}: {plural(d.tensors, 'tensor')} (e.g. {d.example})") for d in report.dropped),
        *(("note", note) for note in report.notes),
    ]
    if not report.has_head:
        rows.append(("next", "train a decoder on labelled images: cdkd-edge finetune"))
    data = {
        "path": path,
        **fields_of(report, "layout", "config", "has_head", "averaged", "dropped", "notes"),
        "other_head": report.other_head or None,
        "classes": report.schema.class_names if report.schema else None,
        "cost": {**dataclasses.asdict(cost), "total_macs": cost.total_macs},
        "sparse_layers": sparse[0],
        "training": dict(report.training),
    }
    return Report(str(path), rows, data)
