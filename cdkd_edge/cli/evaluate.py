"""``cdkd-edge evaluate``: accuracy on labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

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
from cdkd_edge.cli.report import Report, Rows, fields_of, in_brackets, new_folder, write_json
from cdkd_edge.core.numbers import duration, percent
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.core.labels import LabelSchema
    from cdkd_edge.quality.artefacts import LoadedArtefact
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.quality.evaluate import Evaluation


def evaluate(
    artefact: Path | None = Argument(
        None, metavar="CKPT|GRAPH|ENGINE", help="What to measure. Default: the workspace's only engine."
    ),
    *,
    data: Path = DATA,
    engine: Path | None = ENGINE,
    tile: int | None = Option(None, help="Side of a checkpoint's tiles, px. Default: its own.", min=1),
    accuracy: AccuracyOptions,
    reading: ReadingOptions,
    torch: TorchOptions,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Measure accuracy on labelled images: IoU per class, mIoU, OA, mF1.

    Checkpoints, graphs and engines are all measured in the same way.
    """
    from cdkd_edge.quality.artefacts import open_artefact
    from cdkd_edge.quality.evaluate import data_schema
    from cdkd_edge.quality.evaluate import evaluate as measure

    space = Workspace(workspace)
    path = chosen_engine(space, "cdkd-edge evaluate", artefact, engine)
    options = reading.segment_options(overlap=accuracy.overlap)
    dataset = accuracy.dataset(data)
    folder = accuracy.folder(space, f"{stem_of(path)}-accuracy")
    wanted: dict[str, Any] = {"schema": accuracy.schema, "tile": tile, "threads": accuracy.threads}
    subject = open_artefact(path, **wanted, **dataclasses.asdict(torch))
    with subject.labeller as labeller, new_folder(folder) as place, tile_bar(path.name) as progress:
        result = measure(
            labeller,
            dataset,
            data_schema(dataset, accuracy.schema, labeller.schema),
            options=options,
            maps=place / "maps" if place and accuracy.save_maps else None,
            trained_on=subject.training,
            progress=progress,
        )
        report = _describe(subject, dataset, result, folder)
        if place:
            write_json(place / "accuracy.json", report.data)
    report.show(as_json)


def _describe(subject: LoadedArtefact, dataset: Dataset, result: Evaluation, folder: Path | None) -> Report:
    from cdkd_edge.quality.metrics import CLASS_METRICS, METRICS

    matrix, document = result.matrix, result.document()
    scores = {
        row["name"]: [f"{metric.label} {percent(row[name], 2)}" for name, metric in CLASS_METRICS.items()]
        for row in document["classes"]
    }
    rows: Rows = [
        (subject.kind, f"{subject.path}, {subject.precision}, {subject.runtime}"),
        ("data", data_text(dataset, result.schema)),
        *(("note", note) for note in (*subject.notes, *result.notes)),
        *(
            (row["name"], "   ".join([*scores[row["name"]], f"{row['truth_pixels']} px"]))
            for row in document["classes"]
        ),
        *((metric.label, percent(matrix.score(name), 2)) for name, metric in METRICS.items()),
        ("pixels", f"{matrix.pixels} labelled" + in_brackets(result.ignored_pixels, "without label, not counted")),
        ("time", f"{result.tiles} tiles in {duration(result.seconds)}"),
        *([("results", str(folder))] if folder else []),
    ]
    about = {"subject": subject_data(subject), "data": data_of(dataset, result.schema)}
    return Report(f"accuracy of {subject.path.name}", rows, {**about, **document, "folder": folder})


def data_text(dataset: Dataset, schema: LabelSchema) -> str:
    """The images, for a person."""
    return f"{len(dataset)} images of {dataset.folder} ({dataset.layout}), schema {schema.name}"


def data_of(dataset: Dataset, schema: LabelSchema) -> dict[str, Any]:
    """The images, for a program."""
    return {**fields_of(dataset, "folder", "layout"), "schema": schema.name}


def subject_data(subject: LoadedArtefact) -> dict[str, Any]:
    """What was measured, for a program."""
    file = {"sha256": subject.labeller.artefact.sha256, "tile": subject.labeller.tile}
    return {**fields_of(subject, "path", "kind", "precision", "runtime", "notes"), **file}
