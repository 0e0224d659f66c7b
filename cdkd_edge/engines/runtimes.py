"""Find the engine class for an engine file."""

from __future__ import annotations

from pathlib import Path

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.manifest import EngineManifest, read_manifest
from cdkd_edge.engines.protocol import Engine


def load_engine(path: Path, *, threads: int | None = None) -> Engine:
    """Load an engine after its manifest has been checked against the file and this machine.

    Args:
        path: an engine file with its manifest beside it.
        threads: CPU threads for one tile (CPU engines only).

    Raises:
        ManifestError: no manifest, or the file is not the one it describes.
        EngineError: the engine cannot run here.
    """
    manifest = read_manifest(path, EngineManifest)
    if manifest.runtime == "onnxruntime-cpu":
        from cdkd_edge.engines.onnxruntime import CpuEngine

        return CpuEngine(path, manifest, threads)
    if manifest.runtime in ("tensorrt", "tensorrt-rtx"):
        from cdkd_edge.engines.tensorrt.runner import load_tensorrt_engine

        return load_tensorrt_engine(path, manifest)
    raise EngineError(f"{path} needs the runtime {manifest.runtime!r}, which this release does not have")
