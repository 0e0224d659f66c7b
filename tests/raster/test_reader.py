"""Scenes as tiles: borders, bands, values, validity, and every file that is no scene."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import Affine, from_origin
from scene_helpers import FakeEngine, noise, relaxed, write_raster

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.open import Warnings
from cdkd_edge.raster.read import INVALID_FILL, SceneReader, Stretch, reflected
from cdkd_edge.segmentation.jobs import EngineRef, Job
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.worker import run_job

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 16
FILL = INVALID_FILL[:, 0, 0].tolist()


def whole(reader: SceneReader) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
    """A scene up to 64 x 64 px as one tile, cut to the scene."""
    out = np.full((3, 64, 64), 99, np.uint8)
    valid = reader.read_tile(Span(0, 0, reader.height), Span(0, 0, reader.width), out)
    window = np.s_[..., : reader.height, : reader.width]
    return out[window], None if valid is None else valid[window]


def read(path: Path, **options: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
    reader = SceneReader(path, **options)
    try:
        return whole(reader)
    finally:
        reader.close()


def tagged(path: Path, interpretation: list[ColorInterp]) -> Path:
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = interpretation
    return path


# --- borders --------------------------------------------------------------------------------------


@pytest.mark.skipif(np.__version__ < "2", reason="np.pad of NumPy 1.26 reflects wrongly where the border is wide")
@relaxed
@given(size=st.integers(1, 40), before=st.integers(0, 100), after=st.integers(0, 100))
def test_reflection_is_that_of_numpy(size: int, before: int, after: int) -> None:
    expected = np.pad(np.arange(size), (before, after), mode="reflect")
    assert (reflected(-before, before + size + after, size) == expected).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 3), (15, 16), (16, 17), (30, 47)])
@pytest.mark.parametrize("overlap", [0, 4, 15])
@pytest.mark.parametrize("nodata", [None, 0])
def test_all_borders_are_padded_as_numpy_pads(
    tmp_path: Path, height: int, width: int, overlap: int, nodata: int | None
) -> None:
    scene = noise(height, width)
    scene[:, 0, 0] = 0
    path = write_raster(tmp_path / "scene.tif", scene, nodata=nodata)
    pad = 64
    padded = np.pad(scene, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    reader = SceneReader(path)
    for row, column in TileGrid.over(height, width, TILE, overlap):
        window = np.s_[:, row.start + pad :, column.start + pad :]
        expected = padded[window][:, :TILE, :TILE].copy()
        out = np.full((3, TILE, TILE), 99, np.uint8)
        valid = reader.read_tile(row, column, out)
        invalid = (expected == 0).all(axis=0) & (nodata is not None)
        expected[:, invalid] = INVALID_FILL[:, :, 0]
        assert (out == expected).all()
        assert (valid is None and not invalid.any()) or (valid is not None and (valid == ~invalid).all())
    reader.close()


def test_a_margin_of_several_times_the_scene(tmp_path: Path) -> None:
    scene = noise(3, 5)
    reader = SceneReader(write_raster(tmp_path / "scene.tif", scene))
    out = np.zeros((3, 40, 40), np.uint8)
    reader.read_tile(Span(-18, 0, 3), Span(-17, 0, 5), out)
    assert (out == np.pad(scene, ((0, 0), (18, 19), (17, 18)), mode="reflect")).all()
    reader.close()


def test_eight_bit_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    scene = noise(40, 50)
    reader = SceneReader(write_raster(tmp_path / "scene.tif", scene, photometric="RGB"))
    assert (reader.height, reader.width, reader.bands, reader.limits, reader.notes) == (40, 50, (1, 2, 3), None, [])
    out = np.zeros((3, TILE, TILE), np.uint8)
    assert reader.read_tile(Span(20, 20, 36), Span(7, 7, 23), out) is None
    assert (out == scene[:, 20:36, 7:23]).all()
    reader.close()


@pytest.mark.parametrize("driver", ["PNG", "JPEG"])
def test_pictures_are_scenes(tmp_path: Path, driver: str) -> None:
    scene = np.full((3, 20, 30), 77, np.uint8)
    pixels, valid = read(write_raster(tmp_path / f"scene.{driver.lower()}", scene, driver=driver))
    assert valid is None
    assert (pixels == 77).all()


# --- bands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_its_orientation_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = np.kron(noise(7, 11).transpose(1, 2, 0), np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    path, stored = tmp_path / f"turned.{suffix}", tmp_path / f"stored.{suffix}"
    how: dict[str, Any] = {"jpg": {"subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(pixels).save(path, exif=exif, **how)
    Image.fromarray(pixels).save(stored, **how)
    with rasterio.open(stored) as dataset:
        upright = Image.fromarray(dataset.read().transpose(1, 2, 0))
    upright.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright)).transpose(2, 0, 1)
    reader = SceneReader(path)
    assert (reader.height, reader.width) == expected.shape[1:]
    assert (reader.read_window(0, 0, reader.height, reader.width)[0] == expected).all()
    assert (reader.read_window(16, 3, 50, 40)[0] == expected[:, 16:66, 3:43]).all()
    assert (reader.another().overview(10_000) == expected.transpose(1, 2, 0)).all()
    assert any(f"orientation ({orientation})" in note for note in reader.notes) == (orientation > 1)
    assert reader.files == [str(path)]


def test_an_orientation_keeps_alpha_nodata_and_mask_band(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    hidden = noise(20, 30, 1, seed=1)[0] < 100
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.dstack([*pixels, np.where(hidden, 0, 255)]).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    reader = SceneReader(tmp_path / "a.png")
    read, valid = reader.read_window(0, 0, 30, 20)
    assert valid is not None
    assert (valid == np.rot90(~hidden, -1)).all()
    assert (read[:, valid] == np.rot90(pixels, -1, (1, 2))[:, valid]).all()


def test_a_place_on_earth_goes_before_an_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(noise(20, 30).transpose(1, 2, 0).copy()).save(tmp_path / "scene.png", exif=exif)
    (tmp_path / "scene.wld").write_text("1\n0\n0\n-1\n500000\n4000000\n")
    reader = SceneReader(tmp_path / "scene.png")
    assert (reader.read_window(0, 0, 20, 30)[0] == noise(20, 30)).all()
    assert not reader.notes


def test_four_untagged_bands_are_blue_green_red_infrared(tmp_path: Path) -> None:
    scene = noise(8, 9, bands=4)
    reader = SceneReader(write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK", alpha="NO"))
    assert reader.bands == (3, 2, 1)
    assert len(reader.notes) == 1
    assert "B, G, R, NIR" in reader.notes[0]
    assert "--bands" in reader.notes[0]
    pixels, valid = whole(reader)
    assert (pixels == scene[[2, 1, 0]]).all()
    assert valid is None
    reader.close()


def test_tags_say_which_band_is_which(tmp_path: Path) -> None:
    scene = noise(8, 9, bands=5)
    path = write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK")
    undefined = ColorInterp.undefined
    tagged(path, [ColorInterp.blue, undefined, ColorInterp.red, undefined, ColorInterp.green])
    reader = SceneReader(path)
    assert reader.bands == (3, 5, 1)
    assert reader.notes == ["bands 3,5,1 are tagged red, green, blue"]
    assert (whole(reader)[0] == scene[[2, 4, 0]]).all()
    reader.close()


U, GRAY, R, G, B, A = (ColorInterp(number) for number in (0, 1, 3, 4, 5, 6))
CYAN, MAGENTA, YELLOW, BLACK = (ColorInterp(number) for number in (10, 11, 12, 13))


@pytest.mark.parametrize(
    ("tags", "names", "bands", "words"),
    [
        ([R, G, B], None, (1, 2, 3), ""),
        ([R, G, B, U], None, (1, 2, 3), ""),
        ([B, G, R, U], None, (3, 2, 1), "tagged"),
        ([U, B, G, R, A], None, (4, 3, 2), "tagged"),
        ([R, G, B, R, G, B], None, (1, 2, 3), "the first of several"),
        ([GRAY, U, U], None, (1, 2, 3), "bands 1,2,3 without color tags taken as red, green, blue"),
        ([GRAY, U, U, A], None, (1, 2, 3), "bands 1,2,3 without color tags taken as red, green, blue"),
        ([A, U, U, U], None, (2, 3, 4), "bands 2,3,4 without color tags taken as red, green, blue"),
        ([GRAY, U, U, U, A], None, (3, 2, 1), "B, G, R, NIR"),
        ([GRAY, U, U, U], ["Blue", "green", "RED ", "nir"], (3, 2, 1), "named"),
        ([GRAY, U, U, U], ["nir", "red", "green", "blue"], (2, 3, 4), "named"),
        ([R, G, B, A], ["red", "green", "blue", "nir"], (1, 2, 3), ""),
        ([GRAY, U, U], ["B4", "B3", "B2"], (1, 2, 3), "(b4, b3, b2)"),
    ],
)
def test_bands_are_found_by_tags_and_names(
    tmp_path: Path, tags: list[ColorInterp], names: list[str] | None, bands: tuple[int, int, int], words: str
) -> None:
    path = tagged(write_raster(tmp_path / "s.tif", noise(8, 9, bands=len(tags)), photometric="MINISBLACK"), tags)
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = names or [None] * len(tags)
    reader = SceneReader(path)
    assert reader.bands == bands
    assert words in " ".join(reader.notes)
    assert bool(reader.notes) == bool(words)
    reader.close()


@pytest.mark.parametrize(
    ("tags", "names", "message", "hint"),
    [
        ([GRAY, R, G], ["nir", None, None], "no band tagged blue; it has 1 nir, 2 red, 3 green", "--bands 1,2,3"),
        ([R, G, U, U], None, "no band tagged blue", "--bands 1,2,3"),
        ([CYAN, MAGENTA, YELLOW, BLACK], None, "1 cyan, 2 magenta, 3 yellow, 4 black", "--bands"),
        ([GRAY, A], None, "has 2 bands", "--bands 1,1,1"),
        ([GRAY, U, U, U, U, U, U, U], None, "has 8 bands", "--bands 3,2,1"),
        (
            [R, G, B],
            ["blue", "green", "red"],
            "named 1 blue, 2 green, 3 red, and tagged 1 red",
            "3,2,1 or --bands 1,2,3",
        ),
        ([R, G, B, A], ["blue", "green", "red", "nir"], "are named 1 blue", "--bands 3,2,1 or"),
    ],
)
def test_what_tags_and_names_leave_open_is_asked(
    tmp_path: Path, tags: list[ColorInterp], names: list[str] | None, message: str, hint: str
) -> None:
    path = tagged(write_raster(tmp_path / "s.tif", noise(8, 9, bands=len(tags)), photometric="MINISBLACK"), tags)
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = names or [None] * len(tags)
    with pytest.raises(SceneError, match=message) as caught:
        SceneReader(path)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("bands", [(3, 1, 2), (4, 4, 4), (5, 1, 5)])
def test_bands_can_be_chosen(tmp_path: Path, bands: tuple[int, int, int]) -> None:
    scene = noise(8, 9, bands=5)
    path = write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK")
    assert (read(path, bands=bands)[0] == scene[[band - 1 for band in bands]]).all()


@pytest.mark.parametrize("bands", [(), (1,), (1, 2), (1, 2, 3, 1), (0, 1, 2), (1, 2, 4), (-1, 1, 2)])
def test_bands_that_do_not_exist_are_refused(tmp_path: Path, bands: tuple[int, ...]) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9))
    with pytest.raises(SceneError, match=r"has bands 1\.\.3; --bands .* does not name three"):
        SceneReader(path, bands=bands)


@pytest.mark.parametrize(("count", "advice"), [(1, "--bands 1,1,1"), (2, "--bands 1,1,1"), (5, "--bands 3,2,1")])
def test_other_numbers_of_bands_need_a_choice(tmp_path: Path, count: int, advice: str) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9, bands=count), photometric="MINISBLACK", alpha="NO")
    with pytest.raises(SceneError, match=rf"has {count} band") as caught:
        SceneReader(path)
    assert advice in str(caught.value.hint)
    chosen = [int(band) for band in advice.split()[1].split(",")]
    assert read(path, bands=chosen)[0].shape == (3, 8, 9)


def test_a_paletted_image_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9, bands=1), photometric="PALETTE")
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {0: (1, 2, 3, 255), 1: (4, 5, 6, 255)})
    with pytest.raises(SceneError, match="paletted") as caught:
        SceneReader(path)
    assert "-expand rgb" in str(caught.value.hint)


@pytest.mark.parametrize("bands", [None, (1, 2, 3)])
@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
def test_complex_values_are_no_image(tmp_path: Path, dtype: str, bands: tuple[int, int, int] | None) -> None:
    path = tmp_path / "scene.tif"
    rasterio.open(path, "w", driver="GTiff", count=3, height=8, width=9, dtype=dtype).close()
    with pytest.raises(SceneError, match="complex"):
        SceneReader(path, bands=bands)


# --- validity -------------------------------------------------------------------------------------


def test_alpha_is_validity(tmp_path: Path) -> None:
    scene = noise(8, 9, bands=4)
    scene[3] = 255
    scene[3, 2:4, 3:] = 0
    scene[3, 0, 0] = 1  # faint is not absent
    path = write_raster(tmp_path / "scene.tif", scene, photometric="RGB", alpha="YES")
    pixels, valid = read(path)
    assert (valid == (scene[3] > 0)).all()
    assert (pixels[:, valid] == scene[:3, valid]).all()
    assert (pixels[:, ~valid].T == FILL).all()


def test_nodata_is_validity(tmp_path: Path) -> None:
    scene = noise(8, 9)
    scene[:, 5:, :4] = 7
    scene[0, 0, 0], scene[1, 0, 0] = 7, 8  # nodata in one band is a dark pixel, not a hole
    pixels, valid = read(write_raster(tmp_path / "scene.tif", scene, nodata=7))
    expected = ~(scene == 7).all(axis=0)
    assert expected[0, 0]
    assert (valid == expected).all()
    assert (pixels[:, ~expected].T == FILL).all()


def test_a_mask_band_is_validity(tmp_path: Path) -> None:
    scene = noise(8, 9)
    mask = np.full((8, 9), 255, np.uint8)
    mask[:, 8] = 0
    path = write_raster(tmp_path / "scene.tif", scene)
    with rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    pixels, valid = read(path)
    assert (valid == (mask > 0)).all()
    assert (pixels[:, :, 8].T == FILL).all()
    assert (pixels[:, :, :8] == scene[:, :, :8]).all()


def several(path: Path, dtype: str, tags: list[ColorInterp], *, mask: bool = False, **profile: Any) -> Path:
    """A scene of 200 in 120 x 160 px with a place; its corner is 0 in red, green, blue; a column of all else is 0."""
    scene = np.full((len(tags), 120, 160), 200, dtype)
    scene[:3, :40, :40] = 0
    scene[3:, :, 80:] = 0
    place = {"crs": "EPSG:32640", "transform": from_origin(325_000, 2_785_000, 2, 2)}
    tagged(write_raster(path, scene, photometric="MINISBLACK", **place, **profile), tags)
    if mask:
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(scene[0] != 0)
    return path


@pytest.mark.parametrize("gsd", [None, 4.0])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["nodata", "alpha", "both", "mask", "mask and alpha", "none"])
def test_validity_is_that_of_the_bands_used_and_of_alpha_wherever_it_is(
    tmp_path: Path, kind: str, dtype: str, gsd: float | None
) -> None:
    profile = {"nodata": 0} if kind in ("nodata", "both") else {}
    alpha = kind in ("alpha", "both", "mask and alpha")
    path = several(tmp_path / "s.tif", dtype, [R, G, B, U, A if alpha else U], mask="mask" in kind, **profile)
    stretch = None if dtype == "uint8" else Stretch(0, 255, percentiles=False)
    reader = SceneReader(path, stretch=stretch, gsd=gsd)
    height, width = reader.height, reader.width
    pixels, valid = reader.read_window(0, 0, height, width)
    assert (height, width) == ((120, 160) if gsd is None else (60, 80))
    expected = np.ones((height, width), bool)
    if kind not in ("alpha", "none"):
        expected[: height // 3, : width // 4] = False
    if alpha:
        expected[:, width // 2 :] = False
    assert (valid is None and expected.all()) or (valid == expected).all()
    assert set(np.unique(pixels[:, expected])) == ({200} if kind not in ("alpha", "none") else {0, 200})
    reader.close()


@pytest.mark.parametrize("gsd", [None, 4.0])
def test_each_band_has_its_own_nodata(tmp_path: Path, gsd: float | None) -> None:
    several(tmp_path / "s.tif", "uint8", [R, G, B, U])
    with rasterio.open(tmp_path / "s.tif", "r+") as dataset:
        for band, value in enumerate((7, 8, 9), 1):
            pixels = dataset.read(band)
            pixels[pixels == 0] = value
            dataset.write(pixels, band)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">{nodata}<ColorInterp>{color}</ColorInterp><SimpleSource>'
        f"<SourceFilename>{tmp_path}/s.tif</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band, color, nodata in (
            (1, "Red", "<NoDataValue>7</NoDataValue>"),
            (2, "Green", "<NoDataValue>8</NoDataValue>"),
            (3, "Blue", ""),
        )
    )
    place = "<SRS>EPSG:32640</SRS><GeoTransform>325000, 2, 0, 2785000, 0, -2</GeoTransform>"
    (tmp_path / "s.vrt").write_text(f'<VRTDataset rasterXSize="160" rasterYSize="120">{place}{bands}</VRTDataset>')
    reader = SceneReader(tmp_path / "s.vrt", gsd=gsd)
    _, valid = reader.read_window(0, 0, reader.height, reader.width)
    assert valid is not None
    assert np.count_nonzero(~valid) == (1600 if gsd is None else 400)
    assert not valid[: reader.height // 3, : reader.width // 4].any()
    reader.close()


def test_a_band_that_is_asked_for_or_named_is_no_alpha(tmp_path: Path) -> None:
    """GDAL tags the fourth of four bytes alpha unless told otherwise; infrared of water is 0."""
    path = several(tmp_path / "s.tif", "uint8", [R, G, B, A])
    assert read_all(path)[1] is not None
    assert read_all(path, bands=(4, 1, 2))[1] is None
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = ["red", "green", "blue", "NIR"]
    assert read_all(path)[1] is None


def read_all(path: Path, **options: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
    reader = SceneReader(path, **options)
    try:
        return reader.read_window(0, 0, reader.height, reader.width)
    finally:
        reader.close()


@pytest.mark.parametrize(("dtype", "faint"), [("uint8", 1), ("uint16", 1), ("float32", 0.004)])
@pytest.mark.parametrize("gsd", [None, 1.0])
def test_faint_is_not_absent(tmp_path: Path, dtype: str, faint: float, gsd: float | None) -> None:
    path = several(tmp_path / "s.tif", dtype, [R, G, B, A])
    with rasterio.open(path, "r+") as dataset:
        alpha = dataset.read(4)
        alpha[alpha > 0] = faint
        dataset.write(alpha, 4)
    stretch = None if dtype == "uint8" else Stretch(0, 255, percentiles=False)
    valid = read_all(path, stretch=stretch, gsd=gsd)[1]
    assert valid is not None
    assert valid[:, : valid.shape[1] // 2].all()
    assert not valid[:, valid.shape[1] // 2 + 2 :].any()


def test_percentiles_leave_out_what_is_transparent(tmp_path: Path) -> None:
    path = several(tmp_path / "s.tif", "uint16", [R, G, B, U, A])
    with rasterio.open(path, "r+") as dataset:
        for band in (1, 2, 3):
            pixels = dataset.read(band)
            pixels[:, 80:] = 60000
            dataset.write(pixels, band)
    reader = SceneReader(path, stretch=Stretch(2, 98, percentiles=True))
    assert reader.limits is not None
    assert reader.limits.tolist() == [[0, 200]] * 3
    reader.close()


def test_values_that_are_not_finite_have_no_data(tmp_path: Path) -> None:
    scene = noise(8, 9).astype(np.float32)
    scene[0, 1, 1], scene[1, 2, 2], scene[2, 3, 3] = np.nan, np.inf, -np.inf
    path = write_raster(tmp_path / "scene.tif", scene)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pixels, valid = read(path, stretch=Stretch(0, 255, percentiles=False))
    assert valid is not None
    assert (valid == np.isfinite(scene).all(axis=0)).all()
    assert np.count_nonzero(~valid) == 3
    assert (pixels[:, ~valid].T == FILL).all()
    assert (pixels[:, valid] == scene[:, valid]).all()


def test_a_scene_without_a_hole_needs_no_mask(tmp_path: Path) -> None:
    scene = np.maximum(noise(8, 9), 1)
    assert read(write_raster(tmp_path / "scene.tif", scene, nodata=0))[1] is None


# --- stretch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4])
def test_bytes_of_fewer_bits_need_a_stretch(tmp_path: Path, bits: int) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9) // 128, nbits=bits)
    with pytest.raises(SceneError, match=f"holds {bits}-bit values"):
        SceneReader(path)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "int8"])
def test_other_values_than_bytes_need_a_stretch(tmp_path: Path, dtype: str) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9).astype(dtype))
    with pytest.raises(SceneError, match=rf"holds {dtype} values") as caught:
        SceneReader(path)
    for option in ("--stretch ", "--stretch-percentiles LOW HIGH", "--stretch-range LOW HIGH"):
        assert option in str(caught.value.hint)


def test_a_range_maps_its_ends_to_0_and_255(tmp_path: Path) -> None:
    values = np.array([0, 999, 1000, 1500, 2000, 2001, 65535], np.uint16)
    scene = np.broadcast_to(values, (3, 4, 7))
    pixels, valid = read(write_raster(tmp_path / "s.tif", scene), stretch=Stretch(1000, 2000, percentiles=False))
    assert pixels[0, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert (pixels == pixels[0, 0]).all()
    assert valid is None


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float64", "uint8"])
@pytest.mark.parametrize(("low", "high"), [(2, 98), (0, 100), (10.5, 50)])
def test_percentiles_are_those_of_the_scene_band_by_band(tmp_path: Path, dtype: str, low: float, high: float) -> None:
    rng = np.random.default_rng(1)
    top = 250 if dtype == "uint8" else 5000
    scene = np.stack([rng.integers(1 + 10 * band, top // (band + 1), (30, 40)) for band in range(3)]).astype(dtype)
    scene[:, :5] = 0  # holes: no part of the percentiles
    path = write_raster(tmp_path / "scene.tif", scene, nodata=0)
    reader = SceneReader(path, stretch=Stretch(low, high, percentiles=True))
    pixels, valid = whole(reader)
    assert valid is not None
    assert reader.limits is not None
    for band in range(3):
        ends = np.percentile(scene[band, 5:].astype(float), [low, high])
        assert reader.limits[band] == pytest.approx(ends)
        expected = np.clip((scene[band, 5:] - ends[0]) / (ends[1] - ends[0]) * 255, 0, 255)
        assert np.abs(pixels[band, 5:] - expected).max() <= 0.51
    reader.close()


def test_all_tiles_of_a_large_scene_are_stretched_alike(tmp_path: Path) -> None:
    """Percentiles of a sample of the scene, never of a tile, so that there are no seams."""
    ramp = np.broadcast_to(np.linspace(0, 60000, 3000).astype(np.uint16), (3, 20, 3000))
    reader = SceneReader(write_raster(tmp_path / "scene.tif", ramp), stretch=Stretch(0, 100, percentiles=True))
    tiles = []
    for column in (0, 1400, 2980):
        tiles.append(np.zeros((3, 20, 20), np.uint8))
        reader.read_tile(Span(0, 0, 20), Span(column, column, column + 20), tiles[-1])
    assert [round(float(tile.mean())) for tile in tiles] == [1, 120, 254]
    reader.close()


def test_a_constant_scene_can_be_stretched(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", np.full((3, 8, 9), 500, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert (read(path, stretch=Stretch(2, 98, percentiles=True))[0] == 0).all()


@pytest.mark.parametrize("percentiles", [True, False])
def test_the_usual_nodata_of_float_scenes_is_no_reason_to_warn(tmp_path: Path, percentiles: bool) -> None:
    scene = np.random.default_rng(1).uniform(0, 1, (3, 8, 9)).astype(np.float32)
    scene[:, 2:5, 3] = np.finfo(np.float32).min
    path = write_raster(tmp_path / "scene.tif", scene, nodata=float(np.finfo(np.float32).min))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pixels, valid = read(path, stretch=Stretch(0, 100 if percentiles else 1, percentiles))
        reader = SceneReader(path, stretch=Stretch(0, 1, percentiles=False))
        reader.overview(9)
        reader.close()
    assert valid is not None
    assert np.count_nonzero(~valid) == 3
    assert pixels[:, valid].max() > 240


def test_a_scene_without_a_valid_pixel_has_no_percentiles(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", np.zeros((3, 8, 9), np.uint16), nodata=0)
    with pytest.raises(SceneError, match="no valid pixel"):
        SceneReader(path, stretch=Stretch(2, 98, percentiles=True))


@pytest.mark.parametrize(("low", "high"), [(5, 5), (6, 5), (float("nan"), 5), (5, float("nan"))])
@pytest.mark.parametrize("percentiles", [True, False])
def test_a_stretch_needs_low_below_high(low: float, high: float, percentiles: bool) -> None:
    with pytest.raises(UsageError, match="low < high"):
        Stretch(low, high, percentiles)


@pytest.mark.parametrize(("low", "high"), [(-1, 50), (50, 101)])
def test_percentiles_lie_between_0_and_100(low: float, high: float) -> None:
    with pytest.raises(UsageError, match=r"0\.\.100"):
        Stretch(low, high, percentiles=True)
    assert not Stretch(low, high, percentiles=False).percentiles


@pytest.mark.parametrize(("low", "high"), [(0, float("inf")), (float("-inf"), 0)])
def test_a_stretch_to_infinity_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError):
        Stretch(low, high, percentiles=False)


# --- georeference ---------------------------------------------------------------------------------


def georeference(path: Path, **options: Any) -> dict[str, Any]:
    reader = SceneReader(path, **options)
    try:
        return reader.georeference
    finally:
        reader.close()


@pytest.mark.parametrize(
    "transform",
    [from_origin(325_000, 2_785_000, 0.5, 0.5), Affine(0.4, 0.3, 10, 0.3, -0.4, 20), Affine(0.5, 0, 10, 0, 0.5, 20)],
    ids=["north up", "rotated", "south up"],
)
def test_the_place_on_earth_is_known(tmp_path: Path, transform: Affine) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9), crs="EPSG:32640", transform=transform)
    place = georeference(path)
    assert set(place) == {"crs", "transform"}
    assert place["crs"] == CRS.from_epsg(32640)
    assert place["transform"].almost_equals(transform)


def test_ground_control_points_are_kept(tmp_path: Path) -> None:
    points = [GroundControlPoint(row, col, 50 + col / 10, 25 - row / 10, 0) for row in (0, 8) for col in (0, 9)]
    path = write_raster(tmp_path / "scene.tif", noise(8, 9), gcps=points, crs="EPSG:4326")
    place = georeference(path)
    assert set(place) == {"gcps", "crs"}
    assert place["crs"] == CRS.from_epsg(4326)
    assert [(p.row, p.col, p.x, p.y) for p in place["gcps"]] == [(p.row, p.col, p.x, p.y) for p in points]


def some_rpc() -> RPC:
    return RPC(
        height_off=10.25, height_scale=500, lat_off=25.2, lat_scale=0.1, long_off=55.2, long_scale=1 / 3, line_off=4,
        line_scale=4, samp_off=4.5, samp_scale=4.5, line_num_coeff=[0, 0, -1, *[1e-7 / 3] * 17],
        line_den_coeff=[1, *[0] * 19], samp_num_coeff=[0, 1, *[0] * 18], samp_den_coeff=[1, *[0] * 19],
    )  # fmt: skip


@pytest.mark.parametrize("placed", [{}, {"crs": "EPSG:32640", "transform": from_origin(320_000, 2_790_000, 0.5, 0.5)}])
def test_rational_polynomials_are_kept(tmp_path: Path, placed: dict[str, Any]) -> None:
    """Raw passes have them; without them nobody can put the label map on a map."""
    path = write_raster(tmp_path / "scene.tif", noise(80, 90), rpcs=some_rpc(), **placed)
    segment_scene(FakeEngine(64), path, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset, rasterio.open(path) as scene:
        assert dataset.rpcs == scene.rpcs
        assert dataset.rpcs.line_num_coeff == pytest.approx(some_rpc().line_num_coeff, rel=1e-14)


def test_rational_polynomials_of_other_pixels_are_not(tmp_path: Path) -> None:
    placed = {"crs": "EPSG:32640", "transform": from_origin(320_000, 2_790_000, 0.5, 0.5)}
    path = write_raster(tmp_path / "scene.tif", noise(80, 90), rpcs=some_rpc(), **placed)
    assert set(georeference(path, gsd=1.0)) == {"crs", "transform"}


def test_rational_polynomials_that_lack_a_term(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9))
    (tmp_path / "scene.tif.aux.xml").write_text(
        '<PAMDataset><Metadata domain="RPC"><MDI key="LINE_OFF">4</MDI></Metadata></PAMDataset>'
    )
    assert georeference(path) == {}


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_transform_that_is_not_finite_is_no_place(tmp_path: Path, value: str) -> None:
    path = declared(
        tmp_path / "s.vrt", 9, 8, f"<SRS>EPSG:32640</SRS><GeoTransform>{value}, 1, 0, 0, 0, -1</GeoTransform>"
    )
    reader = SceneReader(path)
    assert set(reader.georeference) == {"crs"}
    assert "not finite" in reader.notes[0]
    reader.close()


def test_a_scene_may_lie_nowhere(tmp_path: Path) -> None:
    assert georeference(write_raster(tmp_path / "scene.tif", noise(8, 9))) == {}


# --- overview -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longest", "shape"), [(20, (10, 20, 3)), (40, (20, 40, 3)), (400, (20, 40, 3)), (1, (1, 1, 3))]
)
def test_an_overview_is_small_and_in_the_same_colors(tmp_path: Path, longest: int, shape: tuple[int, int, int]) -> None:
    scene = np.empty((4, 20, 40), np.uint8)
    scene[:] = np.array([10, 20, 30, 40]).reshape(4, 1, 1)
    reader = SceneReader(write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK", alpha="NO"))
    overview = reader.overview(longest)
    assert overview.shape == shape
    assert (overview == [30, 20, 10]).all()
    reader.close()


def test_an_overview_is_stretched_like_the_tiles(tmp_path: Path) -> None:
    scene = np.full((3, 20, 40), 1500, np.float32)
    scene[:, :, 20:] = np.nan
    path = write_raster(tmp_path / "scene.tif", scene)
    reader = SceneReader(path, stretch=Stretch(1000, 2000, percentiles=False))
    assert (reader.overview(40)[:, :20] == 128).all()
    reader.close()


# --- files that are no scene ----------------------------------------------------------------------


def open_files(path: Path) -> int:
    links = Path("/proc/self/fd")
    return sum(os.path.realpath(link) == str(path.resolve()) for link in links.iterdir())


def test_text_empty_and_missing_files_and_folders(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.tif", tmp_path / "empty.tif"
    text.write_text("not a raster\n")
    empty.touch()
    for path, reason in (
        (text, "is not a raster that GDAL can read"),
        (empty, "is not a raster that GDAL can read"),
        (tmp_path / "missing.tif", "does not exist"),
        (tmp_path, "is not a file"),
    ):
        with pytest.raises(SceneError, match=rf"{re.escape(str(path))} {reason}"):
            SceneReader(path)


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_truncated_file_is_found_when_its_tiles_are_read(tmp_path: Path, compress: str, share: float) -> None:
    path = write_raster(
        tmp_path / "scene.tif", noise(256, 256), tiled=True, blockxsize=64, blockysize=64, compress=compress
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    out = np.zeros((3, 64, 64), np.uint8)
    reader = SceneReader(path)  # the header is whole
    with pytest.raises(SceneError, match=rf"reading {re.escape(str(path))} failed: .*ead") as caught:  # noqa: PT012
        for row, column in TileGrid.over(256, 256, 64, 0):
            reader.read_tile(row, column, out)
    assert caught.value.hint is not None
    assert "damaged or cut off" in caught.value.hint
    reader.close()


@pytest.mark.parametrize(
    ("name", "way"),
    [("scene.zip", "/vsizip/{}/SCENE.tif"), ("scene.TGZ", "/vsitar/{}/SCENE.tif"), ("scene.tif.gz", "/vsigzip/{}")],
)
def test_an_archive_is_told_how_to_be_named(tmp_path: Path, name: str, way: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SceneError, match="is not a raster") as caught:
        SceneReader(path)
    assert caught.value.hint == f"name the file in it: {way.format(path)}"


@pytest.mark.parametrize("tile", [64, 256])  # GDAL has a way of its own for pictures that are read at once
@pytest.mark.parametrize("driver", ["PNG", "JPEG"])
def test_a_truncated_picture_is_an_error_and_not_a_grey_field(tmp_path: Path, driver: str, tile: int) -> None:
    path = write_raster(tmp_path / "scene.img", noise(256, 256), driver=driver)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    out = np.zeros((3, tile, tile), np.uint8)
    with pytest.raises(SceneError, match="failed"):  # noqa: PT012 - where it is found depends on the format
        reader = SceneReader(path)
        for row, column in TileGrid.over(256, 256, tile, 0):
            reader.read_tile(row, column, out)


def declared(path: Path, width: int, height: int, more: str = "") -> Path:
    """A VRT that declares a size, of a few bytes itself."""
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{color}</ColorInterp></VRTRasterBand>'
        for band, color in ((1, "Red"), (2, "Green"), (3, "Blue"))
    )
    path.write_text(f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{more}{bands}</VRTDataset>')
    return path


@pytest.mark.parametrize(("width", "height"), [(10**9, 10**9), (2**31 - 1, 1), (1, 2**31 - 1), (2 * 10**6, 10**6)])
def test_sizes_that_nobody_can_label_are_refused_at_once(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(SceneError, match=f"would be {width} x {height} px; at most 10,000,000 px a side"):
        SceneReader(declared(tmp_path / "s.vrt", width, height))


def test_a_million_pixels_a_side_are_planned_in_little_memory(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    engine = FakeEngine(512, fail_at=0, error=EnoughError())
    with pytest.raises(EnoughError):
        segment_scene(engine, declared(tmp_path / "s.vrt", 10**6, 10**6), tmp_path / "map.tif")


def test_a_tile_that_is_all_of_a_large_file_is_refused(tmp_path: Path) -> None:
    profile = {
        "count": 3,
        "dtype": "uint8",
        "photometric": "RGB",
        "tiled": True,
        "blockxsize": 14_336,
        "blockysize": 14_336,
    }
    path = tmp_path / "scene.tif"
    rasterio.open(path, "w", driver="GTiff", height=14_500, width=14_500, sparse_ok=True, **profile).close()
    with pytest.raises(SceneError, match="stored in blocks of 14336 x 14336 px"):
        SceneReader(path)


def test_a_scene_that_refers_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "s.vrt"
    source = f"<SimpleSource><SourceFilename>{path}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    path.write_text(declared(path, 9, 8).read_text().replace("</ColorInterp>", f"</ColorInterp>{source}"))
    with pytest.raises(SceneError) as caught:
        read(path)
    assert "refer to itself" in str(caught.value.hint)


def damaged_jpeg(path: Path, driver: str = "JPEG") -> Path:
    """A picture with 400 wrong bytes in its middle; GDAL decodes it to its end and warns."""
    scene = np.kron(noise(20, 30), np.ones((1, 16, 16), np.uint8))
    profile = {"photometric": "YCBCR", "compress": "jpeg", "blockysize": 320} if driver == "GTiff" else {}
    place = {"crs": "EPSG:32640", "transform": from_origin(325_000, 2_785_000, 2, 2)}
    content = bytearray(write_raster(path, scene, driver=driver, **profile, **place).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = (noise(1, 400, bands=1, seed=1) // 2).tobytes()  # no markers
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("driver", ["JPEG", "GTiff"])
@pytest.mark.parametrize("gsd", [None, 4.0])
def test_what_the_decoder_warns_of_is_told(tmp_path: Path, driver: str, gsd: float | None) -> None:
    path = damaged_jpeg(tmp_path / "scene.img", driver)
    result = segment_scene(FakeEngine(64), path, tmp_path / "map.tif", SegmentOptions(gsd=gsd))
    told = [note for note in result.notes if "GDAL warns" in note]
    assert len(told) == 1
    assert "Corrupt JPEG data" in told[0]
    assert "CPLE" not in told[0]
    with pytest.raises(SceneError, match=r"GDAL warns: .*Corrupt JPEG data") as caught:
        segment_scene(FakeEngine(64), path, tmp_path / "other.tif", SegmentOptions(gsd=gsd, strict=True))
    assert "--strict" in str(caught.value.hint)
    assert not (tmp_path / "other.tif").exists()


def test_a_report_of_many_scenes_has_the_warnings_of_each(tmp_path: Path) -> None:
    path = damaged_jpeg(tmp_path / "scene.jpg")
    engine = FakeEngine(64)
    ref = EngineRef("fake.onnx", "fake", "fp32", None, engine.artefact.sha256, "cd" * 32)
    row = run_job(engine, Job(str(path), str(tmp_path / "map.tif"), ref, SegmentOptions()))[0].document()
    assert row["status"] == "done"
    assert any("Corrupt JPEG data" in note for note in row["notes"])
    strict = Job(str(path), str(tmp_path / "other.tif"), ref, SegmentOptions(strict=True))
    row = run_job(engine, strict)[0].document()
    assert (row["status"], row["error"]["exit_code"]) == ("failed", 10)


def test_many_warnings_are_few_notes() -> None:
    warnings = Warnings()
    warnings.take("reading", [f"line {index} is odd" for index in range(1000)])
    assert warnings.notes == ["GDAL warns: line 0 is odd; the file may be damaged there"]
    warnings.take("reading", [f"{chr(97 + index)} is odd" for index in range(20)])
    assert len(warnings.notes) == 4
    assert warnings.notes[-1] == "GDAL warns of 18 more kinds"


def test_a_raster_without_bands(tmp_path: Path) -> None:
    path = tmp_path / "scene.vrt"
    path.write_text('<VRTDataset rasterXSize="5" rasterYSize="5"></VRTDataset>')
    with pytest.raises(SceneError, match="bands"):
        SceneReader(path)


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """A GeoPackage with two rasters, as netCDF and HDF files have them."""
    path = tmp_path / "scenes.gpkg"
    for index, table in enumerate(("first", "second")):
        options = {"RASTER_TABLE": table} | ({"APPEND_SUBDATASET": "YES"} if index else {})
        transform = from_origin(0, 0, 1, 1)
        scene = np.full((3, 20, 30), 50 + index, np.uint8)
        write_raster(path, scene, driver="GPKG", crs="EPSG:3857", transform=transform, tile_format="PNG", **options)
    return path


def test_a_container_names_what_it_holds(container: Path) -> None:
    with pytest.raises(SceneError, match="no bands of its own, only subdatasets") as caught:
        SceneReader(container)
    assert f"GPKG:{container}:first" in str(caught.value.hint)


def test_what_a_container_advises_works(container: Path) -> None:
    pixels, _ = read(Path(f"GPKG:{container}:second"))
    assert (pixels == 51).all()


@pytest.mark.parametrize("name", ["GPKG:missing.gpkg:first", "nodriver:scene.tif", "/vsizip/missing.zip/scene.tif"])
def test_what_no_container_holds(name: str) -> None:
    with pytest.raises(SceneError, match=re.escape(name)):
        SceneReader(name)


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "scene-\udcff.tif"
    os.replace(write_raster(tmp_path / "scene.tif", noise(8, 9)), path)
    with pytest.raises(SceneError):
        SceneReader(path)


def test_a_refused_scene_is_not_held_open(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(8, 9).astype(np.uint16))
    with pytest.raises(SceneError) as caught:
        SceneReader(path)
    assert open_files(path) == 0
    assert caught.tb is not None, "which keeps the reader from being collected"
    reader = SceneReader(path, stretch=Stretch(0, 1000, percentiles=False))
    assert open_files(path) == 1
    reader.close()
    assert open_files(path) == 0
