"""CUDA through PyCUDA, which JetPack users often have.

PyCUDA keeps a context stack of its own per thread and ties every object to the context on top of it, so
objects are made, used and dropped between :meth:`push` and :meth:`pop`. Streams and events have no method to
destroy them: they go with their last reference. Its errors carry CUDA's text and not its name; the driver's own
tables give the name back.

Source read: pycuda 2026.1, ``src/cpp/cuda.hpp`` and ``src/wrapper/wrap_cudadrv.cpp``.
"""

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from cdkd_edge.engines.cuda.driver import CudaError, DeviceInfo, dotted
from cdkd_edge.engines.protocol import UInt8Array

NAME = "pycuda"

# cuda.h; PyCUDA has no names for stream flags.
_STREAM_NON_BLOCKING = 1
_LAST_ERROR_CODE = 999  # CUDA_ERROR_UNKNOWN


def import_driver() -> Any:
    """PyCUDA's driver module.

    Raises:
        ImportError: PyCUDA is not installed, or cannot find the CUDA driver that it is linked to.
    """
    return import_module("pycuda.driver")


class PyCudaDriver:
    """See :class:`cdkd_edge.engines.cuda.driver.CudaDriver`."""

    name = NAME
    no_graphs: str | None = "PyCUDA has no CUDA graphs"

    def __init__(self, ordinal: int = 0, module: Any = None, error_names: Mapping[str, str] | None = None) -> None:
        """Retain the primary context of a device.

        Args:
            ordinal: number of the device.
            module: ``pycuda.driver``. Default: the installed one.
            error_names: CUDA's error names by their texts. Default: asked of the driver when needed.

        Raises:
            ImportError: PyCUDA is not installed.
            CudaError: there is no such device.
        """
        self._cuda = module if module is not None else import_driver()
        self._error_names = error_names
        self._ordinal = ordinal
        self._call("starting CUDA", self._cuda.init)
        self._device = self._call(f"finding GPU {ordinal}", self._cuda.Device, ordinal)
        self._context = self._call("using the GPU's primary context", self._device.retain_primary_context)
        # Never to be destroyed: PyCUDA's destructor would detach the primary context as if it were another.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._cuda.Error as error:
            raise self._error(str(error), doing) from None

    def _error(self, message: str, doing: str) -> CudaError:
        """The CUDA name of ``cuMemAlloc failed: out of memory``."""
        match = re.match(r"\S+ failed: (.*?)(?: - .*)?$", " ".join(message.split()))
        text = match[1] if match else message
        names = _names_by_text() if self._error_names is None else self._error_names
        return CudaError(names.get(text, "CUDA error"), text, doing)

    def info(self) -> DeviceInfo:
        """See the protocol."""
        cuda, device = self._cuda, self._device
        major, minor = self._call("asking for the GPU's properties", device.compute_capability)
        integrated = cuda.device_attribute.INTEGRATED
        made_for = cuda.get_version()
        return DeviceInfo(
            ordinal=self._ordinal,
            name=str(self._call("asking for the GPU's name", device.name)),
            compute_capability=f"{major}.{minor}",
            integrated=bool(self._call("asking for the GPU's properties", device.get_attribute, integrated)),
            memory_bytes=int(self._call("asking for the GPU's memory", device.total_memory)),
            driver_version=dotted(self._call("asking for the driver's version", cuda.get_driver_version)),
            runtime_version=f"{made_for[0]}.{made_for[1]}",
        )

    def push(self) -> None:
        """See the protocol."""
        self._call("entering the GPU's context", self._context.push)

    def pop(self) -> None:
        """See the protocol."""
        self._call("leaving the GPU's context", self._context.pop)

    def memory(self) -> tuple[int, int]:
        """See the protocol."""
        free, total = self._call("asking for free GPU memory", self._cuda.mem_get_info)
        return int(free), int(total)

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        """See the protocol."""
        kinds = self._cuda.host_alloc_flags
        flags = kinds.PORTABLE | (kinds.DEVICEMAP if mapped else 0)
        doing = f"allocating {int(np.prod(shape))} bytes of page-locked memory"
        array: UInt8Array = self._call(doing, self._cuda.pagelocked_empty, tuple(shape), np.uint8, "C", flags)
        memory: Any = array.base  # PyCUDA's owner of the memory
        pointer = int(self._call("mapping page-locked memory to the GPU", memory.get_device_pointer)) if mapped else 0
        del memory
        return np.asarray(_PageLocked(self, array)), pointer

    def free_host(self, last: list[UInt8Array]) -> None:
        """Drop the last reference to page-locked memory, in any thread, where PyCUDA can free it."""
        try:
            self._context.push()
        except self._cuda.Error:  # lost: there is nothing left to free
            return
        try:
            last.clear()
        finally:
            self._context.pop()

    def device_alloc(self, size: int) -> Any:
        """See the protocol."""
        return self._call(f"allocating {size} bytes of GPU memory", self._cuda.mem_alloc, size)

    def pointer(self, allocation: Any) -> int:
        """See the protocol."""
        return int(allocation)

    def device_free(self, allocation: Any) -> None:
        """See the protocol."""
        self._call("freeing GPU memory", allocation.free)

    def stream_create(self) -> Any:
        """See the protocol."""
        return self._call("creating a stream", self._cuda.Stream, _STREAM_NON_BLOCKING)

    def stream_handle(self, stream: Any) -> int:
        """See the protocol."""
        return int(stream.handle)

    def stream_synchronize(self, stream: Any) -> None:
        """See the protocol."""
        self._call("waiting for a stream", stream.synchronize)

    def stream_destroy(self, stream: Any) -> None:
        """See the protocol; PyCUDA destroys it with its last reference."""

    def event_create(self) -> Any:
        """See the protocol."""
        kinds = self._cuda.event_flags
        flags = int(kinds.DISABLE_TIMING) | int(kinds.BLOCKING_SYNC)
        return self._call("creating an event", self._cuda.Event, flags)

    def event_record(self, event: Any, stream: Any) -> None:
        """See the protocol."""
        self._call("recording an event", event.record, stream)

    def event_synchronize(self, event: Any) -> None:
        """See the protocol."""
        self._call("computing a tile", event.synchronize)

    def event_destroy(self, event: Any) -> None:
        """See the protocol; PyCUDA destroys it with its last reference."""

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        """See the protocol."""
        self._call("copying to the GPU", self._cuda.memcpy_htod_async, pointer, array, stream)

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        """See the protocol."""
        self._call("copying from the GPU", self._cuda.memcpy_dtoh_async, array, pointer, stream)

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        """See the protocol."""
        self._call("filling GPU memory", self._cuda.memset_d8_async, pointer, value, size, stream)

    def capture_begin(self, stream: Any) -> None:
        """PyCUDA cannot."""
        raise CudaError("CUDA_ERROR_NOT_SUPPORTED", str(self.no_graphs), "recording a CUDA graph")

    def capture_end(self, stream: Any) -> Any:
        """PyCUDA cannot."""
        self.capture_begin(stream)

    def graph_launch(self, graph: Any, stream: Any) -> None:
        """PyCUDA cannot."""
        self.capture_begin(stream)

    def graph_destroy(self, graph: Any) -> None:
        """PyCUDA has none."""


class _PageLocked:
    """Owner of page-locked memory; arrays made over it keep it alive. PyCUDA's own could not free it in any thread."""

    def __init__(self, driver: PyCudaDriver, array: UInt8Array) -> None:
        self.__array_interface__ = array.__array_interface__
        weakref.finalize(self, driver.free_host, [array]).atexit = False


@functools.cache
def _names_by_text() -> dict[str, str]:
    """Every error's name by its text, from the driver itself; empty where its library cannot be loaded."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    names: dict[str, str] = {}
    for code in range(1, _LAST_ERROR_CODE + 1):
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        if library.cuGetErrorName(code, ctypes.byref(name)) or library.cuGetErrorString(code, ctypes.byref(text)):
            continue
        if name.value and text.value:
            names.setdefault(text.value.decode(errors="replace"), name.value.decode(errors="replace"))
    return names
