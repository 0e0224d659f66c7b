"""Label schemas: the built-in ones, masks to labels, TOML files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cdkd_edge.cli.segment import class_rows
from cdkd_edge.core.errors import SchemaError
from cdkd_edge.core.labels import (
    BUILTIN_SCHEMAS,
    NO_LABEL,
    LabelSchema,
    LandCoverClass,
    Palette,
    load_schema,
    numbered_schema,
    schema_from_document,
)


def mask(rows):
    return np.array(rows, np.uint8)


# --- built in -------------------------------------------------------------------------------------


def test_the_built_in_schemas():
    assert list(BUILTIN_SCHEMAS) == ["deepglobe", "loveda", "dubai"]
    assert load_schema("deepglobe").class_names == (
        "urban", "agriculture", "rangeland", "forest", "water", "barren",
    )  # fmt: skip
    assert load_schema("loveda").class_names == (
        "background", "building", "road", "water", "barren", "forest", "agriculture",
    )  # fmt: skip
    assert load_schema("dubai").class_names == ("building", "land", "road", "vegetation", "water")


@pytest.mark.parametrize("name", BUILTIN_SCHEMAS)
def test_a_built_in_schema_survives_its_document(name):
    schema = load_schema(name)
    assert schema.name == name
    assert schema_from_document(schema.to_document(), source="x") == schema


def test_deepglobe_masks():
    colors = [(0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    assert load_schema("deepglobe").encode(mask([colors])).tolist() == [[0, 1, 2, 3, 4, 5, NO_LABEL]]
    blurred = [[(3, 250, 131), (128, 128, 127), (127, 0, 5)]]  # JPEG-like; 128 is the first that counts as on
    assert load_schema("deepglobe").encode(mask(blurred)).tolist() == [[0, 1, NO_LABEL]]


def test_loveda_masks():
    labels = load_schema("loveda").encode(mask([[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert labels.tolist() == [[NO_LABEL, 0, 1, 2], [3, 4, 5, 6]]
    assert labels.dtype == np.uint8


def test_dubai_masks():
    colors = [(60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41), (155, 155, 155)]
    assert load_schema("dubai").encode(mask([colors])).tolist() == [[0, 1, 2, 3, 4, NO_LABEL]]
    assert load_schema("dubai").encode(mask([[0, 4, 255]])).tolist() == [[0, 4, NO_LABEL]]


# --- encode ---------------------------------------------------------------------------------------

SCHEMA = LabelSchema(
    "toy",
    (LandCoverClass("a", (10, 20, 30), 7), LandCoverClass("b", (10, 20, 31), 2)),
    ignore_colors=((1, 1, 1),),
    ignore_values=(0, 9),
)


def test_values_and_colors_become_labels():
    assert SCHEMA.encode(mask([[7, 2], [0, 9]])).tolist() == [[0, 1], [NO_LABEL, NO_LABEL]]
    assert SCHEMA.encode(mask([[(10, 20, 31), (10, 20, 30), (1, 1, 1)]])).tolist() == [[1, 0, NO_LABEL]]
    assert SCHEMA.encode(np.zeros((0, 5), np.uint8)).shape == (0, 5)


def test_an_unknown_color_is_named_with_its_source():
    with pytest.raises(SchemaError, match=r"tile7\.png holds the color \(30, 20, 10\), which schema 'toy' does not"):
        SCHEMA.encode(mask([[(10, 20, 30), (30, 20, 10)]]), source="tile7.png")


def test_an_unknown_value_is_named_with_its_source():
    with pytest.raises(SchemaError, match=r"tile7\.png holds the value 1, which schema 'toy' does not"):
        SCHEMA.encode(mask([[7, 1]]), source="tile7.png")


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1), (4, 4, 4), (1, 4, 4, 3)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(SchemaError, match="expected"):
        SCHEMA.encode(np.full(shape, 7, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, bool])
def test_a_mask_of_another_type_is_refused(dtype):
    with pytest.raises(SchemaError, match=np.dtype(dtype).name):
        SCHEMA.encode(np.full((2, 2), 1, dtype))


def test_the_palette_has_every_class_and_black_elsewhere():
    palette = SCHEMA.palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    assert palette[:2].tolist() == [[10, 20, 30], [10, 20, 31]]
    assert not palette[2:].any()


# --- display colours ------------------------------------------------------------------------------

VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
"""What a colour looks like, on linear RGB; Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009, severity 1."""
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colors, vision):
    """CIELAB (D65) of sRGB colours as they look."""
    rgb = np.array(colors) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.array(vision).T, 0, 1) @ np.array(TO_XYZ).T / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("name", BUILTIN_SCHEMAS)
def test_display_colors_are_told_apart_with_any_color_vision(name, vision):
    seen = lab([c.shown for c in load_schema(name).classes], VISION[vision])
    distance = np.linalg.norm(seen[:, None] - seen, axis=2) + 1000 * np.eye(len(seen))
    assert distance.min() > 22


@pytest.mark.parametrize("name", BUILTIN_SCHEMAS)
def test_display_colors_are_those_of_the_things(name):
    for cls in load_schema(name).classes:
        red, green, blue = (int(v) for v in cls.shown)
        if cls.name == "water":
            assert blue > green > red
        elif cls.name in ("vegetation", "forest", "rangeland", "agriculture"):
            assert green > max(red, blue)
        elif cls.name in ("building", "urban"):
            assert red > 2 * max(green, blue)
        elif cls.name in ("land", "barren"):
            assert red > green > blue
        else:
            assert red == green == blue


def test_the_dataset_palette_is_that_of_the_masks():
    schema = load_schema("dubai")
    assert schema.palette()[4].tolist() == list(schema.classes[4].shown) != list(schema.classes[4].color)
    masks = schema.in_palette(Palette.DATASET)
    assert masks.palette()[4].tolist() == list(schema.classes[4].color)
    assert schema.in_palette(Palette.DISPLAY) == schema
    assert schema_from_document(masks.to_document(), source="x") == masks


def test_documents_from_before_there_were_display_colors():
    """Manifests and checkpoints of the built-in schemas get theirs, all others show their mask colours."""
    document = load_schema("loveda").to_document()
    for table in document["classes"]:
        del table["display"]
    assert schema_from_document(document, source="x") == load_schema("loveda")
    document["classes"][0]["color"] = [1, 2, 3]
    assert next(c.shown for c in schema_from_document(document, source="x").classes) == (1, 2, 3)


def test_a_toml_file_may_give_display_colors(tmp_path):
    schema = load_schema(stored(tmp_path, GOOD.replace("value = 1\n", "value = 1\ndisplay = [9, 8, 7]\n")))
    assert [c.shown for c in schema.classes] == [(9, 8, 7), (0, 0, 255)]
    assert schema.encode(mask([[(255, 0, 255)]])).tolist() == [[0]]
    with pytest.raises(SchemaError, match=r"uses the display color \(0, 0, 255\) twice"):
        load_schema(stored(tmp_path, GOOD.replace("value = 1\n", "value = 1\ndisplay = [0, 0, 255]\n")))


# --- TOML -----------------------------------------------------------------------------------------

GOOD = """
name = "my-city"
ignore_colors = [[0, 0, 0]]
ignore_values = [0]
binarize_colors = true

[[classes]]
name = "Häuser"
color = [255, 0, 255]
value = 1

[[classes]]
name = "water"
color = [0, 0, 255]
value = 200
"""


def stored(tmp_path, text):
    path = tmp_path / "city.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_toml_file_is_read(tmp_path):
    expected = LabelSchema(
        "my-city",
        (LandCoverClass("Häuser", (255, 0, 255), 1), LandCoverClass("water", (0, 0, 255), 200)),
        ignore_colors=((0, 0, 0),),
        ignore_values=(0,),
        binarize_colors=True,
    )
    path = stored(tmp_path, GOOD)
    assert load_schema(path) == load_schema(str(path)) == expected
    assert len(expected) == 2


def test_defaults_of_a_toml_file(tmp_path):
    schema = load_schema(stored(tmp_path, "".join(f'[[classes]]\nname="c{i}"\ncolor=[{i},0,0]\n' for i in range(3))))
    assert schema.name == "city"
    assert [c.value for c in schema.classes] == [0, 1, 2]
    assert schema.ignore_colors == ()
    assert not schema.binarize_colors


ONE_CLASS = '[[classes]]\nname = "a"\ncolor = [1, 2, 3]\n'
MALFORMED = {
    "not TOML": ("name = ", "cannot be read"),
    "a key twice": ('name = "a"\nname = "b"\n' + ONE_CLASS, "cannot be read"),
    "too deep": ("x = " + "[" * 20000, "cannot be read"),
    "not UTF-8": (b"name = '\xff'\n", "cannot be read"),
    "nothing": ("", r"missing required field classes"),
    "no classes": ('name = "x"', r"missing required field classes"),
    "empty classes": ("classes = []", r"0 classes; 1 to 255"),
    "classes as a table": ("[classes]\na = 1", r"classes: expected array"),
    "classes as names": ('classes = ["a"]', r"classes\[0\]: expected object"),
    "unknown key": ("colours = 1\n" + ONE_CLASS, r"unknown field colours"),
    "unknown class key": (ONE_CLASS + "colour = 1", r"classes\[0\]: object contains unknown field colour"),
    "no name": ("[[classes]]\ncolor = [1, 2, 3]", r"classes\[0\]: object missing required field name"),
    "blank name": ('[[classes]]\nname = "  "\ncolor = [1, 2, 3]', r"classes\[0\]\.name: expected "),
    "name with an escape": ('[[classes]]\nname = "a\\u001b[2J"\ncolor = [1, 2, 3]', r"classes\[0\]\.name: expected "),
    "name without end": (f'[[classes]]\nname = "{"a" * 201}"\ncolor = [1, 2, 3]', r"classes\[0\]\.name: expected "),
    "channel without end": (
        f'[[classes]]\nname = "a"\ncolor = [1, 2, 0x{"F" * 5000}]',
        r"classes\[0\]\.color.*: expected ",
    ),
    "name is a number": ("[[classes]]\nname = 5\ncolor = [1, 2, 3]", r"classes\[0\]\.name: expected "),
    "no color": (ONE_CLASS + '[[classes]]\nname = "b"', r"classes\[1\]: object missing required field color"),
    "color name": ('[[classes]]\nname = "a"\ncolor = "red"', r"classes\[0\]\.color.*: expected "),
    "two channels": ('[[classes]]\nname = "a"\ncolor = [1, 2]', r"classes\[0\]\.color.*: expected "),
    "four channels": ('[[classes]]\nname = "a"\ncolor = [1, 2, 3, 4]', r"classes\[0\]\.color.*: expected "),
    "channel above 255": ('[[classes]]\nname = "a"\ncolor = [1, 2, 256]', r"classes\[0\]\.color.*: expected "),
    "negative channel": ('[[classes]]\nname = "a"\ncolor = [1, 2, -1]', r"classes\[0\]\.color.*: expected "),
    "fraction": ('[[classes]]\nname = "a"\ncolor = [1, 2, 0.5]', r"classes\[0\]\.color.*: expected "),
    "truth as a channel": ('[[classes]]\nname = "a"\ncolor = [1, 2, true]', r"classes\[0\]\.color.*: expected "),
    "value above 255": (ONE_CLASS + "value = 256", r"classes\[0\]\.value: expected int"),
    "negative value": (ONE_CLASS + "value = -1", r"classes\[0\]\.value: expected int"),
    "value as text": (ONE_CLASS + 'value = "1"', r"classes\[0\]\.value: expected int"),
    "truth as a value": (ONE_CLASS + "value = true", r"classes\[0\]\.value: expected int"),
    "same name": (ONE_CLASS + '[[classes]]\nname = "a"\ncolor = [3, 2, 1]', "uses the class name 'a' twice"),
    "same color": (ONE_CLASS + '[[classes]]\nname = "b"\ncolor = [1, 2, 3]', r"uses the color \(1, 2, 3\) twice"),
    "same value": (ONE_CLASS + '[[classes]]\nname = "b"\ncolor = [3, 2, 1]\nvalue = 0', "uses the mask value 0 twice"),
    "ignored class value": ("ignore_values = [0]\n" + ONE_CLASS, "uses the mask value 0 twice"),
    "ignored class color": ("ignore_colors = [[1, 2, 3]]\n" + ONE_CLASS, r"uses the color \(1, 2, 3\) twice"),
    "one ignored color": ("ignore_colors = [1, 2, 3]\n" + ONE_CLASS, "ignore_colors"),
    "ignored colors as text": ('ignore_colors = "black"\n' + ONE_CLASS, "ignore_colors: expected array"),
    "one ignored value": ("ignore_values = 9\n" + ONE_CLASS, "ignore_values: expected array"),
    "ignored value above 255": ("ignore_values = [300]\n" + ONE_CLASS, "ignore_values"),
    "binarize as text": ('binarize_colors = "yes"\n' + ONE_CLASS, "binarize_colors: expected bool"),
    "name of the schema": ("name = 5\n" + ONE_CLASS, "name: expected str"),
    "too many": (
        "".join(f'[[classes]]\nname="{i}"\ncolor=[{i // 256},{i % 256},0]\nvalue={i % 256}\n' for i in range(256)),
        "256 classes; 1 to 255",
    ),
}


@pytest.mark.parametrize(("text", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_say_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "city.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SchemaError, match=words) as caught:
        load_schema(path)
    assert "city" in str(caught.value)
    assert caught.value.exit_code == 4


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(SchemaError, match="unknown label schema 'deepglobo'") as caught:
        load_schema("deepglobo")
    assert "deepglobe, loveda, dubai" in caught.value.hint
    with pytest.raises(SchemaError, match="does not exist"):
        load_schema(tmp_path / "no.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(SchemaError, match="cannot be read"):
        load_schema(tmp_path / "folder.toml")


# --- numbered -------------------------------------------------------------------------------------


def test_numbered_colors_are_distinct_up_to_255():
    schema = numbered_schema(255)
    colors = np.array([c.color for c in schema.classes])
    distance = np.abs(colors[:, None] - colors).max(axis=2) + 255 * np.eye(255, dtype=int)
    assert distance.min() >= 1
    assert schema.class_names[:2] == ("class_0", "class_1")
    assert schema_from_document(schema.to_document(), source="x") == schema
    assert numbered_schema(3).classes == schema.classes[:3]  # a class keeps its colour whatever their number
    neighbours = np.abs(colors[1:16] - colors[:15]).max(axis=1)
    assert neighbours.min() >= 60


@pytest.mark.parametrize("count", [0, 256])
def test_no_class_and_too_many_are_refused(count):
    with pytest.raises(SchemaError, match="1 to 255"):
        numbered_schema(count)


@pytest.mark.parametrize(("names", "advice"), [(("class_0", "class_1"), 1), (("land", "class_1"), 0)])
def test_classes_without_names_are_told_how_to_get_some(names: tuple[str, ...], advice: int) -> None:
    areas: Any = SimpleNamespace(classes=[SimpleNamespace(name=n, pixels=2, hectares=None) for n in names], reason=None)
    assert sum("--schema" in text for _, text in class_rows(areas, 4)) == advice


def test_a_schema_is_read_no_further_than_a_schema_goes(tmp_path: Path) -> None:
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    with pytest.raises(SchemaError, match="larger than 1 MiB"):
        load_schema(tmp_path / "zero.toml")
