"""Many scenes to label maps: each scene for itself, a report of all."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cdkd_edge.errors import EngineError, FleetError, SystemRefusalError, UsageError
from cdkd_edge.fleet.crew import Crew, Listener
from cdkd_edge.fleet.jobs import FAILED, INTERRUPTED, NOT_BEGUN, SCENE, EngineRef, Failure, Job, stamp
from cdkd_edge.fleet.local import LocalCrew, ProcessCrew
from cdkd_edge.fleet.report import COMPLETE, STOPPED, FleetReport, ReportFile
from cdkd_edge.machine import available_cores
from cdkd_edge.manifest import EngineManifest, GraphManifest, kind_of, read_manifest
from cdkd_edge.maps.products import NOTHING, Wanted, require_products
from cdkd_edge.scene.pipeline import SegmentOptions
from cdkd_edge.scene.raster import is_gdal_name

_NAMES_SHOWN = 3


def segment_many(
    scenes: Sequence[str],
    outputs: Sequence[Path],
    crew: Crew,
    engine: EngineRef,
    options: SegmentOptions = SegmentOptions(),
    products: Wanted = NOTHING,
    *,
    overwrite: bool = False,
    report_path: Path | None = None,
    listener: Listener | None = None,
) -> FleetReport:
    """Label scenes; one that fails does not keep the others from being labelled.

    Label maps that are there stay, if they are of their scene by this engine with these options. A failure of the
    engine or a full disk ends the run, since every other scene would fail as well.

    Args:
        scenes, outputs: from :func:`.scenes.plan_outputs`.
        crew: who does it.
        engine: what they do it with; from :func:`engine_ref`.
        options: how scenes are read and tiled.
        products: what is wanted beside each label map.
        overwrite: replace label maps that are there.
        report_path: where the report is kept up to date, and stays whatever happens.
        listener: is told what happens.

    Returns:
        The report; every scene is done or kept.

    Raises:
        MissingExtraError: a product needs a package that is not installed.
        FleetError: several scenes were given and some of them failed; the report is in ``report_path``.
        Exception: the one scene that was given failed, or the run was stopped: why.
    """
    require_products(products)
    listener = listener or Listener()
    jobs = [
        Job(
            scene=scene,
            output=str(output),
            engine=engine,
            options=options,
            products=products,
            overwrite=overwrite,
            before=stamp(output),
            scene_is_file=not is_gdal_name(scene) and Path(scene).is_file(),
        )
        for scene, output in zip(scenes, outputs, strict=True)
    ]
    report = FleetReport(jobs, engine, {})
    file = ReportFile(report_path)
    file.save(report)  # a report that cannot be written shows now, not after hours of work
    errors: list[Exception] = []
    try:
        with crew:
            report.crew = crew.describe()
            listener.start(len(jobs))
            _collect(crew, jobs, report, file, errors, listener)
        report.ended = COMPLETE
    except Exception as error:
        report.ended, report.error = STOPPED, Failure.of(error)
        idle = report.count(NOT_BEGUN) + report.count(INTERRUPTED)
        if idle and len(jobs) > 1:
            listener.note(f"stopped; {idle} of {len(jobs)} scenes were not begun or not finished")
        raise
    except BaseException:
        report.ended = INTERRUPTED
        raise
    finally:
        with contextlib.suppress(OSError) if report.ended != COMPLETE else contextlib.nullcontext():
            file.save(report, now=True)
    _require_success(report, errors)
    return report


def _collect(
    crew: Crew,
    jobs: Sequence[Job],
    report: FleetReport,
    file: ReportFile,
    errors: list[Exception],
    listener: Listener,
) -> None:
    with contextlib.closing(crew.answers(jobs, _Marking(report, listener))) as answers:
        for answer in answers:
            report.reports[answer.index] = answer.report
            listener.finished(answer.report)
            file.save(report)
            if answer.error is not None:
                errors.append(answer.error)
            failure = answer.report.error
            if failure is not None and failure.reach != SCENE:
                raise answer.error or _as_error(failure)


class _Marking(Listener):
    """Notes which jobs were begun, and passes everything on."""

    def __init__(self, report: FleetReport, listener: Listener) -> None:
        self._report, self._listener = report, listener
        self.tiles = listener.tiles  # type: ignore[method-assign]
        self.note = listener.note  # type: ignore[method-assign]

    def begun(self, index: int, job: Job) -> None:
        self._report.begun[index] = job.attempt
        self._listener.begun(index, job)


def _as_error(failure: Failure) -> Exception:
    """The error behind a failure that was reported from elsewhere."""
    kinds = (EngineError, SystemRefusalError, UsageError)
    kind = next((kind for kind in kinds if kind.exit_code == failure.exit_code), FleetError)
    return kind(failure.message, hint=failure.hint)


def _require_success(report: FleetReport, errors: Sequence[Exception]) -> None:
    rows = [row for row in report.rows() if row.status == FAILED]
    if not rows:
        return
    if len(report.jobs) == 1 and errors:
        raise errors[0]
    short = [Path(job.scene).name for job in report.jobs]
    unique = len(set(short)) == len(short)
    names = ", ".join(Path(row.scene).name if unique else row.scene for row in rows[:_NAMES_SHOWN])
    more = f" and {len(rows) - _NAMES_SHOWN} more" if len(rows) > _NAMES_SHOWN else ""
    reason = f": {rows[0].error.message}" if len(report.jobs) == 1 and rows[0].error else f": {names}{more}"
    raise FleetError(
        f"{len(rows)} of {len(report.jobs)} scenes failed{reason}",
        hint="mend them and run the same command again; what is finished is kept",
    )


def engine_ref(path: Path, *, threads: int | None = None, worker_folder: str | None = None) -> EngineRef:
    """Which engine is meant, from its file; it is not loaded.

    Args:
        path: an engine. With ``worker_folder`` also a graph, whose engines the workers have.
        threads: CPU threads for one tile.
        worker_folder: where each worker looks for its own engine of the same graph and precision.

    Raises:
        ManifestError: there is no such manifest beside it.
    """
    if worker_folder is not None and kind_of(path) == GraphManifest.kind:
        graph = read_manifest(path, GraphManifest, verify=False)
        return EngineRef(
            str(path), graph.name, graph.precision, None, None, graph.artefact.sha256, threads, worker_folder
        )
    manifest = read_manifest(path, EngineManifest, verify=False)  # who loads it verifies
    return EngineRef(
        path=str(path),
        name=manifest.name,
        precision=manifest.precision,
        runtime=manifest.runtime,
        sha256=manifest.artefact.sha256 if worker_folder is None else None,
        graph_sha256=manifest.graph.sha256,
        threads=threads,
        folder=worker_folder,
    )


def crew_for(engine: EngineRef, address: str | None, workers: int | None) -> tuple[Crew, EngineRef]:
    """Who labels the scenes, and the engine with the threads it gets there.

    Args:
        engine: from :func:`engine_ref`.
        address: of a dask scheduler; None: this machine.
        workers: processes to start here; None: this one does it.
    """
    if address is not None:
        from cdkd_edge.fleet.dask import DaskCrew

        return DaskCrew(address), engine
    if workers is None:
        return LocalCrew(engine), engine
    return ProcessCrew(workers), replace(engine, threads=engine.threads or max(1, available_cores() // workers))
