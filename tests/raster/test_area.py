"""Areas of interest and ground sample distances: the right pixels, at the right size."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.features import geometry_mask
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform, transform_geom
from scene_helpers import FakeEngine, ProbabilityEngine, noise, read_labels, red_labels, write_raster

from cdkd_edge.core.errors import MissingExtraError, SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.aoi import read_area
from cdkd_edge.raster.bands import Validity
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.raster.resample import ground_sample_distance
from cdkd_edge.raster.stretch import stretch_limits
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

BANDS, PERCENTILES = (1, 2, 3), Stretch(2, 98, percentiles=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]

TILE = 64
UTM = {"crs": "EPSG:32640", "transform": from_origin(325_000, 2_785_000, 2, 2)}
ROTATED = {"crs": "EPSG:32640", "transform": Affine(1.6, 1.2, 325_000, 1.2, -1.6, 2_785_000)}
LON_LAT = {"crs": "EPSG:4326", "transform": from_origin(55, 25, 2e-5, 2e-5)}


def triangle(place: dict[str, Any]) -> dict[str, Any]:
    """A polygon over a part of a scene of 300 x 400 px, in the scene's coordinates."""
    corners = [place["transform"] * corner for corner in ((60.3, 40.2), (340.1, 120.7), (150.6, 280.4), (60.3, 40.2))]
    return {"type": "Polygon", "coordinates": [[list(corner) for corner in corners]]}


def in_lon_lat(place: dict[str, Any], geometry: dict[str, Any]) -> Any:
    return transform_geom(place["crs"], "OGC:CRS84", geometry)


# --- areas of interest ----------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["crop", "hann"])
@pytest.mark.parametrize("place", [UTM, ROTATED, LON_LAT], ids=["UTM", "rotated", "geographic"])
def test_labels_inside_are_those_of_the_whole_and_outside_there_are_none(
    tmp_path: Path, place: dict[str, Any], merge: str
) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(300, 400), **place)
    area = tmp_path / "area.geojson"
    area.write_text(json.dumps(in_lon_lat(place, triangle(place))))
    engine = ProbabilityEngine(TILE)
    result = segment_scene(engine, path, tmp_path / "map.tif", SegmentOptions(aoi=str(area), merge=merge))
    whole = segment_scene(ProbabilityEngine(TILE), path, tmp_path / "whole.tif", SegmentOptions(merge=merge))
    inside = ~geometry_mask([triangle(place)], (300, 400), place["transform"])
    labels = read_labels(tmp_path / "map.tif")
    expected = np.where(inside, read_labels(tmp_path / "whole.tif"), NO_LABEL)
    assert (labels != expected).sum() <= 3, "corners go through longitude and latitude and back"
    assert 0 < engine.launches < whole.tiles * 0.75
    assert result.tiles == whole.tiles
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags()["AREA_OF_INTEREST"].startswith("sha256:")


def test_what_lies_outside_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(600, 800), **UTM, tiled=True, blockxsize=64, blockysize=64)
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_ROWS", 64)
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_COLUMNS", 64)
    seen = np.zeros((600, 800), bool)
    read_window = SceneReader.read_window

    def watched(self: SceneReader, top: int, left: int, height: int, width: int, **how: Any) -> Any:
        seen[top : top + height, left : left + width] = True
        return read_window(self, top, left, height, width, **how)

    monkeypatch.setattr(SceneReader, "read_window", watched)
    box = "325100,2784800,325200,2784900"
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(aoi=box))
    assert 0.01 < seen.mean() < 0.2
    labels = read_labels(tmp_path / "map.tif")
    assert (labels[50:100, 50:100] != NO_LABEL).all()
    assert (labels != NO_LABEL).sum() == 50 * 50


def test_a_box_in_longitude_and_latitude(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(300, 400), **UTM)
    corners = transform("EPSG:32640", "EPSG:4326", [325_200, 325_500], [2_784_700, 2_784_900])
    box = f"{corners[0][0]:.9f},{corners[1][0]:.9f},{corners[0][1]:.9f},{corners[1][1]:.9f}"
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(aoi=box))
    labelled = read_labels(tmp_path / "map.tif") != NO_LABEL
    assert labelled[55:145, 105:245].all()
    assert not labelled[:45].any()
    assert not labelled[:, 255:].any()


@pytest.mark.parametrize("wrap", ["geometry", "feature", "collection", "geometries", "2008"])
def test_any_geojson(tmp_path: Path, wrap: str) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(300, 400), **UTM)
    geometry: Any = in_lon_lat(UTM, triangle(UTM))
    feature = {"type": "Feature", "properties": {"name": "Ω"}, "geometry": geometry}
    point = {"type": "Point", "coordinates": [0, 0]}
    document = {
        "geometry": geometry,
        "feature": feature,
        "collection": {"type": "FeatureCollection", "features": [{**feature, "geometry": None}, feature]},
        "geometries": {"type": "GeometryCollection", "geometries": [point, geometry]},
        "2008": {
            "type": "FeatureCollection",
            "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32640"}},
            "features": [{**feature, "geometry": triangle(UTM)}],
        },
    }[wrap]
    (tmp_path / "område.geojson").write_bytes(b"\xef\xbb\xbf" + json.dumps(document).encode())
    options = SegmentOptions(aoi=str(tmp_path / "område.geojson"))
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    inside = ~geometry_mask([triangle(UTM)], (300, 400), UTM["transform"])
    assert ((read_labels(tmp_path / "map.tif") != NO_LABEL) != inside).sum() <= 3


def rectangle(left: float, bottom: float, right: float, top: float) -> list[list[list[float]]]:
    return [[[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]]


def labelled(tmp_path: Path, place: dict[str, Any], area: Any) -> Any:
    """Which pixels of a scene of 100 x 200 px have a label, ``[100, 200]``."""
    path = write_raster(tmp_path / "scene.tif", noise(100, 200), **place)
    if isinstance(area, dict):
        (tmp_path / "area.geojson").write_text(json.dumps(area))
        area = tmp_path / "area.geojson"
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(aoi=str(area)))
    return read_labels(tmp_path / "map.tif") != NO_LABEL


SPLIT = {"type": "MultiPolygon", "coordinates": [rectangle(179.95, -1, 180, 1), rectangle(-180, -1, -179.95, 1)]}
BEYOND = {"type": "Polygon", "coordinates": rectangle(-180.05, -1, -179.95, 1)}


@pytest.mark.parametrize("area", [SPLIT, BEYOND, "179.95,-1,-179.95,1"], ids=["split", "beyond", "box"])
@pytest.mark.parametrize(
    ("crs", "left", "step"),
    [
        ("EPSG:4326", 179.9, 0.001),
        ("EPSG:4326", -180.1, 0.001),
        ("EPSG:4258", -180.1, 0.001),
        ("EPSG:3832", None, 111.31949),
        ("EPSG:32660", None, 111.4),
        ("EPSG:32601", None, 111.4),
    ],
)
def test_an_area_across_the_antimeridian_has_both_sides(
    tmp_path: Path, crs: str, left: float | None, step: float, area: Any
) -> None:
    if left is None:
        left = transform("EPSG:4326", crs, [179.9], [0])[0][0]
    found = labelled(tmp_path, {"crs": crs, "transform": from_origin(left, 50 * step, step, step)}, area)
    columns = np.flatnonzero(found.any(axis=0))
    assert (found == found[0]).all()
    assert abs(columns[0] - 50) <= 1
    assert abs(columns[-1] - 149) <= 1
    assert len(columns) == columns[-1] - columns[0] + 1


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4258", "EPSG:3857"])
def test_on_a_map_of_the_world_both_sides_are_at_its_ends(tmp_path: Path, crs: str) -> None:
    side = 180.0 if crs != "EPSG:3857" else 20_037_508.342789244
    world = {"crs": crs, "transform": from_origin(-side, side / 100, side / 100, side / 5000)}
    pacific = {"type": "MultiPolygon", "coordinates": [rectangle(170, -1, 180, 1), rectangle(-180, -1, -170, 1)]}
    for area, columns in (
        (pacific, [*range(6), *range(194, 200)]),
        ("170,-1,-170,1", [*range(6), *range(194, 200)]),
        ("175,-1,180,1", [*range(197, 200)]),
        ("-180,-1,-175,1", [*range(3)]),
    ):
        found = labelled(tmp_path, world, area)
        assert np.flatnonzero(found.any(axis=0)).tolist() == columns
    assert labelled(tmp_path, world, "-180,-80,180,80").all()


def test_an_area_in_metres_across_the_antimeridian_on_a_map_of_the_world(tmp_path: Path) -> None:
    world = {"crs": "EPSG:4326", "transform": from_origin(-180, 5, 1.8, 0.1)}
    area = {"type": "Polygon", "coordinates": rectangle(1e6, -1e5, 1.9e7, 1e5)}  # from 150 degrees east on
    area["crs"] = {"type": "name", "properties": {"name": "EPSG:3832"}}
    columns = np.flatnonzero(labelled(tmp_path, world, area).any(axis=0))
    assert columns.tolist() == [*range(78), *range(188, 200)]


def test_a_map_that_is_cut_at_the_antimeridian(tmp_path: Path) -> None:
    """Where the scene ends with its map, the area ends there too; where it goes on, the area is refused."""
    edge = 20_037_508.34
    ends = {"crs": "EPSG:3857", "transform": from_origin(edge - 200 * 111.31949, 5000, 111.31949, 100)}
    columns = np.flatnonzero(labelled(tmp_path, ends, SPLIT).any(axis=0))
    assert (columns[0], columns[-1]) == (150, 199)
    goes_on = {"crs": "EPSG:3857", "transform": from_origin(edge - 100 * 111.31949, 5000, 111.31949, 100)}
    for area in (SPLIT, BEYOND):
        with pytest.raises(SceneError, match="projection is cut"):
            labelled(tmp_path, goes_on, area)


@pytest.mark.parametrize(
    "place", [UTM, LON_LAT, {"crs": "EPSG:3857", "transform": from_origin(6e6, 3e6, 2, 2)}], ids=["UTM", "4326", "3857"]
)
def test_the_whole_world_is_all_of_a_scene(tmp_path: Path, place: dict[str, Any]) -> None:
    world = {"type": "Polygon", "coordinates": rectangle(-180, -90, 180, 90)}
    assert labelled(tmp_path, place, "-180,-90,180,90").all()
    assert labelled(tmp_path, place, world).all()


def test_an_area_around_a_pole(tmp_path: Path) -> None:
    place = {"crs": "EPSG:3031", "transform": from_origin(-2e6, 1e6, 20_000, 20_000)}
    ring = [[x if x <= 180 else x - 360, -80] for x in range(0, 361, 5)]
    found = labelled(tmp_path, place, {"type": "Polygon", "coordinates": [ring]})
    assert found[50, 100]
    assert found.mean() == pytest.approx(math.pi * 1_090_000**2 / (100 * 200 * 20_000**2), rel=0.15)
    box = labelled(tmp_path, place, "-180,-90,180,-80")
    assert (box != found).mean() < 0.01


def test_overlapping_parts_and_heights_are_no_holes(tmp_path: Path) -> None:
    part = [[[x, y, 7] for x, y in ring] for ring in rectangle(325_010, 2_784_900, 325_100, 2_784_950)]
    crs = {"type": "name", "properties": {"name": "EPSG:32640"}}
    found = labelled(tmp_path, UTM, {"type": "MultiPolygon", "crs": crs, "coordinates": [part, part]})
    assert found.sum() == 45 * 25


@pytest.mark.parametrize(
    ("area", "message"),
    [
        ("325010.1,2784900.1,325010.2,2784900.2", "holds no pixel's centre"),
        ({"type": "Polygon", "coordinates": rectangle(325_010, 2_784_900, 325_100, 2_784_950)}, "is not a longitude"),
        ({"type": "Polygon", "coordinates": rectangle(179, -1, -179, 1)}, "edge over 358 degrees"),
        ("325100,2784900,325010,2784950", "is empty"),
    ],
)
def test_areas_that_are_refused_with_the_reason(tmp_path: Path, area: Any, message: str) -> None:
    with pytest.raises(SceneError, match=message):
        labelled(tmp_path, UTM, area)


@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".fgb"])
def test_files_of_other_formats_are_areas(tmp_path: Path, suffix: str) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    path = tmp_path / f"area{suffix}"
    shapes = [shapely.box(325_010, 2_784_900, 325_100, 2_784_950), *([None] if suffix == ".gpkg" else [])]
    geometry = np.array([None if shape is None else shape.wkb for shape in shapes], object)
    pyogrio.raw.write(path, geometry, [], [], geometry_type="Polygon", crs="EPSG:32640")
    assert labelled(tmp_path, UTM, path).sum() == 45 * 25
    if suffix == ".shp":
        path.with_suffix(".prj").unlink()
        with pytest.raises(SceneError, match="names no reference system"):
            read_area(str(path))
    if suffix == ".gpkg":
        pyogrio.raw.write(path, geometry, [], [], geometry_type="Polygon", crs="EPSG:32640", layer="other", append=True)
        with pytest.raises(SceneError, match="2 layers with geometry: area, other"):
            read_area(str(path))


def test_other_formats_need_pyogrio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "area.gpkg").write_bytes(b"SQLite format 3\0 and so on")
    if "pyogrio" in sys.modules or importlib.util.find_spec("pyogrio"):
        with pytest.raises(SceneError, match="neither GeoJSON nor a file that pyogrio reads"):
            read_area(str(tmp_path / "area.gpkg"))
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    with pytest.raises(MissingExtraError, match="pyogrio") as caught:
        read_area(str(tmp_path / "area.gpkg"))
    assert "cdkd-edge[vector]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("nowhere.geojson", None, "does not exist"),
        ("1,2,3", None, "not a box of four numbers"),
        ("1,2,3,nan", None, "not a box of four numbers"),
        ("3,1,2,2", None, "is empty"),
        ("a.geojson", "", "not GeoJSON"),
        ("a.geojson", "[1, 2", "not GeoJSON"),
        ("a.geojson", "[1, 2]", "damaged"),
        ("a.geojson", '{"type": "Point", "coordinates": [1, 2]}', "holds no polygon"),
        ("a.geojson", '{"type": "FeatureCollection"}', "damaged"),
        ("a.geojson", '{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "damaged"),
        ("a.geojson", '{"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [1, 0], [0, 0]]]}', "damaged"),
        ("a.geojson", '{"type": "Polygon", "coordinates": 5}', "damaged"),
    ],
)
def test_what_is_no_area(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(text).write_text(content)
    with pytest.raises(SceneError, match=message):
        read_area(text)


def test_an_area_beside_the_scene_and_a_scene_without_a_place(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(300, 400), **UTM)
    with pytest.raises(SceneError, match="does not meet the scene"):
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(aoi="10,10,11,11"))
    bare = write_raster(tmp_path / "bare.tif", noise(300, 400))
    for options in (SegmentOptions(aoi="10,10,11,11"), SegmentOptions(gsd=1.0)):
        with pytest.raises(SceneError, match="needs a scene with a reference system"):
            segment_scene(FakeEngine(TILE), bare, tmp_path / "map.tif", options)
    points = [GroundControlPoint(row, col, 50 + col / 10, 25 - row / 10, 0) for row in (0, 8) for col in (0, 9)]
    unplaced = write_raster(tmp_path / "gcps.tif", noise(300, 400), gcps=points, crs="EPSG:4326")
    with pytest.raises(SceneError, match="needs a scene with a reference system"):
        segment_scene(FakeEngine(TILE), unplaced, tmp_path / "map.tif", SegmentOptions(gsd=1.0))


# --- ground sample distance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        ("EPSG:32640", from_origin(325_000, 2_785_000, 0.5, 0.5), (0.5, 0.5)),
        ("EPSG:32640", Affine(0.4, 0.3, 325_000, 0.3, -0.4, 2_785_000), (0.5, 0.5)),
        ("EPSG:3857", from_origin(0, 8_399_738, 2, 2), (1.0, 1.0)),  # 60 degrees north: half
        ("EPSG:4326", from_origin(10, 60, 1e-5, 1e-5), (0.5580, 1.1141)),  # of a degree: 55.80 and 111.41 km
        ("EPSG:2263", from_origin(980_000, 200_000, 3, 3), (0.9144, 0.9144)),  # US survey feet
    ],
)
def test_metres_on_the_ground(crs: str, transform: Affine, expected: tuple[float, float]) -> None:
    class Dataset:
        width, height = 100, 100

    dataset: Any = Dataset()
    dataset.crs, dataset.transform = CRS.from_user_input(crs), transform
    assert ground_sample_distance(dataset) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize("place", [UTM, ROTATED], ids=["north up", "rotated"])
@pytest.mark.parametrize("readers", [1, 3])
def test_a_coarser_scene_is_labelled_in_its_own_grid(tmp_path: Path, place: dict[str, Any], readers: int) -> None:
    small = noise(150, 200) // 128 * 128 + 30
    scene = np.repeat(np.repeat(small, 3, 1), 3, 2)
    path = write_raster(tmp_path / "scene.tif", scene, **place, tiled=True, blockxsize=64, blockysize=64)
    options = SegmentOptions(gsd=6.0, readers=readers)
    result = segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    assert (result.height, result.width) == (150, 200)
    assert any("resampled from 2 to 6 m" in note for note in result.notes)
    agreement = (read_labels(tmp_path / "map.tif") == red_labels(small[None])[0]).mean()
    assert agreement > (0.999 if place is UTM else 0.97)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.transform.almost_equals(place["transform"] * Affine.scale(3))
        assert dataset.crs == CRS.from_user_input(place["crs"])
        assert dataset.tags()["GSD_M"] == "6"


def test_a_finer_grid(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", np.full((3, 50, 60), 130, np.uint8), **UTM)
    result = segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(gsd=0.5))
    assert (result.height, result.width) == (200, 240)
    assert (read_labels(tmp_path / "map.tif") == 2).all()


def test_a_scene_that_has_the_size_already_is_read_as_it_is(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 90), **UTM)
    result = segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(gsd=2.004))
    assert "2 m already" in " ".join(result.notes)
    assert (read_labels(tmp_path / "map.tif") == red_labels(noise(70, 90)[None])[0]).all()


@pytest.mark.parametrize("kind", ["nodata", "16 bit", "float", "mask", "alpha", "NaN"])
def test_holes_stay_holes(tmp_path: Path, kind: str) -> None:
    scene: Any = np.full((4 if kind == "alpha" else 3, 120, 160), 200, np.uint8)
    profile: dict[str, Any] = {}
    options = SegmentOptions(gsd=4.0)
    if kind == "nodata":
        scene[:, 40:80, 60:100], profile = 0, {"nodata": 0}
    elif kind == "alpha":
        scene[3] = 255
        scene[3, 40:80, 60:100], profile = 0, {"photometric": "RGB", "alpha": "YES"}
    elif kind in ("16 bit", "float"):
        scene = scene.astype(np.uint16 if kind == "16 bit" else np.float32)
        scene[:, 40:80, 60:100], profile = 9, {"nodata": 9}
        options = SegmentOptions(gsd=4.0, stretch=Stretch(0, 255, percentiles=False))
    elif kind == "NaN":
        scene = scene.astype(np.float32)
        scene[:, 40:80, 60:100] = math.nan
        options = SegmentOptions(gsd=4.0, stretch=Stretch(0, 255, percentiles=False))
    path = write_raster(tmp_path / "scene.tif", scene, **UTM, **profile)
    if kind == "mask":
        with rasterio.open(path, "r+") as dataset:
            mask = np.full((120, 160), 255, np.uint8)
            mask[40:80, 60:100] = 0
            dataset.write_mask(mask)
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    expected = np.full((60, 80), 3, np.uint8)
    expected[20:40, 30:50] = NO_LABEL
    assert (read_labels(tmp_path / "map.tif") == expected).all()


@pytest.mark.parametrize(
    ("gsd", "kind", "message"),
    [
        (0.0, UsageError, "positive"),
        (-1.0, UsageError, "positive"),
        (math.nan, UsageError, "positive"),
        (1e6, SceneError, "would leave less than a pixel"),
        (1e-3, SceneError, "times finer than the scene's"),
        (1e-300, SceneError, "times finer than the scene's"),
    ],
)
def test_a_distance_that_makes_no_sense(tmp_path: Path, gsd: float, kind: type[Exception], message: str) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 90), **UTM)
    with pytest.raises(kind, match=message):
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(gsd=gsd))


# --- percentiles of large scenes ------------------------------------------------------------------


def test_percentiles_of_a_large_file_come_from_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from every block of it; and they are those of the valid pixels."""
    monkeypatch.setattr("cdkd_edge.raster.stretch._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOW", 32)
    scene = np.random.default_rng(0).integers(100, 5000, (3, 1100, 1300)).astype(np.uint16)
    scene[:, :, :300] = 0
    path = write_raster(tmp_path / "scene.tif", scene, nodata=0, tiled=True, blockxsize=64, blockysize=64)
    reader = SceneReader(path, stretch=Stretch(2, 98, percentiles=True))
    assert reader.limits is not None
    assert reader.limits == pytest.approx(np.array([[198, 4902]] * 3), abs=25)
    again = SceneReader(path, stretch=Stretch(2, 98, percentiles=True))
    assert again.limits is not None
    assert (reader.limits == again.limits).all()
    reader.close()
    again.close()
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    overview = SceneReader(path, stretch=Stretch(2, 98, percentiles=True))
    assert overview.limits == pytest.approx(np.array([[198, 4902]] * 3), abs=25)
    overview.close()


def test_windows_that_all_miss_the_data_are_not_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.raster.stretch._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOW", 8)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOWS_A_SIDE", 2)
    scene = np.zeros((3, 400, 400), np.uint16)
    scene[:, 190:210, 190:210] = 500
    path = write_raster(tmp_path / "scene.tif", scene, nodata=0)
    reader = SceneReader(path, stretch=Stretch(2, 98, percentiles=True))
    assert reader.limits is not None
    assert reader.limits[0].tolist() == [500, 501]
    reader.close()


class Recorded:
    """A dataset that notes which windows are read."""

    def __init__(self, dataset: Any) -> None:
        self.windows: list[Any] = []
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def read(self, bands: Any, window: Any = None, **options: Any) -> Any:
        self.windows.append(window)
        return self._dataset.read(bands, window=window, **options)


@pytest.mark.parametrize("strip", [1, 3, 16, 300])
def test_percentiles_of_strips_take_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    """Windows beside each other would decode the same rows again and again."""
    monkeypatch.setattr("cdkd_edge.raster.stretch._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOW", 32)
    scene = np.random.default_rng(0).integers(100, 5000, (3, 1100, 1300)).astype(np.uint16)
    path = write_raster(tmp_path / "scene.tif", scene, blockysize=strip)
    with rasterio.open(path) as dataset:
        recorded = Recorded(dataset)
        limits = stretch_limits(recorded, BANDS, PERCENTILES, path, Validity(recorded, BANDS))
    assert limits == pytest.approx(np.array([[198, 4902]] * 3), abs=60)
    rows = [row for window in recorded.windows for row in range(window.row_off, window.row_off + window.height)]
    assert len(rows) == len(set(rows))
    assert all(window.width == 1300 for window in recorded.windows)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_percentiles_of_a_large_file_hold_a_sample_only(tmp_path: Path, kind: type[Any]) -> None:
    path = tmp_path / "scene.tif"
    profile = {"count": 3, "dtype": kind, "tiled": True, "blockxsize": 256, "blockysize": 256, "sparse_ok": True}
    rasterio.open(path, "w", driver="GTiff", height=9000, width=9000, **profile).close()
    with rasterio.open(path) as dataset:
        tracemalloc.start()
        stretch_limits(dataset, BANDS, PERCENTILES, path, Validity(dataset, BANDS))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 60e6  # a window for each sample would be 150 MB and more


def test_windows_that_hold_nothing_but_nan_are_not_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdkd_edge.raster.stretch._WHOLE_PIXELS", 1000)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOW", 8)
    monkeypatch.setattr("cdkd_edge.raster.stretch._WINDOWS_A_SIDE", 2)
    scene = np.full((3, 400, 400), np.nan, np.float32)
    scene[:, 190:210, 190:210] = 500
    path = write_raster(tmp_path / "scene.tif", scene)
    with rasterio.open(path) as dataset:
        limits = stretch_limits(dataset, BANDS, PERCENTILES, path, Validity(dataset, BANDS))
    assert limits[0].tolist() == [500, 501]


def test_limits_are_in_the_tags_and_the_result(tmp_path: Path) -> None:
    scene = np.linspace(0, 1000, 3 * 70 * 90).reshape(3, 70, 90).astype(np.uint16)
    path = write_raster(tmp_path / "scene.tif", scene)
    options = SegmentOptions(stretch=Stretch(2, 98, percentiles=True))
    result = segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    assert result.stretch_limits is not None
    with rasterio.open(tmp_path / "map.tif") as dataset:
        shown = "; ".join(f"{low:.6g}..{high:.6g}" for low, high in result.stretch_limits)
        assert dataset.tags()["STRETCH"] == shown


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_bands_beyond_the_third_can_be_resampled(tmp_path: Path, dtype: str) -> None:
    scene = np.stack([np.full((120, 160), 30 * band, dtype) for band in range(1, 9)])
    path = write_raster(tmp_path / "scene.tif", scene, **UTM)
    stretch = None if dtype == "uint8" else Stretch(0, 255, percentiles=False)
    pixels, _ = SceneReader(path, bands=(8, 5, 3), stretch=stretch, gsd=4.0).read_window(0, 0, 60, 80)
    assert [np.unique(plane).tolist() for plane in pixels] == [[240], [150], [90]]
