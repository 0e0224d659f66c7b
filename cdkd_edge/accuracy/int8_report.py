"""What a person reads about an INT8 graph before it goes to a board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdkd_edge.errors import ManifestError
from cdkd_edge.files import write_text
from cdkd_edge.manifest import GraphManifest

WORST = 8


def write_report(path: Path, manifest: GraphManifest) -> None:
    """Write the report of an INT8 graph as Markdown, from its manifest."""
    write_text(path, "\n".join(_lines(manifest)) + "\n")


def require_own_report(path: Path, graph: str) -> None:
    """Make sure that a report replaces nothing but an earlier one of the graph of that name.

    Raises:
        ManifestError: there is another file of that name.
    """
    if path.exists():
        try:
            own = path.read_text(encoding="utf-8").startswith(_title(graph))
        except (OSError, UnicodeDecodeError):
            own = False
        if not own:
            raise ManifestError(f"{path} exists and is not cdkd-edge's to replace", hint="move it away")


def worst_layers(record: dict[str, Any], count: int = WORST) -> list[dict[str, Any]]:
    """The layers with the least signal-to-noise ratio, worst first."""
    return sorted(record["layers"], key=lambda layer: float(layer["snr_db"]))[:count]


def _lines(manifest: GraphManifest) -> list[str]:
    record = manifest.quantization
    judgement, gate = record["judgement"], record["gate"]
    parent = manifest.parent
    layers = record["layers"]
    integer = [layer for layer in layers if layer["precision"] == "int8"]
    of = f"INT8 graph of `{parent.file}`" if parent else "INT8 graph"
    lines = [
        _title(manifest.artefact.file),
        "",
        f"{of}: {len(integer)} of {len(layers)} quantisable layers in INT8, the rest of the network in FP16.",
        "",
        "| | INT8 | FP32 |",
        "|---|---|---|",
        f"| size | {manifest.artefact.bytes / 1e6:.1f} MB ({record['size_over_fp32']:.3f} of FP32) "
        f"| {parent.bytes / 1e6:.1f} MB |"
        if parent
        else "",
        f"| seconds per tile, this CPU, in turn | {judgement['cpu_seconds_per_tile']:.2f} "
        f"({judgement['cpu_speed_up']:.2f} x FP32's tiles/s) | {judgement['cpu_fp32_seconds_per_tile']:.2f} |",
    ]
    if judgement["mean_iou"] is not None:
        lines.append(f"| mIoU on labelled images | {judgement['mean_iou']:.2%} | {judgement['fp32_mean_iou']:.2%} |")
    lines += [
        "",
        f"On {record['check_tiles']} check tiles of `{record['calibration_set']['name']}` that no range was set with: "
        f"{judgement['label_agreement']:.2%} of the pixels keep the FP32 label "
        f"(worst tile {judgement['worst_tile_agreement']:.2%}); mIoU with FP32's labels as truth "
        f"{_percent(judgement['mean_iou_to_fp32'])}.",
        f"Gate: agreement at least {gate['agreement']:.2%}"
        + (
            f", mIoU loss at most {gate['loss']} points; loss {judgement['mean_iou_loss_points']:.2f}."
            if judgement["mean_iou_loss_points"] is not None
            else ". mIoU was not measured: no labelled images were given."
        ),
        "The twin on the CPU gave these figures. Speed on a GPU or a board has to be measured there.",
        "",
    ]
    if manifest.conversion:
        lines += [
            "As TensorRT computes it (INT8 layers, the rest rounded to FP16): "
            f"{manifest.conversion.label_agreement:.2%} of the same pixels keep their label; finite on tiles all 0, "
            "all 255, checkerboard and noise.",
            "",
        ]
    if record["smoothquant_alpha"] is not None:
        lines.append(f"SmoothQuant, alpha {record['smoothquant_alpha']}, on {record['smoothed_layers']} layers.")
    percentile = f" {record['percentile']}" if record["percentile"] else ""
    lines += [
        f"Ranges: {record['calibrator']}{percentile} over {record['calibration_tiles']} tiles.",
        "",
        "## Layers by signal-to-noise",
        "",
        "| layer | precision | SNR, dB | input scale | share of quantisable work |",
        "|---|---|---|---|---|",
    ]
    total = sum(layer["macs"] for layer in layers)
    lines += [
        f"| {layer['name']} | {layer['precision']} | {layer['snr_db']:.1f} | {layer['input_scale']:.4g} "
        f"| {layer['macs'] / total:.1%} |"
        for layer in worst_layers(record, len(layers))
    ]
    if len(record["attempts"]) > 1:
        lines += ["", "## Attempts", "", "| layers kept in FP16 | agreement | why it did not pass |", "|---|---|---|"]
        lines += [
            f"| {', '.join(item['kept_in_fp16']) or 'none'} | {item['label_agreement']:.2%} "
            f"| {'; '.join(item['failures']) or 'passed'} |"
            for item in record["attempts"]
        ]
    return lines


def _title(graph: str) -> str:
    return f"# {graph}"


def _percent(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2%}"
