"""Running the board's own tools: never a question answered, never waited for without end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cdkd_edge.core.errors import BoardError, printable
from cdkd_edge.core.process import kill_session

TIMEOUT = 30.0
"""Seconds; on a board the tools take one or two."""
_MOST_OUTPUT = 1 << 20
_ENDED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
_ATTEMPTS = 5
_PLACES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where the tools are on a board; a user's PATH need not have them."""


@dataclass(frozen=True)
class Answer:
    """How a tool ended, and what it wrote to stdout and stderr."""

    code: int | None
    """None: it was killed, because it took too long or wrote without end."""
    text: str = ""

    @property
    def said(self) -> str:
        """For an error message: its last words, on one line."""
        if self.code is None:
            return "it does not come to an end and was killed"
        lines = [line for line in self.text.splitlines() if line.strip()]
        return printable(" / ".join(lines[-3:]), 300) or f"exit code {self.code}"


Run = Callable[[Sequence[str]], Answer]


def run_command(command: Sequence[str], timeout: float = TIMEOUT) -> Answer:
    """Run a tool without input, in a session of its own, so that the terminal's Ctrl-C does not reach it.

    Args:
        command: name and arguments; the name is looked for in PATH and where a Jetson has its tools.
        timeout: seconds, after which it is killed with everything it started.

    Raises:
        BoardError: there is no such tool, or it cannot be started.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_PLACES))
    program = shutil.which(command[0], path=path)
    if program is None:
        raise BoardError(f"{command[0]} is not installed", hint="power modes and clocks are set on a Jetson only")
    for _ in range(_ATTEMPTS):
        answer = _run_once([program, *command[1:]], timeout)
        # A session of its own begins a moment after the fork. A signal to this process's group in between ends the
        # child before it has become the tool.
        if answer.code not in _ENDED:
            break
    return answer


def _run_once(command: Sequence[str], timeout: float) -> Answer:
    # A file, because a pipe would have to be read until all that hold it have ended; in memory, so that a full disk
    # does not keep a board from being put back.
    with open(os.memfd_create("output"), "w+b") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BoardError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            code = _wait(process, output.fileno(), timeout)
        finally:
            kill_session(process)
        output.seek(0)
        return Answer(code, output.read(_MOST_OUTPUT).decode("utf-8", errors="replace"))


def _wait(process: subprocess.Popen[bytes], output: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0 and os.fstat(output).st_size <= _MOST_OUTPUT:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, 0.2))
    return None
