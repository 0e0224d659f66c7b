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

import json
import sys
import warnings
from typing import Any

from cdkd_edge.core.errors import CdkdEdgeError, SystemRefusalError
from cdkd_edge.core.process import EventWriter, end_with_parent
from cdkd_edge.engines.tensorrt.compiler import BuilderMemoryError, BuildRequest, compile_engine


def main() -> int:
    """Read the request, build, answer."""
    end_with_parent()
    warnings.simplefilter("ignore", DeprecationWarning)
    answers = EventWriter.to_parent()
    fields = json.loads(sys.stdin.read())

    def send(event: str, **fields: Any) -> None:
        answers.write(event=event, **fields)

    try:
        result = compile_engine(BuildRequest(**{**fields, "targets": tuple(fields["targets"])}), send)
    except (MemoryError, BuilderMemoryError) as error:
        send("failed", reason="memory", message=str(error) or "out of memory while building", hint=None)
    except (CdkdEdgeError, OSError) as error:
        reason = "system" if isinstance(error, (OSError, SystemRefusalError)) else "build"
        text = getattr(error, "strerror", None) or str(error)
        send("failed", reason=reason, message=text, hint=getattr(error, "hint", None))
    else:
        send("finished", **result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
