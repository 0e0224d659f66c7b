"""Classes of tiles, from label maps as `segment` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.core.errors import DatasetError, SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.grid import Span
from cdkd_edge.raster.open import gdal, open_scene, place_problem

Counts = npt.NDArray[np.int64]


class LabelMaps:
    """The label maps ``NAME_labels.tif`` of a folder, by the names of scenes.

    Raises:
        DatasetError: the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.class_names: tuple[str, ...] = ()
        """As the first map that names them does."""
        if not folder.is_dir():
            raise DatasetError(f"label maps {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        if not any(folder.glob("*_labels.tif")):
            raise DatasetError(
                f"{folder} holds no label map (NAME_labels.tif)",
                hint=f"make them: cdkd-edge segment SCENES -o {folder}",
            )

    def of(self, scene: str, height: int, width: int) -> LabelMap | None:
        """The label map of a scene, or None.

        Raises:
            DatasetError: it is no label map, has another size, or other classes than those before.
        """
        path = self.folder / f"{Path(scene).stem}_labels.tif"
        if not path.is_file():
            return None
        label_map = LabelMap(path, height, width)
        with open_scene(scene) as image:
            problem = place_problem(image, label_map.dataset)
        if problem:
            label_map.close()
            raise DatasetError(f"label map {path} {problem} ({scene})")
        if label_map.class_names and not self.class_names:
            self.class_names = label_map.class_names
        if label_map.class_names and label_map.class_names != self.class_names:
            label_map.close()
            raise DatasetError(
                f"label map {path} has the classes {', '.join(label_map.class_names)}; those before it have "
                f"{', '.join(self.class_names)}"
            )
        return label_map

    def name(self, label: int) -> str:
        """What to call a label."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"


class LabelMap:
    """One open label map."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path = path
        try:
            self.dataset: Any = open_scene(path)
        except SceneError as error:
            raise DatasetError(f"label map {path} cannot be read: {error}") from None
        dataset = self.dataset
        problem = None
        if dataset.count != 1 or dataset.dtypes[0] != "uint8":
            problem = f"holds {dataset.count} bands of {dataset.dtypes[0]}, not one of uint8"
        elif (dataset.height, dataset.width) != (height, width):
            problem = f"is {dataset.width} x {dataset.height} px, its scene {width} x {height}"
        if problem:
            self.close()
            raise DatasetError(f"label map {path} {problem}")
        names = dataset.tags().get("CLASSES", "")
        self.class_names = tuple(filter(None, (name.strip() for name in names.split(","))))

    def close(self) -> None:
        """Close the file."""
        self.dataset.close()

    def count(self, row: Span, column: Span, tile: int) -> Counts:
        """Pixels per label of the part of a tile that lies in the scene, ``[255]``; pixels without one don't count."""
        top, left = max(row.start, 0), max(column.start, 0)
        bottom = min(row.start + tile, self.dataset.height)
        right = min(column.start + tile, self.dataset.width)
        try:
            with gdal(f"reading {self.path}"):
                labels = self.dataset.read(1, window=Window(left, top, right - left, bottom - top))
        except SceneError as error:
            raise DatasetError(f"label map {self.path} is damaged: {error}") from None
        return np.bincount(labels.ravel(), minlength=256)[:NO_LABEL]


def strata(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """The class that each tile is drawn for: the one of which it has most, compared with the whole archive.

    Rare classes (roads, water in a desert) prevail in no tile, but some tile is always richest in them.

    Args:
        counts: pixels per tile and label, ``[N, 255]``.

    Returns:
        Label per tile, ``[N]``; -1 where no pixel has one.
    """
    total = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(total, 1)
    mean = share.sum(axis=0) / max(1, np.count_nonzero(total))
    richest = np.argmax(share / np.where(mean > 0, mean, 1), axis=1)
    return np.where(total[:, 0] > 0, richest, -1)
