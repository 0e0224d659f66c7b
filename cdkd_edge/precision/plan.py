"""What `build` builds: for which runtime, under which name. (From which graph: :mod:`cdkd_edge.precision.graph`.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.core.errors import EngineError, ManifestError, UsageError
from cdkd_edge.core.manifest import EngineManifest, GraphManifest, output_of, precision_of, read_manifest
from cdkd_edge.core.output_kinds import LABELS, build_options
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.engines.speed import speed_ratio
from cdkd_edge.engines.tensorrt.api import tensorrt_is_installed
from cdkd_edge.engines.tensorrt.device import NoGpu, find_gpu
from cdkd_edge.engines.tensorrt.options import TensorRTOptions

CPU, TENSORRT = "cpu", "tensorrt"
RUNTIMES = ("auto", CPU, TENSORRT)


def choose_runtime(runtime: str, *, targets: tuple[str, ...] = ()) -> str:
    """``cpu`` or ``tensorrt``. ``auto``: TensorRT if it is installed and has a GPU or a target to build for.

    Raises:
        UsageError: there is no such runtime.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"{runtime!r} is no runtime", hint=f"--runtime is one of {', '.join(RUNTIMES)}")
    if runtime != "auto":
        return runtime
    if targets:  # only TensorRT has any; where it is missing, that is the answer
        return TENSORRT
    return TENSORRT if tensorrt_is_installed() and not isinstance(find_gpu(), NoGpu) else CPU


def engine_path(space: Workspace, graph: Path, runtime: str) -> Path:
    """Where the engine of a graph goes: ``engines/NAME.PRECISION.engine``, ``engines/NAME.PRECISION.cpu.onnx``.

    What it gives besides labels follows the precision: ``engines/NAME.fp16.confidence.engine``.
    """
    precision = precision_of(graph) or "fp32"
    kind = _suffix(output_of(graph))
    name = graph.stem.removesuffix(kind).removesuffix(f".{precision}")
    return space.engines / f"{name}.{precision}{kind}{'.cpu.onnx' if runtime == CPU else '.engine'}"


def build_engine(
    graph: Path,
    destination: Path,
    runtime: str,
    options: TensorRTOptions = TensorRTOptions(),
    progress: Callable[[str], None] = lambda step: None,
    log: Callable[[str, str], None] = lambda severity, text: None,
) -> EngineManifest:
    """Build a graph for ``cpu`` or ``tensorrt``; see there for the errors.

    Raises:
        EngineError: also if the CPU does not run the graph's precision.
    """
    if runtime == TENSORRT:
        from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine

        return build_tensorrt_engine(graph, destination, options, progress, log)
    from cdkd_edge.engines.onnxruntime import build_cpu_engine

    if precision_of(graph) == "fp16":
        raise no_fp16_here(graph)
    return build_cpu_engine(graph, destination)


@dataclass(frozen=True)
class Rival:
    """An INT8 engine beside the engine that it has to be faster than."""

    path: Path
    ratio: float
    """Tiles per second of the INT8 engine over those of the other."""


def compare_speed(
    space: Workspace, engine: Path, manifest: EngineManifest, progress: Callable[[str], None] = lambda step: None
) -> Rival | None:
    """Time a new INT8 engine against the workspace's FP16 engine (on a CPU: FP32) of the same network, if it is there.

    INT8 can be slower than FP16 on vision transformers. None for other precisions, where there is no such engine, and
    where one of the two cannot run here.
    """
    if manifest.precision != "int8":
        return None
    kind = _suffix(manifest.output)
    suffix = f".int8{kind}.cpu.onnx" if engine.suffix == ".onnx" else f".int8{kind}.engine"
    other = f".fp32{kind}.cpu.onnx" if engine.suffix == ".onnx" else f".fp16{kind}.engine"
    if not engine.name.endswith(suffix):
        return None
    path = engine.with_name(engine.name.removesuffix(suffix) + other)
    if not path.is_file():
        return None
    progress(f"timing against {path.name}")
    loaded: list[Engine] = []
    try:
        for file in (engine, path):
            loaded.append(load_engine(file))
        return Rival(path, speed_ratio(loaded[0], loaded[1]))
    except (EngineError, ManifestError):
        return None  # compiled for another machine, for example: nothing was measured
    finally:
        for one in loaded:
            one.close()


def _suffix(kind: str) -> str:
    return "" if kind == LABELS else f".{kind}"


def no_fp16_here(graph: Path) -> EngineError:
    """FP16 is TensorRT's: say what is missing, and that the graph (FP32 or FP16) is all the board needs."""
    source = read_manifest(graph, GraphManifest)
    if tensorrt_is_installed():
        gpu = find_gpu()
        missing = gpu.reason if isinstance(gpu, NoGpu) else "the CPU engine has no FP16 kernels"
    else:
        missing = "TensorRT is not installed here"
    return EngineError(
        f"an FP16 engine needs TensorRT on a GPU: {missing}",
        hint=f"carry {graph} and its .json to a board and run `cdkd-edge build "
        f"{build_options('fp16', source.output)}` there; for this machine: cdkd-edge build",
    )
