"""Logs of tegrastats: as JetPack 4 to 7 write them, damaged, of other boards; the right joules, within their bounds."""

from __future__ import annotations

import datetime
import itertools
import json

import pytest
from commands import assert_answer, assert_wrong_usage, run

from cdkd_edge.benchmark.power_record import record_of_log
from cdkd_edge.board.power.tegrastats import read_log
from cdkd_edge.core.errors import PowerError, UsageError

BEGIN = datetime.datetime(2026, 11, 30, 13, 26, 1)
REST = "SWAP 1243/3810MB (cached 5MB) CPU [19%@729,14%@729,off] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] NVDEC off APE 200"
HEAT = "cpu@46.531C soc2@47.312C tj@48.843C"
FORMS = {
    "JetPack 6": "{0}mW/{1}mW",
    "JetPack 7": "{0}mW/{1}mW/{1}mW",
    "JetPack 4": "{0}/{1}",
}


def line(watts, form="JetPack 6", rails=("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")):
    """A line whose averages are nonsense: they must never count."""
    shown = " ".join(
        f"{rail} {FORMS[form].format(round(1000 * watts / number), 77_777)}" for number, rail in enumerate(rails, 1)
    )
    return f"RAM 2461/15656MB (lfb 3x2MB) {REST} {HEAT} {shown}"


def stamp(seconds):
    return f"{BEGIN + datetime.timedelta(seconds=seconds):%m-%d-%Y %H:%M:%S} "


def log_of(tmp_path, *lines):
    path = tmp_path / "tegrastats.log"
    path.write_text("\n".join(lines) + "\n")
    return path


def pattern(moment):
    """Watts: idle for 10 s, a load of 20 s with a step in it, idle."""
    return 6.0 if not 10 <= moment < 30 else 18.0 if moment < 21.3 else 15.0


@pytest.mark.parametrize("form", FORMS)
def test_the_first_value_of_a_rail_counts_in_every_release(tmp_path, form):
    log = read_log(log_of(tmp_path, *(stamp(n) + line(7.5, form) for n in range(10))))
    assert log.trace.source.rails == ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    assert all(sample.values == {"VDD_IN": 7.5, "VDD_CPU_GPU_CV": 3.75, "VDD_SOC": 2.5} for sample in log.trace.samples)
    assert log.trace.problems == ()
    record, _, _ = record_of_log(log)
    assert record.rails["VDD_IN"].joules == pytest.approx(9 * 7.5)
    assert record.rails["VDD_IN"].bound_joules == pytest.approx(7.5), "the length may be wrong by a second"
    assert record.rails["VDD_IN"].bound_watts == 0


@pytest.mark.parametrize("pace", [0.05, 0.1003, 0.25, 0.7, 1.0, 1.007, 2.5])
@pytest.mark.parametrize("phase", [0.0, 0.45, 0.97])
def test_joules_lie_within_their_bound_whatever_the_pace(tmp_path, pace, phase):
    moments = list(itertools.takewhile(lambda moment: moment < 40, (n * pace for n in range(1000))))
    log = read_log(log_of(tmp_path, *(stamp(phase + moment) + line(pattern(moment)) for moment in moments)))
    (record, _, _), rail = record_of_log(log), "VDD_IN"
    truth = 40 * 6 + 11.3 * 12 + 8.7 * 9 - 6 * (40 - moments[-1])
    found = record.rails[rail]
    assert abs(found.joules - truth) <= found.bound_joules
    assert found.bound_joules < 0.09 * truth * max(1, pace)
    assert record.seconds == pytest.approx(moments[-1], abs=1)
    for sample, moment in zip(log.trace.samples, moments, strict=True):
        error = sample.time - moment - (log.trace.samples[0].time - moments[0])
        assert abs(error) <= sample.uncertainty + log.trace.samples[0].uncertainty + 1e-6


def test_idle_power_at_the_beginning_gives_net_energy(tmp_path):
    path = log_of(tmp_path, *(stamp(n / 10) + line(pattern(n / 10)) for n in range(300)))
    record, span, idle = record_of_log(read_log(path), 9.0)
    assert (idle, span[0]) == ((0.0, 9.0), 9.0)
    rail = record.rails["VDD_IN"]
    assert rail.idle_watts == pytest.approx(6.0)
    assert rail.net_joules == pytest.approx(11.3 * 12 + 8.7 * 9, abs=rail.net_bound_joules)
    assert rail.net_bound_joules < 0.04 * rail.net_joules
    for wrong in (-1.0, 1000.0, float("nan")):
        with pytest.raises(UsageError, match=r"--idle must be 0 or more, and less than the log's 29\.9"):
            record_of_log(read_log(path), wrong)


def test_without_date_stamps_the_interval_is_asked_for(tmp_path):
    path = log_of(tmp_path, *(line(pattern(n / 5)) for n in range(200)))
    with pytest.raises(UsageError, match="has no date stamps") as caught:
        read_log(path)
    assert "--interval SECONDS" in caught.value.hint
    log = read_log(path, 0.2)
    assert (log.stamped, log.slack, log.trace.stop) == (False, 0.0, pytest.approx(39.8))
    assert [problem.message for problem in log.trace.problems] == [
        "every line is taken to be 0.2 s after the one before, as --interval says"
    ]
    found = record_of_log(log)[0].rails["VDD_IN"]
    assert found.joules == pytest.approx(39.8 * 6 + 11.3 * 12 + 8.7 * 9, abs=found.bound_joules)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--interval must be a positive number"):
            read_log(path, wrong)


def test_date_stamps_count_more_than_an_interval_that_contradicts_them(tmp_path):
    path = log_of(tmp_path, *(stamp(n) + line(6) for n in range(10)))
    assert read_log(path, 1.0).trace.problems == ()
    log = read_log(path, 0.1)
    assert log.trace.stop == pytest.approx(9)
    assert "lines every 1 s, not 0.1 s; they were taken" in log.trace.problems[0].message


def test_a_log_of_two_seconds_does_not_tell_its_pace(tmp_path):
    path = log_of(tmp_path, *(stamp(0.7 + n / 10) + line(6) for n in range(9)))
    with pytest.raises(UsageError, match="less than three seconds"):
        read_log(path)
    assert read_log(path, 0.1).trace.stop == pytest.approx(0.8)


def test_a_pause_is_a_gap_and_leaves_no_joules(tmp_path):
    moments = [*range(20), *range(60, 80)]
    record, _, _ = record_of_log(read_log(log_of(tmp_path, *(stamp(moment) + line(6) for moment in moments))))
    rail = record.rails["VDD_IN"]
    assert (rail.joules, rail.watts) == (None, pytest.approx(6.0))
    assert rail.reason.startswith("only 48.")


def test_lines_that_are_no_readings_are_counted_and_named(tmp_path):
    lines = [stamp(n) + line(6) for n in range(30)]
    lines.insert(4, "Segmentation fault")
    lines.insert(9, "\x1b[31mnvbufsurface: 17\x00")
    lines[20] = lines[20].replace("VDD_IN 6000mW", "VDD_IN 99999999mW")  # more than the chip can measure
    lines[-1] = lines[-1][: lines[-1].index("VDD_IN 60") + 10]  # the board lost its power here
    lines.append("")
    log = read_log(log_of(tmp_path, *lines))
    assert (log.lines, log.other_lines) == (30, 2)
    assert [problem.message for problem in log.trace.problems] == [
        "lines that tegrastats did not write: 2, the first is line 5",
        "lines without VDD_IN: 2, the first is line 21",
    ]
    assert record_of_log(log)[0].rails["VDD_IN"].watts == pytest.approx(6.0)


def test_lines_without_the_date_that_others_have(tmp_path):
    lines = [stamp(n) + line(6) for n in range(10)]
    lines[3] = lines[3].replace("11-30-2026", "13-45-2026")
    log = read_log(log_of(tmp_path, *lines))
    assert [problem.message for problem in log.trace.problems] == [
        "lines without a date stamp, which were passed over: 1"
    ]
    assert log.trace.stop == pytest.approx(9)


@pytest.mark.parametrize(
    ("rails", "said"),
    [
        (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "only VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0, which do not add"),
        (("POM_5V_IN", "POM_5V_GPU"), "has no VDD_IN, the power of the whole module: only POM_5V_IN, POM_5V_GPU"),
        ((), "names no rail with its power"),
    ],
    ids=["AGX Orin", "Nano", "without the right to read"],
)
def test_a_log_without_the_power_of_the_module_is_refused(tmp_path, rails, said):
    with pytest.raises(PowerError, match=said):
        read_log(log_of(tmp_path, *(stamp(n) + line(6, rails=rails) for n in range(10))))


def test_what_is_no_log(tmp_path):
    path = log_of(tmp_path, "time_s,watts", "1,2")
    with pytest.raises(PowerError, match="is no log of tegrastats; line 1 is 'time_s,watts'"):
        read_log(path)
    path.write_text("")
    with pytest.raises(PowerError, match="is no log of tegrastats, it is empty"):
        read_log(path)
    path.write_bytes(b"\x7fELF\x00\xff\xfe" * 100)
    with pytest.raises(PowerError, match="is no log of tegrastats; line 1 is 'ELF"):
        read_log(path)
    with pytest.raises(PowerError, match="too short: readings of VDD_IN: 2, needed: 3"):
        read_log(log_of(tmp_path, stamp(0) + line(6), stamp(1) + line(6)))


def test_two_logs_in_one_file(tmp_path):
    moments = [0, 1, 2, 3, -3600, -3599, -3598]
    with pytest.raises(PowerError, match=r"line 5 of .* is stamped 3603 s before the line above it"):
        read_log(log_of(tmp_path, *(stamp(moment) + line(6) for moment in moments)))


def test_the_command(tmp_path):
    path = log_of(tmp_path, "hello", *(stamp(n / 10) + line(pattern(n / 10)) for n in range(300)))
    result = run("power", "--import", path, "--idle", 9, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "lines that tegrastats did not write: 1, the first is line 1" in result.stdout
    assert "whether tegrastats averages between two lines is not documented" in " ".join(result.stdout.split())
    assert "net J" in result.stdout
    document = json.loads(run("power", "--import", path, "--idle", 9, "--json").stdout)
    assert document == json.loads((tmp_path / "out" / "power.json").read_text())
    assert document["log"] == {"path": str(path), "lines": 300, "other_lines": 1, "stamped": True}
    rows = (tmp_path / "out" / "trace.csv").read_text().splitlines()
    assert rows[0] == "time_s,uncertainty_s,repeat,phase,VDD_IN_w,VDD_CPU_GPU_CV_w,VDD_SOC_w"
    assert len(rows) == 301
    assert rows[1].split(",")[3:5] == ["idle", "6.000000"]
    assert rows[-2].split(",")[3:5] == ["load", "15.000000"]


def test_the_command_refuses(tmp_path):
    path = log_of(tmp_path, *(line(6) for _ in range(10)))
    assert_answer(run("power", "--import", path), 2, "--interval SECONDS")
    assert_answer(run("power", "--import", tmp_path / "none"), 12, "No such file")
    assert_answer(run("power", "--import", log_of(tmp_path, "x")), 16, "no log of tegrastats")
    assert_answer(run("power", "--import", path, "--run", "true"), 2, "choose one of --run and --import")
    assert_answer(run("power", "--import", path, "--source", "rapl"), 2, "means nothing to --import")
    assert_wrong_usage(run("power", "--import", path, "--seconds", "x"), "must be a number")
