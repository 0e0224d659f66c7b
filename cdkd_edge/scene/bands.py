"""Which bands of a file are red, green and blue, and which of its pixels have data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp, MaskFlags

from cdkd_edge.errors import SceneError

Bands = tuple[int, int, int]

_RGB = ("red", "green", "blue")
_NAMES = (*_RGB, "nir")
"""Band names (GDAL's descriptions) that are understood. Others, "B4" say, mean another colour on each satellite."""
_NOTHING_SAID = ("undefined", "gray", "alpha")
"""Colour tags that do not tell one band from another: GDAL tags the first band of a file without tags gray."""
_SHOWN = 8


def choose_bands(dataset: Any, path: object, asked: Sequence[int] | None) -> tuple[Bands, str | None]:
    """Red, green and blue of an open raster, 1-based.

    In this order: as asked; by colour tags and band names; three untagged bands are red, green, blue, and four are
    blue, green, red, near infrared, as upstream takes them. Bands tagged alpha do not count.

    Returns:
        The bands, and a sentence on how they were chosen unless red, green and blue are tagged as the first three.

    Raises:
        SceneError: the file has no bands that can be used, or does not tell which they are.
    """
    count = dataset.count
    if count == 0:
        raise SceneError(
            f"{path} holds no bands" + (" of its own, only subdatasets" if dataset.subdatasets else ""),
            hint=f"name one, e.g. {dataset.subdatasets[0]}" if dataset.subdatasets else None,
        )
    if asked is not None:
        if len(asked) != 3 or not all(1 <= band <= count for band in asked):
            shown = ",".join(map(str, asked))
            raise SceneError(f"{path} has bands 1..{count}; --bands {shown} does not name three of them")
        _require_real(dataset, path, asked)
        return (asked[0], asked[1], asked[2]), None
    _require_real(dataset, path, range(1, count + 1))
    tags, names = _tags(dataset), _names(dataset)
    if any(name in _NAMES and tag in _NAMES and name != tag for tag, name in zip(tags, names, strict=True)):
        choices = [f"--bands {','.join(map(str, found))}" for found in map(_first_of_each, (names, tags)) if found]
        raise SceneError(
            f"{path}: the bands are named {_listed(names)}, and tagged {_listed(tags)}",
            hint=f"say which is right: {' or '.join(choices) or '--bands RED,GREEN,BLUE'}",
        )
    known = [name if tag in _NOTHING_SAID and name in _NAMES else tag for tag, name in zip(tags, names, strict=True)]
    if found := _first_of_each(known):
        several = any(known.count(color) > 1 for color in _RGB)
        if found == (1, 2, 3) and tags[:3] == list(_RGB) and not several:
            return found, None
        how = "tagged" if _first_of_each(tags) else "named"
        text = f"bands {','.join(map(str, found))} are {how} red, green, blue"
        return found, text + (", the first of several" if several else "")
    plain = [band for band, color in enumerate(known, 1) if color != "alpha"]
    if any(color not in _NOTHING_SAID for color in known):
        _refuse(path, known, dataset)
    called = f" ({', '.join(names)})" if all(names) else ""
    if len(plain) == 3:
        shown = ",".join(map(str, plain))
        text = f"bands {shown} without color tags{called} taken as red, green, blue (else: --bands)"
        return (plain[0], plain[1], plain[2]), text
    if len(plain) == 4:
        text = f"4 bands without color tags{called} taken as B, G, R, NIR, as upstream does (else: --bands)"
        return (plain[2], plain[1], plain[0]), text
    raise SceneError(
        f"{path} has {count} band{'s' if count > 1 else ''}{called} and no color tags; red, green, blue are needed",
        hint="say which they are, e.g. --bands 3,2,1" if len(plain) > 3 else "a grey image works with --bands 1,1,1",
    )


class Validity:
    """Which pixels of an open raster have data.

    Those have none that hold nodata in all bands used that have a nodata value, that the file's mask leaves out, or
    that are fully transparent in a band tagged alpha, whichever band that is; a faint pixel is there. Other bands say
    nothing: infrared that is 0 is dark. (GDAL's own mask, and rasterio's, ask all bands for nodata, and take alpha
    only as the last of two or four, and not of floats.)

    Args:
        dataset: the raster.
        bands: those used, 1-based.
    """

    def __init__(self, dataset: Any, bands: Sequence[int]) -> None:
        flags = dataset.mask_flag_enums
        self.masked = tuple(
            band for band in sorted(set(bands)) if not {MaskFlags.all_valid, MaskFlags.alpha} & set(flags[band - 1])
        )
        """Bands whose nodata or mask counts."""
        if self.masked and MaskFlags.per_dataset in flags[self.masked[0] - 1]:
            self.masked = self.masked[:1]
        tagged = enumerate(zip(_tags(dataset), _names(dataset), strict=True), 1)
        self.alpha = tuple(
            band for band, (tag, name) in tagged if tag == "alpha" and name not in _NAMES and band not in bands
        )
        """Bands of transparency."""

    def __bool__(self) -> bool:
        return bool(self.masked or self.alpha)

    def read(self, dataset: Any, **where: Any) -> npt.NDArray[np.bool_] | None:
        """Validity of a part of the raster, ``[h, w]``; None: every pixel is valid.

        Args:
            dataset: the raster.
            where: ``window`` and ``out_shape`` (rows, columns), as rasterio takes them.
        """
        valid: npt.NDArray[np.bool_] | None = None
        for band in self.masked:
            mask = dataset.read_masks(band, **where) != 0
            valid = mask if valid is None else np.logical_or(valid, mask, out=valid)
        for band in self.alpha:
            opaque = dataset.read(band, **where) > 0
            valid = opaque if valid is None else np.logical_and(valid, opaque, out=valid)
        return valid


def _tags(dataset: Any) -> list[str]:
    return [color.name for color in dataset.colorinterp]


def _names(dataset: Any) -> list[str]:
    return [(name or "").strip().lower() for name in dataset.descriptions]


def _first_of_each(colors: Sequence[str]) -> Bands | None:
    if not all(color in colors for color in _RGB):
        return None
    return colors.index("red") + 1, colors.index("green") + 1, colors.index("blue") + 1


def _listed(colors: Sequence[str]) -> str:
    shown = [f"{band} {color or '-'}" for band, color in enumerate(colors[:_SHOWN], 1)]
    return ", ".join(shown) + (", ..." if len(colors) > _SHOWN else "")


def _refuse(path: object, known: Sequence[str], dataset: Any) -> None:
    """Some bands are known, and not to be red, green and blue."""
    if ColorInterp.palette in dataset.colorinterp:
        raise SceneError(f"{path} is a paletted image", hint="expand it: gdal_translate -expand rgb IN OUT")
    missing = [color for color in _RGB if color not in known]
    if len(known) < 3:
        hint = "a grey image works with --bands 1,1,1"
    elif len(known) == 3:
        hint = "--bands 1,2,3 takes them as they lie"
    else:
        there = {color: known.index(color) + 1 for color in _RGB if color in known}
        rest = iter([band for band, color in enumerate(known, 1) if color in _NOTHING_SAID] or [1, 2, 3])
        guess = [str(there.get(color) or next(rest, 1)) for color in _RGB]
        hint = f"say which bands to take for them, e.g. --bands {','.join(guess)}"
    raise SceneError(f"{path} has no band tagged {' or '.join(missing)}; it has {_listed(known)}", hint=hint)


def _require_real(dataset: Any, path: object, bands: Sequence[int]) -> None:
    if any(dataset.dtypes[band - 1].startswith("complex") for band in bands):  # also complex_int16, unknown to NumPy
        raise SceneError(f"{path} holds complex values, not an image")
