"""The process that builds: TensorRT may be killed or crash here without taking the caller along.

``python -m cdkd_edge.engines.tensorrt.child`` reads one JSON request (:class:`BuildRequest`) from stdin, writes the
engine to the path it names, and answers on stdout with JSON lines, each with an ``event``:

- ``started``: kind and version of TensorRT, GPU, workspace limit;
- ``parsed``: inputs and outputs, and the attention blocks (softmaxes) by name;
- ``phase`` with ``name``, ``parent``, ``steps``; ``step`` with ``name``, ``done``: from TensorRT's progress monitor;
- ``log`` with ``severity`` and ``text``;
- the last one: ``finished`` with what the manifest needs, or ``failed`` with ``reason``, ``message``, ``hint``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import warnings
from typing import Any, TextIO

from cdkd_edge.core.errors import CdkdEdgeError, SystemRefusalError
from cdkd_edge.engines.tensorrt.compiler import BuilderMemoryError, BuildRequest, compile_engine


class Answers:
    """JSON lines to the parent, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        """Write one line."""
        line = json.dumps({"event": event, **fields})
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def main() -> int:
    """Read the request, build, answer."""
    _end_with_parent()
    warnings.simplefilter("ignore", DeprecationWarning)
    # Libraries print to stdout now and then; the answers must not be torn by that.
    answers = Answers(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    fields = json.loads(sys.stdin.read())
    try:
        result = compile_engine(BuildRequest(**{**fields, "targets": tuple(fields["targets"])}), answers.send)
    except (MemoryError, BuilderMemoryError) as error:
        answers.send("failed", reason="memory", message=str(error) or "out of memory while building", hint=None)
    except (CdkdEdgeError, OSError) as error:
        reason = "system" if isinstance(error, (OSError, SystemRefusalError)) else "build"
        text = getattr(error, "strerror", None) or str(error)
        answers.send("failed", reason=reason, message=text, hint=getattr(error, "hint", None))
    else:
        answers.send("finished", **result)
    return 0


def _end_with_parent() -> None:
    """Ask the kernel to end this process when the parent is gone, however it went."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
