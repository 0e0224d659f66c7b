"""Scenes over workers: a real scheduler, real workers in processes of their own, one of them killed in mid-scene."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from scene_helpers import noise, write_raster
from typer.testing import CliRunner

from cdkd_edge import cli
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, FleetError, MissingExtraError
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segmentation import worker as worker_module
from cdkd_edge.segmentation.dask import DaskPool, require_running, stop_run
from cdkd_edge.segmentation.dispatch import Answer, RunObserver
from cdkd_edge.segmentation.jobs import EngineRef, Failure, Job, JobReport, Reach, decode, encode
from cdkd_edge.segmentation.many import engine_ref, segment_many
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.worker import WorkerEngine, engine_path, send_progress

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- with a real scheduler --------------------------------------------------------------------------


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    root = str(Path(cli.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=file, stderr=file, env=environment, cwd=log.parent
        )


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with three workers; each a process without a nanny, so that a killed one stays dead."""
    pytest.importorskip("distributed", reason="needs the [dask] extra")
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    started = [
        start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--scheduler-file", str(file), log=folder / "scheduler.log")
    ]  # fmt: skip
    try:
        for number in range(3):
            started.append(
                start("distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-nanny", "--no-dashboard",
                      "--nthreads", "2", "--name", f"w{number}", log=folder / f"worker{number}.log")
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text():
            assert time.monotonic() < deadline, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


class Notes(RunObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.order: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, report: JobReport) -> None:
        self.order.append(Path(report.scene).stem)


class Killing(Notes):
    """Kills the worker that has the first scene as soon as it tells of tiles."""

    def __init__(self, pool: DaskPool) -> None:
        super().__init__()
        self.pool = pool
        self.killed: list[str] = []

    def tiles(self, index: int, done: int, total: int) -> None:
        if index == 0 and not self.killed and 0 < done < total:
            client = self.pool._client
            (address,) = [at for at, keys in client.processing().items() if any("-0-1" in str(key) for key in keys)]
            os.kill(client.run(os.getpid, workers=[address])[address], signal.SIGKILL)
            self.killed.append(address)


def wait_for_workers(pool: DaskPool, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(pool._living()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nothing_lost_and_nothing_twice(
    scheduler: str, small_engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = write_raster(tmp_path / "large.tif", noise(1200, 1000))
    scenes = [str(large)] + [str(write_raster(tmp_path / f"s{i}.tif", noise(200, 150, seed=i))) for i in range(6)]
    Path(scenes[3]).write_text("no raster")
    outputs = [tmp_path / "maps" / f"{Path(scene).stem}_labels.tif" for scene in scenes]
    ref = engine_ref(small_engine_path, threads=1)
    pool = DaskPool(scheduler)
    observer = Killing(pool)
    with pool:
        wait_for_workers(pool, 3)
        monkeypatch.setattr(DaskPool, "__enter__", lambda self: self)
        monkeypatch.setattr(DaskPool, "__exit__", lambda *_: None)
        with pytest.raises(FleetError, match=r"1 of 7 scenes failed: s2\.tif"):
            segment_many(scenes, outputs, pool, ref, report_path=tmp_path / "report.json", observer=observer)
        assert len(pool._living()) == 2
    assert len(observer.killed) == 1
    assert any("lost the worker" in note and "large.tif" in note for note in observer.notes)
    assert sorted(observer.order) == sorted(Path(scene).stem for scene in scenes), "an answer each, and one only"
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {Path(row["scene"]).stem: row for row in report["scenes"]}
    assert [row["attempts"] for row in report["scenes"]] == [2, 1, 1, 1, 1, 1, 1], "the lost one alone began again"
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "done") | {"s2": "failed"}
    assert report["crew"]["kind"] == "dask"
    with contextlib.closing(load_engine(small_engine_path, threads=1)) as engine:
        for scene, output in zip(scenes, outputs, strict=True):
            if scene != scenes[3]:
                segment_scene(engine, scene, tmp_path / "undisturbed.tif")
                assert output.read_bytes() == (tmp_path / "undisturbed.tif").read_bytes(), scene
    visible = sorted(path.name for path in (tmp_path / "maps").iterdir() if not path.name.startswith("."))
    good = [output.stem for output, scene in zip(outputs, scenes, strict=True) if scene != scenes[3]]
    assert visible == sorted(name + end for name in good for end in (".qml", ".tif", ".tif.aux.xml"))
    assert not list((tmp_path / "maps").glob(".*.cdkd-edge-run"))


def test_the_command(scheduler: str, small_engine_path: Path, small_graph: Path, tmp_path: Path) -> None:
    """Each worker with its own engine of the graph that is given; then again, with nothing left to do."""
    scenes = [write_raster(tmp_path / f"s{i}.tif", noise(80, 90, seed=i)) for i in range(3)]
    command = ["segment", *map(str, scenes), "--out", "maps", "--dask", scheduler, "--json", "-e", str(small_graph),
               "--worker-engines", str(small_engine_path.parent), "--preview", "--stac"]  # fmt: skip
    for status in ("done", "kept"):
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        assert [(row["status"], row["preview"]) for row in rows] == [
            (status, f"maps/s{i}_labels_preview.png") for i in range(3)
        ]
        assert [row["output"] for row in rows] == [f"maps/s{i}_labels.tif" for i in range(3)]


def test_an_engine_that_no_worker_has(scheduler: str, small_engine_path: Path, tmp_path: Path) -> None:
    scene = str(write_raster(tmp_path / "s.tif", noise(80, 90)))
    ref = engine_ref(small_engine_path, worker_folder=str(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match=r"no worker can do this: .*no engine in .*nowhere was built from"):
        segment_many([scene], [tmp_path / "maps" / "map.tif"], DaskPool(scheduler), ref, report_path=Path("r.json"))
    assert json.loads(Path("r.json").read_text())["totals"]["done"] == 0
    assert not (tmp_path / "maps").exists()


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="needs the [dask] extra")
    monkeypatch.setattr("cdkd_edge.segmentation.dask._CONNECT_S", 0.3)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(FleetError, match="no dask scheduler answers at"), DaskPool(address):
            pass


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"dask\.distributed") as caught, DaskPool("tcp://127.0.0.1:9"):
        pass
    assert caught.value.hint == "pip install 'cdkd-edge[dask]'"


# --- who gets which job, with workers that are simulated --------------------------------------------


class Simulated(DaskPool):
    """A pool whose workers are functions: job to report, or None for a worker that dies of it."""

    def __init__(self, workers: dict[str, Any], patience: float = 0.05) -> None:
        super().__init__("simulated", patience=patience)
        self.workers = workers
        self.given: list[tuple[str, str, int]] = []
        self._client = self

    def subscribe_topic(self, *_: Any) -> None:
        pass

    def _living(self) -> dict[str, str]:
        return dict.fromkeys(self.workers, "running")

    def submit(self, function: Any, run: str, index: int, payload: str, *, workers: list[str], **_: Any) -> Any:
        (address,) = workers
        job = decode(payload, Job)
        self.given.append((address, Path(job.scene).name, job.attempt))
        future: Any = Future()
        future.status = "pending"
        report = self.workers[address](job)
        if report is None:
            del self.workers[address]
            self._events.put({"index": -1, "attempt": 0})  # so that it looks again at once
        else:
            future.status = "finished"
            future.set_result(encode(report))
        return future


def done(job: Job) -> JobReport:
    return JobReport(job.scene, job.output, "done", attempts=job.attempt)


def dies(job: Job) -> None:
    return None


def of_engine(job: Job) -> JobReport:
    return JobReport.failed(job, EngineError("the GPU fell off the bus"))


def refuses(job: Job) -> JobReport:
    return JobReport.failed(job, FleetError("not here"), reach=Reach.WORKER)


REF = EngineRef("fake.onnx", "fake", "fp32", "fake", "ab" * 32, "cd" * 32)


def answers(pool: DaskPool, count: int = 4, observer: RunObserver | None = None) -> dict[str, Answer]:
    jobs = [Job(f"s{index}.tif", f"maps/s{index}.tif", REF) for index in range(count)]
    collected: dict[str, Answer] = {}
    for answer in pool.answers(jobs, observer or RunObserver()):
        name = answer.report.scene
        assert name not in collected, "one answer each"
        collected[name] = answer
    assert sorted(collected) == [job.scene for job in jobs]
    return collected


def statuses(found: dict[str, Answer]) -> list[str]:
    return [found[name].report.status for name in sorted(found)]


def test_a_job_goes_to_another_worker_when_one_dies() -> None:
    pool = Simulated({"a": dies, "b": done})
    found = answers(pool)
    assert statuses(found) == ["done"] * 4
    assert found["s0.tif"].report.attempts == 2
    assert pool.given.count(("b", "s0.tif", 2)) == 1


def test_a_job_that_kills_three_workers_is_not_given_to_a_fourth() -> None:
    def poisoned(job: Job) -> JobReport | None:
        return None if job.scene.endswith("s1.tif") else done(job)

    pool = Simulated(dict.fromkeys("abcde", poisoned))
    found = answers(pool)
    assert statuses(found) == ["done", "failed", "done", "done"]
    error = found["s1.tif"].report.error
    assert error is not None
    assert "3 workers were lost" in error.message
    assert (error.exit_code, found["s1.tif"].report.attempts) == (18, 3)
    assert len(pool.workers) == 2


def test_a_worker_that_cannot_is_asked_once() -> None:
    pool, observer = Simulated({"a": refuses, "b": done}), Notes()
    found = answers(pool, observer=observer)
    assert statuses(found) == ["done"] * 4
    assert [address for address, _, _ in pool.given].count("a") == 1
    assert all(answer.report.attempts == 1 for answer in found.values()), "a refusal is no attempt"
    assert observer.notes == ["no more scenes for the worker a: not here"]


def test_a_worker_whose_engine_fails_twice_gets_no_more() -> None:
    pool = Simulated({"a": of_engine, "b": done})
    found = answers(pool, 6)
    assert statuses(found) == ["done"] * 6
    assert [address for address, _, _ in pool.given].count("a") == 2


def test_a_scene_on_which_every_engine_fails_is_that_scenes_failure() -> None:
    def picky(job: Job) -> JobReport:
        return of_engine(job) if job.scene.endswith("s2.tif") else done(job)

    found = answers(Simulated(dict.fromkeys("ab", picky)), 6)
    assert statuses(found) == ["done", "done", "failed", "done", "done", "done"]
    error = found["s2.tif"].report.error
    assert error is not None
    assert (error.reach, error.exit_code) == ("scene", 9)


def test_when_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.segmentation.dispatch._CHECK_EVERY_S", 0.1)
    with pytest.raises(FleetError, match=r"no worker for 0\.05 s"):
        answers(Simulated({"a": dies}))
    with pytest.raises(EngineError, match="no worker can do this: not here"):
        answers(Simulated({"a": refuses, "b": refuses}))


# --- on a worker ------------------------------------------------------------------------------------


def silent(done: int, total: int) -> None:
    pass


def answer_of(engine: WorkerEngine, job: Job) -> JobReport:
    return decode(engine.answer(job, silent), JobReport)


@pytest.fixture
def job(small_engine_path: Path, tmp_path: Path) -> Job:
    scene = write_raster(tmp_path / "s.tif", noise(70, 90))
    return Job(str(scene), str(tmp_path / "map.tif"), engine_ref(small_engine_path, threads=1), scene_is_file=True)


def test_a_worker_loads_its_engine_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(load_engine(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(worker_module, "load_engine", load)
    worker = WorkerEngine()
    for number in range(3):
        report = answer_of(worker, dataclasses.replace(job, output=f"{number}.tif"))
        assert report.status == "done", report.error
    assert len(loaded) == 1
    assert report.engine_sha256 == job.engine.sha256
    answer_of(worker, dataclasses.replace(job, engine=dataclasses.replace(job.engine, threads=2), overwrite=True))
    assert len(loaded) == 2
    assert loaded[0]._session is None, "there is room for one engine"
    worker.release()


def test_an_engine_that_failed_is_loaded_anew(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerEngine()
    first = worker.load(job.engine)
    monkeypatch.setattr(first, "launch", lambda slot: (_ for _ in ()).throw(EngineError("fell off the bus")))
    error = answer_of(worker, job).error
    assert error is not None
    assert error.reach == Reach.ENGINE
    assert worker.load(job.engine) is not first
    assert answer_of(worker, job).status == "done"
    worker.release()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: {"tool": "9.9"}, "has cdkd-edge .*; the run needs 9.9"),
        (lambda job: {"token": "/nowhere/.token"}, "does not see /nowhere"),
        (lambda job: {"scene": "gone.tif"}, "does not see the scene gone.tif"),
        (lambda job: {"engine": dataclasses.replace(job.engine, sha256="00" * 32)}, "is another engine"),
        (lambda job: {"engine": dataclasses.replace(job.engine, path="gone.onnx")}, "does not exist"),
    ],
)
def test_what_a_worker_refuses(job: Job, change: Any, message: str) -> None:
    report = answer_of(WorkerEngine(), dataclasses.replace(job, **change(job)))
    assert report.error is not None
    assert report.error.reach == Reach.WORKER
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(report.error.message)
    assert not Path(job.output).exists()


def test_a_worker_finds_its_own_engine(job: Job, small_engine_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    own = dataclasses.replace(job.engine, sha256=None, folder="engines")
    with pytest.raises(EngineError, match=r"no engine in .*engines was built from the fp32 graph of small"):
        engine_path(own)
    for path in (small_engine_path, small_engine_path.with_suffix(".json")):
        shutil.copy(path, folder / path.name.replace("small", "board"))
    (folder / "junk.onnx").write_text("junk")
    assert engine_path(own).name == "board.fp32.cpu.onnx"
    assert answer_of(WorkerEngine(), dataclasses.replace(job, engine=own)).status == "done"
    for path in (small_engine_path, small_engine_path.with_suffix(".json")):
        shutil.copy(path, folder / path.name)
    with pytest.raises(EngineError, match="were all built from"):
        engine_path(own)


def test_a_run_that_was_stopped_leaves_nothing(job: Job, tmp_path: Path) -> None:
    progress = send_progress(silent, lambda: require_running("that run"))
    worker = WorkerEngine()
    stop_run("that run")
    report = decode(worker.answer(job, progress), JobReport)
    assert report.status == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["s.tif"]
    worker.release()


def test_failures_of_both_sides_are_told_apart() -> None:
    assert Failure.of(FleetError("x"), Reach.WORKER).reach == Reach.WORKER
    assert Failure.of(CdkdEdgeError("x")).reach == "scene"
