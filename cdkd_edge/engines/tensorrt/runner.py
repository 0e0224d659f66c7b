"""The engine of a GPU: TensorRT or TensorRT-RTX, with buffers that are allocated once.

Each slot has its own buffers, stream and execution context, so slots need no order among themselves (a context must
not run in two streams at a time). Contexts share the weights; each has its own scratch memory (about 44 MB for the
paper's network in FP16), so there are fewer slots if scratch would take too much.

A run fills the outputs, copies the tiles in, computes, copies the outputs out and records an event. On a GPU that
shares the CPU's memory nothing is copied. If the binding has CUDA graphs, all but the event is one graph.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.core.output_kinds import LABELS
from cdkd_edge.engines.cuda.gpu import Gpu
from cdkd_edge.engines.cuda.memory import Buffer, Stream
from cdkd_edge.engines.protocol import NamedOutputs, UInt8Array
from cdkd_edge.engines.tensorrt import find
from cdkd_edge.engines.tensorrt.find import ErrorLog, LogTo, rebuild_hint

IMAGE = "image"  # name of an engine's input

SLOTS = 3  # one tile being read, one computed, one written
SCRATCH_SHARE = 0.5  # share of the free GPU memory that the contexts' scratch may take


class TensorRTEngine(NamedOutputs):
    """An engine file on a GPU. See :class:`cdkd_edge.engines.protocol.Engine`.

    ``output(slot)`` has labels only after the slot's ``wait``: between ``launch`` and ``wait`` it is a constant array
    of 255, and after a failure or interruption the slot's labels are 255. Confidence and probabilities are then 0.
    """

    def __init__(
        self,
        path: Path,
        manifest: EngineManifest,
        *,
        gpu: Gpu | None = None,
        tensorrt: Any = None,
        log_to: LogTo | None = None,
        slots: int = SLOTS,
        cuda_graph: bool = True,
    ) -> None:
        """Load an engine whose manifest has been read and compared with this machine.

        Args:
            path: the engine file.
            manifest: its manifest.
            gpu: where to run. Default: the first GPU, through the installed CUDA binding.
            tensorrt: what to run with (``module``, ``logger``, ``name``). Default: the TensorRT that is installed.
            log_to: redirects its log, for the messages of errors.
            slots: the most buffer slots to make.
            cuda_graph: launch through a CUDA graph where that is possible.

        Raises:
            EngineError: TensorRT, the GPU or its memory fails; nothing stays allocated.
            MissingExtraError: no CUDA binding is installed.
        """
        self.manifest = manifest
        self.tile, self.batch = manifest.tile, manifest.batch
        self.schema, self.artefact = manifest.schema, manifest.artefact
        self.output_kind = manifest.output
        self.slots = 0
        self.no_graph: str | None = None if cuda_graph else "not asked for"
        """Why tiles are not launched through a CUDA graph; None if they are."""
        self._slots: list[_Slot] = []
        self._loaded: LoadedEngine | None = None
        self._blank = {name: np.full(shape, _fill(name), np.uint8) for name, shape in manifest.outputs.items()}
        for array in self._blank.values():
            array.flags.writeable = False
        if tensorrt is None:
            tensorrt, log_to = find.find_tensorrt(), find.log_to
        if gpu is None:
            from cdkd_edge.engines.cuda.gpu import open_gpu

            gpu = open_gpu()
        self.gpu = gpu
        self._errors = ErrorLog(log_to)
        self._loaded = LoadedEngine(path, manifest, tensorrt, self._errors)
        try:
            with gpu.current():
                self._load(slots)
        except BaseException:
            self.close()
            raise

    def _load(self, slots: int) -> None:
        loaded = self._loaded
        assert loaded is not None
        loaded.load()
        free, _ = self.gpu.memory()
        for _ in range(affordable_slots(slots, loaded.scratch_bytes, free)):
            self._slots.append(_Slot(self.gpu, self.manifest, self._errors))
            self._slots[-1].prepare(loaded)
        for slot in self._slots:
            # A first run, also needed before a capture: TensorRT leaves some work to it.
            slot.launch()
            slot.wait()
            slot.clear()
        self._capture()
        self.slots = len(self._slots)

    def _capture(self) -> None:
        if self.no_graph is None:
            self.no_graph = self.gpu.no_graphs
        if self.no_graph is not None:
            return
        try:
            for slot in self._slots:
                slot.capture()
        except EngineError as error:
            self.no_graph = error.message
            for slot in self._slots:
                slot.stream.forget()

    def input(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.input`."""
        return self._slot(slot).image.array

    def named_output(self, slot: int, name: str) -> UInt8Array:
        """An output of the slot by name; see the class."""
        chosen = self._slot(slot)
        return self._blank[name] if chosen.running else chosen.outputs[name].array

    def launch(self, slot: int) -> None:
        """Start computing the slot; returns before it is done.

        Raises:
            EngineError: TensorRT or CUDA failed; the slot's labels are 255.
        """
        chosen = self._slot(slot)
        with self.gpu.current():
            chosen.launch()

    def wait(self, slot: int) -> None:
        """Sleep until the slot's labels are there; returns at once where nothing was launched.

        Raises:
            EngineError: the run failed on the GPU; the slot's labels are 255.
        """
        chosen = self._slot(slot)
        if chosen.running:
            with self.gpu.current():
                chosen.wait()

    def close(self) -> None:
        """Release everything on the GPU, also after a failure. Idempotent. Arrays handed out before stay valid."""
        slots, self._slots = self._slots, []
        loaded, self._loaded = self._loaded, None
        self.slots = 0
        if not slots and loaded is None:
            return
        # After an error that lost the context nothing can be freed, and every call raises that error again.
        with contextlib.suppress(EngineError), self.gpu.current():
            for slot in slots:
                if slot.running:
                    slot.stop()
            for slot in slots:
                slot.release()
            if loaded is not None:
                loaded.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self.close()

    def _slot(self, slot: int) -> _Slot:
        if not self._slots:
            raise EngineError(f"the engine {self.artefact.file} is closed")
        return self._slots[slot]


class LoadedEngine:
    """An engine file in memory: TensorRT's runtime and engine.

    Only this class holds TensorRT's objects. After an error the frames of its traceback keep local variables alive; an
    object of TensorRT among them would be destroyed late, out of order and without the GPU's context.

    All methods are called while the GPU's context is current.
    """

    def __init__(self, path: Path, manifest: EngineManifest, tensorrt: Any, errors: ErrorLog) -> None:
        self._path, self._manifest, self._tensorrt, self._errors = path, manifest, tensorrt, errors
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None

    def load(self) -> None:
        """Read the file.

        Raises:
            EngineError: TensorRT refuses the engine, or it is not one of this package.
            OSError: the file cannot be read.
        """
        serialised = self._path.read_bytes()
        with self._errors:
            self._runtime = self._tensorrt.module.Runtime(self._tensorrt.logger)
            self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot load {self._path}{self._errors.reason()}",
                hint=f"it is damaged, or of another TensorRT or GPU; {rebuild_hint(self._manifest)}",
            )
        self._require_tensors()
        self._share_compiled()

    @property
    def scratch_bytes(self) -> int:
        """Device memory that each execution context takes for itself."""
        # TensorRT 10 deprecated device_memory_size in favour of the other; 11 has the other only.
        size = getattr(self._engine, "device_memory_size_v2", None)
        return int(self._engine.device_memory_size if size is None else size)

    def new_context(self) -> Any:
        """Make an execution context; it must be gone before :meth:`close` is called.

        Raises:
            EngineError: TensorRT cannot.
        """
        configured = () if self._config is None else (self._config,)
        with self._errors:
            context = self._engine.create_execution_context(*configured)
        if context is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot prepare {self._path} "
                f"({self.scratch_bytes >> 20} MiB of scratch memory){self._errors.reason()}",
                hint=f"usually there is too little free GPU memory; if not, {rebuild_hint(self._manifest)}",
            )
        return context

    def close(self) -> None:
        """Destroy the objects in order; contexts must be gone. Idempotent."""
        self._cache = None
        self._config = None
        self._engine = None
        self._runtime = None

    def _share_compiled(self) -> None:
        """Let the contexts of TensorRT-RTX share what it compiles; TensorRT compiles nothing at this point."""
        if not hasattr(self._engine, "create_runtime_config"):
            return
        config = self._engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self._config, self._cache = config, config.create_runtime_cache()
            self._config.set_runtime_cache(self._cache)

    def _require_tensors(self) -> None:
        """Make sure that the engine takes one uint8 image and gives the manifest's uint8 outputs."""
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


class _Slot:
    """Buffers, stream and context of one batch. Methods are called while the GPU's context is current."""

    def __init__(self, gpu: Gpu, manifest: EngineManifest, errors: ErrorLog) -> None:
        n, side = manifest.batch, manifest.tile
        self.running = False
        """Launched and not waited for: the GPU may write to the outputs."""
        self.context: Any = None
        self._errors = errors
        with contextlib.ExitStack() as undo:
            self.image = Buffer(gpu, (n, 3, side, side))
            undo.callback(self.image.close)
            self.outputs: dict[str, Buffer] = {}
            for name, shape in manifest.outputs.items():
                self.outputs[name] = Buffer(gpu, shape)
                undo.callback(self.outputs[name].close)
            self.stream = Stream(gpu)
            undo.pop_all()
        self.image.array.fill(0)
        self.clear()

    def prepare(self, loaded: LoadedEngine) -> None:
        """Make the execution context and give it the buffers."""
        self.context = loaded.new_context()
        for name, buffer in {IMAGE: self.image, **self.outputs}.items():
            if not self.context.set_tensor_address(name, buffer.pointer):
                raise EngineError(f"TensorRT refuses the buffer for {name}")

    def clear(self) -> None:
        """Reset the host's side of the outputs: no labels, confidence 0."""
        for name, buffer in self.outputs.items():
            buffer.array.fill(_fill(name))

    def enqueue(self) -> None:
        """Put one run into the stream."""
        for name, buffer in self.outputs.items():
            buffer.clear(_fill(name), self.stream)
        self.image.upload(self.stream)
        with self._errors:
            accepted = self.context.execute_async_v3(self.stream.handle)
        if not accepted:
            raise EngineError(f"TensorRT failed on a tile{self._errors.reason()}")
        for buffer in self.outputs.values():
            buffer.download(self.stream)

    def capture(self) -> None:
        """Record a run as a CUDA graph, for all launches to come."""
        capturable = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX knows in advance
        if capturable is not None and not capturable(self.stream.handle):
            raise EngineError("TensorRT says that this engine cannot be captured")
        self.stream.capture(self.enqueue)

    def launch(self) -> None:
        if self.running:  # launched twice without waiting: the buffers are still in use
            self.stop()
        self.clear()
        self.running = True
        self._or_stop(self._start)

    def _start(self) -> None:
        if self.stream.captured:
            self.stream.replay()
        else:
            self.enqueue()
        self.stream.mark()

    def wait(self) -> None:
        self._or_stop(self.stream.wait)
        self.running = False

    def _or_stop(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:  # Ctrl-C as well
            self.stop()
            raise

    def stop(self) -> None:
        """Let the GPU finish its work, and drop the results."""
        with contextlib.suppress(EngineError):
            self.stream.drain()
        self.clear()
        self.running = False

    def release(self) -> None:
        """Free everything; a failure does not keep the rest from being freed."""
        with contextlib.suppress(EngineError):
            self.stream.forget()
        self.context = None
        parts: tuple[Stream | Buffer, ...] = (self.stream, self.image, *self.outputs.values())
        for part in parts:
            with contextlib.suppress(EngineError):
                part.close()


def load_tensorrt_engine(path: Path, manifest: EngineManifest) -> TensorRTEngine:
    """Load an engine onto the first GPU with the installed TensorRT.

    Raises:
        EngineError: it was built by another TensorRT or for another GPU; or as :class:`TensorRTEngine`.
        ManifestError: the manifest does not say by which.
    """
    tensorrt = find.find_tensorrt()
    find.require_loadable(manifest, tensorrt, find.find_gpu())
    return TensorRTEngine(path, manifest, tensorrt=tensorrt, log_to=find.log_to)


def _fill(name: str) -> int:
    """The value of an output where nothing was computed."""
    return NO_LABEL if name == LABELS else 0


def affordable_slots(wanted: int, scratch_bytes: int, free_bytes: int) -> int:
    """Number of contexts to make: at least one, at most ``wanted``, by their scratch memory."""
    affordable = int(free_bytes * SCRATCH_SHARE) // scratch_bytes if scratch_bytes > 0 else wanted
    return max(1, min(wanted, affordable))
