"""What NVIDIA's compiler makes of an exported graph in FP16: layers, traffic, fused attention, scratch.

    pip install tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0
    python benchmarks/compiled_layers.py export/ckpt.onnx

TensorRT-RTX parses and builds without a GPU or a driver (x86-64); nothing is run. The graph is cast to
FP16 here, weights and activations alike, and compiled strongly typed for SM86. "Traffic" is the bytes of
all inputs and outputs of all layers, a measure of time spent on memory. For a graph with a manifest,
`cdkd-edge build --target sm86` and `cdkd-edge inspect` say more.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from cdkd_edge.engines.tensorrt.build import compile_layers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions


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


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    graph = parser.parse_args().graph
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, graph.name)
        onnx.save(to_fp16(onnx.load(graph)), half)
        compiled = compile_layers(half, TensorRTOptions(targets=("8.6",)))
    print(f"engine layers    {len(compiled.layers)}")
    print(f"fused attention  {compiled.fused_attention}")
    print(f"layer traffic    {compiled.traffic_bytes / 1e9:.3f} GB")
    scratch = compiled.scratch_bytes
    print("scratch memory   " + ("not in the log" if scratch is None else f"{scratch / 1e6:.1f} MB"))


if __name__ == "__main__":
    main()
