"""From an engine file to execution contexts: TensorRT's objects, checked against the manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdkd_edge.engines.tensorrt.listen import Listener
from cdkd_edge.errors import EngineError
from cdkd_edge.files import whole_file
from cdkd_edge.manifest import EngineManifest

IMAGE, LABELS = "image", "labels"


@dataclass
class Deserialised:
    """An engine in memory. The runtime must outlive the engine, and the engine its contexts."""

    runtime: Any
    engine: Any
    scratch_bytes: int
    """Device memory that each execution context takes for itself."""


def rebuild_hint(manifest: EngineManifest) -> str:
    """The command that makes the engine anew."""
    option = f" --{manifest.precision}" if manifest.precision in ("fp16", "int8") else ""
    return f"build it again from {manifest.graph.file}: cdkd-edge build{option}"


def deserialise(path: Path, manifest: EngineManifest, tensorrt: Any, listener: Listener) -> Deserialised:
    """Read an engine file.

    Args:
        path: the file; its hash has been compared with the manifest.
        manifest: what it should be.
        tensorrt: what ``find_tensorrt()`` returns.
        listener: hears TensorRT's log.

    Raises:
        EngineError: TensorRT refuses it, or it is not an engine of this package.
        OSError: the file cannot be read.
    """
    serialised = path.read_bytes()
    with listener:
        runtime = tensorrt.module.Runtime(tensorrt.logger)
        engine = runtime.deserialize_cuda_engine(serialised)
    if engine is None:
        raise EngineError(
            f"{tensorrt.name} cannot load {path}{listener.said()}",
            hint=f"it is damaged, or of another TensorRT or GPU; {rebuild_hint(manifest)}",
        )
    _require_tensors(path, manifest, tensorrt.module, engine)
    # TensorRT 10 deprecated the first in favour of the second; 11 has the second only.
    scratch = getattr(engine, "device_memory_size_v2", None)
    return Deserialised(runtime, engine, int(engine.device_memory_size if scratch is None else scratch))


def _require_tensors(path: Path, manifest: EngineManifest, trt: Any, engine: Any) -> None:
    """One uint8 image in, one uint8 label map out, of the manifest's size."""
    n, side = manifest.batch, manifest.tile
    wanted = {
        IMAGE: (trt.TensorIOMode.INPUT, (n, 3, side, side)),
        LABELS: (trt.TensorIOMode.OUTPUT, (n, side, side)),
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: (engine.get_tensor_mode(name), tuple(engine.get_tensor_shape(name))) for name in names}
    others = [name for name in names if engine.get_tensor_dtype(name) != trt.DataType.UINT8]
    if found != wanted or others:
        tensors = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, (_, shape) in found.items())
        raise EngineError(
            f"{path} has other tensors than its manifest says: {tensors}"
            + (f"; not uint8: {', '.join(others)}" if others else ""),
            hint=rebuild_hint(manifest),
        )


class Contexts:
    """Makes execution contexts; TensorRT-RTX compiles for the GPU then, once for all of them.

    TensorRT-RTX keeps what it compiled in a *runtime cache*. It is shared between contexts, and with a
    file between processes; a file that does not fit this GPU and release is ignored by TensorRT-RTX itself.
    """

    def __init__(self, engine: Any, cache_file: Path | None) -> None:
        self._engine = engine
        self._file = cache_file
        self._config: Any = None
        self._cache: Any = None
        if not hasattr(engine, "create_runtime_config"):
            return
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):  # TensorRT itself has the first but not the second
            return
        self._config, self._cache = config, config.create_runtime_cache()
        if cache_file is not None:
            with contextlib.suppress(OSError):
                self._cache.deserialize(cache_file.read_bytes())
        config.set_runtime_cache(self._cache)

    def make(self, fail: Callable[[], EngineError]) -> Any:
        """One context; ``fail`` makes the error where TensorRT gives none."""
        configured = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*configured)
        if context is None:
            raise fail()
        return context

    def save(self) -> None:
        """Write the cache file, if one was asked for; without it the next start only takes longer."""
        if self._file is None or self._cache is None:
            return
        with contextlib.suppress(OSError), whole_file(self._file) as temporary:
            temporary.write_bytes(bytes(memoryview(self._cache.serialize())))
