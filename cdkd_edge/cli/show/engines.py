"""What `build` and `inspect` show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.cli.show.table import Listing, Report, plain

if TYPE_CHECKING:
    from cdkd_edge.core.manifest import EngineManifest
    from cdkd_edge.engines.inspect import Inspection, OnnxContents
    from cdkd_edge.engines.tensorrt.layers import EngineLayers
    from cdkd_edge.precision.choose import PreparedGraph, SpeedComparison
    from cdkd_edge.precision.int8 import Int8Result


def describe_build(
    path: Path, manifest: EngineManifest, prepared: PreparedGraph, speed: SpeedComparison | None
) -> Report:
    """``cdkd-edge build``: the engine, and the graph that was made for it."""
    report = describe_engine(path, manifest)
    rows: list[tuple[str, str]] = []
    if prepared.made:
        rows.append(("graph", str(prepared.path)))
    if prepared.int8:
        rows += _int8_rows(prepared.int8)
    if speed:
        rows.append(("speed", f"{speed.ratio:.2f} x the tiles/s of {speed.path.name}, in turn on this machine"))
        if speed.ratio <= 1:
            rows.append(("warning", f"INT8 is not faster than {speed.path.name} here; prefer that engine"))
    data = {
        **report.data,
        "graph": str(prepared.path),
        "graph_made": prepared.made,
        "quantization": prepared.int8.manifest.quantization if prepared.int8 else None,
        "speed": {"against": str(speed.path), "ratio": speed.ratio} if speed else None,
    }
    return Report(report.title, (*report.rows, *rows), data)


def _int8_rows(result: Int8Result) -> list[tuple[str, str]]:
    from cdkd_edge.precision.int8_gate import worst_layers

    record = result.manifest.quantization
    judgement = result.attempts[-1].judgement
    kept = record["kept_in_fp16"]
    rows = [
        ("INT8 layers", f"{len(record['layers']) - len(kept)} of {len(record['layers'])}"),
        ("labels", f"{judgement.agreement:.2%} of the pixels of {record['check_tiles']} check tiles keep theirs"),
    ]
    if judgement.loss is not None:
        rows.append(
            ("mIoU", f"{judgement.mean_iou:.2%}, FP32 {judgement.fp32_mean_iou:.2%}, loss {judgement.loss:.2f} points")
        )
    else:
        rows.append(("mIoU", "not measured; --data gives labelled images"))
    rows.append(("graph size", f"{record['size_over_fp32']:.3f} of the FP32 graph"))
    rows.append(("twin", f"{judgement.speed_up:.2f} x FP32's tiles/s on this CPU, check tiles in turn"))
    worst = ", ".join(f"{layer['name']} {layer['snr_db']:.0f} dB" for layer in worst_layers(record, 3))
    rows.append(("noisiest", worst))
    for attempt in result.attempts[:-1]:
        rows.append(("missed", f"with {len(attempt.kept)} layers in FP16: {'; '.join(attempt.failures)}"))
    if kept:
        rows.append(("in FP16", ", ".join(kept)))
    if judgement.speed_up <= 1:
        rows.append(("warning", "INT8 is not faster than FP32 on this CPU"))
    rows.append(("report", str(result.report)))
    return rows


def describe_engine(path: Path, manifest: EngineManifest) -> Report:
    """An engine that was just built."""
    from cdkd_edge.engines.inspect import attention_warnings

    rows = [
        ("runtime", _runtime(manifest)),
        ("precision", manifest.precision),
        ("output", ", ".join(manifest.outputs)),
        ("attention", _attention(manifest)),
        *_tensorrt_rows(manifest),
        ("size", f"{manifest.artefact.bytes / 1e6:.1f} MB"),
        ("seconds", f"{manifest.build_seconds:.1f}"),
    ]
    rows += [("warning", text) for text in attention_warnings(manifest)]
    return Report(f"engine {path}", tuple(rows), {"path": str(path), "manifest": plain(manifest)})


_LISTED = 15
"""Layers shown without ``--all``."""


def describe_inspection(found: Inspection, *, every: bool) -> Report:
    """``cdkd-edge inspect``."""
    from cdkd_edge.core.manifest import EngineManifest
    from cdkd_edge.engines.inspect import OnnxContents

    manifest, contents = found.manifest, found.contents
    rows: list[tuple[str, str]] = []
    if isinstance(manifest, EngineManifest):
        rows += [
            ("runtime", _runtime(manifest)),
            ("precision", f"{manifest.precision}, built from {manifest.graph.file}"),
            ("attention", _attention(manifest)),
            *_tensorrt_rows(manifest),
        ]
    elif manifest is not None:
        rows.append(
            ("precision", f"{manifest.precision}, opset {manifest.opset}, exported from {manifest.checkpoint.file}")
        )
    if manifest is not None:
        rows.append(("tiles", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px"))
        rows.append(("output", ", ".join(manifest.outputs)))
        rows.append(("size", f"{manifest.artefact.bytes / 1e6:.1f} MB"))
    data: dict[str, Any] = {
        "path": str(found.path),
        "kind": manifest.kind if manifest is not None else None,
        "manifest": plain(manifest),
        "warnings": list(found.warnings),
    }
    listing = None
    if isinstance(contents, OnnxContents):
        rows += _onnx_rows(contents)
        data["contents"] = {**plain(contents), "nodes": contents.nodes, "precisions": contents.precisions}
        columns = ("operator", *contents.precisions)
        listing = Listing(
            columns,
            tuple(
                (name, *(str(row.get(kind, "")) for kind in contents.precisions))
                for name, row in contents.operators.items()
            ),
        )
    elif contents is not None:
        data["unfused_attention"] = list(contents.unfused_attention)
        data["layers"] = [
            {
                "name": layer.name,
                "type": layer.type,
                "precision": layer.precision,
                "traffic_bytes": layer.traffic_bytes,
                "fused_attention": layer.is_fused_attention,
                "nodes": list(layer.nodes),
            }
            for layer in contents.layers
        ]
        listing = _layer_listing(contents, every)
    rows += [("warning", text) for text in found.warnings]
    return Report(f"inside {found.path}", tuple(rows), data, listing)


def _runtime(manifest: EngineManifest) -> str:
    compiled_only = manifest.tensorrt is not None and manifest.tensorrt.targets
    return f"{manifest.runtime}{', ' if compiled_only else ' on '}{manifest.device}"


def _attention(manifest: EngineManifest) -> str:
    if manifest.tensorrt is not None and not manifest.tensorrt.layers:
        return f"{manifest.attention_blocks} blocks; whether they are fused is not known"
    return f"{manifest.attention_fused} of {manifest.attention_blocks} blocks fused"


def _tensorrt_rows(manifest: EngineManifest) -> list[tuple[str, str]]:
    build = manifest.tensorrt
    if build is None:
        return []
    typing = "strongly typed" if build.strongly_typed else "weakly typed"
    level = f"optimisation level {build.optimization_level}"
    limit = f", workspace at most {build.workspace_bytes / 1e6:.0f} MB" if build.workspace_bytes else ""
    rows = [("build", f"{manifest.runtime} {build.version}, {typing}, {level}{limit}")]
    if build.layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in build.layer_precisions.items())
        rows.append(("layers", f"{build.layers} ({kinds}), moving {build.traffic_bytes / 1e9:.2f} GB per run"))
    memory = [
        f"{name} {size / 1e6:.1f} MB"
        for name, size in (("scratch", build.scratch_bytes), ("weights", build.weights_bytes))
        if size is not None
    ]
    rows.append(("memory", ", ".join([*memory, f"input and output {_io_bytes(manifest) / 1e6:.1f} MB"])))
    return [*rows, *(("note", note) for note in build.notes)]


def _io_bytes(manifest: EngineManifest) -> int:
    """uint8 tiles of three channels, and uint8 labels."""
    return 4 * manifest.batch * manifest.tile**2


def _onnx_rows(contents: OnnxContents) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in contents.precisions.items())
    casts = ", ".join(f"{count} {what}" for what, count in contents.casts.items())
    parameters = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in contents.parameter_bytes.items())
    rows = [
        ("nodes", f"{contents.nodes} ({kinds})"),
        ("casts", f"{sum(contents.casts.values())}" + (f" ({casts})" if casts else "")),
        ("constants", parameters or "none"),
        ("attention", f"{contents.attention_blocks} blocks, {contents.attention_fused} of them one operator"),
    ]
    if contents.quantize_nodes or contents.dequantize_nodes:
        rows.insert(2, ("Q/DQ", f"{contents.quantize_nodes} quantize, {contents.dequantize_nodes} dequantize"))
    return rows


def _layer_listing(layers: EngineLayers, every: bool) -> Listing:
    """All layers in the order of execution, or those that move most."""
    shown = list(layers.layers)
    if not every:
        shown = sorted(shown, key=lambda layer: -layer.traffic_bytes)[:_LISTED]
    total = max(1, layers.traffic_bytes)
    rows = [
        (
            layer.name,
            layer.type,
            layer.precision,
            f"{layer.traffic_bytes / 1e6:.2f}",
            f"{layer.traffic_bytes / total:.1%}",
            "fused" if layer.is_fused_attention else "",
        )
        for layer in shown
    ]
    if len(shown) < len(layers.layers):
        rows.append((f"... {len(layers.layers) - len(shown)} more (--all)", "", "", "", "", ""))
    return Listing(("layer", "type", "precision", "MB moved", "share", "attention"), tuple(rows))
