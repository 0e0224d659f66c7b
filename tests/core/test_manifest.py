"""Manifests: written whole, read back, and every way in which one can be wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from cdkd_edge.core.errors import ManifestError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import load_schema
from cdkd_edge.core.machine import library_versions
from cdkd_edge.core.manifest import (
    EngineManifest,
    FileRecord,
    GraphManifest,
    manifest_path,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def graph(tmp_path, small_graph):
    """A private copy of a graph and its manifest."""
    for path in (small_graph, manifest_path(small_graph)):
        shutil.copy(path, tmp_path)
    return tmp_path / small_graph.name


@pytest.fixture
def engine(tmp_path, small_engine_path):
    """A private copy of an engine and its manifest."""
    for path in (small_engine_path, manifest_path(small_engine_path)):
        shutil.copy(path, tmp_path)
    return tmp_path / small_engine_path.name


def edit(path, /, **changes):
    path = manifest_path(path)
    document = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del document[key]
        else:
            document[key] = value
    path.write_text(json.dumps(document))


def refusal(artefact, kind=GraphManifest, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(artefact, kind, **options)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    return caught.value


def test_round_trip(graph, engine):
    for path, kind in ((graph, GraphManifest), (engine, EngineManifest)):
        first = read_manifest(path, kind)
        write_manifest(path, first)
        assert read_manifest(path, kind) == first


def test_what_is_in_the_file(graph, engine, small_config):
    document = json.loads(manifest_path(graph).read_text())
    assert document["kind"] == "graph"
    assert document["manifest_version"] == 1
    assert document["network"]["tile"] == small_config.tile
    assert document["artefact"] == {"file": "small.onnx", "sha256": sha256_of(graph), "bytes": graph.stat().st_size}
    assert document["preprocessing"]["channels"] == "RGB"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["created"])
    document = json.loads(manifest_path(engine).read_text())
    assert document["kind"] == "engine"
    assert document["graph"]["sha256"] == sha256_of(graph)
    assert document["graph"]["file"] == "small.onnx"
    assert read_manifest(engine, EngineManifest).schema == load_schema("dubai")


def test_it_lies_beside_its_artefact(tmp_path):
    assert manifest_path(tmp_path / "a.fp32.cpu.onnx") == tmp_path / "a.fp32.cpu.json"


def test_a_later_release_may_add_fields(graph):
    edit(graph, something_new={"a": 1})
    assert read_manifest(graph, GraphManifest).name == "small"


@pytest.mark.parametrize("change", ["flip", "append", "truncate"])
def test_a_tampered_artefact_is_found(graph, change):
    content = bytearray(graph.read_bytes())
    if change == "flip":
        content[len(content) // 2] ^= 1
    graph.write_bytes(content + b"x" if change == "append" else content[:-1] if change == "truncate" else content)
    error = refusal(graph)
    assert "SHA-256 differs" in error.message
    assert error.hint
    assert read_manifest(graph, GraphManifest, verify=False).name == "small"


def test_no_artefact(tmp_path):
    assert refusal(tmp_path / "no.onnx").message == f"graph {tmp_path / 'no.onnx'} does not exist"
    assert refusal(tmp_path, EngineManifest).message.startswith("engine ")


def test_what_was_named_instead_of_a_graph_or_an_engine_is_said(graph):
    error = refusal(graph, EngineManifest)
    assert error.message == f"{graph} is a graph, not an engine"
    assert f"cdkd-edge build {graph}" in error.hint
    error = refusal(graph.parent)
    assert error.message == f"graph {graph.parent} is a folder, not a file"
    assert error.hint == f"name one of {graph}"
    scene = graph.with_name("scene.tif")
    scene.write_bytes(b"II*\0")
    error = refusal(scene, EngineManifest)
    assert error.message == f"{scene} is no engine: its name ends neither in .onnx nor in .engine"
    assert "cdkd-edge build" in error.hint


def test_no_manifest(graph):
    manifest_path(graph).unlink()
    error = refusal(graph)
    assert "small.json" in error.message
    assert "cdkd-edge export" in error.hint


def test_a_manifest_that_cannot_be_read(graph):
    manifest_path(graph).unlink()
    manifest_path(graph).mkdir()
    assert "cannot be read" in refusal(graph).message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b'{"kind": "graph",}', b"\xff\xfe", b'{"kind": "\xff"}', b'{"a":' * 5000],
    ids=["empty", "open", "text", "comma", "bytes", "text that is not UTF-8", "too deep"],
)
def test_damaged_json(graph, content):
    manifest_path(graph).write_bytes(content)
    assert "cannot be read" in refusal(graph).message


@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", '{"kind": "set"}', '{"kind": ["graph"]}'])
def test_json_of_another_kind(graph, content):
    manifest_path(graph).write_text(content)
    assert "not the manifest of a cdkd-edge graph" in refusal(graph).message


def test_graph_and_engine_are_not_confused(graph, engine):
    assert "is a graph, not an engine" in refusal(graph, EngineManifest).message
    assert "is an engine, not a graph" in refusal(engine, GraphManifest).message


@pytest.mark.parametrize("version", [0, 2, "1", None, ...])
def test_another_version(graph, version):
    edit(graph, manifest_version=version)
    assert "this release reads 1" in refusal(graph).message


@pytest.mark.parametrize(
    "changes",
    [
        {"artefact": ...},
        {"tile": ...},
        {"tile": "64"},
        {"batch": 1.5},
        {"artefact": {"file": "small.onnx"}},
        {"preprocessing": {"channels": "RGB", "mean": [1, 2], "std": [1, 2, 3]}},
        {"check": None},
        {"labels": {"classes": []}},
        {"labels": {"classes": [{"name": "a", "color": [0, 0, 999]}]}},
        {"labels": [1]},
        {"libraries": {"onnx": 1}},
        {"name": None},
    ],
    ids=str,
)
def test_damaged_fields(graph, changes):
    edit(graph, **changes)
    assert "damaged" in refusal(graph).message


def test_a_failed_write_leaves_the_old_manifest(graph, monkeypatch):
    manifest = read_manifest(graph, GraphManifest)
    before = manifest_path(graph).read_bytes()

    def power_cut(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cdkd_edge.core.files.os.replace", power_cut)
    with pytest.raises(OSError, match="No space"):
        write_manifest(graph, dataclasses.replace(manifest, name="other"))
    assert manifest_path(graph).read_bytes() == before
    assert sorted(path.name for path in graph.parent.iterdir()) == ["small.json", "small.onnx"]


def test_a_file_record_names_the_file_it_will_be(tmp_path):
    path = tmp_path / "temporary"
    path.write_bytes(b"abc")
    record = FileRecord.of(path, "final.onnx")
    assert record.file == "final.onnx"
    assert record.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record.bytes == 3
    assert FileRecord.of(path).file == "temporary"


def test_versions_of_what_is_installed_only():
    versions = library_versions(("numpy", "no-such-package"))
    assert list(versions) == ["python", "numpy"]
