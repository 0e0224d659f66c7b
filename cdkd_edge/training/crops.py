"""Random training crops from pairs of images and masks, and from drawn scenery. Needs numpy and Pillow.

A data set is a folder with ``images/`` and ``masks/``; a mask has its image's stem. Parts of one scene
adjoin, so that a split by part would leak: :func:`read_pairs` picks whole *scenes*, which share the
file name up to the first underscore (``tile5_003.jpg`` belongs to ``tile5``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cdkd_edge.errors import SceneError
from cdkd_edge.labels import NO_LABEL, LabelSchema
from cdkd_edge.scenery import draw_scene

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_MASK_SUFFIXES = (".png", ".tif", ".tiff")
_DULL = 0.92
"""A crop with more than this share of one class teaches little; one redraw is allowed."""


@dataclass(frozen=True)
class LabelledImage:
    """An image, uint8 RGB ``[H, W, 3]``, and its labels, uint8 ``[H, W]`` with 255 for "no label"."""

    name: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    @property
    def scene(self) -> str:
        """The scene that the image is a part of."""
        return scene_of(self.name)


def scene_of(name: str) -> str:
    """The scene of an image file: its stem up to the first underscore."""
    return Path(name).stem.split("_", 1)[0]


def scenes_in(folder: Path) -> tuple[str, ...]:
    """The scenes of a data set, sorted.

    Raises:
        SceneError: there is no ``images/`` folder with images.
    """
    return tuple(sorted({scene_of(path.name) for path in _images(folder)}))


def read_pairs(folder: Path, schema: LabelSchema, scenes: Collection[str] | None = None) -> list[LabelledImage]:
    """Read the images of some scenes (default: all) with their labels, in order of file name.

    Raises:
        SceneError: an image has no mask or one of another size, a file is damaged, or nothing was found.
        SchemaError: a mask holds a colour or value that the schema does not define.
    """
    pairs = []
    for path in _images(folder):
        if scenes is not None and scene_of(path.name) not in scenes:
            continue
        image, labels = _read(path, ("RGB",)), schema.encode(_read(_mask_of(path, folder), ("L", "RGB")), path.stem)
        if image.shape[:2] != labels.shape:
            raise SceneError(f"{path} is {image.shape[1]} x {image.shape[0]} px but its mask is not")
        pairs.append(LabelledImage(path.name, image, labels))
    if not pairs:
        raise SceneError(f"{folder} has no images of the scenes {', '.join(sorted(scenes or ()))}")
    return pairs


def drawn_pairs(seeds: Iterable[int], side: int) -> list[LabelledImage]:
    """Drawn scenes of ``side`` x ``side`` pixels, one per seed; labels are those of schema ``dubai``."""
    pairs = []
    for seed in seeds:
        scene = draw_scene(side, side, seed=seed)
        pairs.append(LabelledImage(f"drawn{seed}", scene.image, scene.labels))
    return pairs


class CropSampler:
    """Endless augmented crops of ``tile`` x ``tile`` pixels, repeatable for a seed.

    A source is chosen by its share, then a scene with a probability that grows with the square root of
    its area (so that the largest does not drown the others), then an image by area and a place in it.
    Crops are scaled by 0.5 to 1.6, turned and flipped, and their colours changed a little.
    """

    def __init__(self, sources: Sequence[tuple[float, Sequence[LabelledImage]]], tile: int, seed: int) -> None:
        if tile < 1 or not sources or any(share <= 0 or not images for share, images in sources):
            raise ValueError("a sampler needs a tile and, for every source, a positive share and an image")
        self.tile = tile
        self._rng = np.random.default_rng(seed)
        self._images: list[LabelledImage] = []
        odds: list[float] = []
        total = sum(share for share, _ in sources)
        for share, images in sources:
            areas: dict[str, int] = {}
            for item in images:
                areas[item.scene] = areas.get(item.scene, 0) + item.labels.size
            roots = sum(area**0.5 for area in areas.values())
            for item in images:
                area = areas[item.scene]
                self._images.append(item)
                odds.append(share / total * area**0.5 / roots * item.labels.size / area)
        self._odds = np.array(odds) / sum(odds)

    def batch(self, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """``count`` crops: images uint8 RGB ``[N, 3, T, T]`` and labels uint8 ``[N, T, T]``."""
        images = np.empty((count, 3, self.tile, self.tile), np.uint8)
        labels = np.empty((count, self.tile, self.tile), np.uint8)
        for index in range(count):
            image, truth = self._crop()
            if np.bincount(truth.ravel(), minlength=NO_LABEL + 1).max() > _DULL * truth.size:
                image, truth = self._crop()
            images[index], labels[index] = self._recolor(image).transpose(2, 0, 1), truth
        return images, labels

    def _crop(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        rng = self._rng
        item = self._images[int(rng.choice(len(self._images), p=self._odds))]
        height, width = item.labels.shape
        scale = np.exp(rng.uniform(np.log(0.5), np.log(1.6)))
        side = min(max(round(self.tile / scale), 1), height, width)
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        window = np.s_[top : top + side, left : left + side]
        size = (self.tile, self.tile)
        image = np.asarray(Image.fromarray(item.image[window]).resize(size, Image.Resampling.BILINEAR))
        truth = np.asarray(Image.fromarray(item.labels[window]).resize(size, Image.Resampling.NEAREST))
        quarters = int(rng.integers(4))
        image, truth = np.rot90(image, quarters), np.rot90(truth, quarters)
        if rng.random() < 0.5:
            image, truth = image[:, ::-1], truth[:, ::-1]
        return image, truth

    def _recolor(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Other light: gamma, gain and a tint, as a table of 256 values per channel."""
        rng = self._rng
        ramp = (np.arange(256) / 255)[:, None] ** np.exp(rng.uniform(-0.25, 0.25))
        gain = np.exp(rng.uniform(-0.2, 0.15)) * (1 + 0.035 * rng.standard_normal(3))
        table = np.clip(255 * ramp * gain + rng.uniform(-6, 6), 0, 255).astype(np.uint8)  # [256, 3]
        return np.stack([table[image[..., channel], channel] for channel in range(3)], axis=-1)


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in (folder / "images").glob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not found:
        raise SceneError(f"{folder} has no images/ folder with images", hint="expected images/NAME.jpg, masks/NAME.png")
    return found


def _mask_of(image: Path, folder: Path) -> Path:
    for suffix in _MASK_SUFFIXES:
        if (mask := folder / "masks" / f"{image.stem}{suffix}").exists():
            return mask
    raise SceneError(f"{image} has no mask in {folder / 'masks'}")


def _read(path: Path, modes: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Decode a file; palette images and other modes become the last of ``modes``."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in modes else image.convert(modes[-1]))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for bad PNGs
        raise SceneError(f"{path} cannot be read: {error}") from None
