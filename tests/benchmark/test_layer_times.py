"""`bench --layers`: where the time goes, beside the roofline, in runs that change no figure."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from commands import run
from run_helpers import make_run
from scene_helpers import FakeEngine, engine_manifest

from cdkd_edge.benchmark.describe import layer_tables, layer_texts
from cdkd_edge.benchmark.folder import read_run
from cdkd_edge.benchmark.layer_times import layer_profile, modelled_shares, time_kernels
from cdkd_edge.benchmark.record import Protocol
from cdkd_edge.benchmark.report_page import write_report_page
from cdkd_edge.benchmark.roofline.bound import model_of
from cdkd_edge.benchmark.run import BenchOptions, run_benchmark
from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.manifest import FileRecord, TensorRTBuild
from cdkd_edge.engines.protocol import KernelTimes, TimedKernel
from cdkd_edge.engines.tensorrt.layers import EngineLayers, Layer, LayerTensor, write_layers
from cdkd_edge.graph.layers import NetworkPart

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

NO_MODEL = {}, "", "for no reason"
KERNELS = (
    TimedKernel("copy", (), 0.001),
    TimedKernel("mha_0", ("blocks.0.attn.share/Softmax",), 0.004),
    TimedKernel("mha_1", ("blocks.1.attn.share/Softmax",), 0.002),
    TimedKernel("conv", ("fuse.conv/Conv",), 0.002),
    TimedKernel("act", ("fuse/Relu",), 0.001),
)
TIMES = KernelTimes(KERNELS, profiled_seconds=0.0125, plain_seconds=0.01, runs=7, average="median")


class ProfiledEngine(FakeEngine):
    """Tells the same times always, or fails."""

    failure: Exception | None = None

    def kernel_times(self, runs):
        self.launched_before = self.launches
        if self.failure:
            raise self.failure
        return TIMES


# --- the profile ----------------------------------------------------------------------------------


def test_kernels_add_up_to_layers_and_layers_to_parts():
    found = layer_profile(TIMES, NO_MODEL)
    assert (found.runs, found.average) == (7, "median")
    assert (found.sum_ms, found.plain_ms, found.profiled_ms) == pytest.approx((10.0, 10.0, 12.5))
    assert [(one.name, one.block, one.kernels, round(one.ms, 9)) for one in found.dearest] == [
        ("attention", 0, 2, 5.0), ("fuse", None, 2, 3.0), ("attention", 1, 1, 2.0),
    ]  # fmt: skip
    assert [(one.name, one.block, one.layers, one.kernels) for one in found.parts] == [
        ("attention", None, 2, 3), ("fuse", None, 1, 2),
    ]  # fmt: skip
    assert [one.measured_share for one in found.parts] == pytest.approx([0.7, 0.3])
    assert {one.modelled_share for one in (*found.parts, *found.dearest)} == {None}
    assert (found.modelled_from, found.modelled_reason) == ("", "for no reason")


def test_ten_layers_are_listed():
    kernels = tuple(TimedKernel(str(n), (f"blocks.{n}.mlp.fc2/Add",), 1.0 + n) for n in range(12))
    found = layer_profile(replace(TIMES, kernels=kernels), NO_MODEL)
    assert [one.block for one in found.dearest] == list(range(11, 1, -1))
    (part,) = found.parts
    assert (part.layers, part.measured_share) == (12, pytest.approx(1.0))


def test_modelled_shares_stand_beside_measured_ones():
    shares = {
        NetworkPart("attention", 0): 0.5,
        NetworkPart("attention", 1): 0.2,
        NetworkPart("fuse"): 0.25,
        NetworkPart("laterals"): 0.05,
    }
    found = layer_profile(TIMES, (shares, "layers", ""))
    assert [one.modelled_share for one in found.dearest] == [0.5, 0.25, 0.2]
    assert {one.name: one.modelled_share for one in found.parts} == pytest.approx(
        {"attention": 0.7, "fuse": 0.25, "laterals": 0.05}
    )
    assert [(one.kernels, one.ms) for one in found.parts if one.name == "laterals"] == [(0, 0.0)]


@pytest.mark.parametrize(("seconds", "runs"), [(0.05, 50), (1.0, 10), (30.0, 5)])
def test_slow_engines_are_profiled_less_often(monkeypatch, seconds, runs):
    asked = []
    engine = ProfiledEngine()
    monkeypatch.setattr(engine, "kernel_times", lambda count: asked.append(count) or TIMES)
    time_kernels(engine, seconds)
    assert asked == [runs]


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture
def gpu_engine(small_graph):
    """The manifest of an engine that a desktop GPU's TensorRT built from ``small_graph``."""
    build = TensorRTBuild(
        "10.3", "NVIDIA GeForce RTX 4090", "8.9", (), None, None, True, (), None, 3, False, (), None, None, 0, 0, {}
    )  # fmt: skip
    graph = FileRecord.of(small_graph)
    return replace(engine_manifest(64), graph=graph, runtime="tensorrt", tensorrt=build, attention_fused=4)


def require_modelled_shares(engine, folder, source, nodes_of):
    """What an engine's profile says if each kernel takes the time that is modelled for it."""
    model, _ = model_of(engine, [folder])
    modelled = modelled_shares(engine, [folder], model, "")
    assert modelled[1:] == (source, "")
    kernels = tuple(
        TimedKernel(one.kernel.name, nodes_of(one.kernel), one.seconds / 7) for one in model.estimate.times
    )  # fmt: skip
    found = layer_profile(replace(TIMES, kernels=kernels), modelled)
    assert sum(one.modelled_share for one in found.parts) == pytest.approx(1.0)
    for one in (*found.parts, *found.dearest):
        assert one.measured_share == pytest.approx(one.modelled_share), one
    return found


def test_an_engine_that_runs_as_its_layers_are_modelled_has_their_shares(gpu_engine, tmp_path):
    def tensor(*shape):
        return LayerTensor("x", "fp16", shape)

    token, weight, taps = tensor(1, 4096, 384), tensor(1, 384, 384), tensor(256, 1024, 3, 3)
    wide, narrow = tensor(1, 1024, 64, 64), tensor(1, 256, 64, 64)
    layers = EngineLayers(
        (
            Layer("__myl_FcAdd_myl0_1", "f", (token,), (token,), (weight,), ("blocks.0.attn.proj.product/MatMul",)),
            Layer("__myl_Move_myl0_2", "kgen", (wide,), (wide,)),
            Layer("fuse.conv/Conv_myl0_3", "correlation", (wide,), (narrow,), (taps,), ("fuse.conv/Conv",)),
        )
    )
    write_layers(tmp_path / gpu_engine.artefact.file, gpu_engine.artefact.sha256, layers)
    nodes = {layer.name: layer.nodes for layer in layers.layers}
    found = require_modelled_shares(gpu_engine, tmp_path, "layers", lambda kernel: nodes[kernel.name])
    assert [(one.name, one.block, one.kernels) for one in found.dearest] == [
        ("fuse", None, 2), ("attention output", 0, 1),
    ]  # fmt: skip


def test_an_engine_that_runs_as_its_graph_is_modelled_has_its_shares(gpu_engine, small_graph):
    found = require_modelled_shares(gpu_engine, small_graph.parent, "graph", lambda kernel: kernel.operators)
    assert {"attention", "queries, keys, values", "fuse", "smoothing"} <= {one.name for one in found.parts}


def test_a_cpu_has_shares_of_operations(small_graph, small_config):
    engine = replace(engine_manifest(64), graph=FileRecord.of(small_graph))
    shares, source, reason = modelled_shares(engine, [small_graph.parent], None, "the roofline models GPUs")
    assert (source, reason) == ("operations", "")
    assert sum(shares.values()) == pytest.approx(1.0)
    # fc2 has 2 L D M operations in its product, the fuse 2 L C 9 (4 C); sums and ReLU, one for each value.
    length, channels = small_config.grid**2, small_config.head_channels
    second = 2 * length * small_config.embed_dim * small_config.mlp_dim + 2 * length * small_config.embed_dim
    fuse = 2 * length * channels * 9 * 4 * channels + length * channels
    assert shares[NetworkPart("MLP fc2", 3)] / shares[NetworkPart("fuse")] == pytest.approx(second / fuse)


def test_why_nothing_is_modelled(gpu_engine, small_graph, tmp_path):
    cpu = replace(engine_manifest(64), graph=FileRecord.of(small_graph))
    assert modelled_shares(gpu_engine, [], None, "no device file") == ({}, "", "no device file")
    assert "is neither beside the engine" in modelled_shares(cpu, [tmp_path], None, "")[2]
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = replace(cpu, graph=FileRecord.of(tmp_path / "broken.onnx"))
    shares, source, reason = modelled_shares(broken, [tmp_path], None, "")
    assert (shares, source) == ({}, "")
    assert reason


# --- a run ----------------------------------------------------------------------------------------

SHORT = Protocol("default", 0.1, 0.2, 1, 0.0, 0.0, 3)


def test_layers_come_after_everything_else_and_change_no_figure(tmp_path):
    engine = ProfiledEngine(delay=0.01)
    summary = run_benchmark(engine, tmp_path / "run", BenchOptions(protocol=SHORT, layers=True))
    batches = len((tmp_path / "run" / "tiles.csv").read_text().splitlines()) - 1
    assert engine.launched_before == engine.launches > batches  # the scene is done
    assert (summary.layers.sum_ms, summary.layers_reason) == (pytest.approx(10.0), "")
    assert "neither beside the engine" in summary.layers.modelled_reason
    assert read_run(tmp_path / "run").summary == summary
    with open(tmp_path / "run" / "layers.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[:3] == [
        ["kernel", "layer", "block", "ms"], ["copy", "attention", "0", "1.0000"], ["mha_0", "attention", "0", "4.0000"],
    ]  # fmt: skip
    assert rows[4] == ["conv", "fuse", "", "2.0000"]
    assert 'href="layers.csv"' in (tmp_path / "run" / "report.html").read_text()


def test_without_the_option_no_profiler_runs(tmp_path):
    engine = ProfiledEngine(delay=0.01)
    summary = run_benchmark(engine, tmp_path / "run", BenchOptions(protocol=SHORT))
    assert not hasattr(engine, "launched_before")
    assert (summary.layers, summary.layers_reason) == (None, "not asked for (--layers)")
    assert not (tmp_path / "run" / "layers.csv").exists()
    assert layer_tables(summary) == []
    assert layer_texts(summary) == ()


def test_a_profiler_that_fails_costs_no_figure(tmp_path):
    engine = ProfiledEngine(delay=0.01)
    engine.failure = EngineError("TensorRT does not tell the times of layers")
    summary = run_benchmark(engine, tmp_path / "run", BenchOptions(protocol=SHORT, layers=True))
    assert summary.figures is not None
    assert (summary.layers, summary.layers_reason) == (None, engine.failure.message)
    assert f"no times of layers: {engine.failure.message}" in summary.verdict.warnings


def test_an_invalid_run_has_no_times_of_layers(tmp_path, monkeypatch):
    engine = ProfiledEngine(delay=lambda number: 1.5 if number == 3 else 0.01)
    summary = run_benchmark(engine, tmp_path / "run", BenchOptions(protocol=SHORT, layers=True))
    assert summary.verdict.status == "invalid"
    assert (summary.layers, summary.layers_reason) == (None, "the run is invalid")
    assert not hasattr(engine, "launched_before")


# --- how it is shown ------------------------------------------------------------------------------


def test_terminal_and_page_show_the_same_tables(tmp_path):
    shares = {NetworkPart("attention", 0): 0.5, NetworkPart("attention", 1): 0.2, NetworkPart("fuse"): 0.3}
    summary = make_run(tmp_path / "run", layers=layer_profile(TIMES, (shares, "layers", "")))
    (_, columns, whole), (title, _, dearest) = layer_tables(summary)
    assert columns == ("part", "kernels", "ms a batch", "share measured", "share modelled")
    assert whole[0] == ("attention (2 blocks)", "3", "7.00", "70.0 %", "70.0 %")
    assert title == "the 3 dearest layers"
    assert dearest[0] == ("block 0: attention", "2", "5.00", "50.0 %", "50.0 %")
    sums, course, source = layer_texts(summary)
    assert sums == "10.0 ms a batch together, 1.00 x a run without the profiler"
    assert course.startswith("medians of 7 further runs without and with it, in turn: 10.0 and 12.5 ms; the p50 under")
    assert source == "shares MODELLED from the engine's layers"
    write_report_page(read_run(tmp_path / "run"), tmp_path / "run" / "report.html")
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (sums, course, title, *dearest[0], *whole[0]):
        assert text.replace("'", "&#39;") in page


def test_a_cpu_says_that_its_shares_are_of_operations(tmp_path):
    summary = make_run(tmp_path / "run", layers=layer_profile(TIMES, ({NetworkPart("fuse"): 1.0}, "operations", "")))
    assert [columns[-1] for _, columns, _ in layer_tables(summary)] == ["share of operations"] * 2
    assert "no model of a CPU" in layer_texts(summary)[-1]


def test_bench_layers_on_the_cpu_engine(small_graph, small_engine_path, tmp_path):
    options = "--duration", 0.3, "--max-warm-up", 0, "--keep-invalid", "-w", tmp_path, "-o", tmp_path / "run"
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / small_graph.name).write_bytes(small_graph.read_bytes())
    result = run("bench", small_engine_path, "--layers", *options, "--json")
    assert result.exit_code == 0, result.stderr
    layers = json.loads(result.stdout)["summary"]["layers"]
    assert layers == json.loads((tmp_path / "run" / "summary.json").read_text())["layers"]
    assert layers["modelled_from"] == "operations"
    assert len(layers["dearest"]) == 10
    assert sum(one["measured_share"] for one in layers["parts"]) == pytest.approx(1.0)
    assert sum(one["modelled_share"] for one in layers["parts"]) == pytest.approx(1.0)
    assert 0 < layers["sum_ms"] < 2 * layers["profiled_ms"]  # medians of different runs
