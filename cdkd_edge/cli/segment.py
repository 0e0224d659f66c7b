"""``cdkd-edge segment``: scenes to label maps."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typer import Argument, BadParameter, Option

from cdkd_edge.cli.options import ENGINE, JSON, OVERLAP, PALETTE, THREADS, WORKSPACE, ReadingOptions, command_line
from cdkd_edge.cli.progress import bar, lines, plain_tile_bar
from cdkd_edge.cli.report import Console, Report, Rows, in_brackets, print_json, say
from cdkd_edge.core.labels import NAME_THEM, Palette, nameless
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.core.numbers import duration, percent, significant
from cdkd_edge.core.signals import check
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.segmentation.merge_modes import DEFAULT_MERGE, merge_help, merge_mode

if TYPE_CHECKING:
    from cdkd_edge.raster.areas import Areas
    from cdkd_edge.segmentation.dispatch import RunObserver
    from cdkd_edge.segmentation.jobs import Job, JobReport
    from cdkd_edge.segmentation.products import ProductOptions
else:
    RunObserver = object  # importing it takes half a second, which --help does not have


@dataclass(frozen=True)
class MapOptions:
    """How the label map is made."""

    overlap: int | None = OVERLAP
    merge: str = Option(DEFAULT_MERGE, help=merge_help())
    confidence: bool = Option(False, help="Also write NAME_confidence.tif: the label's probability, per cent.")
    gsd: float | None = Option(None, help="Resample to this pixel size. Default: the scene's own.", metavar="METRES")
    aoi: str | None = Option(
        None,
        help="Label only polygons of a file, or a box MINX,MINY,MAXX,MAXY in lon/lat or the scene's coordinates.",
        metavar="FILE|BOX",
    )
    palette: Palette = PALETTE
    readers: int = Option(2, help="Threads that read the scene.", min=1, max=16)

    def engine_kind(self) -> str:
        """What the engine must give."""
        needed = merge_mode(self.merge).needs
        return CONFIDENCE if self.confidence and needed == LABELS else needed


@dataclass(frozen=True)
class ProductsGroup:
    """What is written beside the label map."""

    PANEL: ClassVar[str] = "What is written besides"

    preview: bool = Option(False, help="Also write NAME_preview.png: the map over the scene, with a legend.")
    vector: bool = Option(False, help="Also write NAME.gpkg: polygons of each class.")
    min_area: str | None = Option(None, help="Leave smaller polygons out, e.g. 100m2, 0.5ha or 20px.", metavar="AREA")
    simplify: float = Option(0.0, help="Simplify polygons by up to so many px.", min=0)
    stac: bool = Option(False, help="Also write NAME.stac.json, a STAC Item.")
    when: str | None = Option(
        None, "--datetime", help="Time of the images for STAC, e.g. 2026-05-04T10:30:00Z, or START/END.", metavar="TIME"
    )

    def checked(self) -> ProductOptions:
        """The same, parsed."""
        from cdkd_edge.segmentation.polygons import vector_options
        from cdkd_edge.segmentation.products import ProductOptions

        if (self.min_area or self.simplify) and not self.vector:
            raise BadParameter("they have no effect without --vector", param_hint="--min-area, --simplify")
        if self.when and not self.stac:
            raise BadParameter("it has no effect without --stac", param_hint="--datetime")
        polygons = vector_options(self.min_area, self.simplify) if self.vector else None
        return ProductOptions(vector=polygons, preview=self.preview, stac=self.stac, when=self.when)


@dataclass(frozen=True)
class ManyOptions:
    """How many scenes are worked on."""

    PANEL: ClassVar[str] = "Many scenes"

    keep_folders: bool = Option(False, help="Keep the folders of the scenes below the output folder.")
    report: Path | None = Option(None, help="Keep a report of all scenes in this JSON file.", dir_okay=False)
    workers: int | None = Option(None, help="Label so many scenes at a time, each in a process. Default: one.", min=1)
    dask: str | None = Option(None, help="Spread scenes over the workers of this dask scheduler.", metavar="ADDRESS")
    worker_engines: str | None = Option(
        None, help="With --dask: each worker takes the engine of the same graph from its own DIR.", metavar="DIR"
    )

    def require_sense(self) -> None:
        """Refuse options that exclude each other."""
        if self.dask and self.workers:
            raise BadParameter("choose --dask or --workers", param_hint="--workers")
        if self.worker_engines and not self.dask:
            raise BadParameter("it has no effect without --dask", param_hint="--worker-engines")


def segment(
    scenes: list[str] = Argument(..., help="Rasters, folders of them, patterns ('scenes/**/*.tif'), @LIST.txt."),
    *,
    output: Path | None = Option(
        None,
        *("--output", "--out", "-o"),
        help="Label map (.tif), or a folder. Default: SCENE_labels.tif in this folder.",
    ),
    engine: Path | None = ENGINE,
    threads: int | None = THREADS,
    maps: MapOptions,
    reading: ReadingOptions,
    products: ProductsGroup,
    many: ManyOptions,
    overwrite: bool = Option(False, help="Replace existing label maps, and drop what an interrupted run left."),
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Label scenes: GeoTIFFs with palette, class names and the scene's georeference.

    A scene that fails does not stop the others; the exit code is then 18. A label map that exists is kept if it is of
    this scene by this engine with these options.
    """
    from cdkd_edge.segmentation.many import engine_ref, plan_outputs, segment_many, workers_for
    from cdkd_edge.segmentation.partial import resume_advice

    many.require_sense()
    space, made = Workspace(workspace), products.checked()
    options = reading.segment_options(**dataclasses.asdict(maps))
    naming = {"confidence": maps.confidence, "keep_folders": many.keep_folders, "overwrite": overwrite}
    names, outputs = plan_outputs(scenes, output, space.root, made, **naming)
    path = engine or space.only_engine("cdkd-edge segment SCENE --engine", maps.engine_kind(), command_line())
    ref = engine_ref(path, threads=threads, worker_folder=many.worker_engines)
    workers, ref = workers_for(ref, many.dask, many.workers and min(many.workers, len(names)))
    with _observer(names, as_json) as observer:
        try:
            segment_many(
                *(names, outputs, workers, ref, options, made),
                overwrite=overwrite,
                report_path=many.report,
                observer=observer,
            )
        except (KeyboardInterrupt, SystemExit):
            for advice in filter(None, map(resume_advice, outputs)):
                say(advice)
            raise
        finally:
            if as_json:  # also what was finished before a scene failed
                order = {name: number for number, name in enumerate(names)}
                print_json([row.document() for row in sorted(observer.reports, key=lambda row: order[row.scene])])


@contextlib.contextmanager
def _observer(scenes: list[str], as_json: bool) -> Iterator[SceneLines]:
    """Results on stdout as they come; progress and what failed on stderr."""
    console = Console(stderr=True)
    if len(scenes) == 1:
        with plain_tile_bar(Path(scenes[0]).name) as progress:
            yield SceneLines(as_json, progress=progress)
    elif not console.is_terminal:
        with lines(console) as note:
            yield SceneLines(as_json, len(scenes), summary=lambda text, _: note(f"scenes {text}"))
    else:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("scenes"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with bar(console, columns, total=len(scenes)) as update:
            summary = lambda text, done: update(completed=done, description=text)  # noqa: E731
            yield SceneLines(as_json, len(scenes), console=console, summary=summary)


class SceneLines(RunObserver):
    """Shows a run as it goes, and keeps the reports of its scenes."""

    def __init__(
        self,
        as_json: bool,
        scenes: int = 1,
        *,
        console: Console | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        summary: Callable[[str, float], None] = lambda text, done: None,
    ) -> None:
        self.reports: list[JobReport] = []
        self._as_json, self._scenes, self._console = as_json, scenes, console or Console(stderr=True)
        self._progress, self._summary = progress, summary
        self._started = time.monotonic()
        self._tiles: dict[int, tuple[int, int]] = {}  # tiles done and in all, of every scene that was begun

    def begun(self, index: int, job: Job) -> None:
        """A scene is being worked on."""
        check()
        self._tiles[index] = (0, 1)
        self._show()

    def tiles(self, index: int, done: int, total: int) -> None:
        """Tiles of a scene are done."""
        check()
        self._tiles[index] = (done, total)
        self._progress(done, total)
        self._show()

    def finished(self, report: JobReport) -> None:
        """A scene has its label map, or failed."""
        self.reports.append(report)
        if report.error is None and not self._as_json:
            _describe(report).print()
        if report.error is not None and self._scenes > 1:  # of one scene the error itself says it
            hint = f" — {report.error.hint}" if report.error.hint else ""
            named = "" if str(report.scene) in report.error.message else f"{report.scene}: "
            self._console.print_line(f"failed: {named}{report.error.message}{hint}")
        self._show()

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._console.print_line(f"note: {text}")

    def _show(self) -> None:
        bad = sum(report.error is not None for report in self.reports)
        rate = sum(done for done, _ in self._tiles.values()) / max(1e-3, time.monotonic() - self._started)
        text = f"{len(self.reports)}/{self._scenes}, {significant(rate)} tiles/s" + (f", {bad} failed" if bad else "")
        under_way = sum(done / total for done, total in self._tiles.values() if done < total and total)
        self._summary(text, len(self.reports) + min(under_way, 1.0))


def _describe(job: JobReport) -> Report:
    """A scene that did not fail: a new label map, or one that was there."""
    result, found = job.result, job.result or job.kept
    assert found is not None, "a failed scene is an error, not a result"
    total = max(1, found.height * found.width)
    made: Rows = []
    if result is not None:
        empty = in_brackets(result.tiles_without_data, "without data, not computed")
        resumed = in_brackets(result.tiles_resumed, "done by an earlier run")
        speed = f"{significant(total / result.seconds / 1e6)} MP/s"
        made = [
            ("tiles", f"{result.tiles}{empty}{resumed}"),
            ("time", f"{duration(result.seconds)}, engine {duration(result.engine_seconds)}, {speed}"),
        ]
    rows = [
        ("scene", f"{job.scene}, {found.width} x {found.height} px"),
        *(("note", note) for note in (*(result.notes if result else ()), *job.notes)),
        *class_rows(found.areas, total),
        ("no data", percent(found.no_data_pixels / total)),
        *made,
        *([("confidence", str(found.confidence))] if found.confidence else []),
        *job.products.items(),
    ]
    was_there = ", kept: it was there" if result is None and job.status != "done" else ""
    return Report(f"label map {job.output}{was_there}", rows, job.document())


def class_rows(areas: Areas | None, total: int) -> Rows:
    """What share of ``total`` pixels each class has, and how many hectares, where that is known."""
    if areas is None:
        return []
    shares = []
    for area in areas.classes:
        if area.pixels:
            ground = "" if area.hectares is None else f" ({significant(area.hectares, 4)} ha)"
            shares.append(f"{area.name} {percent(area.pixels / total)}{ground}")
    rows: Rows = [("classes", ", ".join(shares) or "none")]
    if nameless([area.name for area in areas.classes]):
        rows.append(("note", NAME_THEM))
    return rows if areas.reason is None else [*rows, ("no hectares", areas.reason)]
