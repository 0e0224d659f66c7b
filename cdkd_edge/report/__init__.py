"""What commands show: one table for a person, the same facts as data for a program."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cdkd_edge.accuracy.datasets import Dataset
    from cdkd_edge.accuracy.evaluate import Evaluation
    from cdkd_edge.accuracy.parity import Delta, Parity
    from cdkd_edge.accuracy.subject import Subject
    from cdkd_edge.calibration.generate import CalibrateResult
    from cdkd_edge.demo.run import DemoResult
    from cdkd_edge.export.pipeline import ExportResult
    from cdkd_edge.training.finetune import FinetuneResult, Listener


@dataclass(frozen=True)
class Listing:
    """A table below a report's rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """Rows of (name, value) under a title, and the data they come from."""

    title: str
    rows: tuple[tuple[str, str], ...]
    data: dict[str, Any]
    listing: Listing | None = None

    def print(self) -> None:
        """Print the table to stdout, without truncating values where stdout is not a terminal."""
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(Text(name), Text(value))
        console.print(Text(self.title, style="bold"))
        console.print(table)
        if self.listing is not None:
            console.print()
            listing = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for index, name in enumerate(self.listing.columns):
                listing.add_column(name, overflow="fold", justify="right" if index else "left")
            for row in self.listing.rows:
                listing.add_row(*map(Text, row))
            console.print(listing)


def describe_checkpoint(path: Path, *, tile: int | None, heads: int | None) -> Report:
    """``cdkd-edge info``."""
    from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder
    from cdkd_edge.model.cost import network_cost

    network: Any
    network, report = load_encoder(path, tile=tile, heads=heads)
    if report.has_head:
        network, report = load_checkpoint(path, tile=tile, heads=heads)
    config, cost = report.config, network_cost(network)
    classes = ", ".join(report.schema.class_names) if report.schema else "no names in the checkpoint"
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
        *(("dropped", f"{d.what}: {d.tensors} tensors (e.g. {d.example})") for d in report.dropped),
        *(("note", note) for note in report.notes),
    ]
    if not report.has_head:
        rows.append(("next", "tune a decoder on labelled tiles: cdkd-edge finetune"))
    data = {
        "path": str(path),
        "layout": report.layout,
        "config": dataclasses.asdict(config),
        "has_head": report.has_head,
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
    rows = [
        ("layout", manifest.layout),
        *(("dropped", f"{d.what}: {d.tensors} tensors") for d in result.report.dropped),
        *(("note", note) for note in result.report.notes),
        ("nodes", f"{result.nodes_written} written, {manifest.nodes} after simplification"),
        ("size", f"{manifest.artefact.bytes / 1e6:.1f} MB, opset {manifest.opset}"),
        ("tiles", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px, uint8 in, uint8 labels out"),
        ("classes", ", ".join(c["name"] for c in manifest.labels["classes"])),
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
    from cdkd_edge.report.bench import bench_rows
    from cdkd_edge.report.segment import segment_data

    check, segment = result.export.manifest.check, result.segment
    total = max(1, segment.height * segment.width)
    rows = [
        ("graph", f"{result.export.path}  ({result.export.manifest.nodes} nodes)"),
        ("check", f"labels agree with PyTorch on {check.label_agreement:.4%} of the pixels"),
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


def describe_evaluation(subject: Subject, dataset: Dataset, result: Evaluation, folder: Path | None) -> Report:
    """``cdkd-edge evaluate``."""
    matrix = result.matrix
    classes = result.document()["classes"]
    rows = [
        (subject.kind, f"{subject.path}, {subject.precision}, {subject.runtime}"),
        ("data", f"{len(dataset)} images of {dataset.folder} ({dataset.layout}), schema {result.schema.name}"),
        *(("note", note) for note in result.notes),
        *(
            (row["name"], f"IoU {_percent(row['iou'])}   F1 {_percent(row['f1'])}   {row['truth_pixels']} px")
            for row in classes
        ),
        ("mIoU", _percent(matrix.mean_iou)),
        ("OA", _percent(matrix.overall_accuracy)),
        ("mF1", _percent(matrix.mean_f1)),
        ("pixels", f"{matrix.pixels} labelled" + in_brackets(result.ignored_pixels, "without label, not counted")),
        ("time", f"{result.tiles} tiles in {result.seconds:.1f} s"),
        *([("results", str(folder))] if folder else []),
    ]
    data = {
        "subject": _subject_data(subject),
        "data": {"folder": str(dataset.folder), "layout": dataset.layout, "schema": result.schema.name},
        **result.document(),
        "folder": str(folder) if folder else None,
    }
    return Report(f"accuracy of {subject.path.name}", tuple(rows), data)


def describe_parity(
    reference: Subject, candidate: Subject, dataset: Dataset, result: Parity, folder: Path | None
) -> Report:
    """``cdkd-edge parity``."""
    from cdkd_edge import __version__

    document, differences = result.document(), result.differences()
    changed = sum(count for _, _, count in differences)
    rows = [
        *(
            (side, f"{subject.kind} {subject.path}, {subject.precision}, {subject.runtime}")
            for side, subject in (("reference", reference), ("candidate", candidate))
        ),
        ("data", f"{len(dataset)} images of {dataset.folder} ({dataset.layout}), schema {result.schema.name}"),
        *(("note", note) for note in result.notes),
        *(
            (name, f"IoU {_change(*result.class_iou[label], result.class_deltas[label])}")
            for label, name in enumerate(result.schema.class_names)
        ),
        *(
            (title, _change(*result.scores[name], result.deltas[name]))
            for title, name in (("mIoU", "mean_iou"), ("OA", "overall_accuracy"), ("mF1", "mean_f1"))
        ),
        (
            "same label",
            f"{result.agreement:.4%}: {changed} of {document['pixels']} pixels differ"
            + (
                "" if result.labelled_agreement is None else f"; {result.labelled_agreement:.4%} where there is a truth"
            ),
        ),
        *(("changed", f"{before} to {after}: {count} px") for before, after, count in differences[:5]),
        (
            "intervals",
            f"95 %, {result.resamples} resamples of {result.tiles} tiles"
            if result.deltas["mean_iou"].interval
            else "none: too few tiles",
        ),
        ("time", f"{result.seconds:.1f} s"),
        ("verdict", "; ".join([result.verdict, *result.failures]) + _position(result)),
        *([("results", str(folder))] if folder else []),
    ]
    data = {
        "tool": f"cdkd-edge {__version__}",
        "reference": _subject_data(reference),
        "candidate": _subject_data(candidate),
        "data": {"folder": str(dataset.folder), "layout": dataset.layout, "schema": result.schema.name},
        **document,
        "folder": str(folder) if folder else None,
    }
    return Report(f"parity of {candidate.path.name} with {reference.path.name}", tuple(rows), data)


def _change(before: float | None, after: float | None, delta: Delta) -> str:
    """Two scores, their difference in points and its interval."""
    if delta.value is None:
        return "none: not in the truth"
    text = f"{_percent(before)} to {_percent(after)}: {delta.value:+.3f} points"
    return text + (f" ({delta.interval.low:+.3f} .. {delta.interval.high:+.3f})" if delta.interval else "")


def _position(result: Parity) -> str:
    """What the interval adds to the verdict on mIoU."""
    tolerance = f"the tolerance of {result.gate.tolerance:g} points of mIoU"
    return {
        None: "",
        "within": f"; the whole interval lies within {tolerance}",
        "across": f"; the interval reaches across {tolerance}: other images may decide otherwise",
        "beyond": f"; the whole interval lies beyond {tolerance}",
    }[result.interval_position]


def _subject_data(subject: Subject) -> dict[str, Any]:
    return {
        "path": str(subject.path),
        "kind": subject.kind,
        "precision": subject.precision,
        "runtime": subject.runtime,
        "sha256": subject.labeller.artefact.sha256,
        "tile": subject.labeller.tile,
    }


def describe_finetune(result: FinetuneResult) -> Report:
    """``cdkd-edge finetune``."""
    run, scores = result.record["run"], result.record["scores"]
    rows = [
        *(("note", note) for note in result.record["notes"]),
        *(
            (name, f"mIoU {_percent(row['mean_iou'])}   OA {_percent(row['overall_accuracy'])}")
            for name, row in scores.items()
        ),
        *((f"IoU {name}", _percent(iou)) for name, iou in next(iter(scores.values()))["iou"].items()),
        ("time", f"{run['seconds'] / 60:.1f} min on {run['device']}"),
        ("card", str(result.card)),
        ("next", f"cdkd-edge export {result.checkpoint}"),
    ]
    data = {"path": str(result.checkpoint), "card": str(result.card), "training": dict(result.record)}
    return Report(f"checkpoint {result.checkpoint}", tuple(rows), data)


def describe_calibration(result: CalibrateResult) -> Report:
    """``cdkd-edge calibrate``."""
    from cdkd_edge.calibration_set import SHEET_FILE

    manifest, counts, coverage = result.manifest, result.manifest.counts, result.manifest.method["coverage"]
    calibration, check = manifest.of_role("calibration"), manifest.of_role("check")
    passed_over = [
        f"{counts[reason]} {name}"
        for reason, name in (
            ("nodata", "without data"),
            ("blank", "blank"),
            ("excluded", "of an evaluation set"),
            ("near_duplicate", "near-duplicates"),
        )
        if counts.get(reason)
    ]
    strata = Counter(tile.stratum for tile in calibration if tile.stratum is not None)
    rows = [
        (
            "tiles",
            f"{len(calibration)} for calibration, {len(check)} to check on, {manifest.tile} x {manifest.tile} px",
        ),
        (
            "chosen from",
            f"{_plural(counts['candidates'], 'candidate')}: {_plural(counts['tiles_seen'], 'tile')} of "
            f"{_plural(counts['scenes'] - counts['scenes_excluded'] - counts['scenes_broken'], 'scene')}"
            + (f", without {', '.join(passed_over)}" if passed_over else ""),
        ),
        ("scenes used", f"{len({tile.scene for tile in calibration})} for calibration"),
        *((("classes", ", ".join(f"{name} {count}" for name, count in sorted(strata.items()))),) if strata else ()),
        (
            "coverage",
            f"a candidate's distance from the nearest tile: mean {coverage['mean_distance']:.2f}, largest "
            f"{coverage['largest_distance']:.2f} (random choices: {coverage['random_mean_distance']:.2f}, "
            f"{coverage['random_largest_distance']:.2f})",
        ),
        *(("note", note) for note in manifest.notes),
        ("look at", str(result.folder / SHEET_FILE)),
    ]
    data = {"path": str(result.folder), "manifest": plain(manifest)}
    return Report(f"calibration set {result.folder}", tuple(rows), data)


def _percent(value: float | None) -> str:
    """A score of 0..1, which may be missing."""
    return "none" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def in_brackets(count: int, text: str) -> str:
    """A count that is worth a word only if it is not zero."""
    return f" ({count} {text})" if count else ""


def plain(value: Any) -> Any:
    """Dataclasses as JSON data; paths as text."""
    import msgspec

    return msgspec.to_builtins(value, enc_hook=str)


@contextlib.contextmanager
def live_steps() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names the current step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("starting") as status:
        yield lambda step: status.update(step)


@contextlib.contextmanager
def live_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where nobody watches, a bar would leave blank lines between the messages that matter.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def live_training() -> Iterator[Listener]:
    """Epochs as lines on stderr, and below them a bar with the time left where somebody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _TrainingLines(console, progress)


_LINE_EVERY_S = 60.0
"""A log file without a bar gets a line at least this often."""


class _TrainingLines:
    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=None, left="")
        self._last_line = time.monotonic()

    def step(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"{_duration(seconds_left)} left"
        self._progress.update(self._task, description="training", completed=done, total=total, left=f"steps, {left}")
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._line(f"step {done}/{total}  {left}")

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
        if row["mean_iou"] is not None:
            parts.append(f"validation mIoU {_percent(row['mean_iou'])} (best {_percent(best)})")
        if row["epoch"] < epochs:
            parts.append(f"{_duration(seconds_left)} left")
        self._line("  ".join(parts))

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
        self._last_line = time.monotonic()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min"
