"""Reads masks (colours or index values, in any format of GDAL) as labels, strictly by the schema; and their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from cdkd_edge.core.errors import DatasetError, SceneError, SchemaError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema, Palette
from cdkd_edge.quality.datasets import Pair
from cdkd_edge.raster.bands import Upright
from cdkd_edge.raster.open import gdal, open_scene, place_problem
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.options import SegmentOptions

_STRIP = 1024  # rows translated at a time: colours need several times the memory of labels


@dataclass
class HiddenLabels:
    """Pixels that hold a class but have no label, because the mask file marks them as without data."""

    pixels: Counter[tuple[str, str]] = field(default_factory=Counter)  # by cause and class
    masks: Counter[str] = field(default_factory=Counter)

    def add(self, nodata: float | None, counts: npt.NDArray[np.int64], schema: LabelSchema) -> None:
        """Add the hidden pixels of one mask, by label ``[K]``."""
        if not counts.any():
            return
        cause = "transparency or mask band" if nodata is None else f"nodata value {nodata:g}"
        self.masks[cause] += 1
        self.pixels.update({(cause, name): int(n) for name, n in zip(schema.class_names, counts, strict=True) if n})

    def notes(self) -> list[str]:
        """One sentence per cause."""
        return [
            f"the {cause} of {masks} mask{'s' if masks > 1 else ''} takes the label from "
            + ", ".join(f"{n} pixels of {name}" for (why, name), n in self.pixels.most_common() if why == cause)
            + "; if these are to count, store the masks without it"
            for cause, masks in self.masks.items()
        ]


def read_labels(path: Path, schema: LabelSchema, hidden: HiddenLabels | None = None) -> npt.NDArray[np.uint8]:
    """Read a mask as labels uint8 ``[H, W]``, 255 where there is none.

    One band holds index values, three RGB colours; one more may be alpha, which is 255 where there is a label. A
    palette counts as colours, unless it is the ramp of greys in which colour and index are the same number; where index
    values are possible too and disagree, colours must be exactly the schema's. The file's own nodata value or mask and
    transparent palette entries mean "no label"; ``hidden`` counts the pixels of each class that they hide.

    Raises:
        SchemaError, DatasetError: an unknown colour or value; it cannot be read, or has other bands than these.
    """
    with open_mask(path) as dataset:
        with_alpha = dataset.count == 2 and dataset.colorinterp[1] == ColorInterp.alpha
        if dataset.count not in (1, 3, 4) and not with_alpha:
            raise DatasetError(f"mask {path} has {dataset.count} bands; 1 (index values) or 3 (RGB) are expected")
        counts = np.zeros(NO_LABEL + 1, np.int64)
        palette = _palette(dataset, schema) if dataset.count == 1 else None
        by_color = palette is not None and _knows_colors(dataset, palette, schema, path)
        labels = np.empty((dataset.height, dataset.width), np.uint8)
        for top, pixels, known, odd in _strips(dataset, path):
            if palette is not None:
                known &= palette[pixels[0], 3] > 0
            elif len(pixels) in (2, 4):
                known &= pixels[-1] > 0
            if palette is not None and by_color:
                mask = palette[pixels[0]][..., :3]
            else:
                mask = pixels[0] if len(pixels) < 3 else np.ascontiguousarray(pixels[:3].transpose(1, 2, 0))
            labels[top : top + _STRIP] = _encode(mask, known, schema, path)
            if hidden is not None and not known.all():
                without_data = schema.encode(mask[~known & ~odd][None], strict=False)
                counts += np.bincount(without_data.ravel(), minlength=len(counts))
        if hidden is not None:
            hidden.add(dataset.nodata, counts[: len(schema)], schema)
    return labels


def open_mask(path: Path) -> Any:
    """Open a mask; DatasetError if it cannot be read."""
    try:
        return open_scene(path)
    except SceneError as error:
        raise DatasetError(f"mask {path} cannot be read: {error}", hint=error.hint) from None


def _strips(
    dataset: Any, path: Path
) -> Iterator[tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Strips of a mask: first row, pixels ``[bands, h, w]`` as uint8, which have data, which are beyond 0..255."""
    for top in range(0, dataset.height, _STRIP):
        window = Window(0, top, dataset.width, min(_STRIP, dataset.height - top))
        known = np.ones((window.height, window.width), bool)
        try:
            with gdal(f"reading {path}"):
                pixels: npt.NDArray[Any] = dataset.read(window=window)
                if not all(MaskFlags.all_valid in flags for flags in dataset.mask_flag_enums):
                    known = dataset.dataset_mask(window=window) != 0
        except SceneError as error:
            raise DatasetError(f"mask {path} is damaged: {error}") from None
        kind = pixels.dtype
        if kind != np.uint8 and (kind.kind not in "iu" or len(pixels) != 1):
            raise DatasetError(f"mask {path} holds {kind} values; index values are whole numbers, colours uint8")
        small = pixels.astype(np.uint8)
        odd = (small != pixels)[0]
        if (known & odd).any():
            raise DatasetError(f"mask {path} holds {kind} values beyond 0..255; index values and colours are uint8")
        yield top, small, known, odd


def _palette(dataset: Any, schema: LabelSchema) -> npt.NDArray[np.uint8] | None:
    """RGBA by index value, uint8 ``[256, 4]``, or None without a palette; a schema's display colours become its own."""
    if dataset.colorinterp[0] != ColorInterp.palette:
        return None
    table = np.zeros((256, 4), np.uint8)
    table[:, 3] = 255
    for index, color in dataset.colormap(1).items():
        if index < len(table):  # a band of 16 bits has 65536 colours; _strips checks which of them its pixels use
            table[index] = color
    if (table[: len(schema), :3] == schema.palette()[: len(schema)]).all():
        table[: len(schema), :3] = schema.in_palette(Palette.DATASET).palette()[: len(schema)]
    return table


def _knows_colors(dataset: Any, palette: npt.NDArray[np.uint8], schema: LabelSchema, path: Path) -> bool:
    """Whether the colours of a paletted mask mean classes: the schema knows every colour that its pixels use.

    SchemaError if its colours are not the schema's, or its index values are valid too and give other classes.
    """
    used = np.zeros(256, bool)
    for _, pixels, known, _ in _strips(dataset, path):
        used[np.unique(pixels[0][known])] = True
    used &= palette[:, 3] > 0
    colors, indices = palette[used][:, :3], np.flatnonzero(used).astype(np.uint8)
    values = {cls.value for cls in schema.classes} | set(schema.ignore_values)
    try:
        by_color = schema.encode(colors[None])
    except SchemaError:
        if (colors == indices[:, None]).all():
            return False
        # Reading values instead would accept another dataset's mask if the schema happens to define its few values.
        schema.encode(colors[None], str(path))
        raise
    if not set(indices.tolist()) <= values or (schema.encode(indices[None]) == by_color).all():
        return True
    # Index masks come with palettes of greys or of other classes, in which some colours look like the schema's.
    ours, ignored = {cls.color for cls in schema.classes}, {*schema.ignore_colors, (0, 0, 0)}
    defined = set(map(tuple, palette[:, :3].tolist()))
    if set(map(tuple, colors.tolist())) <= ours | ignored and (defined & ours or defined <= ignored):
        return True
    raise SchemaError(
        f"mask {path} has a palette, and its colours and its index values mean different classes",
        hint="store it as RGB, or as index values without a palette",
    )


def _encode(
    mask: npt.NDArray[np.uint8], known: npt.NDArray[np.bool_], schema: LabelSchema, path: Path
) -> npt.NDArray[np.uint8]:
    """Labels of a strip; pixels that are not ``known`` may hold any value and get no label."""
    if known.all():
        return schema.encode(mask, str(path))
    labels = np.full(known.shape, NO_LABEL, np.uint8)
    if known.any():
        labels[known] = schema.encode(mask[known][None], str(path))[0]
    return labels


_CUT = "rio warp MASK FITTED.tif --like IMAGE --src-nodata 255 --dst-nodata 255"
_MEND = "rio edit-info MASK --like IMAGE --crs like --transform like"
_TURNED = (
    "the image is turned by its EXIF orientation; if the mask fits the pixels as they are stored, remove the "
    "orientation: exiftool -Orientation= IMAGE"
)


class ImageReader(SceneReader):
    """Reads an image of a dataset as a scene; raises DatasetError where a scene reader raises SceneError."""

    def __init__(self, pair: Pair, options: SegmentOptions, limits: npt.NDArray[np.float32] | None = None) -> None:
        self.mask = pair.mask
        try:
            super().__init__(pair.image, limits=limits, **options.reading())
        except SceneError as error:
            raise DatasetError(f"image {pair.image}: {error}", hint=error.hint) from None

    def read_window(
        self, top: int, left: int, height: int, width: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        """See :meth:`cdkd_edge.raster.read.SceneReader.read_window`."""
        try:
            return super().read_window(top, left, height, width)
        except SceneError as error:
            raise DatasetError(f"image {self.path}: {error}", hint=error.hint) from None

    def require_fitting_mask(self) -> None:
        """Make sure that the mask has the image's size and, if both are georeferenced, its place; reads headers only.

        DatasetError if it differs, or cannot be read.
        """
        with open_mask(self.mask) as mask:
            height, width = mask.height, mask.width
            if (height, width) != (self.height, self.width):
                as_stored = isinstance(self._source, Upright) and (width, height) == (self.height, self.width)
                fit = "masks are compared pixel by pixel and never resized; make them fit first; "
                raise DatasetError(
                    f"{self.path} is {self.width} x {self.height} px, its mask {self.mask.name} {width} x {height}",
                    hint=_TURNED if as_stored else f"{fit}if both are georeferenced: {_CUT}",
                )
            if problem := place_problem(self._source, mask):
                hint = f"cut the mask to the image: {_CUT}; or, if only its grid is wrong: {_MEND}"
                raise DatasetError(f"mask {self.mask} {problem} ({self.path})", hint=hint)
            if isinstance(mask, Upright):
                self._notes.append(f"its mask was {mask.note}")
