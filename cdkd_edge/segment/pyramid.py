"""Overviews of a raster, halved row by row while it is written.

GDAL's MODE resampling does the same on one core at some 80 MP/s, slower than everything else in the pipeline together;
this takes a tenth of that. Each level is halved from the one above, as GDAL does it: of four labels the most frequent,
pixels without a label having no vote; of equally frequent ones the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.open import writing
from cdkd_edge.segment.write import BLOCK, quick_compression

Labels = npt.NDArray[np.uint8]

_LOWEST_BLOCK = 16
"""Blocks of a GeoTIFF are a multiple of it high."""

_ROWS = 32
"""Halved at once: what is worked on stays in the processor's cache for maps of usual width."""


def halved(labels: Labels) -> Labels:
    """Half the resolution of ``[H, W]``: ``[ceil(H / 2), ceil(W / 2)]``; beyond the edge there is no label."""
    height, width = (-(-side // 2) for side in labels.shape)
    small = np.empty((height, width), np.uint8)
    for top in range(0, height, _ROWS):
        part = labels[2 * top : 2 * (top + _ROWS)]
        if part.shape[0] % 2 or part.shape[1] % 2:
            part = np.pad(part, [(0, side % 2) for side in part.shape], constant_values=NO_LABEL)
        _mode_of_four(part, small[top : top + _ROWS])
    return small


def _mode_of_four(labels: Labels, out: Labels) -> None:
    corners = [np.ascontiguousarray(labels[row::2, column::2]) for row in (0, 1) for column in (0, 1)]
    first = corners[3].copy()
    for corner in reversed(corners[:3]):  # in the end the first that has a label
        np.copyto(first, corner, where=corner != NO_LABEL)
    out[:] = first
    # A label that occurs twice or more has a pair; that of the first corners is looked at last and wins.
    for one, other in ((2, 3), (1, 3), (1, 2), (0, 3), (0, 2), (0, 1)):
        np.copyto(out, corners[one], where=corners[one] == corners[other])
    # Two pixels without a label are a pair too. Beside them is one label at most that occurs twice: the first.
    np.copyto(out, first, where=out == NO_LABEL)


def every_other(values: Labels) -> Labels:
    """Half the resolution of ``[H, W]`` by the nearest pixel: for numbers that must not be mixed."""
    return np.ascontiguousarray(values[::2, ::2])


class Pyramid:
    """Writes the overviews of a raster whose rows come from top to bottom. Use as a context manager.

    Args:
        folder: where ``NAME-1.tif`` ... go.
        height, width: of the raster, px.
        halve: how ``[H, W]`` becomes ``[ceil(H / 2), ceil(W / 2)]``.
        name: of the files.

    Raises:
        SceneError: GDAL cannot write a file.
        SystemRefusalError: the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        height: int,
        width: int,
        halve: Callable[[Labels], Labels] = halved,
        name: str = "overview",
    ) -> None:
        self.paths: list[Path] = []
        """Half the resolution, a quarter ... until both sides fit into a block, or one is a single pixel."""
        self._levels: list[_Level] = []
        while max(height, width) > BLOCK and min(height, width) > 1:  # halved no more, it is no valid overview (COG)
            height, width = -(-height // 2), -(-width // 2)
            self.paths.append(folder / f"{name}-{len(self.paths) + 1}.tif")
            # What a row of the raster's blocks becomes is a row of blocks here, so that rows need not be collected.
            block = max(_LOWEST_BLOCK, BLOCK >> len(self.paths))
            self._levels.append(_Level(self.paths[-1], height, width, block, halve))

    def __enter__(self) -> Pyramid:
        try:
            for level in self._levels:
                level.open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def add(self, rows: Labels) -> None:
        """Append rows of the label map, ``[h, width]``; h is even but for the last ones."""
        for level in self._levels:
            rows = level.add(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:  # all of them, also if one fails
            for level in self._levels:
                stack.callback(level.close)


class _Level:
    def __init__(self, path: Path, height: int, width: int, block: int, halve: Callable[[Labels], Labels]) -> None:
        self.path, self.height, self.width = path, height, width
        self._block, self._halve = block, halve
        self._dataset: Any = None
        self._odd: Labels | None = None
        """A row of the level above that waits for its other half."""
        self._waiting: list[Labels] = []
        self._rows = 0
        self._next = 0

    def open(self) -> None:
        profile = {"driver": "GTiff", "height": self.height, "width": self.width, "count": 1, "dtype": "uint8"}
        with writing(f"creating {self.path}", self.path.parent):
            self._dataset = rasterio.open(
                self.path,
                "w",
                **profile,
                nodata=NO_LABEL,
                tiled=True,
                blockxsize=BLOCK,
                blockysize=self._block,
                BIGTIFF="IF_SAFER",
                **quick_compression(),
            )

    def add(self, above: Labels) -> Labels:
        """Halve rows of the level above, keep them, and hand them on."""
        if self._odd is not None:
            above = np.concatenate([self._odd, above])
            self._odd = None
        done = self._next + self._rows
        last = done + -(-len(above) // 2) >= self.height and done * 2 + len(above) >= 2 * self.height - 1
        if len(above) % 2 and not last:
            self._odd, above = above[-1:].copy(), above[:-1]
        rows = self._halve(above)
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= self._block or self._next + self._rows == self.height:
            self._write(whole=self._next + self._rows == self.height)
        return rows

    def _write(self, *, whole: bool) -> None:
        rows = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        count = len(rows) if whole else len(rows) // self._block * self._block
        with writing(f"writing {self.path}", self.path.parent):
            self._dataset.write(rows[:count], 1, window=Window(0, self._next, self.width, count))
        self._next += count
        self._waiting = [rows[count:].copy()] if count < len(rows) else []
        self._rows = len(rows) - count

    def close(self) -> None:
        if self._dataset is not None:
            # GDAL writes much of it only now.
            with writing(f"writing {self.path}", self.path.parent):
                self._dataset.close()
