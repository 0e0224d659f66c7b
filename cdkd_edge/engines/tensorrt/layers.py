"""The layers of a compiled engine: what was fused, in which precision, how many bytes they move.

TensorRT tells them in two ways. Its engine inspector gives JSON, but only of an engine that was deserialised,
which needs the GPU. The builder's verbose log ends with the same list as text; that is all there is where an engine is
compiled without a GPU. Both are read into :class:`Layer`. They are kept in ``NAME.PRECISION.layers.json``.
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

from cdkd_edge.core.errors import ManifestError
from cdkd_edge.core.files import write_text

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1, "fp8": 1}
_DTYPES = {
    "float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
    "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8", "bool": "bool", "fp8": "fp8",
}  # fmt: skip
FUSED_ATTENTION = re.compile(r"_gem[mv]_mha")
"""In the name of a layer that is a whole attention, e.g. ``_gemm_mha_v2_myl0_6``."""


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer reads or writes."""

    name: str
    dtype: str
    """``fp32``, ``fp16``, ``int8``, ...; TensorRT's own word where it is none that is known here."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size, without padding; 0 if the shape is dynamic."""
        return max(0, math.prod(self.shape)) * _BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: one kernel, or a few."""

    name: str
    kind: str
    """TensorRT's type, e.g. ``gemm``, ``kgen``, ``correlation``."""
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...] = ()
    nodes: tuple[str, ...] = ()
    """Names of the ONNX nodes it was made from."""

    @property
    def traffic_bytes(self) -> int:
        """Bytes of inputs and outputs; constants left out."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is scores, softmax and mixing in one, so that the scores are never written to memory."""
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
    scratch_bytes: int | None = None
    """The most scratch memory of one layer; the fused part of a network is one to TensorRT."""
    weights_bytes: int | None = None
    attention_nodes: tuple[str, ...] = ()
    """Names of the graph's softmaxes, one to an attention block."""

    @property
    def traffic_bytes(self) -> int:
        """Bytes of all inputs and outputs of all layers: a measure of time spent on memory."""
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


@dataclass(frozen=True)
class LayerLimits:
    """What a compiled network may cost at most."""

    attention_blocks: int
    """All of them must be fused."""
    layers: int
    traffic_bytes: float
    scratch_bytes: float


def exceeded(compiled: EngineLayers, limits: LayerLimits) -> list[str]:
    """What of ``limits`` an engine does not keep, as sentences; empty if all is well."""
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


def layers_of_log(lines: Iterable[str]) -> EngineLayers:
    """The layer list and the memory figures of a builder's verbose log."""
    layers: list[Layer] = []
    scratch = weights = None
    for message in lines:
        for line in message.splitlines():
            if re.match(r"Name: .*LayerType:", line):
                layers.append(_layer_of_line(line))
            elif match := re.search(r"Max Scratch Memory: (\d+)", line):
                scratch = int(match[1])
            elif match := re.search(r"Total Weights Memory: (\d+)", line):
                weights = int(match[1])
    return EngineLayers(tuple(layers), scratch, weights)


def layers_of_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of TensorRT's engine inspector; empty if it does not look into what was fused."""
    try:
        items = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return ()
    found = tuple(
        Layer(
            str(item.get("Name", "")),
            str(item.get("LayerType", "")),
            tuple(map(_tensor, item.get("Inputs") or ())),
            tuple(map(_tensor, item.get("Outputs") or ())),
            tuple(map(_tensor, item.get("Constants") or ())),
            _nodes(str(item.get("Metadata", ""))),
        )
        for item in items
        if isinstance(item, dict)
    )
    return () if any("ForeignNode[" in layer.name for layer in found) else found


def layers_path(engine: Path) -> Path:
    """Where the layers of an engine lie: ``ckpt.fp16.engine`` has ``ckpt.fp16.layers.json`` beside it."""
    return engine.with_suffix(".layers.json")


def write_layers(engine: Path, sha256: str, compiled: EngineLayers) -> None:
    """Write the layers of an engine of that content beside it (atomically)."""
    document = {
        "kind": "layers",
        "engine_sha256": sha256,
        "scratch_bytes": compiled.scratch_bytes,
        "weights_bytes": compiled.weights_bytes,
        "attention_nodes": list(compiled.attention_nodes),
        "layers": [
            {
                "name": layer.name,
                "type": layer.kind,
                "nodes": list(layer.nodes),
                **{
                    key: [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]
                    for key, tensors in (
                        ("inputs", layer.inputs), ("outputs", layer.outputs), ("constants", layer.constants)
                    )
                },
            }
            for layer in compiled.layers
        ],
    }  # fmt: skip
    write_text(layers_path(engine), _one_layer_per_line(document))


def read_layers(engine: Path, sha256: str) -> EngineLayers | None:
    """The layers that lie beside an engine of that content; None if there are none.

    Raises:
        ManifestError: the file is damaged, or about another engine.
    """
    path = layers_path(engine)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["engine_sha256"] != sha256:
            raise ManifestError(f"{path} is about another engine", hint="build the engine again")
        layers = tuple(
            Layer(
                str(item["name"]),
                str(item["type"]),
                _stored(item["inputs"]),
                _stored(item["outputs"]),
                _stored(item["constants"]),
                tuple(map(str, item["nodes"])),
            )
            for item in document["layers"]
        )
        return EngineLayers(
            layers,
            _integer(document["scratch_bytes"]),
            _integer(document["weights_bytes"]),
            tuple(map(str, document["attention_nodes"])),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path} is damaged", hint="build the engine again") from None


def _layer_of_line(line: str) -> Layer:
    """``Name: ..., LayerType: ..., Inputs: [ {...}, ...], Constants: [...], Outputs: [...], TacticName: ...``."""
    head, _, rest = line.partition("Inputs:")
    name, _, kind = head.partition(", LayerType:")
    inputs, _, rest = rest.partition("Outputs:")
    # Constants stand before the outputs; what follows the outputs holds no braces with dimensions.
    inputs, _, constants = inputs.partition("Constants:")
    return Layer(
        name.removeprefix("Name:").strip(),
        kind.strip(" ,"),
        _tensors(inputs),
        _tensors(rest),
        _tensors(constants),
        _nodes(line.rpartition("Metadata:")[2]),
    )


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


def _stored(items: Any) -> tuple[LayerTensor, ...]:
    return tuple(LayerTensor(str(item["name"]), str(item["dtype"]), _shape(item["shape"])) for item in items)


def _dtype(text: str) -> str:
    """``fp16`` of ``Half``, ``FP16`` or ``Row major linear FP16 format``."""
    words = re.findall(r"\w+", text.lower())
    return next((_DTYPES[word] for word in words if word in _DTYPES), text.strip())


def _shape(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes if str(size).strip())


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _one_layer_per_line(document: dict[str, Any]) -> str:
    """JSON that a person can search: a line is a layer."""
    layers = ",\n".join(json.dumps(layer) for layer in document["layers"])
    head = json.dumps({**document, "layers": []}, indent=1)
    return head.replace('"layers": []', f'"layers": [\n{layers}\n ]') + "\n"
