"""An engine file in memory: TensorRT's objects, checked against the manifest.

They are reached through :class:`LoadedEngine` alone. After an error the frames of its traceback keep local
variables alive; an object of TensorRT among them would die late, out of order and without the GPU's context.

Whether an engine fits this TensorRT and this GPU, found out before TensorRT is given the file.

Engines are neither portable across TensorRT releases nor across GPU models. TensorRT's own answers to a foreign
engine range from a log line about a magic tag to a crash.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.core.output_kinds import build_options
from cdkd_edge.engines.tensorrt.api import TensorRT
from cdkd_edge.engines.tensorrt.device import Gpu, NoGpu
from cdkd_edge.engines.tensorrt.messages import Listener


def require_loadable(manifest: EngineManifest, api: TensorRT, device: Gpu | NoGpu) -> None:
    """Compare an engine's manifest with what is here. Its file must have been checked against the manifest before.

    Raises:
        ManifestError: the manifest does not say what built the engine.
        EngineError: it was built by another TensorRT or for another GPU; says which, and what builds it here.
    """
    name, build = manifest.artefact.file, manifest.tensorrt
    if build is None:
        raise ManifestError(f"the manifest of {name} does not say which TensorRT built it", hint=_rebuild(manifest))
    if isinstance(device, NoGpu):
        raise EngineError(
            f"{name} is a TensorRT engine and {device.reason}",
            hint="here the CPU engine runs: cdkd-edge build --runtime cpu",
        )
    differences = []
    if (manifest.runtime, build.version) != (api.kind, api.version):
        built_by = TensorRT(None, manifest.runtime, build.version)
        differences.append(f"it was built by {built_by.name}, here is {api.name}")
    if build.targets:
        if device.compute_capability not in build.targets:
            differences.append(
                f"it was compiled for compute capability {', '.join(build.targets)}, "
                f"the {device.name} here has {device.compute_capability}"
            )
    elif (build.gpu, build.compute_capability) != (device.name, device.compute_capability):
        differences.append(
            f"it was built on {build.gpu} (compute capability {build.compute_capability}), "
            f"here is {device.name} ({device.compute_capability})"
        )
    if differences:
        raise EngineError(f"{name} does not fit: {'; '.join(differences)}", hint=_rebuild(manifest))


def _rebuild(manifest: EngineManifest) -> str:
    options = build_options(manifest.precision, manifest.output)
    return f"build it again here from {manifest.graph.file}: cdkd-edge build {options} --runtime tensorrt"


IMAGE = "image"


class LoadedEngine:
    """TensorRT's runtime and engine, and what makes execution contexts of them.

    TensorRT-RTX compiles for the GPU when a context is made, and keeps what it compiled in a *runtime cache*. That
    is shared between contexts, and with a file between processes; a file that does not fit this GPU
    and release TensorRT-RTX ignores.

    All methods are called while the GPU's context is current.
    """

    def __init__(self, path: Path, manifest: EngineManifest, tensorrt: Any, listener: Listener) -> None:
        """Nothing is read yet.

        Args:
            path: the file; its hash has been compared with the manifest.
            manifest: what it should be.
            tensorrt: what ``find_tensorrt()`` returns.
            listener: hears TensorRT's log.
        """
        self._path, self._manifest, self._tensorrt, self._listener = path, manifest, tensorrt, listener
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_file: Path | None = None

    def load(self, cache_file: Path | None = None) -> None:
        """Read the file.

        Args:
            cache_file: where TensorRT-RTX keeps what it compiled.

        Raises:
            EngineError: TensorRT refuses the engine, or it is not one of this package.
            OSError: the file cannot be read.
        """
        serialised = self._path.read_bytes()
        with self._listener:
            self._runtime = self._tensorrt.module.Runtime(self._tensorrt.logger)
            self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot load {self._path}{self._listener.said()}",
                hint=f"it is damaged, or of another TensorRT or GPU; {rebuild_hint(self._manifest)}",
            )
        self._require_tensors()
        self._use_cache(cache_file)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that each execution context takes for itself."""
        # TensorRT 10 deprecated device_memory_size in favour of the other; 11 has the other only.
        size = getattr(self._engine, "device_memory_size_v2", None)
        return int(self._engine.device_memory_size if size is None else size)

    def new_context(self) -> Any:
        """Make an execution context; to be kept where :meth:`close` is called after it is gone.

        Raises:
            EngineError: TensorRT cannot.
        """
        configured = () if self._config is None else (self._config,)
        with self._listener:
            context = self._engine.create_execution_context(*configured)
        if context is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot prepare {self._path} "
                f"({self.scratch_bytes >> 20} MiB of scratch memory){self._listener.said()}",
                hint=f"it is usually too little free GPU memory; else {rebuild_hint(self._manifest)}",
            )
        return context

    def save_cache(self) -> None:
        """Write the cache file, if one was asked for; without it the next start only takes longer."""
        if self._cache_file is None or self._cache is None:
            return
        with contextlib.suppress(OSError), whole_file(self._cache_file) as temporary:
            temporary.write_bytes(bytes(memoryview(self._cache.serialize())))

    def close(self) -> None:
        """Destroy what there is, in order; contexts must be gone. Twice is once."""
        self._cache = None
        self._config = None
        self._engine = None
        self._runtime = None

    def _use_cache(self, file: Path | None) -> None:
        if not hasattr(self._engine, "create_runtime_config"):
            return
        self._config = self._engine.create_runtime_config()
        if not hasattr(self._config, "create_runtime_cache"):  # TensorRT itself compiles nothing at this point
            self._config = None
            return
        self._cache, self._cache_file = self._config.create_runtime_cache(), file
        if file is not None:
            with contextlib.suppress(OSError):
                self._cache.deserialize(file.read_bytes())
        self._config.set_runtime_cache(self._cache)

    def _require_tensors(self) -> None:
        """One uint8 image in, the manifest's uint8 outputs out, all of its size."""
        trt, engine = self._tensorrt.module, self._engine
        try:
            n, side = self._manifest.batch, self._manifest.tile
            wanted = {
                IMAGE: (trt.TensorIOMode.INPUT, (n, 3, side, side)),
                **{name: (trt.TensorIOMode.OUTPUT, shape) for name, shape in self._manifest.outputs.items()},
            }
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            found = {name: (engine.get_tensor_mode(name), tuple(engine.get_tensor_shape(name))) for name in names}
            others = [name for name in names if engine.get_tensor_dtype(name) != trt.DataType.UINT8]
        finally:
            del engine
        if found != wanted or others:
            tensors = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, (_, shape) in found.items())
            raise EngineError(
                f"{self._path} has other tensors than its manifest says: {tensors}"
                + (f"; not uint8: {', '.join(others)}" if others else ""),
                hint=rebuild_hint(self._manifest),
            )


def rebuild_hint(manifest: EngineManifest) -> str:
    """The command that makes the engine anew."""
    options = build_options(manifest.precision, manifest.output)
    return f"build it again here from {manifest.graph.file}: cdkd-edge build {options} --runtime tensorrt"
