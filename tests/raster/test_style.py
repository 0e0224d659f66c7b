"""Label maps and polygons in QGIS: the classes with their names and colours, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rasterio.transform import from_origin
from scene_helpers import SCHEMA, FakeEngine, names_in, noise, read_labels, write_raster

from cdkd_edge.core.labels import LabelSchema, LandCoverClass, load_schema
from cdkd_edge.raster.styles import is_users_style, label_map_style, label_map_xml, polygon_style, style_path
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.polygons import VectorOptions, write_vector

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

UTM = {"crs": "EPSG:32640", "transform": from_origin(320_000, 2_790_000, 0.5, 0.5)}
CLASSES = [[label, cls.name, "#{:02x}{:02x}{:02x}".format(*cls.shown)] for label, cls in enumerate(SCHEMA.classes)]

SAVED = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis hasScaleBasedVisibilityFlag="0" version="3.34.1"><pipe><rasterrenderer type="paletted" opacity="0.5">
<colorPalette>{entries}</colorPalette></rasterrenderer></pipe></qgis>"""
"""As QGIS saves a style."""


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_raster(tmp_path / "scene.tif", noise(90, 140), **UTM)


def test_no_name_makes_the_xml_malformed() -> None:
    name = "a\ufffe\x1b\x9b\ud800\uffff<&\"'"
    schema = LabelSchema("x", (LandCoverClass(name, (1, 2, 3), 0),))  # past the checks of files
    kept = "<PAMDataset><Metadata><MDI key='GCPs'>one\n\ttwo</MDI></Metadata></PAMDataset>"
    for text in (label_map_style(schema), polygon_style(schema), label_map_xml(schema, extra=kept)):
        root = ElementTree.fromstring(text.encode())
        names = [part for element in root.iter() for part in (element.text, *element.attrib.values())]
        assert "a\ufffd\ufffd\x9b\ufffd\ufffd<&\"'" in names
    assert "one\n\ttwo" in names


def saved(names: list[str]) -> str:
    entries = [
        f'<paletteEntry value="{label}" label="{name}" color="#010203" alpha="255"/>'
        for label, name in enumerate(names)
    ]
    return SAVED.format(entries="\n".join(entries))


def test_the_style_names_the_classes_and_nothing_else(tmp_path: Path, scene: Path) -> None:
    segment_scene(FakeEngine(64), scene, tmp_path / "some.map.tif")
    root = ElementTree.parse(tmp_path / "some.map.qml").getroot()
    (renderer,) = root.iter("rasterrenderer")
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    entries = [[int(e.get("value", "")), e.get("label"), e.get("color")] for e in root.iter("paletteEntry")]
    assert entries == CLASSES


def test_names_are_escaped() -> None:
    schema = load_schema("dubai")
    odd = type(schema)(schema.name, (type(schema.classes[0])('a & <b> "c"', (1, 2, 3), 0), *schema.classes[1:]))
    (first, *_) = ElementTree.fromstring(label_map_style(odd)).iter("paletteEntry")
    assert (first.get("label"), first.get("color")) == ('a & <b> "c"', "#010203")


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (saved(list(SCHEMA.class_names)), True),
        (saved([*SCHEMA.class_names, "cloud"]), True),
        (saved(["forest", *SCHEMA.class_names[1:]]), False),
        (saved(["forest"]), False),
        (label_map_style(load_schema("loveda")), False),
        ("<qgis><renderer-v2 type='categorizedSymbol'/></qgis>", True),
        ("not a style", True),
    ],
    ids=["own colours", "one more class", "another class", "fewer classes", "ours, older", "of the polygons", "no XML"],
)
def test_a_style_that_somebody_saved(tmp_path: Path, scene: Path, text: str, stays: bool) -> None:
    """It stays, unless it would give the classes wrong names."""
    style = tmp_path / "map.qml"
    style.write_text(text)
    assert is_users_style(style, SCHEMA) == stays
    segment_scene(FakeEngine(64), scene, tmp_path / "map.tif")
    assert style.read_text() == (text if stays else label_map_style(SCHEMA))
    assert names_in(tmp_path) == ["map.qml", "map.tif", "map.tif.aux.xml", "scene.tif"]


def test_a_label_map_that_fails_leaves_no_style(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refusing(source: Path, destination: Path) -> None:
        if Path(destination).name == "map.tif":
            raise OSError(5, "Input/output error", str(destination))
        replace(source, destination)

    monkeypatch.setattr("cdkd_edge.segmentation.outputs.os.replace", refusing)
    with pytest.raises(OSError, match="Input/output"):
        segment_scene(FakeEngine(64), scene, tmp_path / "map.tif")
    assert not style_path(tmp_path / "map.tif").exists()


IN_QGIS = """
import json, sys
from qgis.core import QgsApplication, QgsRasterLayer, QgsVectorLayer
application = QgsApplication([], False)
application.initQgis()
label_map, polygons = QgsRasterLayer(sys.argv[1], "map"), QgsVectorLayer(sys.argv[2], "polygons", "ogr")
categories = polygons.renderer().categories()
assert label_map.isValid() and polygons.isValid()
hand = label_map.dataProvider().identify(label_map.extent().center(), 1).results()
print(json.dumps({
    "raster": [[int(one.value), one.label, one.color.name()] for one in label_map.renderer().classes()],
    "crs": label_map.crs().authid(),
    "nodata": label_map.dataProvider().sourceNoDataValue(1),
    "vector": [[int(one.value()), one.label(), one.symbol().color().name()] for one in categories],
    "center": hand[1],
}), flush=True)
import os
os._exit(0)  # QGIS 3.22 stumbles over its own end
"""


def test_in_qgis_itself(tmp_path: Path, scene: Path) -> None:
    pytest.importorskip("pyogrio", reason="polygons need the extra 'vector'")
    pytest.importorskip("shapely", reason="polygons need the extra 'vector'")
    python = "/usr/bin/python3"
    there = shutil.which(python) and subprocess.run([python, "-c", "import qgis.core"], capture_output=True)
    if not there or there.returncode:
        pytest.skip("QGIS is not installed: apt install python3-qgis")
    segment_scene(FakeEngine(64), scene, tmp_path / "map.tif")
    write_vector(tmp_path / "map.tif", tmp_path / "map.gpkg", SCHEMA, VectorOptions())
    done = subprocess.run(
        [python, "-c", IN_QGIS, str(tmp_path / "map.tif"), str(tmp_path / "map.gpkg")],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen", "HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["raster"] == CLASSES, "and not 256 of them"
    assert seen["vector"] == CLASSES
    assert (seen["crs"], seen["nodata"]) == ("EPSG:32640", 255)
    assert seen["center"] == read_labels(tmp_path / "map.tif")[45, 70]
