"""cdkd-edge: a land-cover segmentation network, from a checkpoint to a measured engine."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdkd_edge.api import (
        bench,
        build,
        evaluate,
        export,
        load_checkpoint,
        load_engine,
        parity,
        power_window,
        segment,
    )

__version__ = "0.2.0"
__all__ = [
    "bench",
    "build",
    "evaluate",
    "export",
    "load_checkpoint",
    "load_engine",
    "parity",
    "power_window",
    "segment",
]


def __getattr__(name: str) -> Any:
    """The functions of :mod:`cdkd_edge.api`, imported when one is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'cdkd_edge' has no attribute {name!r}")
    from cdkd_edge import api

    return getattr(api, name)


# From release 1.29 on ONNX Runtime reports its use to its maker, unless this is set before it is imported: neither the
# variable nor its own disable_telemetry_events() stop what an import has begun. Processes that we start inherit it.
if tuple(map(int, getattr(sys.modules.get("onnxruntime"), "__version__", "0").split(".")[:2])) >= (
    1,
    29,
) and os.environ.get("ORT_DISABLE_TELEMETRY", "").lower() not in ("1", "true", "yes"):
    warnings.warn(
        "onnxruntime was imported before cdkd_edge, with its telemetry on: it writes below ~/.cache/Microsoft and "
        "looks up a host on the network. Import cdkd_edge first, or set ORT_DISABLE_TELEMETRY=1",
        RuntimeWarning,
        stacklevel=2,
    )
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
