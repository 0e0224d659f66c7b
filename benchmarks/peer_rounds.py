"""Whose turn it is: peers in processes of their own, rounds in an order that is fair to all.

A peer that always ran after the same other one would always meet that one's caches, clocks and threads that still spin.
So the rounds follow a Williams design (E. J. Williams, Aust. J. Sci. Res. A 2, 1949): every peer comes at every
position, and directly after every other one, equally often.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peer_children import AbsentError

LOAD_TIMEOUT = 1800.0
"""Seconds for loading and for one answer; ``torch.compile`` takes minutes for the paper's network."""

MIN_TURN_SECONDS = 0.2
"""A turn repeats its tile until the fastest peer needs about this long, so that waking up does not count."""


class Contestant(Protocol):
    """A peer as the schedule sees it; any method may raise :class:`AbsentError`."""

    key: str

    def load(self) -> dict[str, Any]:
        """Start; what is worth recording."""

    def label(self) -> list[float]:
        """Label all tiles once; seconds of each."""

    def turn(self, tile: int, runs: int) -> float:
        """One tile, ``runs`` times; seconds of all."""

    def memory(self) -> dict[str, int | None]:
        """``peak_memory_bytes``, ``running_memory_bytes``."""

    def close(self) -> None:
        """End, at once."""


class ChildPeer:
    """A peer in a process. See :class:`Contestant`."""

    def __init__(
        self, key: str, folder: Path, threads: int, timeout: float = LOAD_TIMEOUT, clock: str = "wall"
    ) -> None:
        self.key, self._clock = key, clock
        self._folder, self._threads, self._timeout = folder, threads, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "logs" / f"{key}.log"
        self._pending = b""

    def load(self) -> dict[str, Any]:
        """See :class:`Contestant`."""
        (self._folder / "labels").mkdir(exist_ok=True)
        self._log.parent.mkdir(exist_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("peer_children.py")), "--peer", self.key]
        command += ["--folder", str(self._folder), "--threads", str(self._threads), "--clock", self._clock]
        environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(self._folder / "inductor"))
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes that would outlive the compilation
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self._threads)
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        return self._answer()

    def label(self) -> list[float]:
        """See :class:`Contestant`."""
        return [float(value) for value in self._ask(do="label")["seconds"]]

    def turn(self, tile: int, runs: int) -> float:
        """See :class:`Contestant`."""
        return float(self._ask(do="turn", tile=tile, runs=runs)["seconds"])

    def memory(self) -> dict[str, int | None]:
        """See :class:`Contestant`."""
        return self._ask(do="memory")

    def close(self) -> None:
        """See :class:`Contestant`."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AbsentError(self._ending()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + self._timeout
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise AbsentError(f"no answer within {self._timeout:.0f} s")
            block = os.read(descriptor, 1 << 16)
            if not block:
                raise AbsentError(self._ending())
            self._pending += block
        line, _, self._pending = self._pending.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        if "absent" in document:
            raise AbsentError(document["absent"])
        return document

    def _ending(self) -> str:
        """How a process ended that should not have."""
        assert self._process is not None
        code = self._process.wait(10)
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}" + (", for lack of memory perhaps" if name == "SIGKILL" else "")
        said = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}: {said[-1][:300] if said else 'it said nothing'}"


def williams(count: int) -> list[list[int]]:
    """Orders of ``count`` contestants: ``count`` rounds if that is even, twice as many if it is odd.

    In all rounds together each is at every position, and each directly follows every other, equally often.
    """
    first = [0]
    for step in range(1, count):
        first.append((first[-1] + (step if step % 2 else -step)) % count)
    rows = [[(start + one) % count for one in first] for start in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


@dataclass
class Rounds:
    """What was measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per tile, one for each round."""
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Why a peer has no figures."""
    orders: list[list[str]] = field(default_factory=list)
    runs_per_turn: int = 1
    ended_by: str = "rounds"
    """``rounds`` or ``seconds``, whichever ended it."""


def measure(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    tiles: int,
    seconds: float = math.inf,
    pause: float = 0.5,
    progress: Callable[[str], None] = lambda step: None,
) -> Rounds:
    """Load all, let each label all tiles, then rounds in which each has one turn.

    The first round only warms up. In a round all run the same tile, in the next the next one. A contestant that fails
    is left out from then on, with its reason; the others go on.

    Args:
        contestants: who takes part; all are closed at the end, whatever happens.
        rounds: measured rounds.
        tiles: how many tiles there are.
        seconds: no further round is begun after this time in rounds, once there are two.
        pause: seconds before each turn: threads of a runtime go on spinning after a tile and would slow the next.
        progress: called with the name of each step.
    """
    result = Rounds()
    try:
        racing = _loaded(contestants, result, progress)
        started = time.monotonic()
        number, done = 0, 0
        while racing and done < rounds:
            if done >= 2 and time.monotonic() - started > seconds:
                result.ended_by = "seconds"
                break
            progress(f"round {done + 1} of {rounds}" if number else "warm-up round")
            orders = williams(len(racing))
            order = [racing[index] for index in orders[done % len(orders)]]
            took: dict[str, float] = {}
            for one in order:
                time.sleep(pause)
                try:
                    took[one.key] = one.turn(number % tiles, result.runs_per_turn) / result.runs_per_turn
                except AbsentError as error:
                    _leave(one, f"failed in round {done + 1}: {error}", result)
            if number:
                result.orders.append([one.key for one in order])
                for key, value in took.items():
                    result.seconds.setdefault(key, []).append(value)
                done += 1
            number += 1
            racing = [one for one in racing if one.key not in result.absent]
        for one in racing:
            try:
                result.memory[one.key] = one.memory()
            except AbsentError as error:
                _leave(one, str(error), result)
    finally:
        for one in contestants:
            one.close()
    return result


def _loaded(contestants: Sequence[Contestant], result: Rounds, progress: Callable[[str], None]) -> list[Contestant]:
    """Those that load and label; sets how often a turn runs its tile."""
    racing, fastest = [], math.inf
    for one in contestants:
        progress(f"loading {one.key}")
        try:
            result.loaded[one.key] = one.load()
            fastest = min(fastest, *one.label())
        except AbsentError as error:
            _leave(one, str(error), result)
        else:
            racing.append(one)
    if racing:
        result.runs_per_turn = max(1, math.ceil(MIN_TURN_SECONDS / max(fastest, 1e-4)))
    return racing


def _leave(one: Contestant, reason: str, result: Rounds) -> None:
    one.close()
    result.absent[one.key] = reason
    result.seconds.pop(one.key, None)
    result.loaded.pop(one.key, None)
    result.memory.pop(one.key, None)
