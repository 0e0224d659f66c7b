"""How a scene is segmented: the options, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import Palette
from cdkd_edge.raster.aoi import read_area
from cdkd_edge.raster.areas import Areas
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.raster.stretch import Limits, Stretch
from cdkd_edge.segmentation.merge_modes import DEFAULT_MERGE

# The command-line option behind each tag of :meth:`SegmentOptions.tags`.
TAG_OPTIONS = {"OVERLAP_PX": "--overlap", "BANDS": "--bands", "MERGE": "--merge", "PALETTE": "--palette"}
TAG_OPTIONS |= {"GSD_M": "--gsd", "STRETCH": "--stretch", "AREA_OF_INTEREST": "--aoi"}


@dataclass(frozen=True)
class SegmentOptions:
    """How a scene is read, tiled and put together again."""

    overlap: int | None = None  # of neighbouring tiles, px. Default: :func:`cdkd_edge.raster.grid.default_overlap`
    bands: Sequence[int] | None = None  # 1-based red, green, blue. Default: :func:`cdkd_edge.raster.bands.choose_bands`
    stretch: Stretch | None = None  # how values become 0..255. Default: 8-bit values stay, others are an error
    merge: str = DEFAULT_MERGE  # how tiles become one map: a name in :data:`.merge_modes.MERGES`
    confidence: bool = False  # also write ``NAME_confidence.tif``, the probability of the label in per cent
    gsd: float | None = None  # ground sample distance of reading and of the label map, m. Default: the scene's own
    aoi: str | None = None  # the area that gets labels, see :func:`cdkd_edge.raster.aoi.read_area`. Default: all
    palette: Palette = Palette.DISPLAY  # the colours of the label map and of what is made of it
    strict: bool = False  # whether a GDAL warning while the scene is read is an error
    readers: int = 2  # reading threads; each opens the scene for itself

    def reading(self) -> dict[str, Any]:
        """The options that say how a raster is read, as arguments of :class:`cdkd_edge.raster.read.SceneReader`."""
        return {"bands": self.bands, "stretch": self.stretch, "gsd": self.gsd, "strict": self.strict}

    def open(self, scene: str | Path, limits: Limits | None = None) -> SceneReader:
        """Open a scene; raises SceneError if it cannot be read with these options.

        ``limits``: of an earlier reader of the same scene; saves reading all of it again for percentiles.
        """
        return SceneReader(scene, limits=limits, **self.reading())

    def overlap_of(self, tile: int) -> int:
        """The overlap of tiles of this side, px."""
        return default_overlap(tile) if self.overlap is None else self.overlap

    def grid_over(self, reader: SceneReader, tile: int) -> TileGrid:
        """The tiles of an open scene. Raises UsageError if the overlap does not fit the tile."""
        return TileGrid.over(reader.height, reader.width, tile, self.overlap_of(tile))

    def tags(self, reader: SceneReader, tile: int) -> dict[str, str]:
        """The options that decide about labels and their colours, as tags of a label map."""
        tags = {"OVERLAP_PX": str(self.overlap_of(tile)), "BANDS": ",".join(map(str, reader.bands))}
        if self.merge != DEFAULT_MERGE:
            tags["MERGE"] = self.merge
        if self.palette is not Palette.DISPLAY:
            tags["PALETTE"] = self.palette.value
        if self.gsd is not None:
            tags["GSD_M"] = f"{self.gsd:g}"
        if self.aoi is not None:
            tags["AREA_OF_INTEREST"] = f"sha256:{read_area(self.aoi).identity}"
        if reader.limits is not None:
            tags["STRETCH"] = "; ".join(f"{low:.6g}..{high:.6g}" for low, high in reader.limits)
        return tags


@dataclass(frozen=True)
class SegmentResult:
    """A finished label map."""

    output: Path
    height: int
    width: int
    tiles: int
    tiles_without_data: int
    seconds: float  # from opening the scene to the finished file, of this run
    engine_seconds: float  # sum over batches of launch to result, of this run
    class_pixels: dict[str, int]
    no_data_pixels: int
    notes: tuple[str, ...]
    tiles_resumed: int = 0  # tiles that an earlier, interrupted run had done
    confidence: Path | None = None  # the confidence raster, if one was asked for
    stretch_limits: tuple[tuple[float, float], ...] | None = None  # per band the values that became 0 and 255
    stages: dict[str, float] = field(default_factory=dict, compare=False)  # seconds by stage; those of threads added up
    # Pixels per class in each row, [height, K + 1]; the last column is no label. Where the size of a pixel depends on
    # latitude, areas are computed from it.
    row_class_pixels: npt.NDArray[np.uint32] | None = field(default=None, repr=False, compare=False)
    areas: Areas | None = field(default=None, compare=False)  # pixels and hectares per class
