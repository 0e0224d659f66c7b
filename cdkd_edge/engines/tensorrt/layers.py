"""The layers of a compiled engine: what was fused, in which precision, how many bytes they move.

TensorRT's engine inspector lists them as JSON, but only of a loaded engine, which needs the GPU. The builder's verbose
log ends with the same list as text, also without a GPU. Both are kept in ``NAME.PRECISION.layers.json``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cdkd_edge.core.errors import ManifestError
from cdkd_edge.core.files import read_json, write_text

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1, "fp8": 1}
_DTYPES = {
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
    "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8", "bool": "bool", "fp8": "fp8",
}  # fmt: skip
LAYERS_SUFFIX = ".layers.json"
FUSED_ATTENTION = re.compile(r"_gem[mv]_mha")
"""In the name of a layer that is a whole attention, e.g. ``_gemm_mha_v2_myl0_6``."""


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer reads or writes."""

    name: str
    dtype: str  # ``fp32``, ``fp16``, ``int8``, ...; TensorRT's own word if it is not known here
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size, without padding; 0 if the shape is dynamic."""
        return max(0, math.prod(self.shape)) * _BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: one kernel, or a few."""

    name: str
    type: str  # tensorRT's word, e.g. ``gemm``, ``kgen``, ``correlation``.
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...] = ()
    nodes: tuple[str, ...] = ()  # names of the ONNX nodes it was made from

    @property
    def traffic_bytes(self) -> int:
        """Bytes of inputs and outputs; constants left out."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))

    @property
    def is_fused_attention(self) -> bool:
        """Whether it computes a whole attention, so that the scores are never written to memory."""
        return bool(FUSED_ATTENTION.search(self.name))

    @property
    def precision(self) -> str:
        """``int8`` if it reads INT8, else the widest float it touches, else ``other`` (indices, labels)."""
        if any(tensor.dtype in ("int8", "fp8") for tensor in (*self.inputs, *self.constants)):
            return "int8"
        touched = {tensor.dtype for tensor in (*self.inputs, *self.outputs)}
        return next((dtype for dtype in ("fp32", "bf16", "fp16") if dtype in touched), "other")


@dataclass(frozen=True)
class EngineLayers:
    """All layers of an engine, and the memory the compiler planned."""

    layers: tuple[Layer, ...]
    scratch_bytes: int | None = None  # the most of one layer; to TensorRT, the fused part of a network is one layer
    weights_bytes: int | None = None
    attention_nodes: tuple[str, ...] = ()  # names of the graph's softmaxes, one per attention block

    @property
    def traffic_bytes(self) -> int:
        """Bytes of all inputs and outputs of all layers: a measure of the time spent on memory."""
        return sum(layer.traffic_bytes for layer in self.layers)

    @property
    def fused_attention(self) -> int:
        """Attention blocks that became one layer."""
        return sum(layer.is_fused_attention for layer in self.layers)

    @property
    def unfused_attention(self) -> tuple[str, ...]:
        """The softmaxes that are not part of a fused attention; empty also if TensorRT did not name nodes."""
        fused = {node for layer in self.layers if layer.is_fused_attention for node in layer.nodes}
        named = any(layer.nodes for layer in self.layers)
        return tuple(name for name in self.attention_nodes if name not in fused) if named else ()

    @property
    def precisions(self) -> dict[str, int]:
        """Layers by :attr:`Layer.precision`, most frequent first."""
        return dict(Counter(layer.precision for layer in self.layers).most_common())


def layers_of_log(lines: Iterable[str]) -> EngineLayers:
    """The layer list and the memory figures of a builder's verbose log."""
    text = "\n".join(lines)
    layers = tuple(_layer_of_line(line) for line in text.splitlines() if re.match(r"Name: .*LayerType:", line))
    sizes = {what: int(size) for what, size in re.findall(r"(Max Scratch|Total Weights) Memory: (\d+)", text)}
    return EngineLayers(layers, sizes.get("Max Scratch"), sizes.get("Total Weights"))


def layers_of_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of TensorRT's engine inspector; empty if it does not list what is in fused layers."""
    try:
        items = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return ()
    found = [_layer(item) for item in items if isinstance(item, dict)]
    return () if any("ForeignNode[" in layer.name for layer in found) else tuple(found)


def nodes_in_name(layer: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's name holds, for an engine without a list of layers; of many at once, the name."""
    return (layer,) if "ForeignNode[" in layer else tuple(re.findall(r"[\w.]+/[A-Z][A-Za-z]*", layer))


def layers_path(engine: Path) -> Path:
    """Where the layers of an engine lie: ``ckpt.fp16.engine`` has ``ckpt.fp16.layers.json`` beside it."""
    return engine.with_suffix(LAYERS_SUFFIX)


def write_layers(engine: Path, sha256: str, compiled: EngineLayers) -> None:
    """Write the layers of an engine of that SHA-256 beside it, one layer per line so that they can be searched."""
    document = {"kind": "layers", "engine_sha256": sha256, **msgspec.to_builtins(compiled)}
    layers = ",\n".join(json.dumps(layer) for layer in document["layers"])
    head = json.dumps({**document, "layers": []}, indent=1)
    write_text(layers_path(engine), head.replace('"layers": []', f'"layers": [\n{layers}\n ]') + "\n")


def read_layers(engine: Path, sha256: str) -> EngineLayers | None:
    """The layers that lie beside an engine with that SHA-256; None if there are none.

    Raises:
        ManifestError: the file is damaged, or about another engine.
    """
    path = layers_path(engine)
    try:
        compiled, of = read_layers_file(path)
    except FileNotFoundError:
        return None
    if of != sha256:
        raise ManifestError(f"{path} is about another engine", hint="build the engine again")
    return compiled


def read_layers_file(path: Path) -> tuple[EngineLayers, str]:
    """The layers in a file, and the SHA-256 of their engine.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is damaged.
    """
    try:
        document = read_json(path)
        return msgspec.convert(document, EngineLayers), str(document["engine_sha256"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError):
        raise ManifestError(f"{path} is damaged", hint="build the engine again") from None


def _layer(item: dict[str, Any]) -> Layer:
    inputs, outputs, constants = (
        tuple(map(_tensor, item.get(role) or ())) for role in ("Inputs", "Outputs", "Constants")
    )
    nodes = _nodes(str(item.get("Metadata", "")))
    return Layer(str(item.get("Name", "")), str(item.get("LayerType", "")), inputs, outputs, constants, nodes)


def _layer_of_line(line: str) -> Layer:
    """``Name: ..., LayerType: ..., Inputs: [ {...}, ...], Constants: [...], Outputs: [...], TacticName: ...``."""
    head, _, rest = line.partition("Inputs:")
    name, _, kind = head.removeprefix("Name:").partition(", LayerType:")
    inputs, _, outputs = rest.partition("Outputs:")  # what follows the outputs holds no braces with dimensions
    inputs, _, constants = inputs.partition("Constants:")
    nodes = _nodes(line.rpartition("Metadata:")[2])
    return Layer(name.strip(), kind.strip(" ,"), _tensors(inputs), _tensors(outputs), _tensors(constants), nodes)


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    found = re.findall(r"\{ Name: (.*?), .*?Dimensions: \[([-\d,]*)\].*?(?:Format/)?Datatype: ([^,}]+)", text)
    return tuple(LayerTensor(name, _dtype(kind), _shape(sizes.split(","))) for name, sizes, kind in found)


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))


def _tensor(item: Any) -> LayerTensor:
    if not isinstance(item, dict):
        return LayerTensor("", "", ())
    kind = item.get("Datatype") or item.get("Format/Datatype") or ""
    return LayerTensor(str(item.get("Name", "")), _dtype(str(kind)), _shape(item.get("Dimensions") or ()))


def _dtype(text: str) -> str:
    """``fp16`` of ``Half``, ``FP16`` or ``Row major linear FP16 format``."""
    words = re.findall(r"\w+", text.lower())
    return next((_DTYPES[word] for word in words if word in _DTYPES), text.strip())


def _shape(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes if str(size).strip())
