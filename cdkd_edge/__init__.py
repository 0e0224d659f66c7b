"""cdkd-edge: a land-cover segmentation network, from a checkpoint to a measured engine."""

import os
import sys
import warnings

__version__ = "0.2.0"

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
