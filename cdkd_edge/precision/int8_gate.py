"""Judge an INT8 graph against FP32: labels and time on check tiles, mIoU on labelled images; the gate; the report."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.files import require_own, write_text
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import GraphManifest
from cdkd_edge.engines.onnxruntime import OnnxLabeller
from cdkd_edge.engines.protocol import UInt8Array
from cdkd_edge.graph.cpu import fuse_attention
from cdkd_edge.graph.nodes import Note, copy_of
from cdkd_edge.quality.datasets import Dataset, find_dataset
from cdkd_edge.quality.evaluate import Evaluation, data_schema, evaluate
from cdkd_edge.quality.metrics import ConfusionMatrix, number


@dataclass(frozen=True)
class LabelledData:
    """Images with masks, and how to read the masks."""

    dataset: Dataset
    schema: LabelSchema


def labelled_data(folder: Path, schema: str | None, scenes: str | None) -> LabelledData:
    """Open labelled images as `evaluate` does; ``scenes`` are names with commas. Default: what the data says; all."""
    dataset = find_dataset(folder)
    if scenes:
        dataset = dataset.of_scenes(tuple(name.strip() for name in scenes.split(",") if name.strip()))
    return LabelledData(dataset, data_schema(dataset, schema, None))


@dataclass(frozen=True)
class Judgement:
    """How an INT8 graph compares with FP32, in ONNX Runtime on this CPU."""

    agreement: float  # share of the check tiles' pixels with the FP32 graph's label, 0..1
    mean_iou_to_fp32: float  # mIoU on the check tiles with FP32 as ground truth, 0..1: shows the loss of a small class
    worst_tile: float  # agreement on the check tile that agrees least
    seconds: float  # median seconds per tile of the INT8 graph's CPU twin
    fp32_seconds: float  # median seconds per tile of the FP32 graph; the two run in turn
    mean_iou: float | None = None  # mIoU on the labelled images, 0..1; None without any
    fp32_mean_iou: float | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)  # scores of both on the labelled images

    @property
    def loss(self) -> float | None:
        """Points of mIoU lost on the labelled images (negative: gained); None where not measured."""
        if self.mean_iou is None or self.fp32_mean_iou is None:
            return None
        return 100 * (self.fp32_mean_iou - self.mean_iou)

    @property
    def speed_up(self) -> float:
        """Tiles per second over those of FP32, on this CPU."""
        return self.fp32_seconds / self.seconds

    def document(self) -> dict[str, Any]:
        """The judgement as plain data for JSON."""
        return {
            "label_agreement": self.agreement,
            "mean_iou_to_fp32": number(self.mean_iou_to_fp32),
            "worst_tile_agreement": self.worst_tile,
            "cpu_seconds_per_tile": self.seconds,
            "cpu_fp32_seconds_per_tile": self.fp32_seconds,
            "cpu_speed_up": self.speed_up,
            "mean_iou": self.mean_iou,
            "fp32_mean_iou": self.fp32_mean_iou,
            "mean_iou_loss_points": self.loss,
            "scores": dict(self.scores),
        }


@dataclass(frozen=True)
class Int8Gate:
    """What an INT8 graph must reach."""

    agreement: float = 0.98  # share of the check tiles' pixels that must keep the FP32 graph's label
    loss: float = 0.5  # points of mIoU that it may lose on labelled images

    def __post_init__(self) -> None:
        if not 0.01 < self.agreement <= 1:
            raise UsageError(
                f"--min-agreement must be above 1 and at most 100 per cent, got {100 * self.agreement:g}",
                hint="for example --min-agreement 98",
            )
        if not 0 <= self.loss <= 100:
            raise UsageError(f"--max-loss must be between 0 and 100 points of mIoU, got {self.loss:g}")

    def failures(self, judgement: Judgement) -> list[str]:
        """Why a graph fails; empty if it passes."""
        reasons = []
        if not judgement.agreement >= self.agreement:
            reasons.append(f"{judgement.agreement:.2%} of the pixels keep their label; {self.agreement:.2%} must")
        if judgement.loss is not None and not judgement.loss <= self.loss:
            reasons.append(f"mIoU falls by {judgement.loss:.2f} points; at most {self.loss:.2f} are allowed")
        return reasons


class Judge:
    """Compares INT8 graphs with one FP32 graph, whose scores are computed once."""

    def __init__(
        self,
        plain: onnx.ModelProto,
        manifest: GraphManifest,
        tiles: Iterable[UInt8Array],
        data: LabelledData | None,
        scratch: Path,
        note: Note = lambda text: None,
    ) -> None:
        """Load the FP32 graph ``plain``. ``tiles`` are check tiles ``[3, T, T]``; ``scratch``: for temporary files."""
        self._manifest, self._tiles, self._data = manifest, tiles, data
        self._scratch, self._note = scratch, note
        self._plain = self._labeller(plain, "fp32")

    def __call__(self, twin: onnx.ModelProto) -> Judgement:
        """Judge the CPU twin of an INT8 graph."""
        labeller = self._labeller(twin, "int8")
        try:
            judgement, plain, scores = self._on_tiles(labeller), self._fp32_scores, self._scores(labeller, "INT8")
        finally:
            labeller.close()
        if scores is None or plain is None:
            return judgement
        documents = {"fp32": plain.document(), "int8": scores.document()}
        means = {"mean_iou": scores.matrix.mean_iou, "fp32_mean_iou": plain.matrix.mean_iou}
        return dataclasses.replace(judgement, **means, scores=documents)

    def _on_tiles(self, labeller: OnnxLabeller) -> Judgement:
        matrix = ConfusionMatrix(len(self._manifest.schema))
        rows: list[tuple[float, float, float]] = []
        for tile in self._tiles:
            expected, plain_seconds = _label(self._plain, tile)
            found, seconds = _label(labeller, tile)
            matrix.update(expected, found)
            rows.append((float((expected == found).mean()), seconds, plain_seconds))
        agreements, times, plain_times = zip(*rows, strict=True)
        seconds, plain_seconds = median(times), median(plain_times)
        return Judgement(fmean(agreements), matrix.mean_iou, min(agreements), seconds, plain_seconds)

    @functools.cached_property
    def _fp32_scores(self) -> Evaluation | None:
        return self._scores(self._plain, "FP32")

    def _scores(self, labeller: OnnxLabeller, name: str) -> Evaluation | None:
        if (data := self._data) is None:
            return None
        self._note(f"scores of the {name} graph")
        return evaluate(labeller, data.dataset, data.schema)

    def _labeller(self, model: onnx.ModelProto, name: str) -> OnnxLabeller:
        fused = copy_of(model)
        fuse_attention(fused)
        path = self._scratch / f"{name}.onnx"
        onnx.save(fused, path)
        del fused
        return OnnxLabeller(path, self._manifest)


def _label(labeller: OnnxLabeller, tile: UInt8Array) -> tuple[npt.NDArray[np.uint8], float]:
    """Labels of a tile, and seconds per tile."""
    labeller.input(0)[:] = tile
    started = time.perf_counter()
    labeller.launch(0)
    labeller.wait(0)
    return labeller.output(0)[0].copy(), (time.perf_counter() - started) / labeller.batch


def write_report(path: Path, manifest: GraphManifest) -> None:
    """Write the report of an INT8 graph as Markdown, from its manifest."""
    record = manifest.quantization
    lines = [f"# {manifest.artefact.file}", "", *_summary(manifest), "", "## Layers by signal-to-noise", ""]
    lines += ["| layer | precision | SNR, dB | input scale | share of quantisable work |", "|---|---|---|---|---|"]
    total = sum(layer["macs"] for layer in record["layers"])
    for layer in worst_layers(record):
        figures = f"{layer['snr_db']:.1f} | {layer['input_scale']:.4g} | {layer['macs'] / total:.1%}"
        lines.append(f"| {layer['name']} | {layer['precision']} | {figures} |")
    if len(record["attempts"]) > 1:
        lines += ["", "## Attempts", "", "| layers kept in FP16 | agreement | why it failed |", "|---|---|---|"]
        for attempt in record["attempts"]:
            kept, failures = ", ".join(attempt["kept_in_fp16"]), "; ".join(attempt["failures"])
            lines.append(f"| {kept or 'none'} | {attempt['label_agreement']:.2%} | {failures or 'passed'} |")
    write_text(path, "\n".join(lines) + "\n")


def require_own_report(path: Path, graph: str) -> None:
    """Make sure that a report replaces nothing but an earlier one of the graph of that name, or raise ManifestError."""
    require_own(path, lambda path: path.read_text(encoding="utf-8").startswith(f"# {graph}"))


def worst_layers(record: dict[str, Any], count: int | None = None) -> list[dict[str, Any]]:
    """The layers with the least signal-to-noise ratio, worst first."""
    return sorted(record["layers"], key=lambda layer: float(layer["snr_db"]))[:count]


def _summary(manifest: GraphManifest) -> Iterator[str]:
    record, parent, conversion = manifest.quantization, manifest.parent, manifest.conversion
    assert parent is not None  # write_int8 sets both
    assert conversion is not None
    judgement, gate = record["judgement"], record["gate"]
    precisions = [layer["precision"] for layer in record["layers"]]
    yield (
        f"INT8 graph of `{parent.file}`: {precisions.count('int8')} of {len(precisions)} quantisable layers in INT8, "
        "the rest of the network in FP16."
    )
    yield from ("", "| | INT8 | FP32 |", "|---|---|---|")
    size = f"{manifest.artefact.bytes / 1e6:.1f} MB ({record['size_over_fp32']:.3f} of FP32)"
    yield f"| size | {size} | {parent.bytes / 1e6:.1f} MB |"
    seconds = f"{judgement['cpu_seconds_per_tile']:.2f} ({judgement['cpu_speed_up']:.2f} x FP32's tiles/s)"
    yield f"| seconds per tile, this CPU, in turn | {seconds} | {judgement['cpu_fp32_seconds_per_tile']:.2f} |"
    if judgement["mean_iou"] is not None:
        yield f"| mIoU on labelled images | {judgement['mean_iou']:.2%} | {judgement['fp32_mean_iou']:.2%} |"
    to_fp32, loss = judgement["mean_iou_to_fp32"], judgement["mean_iou_loss_points"]
    loss_gate = ". mIoU was not measured: no labelled images were given."
    if loss is not None:
        loss_gate = f", mIoU loss at most {gate['loss']} points; loss {loss:.2f}."
    yield from (
        "",
        f"On {record['check_tiles']} check tiles of `{record['calibration_set']['name']}`, which set no ranges, "
        f"{judgement['label_agreement']:.2%} of the pixels keep the FP32 label (worst tile "
        f"{judgement['worst_tile_agreement']:.2%}); mIoU with FP32's labels as ground truth is "
        f"{'not defined' if to_fp32 is None else f'{to_fp32:.2%}'}.",
        f"Gate: agreement at least {gate['agreement']:.2%}{loss_gate}",
        "These figures are ONNX Runtime's on this CPU. Speed on a GPU or a board has to be measured there.",
        "",
        "As TensorRT computes it (INT8 layers, the rest rounded to FP16), "
        f"{conversion.label_agreement:.2%} of the same pixels keep their label; all values are finite, also on tiles "
        "that are all 0, all 255, a checkerboard and noise.",
        *(f"Attention was changed for FP16: {change}." for change in conversion.attention),
        "",
    )
    if record["smoothquant_alpha"] is not None:
        yield f"SmoothQuant, alpha {record['smoothquant_alpha']}, on {record['smoothed_layers']} layers."
    percentile = f" {record['percentile']}" if record["percentile"] else ""
    yield f"Ranges: {record['calibrator']}{percentile} over {record['calibration_tiles']} tiles."
