"""The roofline of what a run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdkd_edge.bench.record import ModelledBound
from cdkd_edge.bench.roofline.devices import Device, find_device, load_device
from cdkd_edge.bench.roofline.model import roofline, share_of_bound
from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.runtimes import runtime_of


def modelled_bound(
    engine: EngineManifest,
    folders: Sequence[Path],
    tiles_per_second: float | None,
    *,
    device: str | None = None,
    mode: str | None = None,
    root: Path = Path("/"),
) -> tuple[ModelledBound | None, str]:
    """The bound of an engine's graph on the device it runs on, or None and why there is none.

    Args:
        engine: its manifest.
        folders: where its graph may be.
        tiles_per_second: measured; None where there is no such figure.
        device: name of a device file. Default: the one of this board, or of the GPU the engine was built on.
        mode: power mode the board is in; None: not known.
        root: of the file tree with ``proc/device-tree``.

    Raises:
        UsageError: there is no device file of that name.
    """
    known = load_device(device) if device is not None else None
    if runtime_of(engine).on_cpu:
        return None, "the roofline models GPUs; this engine runs on the CPU"
    known = known or _device_of(engine, root)
    if known is None:
        gpu = engine.tensorrt.gpu if engine.tensorrt else None
        return None, f"there is no device file for {gpu or engine.device} (--device)"
    graph = next((folder / engine.graph.file for folder in folders if _is(folder / engine.graph.file, engine)), None)
    if graph is None:
        return None, f"its graph {engine.graph.file} is not beside the engine or in the workspace"
    name = _mode_of(known, mode)
    if name is None:
        return None, f"{known.title} is in power mode {mode or 'unknown'}, which its device file does not have"
    try:
        found = roofline(graph, known, mode=name, precision=engine.precision)
    except CdkdEdgeError as error:
        return None, error.message
    # What the compiler made of it: with fused attention if it fused any.
    wanted = "fused" if engine.attention_fused else "unfused"
    fitting = [one for one in found.estimates if one.attention == wanted] or list(found.estimates)
    best = max(fitting, key=lambda one: one.bound_fps)
    return (
        ModelledBound(
            device=known.name,
            mode=name,
            precision=best.precision,
            bound_tiles_per_second=best.bound_fps,
            expected_tiles_per_second=(best.low_fps, best.high_fps),
            share_of_bound=share_of_bound(tiles_per_second, best) if tiles_per_second else None,
        ),
        "",
    )


def _device_of(engine: EngineManifest, root: Path) -> Device | None:
    try:
        part = (root / "proc/device-tree/compatible").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        part = None
    return find_device(part=part, gpu=engine.tensorrt.gpu if engine.tensorrt else None)


def _mode_of(device: Device, mode: str | None) -> str | None:
    """The device file's name of a power mode; of a device with a single mode, that one."""
    if mode in device.modes:
        return mode
    return next(iter(device.modes)) if mode is None and len(device.modes) == 1 else None


def _is(path: Path, engine: EngineManifest) -> bool:
    return path.is_file() and sha256_of(path) == engine.graph.sha256
