"""The builder around TensorRT: the process that builds and all the ways in which it ends, options, what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tensorrt_helpers import ORIN, child, half_graph, int8_variant, needs_compiler, store_variant

from cdkd_edge.cli.build import describe_engine
from cdkd_edge.core.errors import EngineError, GraphError, ManifestError, SystemRefusalError
from cdkd_edge.core.manifest import EngineManifest, GraphManifest, read_manifest, write_manifest
from cdkd_edge.engines.inspect import inspect_artefact, read_onnx
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.engines.tensorrt import compile as compiler
from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine, compile_layers, run_builder
from cdkd_edge.engines.tensorrt.compile import BuilderMemoryError, BuildRequest
from cdkd_edge.engines.tensorrt.find import NoGpu, TensorRT, TensorRTMissingError, find_tensorrt
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.graph.files import derived_path
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.precision.choose import BuiltEngine, PreparedGraph

SM86 = TensorRTOptions(targets=("8.6",))
REQUEST = BuildRequest("g.onnx", "e.engine", "fp16", TensorRTOptions())
STARTED = {"kind": "tensorrt", "version": "10.3.0", "gpu": dataclasses.asdict(ORIN), "workspace_bytes": 5 << 30}
FINISHED: dict[str, Any] = {
    "flags": ["TF32"], "optimization_level": 3, "timing_cache": True, "inspector": None, "scratch_bytes": 123,
    "layer_lines": [], "notes": [],
}  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def build_with(code: str, graph: Path, destination: Path, **options: Any) -> EngineManifest:
    """Build with a process that does what ``code`` says instead of building."""
    return build_tensorrt_engine(graph, destination, TensorRTOptions(**options), command=child(code))


def parsed(tile: int = 64, batch: int = 1) -> str:
    """The ``parsed`` of a good network, as code."""
    tensors = [
        {"name": "image", "dtype": "uint8", "shape": [batch, 3, tile, tile]},
        {"name": "labels", "dtype": "uint8", "shape": [batch, tile, tile]},
    ]
    return f"say('started', **{STARTED!r}); say('parsed', tensors={tensors!r}, attention_nodes=['a', 'b'])\n"


WRITE = "open(request['destination'], 'wb').write(b'engine')\n"
GOOD = parsed() + WRITE + f"say('finished', **{FINISHED!r})\n"


# --- with NVIDIA's compiler -----------------------------------------------------------------------


@needs_compiler
def test_an_engine_with_manifest_and_layers(small_graph: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    engine = tmp_path / "new" / "small.fp32.engine"
    manifest = build_tensorrt_engine(small_graph, engine, SM86, steps.append)
    assert read_manifest(engine, EngineManifest) == manifest
    assert names(engine.parent) == ["small.fp32.engine", "small.fp32.json", "small.fp32.layers.json"]
    assert manifest.runtime == "tensorrt-rtx"
    assert manifest.graph.sha256 == read_manifest(small_graph, GraphManifest).artefact.sha256
    assert (manifest.attention_blocks, manifest.attention_fused) == (4, 0)
    build = manifest.tensorrt
    assert build is not None
    assert (build.gpu, build.targets, build.timing_cache) == (None, ("8.6",), False)
    assert build.layers == len(inspect_artefact(engine).contents.layers) > 20  # type: ignore[union-attr]
    assert build.scratch_bytes
    assert build.weights_bytes
    assert build.layer_precisions["fp32"] > 20
    assert 0 < manifest.build_seconds < 60
    assert any(step.startswith("Building engine ") and "Optimizing" in step for step in steps), steps


@needs_compiler
def test_options_reach_the_compiler(small_graph: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = TensorRTOptions(
        targets=("8.0", "8.9"), workspace_bytes=256 << 20, optimization_level=1, sparse=True, verbose=True
    )
    manifest = build_tensorrt_engine(
        small_graph, tmp_path / "e.engine", options, log=lambda severity, text: lines.append(f"{severity} {text}")
    )
    build = manifest.tensorrt
    assert build is not None
    assert (build.workspace_bytes, build.optimization_level, build.targets) == (256 << 20, 1, ("8.0", "8.9"))
    assert "SPARSE_WEIGHTS" in build.flags
    assert manifest.device == "compiled for SM 8.0, SM 8.9"
    assert sum(line.startswith("verbose ") for line in lines) > 50


@needs_compiler
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TensorRTOptions(targets=("8.7",)), r"does not compile for 8\.7; it knows .*SM86"),
        (TensorRTOptions(targets=("8.6",), weakly_typed=True), "has no weak typing"),
    ],
)
def test_what_the_compiler_does_not_have(
    options: TensorRTOptions, message: str, small_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        build_tensorrt_engine(small_graph, tmp_path / "e.engine", options)
    assert names(tmp_path) == []


@needs_compiler
@pytest.mark.parametrize(
    ("operator", "domain", "message", "hint"),
    [
        ("Det", "", r"node 'odd', an ONNX Det \(not in TensorRT's parser as of 10\.15\)", "export the graph again"),
        ("Frobnicate", "", r"node 'odd', an ONNX Frobnicate \(not known since which release .*\)", "uses opset 20"),
        ("MultiHeadAttention", "com.microsoft", r"node 'odd', a com\.microsoft\.MultiHeadAttention", "a CPU engine"),
    ],
)
def test_an_operator_that_the_parser_does_not_take(
    operator: str, domain: str, message: str, hint: str, small_graph: Path, tmp_path: Path
) -> None:
    model = onnx.load(small_graph)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.op_type, softmax.domain, softmax.name = operator, domain, "odd"
    del softmax.attribute[:]
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    folder = tmp_path / "export"
    folder.mkdir()
    copy = folder / small_graph.name
    copy.write_bytes(small_graph.read_bytes())
    write_manifest(copy, read_manifest(small_graph, GraphManifest))
    with pytest.raises(EngineError, match=message) as caught:
        build_tensorrt_engine(store_variant(copy, model, "odd"), tmp_path / "engines" / "e.engine", SM86)
    assert hint in str(caught.value.hint)
    assert names(tmp_path / "engines") == []


@needs_compiler
def test_a_graph_with_other_tensors(small_graph: Path, tmp_path: Path) -> None:
    """Found after parsing, before the time is spent on building."""
    model = onnx.load(small_graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    copy = tmp_path / "export" / small_graph.name
    copy.parent.mkdir()
    copy.write_bytes(small_graph.read_bytes())
    write_manifest(copy, read_manifest(small_graph, GraphManifest))
    with pytest.raises(GraphError, match=r"logits float \[1, 5, 8, 8\]; an engine has image uint8"):
        build_tensorrt_engine(store_variant(copy, model, "logits"), tmp_path / "e.engine", SM86)
    assert names(tmp_path) == ["export"]


@needs_compiler
def test_no_gpu_and_no_target(small_graph: Path, tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = (
        "from pathlib import Path; from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine as b\n"
        f"b(Path({str(small_graph)!r}), Path({str(tmp_path / 'e.engine')!r}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden, check=False)
    assert "EngineError: TensorRT-RTX" in answer.stderr
    assert "builds only for the GPU of this machine" in answer.stderr
    assert names(tmp_path) == []


@needs_compiler
def test_layers_of_any_onnx_file(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(np.ones((8, 16), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    compiled = compile_layers(tmp_path / "m.onnx", SM86)
    assert compiled.traffic_bytes == 4 * (4 * 8 + 4 * 16)
    assert {node for layer in compiled.layers for node in layer.nodes} == {"product"}


@needs_compiler
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"garbage", "cannot read the graph: .*parse"), (b"\0garbage", "no outputs in m.onnx"), (b"", "m.onnx|parse")],
)
def test_an_onnx_file_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=message):
        compile_layers(tmp_path / "m.onnx", SM86)


@needs_compiler
def test_a_truncated_engine_is_answered_before_anything_reads_it(small_graph: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    build_tensorrt_engine(small_graph, engine, SM86)
    engine.write_bytes(engine.read_bytes()[:1000])
    for look in (load_engine, inspect_artefact):
        with pytest.raises(ManifestError, match="not the file its manifest describes"):
            look(engine)  # type: ignore[operator]


@needs_compiler
def test_beside_onnxruntime_in_one_process(small_graph: Path, small_engine_path: Path) -> None:
    """The wheel with the compiler's libraries is a plug-in of ONNX Runtime's; it must stay out of its way."""
    code = (
        "import onnxruntime, sys\nfrom pathlib import Path\n"
        "from cdkd_edge.engines.tensorrt.find import find_tensorrt\n"
        "from cdkd_edge.engines.runtimes import load_engine\n"
        "api = find_tensorrt()\n"
        f"load_engine(Path({str(small_engine_path)!r})).launch(0)\n"
        "print(api.kind, onnxruntime.get_available_providers(), 'onnxruntime_ep_nv_tensorrt_rtx' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("tensorrt-rtx [")
    assert "CPUExecutionProvider" in answer.stdout
    assert "Nv" not in answer.stdout
    assert answer.stdout.rstrip().endswith("False")


@needs_compiler
def test_half_precision_of_the_small_network(small_graph: Path, tmp_path: Path) -> None:
    copy = tmp_path / "export" / small_graph.name
    copy.parent.mkdir()
    copy.write_bytes(small_graph.read_bytes())
    write_manifest(copy, read_manifest(small_graph, GraphManifest))
    manifest = build_tensorrt_engine(half_graph(copy), tmp_path / "e.engine", SM86)
    assert manifest.precision == "fp16"
    assert manifest.tensorrt is not None
    assert set(manifest.tensorrt.layer_precisions) == {"fp16"}


@pytest.mark.parametrize("kind", ["labels", "confidence", "probabilities"])
def test_every_output_becomes_uint8_from_floats(kind: str, small_graph: Path, tmp_path: Path) -> None:
    """NvInferRuntimeBase.h of 10.3 to 11.1 allows kUINT8 conversions of kFLOAT and kHALF only; ArgMax gives INT64."""
    plain = tmp_path / small_graph.name
    plain.write_bytes(small_graph.read_bytes())
    write_manifest(plain, read_manifest(small_graph, GraphManifest))
    for graph in (plain, half_graph(plain), int8_variant(plain)):
        given = graph if kind == "labels" else derived_path(graph, kind)
        if given != graph:
            write_variant(graph, given, kind)
        casts = {what for what in read_onnx(given).casts if what.endswith(" to uint8")}
        assert casts
        assert casts <= {"fp32 to uint8", "fp16 to uint8"}, given.name


# --- the process and its ends ---------------------------------------------------------------------


def test_what_the_manifest_takes_from_the_process(small_graph: Path, tmp_path: Path) -> None:
    manifest = build_with(GOOD, small_graph, tmp_path / "e.engine")
    build = manifest.tensorrt
    assert build is not None
    assert (tmp_path / "e.engine").read_bytes() == b"engine"
    assert (manifest.runtime, manifest.device, manifest.libraries["tensorrt"]) == ("tensorrt", "Orin", "10.3.0")
    assert (build.gpu, build.compute_capability, build.cuda) == ("Orin", "8.7", "12.6")
    assert (build.multiprocessors, build.module, build.portable) == (8, None, False)
    assert (build.workspace_bytes, build.scratch_bytes, build.timing_cache) == (5 << 30, 123, True)
    assert manifest.attention_blocks == 2
    assert "did not list the engine's layers" in build.notes[0]
    report = describe_engine(BuiltEngine(tmp_path / "e.engine", manifest), PreparedGraph(small_graph))
    assert ("attention", "global; 2 blocks; whether they are fused is not known") in report.rows
    assert "warning" not in dict(report.rows)


def test_the_layers_of_the_inspector_come_before_those_of_the_log(small_graph: Path, tmp_path: Path) -> None:
    text = json.dumps({"Layers": [{"Name": "_gemm_mha_v2_myl0_1", "LayerType": "kgen", "Metadata": "[ONNX Layer: a]"}]})
    code = parsed() + WRITE + f"say('finished', **{ {**FINISHED, 'inspector': text}!r})\n"
    manifest = build_with(code, small_graph, tmp_path / "e.engine")
    assert manifest.attention_fused == 1
    assert inspect_artefact(tmp_path / "e.engine").contents.unfused_attention == ("b",)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", BuilderMemoryError, "out of memory: the system killed the builder"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", EngineError, r"the builder crashed \(SIGSEGV\)"),
        ("sys.stderr.write('std::bad_alloc'); sys.stderr.flush(); os.abort()", BuilderMemoryError, "out of memory"),
        ("raise ValueError('odd')", EngineError, r"crashed \(exit code 1: ValueError: odd\)"),
        ("pass", EngineError, r"crashed \(exit code 0\)$"),
        ('print(\'{"event": "fini\')', EngineError, r"crashed \(exit code 0\)$"),
        ("print('[1]'); print('hello')", EngineError, r"crashed \(exit code 0\)$"),
        ("say('failed', reason='memory', message='x', hint=None)", BuilderMemoryError, "out of memory while building"),
        ("say('failed', reason='build', message='no such kernel', hint='h')", EngineError, "no such kernel"),
        (
            "say('failed', reason='system', message='No space left', hint=None)",
            SystemRefusalError,
            r"e\.engine: No space left",
        ),
    ],
)
def test_every_end_has_an_answer_and_leaves_nothing(
    end: str, error: type[Exception], message: str, small_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        build_with(parsed() + WRITE + end, small_graph, tmp_path / "engines" / "e.engine")
    assert names(tmp_path / "engines") == []
    if error is BuilderMemoryError:
        hint = str(caught.value.hint)  # type: ignore[attr-defined]
        assert "lower --workspace-size (it was 5120M)" in hint
        assert "--opt-level" in hint
        assert "swap" in hint
        assert "batch" not in hint, "one tile at a time cannot become fewer"


def test_an_engine_that_is_there_survives_a_failed_build(small_graph: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    before = build_with(GOOD, small_graph, engine)
    with pytest.raises(EngineError):
        build_with(parsed() + "sys.exit(3)", small_graph, engine)
    assert read_manifest(engine, EngineManifest) == before


def test_a_batch_is_one_of_the_levers(
    tmp_path: Path, make_graph: Callable[..., Path], small_weights: Any, small_config: Any
) -> None:
    graph = make_graph(tmp_path, small_weights, small_config, batch=2)
    with pytest.raises(BuilderMemoryError) as caught:
        build_with("os.kill(os.getpid(), signal.SIGKILL)", graph, tmp_path / "e.engine")
    assert "export with --batch 1 (this graph has 2)" in str(caught.value.hint)
    assert "lower --workspace-size (e.g. 512M)" in str(caught.value.hint), "it never told its limit"


def test_ctrl_c_ends_the_process_and_leaves_nothing(small_graph: Path, tmp_path: Path) -> None:
    waiting = parsed() + WRITE + "open(request['destination'] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path\n"
        "from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine as b\n"
        f"b(Path({str(small_graph)!r}), Path({str(tmp_path / 'e.engine')!r}), command={child(waiting)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True)
    pids: list[Path] = []
    deadline = time.monotonic() + 30
    while not pids or not pids[0].read_text():
        pids = list(tmp_path.glob(".*/*.pid"))
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(pids[0].read_text())
    pids[0].unlink()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert names(tmp_path) == []


def test_the_process_goes_when_its_parent_is_killed() -> None:
    """SIGKILL gives the parent no time to end it."""
    grandchild = (
        "import os, time\nfrom cdkd_edge.core.process import end_with_parent\n"
        "end_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {grandchild!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_progress_is_one_line_of_nested_phases() -> None:
    heard: list[str] = []
    code = (
        "say('phase', name='Building', parent=None, steps=6); say('step', name='Building', done=1)\n"
        "say('phase', name='Timing', parent='Building', steps=30); say('step', name='Timing', done=7)\n"
        "say('phase', name='Packing', parent='Building', steps=1); say('unheard of')\n"
        "say('log', severity='warning', text='odd'); say('finished')"
    )
    logged: list[tuple[str, str]] = []
    run_builder(REQUEST, lambda event: None, heard.append, lambda *line: logged.append(line), child(code))  # type: ignore[arg-type]
    assert heard == [
        "Building 0/6",
        "Building 1/6",
        "Building 1/6: Timing 0/30",
        "Building 1/6: Timing 7/30",
        "Building 1/6: Packing",
    ]
    assert logged == [("warning", "odd")]


def test_what_libraries_print_does_not_tear_the_answers(small_graph: Path) -> None:
    """The real process, asked for nonsense: its answer comes alone on stdout."""
    request = dataclasses.replace(REQUEST, graph=str(small_graph.with_name("nowhere.onnx")), options=SM86)
    code = (
        "import os; from cdkd_edge.engines.tensorrt import compile as child\n"
        "real = child.compile_engine\n"
        "def loud(*a): os.write(1, b'printed by a library\\n'); return real(*a)\n"
        "child.compile_engine = loud; child.main()"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dataclasses.asdict(request)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "printed by a library" in answer.stderr
    events = [json.loads(line)["event"] for line in answer.stdout.splitlines()]
    assert events[-1] == "failed"


# --- what is refused before anything starts -------------------------------------------------------


def test_a_graph_that_was_changed(small_graph: Path, tmp_path: Path) -> None:
    copy = tmp_path / small_graph.name
    copy.write_bytes(small_graph.read_bytes() + b"\0")
    write_manifest(copy, read_manifest(small_graph, GraphManifest))
    with pytest.raises(ManifestError, match="not the file its manifest describes"):
        build_with("sys.exit(1)", copy, tmp_path / "engines" / "e.engine")


def test_the_manifest_of_a_graph_is_not_replaced(small_graph: Path, tmp_path: Path) -> None:
    copy = tmp_path / small_graph.name
    copy.write_bytes(small_graph.read_bytes())
    write_manifest(copy, read_manifest(small_graph, GraphManifest))
    with pytest.raises(ManifestError, match=r"small\.json is the manifest of a graph"):
        build_with(GOOD, copy, copy.with_suffix(".engine"))
    assert read_manifest(copy, GraphManifest)


def test_a_file_of_somebody_else_is_not_replaced(small_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "e.engine").write_bytes(b"mine")
    with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
        build_with(GOOD, small_graph, tmp_path / "e.engine")
    assert (tmp_path / "e.engine").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_written(small_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        build_with(GOOD, small_graph, tmp_path / "file" / "e.engine")


# --- TensorRT 10.x, as far as it can be stood in for ----------------------------------------------


class Config:
    """The part of ``IBuilderConfig`` that is set; without the compute capabilities of TensorRT-RTX."""

    hardware_compatibility_level = 0

    def __init__(self) -> None:
        self.set: list[str] = []
        self.pool: int | None = None
        self.builder_optimization_level = 3

    def set_flag(self, flag: str) -> None:
        self.set.append(flag)

    def set_memory_pool_limit(self, kind: str, size: int) -> None:
        self.pool = size


def tensorrt_10(**changes: Any) -> TensorRT:
    module = SimpleNamespace(
        BuilderFlag=SimpleNamespace(FP16="FP16", INT8="INT8", SPARSE_WEIGHTS="SPARSE_WEIGHTS"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    )
    return TensorRT(SimpleNamespace(**{**vars(module), **changes}), "tensorrt", "10.3.0")


@pytest.mark.parametrize(
    ("weakly_typed", "precision", "network_flags", "builder_flags"),
    [
        (False, "fp16", 2, []),
        (False, "int8", 2, []),
        (True, "fp32", 0, []),
        (True, "fp16", 0, ["FP16"]),
        (True, "int8", 0, ["FP16", "INT8"]),
    ],
)
def test_typing(weakly_typed: bool, precision: str, network_flags: int, builder_flags: list[str]) -> None:
    request = BuildRequest(
        "g.onnx", "e.engine", precision, TensorRTOptions(workspace_bytes=1 << 30, weakly_typed=weakly_typed)
    )
    config: Any = Config()
    made: Any = SimpleNamespace(create_network=lambda flags: flags)
    assert compiler._create_network(tensorrt_10(), made, request) == network_flags
    compiler._configure(tensorrt_10(), config, request, ORIN)
    assert config.set == builder_flags


def test_tensorrt_11_has_no_weak_typing() -> None:
    api = tensorrt_10(BuilderFlag=SimpleNamespace(SPARSE_WEIGHTS="SPARSE_WEIGHTS"))
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 has no weak typing"):
        compiler._create_network(api, None, dataclasses.replace(REQUEST, options=TensorRTOptions(weakly_typed=True)))  # type: ignore[arg-type]


def test_the_workspace_is_below_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\0" * (10 << 20))
    asked: list[tuple[Any, int]] = []
    monkeypatch.setattr(compiler, "default_workspace", lambda gpu, size: asked.append((gpu, size)) or 7 << 20)
    request = dataclasses.replace(REQUEST, graph=str(tmp_path / "g.onnx"))
    config: Any = Config()
    assert compiler._configure(tensorrt_10(), config, request, ORIN) == config.pool == 7 << 20
    assert asked == [(ORIN, 10 << 20)]
    config = Config()
    targeted = dataclasses.replace(request, options=TensorRTOptions(targets=("8.6",)))
    assert compiler._configure(tensorrt_10(), config, targeted, NoGpu("none")) is None
    assert config.pool is None


@needs_compiler
def test_tensorrt_rtx_is_refused_a_portable_engine_and_not_believed(small_graph: Path, tmp_path: Path) -> None:
    """It has the level's name, and goes on without it."""
    api = find_tensorrt()
    config = api.module.Builder(api.logger).create_builder_config()
    with pytest.raises(EngineError, match=r"TensorRT-RTX .* has no --portable") as caught:
        compiler._make_portable(api, config, ORIN)
    assert "--target" in str(caught.value.hint)


def test_portable_needs_tensorrt_10_9() -> None:
    config: Any = Config()
    levels = SimpleNamespace(NONE=0, AMPERE_PLUS=1)
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 cannot .*--portable needs TensorRT 10\.9"):
        compiler._make_portable(tensorrt_10(HardwareCompatibilityLevel=levels), config, ORIN)
    levels.SAME_COMPUTE_CAPABILITY = 2
    (note,) = compiler._make_portable(tensorrt_10(HardwareCompatibilityLevel=levels), config, ORIN)
    assert config.hardware_compatibility_level == 2
    assert "every GPU of compute capability 8.7" in note
    assert "slower" in note


def test_a_target_needs_tensorrt_rtx() -> None:
    config: Any = Config()
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 builds only for the GPU of this machine"):
        compiler._set_targets(tensorrt_10(), config, ("8.6",), ORIN)
    with pytest.raises(EngineError, match="and there is no CUDA driver"):
        compiler._set_targets(tensorrt_10(), config, (), NoGpu("there is no CUDA driver"))
    compiler._set_targets(tensorrt_10(), config, (), ORIN)


@pytest.mark.parametrize(
    "line",
    [
        "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)",
        "[resizePhysical::145] Error Code 2: OutOfMemory (Requested size was 536870912 bytes.)",
        "Error Code 1: Cuda Runtime (out of memory)",
    ],
)
def test_the_ways_in_which_tensorrt_says_out_of_memory(line: str) -> None:
    sent: list[dict[str, Any]] = []
    log = compiler._Log(lambda event, **fields: sent.append(fields), verbose=False)
    log("verbose", "Total Weights Memory: 12 bytes")
    log("info", "nothing")
    log("error", line)
    failure = log.failure(tensorrt_10(), "while building")
    assert isinstance(failure, BuilderMemoryError)
    assert "Could not find" not in str(failure)
    assert [fields["severity"] for fields in sent] == ["error"]
    assert log.layer_lines == ["Total Weights Memory: 12 bytes"]


def test_another_failure_keeps_tensorrts_words() -> None:
    log = compiler._Log(lambda event, **fields: None, verbose=False)
    log("warning", "Skipping tactic 0x1 due to insufficient memory")  # it tries the next, and is no error
    log("error", "Error Code 9:\n  unsupported")
    failure = log.failure(tensorrt_10(), "while building")
    assert failure.hint == "--verbose shows everything it logs"
    assert str(failure) == "TensorRT 10.3.0 failed while building: Error Code 9: unsupported"
    assert not isinstance(failure, BuilderMemoryError)


def test_without_tensorrt(small_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = TensorRTMissingError()
    assert "python3-libnvinfer" in str(missing.hint)
    code = f"say('failed', reason='build', message={str(missing)!r}, hint={missing.hint!r})"
    with pytest.raises(EngineError, match="TensorRT is not installed in this Python"):
        build_with(code, small_graph, tmp_path / "e.engine")


@pytest.mark.parametrize("size", ["device_memory_size_v2", "device_memory_size"])
def test_what_an_engine_says_of_itself(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two spellings of its size: TensorRT 10.3 has the one, 11 the other."""
    inspector = SimpleNamespace(get_engine_information=lambda kind: f"layers as {kind}")
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, **{size: 12})
    loaded: list[Any] = [engine, None]
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: loaded.pop(0))
    api = tensorrt_10(Runtime=lambda logger: runtime, LayerInformationFormat=SimpleNamespace(JSON="json"))
    monkeypatch.setattr(TensorRT, "logger", None)
    log = compiler._Log(lambda event, **fields: None, verbose=False)
    assert compiler._inspect(api, b"", log) == ("layers as json", 12)
    with pytest.raises(EngineError, match="failed loading the engine it has just built: it does not say why"):
        compiler._inspect(api, b"", log)
