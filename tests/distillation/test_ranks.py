"""Two processes make the steps that one makes with the same global batch, and resume as one does (gloo, CPU)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from distill_helpers import MASKED, assert_nearly_identical, distilled, write_encoder, write_sam, write_scenes  # noqa: E402
from traced_distill import TracedDistilling, quick_stages  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.core.errors import UsageError  # noqa: E402
from cdkd_edge.distillation import distill as module  # noqa: E402
from cdkd_edge.distillation.metrics_log import read_log  # noqa: E402
from cdkd_edge.training.ranks import Ranks  # noqa: E402

pytestmark = [
    pytest.mark.needs_torch,
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without its distributed part"),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def words(tmp_path_factory, make_weights):
    folder = tmp_path_factory.mktemp("run")
    (folder / "scenes").mkdir()
    plain = write_encoder(folder / "plain.pt", make_weights(CONFIG, seed=1))
    sam = write_sam(folder / "sam.pth")
    return (write_scenes(folder / "scenes"), "--teacher", sam, "--student", plain, *MASKED, "--schedule", "cosine")


def torchrun(*words, **environment):
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
    )


def assert_same_table(one, other):
    ours, theirs = read_log(one), read_log(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine["stage"], mine["learning_rate"]) == (its["stage"], its["learning_rate"])
        for name in ("loss", "distillation", "teacher_pixels", "student_pixels", "missed_2", "ratio"):
            assert float(mine[name]) == pytest.approx(float(its[name]), rel=1e-4), name


def test_two_processes_make_the_steps_of_one(words, tmp_path, monkeypatch):
    """With accumulation; the schedule changes in the same steps in both. Only the first process writes and prints."""
    steps = ("--steps", 6, "--lr", 3e-4)
    two = torchrun(
        *(ROOT / "tests" / "helpers" / "traced_distill.py", "distill", *words, *steps),
        *("--batch", 2, "--accumulate", 2, "-o", tmp_path / "two.pt", "--json"),
        TRACES=str(tmp_path),
    )
    quick_stages(monkeypatch.setattr)
    monkeypatch.setattr(module, "_Distilling", TracedDistilling)
    (tmp_path / "one").mkdir()
    monkeypatch.setenv("TRACES", str(tmp_path / "one"))
    record = distilled(*words, *steps, "--batch", 8, "-o", tmp_path / "one.pt")
    out, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    found = json.loads(out)["distilled"]
    assert (found["run"]["processes"], record["run"]["processes"]) == (2, 1)
    assert errors.count("step 6/6") == 1
    traces = [json.loads((tmp_path / name).read_text()) for name in ("0.json", "1.json", "one/0.json")]
    assert traces[0] == traces[1]
    stages = [[(row["stage"], row["step"]) for row in trace["schedule"]["transitions"]] for trace in traces]
    assert stages[0] == stages[1] == stages[2] == [("middle", 2), ("late", 4)]
    assert_nearly_identical(tmp_path / "one.pt", tmp_path / "two.pt", words[4])
    assert_same_table(tmp_path / "one.steps.csv", tmp_path / "two.steps.csv")
    assert [row["step"] for row in found["run"]["history"]] == [row["step"] for row in record["run"]["history"]]


def test_two_processes_that_got_a_signal_resume(words, tmp_path):
    words = (*words, "--steps", 16)
    command = ("-m", "cdkd_edge", "distill", *words, "--batch", 2, "-o", tmp_path / "two.pt")
    first = torchrun(*command)
    ends = time.monotonic() + 300
    for line in first.stderr:
        if line.startswith("step 4/") or time.monotonic() > ends:
            break
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode != 0
    assert errors.count("interrupted; the run is kept in") == 1, errors
    assert torch.load(tmp_path / "two.state.pt")["progress"]["step"] < 16
    second = torchrun(*command, "--resume")
    distilled(*words, "--batch", 4, "-o", tmp_path / "one.pt")
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert "step 2/16" not in errors, "it goes on"
    assert_nearly_identical(tmp_path / "one.pt", tmp_path / "two.pt", words[4])
    assert_same_table(tmp_path / "one.steps.csv", tmp_path / "two.steps.csv")


def test_processes_with_other_options_are_an_error(monkeypatch):
    """One of three has another value."""

    def largest_of_all(ends, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        ends.copy_(torch.maximum(ends, torch.tensor(others)))

    monkeypatch.setattr(torch.distributed, "all_reduce", largest_of_all)
    ranks = Ranks(1, 3)
    others = [-(1 << 60), -(1 << 60)]
    ranks.require_same("a", "options", torch.device("cpu"))
    others = [1 << 60, -1]
    with pytest.raises(UsageError, match="do not have the same options"):
        ranks.require_same("a", "options", torch.device("cpu"))
    Ranks().require_same("a", "options", torch.device("cpu"))
