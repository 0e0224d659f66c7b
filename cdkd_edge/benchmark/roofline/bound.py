"""The modelled bound that stands beside a measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.benchmark.record import ModelledBound
from cdkd_edge.benchmark.roofline.devices import Device, find_device, load_device
from cdkd_edge.benchmark.roofline.model import GRAPH, LAYERS, Estimate, model_engine, roofline
from cdkd_edge.board.jetson import device_tree
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, ManifestError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.runtimes import runtime_of
from cdkd_edge.engines.tensorrt.layers import read_layers


@dataclass(frozen=True)
class ModelledEngine:
    """An engine as the roofline sees it on a device."""

    device: Device
    estimate: Estimate
    source: str  # :data:`LAYERS` or :data:`GRAPH`

    def bound(self, tiles_per_second: float | None) -> ModelledBound:
        """The bound beside a measured speed; None if there is none.

        A share of the bound above 1 means that an assumption is wrong: higher clocks than the power mode's, or data
        kept in a cache.
        """
        best = self.estimate
        share = tiles_per_second / best.bound_fps if tiles_per_second else None
        expected = best.low_fps, best.high_fps
        return ModelledBound(
            self.device.name, best.mode.name, best.precision, best.bound_fps, expected, share, self.source
        )


def model_of(
    engine: EngineManifest,
    folders: Sequence[Path],
    *,
    device: str | None = None,
    mode: str | None = None,
    root: Path = Path("/"),
) -> tuple[ModelledEngine | None, str]:
    """The model of an engine on the device it runs on, or None and why there is none.

    It is made from the layers that TensorRT listed when it built the engine; without them, from the graph.

    Args:
        folders: folders to look for its layers and its graph in.
        device: name of a device file. Default: that of this board, or of the GPU the engine was built on.
        mode: the board's power mode; None: not known.
        root: root of the file tree with ``proc/device-tree``.

    Raises:
        UsageError: there is no device file of that name.
    """
    chosen = load_device(device) if device is not None else None
    if runtime_of(engine).on_cpu:
        return None, "the roofline models GPUs, and this engine runs on the CPU"
    gpu = engine.tensorrt.gpu if engine.tensorrt else None
    known = chosen or find_device(part=device_tree(root, "compatible").text, gpu=gpu)
    if known is None:
        return None, f"there is no device file for {gpu or engine.device}; name one with --device"
    name = next(iter(known.modes)) if mode is None and len(known.modes) == 1 else mode
    if name not in known.modes:
        return None, f"{known.title} is in power mode {mode or 'unknown'}, which is not in its device file"
    best, source, reason = _estimate_of_layers(engine, folders, known, name), LAYERS, ""
    if best is None:
        (best, reason), source = _estimate_of_graph(engine, folders, known, name), GRAPH
    return (ModelledEngine(known, best, source), "") if best is not None else (None, reason)


def _estimate_of_layers(engine: EngineManifest, folders: Sequence[Path], device: Device, mode: str) -> Estimate | None:
    """From the layers that TensorRT listed when it built the engine; None where there is no list that can be used."""
    for folder in folders:
        try:
            compiled = read_layers(folder / engine.artefact.file, engine.artefact.sha256)
            if compiled is not None:
                return model_engine(compiled, device, mode=mode)[0]
        except (ManifestError, EngineError):
            continue
    return None


def graph_of(engine: EngineManifest, folders: Sequence[Path]) -> tuple[Path | None, str]:
    """The graph that an engine was built from, or None and why there is none."""
    paths = [folder / engine.graph.file for folder in folders]
    found = next((path for path in paths if path.is_file() and sha256_of(path) == engine.graph.sha256), None)
    return found, f"its graph {engine.graph.file} is neither beside the engine nor in the workspace"


def _estimate_of_graph(
    engine: EngineManifest, folders: Sequence[Path], device: Device, mode: str
) -> tuple[Estimate | None, str]:
    """From its graph, or None and why there is none."""
    graph, reason = graph_of(engine, folders)
    if graph is None:
        return None, reason
    try:
        found = roofline(graph, device, mode=mode, precision=engine.precision)
    except CdkdEdgeError as error:
        return None, error.message
    # Attention as the compiler built it: fused if it fused any block.
    wanted = "fused" if engine.attention_fused else "unfused"
    fitting = [one for one in found.estimates if one.attention == wanted] or list(found.estimates)
    return max(fitting, key=lambda one: one.bound_fps), ""
