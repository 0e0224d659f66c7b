"""What NVIDIA's compiler makes of an exported graph: layers, traffic, fused attention, scratch, modelled speed.

    pip install tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0
    python benchmarks/compiled_layers.py export/ckpt.onnx

TensorRT-RTX parses and builds without a GPU or a driver (x86-64); nothing is run. An FP32 graph is converted to FP16
as `export` does, and compiled for SM 8.6. "Traffic" is the bytes of all inputs and outputs of all layers, a measure of
time spent on memory. The speed is what `cdkd-edge roofline` models from the layers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from cdkd_edge.benchmark.roofline.devices import load_device
from cdkd_edge.benchmark.roofline.model import model_engine
from cdkd_edge.core.manifest import precision_of
from cdkd_edge.engines.tensorrt.build import compile_layers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.graph.fp16 import to_fp16


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    graph = parser.parse_args().graph
    options = TensorRTOptions(targets=("8.6",))
    if precision_of(graph) in ("fp32", None):
        with tempfile.TemporaryDirectory() as folder:
            half = Path(folder, graph.name)
            onnx.save(to_fp16(onnx.load(graph)), half)
            compiled = compile_layers(half, options)
    else:
        compiled = compile_layers(graph, options)
    print(f"engine layers    {len(compiled.layers)}")
    print(f"fused attention  {compiled.fused_attention}")
    print(f"layer traffic    {compiled.traffic_bytes / 1e9:.3f} GB")
    scratch = compiled.scratch_bytes
    print("scratch memory   " + ("not in the log" if scratch is None else f"{scratch / 1e6:.1f} MB"))
    for one in model_engine(compiled, load_device("orin-nx-16gb")):
        speed = f"{one.fps:.1f} ({one.low_fps:.1f} to {one.high_fps:.1f})"
        print(f"modelled         {speed} tiles/s, Orin NX 16 GB, {one.mode.name}")


if __name__ == "__main__":
    main()
