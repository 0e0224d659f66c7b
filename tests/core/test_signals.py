"""Ctrl-C and SIGTERM end what is under way, also where the exception they raise is dropped on its way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scene_helpers import sparse_raster

from cdkd_edge.core import signals as interrupts

LOSE = """
import importlib, os, sys
module, name, number, *arguments = sys.argv[1:]
place = importlib.import_module(module)
inner = getattr(place, name)

def losing(*positional, **named):
    try:
        os.kill(os.getpid(), int(number))
        for _ in range(1000):
            pass
    except BaseException:
        pass
    return inner(*positional, **named)

setattr(place, name, losing)
sys.argv = ["cdkd-edge", *arguments]
from cdkd_edge.__main__ import main
main()
"""
"""Runs the command with one function replaced by one that drops whatever a signal raises, as compiled modules do."""


@pytest.mark.parametrize(
    ("command", "module", "name", "number", "code"),
    [
        ("bench", "cdkd_edge.benchmark.run", "fill_inputs", signal.SIGINT, 130),
        ("segment", "cdkd_edge.segmentation.worker", "do_job", signal.SIGTERM, 143),
    ],
    ids=["bench", "segment"],
)
def test_a_signal_that_was_dropped_ends_the_command(
    small_engine_path: Path, tmp_path: Path, command: str, module: str, name: str, number: signal.Signals, code: int
) -> None:
    scene = sparse_raster(tmp_path / "large.tif", 6000, 6000)
    options = {
        "bench": (small_engine_path, "-w", tmp_path, "--duration", "60"),
        "segment": (scene, "--engine", small_engine_path, "-o", tmp_path / "maps" / "map.tif"),
    }[command]
    arguments = [str(argument) for argument in (module, name, int(number), command, *options)]
    done = subprocess.run([sys.executable, "-c", LOSE, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not [one for one in tmp_path.rglob("*") if one.name in ("map.tif", "summary.json")]
    if command == "bench":
        assert not (tmp_path / "benchmarks").exists()


START = """
import os, sys
number, mangled, module, *arguments = sys.argv[1:]

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), int(number))
            except BaseException as error:
                raise ImportError("half a module") if mangled == "mangled" else error

sys.meta_path.insert(0, Interrupting())
sys.argv = ["cdkd-edge", *arguments]
from cdkd_edge.__main__ import main
main()
"""
"""Runs the command with a signal that comes while a module is imported."""


@pytest.mark.parametrize("module", ["cdkd_edge.cli", "typer", "cdkd_edge.cli.segment", "numpy", "rasterio"])
@pytest.mark.parametrize(
    ("number", "code", "mangled"),
    [(signal.SIGINT, 130, "plain"), (signal.SIGINT, 130, "mangled"), (signal.SIGTERM, 143, "mangled")],
    ids=["INT", "INT-mangled", "TERM-mangled"],
)
def test_a_signal_while_the_program_starts(
    small_engine_path: Path, tmp_path: Path, module: str, mangled: str, number: signal.Signals, code: int
) -> None:
    """Also where the import makes another error of it."""
    arguments = ["segment", tmp_path / "scene.tif", "--engine", small_engine_path, "-w", tmp_path]
    command = [sys.executable, "-c", START, str(int(number)), mangled, module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr


def test_a_command_that_lost_a_signal_does_not_end_with_0(tmp_path: Path) -> None:

    command = [sys.executable, "-c", LOSE, "cdkd_edge.cli", "main", str(int(signal.SIGTERM)), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143
    assert "Traceback" not in done.stderr


@pytest.fixture
def ours() -> Iterator[None]:
    """Our handlers; those from before come back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    interrupts.end_on_signals()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("ours")
def test_what_was_lost_is_raised_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()


@pytest.mark.usefixtures("ours")
def test_nothing_is_raised_into_the_cleaning_up() -> None:
    """What is called while the exception is on its way must come to its end."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        interrupts.check()
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


def test_what_is_ignored_stays_ignored() -> None:
    """Under nohup, and in the background of a script."""
    script = (
        "import os, signal\n"
        "from cdkd_edge.core import signals as interrupts\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "interrupts.end_on_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "interrupts.check()\n"
        "print('here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "here\n"


OFTEN = """
import sys
from cdkd_edge.cli import progress
progress.LINE_EVERY_S = 0.05
from cdkd_edge.cli import main
main()
"""
"""Runs the command with a line every 50 ms instead of every minute."""


def started(small_engine_path: Path, folder: Path, command: str) -> subprocess.Popen[bytes]:
    """A command that takes its time, with stderr going into ``log``."""
    scene = sparse_raster(folder / "large.tif", 6000, 6000)
    options = {
        "bench": (small_engine_path, "-w", folder, "--duration", "60"),
        "segment": (scene, "--engine", small_engine_path, "-o", folder / "map.tif"),
        "calibrate": (scene, "--tile", "32", "-o", folder / "set"),
    }[command]
    arguments = [sys.executable, "-c", OFTEN, command, *map(str, options)]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log)


@pytest.mark.parametrize(
    ("command", "line", "kept"),
    [
        ("bench", r"after [\d.]+ m?s: warm-up", "nothing is kept; the same command starts again"),
        ("segment", r"after [\d.]+ m?s: large\.tif: \d{4,} of \d+ tiles", "the same command resumes"),
        ("calibrate", r"after [\d.]+ m?s: reading tiles: \d+ of 10000 tiles", "the same command starts again"),
    ],
)
def test_a_log_file_hears_how_far_it_is_and_what_is_kept(
    small_engine_path: Path, tmp_path: Path, command: str, line: str, kept: str
) -> None:
    process = started(small_engine_path, tmp_path, command)
    try:
        for _ in range(600):
            if re.search(line, (tmp_path / "log").read_text()):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert re.search(line, log), log
    assert "interrupted; " in log
    assert kept in log.splitlines()[-1]
