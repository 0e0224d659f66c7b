"""Changing the board for a run: another power mode, or clocks held at their maximum; afterwards, what was there before.

``nvpmodel -m ID`` asks whether to reboot where a mode cannot be entered otherwise (``NVPM WARN: Reboot required for
changing to this power mode``); it gets no answer, and the mode is refused. ``jetson_clocks`` ends with exit code 0
whatever it failed to do, so clocks and mode are read back after every change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.board.jetson import PowerMode, clocks_held, current_mode, is_jetson, mode_of, read_modes
from cdkd_edge.board.journal import Change, Journal
from cdkd_edge.core.errors import BoardError, printable
from cdkd_edge.core.process import kill_session
from cdkd_edge.core.signals import HeldSignals

ROOT = Path("/")
AS_ROOT = "sudo $(command -v cdkd-edge) ... (sudo has a PATH of its own, without virtual environments)"
TIMEOUT = 30.0  # seconds; on a board the tools take one or two
_MOST_OUTPUT = 1 << 20
_ENDED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
_ATTEMPTS = 5
_PLACES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")  # where the tools are on a board; a user's PATH need not have them

# --- the tools ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolAnswer:
    """How a board tool ended, and what it wrote."""

    code: int | None  # exit code; None: it was killed, because it took too long or wrote too much
    text: str = ""

    @property
    def said(self) -> str:
        """Its last lines, on one line, for an error message."""
        if self.code is None:
            return "it did not end and was killed"
        lines = [line for line in self.text.splitlines() if line.strip()]
        return printable(" / ".join(lines[-3:]), 300) or f"exit code {self.code}"


RunTool = Callable[[Sequence[str]], ToolAnswer]


def run_command(command: Sequence[str], timeout: float = TIMEOUT) -> ToolAnswer:
    """Run a board tool without input, in its own session, so that Ctrl-C does not reach it.

    It is looked for on PATH and where a Jetson has its tools, and killed after ``timeout`` seconds with all it started.

    Raises:
        BoardError: there is no such tool, or it cannot be started.
    """
    program = shutil.which(command[0], path=os.pathsep.join((os.environ.get("PATH", ""), *_PLACES)))
    if program is None:
        raise BoardError(
            f"{command[0]} is not installed",
            hint="set power mode and clocks on the Jetson itself, not in a container",
        )
    for _ in range(_ATTEMPTS):
        answer = _run_once([program, *command[1:]], timeout)
        # The session begins a moment after the fork; a signal to this process's group in between ends the child before
        # it has become the tool.
        if answer.code not in _ENDED:
            break
    return answer


def _run_once(command: Sequence[str], timeout: float) -> ToolAnswer:
    # A file, because a pipe would have to be read until every process that holds it has ended; in memory, so that the
    # board can be put back even on a full disk.
    with open(os.memfd_create("output"), "w+b") as output:
        null, both = subprocess.DEVNULL, subprocess.STDOUT
        try:
            process = subprocess.Popen(command, stdin=null, stdout=output, stderr=both, start_new_session=True)
        except OSError as error:
            raise BoardError(f"{command[0]} cannot be started: {error.strerror}") from error
        code, deadline = None, time.monotonic() + timeout
        try:
            while code is None and time.monotonic() < deadline and os.fstat(output.fileno()).st_size <= _MOST_OUTPUT:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(timeout, 0.2))
        finally:
            kill_session(process)
        output.seek(0)
        return ToolAnswer(code, output.read(_MOST_OUTPUT).decode("utf-8", errors="replace"))


# --- setting and restoring ------------------------------------------------------------------------


@dataclass(frozen=True)
class BoardChange:
    """How the board is set for the run."""

    before: PowerMode | None = None  # power mode that was there; None: it was not asked for
    mode: PowerMode | None = None  # power mode during the run
    max_clocks: bool = False  # whether GPU and CPU are held at their maximum by this run
    restored: str | None = None  # what was put back first, after an earlier run that was killed


@dataclass(frozen=True)
class PendingRestore:
    """What a run that was killed has left changed."""

    since: str  # when it began, ISO 8601
    mode: PowerMode | None  # power mode to put back; None: none
    clocks: Path | None  # file from which ``jetson_clocks`` restores; None: nothing to restore

    @property
    def commands(self) -> list[str]:
        """What to type to put it back by hand."""
        commands = [f"sudo nvpmodel -m {self.mode.id}"] if self.mode else []
        if self.clocks:  # removing the file tells the next run that they have been restored by hand
            commands += [f"sudo jetson_clocks --restore {self.clocks}", f"sudo rm {self.clocks}"]
        return commands

    def __str__(self) -> str:
        parts = [f"power mode {self.mode}"] if self.mode else []
        parts += ["the clocks"] if self.clocks else []
        return f"{' and '.join(parts)}, changed by a run of {self.since} that was killed"


@contextlib.contextmanager
def changed_board(
    mode: str | None, max_clocks: bool, *, root: Path = ROOT, run: RunTool = run_command
) -> Iterator[BoardChange]:
    """Set the board for a block, and put back what was there; also after errors, Ctrl-C, SIGTERM and SIGHUP.

    These signals wait while the board is being set or put back. What a killed run has left is put back first.

    Args:
        mode: name (in any case) or number of a power mode; None leaves it.
        max_clocks: hold GPU, CPU and memory at their maximum in that mode (``jetson_clocks``).
        root: of the file tree.
        run: runs a command, as :func:`run_command`.

    Raises:
        BoardError: it cannot be set (and is as it was), or could not be put back; then the hint is what to type.
    """
    if mode is None and not max_clocks:
        yield BoardChange()
        return
    require_changeable(root)
    journal = Journal(root)
    with HeldSignals() as signals, journal.locked():
        left = _restore_left(root, journal, run)
        try:
            change = _set(mode, max_clocks, root, journal, run)
            signals.release()
            yield replace(change, restored=left)
        finally:
            signals.holding = True
            _put_back(root, journal, run)


def require_changeable(root: Path = ROOT) -> None:
    """Make sure that this process may change power mode and clocks, or raise BoardError."""
    if os.geteuid() != 0:
        raise BoardError("only root may change power mode and clocks", hint=AS_ROOT)
    if not is_jetson(root):
        raise BoardError("power modes and clocks can be set on a Jetson only, and this is none")


def pending_restore(root: Path = ROOT) -> PendingRestore | None:
    """What a killed run has left changed; None if there is nothing, or that run is still alive. Needs no root."""
    journal = Journal(root)
    return None if journal.in_use() else _left(root, journal)


def find_mode(modes: tuple[PowerMode, ...], wanted: str) -> PowerMode:
    """The mode of that name (``25W``, ``maxn``, also without the ``MODE_`` of some boards) or number, or BoardError.

    On a super board the mode without limits is called MAXN_SUPER and there is no MAXN: there, MAXN means that one.
    """
    if not modes:
        raise BoardError("this machine has no power modes: there is no /etc/nvpmodel.conf that names one")
    name = wanted.strip().casefold()
    for wished in (name, f"{name}_super") if name == "maxn" else (name,):
        for mode in modes:
            if wished in (mode.name.casefold(), mode.name.casefold().removeprefix("mode_"), str(mode.id)):
                return mode
    raise BoardError(f"there is no power mode {wanted}", hint=f"this board has {', '.join(map(str, modes))}")


def _set(mode: str | None, max_clocks: bool, root: Path, journal: Journal, run: RunTool) -> BoardChange:
    before = during = None
    if mode is not None:
        modes = read_modes(root)
        during = find_mode(modes, mode)
        before = _query(modes, run)
    moves = before != during
    held = clocks_held(root)
    clocks = None
    if max_clocks or (moves and held):  # entering a mode resets the clocks
        clocks = journal.new_clocks_file()
        answer = run(("jetson_clocks", "--store", str(clocks)))
        if answer.code != 0 or not clocks.is_file() or not clocks.stat().st_size:
            clocks.unlink(missing_ok=True)
            raise BoardError(f"jetson_clocks cannot store the present clocks: {answer.said}")
    if moves or max_clocks:
        # Written before anything is changed, so that a killed run can be undone.
        journal.write(Change(before if moves else None, during if moves else None, clocks, max_clocks, held))
    if moves and during is not None:
        _enter(during, root, run)
    if max_clocks:
        answer = run(("jetson_clocks",))
        if answer.code != 0 or clocks_held(root) is False:
            raise BoardError(f"jetson_clocks does not hold the clocks at their maximum: {answer.said}")
    return BoardChange(before, during, max_clocks)


def _enter(mode: PowerMode, root: Path, run: RunTool) -> None:
    """Enter a power mode and read it back; BoardError if the board is in another mode afterwards."""
    answer = run(("nvpmodel", "-m", str(mode.id)))
    if re.search("reboot", answer.text, re.IGNORECASE):
        hint = f"sudo nvpmodel -m {mode.id}, answer yes, and run this again without setting the mode"
        raise BoardError(f"power mode {mode} can only be entered by a reboot", hint=hint)
    if answer.code != 0 or "NVPM ERROR" in answer.text:
        raise BoardError(f"power mode {mode} cannot be set: {answer.said}")
    now = _query(read_modes(root), run)
    if now != mode:
        raise BoardError(f"nvpmodel was to set power mode {mode}, but the board is in {now}")


def _query(modes: tuple[PowerMode, ...], run: RunTool) -> PowerMode:
    """The present power mode; BoardError if nvpmodel does not say."""
    answer = run(("nvpmodel", "-q"))
    match = re.search(r"NV Power Mode:\s*(\S+)\s*\n\s*(\d+)\s*$", answer.text, re.MULTILINE)
    mode = mode_of(modes, int(match[2])) if match and answer.code == 0 else None
    if mode is None:
        raise BoardError(f"the present power mode is not known; nvpmodel -q: {answer.said}")
    return mode


def _put_back(root: Path, journal: Journal, run: RunTool) -> None:
    """Undo what the journal says; BoardError if something could not be put back, and the journal stays."""
    change = journal.read()
    if change is None:
        journal.clear()  # remove clocks that were stored before nothing was changed
        return
    failures = []
    if change.clocks and change.maximised:  # before the mode: clocks that are held may be above what it allows
        failures += _restore_clocks(change.clocks, run)
    if change.before is not None:
        try:
            if _query(read_modes(root), run) != change.before:
                _enter(change.before, root, run)
        except BoardError as error:
            failures.append(error.message)
        if change.clocks:  # entering a mode sets lowest clocks as well
            failures += _restore_clocks(change.clocks, run)
    if change.clocks and change.held_before is False and clocks_held(root):
        failures.append("the clocks are still held at their maximum")
    if failures:
        text = f"the board was not put back as it was: {'; '.join(dict.fromkeys(failures))}"
        left = PendingRestore(change.since, change.before, change.clocks)
        raise BoardError(text, hint=" && ".join(left.commands))
    journal.clear()


def _restore_clocks(clocks: Path, run: RunTool) -> list[str]:
    try:
        answer = run(("jetson_clocks", "--restore", str(clocks)))
    except BoardError as error:
        answer = ToolAnswer(1, error.message)
    return [] if answer.code == 0 else [f"jetson_clocks --restore: {answer.said}"]


def _left(root: Path, journal: Journal) -> PendingRestore | None:
    change = journal.read()
    if change is None:
        return None
    # A reboot resets the clocks. A mode that somebody has set since stays.
    clocks = change.clocks if change.boot == journal.boot and change.clocks and change.clocks.is_file() else None
    number = current_mode(root)
    unchanged = number is None or (change.during is not None and number == change.during.id)
    mode = change.before if change.before is not None and unchanged else None
    return PendingRestore(change.since, mode, clocks) if mode or clocks else None


def _restore_left(root: Path, journal: Journal, run: RunTool) -> str | None:
    """Put back what an earlier run has left, if anything; the lock must be held."""
    left, change = _left(root, journal), journal.read()
    if change is None:
        return None
    if left is None:
        journal.clear()
        return None
    journal.write(replace(change, before=left.mode, during=change.during if left.mode else None, clocks=left.clocks))
    _put_back(root, journal, run)
    return str(left)
