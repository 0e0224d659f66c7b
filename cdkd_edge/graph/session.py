"""Sessions of ONNX Runtime on the CPU, and how its integer products come out there."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.core.machine import available_cores
from cdkd_edge.graph.fuse import CONTRIB_DOMAIN

_SIZE = 64


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of every session.

    Args:
        threads: for one run. Default: the cores this process may use.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them on stderr
    # Said explicitly because ONNX Runtime otherwise counts the cores of the machine, not of the container.
    options.intra_op_num_threads = threads or available_cores()
    return options


def cpu_session(model: onnx.ModelProto, *, arena: bool = False, in_order: bool = False) -> Any:
    """A session for looking at values, on all cores this process may use.

    Args:
        model: at most 2 GB.
        in_order: run nodes as they stand in the graph. ONNX Runtime's own order leaves side branches for the end, and
            keeps what they need until then.
        arena: keep freed memory for the next run. Off: large outputs that are handed out would never come back.

    Raises:
        GraphError: ONNX Runtime refuses the graph.
    """
    options = session_options()
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = arena
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own types share no base but Exception
        raise GraphError(f"ONNX Runtime refuses the graph: {' '.join(str(error).split())[:300]}") from None


@functools.cache
def signed_weights_are_exact() -> bool:
    """Whether this CPU multiplies the largest uint8 and int8 rightly, in the operator that INT8 engines use.

    x86-64 CPUs without VNNI add pairs of uint8 x int8 products in 16 bits, which saturate at 32767: two of 255 x 127
    make 64770. Labels would be wrong without a word. Products of uint8 and uint8 are exact on every CPU, but take more
    than twice as long where there is VNNI.
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("U8S8 can suffer from saturation
    issues")
    """
    constants: dict[str, npt.NDArray[Any]] = {
        "weight": np.full((_SIZE, _SIZE), 127, np.int8),
        "one": np.array(1, np.float32),
        "ones": np.ones(_SIZE, np.float32),
        "zero": np.array(0, np.uint8),
    }
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "weight", "one", "ones", "zero"], ["y"], domain=CONTRIB_DOMAIN
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [_SIZE, _SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_SIZE, _SIZE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(["y"], {"x": np.full((_SIZE, _SIZE), 255, np.uint8)})
    return bool((product == _SIZE * 255 * 127).all())
