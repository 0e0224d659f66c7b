"""Writes a set: the chosen tiles, read again and compared with what was seen before, manifest and contact sheet."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.graph.tiles import (
    SHEET_FILE,
    Role,
    SceneRecord,
    SetManifest,
    TileRecord,
    pixels_sha256,
    write_set_manifest,
    write_tile,
)
from cdkd_edge.precision.calibration.candidates import Candidates, window_of
from cdkd_edge.precision.calibration.pick import Pick, Picked
from cdkd_edge.precision.calibration.sheet import Sheet, SheetTile, small, thumbnail_side, write_sheet
from cdkd_edge.raster.grid import Span
from cdkd_edge.segment.options import SegmentOptions


def store(
    folder: Path,
    name: str,
    candidates: Candidates,
    pick: Pick,
    scene_options: SegmentOptions,
    description: dict[str, Any],
) -> SetManifest:
    """Write everything into ``folder``.

    Args:
        folder: an empty folder.
        name: of the set, for the sheet.
        candidates: what was chosen from.
        pick: what was chosen.
        scene_options: bands and stretch, as in the scan.
        description: the manifest's fields about the whole set.

    Raises:
        SceneError: a scene cannot be read again, or changed meanwhile.
        OSError: the system refused to write.
    """
    side = thumbnail_side(len(pick.calibration) + len(pick.check))
    records: dict[int, TileRecord] = {}
    pictures: dict[int, npt.NDArray[np.uint8]] = {}
    by_scene: dict[int, list[int]] = defaultdict(list)
    roles: tuple[tuple[Role, tuple[Picked, ...]], ...] = (("calibration", pick.calibration), ("check", pick.check))
    for role, tiles in roles:
        for number, tile in enumerate(tiles):
            records[tile.index] = _record(candidates, tile, role, number)
            by_scene[int(candidates.scene[tile.index])].append(tile.index)
    scenes = []
    for scene, indices in sorted(by_scene.items()):
        source = candidates.sources[scene]
        limits = candidates.limits.get(scene)
        reader = dataclasses.replace(scene_options, strict=False).open(source.path, limits)
        try:
            pixels = np.empty((3, source.tile, source.tile), np.uint8)
            for index in sorted(indices):
                x, y, _, _ = window_of(candidates, index)
                reader.read_tile(Span(y, 0, source.height), Span(x, 0, source.width), pixels)
                if pixels_sha256(pixels) != candidates.pixels[index]:
                    raise SceneError(f"{source.path} changed while it was read")
                write_tile(folder / records[index].file, pixels)
                pictures[index] = small(pixels, side)
        finally:
            reader.close()
        path = Path(source.path)
        known = path.is_file()
        scenes.append(
            SceneRecord(
                source.path,
                sha256_of(path) if known else None,
                path.stat().st_size if known else None,
                None if limits is None else [[float(low), float(high)] for low, high in limits],
            )
        )
    manifest = SetManifest(
        scenes=tuple(scenes),
        tiles=tuple(records[tile.index] for _, tiles in roles for tile in tiles),
        **description,
    )
    write_set_manifest(folder, manifest)
    write_sheet(folder / SHEET_FILE, _sheet(name, manifest, pick, pictures))
    return manifest


def _record(candidates: Candidates, tile: Picked, role: Role, number: int) -> TileRecord:
    x, y, width, height = window_of(candidates, tile.index)
    return TileRecord(
        file=f"{role}/{number:04}.png",
        sha256=candidates.pixels[tile.index],
        scene=candidates.sources[int(candidates.scene[tile.index])].path,
        x=x,
        y=y,
        width=width,
        height=height,
        role=role,
        cluster=tile.kind,
        why=tile.why,
        score=tile.score,
        represents=tile.represents,
        stratum=tile.stratum,
    )


def _sheet(name: str, manifest: SetManifest, pick: Pick, pictures: dict[int, npt.NDArray[np.uint8]]) -> Sheet:
    counts, coverage = manifest.counts, manifest.method["coverage"]
    calibration, check = manifest.of_role("calibration"), manifest.of_role("check")
    left_out = "".join(
        f", {counts[reason]} {reason.replace('_', ' ')}"
        for reason in ("nodata", "blank", "excluded", "near_duplicate")
        if counts.get(reason)
    )
    seen = counts["scenes"] - counts["scenes_excluded"] - counts["scenes_broken"]
    lines = (
        f"{manifest.tile} x {manifest.tile} px, seed {manifest.seed}; from {counts['candidates']} candidates "
        f"(tiles looked at: {counts['tiles_seen']}, scenes: {seen}{left_out})",
        f"distance of a candidate from the nearest tile: mean {coverage['mean_distance']:.2f}, "
        f"largest {coverage['largest_distance']:.2f} (random choice: {coverage['random_mean_distance']:.2f}, "
        f"{coverage['random_largest_distance']:.2f})",
    )

    def drawn(picked: tuple[Picked, ...], records: tuple[TileRecord, ...]) -> tuple[SheetTile, ...]:
        return tuple(
            SheetTile(pictures[tile.index], Path(record.scene).stem, _detail(record), record.cluster)
            for tile, record in zip(picked, records, strict=True)
        )

    return Sheet(
        title=f"Calibration set {name}",
        lines=lines,
        kinds=tuple((kind, f"kind {kind}: {share:.0%}") for kind, share in enumerate(pick.kind_shares)),
        sections=(
            (
                f"{len(calibration)} tiles for calibration",
                "number: candidates like it",
                drawn(pick.calibration, calibration),
            ),
            (f"{len(check)} tiles to check on", "never used for calibration", drawn(pick.check, check)),
        ),
    )


def _detail(record: TileRecord) -> str:
    return f"{record.x}, {record.y}   {record.stratum or record.why} {record.represents}"
