"""The sampling process: real processes on an INA3221 tree, and processes that hang, crash, freeze and babble."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from board import CHIP, HWMON, VOLTS, make_tree, write
from commands import assert_answer, run

import cdkd_edge
from cdkd_edge.board.power.energy import rail_energy
from cdkd_edge.board.power.sampler import PowerSampler, find_source, list_sources
from cdkd_edge.core.errors import PowerError, UsageError

ROOT = str(Path(cdkd_edge.__file__).parents[1])
STARTED = {
    "event": "started", "name": "fake", "scope": "module", "covers": "", "quantity": "watts", "rails": ["a"],
    "total": "a", "interval": 0.1, "source_interval": None, "notes": [],
}  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "sys", (18.95, 9.5, 3.25))


def python(code):
    """A sampling process that is this code."""
    return (sys.executable, "-c", f"import sys, time, os, json\nSTARTED = {STARTED!r}\n{code}")


def say(*lines):
    return "".join(f"print(json.dumps({line}), flush=True)\n" for line in lines)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.01)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the way it is meant --------------------------------------------------------------------------


def test_samples_on_the_clock_of_tile_events(tree):
    before = time.perf_counter()
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        wait_for(lambda: len(sampler.samples) > 60)
        assert sampler.watts() == {"VDD_IN": 18.95, "VDD_CPU_GPU_CV": 9.5, "VDD_SOC": 3.25}
        assert sampler.health() == ()
    trace = sampler.trace()
    assert before < trace.samples[0].time < trace.samples[-1].time < time.perf_counter()
    assert all(0 <= sample.uncertainty < 0.5 for sample in trace.samples)
    energy = rail_energy(trace, "VDD_IN", trace.samples[5].time, trace.samples[55].time)
    assert energy.watts == pytest.approx(18.95)
    assert trace.problems == ()


def test_a_rail_that_disappears_is_said_once_and_the_others_go_on(tree):
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        (tree / HWMON / "curr3_input").unlink()
        wait_for(sampler.health)
        count = len(sampler.samples)
        wait_for(lambda: len(sampler.samples) > count + 50)
        wait_for(lambda: "VDD_SOC" not in sampler.watts())
        write(tree / HWMON / "curr3_input", 650)
        wait_for(lambda: "VDD_SOC" in sampler.watts())
        assert sampler.watts()["VDD_SOC"] == 0.65 * VOLTS
        assert sampler.health() == ("VDD_SOC cannot be read",)
    (problem,) = sampler.trace().problems
    assert problem.kind == "rail"


def test_a_chip_that_disappears_leaves_a_gap(tree):
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        wait_for(lambda: len(sampler.samples) > 5)
        (tree / CHIP).rename(tree / "away")
        wait_for(lambda: any("No such file" in trouble for trouble in sampler.health()))
        time.sleep(0.5)
        (tree / "away").rename(tree / CHIP)
        count = len(sampler.samples)
        wait_for(lambda: len(sampler.samples) > count + 5)
    trace = sampler.trace()
    assert [problem.kind for problem in trace.problems] == ["unreadable"]
    assert sum(gap.seconds for gap in trace.gaps()) > 0.4
    first, last = trace.samples[0].time, trace.samples[-1].time
    energy = rail_energy(trace, "VDD_IN", first, last)
    assert energy.covered < last - first - 0.4
    assert energy.watts == pytest.approx(18.95), "nothing was filled in"


def test_a_sampler_that_never_began_has_no_trace():
    sampler = PowerSampler("ina3221")
    sampler.stop()
    assert sampler.health() == ()
    assert sampler.watts() == {}
    with pytest.raises(PowerError, match="nothing was sampled"):
        sampler.trace()


# --- refusals -------------------------------------------------------------------------------------


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(PowerError, match=f"no INA3221 under {tmp_path}") as caught:
        PowerSampler("ina3221", sys_root=tmp_path).start()
    assert caught.value.exit_code == 16


def test_a_source_that_hangs_at_start():
    sampler = PowerSampler("jtop", command=python("time.sleep(1000)"))
    begin = time.monotonic()
    with pytest.raises(PowerError, match=r"jtop: no answer within 0.3 s") as caught:
        sampler.start(timeout=0.3)
    assert time.monotonic() - begin < 5
    assert "restart jtop" in caught.value.hint
    assert not alive(sampler._process.pid)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('odd')", r"died \(exit code 1: ValueError: odd\)"),
        ("os.kill(os.getpid(), 11)", r"died \(SIGSEGV\)"),
        ("pass", r"died \(exit code 0\)"),
        ("print('[]'); print('no json'); sys.exit(7)", r"died \(exit code 7\)"),
    ],
)
def test_a_process_that_dies_at_start(code, said):
    with pytest.raises(PowerError, match=said):
        PowerSampler("jtop", command=python(code)).start()


def test_ctrl_c_while_starting(monkeypatch):
    sampler = PowerSampler("jtop", command=python("time.sleep(1000)"))

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampler._answered, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.start()
    assert not alive(sampler._process.pid)


# --- trouble on the way ---------------------------------------------------------------------------


def test_the_process_is_killed(tree):
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        wait_for(lambda: len(sampler.samples) > 5)
        os.kill(sampler._process.pid, signal.SIGKILL)
        wait_for(lambda: any("died (SIGKILL)" in trouble for trouble in sampler.health()))
        heard = len(sampler.samples)
        time.sleep(0.5)
    trace = sampler.trace()
    assert len(trace.samples) == heard, "what was heard stands"
    assert [problem.kind for problem in trace.problems] == ["died"]
    gap = trace.gaps()[-1]
    assert gap.stop == trace.stop
    assert gap.seconds > 0.4


def test_the_process_is_frozen_and_goes_on(tree):
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        wait_for(lambda: len(sampler.samples) > 5)
        os.kill(sampler._process.pid, signal.SIGSTOP)
        wait_for(lambda: any("no sample for" in trouble for trouble in sampler.health()))
        time.sleep(0.3)
        os.kill(sampler._process.pid, signal.SIGCONT)
        count = len(sampler.samples)
        wait_for(lambda: len(sampler.samples) > count + 5)
        assert sampler.health() == ()
    trace = sampler.trace()
    assert len(trace.gaps()) >= 1
    assert max(gap.seconds for gap in trace.gaps()) > 0.4
    times = [sample.time for sample in trace.samples]
    assert times == sorted(set(times))


def may_hurry():
    """Tried in a process of its own: root of a container may lack the right."""
    ask = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def test_readings_come_before_other_work_where_that_is_granted(tree):
    with PowerSampler("ina3221", 0.02, sys_root=tree) as sampler:
        wait_for(lambda: len(sampler.samples) > 5)
        threads = Path(f"/proc/{sampler._process.pid}/task").iterdir()
        policies = {os.sched_getscheduler(int(thread.name)) for thread in threads}
    assert policies == {os.SCHED_RR if may_hurry() else os.SCHED_OTHER}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the engine has no more than before"


def test_readings_come_before_an_engine_of_real_time_priority(tree):
    if not may_hurry():
        pytest.skip("SCHED_RR is not granted here")
    own = os.sched_getscheduler(0), os.sched_getparam(0)
    for priority, expected in ((50, 51), (99, 99)):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        try:
            sampler = PowerSampler("ina3221", 0.02, sys_root=tree)
            sampler.start()
        finally:
            os.sched_setscheduler(0, *own)
        assert os.sched_getparam(sampler._process.pid).sched_priority == expected
        sampler.stop()


def test_readings_on_a_busy_machine(tree):
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        for _ in range(10):  # a virtual machine is itself kept waiting now and then
            with PowerSampler("ina3221", 0.1, sys_root=tree) as sampler:
                time.sleep(3)
            times = sampler.trace().readings
            steps = [second - first for first, second in itertools.pairwise(times)]
            usual, worst = 1e3 * statistics.median(steps), 1e3 * max(steps)
            print(f"{len(steps)} readings in 3 s, every {usual:.1f} ms, at most {worst:.1f} ms apart")
            if worst < 55 or not may_hurry():
                break
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert worst < 55 or not may_hurry()
    assert usual == pytest.approx(7, rel=0.5), "a conversion of the chip"


def test_a_frozen_process_can_be_stopped(tree):
    sampler = PowerSampler("ina3221", 0.02, sys_root=tree)
    sampler.start()
    wait_for(lambda: len(sampler.samples) > 5)
    os.kill(sampler._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    sampler.stop(patience=0.2)
    sampler.stop()
    assert time.monotonic() - begin < 3
    assert not alive(sampler._process.pid)
    assert len(sampler.trace().samples) > 5


def test_a_source_that_is_lost():
    command = python(
        say("STARTED", {"event": "sample", "time": 1.0, "uncertainty": 0.0, "values": {"a": 5.0}})
        + say({"event": "lost", "time": 2.0, "message": "the service stopped"})
        + "sys.exit(4)"
    )
    with PowerSampler("fake", command=command) as sampler:
        wait_for(lambda: "the service stopped" in sampler.health())
    trace = sampler.trace()
    assert [(problem.kind, problem.time) for problem in trace.problems] == [("lost", 2.0)], "and not also 'died'"
    assert len(trace.samples) == 1


def test_half_a_line_and_nonsense_are_passed_over():
    command = python("print('[1]\\nnonsense')\n" + say("STARTED") + 'sys.stdout.write(\'{"event": "sam\')')
    with PowerSampler("fake", command=command) as sampler:
        wait_for(sampler.health)
    assert sampler.trace().samples == ()


def test_the_process_ends_with_its_parent(tree):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom cdkd_edge.board.power.sampler import PowerSampler\n"
        f"sampler = PowerSampler('ina3221', sys_root=Path({str(tree)!r}))\nsampler.start()\n"
        "print(sampler._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    pid = int(answer.stdout)
    wait_for(lambda: not alive(pid))


def test_ctrl_c_reaches_the_parent_alone(tree):
    code = (
        "import time\nfrom pathlib import Path\nfrom cdkd_edge.board.power.sampler import PowerSampler\n"
        f"sampler = PowerSampler('ina3221', 0.02, sys_root=Path({str(tree)!r}))\n"
        "with sampler:\n"
        "    try:\n        print(sampler._process.pid, flush=True)\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        count = len(sampler.samples)\n        time.sleep(0.5)\n"
        "        print(len(sampler.samples) > count, sampler.trace().problems, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        start_new_session=True,
    )
    pid = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out == "True ()\n", err
    assert not alive(pid)


def test_what_a_library_prints_is_no_line(tree, tmp_path):
    """Only the process's own lines go to stdout."""
    (tmp_path / "sitecustomize.py").write_text("")
    code = (
        "import sys, os\nfrom cdkd_edge.board.power import sampler_child, ina3221\n"
        "quiet = ina3221.Ina3221Reader\n"
        "def loud(root):\n    print('loud'); os.write(1, b'louder\\n'); return quiet(root)\n"
        "ina3221.Ina3221Reader = loud\n"
        f"sampler_child.main(['--source', 'ina3221', '--interval', '0.02', '--sys', {str(tree)!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    lines = [process.stdout.readline() for _ in range(5)]
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    assert [json.loads(line)["event"] for line in lines] == ["started"] + ["sample"] * 4


# --- finding --------------------------------------------------------------------------------------

ONLY_FILES = "import sys; sys.modules['jtop'] = sys.modules['pynvml'] = None; "
COMMAND = (sys.executable, "-c", f"{ONLY_FILES}from cdkd_edge.board.power.sampler_child import main; main()")


def test_the_first_that_answers(tree):
    with find_source(sys_root=tree, command=COMMAND) as sampler:
        assert sampler.info.name == "ina3221"


def test_a_forced_source_is_the_only_one_tried(tree):
    with pytest.raises(PowerError, match=r"^RAPL: no CPU package under [^;]*$"):
        find_source("rapl", sys_root=tree, command=COMMAND)
    with pytest.raises(UsageError, match="named wattmeter"):
        find_source("wattmeter")


def test_reasons_of_all(tmp_path):
    with pytest.raises(PowerError, match=r"jetson-stats is not installed.*no INA3221.*nvidia-ml-py.*no CPU package"):
        find_source(sys_root=tmp_path, command=COMMAND)


def test_list(tree):
    package = tree / "class/powercap/intel-rapl:0"
    for name, text in (("name", "package-0"), ("energy_uj", 5), ("max_energy_range_uj", 10**12)):
        write(package / name, text)
    jtop, ina, nvml, rapl = list_sources(seconds=0.4, interval=0.05, sys_root=tree, command=COMMAND)
    assert (jtop.info, jtop.watts) == (None, {})
    assert "not installed" in jtop.reason
    assert "pip3 install" in jtop.hint
    assert "nvidia-ml-py" in nvml.reason
    assert ina.watts == pytest.approx({"VDD_IN": 18.95, "VDD_CPU_GPU_CV": 9.5, "VDD_SOC": 3.25})
    assert 1 < ina.rate <= 212
    assert (rapl.info.scope, rapl.info.quantity, rapl.watts) == ("CPU package", "joules", {"package-0": 0.0})


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tree, monkeypatch):
    def listed(*arguments):
        return list_sources(*arguments, sys_root=tree, command=COMMAND)

    monkeypatch.setattr("cdkd_edge.board.power.sampler.list_sources", listed)
    result = run("power", "--seconds", "0.3")
    assert result.exit_code == 0, result.stderr
    assert "ina3221 would be used" in result.stdout
    assert "ina3221  VDD_IN" in result.stdout
    assert "18.9" in result.stdout
    assert "not usable: jtop: jetson-stats is not installed" in result.stdout
    result = run("power", "--seconds", "0.3", "--json", "--source", "ina3221")
    document = json.loads(result.stdout)
    assert document["used"] == "ina3221"
    (source,) = document["sources"]
    assert source["watts"]["VDD_IN"] == pytest.approx(18.95)
    assert source["info"]["scope"] == "module"
    assert_answer(run("power", "--source", "rapl"), 16, "no CPU package")
    assert_answer(run("power", "--interval", "nan"), 2, r"--interval|an interval of nan s")
    assert_answer(run("power", "--seconds", "nan"), 2, r"--seconds|watching for nan s")
    assert_answer(run("power", "--source", "wattmeter"), 2, "one of jtop, ina3221, nvml, rapl")


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
def test_an_interval_that_is_none(interval):
    with pytest.raises(UsageError, match="interval"):
        PowerSampler("ina3221", interval)
    with pytest.raises(UsageError, match="--seconds must be"):
        list_sources(seconds=float("nan"))
