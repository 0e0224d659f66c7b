"""The engine of OpenVINO: in the precision that was asked for, as its graph labels; and `build` chooses by speed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import assert_answer, run

from cdkd_edge.core.errors import EngineError, ManifestError, MissingExtraError, NumericalCheckError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import EngineManifest, FileRecord, GraphManifest, manifest_path, read_manifest
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines import openvino as ours
from cdkd_edge.engines import runtimes
from cdkd_edge.engines.onnxruntime import build_cpu_engine
from cdkd_edge.engines.openvino import OpenVinoEngine, build_openvino_engine
from cdkd_edge.engines.protocol import segment_tiles
from cdkd_edge.engines.runtimes import RUNTIMES, choose_runtime, load_engine
from cdkd_edge.graph.layers import NetworkPart, parts_of
from cdkd_edge.model.config import attention_of
from cdkd_edge.precision import choose
from cdkd_edge.precision.choose import build_fastest, compare_speed, engine_path, engine_places

WITH = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")


def edit(path: Path, /, **changes) -> None:
    document = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**document, **changes}))


def copied(path: Path, folder: Path) -> Path:
    for file in (path, manifest_path(path)):
        shutil.copy(file, folder)
    return folder / path.name


@pytest.fixture
def installed(monkeypatch):
    """OpenVINO counts as installed; the other tests hide it."""
    monkeypatch.setattr(runtimes, "find_spec", find_spec)


@pytest.fixture(scope="session")
def engine_file(small_graph, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "small.fp32.openvino.onnx"
    build_openvino_engine(small_graph, path, "fp32")
    return path


@pytest.fixture
def asked(monkeypatch):
    """The options of every compilation."""
    openvino, options = ours.import_openvino(), []
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, config):
        options.append(config)
        return compile_model(self, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    return options


# --- the engine -----------------------------------------------------------------------------------


@WITH
def test_it_labels_as_the_graph_and_as_the_other_engine(engine_file, small_engine_path, small_tiles):
    with load_engine(engine_file) as engine, load_engine(small_engine_path) as other:
        assert isinstance(engine, OpenVinoEngine)
        labels = segment_tiles(engine, small_tiles)
        assert (labels == segment_tiles(other, small_tiles)).mean() > 0.9999
        assert len(np.unique(labels)) == 5


@WITH
def test_the_file_is_the_graph_and_names_no_place(engine_file, small_graph, small_config):
    manifest = read_manifest(engine_file, EngineManifest)
    assert (manifest.runtime, manifest.precision) == ("openvino-cpu", "fp32")
    assert manifest.artefact == FileRecord.of(engine_file)
    assert manifest.graph.sha256 == sha256_of(small_graph)
    assert manifest.attention_blocks == small_config.depth
    assert 0 <= manifest.attention_fused <= small_config.depth
    assert "-" not in manifest.libraries["openvino"], "the release, without the number of the build"
    assert onnx.load(engine_file) == onnx.load(small_graph)
    for file in (engine_file, manifest_path(engine_file)):
        assert str(small_graph.parent).encode() not in file.read_bytes()
        assert str(engine_file.parent).encode() not in file.read_bytes()


@WITH
def test_what_openvino_fuses_is_read_from_its_kernels(engine_file):
    """One kernel has both products of the first block; the second block's softmax is a kernel of its own."""

    def kernel(*names):
        text = types.SimpleNamespace(astype=lambda kind: ",".join(names))
        return types.SimpleNamespace(
            get_friendly_name=lambda: names[-1], get_rt_info=lambda: {"originalLayersNames": text}
        )

    kernels = [
        kernel("blocks.0.attn.scores/MatMul", "blocks.0.attn.share/Softmax", "blocks.0.attn.mixed/MatMul"),
        kernel("blocks.1.attn.scores/MatMul"),
        kernel("blocks.1.attn.share/Softmax"),
        kernel("probability/Softmax"),
    ]
    model = types.SimpleNamespace(get_ops=lambda: kernels)
    assert ours._fused_attention(types.SimpleNamespace(get_runtime_model=lambda: model)) == 1
    with load_engine(engine_file) as engine:  # that there are such names
        nodes = engine._compiled.get_runtime_model().get_ops()
        assert any("/Softmax" in node.get_rt_info()["originalLayersNames"].astype(str) for node in nodes)


@WITH
def test_the_profiler_times_every_layer_of_the_network(engine_file):
    with load_engine(engine_file) as engine:
        engine.input(0)[:] = sample_tiles(engine.tile, 1)
        times = engine.kernel_times(3)
    assert times.runs == 3
    assert 0 < sum(one.seconds for one in times.kernels) < 1.05 * times.profiled_seconds
    parts = set(parts_of([one.nodes for one in times.kernels]))
    assert {
        NetworkPart(name, block) for name in ("attention", "MLP fc1, GELU", "MLP fc2") for block in range(4)
    } <= parts
    assert NetworkPart("others") not in parts


@WITH
@pytest.mark.parametrize("kind", ["confidence", "probabilities"])
def test_further_outputs(small_graph, small_tiles, tmp_path, kind):
    space = Workspace(tmp_path)
    result = run("build", small_graph, "--runtime", "openvino", f"--{kind}", "-w", tmp_path)
    assert result.exit_code == 0, result.stderr
    build_cpu_engine(read_only(tmp_path, kind, small_graph), tmp_path / "other.cpu.onnx")
    path = space.engines / f"small.fp32.{kind}.openvino.onnx"
    with load_engine(path) as engine, load_engine(tmp_path / "other.cpu.onnx") as other:
        for one in (engine, other):
            one.input(0)[0] = small_tiles[0]
            one.launch(0)
            one.wait(0)
        difference = engine.confidence(0).astype(int) - other.confidence(0)
        assert np.abs(difference).max() <= 1
        assert engine.confidence(0).max() > 0


def read_only(workspace: Path, kind: str, graph: Path) -> Path:
    """The graph that `build` made beside the small one."""
    return graph.with_name(f"small.{kind}.onnx")


@WITH
def test_a_batch(tmp_path, make_graph, small_weights, small_config, small_tiles, small_engine_path):
    graph = make_graph(tmp_path / "export", small_weights, small_config, batch=3)
    assert build_openvino_engine(graph, tmp_path / "e.onnx", "fp32").batch == 3
    with load_engine(tmp_path / "e.onnx") as engine, load_engine(small_engine_path) as other:
        assert engine.input(0).shape == (3, 3, 64, 64)
        assert (segment_tiles(engine, small_tiles) == segment_tiles(other, small_tiles)).mean() > 0.9999


@WITH
@pytest.mark.parametrize("text", ["window4/global", "window2/pooled2"])
def test_windows_and_pooled_keys(tmp_path, make_graph, small_weights, small_config, text):
    """The build compares labels with the graph's in ONNX Runtime."""
    config = dataclasses.replace(small_config, attention=attention_of(text, small_config.depth, small_config.taps))
    manifest = build_openvino_engine(make_graph(tmp_path, small_weights, config), tmp_path / "e.onnx", "fp32")
    assert manifest.attention_blocks == small_config.depth


@WITH
def test_slots_run_side_by_side_in_arrays_that_stay(engine_file, small_tiles):
    with load_engine(engine_file) as engine:
        assert engine.slots == 3
        inputs, outputs = [engine.input(slot) for slot in range(3)], [engine.output(slot) for slot in range(3)]
        assert all((labels == NO_LABEL).all() for labels in outputs)
        for slot in range(3):
            inputs[slot][0] = small_tiles[slot]
            engine.launch(slot)
        for slot in (2, 0, 1):
            engine.wait(slot)
        assert all(engine.output(slot) is outputs[slot] for slot in range(3))
        np.testing.assert_array_equal(np.concatenate(outputs), segment_tiles(engine, small_tiles[:3]))


@WITH
def test_a_failed_run_leaves_no_labels(engine_file, small_tiles):
    engine = load_engine(engine_file)
    engine.input(0)[0] = small_tiles[0]
    engine.launch(0)
    engine.wait(0)
    assert (engine.output(0) != NO_LABEL).all()
    engine.close()
    for call in (engine.launch, engine.wait):
        engine.output(0)[:] = 1
        with pytest.raises(EngineError, match="failed on a tile"):
            call(0)
        assert (engine.output(0) == NO_LABEL).all()


# --- what is asked of OpenVINO --------------------------------------------------------------------


@WITH
def test_the_precision_is_always_said(engine_file, asked, monkeypatch, small_graph, tmp_path):
    """OpenVINO's own choice is BF16 or FP16 where the CPU has it; so the option must be there, on every CPU."""
    load_engine(engine_file).close()
    build_openvino_engine(small_graph, tmp_path / "e.onnx", "fp32")
    assert [options["INFERENCE_PRECISION_HINT"] for options in asked] == ["f32", "f32"]
    with load_engine(engine_file) as engine:
        assert engine._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    monkeypatch.setattr(ours, "cpu_precisions", lambda: ("FP32", "BF16"))
    edit(copied(engine_file, tmp_path), precision="bf16")
    load_engine(tmp_path / engine_file.name).close()
    assert asked[-1]["INFERENCE_PRECISION_HINT"] == "bf16"


@WITH
def test_threads(engine_file, asked, monkeypatch):
    """Those that were asked for, or the cores of this process, which a container may limit; never pinned to a core."""
    load_engine(engine_file, threads=1).close()
    monkeypatch.setattr(ours, "available_cores", lambda: 2)
    load_engine(engine_file).close()
    assert [options["INFERENCE_NUM_THREADS"] for options in asked] == [1, 2]
    assert not any(options["ENABLE_CPU_PINNING"] for options in asked)


@WITH
def test_its_telemetry_stays_out():
    """It reports `import openvino` to a server; tests/test_house.py watches the calls, where strace is."""
    script = """if True:
        import sys
        from cdkd_edge.engines.openvino import cpu_precisions
        assert "FP32" in cpu_precisions()
        assert not [name for name, module in sys.modules.items() if "openvino_telemetry" in name and module]"""
    root = Path(ours.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what is refused ------------------------------------------------------------------------------


@WITH
def test_an_engine_that_labels_otherwise_is_not_written(small_graph, tmp_path, monkeypatch):
    compiled = ours._compile

    def other_network(model: bytes, *rest):
        graph = onnx.load_from_string(model)
        largest = max(graph.graph.initializer, key=lambda item: len(item.raw_data))
        largest.raw_data = (-np.frombuffer(largest.raw_data, np.float32)).tobytes()
        return compiled(graph.SerializeToString(), *rest)

    monkeypatch.setattr(ours, "_compile", other_network)
    with pytest.raises(NumericalCheckError, match=r"the FP32 engine gives another label .*at most 0\.01% may differ"):
        build_openvino_engine(small_graph, tmp_path / "e.onnx", "fp32")
    assert list(tmp_path.iterdir()) == []


@WITH
def test_an_engine_of_another_release_is_refused(engine_file, tmp_path):
    path = copied(engine_file, tmp_path)
    libraries = read_manifest(path, EngineManifest).libraries
    edit(path, libraries={**libraries, "openvino": "2019.3.0"})
    with pytest.raises(EngineError, match=r"was built with openvino 2019\.3\.0; this is 20\d\d\.") as caught:
        load_engine(path)
    assert "cdkd-edge build --fp32" in caught.value.hint
    edit(path, libraries={**libraries, "openvino": libraries["openvino"].rpartition(".")[0] + ".99"})
    load_engine(path).close()


@WITH
def test_a_damaged_engine_is_refused_before_openvino_sees_it(engine_file, tmp_path, asked):
    path = copied(engine_file, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="SHA-256 differs"):
        load_engine(path)
    assert not asked


@WITH
@pytest.mark.parametrize("change", [{"tile": 32}, {"batch": 2}, {"output": "confidence"}], ids=str)
def test_an_engine_that_does_not_fit_its_manifest(engine_file, change):
    manifest = dataclasses.replace(read_manifest(engine_file, EngineManifest), **change)
    with pytest.raises(ManifestError, match="its manifest says"):
        OpenVinoEngine(engine_file, manifest)


@WITH
def test_what_openvino_refuses_is_one_line(small_graph):
    with pytest.raises(EngineError, match=r"loading x\.onnx failed in OpenVINO: ") as caught:
        ours._compile(b"no graph", "fp32", None, "x.onnx")
    assert "\n" not in str(caught.value)


@WITH
def test_bf16_needs_a_cpu_that_has_it(small_graph, engine_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "cpu_precisions", lambda: ("FP32", "INT8"))
    with pytest.raises(EngineError, match="BF16, which this CPU does not have"):
        build_openvino_engine(small_graph, tmp_path / "e.onnx", "bf16")
    assert list(tmp_path.iterdir()) == []
    edit(copied(engine_file, tmp_path), precision="bf16")  # built elsewhere
    with pytest.raises(EngineError, match="which this CPU does not have"):
        load_engine(tmp_path / engine_file.name)


def test_other_graphs_are_for_other_runtimes(small_graph, tmp_path):
    path = copied(small_graph, tmp_path)
    edit(path, precision="int8")
    with pytest.raises(EngineError, match="is an int8 graph; OpenVINO runs fp32"):
        build_openvino_engine(path, tmp_path / "e.onnx", "fp32")
    assert read_manifest(small_graph, GraphManifest).precision == "fp32"
    refused = run("build", small_graph, "--int8", "--runtime", "openvino", "-w", tmp_path)
    assert_answer(refused, 9, r"an INT8 engine needs ONNX Runtime on the CPU.*--int8 --runtime cpu")
    refused = run("build", small_graph, "--bf16", "--runtime", "cpu", "-w", tmp_path)
    assert_answer(refused, 9, r"a BF16 engine needs OpenVINO on the CPU: ")


# --- without it -----------------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.usefixtures("missing", "installed")
def test_without_openvino_nothing_changes(small_graph, tmp_path):
    assert RUNTIMES["openvino"].why_not_here() == "OpenVINO is not installed here"
    assert list(engine_places(Workspace(tmp_path), small_graph, "auto", choose_runtime("auto"))) == ["cpu"]
    result = run("build", small_graph, "-w", tmp_path, "--json")
    data = json.loads(result.stdout)
    assert (data["manifest"]["runtime"], data["manifest"]["speed_over"], data["refused"]) == ("onnxruntime-cpu", {}, {})


@pytest.mark.usefixtures("missing", "installed")
def test_without_openvino_its_engines_say_what_is_missing(small_graph, small_engine_path, tmp_path):
    with pytest.raises(MissingExtraError, match="OpenVINO, which is not installed") as caught:
        build_openvino_engine(small_graph, tmp_path / "e.onnx", "fp32")
    assert caught.value.hint == "pip install 'cdkd-edge[openvino]'"
    edit(copied(small_engine_path, tmp_path), runtime="openvino-cpu")
    with pytest.raises(MissingExtraError):
        load_engine(tmp_path / small_engine_path.name)
    assert_answer(run("build", small_graph, "--bf16", "-w", tmp_path), 9, r"not installed here.*cdkd-edge\[openvino\]")


def test_an_openvino_that_does_not_start_is_no_choice(monkeypatch):
    def broken(name, *rest):
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr("builtins.__import__", broken)
    try:
        with pytest.raises(EngineError, match="is installed and does not start: libopenvino"):
            ours.import_openvino()
    finally:
        monkeypatch.undo()


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch, small_engine_path, small_graph):
    """A second runtime of the CPU on every machine: engines of ONNX Runtime under OpenVINO's name.

    Returns a list to set its speed in: tiles per second over those of the first runtime.
    """
    speeds = [1.0]
    row = dataclasses.replace(
        RUNTIMES["openvino"],
        why_not_here=lambda: None,
        build=lambda graph, destination, precision, *rest: renamed(build_cpu_engine(graph, destination), destination),
        load=RUNTIMES["cpu"].load,
    )
    monkeypatch.setitem(RUNTIMES, "openvino", row)
    monkeypatch.setattr(choose, "speed_ratio", lambda engine, other: speeds[0])
    return speeds


def renamed(manifest: EngineManifest, path: Path) -> EngineManifest:
    edit(path, runtime="openvino-cpu")
    return dataclasses.replace(manifest, runtime="openvino-cpu")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("speed", "name"), [(1.04, "openvino"), (1.02, "cpu"), (0.5, "cpu")])
def test_the_faster_one_is_kept_and_onnxruntime_within_noise(small_graph, tmp_path, stand_in, speed, name):
    stand_in[0] = speed
    result = run("build", small_graph, "-w", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "engines") == [f"small.fp32.{name}.json", f"small.fp32.{name}.onnx"]
    manifest = json.loads(result.stdout)["manifest"]
    other = {"openvino": "onnxruntime-cpu", "cpu": "openvino-cpu"}[name]
    ratio = speed if name == "openvino" else 1 / speed
    assert manifest["speed_over"] == {other: pytest.approx(ratio)}
    path = tmp_path / "engines" / f"small.fp32.{name}.onnx"
    assert read_manifest(path, EngineManifest).speed_over == manifest["speed_over"]
    assert read_manifest(path, EngineManifest).artefact == FileRecord.of(path)
    assert f"x the tiles/s of {other}" in run("build", small_graph, "-w", tmp_path).stdout


def test_a_named_output_is_the_winner(small_graph, tmp_path, stand_in):
    stand_in[0] = 2.0
    assert run("build", small_graph, "-o", tmp_path / "e.onnx", "-w", tmp_path).exit_code == 0
    assert read_manifest(tmp_path / "e.onnx", EngineManifest).runtime == "openvino-cpu"
    assert files(tmp_path) == ["e.json", "e.onnx"]


def test_a_named_runtime_is_built_without_comparing(small_graph, tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(choose, "speed_ratio", lambda *_: pytest.fail("timed"))
    for name in ("cpu", "openvino"):
        assert run("build", small_graph, "--runtime", name, "-w", tmp_path).exit_code == 0
    assert [name for name in files(tmp_path / "engines") if name.endswith(".onnx")] == [
        "small.fp32.cpu.onnx",
        "small.fp32.openvino.onnx",
    ]


def test_one_that_labels_otherwise_is_no_choice_and_is_named(small_graph, tmp_path, stand_in, monkeypatch):
    def wrong(*_):
        raise NumericalCheckError("the FP32 engine gives another label")

    row = dataclasses.replace(RUNTIMES["openvino"], build=wrong)
    monkeypatch.setitem(RUNTIMES, "openvino", row)
    result = run("build", small_graph, "-w", tmp_path, "--json")
    data = json.loads(result.stdout)
    assert data["manifest"]["runtime"] == "onnxruntime-cpu"
    assert data["refused"] == {"OpenVINO on the CPU": "the FP32 engine gives another label"}
    assert "another label" in run("build", small_graph, "-w", tmp_path).stdout
    places = {name: tmp_path / f"{name}.onnx" for name in ("openvino", "cpu")}
    monkeypatch.setitem(RUNTIMES, "cpu", dataclasses.replace(RUNTIMES["cpu"], build=wrong))
    with pytest.raises(NumericalCheckError):
        build_fastest(small_graph, places)


def test_a_users_file_is_not_replaced_by_either(small_graph, tmp_path, stand_in):
    (tmp_path / "engines").mkdir()
    own = tmp_path / "engines" / "small.fp32.openvino.onnx"
    own.write_text("mine")
    assert run("build", small_graph, "-w", tmp_path).exit_code == 6
    assert own.read_text() == "mine"


def test_bf16_is_only_built_if_it_is_asked_for(small_graph, tmp_path, stand_in):
    space = Workspace(tmp_path)
    assert choose_runtime("auto").name == choose_runtime("auto", precision="int8").name == "cpu"
    assert choose_runtime("auto", precision="bf16").name == "openvino"
    for wanted, names in (("fp32", ["cpu", "openvino"]), ("int8", ["cpu"]), ("bf16", ["openvino"])):
        places = engine_places(space, small_graph, "auto", choose_runtime("auto", precision=wanted), precision=wanted)
        assert list(places) == names
        assert all(f".{wanted}." in path.name for path in places.values())


def test_int8_is_timed_against_the_fastest_float_engine(small_engine_path, tmp_path, stand_in, monkeypatch):
    int8 = tmp_path / "small.int8.cpu.onnx"
    for name in ("small.int8.cpu.onnx", "small.fp32.cpu.onnx", "small.bf16.openvino.onnx"):
        shutil.copy(small_engine_path, tmp_path / name)
        document = json.loads(manifest_path(small_engine_path).read_text())
        document["artefact"]["file"] = name
        manifest_path(tmp_path / name).write_text(json.dumps(document))
    manifest = dataclasses.replace(read_manifest(int8, EngineManifest), precision="int8")
    ratios = iter([1.5, 0.8])
    monkeypatch.setattr(choose, "speed_ratio", lambda engine, other: next(ratios))
    found = compare_speed(int8, manifest)
    assert found is not None
    assert (found.path.name, found.ratio) == ("small.bf16.openvino.onnx", 0.8)


@WITH
@pytest.mark.usefixtures("installed")
def test_the_real_choice(small_graph, tmp_path):
    result = run("build", small_graph, "-w", tmp_path, "--json")
    manifest = json.loads(result.stdout)["manifest"]
    assert {manifest["runtime"], *manifest["speed_over"]} == {"onnxruntime-cpu", "openvino-cpu"}
    path = engine_path(
        Workspace(tmp_path),
        small_graph,
        runtimes.runtime_of(read_manifest(Path(json.loads(result.stdout)["path"]), EngineManifest)),
    )
    assert run("inspect", path).exit_code == 0
    with load_engine(path) as engine:
        assert engine.manifest.precision == "fp32"


@WITH
@pytest.mark.usefixtures("installed")
def test_bf16_from_the_command_line(small_graph, small_engine_path, small_tiles, tmp_path):
    if "BF16" not in ours.cpu_precisions():
        pytest.skip("this CPU has no BF16")
    result = run("build", small_graph, "--bf16", "-w", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["path"].endswith("engines/small.bf16.openvino.onnx")
    assert data["manifest"]["precision"] == "bf16"
    with load_engine(Path(data["path"])) as engine, load_engine(small_engine_path) as other:
        assert engine._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "bf16"
        agreement = (segment_tiles(engine, small_tiles) == segment_tiles(other, small_tiles)).mean()
        assert agreement > 0.97, "random weights, whose scores lie near each other"
