"""Training data: tiles of the images of a dataset, turned, mirrored, moved, scaled and in other light.

A *place* is a tile of an image's grid, without overlap. A *view* is one variant of it; view 0 is the tile as it is.
Views are drawn from seeds, so that each can be made again. A run uses either a few fixed views of each place, whose
features are worth caching, or fresh ones in every epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.quality.datasets import Dataset
from cdkd_edge.quality.evaluate import no_labels
from cdkd_edge.quality.masks import HiddenLabels, ImageReader, read_labels
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.options import SegmentOptions

UInt8Array = npt.NDArray[np.uint8]

ORIENTATIONS = 8  # four quarter turns, each mirrored or not
_SHIFT = 0.25  # a view is moved by up to this share of a tile, but not beyond the image
_LABELS_IN_MEMORY = 2 << 30


@dataclass(frozen=True)
class Augmentation:
    """How views differ from the tile as it is."""

    flips: bool = True  # quarter turns and mirroring: imagery from above has no preferred direction
    scale: tuple[float, float] = (1.0, 1.0)  # smallest and largest magnification, drawn evenly on a logarithmic scale
    light: float = 0.0  # strength of changes of gamma, gain and tint; 1 is strong
    # Strength of grain in patches, like waves, glint and speckle; 1 is strong. It teaches that the smoothness of a
    # surface in one scene does not tell its class.
    texture: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0.1 <= low <= high <= 10:
            raise UsageError(f"--scale must be two numbers from 0.1 to 10, the smaller first; got {low:g} {high:g}")
        for name, strength in (("light", self.light), ("texture", self.texture)):
            if not 0 <= strength <= 1:
                raise UsageError(f"--{name} must be between 0 and 1, got {strength:g}")


@dataclass(frozen=True)
class TilePlace:
    """A tile of an image's grid; ``row`` and ``column`` of its first pixel may be negative."""

    image: int
    row: int
    column: int


@dataclass(frozen=True)
class View:
    """A variant of a place."""

    quarters: int = 0
    mirrored: bool = False
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)  # rows and columns, as shares of a tile
    light: int | None = None  # seed of a change of light
    texture: int | None = None  # seed of a grain


def draw_view(augmentation: Augmentation, seed: Sequence[int], index: int | None) -> View:
    """Draw a view from a seed of numbers that no other view has.

    ``index`` is the number of a fixed view: 0 is the tile as it is, and the first eight are the eight orientations.
    None is a fresh view, everything drawn.
    """
    if index == 0:
        return View()
    rng = np.random.default_rng([*seed, index or 0])
    orientation = int(rng.integers(ORIENTATIONS)) if augmentation.flips else 0
    if augmentation.flips and index is not None and index < ORIENTATIONS:
        orientation = index
    low, high = np.log(augmentation.scale)
    scale = float(np.exp(rng.uniform(low, high))) if high > low else augmentation.scale[0]
    return View(
        quarters=orientation % 4,
        mirrored=orientation >= 4,
        scale=scale,
        shift=(float(rng.uniform(-_SHIFT, _SHIFT)), float(rng.uniform(-_SHIFT, _SHIFT))),
        light=int(rng.integers(1 << 31)) if augmentation.light else None,
        texture=int(rng.integers(1 << 31)) if augmentation.texture else None,
    )


class TrainingTiles:
    """Places and views of a dataset as tiles of T px with labels; masks are read, and images checked, once.

    Raises:
        DatasetError: an image or mask cannot be read, or they differ in size or place; no pixel has a label.
        SchemaError: a mask holds something that the schema does not define.
    """

    def __init__(
        self,
        dataset: Dataset,
        schema: LabelSchema,
        tile: int,
        augmentation: Augmentation = Augmentation(),
        options: SegmentOptions = SegmentOptions(),
    ) -> None:
        self.tile, self.schema, self.augmentation = tile, schema, augmentation
        self._dataset, self._options = dataset, options
        self._labels: OrderedDict[int, UInt8Array] = OrderedDict()
        self._limits: list[npt.NDArray[np.float32] | None] = []  # how the values of each image are stretched
        self.class_pixels = np.zeros(len(schema), np.int64)  # labelled pixels by class, ``[K]``
        self.places: list[TilePlace] = []
        self.warnings: dict[str, Sequence[str]] = {}  # of GDAL while views were read, by image
        notes: dict[str, Sequence[str]] = {}
        lost = HiddenLabels()
        for index, pair in enumerate(dataset):
            with closing(ImageReader(pair, options)) as reader:
                reader.require_fitting_mask()
                self._limits.append(reader.limits)
                height, width, notes[pair.name] = reader.height, reader.width, reader.notes
            labels = read_labels(pair.mask, schema, lost)
            self.class_pixels += np.bincount(labels.ravel(), minlength=NO_LABEL + 1)[: len(schema)]
            for row, column in TileGrid.over(height, width, tile, 0):
                if (labels[row.first : row.last, column.first : column.last] != NO_LABEL).any():
                    self.places.append(TilePlace(index, row.start, column.start))
            self._remember(index, labels)
        self.notes = [*lost.notes(), *reading_notes(notes)]  # how images and masks are read
        if not self.places:
            raise no_labels(f"the {len(dataset)} training masks of {dataset.folder}", lost)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: TilePlace, view: View) -> tuple[UInt8Array, UInt8Array]:
        """Read a view of a place: RGB ``[3, T, T]`` and labels ``[T, T]``, both uint8; 255 beyond the image."""
        pair = self._dataset.pairs[place.image]
        if (labels := self._labels.get(place.image)) is None:
            labels = read_labels(pair.mask, self.schema)
            self._remember(place.image, labels)
        self._labels.move_to_end(place.image)
        row, column = window_of(place, view, self.tile, labels.shape)
        side = row.last - row.first
        image = np.empty((3, side, side), np.uint8)
        with closing(ImageReader(pair, self._options, self._limits[place.image])) as reader:
            valid = reader.read_tile(row, column, image)
            if reader.warnings:
                self.warnings[pair.name] = reader.warnings
        truth = np.full((side, side), NO_LABEL, np.uint8)
        top, left = max(row.first, 0), max(column.first, 0)
        part = labels[top : row.last, left : column.last]
        truth[top - row.first : top - row.first + part.shape[0], left - column.first :][:, : part.shape[1]] = part
        if valid is not None:
            truth[~valid] = NO_LABEL
        if side != self.tile:
            truth = np.asarray(Image.fromarray(truth).resize((self.tile, self.tile), Image.Resampling.NEAREST))
        return as_seen(image, view, self.tile, self.augmentation), np.ascontiguousarray(_turned(truth, view))

    def _remember(self, index: int, labels: UInt8Array) -> None:
        """Masks are small once they are labels; the least recently used give way."""
        self._labels[index] = labels
        while sum(kept.nbytes for kept in self._labels.values()) > _LABELS_IN_MEMORY and len(self._labels) > 1:
            self._labels.popitem(last=False)


def window_of(place: TilePlace, view: View, tile: int, shape: tuple[int, ...]) -> tuple[Span, Span]:
    """Rows and columns of an image (``shape``: its height and width, px) that a view of a place shows, a square."""
    side = max(1, round(tile / view.scale))
    starts = (
        _placed(start, tile, shift, side, size)
        for start, shift, size in zip((place.row, place.column), view.shift, shape, strict=True)
    )
    row, column = (Span(start, start, start + side) for start in starts)
    return row, column


def as_seen(image: UInt8Array, view: View, tile: int, augmentation: Augmentation) -> UInt8Array:
    """The pixels of a window ``[3, S, S]`` as a view shows them, ``[3, T, T]``."""
    if image.shape[-1] != tile:
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        image = np.asarray(picture.resize((tile, tile), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    image = _turned(image, view)
    if view.texture is not None:
        image = _add_grain(image, view.texture, augmentation.texture)
    if view.light is not None:
        image = _change_light(image, view.light, augmentation.light)
    return np.ascontiguousarray(image)


def _turned(picture: UInt8Array, view: View) -> UInt8Array:
    """A picture or labels ``[..., T, T]``, turned and mirrored."""
    picture = np.rot90(picture, view.quarters, axes=(-2, -1))
    return picture[..., ::-1] if view.mirrored else picture


def _placed(start: int, tile: int, shift: float, side: int, size: int) -> int:
    """First pixel of a window of ``side`` px around a tile's middle, inside an axis of ``size`` px if it fits."""
    if size <= side:
        return -((side - size) // 2)
    middle = start + tile / 2 + shift * tile
    return int(np.clip(round(middle - side / 2), 0, size - side))


def _change_light(image: UInt8Array, seed: int, strength: float) -> UInt8Array:
    """Change gamma, gain and tint, by a table of 256 values per channel."""
    rng = np.random.default_rng(seed)
    ramp = (np.arange(256) / 255)[:, None] ** np.exp(strength * rng.uniform(-0.5, 0.5))
    gain = np.exp(strength * rng.uniform(-0.4, 0.3)) * (1 + strength * 0.07 * rng.standard_normal(3))
    table = np.clip(255 * ramp * gain + strength * rng.uniform(-12, 12), 0, 255).astype(np.uint8)  # [256, 3]
    return np.stack([table[plane, channel] for channel, plane in enumerate(image)])


def _add_grain(image: UInt8Array, seed: int, strength: float) -> UInt8Array:
    """Add grain of 2.5 to 24 px in two directions, in patches; its deviation is up to an eighth of the value + 14."""
    rng = np.random.default_rng(seed)
    side = image.shape[1]
    grain = np.zeros((side, side), np.float32)
    for _ in range(2):
        height, width = np.maximum(2, side / np.exp(rng.uniform(np.log(2.5), np.log(24), 2))).astype(int)
        layer = _enlarged(rng.standard_normal((height, width)), side)
        grain += layer / max(float(layer.std()), 1e-6)
    patches = 1 / (1 + np.exp(-3 * (_enlarged(rng.standard_normal((5, 5)), side) - rng.uniform(-0.8, 0.8))))
    gain, offset = strength * rng.uniform(0, 0.12), strength * rng.uniform(2, 14)
    changed = image + (gain * image + offset) * (grain / np.sqrt(2) * patches).astype(np.float32)
    clipped: UInt8Array = np.clip(changed, 0, 255).astype(np.uint8)
    return clipped


def _enlarged(values: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(values.astype(np.float32))
    enlarged: npt.NDArray[np.float32] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    return enlarged
