"""What tests of the TensorRT engines share: TensorRT-RTX where it is, graphs in FP16, children that misbehave."""

from __future__ import annotations

import dataclasses
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cdkd_edge.core.manifest import FileRecord, GraphManifest, read_manifest, write_manifest
from cdkd_edge.engines.tensorrt.find import GpuInfo, tensorrt_is_installed
from cdkd_edge.engines.tensorrt.layers import EngineLayers
from cdkd_edge.graph.fp16 import to_fp16
from cdkd_edge.graph.int8 import int8_graph
from cdkd_edge.graph.int8_ranges import LayerScales, weight_scales
from cdkd_edge.graph.layers import quantizable_layers, weight_of

ORIN = GpuInfo("Orin", "8.7", True, 8, 16 << 30, "12.6")


def compiler_missing() -> str:
    """Why TensorRT-RTX's compiler cannot be used here; empty if it can."""
    if not tensorrt_is_installed():
        wheels = "tensorrt-rtx-cu13-bindings and onnxruntime-ep-nv-tensorrt-rtx-cu13 of the [test] extra"
        here = f"{sys.platform} {platform.machine()}, Python {platform.python_version()}"
        return f"no TensorRT-RTX to compile with: {wheels} are missing ({here})"
    tensorrt = find_spec("tensorrt")  # not imported: that would load the compiler into every test process
    if tensorrt is not None and tensorrt.origin is not None:
        return "TensorRT comes before TensorRT-RTX here, and it compiles for no GPU but its own"
    return ""


needs_compiler = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing())


def half_graph(graph: Path) -> Path:
    """``NAME.fp16.onnx`` beside an FP32 graph, unchecked, and its manifest."""
    return store_variant(graph, to_fp16(onnx.load(graph)), "fp16")


def int8_variant(graph: Path) -> Path:
    """``NAME.int8.onnx`` beside an FP32 graph: all quantisable layers in INT8, and a manifest."""
    model = onnx.load(graph)
    layers = quantizable_layers(model)
    scales = {
        layer.name: LayerScales(0.05, weight_scales(weight_of(model, layer.weight), layer.output_axis))
        for layer in layers
    }
    return store_variant(graph, int8_graph(model, layers, scales), "int8")


def break_attention(graph: Path) -> Path:
    """Beside a graph, one in which an operator after each softmax keeps TensorRT from fusing attention."""
    model = onnx.load(graph)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Softmax":
            share = node.output[0]
            node.output[0] = f"{share}.kept"
            # A running sum is of no use here, and of no kind that an attention kernel has inside.
            nodes.append(helper.make_node("CumSum", [node.output[0], "broken.axis"], [share], name=f"{share}.sum"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int64), "broken.axis"))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return store_variant(graph, model, "broken")


def store_variant(graph: Path, model: onnx.ModelProto, suffix: str) -> Path:
    """A changed graph beside its origin, with a manifest; of the precision ``suffix`` if that is one."""
    source = read_manifest(graph, GraphManifest)
    path = graph.with_name(f"{source.name}.{suffix}.onnx")
    onnx.save(model, path)
    precision = suffix if suffix in ("fp16", "int8") else source.precision
    changed = dataclasses.replace(
        source, precision=precision, artefact=FileRecord.of(path), parent=source.artefact, nodes=len(model.graph.node)
    )
    write_manifest(path, changed)
    return path


def child(code: str) -> tuple[str, ...]:
    """A command that stands in for the building process; ``say(event, **fields)`` and ``request`` are there."""
    head = (
        "import json, os, signal, sys, time\n"
        "request = json.loads(sys.stdin.read())\n"
        "def say(event, **fields): print(json.dumps({'event': event, **fields}), flush=True)\n"
    )
    return (sys.executable, "-c", head + code)


@dataclasses.dataclass(frozen=True)
class LayerLimits:
    """What a compiled network may cost at most."""

    attention_blocks: int
    """All of them must be fused."""
    layers: int
    traffic_bytes: float
    scratch_bytes: float


def exceeded(compiled: EngineLayers, limits: LayerLimits) -> list[str]:
    """The limits that an engine exceeds, as sentences."""
    findings = []
    if compiled.fused_attention < limits.attention_blocks:
        findings.append(f"{compiled.fused_attention} of {limits.attention_blocks} attention blocks are fused")
    if len(compiled.layers) > limits.layers:
        findings.append(f"{len(compiled.layers)} layers, at most {limits.layers}")
    if compiled.traffic_bytes > limits.traffic_bytes:
        findings.append(
            f"{compiled.traffic_bytes / 1e9:.2f} GB layer traffic, at most {limits.traffic_bytes / 1e9:.2f}"
        )
    if compiled.scratch_bytes is None:
        findings.append("the compiler did not tell its scratch memory")
    elif compiled.scratch_bytes > limits.scratch_bytes:
        findings.append(f"{compiled.scratch_bytes / 1e6:.0f} MB scratch, at most {limits.scratch_bytes / 1e6:.0f}")
    return findings
