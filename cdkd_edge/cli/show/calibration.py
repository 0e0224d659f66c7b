"""What is shown of a calibration set."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.table import Report, plain, plural

if TYPE_CHECKING:
    from cdkd_edge.precision.calibration.calibrate import CalibrateResult


def describe_calibration(result: CalibrateResult) -> Report:
    """``cdkd-edge calibrate``."""
    from cdkd_edge.graph.tiles import SHEET_FILE

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
            f"{plural(counts['candidates'], 'candidate')}: {plural(counts['tiles_seen'], 'tile')} of "
            f"{plural(counts['scenes'] - counts['scenes_excluded'] - counts['scenes_broken'], 'scene')}"
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
