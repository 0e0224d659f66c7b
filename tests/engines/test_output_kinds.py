"""Confidence and probabilities beyond the graph: the TensorRT engine on a simulated device, the workspace, `build`."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from commands import assert_answer, assert_wrong_usage, run
from cuda_fakes import CUresult, FakeTensorRT
from scene_helpers import noise, write_raster
from tensorrt_helpers import half_graph, needs_compiler
from test_tensorrt_runner import KINDS as BINDINGS
from test_tensorrt_runner import SIDE, Bench, manifest_of, tiles_of

from cdkd_edge.core.errors import EngineError, GraphError, UsageError, WorkspaceError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import EngineTensor, GraphManifest, manifest_path, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import confidence_of
from cdkd_edge.engines.runtimes import RUNTIMES, load_engine
from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.engines.tensorrt.runner import TensorRTEngine
from cdkd_edge.graph.files import derived_path
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.precision.choose import GraphRequest, compare_speed, engine_path, prepare_graph

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

KINDS = ("confidence", "probabilities")
EXPECTED = {"confidence": FakeTensorRT.confidence_of, "probabilities": FakeTensorRT.probabilities_of}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


# --- TensorRT on a simulated device ---------------------------------------------------------------


class KindBench(Bench):
    """A device, a TensorRT and an engine file of a kind of output."""

    def __init__(self, folder, shape, kind, **world):
        super().__init__(folder, shape, **world)
        self.kind = self.trt.output = kind

    def load(self, *, batch=1, **options):
        self.trt.batch = batch
        manifest = dataclasses.replace(manifest_of(self.path, batch=batch), output=self.kind)
        return TensorRTEngine(self.path, manifest, gpu=self.gpu, tensorrt=self.trt, **options)


@pytest.fixture(params=BINDINGS, ids=[f"{shape}-{'integrated' if own else 'discrete'}" for shape, own in BINDINGS])
def device(request, tmp_path):
    """``device(kind)``: a bench for each CUDA binding, with shared and with own memory."""
    shape, integrated = request.param
    return lambda kind: KindBench(tmp_path, shape, kind, integrated=integrated)


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_bound_and_returned(device, kind):
    bench = device(kind)
    engine = bench.load(batch=2)
    assert engine.output_kind == kind
    for seed in range(5):
        slot = seed % engine.slots
        engine.input(slot)[...] = tiles = tiles_of(2, seed)
        engine.launch(slot)
        engine.wait(slot)
        assert (engine.output(slot) == FakeTensorRT.labels_of(tiles)).all()
        assert (getattr(engine, kind)(slot) == EXPECTED[kind](tiles)).all()
    if kind == "probabilities":
        assert (engine.confidence(slot) == confidence_of(FakeTensorRT.probabilities_of(tiles))).all()
    else:
        with pytest.raises(EngineError, match="gives confidence, not probabilities"):
            engine.probabilities(slot)
    engine.close()
    bench.assert_clean()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_show_only_after_waiting(tmp_path, kind, eager):
    bench = KindBench(tmp_path, "cuda-python", kind, eager=eager, integrated=eager)
    engine = bench.load()
    assert not engine.confidence(0).any()
    for seed in range(2):
        engine.input(0)[...] = tiles_of(1, seed)
        engine.launch(0)
        assert (engine.output(0) == NO_LABEL).all()
        assert not engine.confidence(0).any()
        assert not getattr(engine, kind)(0).any()
        with pytest.raises(ValueError, match="read-only"):
            getattr(engine, kind)(0)[...] = 1
        engine.wait(0)
        assert getattr(engine, kind)(0).any()
    engine.close()
    bench.assert_clean()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fails_leaves_nothing(tmp_path, kind, cuda_graph):
    bench = KindBench(tmp_path, "cuda-python", kind)
    engine = bench.load(cuda_graph=cuda_graph)
    engine.input(0)[...] = tiles_of(1)
    engine.launch(0)
    engine.wait(0)
    bench.world.fail("cuEventRecord", CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE"):
        engine.launch(0)
    assert (engine.output(0) == NO_LABEL).all()
    assert not getattr(engine, kind)(0).any()
    engine.close()
    bench.assert_clean()


@pytest.mark.parametrize("skip", range(9))
def test_memory_that_runs_out_anywhere_is_given_back(tmp_path, skip):
    """Three slots of three buffers each."""
    bench = KindBench(tmp_path, "cuda-python", "probabilities")
    bench.world.fail("cuMemHostAlloc", skip=skip)
    with pytest.raises(EngineError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        bench.load()
    bench.assert_clean()


@pytest.mark.parametrize(("promised", "given"), [("confidence", "labels"), ("labels", "confidence")])
def test_an_engine_with_other_outputs_than_its_manifest(tmp_path, promised, given):
    bench = KindBench(tmp_path, "cuda-python", promised)
    bench.trt.output = given
    with pytest.raises(EngineError, match="has other tensors than its manifest says") as caught:
        bench.load()
    assert caught.value.hint.endswith(
        f"cdkd-edge build --fp16{' --confidence' if promised == 'confidence' else ''} --runtime tensorrt"
    )
    bench.assert_clean()


def test_labels_alone_have_no_more_buffers(tmp_path):
    bench = KindBench(tmp_path, "cuda-python", "labels")
    engine = bench.load()
    assert len(bench.world.device) == 2 * engine.slots
    with pytest.raises(EngineError, match="gives labels alone, not confidence"):
        engine.confidence(0)
    assert engine.output(0).shape == (1, SIDE, SIDE)
    engine.close()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_compiles_it_and_binds_uint8(tmp_path, small_graph, kind):
    """Parser and builder are NVIDIA's own; nothing is run."""
    for file in (small_graph, manifest_path(small_graph)):
        shutil.copy(file, tmp_path)
    source = half_graph(tmp_path / small_graph.name)
    graph = derived_path(source, kind)
    write_variant(source, graph, kind)
    manifest = build_tensorrt_engine(graph, tmp_path / "engines" / "a.engine", TensorRTOptions(targets=("8.6",)))
    shape = (1, 64, 64) if kind == "confidence" else (1, 5, 64, 64)
    assert manifest.tensorrt.tensors == (
        EngineTensor("image", "uint8", (1, 3, 64, 64)),
        EngineTensor("labels", "uint8", (1, 64, 64)),
        EngineTensor(kind, "uint8", shape),
    )
    assert (manifest.output, manifest.precision, manifest.attention_blocks) == (kind, "fp16", 4)
    # The same file under a manifest that promises less.
    document = json.loads(manifest_path(graph).read_text())
    manifest_path(graph).write_text(json.dumps({**document, "output": "labels"}))
    with pytest.raises(GraphError, match=f"{kind} uint8"):
        build_tensorrt_engine(graph, tmp_path / "engines" / "b.engine", TensorRTOptions(targets=("8.6",)))


# --- the workspace --------------------------------------------------------------------------------


def put(folder, name, **document):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.touch()
    path.with_suffix(".json").write_text(json.dumps(document))
    return path


def test_a_variant_beside_the_plain_engine_is_not_ambiguous(tmp_path):
    space = Workspace(tmp_path)
    plain = put(space.engines, "a.fp16.engine")
    sure = put(space.engines, "a.fp16.confidence.engine", output="confidence")
    full = put(space.engines, "a.fp16.probabilities.engine", output="probabilities")
    assert space.only_engine("cdkd-edge bench") == plain
    assert space.only_engine("cdkd-edge segment", "confidence") == sure
    assert space.only_engine("cdkd-edge segment", "probabilities") == full
    sure.unlink()
    assert space.only_engine("cdkd-edge segment", "confidence") == full, "it follows from probabilities"
    plain.unlink()
    assert space.only_engine("cdkd-edge bench") == full, "it gives labels, too"


def test_two_engines_that_give_the_same_are_ambiguous(tmp_path):
    space = Workspace(tmp_path)
    for name, output in (("a", "labels"), ("a.confidence", "confidence"), ("b.confidence", "confidence")):
        put(space.engines, f"{name}.engine", output=output)
    assert space.only_engine("cdkd-edge bench").name == "a.engine"
    with pytest.raises(WorkspaceError, match=r"2 candidates for the engine with confidence in .*: a\.conf"):
        space.only_engine("cdkd-edge segment", "confidence")


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_engine_that_has_it_the_build_command_is_named(tmp_path, kind):
    space = Workspace(tmp_path)
    put(space.engines, "a.fp16.engine", output="labels")
    if kind == "probabilities":
        put(space.engines, "a.fp16.confidence.engine", output="confidence")
    with pytest.raises(WorkspaceError, match=f"there is no engine with {kind} in") as caught:
        space.only_engine("cdkd-edge segment", kind)
    assert caught.value.hint == f"make one: cdkd-edge export CKPT && cdkd-edge build --{kind}"


def test_graphs_with_more_than_labels_are_found_only_when_asked_for(tmp_path):
    space = Workspace(tmp_path)
    plain = put(space.graphs, "a.onnx", precision="fp32")
    sure = put(space.graphs, "a.confidence.onnx", precision="fp32", output="confidence")
    assert space.graphs_of("fp32") == [plain]
    assert space.only_graph() == plain
    assert space.only_graph("fp32", output="confidence") == sure


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_engines(tmp_path, kind):
    space = Workspace(tmp_path)
    for name, precision, expected in (("a", "fp32", "a.fp32"), ("a.fp16", "fp16", "a.fp16")):
        graph = put(space.graphs, f"{name}.{kind}.onnx", precision=precision, output=kind)
        assert engine_path(space, graph, RUNTIMES["cpu"]) == space.engines / f"{expected}.{kind}.cpu.onnx"
        assert engine_path(space, graph, RUNTIMES["tensorrt"]) == space.engines / f"{expected}.{kind}.engine"


# --- build ----------------------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path, small_graph):
    folder = tmp_path / "space" / "export"
    folder.mkdir(parents=True)
    for file in (small_graph, manifest_path(small_graph)):
        shutil.copy(file, folder)
    return Workspace(folder.parent)


def test_build_makes_the_graph_and_the_engine_and_nothing_becomes_ambiguous(space, tmp_path):
    assert run("build", "-w", space.root).exit_code == 0
    for kind in KINDS:
        result = run("build", f"--{kind}", "-w", space.root, "--json")
        assert result.exit_code == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["manifest"]["output"] == kind
        assert answer["graph_made"]
        assert answer["graph"].endswith(f"export/small.{kind}.onnx")
        assert answer["path"].endswith(f"engines/small.fp32.{kind}.cpu.onnx")
        again = json.loads(run("build", f"--{kind}", "-w", space.root, "--json").stdout)
        assert not again["graph_made"]
        assert again["manifest"]["artefact"]["sha256"] == answer["manifest"]["artefact"]["sha256"]
    shown = run("build", "--confidence", "-w", space.root)
    assert re.search(r"output\s+labels, confidence", shown.stdout)

    scene = write_raster(tmp_path / "scene.tif", noise(64, 64))
    for arguments in (
        ["segment", scene],
        ["inspect"],
        ["bench", "--duration", "0.1", "--max-warm-up", "0", "--scene", scene],
        ["roofline"],
        ["build"],
    ):
        result = run(*arguments, "-w", space.root)
        assert result.exit_code == 0, (arguments, result.stderr)
    assert re.search(r"output\s+labels *\n", run("inspect", "-w", space.root).stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_was_exported_again_has_its_variant_made_again(
    space, make_graph, make_weights, small_config, kind
):
    first = json.loads(run("build", f"--{kind}", "-w", space.root, "--json").stdout)
    make_graph(space.graphs, make_weights(small_config, seed=9), small_config)
    second = json.loads(run("build", f"--{kind}", "-w", space.root, "--json").stdout)
    assert second["graph_made"]
    assert first["manifest"]["graph"]["sha256"] != second["manifest"]["graph"]["sha256"]
    parent = read_manifest(derived_path(space.graphs / "small.onnx", kind), GraphManifest).parent
    assert parent == read_manifest(space.graphs / "small.onnx", GraphManifest).artefact


def test_fp16_is_made_first_and_needs_tensorrt(space):
    half_graph(space.graphs / "small.onnx")
    result = run("build", "--fp16", "--confidence", "-w", space.root)
    assert_answer(result, 9, r"an FP16 engine needs TensorRT.*run `cdkd-edge build --fp16 --confidence` there")
    manifest = read_manifest(space.graphs / "small.fp16.confidence.onnx", GraphManifest)
    assert (manifest.precision, manifest.output) == ("fp16", "confidence")


def test_one_kind_at_a_time(space):
    assert_wrong_usage(
        run("build", "--confidence", "--probabilities", "-w", space.root), "probabilities include confidence"
    )


def test_a_named_graph_with_confidence_is_built_as_it_is(space):
    plain = space.graphs / "small.onnx"
    sure = derived_path(plain, "confidence")
    write_variant(plain, sure, "confidence")
    for asked in (None, "confidence"):
        prepared = prepare_graph(space, sure, None, output=asked)
        assert (prepared.path, prepared.made) == (sure, False)
    for precision, output in (("fp16", None), (None, "probabilities"), (None, "labels")):
        with pytest.raises(UsageError, match="a graph of fp32 that gives confidence"):
            prepare_graph(space, sure, precision, output=output)
    with pytest.raises(UsageError):
        prepare_graph(space, sure, None, GraphRequest(again=True))


def test_a_board_to_which_only_the_variant_was_carried(space):
    plain = space.graphs / "small.onnx"
    half = half_graph(plain)
    sure = derived_path(half, "confidence")
    write_variant(half, sure, "confidence")
    for path in (plain, half):
        path.unlink()
        manifest_path(path).unlink()
    assert prepare_graph(space, None, "fp16", output="confidence").path == sure
    with pytest.raises(WorkspaceError, match="no fp16 graph"):
        prepare_graph(space, None, "fp16", output="probabilities")


def test_int8_with_confidence_is_timed_against_fp32_with_confidence(space, tmp_path, monkeypatch):
    monkeypatch.setattr("cdkd_edge.engines.protocol.SPEED_ROUNDS", 1)
    run("build", "--confidence", "-w", space.root)
    rival = space.engines / "small.fp32.confidence.cpu.onnx"
    copy = space.engines / "small.int8.confidence.cpu.onnx"
    for source, target in ((rival, copy), (manifest_path(rival), manifest_path(copy))):
        shutil.copy(source, target)
    manifest = dataclasses.replace(load_engine(copy).manifest, precision="int8")
    assert compare_speed(copy, manifest).path == rival


def test_evaluate_and_parity_take_a_graph_with_confidence(space, small_tiles):
    """They look at the labels."""
    from cdkd_edge.engines.protocol import segment_tiles
    from cdkd_edge.quality.artefacts import open_artefact

    plain = space.graphs / "small.onnx"
    write_variant(plain, derived_path(plain, "probabilities"), "probabilities")
    found = open_artefact(derived_path(plain, "probabilities")).labeller
    assert (segment_tiles(found, small_tiles) == segment_tiles(open_artefact(plain).labeller, small_tiles)).all()
    assert np.ptp(found.confidence(0)) > 0
