"""The engine of a GPU: TensorRT or TensorRT-RTX, with buffers that are allocated once.

Each slot has its own buffers, stream and execution context, so slots need no order among themselves (a context must
not run in two streams at a time). Contexts share the weights; each has its own scratch memory, so there are fewer
slots if scratch would take too much. A run fills the outputs, copies the tiles in, computes, copies the outputs out
and records an event. If the binding has CUDA graphs, all but the event is one graph.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.cuda.gpu import Gpu, open_gpu
from cdkd_edge.engines.cuda.memory import Buffer, CudaStream
from cdkd_edge.engines.protocol import (
    PROFILE_WARM_UP,
    ArtefactLabeller,
    Engine,
    KernelTimes,
    UInt8Array,
    blank_value,
    median_times,
    timed_run,
)
from cdkd_edge.engines.tensorrt import find
from cdkd_edge.engines.tensorrt.find import errors_said, rebuild_hint, scratch_bytes
from cdkd_edge.engines.tensorrt.layers import nodes_in_name, read_layers

IMAGE = "image"  # name of an engine's input
SLOTS = 3  # one tile being read, one computed, one written
SCRATCH_SHARE = 0.5  # share of the free GPU memory that the contexts' scratch may take


class TensorRTEngine(ArtefactLabeller, Engine):
    """An engine file on a GPU. See :class:`cdkd_edge.engines.protocol.Engine`.

    ``output(slot)`` has labels only after the slot's ``wait``: between ``launch`` and ``wait`` it is a constant array
    of 255, and after a failure or interruption the slot's labels are 255. Confidence and probabilities are then 0.

    TensorRT's objects are attributes here and in slots, never local variables: after an error the frames of its
    traceback keep those alive, and they would be destroyed late, out of order and without the GPU's context.
    """

    def __init__(
        self,
        path: Path,
        manifest: EngineManifest,
        *,
        gpu: Gpu | None = None,
        tensorrt: Any = None,
        cuda_graph: bool = True,
    ) -> None:
        """Load an engine whose manifest has been read and compared with this machine.

        Args:
            path: the engine file.
            manifest: its manifest.
            gpu: where to run. Default: the first GPU, through the installed CUDA binding.
            tensorrt: what to run with (``module``, ``logger``, ``name``). Default: the TensorRT that is installed.
            cuda_graph: launch through a CUDA graph where that is possible.

        Raises:
            EngineError: TensorRT, the GPU or its memory fails; nothing stays allocated.
            MissingExtraError: no CUDA binding is installed.
        """
        super().__init__(manifest)
        self.manifest = manifest
        self._path = path
        self.slots = 0  # until it is loaded, and after :meth:`close`
        self.no_graph = None if cuda_graph else "not asked for"  # why tiles are launched one call at a time
        self._slots: list[_Slot] = []
        self._held = contextlib.ExitStack()  # frees what was allocated, the last first
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._blank = {name: np.full(shape, blank_value(name), np.uint8) for name, shape in manifest.outputs.items()}
        for array in self._blank.values():
            array.flags.writeable = False
        self._tensorrt = tensorrt or find.find_tensorrt()
        self.gpu = gpu or open_gpu()
        try:
            with self.gpu.current():
                self._read(path)
                self._make_slots()
                self._record_graphs()
            self.slots = len(self._slots)
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        serialised = path.read_bytes()
        with errors_said() as said:
            self._runtime = self._tensorrt.module.Runtime(self._tensorrt.logger)
            self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot load {path}{said}",
                hint=f"it is damaged, or of another TensorRT or GPU; {rebuild_hint(self.manifest)}",
            )
        self._require_tensors(path)
        if hasattr(self._engine, "create_runtime_config"):  # TensorRT-RTX: let the contexts share what it compiles
            self._config = self._engine.create_runtime_config()
            if hasattr(self._config, "create_runtime_cache"):
                self._cache = self._config.create_runtime_cache()
                self._config.set_runtime_cache(self._cache)
            else:
                self._config = None

    def _require_tensors(self, path: Path) -> None:
        """Make sure that the engine takes one uint8 image and gives the manifest's uint8 outputs."""
        trt = self._tensorrt.module
        wanted = {name: (trt.TensorIOMode.OUTPUT, shape) for name, shape in self.manifest.outputs.items()}
        wanted[IMAGE] = (trt.TensorIOMode.INPUT, (self.batch, 3, self.tile, self.tile))
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        found = {name: (self._engine.get_tensor_mode(name), shape) for name, shape in shapes.items()}
        others = [name for name in names if self._engine.get_tensor_dtype(name) != trt.DataType.UINT8]
        if found != wanted or others:
            tensors = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            raise EngineError(
                f"{path} has other tensors than its manifest says: {tensors}"
                + (f"; not uint8: {', '.join(others)}" if others else ""),
                hint=rebuild_hint(self.manifest),
            )

    def _make_slots(self) -> None:
        free, _ = self.gpu.memory()
        for _ in range(affordable_slots(SLOTS, scratch_bytes(self._engine), free)):
            self._slots.append(self._make_slot(self._held))
        for slot in self._slots:
            # A first run, also needed before a capture: TensorRT leaves some work to it.
            slot.launch()
            slot.wait()
            slot.clear()

    def _make_slot(self, held: contextlib.ExitStack) -> _Slot:
        slot, scratch = _Slot(self.gpu, self.manifest, held), scratch_bytes(self._engine) >> 20
        with errors_said() as said:
            slot.context = self._engine.create_execution_context(*(() if self._config is None else (self._config,)))
        if slot.context is None:
            raise EngineError(
                f"{self._tensorrt.name} cannot prepare {self._path} ({scratch} MiB of scratch memory){said}",
                hint=f"usually there is too little free GPU memory; if not, {rebuild_hint(self.manifest)}",
            )
        slot.bind()
        return slot

    def _record_graphs(self) -> None:
        self.no_graph = self.no_graph or self.gpu.no_graphs
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

    def kernel_times(self, runs: int) -> KernelTimes:
        """See :meth:`cdkd_edge.engines.protocol.Engine.kernel_times`.

        It runs in a context of its own, because TensorRT never takes a profiler off a context again, and without a CUDA
        graph. As in NVIDIA's ``trtexec``, a run only records events, and the profiler is called when it is done.
        """
        listed = read_layers(self._path, self.artefact.sha256)
        nodes = {layer.name: layer.nodes for layer in listed.layers} if listed else {}
        tiles = self._slot(0).image.array
        plain: list[float] = []
        profiled: list[float] = []
        reported: list[list[tuple[str, float]]] = []
        with self.gpu.current(), contextlib.ExitStack() as held:
            slot = self._make_slot(held)
            held.callback(slot.stop)  # Ctrl-C may come while the GPU still writes to the buffers
            slot.image.array[:] = tiles
            slot.context.profiler = _profiler(self._tensorrt.module, reported)
            slot.context.enqueue_emits_profile = False
            for _ in range(PROFILE_WARM_UP + runs):
                plain.append(timed_run(self))
                started = time.perf_counter()
                slot.launch()
                slot.wait()
                profiled.append(time.perf_counter() - started)
                reported.append([])
                with errors_said() as said:
                    told = slot.context.report_to_profiler()
                if not told:
                    raise EngineError(f"{self._tensorrt.name} does not tell the times of layers{said}")
        return median_times(plain, profiled, reported, lambda name: nodes.get(name) or nodes_in_name(name))

    def close(self) -> None:
        """Release everything on the GPU, also after a failure. Idempotent. Arrays handed out before stay valid."""
        slots, self._slots = self._slots, []
        self.slots, held = 0, self._held.pop_all()
        if self._runtime is None:
            return
        # After an error that lost the context nothing can be freed, and every call raises that error again.
        with contextlib.suppress(EngineError), self.gpu.current():
            try:
                with held:
                    for slot in slots:
                        if slot.running:
                            slot.stop()
            finally:
                self._cache = self._config = self._engine = self._runtime = None  # destroyed in this order

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self.close()

    def _slot(self, slot: int) -> _Slot:
        if not self._slots:
            raise EngineError(f"the engine {self.artefact.file} is closed")
        return self._slots[slot]


class _Slot:
    """Buffers, stream and context of one batch. Methods are called while the GPU's context is current."""

    def __init__(self, gpu: Gpu, manifest: EngineManifest, held: contextlib.ExitStack) -> None:
        """Allocate the buffers and the stream; ``held`` frees them, and whatever is made later."""
        self.running = False  # launched and not waited for: the GPU may write to the outputs
        self.context: Any = None
        self.outputs: dict[str, Buffer] = {}
        self.image = Buffer(gpu, (manifest.batch, 3, manifest.tile, manifest.tile))
        held.callback(self.image.close)
        for name, shape in manifest.outputs.items():
            self.outputs[name] = Buffer(gpu, shape)
            held.callback(self.outputs[name].close)
        self.stream = CudaStream(gpu)
        held.callback(self.stream.close)
        held.callback(setattr, self, "context", None)
        held.callback(self.stream.forget)
        self.image.array.fill(0)
        self.clear()

    def bind(self) -> None:
        """Give the buffers to the context."""
        for name, buffer in {IMAGE: self.image, **self.outputs}.items():
            if not self.context.set_tensor_address(name, buffer.pointer):
                raise EngineError(f"TensorRT refuses the buffer for {name}")

    def clear(self) -> None:
        """Reset the host's side of the outputs: no labels, confidence 0."""
        for name, buffer in self.outputs.items():
            buffer.array.fill(blank_value(name))

    def enqueue(self) -> None:
        """Put one run into the stream."""
        for name, buffer in self.outputs.items():
            buffer.clear(blank_value(name), self.stream)
        self.image.upload(self.stream)
        with errors_said() as said:
            accepted = self.context.execute_async_v3(self.stream.handle)
        if not accepted:
            raise EngineError(f"TensorRT failed on a tile{said}")
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
        self._or_stop(self.stream.replay if self.stream.captured else self.enqueue, self.stream.mark)

    def wait(self) -> None:
        self._or_stop(self.stream.wait)
        self.running = False

    def _or_stop(self, *work: Callable[[], None]) -> None:
        try:
            for step in work:
                step()
        except BaseException:  # Ctrl-C as well
            self.stop()
            raise

    def stop(self) -> None:
        """Let the GPU finish its work, and drop the results."""
        with contextlib.suppress(EngineError):
            self.stream.drain()
        self.clear()
        self.running = False


def _profiler(trt: Any, reported: list[list[tuple[str, float]]]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Called by TensorRT with the time of each layer; adds it to the last run."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reported[-1].append((layer_name, ms / 1e3))

    return Profiler()


def load_tensorrt_engine(path: Path, manifest: EngineManifest) -> TensorRTEngine:
    """Load an engine onto the first GPU with the installed TensorRT.

    Raises:
        EngineError: it was built by another TensorRT or for another GPU; or as :class:`TensorRTEngine`.
        ManifestError: the manifest does not say by which.
    """
    tensorrt = find.find_tensorrt()
    warning = find.require_loadable(manifest, tensorrt, find.find_gpu())
    engine = TensorRTEngine(path, manifest, tensorrt=tensorrt)
    engine.warning = warning
    return engine


def affordable_slots(wanted: int, scratch_bytes: int, free_bytes: int) -> int:
    """Number of contexts to make: at least one, at most ``wanted``, by their scratch memory."""
    affordable = int(free_bytes * SCRATCH_SHARE) // scratch_bytes if scratch_bytes > 0 else wanted
    return max(1, min(wanted, affordable))
