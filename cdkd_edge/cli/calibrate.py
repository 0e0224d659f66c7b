"""``cdkd-edge calibrate``: scenes to a calibration set."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, Option

from cdkd_edge.cli.options import JSON, WORKSPACE, ReadingOptions
from cdkd_edge.cli.progress import tile_bar
from cdkd_edge.cli.report import Report, Rows, plural, say
from cdkd_edge.core.numbers import significant
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.precision.calibrate import CalibrateResult


@dataclass(frozen=True)
class SetOptions:
    """Fields of :class:`~cdkd_edge.precision.calibrate.CalibrateOptions`."""

    count: int = Option(64, help="Tiles for calibration.", min=1)
    check: int = Option(8, help="Further tiles, to judge the quantised graph on.", min=0)
    tile: int | None = Option(None, help="Side of a tile, px. Default: the workspace's graph's, else 1024.", min=32)
    exclude: list[str] | None = Option(
        None,
        help="Evaluation set that must not be used: folder of images, calibration set, or list (.txt). Repeatable.",
        metavar="SET",
    )
    labels: Path | None = Option(None, help="Folder of segment's label maps, to cover every class.")
    seed: int = Option(0, help="The same scenes, options and seed give the same set.", min=0)
    candidates: int = Option(10_000, help="Tiles to choose from, in all scenes together.", min=1)
    max_nodata: float = Option(0.1, help="Largest share of a tile that may have no data, 0 to 1.", min=0.0, max=1.0)
    skip_broken: bool = Option(False, help="Skip scenes that cannot be read.")


def calibrate(
    scenes: list[str] = Argument(..., help="Rasters, folders of rasters, patterns in quotes, or @LIST."),
    *,
    output: Path | None = Option(
        None, "--output", "-o", help="Folder of the set. Default: engines/calibration/NAME, after the scene or folder."
    ),
    chosen: SetOptions,
    reading: ReadingOptions,
    overwrite: bool = Option(False, help="Replace an existing calibration set."),
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Choose tiles of scenes for INT8: they cover the imagery. Writes engines/calibration/NAME/."""
    from cdkd_edge.precision.calibrate import calibrate as choose_tiles
    from cdkd_edge.precision.calibrate import default_folder, default_tile, tile_sides
    from cdkd_edge.precision.scan_scenes import CalibrateOptions

    space, tile, sides = Workspace(workspace), chosen.tile, tile_sides(Workspace(workspace))
    if tile and sides and tile not in sides:  # `build --int8` would find it after the work
        say(f"note: graphs in {space.graphs} have tiles of {', '.join(map(str, sorted(sides)))} px, not {tile} px")
    parsed = {"tile": tile or default_tile(space), "exclude": tuple(chosen.exclude or ())}
    options = CalibrateOptions(**{**asdict(chosen), **parsed}, reading=reading.segment_options())
    with tile_bar("reading tiles") as progress:
        result = choose_tiles(scenes, output or default_folder(space, scenes), options, progress, overwrite=overwrite)
    _describe(result).show(as_json)


_SKIPPED = {
    "nodata": "without data",
    "blank": "blank",
    "excluded": "of an evaluation set",
    "near_duplicate": "near-duplicates",
}


def _describe(result: CalibrateResult) -> Report:
    from cdkd_edge.graph.tiles import SHEET_FILE

    manifest, counts, coverage = result.manifest, result.manifest.counts, result.manifest.method["coverage"]
    calibration, check = manifest.of_role("calibration"), manifest.of_role("check")
    skipped = ", ".join(f"{counts[reason]} {name}" for reason, name in _SKIPPED.items() if counts.get(reason))
    strata = Counter(tile.stratum for tile in calibration if tile.stratum is not None)
    read = counts["scenes"] - counts["scenes_excluded"] - counts["scenes_broken"]
    chosen_from = f"{plural(counts['candidates'], 'candidate')}: {plural(counts['tiles_seen'], 'tile')} of "
    chosen_from += plural(read, "scene") + (f", without {skipped}" if skipped else "")
    sizes = f"{len(calibration)} for calibration, {len(check)} to check on, {manifest.tile} x {manifest.tile} px"
    mean, largest = significant(coverage["mean_distance"]), significant(coverage["largest_distance"])
    random = f"{significant(coverage['random_mean_distance'])}, {significant(coverage['random_largest_distance'])}"
    near = f"distance of a candidate from the nearest tile: mean {mean}, largest {largest} (random choices: {random})"
    rows: Rows = [
        ("tiles", sizes),
        ("chosen from", chosen_from),
        ("scenes used", f"{len({tile.scene for tile in calibration})} for calibration"),
        *([("classes", ", ".join(f"{name} {count}" for name, count in sorted(strata.items())))] if strata else []),
        ("coverage", near),
        *(("note", note) for note in manifest.notes),
        ("look at", str(result.folder / SHEET_FILE)),
    ]
    return Report(f"calibration set {result.folder}", rows, {"path": result.folder, "manifest": manifest})
