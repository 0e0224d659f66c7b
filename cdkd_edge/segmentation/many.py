"""Labels many scenes, each independently of the others, and reports on all of them."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cdkd_edge.core.errors import EngineError, FleetError, SceneError, SystemRefusalError, UsageError
from cdkd_edge.core.machine import available_cores
from cdkd_edge.core.manifest import EngineManifest, GraphManifest, kind_of, read_manifest
from cdkd_edge.raster.open import file_key, is_gdal_name, lines_of, rasters_named
from cdkd_edge.raster.styles import sidecar_path
from cdkd_edge.segmentation.dispatch import InProcess, ProcessPool, RunObserver, Workers
from cdkd_edge.segmentation.jobs import Ended, EngineRef, Failure, Job, Reach, RunReport, Status, file_state
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.outputs import label_map_paths, require_file_place
from cdkd_edge.segmentation.products import NO_PRODUCTS, ProductOptions, product_paths
from cdkd_edge.segmentation.worker import is_label_map

_MOST_SCENES = 100_000  # in a list; the report alone of so many takes 100 MB
_NAMES_SHOWN = 3


def scenes_of(arguments: Sequence[str]) -> list[str]:
    """The scenes that the arguments of ``segment`` name.

    An argument is a raster; a name of GDAL's (``/vsicurl/...``, ``https://...``), which stays as it is; a folder, for
    the rasters in it; a pattern (also with ``**``); or ``@LIST``, a text file with one of these per line and ``#`` for
    comments. Files found in folders and by patterns are sorted, without those that ``segment`` wrote.

    Returns paths in the order of the arguments, each file once, by its own name rather than a link's. A path that does
    not exist is among them: that scene will fail, and no other. Raises SceneError if a pattern or a folder gives no
    scene, or a list cannot be read.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        lines = lines_of(argument)
        if len(lines) > _MOST_SCENES:
            problem = f"the list {argument[1:]} names {len(lines)} scenes; a run takes {_MOST_SCENES}"
            raise SceneError(problem, hint="divide it")
        for line in lines:
            gone = not is_gdal_name(line) and not Path(line).exists() and not glob.has_magic(line)
            for path in [line] if gone else sorted(rasters_named(line)):  # opening a file that is gone will fail
                first = found.setdefault(file_key(path), path)
                if Path(first).is_symlink() and not Path(path).is_symlink():
                    found[file_key(path)] = path  # "latest.tif" is another scene's name tomorrow
    return list(found.values())


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
    """Find the scenes, name their label maps, and check that no file is in the way of another.

    Returns scenes and their label maps. A scene that is the label map of another one (``segment *.tif`` for the second
    time) is left out. Arguments are those of :func:`scenes_of` and :func:`.outputs.label_map_paths`; ``products`` and
    ``confidence`` say what else is written. Raises SceneError if two scenes would get one label map, or a scene would
    be replaced; UsageError if the output is another format, or one file for several scenes; SystemRefusalError if the
    output folder is a file.
    """
    scenes = scenes_of(arguments)
    planned = label_map_paths(scenes, output, folder, keep_folders=keep_folders)
    outputs = {file_key(str(path)) for path in planned}
    pairs = [
        (scene, path)
        for scene, path in zip(scenes, planned, strict=True)
        if len(scenes) == 1 or file_key(scene) not in outputs or not is_label_map(scene)
    ]
    sources = {file_key(scene): scene for scene, _ in pairs}
    for _, path in pairs:
        _require_folder(path)
        for place in (path, sidecar_path(path), *product_paths(path, products, confidence=confidence).values()):
            require_file_place(place, links=True)
            if overwrite and (scene := sources.get(file_key(str(place)))):
                raise SceneError(f"{place} would overwrite the scene {scene}", hint="choose another --output")
    return [scene for scene, _ in pairs], [path for _, path in pairs]


def _require_folder(path: Path) -> None:
    """Make sure that no file is where the folder of a label map goes."""
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise SystemRefusalError(f"{parent} is a file, not a folder", hint="choose another --output")


def segment_many(
    scenes: Sequence[str],
    outputs: Sequence[Path],
    workers: Workers,
    engine: EngineRef,
    options: SegmentOptions = SegmentOptions(),
    products: ProductOptions = NO_PRODUCTS,
    *,
    overwrite: bool = False,
    report_path: Path | None = None,
    observer: RunObserver | None = None,
) -> RunReport:
    """Label scenes. A scene that fails does not keep the others from being labelled.

    Label maps that are there stay if they are of their scene, by this engine, with these options. A failure of the
    engine or a full disk ends the run, since every other scene would fail as well.

    Args:
        scenes, outputs: from :func:`plan_outputs`.
        workers, engine: from :func:`workers_for`.
        options, products: how scenes are read and tiled, and what is made beside each label map.
        overwrite: replace label maps that are there.
        report_path: where the report is kept up to date, however the run ends.
        observer: its methods are called as things happen.

    Returns the report; every scene is done or kept. Raises FleetError if there were several scenes and some failed, or
    the error for which the only scene failed or the run was stopped (also MissingExtraError, before it begins).
    """
    products.require()
    observer = observer or RunObserver()
    jobs = []
    for scene, output in zip(scenes, outputs, strict=True):
        before, is_file = file_state(output), not is_gdal_name(scene) and Path(scene).is_file()
        jobs.append(Job(scene, str(output), engine, options, products, overwrite, before, is_file))
    report = RunReport(jobs, engine, workers.begun, report_path)
    report.save()  # fails now, not after hours of work, if it cannot be written
    error: Exception | None = None
    try:
        with workers, contextlib.closing(workers.answers(jobs, observer)) as answers:
            report.workers = workers.description
            for index, row, error in answers:
                report.reports[index] = row
                observer.finished(row)
                report.save()
                if row.error is not None and row.error.reach != Reach.SCENE:  # the other scenes would fail as well
                    raise error or _as_error(row.error)
        report.ended = Ended.COMPLETE
    except Exception as stopped:
        report.ended, report.error = Ended.STOPPED, Failure.of(stopped)
        idle = sum(row.status in (Status.NOT_BEGUN, Status.INTERRUPTED) for row in report.rows())
        if idle and len(jobs) > 1:
            observer.note(f"stopped; {idle} of {len(jobs)} scenes were not begun or not finished")
        raise
    except BaseException:
        report.ended = Ended.INTERRUPTED
        raise
    finally:
        with contextlib.suppress(OSError) if report.ended != Ended.COMPLETE else contextlib.nullcontext():
            report.save(now=True)
    if error is not None and len(jobs) == 1:
        raise error
    _require_success(report)
    return report


def _as_error(failure: Failure) -> Exception:
    """The error behind a failure that another process reported."""
    kinds = (EngineError, SystemRefusalError, UsageError)
    kind = next((kind for kind in kinds if kind.exit_code == failure.exit_code), FleetError)
    return kind(failure.message, hint=failure.hint)


def _require_success(report: RunReport) -> None:
    rows = [row for row in report.rows() if row.status == Status.FAILED]
    if not rows:
        return
    names = [Path(job.scene).name for job in report.jobs]
    unique = len(set(names)) == len(names)
    shown = ", ".join(Path(row.scene).name if unique else row.scene for row in rows[:_NAMES_SHOWN])
    more = f" and {len(rows) - _NAMES_SHOWN} more" if len(rows) > _NAMES_SHOWN else ""
    reason = rows[0].error.message if len(report.jobs) == 1 and rows[0].error else f"{shown}{more}"
    raise FleetError(
        f"{len(rows)} of {len(report.jobs)} scenes failed: {reason}",
        hint="correct them and run the same command again; what is finished is kept",
    )


def engine_ref(path: Path, *, threads: int | None = None, worker_folder: str | None = None) -> EngineRef:
    """Identify an engine by its manifest, without loading it; raises ManifestError if there is none beside it.

    With ``worker_folder``, ``path`` may also be a graph from which the workers' engines were built. That and
    ``threads``: see :class:`.jobs.EngineRef`.
    """
    if worker_folder is not None and kind_of(path) == GraphManifest.kind:
        graph = read_manifest(path, GraphManifest, verify=False)
        sha256 = graph.artefact.sha256
        return EngineRef(str(path), graph.name, graph.precision, None, None, sha256, threads, worker_folder)
    found = read_manifest(path, EngineManifest, verify=False)  # verified when it is loaded
    own, graph_sha256 = found.artefact.sha256 if worker_folder is None else None, found.graph.sha256
    about = str(path), found.name, found.precision, found.runtime
    return EngineRef(*about, own, graph_sha256, threads, worker_folder)


def workers_for(engine: EngineRef, scheduler: str | None, processes: int | None) -> tuple[Workers, EngineRef]:
    """Choose who labels the scenes; returns the engine with the threads that it gets there.

    ``scheduler`` is the address of a dask scheduler, ``processes`` how many to start here; default: this process.
    """
    if scheduler is not None:
        from cdkd_edge.segmentation.dask import DaskPool

        return DaskPool(scheduler), engine
    if processes is None:
        return InProcess(engine), engine
    return ProcessPool(processes), replace(engine, threads=engine.threads or max(1, available_cores() // processes))
