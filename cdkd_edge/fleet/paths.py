"""Paths as the command has them and as workers see them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cdkd_edge.fleet.jobs import EngineRef, Job, JobReport
from cdkd_edge.scene.outputs import confidence_path
from cdkd_edge.scene.raster import is_gdal_name


def _absolute_engine(engine: EngineRef) -> EngineRef:
    """The engine under a path that a worker finds, wherever it was started."""
    return replace(engine, path=os.path.abspath(engine.path))  # noqa: PTH100 - links stay as they are


def on_the_wire(job: Job, token: str | None) -> Job:
    """A job as a worker gets it, wherever that was started."""
    scene = job.scene if is_gdal_name(job.scene) else os.path.abspath(job.scene)  # noqa: PTH100
    output = os.path.abspath(job.output)  # noqa: PTH100
    options = job.options
    if options.aoi is not None and Path(options.aoi).exists():  # else it is a box
        options = replace(options, aoi=os.path.abspath(options.aoi))  # noqa: PTH100
    engine = _absolute_engine(job.engine)
    return replace(job, scene=scene, output=output, engine=engine, options=options, token=token)


def as_named(report: JobReport, job: Job) -> JobReport:
    """The report with the paths that the user gave."""
    result = report.result
    if result is not None:
        confidence = confidence_path(Path(job.output)) if result.confidence else None
        result = replace(result, output=Path(job.output), confidence=confidence)
    kept = replace(report.kept, output=Path(job.output)) if report.kept else None
    folder = Path(job.output).parent
    products = {name: str(folder / Path(path).name) for name, path in report.products.items()}
    return replace(report, scene=job.scene, output=job.output, result=result, kept=kept, products=products)


@contextlib.contextmanager
def shared_folders(jobs: Sequence[Job]) -> Iterator[dict[str, str]]:
    """Put a file into each output folder by which workers know that it is the same folder; by folder, as given."""
    name = f".{secrets.token_hex(8)}.cdkd-edge-run"
    tokens: dict[str, str] = {}
    made: list[Path] = []
    try:
        for folder in {str(Path(job.output).parent) for job in jobs}:
            place = Path(os.path.abspath(folder))  # noqa: PTH100
            if not place.exists():
                place.mkdir(parents=True)
                made.append(place)
            (place / name).touch()
            tokens[folder] = str(place / name)
        yield tokens
    finally:
        for token in tokens.values():
            with contextlib.suppress(OSError):
                Path(token).unlink()
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()  # if nothing came into it
