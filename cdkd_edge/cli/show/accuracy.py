"""What is shown of an evaluation and of a parity test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.cli.show.table import Report, in_brackets, percent

if TYPE_CHECKING:
    from cdkd_edge.quality.artefacts import LoadedArtefact
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.quality.evaluate import Evaluation
    from cdkd_edge.quality.parity import ComparedScore, Parity


def describe_evaluation(subject: LoadedArtefact, dataset: Dataset, result: Evaluation, folder: Path | None) -> Report:
    """``cdkd-edge evaluate``."""
    from cdkd_edge.quality.metrics import CLASS_METRICS, METRICS

    matrix, classes = result.matrix, result.document()["classes"]
    class_metrics = CLASS_METRICS.values()
    rows = [
        (subject.kind, f"{subject.path}, {subject.precision}, {subject.runtime}"),
        ("data", f"{len(dataset)} images of {dataset.folder} ({dataset.layout}), schema {result.schema.name}"),
        *(("note", note) for note in (*subject.notes, *result.notes)),
        *(
            (
                row["name"],
                "   ".join(
                    [*(f"{one.label} {percent(row[one.name])}" for one in class_metrics), f"{row['truth_pixels']} px"]
                ),
            )
            for row in classes
        ),
        *((metric.label, percent(matrix.score(name))) for name, metric in METRICS.items()),
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
    reference: LoadedArtefact, candidate: LoadedArtefact, dataset: Dataset, result: Parity, folder: Path | None
) -> Report:
    """``cdkd-edge parity``."""
    from cdkd_edge import __version__
    from cdkd_edge.quality.metrics import METRICS

    document, differences = result.document(), result.differences()
    changed = sum(count for _, _, count in differences)
    rows = [
        *(
            (side, f"{subject.kind} {subject.path}, {subject.precision}, {subject.runtime}")
            for side, subject in (("reference", reference), ("candidate", candidate))
        ),
        ("data", f"{len(dataset)} images of {dataset.folder} ({dataset.layout}), schema {result.schema.name}"),
        *(("note", f"{one.path.name}: {note}") for one in (reference, candidate) for note in one.notes),
        *(("note", note) for note in result.notes),
        *((name, f"IoU {_change(result.class_iou[label])}") for label, name in enumerate(result.schema.class_names)),
        *((metric.label, _change(result.scores[name])) for name, metric in METRICS.items()),
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
            if result.scores["mean_iou"].interval
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


def _change(score: ComparedScore) -> str:
    """Two scores, their difference in points and its interval."""
    if score.delta is None:
        return "none: not in the truth"
    text = f"{percent(score.reference)} to {percent(score.candidate)}: {score.delta:+.3f} points"
    return text + (f" ({score.interval.low:+.3f} .. {score.interval.high:+.3f})" if score.interval else "")


def _position(result: Parity) -> str:
    """What the interval adds to the verdict on mIoU."""
    tolerance = f"the tolerance of {result.gate.tolerance:g} points of mIoU"
    return {
        None: "",
        "within": f"; the whole interval lies within {tolerance}",
        "across": f"; the interval reaches across {tolerance}: other images may decide otherwise",
        "beyond": f"; the whole interval lies beyond {tolerance}",
    }[result.interval_position]


def _subject_data(subject: LoadedArtefact) -> dict[str, Any]:
    return {
        "path": str(subject.path),
        "kind": subject.kind,
        "precision": subject.precision,
        "runtime": subject.runtime,
        "sha256": subject.labeller.artefact.sha256,
        "tile": subject.labeller.tile,
        "notes": list(subject.notes),
    }
