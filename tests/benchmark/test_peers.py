"""The comparison with peers: fair order, ratios of the same round, who is absent and why, one run of the real thing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from math import comb
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_helpers import FakeEngine, noise, write_raster

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "peers.py").exists():
    pytest.skip("the suite is not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import overhead  # noqa: E402
import peer_children  # noqa: E402
from peer_children import PEERS, AbsentError  # noqa: E402
from peer_rounds import ChildPeer, measure, williams  # noqa: E402
from peer_statistics import agreement, leads, median_interval, ratio_of, summarise, verdict  # noqa: E402
from peer_table import table_of  # noqa: E402
from script_tools import cpu_slug  # noqa: E402


class FakePeer:
    """A contestant that takes as long as it is told, and notes when it ran."""

    def __init__(self, key, history, seconds=1.0, fails=None):
        self.key, self.history, self.seconds, self.fails = key, history, seconds, fails
        self.closed = False
        self.turns = 0

    def load(self):
        if self.fails == "load":
            raise AbsentError("not installed")
        return {"load_seconds": 0.0, "details": {}}

    def label(self):
        if self.fails == "label":
            raise AbsentError("no such operator")
        return [self.seconds, self.seconds]

    def turn(self, tile, runs):
        assert not self.closed
        if self.fails == ("turn", self.turns):
            raise AbsentError("out of memory")
        self.turns += 1
        self.history.append((self.key, tile, runs))
        return runs * self.seconds * self.turns

    def memory(self):
        if self.fails == "memory":
            raise AbsentError("gone")
        return {"peak_memory_bytes": 1000, "running_memory_bytes": None}

    def close(self):
        self.closed = True


def race(*peers, rounds=4, tiles=2, **options):
    return measure(peers, rounds=rounds, tiles=tiles, pause=0, **options)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 12))
def test_everyone_is_everywhere_and_follows_everyone_equally_often(count):
    rows = williams(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    for position in range(count):
        at = [row[position] for row in rows]
        assert {at.count(one) for one in range(count)} == {len(rows) // count}
    follows = [pair for row in rows for pair in pairwise(row)]
    wanted = len(rows) // count if count > 1 else 0
    assert {follows.count((a, b)) for a in range(count) for b in range(count) if a != b} <= {wanted}


def test_rounds_are_interleaved_in_that_order_and_tiles_take_turns():
    history = []
    peers = [FakePeer(key, history) for key in "abc"]
    result = race(*peers, rounds=6, tiles=2)
    assert [[key for key, _, _ in history[start : start + 3]] for start in range(3, 21, 3)] == result.orders
    assert result.orders == [["abc"[index] for index in row] for row in williams(3)]
    assert [tile for _, tile, _ in history] == [tile for number in range(7) for tile in [number % 2] * 3]
    assert all(peer.closed for peer in peers)
    assert result.ended_by == "rounds"


def test_the_first_round_only_warms_up_and_times_are_per_tile():
    result = race(FakePeer("a", []), rounds=3)
    assert result.seconds == {"a": [2.0, 3.0, 4.0]}  # a turn takes as many seconds as there were turns before


def test_a_turn_of_a_fast_peer_is_long_enough_for_all():
    history = []
    result = race(FakePeer("fast", history, seconds=0.01), FakePeer("slow", history, seconds=1.0), rounds=2)
    assert result.runs_per_turn == 20
    assert {runs for _, _, runs in history} == {20}
    assert result.seconds["fast"] == pytest.approx([0.02, 0.03])


def test_the_budget_ends_it_after_two_rounds_at_the_earliest():
    result = race(FakePeer("a", []), rounds=50, seconds=0)
    assert (len(result.seconds["a"]), result.ended_by) == (2, "seconds")


# --- who fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("load", "not installed"),
        ("label", "no such operator"),
        (("turn", 0), "failed in round 1: out of memory"),
        (("turn", 3), "failed in round 3: out of memory"),
        ("memory", "gone"),
    ],
)
def test_who_fails_is_absent_with_its_reason_and_the_others_go_on(fails, reason):
    history = []
    broken = FakePeer("b", history, fails=fails)
    result = race(FakePeer("a", history), broken, FakePeer("c", history), rounds=4)
    assert result.absent == {"b": reason}
    assert {key: len(values) for key, values in result.seconds.items()} == {"a": 4, "c": 4}
    assert set(result.memory) == set(result.loaded) == {"a", "c"}
    assert broken.closed


def test_nobody_left_is_no_endless_loop():
    assert race(FakePeer("a", [], fails="load")).seconds == {}


def test_all_are_closed_when_it_is_interrupted():
    peers = [FakePeer("a", []), FakePeer("b", [])]

    def stop(step):
        if step.startswith("round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race(*peers, progress=stop)
    assert all(peer.closed for peer in peers)


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import sys; print('cannot find it', file=sys.stderr); sys.exit(3)", "exit code 3: cannot find it"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, for lack of memory perhaps"),
        ("import time; time.sleep(60)", "no answer within"),
        ('print(\'{"absent": "no CUDA"}\')', "no CUDA"),
    ],
)
def test_a_process_that_ends_or_hangs_says_why(tmp_path, monkeypatch, child, reason):
    """The suite starts `peer_children.py` beside `peer_rounds.py`; here another program lies there."""
    (tmp_path / "peer_children.py").write_text(child)
    monkeypatch.setattr("peer_rounds.__file__", str(tmp_path / "peer_rounds.py"))
    peer = ChildPeer("ours-fp32", tmp_path, threads=1, timeout=20 if "sleep" not in child else 0.3)
    with pytest.raises(AbsentError, match=reason):
        peer.load()
    peer.close()


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    def load(folder, threads):
        raise ModuleNotFoundError("No module named 'openvino'", name="openvino")

    monkeypatch.setitem(PEERS, "ort-graph", peer_children.Peer("x", "fp32", "", load))
    reading, writing = os.pipe()
    saved = os.dup(1)
    try:
        os.dup2(writing, 1)
        peer_children.serve("ort-graph", tmp_path, 1)
    finally:
        os.dup2(saved, 1)
        os.close(writing)
        os.close(saved)
    with os.fdopen(reading) as answers:
        assert json.loads(answers.readline()) == {"absent": "openvino is not installed"}


# --- figures --------------------------------------------------------------------------------------


def test_a_ratio_is_of_the_same_round():
    """A machine that is three times as slow for a while changes no ratio."""
    slow = [1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    ratio = ratio_of([2 * value for value in slow], slow)
    assert (ratio["median"], ratio["low"], ratio["high"], ratio["reason"]) == (2, 2, 2, None)


def test_rounds_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="argument"):
        ratio_of([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("count", "k"), [(5, None), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (30, 10)])
def test_the_interval_has_the_ranks_of_the_sign_test(count, k):
    """Ranks as in Conover's table A3 (two-sided, 95 %)."""
    values = list(np.random.default_rng(0).permutation(count).astype(float))
    interval = median_interval(values)
    assert interval == (None if k is None else (k - 1, count - k))
    if k:
        assert 1 - 2 * sum(comb(count, i) for i in range(k)) / 2**count >= 0.95
        assert 1 - 2 * sum(comb(count, i) for i in range(k + 1)) / 2**count < 0.95


def test_the_interval_covers_the_median_of_skewed_times():
    samples = np.random.default_rng(1).lognormal(size=(2000, 15))
    hits = [low <= 1 <= high for low, high in map(median_interval, samples.tolist())]
    assert 0.95 <= np.mean(hits) <= 0.98  # 96.5 % by the binomial


def test_few_rounds_have_no_interval_and_say_so():
    ratio = ratio_of([1.0, 2.0], [1.0, 1.0])
    assert ratio["low"] is None
    assert "takes 6 rounds, not 2" in ratio["reason"]


def test_ratios_without_a_baseline_are_absent():
    memory = {"peak_memory_bytes": 1, "running_memory_bytes": None}
    result = summarise({"b": [1.0, 2.0]}, {"b": "a"}, {"b": memory})["b"]
    assert (result["time_ratio"]["median"], result["time_ratio"]["reason"]) == (None, "a did not run")
    assert result["memory_ratio"] is None


def test_memory_ratio():
    memory = {key: {"peak_memory_bytes": size, "running_memory_bytes": None} for key, size in (("a", 2), ("b", 3))}
    result = summarise({"a": [1.0], "b": [1.0]}, {"a": "a", "b": "a"}, memory)
    assert result["b"]["memory_ratio"] == 1.5


def test_agreement_counts_pixels():
    reference = np.zeros((2, 4, 4), np.uint8)
    other = reference.copy()
    other[0, 0, :2] = 3
    assert agreement(other, reference) == 1 - 2 / 32
    with pytest.raises(ValueError, match="labels are"):
        agreement(other[:1], reference)


def test_what_computes_something_else_is_no_peer():
    assert verdict(0.9995, "fp32", trained=True) is None
    assert "99.80%" in verdict(0.998, "fp32", trained=True)
    assert verdict(0.998, "int8", trained=True) is None
    assert "computes something else" in verdict(0.9, "int8", trained=True)
    assert verdict(0.9, "int8", trained=False) is None
    assert verdict(0.9, "fp32", trained=False) is not None


def test_our_fastest_engine_is_compared_with_the_fastest_peer():
    def one(precision, seconds, baseline="ours-fp32", no_peer=None):
        return {"precision": precision, "seconds_median": seconds, "baseline": baseline, "no_peer": no_peer}

    results = {
        "ours-fp32": one("fp32", 3.0),
        "ours-bf16": one("bf16", 1.5),
        "slow": one("fp32", 5.0),
        "quick": one("fp32", 2.0),
        "wrong": one("fp32", 0.1, no_peer="computes something else"),
        "own": one("own choice", 2.0),
        "ours-tensorrt-fp16": one("fp16", 0.1, "ours-tensorrt-fp16"),
    }
    found = leads({key: [value["seconds_median"]] * 6 for key, value in results.items()}, results)
    assert [(lead["precision"], lead["ours"], lead["peer"], lead["median"]) for lead in found] == [
        ("fp32", "ours-fp32", "quick", 1.5),
        ("any", "ours-bf16", "quick", 0.75),
    ]
    assert leads({}, {}) == []


def test_processor_time_is_that_of_the_peer(tmp_path, monkeypatch, capfd):
    """A peer that sleeps takes no processor time."""

    def load(folder, threads):
        return lambda image: time.sleep(0.2) or image[:, 0], {}

    monkeypatch.setitem(PEERS, "ort-graph", peer_children.Peer("x", "fp32", "", load))
    np.save(tmp_path / "tiles.npy", np.zeros((1, 3, 4, 4), np.uint8))
    taken = {}
    for clock in peer_children.CLOCKS:
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"do": "turn", "tile": 0, "runs": 1}\n'))
        kept = os.dup(1)
        peer_children.serve("ort-graph", tmp_path, 1, clock)
        os.dup2(kept, 1)
        os.close(kept)
        taken[clock] = json.loads(capfd.readouterr().out.splitlines()[-1])["seconds"]
    assert taken["wall"] >= 0.2 > 0.1 > taken["processor"]


def test_a_record_is_named_by_the_kind_of_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC (R) 9\nstepping\t: 1\n" * 2)
    assert cpu_slug(file) == "amd-epyc-r-9-25-17"
    file.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd42\n")
    assert cpu_slug(file).endswith("-0xd42")


# --- the real thing -------------------------------------------------------------------------------


def suite(*words, script="peers.py", **environment):
    root = BENCHMARKS.parent
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(root), CUDA_VISIBLE_DEVICES="", **environment),
        timeout=600,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The bundled network on tiles of 64 px cut from two images, two rounds. Not to be changed."""
    for module in ("torch", "onnxsim", "safetensors"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("peers")
    (folder / "data" / "images").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(noise(64, 80, seed=index).transpose(1, 2, 0)).save(folder / "data" / "images" / f"{index}.png")
    Image.fromarray(noise(32, 32).transpose(1, 2, 0)).save(folder / "data" / "images" / "small.png")
    words = ["--preset", "tiny", "--tile", 64, "--rounds", 2, "--tiles", 2, "--pause", 0, "--threads", 1]
    words += ["--only", "ours-fp32,ours-bf16,torch-compile,ort-graph,openvino-graph,ours-tensorrt-fp16,torch-cuda-fp16"]
    words += ["--data", folder / "data", "--folder", folder / "artefacts", "--output", folder / "results"]
    answer = suite(*words, CXX="/nonexistent")
    assert answer.returncode == 0, answer.stderr
    return folder, json.loads((folder / "results" / f"peers-{cpu_slug()}.json").read_text()), answer


def test_the_suite_compares_what_is_installed(compared):
    folder, record, _ = compared
    (run,) = record["runs"]
    assert {"ours-fp32", "ort-graph"} <= set(run["peers"])
    for peer in run["peers"].values():
        assert len(peer["seconds"]) == run["rounds"] == 2
        assert peer["seconds_median"] > 0
        assert peer["label_agreement"] > (0.999 if peer["precision"] == "fp32" else 0.98)
        assert peer["no_peer"] is None
        assert peer["peak_memory_bytes"] >= (peer["running_memory_bytes"] or 0) > 1e7
    assert run["peers"]["ours-fp32"]["time_ratio"]["median"] == 1
    assert (run["tile"], run["trained"], run["threads"]) == (64, True, 1)
    assert run["tiles"] == {"count": 2, "source": "of images"}
    assert str(folder) not in json.dumps(record)


def test_what_has_no_gpu_is_absent_with_its_reason(compared):
    (run,) = compared[1]["runs"]
    assert "CUDA" in run["absent"]["torch-cuda-fp16"]["reason"]
    assert run["absent"]["ours-tensorrt-fp16"]["reason"]
    assert not {"torch-cuda-fp16", "ours-tensorrt-fp16"} & set(run["peers"])


def test_openvino_is_a_peer_where_it_is_installed(compared):
    (run,) = compared[1]["runs"]
    if find_spec("openvino") is None:
        assert "not installed" in run["absent"]["openvino-graph"]["reason"]
        pytest.skip("openvino is not installed; the suite says so")
    assert run["peers"]["openvino-graph"]["details"]["computes_in"] == "f32"
    assert run["peers"]["openvino-graph"]["details"]["threads_used"] == 1


def test_the_table_has_every_peer_and_who_is_absent(compared):
    folder, record, answer = compared
    table = (folder / "results" / f"peers-{cpu_slug()}.md").read_text()
    assert table == table_of(record)
    assert answer.stdout.strip() == table.strip()
    (run,) = record["runs"]
    for peer in (*run["peers"].values(), *run["absent"].values()):
        assert peer["title"] in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(run["peers"])
    assert {row.count("|") for row in rows} == {8}


def test_a_record_keeps_other_runs(compared):
    from peers import merge

    record = compared[1]
    (run,) = record["runs"]
    other = merge(record, dict(run, tile=128))
    assert [one["tile"] for one in other["runs"]] == [128, 64]
    again = merge(other, dict(run, rounds=7))
    assert [(one["tile"], one["rounds"]) for one in again["runs"]] == [(128, 2), (64, 7)]


def test_a_peer_that_labels_otherwise_has_no_ratio_in_the_table(compared):
    record = json.loads(json.dumps(compared[1]))
    peer = record["runs"][0]["peers"]["ort-graph"]
    peer.update(label_agreement=0.5, no_peer="computes something else: 50 %")
    (row,) = [line for line in table_of(record).splitlines() if line.startswith(f"| {peer['title']}")]
    assert row.split("|")[4].strip() == "-"
    assert "(no peer)" in row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "ours-fp33"), "no peer is called 'ours-fp33'"),
        (("--rounds", "0"), "at least 1"),
        (("--prepare-only",), "needs --folder"),
        (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
    ],
)
def test_mistakes_are_said_without_a_traceback(words, said, capsys):
    pytest.importorskip("torch")
    from peers import main

    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    assert code != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"results": {}}'])
def test_a_record_of_something_else_is_not_overwritten(tmp_path, capsys, content):
    pytest.importorskip("torch")
    from peers import main

    path = tmp_path / f"peers-{cpu_slug()}.json"
    path.write_text(content)
    assert main(["--preset", "tiny", "--output", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    assert path.read_text() == content


def test_an_output_that_is_no_folder_is_said_before_anything_is_measured(tmp_path, capsys):
    pytest.importorskip("torch")
    from peers import main

    (tmp_path / "file").touch()
    assert main(["--preset", "tiny", "--output", str(tmp_path / "file")]) == 1
    captured = capsys.readouterr()
    assert "file" in captured.err
    assert "exporting" not in captured.err


def test_images_that_are_too_small_are_said(tmp_path):
    pytest.importorskip("torch")
    from peer_artefacts import read_tiles

    from cdkd_edge.core.errors import SceneError

    write_raster(tmp_path / "a.tif", noise(40, 90), photometric="RGB")
    with pytest.raises(SceneError, match="64 x 64"):
        read_tiles(tmp_path, 64, 2)


def test_other_tiles_make_another_calibration(tmp_path):
    """What INT8 ranges were set with must not be measured on."""
    pytest.importorskip("torch")
    from peer_artefacts import prepare, put_checkpoint

    put_checkpoint(tmp_path, "tiny", None)
    options = {"wanted": [], "trained": True}
    prepare(tmp_path, 64, tiles=1, **options)
    graph = tmp_path / "plain.onnx"
    made = graph.stat().st_mtime_ns
    (tmp_path / "calibration").mkdir()
    (tmp_path / "plain.int8.onnx").touch()
    prepare(tmp_path, 64, tiles=1, **options)
    assert (tmp_path / "calibration").exists()
    prepare(tmp_path, 64, tiles=2, **options)
    assert not (tmp_path / "calibration").exists()
    assert not (tmp_path / "plain.int8.onnx").exists()
    assert graph.stat().st_mtime_ns == made
    prepare(tmp_path, 128, tiles=2, **options)
    assert graph.stat().st_mtime_ns != made


def test_torch_compile_without_a_compiler_is_absent_with_the_reason(compared):
    (run,) = compared[1]["runs"]
    assert "compiler" in run["absent"]["torch-compile"]["reason"]


# --- overhead -------------------------------------------------------------------------------------


def test_overhead_of_an_engine_whose_time_is_known(tmp_path):
    """Tiles of 20 ms each: what is beyond them is small, and said."""
    scene = write_raster(tmp_path / "scene.tif", noise(200, 200), photometric="RGB")
    engine = FakeEngine(tile=64, delay=0.02)
    result = overhead.measure(engine, scene, repeats=2)
    tiles = result["tiles"]
    assert len(result["repeats"]) == 2
    for row in result["repeats"]:
        assert row["engine_seconds"] >= 0.02 * tiles
        assert row["engine_alone_seconds"] >= 0.02 * tiles
        assert row["ratio"] == row["seconds"] / row["engine_seconds"] >= 1
    assert engine.launches == 3 * 2 * tiles  # warm-up too; in the scene, and alone
    assert result["within_target"] == (result["figures"]["ratio"]["median"] <= 1.05)


def test_time_before_the_first_tile_is_seen(tmp_path, monkeypatch):
    """A scene that opens 0.3 s late costs so much."""
    scene = write_raster(tmp_path / "scene.tif", noise(100, 100), photometric="RGB")
    real = overhead.segment_scene

    def late(*arguments, **options):
        import dataclasses
        import time

        time.sleep(0.3)
        result = real(*arguments, **options)
        return dataclasses.replace(result, seconds=result.seconds + 0.3)

    monkeypatch.setattr(overhead, "segment_scene", late)
    figures = overhead.measure(FakeEngine(tile=64, delay=0.02), scene, repeats=1)["figures"]
    assert figures["before"]["median"] >= 0.29
    assert figures["ratio"]["median"] > 2


def test_overhead_is_recorded(tmp_path, small_engine_path):
    for _ in range(2):  # the second replaces the first
        words = [small_engine_path, "--side", 100, "--repeats", 1, "--threads", 1, "--output", tmp_path]
        answer = suite(*words, script="overhead.py")
        assert answer.returncode == 0, answer.stderr
    (run,) = json.loads((tmp_path / "overhead.json").read_text())["runs"]
    assert run["figures"]["ratio"]["median"] > 1
    assert run["command"].startswith("python benchmarks/overhead.py small.fp32.cpu.onnx")
    assert str(tmp_path) not in json.dumps(run)
