"""Manifests: the JSON file beside every graph and engine; ``ckpt.onnx`` has ``ckpt.json``.

A manifest says what the file was made from, what it expects and what was measured about it. It holds the file's
SHA-256, so that a file that was swapped or damaged is found before anything runs it.
"""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from cdkd_edge import __version__
from cdkd_edge.core.errors import EngineError, ManifestError, SchemaError
from cdkd_edge.core.files import converted, read_json, require_own, sha256_of, write_text
from cdkd_edge.core.labels import LabelSchema, schema_from_document
from cdkd_edge.core.machine import library_versions

MANIFEST_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ARTEFACT_SUFFIXES = (".onnx", ".engine")  # file names of graphs and engines end like this
ONNXRUNTIME_CPU, OPENVINO_CPU = "onnxruntime-cpu", "openvino-cpu"  # the runtimes of CPU engines, in their manifests
MAX_PIXEL_BYTES = 1 << 31  # largest batch of tiles: two of 16,384 px, or 600 of 1024 px


# --- kinds of output ------------------------------------------------------------------------------

LABELS, CONFIDENCE, PROBABILITIES = "labels", "confidence", "probabilities"
OUTPUT_KINDS = (LABELS, CONFIDENCE, PROBABILITIES)
PERCENT = 100  # a confidence of 1
PROBABILITY_ONE = 255  # a probability of 1


def output_shapes(kind: str, batch: int, tile: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the uint8 outputs of a kind by name: always labels, first; confidence in per cent; ``round(255 p)``.

    Probabilities are the softmax of the logits at full resolution, as the network was trained; they are not calibrated.
    """
    shapes: dict[str, tuple[int, ...]] = {LABELS: (batch, tile, tile)}
    if kind == CONFIDENCE:
        shapes[CONFIDENCE] = (batch, tile, tile)
    elif kind == PROBABILITIES:
        shapes[PROBABILITIES] = (batch, classes, tile, tile)
    return shapes


def provides(kind: str, wanted: str) -> bool:
    """Whether an artefact of ``kind`` can give ``wanted``; confidence follows from probabilities."""
    return wanted in (LABELS, kind) or (kind, wanted) == (PROBABILITIES, CONFIDENCE)


def missing_output(kind: str, wanted: str, artefact: str) -> EngineError:
    """The error for an output that an artefact does not have."""
    gives = "labels alone" if kind == LABELS else kind
    hint = f"build one that does: cdkd-edge build --{wanted}"
    return EngineError(f"{artefact} gives {gives}, not {wanted}", hint=hint)


def build_options(precision: str, kind: str) -> str:
    """What to type after ``cdkd-edge build`` for an engine like this."""
    return f"--{precision}" if kind == LABELS else f"--{precision} --{kind}"


@dataclass(frozen=True)
class FileRecord:
    """A file by name and content."""

    file: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> FileRecord:
        """Record ``path``, under another ``name`` if it is about to be renamed."""
        return cls(name or path.name, sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class Preprocessing:
    """What the graph does to a uint8 RGB tile before the first layer."""

    channels: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class GraphCheck:
    """The graph compared with the network, when the graph was made."""

    tiles: int
    max_logit_error: float
    label_agreement: float  # share of pixels with the same label, 0..1
    network_runtime: str
    graph_runtime: str


@dataclass(frozen=True)
class AttentionChange:
    """What was changed in a block's attention, because a kernel that adds in FP16 would overflow or be inexact."""

    block: str  # e.g. ``blocks.3.attn``
    reason: str
    values_divided_by: int = 1  # v, a power of two; proj multiplies by it again
    scores_in_fp32: bool = False  # softmax and its sum too
    scores_divided_by: int = 1  # q, a power of two; scores are multiplied by it in FP32

    def __str__(self) -> str:
        what = [f"values divided by {self.values_divided_by}"] if self.values_divided_by > 1 else []
        if self.scores_in_fp32:
            divided = f", divided by {self.scores_divided_by} before" if self.scores_divided_by > 1 else ""
            what.append(f"scores in FP32{divided}")
        return f"{self.block}: {' and '.join(what)}, because {self.reason}"


@dataclass(frozen=True)
class ConversionCheck:
    """A graph of lower precision against the FP32 graph it was made from, in ONNX Runtime on the CPU."""

    tiles: int
    imagery: str  # what the tiles were: ``sample``, or the name of a calibration set
    label_agreement: float  # share of pixels with the same label, 0..1
    finite: bool  # every value in FP16, also on tiles that are all 0, all 255, a checkerboard and noise
    runtime: str
    max_logit_error: float | None = None  # None where the share of labels alone was judged
    logit_tolerance: float | None = None
    """What rounding explains of it. Labels that differ are ties: FP32's best scores are nearer than twice this."""
    attention_error: float | None = None
    """What FP16 sums add to the error of attention, as a share of its result (rms of the worst head); some queries."""
    attention: tuple[AttentionChange, ...] = ()  # blocks whose attention plain FP16 would break


@dataclass(frozen=True)
class Refusal:
    """Why no FP16 graph was made of an FP32 graph."""

    reason: str
    out_of_range: bool  # a value is too large for FP16, which no other imagery and no INT8 layer changes
    tool: str = f"cdkd-edge {__version__}"  # whose judgement it is; another release may judge otherwise

    @property
    def holds(self) -> bool:
        """Whether this release would find the same."""
        return self.tool == f"cdkd-edge {__version__}"


class _Described:
    """What follows from the fields that graphs and engines share."""

    artefact: FileRecord
    labels: dict[str, Any]
    tile: int
    batch: int
    output: str

    @property
    def schema(self) -> LabelSchema:
        """The label schema of the output."""
        return schema_from_document(self.labels, source=f"the manifest of {self.artefact.file}")

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the uint8 outputs by name, the labels first."""
        return output_shapes(self.output, self.batch, self.tile, len(self.schema))


@dataclass(frozen=True)
class GraphManifest(_Described):
    """Beside an ONNX graph."""

    kind: ClassVar[str] = "graph"

    name: str
    precision: str
    artefact: FileRecord
    checkpoint: FileRecord
    layout: str
    labels: dict[str, Any]  # the label schema, as :meth:`cdkd_edge.core.labels.LabelSchema.to_document` writes it
    preprocessing: Preprocessing
    tile: int
    batch: int
    opset: int
    network: dict[str, Any]
    nodes: int
    check: GraphCheck
    libraries: dict[str, str]
    training: dict[str, Any] = field(default_factory=dict)
    parent: FileRecord | None = None  # of lower precision it was made from FP32, with more outputs from labels alone
    conversion: ConversionCheck | None = None  # this graph against its parent
    quantization: dict[str, Any] = field(default_factory=dict)  # how an INT8 graph got its scales, where it is INT8
    fp16_refused: Refusal | None = None  # why `export` or `build` made no FP16 graph of this FP32 graph
    output: str = LABELS  # what it gives: one of :data:`OUTPUT_KINDS`
    created: str = field(default_factory=lambda: _now())
    tool: str = f"cdkd-edge {__version__}"
    manifest_version: int = MANIFEST_VERSION

    def derived(self, artefact: FileRecord, nodes: int, **changes: Any) -> GraphManifest:
        """The manifest of a graph that is made from this one; ``changes`` are further fields that differ."""
        changes |= {"libraries": library_versions(("onnx", "onnxruntime", "numpy")), "tool": GraphManifest.tool}
        changes |= {"parent": self.artefact, "fp16_refused": None, "created": _now()}
        return dataclasses.replace(self, artefact=artefact, nodes=nodes, **changes)


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of a compiled engine."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorRTBuild:
    """Which TensorRT built an engine, on what, and the result; the engine runs only where this fits."""

    version: str
    gpu: str | None  # name of the GPU it was built on; None if it was compiled for ``targets`` without one
    compute_capability: str | None  # of that GPU, e.g. ``8.7``
    targets: tuple[str, ...]  # compute capabilities it was compiled for on request; empty: the GPU it was built on
    cuda: str | None  # CUDA version of the driver
    l4t: str | None
    strongly_typed: bool
    flags: tuple[str, ...]  # builder flags that were set, TensorRT's own defaults included
    workspace_bytes: int | None  # limit of the builder's workspace; None: TensorRT's own
    optimization_level: int
    timing_cache: bool
    tensors: tuple[EngineTensor, ...]
    scratch_bytes: int | None  # largest scratch memory of a layer; None where the compiler did not say
    weights_bytes: int | None
    layers: int  # layers of the compiled engine; 0 where the compiler did not list them
    traffic_bytes: int  # bytes of all inputs and outputs of all layers, constants left out
    layer_precisions: dict[str, int]  # layers by :attr:`cdkd_edge.engines.tensorrt.layers.Layer.precision`
    notes: tuple[str, ...] = ()
    multiprocessors: int | None = None  # of the GPU that were on; None: not known, as for the next three
    module: str | None = None  # part number of the Jetson module: all of a series call their GPU by one name
    board: str | None = None  # what the device tree calls the board
    power_mode: str | None = None
    portable: bool = False  # whether it was built for every GPU of this compute capability


@dataclass(frozen=True)
class EngineManifest(_Described):
    """Beside an engine."""

    kind: ClassVar[str] = "engine"

    name: str
    runtime: str  # ``onnxruntime-cpu``, ``openvino-cpu``, ``tensorrt`` or ``tensorrt-rtx``
    precision: str
    artefact: FileRecord
    graph: FileRecord
    labels: dict[str, Any]
    preprocessing: Preprocessing
    tile: int
    batch: int
    device: str
    attention_blocks: int
    attention_fused: int
    build_seconds: float
    graph_check: GraphCheck
    libraries: dict[str, str]
    training: dict[str, Any] = field(default_factory=dict)
    tensorrt: TensorRTBuild | None = None  # of engines that TensorRT built
    output: str = LABELS  # what it gives: one of :data:`OUTPUT_KINDS`
    speed_over: dict[str, float] = field(default_factory=dict)
    """Tiles/s over those of the engines of other runtimes that `build` could choose, by what manifests call these."""
    attention: tuple[str, ...] = ()
    """What each block attends to, as :attr:`cdkd_edge.model.config.NetworkConfig.attention` has it; empty: global."""
    attention_changes: tuple[AttentionChange, ...] = ()  # of the graph, for FP16
    created: str = field(default_factory=lambda: _now())
    tool: str = f"cdkd-edge {__version__}"
    manifest_version: int = MANIFEST_VERSION

    @classmethod
    def of_graph(cls, source: GraphManifest, **fields: Any) -> EngineManifest:
        """The manifest of an engine built from the graph of ``source``; ``fields`` are those that it does not have."""
        names = ("name", "precision", "labels", "preprocessing", "tile", "batch", "training", "output")
        shared = {name: getattr(source, name) for name in names}
        shared["attention"] = tuple(source.network.get("attention") or ())
        shared["attention_changes"] = source.conversion.attention if source.conversion else ()
        return cls(**{"graph": source.artefact, "graph_check": source.check, **shared, **fields})


AnyManifest = TypeVar("AnyManifest", GraphManifest, EngineManifest)


def manifest_path(artefact: Path) -> Path:
    """Path of the manifest of a file."""
    return artefact.with_suffix(".json") if artefact.name else artefact / ".json"  # "." has no name


def kind_of(artefact: Path) -> str | None:
    """``graph`` or ``engine`` by the manifest beside a file; None where there is none that can be read."""
    kind = _glance(artefact).get("kind")
    return kind if kind in (GraphManifest.kind, EngineManifest.kind) else None


def is_artefact_name(path: Path) -> bool:
    """Whether a graph or an engine may have this name."""
    return path.suffix in ARTEFACT_SUFFIXES


def precision_of(artefact: Path) -> str | None:
    """``fp32``, ``fp16``, ``bf16`` or ``int8`` by the manifest beside a file; None where it does not say."""
    precision = _glance(artefact).get("precision")
    return precision if isinstance(precision, str) else None


def output_of(artefact: Path) -> str:
    """The kind of output by the manifest beside a file; labels where it does not say."""
    output = _glance(artefact).get("output")
    return output if output in OUTPUT_KINDS else LABELS


def attention_kinds(artefact: Path) -> tuple[str, ...] | None:
    """What each block attends to by the manifest beside a file (empty: global); None where it does not say."""
    found = _glance(artefact)
    network = found.get("network")
    kinds = found.get("attention", network.get("attention", ()) if isinstance(network, dict) else None)
    return tuple(map(str, kinds)) if isinstance(kinds, list | tuple) else None


def fp16_refusal(artefact: Path) -> str | None:
    """Why there is no FP16 graph of a graph, by the manifest beside it; None where it does not say."""
    refusal = _glance(artefact).get("fp16_refused")
    reason = refusal.get("reason") if isinstance(refusal, dict) else None
    return reason if isinstance(reason, str) else None


def _glance(artefact: Path) -> dict[str, Any]:
    """The manifest of a file, unchecked; empty where there is none, or no JSON object."""
    try:
        document = read_json(manifest_path(artefact))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def require_replaceable(artefact: Path) -> None:
    """Make sure, or raise ManifestError, that writing ``artefact`` and its manifest replaces only an earlier pair."""
    for path in (artefact, manifest_path(artefact)):
        require_own(path, lambda _: kind_of(artefact) is not None)


def write_manifest(artefact: Path, manifest: GraphManifest | EngineManifest) -> None:
    """Write the manifest of ``artefact``, whole or not at all."""
    import msgspec

    document = {"kind": manifest.kind, **msgspec.to_builtins(manifest)}
    write_text(manifest_path(artefact), msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def read_manifest(artefact: Path, kind: type[AnyManifest], *, verify: bool = True) -> AnyManifest:
    """Read the manifest of ``artefact`` and check it; ``verify``: also the file's SHA-256.

    Raises:
        ManifestError: there is none, it is damaged, of another kind or version, or not about this file.
    """
    path = manifest_path(artefact)
    if not artefact.is_file():
        there = sorted(str(p) for p in artefact.glob("*.*") if is_artefact_name(p) and kind_of(p) == kind.kind)
        fault = "is a folder, not a file" if artefact.is_dir() else "does not exist"
        hint = f"name one of {', '.join(there[:4])}" if there else None
        raise ManifestError(f"{kind.kind} {artefact} {fault}", hint=hint)
    try:
        document = read_json(path)
    except FileNotFoundError:
        fault = f"has no manifest ({path.name}) beside it"
        hint = "copy both files together, or make them again with `cdkd-edge export` and `cdkd-edge build`"
        if not is_artefact_name(artefact):
            fault = f"is no {kind.kind}: its name ends neither in .onnx nor in .engine"
            hint = "`cdkd-edge export` makes a graph of a checkpoint, `cdkd-edge build` an engine of a graph"
        raise ManifestError(f"{artefact} {fault}", hint=hint) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from None
    found = document.pop("kind", None) if isinstance(document, dict) else None
    if found != kind.kind:
        raise _other_kind(artefact, found, kind.kind)
    version = document.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise ManifestError(f"{path} has manifest version {version}; this release reads {MANIFEST_VERSION}")
    try:
        manifest = converted(document, kind)
        schema_from_document(manifest.labels, source=str(path))
    except (ValueError, SchemaError) as error:
        raise ManifestError(f"manifest {path} is damaged: {error}") from None
    for value, known in ((manifest.output, OUTPUT_KINDS), (manifest.precision, PRECISIONS)):
        if value not in known:
            raise ManifestError(f"{path}: this release does not know {value!r}, only {', '.join(known)}")
    if manifest.tile < 1 or manifest.batch < 1 or 3 * manifest.batch * manifest.tile**2 > MAX_PIXEL_BYTES:
        raise ManifestError(f"manifest {path} is damaged: {manifest.batch} tiles of {manifest.tile} px")
    if verify and sha256_of(artefact) != manifest.artefact.sha256:
        hint = "the file or the manifest was replaced or damaged; make it again"
        raise ManifestError(f"{artefact} is not the file its manifest describes (SHA-256 differs)", hint=hint)
    return manifest


def _other_kind(artefact: Path, found: object, wanted: str) -> ManifestError:
    if found == GraphManifest.kind:
        hint = f"name the engine that was built of it, or make one: cdkd-edge build {shlex.quote(str(artefact))}"
        return ManifestError(f"{artefact} is a graph, not an engine", hint=hint)
    if found == EngineManifest.kind:
        return ManifestError(f"{artefact} is an engine, not a graph", hint="name the graph that it was built of")
    return ManifestError(f"{manifest_path(artefact)} is not the manifest of a cdkd-edge {wanted}")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
