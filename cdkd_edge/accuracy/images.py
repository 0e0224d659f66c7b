"""Images of a dataset, read as scenes are, each with a mask that fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.accuracy.datasets import Pair
from cdkd_edge.accuracy.masks import mask_size
from cdkd_edge.errors import DatasetError, SceneError
from cdkd_edge.scene.pipeline import SegmentOptions
from cdkd_edge.scene.reader import SceneReader


class ImageReader(SceneReader):
    """An image of a dataset, read as a scene is; what is wrong with it is wrong with the data.

    Raises:
        DatasetError: where a scene is a SceneError.
    """

    def __init__(self, pair: Pair, options: SegmentOptions, limits: npt.NDArray[np.float32] | None = None) -> None:
        self.mask = pair.mask
        try:
            super().__init__(pair.image, bands=options.bands, stretch=options.stretch, limits=limits)
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
        """Make sure that the mask has the image's size, by its header.

        Raises:
            DatasetError: it has another, or cannot be read.
        """
        height, width = mask_size(self.mask)
        if (height, width) != (self.height, self.width):
            raise DatasetError(
                f"{self.path} is {self.width} x {self.height} px, its mask {self.mask.name} {width} x {height}",
                hint="masks are compared pixel by pixel and never resized; make them fit first",
            )
