"""Images of a dataset, read as scenes are, each with a mask that fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.accuracy.datasets import Pair
from cdkd_edge.accuracy.masks import open_mask
from cdkd_edge.errors import DatasetError, SceneError
from cdkd_edge.scene.pipeline import SegmentOptions
from cdkd_edge.scene.raster import place_problem
from cdkd_edge.scene.reader import SceneReader
from cdkd_edge.scene.upright import Upright

_CUT = "rio warp MASK FITTED.tif --like IMAGE --src-nodata 255 --dst-nodata 255"
_MEND_PLACE = (
    f"cut the mask to the image: {_CUT}; or, if only its grid is wrong: "
    "rio edit-info MASK --like IMAGE --crs like --transform like"
)


class ImageReader(SceneReader):
    """An image of a dataset, read as a scene is; what is wrong with it is wrong with the data.

    Raises:
        DatasetError: where a scene is a SceneError.
    """

    def __init__(self, pair: Pair, options: SegmentOptions, limits: npt.NDArray[np.float32] | None = None) -> None:
        self.mask = pair.mask
        try:
            super().__init__(
                pair.image, bands=options.bands, stretch=options.stretch, limits=limits, strict=options.strict
            )
        except SceneError as error:
            raise DatasetError(f"image {pair.image}: {error}", hint=error.hint) from None

    def read_window(
        self, top: int, left: int, height: int, width: int, **how: Any
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        """See :meth:`cdkd_edge.scene.reader.SceneReader.read_window`."""
        try:
            return super().read_window(top, left, height, width, **how)
        except SceneError as error:
            raise DatasetError(f"image {self.path}: {error}", hint=error.hint) from None

    def require_fitting_mask(self) -> None:
        """Make sure by its header that the mask has the image's size and, where both have a grid, its place.

        Raises:
            DatasetError: it has another, or cannot be read.
        """
        with open_mask(self.mask) as mask:
            height, width = mask.height, mask.width
            if (height, width) != (self.height, self.width):
                as_stored = isinstance(self._source, Upright) and (width, height) == (self.height, self.width)
                raise DatasetError(
                    f"{self.path} is {self.width} x {self.height} px, its mask {self.mask.name} {width} x {height}",
                    hint="the image is turned by its EXIF orientation; if the mask lies as its pixels are stored, take "
                    "that away: exiftool -Orientation= IMAGE"
                    if as_stored
                    else "masks are compared pixel by pixel and never resized; make them fit first, "
                    f"where both have a grid with: {_CUT}",
                )
            if problem := place_problem(self._source, mask):
                raise DatasetError(f"mask {self.mask} {problem} ({self.path})", hint=_MEND_PLACE)
            if isinstance(mask, Upright):
                self._notes.append(f"its mask was {mask.note}")
