"""Label schemas: the classes of a land-cover map, their colours, and how masks encode them.

A *label* is the index of a class in its schema, 0 .. K-1; 255 is "no label" everywhere. A *mask* is what a dataset
ships: RGB colours or index values, which a schema translates to labels. Maps, legends and reports show *display*
colours. Built in: ``deepglobe`` (Demir et al., CVPRW 2018), ``loveda`` (Wang et al., NeurIPS D&B 2021), ``dubai``
(MBRSC / Humans in the Loop, CC0). docs/getting-started.md shows a schema of one's own, a TOML file.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cdkd_edge.core.errors import SchemaError
from cdkd_edge.core.files import converted, read_toml

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NO_LABEL = 255  # label of pixels that have none; also the nodata value of every label map

MAX_CLASSES = NO_LABEL  # labels are uint8 and 255 is taken
MAX_NAME = 200  # characters of a name: names stand in tables, legends and pictures

RGB = tuple[int, int, int]


class Palette(str, enum.Enum):
    """Which colours of its schema a map shows."""

    DISPLAY = "display"
    DATASET = "dataset"  # those of the dataset's masks


@dataclass(frozen=True)
class LandCoverClass:
    """One class of a schema."""

    name: str
    color: RGB  # in colour-coded masks
    value: int  # in index masks
    display: RGB | None = None  # on maps, legends and reports; None: ``color``

    @property
    def shown(self) -> RGB:
        """The colour on maps, legends and reports."""
        return self.display or self.color


@dataclass(frozen=True)
class LabelSchema:
    """An ordered set of classes and the mask colours and values that mean "no label"."""

    name: str
    classes: tuple[LandCoverClass, ...]
    ignore_colors: tuple[RGB, ...] = ()
    ignore_values: tuple[int, ...] = ()
    binarize_colors: bool = False  # threshold each channel at 128 first: DeepGlobe's masks are not exactly 0 or 255

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise SchemaError(f"schema {self.name!r} has {len(self.classes)} classes; 1 to {MAX_CLASSES} are possible")
        _require_unique(self.name, "class name", [c.name for c in self.classes])
        _require_unique(self.name, "mask value", [*(c.value for c in self.classes), *self.ignore_values])
        _require_unique(self.name, "color", [*(c.color for c in self.classes), *self.ignore_colors])
        _require_unique(self.name, "display color", [c.shown for c in self.classes])

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(c.name for c in self.classes)

    @property
    def numbered(self) -> bool:
        """Whether its classes are mere numbers (:func:`numbered_schema`)."""
        return nameless(self.class_names)

    def to_document(self) -> dict[str, Any]:
        """The schema as plain data, the inverse of :func:`schema_from_document`."""
        return {
            "name": self.name,
            "classes": [
                {"name": c.name, "color": list(c.color), "value": c.value}
                | ({"display": list(c.display)} if c.display else {})
                for c in self.classes
            ],
            "ignore_colors": [list(color) for color in self.ignore_colors],
            "ignore_values": list(self.ignore_values),
            "binarize_colors": self.binarize_colors,
        }

    def in_palette(self, palette: Palette) -> LabelSchema:
        """The same schema, to be shown in these colours."""
        if palette is Palette.DISPLAY:
            return self
        return replace(self, classes=tuple(replace(c, display=c.color) for c in self.classes))

    def palette(self) -> npt.NDArray[np.uint8]:
        """The colours of a map by label, uint8 ``[256, 3]``; labels without a class are black."""
        import numpy as np

        table = np.zeros((256, 3), np.uint8)
        for label, cls in enumerate(self.classes):
            table[label] = cls.shown
        return table

    def encode(
        self, mask: npt.NDArray[np.uint8], source: str = "mask", *, strict: bool = True
    ) -> npt.NDArray[np.uint8]:
        """Turn a dataset's mask into labels, uint8 ``[H, W]``; 255 where the schema says "ignore".

        Args:
            mask: uint8, ``[H, W, 3]`` RGB colours or ``[H, W]`` index values.
            source: what to call the mask in an error message.
            strict: False: a colour or value that the schema does not know becomes "no label".

        Raises:
            SchemaError: the mask holds a colour or value that the schema does not know, or has another type or shape.
        """
        import numpy as np

        if mask.dtype != np.uint8:
            raise SchemaError(f"{source} is {mask.dtype}; expected uint8")
        if mask.ndim == 2:
            known: dict[Any, int] = {c.value: label for label, c in enumerate(self.classes)}
            known |= dict.fromkeys(self.ignore_values, NO_LABEL)
            lookup = np.full(256, -1, np.int16)
            lookup[[*known]] = [*known.values()]
            labels = lookup[mask]
        elif mask.ndim == 3 and mask.shape[2] == 3:
            known = {c.color: label for label, c in enumerate(self.classes)}
            known |= dict.fromkeys(self.ignore_colors, NO_LABEL)
            if self.binarize_colors:
                mask = np.where(mask >= 128, 255, 0).astype(np.uint8)
            codes = mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]
            labels = np.full(codes.shape, -1, np.int16)
            for (red, green, blue), label in known.items():
                labels[codes == red << 16 | green << 8 | blue] = label
        else:
            raise SchemaError(f"{source} has shape {mask.shape}; expected [H, W] or [H, W, 3]")
        if strict and (labels < 0).any():
            wrong = labels < 0
            first = mask[wrong][0].tolist()
            found, listed, more = f"value {first}", sorted(known), ""
            if mask.ndim == 3:
                found, listed = f"color {tuple(first)}", [*known]
                more = "; a mask must be stored without loss, not as JPEG"
            raise SchemaError(
                f"{source} holds the {found}, which schema {self.name!r} does not define "
                f"({np.count_nonzero(wrong)} of {wrong.size} are not of the schema)",
                hint=f"it defines {', '.join(map(str, listed))}{more}",
            )
        return labels.astype(np.uint8)  # -1 becomes 255


NAME_THEM = "the classes have no names; export --schema gives them (deepglobe, loveda, dubai, or a .toml file)"


def nameless(names: Sequence[str]) -> bool:
    """Whether class names are mere numbers (:func:`numbered_schema`)."""
    return list(names) == [f"class_{index}" for index in range(len(names))]


def load_schema(name_or_path: str | Path) -> LabelSchema:
    """A built-in schema by name, or a user's schema from a ``.toml`` file; SchemaError if it is neither."""
    name = str(name_or_path)
    if name in BUILTIN_SCHEMAS:
        return BUILTIN_SCHEMAS[name]
    if not name.endswith(".toml"):
        hint = f"use one of {', '.join(BUILTIN_SCHEMAS)}, or the path of a .toml file"
        raise SchemaError(f"unknown label schema {name!r}", hint=hint)
    try:
        document = read_toml(Path(name))
    except FileNotFoundError:
        raise SchemaError(f"label schema {name} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SchemaError(f"label schema {name} cannot be read: {reason}") from None
    return schema_from_document(document, source=name)


def schema_of_lists(name: str, class_names: object, colors: object, count: int) -> LabelSchema:
    """A schema of ``count`` classes from a list of names and one of RGB colours (None: those of numbered classes).

    Raises:
        SchemaError: these are not such lists, have another length, or hold something twice.
    """
    if colors is None:
        colors = [cls.color for cls in numbered_schema(count).classes]
    for what, part in (("class names", class_names), ("colours", colors)):
        if not isinstance(part, (list, tuple)) or len(part) != count:
            found = f"{len(part)} {what}" if isinstance(part, (list, tuple)) else f"no list of {what}"
            raise SchemaError(f"{found} for {count} classes")
    pairs = zip(class_names, colors, strict=True)  # type: ignore[call-overload]
    return schema_from_document({"name": name, "classes": [{"name": n, "color": c} for n, c in pairs]}, source=name)


def numbered_schema(count: int) -> LabelSchema:
    """Classes ``class_0 .. class_{count-1}`` in well-separated colours, for checkpoints without class names."""
    import colorsys

    classes = []
    for index in range(count):
        # The golden ratio keeps hues apart for any count; three brightness steps tell neighbours apart.
        channels = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.65, 0.95 - 0.2 * (index % 3))
        red, green, blue = (round(255 * channel) for channel in channels)
        classes.append(LandCoverClass(f"class_{index}", (red, green, blue), index))
    return LabelSchema(f"numbered-{count}", tuple(classes))


@functools.cache
def _document_type() -> type[Any]:
    """The type of a schema's document; made when needed, so that the command line starts without msgspec."""
    import msgspec

    byte: Any = Annotated[int, msgspec.Meta(ge=0, le=255)]
    rgb: Any = tuple[byte, byte, byte]
    members: list[Any] = [("name", str), ("color", rgb), ("value", byte | None, None), ("display", rgb | None, None)]
    table: Any = msgspec.defstruct("ClassTable", members, forbid_unknown_fields=True)
    fields: list[Any] = [
        ("classes", list[table]),
        ("name", str | None, None),
        ("ignore_colors", list[rgb], []),
        ("ignore_values", list[byte], []),
        ("binarize_colors", bool, False),
    ]
    return msgspec.defstruct("SchemaDocument", fields, forbid_unknown_fields=True)


def schema_from_document(document: Any, source: str) -> LabelSchema:
    """A schema from parsed TOML or JSON, strictly checked.

    Classes without display colours that have the names and mask colours of a built-in schema get that one's: manifests
    and checkpoints were written before there were display colours.

    Raises:
        SchemaError: with ``source`` and the place that is wrong.
    """
    try:
        read = converted(document, _document_type())
    except ValueError as error:
        raise SchemaError(f"{source}: {error}") from None
    name = Path(source).stem if read.name is None else read.name
    names = {"name": read.name or "-", **{f"classes[{label}].name": c.name for label, c in enumerate(read.classes)}}
    for where, text in names.items():
        if not text.strip() or not text.isprintable() or len(text) > MAX_NAME:
            raise SchemaError(f"{source}: {where}: expected 1 to {MAX_NAME} printable characters")
    if len(read.classes) > MAX_CLASSES:  # before their default values run over
        raise SchemaError(f"{source} has {len(read.classes)} classes; 1 to {MAX_CLASSES} are possible")
    classes = tuple(
        LandCoverClass(c.name, c.color, label if c.value is None else c.value, c.display)
        for label, c in enumerate(read.classes)
    )
    ignored = tuple(read.ignore_colors), tuple(read.ignore_values)
    return LabelSchema(name, _displayed(classes), *ignored, read.binarize_colors)


def _displayed(classes: tuple[LandCoverClass, ...]) -> tuple[LandCoverClass, ...]:
    """Classes with the display colours of the built-in schema that has the same ones, if they have none."""
    if any(c.display for c in classes):
        return classes
    for schema in BUILTIN_SCHEMAS.values():
        if [(c.name, c.color) for c in classes] == [(c.name, c.color) for c in schema.classes]:
            return tuple(replace(c, display=known.display) for c, known in zip(classes, schema.classes, strict=True))
    return classes


def _require_unique(schema: str, what: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise SchemaError(f"schema {schema!r} uses the {what} {value!r} twice")
        seen.add(value)


_RED, _OCHRE, _GREY, _DARK_GREEN, _BLUE = (180, 66, 86), (237, 188, 67), (164, 164, 164), (2, 77, 0), (39, 132, 228)
_LIGHT_GREEN, _OLIVE, _WHITE = (175, 205, 124), (99, 131, 33), (242, 242, 242)
_DISPLAY: dict[str, RGB] = {
    "building": _RED, "urban": _RED, "road": _GREY, "water": _BLUE, "land": _OCHRE, "barren": _OCHRE,
    "vegetation": _DARK_GREEN, "forest": _DARK_GREEN, "rangeland": _OLIVE, "agriculture": _LIGHT_GREEN,
    "background": _WHITE,
}  # fmt: skip
"""Display colours of the built-in schemas, told apart with any colour vision (tests/core/test_labels.py)."""


def _classes(colors: dict[str, RGB], first_value: int = 0) -> tuple[LandCoverClass, ...]:
    """The classes of a built-in schema, by name and mask colour; values count from ``first_value``."""
    return tuple(LandCoverClass(n, c, value, _DISPLAY[n]) for value, (n, c) in enumerate(colors.items(), first_value))


_DEEPGLOBE = _classes({
    "urban": (0, 255, 255), "agriculture": (255, 255, 0), "rangeland": (255, 0, 255), "forest": (0, 255, 0),
    "water": (0, 0, 255), "barren": (255, 255, 255),
})  # fmt: skip
_LOVEDA = _classes({
    "background": (255, 255, 255), "building": (255, 0, 0), "road": (255, 255, 0), "water": (0, 0, 255),
    "barren": (159, 129, 183), "forest": (0, 255, 0), "agriculture": (255, 195, 128),
}, first_value=1)  # fmt: skip
_DUBAI = _classes({
    "building": (60, 16, 152), "land": (132, 41, 246), "road": (110, 193, 228), "vegetation": (254, 221, 58),
    "water": (226, 169, 41),
})  # fmt: skip

BUILTIN_SCHEMAS: dict[str, LabelSchema] = {
    "deepglobe": LabelSchema("deepglobe", _DEEPGLOBE, ((0, 0, 0),), (NO_LABEL,), binarize_colors=True),
    "loveda": LabelSchema("loveda", _LOVEDA, ignore_values=(0,)),
    "dubai": LabelSchema("dubai", _DUBAI, ((155, 155, 155), (0, 0, 0)), (NO_LABEL,)),
}
