"""From the arguments of a command to scenes: files, folders and patterns; and how many tiles each may give."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdkd_edge.raster.find import file_key, rasters_named
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.open import open_scene


@dataclass(frozen=True)
class Source:
    """A scene and its tiles, before any pixel of it was read."""

    path: str
    height: int
    width: int
    tile: int

    @property
    def grid(self) -> TileGrid:
        """Tiles side by side: they overlap only as much as they must, and a small scene is one tile."""
        return TileGrid.over(self.height, self.width, self.tile, 0)

    def places(self, limit: int, seed: int) -> Iterator[tuple[Span, Span]]:
        """The scene's tiles row by row; if they are more than ``limit``, a random choice.

        The choice depends on the seed and the scene's name, not on other scenes.
        """
        grid = self.grid
        chosen: Iterable[int] = range(len(grid))
        if len(grid) > limit:
            generator = np.random.default_rng([seed, zlib.crc32(Path(self.path).name.encode(errors="replace"))])
            chosen = sorted(generator.choice(len(grid), limit, replace=False).tolist())
        columns = len(grid.columns)
        for index in chosen:
            yield grid.rows[index // columns], grid.columns[index % columns]


def expand(arguments: Sequence[str]) -> list[str]:
    """Scenes that arguments name: a raster, a folder of rasters, a pattern (``**`` too), or a name of GDAL's.

    Folders are not searched below, so that masks are not taken for images. What `segment` wrote is passed over, and
    files whose names begin with a dot.

    Returns:
        Paths as they were given, sorted; the same file once.

    Raises:
        SceneError: an argument names nothing.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for path in rasters_named(argument):
            key = file_key(path)
            found[key] = min(found.get(key, path), path)
    return sorted(found.values())


def measure(path: str, tile: int) -> Source:
    """Open a scene to see how large it is.

    Raises:
        SceneError: it cannot be opened.
    """
    with open_scene(path) as dataset:
        return Source(path, int(dataset.height), int(dataset.width), tile)


def fair_limit(sizes: Sequence[int], budget: int) -> int:
    """The largest number of tiles a scene may give, so that all together give at most ``budget``; at least 1."""
    limit, left, scenes = 0, budget, len(sizes)
    for size in sorted(sizes):
        if size > left // scenes:
            return max(1, left // scenes)
        limit, left, scenes = size, left - size, scenes - 1
    return max(1, limit)
