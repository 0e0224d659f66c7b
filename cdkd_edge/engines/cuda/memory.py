"""Buffers and streams on a GPU.

A buffer is page-locked host memory, seen as a numpy array, and an address for the GPU. On a GPU that shares the CPU's
memory, the address is that of the array itself (mapped memory) and nothing is copied. Other GPUs have memory of their
own, and copies run in a stream. Everything is allocated when an engine is loaded, nothing per tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cdkd_edge.engines.cuda.gpu import Gpu
from cdkd_edge.engines.protocol import UInt8Array

_STREAM_FLAGS = 1  # CU_STREAM_NON_BLOCKING: does not synchronise with the legacy default stream
_EVENT_FLAGS = 1 | 2  # CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING: a thread that waits sleeps
_EMPTY: UInt8Array = np.empty(0, np.uint8)


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
            self.array, self.pointer = gpu.host_array(shape, mapped=self.mapped)
            if self.mapped:
                return
            size = self.array.nbytes
            try:
                self._device = gpu.call(f"allocating {size} bytes of GPU memory", "cuMemAlloc", size)
            except BaseException:
                self.array = _EMPTY
                raise
            self.pointer = int(self._device)

    def upload(self, stream: CudaStream) -> None:
        """Start copying the array to the GPU."""
        if not self.mapped:
            size = self.array.nbytes
            self._gpu.call("copying to the GPU", "cuMemcpyHtoDAsync", self.pointer, self.array, size, stream.raw)

    def download(self, stream: CudaStream) -> None:
        """Start copying what the GPU wrote into the array."""
        if not self.mapped:
            size = self.array.nbytes
            self._gpu.call("copying from the GPU", "cuMemcpyDtoHAsync", self.array, self.pointer, size, stream.raw)

    def clear(self, value: int, stream: CudaStream) -> None:
        """Start filling the GPU's memory with a byte. The host fills a mapped array."""
        if not self.mapped:
            size = self.array.nbytes
            self._gpu.call("filling GPU memory", "cuMemsetD8Async", self.pointer, value, size, stream.raw)

    def close(self) -> None:
        """Free the memory; host memory stays as long as an array over it is in use. Idempotent."""
        if not self.pointer:
            return
        device, self._device = self._device, None
        self.pointer = 0
        with self._gpu.current():
            self.array = _EMPTY  # dropped where the context is current: PyCUDA may be unable to free it elsewhere
            if device is not None:
                self._gpu.call("freeing GPU memory", "cuMemFree", device)


class CudaStream:
    """A queue of GPU work. Its methods, except :meth:`close`, are called inside :meth:`Gpu.current`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._event: Any = None
        self._graph: Any = None
        with gpu.current():
            self.raw: Any = gpu.call("creating a stream", "cuStreamCreate", _STREAM_FLAGS)
            try:
                self._event = gpu.call("creating an event", "cuEventCreate", _EVENT_FLAGS)
            except BaseException:
                gpu.call("destroying a stream", "cuStreamDestroy", self.raw)
                self.raw = None
                raise

    @property
    def handle(self) -> int:
        """The ``cudaStream_t``, for libraries."""
        return int(getattr(self.raw, "handle", self.raw))  # PyCUDA's objects have it as an attribute

    def mark(self) -> None:
        """Record the event that :meth:`wait` waits for, after all work that is in the stream now."""
        self._gpu.call("recording an event", "cuEventRecord", self._event, self.raw)

    def wait(self) -> None:
        """Sleep until the work before :meth:`mark` is done; raises the errors of that work."""
        self._gpu.call("computing a tile", "cuEventSynchronize", self._event)

    def drain(self) -> None:
        """Wait until the stream is empty."""
        self._gpu.call("waiting for a stream", "cuStreamSynchronize", self.raw)

    def capture(self, work: Callable[[], None]) -> None:
        """Record what ``work`` puts into the stream as a CUDA graph for :meth:`replay`; nothing runs.

        Raises:
            EngineError: something in it cannot be recorded; the stream is as it was before.
        """
        self.forget()
        self._gpu.begin_capture(self.raw)
        try:
            work()
        except BaseException:
            # End the recording in any case: a stream that is left recording cannot be used.
            with contextlib.suppress(Exception):
                self._gpu.call("dropping a CUDA graph", "cuGraphDestroy", self._recorded())
            raise
        template = self._recorded()
        try:
            self._graph = self._gpu.call("instantiating a CUDA graph", "cuGraphInstantiate", template, 0)
        finally:
            self._gpu.call("dropping a CUDA graph's template", "cuGraphDestroy", template)

    def _recorded(self) -> Any:
        return self._gpu.call("recording a CUDA graph", "cuStreamEndCapture", self.raw)

    @property
    def captured(self) -> bool:
        """Whether there is a graph to :meth:`replay`."""
        return self._graph is not None

    def replay(self) -> None:
        """Put the recorded work into the stream."""
        self._gpu.call("launching a CUDA graph", "cuGraphLaunch", self._graph, self.raw)

    def forget(self) -> None:
        """Destroy the graph. Idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._gpu.call("destroying a CUDA graph", "cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Destroy graph, event and stream, even if one of them fails. Idempotent.

        Raises:
            CudaError: the first failure.
        """
        if self.raw is None:
            return
        with self._gpu.current(), contextlib.ExitStack() as stack:  # callbacks run from the last to the first
            stack.callback(self._drop)  # while the context is current: PyCUDA destroys by reference
            stack.callback(self._gpu.call, "destroying a stream", "cuStreamDestroy", self.raw)
            stack.callback(self._gpu.call, "destroying an event", "cuEventDestroy", self._event)
            stack.callback(self.forget)

    def _drop(self) -> None:
        self._event = self.raw = None
