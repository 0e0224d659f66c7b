"""The CUDA driver through PyCUDA, which JetPack users often have.

PyCUDA keeps its own stack of contexts per thread and ties every object to the context on top of it. So objects are
created, used and dropped between :meth:`push` and :meth:`pop`. A stream or event is destroyed with its last reference.
PyCUDA's errors carry CUDA's text without the error's name; the name is looked up in the driver.

Source: pycuda 2026.1, ``src/cpp/cuda.hpp`` and ``src/wrapper/wrap_cudadrv.cpp``.
"""
# ruff: noqa: D102 -- CudaDriver documents the methods

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from cdkd_edge.engines.cuda.driver import CudaDriver, CudaError, DeviceInfo
from cdkd_edge.engines.protocol import UInt8Array

NAME = "pycuda"

# cuda.h; PyCUDA has no names for stream flags.
_STREAM_NON_BLOCKING = 1
_LAST_ERROR_CODE = 999  # CUDA_ERROR_UNKNOWN


class PyCudaDriver(CudaDriver):
    """A device through PyCUDA."""

    name = NAME
    no_graphs = "PyCUDA has no CUDA graphs"

    def __init__(self, ordinal: int = 0, module: Any = None, error_names: Mapping[str, str] | None = None) -> None:
        """Retain the primary context of a device.

        Args:
            ordinal: number of the device.
            module: ``pycuda.driver``. Default: the installed one.
            error_names: CUDA's error names by their texts. Default: asked of the driver when needed.

        Raises:
            ImportError: PyCUDA is not installed, or does not find the CUDA driver.
            CudaError: there is no such device.
        """
        self._cuda = module if module is not None else import_module("pycuda.driver")
        self._error_names = error_names
        self._call("starting CUDA", self._cuda.init)
        self._device = self._call(f"finding GPU {ordinal}", self._cuda.Device, ordinal)
        self._context = self._call("using the GPU's primary context", self._device.retain_primary_context)
        # The object must never be destroyed: PyCUDA's destructor would treat the primary context as its own.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._cuda.Error as error:
            raise self._error(str(error), doing) from None

    def _error(self, message: str, doing: str) -> CudaError:
        """The error for a message such as ``cuMemAlloc failed: out of memory``."""
        match = re.match(r"\S+ failed: (.*?)(?: - .*)?$", " ".join(message.split()))
        text = match[1] if match else message
        names = _names_by_text() if self._error_names is None else self._error_names
        return CudaError(names.get(text, "CUDA error"), text, doing)

    def info(self) -> DeviceInfo:
        device, shared = self._device, self._cuda.device_attribute.INTEGRATED
        major, minor, *_ = self._cuda.get_version()
        return DeviceInfo(
            name=str(self._call("asking for the GPU's name", device.name)),
            integrated=bool(self._call("asking for the GPU's properties", device.get_attribute, shared)),
            runtime_version=f"{major}.{minor}",
        )

    def push(self) -> None:
        self._call("entering the GPU's context", self._context.push)

    def pop(self) -> None:
        self._call("leaving the GPU's context", self._context.pop)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("asking for free GPU memory", self._cuda.mem_get_info)
        return int(free), int(total)

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        kinds = self._cuda.host_alloc_flags
        flags = kinds.PORTABLE | (kinds.DEVICEMAP if mapped else 0)
        doing = f"allocating {int(np.prod(shape))} bytes of page-locked memory"
        array: UInt8Array = self._call(doing, self._cuda.pagelocked_empty, tuple(shape), np.uint8, "C", flags)
        memory: Any = array.base  # PyCUDA's owner of the memory
        pointer = int(self._call("mapping page-locked memory to the GPU", memory.get_device_pointer)) if mapped else 0
        del memory
        return np.asarray(_PageLocked(self, array)), pointer

    def free_host(self, last: list[UInt8Array]) -> None:
        """Drop the last reference to page-locked memory, with the context current so that PyCUDA can free it."""
        try:
            self._context.push()
        except self._cuda.Error:  # the context is lost, and the memory with it
            return
        try:
            last.clear()
        finally:
            self._context.pop()

    def device_alloc(self, size: int) -> Any:
        return self._call(f"allocating {size} bytes of GPU memory", self._cuda.mem_alloc, size)

    def device_free(self, allocation: Any) -> None:
        self._call("freeing GPU memory", allocation.free)

    def stream_create(self) -> Any:
        return self._call("creating a stream", self._cuda.Stream, _STREAM_NON_BLOCKING)

    def stream_handle(self, stream: Any) -> int:
        return int(stream.handle)

    def stream_synchronize(self, stream: Any) -> None:
        self._call("waiting for a stream", stream.synchronize)

    def stream_destroy(self, stream: Any) -> None:
        pass  # PyCUDA destroys it with its last reference

    def event_create(self) -> Any:
        kinds = self._cuda.event_flags
        flags = int(kinds.DISABLE_TIMING) | int(kinds.BLOCKING_SYNC)
        return self._call("creating an event", self._cuda.Event, flags)

    def event_record(self, event: Any, stream: Any) -> None:
        self._call("recording an event", event.record, stream)

    def event_synchronize(self, event: Any) -> None:
        self._call("computing a tile", event.synchronize)

    def event_destroy(self, event: Any) -> None:
        pass  # PyCUDA destroys it with its last reference

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        self._call("copying to the GPU", self._cuda.memcpy_htod_async, pointer, array, stream)

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        self._call("copying from the GPU", self._cuda.memcpy_dtoh_async, array, pointer, stream)

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        self._call("filling GPU memory", self._cuda.memset_d8_async, pointer, value, size, stream)


class _PageLocked:
    """Owns page-locked memory; arrays over it keep it alive. PyCUDA's own owner cannot free it in every thread."""

    def __init__(self, driver: PyCudaDriver, array: UInt8Array) -> None:
        self.__array_interface__ = array.__array_interface__
        weakref.finalize(self, driver.free_host, [array]).atexit = False


@functools.cache
def _names_by_text() -> dict[str, str]:
    """Names of CUDA's errors by their texts, from the driver; empty if its library cannot be loaded."""
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
