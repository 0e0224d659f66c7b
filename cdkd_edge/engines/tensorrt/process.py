"""Run the building process and hear what it says; answer for it when it dies."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from cdkd_edge.core.errors import EngineError, SystemRefusalError
from cdkd_edge.core.process import events, last_words, module_command, start_child, tail_of
from cdkd_edge.engines.tensorrt.compiler import BuilderMemoryError, BuildRequest

COMMAND = module_command("cdkd_edge.engines.tensorrt.child")

StepListener = Callable[[str], None]
"""Called with what is being done, to show it."""
LineListener = Callable[[str, str], None]
"""Called with severity and text of a line that TensorRT logged."""


def run_builder(
    request: BuildRequest,
    heard: Callable[[dict[str, Any]], None],
    step: StepListener,
    line: LineListener,
    command: tuple[str, ...] = COMMAND,
) -> dict[str, Any]:
    """Build in a process of its own; the fields of its ``finished``.

    Args:
        request: what to build.
        heard: called with ``started`` and ``parsed``; what it raises ends the process.
        step: hears of progress.
        line: hears what TensorRT logs.
        command: the process, for tests.

    Raises:
        BuilderMemoryError: it was killed, or TensorRT had too little memory.
        EngineError: TensorRT refused, or crashed.
        SystemRefusalError: the engine could not be written.
    """
    progress = _Progress(step)
    with tempfile.TemporaryFile() as errors:
        process = start_child(command, errors)
        try:
            for event in _conversation(process, request):
                kind = event.get("event")
                if kind in ("finished", "failed"):
                    process.wait()
                    if kind == "finished":
                        return event
                    raise _failure(event)
                if kind == "log":
                    line(str(event.get("severity")), str(event.get("text")))
                elif kind in ("started", "parsed"):
                    heard(event)
                else:
                    progress.hear(event)
            raise _death(process.wait(), tail_of(errors))
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _conversation(process: subprocess.Popen[bytes], request: BuildRequest) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(dataclasses.asdict(request)).encode())
        process.stdin.flush()
        process.stdin.close()
    except BrokenPipeError:  # it died at once; its end says more
        return
    yield from events(process.stdout)


def _failure(event: dict[str, Any]) -> EngineError | SystemRefusalError:
    message, hint = str(event.get("message")), event.get("hint")
    if event.get("reason") == "memory":
        return BuilderMemoryError("out of memory while building")
    if event.get("reason") == "system":
        return SystemRefusalError(message, hint=hint)
    return EngineError(message, hint=hint)


def _death(code: int, said: str) -> EngineError:
    """The error for a process that ended without a result."""
    if code == -signal.SIGKILL:
        return BuilderMemoryError("out of memory: the system killed the builder")
    if "bad_alloc" in said or "MemoryError" in said or "out of memory" in said:
        return BuilderMemoryError("out of memory while building")
    return EngineError(
        f"the builder crashed ({last_words(code, said)})", hint="--verbose shows what TensorRT did before"
    )


class _Progress:
    """Nested phases as one line: the outermost with its steps, and the one at work."""

    def __init__(self, step: StepListener) -> None:
        self._step = step
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._outer = ""

    def hear(self, event: dict[str, Any]) -> None:
        name = str(event.get("name"))
        if event.get("event") == "phase":
            self._steps[name], self._done[name] = int(event.get("steps") or 0), 0
            if not event.get("parent"):
                self._outer = name
        elif event.get("event") == "step":
            self._done[name] = int(event.get("done") or 0)
        else:
            return
        parts = [self._outer] if name == self._outer else [self._outer, name]
        self._step(": ".join(self._text(part) for part in parts if part))

    def _text(self, name: str) -> str:
        total = self._steps.get(name, 0)
        return f"{name} {self._done.get(name, 0)}/{total}" if total > 1 else name
