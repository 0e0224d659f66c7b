"""Masks as files: every way in which colours and values are stored, and none of them guessed."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from scene_helpers import write_raster

from cdkd_edge.core.errors import DatasetError, SchemaError
from cdkd_edge.core.labels import LabelSchema, LandCoverClass, Palette, load_schema
from cdkd_edge.quality.masks import HiddenLabels, open_mask, read_labels
from cdkd_edge.segmentation.geotiff import LabelMapWriter

pytestmark = pytest.mark.filterwarnings("error", "ignore::rasterio.errors.NotGeoreferencedWarning")

UInt8Array = npt.NDArray[np.uint8]

DUBAI, LOVEDA, DEEPGLOBE = load_schema("dubai"), load_schema("loveda"), load_schema("deepglobe")


def some_labels(schema: LabelSchema, height: int = 37, width: int = 53, *, missing: bool = True) -> UInt8Array:
    """Every class of a schema, and pixels without a label."""
    values = [*range(len(schema)), *([255] if missing else [])]
    labels = np.random.default_rng(0).choice(np.array(values, np.uint8), (height, width))
    labels.flat[: len(values)] = values
    return labels


def colors_of(labels: UInt8Array, schema: LabelSchema) -> UInt8Array:
    """RGB ``[H, W, 3]``; no label is the schema's first ignored colour, or black."""
    palette = schema.in_palette(Palette.DATASET).palette()
    palette[255] = schema.ignore_colors[0] if schema.ignore_colors else (0, 0, 0)
    return palette[labels]


def values_of(labels: UInt8Array, schema: LabelSchema) -> UInt8Array:
    table = np.zeros(256, np.uint8)
    table[: len(schema)] = [cls.value for cls in schema.classes]
    table[255] = schema.ignore_values[0]
    return table[labels]


def paletted(path: Path, indices: UInt8Array, palette: npt.NDArray[Any], **options: Any) -> Path:
    picture = Image.fromarray(indices, "L")
    picture.putpalette(np.asarray(palette, np.uint8).tobytes())
    picture.save(path, **options)
    return path


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("schema", [DUBAI, DEEPGLOBE], ids=lambda schema: schema.name)
def test_rgb(tmp_path: Path, schema: LabelSchema, suffix: str) -> None:
    labels = some_labels(schema)
    path = tmp_path / f"mask{suffix}"
    Image.fromarray(colors_of(labels, schema)).save(path)
    read = read_labels(path, schema)
    assert read.dtype == np.uint8
    assert (read == labels).all()


def test_where_alpha_is_0_there_is_no_label_whatever_the_colour(tmp_path: Path) -> None:
    labels = some_labels(LOVEDA, missing=False)
    alpha = np.where(np.random.default_rng(1).random(labels.shape) < 0.5, 0, 255).astype(np.uint8)
    colors = colors_of(labels, LOVEDA)
    colors[alpha == 0] = (1, 2, 3)  # not of the schema, and not seen
    Image.fromarray(np.dstack([colors, alpha])).save(tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png", LOVEDA) == np.where(alpha > 0, labels, 255)).all()
    alpha[:] = 0
    Image.fromarray(np.dstack([colors, alpha])).save(tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png", LOVEDA) == 255).all()


def test_deepglobe_is_not_exactly_black_and_white(tmp_path: Path) -> None:
    labels = some_labels(DEEPGLOBE)
    colors = colors_of(labels, DEEPGLOBE)
    rng = np.random.default_rng(2)
    colors = np.where(colors == 255, rng.integers(128, 256, colors.shape), rng.integers(0, 128, colors.shape))
    colors[0, 0], labels[0, 0] = (130, 120, 128), 2  # rangeland is magenta
    Image.fromarray(colors.astype(np.uint8)).save(tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png", DEEPGLOBE) == labels).all()


def test_an_unknown_colour_is_named_with_its_file(tmp_path: Path) -> None:
    colors = colors_of(some_labels(DUBAI), DUBAI)
    colors[20, 30] = (1, 2, 3)
    Image.fromarray(colors).save(tmp_path / "odd.png")
    with pytest.raises(
        SchemaError, match=rf"odd\.png holds the color \(1, 2, 3\).*\(1 of {colors[..., 0].size} are not"
    ) as raised:
        read_labels(tmp_path / "odd.png", DUBAI)
    assert "(60, 16, 152)" in (raised.value.hint or "")


def test_colours_that_were_a_jpeg_are_not_guessed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colors_of(some_labels(DUBAI), DUBAI)).save(buffer, "JPEG", quality=90)
    Image.open(buffer).save(tmp_path / "mask.png")
    with pytest.raises(SchemaError, match="holds the color") as raised:
        read_labels(tmp_path / "mask.png", DUBAI)
    assert "without loss" in (raised.value.hint or "")


@pytest.mark.parametrize("by", ["color", "value", "palette"])
def test_every_strip_of_a_tall_mask_is_looked_at(tmp_path: Path, by: str) -> None:
    labels = some_labels(DUBAI, 2500, 7)
    path = tmp_path / "tall.png"
    if by == "color":
        colors = colors_of(labels, DUBAI)
        Image.fromarray(colors).save(path)
        assert (read_labels(path, DUBAI) == labels).all()
        colors[-1, -1] = (9, 9, 9)
        Image.fromarray(colors).save(path)
    elif by == "value":
        Image.fromarray(labels).save(path)
        assert (read_labels(path, DUBAI) == labels).all()
        labels[-1, -1] = 99
        Image.fromarray(labels).save(path)
    else:
        palette = DUBAI.in_palette(Palette.DATASET).palette()
        palette[99] = (9, 9, 9)
        paletted(path, labels, palette)
        assert (read_labels(path, DUBAI) == labels).all()
        labels[-1, -1] = 99
        paletted(path, labels, palette)
    with pytest.raises(SchemaError, match=r"tall\.png holds the (color \(9, 9, 9\)|value 99)"):
        read_labels(path, DUBAI)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [DUBAI, LOVEDA, DEEPGLOBE], ids=lambda schema: schema.name)
@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "uint32"])
def test_index_values_of_any_whole_type(tmp_path: Path, schema: LabelSchema, kind: str) -> None:
    labels = some_labels(schema)
    path = write_raster(tmp_path / "mask.tif", values_of(labels, schema).astype(kind)[None])
    assert (read_labels(path, schema) == labels).all()


@pytest.mark.parametrize(("kind", "value"), [("int16", 300), ("int16", -1), ("int32", 1 << 20), ("uint16", 65535)])
def test_values_that_no_schema_can_define(tmp_path: Path, kind: str, value: int) -> None:
    pixels = np.zeros((1, 9, 9), kind)
    pixels[0, 5, 5] = value
    path = write_raster(tmp_path / "odd.tif", pixels)
    with pytest.raises(DatasetError, match=rf"odd\.tif holds {kind} values beyond 0\.\.255"):
        read_labels(path, DUBAI)


@pytest.mark.parametrize(("kind", "nodata"), [("uint8", 7), ("uint8", 0), ("int16", -1), ("int32", -9999)])
def test_the_nodata_value_of_the_file_is_no_label(tmp_path: Path, kind: str, nodata: int) -> None:
    labels = some_labels(DUBAI, missing=False)
    pixels = labels.astype(kind)
    pixels[10:20] = nodata
    path = write_raster(tmp_path / "mask.tif", pixels[None], nodata=nodata)
    assert (read_labels(path, DUBAI) == np.where(pixels == nodata, 255, labels)).all()


def test_the_nodata_value_of_an_rgb_file_is_no_label(tmp_path: Path) -> None:
    labels = some_labels(LOVEDA)
    colors = colors_of(labels, LOVEDA)  # black, which this schema does not define, where there is no label
    path = write_raster(tmp_path / "mask.tif", colors.transpose(2, 0, 1), nodata=0, photometric="RGB")
    assert (read_labels(path, LOVEDA) == labels).all()


def test_what_the_mask_of_the_file_hides_is_no_label(tmp_path: Path) -> None:
    """A mask band inside a GeoTIFF, as `gdal_translate -mask` makes it."""
    labels = some_labels(DUBAI, missing=False)
    hidden = np.random.default_rng(6).random(labels.shape) < 0.3
    for name, pixels in (("rgb", colors_of(labels, DUBAI).transpose(2, 0, 1)), ("index", labels[None])):
        path = tmp_path / f"{name}.tif"
        pixels = np.where(hidden, 77, pixels).astype(np.uint8)
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(path, "w", driver="GTiff", height=37, width=53, count=len(pixels), dtype="uint8") as dataset,
        ):
            dataset.write(pixels)
            dataset.write_mask(~hidden)
        assert (read_labels(path, DUBAI) == np.where(hidden, 255, labels)).all()


def test_a_nodata_value_elsewhere_does_not_excuse_an_unknown_value(tmp_path: Path) -> None:
    pixels = np.zeros((1, 9, 9), np.int16)
    pixels[0, 0], pixels[0, 1] = -1, 255
    path = write_raster(tmp_path / "odd.tif", pixels, nodata=-1)
    with pytest.raises(SchemaError, match=r"odd\.tif holds the value 255"):
        read_labels(path, LabelSchema("one", (LandCoverClass("only", (1, 1, 1), 0),)))


def test_one_bit_is_enough_for_two_classes(tmp_path: Path) -> None:
    schema = LabelSchema("two", (LandCoverClass("no", (9, 9, 9), 0), LandCoverClass("yes", (8, 8, 8), 1)))
    truth = np.random.default_rng(0).random((11, 13)) < 0.5
    Image.fromarray(truth).save(tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png", schema) == truth).all()


@pytest.mark.parametrize("value", [0.5, 1.0, np.nan, np.inf, -1e30])
def test_a_float_mask_is_no_mask(tmp_path: Path, value: float) -> None:
    path = write_raster(tmp_path / "soft.tif", np.full((1, 9, 9), value, np.float32))
    with pytest.raises(DatasetError, match=r"soft\.tif holds float32"):
        read_labels(path, DUBAI)


def test_two_bands_are_neither_values_nor_colours(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "two.tif", np.zeros((2, 9, 9), np.uint8))
    with pytest.raises(DatasetError, match=r"two\.tif has 2 bands; 1 .* or 3"):
        read_labels(path, DUBAI)


def test_sixteen_bit_colours_are_not_taken(tmp_path: Path) -> None:
    colors = colors_of(some_labels(DUBAI), DUBAI).transpose(2, 0, 1).astype(np.uint16)
    for name, pixels in (("low.tif", colors), ("high.tif", colors * 257)):
        path = write_raster(tmp_path / name, pixels)
        with pytest.raises(DatasetError, match=rf"{name} holds uint16"):
            read_labels(path, DUBAI)


# --- palettes -------------------------------------------------------------------------------------


def test_a_palette_of_the_schemas_colours_is_read_by_colour(tmp_path: Path) -> None:
    labels = some_labels(LOVEDA, missing=False)
    order = np.array([3, 1, 6, 0, 5, 2, 4])  # entry 0 is label 3: values would give another map
    palette = LOVEDA.in_palette(Palette.DATASET).palette()[order]
    path = paletted(tmp_path / "mask.png", np.argsort(order).astype(np.uint8)[labels], palette)
    assert (read_labels(path, LOVEDA) == labels).all()


def test_a_ramp_of_greys_is_read_by_value(tmp_path: Path) -> None:
    labels = some_labels(LOVEDA)
    path = paletted(tmp_path / "mask.png", values_of(labels, LOVEDA), grey_palette())
    assert (read_labels(path, LOVEDA) == labels).all()


def test_the_mask_of_another_dataset_is_refused_also_where_its_values_fit(tmp_path: Path) -> None:
    path = paletted(
        tmp_path / "mask.png", some_labels(DUBAI, missing=False), DUBAI.in_palette(Palette.DATASET).palette()
    )
    with pytest.raises(SchemaError, match=r"mask\.png holds the color \(\d+, \d+, \d+\), which schema 'loveda'"):
        read_labels(path, LOVEDA)


def test_a_palette_that_is_neither_is_refused_by_its_colour(tmp_path: Path) -> None:
    palette = np.tile(np.array([[9, 8, 7]]), (256, 1))
    path = paletted(tmp_path / "odd.png", np.full((9, 9), 77, np.uint8), palette)
    with pytest.raises(SchemaError, match=r"odd\.png holds the color \(9, 8, 7\)"):
        read_labels(path, LOVEDA)


def grey_palette() -> UInt8Array:
    return np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def voc_palette() -> UInt8Array:
    """That of PASCAL VOC, which many tools give to index masks: black, dark red, dark green, ..."""
    index = np.arange(256)[:, None]
    bits = [(index >> 3 * bit + np.arange(3) & 1) << 7 - bit for bit in range(3)]
    return np.sum(bits, axis=0).astype(np.uint8)


@pytest.mark.parametrize(
    ("schema", "palette", "indices"),
    [
        (DUBAI, grey_palette(), [0]),  # only buildings; the schema ignores black
        (DUBAI, voc_palette(), [0]),
        (DEEPGLOBE, grey_palette(), [0, 1, 2, 3, 4, 5]),  # all of them nearly black
        (DEEPGLOBE, voc_palette(), [0, 2, 3, 4, 5]),  # corners of the colour cube, when binarised
    ],
)
def test_a_palette_that_can_be_taken_for_either_is_not_guessed(
    tmp_path: Path, schema: LabelSchema, palette: UInt8Array, indices: list[int]
) -> None:
    pixels = np.tile(np.array(indices, np.uint8)[:, None], (1, 9))
    path = paletted(tmp_path / "either.png", pixels, palette)
    with pytest.raises(SchemaError, match=r"either\.png has a palette") as raised:
        read_labels(path, schema)
    assert "without a palette" in (raised.value.hint or "")


def test_a_palette_of_nothing_but_an_ignored_colour_is_read_by_colour(tmp_path: Path) -> None:
    path = paletted(tmp_path / "mask.png", np.zeros((9, 9), np.uint8), np.zeros((256, 3)))
    assert (read_labels(path, DUBAI) == 255).all()
    palette = DUBAI.in_palette(Palette.DATASET).palette()[::-1].copy()  # black first, the classes at the end and unused
    assert (read_labels(paletted(tmp_path / "mask.png", np.zeros((9, 9), np.uint8), palette), DUBAI) == 255).all()


def test_palette_entries_that_no_pixel_uses_do_not_matter(tmp_path: Path) -> None:
    palette = np.random.default_rng(4).integers(0, 256, (256, 3))
    palette[[40, 41]] = DUBAI.in_palette(Palette.DATASET).palette()[[2, 4]]
    indices = np.where(np.eye(12, dtype=bool), 40, 41).astype(np.uint8)
    path = paletted(tmp_path / "mask.png", indices, palette)
    assert (read_labels(path, DUBAI) == np.where(indices == 40, 2, 4)).all()


@pytest.mark.parametrize("transparent", [{200}, {200, 201}], ids=["one", "two"])
@pytest.mark.parametrize("by", ["color", "value"])
def test_transparent_palette_entries_are_no_label(tmp_path: Path, by: str, transparent: set[int]) -> None:
    schema = LOVEDA
    labels = some_labels(schema, missing=False)
    rng = np.random.default_rng(5)
    palette = grey_palette()
    indices = labels.copy() if by == "color" else values_of(labels, schema)
    if by == "color":
        palette[: len(schema)] = schema.in_palette(Palette.DATASET).palette()[: len(schema)]
    away = rng.random(labels.shape) < 0.3
    indices[away] = rng.choice(np.array(sorted(transparent), np.uint8), int(away.sum()))
    alpha = bytes(0 if index in transparent else 255 for index in range(256))
    path = paletted(tmp_path / "mask.png", indices, palette, transparency=alpha)
    assert (read_labels(path, schema) == np.where(away, 255, labels)).all()


def test_the_nodata_value_goes_before_its_palette_colour(tmp_path: Path) -> None:
    labels = some_labels(LOVEDA, missing=False)
    labels[:5] = 3
    path = tmp_path / "mask.tif"
    write_raster(path, labels[None], nodata=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "r+") as dataset:
            dataset.write_colormap(1, {i: (*map(int, cls.color), 255) for i, cls in enumerate(LOVEDA.classes)})
    assert (read_labels(path, LOVEDA) == np.where(labels == 3, 255, labels)).all()


def test_a_palette_of_65536_colours(tmp_path: Path) -> None:
    labels = some_labels(DUBAI, missing=False)
    path = tmp_path / "mask.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=37, width=53, count=1, dtype="uint16", photometric="palette"
    ) as dataset:
        dataset.write_colormap(1, {i: (*map(int, cls.color), 255) for i, cls in enumerate(DUBAI.classes)})
        dataset.write(labels[None].astype(np.uint16))
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp == (ColorInterp.palette,)
        assert len(dataset.colormap(1)) == 65536
    assert (read_labels(path, DUBAI) == labels).all()


@pytest.mark.parametrize("schema", [DUBAI, LOVEDA, DEEPGLOBE], ids=lambda schema: schema.name)
def test_label_maps_of_this_package_are_masks(tmp_path: Path, schema: LabelSchema) -> None:
    labels = some_labels(schema, 300, 280)
    with LabelMapWriter(tmp_path / "map.tif", 300, 280, schema, {}, {}) as writer:
        writer.write_rows(labels)
    assert (read_labels(tmp_path / "map.tif", schema) == labels).all()


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("keep", [0, 20, 60, 0.5, 0.98])
def test_a_truncated_mask_is_an_error(tmp_path: Path, mode: str, keep: float) -> None:
    labels = some_labels(DUBAI, 400, 300, missing=False)
    path = tmp_path / "cut.png"
    if mode == "P":
        paletted(path, labels, DUBAI.in_palette(Palette.DATASET).palette())
    else:
        Image.fromarray(colors_of(labels, DUBAI) if mode == "RGB" else labels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep < 1 else int(keep)])
    with pytest.raises(DatasetError, match=r"cut\.png (cannot be read|is damaged)"):
        read_labels(path, DUBAI)


def test_a_mask_with_a_flipped_byte_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "flipped.png"
    Image.fromarray(some_labels(DUBAI, 400, 300, missing=False)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"flipped\.png is damaged"):
        read_labels(path, DUBAI)


def test_classes_behind_transparency_are_counted(tmp_path: Path) -> None:
    labels = some_labels(DUBAI, missing=False)
    path = paletted(tmp_path / "mask.png", labels, DUBAI.in_palette(Palette.DATASET).palette(), transparency=2)
    lost = HiddenLabels()
    assert (read_labels(path, DUBAI, lost) == np.where(labels == 2, 255, labels)).all()
    (note,) = lost.notes()
    assert f"nodata value 2 of 1 mask takes the label from {(labels == 2).sum()} pixels of road" in note


@pytest.mark.parametrize(("dtype", "nodata"), [("int16", -9999), ("uint16", 256), ("uint16", 65535), ("int16", -1)])
def test_a_nodata_value_that_is_no_class_takes_nothing(tmp_path: Path, dtype: str, nodata: int) -> None:
    labels = some_labels(DUBAI)
    values = np.where(labels == 255, np.array(nodata, dtype), labels.astype(dtype))
    path = write_raster(tmp_path / "mask.tif", values[None], nodata=nodata)
    lost = HiddenLabels()
    assert (read_labels(path, DUBAI, lost) == labels).all()
    assert not lost.notes()


def test_index_values_may_have_alpha(tmp_path: Path) -> None:
    labels = some_labels(DUBAI)
    Image.fromarray(np.dstack([labels, np.where(labels == 255, 0, 255)]).astype(np.uint8), "LA").save(
        tmp_path / "m.png"
    )
    assert (read_labels(tmp_path / "m.png", DUBAI) == labels).all()


def test_what_is_no_mask_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for path, reason in ((tmp_path / "text.png", "cannot be read"), (tmp_path / "nowhere.png", "does not exist")):
        for read in (lambda path: read_labels(path, DUBAI), open_mask):
            with pytest.raises(DatasetError, match=reason):
                read(path)
