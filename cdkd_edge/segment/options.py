"""How a scene is segmented, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdkd_edge.raster.areas import Areas
from cdkd_edge.raster.stretch import Stretch


@dataclass(frozen=True)
class SegmentOptions:
    """How a scene is read, tiled and put together again."""

    overlap: int | None = None
    """Overlap of neighbouring tiles, px. Default: :func:`.grid.default_overlap`."""
    bands: Sequence[int] | None = None
    """Red, green and blue as 1-based band numbers. Default: by colour tags, as :class:`.reader.SceneReader` says."""
    stretch: Stretch | None = None
    """How values become 0..255. Default: 8-bit values as they are, others are an error."""
    merge: str = "crop"
    """``crop``: each pixel from the tile in which it lies deepest. ``hann``: probabilities of tiles are blended."""
    confidence: bool = False
    """Also write ``NAME_confidence.tif``, the probability of the label in per cent."""
    gsd: float | None = None
    """Ground sample distance at which the scene is read, m; the label map has it too. Default: the scene's own."""
    aoi: str | None = None
    """Area of interest as :func:`.aoi.read_area` takes it; outside there is no label. Default: all of the scene."""
    strict: bool = False
    """What GDAL warns of while the scene is read is an error."""
    readers: int = 2
    """Reading threads, each with the scene opened for itself."""


@dataclass(frozen=True)
class SegmentResult:
    """A finished label map."""

    output: Path
    height: int
    width: int
    tiles: int
    tiles_without_data: int
    seconds: float
    """From opening the scene to the finished file, of this run."""
    engine_seconds: float
    """Sum over batches of launch to result, of this run."""
    class_pixels: dict[str, int]
    no_data_pixels: int
    notes: tuple[str, ...]
    tiles_resumed: int = 0
    """Tiles that an earlier, interrupted run had done."""
    confidence: Path | None = None
    """The confidence raster, if one was asked for."""
    stretch_limits: tuple[tuple[float, float], ...] | None = None
    """Per band the values that became 0 and 255."""
    stages: dict[str, float] = field(default_factory=dict, compare=False)
    """Seconds by stage; those of threads added up."""
    row_class_pixels: npt.NDArray[np.uint32] | None = field(default=None, repr=False, compare=False)
    """Pixels per class in every row of pixels, ``[height, K + 1]``, the last column being no label: for areas where
    the size of a pixel depends on latitude."""
    areas: Areas | None = field(default=None, compare=False)
    """Pixels and hectares per class."""
