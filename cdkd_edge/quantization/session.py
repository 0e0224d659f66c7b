"""A graph in ONNX Runtime on the CPU, for looking at values."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime

from cdkd_edge.errors import GraphError
from cdkd_edge.machine import available_cores


def cpu_session(model: onnx.ModelProto, *, arena: bool = False, in_order: bool = False) -> Any:
    """A session on all cores this process may use.

    Args:
        model: at most 2 GB.
        in_order: run nodes as they stand in the graph. ONNX Runtime's own order leaves side branches for the end, and
            keeps what they need until then.
        arena: keep freed memory for the next run. Off: large outputs that are handed out would never come back.

    Raises:
        GraphError: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    options.intra_op_num_threads = available_cores()
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = arena
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own types share no base but Exception
        raise GraphError(f"ONNX Runtime refuses the graph: {' '.join(str(error).split())[:300]}") from None
