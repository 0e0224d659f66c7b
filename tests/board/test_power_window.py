"""Energy of blocks and of commands: right values, what is too short, what dies; commands run as if nobody watched."""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from board import NoBoardError, Pattern, make_tree, running_board, set_watts
from commands import assert_answer, run

import cdkd_edge as ce
from cdkd_edge.board.power import sampler as samplers
from cdkd_edge.board.power import window as windows
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.protocol import JOULES, WATTS, Accuracy, Sample, SourceInfo
from cdkd_edge.board.power.window import open_window, rail_windows
from cdkd_edge.core.errors import PowerError, UsageError

ONLY_FILES = "import sys; sys.modules['jtop'] = sys.modules['pynvml'] = None; "
COMMAND = (sys.executable, "-c", f"{ONLY_FILES}from cdkd_edge.board.power.sampler_child import main; main()")


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "sys", (6.0, 1.5, 1.0))


def trace_of(points, quantity=WATTS, total="rail", rails=("rail",), random_moments=False):
    info = SourceInfo("test", "module", "a test", quantity, rails, total, 0.1, random_moments=random_moments)
    samples = tuple(Sample(moment, 0.0, dict.fromkeys(rails, value)) for moment, value in points)
    return Trace(info, samples, (), points[0][0], points[-1][0])


def steps(*parts):
    """Ten readings a second of watts that hold for some seconds each: (seconds, watts)."""
    values = [watts for seconds, watts in parts for _ in range(round(10 * seconds))]
    return [(n / 10 + 0.05, watts) for n, watts in enumerate(values)]


# --- figures --------------------------------------------------------------------------------------


def test_net_figures_leave_idle_power_out():
    trace = trace_of(steps((5, 6.0), (10, 18.0), (1, 6.0)))
    rail = rail_windows(trace, (5.0, 15.0), (0.1, 5.0))["rail"]
    assert (rail.joules, rail.watts, rail.idle_watts) == pytest.approx((180.0, 18.0, 6.0))
    assert (rail.net_joules, rail.net_watts) == pytest.approx((120.0, 12.0))
    assert (rail.covered, rail.readings, rail.reason) == (pytest.approx(1), 100, "")
    assert rail_windows(trace, (5.0, 15.0))["rail"].net_joules is None


def test_the_bound_of_net_energy_grows_with_that_of_idle_power():
    quiet = [(n / 10, 6.0) for n in range(51)]
    rough = [(n / 10, 6.0 + (n % 2)) for n in range(51)]
    load = [(5 + n / 10, 18.0 + (n % 2)) for n in range(1, 101)]
    first, second = (rail_windows(trace_of(idle + load), (5.05, 14.95), (0.1, 4.9))["rail"] for idle in (quiet, rough))
    assert first.net_bound_joules == pytest.approx(first.bound_joules)
    idle_bound = 4.8 * 0.5  # J, of regular readings that go up and down by 1 W
    assert second.net_bound_joules - second.bound_joules == pytest.approx(9.9 * idle_bound / 4.8, rel=0.1)


def test_the_offset_of_the_sensor_is_in_gross_but_not_in_net_figures():
    trace = trace_of(steps((5, 6.0), (10, 18.0)))
    known = replace(trace, source=replace(trace.source, accuracy={"rail": Accuracy(0.08, 0.04, 0.0)}))
    (exact, found) = (rail_windows(one, (5.0, 14.9), (0.1, 4.9))["rail"] for one in (trace, known))
    assert found.bound_watts - exact.bound_watts == pytest.approx(0.08 + 0.02)
    assert found.bound_joules - exact.bound_joules == pytest.approx(9.9 * 0.10)
    assert found.net_bound_joules - exact.net_bound_joules == pytest.approx(9.9 * 2 * 0.02), "half a step, twice"


def test_a_length_that_is_not_known_exactly_widens_the_bound():
    trace = trace_of(steps((5, 6.0), (10, 18.0)))
    rail = rail_windows(trace, (5.0, 14.9), (0.1, 4.9), slack=0.5)["rail"]
    known = rail_windows(trace, (5.0, 14.9), (0.1, 4.9))["rail"]
    assert rail.bound_joules - known.bound_joules == pytest.approx(18 * 0.5)
    assert rail.net_bound_joules - known.net_bound_joules == pytest.approx(12 * 0.5)
    assert rail.bound_watts == known.bound_watts


def test_a_window_of_two_readings_is_too_short_for_a_bound():
    trace = trace_of(steps((5, 6.0)))
    short = rail_windows(trace, (1.0, 1.2))["rail"]
    assert (short.joules, short.bound_joules, short.watts, short.net_joules) == (None,) * 4
    assert short.reason == "200 ms is too short for a bound: 2 readings, at least 3 are needed"
    assert rail_windows(trace, (1.0, 1.3))["rail"].joules == pytest.approx(1.8)


def test_a_counter_needs_no_readings_inside():
    trace = trace_of([(n / 10, 0.6 * n) for n in range(50)], JOULES)
    rail = rail_windows(trace, (1.02, 1.06))["rail"]
    assert rail.joules == pytest.approx(0.24)
    assert rail.bound_joules == pytest.approx(0.36), "all of the step may have been inside"


def test_missing_readings_leave_watts_but_no_joules():
    trace = trace_of([point for point in steps((20, 6.0)) if not 4 < point[0] < 9])
    rail = rail_windows(trace, (1.0, 19.0))["rail"]
    assert (rail.joules, rail.watts) == (None, pytest.approx(6.0))
    assert rail.reason == "only 71.7 % of 18.0 s have readings"
    assert rail_windows(trace, (5.0, 8.0))["rail"].reason == "no reading in 3.00 s"
    idle = rail_windows(trace, (10.0, 19.0), (3.0, 9.0))["rail"]
    assert (idle.joules, idle.idle_watts, idle.net_joules) == (pytest.approx(54.0), None, None)


# --- blocks of Python -----------------------------------------------------------------------------


def test_a_block_its_parts_and_the_idle_time_before(tree):
    with open_window("all", interval=0.08, idle=0.6, sys_root=tree, command=COMMAND) as window:
        with pytest.raises(PowerError, match="the window all has not ended"):
            assert window.joules
        set_watts(tree, 18.0, 9.0, 3.0)
        parts = []
        for number in range(2):
            with window.part(f"part {number}") as part:
                time.sleep(0.5)
            parts.append(part)
        running = parts[0].joules  # while the window goes on
    assert running == parts[0].joules == pytest.approx(18.0 * parts[0].seconds, rel=0.02)
    assert window.joules == pytest.approx(18.0 * window.seconds, rel=0.15), "the change itself is in it"
    assert window.watts == pytest.approx(window.joules / window.seconds, rel=0.03)
    assert window.idle_watts == parts[1].idle_watts == pytest.approx(6.0)
    assert parts[1].net_joules == pytest.approx(12.0 * parts[1].seconds, rel=0.02)
    assert parts[1].net_watts == pytest.approx(12.0)
    assert parts[1].bound < 0.2, "the chip's steps"
    assert parts[1].net_bound < 1, "the load that ended the idle time may have begun before"
    assert set(window.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert window.source.name == "ina3221"
    assert sum(part.seconds for part in parts) < window.seconds


def test_a_block_that_fails_ends_its_window(tree):
    def fail():
        with open_window(source="ina3221", interval=0.08, sys_root=tree, command=COMMAND) as window:
            seen.append(window)
            time.sleep(0.3)
            raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):
        fail()
    (window,) = seen
    assert window.joules == pytest.approx(6.0 * window.seconds, rel=0.02)
    with pytest.raises(PowerError, match="VDD_IN in the window: idle power was not measured") as caught:
        assert window.net_joules
    assert "idle=5" in caught.value.hint


def test_a_block_that_is_too_short(tree):
    with open_window("blink", source="ina3221", sys_root=tree, command=COMMAND) as window:
        pass
    with pytest.raises(PowerError, match=r"VDD_IN in the window blink: .* is too short for a bound"):
        assert window.joules


def test_without_a_rail_that_stands_for_all(tree, monkeypatch):
    with open_window(source="ina3221", interval=0.08, sys_root=tree, command=COMMAND) as window:
        time.sleep(0.3)
    monkeypatch.setattr(windows, "main_rail", lambda source: None)
    with pytest.raises(PowerError, match="no rail of ina3221 stands for all of it: VDD_IN, VDD_CPU_GPU_CV, VDD_SOC"):
        assert window.watts


@pytest.mark.parametrize(
    ("rails", "total", "main"), [(("a", "b"), "b", "b"), (("a",), None, "a"), (("a", "b"), None, None)]
)
def test_the_main_rail(rails, total, main):
    assert windows.main_rail(trace_of(steps((1, 1.0)), total=total, rails=rails).source) == main


def test_what_cannot_be_measured_is_said_before_the_block(tree):
    with pytest.raises(PowerError, match="no CPU package"), ce.power_window("mine", source="rapl"):
        raise AssertionError("nothing ran")
    with pytest.raises(UsageError, match="named wattmeter"), ce.power_window(source="wattmeter"):
        pass
    for idle in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="--idle must be 0 or more"), ce.power_window(idle=idle):
            pass


# --- commands -------------------------------------------------------------------------------------

LAUNCH = """
import functools, os, sys
from pathlib import Path
from cdkd_edge.board.power import sampler, window
tree, command = os.environ["TREE"], tuple(__import__("json").loads(os.environ["SAMPLER"]))
window.find_source = functools.partial(sampler.find_source, sys_root=Path(tree), command=command)
from cdkd_edge.cli import main
main()
"""


def launched(tree, *arguments):
    """The command line in a process of its own that reads an emulated chip."""
    root = str(Path(ce.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "TREE": str(tree), "SAMPLER": json.dumps(COMMAND)}
    line = ["power", "--run", "--source", "ina3221", *map(str, arguments)]
    return [sys.executable, "-c", LAUNCH, *line], environment


def measured(tree, *arguments, stdin="", **options):
    command, environment = launched(tree, *arguments)
    return subprocess.run(
        command, env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False, **options
    )


def python(code):
    return ("--", sys.executable, "-c", textwrap.dedent(code))


def test_a_command_has_its_own_streams_and_exit_code(tree):
    code = "import sys, time; print(sys.stdin.read()); print('oh', file=sys.stderr); time.sleep(0.5); sys.exit(7)"
    result = measured(tree, "--idle", "0.4", *python(code), stdin="hello")
    assert (result.returncode, result.stdout) == (7, "hello\n")
    assert "measuring idle power for 0.4 s" in result.stderr
    assert "oh\n" in result.stderr
    assert "exit code  7" in result.stderr.replace("exit code    7", "exit code  7")
    (row,) = [line.split() for line in result.stderr.splitlines() if line.startswith("VDD_IN")]
    assert row[-1] == "6.00", "idle power"


def test_json_is_alone_on_stdout(tree, tmp_path):
    arguments = ("--json", "--idle", "0.4", "-o", tmp_path / "out", "--", "sh", "-c", "echo hello; sleep 0.6")
    result = measured(tree, *arguments)
    document = json.loads(result.stdout)
    assert "hello\n" in result.stderr
    assert document == json.loads((tmp_path / "out" / "power.json").read_text())
    assert (document["exit_code"], document["command"][:2]) == (0, ["sh", "-c"])
    assert document["idle_seconds"] == pytest.approx(0.4, abs=0.1)
    rail = document["rails"]["VDD_IN"]
    assert rail["joules"] == pytest.approx(6.0 * document["seconds"], rel=0.02)
    assert rail["net_joules"] == pytest.approx(0, abs=1e-6)
    phases = {line.split(",")[3] for line in (tmp_path / "out" / "trace.csv").read_text().splitlines()[1:]}
    assert phases == {"", "idle", "load"}


def test_net_energy_of_a_command_on_the_emulated_board(tmp_path):
    try:
        with running_board(tmp_path, service=False) as board:
            board.set_watts(6.0, 1.5, 1.0)
            words = ("power", "--run", "--source", "ina3221", "--idle", "2", "--json")
            command = board.enter(sys.executable, "-m", "cdkd_edge", *words, "--", "sh", "-c", "echo ready; cat")
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, env=board.environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
            while process.stderr.readline() != "ready\n":
                assert process.poll() is None
            pattern = Pattern(board.sys, [(2.0, 18.0), (1.5, 12.0), (1.0, 20.0), (0.3, 6.0)])
            pattern.start()
            pattern.join()
            out, err = process.communicate(timeout=60)  # closes the command's stdin: it ends
    except NoBoardError as error:
        pytest.skip(f"no emulated board: {error}")
    assert process.returncode == 0, err
    document, truth = json.loads(out), pattern.joules(pattern.times[0], pattern.times[-1])
    truth -= 6.0 * (pattern.times[-1] - pattern.times[0])
    rail = document["rails"]["VDD_IN"]
    print(f"net {rail['net_joules']:.2f} ± {rail['net_bound_joules']:.2f} J, true {truth:.2f} J")
    assert rail["net_joules"] == pytest.approx(truth, abs=rail["net_bound_joules"])
    assert rail["net_joules"] == pytest.approx(truth, rel=0.05)
    assert rail["idle_watts"] == pytest.approx(6.0, rel=0.02)


def test_a_command_has_the_environment_that_was_given(tree):
    code = (
        "import os; print(os.environ.get('MPLCONFIGDIR'), os.environ.get('ORT_DISABLE_TELEMETRY'), os.environ['TREE'])"
    )
    command, environment = launched(tree, "--idle", 0, *python(code))
    for name in ("MPLCONFIGDIR", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == f"None None {tree}\n", result.stderr


def test_a_command_that_ends_at_once(tree):
    result = measured(tree, "--idle", 0, "--", "true")
    assert result.returncode == 0
    assert "is too short for a bound" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_there_are_figures(tree, number):
    code = f"""
        import signal, sys, time
        def leave(number, frame):
            print("told", number, flush=True)
            sys.exit(5)
        signal.signal({int(number)}, leave)
        print("ready", flush=True)
        time.sleep(30)
    """
    command, environment = launched(tree, "--idle", 0, *python(code))
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (5, f"told {int(number)}\n")
    assert "VDD_IN" in err


def test_a_command_that_a_signal_ended(tree):
    result = measured(tree, "--idle", 0, "--", "sh", "-c", "sleep 0.4; kill -TERM $$")
    assert result.returncode == 128 + signal.SIGTERM
    assert "VDD_IN" in result.stderr


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tree):
    code = """
        import signal, sys, time
        times = []
        signal.signal(signal.SIGINT, lambda number, frame: times.append(number))
        print("ready", flush=True)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            time.sleep(0.05)
        print("told", len(times), "times", flush=True)
    """
    command, environment = launched(tree, "--idle", 0, *python(code))
    pid, terminal = pty.fork()
    if pid == 0:  # in the child, whose terminal it is
        os.execve(command[0], command, environment)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:  # how Linux says that the terminal's last user has gone
        pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"told 1 times" in seen
    assert b"VDD_IN" in seen
    assert os.waitstatus_to_exitcode(status) == 0


def test_ctrl_c_in_the_idle_time_runs_nothing(tree, tmp_path):
    command, environment = launched(tree, "--idle", 20, "--", "touch", tmp_path / "ran")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "measuring idle power" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not (tmp_path / "ran").exists()


def test_a_source_that_dies_midway(tree):
    code = """
        import os, signal, time
        from pathlib import Path
        time.sleep(1)
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"--interval" in words.split(b"\\0") and parent == os.getppid():
                os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(2)
        print("done")
    """
    result = measured(tree, "--idle", 0, *python(code))
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert "the sampling process died (SIGKILL)" in result.stderr
    assert "no joules" in result.stderr
    assert "have readings" in result.stderr
    (row,) = [line.split() for line in result.stderr.splitlines() if line.startswith("VDD_IN")]
    assert (row[1], row[2][:4]) == ("–", "6.00"), "watts of the time with readings"


def test_what_is_refused_before_anything_runs(tree, tmp_path, monkeypatch):
    local = functools.partial(samplers.find_source, sys_root=tmp_path, command=COMMAND)
    monkeypatch.setattr(windows, "find_source", local)
    (tmp_path / "text").write_text("no program")
    assert_answer(run("power", "--run", "--idle", 0, "--", "no-such-command"), 127, "is no command that can be run")
    assert_answer(run("power", "--run", "--idle", 0, "--", tmp_path / "text"), 127, "sh -c 'WORDS'")
    assert_answer(run("power", "--run", "--idle", 0, "--", "true"), 16, "no INA3221 under")
    assert_answer(run("power", "--run"), 2, "needs a command: cdkd-edge power --run -- COMMAND")
    assert_answer(run("power", "true"), 2, "put --run before it")
    assert_answer(run("power", "--run", "--seconds", 3, "--", "true"), 2, "means nothing to --run")
    assert_answer(run("power", "--idle", 3), 2, "means nothing to a list of sources")
    assert_answer(run("power", "-o", tmp_path / "new"), 2, "have something to write")
    assert_answer(run("power", "--run", "-o", tmp_path, "--", "true"), 2, "is not empty")
    assert not (tmp_path / "new").exists()


def test_a_file_that_the_system_cannot_run(tree, tmp_path, monkeypatch):
    local = functools.partial(samplers.find_source, sys_root=tree, command=COMMAND)
    monkeypatch.setattr(windows, "find_source", local)
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    assert_answer(run("power", "--run", "--idle", 0, "--", broken), 127, "cannot be started: Exec format error")
