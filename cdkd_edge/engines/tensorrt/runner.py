"""The engine of a GPU: TensorRT or TensorRT-RTX, with buffers that are allocated once.

A slot has its own buffers, stream and execution context: no order between slots has to be kept, and
a context must not run in two streams at a time. Contexts share the weights; each has its own scratch memory
(about 44 MB for the paper's network in FP16), so there are fewer slots where scratch would take too much.

A run is: fill the outputs, copy the tiles in, compute, copy the outputs out, mark the place. On a GPU that
shares the CPU's memory nothing is copied. Where the binding can, all but the mark is one CUDA graph.
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
from cdkd_edge.core.output_kinds import CONFIDENCE, LABELS, PROBABILITIES, confidence_of, missing_output
from cdkd_edge.engines.cuda.gpu import Buffer, Gpu, Stream
from cdkd_edge.engines.protocol import UInt8Array
from cdkd_edge.engines.tensorrt import api, device
from cdkd_edge.engines.tensorrt import load as loadable
from cdkd_edge.engines.tensorrt.load import IMAGE, LoadedEngine
from cdkd_edge.engines.tensorrt.messages import Listener, LogTo

SLOTS = 3
"""One tile being read, one computed, one written."""
SCRATCH_SHARE = 0.5
"""Share of the free GPU memory that the contexts' scratch may take."""


class TensorRTEngine:
    """An engine file on a GPU. See :class:`cdkd_edge.engines.protocol.Engine`.

    ``output(slot)`` shows labels only after the slot's ``wait``: between ``launch`` and ``wait`` it is an array of 255s
    that is not written to, and after any failure or interruption the slot's labels are 255. So it is with confidence
    and probabilities, and 0.
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
        runtime_cache: Path | None = None,
    ) -> None:
        """Load an engine whose manifest has been read and compared with this machine.

        Args:
            path: the engine file.
            manifest: its manifest.
            gpu: where to run. Default: the first GPU, through the installed CUDA binding.
            tensorrt: what to run with (``module``, ``logger``, ``name``). Default: the TensorRT that is installed.
            log_to: how to hear what that logs, for the messages of errors.
            slots: the most buffer slots to make.
            cuda_graph: launch through a CUDA graph where that is possible.
            runtime_cache: file in which TensorRT-RTX keeps what it compiled (TensorRT needs none). Default: none.

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
        """Why tiles are not launched through a CUDA graph; None where they are."""
        self._slots: list[_Slot] = []
        self._loaded: LoadedEngine | None = None
        self._blank = {name: np.full(shape, _fill(name), np.uint8) for name, shape in manifest.outputs.items()}
        for array in self._blank.values():
            array.flags.writeable = False
        if tensorrt is None:
            tensorrt, log_to = _installed()
        if gpu is None:
            from cdkd_edge.engines.cuda.gpu import open_gpu

            gpu = open_gpu()
        self.gpu = gpu
        self._listener = Listener(log_to)
        self._loaded = LoadedEngine(path, manifest, tensorrt, self._listener)
        try:
            with gpu.current():
                self._load(slots, runtime_cache)
        except BaseException:
            self.close()
            raise

    def _load(self, slots: int, runtime_cache: Path | None) -> None:
        loaded = self._loaded
        assert loaded is not None
        loaded.load(runtime_cache)
        free, _ = self.gpu.driver.memory()
        for _ in range(affordable_slots(slots, loaded.scratch_bytes, free)):
            self._slots.append(_Slot(self.gpu, self.manifest, self._listener))
            self._slots[-1].prepare(loaded)
        for slot in self._slots:
            # Also needed before a capture: the first run settles what TensorRT left for it.
            slot.launch()
            slot.wait()
            slot.clear()
        loaded.save_cache()
        self._capture()
        self.slots = len(self._slots)

    def _capture(self) -> None:
        if self.no_graph is None:
            self.no_graph = self.gpu.driver.no_graphs
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

    def output(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.output`, and the class."""
        return self._output(slot, LABELS)

    def confidence(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.confidence`, and the class."""
        if self.output_kind == PROBABILITIES:
            return confidence_of(self._output(slot, PROBABILITIES))
        return self._output(slot, CONFIDENCE)

    def probabilities(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.probabilities`, and the class."""
        return self._output(slot, PROBABILITIES)

    def _output(self, slot: int, wanted: str) -> UInt8Array:
        chosen = self._slot(slot)
        if wanted not in self._blank:
            raise missing_output(self.output_kind, wanted, self.artefact.file)
        return self._blank[wanted] if chosen.running else chosen.outputs[wanted].array

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
        """Release all on the GPU, also after a failure; twice is once. Arrays handed out before stay valid."""
        slots, self._slots = self._slots, []
        loaded, self._loaded = self._loaded, None
        self.slots = 0
        if not slots and loaded is None:
            return
        # After an error that cost the context, nothing can be freed any more and every call says so again.
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


class _Slot:
    """One batch on its way. Methods are called while the GPU's context is current."""

    def __init__(self, gpu: Gpu, manifest: EngineManifest, listener: Listener) -> None:
        n, side = manifest.batch, manifest.tile
        self.running = False
        """Launched and not waited for: the GPU may write to the outputs at any moment."""
        self.context: Any = None
        self._listener = listener
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
        """Make the execution context and tell it the buffers."""
        self.context = loaded.new_context()
        for name, buffer in {IMAGE: self.image, **self.outputs}.items():
            if not self.context.set_tensor_address(name, buffer.pointer):
                raise EngineError(f"TensorRT refuses the buffer for {name}")

    def clear(self) -> None:
        """No labels, and nothing known of them, as the host sees it."""
        for name, buffer in self.outputs.items():
            buffer.array.fill(_fill(name))

    def enqueue(self) -> None:
        """Put one run into the stream."""
        for name, buffer in self.outputs.items():
            buffer.clear(_fill(name), self.stream)
        self.image.upload(self.stream)
        with self._listener:
            accepted = self.context.execute_async_v3(self.stream.handle)
        if not accepted:
            raise EngineError(f"TensorRT failed on a tile{self._listener.said()}")
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
        """Let the GPU finish what it has, and show no labels."""
        with contextlib.suppress(EngineError):
            self.stream.drain()
        self.clear()
        self.running = False

    def release(self) -> None:
        """Free all; what cannot be freed does not keep the rest."""
        with contextlib.suppress(EngineError):
            self.stream.forget()
        self.context = None
        parts: tuple[Stream | Buffer, ...] = (self.stream, self.image, *self.outputs.values())
        for part in parts:
            with contextlib.suppress(EngineError):
                part.close()


def load_tensorrt_engine(path: Path, manifest: EngineManifest) -> TensorRTEngine:
    """Load an engine with the installed TensorRT onto the first GPU, if it was built by the one for the other.

    Raises:
        EngineError: it was not, or as :class:`TensorRTEngine`.
        ManifestError: the manifest does not say.
    """
    tensorrt, log_to = _installed()
    gpu = device.find_gpu()
    loadable.require_loadable(manifest, tensorrt, gpu)
    return TensorRTEngine(path, manifest, tensorrt=tensorrt, log_to=log_to)


def _installed() -> tuple[Any, LogTo]:
    return api.find_tensorrt(), api.log_to


def _fill(name: str) -> int:
    """What stands in an output where nothing was computed."""
    return NO_LABEL if name == LABELS else 0


def affordable_slots(wanted: int, scratch_bytes: int, free_bytes: int) -> int:
    """How many contexts to make: as many as wanted, unless their scratch memory takes too much; at least one."""
    if scratch_bytes <= 0:
        return max(1, wanted)
    return max(1, min(wanted, int(free_bytes * SCRATCH_SHARE) // scratch_bytes))
