"""Many scenes to label maps: each scene for itself, a report of all.

From the arguments of ``segment`` to scenes and label maps, before anything is read.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cdkd_edge.core.errors import EngineError, FleetError, SceneError, SystemRefusalError, UsageError
from cdkd_edge.core.files import read_small
from cdkd_edge.core.machine import available_cores
from cdkd_edge.core.manifest import EngineManifest, GraphManifest, kind_of, read_manifest
from cdkd_edge.raster.find import file_key, rasters_named
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.raster.styles import sidecar_path
from cdkd_edge.segment.many.crew import Crew, Listener
from cdkd_edge.segment.many.jobs import FAILED, INTERRUPTED, NOT_BEGUN, SCENE, EngineRef, Failure, Job, stamp
from cdkd_edge.segment.many.kept import is_label_map
from cdkd_edge.segment.many.local import LocalCrew, ProcessCrew
from cdkd_edge.segment.many.report import COMPLETE, STOPPED, FleetReport, ReportFile
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.outputs import label_map_paths, require_file_place
from cdkd_edge.segment.products import NO_PRODUCTS, ProductOptions, product_paths

_MOST_SCENES = 100_000
"""In a list; the report alone of so many takes 100 MB."""


def scenes_of(arguments: Sequence[str]) -> list[str]:
    """Scenes that arguments name.

    An argument is a raster; a name of GDAL's (``/vsicurl/...``, ``https://...``), which stays as it is; a folder, for
    the rasters in it; a pattern (``**`` too); or ``@LIST``, a text file with one of these a line, ``#`` for comments.
    Matches of a pattern and files of a folder are sorted and leave out what ``segment`` wrote.

    Returns:
        Paths in the order of the arguments, each file once, by its own name rather than by a link's. A path that does
        not exist is among them: that scene will fail, and no other.

    Raises:
        SceneError: a pattern or a folder gives no scene, or a list cannot be read.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for path in _named(argument):
            first = found.setdefault(file_key(path), path)
            if Path(first).is_symlink() and not Path(path).is_symlink():
                found[file_key(path)] = path  # "latest.tif" is another scene's name tomorrow
    return list(found.values())


def _named(argument: str) -> list[str]:
    if argument.startswith("@") and not Path(argument).exists():
        return [path for line in _lines(Path(argument[1:])) for path in _named_in_list(line)]
    return _named_in_list(argument)


def _named_in_list(argument: str) -> list[str]:
    # The path of a file that is gone; what to make of it is decided where it would be read.
    if not is_gdal_name(argument) and not Path(argument).exists() and not glob.has_magic(argument):
        return [argument]
    return sorted(rasters_named(argument))


def _lines(path: Path) -> list[str]:
    try:
        # File names may hold any bytes; surrogates bring them through.
        text = read_small(path).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise SceneError(f"the list {path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise SceneError(f"the list {path} is no text file", hint="a list names a scene on each line")
    lines = (line.strip() for line in text.splitlines())
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise SceneError(f"the list {path} names no scene")
    if len(named) > _MOST_SCENES:
        raise SceneError(f"the list {path} names {len(named)} scenes; a run takes {_MOST_SCENES}", hint="divide it")
    return named


def plan_outputs(
    arguments: Sequence[str],
    output: Path | None,
    folder: Path,
    products: ProductOptions = NO_PRODUCTS,
    *,
    confidence: bool = False,
    keep_folders: bool = False,
    overwrite: bool,
) -> tuple[list[str], list[Path]]:
    """Scenes and their label maps, checked against each other.

    Args:
        arguments: as for :func:`scenes_of`.
        output, folder, keep_folders: as for :func:`~cdkd_edge.segment.outputs.label_map_paths`.
        products: what is wanted beside each label map.
        confidence: whether a raster of confidence is among it.
        overwrite: whether existing label maps are replaced.

    Returns:
        Scenes and their label maps. A scene that is the label map of another (``segment *.tif`` for the second
        time) is left out.

    Raises:
        SceneError: two scenes would get one label map, or a scene would be replaced.
        UsageError: the output is another format, or one file for several scenes.
        SystemRefusalError: the output folder is a file.
    """
    scenes = scenes_of(arguments)
    planned = label_map_paths(scenes, output, folder, keep_folders=keep_folders)
    outputs = {file_key(str(path)) for path in planned}
    pairs = [
        (scene, path)
        for scene, path in zip(scenes, planned, strict=True)
        if len(scenes) == 1 or file_key(scene) not in outputs or not is_label_map(scene)
    ]
    scenes, planned = [scene for scene, _ in pairs], [path for _, path in pairs]
    sources = {file_key(scene): scene for scene in scenes}
    for path in planned:
        _require_room(path)
        for place in (path, sidecar_path(path), *product_paths(path, products, confidence=confidence).values()):
            require_file_place(place, links=True)
            if overwrite and (scene := sources.get(file_key(str(place)))):
                raise SceneError(f"{place} would overwrite the scene {scene}", hint="choose another --output")
    return scenes, planned


def _require_room(path: Path) -> None:
    """Something that is in the way of every label map is said once, before work begins."""
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise SystemRefusalError(f"{parent} is a file, not a folder", hint="choose another --output")


_NAMES_SHOWN = 3


def segment_many(
    scenes: Sequence[str],
    outputs: Sequence[Path],
    crew: Crew,
    engine: EngineRef,
    options: SegmentOptions = SegmentOptions(),
    products: ProductOptions = NO_PRODUCTS,
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
    products.require()
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
        from cdkd_edge.segment.many.dask import DaskCrew

        return DaskCrew(address), engine
    if workers is None:
        return LocalCrew(engine), engine
    return ProcessCrew(workers), replace(engine, threads=engine.threads or max(1, available_cores() // workers))
