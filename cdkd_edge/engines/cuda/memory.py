"""Buffers, streams and graphs of one GPU, the same over both bindings.

A buffer is page-locked memory of the host, seen as a numpy array, and an address for the GPU. Where GPU and CPU
share their memory the address is the array's own, mapped, and nothing is copied; elsewhere it is memory on the
device, and copies run in a stream. Everything is allocated when an engine is loaded, nothing per tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cdkd_edge.engines.cuda.driver import CudaDriver
from cdkd_edge.engines.protocol import UInt8Array

_NOTHING: UInt8Array = np.empty(0, np.uint8)


class Gpu:
    """One device. Its context is made current around each use and then put back, in whichever thread."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.info = driver.info()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current in this thread for the block; blocks may be nested.

        PyTorch, or whatever else was current, is so again afterwards.
        """
        self.driver.push()
        try:
            yield
        finally:
            self.driver.pop()

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. On an integrated GPU: of the memory that the CPU uses as well."""
        with self.current():
            return self.driver.memory()


class Buffer:
    """A uint8 array that the GPU can read and write.

    An array of it stays valid for whoever still holds it after :meth:`close`.
    """

    array: UInt8Array
    """The content; empty after :meth:`close`."""
    pointer: int
    """Where the GPU sees it; 0 after :meth:`close`."""

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
                self.array = _NOTHING
                raise
            self.pointer = gpu.driver.pointer(self._device)

    def upload(self, stream: Stream) -> None:
        """Start making the array's content visible to the GPU."""
        if not self.mapped:
            self._gpu.driver.copy_in(self.pointer, self.array, stream.raw)

    def download(self, stream: Stream) -> None:
        """Start making what the GPU wrote visible in the array."""
        if not self.mapped:
            self._gpu.driver.copy_out(self.array, self.pointer, stream.raw)

    def clear(self, value: int, stream: Stream) -> None:
        """Start filling the GPU's side with a byte; a mapped array has one side, to be filled by the host."""
        if not self.mapped:
            self._gpu.driver.fill(self.pointer, value, self.array.nbytes, stream.raw)

    def close(self) -> None:
        """Free the memory, but for an array that somebody holds; twice is once."""
        if not self.pointer:
            return
        device, self._device = self._device, None
        self.pointer = 0
        with self._gpu.current():
            # Here and not with the object: PyCUDA may be unable to free it where its context is not current.
            self.array = _NOTHING
            if device is not None:
                self._gpu.driver.device_free(device)


class Stream:
    """A queue of work with one place to wait for.

    Its methods, but :meth:`close`, are called between :meth:`Gpu.current`.
    """

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
        """Set the place that :meth:`wait` waits for: after all that is in the stream now."""
        self._gpu.driver.event_record(self._event, self.raw)

    def wait(self) -> None:
        """Sleep until the marked place is reached; errors of the work before it are raised here."""
        self._gpu.driver.event_synchronize(self._event)

    def drain(self) -> None:
        """Wait until the stream is empty."""
        self._gpu.driver.stream_synchronize(self.raw)

    def capture(self, work: Callable[[], None]) -> None:
        """Record what ``work`` puts into the stream as the CUDA graph for :meth:`replay`; nothing runs.

        Raises:
            EngineError: something in it cannot be recorded; the stream is as it was before.
        """
        driver = self._gpu.driver
        self.forget()
        driver.capture_begin(self.raw)
        try:
            work()
        except BaseException:
            # Ends the recording whatever it holds; a stream left recording could do nothing else.
            with contextlib.suppress(Exception):
                driver.graph_destroy(driver.capture_end(self.raw))
            raise
        self._graph = driver.capture_end(self.raw)

    @property
    def captured(self) -> bool:
        """Whether there is something to :meth:`replay`."""
        return self._graph is not None

    def replay(self) -> None:
        """Put the recorded work into the stream."""
        self._gpu.driver.graph_launch(self._graph, self.raw)

    def forget(self) -> None:
        """Destroy the recorded work; twice is once."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._gpu.driver.graph_destroy(graph)

    def close(self) -> None:
        """Destroy graph, event and stream, even if one of them cannot be; twice is once.

        Raises:
            CudaError: the first that could not.
        """
        if self.raw is None:
            return
        driver = self._gpu.driver
        with self._gpu.current(), contextlib.ExitStack() as stack:
            stack.callback(self._drop)  # last, and before the context is popped: PyCUDA destroys by reference
            stack.callback(driver.stream_destroy, self.raw)
            stack.callback(driver.event_destroy, self._event)
            stack.callback(self.forget)

    def _drop(self) -> None:
        self._event = self.raw = None
