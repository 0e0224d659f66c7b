"""A run that was killed at any step, by any means, ends as it would have ended; so do other ways to the same steps."""

from __future__ import annotations

import json
import signal
import time

import pytest

torch = pytest.importorskip("torch")

from commands import assert_answer, run, start  # noqa: E402
from distill_helpers import (  # noqa: E402
    FEATURES,
    MASKED,
    assert_nearly_identical,
    distilled,
    identical,
    write_encoder,
    write_network,
    write_sam,
    write_scenes,
)
from training_helpers import CONFIG, write_dataset  # noqa: E402

from cdkd_edge.distillation import distill as module  # noqa: E402
from cdkd_edge.distillation import schedule  # noqa: E402
from cdkd_edge.distillation.distiller import Distiller  # noqa: E402
from cdkd_edge.distillation.metrics_log import read_log  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

STEPS = 14


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick(monkeypatch)


def quick(patch):
    """Nothing waits for the disk, and a schedule goes through all its stages in a few steps."""
    patch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)
    patch.setattr(schedule, "LEAST_STEPS", 4)
    patch.setattr(schedule, "MIDDLE_BELOW", 9.0)
    patch.setattr(schedule, "LATE_ABOVE", 0.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_weights):
    return write_encoder(tmp_path_factory.mktemp("plain") / "plain.pt", make_weights(CONFIG, seed=1))


@pytest.fixture(scope="module")
def masked(scenes, plain):
    """Words of a run with SAM, with all that a state has to hold. An epoch is 4 steps of 2 passes; 2 tiles are over."""
    sam = write_sam(plain.with_name("sam.pth"))
    more = ("--steps", STEPS, "--batch", 2, "--accumulate", 2, "--mean-decay", 0.8, "--schedule", "cosine")
    return ("distill", scenes, "--teacher", sam, "--student", plain, *MASKED, *more)


@pytest.fixture(scope="module")
def features(plain, make_weights, scenes):
    teacher = write_network(plain.with_name("teacher.pt"), make_weights(CONFIG))
    student = plain.with_name("student.pt")
    assert run("convert", teacher, "--attention", "window4/pooled2@1,3", "-o", student).exit_code == 0
    return ("distill", scenes, "--teacher", teacher, "--student", student, *FEATURES, "--steps", STEPS)


@pytest.fixture(scope="module")
def finished(masked, features, tmp_path_factory):
    """Whole runs: their outputs and records."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        found = {}
        for name, words in (("masked", masked), ("features", features)):
            output = tmp_path_factory.mktemp(name) / "out.pt"
            found[name] = output, distilled(*words[1:], "-o", output)
    return found


def assert_same_run(output, finished):
    """Weights, best file, table, history and transitions are those of the run that nothing disturbed."""
    theirs, record = finished
    assert identical(output, theirs)
    ours, other = (path.with_name("out.best.pt") for path in (output, theirs))
    assert ours.exists() == other.exists()
    assert not ours.exists() or identical(ours, other)
    tables = [read_log(path.with_name("out.steps.csv")) for path in (output, theirs)]
    for table in tables:
        for row in table:
            row["seconds"] = row["waited"] = ""
    assert tables[0] == tables[1]
    result = json.loads(run("info", output, "--json").stdout)["training"]["distilled"]
    for name in ("before", "after", "transitions"):
        assert result[name] == record[name]
    assert result["run"]["history"] == record["run"]["history"]
    assert not output.with_name("out.state.pt").exists()


def interrupt(patch, step, number=signal.SIGINT):
    """A signal in the middle of a step."""
    real = Distiller.loss

    def loss(self, *batch):
        found = real(self, *batch)
        if self.progress.step == step - 1:
            signal.raise_signal(number)
        return found

    patch.setattr(Distiller, "loss", loss)


def test_the_undisturbed_run_goes_through_all_stages(finished):
    assert [one["stage"] for one in finished["masked"][1]["transitions"]] == ["middle", "late"]


@pytest.mark.parametrize(
    ("method", "step", "number"),
    [
        ("masked", 1, signal.SIGINT),
        ("masked", 4, signal.SIGTERM),  # the last of an epoch, and a stage changes
        ("masked", 7, signal.SIGINT),
        ("features", 6, signal.SIGINT),  # the last of an epoch
        ("features", STEPS, signal.SIGINT),
    ],
)
def test_a_run_that_got_a_signal_resumes(request, method, step, number, finished, tmp_path, monkeypatch):
    words = (*request.getfixturevalue(method), "-o", tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        interrupt(patch, step, number)
        result = run(*words)
    assert result.exit_code == 128 + number, (result.stderr, result.exception)
    assert f"the run is kept in {tmp_path / 'out.state.pt'}" in result.stderr
    assert torch.load(tmp_path / "out.state.pt")["progress"]["step"] == step  # a step that has begun is finished
    assert not (tmp_path / "out.pt").exists()
    assert_answer(run(*words), 2, "holds an unfinished run.*--resume")
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_run(tmp_path / "out.pt", finished[method])


def test_a_run_that_was_interrupted_while_it_compared_resumes(masked, finished, tmp_path, monkeypatch):
    real = Distiller.compare

    def compare(self):
        if self.progress.step == 6:
            raise KeyboardInterrupt
        return real(self)

    words = (*masked, "-o", tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "compare", compare)
        assert run(*words).exit_code == 130
    result = run(*words, "--resume")
    assert result.exit_code == 0
    assert_same_run(tmp_path / "out.pt", finished["masked"])
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 6/")
    assert " left" not in lines[0]  # no step yet by which time could be told
    assert " left" in lines[1]


def test_an_error_at_any_step_leaves_the_last_state(masked, finished, tmp_path, monkeypatch):
    """Rows that were written after the state was are written once."""
    real = module._Distilling._save_state
    monkeypatch.setattr(module._Distilling, "_row_is_due", lambda self: self.distiller.progress.step == STEPS)
    monkeypatch.setattr(
        module._Distilling,
        "_save_state",
        lambda self: real(self) if self.distiller.progress.step in (3, STEPS) else self.log.flush(),
    )
    monkeypatch.setattr(module, "_SAVE_STATE_EVERY_S", -1.0)
    words = (*masked, "-o", tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        real_loss = Distiller.loss

        def loss(self, *batch):
            if self.progress.step == 8:
                raise MemoryError
            return real_loss(self, *batch)

        patch.setattr(Distiller, "loss", loss)
        assert run(*words).exit_code != 0
    assert len(read_log(tmp_path / "out.steps.csv")) == 8
    assert torch.load(tmp_path / "out.state.pt")["progress"]["step"] == 3
    assert run(*words, "--resume").exit_code == 0
    assert identical(tmp_path / "out.pt", finished["masked"][0])
    assert [int(row["step"]) for row in read_log(tmp_path / "out.steps.csv")] == list(range(1, STEPS + 1))


def test_a_killed_process_resumes(features, finished, tmp_path):
    """SIGKILL, which nothing can catch."""
    words = (*features, "-o", tmp_path / "out.pt")
    process = start(*words)
    try:
        ends = time.monotonic() + 300
        for line in process.stderr:
            if line.startswith("step 5/") or time.monotonic() > ends:
                break
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "out.pt").exists()
    assert torch.load(tmp_path / "out.state.pt")["progress"]["step"] >= 5
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_run(tmp_path / "out.pt", finished["features"])


def test_notes_of_the_first_part_are_in_the_card(masked, tmp_path, monkeypatch):
    monkeypatch.setattr(Distiller, "oddities", lambda self, before, now: {"odd": f"step {self.progress.step}: odd"})
    words = (*masked, "-o", tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert run(*words).exit_code == 130
    result = run(*words, "--resume", "--json")
    notes = json.loads(result.stdout)["distilled"]["notes"]
    assert [note for note in notes if "odd" in note] == ["step 1: odd"]
    assert "note: step" not in result.stderr  # said once


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_reads_the_same(masked, finished, tmp_path, workers):
    distilled(*masked[1:], "-o", tmp_path / "out.pt", "--workers", workers)
    assert_same_run(tmp_path / "out.pt", finished["masked"])


@pytest.mark.parametrize("batches", [((4, 1), (1, 4)), ((32, 1), (4, 8))], ids=["whole", "fewer tiles than a step"])
def test_passes_make_the_step_of_a_larger_batch(masked, plain, tmp_path, batches):
    """In the second pair, the 18 tiles are one pass, and passes of 4, 4, 4, 4 and 2."""
    found = []
    for index, (batch, passes) in enumerate(batches):
        output = tmp_path / f"{index}.pt"
        more = ("--batch", batch, "--accumulate", passes, "--steps", 3, "--mean-decay", 0, "--lr", 3e-4)
        distilled(*masked[1:], *more, "-o", output)
        found.append(read_log(tmp_path / f"{index}.steps.csv"))
    assert_nearly_identical(tmp_path / "0.pt", tmp_path / "1.pt", plain)
    for mine, theirs in zip(*found, strict=True):
        for name in ("loss", "distillation", "teacher_pixels", "student_pixels", "missed_1", "ratio"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name


def test_the_rate_is_for_four_tiles_a_step(masked, tmp_path):
    rates = []
    for batch, passes in ((4, 1), (2, 4)):
        more = ("--batch", batch, "--accumulate", passes, "--steps", 1, "--lr", 0.001)
        distilled(*masked[1:], *more, "-o", tmp_path / f"{batch}.pt")
        rates.append(float(read_log(tmp_path / f"{batch}.steps.csv")[0]["learning_rate"]))
    assert rates == [0.001, 0.002]


def test_a_state_of_another_run_is_refused(masked, scenes, plain, tmp_path, monkeypatch):
    words = (*masked, "-o", tmp_path / "out.pt")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(*words).exit_code == 130
    again = (*words, "--resume")
    assert_answer(run(*again, "--lr", 0.1), 2, "other recipe: learning_rate was 0.002, now 0.1")
    answer = run(*again, "--norm-eps", 1e-5)
    assert_answer(answer, 2, "other teacher's settings: layer_norm_eps was None, now 1e-05")
    assert_answer(run(*again, "--weights", "raw"), 2, "other teacher's settings")
    data = write_dataset(tmp_path / "data", {"a_0": (64, 64), "b_0": (64, 64)})
    probe = ("--probe", data, "--schema", "dubai", "--val-scenes", "b")
    assert_answer(run(*again, *probe), 2, "with other probe")
    assert_answer(run("distill", scenes / "a.tif", *again[2:]), 2, "with other images")
    (tmp_path / "out.state.pt").write_bytes(b"no state")
    assert_answer(run(*again), 3, "out.state.pt cannot be read.*--overwrite")
    assert run(*words, "--overwrite").exit_code == 0
    assert_answer(run(*again), 2, "is finished; there is nothing to resume")
