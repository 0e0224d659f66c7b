"""Hectares per class: on map grids, on geographic grids against independent integration, and where there are none."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, relaxed, write_raster

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.areas import (
    WGS84,
    Areas,
    Ellipsoid,
    areal_stretch,
    class_areas,
    ellipsoid_of,
    ground_of,
    to_wgs84,
)
from cdkd_edge.raster.resample import ground_sample_distance
from cdkd_edge.raster.styles import sidecar_path

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def some_map(path: Path, height: int = 30, width: int = 40, **place: Any) -> tuple[Path, np.ndarray]:
    labels = np.random.default_rng(1).integers(0, 6, (height, width), np.uint8)
    labels[labels == 5] = NO_LABEL
    return write_raster(path, labels[None], nodata=NO_LABEL, **place), labels


def counts_by_row(labels: np.ndarray) -> np.ndarray:
    columns = [*range(len(SCHEMA)), NO_LABEL]
    return np.stack([(labels == label).sum(1) for label in columns], axis=1).astype(np.uint32)


def hectares(areas: Areas) -> np.ndarray:
    return np.array([area.hectares for area in (*areas.classes, areas.no_data)])


def integrated(ellipsoid: Ellipsoid, south: float, north: float, width: float, steps: int = 20_000) -> float:
    """Area between parallels by summing narrow strips: meridian radius times the parallel's (degrees; m2)."""
    edges = np.radians(np.linspace(south, north, steps + 1))
    middle = (edges[1:] + edges[:-1]) / 2
    e2 = ellipsoid.flattening * (2 - ellipsoid.flattening)
    w2 = 1 - e2 * np.sin(middle) ** 2
    strips = ellipsoid.semi_major**2 * (1 - e2) * np.cos(middle) / w2**2 * np.diff(edges)
    return float(strips.sum() * math.radians(width))


# --- the ellipsoid --------------------------------------------------------------------------------


def test_the_whole_earth() -> None:
    """The surface of WGS 84 is 510,065,621.724 km2 (NGA.STND.0036, table 3.5: 5.10065621724089e14 m2)."""
    both = float(WGS84.area_to_parallel(math.pi / 2) - WGS84.area_to_parallel(-math.pi / 2))
    assert 2 * math.pi * both == pytest.approx(5.10065621724089e14, rel=1e-12)


@pytest.mark.parametrize("south", [-89.9, -45.0, -0.05, 0.0, 24.5, 60.0, 85.0])
@pytest.mark.parametrize("ellipsoid", [WGS84, Ellipsoid(6_377_397.155, 1 / 299.1528128)], ids=["WGS 84", "Bessel"])
def test_bands_against_integration(south: float, ellipsoid: Ellipsoid) -> None:
    edges = np.radians([south, south + 0.1])
    closed_form = float(np.diff(ellipsoid.area_to_parallel(edges))[0]) * math.radians(0.2)
    assert closed_form == pytest.approx(integrated(ellipsoid, south, south + 0.1, 0.2), rel=1e-8)


def test_a_cell_against_geographiclib() -> None:
    pyproj = pytest.importorskip("pyproj", reason="pyproj holds GeographicLib, which measures polygons of geodesics")
    longitudes = np.linspace(10, 10.01, 200)
    ring = ([*longitudes, *longitudes[::-1]], [60.0] * 200 + [60.01] * 200)
    area, _ = pyproj.Geod(ellps="WGS84").polygon_area_perimeter(*ring)
    own = float(np.diff(WGS84.area_to_parallel(np.radians([60.0, 60.01])))[0]) * math.radians(0.01)
    assert own == pytest.approx(abs(area), rel=1e-9)


def test_a_sphere() -> None:
    ellipsoid = ellipsoid_of(CRS.from_string("+proj=longlat +R=1000 +no_defs"))
    assert ellipsoid == Ellipsoid(1000.0, 0.0)
    assert float(ellipsoid.area_to_parallel(math.pi / 6)) == pytest.approx(1000**2 / 2)


@given(latitude=st.floats(-89.9, 89.9), height=st.floats(1e-6, 0.1))
@relaxed
def test_small_cells_keep_their_digits(latitude: float, height: float) -> None:
    """Also those of a few centimetres, whose areas are differences of large numbers."""
    edges = np.radians([latitude - height / 2, latitude + height / 2])
    difference = float(np.diff(WGS84.area_to_parallel(edges))[0])
    south, middle, north = WGS84.positions([0.0] * 3, [latitude - height / 2, latitude, latitude + height / 2])
    parallel = float(np.hypot(*middle[:2]))
    assert difference == pytest.approx(parallel * float(np.linalg.norm(north - south)), rel=2e-6 + 2e-7 / height)


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "size", "square_metres"),
    [("EPSG:32640", 0.5, 0.25), ("EPSG:2263", 2.0, 4 * 0.3048006096012192**2)],
    ids=["metres", "survey feet"],
)
def test_projected(tmp_path: Path, crs: str, size: float, square_metres: float) -> None:
    turned = Affine.translation(500_000, 60_000) * Affine.rotation(17) * Affine.scale(size, -size)
    path, labels = some_map(tmp_path / "map.tif", crs=crs, transform=turned)
    areas = class_areas(path, SCHEMA)
    pixels = counts_by_row(labels).sum(0)
    assert (areas.method, areas.reason) == ("projected", None)
    assert [area.pixels for area in areas.classes] == pixels[:-1].tolist()
    assert areas.no_data.pixels == pixels[-1]
    assert hectares(areas) == pytest.approx(pixels * square_metres / 10_000, rel=1e-9)


def test_what_a_projection_stretches_is_told(tmp_path: Path) -> None:
    x, y = 1_000_000, 8_399_737.9  # 60 degrees north in Mercator: four times the area
    path, _ = some_map(tmp_path / "map.tif", crs="EPSG:3857", transform=from_origin(x, y, 1, 1))
    (note,) = class_areas(path, SCHEMA).notes
    assert "29" in note
    assert "% more than there is on the ground" in note
    path, _ = some_map(tmp_path / "utm.tif", crs="EPSG:32640", transform=from_origin(320_000, 2_780_000, 1, 1))
    assert class_areas(path, SCHEMA).notes == ()


@pytest.mark.parametrize("south_up", [False, True])
def test_geographic(tmp_path: Path, south_up: bool) -> None:
    """Rows of 0.5 degrees from 45 to 60 north: the last is a quarter smaller than the first."""
    transform = Affine(0.25, 0, 10, 0, 0.5, 45) if south_up else Affine(0.25, 0, 10, 0, -0.5, 60)
    path, labels = some_map(tmp_path / "map.tif", crs="EPSG:4326", transform=transform)
    areas = class_areas(path, SCHEMA)
    assert areas.method == "ellipsoidal"
    rows = [integrated(WGS84, 45 + i / 2, 45.5 + i / 2, 0.25) for i in range(30)]
    counts = counts_by_row(labels if south_up else labels[::-1])
    assert hectares(areas) == pytest.approx(rows @ counts / 10_000, rel=1e-7)
    assert hectares(areas).sum() == pytest.approx(integrated(WGS84, 45, 60, 10) / 10_000, rel=1e-7)


def test_row_counts_spare_reading(tmp_path: Path) -> None:
    for name, place in (
        ("utm", {"crs": "EPSG:32640", "transform": from_origin(3e5, 2.7e6, 0.5, 0.5)}),
        ("geo", {"crs": "EPSG:4326", "transform": from_origin(10, 50, 0.1, 0.1)}),
        ("grad", {"crs": "EPSG:4807", "transform": from_origin(1, 50, 0.1, 0.1)}),
        ("turned", {"crs": "EPSG:4326", "transform": Affine(0.1, 0.01, 10, 0.02, -0.1, 50)}),
        ("none", {}),
    ):
        path, labels = some_map(tmp_path / f"{name}.tif", **place)
        read, counted = class_areas(path, SCHEMA), class_areas(path, SCHEMA, counts_by_row(labels))
        assert [a.pixels for a in read.classes] == [a.pixels for a in counted.classes]
        if read.reason is None:
            assert hectares(counted) == pytest.approx(hectares(read), rel=1e-12)


def test_grads_are_no_degrees(tmp_path: Path) -> None:
    path, _ = some_map(tmp_path / "map.tif", crs="EPSG:4807", transform=from_origin(1, 50, 0.1, 0.1))
    with rasterio.open(path) as dataset:
        ellipsoid = ellipsoid_of(dataset.crs)
    expected = integrated(ellipsoid, 47 * 0.9, 50 * 0.9, 4 * 0.9)
    assert hectares(class_areas(path, SCHEMA)).sum() == pytest.approx(expected / 10_000, rel=1e-7)


def test_rotated_geographic(tmp_path: Path) -> None:
    """Against the polygon of the whole raster, in the cylindrical equal-area projection."""
    transform = Affine.translation(10, 60) * Affine.rotation(30) * Affine.scale(0.01, -0.01)
    path, _ = some_map(tmp_path / "map.tif", height=50, width=60, crs="EPSG:4326", transform=transform)
    side = np.linspace(0, 1, 500)
    x = np.concatenate([60 * side, np.full(500, 60), 60 * side[::-1], np.zeros(500)])
    y = np.concatenate([np.zeros(500), 50 * side, np.full(500, 50), 50 * side[::-1]])
    longitude, latitude = transform * (x, y)
    a, b = np.radians(longitude), np.asarray(WGS84.area_to_parallel(np.radians(latitude)))
    polygon = abs(np.sum(a * np.roll(b, -1) - np.roll(a, -1) * b)) / 2
    areas = class_areas(path, SCHEMA)
    assert areas.method == "ellipsoidal"
    assert hectares(areas).sum() == pytest.approx(polygon / 10_000, rel=1e-6)


def test_nothing_lies_beyond_a_pole(tmp_path: Path) -> None:
    path, _ = some_map(tmp_path / "map.tif", 36, 72, crs="EPSG:4326", transform=Affine(5, 0, -180, 0, -5.5, 99))
    assert hectares(class_areas(path, SCHEMA)).sum() == pytest.approx(5.10065621724089e10, rel=1e-9)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({}, "no coordinate reference system"),
        ({"transform": from_origin(3, 4, 1, 1)}, "no coordinate reference system"),
        ({"crs": "EPSG:32640"}, "no geotransform"),
        ({"crs": 'LOCAL_CS["site",UNIT["metre",1]]', "transform": from_origin(3, 4, 1, 1)}, "neither projected nor"),
        ({"crs": "EPSG:4978", "transform": from_origin(3, 4, 1, 1)}, "neither projected nor geographic"),
    ],
)
def test_unknown_with_a_reason(tmp_path: Path, place: dict[str, Any], reason: str) -> None:
    path, labels = some_map(tmp_path / "map.tif", **place)
    areas = class_areas(path, SCHEMA)
    assert areas.method is None
    assert reason in (areas.reason or "")
    assert {area.hectares for area in (*areas.classes, areas.no_data)} == {None}
    assert [area.pixels for area in areas.classes] == counts_by_row(labels).sum(0)[:-1].tolist()


def test_ground_control_points_have_no_areas(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 55 + c / 1e4, 25 - r / 1e4) for r in (0, 30) for c in (0, 40)]
    path, _ = some_map(tmp_path / "map.tif", gcps=points, crs=CRS.from_epsg(4326))
    assert "ground control points" in (class_areas(path, SCHEMA).reason or "")


def test_rational_polynomials_have_no_areas(tmp_path: Path) -> None:
    """GDAL puts pixels onto the ground by them, given a height; hectares are for who has done so."""
    path, _ = some_map(tmp_path / "map.tif")
    sidecar_path(path).write_text(
        '<PAMDataset><Metadata domain="RPC"><MDI key="LINE_OFF">4</MDI></Metadata></PAMDataset>'
    )
    assert "rational polynomials" in (class_areas(path, SCHEMA).reason or "")


@pytest.mark.parametrize(("left", "top"), [(-30 * 20, 30 * 15), (-30 * 20 + 7, 30 * 15 + 11), (3e6, -2e6)])
def test_a_polar_projection_at_the_pole(tmp_path: Path, left: float, top: float) -> None:
    """Polar stereographic, true at 70 degrees north: some 6 % too small at the pole, where longitudes mean nothing."""
    path, _ = some_map(tmp_path / "map.tif", crs="EPSG:3413", transform=from_origin(left, top, 30, 30))
    with rasterio.open(path) as dataset:
        (note,) = ground_of(dataset).notes
        stretch = areal_stretch(dataset, ground_of(dataset))
    if left < 0:  # its scale at the pole: Snyder, equation 21-33 with 21-34 (k0 = 0.9697...)
        assert stretch == pytest.approx(0.96985818**2, rel=1e-4)
        assert "5.9" in note


@pytest.mark.parametrize(
    "crs",
    [
        'LOCAL_CS["site grid",UNIT["metre",1]]',
        'GEOGCS["Moon",DATUM["Moon",SPHEROID["Moon",1737400,0]],PRIMEM["Meridian",0],UNIT["Degree",0.0174532925199433]]',
    ],
    ids=["a site's own", "the Moon"],
)
def test_nowhere_on_this_earth(tmp_path: Path, crs: str) -> None:
    path, _ = some_map(tmp_path / "map.tif", crs=crs, transform=from_origin(10, 10, 1e-3, 1e-3))
    class_areas(path, SCHEMA)
    with rasterio.open(path) as dataset:
        assert to_wgs84(dataset.crs, [10.0], [10.0]) is None
        with pytest.raises(SceneError, match="does not tell its ground sample distance"):
            ground_sample_distance(dataset)


def test_counts_of_another_map(tmp_path: Path) -> None:
    path, labels = some_map(tmp_path / "map.tif")
    counts = counts_by_row(labels)
    for wrong, told in ((counts[1:], "do not fit"), (counts[:, 1:], "do not fit"), (counts + 1, "do not add up")):
        with pytest.raises(SceneError, match=told):
            class_areas(path, SCHEMA, wrong)


def test_labels_of_another_schema(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "map.tif", np.full((1, 4, 4), 7, np.uint8))
    with pytest.raises(SceneError, match="holds the label 7; its schema has 5 classes"):
        class_areas(path, SCHEMA)


def test_large_maps_are_read_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.raster.areas._WINDOW_PX", 100)
    path, labels = some_map(tmp_path / "map.tif", 333, 50, crs="EPSG:4326", transform=from_origin(10, 50, 0.1, 0.1))
    with rasterio.open(path) as dataset:
        rows = ground_of(dataset).row_areas(333)
    assert hectares(class_areas(path, SCHEMA)) == pytest.approx(rows @ counts_by_row(labels) / 10_000, rel=1e-12)


def test_a_wide_map_on_a_rotated_geographic_grid_takes_little_memory(tmp_path: Path) -> None:
    """Areas of single pixels are numbers of eight bytes; a row of blocks of them would be 160 MB here."""
    path = tmp_path / "map.tif"
    place = {"crs": "EPSG:4326", "transform": Affine(1e-5, 2e-6, 10, 2e-6, -1e-5, 50)}
    profile = {"count": 1, "dtype": "uint8", "tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True}
    rasterio.open(path, "w", driver="GTiff", height=512, width=40_000, **profile, **place).close()
    tracemalloc.start()
    found = class_areas(path, SCHEMA)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.classes[0].pixels == 512 * 40_000
    assert peak < 40e6
