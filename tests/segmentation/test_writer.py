"""Label maps: what is in them, that GDAL and QGIS find it, and that there is all of it or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioIOError
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, names_in, noise, read_labels, relaxed, write_raster

from cdkd_edge.core.errors import CdkdEdgeError, SceneError, SystemRefusalError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema, LandCoverClass
from cdkd_edge.segmentation.geotiff import BLOCK, LabelMapWriter

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def some_labels(height: int, width: int) -> npt.NDArray[np.uint8]:
    labels = np.random.default_rng(5).integers(0, 6, (height, width), np.uint8)
    labels[labels == 5] = NO_LABEL
    return labels


def write(
    path: Path,
    labels: npt.NDArray[np.uint8],
    *,
    rows: int | None = None,
    schema: LabelSchema = SCHEMA,
    georeference: dict[str, Any] | None = None,
    tags: dict[str, str] | None = None,
) -> LabelMapWriter:
    """Write a label map, ``rows`` at a time."""
    height, width = labels.shape
    writer = LabelMapWriter(path, height, width, schema, georeference or {}, tags or {})
    with writer:
        for start in range(0, height, rows or height):
            writer.write_rows(labels[start : start + (rows or height)])
    return writer


# --- content --------------------------------------------------------------------------------------


@settings(relaxed, max_examples=40)
@given(height=st.integers(1, 1600), rows=st.integers(1, 1600), wide=st.booleans())
def test_rows_may_come_in_any_portion(
    tmp_path_factory: pytest.TempPathFactory, height: int, rows: int, wide: bool
) -> None:
    labels = some_labels(height, BLOCK + 5 if wide else 7)
    path = tmp_path_factory.mktemp("rows") / "map.tif"
    writer = write(path, labels, rows=rows)
    assert (read_labels(path) == labels).all()
    for column, label in enumerate((0, 1, 2, 3, 4, NO_LABEL)):
        assert (writer.row_counts[:, column] == (labels == label).sum(axis=1)).all()


def test_the_rows_may_be_used_again_by_the_caller(tmp_path: Path) -> None:
    labels = some_labels(700, 600)
    rows = np.empty((100, 600), np.uint8)
    with LabelMapWriter(tmp_path / "map.tif", 700, 600, SCHEMA, {}, {}) as writer:
        for start in range(0, 700, 100):
            rows[:] = labels[start : start + 100]
            writer.write_rows(rows)
            rows.fill(77)
    assert (read_labels(tmp_path / "map.tif") == labels).all()


def test_no_block_is_written_twice(tmp_path: Path) -> None:
    """A compressed block that is written again leaves a hole of its first size in the file."""
    labels = some_labels(1500, 1100)
    write(tmp_path / "whole.tif", labels)
    write(tmp_path / "rows.tif", labels, rows=112)
    assert (tmp_path / "rows.tif").stat().st_size <= 1.001 * (tmp_path / "whole.tif").stat().st_size


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2000), (511, 511), (512, 512), (600, 700)])
def test_format(tmp_path: Path, height: int, width: int) -> None:
    labels = some_labels(height, width)
    write(tmp_path / "map.tif", labels, tags={"SCENE": "a scene", "ENGINE": "e = m"})
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.driver, dataset.count, dataset.dtypes) == ("GTiff", 1, ("uint8",))
        assert dataset.nodata == NO_LABEL
        assert dataset.compression.value == "DEFLATE"
        assert dataset.colorinterp == (ColorInterp.palette,)
        colors = dataset.colormap(1)
        assert [colors[label] for label in range(5)] == [(*cls.shown, 255) for cls in SCHEMA.classes]
        assert colors[NO_LABEL] == (0, 0, 0, 0), "no label is transparent"
        assert dataset.tags()["SCENE"] == "a scene"
        assert dataset.tags()["ENGINE"] == "e = m"
        blocks_expected = min(height, width) >= BLOCK
        assert (dataset.block_shapes == [(BLOCK, BLOCK)]) == blocks_expected
        assert (dataset.dataset_mask() == np.where(labels == NO_LABEL, 0, 255)).all()


def sidecar_of(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path.with_name(path.name + ".aux.xml")).getroot()


def test_class_names_and_colors_lie_beside_it_as_gdal_expects(tmp_path: Path) -> None:
    write(tmp_path / "map.tif", some_labels(9, 8))
    root = sidecar_of(tmp_path / "map.tif")
    assert root.tag == "PAMDataset"
    (band,) = root.findall("PAMRasterBand")
    assert band.get("band") == "1"
    assert [item.text for item in band.findall("CategoryNames/Category")] == list(SCHEMA.class_names)
    table = band.find("GDALRasterAttributeTable")
    assert table is not None
    assert table.get("tableType") == "thematic"
    fields = [(f.findtext("Name"), f.findtext("Type"), f.findtext("Usage")) for f in table.findall("FieldDefn")]
    assert fields == [
        ("Value", "0", "5"),
        ("Class", "2", "2"),
        ("Red", "0", "6"),
        ("Green", "0", "7"),
        ("Blue", "0", "8"),
    ]
    rows = [[cell.text for cell in row.findall("F")] for row in table.findall("Row")]
    assert rows == [[str(i), cls.name, *map(str, cls.shown)] for i, cls in enumerate(SCHEMA.classes)]
    assert [row.get("index") for row in table.findall("Row")] == list("01234")


def test_class_names_may_hold_any_character(tmp_path: Path) -> None:
    names = ["grass & <trees>", 'the "rest"', "Straße/道路"]
    schema = LabelSchema("odd", tuple(LandCoverClass(name, (i, 0, 0), i) for i, name in enumerate(names)))
    write(tmp_path / "map.tif", np.zeros((4, 4), np.uint8), schema=schema, tags={"CLASSES": ", ".join(names)})
    categories = sidecar_of(tmp_path / "map.tif").findall("PAMRasterBand/CategoryNames/Category")
    assert [item.text for item in categories] == names
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags()["CLASSES"] == ", ".join(names)


def test_gdal_itself_finds_classes_palette_and_nodata(tmp_path: Path) -> None:
    gdalinfo = shutil.which("gdalinfo")
    if gdalinfo is None:
        pytest.skip("NOT CHECKED against GDAL's own reader: no gdalinfo on PATH (apt-get install gdal-bin)")
    labels = some_labels(600, 700)
    write(tmp_path / "map.tif", labels, georeference={"crs": "EPSG:32640", "transform": from_origin(5, 9, 2, 2)})
    # The wheel's PROJ data are of another version than the system's.
    environment = {k: v for k, v in os.environ.items() if k not in ("PROJ_LIB", "PROJ_DATA", "GDAL_DATA")}
    run = subprocess.run(
        [gdalinfo, tmp_path / "map.tif"], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert "NoData Value=255" in run.stdout
    assert "ColorInterp=Palette" in run.stdout
    for label, cls in enumerate(SCHEMA.classes):
        assert f"{label}: {cls.name}\n" in run.stdout, "category names"
        assert f"<F>{cls.name}</F>" in run.stdout, "attribute table"
        assert f"{label}: {','.join(map(str, cls.shown))},255" in run.stdout, "palette"
    assert 'ID["EPSG",32640]' in run.stdout
    assert run.stderr == ""


# --- georeference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [from_origin(325_000, 2_785_000, 0.5, 0.5), Affine(0.4, 0.3, 10, 0.3, -0.4, 20), Affine(0.5, 0, 10, 0, 0.5, 20)],
    ids=["north up", "rotated", "south up"],
)
def test_transform_and_crs(tmp_path: Path, transform: Affine) -> None:
    write(tmp_path / "map.tif", some_labels(9, 8), georeference={"crs": "EPSG:32640", "transform": transform})
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.crs == CRS.from_epsg(32640)
        assert dataset.transform.almost_equals(transform)


def test_ground_control_points(tmp_path: Path) -> None:
    points = [GroundControlPoint(row, col, 50 + col / 10, 25 - row / 10, 0) for row in (0, 9) for col in (0, 8)]
    georeference = {"crs": CRS.from_epsg(4326), "gcps": points}
    write(tmp_path / "map.tif", some_labels(9, 8), georeference=georeference)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        found, crs = dataset.gcps
        assert crs == CRS.from_epsg(4326)
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert dataset.transform.is_identity


def test_no_place_at_all(tmp_path: Path) -> None:
    write(tmp_path / "map.tif", some_labels(9, 8))
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.crs is None
        assert dataset.transform.is_identity


def test_a_crs_that_geotiff_has_no_words_for(tmp_path: Path) -> None:
    """GDAL keeps such a CRS beside the file, under the name the file has while it is written."""
    crs = CRS.from_user_input("+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=30 +lon_0=10 +datum=WGS84 +type=crs")
    write_raster(tmp_path / "plain.tif", noise(9, 8, bands=1), crs=crs, transform=from_origin(0, 9, 1, 1))
    with rasterio.open(tmp_path / "plain.tif") as dataset:
        expected = dataset.crs
    folder = tmp_path / "out"
    write(folder / "map.tif", some_labels(9, 8), georeference={"crs": crs, "transform": from_origin(0, 9, 1, 1)})
    assert names_in(folder) == ["map.tif", "map.tif.aux.xml"]
    with rasterio.open(folder / "map.tif") as dataset:
        assert dataset.crs == expected
    categories = sidecar_of(folder / "map.tif").findall("PAMRasterBand/CategoryNames/Category")
    assert [item.text for item in categories] == list(SCHEMA.class_names)


# --- all or nothing -------------------------------------------------------------------------------


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError("boom"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("rows", [0, 1, 599, 600])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException, rows: int) -> None:
    writer = LabelMapWriter(tmp_path / "map.tif", 600, 700, SCHEMA, {}, {})
    with pytest.raises(type(error)) as caught, writer:  # noqa: PT012
        writer.write_rows(some_labels(rows, 700))
        assert [name for name in names_in(tmp_path) if not name.startswith(".")] == [], "no final name yet"
        raise error
    assert caught.value is error
    assert names_in(tmp_path) == []


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a power cut leaves the old map or the new one."""
    steps: list[tuple[str, str]] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().suffix))

    def rename(source: Path, target: Path) -> None:
        steps.append(("rename", Path(target).suffix))
        replace(source, target)

    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", fsync)
    monkeypatch.setattr("cdkd_edge.core.files.os.replace", rename)
    write(tmp_path / "map.tif", some_labels(9, 8))
    for suffix in (".tif", ".xml"):
        assert steps.index(("sync", suffix)) < steps.index(("rename", suffix))
        assert ("sync", "") in steps[steps.index(("rename", suffix)) :], "the folder"


def test_an_older_label_map_survives_an_error(tmp_path: Path) -> None:
    write(tmp_path / "map.tif", some_labels(9, 8))
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with pytest.raises(BoomError), LabelMapWriter(tmp_path / "map.tif", 600, 700, SCHEMA, {}, {}):
        raise BoomError
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before


def test_an_older_label_map_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "map.tif", some_labels(9, 8))
    labels = some_labels(600, 700)
    write(tmp_path / "map.tif", labels)
    assert (read_labels(tmp_path / "map.tif") == labels).all()
    assert names_in(tmp_path) == ["map.tif", "map.tif.aux.xml"]


@pytest.mark.parametrize("rows", [0, 1, 8])
def test_missing_rows_are_an_error(tmp_path: Path, rows: int) -> None:
    writer = LabelMapWriter(tmp_path / "map.tif", 9, 8, SCHEMA, {}, {})
    with pytest.raises(SceneError, match="of 9 rows were written"), writer:
        writer.write_rows(some_labels(rows, 8))
    assert names_in(tmp_path) == []


class Stubborn:
    """A dataset whose last blocks cannot be flushed, as GDAL tells it: in the log, or by an error."""

    def __init__(self, dataset: Any, message: str | None) -> None:
        self._dataset, self._message = dataset, message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def close(self) -> None:
        self._dataset.close()
        if self._message is None:
            raise RasterioIOError("flush failed")
        logging.getLogger("rasterio._env").error(self._message)


@pytest.mark.parametrize("message", [None, "CPLE_FileIO in map.tif: write error"])
def test_an_error_that_shows_only_when_the_file_is_closed(tmp_path: Path, message: str | None) -> None:
    writer = LabelMapWriter(tmp_path / "map.tif", 9, 8, SCHEMA, {}, {})
    with pytest.raises(SceneError, match=r"map\.tif failed: .*(flush failed|write error)"), writer:  # noqa: PT012
        writer._dataset = Stubborn(writer._dataset, message)
        writer.write_rows(some_labels(9, 8))
    assert names_in(tmp_path) == []


def test_folders_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "map.tif", some_labels(9, 8))
    assert names_in(tmp_path) == ["a", "a/b", "a/b/map.tif", "a/b/map.tif.aux.xml"]


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "map.tif", some_labels(9, 8))
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "deeper" / "map.tif", some_labels(9, 8))
    assert names_in(tmp_path) == ["file"]


def test_a_folder_under_the_final_name(tmp_path: Path) -> None:
    (tmp_path / "map.tif").mkdir()
    with pytest.raises((OSError, SceneError)):
        write(tmp_path / "map.tif", some_labels(9, 8))
    assert names_in(tmp_path) == ["map.tif"]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises((OSError, SceneError)):
        write(tmp_path / f"{'m' * 250}.tif", some_labels(9, 8))
    assert names_in(tmp_path) == []


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(SceneError):
        write(tmp_path / "map-\udcff.tif", some_labels(9, 8))
    assert names_in(tmp_path) == []


def test_writing_two_maps_at_once_keeps_errors_apart(tmp_path: Path) -> None:
    """An error GDAL reports in another thread, about another file, is not this label map's."""
    labels = some_labels(9, 8)
    writer = LabelMapWriter(tmp_path / "map.tif", 9, 8, SCHEMA, {}, {})

    def elsewhere() -> None:
        logging.getLogger("rasterio._env").error("CPLE_AppDefined in scene.tif: a bad block")

    with writer:
        reader = threading.Thread(target=elsewhere)
        reader.start()
        reader.join()
        writer.write_rows(labels)
    assert (read_labels(tmp_path / "map.tif") == labels).all()


# --- file systems that refuse ---------------------------------------------------------------------


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("NOT CHECKED: mounting a small file system needs root on Linux")
    run = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"NOT CHECKED: cannot mount a tmpfs here: {run.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    yield from mounted(tmp_path / "disk", "size=1m")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "ro,size=1m")


FULL = [
    (3000, 3000, 3000),  # fails while rows are written
    (3000, 3000, 100),
    (1100, 1100, 1100),  # fails only when GDAL flushes its cache at the end
    (300, 9000, 300),  # strips
]


@pytest.mark.parametrize(("height", "width", "rows"), FULL)
def test_a_full_disk_leaves_nothing(small_disk: Path, height: int, width: int, rows: int) -> None:
    with pytest.raises(CdkdEdgeError, match=r"map\.tif"):
        write(small_disk / "map.tif", noise(height, width, bands=1)[0], rows=rows)
    assert names_in(small_disk) == []
    write(small_disk / "map.tif", some_labels(300, 300))  # the room is free again
    assert names_in(small_disk) == ["map.tif", "map.tif.aux.xml"]


@pytest.mark.parametrize(("height", "width", "rows"), FULL)
def test_a_full_disk_is_called_a_full_disk(small_disk: Path, height: int, width: int, rows: int) -> None:
    with pytest.raises(SystemRefusalError, match="no space left"):
        write(small_disk / "map.tif", noise(height, width, bands=1)[0], rows=rows)


@pytest.mark.parametrize("pages_short", range(-2, 7))
def test_a_disk_that_is_all_but_full(small_disk: Path, pages_short: int) -> None:
    """Wherever in the file or in its sidecar the room ends: all of the label map, or nothing and an error."""
    labels = some_labels(300, 300)
    write(small_disk / "map.tif", labels)
    page = 4096
    room = sum(-(-(small_disk / name).stat().st_size // page) * page for name in names_in(small_disk))
    for name in names_in(small_disk):
        (small_disk / name).unlink()
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - room + pages_short * page))
    try:
        write(small_disk / "map.tif", labels)
    except (OSError, CdkdEdgeError):
        assert pages_short > 0
        assert names_in(small_disk) == ["ballast"]
    else:
        assert pages_short <= 0
        assert names_in(small_disk) == ["ballast", "map.tif", "map.tif.aux.xml"]
        assert (read_labels(small_disk / "map.tif") == labels).all()


def test_a_read_only_disk(read_only_disk: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as caught:
        write(read_only_disk / "map.tif", some_labels(9, 8))
    assert not isinstance(caught.value, SceneError)
    with pytest.raises(OSError, match="Read-only"):
        write(read_only_disk / "new" / "map.tif", some_labels(9, 8))
