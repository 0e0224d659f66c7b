"""What NVIDIA's compiler makes of an exported graph in FP16: layers, traffic, fused attention, scratch.

    pip install tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 onnx --no-deps
    python benchmarks/compiled_layers.py export/ckpt.onnx

TensorRT-RTX parses and builds without a GPU or a driver (x86-64); nothing is run. The graph is cast to
FP16 here, weights and activations alike, and compiled strongly typed for SM86. "Traffic" is the bytes of
all inputs and outputs of all layers, a measure of time spent on memory.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

BYTES = {"Half": 2, "Float": 4, "UInt8": 1, "Int8": 1, "Int32": 4, "Int64": 8, "Bool": 1}


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cast weights and the input cast to FP16, in place; Resize keeps its FP32 scales, as ONNX wants."""
    scales = {node.input[2] for node in model.graph.node if node.op_type == "Resize"}
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in scales:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float16), item.name))
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] == "image":
            node.attribute[0].i = TensorProto.FLOAT16
    del model.graph.value_info[:]
    return model


def compile_log(model: onnx.ModelProto) -> str:
    """Build an engine for SM86 and return the compiler's verbose log."""
    provider = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if provider is None or provider.origin is None:
        raise SystemExit("TensorRT-RTX is not installed; see the head of this file")
    for name in ("libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"):
        ctypes.CDLL(str(Path(provider.origin).parent / name), ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings  # type: ignore[import-not-found]

    trt: Any = tensorrt_rtx_bindings
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise SystemExit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit("the compiler refused the graph:\n" + "\n".join(lines[-5:]))
    return "\n".join(lines)


def traffic_bytes(layer: str) -> int:
    """Bytes of a layer's inputs and outputs, from its line in the log (constants left out)."""
    tensors = layer.split("Constants:")[0] + layer.split("Outputs:")[1]
    total = 0
    for dimensions, kind in re.findall(r"Dimensions: \[([\d,]*)\].*?Datatype: (\w+)", tensors):
        total += math.prod(int(size) for size in dimensions.split(",") if size) * BYTES[kind]
    return total


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    text = compile_log(to_fp16(onnx.load(parser.parse_args().graph)))
    layers = [line for line in text.splitlines() if re.match(r"Name: .*LayerType:", line)]
    scratch = re.search(r"Max Scratch Memory: (\d+)", text)
    print(f"engine layers    {len(layers)}")
    print(f"fused attention  {sum('_gemm_mha' in layer.split(',')[0] for layer in layers)}")
    print(f"layer traffic    {sum(map(traffic_bytes, layers)) / 1e9:.3f} GB")
    print(f"scratch memory   {int(scratch[1]) / 1e6:.1f} MB" if scratch else "scratch memory   not in the log")


if __name__ == "__main__":
    main()
