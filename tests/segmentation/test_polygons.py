"""Polygons: the same as from the whole map at once, valid, without gaps or overlaps, bounded, read by GDAL's tools."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.features import rasterize, shapes
from rasterio.io import MemoryFile
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, names_in, relaxed, write_raster

from cdkd_edge.core.errors import MissingExtraError, SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.areas import class_areas, ground_of
from cdkd_edge.segmentation import regions as regions_module
from cdkd_edge.segmentation.outlines import Outlines
from cdkd_edge.segmentation.polygons import VectorOptions, large_enough, vector_options, write_vector
from cdkd_edge.segmentation.regions import trace_regions

shapely = pytest.importorskip("shapely", reason="polygons need the extra 'vector'")
pyogrio = pytest.importorskip("pyogrio", reason="polygons need the extra 'vector'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]

UTM = {"crs": "EPSG:32640", "transform": from_origin(300_000, 2_700_000, 0.5, 0.5)}


def patches(height: int, width: int, side: int = 3, classes: int = 5, seed: int = 0) -> np.ndarray:
    """Squares of some classes and of no data."""
    coarse = np.random.default_rng(seed).integers(0, classes + 1, (-(-height // side), -(-width // side)), np.uint8)
    coarse[coarse == classes] = NO_LABEL
    return np.kron(coarse, np.ones((side, side), np.uint8))[:height, :width]


def found_in(labels: np.ndarray, **options: Any) -> tuple[list[Any], list[int], list[bool]]:
    """All regions of a map, straight vertices removed."""
    polygons, values, parts = [], [], []
    with MemoryFile() as file:
        height, width = labels.shape
        with file.open(driver="GTiff", height=height, width=width, count=1, dtype="uint8", nodata=255) as dataset:
            dataset.write(labels, 1)
        with file.open() as dataset:
            for portion in trace_regions(dataset, **options):
                polygons += list(portion.outlines.to_shapely())
                values += portion.labels.tolist()
                parts += portion.parts.tolist()
    if polygons:
        straight = Outlines.from_shapely(np.array(polygons, object)).without_straight_vertices()
        polygons = list(straight.to_shapely())
    return polygons, values, parts


def canonical(polygons: list[Any], values: list[int]) -> list[tuple[int, str]]:
    return sorted((value, shapely.normalize(polygon).wkt) for polygon, value in zip(polygons, values, strict=True))


def at_once(labels: np.ndarray) -> list[tuple[int, str]]:
    """What GDAL finds when it sees the whole map."""
    found = list(shapes(labels, mask=labels != NO_LABEL, connectivity=4))
    return canonical([shapely.geometry.shape(shape) for shape, _ in found], [int(value) for _, value in found])


# --- regions --------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 48), width=st.integers(1, 48), side=st.integers(1, 9), classes=st.integers(1, 4),
    tile=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
@settings(relaxed, max_examples=25)
def test_tiles_leave_no_trace(height: int, width: int, side: int, classes: int, tile: int, seed: int) -> None:
    labels = patches(height, width, side, classes, seed)
    tile = max(tile, max(height, width) // 12)
    polygons, values, parts = found_in(labels, tile=tile)
    assert canonical(polygons, values) == at_once(labels)
    assert not any(parts)


@given(side=st.integers(2, 9), tile=st.integers(8, 40), tolerance=st.floats(0.5, 6), seed=st.integers(0, 99))
@settings(relaxed, max_examples=10)
def test_simplified_borders_stay_common(side: int, tile: int, tolerance: float, seed: int) -> None:
    """A map without holes stays one: nothing overlaps, nothing is missing, nothing leaves the map."""
    labels = patches(50, 60, side, 4, seed)
    labels[labels == NO_LABEL] = 4
    polygons, values, _ = found_in(labels, tile=tile, simplify=tolerance)
    assert shapely.is_valid(polygons).all()
    assert len(polygons) == len(at_once(labels)), "no region is lost"
    assert shapely.area(polygons).sum() == 50 * 60
    assert shapely.area(shapely.union_all(polygons)) == 50 * 60
    assert sorted(values) == [value for value, _ in at_once(labels)]


def test_noise_is_taken_in_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory goes with the borders in a tile; what comes out does not depend on the tiles."""
    monkeypatch.setattr("cdkd_edge.segmentation.regions.MAX_BORDERS", 300)
    monkeypatch.setattr("cdkd_edge.segmentation.regions._SMALLEST_TILE", 8)
    calls: list[tuple[int, int]] = []
    original = regions_module._polygonized
    monkeypatch.setattr(
        regions_module, "_polygonized", lambda *a, **k: (calls.append(a[0].shape), original(*a, **k))[1]
    )
    labels = np.zeros((75, 50), np.uint8)
    labels[32:64] = patches(32, 50, 1)
    polygons, values, _ = found_in(labels, tile=32)
    assert canonical(polygons, values) == at_once(labels)
    assert set(calls) == {(32, 32), (32, 18), (8, 8), (8, 2), (11, 32), (11, 18)}


def test_simplification_straightens_stairs() -> None:
    labels = np.tri(200, 200, dtype=np.uint8)
    plain, _, _ = found_in(labels, tile=1000)
    simple, _, _ = found_in(labels, tile=1000, simplify=2)
    assert shapely.get_num_coordinates(plain).sum() > 700
    assert shapely.get_num_coordinates(simple).sum() < 20


def test_holes_in_holes_across_tiles() -> None:
    labels = np.zeros((90, 90), np.uint8)
    for index, inset in enumerate((5, 12, 20, 30)):
        labels[inset:-inset, inset:-inset] = (index + 1) % 2
    polygons, values, _ = found_in(labels, tile=16)
    assert canonical(polygons, values) == at_once(labels)
    assert sorted(len(polygon.interiors) for polygon in polygons) == [0, 1, 1, 1, 1]


def test_a_region_that_is_too_large_comes_in_parts() -> None:
    labels = np.zeros((120, 64), np.uint8)
    labels[1::2, 1:-1:2] = 1
    polygons, values, parts = found_in(labels, tile=16, max_vertices=200)
    land = [polygon for polygon, value in zip(polygons, values, strict=True) if value == 0]
    assert len(land) > 1
    assert all(part == (value == 0) for part, value in zip(parts, values, strict=True))
    assert {polygon.geom_type for polygon in polygons} == {"Polygon"}
    assert shapely.area(land).sum() == (labels == 0).sum()
    whole, _, _ = found_in(labels, tile=16)
    united = [polygon for polygon, value in zip(whole, values, strict=False) if value == 0]
    assert shapely.union_all(land).area == (labels == 0).sum()
    assert united, "without the limit there is one"


def test_nothing_to_find() -> None:
    assert found_in(np.full((40, 40), NO_LABEL, np.uint8), tile=16) == ([], [], [])
    assert found_in(np.full((40, 40), NO_LABEL, np.uint8), tile=16, simplify=2) == ([], [], [])


def test_areas_and_small_ones(tmp_path: Path) -> None:
    """A shore of 44 px around a lake of 100 px, an islet of 4 px in it, on sea."""
    labels = np.zeros((40, 40), np.uint8)
    labels[10:22, 10:22] = 1
    labels[11:21, 11:21] = 2
    labels[15:17, 15:17] = 3
    with MemoryFile() as file:
        with file.open(driver="GTiff", height=40, width=40, count=1, dtype="uint8", **UTM) as dataset:
            dataset.write(labels, 1)
        with file.open() as dataset:
            ground = ground_of(dataset)
            ((outlines, values),) = [(r.outlines, r.labels) for r in trace_regions(dataset)]
    for minimum, expected in (
        (0, {0: 1600 - 144, 1: 44, 2: 96, 3: 4}),
        (5, {0: 1600 - 144, 1: 44, 2: 100}),
        (45, {0: 1600 - 144, 2: 100}),
        (101, {0: 1600 - 144, 1: 144}),
        (145, {0: 1600}),
    ):
        for limits in ({"minimum_m2": minimum / 4}, {"minimum_px": minimum}):
            drawn, areas, left = large_enough(outlines, ground, **limits)
            assert dict(zip(values[left].tolist(), (areas * 4).tolist(), strict=True)) == pytest.approx(expected)
            assert shapely.area(drawn.to_shapely()) == pytest.approx(areas * 4)


# --- the file -------------------------------------------------------------------------------------


def map_file(path: Path, labels: np.ndarray, **place: Any) -> Path:
    return write_raster(path, labels[None], nodata=NO_LABEL, **place)


def read(path: Path, layer: str = "classes") -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    meta, _, geometry, fields = pyogrio.raw.read(path, layer=layer)
    shapes_read = np.array([]) if geometry is None else shapely.from_wkb(geometry)
    return meta, shapes_read, dict(zip(meta["fields"], fields, strict=True))


@pytest.mark.parametrize(
    "place",
    [
        UTM,
        {"crs": "EPSG:4326", "transform": from_origin(55, 60, 1e-4, 1e-4)},
        {"crs": "EPSG:32640", "transform": Affine.translation(3e5, 2.7e6) * Affine.rotation(20) * Affine.scale(2, -2)},
    ],
    ids=["projected", "geographic", "rotated"],
)
def test_burnt_back_it_is_the_map(tmp_path: Path, place: dict[str, Any]) -> None:
    labels = patches(150, 170)
    path = map_file(tmp_path / "map.tif", labels, **place)
    notes = write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    meta, polygons, fields = read(tmp_path / "map.gpkg")
    assert notes == ()
    assert shapely.is_valid(polygons).all()
    with rasterio.open(path) as dataset:
        assert rasterio.crs.CRS.from_user_input(meta["crs"]) == dataset.crs
        pairs = zip(polygons, fields["class_id"].tolist(), strict=True)
        again = rasterize(pairs, labels.shape, fill=NO_LABEL, transform=dataset.transform, dtype="uint8")
    assert (again == labels).all()
    for area in class_areas(path, SCHEMA).classes:
        own = fields["class_id"] == area.label
        assert fields["area_ha"][own].sum() == pytest.approx(area.hectares, rel=1e-9)
        assert set(fields["class"][own]) == {area.name}
        assert set(fields["color"][own]) == {"#{:02x}{:02x}{:02x}".format(*SCHEMA.classes[area.label].shown)}
    assert names_in(tmp_path) == ["map.gpkg", "map.tif"]


def test_as_ogrinfo_sees_it(tmp_path: Path) -> None:
    program = shutil.which("ogrinfo")
    if program is None:
        pytest.skip("ogrinfo is not installed, so GDAL's own view of the file was not asked for")
    path = map_file(tmp_path / "map.tif", patches(80, 90), **UTM)
    write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    environment = {key: value for key, value in os.environ.items() if key not in ("GDAL_DATA", "PROJ_DATA", "PROJ_LIB")}
    answer = subprocess.run(
        [program, "-so", str(tmp_path / "map.gpkg"), "classes"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert answer.stderr == "", "no warning, for older versions of GDAL neither"
    assert "Geometry: Polygon" in answer.stdout
    assert f"Feature Count: {len(read(tmp_path / 'map.gpkg')[1])}" in answer.stdout
    assert "WGS 84 / UTM zone 40N" in answer.stdout
    for line in ("class_id: Integer", "class: String", "color: String", "area_ha: Real"):
        assert line in answer.stdout


def test_the_style_that_qgis_looks_for(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    write_vector(map_file(tmp_path / "map.tif", patches(30, 30), **UTM), tmp_path / "map.gpkg", SCHEMA)
    with sqlite3.connect(tmp_path / "map.gpkg") as database:
        row = database.execute(
            "SELECT f_table_name, f_geometry_column, useAsDefault, styleQML FROM layer_styles"
        ).fetchall()
        (kind,) = database.execute("SELECT data_type FROM gpkg_contents WHERE table_name = 'layer_styles'").fetchone()
        (geometry,) = database.execute("SELECT column_name FROM gpkg_geometry_columns").fetchone()
    ((table, column, default, qml),) = row
    assert (table, column, default, kind) == ("classes", geometry, 1, "attributes")
    style = ElementTree.fromstring(qml.partition("\n")[2])
    shown = {c.get("label"): c.get("symbol") for c in style.iter("category")}
    assert list(shown) == list(SCHEMA.class_names)
    symbol = next(s for s in style.iter("symbol") if s.get("name") == shown["water"])
    water = next(cls.shown for cls in SCHEMA.classes if cls.name == "water")
    color = next(o.get("value") for o in symbol.iter("Option") if o.get("name") == "color")
    assert color == "{},{},{},178".format(*water)


def test_the_system_says_why_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = map_file(tmp_path / "map.tif", patches(30, 40))

    def refused(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    assert caught.value.filename == str(tmp_path / "map.gpkg")


def test_placed_without_a_grid(tmp_path: Path) -> None:
    """QGIS puts such a raster on the map and its polygons into the Gulf of Guinea."""
    points = [GroundControlPoint(r, c, 55 + c / 1e4, 25 - r / 1e4) for r in (0, 30) for c in (0, 40)]
    path = map_file(tmp_path / "map.tif", patches(30, 40), gcps=points, crs="EPSG:4326")
    areas, pixels = write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    assert "ground control points" in areas
    assert "in pixels" in pixels


@pytest.mark.parametrize(
    "name", ["semi;colon", "new\nline", "wow!", "so!/what", "a;b/c", "why?", "file:c", "zip:d", "ünï", " "], ids=repr
)
def test_names_that_are_no_uris(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyogrio takes them apart, and would write elsewhere; relative ones are the worst."""
    monkeypatch.chdir(tmp_path)
    path = map_file(tmp_path / "map.tif", patches(30, 40))
    write_vector(path, tmp_path / "plain.gpkg", SCHEMA)
    write_vector(path, Path(name + ".gpkg"), SCHEMA)
    assert (tmp_path / (name + ".gpkg")).read_bytes() == (tmp_path / "plain.gpkg").read_bytes()
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {name + ".gpkg", "map.tif", "plain.gpkg"}


def test_without_a_place_on_earth(tmp_path: Path) -> None:
    path = map_file(tmp_path / "map.tif", patches(30, 40))
    notes = write_vector(path, tmp_path / "map.gpkg", SCHEMA, VectorOptions(minimum_px=10))
    assert notes == ("no areas: the scene has no coordinate reference system",)
    _, polygons, fields = read(tmp_path / "map.gpkg")
    assert np.isnan(fields["area_ha"]).all()
    left, bottom, right, top = shapely.total_bounds(polygons)
    assert (left >= 0, right <= 40, top <= 0, bottom >= -30) == (True,) * 4, "where QGIS puts such rasters"
    with pytest.raises(SceneError, match="no coordinate reference system") as caught:
        write_vector(path, tmp_path / "other.gpkg", SCHEMA, VectorOptions(minimum_m2=10))
    assert "pixels" in caught.value.hint
    assert names_in(tmp_path) == ["map.gpkg", "map.tif"]


def test_the_same_map_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = map_file(tmp_path / "map.tif", patches(60, 60), **UTM)
    write_vector(path, tmp_path / "one.gpkg", SCHEMA)
    monkeypatch.setenv("TZ", "Asia/Dubai")
    write_vector(path, tmp_path / "two.gpkg", SCHEMA)
    assert (tmp_path / "one.gpkg").read_bytes() == (tmp_path / "two.gpkg").read_bytes()


def test_a_map_without_labels(tmp_path: Path) -> None:
    path = map_file(tmp_path / "map.tif", np.full((20, 20), NO_LABEL, np.uint8), **UTM)
    write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    meta, polygons, _ = read(tmp_path / "map.gpkg")
    assert (len(polygons), list(meta["fields"])) == (0, ["class_id", "class", "color", "area_ha"])


def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = map_file(tmp_path / "map.tif", patches(100, 100), **UTM)
    write_vector(path, tmp_path / "one.gpkg", SCHEMA)
    monkeypatch.setattr("cdkd_edge.segmentation.polygons._BATCH", 50)
    write_vector(path, tmp_path / "many.gpkg", SCHEMA)
    _, one, _ = read(tmp_path / "one.gpkg")
    _, many, _ = read(tmp_path / "many.gpkg")
    assert shapely.equals(one, many).all()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"minimum_m2": -1}, {"simplify_px": float("nan")}, {"minimum_px": float("inf")},
                {"minimum_m2": 1, "minimum_px": 1}]
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(SceneError):
        VectorOptions(**options)


def test_labels_of_another_schema(tmp_path: Path) -> None:
    path = map_file(tmp_path / "map.tif", np.full((4, 4), 7, np.uint8))
    with pytest.raises(SceneError, match="holds the label 7; its schema has 5 classes"):
        write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    assert names_in(tmp_path) == ["map.tif"]


@pytest.mark.parametrize("absent", ["shapely", "pyogrio"])
def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    path = map_file(tmp_path / "map.tif", patches(4, 4))
    with pytest.raises(MissingExtraError, match=absent) as caught:
        write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    assert caught.value.hint == "pip install 'cdkd-edge[vector]'"
    assert names_in(tmp_path) == ["map.tif"]


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = map_file(tmp_path / "map.tif", patches(60, 60), **UTM)
    (tmp_path / "map.gpkg").write_bytes(b"older")

    def interrupted(*arguments: Any, **options: Any) -> Iterator[regions_module.RegionBatch]:
        yield next(trace_regions(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr("cdkd_edge.segmentation.polygons._BATCH", 1)
    monkeypatch.setattr("cdkd_edge.segmentation.polygons.trace_regions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_vector(path, tmp_path / "map.gpkg", SCHEMA)
    assert names_in(tmp_path) == ["map.gpkg", "map.tif"]
    assert (tmp_path / "map.gpkg").read_bytes() == b"older"


FEW_BYTES = """
import json, resource, signal, sys
from pathlib import Path
from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.labels import load_schema
from cdkd_edge.segmentation.polygons import write_vector
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write_vector(Path(sys.argv[1]), Path(sys.argv[2]), load_schema("dubai"))
        print("written with", limit)
    except CdkdEdgeError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_no_more_may_be_written(tmp_path: Path) -> None:
    path = map_file(tmp_path / "map.tif", patches(200, 200), **UTM)
    write_vector(path, tmp_path / "whole.gpkg", SCHEMA)
    size = (tmp_path / "whole.gpkg").stat().st_size
    (tmp_path / "new").mkdir()
    limits = [str(limit) for limit in (0, size // 3, size // 2, size - 1)]
    command = [sys.executable, "-c", FEW_BYTES, str(path), str(tmp_path / "new" / "map.gpkg"), *limits]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [kind for kind, _ in told] == ["SceneError"] * 4, answer.stdout
    assert all("map.gpkg failed" in text and ".part" not in text for _, text in told)
    assert names_in(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        (None, VectorOptions()),
        ("100m2", VectorOptions(minimum_m2=100)),
        ("0.5 ha", VectorOptions(minimum_m2=5000)),
        ("2km2", VectorOptions(minimum_m2=2e6)),
        ("20px", VectorOptions(minimum_px=20)),
    ],
)
def test_areas_as_a_person_types_them(typed, options):
    assert vector_options(typed) == options


@pytest.mark.parametrize("typed", ["", "many", "3", "1.2.3ha", "-5px", "5 acres"])
def test_what_is_no_area(typed):
    with pytest.raises(UsageError, match="is no area"):
        vector_options(typed)
