"""Where an engine goes, and whether INT8 pays. (From which graph it is built: :mod:`cdkd_edge.precision.graph`.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.manifest import EngineManifest, output_of, precision_of
from cdkd_edge.core.output_kinds import LABELS
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.engines.runtimes import Runtime, load_engine, runtime_of
from cdkd_edge.engines.speed import speed_ratio


def engine_path(space: Workspace, graph: Path, runtime: Runtime) -> Path:
    """Where the engine of a graph goes: ``engines/NAME.PRECISION.engine``, ``engines/NAME.PRECISION.cpu.onnx``.

    What it gives besides labels follows the precision: ``engines/NAME.fp16.confidence.engine``.
    """
    precision = precision_of(graph) or "fp32"
    kind = _suffix(output_of(graph))
    name = graph.stem.removesuffix(kind).removesuffix(f".{precision}")
    return space.engines / f"{name}.{precision}{kind}{runtime.suffix}"


@dataclass(frozen=True)
class Rival:
    """An INT8 engine beside the engine that it has to be faster than."""

    path: Path
    ratio: float
    """Tiles per second of the INT8 engine over those of the other."""


def compare_speed(
    space: Workspace, engine: Path, manifest: EngineManifest, progress: Callable[[str], None] = lambda step: None
) -> Rival | None:
    """Time a new INT8 engine against the FP16 engine beside it (on a CPU: FP32) of the same network, if it is there.

    INT8 can be slower than FP16 on vision transformers. None for other precisions, where there is no such engine, and
    where one of the two cannot run here.
    """
    if manifest.precision != "int8":
        return None
    kind = _suffix(manifest.output)
    runtime = runtime_of(manifest)
    suffix = f".int8{kind}{runtime.suffix}"
    if not engine.name.endswith(suffix):
        return None
    path = engine.with_name(f"{engine.name.removesuffix(suffix)}.{runtime.fastest_float}{kind}{runtime.suffix}")
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
