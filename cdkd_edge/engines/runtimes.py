"""The runtimes that build and run engines. Everything that differs between them is in a row of :data:`RUNTIMES`.

To add one, write ``engines/NAME.py`` with a function that builds an engine and one that loads it, and add a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import EngineError, UsageError
from cdkd_edge.core.manifest import (
    ONNXRUNTIME_CPU,
    OPENVINO_CPU,
    EngineManifest,
    GraphManifest,
    build_options,
    precision_of,
    read_manifest,
)
from cdkd_edge.engines.tensorrt.find import TENSORRT, TENSORRT_RTX, NoGpu, find_gpu, tensorrt_is_installed

if TYPE_CHECKING:
    from cdkd_edge.engines.protocol import Engine, Log, Note
    from cdkd_edge.engines.tensorrt.layers import EngineLayers
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions


@dataclass(frozen=True)
class Runtime:
    """One way to build engines from graphs and to run them."""

    name: str  # as ``--runtime`` takes it
    title: str  # for messages
    manifest_names: tuple[str, ...]  # what the manifests of its engines call it
    suffix: str  # how the names of its engines end
    on_cpu: bool  # whether it computes on the CPU, and not on a GPU
    precisions: tuple[str, ...]  # what it can run
    rivals_of_int8: tuple[str, ...]  # its precisions that an INT8 engine on the same processor has to be faster than
    has_options: bool  # whether :class:`TensorRTOptions` apply to it, among them targets: GPUs that are not here
    why_not_here: Callable[[], str | None]  # why it cannot run on this machine; None if it can
    build: Callable[[Path, Path, str, TensorRTOptions | None, Note, Log], EngineManifest]
    """From graph, destination, precision, options, and where notes and log lines go."""
    load: Callable[[Path, EngineManifest, int | None], Engine]
    """From an engine file, its checked manifest and the number of CPU threads."""
    read_layers: Callable[[Path, EngineManifest], EngineLayers | None] | None
    """The layers that were listed at the build, None if they were not. No function: the engine is an ONNX file."""


def _build_cpu(graph: Path, destination: Path, precision: str, options: object, note: Note, log: Log) -> EngineManifest:
    from cdkd_edge.engines.onnxruntime import build_cpu_engine

    return build_cpu_engine(graph, destination)


def _load_cpu(path: Path, manifest: EngineManifest, threads: int | None) -> Engine:
    from cdkd_edge.engines.onnxruntime import CpuEngine

    return CpuEngine(path, manifest, threads)


def _build_openvino(
    graph: Path, destination: Path, precision: str, options: object, note: Note, log: Log
) -> EngineManifest:
    from cdkd_edge.engines.openvino import build_openvino_engine

    return build_openvino_engine(graph, destination, precision)


def _load_openvino(path: Path, manifest: EngineManifest, threads: int | None) -> Engine:
    from cdkd_edge.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(path, manifest, threads)


def _why_no_openvino() -> str | None:
    return None if find_spec("openvino") else "OpenVINO is not installed here"


def _build_tensorrt(
    graph: Path, destination: Path, precision: str, options: TensorRTOptions | None, note: Note, log: Log
) -> EngineManifest:
    from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions

    return build_tensorrt_engine(graph, destination, options or TensorRTOptions(), note, log)


def _load_tensorrt(path: Path, manifest: EngineManifest, threads: int | None) -> Engine:
    from cdkd_edge.engines.tensorrt.runner import load_tensorrt_engine

    return load_tensorrt_engine(path, manifest)


def _layers_of_tensorrt(path: Path, manifest: EngineManifest) -> EngineLayers | None:
    from cdkd_edge.engines.tensorrt.layers import read_layers

    return read_layers(path, manifest.artefact.sha256)


def _why_no_tensorrt() -> str | None:
    if not tensorrt_is_installed():
        return "TensorRT is not installed here"
    gpu = find_gpu()
    return gpu.reason if isinstance(gpu, NoGpu) else None


_ROWS = (
    Runtime(
        name="tensorrt",
        title="TensorRT on a GPU",
        manifest_names=(TENSORRT, TENSORRT_RTX),
        suffix=".engine",
        on_cpu=False,
        precisions=("fp32", "fp16", "int8"),
        rivals_of_int8=("fp16",),
        has_options=True,
        why_not_here=_why_no_tensorrt,
        build=_build_tensorrt,
        load=_load_tensorrt,
        read_layers=_layers_of_tensorrt,
    ),
    Runtime(
        name="cpu",
        title="ONNX Runtime on the CPU",
        manifest_names=(ONNXRUNTIME_CPU,),
        suffix=".cpu.onnx",
        on_cpu=True,
        precisions=("fp32", "int8"),  # ONNX Runtime computes FP16 in FP32 on a CPU: docs/decisions.md
        rivals_of_int8=("fp32",),
        has_options=False,
        why_not_here=lambda: None,
        build=_build_cpu,
        load=_load_cpu,
        read_layers=None,
    ),
    Runtime(
        name="openvino",
        title="OpenVINO on the CPU",
        manifest_names=(OPENVINO_CPU,),
        suffix=".openvino.onnx",
        on_cpu=True,
        precisions=("fp32", "bf16"),  # its INT8 is no faster than ONNX Runtime's, and convolutions are wrong
        rivals_of_int8=("fp32", "bf16"),
        has_options=False,
        why_not_here=_why_no_openvino,
        build=_build_openvino,
        load=_load_openvino,
        read_layers=None,
    ),
)
RUNTIMES = {row.name: row for row in _ROWS}
"""By the name that ``--runtime`` takes; the preferred one first."""


def choose_runtime(name: str, *, targets: tuple[str, ...] = (), precision: str | None = None) -> Runtime:
    """The runtime of that name; ``auto`` is the first that can run here, or that can compile for ``targets``.

    With a ``precision``, ``auto`` passes over those that cannot run it, unless none can.

    Raises:
        UsageError: there is no such runtime.
    """
    if name != "auto":
        if name not in RUNTIMES:
            raise UsageError(f"{name!r} is no runtime", hint=f"--runtime is one of auto, {', '.join(RUNTIMES)}")
        return RUNTIMES[name]
    if targets:  # where the compiler is missing, the build says so
        return next(runtime for runtime in RUNTIMES.values() if runtime.has_options)
    here = [runtime for runtime in RUNTIMES.values() if runtime.why_not_here() is None]
    return next((runtime for runtime in here if precision in runtime.precisions), here[0])


def runtime_of(manifest: EngineManifest) -> Runtime:
    """The runtime that an engine was built for.

    Raises:
        EngineError: this release does not have it.
    """
    for runtime in RUNTIMES.values():
        if manifest.runtime in runtime.manifest_names:
            return runtime
    file = manifest.artefact.file
    raise EngineError(f"{file} needs the runtime {manifest.runtime!r}, which this release does not have")


def load_engine(path: Path, *, threads: int | None = None) -> Engine:
    """Load an engine after its manifest has been checked against the file and this machine.

    ``threads`` are CPU threads for one tile (CPU engines only).

    Raises:
        ManifestError: no manifest, or the file is not the one it describes.
        EngineError: the engine cannot run here.
    """
    manifest = read_manifest(path, EngineManifest)
    return runtime_of(manifest).load(path, manifest, threads)


def build_engine(
    graph: Path,
    destination: Path,
    runtime: Runtime,
    options: TensorRTOptions | None = None,
    note: Note = lambda text: None,
    log: Log = lambda severity, text: None,
    precision: str | None = None,
) -> EngineManifest:
    """Build the engine of an exported graph with its manifest, in the graph's precision; ``bf16`` of an FP32 graph.

    Raises:
        EngineError: the runtime cannot run the graph's precision, or refuses the graph.
        CdkdEdgeError: see the function that builds for the runtime.
    """
    precision = precision or precision_of(graph) or "fp32"
    require_precision(runtime, precision, graph)
    return runtime.build(graph, destination, precision, options, note, log)


def require_precision(runtime: Runtime, precision: str, graph: Path) -> None:
    """Make sure that a runtime can run a precision, before an engine is built from a graph (or one made from it).

    Raises:
        EngineError: it cannot; says what can, and what is missing here for that.
    """
    if precision in runtime.precisions:
        return
    source = read_manifest(graph, GraphManifest)
    able = [other for other in RUNTIMES.values() if precision in other.precisions]
    needed = min(able, key=lambda other: other.on_cpu != runtime.on_cpu)
    missing = needed.why_not_here() or f"{runtime.title} cannot run {precision.upper()}"
    typed = f"cdkd-edge build {build_options(precision, source.output)}"
    hint = f"carry {graph} and its .json to a board and run `{typed}` there; for this machine: cdkd-edge build"
    if needed.on_cpu:
        installed = needed.why_not_here() is None
        hint = f"{typed} --runtime {needed.name}" if installed else f"pip install 'cdkd-edge[{needed.name}]'"
    article = "a" if precision == "bf16" else "an"
    raise EngineError(f"{article} {precision.upper()} engine needs {needed.title}: {missing}", hint=hint)
