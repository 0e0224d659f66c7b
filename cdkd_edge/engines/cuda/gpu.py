"""A GPU with its buffers and streams, through whichever CUDA binding is installed.

cuda-python comes first where both are installed: it has CUDA graphs, and wheels for Jetson and desktop. PyCUDA is
compiled at installation and has no graphs.

A buffer is page-locked host memory, seen as a numpy array, and an address for the GPU. On a GPU that shares the CPU's
memory, the address is that of the array itself (mapped memory) and nothing is copied. Other GPUs have
memory of their own, and copies run in a stream. Everything is allocated when an engine is loaded, nothing per tile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cdkd_edge.core.errors import EngineError, MissingExtraError, UsageError
from cdkd_edge.engines.cuda.bindings import CudaPythonDriver, PyCudaDriver
from cdkd_edge.engines.cuda.driver import CudaDriver
from cdkd_edge.engines.protocol import UInt8Array

VARIABLE = "CDKD_EDGE_CUDA_BINDING"  # environment variable that names the binding to use

BINDINGS: dict[str, Callable[[int], CudaDriver]] = {
    CudaPythonDriver.name: CudaPythonDriver,
    PyCudaDriver.name: PyCudaDriver,
}
"""In order of preference."""

_EMPTY: UInt8Array = np.empty(0, np.uint8)


class Gpu:
    """One device. Its context is made current around each use, in whichever thread."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.info = driver.info()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current in this thread for the block, then restore the one before (PyTorch's)."""
        self.driver.push()
        try:
            yield
        finally:
            self.driver.pop()

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. An integrated GPU counts the memory that it shares with the CPU."""
        with self.current():
            return self.driver.memory()


_open: dict[tuple[str, int], Gpu] = {}
_lock = threading.Lock()


def open_gpu(binding: str | None = None, ordinal: int = 0) -> Gpu:
    """The GPU through one binding; the same object for the same arguments as long as the process lives.

    Args:
        binding: ``cuda-python`` or ``pycuda``. Default: what ``CDKD_EDGE_CUDA_BINDING`` names, else the first of
            them that is installed.
        ordinal: number of the device.

    Raises:
        UsageError: there is no binding of that name.
        MissingExtraError: it is not installed; without a name, none is.
        EngineError: the binding cannot be imported, or there is no driver or no GPU.
    """
    named = binding or os.environ.get(VARIABLE) or None
    if named is not None and named not in BINDINGS:
        source = "" if binding else f" ({VARIABLE})"
        raise UsageError(f"no CUDA binding is called {named!r}{source}; there are {' and '.join(BINDINGS)}")
    failures = []
    for name in (named,) if named else BINDINGS:
        try:
            with _lock:
                if (name, ordinal) not in _open:
                    _open[name, ordinal] = Gpu(BINDINGS[name](ordinal))
                return _open[name, ordinal]
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # installed, but for another CUDA or Python
            failures.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    if failures:
        raise EngineError("; ".join(failures), hint="install it again for this Python and this CUDA")
    raise MissingExtraError(named or "cuda-python or pycuda", "jetson" if named == "pycuda" else "gpu", "a GPU engine")


class Buffer:
    """A uint8 array that the GPU can read and write. Arrays taken from it stay valid after :meth:`close`."""

    array: UInt8Array  # the content; empty after :meth:`close`
    pointer: int  # its address for the GPU; 0 after :meth:`close`

    def __init__(self, gpu: Gpu, shape: Sequence[int], *, mapped: bool | None = None) -> None:
        """Allocate.

        Args:
            gpu: the device.
            shape: of the array.
            mapped: share the array's memory with the GPU, instead of copying. Default: on integrated GPUs.

        Raises:
            CudaError: there is not enough memory.
        """
        self._gpu = gpu
        self.mapped = gpu.info.integrated if mapped is None else mapped
        self._device: Any = None
        with gpu.current():
            self.array, self.pointer = gpu.driver.host_array(shape, mapped=self.mapped)
            if self.mapped:
                return
            try:
                self._device = gpu.driver.device_alloc(self.array.nbytes)
            except BaseException:
                self.array = _EMPTY
                raise
            self.pointer = int(self._device)

    def upload(self, stream: Stream) -> None:
        """Start copying the array to the GPU."""
        if not self.mapped:
            self._gpu.driver.copy_in(self.pointer, self.array, stream.raw)

    def download(self, stream: Stream) -> None:
        """Start copying what the GPU wrote into the array."""
        if not self.mapped:
            self._gpu.driver.copy_out(self.array, self.pointer, stream.raw)

    def clear(self, value: int, stream: Stream) -> None:
        """Start filling the GPU's memory with a byte. The host fills a mapped array."""
        if not self.mapped:
            self._gpu.driver.fill(self.pointer, value, self.array.nbytes, stream.raw)

    def close(self) -> None:
        """Free the memory; host memory stays as long as an array over it is in use. Idempotent."""
        if not self.pointer:
            return
        device, self._device = self._device, None
        self.pointer = 0
        with self._gpu.current():
            # Dropped here, where the context is current: PyCUDA may be unable to free it elsewhere.
            self.array = _EMPTY
            if device is not None:
                self._gpu.driver.device_free(device)


class Stream:
    """A queue of GPU work. Its methods, except :meth:`close`, are called inside :meth:`Gpu.current`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._event: Any = None
        self._graph: Any = None
        self.raw: Any = None
        with gpu.current():
            self.raw = gpu.driver.stream_create()
            try:
                self._event = gpu.driver.event_create()
            except BaseException:
                gpu.driver.stream_destroy(self.raw)
                self.raw = None
                raise

    @property
    def handle(self) -> int:
        """The ``cudaStream_t``, for libraries."""
        return self._gpu.driver.stream_handle(self.raw)

    def mark(self) -> None:
        """Record the event that :meth:`wait` waits for, after all work that is in the stream now."""
        self._gpu.driver.event_record(self._event, self.raw)

    def wait(self) -> None:
        """Sleep until the work before :meth:`mark` is done; raises the errors of that work."""
        self._gpu.driver.event_synchronize(self._event)

    def drain(self) -> None:
        """Wait until the stream is empty."""
        self._gpu.driver.stream_synchronize(self.raw)

    def capture(self, work: Callable[[], None]) -> None:
        """Record what ``work`` puts into the stream as a CUDA graph for :meth:`replay`; nothing runs.

        Raises:
            EngineError: something in it cannot be recorded; the stream is as it was before.
        """
        driver = self._gpu.driver
        self.forget()
        driver.capture_begin(self.raw)
        try:
            work()
        except BaseException:
            # End the recording in any case: a stream that is left recording cannot be used.
            with contextlib.suppress(Exception):
                driver.graph_destroy(driver.capture_end(self.raw))
            raise
        self._graph = driver.capture_end(self.raw)

    @property
    def captured(self) -> bool:
        """Whether there is a graph to :meth:`replay`."""
        return self._graph is not None

    def replay(self) -> None:
        """Put the recorded work into the stream."""
        self._gpu.driver.graph_launch(self._graph, self.raw)

    def forget(self) -> None:
        """Destroy the graph. Idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._gpu.driver.graph_destroy(graph)

    def close(self) -> None:
        """Destroy graph, event and stream, even if one of them fails. Idempotent.

        Raises:
            CudaError: the first failure.
        """
        if self.raw is None:
            return
        driver = self._gpu.driver
        with self._gpu.current(), contextlib.ExitStack() as stack:  # callbacks run from the last to the first
            stack.callback(self._drop)  # while the context is current: PyCUDA destroys by reference
            stack.callback(driver.stream_destroy, self.raw)
            stack.callback(driver.event_destroy, self._event)
            stack.callback(self.forget)

    def _drop(self) -> None:
        self._event = self.raw = None
