"""Child processes: work that may crash, hang or be killed without taking its caller along.

Most run a module of this package, read their task from stdin and answer on stdout with JSON lines, one event per line.
A child ends with its parent: :func:`end_with_parent` also works while a library holds Python's lock for minutes,
:func:`end_with_stdin` also when the thread that started the child ends before the parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from cdkd_edge.core.signals import forwarded


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module of this package in a new Python."""
    return (sys.executable, "-m", module, *arguments)


def child_environment() -> dict[str, str]:
    """This process's environment, with this very package first on the path and the working directory not on it."""
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def start_child(command: Iterable[str], stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a child with pipes to its stdin and from its stdout; its stderr goes to a file, for :func:`tail_of`.

    It gets a session of its own: Ctrl-C reaches this process alone, which then ends the child.
    """
    pipe, environment = subprocess.PIPE, child_environment()
    return subprocess.Popen([*command], stdin=pipe, stdout=pipe, stderr=stderr, env=environment, start_new_session=True)


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines a child wrote; the line it was killed at may be half a line."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def end_children(children: Iterable[subprocess.Popen[bytes]], patience: float) -> None:
    """Close the stdin of children, give them ``patience`` seconds in all to end, and kill those that have not."""
    children = tuple(children)
    try:
        for child in children:
            if child.stdin is not None:
                with contextlib.suppress(OSError):
                    child.stdin.close()
        deadline = time.monotonic() + patience
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            child.kill()  # reaches a stopped one, too
            child.wait()


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that leads a session, with everything it started; does nothing if it has ended."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def tail_of(errors: IO[bytes]) -> str:
    """The end of what a child wrote to its stderr file."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
    return errors.read().decode(errors="replace").strip()


def last_words(code: int | None, said: str) -> str:
    """How a child ended and the last line of its stderr: ``SIGSEGV: line``, ``exit code 3: line``."""
    how = f"exit code {code}"
    if code is not None and code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
    lines = said.splitlines()
    return f"{how}: {' '.join(lines[-1].split())[:300]}" if lines else how


def run_command(command: Sequence[str], inherited: Sequence[int] = (), patience: float = 60.0) -> str:
    """Run a command of this package in a child, without input; returns why it failed, or nothing.

    The reason is the child's own answer (``error: ...``) if it gave one. What ends this process ends the child first:
    it gets SIGTERM and ``patience`` seconds, because a benchmark puts the board back.

    Args:
        inherited: descriptors that stay open in the child, to hold their locks.

    Raises:
        OSError: the command cannot be started.
    """
    null, environment = subprocess.DEVNULL, child_environment()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=errors, env=environment, pass_fds=inherited, start_new_session=True
        )
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
            raise
        finally:
            kill_session(child)
        said = tail_of(errors)
    if code == 0:
        return ""
    if answers := [line for line in said.splitlines() if line.startswith("error: ")]:
        return answers[-1].removeprefix("error: ")
    return last_words(code, said) + (" (out of memory?)" if code == -signal.SIGKILL else "")


def run_in_foreground(command: Sequence[str], stdout: IO[Any] | None = None) -> int:
    """Run somebody's command as if it had been typed: with our stdin, stdout, stderr and the environment we got.

    Ctrl-C, SIGTERM and SIGHUP reach the command, and this process goes on waiting for it.

    Args:
        stdout: where its stdout goes. Default: ours.

    Returns:
        Its exit code; 128 + the number of the signal that ended it, as in a shell.

    Raises:
        OSError: it cannot be started.
    """
    got = Path("/proc/self/environ").read_bytes().split(b"\0")  # os.environ has what we set for ourselves
    environment = dict(entry.split(b"=", 1) for entry in got if b"=" in entry)
    child = subprocess.Popen(command, stdout=stdout, env=environment)

    def send(number: int) -> None:
        # A terminal sends its Ctrl-C to all processes in its foreground, so the child has had it.
        if number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    with forwarded(send):
        code = child.wait()
    return code if code >= 0 else 128 - code


def _in_foreground() -> bool:
    """Whether this process belongs to those that the terminal's Ctrl-C reaches."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is no terminal
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


class EventWriter:
    """JSON lines from a child to its parent; may be used from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    @classmethod
    def to_parent(cls) -> EventWriter:
        """Write to a copy of stdout. From now on stdout itself is stderr, so that no library's print tears a line."""
        stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        return cls(stream)

    def write(self, **fields: Any) -> None:
        """Write one line."""
        line = json.dumps(fields)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def end_with_stdin() -> None:
    """End this process when its stdin ends: the parent has closed the other end, or is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        leave(0)

    threading.Thread(target=watch, daemon=True).start()


def leave(code: int) -> None:
    """End this process at once, whatever a library's threads still wait for."""
    sys.stderr.flush()
    os._exit(code)
