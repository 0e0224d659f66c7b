"""The table of a run: one row a step, also after a run was killed and resumed; and its picture."""

from __future__ import annotations

import csv

import pytest
from PIL import Image

from cdkd_edge.distillation.metrics_log import MetricsLog, curves_path, log_path, read_log, write_curves


def row(step, **more):
    measures = {"loss": 1 / step, "distillation": 0.5, "teacher_pixels": 0.25, "student_pixels": 2.0, "classes": 0.0}
    weights = {f"weight_{name}": 0.2 for name in ("distillation", "teacher_pixels", "student_pixels", "classes")}
    pairs = {"missed_1": 0.5, "missed_2": 0.6, "spread_1": 1.0, "spread_2": 0.9}
    rest = {"epoch": 0, "seconds": 1.5 * step, "learning_rate": 1e-5, "ratio": 0.125, "stage": "early", "waited": 0.0}
    return {"step": step, **measures, **weights, **pairs, **rest, **more}


def written(path, steps, *, resumed=0, pairs=2):
    log = MetricsLog(path, pairs, resumed)
    for step in steps:
        log.add(row(step))
    log.flush()
    return log


def steps_of(path):
    return [int(one["step"]) for one in read_log(path)]


def test_the_table_has_every_measure_of_every_step(tmp_path):
    written(tmp_path / "a.csv", range(1, 46))
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(one["step"]) for one in rows] == [*range(1, 46)]
    assert rows[2] == {
        name: format(value, ".6g") if isinstance(value, float) else str(value)
        for name, value in row(3).items()
        if name != "weight_classes"
    }
    assert rows[2]["loss"] == "0.333333"
    assert rows == read_log(tmp_path / "a.csv")


def test_a_table_that_was_taken_away_or_changed_does_not_end_the_run(tmp_path):
    path = tmp_path / "a.csv"
    log = written(path, range(1, 4))
    path.unlink()
    log.add(row(4))
    log.flush()
    assert steps_of(path) == [4]
    whole = path.read_text("utf-8")
    path.write_text(
        whole + "5,0,1\n" + "\0" * 9 + "\n" + whole.splitlines()[1].replace("4", "x", 1) + "\n" + "6,0", "utf-8"
    )
    assert steps_of(path) == [4]
    for text in ("", "4,0,6,1e-05\n", "step;epoch\n4;0\n"):
        path.write_text(text, "utf-8")
        assert read_log(path) == []
        write_curves(read_log(path), [], tmp_path / "a.png")
        assert steps_of(written(path, [6], resumed=5).path) == [6]


def test_what_a_method_lacks_is_empty(tmp_path):
    log = MetricsLog(tmp_path / "a.csv", 0, 0)
    log.add(row(1, ratio=None, stage=""))
    log.flush()
    (found,) = read_log(tmp_path / "a.csv")
    assert (found["ratio"], found["stage"]) == ("", "")
    assert not [name for name in found if name.startswith(("missed", "spread"))]


def test_rows_are_on_the_disk_after_a_few_steps(tmp_path):
    log = MetricsLog(tmp_path / "a.csv", 2, 0)
    for step in range(1, 26):
        log.add(row(step))
    assert steps_of(tmp_path / "a.csv") == [*range(1, 21)]
    log.flush()
    log.flush()
    assert steps_of(tmp_path / "a.csv") == [*range(1, 26)]


def test_steps_that_are_made_again_are_in_the_table_once(tmp_path):
    """A run was killed at step 30, and resumes from the state of step 12."""
    written(tmp_path / "a.csv", range(1, 31))
    first = read_log(tmp_path / "a.csv")
    written(tmp_path / "a.csv", range(13, 41), resumed=12)
    assert steps_of(tmp_path / "a.csv") == [*range(1, 41)]
    assert read_log(tmp_path / "a.csv")[:30] == first


def test_a_new_run_begins_a_new_table(tmp_path):
    written(tmp_path / "a.csv", range(1, 31))
    written(tmp_path / "a.csv", range(1, 4))
    assert steps_of(tmp_path / "a.csv") == [1, 2, 3]


@pytest.mark.parametrize("lost", [1, 2, 3, 30, 60])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, lost):
    """Also if only the end of its last number is missing."""
    written(tmp_path / "a.csv", range(1, 6))
    whole = (tmp_path / "a.csv").read_text()
    assert len(whole.splitlines()[-1]) > 60
    (tmp_path / "a.csv").write_text(whole[:-lost])
    assert steps_of(tmp_path / "a.csv") == [1, 2, 3, 4]
    written(tmp_path / "a.csv", [5], resumed=4)
    assert (tmp_path / "a.csv").read_text() == whole


def test_there_may_be_no_table(tmp_path):
    assert read_log(tmp_path / "gone.csv") == []
    written(tmp_path / "gone.csv", [8], resumed=7)
    assert steps_of(tmp_path / "gone.csv") == [8]


def test_table_and_picture_lie_beside_the_output(tmp_path):
    assert log_path(tmp_path / "encoder.pth") == tmp_path / "encoder.steps.csv"
    assert curves_path(tmp_path / "encoder.pth") == tmp_path / "encoder.curves.png"


@pytest.mark.parametrize("scheduled", [True, False])
def test_curves_are_drawn(tmp_path, scheduled):
    log = MetricsLog(tmp_path / "a.csv", 2, 0)
    for step in range(1, 301):
        log.add(row(step) if scheduled else row(step, ratio=None, stage=""))
    log.flush()
    changes = [{"stage": "middle", "step": 200, "ratio": 0.84}] if scheduled else []
    write_curves(read_log(log.path), changes, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (975, 675 if scheduled else 450))
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert ((0xD5, 0x5E, 0x00) in colours) == scheduled  # the line at a change of stage


def test_a_run_of_one_step_has_curves(tmp_path):
    written(tmp_path / "a.csv", [1])
    write_curves(read_log(tmp_path / "a.csv"), [], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
