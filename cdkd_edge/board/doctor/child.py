"""What only an import can tell, asked in a process of its own: ``python -m cdkd_edge.board.doctor.child gpu``.

A driver may crash or hang, TensorRT is large, and importing jtop changes multiprocessing for the whole process.
Prints one line of JSON, with ``error`` if it does not work.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any


def _gpu() -> dict[str, Any]:
    from cdkd_edge.engines.tensorrt.find import NoGpu, find_gpu

    found = find_gpu()
    return {"error": found.reason} if isinstance(found, NoGpu) else dataclasses.asdict(found)


def _tensorrt() -> dict[str, Any]:
    from cdkd_edge.engines.tensorrt.find import find_tensorrt

    found = find_tensorrt()
    return {"kind": found.kind, "version": found.version, "name": found.name}


def _cuda() -> dict[str, Any]:
    from cdkd_edge.engines.cuda.gpu import open_gpu

    return dataclasses.asdict(open_gpu().info)


def _jtop() -> dict[str, Any]:
    import jtop  # type: ignore[import-not-found,unused-ignore]

    with jtop.jtop() as client:
        total = client.power.get("tot", {}) if client.ok() else {}
        return {"version": str(jtop.__version__), "rail": total.get("name")}


QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {"gpu": _gpu, "tensorrt": _tensorrt, "cuda": _cuda, "jtop": _jtop}


def main() -> None:
    """Answer the question that is the only argument."""
    try:
        answer = QUESTIONS[sys.argv[1]]()
    except Exception as error:  # whatever a driver or a service throws is the answer
        answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
