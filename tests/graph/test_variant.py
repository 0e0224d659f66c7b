"""Graphs and CPU engines that give confidence or probabilities beside the labels, and the labels unchanged."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_helpers import half_graph, int8_variant

from cdkd_edge.core.errors import EngineError, GraphError, ManifestError, NumericalCheckError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphManifest,
    manifest_path,
    output_of,
    output_shapes,
    provides,
    read_manifest,
    write_manifest,
)
from cdkd_edge.engines.onnxruntime import CpuEngine, OnnxLabeller, build_cpu_engine, graph_labeller
from cdkd_edge.engines.protocol import Labeller, confidence_of, segment_tiles
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.graph import outputs as variant
from cdkd_edge.graph.cpu import cpu_session, cpu_twin, fuse_attention
from cdkd_edge.graph.files import derived_path, load_graph
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.fp16_simulation import fp16_on_cpu, rounded_values
from cdkd_edge.graph.layers import scores_of
from cdkd_edge.graph.outputs import check_branch, expected_output, with_output, write_variant
from cdkd_edge.precision.int8 import write_int8

KINDS = ("confidence", "probabilities")
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, small_graph):
    """The small network's graph in three precisions. Not to be changed."""
    folder = tmp_path_factory.mktemp("export")
    for file in (small_graph, manifest_path(small_graph)):
        shutil.copy(file, folder)
    plain = folder / small_graph.name
    return {"fp32": plain, "fp16": half_graph(plain), "int8": int8_variant(plain)}


@pytest.fixture(scope="module")
def variants(graphs):
    """Of each precision and kind, the path and the manifest."""
    made = {}
    for precision, graph in graphs.items():
        for kind in KINDS:
            path = derived_path(graph, kind)
            made[precision, kind] = (path, write_variant(graph, path, kind))
    return made


def outputs(labeller, kind, tiles):
    """Labels and the other output, tile by tile."""
    labels, others = [], []
    for tile in tiles:
        labeller.input(0)[0] = tile
        labeller.launch(0)
        labeller.wait(0)
        labels.append(labeller.output(0)[0].copy())
        others.append(getattr(labeller, kind)(0)[0].copy())
    return np.stack(labels), np.stack(others)


def fused_twin(model):
    """As engines run it; a value that attention changes in its last digits may move by a step of INT8."""
    twin = cpu_twin(model)
    fuse_attention(twin)
    return twin


def scores_in(model, tiles):
    """The logits at full resolution ``[M, K, T, T]``."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    name = scores_of(model)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = cpu_session(model)
    return np.concatenate([session.run([name], {"image": tile[None]})[0] for tile in tiles])


def edit(path, **changes):
    document = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**document, **changes}))


def copied(path, folder):
    for file in (path, manifest_path(path)):
        shutil.copy(file, folder)
    return folder / path.name


# --- the graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_are_bit_identical_and_the_rest_is_softmax(graphs, variants, small_tiles, precision, kind):
    graph = graphs[precision]
    path, manifest = variants[precision, kind]
    plain = segment_tiles(graph_labeller(graph, read_manifest(graph, GraphManifest)), small_tiles)
    labels, found = outputs(graph_labeller(path, manifest), kind, small_tiles)
    assert (labels == plain).all()
    judged = {"fp32": lambda m: m, "fp16": fp16_on_cpu, "int8": fused_twin}[precision](load_graph(graph))
    expected = expected_output(scores_in(judged, small_tiles), kind)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 1).mean() < 1e-3
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 20, "the tiles tell something"


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_what_torch_makes_of_the_same_logits(graphs, variants, small_tiles, kind):
    torch = pytest.importorskip("torch")
    scores = scores_in(load_graph(graphs["fp32"]), small_tiles)
    softmax = torch.from_numpy(scores).softmax(dim=1)
    expected = (255 * softmax if kind == "probabilities" else 100 * softmax.amax(dim=1)).round().numpy()
    _, found = outputs(graph_labeller(*variants["fp32", kind]), kind, small_tiles)
    difference = np.abs(found - expected)
    assert difference.max() <= 1
    assert (difference == 1).mean() < 1e-3


def test_probabilities_have_their_maximum_at_the_label_and_add_up(variants, small_tiles):
    labels, found = outputs(graph_labeller(*variants["fp32", "probabilities"]), "probabilities", small_tiles)
    assert (np.take_along_axis(found, labels[:, None], axis=1)[:, 0] == found.max(axis=1)).all()
    assert np.abs(found.astype(int).sum(axis=1) - 255).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_way_to_the_labels_is_not_touched(graphs, variants, precision, kind):
    plain, grown = load_graph(graphs[precision]).graph, load_graph(variants[precision, kind][0]).graph
    count = len(plain.node)
    assert list(grown.node)[:count] == list(plain.node)
    assert list(grown.initializer)[: len(plain.initializer)] == list(plain.initializer)
    assert all(node.output[0].startswith(kind) for node in list(grown.node)[count:])
    assert [output.name for output in grown.output] == ["labels", kind]
    assert not any(node.op_type == "Softmax" for node in list(grown.node)[count:]), "it would count as attention"
    onnx.checker.check_model(load_graph(variants[precision, kind][0]), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp16_the_branch_alone_is_fp32(variants, kind):
    model = load_graph(variants["fp16", kind][0])
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {item.name: item.type.tensor_type.elem_type for item in inferred.graph.value_info}
    for name, found in types.items():
        if name.startswith(f"{kind}."):
            assert found == TensorProto.FLOAT, name
    assert TensorProto.FLOAT not in {found for name, found in types.items() if not name.startswith(kind)}
    assert not [name for name in rounded_values(fp16_on_cpu(model)) if name.startswith(kind)]


def test_before_opset_18_axes_are_an_attribute(tmp_path, make_graph, small_weights, small_config, small_tiles):
    graph = make_graph(tmp_path, small_weights, small_config, opset=17)
    for kind in KINDS:
        path = derived_path(graph, kind)
        manifest = write_variant(graph, path, kind)
        onnx.checker.check_model(load_graph(path), full_check=True)
        _, found = outputs(graph_labeller(path, manifest), kind, small_tiles[:1])
        expected = expected_output(scores_in(load_graph(graph), small_tiles[:1]), kind)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_batch(tmp_path, make_graph, small_weights, small_config, small_tiles):
    graph = make_graph(tmp_path, small_weights, small_config, batch=2)
    path = derived_path(graph, "probabilities")
    manifest = write_variant(graph, path, "probabilities")
    assert manifest.outputs == {"labels": (2, 64, 64), "probabilities": (2, 5, 64, 64)}
    labeller = graph_labeller(path, manifest)
    labeller.input(0)[:] = small_tiles[:2]
    labeller.launch(0)
    assert labeller.probabilities(0).shape == (2, 5, 64, 64)
    assert labeller.confidence(0).shape == (2, 64, 64)
    assert (labeller.probabilities(0).argmax(axis=1) == labeller.output(0)).mean() > 0.99


def test_the_manifest_says_what_it_gives_and_what_it_was_made_from(graphs, variants):
    for (precision, kind), (path, manifest) in variants.items():
        assert read_manifest(path, GraphManifest) == manifest
        assert (manifest.output, manifest.precision, output_of(path)) == (kind, precision, kind)
        assert manifest.parent == read_manifest(graphs[precision], GraphManifest).artefact
        assert manifest.nodes == len(load_graph(path).graph.node)
        assert path.name == f"{graphs[precision].stem}.{kind}.onnx"


def test_a_manifest_from_before_says_labels(tmp_path, graphs):
    path = copied(graphs["fp32"], tmp_path)
    document = json.loads(manifest_path(path).read_text())
    del document["output"]
    manifest_path(path).write_text(json.dumps(document))
    assert read_manifest(path, GraphManifest).output == output_of(path) == "labels"


@pytest.mark.parametrize("kind", ["logits", "", None, 3])
def test_a_manifest_with_an_unknown_output_is_refused(tmp_path, graphs, kind):
    path = copied(graphs["fp32"], tmp_path)
    edit(path, output=kind)
    with pytest.raises(ManifestError):
        read_manifest(path, GraphManifest)
    assert output_of(path) == "labels"


# --- what cannot be made --------------------------------------------------------------------------


def test_a_variant_has_no_variant_and_no_lower_precision(tmp_path, variants):
    path, manifest = variants["fp32", "confidence"]
    with pytest.raises(GraphError, match="gives confidence already"):
        write_variant(path, tmp_path / "a.onnx", "probabilities")
    with pytest.raises(GraphError, match="does not end in labels alone"):
        with_output(load_graph(path), "probabilities", 5)
    with pytest.raises(GraphError, match="labels alone"):
        write_fp16(path, tmp_path / "a.onnx")
    with pytest.raises(GraphError, match="labels alone"):
        write_int8(path, tmp_path / "a.onnx", _NoTiles(manifest.tile))
    assert list(tmp_path.iterdir()) == []


class _NoTiles:
    """As far as a calibration set is looked at before the graph is."""

    name = "none"

    def __init__(self, tile):
        self.tile = tile

    def tiles(self, role):
        return [role]


@pytest.mark.parametrize("kind", ["labels", "logits", ""])
def test_there_are_two_kinds(tmp_path, graphs, kind):
    with pytest.raises(GraphError, match="there is no graph with"):
        write_variant(graphs["fp32"], tmp_path / "a.onnx", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_another_shape_is_refused(tmp_path, graphs):
    path = copied(graphs["fp32"], tmp_path)
    model = load_graph(path)
    next(node for node in model.graph.node if node.op_type == "ArgMax").op_type = "ArgMin"
    onnx.save(model, path)
    manifest = read_manifest(path, GraphManifest, verify=False)
    write_manifest(path, dataclasses.replace(manifest, artefact=FileRecord.of(path)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraphError, match="does not end in labels alone"):
        write_variant(path, derived_path(path, "confidence"), "confidence")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_not_ours_is_not_replaced(tmp_path, graphs):
    path = copied(graphs["fp32"], tmp_path)
    mine = derived_path(path, "confidence")
    mine.write_bytes(b"mine")
    with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
        write_variant(path, mine, "confidence")
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_the_check_finds_a_branch_that_is_wrong(monkeypatch, kind, half):
    assert check_branch(kind, 7, 20, half=half) < 1e-3
    right = variant.output_branch

    def without_largest(*arguments, **options):
        branch = right(*arguments, **options)
        next(node for node in branch.nodes if node.op_type == "Sub").op_type = "Add"
        return branch

    monkeypatch.setattr(variant, "output_branch", without_largest)
    with pytest.raises(NumericalCheckError, match="differ from softmax"):
        check_branch(kind, 7, 20, half=half)


# --- the CPU engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_paths(tmp_path_factory, variants):
    folder = tmp_path_factory.mktemp("engines")
    paths = {}
    for precision in ("fp32", "int8"):
        for kind in KINDS:
            paths[precision, kind] = folder / f"small.{precision}.{kind}.cpu.onnx"
            build_cpu_engine(variants[precision, kind][0], paths[precision, kind])
    return paths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_gives_what_its_graph_gives(variants, engine_paths, small_tiles, precision, kind):
    engine = load_engine(engine_paths[precision, kind])
    assert engine.output_kind == engine.manifest.output == kind
    assert engine.manifest.attention_blocks == engine.manifest.attention_fused == 4
    labels, found = outputs(engine, kind, small_tiles)
    expected_labels, expected = outputs(graph_labeller(*variants[precision, kind]), kind, small_tiles)
    assert (labels == expected_labels).mean() > 0.9999
    assert np.abs(found.astype(int) - expected).max() <= 1
    engine.close()


def test_confidence_follows_from_probabilities(engine_paths, small_tiles):
    direct, derived = (load_engine(engine_paths["fp32", kind]) for kind in KINDS)
    _, expected = outputs(direct, "confidence", small_tiles)
    _, found = outputs(derived, "confidence", small_tiles)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1
    with pytest.raises(EngineError, match="gives confidence, not probabilities") as caught:
        direct.probabilities(0)
    assert caught.value.hint == "build one that does: cdkd-edge build --probabilities"


def test_an_engine_with_labels_alone_says_what_to_build(small_engine_path):
    engine = load_engine(small_engine_path)
    assert engine.output_kind == "labels"
    for wanted in KINDS:
        with pytest.raises(EngineError, match=f"gives labels alone, not {wanted}") as caught:
            getattr(engine, wanted)(0)
        assert caught.value.hint == f"build one that does: cdkd-edge build --{wanted}"


def test_what_gives_labels_alone_says_so():
    class LabelsOnly(Labeller):
        artefact = FileRecord("some.pt", "", 0)

    assert LabelsOnly().output_kind == "labels"
    for wanted in KINDS:
        with pytest.raises(EngineError, match=f"some.pt gives labels alone, not {wanted}"):
            getattr(LabelsOnly(), wanted)(0)


def test_after_a_failure_nothing_is_known(engine_paths, small_tiles, monkeypatch):
    engine = load_engine(engine_paths["fp32", "probabilities"])
    assert (engine.output(0) == NO_LABEL).all()
    assert not engine.confidence(0).any()
    assert not engine.probabilities(0).any()
    outputs(engine, "probabilities", small_tiles[:1])
    assert engine.probabilities(0).any()

    class Broken:
        def run_with_iobinding(self, binding):
            raise RuntimeError("out of luck")

    monkeypatch.setattr(engine, "_session", Broken())
    with pytest.raises(EngineError, match="out of luck"):
        engine.launch(0)
    assert (engine.output(0) == NO_LABEL).all()
    assert not engine.probabilities(0).any()


def test_a_manifest_that_promises_more_than_the_engine_gives(tmp_path, engine_paths, small_engine_path):
    for source, kind in ((small_engine_path, "confidence"), (engine_paths["fp32", "confidence"], "probabilities")):
        path = copied(source, tmp_path)
        edit(path, output=kind)
        with pytest.raises(ManifestError, match=rf"labels uint8.*its manifest says .*, {kind} uint8"):
            load_engine(path)


def test_an_engine_that_is_unsure_of_itself_is_not_written(tmp_path, variants, monkeypatch):
    """The check of a new engine looks at every output."""
    path = copied(variants["fp32", "confidence"][0], tmp_path)
    real = OnnxLabeller.named_output

    def dimmed(self, slot, name):
        return real(self, slot, name) // (2 if name == "confidence" else 1)

    monkeypatch.setattr(OnnxLabeller, "named_output", dimmed)
    with pytest.raises(NumericalCheckError, match="gives another confidence than the graph"):
        build_cpu_engine(path, tmp_path / "small.cpu.onnx")
    assert not (tmp_path / "small.cpu.onnx").exists()


def test_a_cpu_engine_of_another_release_says_how_to_build_it_again(tmp_path, engine_paths):
    path = copied(engine_paths["int8", "confidence"], tmp_path)
    edit(path, libraries={"onnxruntime": "0.1.0"})
    with pytest.raises(EngineError) as caught:
        load_engine(path)
    assert caught.value.hint.endswith("cdkd-edge build --int8 --confidence")
    assert isinstance(load_engine(engine_paths["int8", "confidence"]), CpuEngine)


# --- kinds ----------------------------------------------------------------------------------------


def test_what_includes_what():
    assert [provides(kind, "labels") for kind in ("labels", *KINDS)] == [True, True, True]
    assert [provides(kind, "confidence") for kind in ("labels", *KINDS)] == [False, True, True]
    assert [provides(kind, "probabilities") for kind in ("labels", *KINDS)] == [False, False, True]
    assert output_shapes("labels", 2, 8, 5) == {"labels": (2, 8, 8)}


def test_confidence_of_every_probability():
    values = np.arange(256, dtype=np.uint8)[None, None, None]
    found = confidence_of(np.concatenate([values, values // 2], axis=1))
    assert (found[0, 0] == np.rint(np.arange(256) * 100 / 255)).all()
    assert (found.dtype, found.shape) == (np.uint8, (1, 1, 256))
