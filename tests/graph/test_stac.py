"""The STAC item of an exported network, against the schemas of the extensions that it declares."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_helpers import relaxed

from cdkd_edge.core.errors import ManifestError
from cdkd_edge.core.labels import load_schema
from cdkd_edge.core.manifest import FileRecord, GraphManifest, read_manifest
from cdkd_edge.graph import stac
from cdkd_edge.graph.outputs import QgisGraph
from cdkd_edge.graph.stac import class_names, model_name, stac_item, write_stac

SCHEMAS = Path(__file__).parents[1] / "helpers" / "stac_schemas"
PUBLISHED = "https://stac-extensions.github.io"


@pytest.fixture(scope="module")
def manifest(small_graph):
    return read_manifest(small_graph, GraphManifest)


@pytest.fixture(scope="module")
def item(manifest):
    half = dataclasses.replace(manifest, precision="fp16", artefact=FileRecord("small.fp16.onnx", "ab" * 32, 7))
    qgis = QgisGraph(Path("small.qgis.onnx"), FileRecord("small.qgis.onnx", "cd" * 32, 8), 0.5, 1.0)
    return stac_item(manifest, 12345, half, qgis, 0.5)


@pytest.fixture(scope="module")
def validators():
    """One per declared extension, with nothing fetched from anywhere."""
    jsonschema = pytest.importorskip("jsonschema")
    referencing = pytest.importorskip("referencing")
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in SCHEMAS.glob("*.json")}
    documents = {}
    for name, document in found.items():
        documents[f"{PUBLISHED}/{name.replace('-', '/', 1)}/schema.json"] = document
    if stac.MLM not in documents:  # see the README beside the schemas
        text = json.dumps(documents[f"{PUBLISHED}/mlm/v1.4.0/schema.json"])
        documents[stac.MLM] = json.loads(text.replace("mlm/v1.4.0/", "mlm/v1.5.2/"))
    # MLM 1.4 refers to classification 1.1; the definition it takes from there is in 2.0 under the same name.
    documents[f"{PUBLISHED}/classification/v1.1.0/schema.json"] = documents[stac.CLASSIFICATION]
    resources = [
        (address, referencing.Resource.from_contents(document, referencing.jsonschema.DRAFT7))
        for address, document in documents.items()
    ]
    registry = referencing.Registry().with_resources(resources)
    return {
        address: jsonschema.Draft7Validator(documents[address], registry=registry)
        for address in (stac.MLM, stac.FILE, stac.CLASSIFICATION, stac.PROCESSING)
    }


def complaints(validators, item):
    """By all schemas that the item declares, and by what MLM 1.5 asks for beyond 1.4."""
    found = []
    for address in item["stac_extensions"]:
        found += [error.message for error in validators[address].iter_errors(item)]
    for part in [*item["properties"].get("mlm:input", []), *item["properties"].get("mlm:output", [])]:
        tensor = part.get("input") or part["result"]
        if len(tensor["shape"]) != len(tensor["dim_order"]):
            found.append("shape and dim_order differ in length")
        if bool(part.get("bands")) != ("bands" in tensor["dim_order"]):
            found.append("bands and the bands dimension go together")
    return found


def test_it_keeps_to_every_schema_it_declares(validators, item, manifest):
    assert set(item["stac_extensions"]) == set(validators)
    assert complaints(validators, item) == []
    assert complaints(validators, stac_item(manifest, 1)) == []


def without(path):
    def change(item):
        *parents, last = path
        for key in parents:
            item = item[key]
        del item[last]

    return change


def with_value(path, value):
    def change(item):
        *parents, last = path
        for key in parents:
            item = item[key]
        item[last] = value

    return change


PROPERTIES = ("properties",)
IN, OUT = ("properties", "mlm:input", 0), ("properties", "mlm:output", 0)


@pytest.mark.parametrize(
    "change",
    [
        *(without((*PROPERTIES, f"mlm:{name}")) for name in ("name", "architecture", "tasks", "input", "output")),
        with_value((*PROPERTIES, "mlm:name"), "a/b"),
        with_value((*PROPERTIES, "mlm:tasks"), ["painting"]),
        without((*PROPERTIES, "bands")),
        with_value((*IN, "bands"), []),
        with_value((*IN, "input", "dim_order"), ["batch", "channel", "height", "width"]),
        with_value((*IN, "input", "shape"), [1, 3, 64]),
        with_value((*IN, "input", "data_type"), "uchar"),
        with_value((*OUT, "classification:classes", 0, "color_hint"), "#3C1098"),
        with_value((*OUT, "classification:classes", 0, "name"), "built up"),
        without(("assets", "model", "mlm:artifact_type")),
        with_value(("assets", "qgis", "mlm:artifact_type"), "onnx"),
        with_value(("assets", "model", "mlm:name"), "small"),
        with_value(("assets", "model", "file:checksum"), "SHA-256"),
        with_value(("assets", "model", "file:size"), -1),
        without((*PROPERTIES, "processing:software")),
        with_value(("stac_extensions",), [stac.FILE, stac.CLASSIFICATION, stac.PROCESSING]),
    ],
)
def test_the_schemas_find_what_is_wrong(validators, item, change):
    """So that the test above can fail."""
    wrong = copy.deepcopy(item)
    change(wrong)
    assert [*complaints(validators, wrong), *(["not declared"] if stac.MLM not in wrong["stac_extensions"] else [])]


def test_the_core_of_an_item(item):
    """STAC 1.1: without geometry no bbox, datetime in UTC, bands in the properties only if an asset has any."""
    assert (item["type"], item["stac_version"]) == ("Feature", "1.1.0")
    assert item["geometry"] is None
    assert "bbox" not in item
    assert item["links"] == []
    assert "collection" not in item, "which a link would have to name"
    assert item["properties"]["bands"] == item["assets"]["model"]["bands"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", item["properties"]["datetime"])
    for asset in item["assets"].values():
        assert asset["href"].startswith("./")
        assert asset["roles"]
        assert asset["type"]


def test_it_describes_the_graph(item, manifest, small_graph):
    properties, model = item["properties"], item["assets"]["model"]
    assert properties["mlm:input"][0]["input"] == {
        "shape": [1, 3, 64, 64],
        "dim_order": ["batch", "bands", "height", "width"],
        "data_type": "uint8",
    }
    assert properties["mlm:output"][0]["result"]["shape"] == [1, 64, 64]
    classes = properties["mlm:output"][0]["classification:classes"]
    assert [cls["value"] for cls in classes] == [0, 1, 2, 3, 4]
    for found, cls in zip(classes, load_schema("dubai").classes, strict=True):
        assert found["description"] == cls.name
        assert tuple(bytes.fromhex(found["color_hint"])) == cls.shown
    assert (properties["mlm:total_parameters"], properties["gsd"]) == (12345, 0.5)
    assert model["file:size"] == small_graph.stat().st_size
    assert model["file:checksum"] == "1220" + manifest.artefact.sha256
    assert len(bytes.fromhex(model["file:checksum"])) == 2 + 0x20
    assert set(item["assets"]) == {"model", "manifest", "model-fp16", "qgis"}
    assert item["assets"]["manifest"]["href"] == "./small.json"


def test_what_is_not_there_is_not_named(manifest):
    plain = stac_item(manifest, 1)
    assert set(plain["assets"]) == {"model", "manifest"}
    assert "gsd" not in plain["properties"]


@relaxed
@given(st.text(min_size=0, max_size=30))
def test_any_name_becomes_one_that_is_allowed(name):
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", model_name(name))


@relaxed
@given(st.lists(st.text(max_size=8), min_size=1, max_size=20, unique=True))
def test_class_names_for_programs(names):
    found = class_names(names)
    assert len(found) == len(names)
    assert all(re.fullmatch(r"[0-9A-Za-z_-]+", name) for name in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dubai", "dubai"),
        ("a/b", "a-b"),
        ("Städte 1", "Stadte 1"),
        ("x", "x-model"),
        ("1", "model-1"),
        ("森林", "model"),
    ],
)
def test_names_stay_recognisable(name, expected):
    assert model_name(name) == expected


def test_class_names_that_look_alike_stay_apart():
    assert class_names(["Built up", "built-up", "水", "Forêt"]) == ["built-up", "built-up-1", "class-2", "foret"]


def test_file_names_are_addresses(manifest):
    odd = dataclasses.replace(manifest, artefact=FileRecord("Städte 1#2.onnx", "ab" * 32, 7))
    assets = stac_item(odd, 1)["assets"]
    assert assets["model"]["href"] == "./St%C3%A4dte%201%232.onnx"
    assert assets["manifest"]["href"] == "./St%C3%A4dte%201%232.json"


def test_it_is_replaced_only_by_its_like(tmp_path, item):
    path = tmp_path / "small.stac.json"
    write_stac(item, path)
    assert json.loads(path.read_text(encoding="utf-8")) == item
    write_stac({**item, "id": "again"}, path)
    for mine in (b"{}", b'{"properties": {"processing:software": {"other": "1"}}}', b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(mine)
        with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
            write_stac(item, path)
        assert path.read_bytes() == mine
    path.unlink()
    path.mkdir()
    with pytest.raises(ManifestError):
        write_stac(item, path)
    assert np.all([part.is_dir() for part in tmp_path.iterdir()])
