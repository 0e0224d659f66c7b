"""Labelled datasets: finds the mask of each image, and divides images into training and validation.

Every image belongs to a *scene*. Images of one scene may touch, so a split should not divide scenes. DeepGlobe is by
Demir et al. (CVPRW 2018), LoveDA by Wang et al. (NeurIPS D&B 2021).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.core.errors import DatasetError
from cdkd_edge.core.files import read_small

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".vrt")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".webp", ".vrt")
SCHEMA_FILE = "schema.toml"

_LOVEDA_PLACES = ("Urban", "Rural")
_OPENMMLAB = (("img_dir", "ann_dir"), ("images", "annotations"))
_TRAINING_NAMES, _VALIDATION_NAMES = ("train", "training"), ("val", "valid", "validation")

Part = tuple[Path, Path, str, str]  # images, masks, prefix of names, scene (empty: by the file's name)


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    name: str  # unique in the dataset: the image's stem, after its subfolder if there is one (``Train/Urban/1366``)
    scene: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Dataset:
    """The pairs of a folder, in order of name."""

    folder: Path
    layout: str  # ``folder pair``, ``OpenMMLab``, ``DeepGlobe`` or ``LoveDA``
    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @property
    def scenes(self) -> tuple[str, ...]:
        """All scenes, sorted."""
        return tuple(sorted({pair.scene for pair in self.pairs}))

    @property
    def schema_name(self) -> str | None:
        """The label schema that comes with the data: ``schema.toml`` in the folder, or the layout's own."""
        if (file := self.folder / SCHEMA_FILE).is_file():
            return str(file)
        return {"DeepGlobe": "deepglobe", "LoveDA": "loveda"}.get(self.layout)

    def of_scenes(self, scenes: Iterable[str]) -> Dataset:
        """The pairs of some scenes; DatasetError if one is unknown."""
        wanted = set(scenes)
        if unknown := sorted(wanted - set(self.scenes)):
            hint = f"its scenes are {listed(self.scenes, 12)}"
            raise DatasetError(f"{self.folder} has no scene {listed(unknown)}", hint=hint)
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair.scene in wanted))

    def of_list(self, file: Path) -> Dataset:
        """The pairs that a text file names (:func:`read_list`): a name, a file name, or a path that ends in one.

        Raises:
            DatasetError: the file cannot be read or is empty, or a name is there twice, unknown, or of several images.
        """
        by_name: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            path = pair.image.relative_to(self.folder)
            ways = {pair.name, pair.name.rpartition("/")[2], path.as_posix(), path.with_suffix("").as_posix()}
            for name in ways | {path.name, path.stem}:
                by_name.setdefault(name, []).append(pair)
        chosen: list[Pair] = []
        for entry in read_list(file):
            parts, found = Path(entry).parts, list[Pair]()
            for first in range(len(parts)):  # the longest end of the path that matches decides
                tail = "/".join(parts[first:])
                suffix = Path(tail).suffix if Path(tail).suffix.lower() in IMAGE_SUFFIXES else ""
                if found := by_name.get(tail) or by_name.get(tail.removesuffix(suffix)) or []:
                    break
            if len(found) != 1:
                problem = "is not in" if not found else f"could be {len(found)} images of"
                raise DatasetError(f"{file} names {entry}, which {problem} {self.folder}")
            if found[0] in chosen:
                raise DatasetError(f"{file} names {entry} twice")
            chosen += found
        return replace(self, pairs=tuple(sorted(chosen, key=lambda pair: pair.name)))


@dataclass(frozen=True)
class Split:
    """Images to train on and to validate on."""

    training: Dataset
    validation: Dataset
    rule: str  # how it was made, for the model card
    notes: tuple[str, ...] = ()


def find_dataset(folder: Path) -> Dataset:
    """Recognise the layout of a dataset and match its images with their masks.

    Raises:
        DatasetError: the layout is unknown, or an image or a mask has no counterpart, or more than one.
    """
    if not folder.is_dir():
        raise DatasetError(f"dataset {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    layout, parts = _layout(folder)
    if layout == "DeepGlobe":
        pairs = _deepglobe(folder if _has_deepglobe(folder) else folder / "train")
    elif layout:
        pairs = [pair for part in parts for pair in _matched(*part)]
    else:
        raise DatasetError(
            f"{folder} holds no labelled images in a known layout",
            hint="expected images/ and masks/ with the same file names, img_dir/train and ann_dir/train (OpenMMLab), "
            "ID_sat.jpg beside ID_mask.png (DeepGlobe), or Train/ and Val/ (LoveDA)",
        )
    if not pairs:
        raise DatasetError(f"{folder} ({layout} layout) has no images")
    return Dataset(folder, layout, tuple(sorted(pairs, key=lambda pair: pair.name)))


def _layout(folder: Path) -> tuple[str, list[Part]]:
    """The layout of a folder (empty: unknown), and where its images and masks are, by what lies in it.

    ``{Train,Val}/{Urban,Rural}/{images_png,masks_png}`` or one of the two parts; ``{img,ann}_dir/{train,val}`` or
    ADE20K's names; ``images/NAME.*`` and ``masks/NAME.*``, also one level down; ``ID_sat.jpg`` beside ``ID_mask.png``.
    """

    def has_loveda(place: Path) -> bool:
        return any((place / kind / "images_png").is_dir() for kind in _LOVEDA_PLACES)

    tops = [(folder / part, f"{part}/", part) for part in ("Train", "Val") if has_loveda(folder / part)]
    if tops or has_loveda(folder):
        return "LoveDA", [
            (top / kind / "images_png", top / kind / "masks_png", f"{prefix}{kind}/", scene or kind)
            for top, prefix, scene in tops or [(folder, "", "")]
            for kind in _LOVEDA_PLACES
            if (top / kind).is_dir()
        ]
    if not (folder / "masks").is_dir() and (parts := _openmmlab(folder)):
        return "OpenMMLab", parts
    if (folder / "images").is_dir():
        return "folder pair", [(folder / "images", folder / "masks", "", "")]
    below = [place for place in sorted(folder.iterdir()) if not place.name.startswith(".")]
    below = [place for place in below if (place / "images").is_dir() and (place / "masks").is_dir()]
    if below:
        return "folder pair", [(it / "images", it / "masks", f"{it.name}/", it.name) for it in below]
    return "DeepGlobe" if _has_deepglobe(folder) or _has_deepglobe(folder / "train") else "", []


def split_dataset(
    dataset: Dataset,
    *,
    training_scenes: Sequence[str] = (),
    validation_scenes: Sequence[str] = (),
    training_list: Path | None = None,
    validation_list: Path | None = None,
) -> Split:
    """Divide a dataset by scenes, by text files, or by its own lists or folders.

    If scenes or a list are given for one side only, the other side is the rest. If none are given: ``train.txt`` and
    ``val.txt`` in the folder, or its subfolders ``train`` and ``val`` (LoveDA: ``Train`` and ``Val``).

    Raises:
        DatasetError: no split is known, one side is empty, or an image is on both sides.
    """
    if (training_scenes and training_list) or (validation_scenes and validation_list):
        raise DatasetError(
            "one side of the split is given by scenes and by a list",
            hint="give --train-scenes or --train-list, --val-scenes or --val-list",
        )
    sides: dict[str, Dataset] = {}
    rules = []
    for side, scenes, file in (
        ("training", training_scenes, training_list),
        ("validation", validation_scenes, validation_list),
    ):
        if scenes:
            sides[side] = dataset.of_scenes(scenes)
            rules.append(f"{side} by scene {listed(sorted(scenes), 12)}")
        elif file:
            sides[side] = dataset.of_list(file)
            rules.append(f"{side} by {_list_named(file, sides[side])}")
    if not sides:
        return _own_split(dataset)
    taken = {pair for side in sides.values() for pair in side}
    rest = replace(dataset, pairs=tuple(pair for pair in dataset if pair not in taken))
    training, validation = sides.get("training", rest), sides.get("validation", rest)
    for name, chosen in (("training", training), ("validation", validation)):
        if not len(chosen):
            raise DatasetError(f"the split leaves nothing for {name}: all {chosen.folder} images are on the other side")
    if both := sorted({pair.name for pair in training} & {pair.name for pair in validation}):
        raise DatasetError(f"{len(both)} images are in training and in validation: {listed(both)}")
    notes: tuple[str, ...] = ()
    if shared := sorted(set(training.scenes) & set(validation.scenes)):
        which = f"the scene{'s' if len(shared) > 1 else ''} {listed(shared)}"
        notes = (f"training and validation share {which}; where parts of a scene touch, the score is too high",)
    return Split(training, validation, "; ".join(rules), notes)


def _list_named(file: Path, chosen: Dataset) -> str:
    """A name for a list. One from a pipe (``--val-list <(...)``) has none and is described by its content."""
    if file.is_file() and file.parts[:2] not in (("/", "dev"), ("/", "proc")):
        return f"list {file.name}"
    names = [pair.name for pair in chosen]
    digest = hashlib.sha256("".join(f"{name}\n" for name in names).encode(errors="surrogateescape")).hexdigest()
    return f"a list of {len(names)} images: {listed(names, 12)} (SHA-256 of the names, one a line: {digest})"


def _own_split(dataset: Dataset) -> Split:
    lists = dataset.folder / "train.txt", dataset.folder / "val.txt"
    if all(file.is_file() for file in lists):
        split = split_dataset(dataset, training_list=lists[0], validation_list=lists[1])
        return replace(split, rule="train.txt and val.txt of the dataset")
    named = {scene.lower(): scene for scene in dataset.scenes}
    training = next((named[name] for name in _TRAINING_NAMES if name in named), None)
    validation = next((named[name] for name in _VALIDATION_NAMES if name in named), None)
    if training and validation:
        rule = f"folders {training} and {validation}"
        return Split(dataset.of_scenes([training]), dataset.of_scenes([validation]), rule)
    raise DatasetError(
        f"{dataset.folder} has no split into training and validation",
        hint=f"name whole scenes (--val-scenes; there are {listed(dataset.scenes, 12)}), give text files "
        "(--train-list, --val-list), or put train.txt and val.txt into the folder",
    )


def _matched(images: Path, masks: Path, prefix: str, scene: str) -> list[Pair]:
    """Pairs of two folders by stem."""
    if not masks.is_dir():
        raise DatasetError(f"{images} has no folder {masks.name}/ beside it")
    by_stem, mask_by_stem = _by_stem(images, IMAGE_SUFFIXES), _by_stem(masks, MASK_SUFFIXES)
    if by_stem.keys() != mask_by_stem.keys():
        bare, mask_bare = _without_ending(by_stem), _without_ending(mask_by_stem)
        ways = (bare, mask_bare), (by_stem, mask_bare), (bare, mask_by_stem)
        by_stem, mask_by_stem = next((way for way in ways if way[0].keys() == way[1].keys()), (by_stem, mask_by_stem))
    _require_counterparts(by_stem.keys(), mask_by_stem.keys(), images, masks)
    return [
        Pair(f"{prefix}{stem}", scene or stem.split("_", 1)[0], image, mask_by_stem[stem])
        for stem, image in by_stem.items()
    ]


def _without_ending(by_stem: dict[str, Path]) -> dict[str, Path]:
    """Files by their stems without the ending that all of them share, from an underscore on: ``_leftImg8bit``."""
    shared = os.path.commonprefix([stem[::-1] for stem in by_stem])[::-1]  # noqa: RUF071 - of names, not of paths
    ending = shared[shared.find("_") :] if "_" in shared else ""
    if len(by_stem) < 2 or not re.search("[A-Za-z]{3}", ending):  # numbers and letters tell images apart
        return by_stem
    return {stem.removesuffix(ending): path for stem, path in by_stem.items()}


def _openmmlab(folder: Path) -> list[Part]:
    for images, masks in ((folder / one, folder / other) for one, other in _OPENMMLAB):
        if images.is_dir() and masks.is_dir():
            names = sorted(part.name for part in images.iterdir() if part.is_dir() and not part.name.startswith("."))
            if not names:
                return [(images, masks, "", "")]
            return [
                (images / name, masks / name, f"{name}/", name)
                for name in names
                if (masks / name).is_dir() or not name.lower().startswith("test")
            ]
    return []


def _deepglobe(folder: Path) -> list[Pair]:
    images = _by_stem(folder, IMAGE_SUFFIXES, "_sat")
    masks = _by_stem(folder, MASK_SUFFIXES, "_mask")
    _require_counterparts(images.keys(), masks.keys(), folder, folder)
    return [Pair(name, name, image, masks[name]) for name, image in images.items()]


def _has_deepglobe(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*_sat.*"))


def _by_stem(folder: Path, suffixes: tuple[str, ...], ending: str = "") -> dict[str, Path]:
    """Files whose stem has this ending, by the stem without it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{ending}.*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        name = path.stem.removesuffix(ending)
        if name in found:
            raise DatasetError(f"{folder} holds both {found[name].name} and {path.name}")
        found[name] = path
    return found


def _require_counterparts(images: Iterable[str], masks: Iterable[str], images_in: Path, masks_in: Path) -> None:
    image_names, mask_names = set(images), set(masks)
    if lonely := sorted(image_names - mask_names):
        problem = f"images in {images_in} have no mask in {masks_in}: {listed(lonely)}"
        hint = f"a mask has its image's name and ends in {', '.join(MASK_SUFFIXES)}"
        raise DatasetError(f"{len(lonely)} of {len(image_names)} {problem}", hint=hint)
    if lonely := sorted(mask_names - image_names):
        problem = f"masks in {masks_in} have no image in {images_in}: {listed(lonely)}"
        raise DatasetError(f"{len(lonely)} of {len(mask_names)} {problem}")


def listed(names: Sequence[str], shown: int = 5) -> str:
    """Names with commas; after the first ones, how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def read_list(file: Path) -> list[str]:
    """The lines of a text file that names images, without empty lines and without what follows ``#``."""
    try:
        text = read_small(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DatasetError(f"list {file} cannot be read: {reason}") from None
    entries = [entry for line in text.splitlines() if (entry := line.partition("#")[0].strip())]
    if not entries:
        raise DatasetError(f"list {file} names no image")
    return entries
