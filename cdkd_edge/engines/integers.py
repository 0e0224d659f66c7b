"""Does this CPU multiply integers exactly? Asked of ONNX Runtime itself, before an INT8 engine is trusted.

x86-64 CPUs without VNNI add pairs of uint8 x int8 products in 16 bits, which saturate at 32767: two of 255 x 127
make 64770. Labels would be wrong without a word.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("U8S8 can suffer from saturation issues")
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.errors import EngineError
from cdkd_edge.export.fuse import CONTRIB_DOMAIN

_SIZE = 64


@functools.cache
def integers_are_exact() -> bool:
    """Whether a product of the largest integers comes out right, in the operator that INT8 engines use."""
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


def require_exact_integers() -> None:
    """Refuse INT8 where it would give wrong labels.

    Raises:
        EngineError: this CPU's integer products saturate.
    """
    if not integers_are_exact():
        raise EngineError(
            "this CPU's INT8 products saturate (x86-64 without VNNI); an INT8 engine would give wrong labels",
            hint="use the FP32 engine here: cdkd-edge build",
        )
