"""The parts of a benchmark that need no engine: steadiness, verdict, modelled bound."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_helpers import engine_manifest

from cdkd_edge.benchmark import phases
from cdkd_edge.benchmark.folder import TimedBatch
from cdkd_edge.benchmark.phases import DEFAULT, Timeline, Window, hottest, is_steady
from cdkd_edge.benchmark.record import Phase, RailRepeat, Repeat
from cdkd_edge.benchmark.roofline.bound import model_of
from cdkd_edge.benchmark.roofline.devices import load_device
from cdkd_edge.benchmark.roofline.model import model_engine, roofline
from cdkd_edge.benchmark.statistics import latency_of
from cdkd_edge.benchmark.verdict import judge
from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.power.energy import Problem, Trace
from cdkd_edge.board.power.protocol import CPU_PACKAGE, GPU_BOARD, MODULE, WATTS, Sample, SourceInfo
from cdkd_edge.board.power.sampler import PowerSampler
from cdkd_edge.board.throttling import ConditionFinding, judge_other_programs
from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.manifest import FileRecord, TensorRTBuild
from cdkd_edge.engines.tensorrt.layers import EngineLayers, Layer, LayerTensor, write_layers

# --- steady ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "steady"),
    [
        ([Window(2.5, 18.9, 60)] * 3, True),
        ([Window(2.5, 18.9, 60)] * 2, False),
        ([Window(9, 1, 20), *[Window(2.5, 18.9, 60)] * 3], True),
        ([Window(2.5, 18.9, 60), Window(2.5, 18.9, 60), Window(2.6, 18.9, 60)], False),
        ([Window(2.5, 18.9, 60), Window(2.5, 18.9, 60), Window(2.5, 19.6, 60)], False),
        ([Window(2.5, 18.9, 60), Window(2.5, 18.9, 60.5), Window(2.5, 18.9, 61.1)], False),
        ([Window(2.5, 1.0, None), Window(2.5, 1.15, None), Window(2.5, 1.1, None)], True),
        ([Window(2.5, None, None)] * 3, True),
        ([Window(2.5, None, 40), Window(2.5, 18.9, None), Window(2.5, 30, 90)], True),
        ([], False),
    ],
    ids=[
        "same", "two are too few", "only the last count", "speed", "watts", "temperature", "little watts", "speed only",
        "not in all", "none",
    ],
)  # fmt: skip
def test_steady_windows_agree_in_speed_power_and_temperature(windows, steady):
    assert is_steady(windows) == steady


def test_the_junction_is_what_counts_on_a_jetson():
    assert hottest({"cpu-thermal": 80.0, "tj-thermal": 70.0}) == 70.0
    assert hottest({"Package id 0": 50.0, "acpitz": 30.0}) == 50.0
    assert hottest({}) is None


# --- a source that falls silent -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"VDD_IN": 9.0, "VDD_SOC": 2.0}, r"ina3221 stopped answering: no reading for \d+\.\d s"),
        ({"VDD_SOC": 2.0}, r"ina3221 stopped answering: no reading of VDD_IN for \d+\.\d s"),
        (None, r"ina3221 stopped answering: no reading for \d+\.\d s"),
    ],
    ids=["the source", "its total", "the source, from the start"],
)
def test_silence_is_told_of_the_rail_only_where_others_go_on(monkeypatch, values, reason):
    """Heard 0.1 s after it was taken, a reading is too old at a moment at which it was heard of lately enough."""
    monkeypatch.setattr(phases, "LONGEST_SILENCE", 0.5)
    sampler = PowerSampler("ina3221")
    sampler.info = SourceInfo("ina3221", MODULE, "the module", WATTS, ("VDD_IN", "VDD_SOC"), "VDD_IN", 0.1)
    sampler._last_arrival = time.monotonic() - 0.45
    sampler._began = sampler._last_arrival - 10
    sampler._samples = [Sample(sampler._last_arrival - 0.1, 0.0, values)] if values else []
    protocol = replace(DEFAULT, load_seconds=1.0)
    run = phases.PhaseRunner(None, protocol, sampler, None, lambda live: None, False)
    with pytest.raises(phases._PowerLostError) as lost:
        run._require_power()
    assert re.fullmatch(reason, str(lost.value))


# --- verdict --------------------------------------------------------------------------------------


def trace_of(scope=MODULE, total="VDD_IN", problems=(), late=0):
    info = SourceInfo("jtop", scope, "the module", WATTS, ("VDD_IN", "VDD_SOC"), total, 0.1)
    samples = [Sample(i * (0.2 if i < late else 0.1), 0.0, {"VDD_IN": 1.0}) for i in range(100)]
    return Trace(info, tuple(samples), tuple(problems), 0.0, 10.0)


def repeat_of(idle=5.74, after=None, load=18.95, covered=1.0, steady=True):
    after = idle if after is None else after
    rail = RailRepeat((idle + after) / 2, idle, after, load, load * 60, covered, 1.0)
    return Repeat(steady, 20.0, 150, 60.0, 2.5, latency_of([0.4]), {"VDD_IN": rail})


def verdict_of(*repeats, trace=None, engine=None, reason="", conditions=(), broken_off="", load=60.0, wanted=True):
    timeline = Timeline(0.0, completed=[Phase("load", 0, 30.0, 30.0 + load)], broken_off=broken_off)
    return judge(
        timeline,
        replace(DEFAULT, repeats=max(1, len(repeats))),
        repeats or (repeat_of(),),
        engine or engine_manifest(1024),
        trace_of() if trace is None else trace or None,
        reason,
        conditions,
        power_wanted=wanted,
    )


def test_a_run_without_fault_is_valid():
    verdict = verdict_of()
    assert (verdict.status, verdict.reasons, verdict.warnings) == ("valid", (), ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trace": trace_of(problems=[Problem(1.0, "lost", "the connection broke")])}, "the connection broke"),
        ({"trace": trace_of(problems=[Problem(1.0, "died", "SIGKILL")])}, "stopped answering: SIGKILL"),
        ({"reason": "jtop: 1 readings of VDD_IN"}, "1 readings"),
        ({"broken_off": "jtop stopped answering: no reading for 6.0 s"}, "no reading"),
        ({"conditions": [ConditionFinding("too hot", True, "tj reached 96")]}, "tj reached 96"),
        (
            {"trace": trace_of(scope=GPU_BOARD), "engine": replace(engine_manifest(64), runtime="onnxruntime-cpu")},
            "CPU",
        ),
    ],
)
def test_what_makes_a_run_invalid(changes, said):
    verdict = verdict_of(**changes)
    assert verdict.status == "invalid"
    assert said in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("repeat", "said"),
    [
        (repeat_of(covered=0.97), "readings of VDD_IN are missing for 3% of a phase"),
        (repeat_of(load=5.70), "VDD_IN is not higher under load (5.70 W) than idle (5.74 W)"),
        (repeat_of(load=5.74), "VDD_IN is not higher under load (5.74 W) than idle (5.74 W)"),
        (repeat_of(load=math.nextafter(5.74, 6)), "VDD_IN is not higher under load (5.74 W) than idle (5.74 W)"),
        (repeat_of(load=5.79), "VDD_IN is hardly higher under load (5.79 W) than idle (5.74 W)"),
        (repeat_of(idle=-5.0, after=3.0), "jtop: the mean of VDD_IN over a phase is negative: -5.00 W"),
    ],
)
def test_one_repeat_at_fault_makes_all_invalid(repeat, said):
    assert said in verdict_of(repeat_of(), repeat, repeat_of()).reasons[0]
    assert verdict_of(repeat_of(), repeat).status == "invalid"


def test_rails_without_a_total_are_watched_together():
    rising, stuck = repeat_of(), repeat_of(load=5.74)
    assert verdict_of(rising, trace=trace_of(total=None)).status == "valid"
    (reason,) = verdict_of(stuck, trace=trace_of(total=None)).reasons
    assert "the sum of jtop's rails is not higher under load (5.74 W) than idle (5.74 W)" in reason
    one, other = rising.rails["VDD_IN"], stuck.rails["VDD_IN"]
    both = replace(rising, rails={"VDD_GPU_SOC": one, "VDD_CPU_CV": other})
    assert verdict_of(both, trace=trace_of(total=None)).status == "valid"


def test_a_gpu_engine_is_not_measured_at_the_cpu():
    engine = replace(engine_manifest(64), runtime="tensorrt", tensorrt=build_record())
    verdict = verdict_of(trace=trace_of(scope=CPU_PACKAGE), engine=engine)
    assert verdict.reasons == ("jtop measures the CPU package, but this engine runs on the GPU",)


def test_not_steady_names_the_repeats_and_invalid_comes_first():
    verdict = verdict_of(repeat_of(), repeat_of(steady=False), repeat_of(steady=False))
    assert verdict.status == "not_steady"
    assert "of repeat 2, 3" in verdict.reasons[0]
    assert verdict_of(repeat_of(steady=False), broken_off="lost").status == "invalid"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": [ConditionFinding("below maximum clock", False, "612 of 918 MHz")]}, "612 of 918 MHz"),
        ({"trace": trace_of(total=None)}, "jtop has no total rail"),
        ({"trace": trace_of(problems=[Problem(0.0, "interval", "another client pins 1 s")])}, "another client"),
        ({"trace": trace_of(late=20)}, "19 of 100 power readings were late"),
        ({"load": 20.0}, "the load lasted 20 s; MLPerf Power requires 60 s"),
        ({"trace": False, "reason": "no source"}, "power was asked for and not measured: no source"),
    ],
)
def test_what_a_reader_is_warned_of(changes, said):
    verdict = verdict_of(**changes)
    assert verdict.status == "valid", verdict
    assert said in " ".join(verdict.warnings)


@pytest.mark.parametrize(
    ("batches", "slower", "status", "said"),
    [
        (100, 1.0, "valid", ""),
        (100, 1.04, "valid", ""),
        (100, 1.07, "valid", "load 1: the speed changed by 7% of its mean between 5 parts"),
        (66, 1.14, "not_steady", "load 1: the speed changed by 13% of its mean between 5 parts"),
        (100, 1.5, "not_steady", "load 1: the speed changed by 38% of its mean between 5 parts"),
        (4, 1.5, "not_steady", "load 1: the speed changed by 22% of its mean between 2 parts"),
        (3, 1.0, "not_steady", "load 1: 3 batches are too few to tell whether the speed was steady"),
        (1, 1.0, "not_steady", "load 1: 1 batch is too few to tell whether the speed was steady"),
    ],
)
def test_a_load_whose_speed_did_not_hold_is_not_steady(batches, slower, status, said):
    """The last 30 % of the batches take longer."""
    start, count, batches = 30.0, batches, []
    for number in range(count):
        latency = 0.1 * (slower if number >= 0.7 * count else 1)
        batches.append(TimedBatch(0, "load", start, latency))
        start += latency
    timeline = Timeline(0.0, [Phase("load", 0, 30.0, start)], batches)
    verdict = judge(timeline, DEFAULT, (repeat_of(),), engine_manifest(64), None, "", (), power_wanted=False)
    assert verdict.status == status
    assert (*verdict.reasons, *verdict.warnings) == ((said,) if said else ())


@pytest.mark.parametrize(
    ("share", "on_gpu", "status"),
    [(0.04, False, "valid"), (0.08, False, "warned"), (0.6, False, "not_steady"), (0.6, True, "warned")],
)
def test_other_programs_on_the_processors_are_named_with_their_share(share, on_gpu, status):
    readings = [Conditions(float(second), others_seconds=100 + share * second) for second in range(60)]
    findings = judge_other_programs(readings, 20.0, 40.0, "load 1")
    engine = replace(engine_manifest(1024), runtime="tensorrt", tensorrt=build_record()) if on_gpu else None
    verdict = verdict_of(engine=engine, conditions=findings)
    said = f"other programs used {share:.0%} of the processors' time during load 1"
    assert verdict.status == ("not_steady" if status == "not_steady" else "valid")
    assert (said in verdict.reasons) == (status == "not_steady")
    assert (said in verdict.warnings) == (status == "warned")


@pytest.mark.parametrize(
    ("stands", "within", "latency", "status"),
    [
        (0.8, True, 0.05, "valid"),  # a hiccup of a shared machine
        (1.0, True, 0.5, "valid"),  # a slow engine has slow batches
        (1.1, True, 0.1, "warned"),
        (4.0, True, 0.1, "invalid"),
        (4.0, False, 0.1, "invalid"),
    ],
)
def test_a_load_that_stood_still(stands, within, latency, status):
    """As after SIGSTOP and SIGCONT, during a batch or between two: 60 s or 120 s of load."""
    start, batches = 10.0, []
    for number in range(round((120 if status == "warned" else 60) / latency)):
        pause = stands if number == 100 else 0.0
        batches.append(TimedBatch(0, "load", start, latency + (pause if within else 0)))
        start += latency + pause
    timeline = Timeline(0.0, [Phase("load", 0, 10.0, start)], batches)
    verdict = judge(timeline, DEFAULT, (repeat_of(),), engine_manifest(64), None, "", (), power_wanted=False)
    said = f"load 1: no batch ended for {stands:.1f} s of {start - 10:.1f} s"
    assert (said in verdict.reasons) == (status == "invalid")
    assert (said in verdict.warnings) == (status == "warned")
    assert verdict.status == ("invalid" if status == "invalid" else "valid")


def test_idle_that_drifts_is_said():
    (warning,) = verdict_of(repeat_of(idle=5.0, after=6.5)).warnings
    assert warning.startswith("repeat 1: idle power is 5.00 W before and 6.50 W after")


# --- modelled bound -------------------------------------------------------------------------------


def build_record(gpu="NVIDIA GeForce RTX 4090"):
    return TensorRTBuild(
        "10.3", gpu, "8.9", (), None, None, True, (), None, 3, False, (), None, None, 0, 0, {}
    )  # fmt: skip


@pytest.fixture
def built(small_graph):
    """The manifest of a GPU engine of ``small_graph``, and its folder."""
    manifest = replace(
        engine_manifest(64),
        graph=FileRecord.of(small_graph),
        runtime="tensorrt",
        tensorrt=build_record(),
        attention_fused=2,
    )
    return manifest, small_graph


def test_the_bound_is_that_of_the_roofline(built):
    manifest, graph = built
    model, reason = model_of(manifest, [graph.parent / "elsewhere", graph.parent])
    bound = model.bound(100.0)
    assert reason == ""
    assert bound.device == "rtx-4090"
    found = roofline(graph, load_device("rtx-4090"), precision="fp32")
    fused = [one for one in found.estimates if one.attention == "fused"] or found.estimates
    assert bound.bound_tiles_per_second == max(one.bound_fps for one in fused)
    assert bound.share_of_bound == pytest.approx(100.0 / bound.bound_tiles_per_second)
    assert bound.expected_tiles_per_second[0] < bound.expected_tiles_per_second[1] <= bound.bound_tiles_per_second


def test_the_bound_is_that_of_the_layers_where_they_are_known(built, tmp_path):
    half = LayerTensor("x", "fp16", (1, 4096, 384)), LayerTensor("w", "fp16", (1, 384, 384))
    layers = EngineLayers((Layer("__myl_FcAdd_myl0_1", "f", half[:1], half[:1], half[1:]),))
    manifest, graph = built
    engine = tmp_path / manifest.artefact.file
    write_layers(engine, manifest.artefact.sha256, layers)
    model, _ = model_of(manifest, [graph.parent, tmp_path])
    bound = model.bound(100.0)
    known = model_engine(layers, load_device("rtx-4090"))[0]
    assert (bound.modelled_from, bound.bound_tiles_per_second) == ("layers", known.bound_fps)
    write_layers(engine, "of another engine", layers)
    model, _ = model_of(manifest, [graph.parent, tmp_path])
    bound = model.bound(100.0)
    assert bound.modelled_from == "graph"
    assert bound.bound_tiles_per_second != known.bound_fps


def test_without_a_measured_figure_there_is_no_share(built):
    manifest, graph = built
    model, _ = model_of(manifest, [graph.parent])
    bound = model.bound(None)
    assert bound.share_of_bound is None


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"runtime": "onnxruntime-cpu", "tensorrt": None}, {}, "runs on the CPU"),
        ({"tensorrt": build_record("Voodoo 2")}, {}, "no device file for Voodoo 2"),
        ({"graph": FileRecord("small.onnx", "00" * 32, 1)}, {}, "is neither beside the engine"),
        ({}, {"device": "orin-nx-16gb"}, "power mode unknown"),
        ({}, {"device": "orin-nx-16gb", "mode": "12W"}, "power mode 12W"),
    ],
)
def test_why_there_is_no_bound(built, change, options, said):
    manifest, graph = built
    model, reason = model_of(replace(manifest, **change), [graph.parent], **options)
    assert model is None
    assert said in reason


def test_a_board_is_known_by_its_part_number_and_mode(built, tmp_path):
    manifest, graph = built
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0")
    manifest = replace(manifest, tensorrt=build_record("Orin"))
    model, _ = model_of(manifest, [graph.parent], mode="25W", root=tmp_path)
    bound = model.bound(1.0)
    assert (bound.device, bound.mode) == ("orin-nx-16gb", "25W")


def test_a_device_that_does_not_exist_is_an_error_before_all_else(built):
    with pytest.raises(UsageError, match="no device"):
        model_of(replace(built[0], runtime="onnxruntime-cpu", tensorrt=None), [], device="orin-nx-17gb")


@given(st.lists(st.floats(0.1, 100), min_size=3, max_size=8))
def test_windows_of_the_same_speed_are_steady_whatever_came_before(speeds):
    assert is_steady([*(Window(speed, None, None) for speed in speeds), *[Window(7.0, None, None)] * 3])
