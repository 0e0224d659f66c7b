"""The CPU engine: built only if it is right, loaded only if it fits, and the engine protocol."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cdkd_edge.core.errors import EngineError, GraphError, ManifestError, NumericalCheckError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import (
    EngineManifest,
    FileRecord,
    GraphManifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines import onnxruntime as cpu
from cdkd_edge.engines.onnxruntime import CpuEngine, build_cpu_engine
from cdkd_edge.engines.protocol import segment_tiles
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.graph.layers import NetworkPart, parts_of


def graph_labels(graph, tiles):
    """Labels of the exported graph itself, tile by tile."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["labels"], {"image": tile[None]})[0] for tile in tiles])


def copied(path, folder):
    """A private copy of an artefact and its manifest."""
    for file in (path, manifest_path(path)):
        shutil.copy(file, folder)
    return folder / path.name


def edit(path, /, **changes):
    document = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**document, **changes}))


@pytest.fixture
def engine(small_engine_path):
    """A fresh engine."""
    loaded = load_engine(small_engine_path)
    yield loaded
    loaded.close()


# --- building -------------------------------------------------------------------------------------


def test_an_engine_labels_as_its_graph(engine, small_graph, small_tiles):
    labels = segment_tiles(engine, small_tiles)
    assert labels.dtype == np.uint8
    assert labels.shape == (4, 64, 64)
    assert (labels == graph_labels(small_graph, small_tiles)).mean() > 0.9999
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}


def test_all_attention_is_fused_in_the_file(small_engine_path, small_config):
    ops = Counter(node.op_type for node in onnx.load(small_engine_path).graph.node)
    assert ops["MultiHeadAttention"] == small_config.depth
    assert ops["Softmax"] == 0


def test_the_manifest_of_an_engine(small_engine_path, small_graph, small_config):
    manifest = read_manifest(small_engine_path, EngineManifest)
    source = read_manifest(small_graph, GraphManifest)
    assert manifest.runtime == "onnxruntime-cpu"
    assert manifest.precision == "fp32"
    assert manifest.artefact == FileRecord.of(small_engine_path)
    assert manifest.graph.sha256 == sha256_of(small_graph)
    assert (manifest.attention_fused, manifest.attention_blocks) == (small_config.depth, small_config.depth)
    assert (manifest.tile, manifest.batch) == (64, 1)
    assert manifest.labels == source.labels
    assert manifest.preprocessing == source.preprocessing
    assert manifest.graph_check == source.check
    assert manifest.build_seconds > 0
    assert manifest.device
    assert manifest.libraries["onnxruntime"] == onnxruntime.__version__


def test_only_the_engine_and_its_manifest_are_left(tmp_path, small_graph):
    build_cpu_engine(small_graph, tmp_path / "deep" / "er" / "e.onnx")
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["e.json", "e.onnx"]


def test_a_batch_engine_takes_any_number_of_tiles(
    tmp_path, make_graph, small_weights, small_config, small_tiles, small_graph
):
    graph = make_graph(tmp_path / "export", small_weights, small_config, batch=3)
    path = tmp_path / "batch.onnx"
    assert build_cpu_engine(graph, path).batch == 3
    engine = load_engine(path)
    assert engine.input(0).shape == (3, 3, 64, 64)
    assert (segment_tiles(engine, small_tiles) == graph_labels(small_graph, small_tiles)).mean() > 0.9999
    assert segment_tiles(engine, small_tiles[:0]).shape == (0, 64, 64)


def assert_not_built(error, graph, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(error) as caught:
        build_cpu_engine(graph, folder / "engine.onnx")
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_engine_that_labels_otherwise_is_not_written(tmp_path, small_graph, monkeypatch):
    fuse = cpu.fuse_attention

    def fuse_wrongly(model):
        counts = fuse(model)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MultiHeadAttention" and attribute.name == "scale":
                    attribute.f = -1.0
        return counts

    monkeypatch.setattr(cpu, "fuse_attention", fuse_wrongly)
    error = assert_not_built(NumericalCheckError, small_graph, tmp_path)
    assert "% of the pixels" in error.message
    assert error.exit_code == 8


def test_a_graph_that_onnxruntime_refuses_is_an_answer(tmp_path, small_graph):
    graph = copied(small_graph, tmp_path)
    model = onnx.load(graph)
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, graph)
    manifest = read_manifest(graph, GraphManifest, verify=False)
    write_manifest(graph, dataclasses.replace(manifest, artefact=FileRecord.of(graph)))
    error = assert_not_built(GraphError, graph, tmp_path)
    assert "NoSuchOperator" in error.message


def test_a_tampered_graph_is_not_built(tmp_path, small_graph):
    graph = copied(small_graph, tmp_path)
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert_not_built(ManifestError, graph, tmp_path)


def test_a_graph_of_another_precision_is_not_built(tmp_path, small_graph):
    graph = copied(small_graph, tmp_path)
    edit(graph, precision="fp16")
    error = assert_not_built(EngineError, graph, tmp_path)
    assert "fp16" in error.message
    assert error.hint


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def no_session(monkeypatch):
    """Nothing may be handed to ONNX Runtime."""

    def session(*_, **__):
        pytest.fail("the engine file was loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_engine_is_refused_before_it_is_loaded(tmp_path, small_engine_path, damage):
    path = copied(small_engine_path, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x40
    path.write_bytes({"flip": content, "truncate": content[:1000], "empty": b""}[damage])
    with pytest.raises(ManifestError, match="SHA-256 differs"):
        load_engine(path)


@pytest.mark.usefixtures("no_session")
def test_an_engine_of_another_release_is_refused_before_it_is_loaded(tmp_path, small_engine_path):
    path = copied(small_engine_path, tmp_path)
    major, minor = onnxruntime.__version__.split(".")[:2]
    for version in (f"{major}.{int(minor) + 1}.0", f"{major}.{int(minor) - 1}.9", f"{int(major) + 1}.{minor}.0"):
        edit(path, libraries={"onnxruntime": version})
        with pytest.raises(EngineError) as caught:
            load_engine(path)
        assert version in caught.value.message
        assert onnxruntime.__version__ in caught.value.message
        assert "cdkd-edge build" in caught.value.hint
    edit(path, libraries={})
    with pytest.raises(EngineError, match="an unknown release"):
        load_engine(path)


def test_a_patch_release_apart_is_loaded(tmp_path, small_engine_path):
    path = copied(small_engine_path, tmp_path)
    edit(path, libraries={"onnxruntime": ".".join(onnxruntime.__version__.split(".")[:2]) + ".99"})
    load_engine(path).close()


def test_the_release_is_known_whatever_its_package_is_called(tmp_path, small_graph, monkeypatch):
    """Such as onnxruntime-gpu, whose module is onnxruntime as well."""
    version = metadata.version

    def elsewhere(name):
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", elsewhere)
    build_cpu_engine(small_graph, tmp_path / "e.onnx")
    load_engine(tmp_path / "e.onnx").close()


@pytest.mark.usefixtures("no_session")
def test_an_engine_for_another_runtime_is_refused(tmp_path, small_engine_path):
    path = copied(small_engine_path, tmp_path)
    edit(path, runtime="abacus")
    with pytest.raises(EngineError, match="'abacus'"):
        load_engine(path)


@pytest.mark.usefixtures("no_session")
def test_a_graph_is_no_engine(small_graph):
    with pytest.raises(ManifestError, match="is a graph, not an engine"):
        load_engine(small_graph)


# --- the protocol ---------------------------------------------------------------------------------


def test_buffers_are_allocated_once_and_used_in_place(engine, small_tiles):
    assert engine.slots == 3
    inputs = [engine.input(slot) for slot in range(3)]
    outputs = [engine.output(slot) for slot in range(3)]
    for slot in range(3):
        assert inputs[slot].shape == (1, 3, 64, 64)
        assert outputs[slot].shape == (1, 64, 64)
        assert inputs[slot].dtype == outputs[slot].dtype == np.uint8
        assert (outputs[slot] == NO_LABEL).all()
        for other in range(slot):
            assert not np.shares_memory(inputs[slot], inputs[other])
            assert not np.shares_memory(outputs[slot], outputs[other])
    for slot in (0, 2, 1):
        inputs[slot][0] = small_tiles[slot]  # through the view that was handed out first
        engine.launch(slot)
        engine.wait(slot)
        assert engine.input(slot) is inputs[slot]
        assert engine.output(slot) is outputs[slot]
    np.testing.assert_array_equal(np.concatenate(outputs), segment_tiles(engine, small_tiles[:3]))


def test_a_slot_leaves_the_others_alone(engine, small_tiles):
    engine.input(0)[0] = small_tiles[0]
    engine.launch(0)
    engine.wait(0)
    first = engine.output(0).copy()
    engine.input(1)[0] = small_tiles[1]
    engine.launch(1)
    engine.wait(1)
    np.testing.assert_array_equal(engine.output(0), first)
    np.testing.assert_array_equal(engine.input(0)[0], small_tiles[0])
    assert (engine.output(2) == NO_LABEL).all()
    assert (engine.output(1) != first).any()


def test_a_slot_can_be_used_again_and_again(engine, small_tiles):
    once = [segment_tiles(engine, tile[None]) for tile in small_tiles]
    again = [segment_tiles(engine, tile[None]) for tile in small_tiles]
    np.testing.assert_array_equal(once, again)


def test_a_failed_run_leaves_no_labels(engine, small_tiles):
    engine.input(0)[0] = small_tiles[0]
    engine.launch(0)
    assert (engine.output(0) != NO_LABEL).all()
    engine.close()
    with pytest.raises(EngineError):
        engine.launch(0)
    assert (engine.output(0) == NO_LABEL).all()


@pytest.mark.parametrize("change", [{"tile": 32}, {"batch": 2}, {"tile": 10**9}, {"output": "confidence"}], ids=str)
def test_an_engine_that_does_not_fit_its_manifest_is_not_loaded(small_engine_path, change):
    manifest = dataclasses.replace(read_manifest(small_engine_path, EngineManifest), **change)
    with pytest.raises(ManifestError, match=r"has image uint8 \[1,3,64,64\].*its manifest says"):
        CpuEngine(small_engine_path, manifest)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_can_be_chosen(small_engine_path, small_tiles, threads, monkeypatch):
    chosen = []
    session = onnxruntime.InferenceSession

    def spy(model, options, **rest):
        chosen.append(options.intra_op_num_threads)
        return session(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    engine = load_engine(small_engine_path, threads=threads)
    assert chosen == [threads]
    assert segment_tiles(engine, small_tiles[:1]).max() < 5
    monkeypatch.setattr("cdkd_edge.graph.cpu.available_cores", lambda: 7)
    load_engine(small_engine_path)
    assert chosen == [threads, 7]


# --- the profiler ---------------------------------------------------------------------------------


def test_the_profiler_times_every_layer(engine, small_config):
    """Of the whole network, in a copy of the engine, which leaves no file behind."""
    engine.input(0)[:] = sample_tiles(engine.tile, 1)
    times = engine.kernel_times(3)
    assert (times.runs, times.average) == (3, "median")
    assert 0 < sum(one.seconds for one in times.kernels) < 2 * times.profiled_seconds  # medians of different runs
    assert not list((Path(tempfile.gettempdir()) / "cdkd-edge").glob("*/profile*"))
    parts = parts_of([one.nodes for one in times.kernels])
    assert NetworkPart("others") not in parts
    blocks = range(small_config.depth)
    assert [part.block for part in parts if part.name == "attention"] == list(blocks)  # one operator a block
    names = {"LayerNorm", "queries, keys, values", "attention output", "MLP fc1, GELU", "MLP fc2"}
    assert {(name, block) for name in names for block in blocks} <= set(parts)
    assert {"fuse", "smoothing", "laterals", "pyramid pooling", "classifier, up-sampling"} <= {
        one.name for one in parts
    }
    assert not engine._session.get_session_options().enable_profiling
