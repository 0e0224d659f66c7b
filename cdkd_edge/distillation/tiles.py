"""Tiles of scenes without labels, in the views of :mod:`cdkd_edge.training.views`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import SceneError
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.open import scenes_named
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.views import Augmentation, TilePlace, UInt8Array, View, as_seen, window_of


class SceneTiles:
    """Places and views of scenes as tiles of T px; each scene's header is read once, its pixels when they are needed.

    Args:
        arguments: rasters, folders of them, or patterns.
        tile: side of a tile, px.
        augmentation, options: how views differ; how scenes are read.

    Raises:
        SceneError: nothing is found, or a scene cannot be read; names it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        tile: int,
        augmentation: Augmentation = Augmentation(),
        options: SegmentOptions = SegmentOptions(),
    ) -> None:
        self.tile, self.augmentation, self._options = tile, augmentation, options
        self.scenes = scenes_named(arguments)
        self.shapes: list[tuple[int, int]] = []  # height and width of each scene, px
        self.places: list[TilePlace] = []
        self._limits: list[npt.NDArray[np.float32] | None] = []  # how the values of each scene are stretched
        notes: dict[str, Sequence[str]] = {}
        for index, scene in enumerate(self.scenes):
            with closing(self._options.open(scene)) as reader:
                self._limits.append(reader.limits)
                self.shapes.append((reader.height, reader.width))
                notes[scene] = reader.notes
            for row, column in TileGrid.over(*self.shapes[-1], tile, 0):
                self.places.append(TilePlace(index, row.start, column.start))
        self.notes = reading_notes(notes)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: TilePlace, view: View) -> UInt8Array:
        """Read a view of a place, RGB uint8 ``[3, T, T]``. SceneError if the scene cannot be read."""
        scene = self.scenes[place.image]
        row, column = window_of(place, view, self.tile, self.shapes[place.image])
        image = np.empty((3, row.last - row.first, column.last - column.first), np.uint8)
        with closing(self._options.open(scene, self._limits[place.image])) as reader:
            if (reader.height, reader.width) != self.shapes[place.image]:
                raise SceneError(f"{scene} was replaced by another while it was read")
            reader.read_tile(row, column, image)
        return as_seen(image, view, self.tile, self.augmentation)

    def digest(self) -> str:
        return str(len(self))

    def found(self) -> list[dict[str, object]]:
        return []

    def late_notes(self) -> list[str]:
        return []
