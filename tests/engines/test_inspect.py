"""Building and looking into engines from the command line: which graph, which runtime, what is shown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import assert_answer, assert_wrong_usage, run
from onnx import TensorProto, helper, numpy_helper
from tensorrt_helpers import ORIN, half_graph, needs_compiler

from cdkd_edge.board import modes
from cdkd_edge.core.errors import EngineError, UsageError
from cdkd_edge.core.manifest import AttentionChange, EngineManifest, manifest_path, read_manifest, write_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines import runtimes
from cdkd_edge.engines.inspect import OnnxContents, inspect_artefact, read_onnx
from cdkd_edge.engines.onnxruntime import build_cpu_engine
from cdkd_edge.engines.runtimes import RUNTIMES, choose_runtime
from cdkd_edge.engines.tensorrt.layers import layers_path
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.precision import choose
from cdkd_edge.precision.choose import PreparedGraph, prepare_graph


@pytest.fixture
def workspace(tmp_path: Path, small_graph: Path) -> Path:
    """A workspace with an FP32 graph."""
    shutil.copytree(small_graph.parent, tmp_path / "export")
    return tmp_path


@pytest.fixture
def half(workspace: Path) -> Path:
    """An FP16 graph in the same workspace."""
    return half_graph(workspace / "export" / "small.onnx")


# --- build: which graph ---------------------------------------------------------------------------


def test_the_graph_of_a_precision(workspace: Path, half: Path) -> None:
    space = Workspace(workspace)
    full = workspace / "export" / "small.onnx"
    assert prepare_graph(space, None, None) == prepare_graph(space, None, "fp32") == PreparedGraph(full)
    assert prepare_graph(space, None, "fp16") == PreparedGraph(half)
    assert prepare_graph(space, half, None) == PreparedGraph(half), "a named graph says itself what it is"
    with pytest.raises(UsageError, match="is a graph of fp16, and --fp32 was asked for"):
        prepare_graph(space, half, "fp32")


def test_names_of_engines(workspace: Path, half: Path) -> None:
    space = Workspace(workspace)
    full = workspace / "export" / "small.onnx"
    assert choose.engine_path(space, full, RUNTIMES["cpu"]) == workspace / "engines" / "small.fp32.cpu.onnx"
    assert choose.engine_path(space, full, RUNTIMES["tensorrt"]) == workspace / "engines" / "small.fp32.engine"
    assert choose.engine_path(space, half, RUNTIMES["tensorrt"]) == workspace / "engines" / "small.fp16.engine"


def test_no_graph_of_that_precision(workspace: Path) -> None:
    (workspace / "export" / "small.onnx").unlink()
    assert_answer(run("build", "--int8", "-w", workspace), 5, "there is no int8 graph")


def test_wrong_usage(workspace: Path, half: Path) -> None:
    assert_wrong_usage(run("build", "--fp16", "--int8", "-w", workspace), "one precision at a time")
    assert_wrong_usage(run("build", "--runtime", "onnx", "-w", workspace), "'onnx' is no runtime")
    assert_wrong_usage(run("build", "--workspace-size", "2", "-w", workspace), "'2' is not a size")
    assert_wrong_usage(run("build", "--target", "orin", "-w", workspace), "not a compute capability")
    assert_wrong_usage(run("build", "--opt-level", "7", "-w", workspace), "--opt-level")
    assert_wrong_usage(run("build", "--runtime", "cpu", "--sparse", "-w", workspace), "none of TensorRT's options")
    assert_wrong_usage(run("build", half, "--fp32", "-w", workspace), "is a graph of fp16")
    assert_wrong_usage(run("build", "--target", "86", "-o", "e.onnx", "-w", workspace), r"is an \.engine file")
    assert not (workspace / "engines").exists()


# --- build: which runtime -------------------------------------------------------------------------


def test_auto_is_tensorrt_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_runtime("cpu").name == "cpu"
    assert choose_runtime("auto").name == "cpu", "no GPU: the tests see to that"
    assert choose_runtime("auto", targets=("8.6",)).name == "tensorrt"
    assert choose_runtime("tensorrt").name == "tensorrt"
    monkeypatch.setattr(runtimes, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(runtimes, "tensorrt_is_installed", lambda: True)
    assert choose_runtime("auto").name == "tensorrt"
    monkeypatch.setattr(runtimes, "tensorrt_is_installed", lambda: False)
    assert choose_runtime("auto").name == "cpu"


NVPMODEL = """< POWER_MODEL ID=0 NAME=MAXN >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ -1
< POWER_MODEL ID=2 NAME=15W >
TPC_POWER_GATING TPC_PG_MASK 252
GPU MAX_FREQ 612000000
"""


@pytest.mark.parametrize(("mode", "name"), [(0, "MAXN"), (2, "15W")])
def test_a_build_in_a_low_power_mode_warns_before_it_begins(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, name: str
) -> None:
    board = tmp_path / "board"
    for place, text in {
        "etc/nvpmodel.conf": NVPMODEL,
        "var/lib/nvpmodel/status": f"pmode:000{mode}",
        "proc/device-tree/model": "NVIDIA Jetson Orin NX",
    }.items():
        (board / place).parent.mkdir(parents=True, exist_ok=True)
        (board / place).write_text(text)
    given: list[TensorRTOptions] = []

    def stop(graph: Path, places: object, precision: str | None, options: TensorRTOptions, *rest: object) -> None:
        given.append(options)
        raise EngineError("far enough")

    monkeypatch.setattr(modes, "ROOT", board)
    monkeypatch.setattr(choose, "build_fastest", stop)
    result = run("build", "--runtime", "tensorrt", "-w", workspace)
    assert result.exit_code == 9
    assert given[0].power_mode == name
    assert ("15W (id 2), 4 multiprocessors, GPU at most 612 MHz" in result.stderr) == (mode == 2)
    assert ("sudo nvpmodel -m 0" in result.stderr) == (mode == 2)


def test_fp16_without_tensorrt(workspace: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "tensorrt_is_installed", lambda: False)
    pattern = r"TensorRT is not installed here — carry .*small\.fp16\.onnx and its \.json to a board and run"
    assert_answer(run("build", "--fp16", "-w", workspace), 9, pattern)
    monkeypatch.setattr(runtimes, "tensorrt_is_installed", lambda: True)
    assert_answer(run("build", "--fp16", "-w", workspace), 9, "needs TensorRT on a GPU: the tests look for no GPU")
    assert not (workspace / "engines").exists()


def test_the_cpu_engine_is_as_before(workspace: Path) -> None:
    result = run("build", "--fp32", "-w", workspace, "--json")
    data = json.loads(result.stdout)
    assert set(data) == {"path", "manifest", "graph", "graph_made", "quantization", "speed", "refused"}
    assert not data["graph_made"]
    assert data["path"] == str(workspace / "engines" / "small.fp32.cpu.onnx")
    assert data["manifest"]["tensorrt"] is None


@needs_compiler
def test_build_and_inspect_for_a_gpu_that_is_not_here(workspace: Path, half: Path) -> None:
    built = run("build", "--fp16", "--target", "sm86", "-w", workspace)
    assert built.exit_code == 0, built.stderr
    assert "tensorrt-rtx, compiled for SM 8.6" in built.stdout
    assert "0 of 4 blocks fused" in built.stdout
    shown = run("inspect", "-w", workspace)
    assert shown.exit_code == 0
    for text in ("strongly typed", "scratch ", "weights ", "moving ", "MB moved", "more (--all)", "attn.q/MatMul"):
        assert text in shown.stdout, text
    assert "warning" in shown.stdout
    assert "attention is not fused in 4 of 4 blocks" in " ".join(shown.stdout.split())
    engine = workspace / "engines" / "small.fp16.engine"
    every = run("inspect", engine, "--all")
    data = json.loads(run("inspect", engine, "--json").stdout)
    assert all(layer["name"] in every.stdout for layer in data["layers"])
    assert len(data["layers"]) == data["manifest"]["tensorrt"]["layers"]
    assert data["warnings"] == [
        "attention is not fused in 4 of 4 blocks: their scores are written to memory, which costs time and memory"
    ]
    assert data["unfused_attention"] == [f"blocks.{index}.attn.share/Softmax" for index in range(4)]


@needs_compiler
def test_verbose_shows_the_log(workspace: Path) -> None:
    result = run("build", "--target", "sm86", "--verbose", "-w", workspace, "--json")
    assert "verbose: " in result.stderr
    assert json.loads(result.stdout)["manifest"]["runtime"] == "tensorrt-rtx"


@needs_compiler
def test_an_engine_whose_sidecars_are_odd(workspace: Path) -> None:
    run("build", "--target", "sm86", "-w", workspace)
    engine = workspace / "engines" / "small.fp32.engine"
    layers = layers_path(engine).read_text()
    layers_path(engine).unlink()
    result = run("inspect", engine)
    assert result.exit_code == 0
    assert "its layers are not recorded" in " ".join(result.stdout.split())
    layers_path(engine).write_text(layers.replace('"engine_sha256": "', '"engine_sha256": "0'))
    assert_answer(run("inspect", engine), 6, "is about another engine")
    layers_path(engine).write_text("{")
    assert_answer(run("inspect", engine), 6, "is damaged")
    manifest_path(engine).unlink()
    assert_answer(run("inspect", engine), 6, "has no manifest")


# --- inspect --------------------------------------------------------------------------------------


def test_a_graph(workspace: Path, half: Path) -> None:
    data = json.loads(run("inspect", workspace / "export" / "small.onnx", "--json").stdout)
    assert (data["kind"], data["warnings"]) == ("graph", [])
    contents = data["contents"]
    model = onnx.load(workspace / "export" / "small.onnx")
    assert contents["nodes"] == len(model.graph.node)
    assert contents["casts"] == {"uint8 to fp32": 1, "int64 to uint8": 1}
    assert contents["operators"]["Softmax"] == {"fp32": 4}
    assert contents["parameter_bytes"]["fp32"] == sum(
        numpy_helper.to_array(item).nbytes for item in model.graph.initializer if item.data_type == TensorProto.FLOAT
    )
    assert (contents["attention_blocks"], contents["attention_fused"]) == (4, 0)
    shown = run("inspect", half)
    assert shown.exit_code == 0
    assert "fp16, opset 20, exported from small.pt" in shown.stdout
    assert "1 uint8 to fp16" in shown.stdout


def test_a_cpu_engine(small_engine_path: Path) -> None:
    found = inspect_artefact(small_engine_path)
    assert isinstance(found.contents, OnnxContents)
    assert (found.contents.attention_blocks, found.contents.attention_fused) == (4, 4)
    assert found.warnings == ()
    shown = run("inspect", small_engine_path)
    assert "onnxruntime-cpu on" in shown.stdout
    assert "MultiHeadAttention" in shown.stdout


def test_windows_and_pooled_keys_are_named(tmp_path: Path, make_graph, make_weights, small_config) -> None:
    config = dataclasses.replace(small_config, attention=("window 4", "window 4", "pooled 2", "pooled 2"))
    graph = make_graph(tmp_path / "export", make_weights(config), config)
    engine = tmp_path / "engines" / "small.fp32.cpu.onnx"
    build_cpu_engine(graph, engine)
    kinds = "window 4 in blocks 0-1; pooled 2 in blocks 2-3"
    for path, fused in ((graph, "4 blocks, 0 of them one operator"), (engine, "4 of 4 blocks fused")):
        shown = " ".join(run("inspect", path).stdout.split())
        assert f"attention {kinds}; {fused}" in shown
    assert f"attention {kinds} " in " ".join(run("roofline", graph, "--device", "orin-nx-16gb").stdout.split())
    modelled = json.loads(run("roofline", graph, "--device", "orin-nx-16gb", "--json").stdout)
    assert modelled["attention"] == list(config.attention)
    assert json.loads(run("inspect", engine, "--json").stdout)["manifest"]["attention"] == list(config.attention)
    manifest_path(graph).unlink()
    assert json.loads(run("roofline", graph, "--device", "orin-nx-16gb", "--json").stdout)["attention"] is None


def test_attention_that_was_changed_for_fp16(small_engine_path: Path, tmp_path: Path) -> None:
    """The graph's manifest tells it to the engine's."""
    change = AttentionChange("blocks.1.attn", "scores may reach 7e+04 on noise", scores_in_fp32=True)
    engine = tmp_path / small_engine_path.name
    shutil.copy(small_engine_path, engine)
    manifest = read_manifest(small_engine_path, EngineManifest)
    write_manifest(engine, dataclasses.replace(manifest, attention_changes=(change,)))
    text = " ".join(run("inspect", engine).stdout.split())
    assert "changed blocks.1.attn: scores in FP32, because scores may reach 7e+04 on noise" in text


def test_a_cpu_engine_whose_attention_is_not_fused(small_engine_path: Path, tmp_path: Path) -> None:
    shutil.copytree(small_engine_path.parent, tmp_path / "engines")
    sidecar = manifest_path(tmp_path / "engines" / small_engine_path.name)
    sidecar.write_text(sidecar.read_text().replace('"attention_fused": 4', '"attention_fused": 3'))
    data = json.loads(run("inspect", "-w", tmp_path, "--json").stdout)
    assert "not fused in 1 of 4 blocks" in data["warnings"][0]


def test_quantised_nodes_are_counted_apart(tmp_path: Path) -> None:
    def constant(name: str, value: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wd"]),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
        helper.make_node("DynamicQuantizeLinear", ["y"], ["u", "s", "z"]),
        helper.make_node("MatMulInteger", ["u", "w"], ["i"]),
        helper.make_node("ArgMax", ["y"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [4, 4])],
        [helper.make_tensor_value_info("labels", TensorProto.INT64, [1, 4])],
        [constant("scale", np.float16(0.1)), constant("zero", np.int8(0)), constant("w", np.zeros((4, 4), np.int8))],
    )
    onnx.save(helper.make_model(graph), tmp_path / "lone.onnx")
    contents = read_onnx(tmp_path / "lone.onnx")
    assert (contents.quantize_nodes, contents.dequantize_nodes) == (1, 2)
    assert contents.operators["MatMul"] == {"fp16": 1}
    assert contents.operators["MatMulInteger"] == {"int8": 1}
    assert contents.operators["Cast"] == {"fp16": 1}
    assert contents.operators["ArgMax"] == {"fp16": 1}
    assert contents.parameter_bytes == {"int8": 17, "fp16": 2}
    shown = run("inspect", tmp_path / "lone.onnx")
    assert shown.exit_code == 0
    assert "1 quantize, 2 dequantize" in shown.stdout
    assert "no manifest beside it" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("name", "content", "code", "pattern"),
    [
        ("a.onnx", b"", 7, "not an ONNX graph"),
        ("a.onnx", b"garbage", 7, "not an ONNX graph"),
        ("a.onnx", b"\x08\x07" * 9, 7, "without nodes|not an ONNX graph"),
        ("a.engine", b"", 6, "has no manifest"),
        ("a.pt", b"", 9, "neither a graph .* `cdkd-edge info`"),
        ("ü\x1b[31m.onnx", b"garbage", 7, "not an ONNX graph"),
    ],
)
def test_files_that_are_nothing_of_ours(name: str, content: bytes, code: int, pattern: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("inspect", tmp_path / name)
    assert_answer(result, code, pattern)
    assert "\x1b[31m.onnx" not in result.stderr


def test_info_of_a_graph_names_inspect(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "a.onnx").write_bytes(b"no checkpoint")
    assert_answer(run("info", tmp_path / "a.onnx"), 3, "for graphs and engines: `cdkd-edge inspect`")


def test_places_without_a_file(tmp_path: Path) -> None:
    assert_answer(run("inspect", tmp_path / "nowhere.onnx"), 6, "does not exist")
    assert_answer(run("inspect", tmp_path), 6, "is not a file")
    assert_answer(run("inspect", "-w", tmp_path), 5, "there is no engine in")


def test_a_graph_that_was_changed(workspace: Path) -> None:
    path = workspace / "export" / "small.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    assert_answer(run("inspect", path), 6, "not the file its manifest describes")
    manifest_path(path).write_text('{"name": "somebody else\'s"}')
    assert_answer(run("inspect", path), 6, "is not the manifest of a cdkd-edge graph")
