"""``cdkd-edge inspect``: what is inside a graph or an engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from cdkd_edge.cli.options import ENGINE, JSON, WORKSPACE, chosen_engine
from cdkd_edge.cli.report import LISTED, Listing, Report, Rows, fields_of, plain
from cdkd_edge.core.numbers import percent, significant, size
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.core.manifest import AttentionChange, EngineManifest
    from cdkd_edge.engines.inspect import Inspection, OnnxContents
    from cdkd_edge.engines.tensorrt.layers import EngineLayers


def inspect(
    artefact: Path | None = Argument(None, help="Engine or graph. Default: the workspace's only engine."),
    engine: Path | None = ENGINE,
    every: bool = Option(False, "--all", help=f"List every layer, not only the {LISTED} that move most data."),
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Show what is inside a graph or an engine: layers, precisions, memory, fused attention. Runs nothing."""
    from cdkd_edge.engines.inspect import inspect_artefact

    path = chosen_engine(Workspace(workspace), "cdkd-edge inspect", artefact, engine)
    _describe(inspect_artefact(path), every=every).show(as_json)


def _describe(found: Inspection, *, every: bool) -> Report:
    from cdkd_edge.core.manifest import EngineManifest, attention_kinds
    from cdkd_edge.engines.inspect import OnnxContents
    from cdkd_edge.model.config import attention_text

    manifest, contents = found.manifest, found.contents
    rows = _manifest_rows(found)
    data: dict[str, Any] = {
        **fields_of(found, "path", "manifest", "warnings"),
        "kind": manifest.kind if manifest is not None else None,
    }
    listings: tuple[Listing, ...] = ()
    if isinstance(contents, OnnxContents):
        rows += _onnx_rows(contents)
        if not isinstance(manifest, EngineManifest):  # whose row is there already: OpenVINO fuses on loading
            fused = f"{contents.attention_fused} of them one operator"
            kinds = attention_kinds(found.path)
            of = f"{attention_text(kinds)}; " if kinds is not None else ""
            rows.append(("attention", f"{of}{contents.attention_blocks} blocks, {fused}"))
        data["contents"] = {**plain(contents), "nodes": contents.nodes, "precisions": contents.precisions}
        operators = tuple(
            (name, *(str(row.get(kind, "")) for kind in contents.precisions))
            for name, row in contents.operators.items()
        )
        listings = (Listing(("operator", *contents.precisions), operators),)
    elif contents is not None:
        data["unfused_attention"] = contents.unfused_attention
        names = ("name", "type", "precision", "traffic_bytes", "nodes")
        data["layers"] = [
            {**fields_of(layer, *names), "fused_attention": layer.is_fused_attention} for layer in contents.layers
        ]
        listings = (_layer_listing(contents, every),)
    rows += [("warning", text) for text in found.warnings]
    return Report(f"inside {found.path}", rows, data, listings)


def _manifest_rows(found: Inspection) -> Rows:
    from cdkd_edge.core.manifest import EngineManifest

    manifest = found.manifest
    if manifest is None:
        return []
    if isinstance(manifest, EngineManifest):
        rows = engine_rows(manifest, f"{manifest.precision}, built from {manifest.graph.file}")
    else:
        rows = [
            ("precision", f"{manifest.precision}, opset {manifest.opset}, exported from {manifest.checkpoint.file}"),
            *change_rows(manifest.conversion.attention if manifest.conversion else ()),
        ]
    return [
        *rows,
        ("tiles", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px"),
        ("output", ", ".join(manifest.outputs)),
        ("size", size(manifest.artefact.bytes)),
    ]


def engine_rows(manifest: EngineManifest, precision: str) -> Rows:
    """What an engine runs on, its attention and how many blocks of it are fused, and how TensorRT built it."""
    from cdkd_edge.model.config import attention_text

    build = manifest.tensorrt
    here = ", " if build is not None and build.targets else " on "  # compiled for another GPU than the one here
    fused = f"{manifest.attention_fused} of {manifest.attention_blocks} blocks fused"
    if build is not None and not build.layers:
        fused = f"{manifest.attention_blocks} blocks; whether they are fused is not known"
    rows: Rows = [
        ("runtime", f"{manifest.runtime}{here}{manifest.device}"),
        ("precision", precision),
        ("attention", f"{attention_text(manifest.attention)}; {fused}"),
        *change_rows(manifest.attention_changes),
    ]
    if build is None:
        return rows
    typing = "strongly typed" if build.strongly_typed else "weakly typed"
    limit = f", workspace at most {size(build.workspace_bytes)}" if build.workspace_bytes else ""
    level = f"optimisation level {build.optimization_level}"
    rows.append(("build", f"{manifest.runtime} {build.version}, {typing}, {level}{limit}"))
    if build.multiprocessors:
        places = (f"{build.multiprocessors} multiprocessors", build.module, build.board, build.power_mode)
        rows.append(("built on", ", ".join(filter(None, places))))
    if build.layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in build.layer_precisions.items())
        rows.append(("layers", f"{build.layers} ({kinds}), moving {size(build.traffic_bytes)} per run"))
    buffers = 4 * manifest.batch * manifest.tile**2  # uint8: three channels in, labels out
    memory = {"scratch": build.scratch_bytes, "weights": build.weights_bytes, "input and output": buffers}
    rows.append(("memory", ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count is not None)))
    return [*rows, *(("note", note) for note in build.notes)]


def change_rows(changes: Iterable[AttentionChange]) -> Rows:
    """A row for each block whose attention was changed for FP16."""
    return [("changed", str(change)) for change in changes]


def _onnx_rows(contents: OnnxContents) -> Rows:
    kinds = ", ".join(f"{count} {kind}" for kind, count in contents.precisions.items())
    casts = ", ".join(f"{count} {what}" for what, count in contents.casts.items())
    constants = ", ".join(f"{kind} {size(count)}" for kind, count in contents.parameter_bytes.items())
    quantized = f"{contents.quantize_nodes} quantize, {contents.dequantize_nodes} dequantize"
    return [
        ("nodes", f"{contents.nodes} ({kinds})"),
        ("casts", f"{sum(contents.casts.values())}" + (f" ({casts})" if casts else "")),
        *([("Q/DQ", quantized)] if contents.quantize_nodes or contents.dequantize_nodes else []),
        ("constants", constants or "none"),
    ]


def _layer_listing(layers: EngineLayers, every: bool) -> Listing:
    """All layers in the order of execution, or those that move most data."""
    shown = list(layers.layers)
    if not every:
        shown = sorted(shown, key=lambda layer: -layer.traffic_bytes)[:LISTED]
    total = max(1, layers.traffic_bytes)
    rows: list[tuple[str, ...]] = []
    for layer in shown:
        moved = significant(layer.traffic_bytes / 1e6), percent(layer.traffic_bytes / total)
        rows.append((layer.name, layer.type, layer.precision, *moved, "fused" if layer.is_fused_attention else ""))
    if len(shown) < len(layers.layers):
        rows.append((f"... {len(layers.layers) - len(shown)} more (--all)", *[""] * 5))
    return Listing(("layer", "type", "precision", "MB moved", "share", "attention"), tuple(rows))
