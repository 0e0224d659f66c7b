"""``cdkd-edge parity``: does an engine label as its network does?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, BadParameter, Option

from cdkd_edge.cli.evaluate import data_of, data_text, subject_data
from cdkd_edge.cli.options import (
    DATA,
    ENGINE,
    JSON,
    WORKSPACE,
    AccuracyOptions,
    ReadingOptions,
    TorchOptions,
    chosen_engine,
    stem_of,
)
from cdkd_edge.cli.progress import tile_bar
from cdkd_edge.cli.report import Report, Rows, new_folder, write_json
from cdkd_edge.core.numbers import duration, percent
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.quality.artefacts import LoadedArtefact
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.quality.parity import ComparedScore, Parity, ParityGate


@dataclass(frozen=True)
class LimitOptions:
    """What the verdict depends on."""

    tolerance: float | None = Option(
        None, help="Largest loss of mIoU, percentage points. Default: 0.02; 0.5 for an INT8 candidate.", min=0, max=100
    )
    min_agreement: float | None = Option(
        None,
        help="Smallest share of pixels with the same label, per cent. Default: 99.9; 98 for an INT8 candidate.",
        min=0,
        max=100,
    )

    def require_sense(self) -> None:
        """Refuse a share of 1 where per cent are meant."""
        if self.min_agreement is not None and 0 < self.min_agreement <= 1:
            raise BadParameter("a share in per cent, e.g. 98", param_hint="--min-agreement")

    def gate(self, precision: str) -> ParityGate:
        """The limits for a candidate of this precision."""
        from cdkd_edge.quality.parity import ParityGate

        share = None if self.min_agreement is None else self.min_agreement / 100
        return ParityGate.of(precision, self.tolerance, share)


def parity(
    reference: Path = Argument(..., metavar="CKPT", help="Gives the expected labels: checkpoint, graph or engine."),
    artefact: Path | None = Argument(
        None, metavar="ENGINE", help="Engine, graph or checkpoint to compare. Default: the workspace's only engine."
    ),
    *,
    data: Path = DATA,
    engine: Path | None = ENGINE,
    limits: LimitOptions,
    accuracy: AccuracyOptions,
    reading: ReadingOptions,
    torch: TorchOptions,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Check whether an engine labels as its network does: both scores on labelled images, and a verdict.

    Exits with 0 if it passes and with 14 if it does not; any other code means that nothing was decided.
    """
    from cdkd_edge.core.errors import ParityError
    from cdkd_edge.quality.artefacts import open_artefacts
    from cdkd_edge.quality.evaluate import data_schema
    from cdkd_edge.quality.parity import measure_parity

    limits.require_sense()
    options = reading.segment_options(overlap=accuracy.overlap)
    space = Workspace(workspace)
    candidate = chosen_engine(space, f"cdkd-edge parity {reference}", artefact, engine)
    dataset = accuracy.dataset(data)
    folder = accuracy.folder(space, f"{stem_of(candidate)}-parity")
    wanted: dict[str, Any] = {"schema": accuracy.schema, "threads": accuracy.threads}
    pair = open_artefacts(reference, candidate, **wanted, **dataclasses.asdict(torch))
    with pair as (ours, theirs), new_folder(folder) as place, tile_bar(candidate.name) as progress:
        named = next((one.labeller.schema for one in (theirs, ours) if not one.labeller.schema.numbered), None)
        result = measure_parity(
            ours.labeller,
            theirs.labeller,
            dataset,
            data_schema(dataset, accuracy.schema, named),
            limits.gate(theirs.precision),
            options=options,
            maps=place / "maps" if place and accuracy.save_maps else None,
            trained_on=ours.training or theirs.training,
            progress=progress,
        )
        report = _describe(ours, theirs, dataset, result, folder)
        if place:
            write_json(place / "parity.json", report.data)
    report.show(as_json)
    if result.failures:
        raise ParityError(f"{candidate.name} does not keep to {reference.name}: {'; '.join(result.failures)}")


def _describe(
    reference: LoadedArtefact, candidate: LoadedArtefact, dataset: Dataset, result: Parity, folder: Path | None
) -> Report:
    from cdkd_edge import __version__
    from cdkd_edge.quality.metrics import METRICS

    document, differences = result.document(), result.differences()
    changed = sum(count for _, _, count in differences)
    same = f"{percent(result.agreement, 2)}: {changed} of {document['pixels']} pixels differ"
    if result.labelled_agreement is not None:
        same += f"; {percent(result.labelled_agreement, 2)} where there is a truth"
    intervals = "none: too few tiles"
    if result.scores["mean_iou"].interval:
        intervals = f"95 %, {result.resamples} resamples of {result.tiles} tiles"

    def what(subject: LoadedArtefact) -> str:
        return f"{subject.kind} {subject.path}, {subject.precision}, {subject.runtime}"

    rows: Rows = [
        ("reference", what(reference)),
        ("candidate", what(candidate)),
        ("data", data_text(dataset, result.schema)),
        *(("note", f"{one.path.name}: {note}") for one in (reference, candidate) for note in one.notes),
        *(("note", note) for note in result.notes),
        *((name, f"IoU {_change(result.class_iou[label])}") for label, name in enumerate(result.schema.class_names)),
        *((metric.label, _change(result.scores[name])) for name, metric in METRICS.items()),
        ("same label", same),
        *(("changed", f"{before} to {after}: {count} px") for before, after, count in differences[:5]),
        ("intervals", intervals),
        ("time", duration(result.seconds)),
        ("verdict", "; ".join([result.verdict, *result.failures]) + _position(result)),
        *([("results", str(folder))] if folder else []),
    ]
    sides = {"reference": subject_data(reference), "candidate": subject_data(candidate)}
    about = {"tool": f"cdkd-edge {__version__}", **sides, "data": data_of(dataset, result.schema)}
    data = {**about, **document, "folder": folder}
    return Report(f"parity of {candidate.path.name} with {reference.path.name}", rows, data)


def _change(score: ComparedScore) -> str:
    """Two scores, their difference in points and its interval."""
    if score.delta is None:
        return "none: not in the truth"
    text = f"{percent(score.reference, 2)} to {percent(score.candidate, 2)}: {score.delta:+.3f} points"
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
