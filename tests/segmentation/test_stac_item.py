"""STAC Items: valid by STAC's own schema, in the right place on Earth, with classes, checksum and provenance."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, ProbabilityEngine, names_in, noise, write_raster

from cdkd_edge import __version__
from cdkd_edge.core.errors import MissingExtraError, SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema, LandCoverClass
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.raster.areas import class_areas
from cdkd_edge.segmentation import products
from cdkd_edge.segmentation.geotiff import write_cog
from cdkd_edge.segmentation.jobs import EngineRef, Job, file_state
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.polygons import VectorOptions
from cdkd_edge.segmentation.products import ProductOptions, product_paths, write_products
from cdkd_edge.segmentation.stac import (
    EXTENSIONS,
    When,
    complete_item,
    footprint_of,
    item_for,
    parse_when,
    write_item,
)
from cdkd_edge.segmentation.worker import do_job

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]

UTM = {"crs": "EPSG:32640", "transform": from_origin(325_000, 2_786_000, 0.5, 0.5)}
SCHEMAS = Path(__file__).parents[1] / "helpers" / "stac_schemas"
TILE = 64
NOW = datetime(2026, 5, 4, 10, 30, tzinfo=timezone.utc)


def labelled(folder: Path, schema: LabelSchema = SCHEMA, **place: Any) -> tuple[Path, Path]:
    """A scene and its label map."""
    labels = np.random.default_rng(1).integers(0, len(schema) + 1, (1, 40, 60), np.uint8)
    labels[labels == len(schema)] = NO_LABEL
    scene = write_raster(folder / "scene.tif", noise(40, 60), **place)
    return scene, write_raster(folder / "scene_labels.tif", labels, nodata=NO_LABEL, **place)


def item_of(folder: Path, schema: LabelSchema = SCHEMA, place: dict[str, Any] = UTM, **options: Any) -> dict[str, Any]:
    scene, path = labelled(folder, schema, **place)
    item = item_for(path, scene, schema, class_areas(path, schema), created=NOW, **options)
    write_item(folder / "item.json", item)
    read: dict[str, Any] = json.loads((folder / "item.json").read_text(encoding="utf-8"))
    assert read == item
    return read


def require_valid(item: dict[str, Any]) -> None:
    pystac = pytest.importorskip("pystac", reason="pystac brings the JSON schema of STAC's core")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema applies it")
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    JsonSchemaSTACValidator().validate_core(item, pystac.STACObjectType.ITEM, item["stac_version"])
    for name in ("classification-v2.0.0", "file-v2.1.0"):
        jsonschema.Draft7Validator(json.loads((SCHEMAS / f"{name}.json").read_text())).validate(item)
    assert pystac.Item.from_dict(item).to_dict(include_self_link=False)["properties"] == item["properties"]


def test_the_schema_can_refuse(tmp_path: Path) -> None:
    """So that the tests below can fail."""
    item = item_of(tmp_path)
    require_valid(item)
    for spoil in ({"geometry": 3}, {"properties": {}}, {"links": None}):
        with pytest.raises(Exception, match=r"alid|KeyError|NoneType"):
            require_valid({**item, **spoil})


def test_what_it_says(tmp_path: Path) -> None:
    item = item_of(tmp_path, engine=FileRecord("e.fp16.engine", "ab" * 32, 1), when=When(NOW))
    require_valid(item)
    properties, asset = item["properties"], item["assets"]["labels"]
    assert (item["stac_version"], item["id"]) == ("1.1.0", "scene_labels")
    assert item["stac_extensions"] == list(EXTENSIONS)
    assert (properties["datetime"], properties["created"]) == ("2026-05-04T10:30:00Z", "2026-05-04T10:30:00Z")
    assert (properties["proj:code"], properties["proj:shape"]) == ("EPSG:32640", [40, 60])
    assert properties["proj:transform"] == [0.5, 0, 325_000, 0, -0.5, 2_786_000]
    assert properties["processing:software"] == {"cdkd-edge": __version__}
    assert properties["cdkd-edge:engine_sha256"] == "ab" * 32
    assert properties["cdkd-edge:scene"] == "scene.tif"
    assert "cdkd-edge:notes" not in properties
    assert item["links"] == [{"rel": "derived_from", "href": "./scene.tif", "title": "the scene", "type": "image/tiff"}]
    content = (tmp_path / "scene_labels.tif").read_bytes()
    assert asset["file:checksum"] == "1220" + hashlib.sha256(content).hexdigest()
    assert (asset["href"], asset["file:size"]) == ("./scene_labels.tif", len(content))
    (band,) = asset["bands"]
    assert (band["data_type"], band["nodata"], band["raster:sampling"]) == ("uint8", 255, "area")


def test_classes_keep_to_the_extension(tmp_path: Path) -> None:
    """classification 2.0.0: names of letters, digits, - and _, each once; colours as six hex digits."""
    names = ("Wald & Wiese", "水", "no_data", "wald___wiese", "Wald-Wiese", "Wald Wiese")
    classes = tuple(LandCoverClass(name, (i, 100, 200), i) for i, name in enumerate(names))
    schema = LabelSchema("mine", classes)
    item = item_of(tmp_path, schema)
    require_valid(item)
    entries = item["assets"]["labels"]["bands"][0]["classification:classes"]
    assert [entry["value"] for entry in entries] == [0, 1, 2, 3, 4, 5, 255]
    assert all(re.fullmatch(r"[0-9A-Za-z-_]+", entry["name"]) for entry in entries)
    assert len({entry["name"] for entry in entries}) == 7
    assert [entry["title"] for entry in entries[:-1]] == list(names)
    assert all(re.fullmatch(r"[0-9A-F]{6}", entry["color_hint"]) for entry in entries[:-1])
    assert all(entry["description"] for entry in entries)
    assert sum(entry["percentage"] for entry in entries[:-1]) == pytest.approx(100, abs=1e-4)
    assert sum(entry["count"] for entry in entries[:-1]) < 40 * 60
    assert entries[-1]["nodata"] is True
    assert sum(e["cdkd-edge:area_ha"] for e in entries[:-1]) == pytest.approx(
        sum(e["count"] for e in entries[:-1]) * 0.25 / 10_000
    )


def test_without_a_place_on_earth(tmp_path: Path) -> None:
    item = item_of(tmp_path, place={})
    require_valid(item)
    assert item["geometry"] is None
    assert "bbox" not in item
    assert item["properties"]["proj:code"] is None
    assert any("no place on Earth" in note for note in item["properties"]["cdkd-edge:notes"])


def test_a_crs_without_a_code(tmp_path: Path) -> None:
    place = {"crs": "+proj=laea +lat_0=12 +lon_0=3 +ellps=bessel", "transform": from_origin(0, 0, 2, 2)}
    item = item_of(tmp_path, place=place)
    require_valid(item)
    assert item["properties"]["proj:code"] is None
    assert "Lambert Azimuthal Equal Area" in item["properties"]["proj:wkt2"]


# --- when -----------------------------------------------------------------------------------------


def test_the_time_of_the_image(tmp_path: Path) -> None:
    scene, path = labelled(tmp_path, **UTM)
    areas = class_areas(path, SCHEMA)
    item = item_for(path, scene, SCHEMA, areas, created=NOW)
    assert item["properties"]["datetime"] == item["properties"]["created"]
    assert "unknown" in item["properties"]["cdkd-edge:notes"][0]
    for tag, expected in (("2025:01:02 03:04:05", "2025-01-02T03:04:05Z"), ("0000:00:00 00:00:00", None)):
        with rasterio.open(scene, "r+") as dataset:
            dataset.update_tags(TIFFTAG_DATETIME=tag)
        item = item_for(path, scene, SCHEMA, areas, created=NOW)
        assert item["properties"]["datetime"] == (expected or item["properties"]["created"])
    interval = item_for(
        path, scene, SCHEMA, areas, when=parse_when("2025-01-01/2025-01-02T12:00:00+02:00"), created=NOW
    )
    require_valid(interval)
    assert interval["properties"]["datetime"] is None
    assert interval["properties"]["start_datetime"] == "2025-01-01T00:00:00Z"
    assert interval["properties"]["end_datetime"] == "2025-01-02T10:00:00Z"


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-13-01", "2026-01-02/2026-01-01", "2026-01-01/2026-01-02/2026-01-03"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError):
        parse_when(text)


def test_moments() -> None:
    assert parse_when("2026-05-04T12:30:00+02:00").start == parse_when("2026-05-04T10:30:00Z").start == NOW


# --- where ----------------------------------------------------------------------------------------


def footprint(folder: Path, height: int = 40, width: int = 60, **place: Any) -> Any:
    path = write_raster(folder / "map.tif", np.zeros((1, height, width), np.uint8), **place)
    with rasterio.open(path) as dataset:
        return footprint_of(dataset)


def test_footprint_of_a_utm_scene(tmp_path: Path) -> None:
    found = footprint(tmp_path, **UTM)
    west, south, east, north = found.bbox
    # `gdalinfo -json` says so of this raster (GDAL 3.6, PROJ 9.1).
    assert (west, south, east, north) == pytest.approx((55.2634094, 25.1797498, 55.2637096, 25.1799338), abs=2e-7)
    (ring,) = found.geometry["coordinates"]
    assert ring[0] == ring[-1]
    assert sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) > 0, "anticlockwise"
    assert found.note is None


def test_a_geographic_scene_has_four_corners(tmp_path: Path) -> None:
    found = footprint(tmp_path, crs="EPSG:4326", transform=from_origin(10, 50, 0.01, 0.01))
    assert len(found.geometry["coordinates"][0]) == 5
    assert found.bbox == [10, 49.6, 10.6, 50]


@pytest.mark.parametrize(
    "place",
    [
        {"crs": "EPSG:4326", "transform": from_origin(179.8, -16, 0.01, 0.01)},
        {"crs": "EPSG:4326", "transform": from_origin(-180.2, -16, 0.01, 0.01)},
        {"crs": "EPSG:32760", "transform": from_origin(800_000, 8_200_000, 1000, 1000)},
    ],
    ids=["beyond 180", "beyond -180", "UTM"],
)
def test_across_the_antimeridian(tmp_path: Path, place: dict[str, Any]) -> None:
    """RFC 7946, 3.1.9 and 5.2: cut in two, and a box whose west is greater than its east."""
    found = footprint(tmp_path, **place)
    west, _, east, _ = found.bbox
    assert west > 179
    assert east < -179
    assert found.geometry["type"] == "MultiPolygon"
    sides = [[x for x, _ in polygon[0]] for polygon in found.geometry["coordinates"]]
    assert len(sides) == 2
    (east_side,) = [side for side in sides if max(side) == 180]
    (west_side,) = [side for side in sides if min(side) == -180]
    assert min(east_side) > 179
    assert max(west_side) < -179


@pytest.mark.parametrize("left", [-180, 0])
def test_the_whole_earth(tmp_path: Path, left: float) -> None:
    found = footprint(tmp_path, 18, 36, crs="EPSG:4326", transform=from_origin(left, 90, 10, 10))
    assert found.bbox == [-180, -90, 180, 90]
    assert found.geometry["type"] == "Polygon"


@pytest.mark.parametrize(("crs", "south", "north"), [("EPSG:3995", 80, 90), ("EPSG:3031", -90, -80)])
def test_around_a_pole(tmp_path: Path, crs: str, south: float, north: float) -> None:
    found = footprint(tmp_path, 60, 60, crs=crs, transform=from_origin(-600_000, 600_000, 20_000, 20_000))
    west, low, east, high = found.bbox
    assert (west, east) == (-180, 180)
    assert (low, high) == pytest.approx((south, north), abs=3)
    assert 90 in (low, high) or -90 in (low, high)
    assert "pole" in found.note


def test_ground_control_points(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 55 + c / 100, 25 - r / 100) for r in (0, 40) for c in (0, 60)]
    found = footprint(tmp_path, gcps=points, crs=CRS.from_epsg(4326))
    assert found.bbox == pytest.approx([55, 24.6, 55.6, 25])
    assert "approximate" in found.note


def test_rotated(tmp_path: Path) -> None:
    found = footprint(
        tmp_path, crs="EPSG:4326", transform=Affine.translation(10, 50) * Affine.rotation(45) * Affine.scale(0.5)
    )
    # Columns go to the north-east, rows (the transform has no minus) to the north-west.
    assert found.bbox == pytest.approx([10 - 20 / 2**0.5, 50, 10 + 30 / 2**0.5, 50 + 50 / 2**0.5])


# --- all products ---------------------------------------------------------------------------------


def test_products(tmp_path: Path) -> None:
    pytest.importorskip("pyogrio", reason="polygons need the extra 'vector'")
    pytest.importorskip("shapely", reason="polygons need the extra 'vector'")
    scene, path = labelled(tmp_path, **UTM)
    write_cog(path, path, SCHEMA, {})
    wanted = ProductOptions(VectorOptions(), preview=True, stac=True, when="2026-05-04")
    made, _ = write_products(scene, path, class_areas(path, SCHEMA), ProbabilityEngine(), wanted)
    names = ["scene_labels.gpkg", "scene_labels_preview.png", "scene_labels.stac.json"]
    assert list(made.values()) == [str(one) for one in product_paths(path, wanted).values()]
    assert [Path(one).name for one in made.values()] == names
    item = json.loads(Path(made["stac"]).read_text())
    require_valid(item)
    for key, name in (("vector", names[0]), ("preview", names[1])):
        asset = item["assets"][key]
        assert asset["href"] == f"./{name}"
        assert asset["file:checksum"] == "1220" + hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert "profile=cloud-optimized" in item["assets"]["labels"]["type"]
    assert names_in(tmp_path) == sorted([*names, "scene.tif", "scene_labels.tif", "scene_labels.tif.aux.xml"])


def test_nothing_asked_for(tmp_path: Path) -> None:
    scene, path = labelled(tmp_path, **UTM)
    assert write_products(scene, path, class_areas(path, SCHEMA), ProbabilityEngine(), ProductOptions()) == ({}, ())
    assert names_in(tmp_path) == ["scene.tif", "scene_labels.tif"]


def test_what_is_missing_is_said_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise MissingExtraError("pyogrio", "vector", "polygons of a label map")

    monkeypatch.setattr(products, "require_vector", absent)
    scene, path = labelled(tmp_path)
    with pytest.raises(MissingExtraError):
        write_products(
            scene, path, class_areas(path, SCHEMA), ProbabilityEngine(), ProductOptions(VectorOptions(), preview=True)
        )
    assert names_in(tmp_path) == ["scene.tif", "scene_labels.tif"]


def job_of(scene: Path, path: Path, wanted: ProductOptions, **options: Any) -> Job:
    engine = ProbabilityEngine(TILE, kind="confidence")
    ref = EngineRef("fake.onnx", "fake", "fp32", "fake", engine.artefact.sha256, "cd" * 32)
    return Job(str(scene), str(path), ref, SegmentOptions(**options), wanted, before=file_state(path))


def assets_of(path: Path) -> dict[str, Any]:
    item = json.loads(path.read_text(encoding="utf-8"))
    require_valid(item)
    for asset in item["assets"].values():
        file = path.parent / asset["href"]
        assert file.exists()
        if "file:checksum" in asset:
            assert asset["file:checksum"] == "1220" + hashlib.sha256(file.read_bytes()).hexdigest()
    return dict(item["assets"])


def test_every_file_that_was_written_is_an_asset(tmp_path: Path) -> None:
    pytest.importorskip("pyogrio", reason="polygons need the extra 'vector'")
    pytest.importorskip("shapely", reason="polygons need the extra 'vector'")
    scene, path = write_raster(tmp_path / "scene.tif", noise(70, 90), **UTM), tmp_path / "scene_labels.tif"
    wanted = ProductOptions(vector=VectorOptions(), preview=True, stac=True)
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, wanted, confidence=True))
    assets = assets_of(tmp_path / "scene_labels.stac.json")
    listed = sorted(asset["href"].removeprefix("./") for asset in assets.values())
    assert listed == sorted(set(names_in(tmp_path)) - {"scene.tif", "scene_labels.stac.json"})
    (band,) = assets["confidence"]["bands"]
    assert (band["data_type"], band["nodata"], band["unit"], band["raster:sampling"]) == ("uint8", 255, "%", "area")
    assert "classification:classes" not in band
    roles = {key: asset["roles"] for key, asset in assets.items()}
    assert roles == {
        "labels": ["data"], "confidence": ["data"], "vector": ["data"], "preview": ["overview"],
        "attributes": ["metadata"], "style": ["metadata"],
    }  # fmt: skip
    with rasterio.open(tmp_path / "scene_labels_confidence.tif") as dataset:
        assert (dataset.dtypes[0], dataset.nodata) == (band["data_type"], band["nodata"])


def test_an_item_made_later_lists_what_was_there(tmp_path: Path) -> None:
    scene, path = write_raster(tmp_path / "scene.tif", noise(70, 90), **UTM), tmp_path / "scene_labels.tif"
    engine = ProbabilityEngine(TILE, kind="confidence")
    do_job(engine, job_of(scene, path, ProductOptions(preview=True), confidence=True))
    report = do_job(engine, job_of(scene, path, ProductOptions(preview=True, stac=True), confidence=True))
    assert report.status == "kept"
    assert {"labels", "confidence", "preview"} <= set(assets_of(tmp_path / "scene_labels.stac.json"))


def test_what_is_made_later_is_added_to_the_item_that_was_there(tmp_path: Path) -> None:
    scene, path = write_raster(tmp_path / "scene.tif", noise(70, 90), **UTM), tmp_path / "scene_labels.tif"
    engine, item = ProbabilityEngine(TILE, kind="confidence"), tmp_path / "scene_labels.stac.json"
    do_job(engine, job_of(scene, path, ProductOptions(stac=True, when="2026-05-04"), confidence=True))
    before = json.loads(item.read_text())
    report = do_job(engine, job_of(scene, path, ProductOptions(preview=True, stac=True), confidence=True))
    assert report.notes == ("scene_labels.stac.json was there; what it did not list was added",)
    after = json.loads(item.read_text())
    assert set(assets_of(item)) - set(before["assets"]) == {"preview"}
    assert after["properties"] == before["properties"]  # the time of the image was given to the first run only
    again = item.read_bytes()
    report = do_job(engine, job_of(scene, path, ProductOptions(preview=True, stac=True), confidence=True))
    assert (report.notes, item.read_bytes()) == ((), again)


# --- products that are there ----------------------------------------------------------------------

ALL = {"vector": VectorOptions(), "preview": True, "stac": True}
COMPANIONS = ("scene_labels.gpkg", "scene_labels_preview.png", "scene_labels.stac.json", "scene_labels_confidence.tif")
DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "cut by a byte": lambda content: content[:-9],
    "foreign": lambda content: b"somebody's",
    "zeros": lambda content: content[:3000] + bytes(len(content) // 2) + content[3000 + len(content) // 2 :],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scene and its label map with all products."""
    pytest.importorskip("pyogrio", reason="polygons need the extra 'vector'")
    pytest.importorskip("shapely", reason="polygons need the extra 'vector'")
    folder = tmp_path_factory.mktemp("finished")
    scene, path = write_raster(folder / "scene.tif", noise(70, 90), **UTM), folder / "scene_labels.tif"
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions(**ALL), confidence=True))
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same in a folder of the test's own: the scene and the label map."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "scene.tif", tmp_path / "scene_labels.tif"


def test_whole_products_are_kept(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    before = {name: (path.parent / name).read_bytes() for name in names_in(path.parent)}
    report = do_job(
        ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions(**ALL), confidence=True)
    )
    assert (report.status, report.notes) == ("kept", ())
    assert {name: (path.parent / name).read_bytes() for name in names_in(path.parent)} == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", COMPANIONS)
def test_what_is_not_whole_is_not_kept(finished: tuple[Path, Path], name: str, damage: str) -> None:
    scene, path = finished
    place, engine = path.parent / name, ProbabilityEngine(TILE, kind="confidence")
    content = place.read_bytes()
    place.write_bytes(DAMAGES[damage](content))
    job = job_of(scene, path, ProductOptions(**ALL), confidence=True)
    with pytest.raises(SceneError, match=name) as caught:
        do_job(engine, job)
    assert "--overwrite" in str(caught.value.hint)
    place.unlink()
    if name != "scene_labels_confidence.tif":
        assert do_job(engine, job).status == "kept"
        assert name.endswith("json") or place.read_bytes() == content


@pytest.mark.parametrize("damage", ["empty", "truncated"])
@pytest.mark.parametrize("name", ["scene_labels.tif.aux.xml", "scene_labels.qml"])
def test_class_names_and_style_are_written_again(finished: tuple[Path, Path], name: str, damage: str) -> None:
    scene, path = finished
    place = path.parent / name
    content = place.read_bytes()
    place.write_bytes(DAMAGES[damage](content))
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions()))
    assert place.read_bytes() == content


def test_class_names_of_another_map_are_written_again(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    place = path.parent / "scene_labels.tif.aux.xml"
    content = place.read_text()
    (pixels,) = {row.text for row in ElementTree.fromstring(content).iterfind(".//Row[1]/F[6]")}
    place.write_text(content.replace(f"<F>{pixels}</F>", "<F>7</F>"))
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions()))
    assert place.read_text() == content
    place.write_text(content.replace("</PAMDataset>", "<Metadata/></PAMDataset>"))  # GDAL's statistics may be added
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions()))
    assert "<Metadata/>" in place.read_text()


def test_products_of_a_replaced_map_go_with_it(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    (path.parent / "scene_labels_preview.png").write_text("somebody's own")
    write_raster(scene, noise(70, 90, seed=5), **UTM)
    engine = ProbabilityEngine(TILE, kind="confidence")
    report = do_job(engine, replace(job_of(scene, path, ProductOptions()), overwrite=True))
    (note,) = report.notes
    assert note.startswith("removed scene_labels_confidence.tif, scene_labels.gpkg, scene_labels.stac.json: made of")
    assert (path.parent / "scene_labels_preview.png").read_text() == "somebody's own"
    assert [name for name in COMPANIONS if (path.parent / name).exists()] == ["scene_labels_preview.png"]


def test_the_products_of_the_same_map_stay(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    engine = ProbabilityEngine(TILE, kind="confidence")
    report = do_job(engine, replace(job_of(scene, path, ProductOptions()), overwrite=True))
    assert (report.status, report.notes) == ("done", ())
    assert all((path.parent / name).exists() for name in COMPANIONS)


@pytest.mark.parametrize("name", COMPANIONS)
def test_products_of_another_map_are_not_kept(finished: tuple[Path, Path], name: str) -> None:
    """Whole ones, under the right name."""
    scene, path = finished
    engine, old = ProbabilityEngine(TILE, kind="confidence"), (path.parent / name).read_bytes()
    write_raster(scene, noise(70, 90, seed=5), **UTM)
    job = job_of(scene, path, ProductOptions(**ALL), confidence=True)
    do_job(engine, replace(job, overwrite=True))
    (path.parent / name).write_bytes(old)
    with pytest.raises(SceneError, match=f"{name} .*was made of another label map"):
        do_job(engine, job_of(scene, path, ProductOptions(**ALL), confidence=True))


def test_products_made_with_other_options_are_not_kept(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    engine = ProbabilityEngine(TILE, kind="confidence")
    other = ProductOptions(vector=VectorOptions(minimum_px=20))
    with pytest.raises(SceneError, match=r"gpkg exists and was made with other options: minimum_px was 0.0 and is 20"):
        do_job(engine, job_of(scene, path, other))
    with pytest.raises(SceneError, match="has another time"):
        do_job(engine, job_of(scene, path, ProductOptions(stac=True, when="2026-05-04")))


def test_an_item_learns_of_a_product_that_was_made_again(finished: tuple[Path, Path]) -> None:
    scene, path = finished
    (path.parent / "scene_labels.gpkg").unlink()
    wanted = ProductOptions(vector=VectorOptions(minimum_px=20), preview=True, stac=True)
    do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, wanted, confidence=True))
    assets_of(path.parent / "scene_labels.stac.json")


def test_a_scene_that_was_replaced_by_an_older_one(finished: tuple[Path, Path]) -> None:
    """``cp -p`` and archives keep the time of change."""
    scene, path = finished
    write_raster(scene, noise(70, 90, seed=5), **UTM)
    os.utime(scene, (1, 1))
    with pytest.raises(SceneError, match="was made of another scene named"):
        do_job(ProbabilityEngine(TILE, kind="confidence"), job_of(scene, path, ProductOptions()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"assets": 3}', "nonsense", '{"assets": null}', "[" * 100_000])
def test_what_is_no_item_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "item.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        complete_item(path, tmp_path / "map.tif", {"preview": tmp_path / "map_preview.png"})
    assert path.read_text() == text
