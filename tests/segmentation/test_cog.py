"""Cloud-optimised label maps: judged by rio-cogeo and GDAL's own tools, whole or absent, the same bytes every time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, ProbabilityEngine, names_in, noise, read_labels, write_raster

from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.styles import ClassArea
from cdkd_edge.segmentation import geotiff
from cdkd_edge.segmentation.geotiff import write_cog
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

UTM = {"crs": "EPSG:32640", "transform": from_origin(300_000, 2_700_000, 0.5, 0.5)}


def patches(height: int, width: int, side: int = 7, seed: int = 3) -> npt.NDArray[np.uint8]:
    """Squares of the five classes and of no data."""
    coarse = np.random.default_rng(seed).integers(0, 6, (-(-height // side), -(-width // side)), np.uint8)
    coarse[coarse == 5] = NO_LABEL
    return np.kron(coarse, np.ones((side, side), np.uint8))[:height, :width]


def label_map(path: Path, labels: npt.NDArray[np.uint8], **profile: Any) -> Path:
    tiled = {"tiled": True, "blockxsize": 512, "blockysize": 512} if min(labels.shape) >= 512 else {}
    return write_raster(path, labels[None], nodata=NO_LABEL, compress="deflate", **tiled, **profile)


def gdal_tool(name: str, *arguments: str | Path) -> str:
    """Run one of GDAL's own programs; what it says on standard output."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed, so GDAL's own view of the file was not asked for")
    # rasterio's wheel points GDAL and PROJ to its own data, which need not be the program's.
    environment = {key: value for key, value in os.environ.items() if key not in ("GDAL_DATA", "PROJ_DATA", "PROJ_LIB")}
    command = [program, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (512, 512), (513, 700), (1300, 2100)])
def test_valid_and_the_same_labels(tmp_path: Path, height: int, width: int) -> None:
    labels = patches(height, width)
    write_cog(label_map(tmp_path / "map.tif", labels, **UTM), tmp_path / "cog.tif", SCHEMA, {})
    assert (read_labels(tmp_path / "cog.tif") == labels).all()
    validate = pytest.importorskip("rio_cogeo", reason="rio-cogeo judges the layout").cog_validate
    valid, errors, warnings = validate(tmp_path / "cog.tif", strict=True)
    assert (valid, errors, warnings) == (True, [], [])
    assert names_in(tmp_path) == ["cog.tif", "cog.tif.aux.xml", "map.tif"]


def test_content(tmp_path: Path) -> None:
    source = label_map(tmp_path / "map.tif", patches(900, 1100), **UTM)
    with rasterio.open(source, "r+") as dataset:
        dataset.update_tags(SCENE="a scene")
    write_cog(source, tmp_path / "cog.tif", SCHEMA, {"ENGINE": "e = m", "SCENE": "ü <&>"})
    with rasterio.open(tmp_path / "cog.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.nodata == NO_LABEL
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.compression.value == "DEFLATE"
        assert (dataset.tags()["ENGINE"], dataset.tags()["SCENE"]) == ("e = m", "ü <&>")
        assert (dataset.crs, dataset.transform) == (CRS.from_epsg(32640), UTM["transform"])
        assert [dataset.colormap(1)[label] for label in range(5)] == [(*cls.shown, 255) for cls in SCHEMA.classes]
        assert dataset.colormap(1)[NO_LABEL] == (0, 0, 0, 0)
        assert dataset.overviews(1) == [2, 4]


def test_the_source_is_left_as_it_is_and_may_be_replaced(tmp_path: Path) -> None:
    labels = patches(600, 600)
    source = label_map(tmp_path / "map.tif", labels)
    before = source.read_bytes()
    write_cog(source, tmp_path / "cog.tif", SCHEMA, {"A": "b"})
    assert source.read_bytes() == before
    write_cog(source, source, SCHEMA, {"A": "b"})
    assert source.read_bytes() == (tmp_path / "cog.tif").read_bytes()


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"crs": "EPSG:4326", "transform": from_origin(55, 25, 1e-5, 1e-5)},
        {"crs": "EPSG:32640", "transform": Affine.translation(3e5, 2.7e6) * Affine.rotation(20) * Affine.scale(2, -2)},
        {"crs": '+proj=laea +lat_0=12 +lon_0=3 +ellps=bessel +units=us-ft', "transform": from_origin(0, 0, 2, 2)},
    ],
    ids=["none", "geographic", "rotated", "unusual"],
)  # fmt: skip
def test_georeference(tmp_path: Path, place: dict[str, Any]) -> None:
    source = label_map(tmp_path / "map.tif", patches(520, 530), **place)
    write_cog(source, tmp_path / "cog.tif", SCHEMA, {})
    with rasterio.open(source) as before, rasterio.open(tmp_path / "cog.tif") as after:
        assert after.crs == before.crs
        assert after.transform.almost_equals(before.transform)
    assert names_in(tmp_path) == ["cog.tif", "cog.tif.aux.xml", "map.tif"]


def test_ground_control_points(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 55 + c / 1e4, 25 - r / 1e4) for r in (0, 500) for c in (0, 510)]
    source = label_map(tmp_path / "map.tif", patches(520, 530), gcps=points, crs=CRS.from_epsg(4326))
    write_cog(source, tmp_path / "cog.tif", SCHEMA, {})
    with rasterio.open(tmp_path / "cog.tif") as dataset:
        kept, crs = dataset.gcps
        assert crs == CRS.from_epsg(4326)
        assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]


def test_overviews_hold_the_most_frequent_class(tmp_path: Path) -> None:
    labels = patches(1024, 1024, side=3)
    write_cog(label_map(tmp_path / "map.tif", labels), tmp_path / "cog.tif", SCHEMA, {})
    with rasterio.open(tmp_path / "cog.tif", overview_level=0) as dataset:
        overview = dataset.read(1)
    fours = labels.reshape(512, 2, 512, 2).transpose(0, 2, 1, 3).reshape(512, 512, 4)
    counts = np.stack([(fours == label).sum(2) for label in range(len(SCHEMA))])
    nothing = counts.sum(0) == 0
    assert nothing.any(), "the test has pixels without any class below them"
    assert ((overview == NO_LABEL) == nothing).all(), "no data only where there is nothing else"
    chosen = np.take_along_axis(counts, np.where(nothing, 0, overview)[None].astype(int), 0)[0]
    assert (chosen == counts.max(0)).all(), "of the classes below it, one of the most frequent"


@pytest.mark.parametrize(("height", "width", "levels"), [(512, 512, 0), (513, 40, 1), (1100, 600, 2), (1100, 1, 0)])
def test_the_smallest_overview_fits_into_a_block(tmp_path: Path, height: int, width: int, levels: int) -> None:
    write_cog(label_map(tmp_path / "map.tif", patches(height, width)), tmp_path / "cog.tif", SCHEMA, {})
    with rasterio.open(tmp_path / "cog.tif") as dataset:
        assert len(dataset.overviews(1)) == levels


def test_overviews_of_numbers_do_not_mix_them(tmp_path: Path) -> None:
    values = noise(1100, 900, bands=1)[0]
    write_cog(label_map(tmp_path / "map.tif", values), tmp_path / "cog.tif", None, {})
    with rasterio.open(tmp_path / "cog.tif", overview_level=1) as overview:
        assert (overview.read(1) == values[::4, ::4]).all()


def test_the_same_bytes_from_any_number_of_threads(tmp_path: Path) -> None:
    source = label_map(tmp_path / "map.tif", patches(1500, 1500), **UTM)
    contents = set()
    for index, threads in enumerate((1, 2, 7, None)):
        path = tmp_path / f"{index}" / "cog.tif"
        write_cog(source, path, SCHEMA, {"A": "b"}, threads=threads)
        contents.add((path.read_bytes(), (path.parent / "cog.tif.aux.xml").read_bytes()))
    assert len(contents) == 1


# --- as GDAL sees it ------------------------------------------------------------------------------


def test_gdalinfo_and_gdal_translate(tmp_path: Path) -> None:
    labels = patches(700, 900)
    source = label_map(tmp_path / "map.tif", labels, **UTM)
    areas = [ClassArea(i, name, 1000 + i, i / 8) for i, name in enumerate(SCHEMA.class_names)]
    write_cog(source, tmp_path / "cog.tif", SCHEMA, {"SCENE": "s"}, areas=areas)
    told = json.loads(gdal_tool("gdalinfo", "-json", tmp_path / "cog.tif"))
    band = told["bands"][0]
    assert told["metadata"]["IMAGE_STRUCTURE"]["LAYOUT"] == "COG"
    assert told["metadata"][""]["SCENE"] == "s"
    assert (band["type"], band["noDataValue"], band["colorInterpretation"]) == ("Byte", 255, "Palette")
    assert [o["size"] for o in band["overviews"]] == [[450, 350]]
    text = gdal_tool("gdalinfo", tmp_path / "cog.tif")
    assert "Categories:" in text
    assert all(f"{i}: {name}" in text for i, name in enumerate(SCHEMA.class_names))
    table = ElementTree.fromstring(text[text.index("<GDALRasterAttributeTable") :])
    assert table.get("tableType") == "thematic"
    fields = [(f.findtext("Name"), f.findtext("Type"), f.findtext("Usage")) for f in table.findall("FieldDefn")]
    assert fields[-2:] == [("Pixels", "1", "1"), ("Area_ha", "1", "0")]
    rows = [[f.text for f in row.findall("F")] for row in table.findall("Row")]
    assert rows[3][:5] == ["3", "vegetation", *map(str, SCHEMA.classes[3].shown)]
    assert [float(text or "") for text in rows[3][5:]] == [1003.0, 0.375]

    gdal_tool("gdal_translate", "-q", "-expand", "rgba", "-of", "PNG", tmp_path / "cog.tif", tmp_path / "map.png")
    with rasterio.open(tmp_path / "map.png") as picture:
        pixels = picture.read()
    assert (pixels[:3].transpose(1, 2, 0) == SCHEMA.palette()[labels])[labels != NO_LABEL].all()
    assert ((pixels[3] == 0) == (labels == NO_LABEL)).all()

    gdal_tool("gdal_translate", "-q", "-of", "COG", tmp_path / "cog.tif", tmp_path / "again.tif")
    assert (read_labels(tmp_path / "again.tif") == labels).all()
    names = ElementTree.parse(tmp_path / "again.tif.aux.xml").iter("Category")
    assert [name.text for name in names] == list(SCHEMA.class_names), "GDAL took the names along"


# --- all or nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bands", "dtype", "told"), [(3, "uint8", "3 bands of uint8"), (1, "uint16", "1 band of uint16")]
)
def test_what_is_no_label_map(tmp_path: Path, bands: int, dtype: str, told: str) -> None:
    source = write_raster(tmp_path / "scene.tif", np.zeros((bands, 20, 20), dtype))
    with pytest.raises(SceneError, match=f"not a label map: it has {told}"):
        write_cog(source, tmp_path / "cog.tif", SCHEMA, {})
    assert names_in(tmp_path) == ["scene.tif"]


@pytest.mark.parametrize("content", [b"", b"no raster", None], ids=["empty", "text", "absent"])
def test_what_is_no_raster(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "map.tif").write_bytes(content)
    before = names_in(tmp_path)
    with pytest.raises(SceneError, match=r"map\.tif (does not exist|is not a raster)"):
        write_cog(tmp_path / "map.tif", tmp_path / "cog.tif", SCHEMA, {})
    assert names_in(tmp_path) == before


def test_a_truncated_source(tmp_path: Path) -> None:
    source = label_map(tmp_path / "map.tif", np.random.default_rng(0).integers(0, 5, (1500, 1500), np.uint8))
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    (tmp_path / "cog.tif").write_bytes(b"older")
    with pytest.raises(SceneError, match=r"writing .*cog\.tif failed"):
        write_cog(source, tmp_path / "cog.tif", SCHEMA, {})
    assert names_in(tmp_path) == ["cog.tif", "map.tif"]
    assert (tmp_path / "cog.tif").read_bytes() == b"older"


def test_interrupted_before_the_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(geotiff, "label_map_xml", interrupt)
    source = label_map(tmp_path / "map.tif", patches(600, 600))
    with pytest.raises(KeyboardInterrupt):
        write_cog(source, tmp_path / "cog.tif", SCHEMA, {})
    assert names_in(tmp_path) == ["map.tif"]


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
import cdkd_edge.segmentation.geotiff as cog
from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.labels import load_schema
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        cog.write_cog(Path(sys.argv[1]), Path(sys.argv[2]), load_schema("dubai"), {})
    except CdkdEdgeError as error:
        print(type(error).__name__, error)
    else:
        print("written with", limit)
"""


def test_no_more_may_be_written(tmp_path: Path) -> None:
    """At any moment (a limit on the size of files stands for a disk that is full)."""
    labels = np.random.default_rng(0).integers(0, 5, (1100, 1100), np.uint8)
    source = label_map(tmp_path / "map.tif", labels)
    write_cog(source, tmp_path / "whole" / "cog.tif", SCHEMA, {})
    size = (tmp_path / "whole" / "cog.tif").stat().st_size
    (tmp_path / "new").mkdir()
    limits = [str(int(size * share)) for share in (0.0, 0.05, 0.3, 0.6, 0.9)] + [str(size - 1)]
    command = [sys.executable, "-c", SMALL_DISK, str(source), str(tmp_path / "new" / "cog.tif"), *limits]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split(" writing ")[0] for line in answer.stdout.splitlines()] == ["SceneError"] * 6, answer.stdout
    assert names_in(tmp_path / "new") == []


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = label_map(tmp_path / "map.tif", patches(600, 600))
    source.write_bytes(source.read_bytes()[:3000])
    monkeypatch.setattr("cdkd_edge.raster.open.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(SystemRefusalError, match="no space left"):
        write_cog(source, tmp_path / "cog.tif", SCHEMA, {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = label_map(tmp_path / "map.tif", patches(60, 60))
    with pytest.raises(OSError, match="file"):
        write_cog(source, tmp_path / "file" / "cog.tif", SCHEMA, {})


def test_unicode_and_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "中文 & <ü>"
    folder.mkdir()
    labels = patches(600, 600)
    source = label_map(folder / "kárta 'x' \"y\".tif", labels)
    write_cog(source, folder / "ç.tif", SCHEMA, {})
    assert (read_labels(folder / "ç.tif") == labels).all()


def test_the_confidence_raster_is_one_too(tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "scene.tif", noise(1100, 700), photometric="RGB", **UTM)
    segment_scene(ProbabilityEngine(256), scene, tmp_path / "map.tif", SegmentOptions(confidence=True))
    path = tmp_path / "map_confidence.tif"
    validate = pytest.importorskip("rio_cogeo", reason="rio-cogeo judges the layout").cog_validate
    assert validate(str(path), quiet=True) == (True, [], [])
    with rasterio.open(path) as dataset:
        percent = dataset.read(1)
        assert dataset.overviews(1) == [2, 4]
        assert dataset.nodata == 255
        assert dataset.colorinterp[0].name == "gray"
        assert dataset.tags()["UNIT"].startswith("per cent")
        assert (dataset.read(1, out_shape=(550, 350)) == percent[::2, ::2]).all()
    assert not (tmp_path / "map_confidence.tif.aux.xml").exists()


def test_gdal_keeps_as_much_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """rasterio takes bytes; GDAL's environment variable is in MB."""
    program = "from cdkd_edge.raster import open as opening; from rasterio.env import get_gdal_config as g; "
    program += "import rasterio; e = opening.gdal('x'); e.__enter__(); print(g('GDAL_CACHEMAX'))"
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == f"{32 << 20}\n"
    monkeypatch.setenv("GDAL_CACHEMAX", "77")
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == f"{77 << 20}\n"


@pytest.mark.parametrize("shape", [(1100, 1), (1, 1100), (1100, 2), (3, 2100)])
def test_maps_of_a_few_pixels_across_are_cogs_too(tmp_path: Path, shape: tuple[int, int]) -> None:
    """An overview that is no narrower than the map is none to rio-cogeo."""
    scene = write_raster(tmp_path / "scene.tif", noise(*shape), photometric="RGB", **UTM)
    segment_scene(ProbabilityEngine(256), scene, tmp_path / "map.tif", SegmentOptions(confidence=True))
    validate = pytest.importorskip("rio_cogeo", reason="rio-cogeo judges the layout").cog_validate
    for name in ("map.tif", "map_confidence.tif"):
        whole, errors, _ = validate(str(tmp_path / name), quiet=True)
        assert (whole, errors) == (True, [])


PEAK = """
import sys
from pathlib import Path
from cdkd_edge.core.labels import load_schema
from cdkd_edge.segmentation.geotiff import write_cog
def megabytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
before = megabytes("VmRSS")
write_cog(Path(sys.argv[1]), Path(sys.argv[2]), load_schema("dubai"), {})
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell memory")
def test_overviews_of_a_wide_map_take_little_memory(tmp_path: Path) -> None:
    """100,000 px wide: GDAL's own choice of rows at a time took 280 MB, the label map's share of `segment` is 300."""
    labels = np.tile(noise(1, 1000, seed=3)[0, 0] % 5, (2816, 100)).astype(np.uint8)
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    plain = write_raster(tmp_path / "plain.tif", labels[None], nodata=255, **layout)
    words = [sys.executable, "-c", PEAK, str(plain), str(tmp_path / "map.tif")]
    found = float(subprocess.check_output(words, text=True, stderr=subprocess.DEVNULL))
    assert found < 200, found
