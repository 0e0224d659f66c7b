"""Sweeps: every combination is measured once, whatever fails or ends in between, and the best one is named.

Most tests use :mod:`fake_step` for the commands that a sweep calls; the last ones call the real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import calibration_helpers
import numpy as np
import pytest
from board import Board, NoBoardError, running_board, set_watts
from browser import browsing, find_browser
from commands import assert_answer, finish, run, start
from fake_step import run_here
from labelled_images import build_data
from PIL import Image
from test_page import words

import cdkd_edge
from cdkd_edge.benchmark import sweep as sweeping
from cdkd_edge.benchmark.report_page import write_sweep_page
from cdkd_edge.benchmark.statistics import figure_of
from cdkd_edge.benchmark.sweep import SweepOptions, open_sources, run_sweep
from cdkd_edge.benchmark.sweep_table import (
    PointEnergy,
    Sweep,
    SweepPoint,
    failures,
    judged,
    read_sweep,
    sweep_schema,
    table,
    unbeaten,
)
from cdkd_edge.board.jetson import PowerMode
from cdkd_edge.cli.sweep import words_of
from cdkd_edge.core.errors import BenchError
from cdkd_edge.core.files import sole_use
from cdkd_edge.core.process import run_command
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.quality.datasets import find_dataset

FAKE = (sys.executable, str(Path(__file__).parents[1] / "helpers" / "fake_step.py"))
PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "sweep-1.json"
CHECKPOINT = Path(cdkd_edge.__file__).parent / "demo" / "tiny.safetensors"
MODES = (PowerMode(0, "MAXN"), PowerMode(3, "25W"))


class Place:
    """A workspace with graphs ``a`` and ``b``, and what the fake commands do."""

    def __init__(self, root: Path, make_graph: Callable[..., Path], weights: Any, config: Any) -> None:
        self.root, self.folder, self.log = root, root / "benchmarks" / "sweep", root / "calls"
        self._make = lambda folder, seed: make_graph(folder, weights(config, seed), config)
        self.graphs = [self.put_graph("a", 1), self.put_graph("b", 2)]
        self.plan = {
            "log": str(self.log),
            "fps": {"a fp32": 4.0, "a int8": 8.0, "b fp32": 5.0, "b int8": 10.0},
            "mean_iou": {"a fp32": 0.60, "a int8": 0.598, "b fp32": 0.55, "b int8": 0.54},
            "trouble": {},
        }
        build_data(root / "data", {"t1_a": (70, 90)})
        os.environ["FAKE_STEP"] = str(root / "plan.json")

    def put_graph(self, name: str, seed: int) -> Path:
        """Write a graph of the small network with other weights."""
        made = self._make(self.root / f"made-{name}-{seed}", seed)
        path = self.root / "export" / f"{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        for file in (made, made.with_suffix(".json")):
            shutil.copy(file, path.with_suffix(file.suffix))
        return path

    def sweep(self, *sources: Path, **changes: Any) -> Sweep:
        (self.root / "plan.json").write_text(json.dumps(self.plan))
        options = SweepOptions("cpu", step=FAKE, **changes)
        opened = open_sources(sources or self.graphs)
        return run_sweep(opened, self.folder, Workspace(self.root), options, "cdkd-edge sweep a b")

    def calls(self) -> list[str]:
        """What was called since the last time."""
        found = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found

    def kept(self, kind: str) -> list[str]:
        """Names of the results of a kind that are there."""
        return [path.name for path in (self.folder / kind).glob("[!.]*")]


@pytest.fixture
def place(
    tmp_path: Path, make_graph: Any, make_weights: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setenv("FAKE_STEP", "")
    monkeypatch.setattr(sweeping, "run_command", run_here)
    return Place(tmp_path, make_graph, make_weights, small_config)


def dataset(place: Place) -> Any:
    return find_dataset(place.root / "data")


def shown(sweep: Sweep) -> list[tuple[str, str, str]]:
    return [(Path(point.source).stem, point.precision, point.status) for point in sweep.points]


# --- the cross and the table ----------------------------------------------------------------------


def test_every_combination_is_measured_and_each_engine_evaluated_once(place: Place) -> None:
    found = place.sweep(dataset=dataset(place), modes=MODES, bench=("--power-trace",))
    assert shown(found)[::2] == [(graph, precision, "valid") for graph in "ab" for precision in ("fp32", "int8")]
    assert [point.power_mode for point in found.points] == ["MAXN", "25W"] * 4
    assert [point.number for point in found.points] == list(range(1, 9))
    calls = place.calls()
    for graph in ("a fp32", "a int8", "b fp32", "b int8"):
        expected = [f"build {graph}", f"evaluate {graph}", f"bench {graph} 0", f"bench {graph} 3"]
        assert [call for call in calls if f" {graph}" in call] == expected
    for point in found.points:
        assert (point.tile, point.overlap, point.attention) == (64, 16, "global")
        assert point.scene_megapixels_per_second == pytest.approx(point.tiles_per_second.mean * 48**2 / 1e6)
        fps = place.plan["fps"][f"{Path(point.source).stem} {point.precision}"]
        assert point.energy.gross_joules_per_tile.mean == pytest.approx(18.95 / fps), "half the watts at half the speed"
        assert (place.folder / point.engine).is_file()
        assert (place.folder / point.run / "summary.json").is_file()
    assert failures(found) == []
    assert read_sweep(place.folder) == found


def test_the_fastest_within_the_loss_is_chosen_with_its_commands(place: Place) -> None:
    found = place.sweep(dataset=dataset(place), modes=MODES)
    chosen = found.points[found.chosen - 1]
    assert (Path(chosen.source).stem, chosen.precision, chosen.power_mode) == ("a", "int8", "MAXN")
    assert found.rule.endswith("whose mIoU is at most 0.5 points below the best, with a valid benchmark")
    graph = place.graphs[0]
    assert chosen.rebuild == (f"cdkd-edge build {graph} --int8 --runtime cpu", "sudo nvpmodel -m 0")
    assert judged(found, 0.1).chosen == 1
    assert judged(found, 10).chosen == 7
    assert [point.number for point in found.points if point.front] == [1, 3, 7], "a in INT8 beats b in FP32"
    assert found.front_of == ("mIoU", "megapixels of a scene per second")


def test_without_data_speed_alone_decides(place: Place) -> None:
    found = place.sweep()
    assert (found.chosen, [point.number for point in found.points if point.front]) == (4, [4])
    assert "evaluate" not in " ".join(place.calls())
    assert not {"mIoU", "runtime", "power mode", "load, W"} & set(table(found)[0]), "no column says nothing"
    other = replace(found, points=(replace(found.points[0], runtime="openvino-cpu"), *found.points[1:]))
    assert "runtime" in table(other)[0]


def test_graphs_made_of_a_named_one_are_left_out(place: Place) -> None:
    """So that ``export/*.onnx`` does what it says."""
    place.sweep(precisions=("int8",))
    made = sorted((place.root / "export").glob("*.onnx"))
    assert len(made) == 4
    assert [source.path for source in open_sources(made)] == place.graphs
    place.calls()
    alone = place.sweep(place.root / "export" / "a.int8.onnx")
    assert shown(alone) == [("a.int8", "int8", "valid")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tiles": (128,)}, r"a.onnx takes 1 x 64 px; .* cdkd-edge export CKPT --tile 128 --no-fp16 -o GRAPH"),
        ({"batches": (4,)}, r"a.onnx takes 1 x 64 px; .* cdkd-edge export CKPT --tile 64 --batch 4 --no-fp16 -o GRAPH"),
    ],
)
def test_what_a_graph_does_not_have_is_a_row_that_says_how_to_get_it(place: Place, changes: Any, reason: str) -> None:
    found = place.sweep(place.graphs[0], precisions=("fp32",), **changes)
    (point,) = found.points
    assert point.status == "failed"
    assert re.search(reason, point.reason), point.reason
    assert place.calls() == []


def test_a_calibration_set_is_chosen_by_its_tiles(place: Place) -> None:
    scenes = calibration_helpers.archive(place.root / "archive", count=1)
    sets = place.root / "engines" / "calibration"
    for tile in (64, 32):
        calibration_helpers.make(scenes, sets / f"of-{tile}", tile=tile, count=2, check=1)
    options: dict[str, Any] = {"precisions": ("int8",), "modes": MODES}
    place.sweep(place.graphs[0], **options)
    assert place.calls()[0] == "build a int8 of-64"
    place.sweep(place.graphs[0], **options)
    assert place.calls() == []
    place.sweep(place.graphs[0], **options, calibrations=(sets / "of-64",))
    assert place.calls()[0] == "build a int8 of-64", "the graph was made with another set, as far as it says"
    (point, _) = place.sweep(place.graphs[1], **options, calibrations=(sets / "of-64", sets / "of-64")).points
    assert point.reason == "2 of the calibration sets have tiles of 64 px; name one of them"


def test_without_pytorch_a_checkpoint_is_a_row_that_says_what_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "find_spec", lambda name: None)
    found = place.sweep(CHECKPOINT, place.graphs[0], precisions=("fp32",), tiles=(64, 32))
    assert [one.status for one in found.points] == ["failed", "failed", "valid", "failed"]
    assert found.points[1].reason == (
        "a checkpoint is exported where PyTorch is, and its graph named here: "
        f"cdkd-edge export {CHECKPOINT} --tile 32 --no-fp16 -o GRAPH"
    )


# --- what fails, and what ends in between ---------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refused — do this", "build: refused — do this"),
        ("crash", "build: SIGSEGV"),
        ("kill", "build: SIGKILL (out of memory?)"),
    ],
)
def test_a_build_that_fails_is_a_row_and_the_others_go_on(
    place: Place, trouble: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "run_command", run_command)  # in processes
    place.plan["trouble"] = {"build a int8": trouble}
    found = place.sweep(place.graphs[0], modes=MODES)
    failed = [point for point in found.points if point.status == "failed"]
    assert [(Path(point.source).stem, point.precision, point.reason) for point in failed] == [("a", "int8", reason)] * 2
    assert failures(found) == failed
    assert place.calls().count("build a int8") == 1, "not tried again for each power mode"
    place.plan["trouble"] = {}
    again = place.sweep(place.graphs[0], modes=MODES)
    assert place.calls() == ["build a int8", "bench a int8 0", "bench a int8 3"], "what failed alone"
    assert failures(again) == []


def test_a_run_that_is_invalid_has_no_figures_and_is_measured_again(place: Place) -> None:
    place.plan["trouble"] = {"bench b fp32": "invalid"}
    found = place.sweep()
    point = found.points[2]
    assert (point.status, point.reason, point.tiles_per_second) == ("invalid", "throttled: oc1 rose", None)
    assert failures(found) == [point]
    place.calls()
    place.plan["trouble"] = {}
    assert place.sweep().points[2].status == "valid"
    assert place.calls() == ["bench b fp32"]


def test_an_evaluation_that_fails_costs_the_score_alone(place: Place) -> None:
    place.plan["trouble"] = {"evaluate a fp32": "the mask is torn"}
    found = place.sweep(dataset=dataset(place))
    point = found.points[0]
    assert (point.status, point.mean_iou, point.mean_iou_reason) == ("valid", None, "evaluate: the mask is torn")
    assert not point.front
    assert failures(found) == [point]


def test_the_same_sweep_again_measures_nothing_and_writes_the_same(place: Place) -> None:
    place.sweep(dataset=dataset(place))
    place.calls()
    before = (place.folder / "sweep.json").read_bytes()
    place.sweep(dataset=dataset(place))
    assert place.calls() == []
    assert (place.folder / "sweep.json").read_bytes() == before


def test_more_precisions_keep_what_is_measured(place: Place) -> None:
    place.sweep(precisions=("fp32",))
    place.calls()
    place.sweep()
    assert place.calls() == ["build a int8", "bench a int8", "build b int8", "bench b int8"]


@pytest.mark.parametrize("what", ["graph", "int8 graph", "protocol", "data", "machine"])
def test_what_changed_is_measured_again(place: Place, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dataset": dataset(place), "precisions": ("int8",)}
    first = place.sweep(**options)
    place.calls()
    expected = ["build a int8", "evaluate a int8", "bench a int8"]
    if what == "graph":
        place.put_graph("a", 7)
    elif what == "int8 graph":  # made again with another calibration, for example
        path = place.root / "export" / "a.int8.onnx"
        path.write_bytes(path.read_bytes() + b"\x32\x00")  # an empty doc_string
        manifest = json.loads(path.with_suffix(".json").read_text())
        manifest["artefact"]["sha256"] = sweeping.sha256_of(path)
        path.with_suffix(".json").write_text(json.dumps(manifest))
    elif what == "protocol":
        options["bench"] = ("--duration", "90")
        expected = ["bench a int8", "bench b int8"]
    elif what == "data":
        os.utime(next((place.root / "data" / "masks").iterdir()), (1, 1))
        expected = ["evaluate a int8", "evaluate b int8"]
    elif what == "machine":
        machine = replace(sweeping.describe_machine(), cores=64)
        monkeypatch.setattr(sweeping, "describe_machine", lambda: machine)
        expected = [f"{step} {graph} int8" for graph in "ab" for step in ("build", "evaluate", "bench")]
    second = place.sweep(**options)
    assert place.calls() == expected
    assert (first.points[0].run == second.points[0].run) == (what == "data")


def test_two_sweeps_do_not_share_a_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "LOCK_SECONDS", 0.3)
    with sole_use(place.folder, 1, lambda: None), pytest.raises(BenchError, match="another sweep is at work"):
        place.sweep()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_sweep(place: Place, number: int) -> None:
    """The command line, with the fake commands in place of the real ones."""
    place.plan["trouble"] = {"bench a int8": "hang"}
    (place.root / "plan.json").write_text(json.dumps(place.plan))
    script = (
        "import sys; fake = tuple(sys.argv.pop(1).split()); from cdkd_edge.cli import sweep\n"
        "sweep.module_command = lambda name: fake\n"
        "from cdkd_edge.__main__ import main; main()"
    )
    words = ("sweep", "--runtime", "cpu", "-w", place.root, *place.graphs)
    command = [sys.executable, "-c", script, " ".join(FAKE), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(sweeping.__file__).parents[2])}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    until(lambda: place.log.exists() and "bench a int8" in place.log.read_text(), process)
    (step,) = children_of(process.pid)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (128 + number, "")
    assert "interrupted; 1 of 4 points are measured and kept; the same command goes on" in err
    assert not Path(f"/proc/{step}").exists()
    place.calls()
    place.plan["trouble"] = {}
    assert failures(place.sweep()) == []
    assert place.calls() == ["bench a int8", "build b fp32", "bench b fp32", "build b int8", "bench b int8"]


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- the front, the choice, the record ------------------------------------------------------------


def point(
    number: int, *, iou: float | None = 0.5, speed: float | None = 1.0, joules: float | None = None
) -> SweepPoint:
    """A point of the graph ``a``; ``speed`` in tiles/s, of 1 MP each."""
    energy = None
    if joules is not None and speed is not None:
        figures = figure_of([joules * speed]), figure_of([joules]), figure_of([joules / 2])
        energy = PointEnergy("jtop", "module", "VDD_IN", *figures, joules, joules / 2)
    return SweepPoint(
        number=number, source="export/a.onnx", source_sha256="0" * 64, precision="fp16", tile=1024, batch=1,
        power_mode=None, status="failed" if speed is None else "valid", reason="why" if speed is None else "",
        mean_iou=iou, tiles_per_second=figure_of([speed]) if speed else None, scene_megapixels_per_second=speed,
        overlap=24, latency_p50_ms=1.0, energy=energy, energy_reason="" if energy else "none", rebuild=("cdkd-edge",),
    )  # fmt: skip


def swept(*points: SweepPoint, data: str | None = "data") -> Sweep:
    return judged(Sweep(points, "a board", data, 3, "cdkd-edge sweep"))


def test_what_is_unbeaten() -> None:
    assert unbeaten([(1, 1), (2, 0), (0, 2), (1, 0), (1, 1)]) == [0, 1, 2, 4], "equal ones do not beat each other"
    assert unbeaten([(1, 1, 1), (1, 1, 2), (0, 3, 0)]) == [1, 2]
    assert unbeaten([]) == []


def test_energy_is_the_third_quantity() -> None:
    found = swept(point(1, speed=2, joules=5), point(2, speed=1, joules=3), point(3, speed=1.5, joules=6))
    assert [one.front for one in found.points] == [True, True, False]
    assert len(found.front_of) == 3
    assert found.chosen == 1


def test_energies_of_different_scopes_are_not_compared() -> None:
    other = point(2, speed=1, joules=3)
    assert other.energy is not None
    other = replace(other, energy=replace(other.energy, scope="CPU package"))
    found = swept(point(1, speed=2, joules=5), other)
    assert [one.front for one in found.points] == [True, False]
    assert len(found.front_of) == 2


def test_a_point_without_a_quantity_of_others_is_neither_on_the_front_nor_chosen() -> None:
    found = swept(point(1, iou=0.5, speed=1), point(2, iou=None, speed=9), point(3, speed=None, iou=0.9))
    assert ([one.front for one in found.points], found.chosen) == ([True, False, False], 1)


def test_valid_points_are_preferred() -> None:
    shaky = replace(point(2, speed=9), status="not_steady", reason="others")
    assert swept(point(1), shaky).chosen == 1
    assert swept(shaky).chosen == 2
    assert "valid" not in swept(shaky).rule


def test_nothing_measured_nothing_chosen() -> None:
    found = swept(point(1, speed=None, iou=None))
    assert (found.chosen, found.rule, found.front_of) == (None, "", ())


@pytest.mark.skipif(not PUBLISHED.parent.exists(), reason="not a checkout: docs/ is not here")
def test_the_published_schema_is_the_records(place: Place) -> None:
    text = json.dumps(sweep_schema(), indent=2, ensure_ascii=False) + "\n"
    assert text == PUBLISHED.read_text(encoding="utf-8"), (
        "python -m cdkd_edge.benchmark.sweep_table > docs/schemas/sweep-1.json"
    )
    jsonschema = pytest.importorskip("jsonschema", reason="validating needs jsonschema, of the extra [test]")
    validator = jsonschema.Draft202012Validator(sweep_schema())
    place.plan["trouble"] = {"build b fp32": "refused"}
    place.sweep(dataset=dataset(place), bench=("--power-trace",))
    document = json.loads((place.folder / "sweep.json").read_text())
    validator.validate(document)
    document["points"][0]["status"] = "fine"
    assert not validator.is_valid(document)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_says_what_to_take(tmp_path: Path) -> None:
    points = [point(1, speed=2, joules=5), point(2, speed=1, joules=3), point(3, speed=None), point(4, iou=None)]
    evil = replace(points[1], source="export/<b>$x^{$.onnx", warnings=("<script>",), reason="<script>alert(1)</script>")
    found = swept(points[0], evil, *points[2:])
    write_sweep_page(found, tmp_path / "sweep.html")
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "Take point 1" in text
    assert "<script>" not in text
    assert "<b>" not in text
    shown = words(tmp_path / "sweep.html")
    assert "3 of 4 points were measured, mIoU on 3 images of data" in shown
    assert "a tile counts for (tile − overlap)² px, here (1024 − 24)²" in shown
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        tree = ElementTree.fromstring(drawing)
        texts = ["".join(one.itertext()).strip() for one in tree.iter() if one.tag.endswith("text")]
        assert {"1", "2", "mIoU, %", "energy, J per MP of a scene, gross"} <= set(texts)


def test_a_page_of_nothing(tmp_path: Path) -> None:
    write_sweep_page(swept(point(1, speed=None, iou=None)), tmp_path / "sweep.html")
    assert "Nothing was measured" in words(tmp_path / "sweep.html")


def test_many_points_in_one_place_still_have_readable_numbers(tmp_path: Path) -> None:
    crowd = [point(number, iou=0.5 + 1e-4 * (number % 3), speed=1 + 1e-3 * number) for number in range(1, 9)]
    write_sweep_page(swept(*crowd, point(9, speed=2, iou=0.4)), tmp_path / "sweep.html")
    assert "<svg" in (tmp_path / "sweep.html").read_text(encoding="utf-8")


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--tile", "512,x"], "whole numbers with commas, e.g. 512,1024, not '512,x'"),
        (["--batch", "0"], "whole numbers"),
        (["--precision", "int4"], "'int4' is no precision"),
        (["--schema", "dubai"], "they say how to read --data"),
        (["--paper", "--mlperf"], "one protocol at a time"),
        (["--runtime", "none"], "'none' is no runtime"),
    ],
)
def test_what_is_typed_wrong_is_said_before_anything_is_done(place: Place, arguments: list[str], pattern: str) -> None:
    assert_answer(run("sweep", place.graphs[0], "-w", place.root, *arguments), 2, pattern)
    assert not place.folder.exists()


def test_what_is_no_source(place: Place, small_engine_path: Path) -> None:
    assert_answer(run("sweep", small_engine_path), 2, "is an engine — name the graph it was built of")
    assert_answer(run("sweep", place.root / "none.pt"), 2, "is no graph .* and no checkpoint")
    assert_answer(run("sweep", place.root / "none.onnx"), 6, "does not exist")
    assert_answer(run("sweep", place.graphs[0], "--power-mode", "MAXN"), 17, "no power modes")


def test_options_become_words() -> None:
    assert words_of(a_b=1, c=None, d=False, e=True, f=Path("x")) == ("--a-b", "1", "--e", "--f", "x")


# --- the real commands ----------------------------------------------------------------------------


def real_tiles(folder: Path) -> Path:
    """Pieces of the bundled scene, with masks by brightness: not a task for anybody, but real pixels."""
    with Image.open(Path(cdkd_edge.__file__).parent / "demo" / "scene.jpg") as scene:
        pieces = [scene.convert("RGB").crop((left, 200, left + 90, 270)) for left in (100, 400)]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number, piece in enumerate(pieces):
        piece.save(folder / "images" / f"t{number}_a.png")
        Image.fromarray(np.asarray(piece.convert("L")) // 52).save(folder / "masks" / f"t{number}_a.png")
    return folder


SHORT = ("--duration", "0.6", "--max-warm-up", "0.2", "--threads", "1", "--schema", "dubai")


def test_killed_in_the_middle_and_called_again_it_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "run_command", run_command)
    data = real_tiles(place.root / "real")
    arguments = ("sweep", *place.graphs, "--precision", "fp32,fp16", "--data", data, *SHORT, "-w", place.root, "--json")
    process = start(*arguments)
    until(lambda: len(place.kept("runs")) == 1, process)
    until(lambda: bool(children_of(process.pid)), process)
    (step,) = children_of(process.pid)
    process.kill()
    process.communicate()
    assert [one.status == "missing" for one in read_sweep(place.folder).points[2:]] == [True, True]
    until(lambda: not Path(f"/proc/{step}").exists())
    first = {path: path.stat().st_mtime_ns for path in (place.folder / "runs").glob("*/summary.json")}

    result = run(*arguments)
    assert result.exit_code == 19, result.stderr
    assert "2 of 4 points failed: build: an FP16 engine needs TensorRT on a GPU" in result.stderr
    document = json.loads(result.stdout)
    assert [one["status"] in ("valid", "not_steady") for one in document["points"]] == [True, False, True, False]
    assert all(0 <= one["mean_iou"] <= 1 for one in document["points"][::2])
    assert document["chosen"] in (1, 3)
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items()), "measured once"
    state = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*.csv")}
    assert len(place.kept("runs")) == len(place.kept("accuracy")) == 2

    assert json.loads(run(*arguments).stdout) == document
    assert {path: path.stat().st_mtime_ns for path in place.folder.rglob("*.csv")} == state

    place.put_graph("a", 7)
    changed = json.loads(run(*arguments).stdout)["points"]
    assert changed[0]["engine_sha256"] != document["points"][0]["engine_sha256"]
    assert changed[0]["run"] != document["points"][0]["run"]
    assert changed[2]["run"] == document["points"][2]["run"]
    assert changed[2]["tiles_per_second"] == document["points"][2]["tiles_per_second"]


@pytest.mark.needs_torch
def test_the_commands_that_it_shows_make_the_same_engine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sweeping, "run_command", run_command)
    monkeypatch.chdir(place.root)
    shutil.copy(CHECKPOINT, "tiny.safetensors")
    result = run(
        "sweep", "tiny.safetensors", "--precision", "fp32", "--tile", "64", "--batch", "2", *SHORT[:6], "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (one,) = found["points"]
    assert (one["tile"], one["batch"], found["chosen"]) == (64, 2, 1)
    for command in one["rebuild"]:
        assert run(*shlex.split(command)[1:]).exit_code == 0
    (engine,) = Path("engines").glob("*.onnx")
    assert sweeping.sha256_of(engine) == one["engine_sha256"]


def test_a_step_ends_with_its_sweep(place: Place, small_engine_path: Path) -> None:
    """Gently: a benchmark puts the board back and leaves nothing half done."""
    runs = place.root / "runs"
    step = (
        sys.executable,
        "-m",
        "cdkd_edge.cli.step",
        "bench",
        small_engine_path,
        "--duration",
        "300",
        "-o",
        runs / "a",
    )
    script = "import sys; from cdkd_edge.core.process import run_command; run_command(sys.argv[1:])"
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, step)],
        env={**os.environ, "PYTHONPATH": str(Path(cdkd_edge.__file__).parents[1])},
    )
    until(lambda: any(runs.glob(".*.part/*")))
    (child,) = children_of(parent.pid)
    parent.kill()
    parent.wait()
    until(lambda: not Path(f"/proc/{child}").exists(), seconds=60)
    assert list(runs.glob("*")) + list(runs.glob(".*")) == [] or not runs.exists()


class Follower(threading.Thread):
    """Shows the watts of a board's power mode while a benchmark computes, and those of idling while none does."""

    def __init__(self, board: Board) -> None:
        super().__init__(name="watts", daemon=True)
        self.board, self.over = board, threading.Event()

    def run(self) -> None:
        before = 0.0
        while not self.over.wait(0.25):
            now = sum(map(self._seconds, Path("/proc").glob("[0-9]*")))
            mode = (self.board.root / "var/lib/nvpmodel/status").read_text().strip()
            load = 18.95 if mode.endswith("0") else 9.5
            set_watts(self.board.sys, load if now - before > 0.05 else 5.0)
            before = now

    def _seconds(self, process: Path) -> float:
        """Processor time of a process, if it is a benchmark of a sweep."""
        try:
            if b"cdkd_edge.cli.step\0bench" not in (process / "cmdline").read_bytes():
                return 0.0
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_power_modes_of_an_emulated_board(place: Place) -> None:
    with contextlib.ExitStack() as stack:
        try:
            board = stack.enter_context(running_board(place.root / "board", service=False, modes=True))
        except NoBoardError as error:
            pytest.skip(f"NO EMULATED BOARD: {error}")
        follower = Follower(board)
        follower.start()
        stack.callback(follower.join)
        stack.callback(follower.over.set)
        command = ("sweep", place.graphs[0], "--precision", "fp32", "--power-mode", "maxn,10W", "-w", place.root)
        options = ("--power-source", "ina3221", "--idle", "1", "--duration", "3", "--max-warm-up", "1", "--json")
        status = board.root / "var/lib/nvpmodel/status"

        def begin() -> subprocess.Popen[str]:
            entered = board.enter(sys.executable, "-m", "cdkd_edge", *command, *options)
            pipe = subprocess.PIPE
            return subprocess.Popen(entered, env=board.environment(), stdout=pipe, stderr=pipe, text=True)

        killed = begin()
        until(lambda: status.read_text().strip() == "pmode:0001", killed)
        killed.kill()
        killed.communicate()
        until(lambda: status.read_text().strip() == "pmode:0000")
        assert len(place.kept("runs")) == 1, "the step was ended, and has set the mode back"
        code, out, err = finish(begin())
        assert code == 0, (out, err)
        assert status.read_text().strip() == "pmode:0000"
    assert len(place.kept("runs")) == 2
    found = json.loads(out)
    assert [one["power_mode"] for one in found["points"]] == ["MAXN", "10W"]
    for one, watts in zip(found["points"], (18.95, 9.5), strict=True):
        assert one["energy"]["rail"] == "VDD_IN"
        assert one["energy"]["load_watts"]["mean"] == pytest.approx(watts, rel=0.1)
        joules = one["energy"]["load_watts"]["mean"] / one["tiles_per_second"]["mean"]
        assert one["energy"]["gross_joules_per_tile"]["mean"] == pytest.approx(joules, rel=1e-6)
        assert one["rebuild"][-1] == f"sudo nvpmodel -m {('MAXN', '10W').index(one['power_mode'])}"
    assert len({one["engine"] for one in found["points"]}) == 1
    assert found["front_of"] == ["megapixels of a scene per second", "gross joules per megapixel of a scene"]


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_a_browser_shows_the_page_of_a_sweep(place: Place) -> None:
    found = place.sweep(dataset=dataset(place), modes=MODES, bench=("--power-trace",))
    write_sweep_page(found, place.folder / "sweep.html")
    with browsing(str(find_browser()), place.root / "profile") as browser:
        for width in (1200, 390):
            page = browser.open(place.folder / "sweep.html", width=width)
            assert page.complaints() == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        picture = os.environ.get("SWEEP_PICTURE")
        if picture:
            Path(picture).write_bytes(browser.open(place.folder / "sweep.html").screenshot())
    assert place.folder.joinpath(re.findall(r'href="(runs/[^"]*)"', (place.folder / "sweep.html").read_text())[0])
