"""Lists what is inside a graph or an engine: operators or layers, precisions, memory, fused attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.manifest import (
    EngineManifest,
    GraphManifest,
    is_artefact_name,
    kind_of,
    manifest_path,
    read_manifest,
)
from cdkd_edge.engines.runtimes import runtime_of
from cdkd_edge.engines.tensorrt.layers import EngineLayers
from cdkd_edge.graph.files import load_graph
from cdkd_edge.graph.nodes import CONTRIB_DOMAIN

_NAMES = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.INT32: "int32", TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}  # fmt: skip
_FLOATS = ("fp64", "fp32", "bf16", "fp16")
_ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1}
_OUTPUTS = {  # types of outputs that are always the same
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "Shape", "Size"), "int64"),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), "int32"),
}
_OUTPUT_LIKE = {
    "QuantizeLinear": (2, "uint8"), "DynamicQuantizeLinear": (2, "uint8"), "DequantizeLinear": (1, "fp32"),
    "QLinearConv": (7, "other"), "QLinearMatMul": (7, "other"),
}  # fmt: skip
"""Operators whose outputs have the type of an input: its number, and the type if there is no such input."""


@dataclass(frozen=True)
class OnnxContents:
    """The content of an ONNX file: a graph, or an engine for the CPU."""

    operators: Mapping[str, Mapping[str, int]]
    """Nodes by operator, the most frequent first, and precision: ``int8`` if it computes on INT8 or UINT8, else the
    widest float it touches, else ``other``."""
    casts: Mapping[str, int]  # by what they convert, e.g. ``uint8 to fp16``
    quantize_nodes: int
    dequantize_nodes: int
    parameter_bytes: Mapping[str, int]  # bytes of constants by type
    attention_blocks: int
    attention_fused: int  # attention blocks that are one operator

    @property
    def nodes(self) -> int:
        """All nodes."""
        return sum(sum(row.values()) for row in self.operators.values())

    @property
    def precisions(self) -> dict[str, int]:
        """Nodes by precision."""
        total: Counter[str] = Counter()
        for row in self.operators.values():
            total.update(row)
        return dict(total.most_common())


@dataclass(frozen=True)
class Inspection:
    """What was found in a file."""

    path: Path
    manifest: GraphManifest | EngineManifest | None
    contents: OnnxContents | EngineLayers | None  # None if the layers of an engine were not recorded
    warnings: tuple[str, ...]


def inspect_artefact(path: Path) -> Inspection:
    """Inspect a graph (``.onnx``) or an engine (``.cpu.onnx``, ``.engine``). Runs nothing.

    Raises:
        ManifestError: the file does not exist, has a manifest that is not its own, or needs one and has none.
        EngineError, GraphError: it is neither ONNX nor an engine that cdkd-edge built.
    """
    if not path.is_file():
        raise ManifestError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if not is_artefact_name(path):
        raise EngineError(
            f"{path} is neither a graph (.onnx) nor an engine (.engine, .cpu.onnx)",
            hint="for a checkpoint: `cdkd-edge info`",
        )
    if path.suffix == ".onnx" and not manifest_path(path).exists():
        warning = "there is no manifest beside it: what it was made from and whether it was checked is not known"
        return Inspection(path, None, read_onnx(path), (warning,))
    if path.suffix == ".onnx" and kind_of(path) != EngineManifest.kind:
        return Inspection(path, read_manifest(path, GraphManifest), read_onnx(path), ())
    manifest = read_manifest(path, EngineManifest)
    read_layers = runtime_of(manifest).read_layers
    contents = read_layers(path, manifest) if read_layers else read_onnx(path)
    warnings = list(manifest.tensorrt.notes) if manifest.tensorrt else []
    if contents is None:
        warnings.insert(0, "its layers are not recorded beside it (.layers.json); build it again to see them")
    warnings += attention_warnings(manifest, contents if isinstance(contents, EngineLayers) else None)
    return Inspection(path, manifest, contents, tuple(warnings))


def attention_warnings(manifest: EngineManifest, layers: EngineLayers | None = None) -> list[str]:
    """A warning if an attention block of an engine is not fused; none if that is not known."""
    blocks, fused = manifest.attention_blocks, manifest.attention_fused
    if fused >= blocks or (manifest.tensorrt is not None and not manifest.tensorrt.layers):
        return []
    unfused = layers.unfused_attention if layers else ()
    which = f" ({', '.join(unfused[:4])}{', ...' if len(unfused) > 4 else ''})" if 0 < len(unfused) < blocks else ""
    helps = manifest.tensorrt is not None and manifest.precision == "fp32"
    return [
        f"attention is not fused in {blocks - fused} of {blocks} blocks{which}: their scores are written to memory, "
        f"which costs time and memory{'; TensorRT fuses it in FP16: cdkd-edge build --fp16' if helps else ''}"
    ]


def read_onnx(path: Path) -> OnnxContents:
    """Count what is in an ONNX file.

    Raises:
        GraphError: it is none, or is empty.
    """
    graph = load_graph(path).graph
    dtypes = {item.name: _NAMES.get(item.data_type, "other") for item in graph.initializer}
    dtypes |= {item.name: _NAMES.get(item.type.tensor_type.elem_type, "other") for item in graph.input}
    operators: dict[str, Counter[str]] = {}
    casts: Counter[str] = Counter()
    for node in graph.node:
        output = _output_dtype(node, dtypes)
        dtypes |= dict.fromkeys(node.output, output)
        operators.setdefault(node.op_type, Counter())[_node_precision(node, dtypes, output)] += 1
        if node.op_type == "Cast":
            casts[f"{dtypes.get(next(iter(node.input), ''), 'other')} to {output}"] += 1
    counts = {name: sum(row.values()) for name, row in operators.items()}
    fused = sum(
        node.op_type in ("Attention", "MultiHeadAttention", "PackedMultiHeadAttention")
        and node.domain in ("", CONTRIB_DOMAIN)
        for node in graph.node
    )
    parameters: Counter[str] = Counter()
    for item in graph.initializer:
        kind = _NAMES.get(item.data_type, "other")
        parameters[kind] += math.prod(max(0, size) for size in item.dims) * _ITEM_BYTES.get(kind, 0)
    return OnnxContents(
        operators={name: dict(operators[name].most_common()) for name in sorted(counts, key=lambda n: (-counts[n], n))},
        casts=dict(casts.most_common()),
        quantize_nodes=counts.get("QuantizeLinear", 0),
        dequantize_nodes=counts.get("DequantizeLinear", 0),
        parameter_bytes=dict(parameters.most_common()),
        attention_blocks=fused + counts.get("Softmax", 0),
        attention_fused=fused,
    )


def _output_dtype(node: onnx.NodeProto, dtypes: Mapping[str, str]) -> str:
    """Type of a node's outputs by its operator's definition; for other operators, that of its first float input."""
    inputs = [dtypes.get(name, "other") for name in node.input]
    attributes = {item.name: item for item in node.attribute}
    if node.op_type == "Cast":
        return _NAMES.get(attributes["to"].i, "other") if "to" in attributes else "other"
    if node.op_type == "Constant":
        value = attributes.get("value")
        return _NAMES.get(value.t.data_type, "other") if value is not None else "fp32"
    if node.op_type in _OUTPUT_LIKE:
        number, otherwise = _OUTPUT_LIKE[node.op_type]
        return inputs[number] if len(inputs) > number else otherwise
    if node.op_type in _OUTPUTS:
        return _OUTPUTS[node.op_type]
    return next((kind for kind in inputs if kind in _FLOATS), inputs[0] if inputs else "other")


def _node_precision(node: onnx.NodeProto, dtypes: Mapping[str, str], output: str) -> str:
    touched = {dtypes.get(name, "other") for name in node.input} | {output}
    if node.op_type != "Cast" and touched & {"int8", "uint8"}:
        return "int8"
    return next((kind for kind in _FLOATS if kind in touched), "other")
