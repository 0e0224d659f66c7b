"""Another power mode, or clocks held at their maximum, while something is measured; then what was there before.

``nvpmodel -m ID`` asks whether to reboot where a mode cannot be entered otherwise (``NVPM WARN: Reboot required for
changing to this power mode``); it gets no answer, and the mode is refused. ``jetson_clocks`` ends with exit code 0
whatever it failed to do, so that clocks and mode are read back after every change.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.board.commands import Answer, Run, run_command
from cdkd_edge.board.identity import clocks_held, mode_of, read_modes
from cdkd_edge.board.jetson import current_mode, is_jetson
from cdkd_edge.board.journal import Change, Journal
from cdkd_edge.board.nvpmodel import PowerMode
from cdkd_edge.core.errors import BoardError
from cdkd_edge.core.signals import HeldSignals

ROOT = Path("/")
AS_ROOT = "sudo $(command -v cdkd-edge) bench ... (sudo has a PATH of its own, without virtual environments)"


@dataclass(frozen=True)
class BoardChange:
    """How the board is set for the run."""

    before: PowerMode | None = None
    """Power mode that was there; None: it was not asked for."""
    mode: PowerMode | None = None
    """Power mode during the run."""
    max_clocks: bool = False
    """Whether GPU and CPU are held at their maximum by this run."""
    restored: str | None = None
    """What an earlier run, which was killed, had left and was put back first."""


@dataclass(frozen=True)
class PendingRestore:
    """What a run that was killed has left behind."""

    since: str
    """When it began, ISO 8601."""
    mode: PowerMode | None
    """Power mode to put back; None: it needs not be."""
    clocks: Path | None
    """File from which ``jetson_clocks`` is to restore; None: it needs not."""

    @property
    def commands(self) -> tuple[str, ...]:
        """To type in its place; afterwards nothing is left to be put back."""
        return _commands(self.mode, self.clocks)

    def __str__(self) -> str:
        parts = [f"power mode {self.mode}"] if self.mode else []
        parts += ["the clocks"] if self.clocks else []
        return f"{' and '.join(parts)}, changed by a run of {self.since} that was killed"


@contextlib.contextmanager
def changed_board(
    mode: str | None, max_clocks: bool, *, root: Path = ROOT, run: Run = run_command
) -> Iterator[BoardChange]:
    """Set the board, and put back what was there when the block ends: after errors, Ctrl-C, SIGTERM and SIGHUP as well.

    Those signals wait while the board is being set or put back. What a killed run has left is put back first.

    Args:
        mode: name (in any case) or number of a power mode; None leaves it.
        max_clocks: hold GPU, CPU and memory at their maximum in that mode (``jetson_clocks``).
        root: of the file tree.
        run: runs a command.

    Raises:
        BoardError: it cannot be set (and is as it was), or could not be put back; then the hint is what to type.
    """
    if mode is None and not max_clocks:
        yield BoardChange()
        return
    if os.geteuid() != 0:
        raise BoardError("only root may change power mode and clocks", hint=AS_ROOT)
    if not is_jetson(root):
        raise BoardError("power modes and clocks can be set on a Jetson only, and this is none")
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


def pending_restore(root: Path = ROOT) -> PendingRestore | None:
    """What a killed run has left to be put back; None if nothing, or if that run is still alive. Any user may ask.

    Raises:
        BoardError: it is not readable what was changed.
    """
    journal = Journal(root)
    return None if journal.in_use() else _left(root, journal)


def restore_pending(root: Path = ROOT, run: Run = run_command) -> PendingRestore | None:
    """Put that back.

    Returns:
        What was put back, if anything was.

    Raises:
        BoardError: not root, or it could not be put back; the hint is what to type.
    """
    left = pending_restore(root)
    if left is None:
        return None
    if os.geteuid() != 0:
        raise BoardError(f"to be put back, by root: {left}", hint=" && ".join(left.commands))
    journal = Journal(root)
    with HeldSignals(), journal.locked():
        _restore_left(root, journal, run)
    return left


def find_mode(modes: tuple[PowerMode, ...], wanted: str) -> PowerMode:
    """The mode of that name (``25W``, ``maxn``, also without the ``MODE_`` of some boards) or number.

    Raises:
        BoardError: there is none; with those there are.
    """
    if not modes:
        raise BoardError("this machine has no power modes: there is no /etc/nvpmodel.conf that names one")
    name = wanted.strip().casefold()
    for mode in modes:
        # A name may itself be a number's look-alike (15W is none, but 15 is no number of a mode either).
        if name in (mode.name.casefold(), mode.name.casefold().removeprefix("mode_"), str(mode.id)):
            return mode
    raise BoardError(f"there is no power mode {wanted}", hint=f"one of {', '.join(map(str, modes))}")


def _set(mode: str | None, max_clocks: bool, root: Path, journal: Journal, run: Run) -> BoardChange:
    before = during = None
    if mode is not None:
        modes = read_modes(root)
        during = find_mode(modes, mode)
        before = _query(modes, run)
    moves = before != during
    held = clocks_held(root)
    clocks = None
    if max_clocks or (moves and held):  # entering a mode lets clocks go
        clocks = journal.new_clocks_file()
        answer = run(("jetson_clocks", "--store", str(clocks)))
        if answer.code != 0 or not clocks.is_file() or not clocks.stat().st_size:
            clocks.unlink(missing_ok=True)
            raise BoardError(f"jetson_clocks cannot store the present clocks: {answer.said}")
    if moves or max_clocks:
        # Before anything is changed, so that whatever happens then is known.
        journal.write(Change(before if moves else None, during if moves else None, clocks, max_clocks, held))
    if moves and during is not None:
        _enter(during, root, run)
    if max_clocks:
        answer = run(("jetson_clocks",))
        if answer.code != 0 or clocks_held(root) is False:
            raise BoardError(f"jetson_clocks does not hold the clocks at their maximum: {answer.said}")
    return BoardChange(before, during, max_clocks)


def _enter(mode: PowerMode, root: Path, run: Run) -> None:
    """Change to a power mode and make sure of it.

    Raises:
        BoardError: nvpmodel refuses, or says that it did and did not.
    """
    answer = run(("nvpmodel", "-m", str(mode.id)))
    if re.search("reboot", answer.text, re.IGNORECASE):
        raise BoardError(
            f"power mode {mode} can only be entered by a reboot",
            hint=f"sudo nvpmodel -m {mode.id}, answer yes, and run this again without setting the mode",
        )
    if answer.code != 0 or "NVPM ERROR" in answer.text:
        raise BoardError(f"power mode {mode} cannot be set: {answer.said}")
    now = _query(read_modes(root), run)
    if now != mode:
        raise BoardError(f"nvpmodel was to set power mode {mode}, but the board is in {now}")


def _query(modes: tuple[PowerMode, ...], run: Run) -> PowerMode:
    """The present power mode.

    Raises:
        BoardError: nvpmodel does not say.
    """
    answer = run(("nvpmodel", "-q"))
    match = re.search(r"NV Power Mode:\s*(\S+)\s*\n\s*(\d+)\s*$", answer.text, re.MULTILINE)
    mode = mode_of(modes, int(match[2])) if match and answer.code == 0 else None
    if mode is None:
        raise BoardError(f"the present power mode is not known; nvpmodel -q: {answer.said}")
    return mode


def _put_back(root: Path, journal: Journal, run: Run) -> None:
    """Undo what the journal says; without one, nothing has been changed.

    Raises:
        BoardError: something could not be put back. The journal stays.
    """
    change = journal.read()
    if change is None:
        journal.clear()  # of clocks that were stored, and nothing after that
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
        raise BoardError(
            f"the board was not put back as it was: {'; '.join(dict.fromkeys(failures))}",
            hint=" && ".join(_commands(change.before, change.clocks)),
        )
    journal.clear()


def _restore_clocks(clocks: Path, run: Run) -> list[str]:
    try:
        answer = run(("jetson_clocks", "--restore", str(clocks)))
    except BoardError as error:
        answer = Answer(1, error.message)
    return [] if answer.code == 0 else [f"jetson_clocks --restore: {answer.said}"]


def _commands(mode: PowerMode | None, clocks: Path | None) -> tuple[str, ...]:
    commands = [f"sudo nvpmodel -m {mode.id}"] if mode else []
    # The file is removed because nothing else tells that clocks have been restored by hand.
    commands += [f"sudo jetson_clocks --restore {clocks}", f"sudo rm {clocks}"] if clocks else []
    return tuple(commands)


def _left(root: Path, journal: Journal) -> PendingRestore | None:
    change = journal.read()
    if change is None:
        return None
    # A reboot lets clocks go. A mode that somebody has set since is theirs.
    clocks = change.clocks if change.boot == journal.boot and change.clocks and change.clocks.is_file() else None
    number = current_mode(root)
    unchanged = number is None or (change.during is not None and number == change.during.id)
    mode = change.before if change.before is not None and unchanged else None
    return PendingRestore(change.since, mode, clocks) if mode or clocks else None


def _restore_left(root: Path, journal: Journal, run: Run) -> str | None:
    """With the lock held: what an earlier run has left is put back, or turns out to need nothing."""
    left = _left(root, journal)
    change = journal.read()
    if left is None or change is None:
        if change is not None:
            journal.clear()
        return None
    # What is put back is what is left of it.
    journal.write(replace(change, before=left.mode, during=change.during if left.mode else None, clocks=left.clocks))
    _put_back(root, journal, run)
    return str(left)
