"""The two CUDA bindings behind one interface: cuda-python and PyCUDA."""
# ruff: noqa: D102 -- CudaDriver documents the methods

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from cdkd_edge.engines.cuda.driver import CudaDriver, CudaError, DeviceInfo
from cdkd_edge.engines.protocol import UInt8Array

_STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING of cuda.h, for which PyCUDA has no name
_LAST_ERROR_CODE = 999  # CUDA_ERROR_UNKNOWN


class CudaPythonDriver(CudaDriver):
    """A device through cuda-python: ``cuda.bindings.driver``, or ``cuda.cuda`` of releases before 12.8.

    Every function of the binding returns a tuple that begins with a ``CUresult``, and releases Python's global lock.
    Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/driver.html
    """

    name = "cuda-python"

    def __init__(self, ordinal: int = 0, module: Any = None) -> None:
        """Retain the primary context of a device.

        Args:
            ordinal: number of the device.
            module: the driver API. Default: cuda-python's.

        Raises:
            ImportError: cuda-python is not installed.
            CudaError: there is no driver or no such device.
        """
        self._cuda = cuda = module if module is not None else _import_cuda_python()
        try:
            self._call("starting CUDA", cuda.cuInit, 0)
        except RuntimeError as error:
            if isinstance(error, CudaError):
                raise
            # The binding loads libcuda at its first call; if that fails, it raises a plain RuntimeError.
            raise CudaError("no CUDA driver", " ".join(str(error).split())[:200], "starting CUDA") from None
        self._device = self._call(f"finding GPU {ordinal}", cuda.cuDeviceGet, ordinal)
        self._context = self._call("using the GPU's primary context", cuda.cuDevicePrimaryCtxRetain, self._device)

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a driver function; returns its one value, or a tuple of its values."""
        error, *values = function(*arguments)
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            _, text = self._cuda.cuGetErrorString(error)
            raise CudaError(getattr(error, "name", str(error)), _text(text), doing)
        return values[0] if len(values) == 1 else tuple(values)

    def info(self) -> DeviceInfo:
        cuda, device = self._cuda, self._device
        shared = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        version = cuda.CUDA_VERSION  # 12060 is 12.6
        return DeviceInfo(
            name=_text(self._call("asking for the GPU's name", cuda.cuDeviceGetName, 256, device)),
            integrated=bool(self._call("asking for the GPU's properties", cuda.cuDeviceGetAttribute, shared, device)),
            runtime_version=f"{version // 1000}.{version % 1000 // 10}",
        )

    def push(self) -> None:
        self._call("entering the GPU's context", self._cuda.cuCtxPushCurrent, self._context)

    def pop(self) -> None:
        self._call("leaving the GPU's context", self._cuda.cuCtxPopCurrent)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("asking for free GPU memory", self._cuda.cuMemGetInfo)
        return int(free), int(total)

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        cuda, size = self._cuda, prod(shape)
        flags = cuda.CU_MEMHOSTALLOC_PORTABLE | (cuda.CU_MEMHOSTALLOC_DEVICEMAP if mapped else 0)
        address = int(self._call(f"allocating {size} bytes of page-locked memory", cuda.cuMemHostAlloc, size, flags))
        array: UInt8Array = np.asarray(_PageLocked(address, size, self.free_host, address)).reshape(shape)
        pointer = 0
        if mapped:
            doing = "mapping page-locked memory to the GPU"
            pointer = int(self._call(doing, cuda.cuMemHostGetDevicePointer, address, 0))
        return array, pointer

    def free_host(self, address: int) -> None:
        """Free page-locked memory, in any thread. Where the context is lost, the memory is already free."""
        cuda = self._cuda
        if cuda.cuCtxPushCurrent(self._context)[0] == cuda.CUresult.CUDA_SUCCESS:
            cuda.cuMemFreeHost(address)
            cuda.cuCtxPopCurrent()

    def device_alloc(self, size: int) -> Any:
        return self._call(f"allocating {size} bytes of GPU memory", self._cuda.cuMemAlloc, size)

    def device_free(self, allocation: Any) -> None:
        self._call("freeing GPU memory", self._cuda.cuMemFree, allocation)

    def stream_create(self) -> Any:
        flags = int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._call("creating a stream", self._cuda.cuStreamCreate, flags)

    def stream_handle(self, stream: Any) -> int:
        return int(stream)

    def stream_synchronize(self, stream: Any) -> None:
        self._call("waiting for a stream", self._cuda.cuStreamSynchronize, stream)

    def stream_destroy(self, stream: Any) -> None:
        self._call("destroying a stream", self._cuda.cuStreamDestroy, stream)

    def event_create(self) -> Any:
        kinds = self._cuda.CUevent_flags
        flags = int(kinds.CU_EVENT_DISABLE_TIMING) | int(kinds.CU_EVENT_BLOCKING_SYNC)
        return self._call("creating an event", self._cuda.cuEventCreate, flags)

    def event_record(self, event: Any, stream: Any) -> None:
        self._call("recording an event", self._cuda.cuEventRecord, event, stream)

    def event_synchronize(self, event: Any) -> None:
        self._call("computing a tile", self._cuda.cuEventSynchronize, event)

    def event_destroy(self, event: Any) -> None:
        self._call("destroying an event", self._cuda.cuEventDestroy, event)

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        copy = self._cuda.cuMemcpyHtoDAsync
        self._call("copying to the GPU", copy, pointer, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        copy = self._cuda.cuMemcpyDtoHAsync
        self._call("copying from the GPU", copy, array.ctypes.data, pointer, array.nbytes, stream)

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        self._call("filling GPU memory", self._cuda.cuMemsetD8Async, pointer, value, size, stream)

    def capture_begin(self, stream: Any) -> None:
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("recording a CUDA graph", self._cuda.cuStreamBeginCapture, stream, mode)

    def capture_end(self, stream: Any) -> Any:
        graph = self._call("recording a CUDA graph", self._cuda.cuStreamEndCapture, stream)
        try:
            return self._call("instantiating a CUDA graph", self._cuda.cuGraphInstantiate, graph, 0)
        finally:
            self._call("dropping a CUDA graph's template", self._cuda.cuGraphDestroy, graph)

    def graph_launch(self, graph: Any, stream: Any) -> None:
        self._call("launching a CUDA graph", self._cuda.cuGraphLaunch, graph, stream)

    def graph_destroy(self, graph: Any) -> None:
        self._call("destroying a CUDA graph", self._cuda.cuGraphExecDestroy, graph)


class PyCudaDriver(CudaDriver):
    """A device through PyCUDA, which JetPack users often have.

    PyCUDA keeps its own stack of contexts per thread and ties every object to the context on top of it. So objects are
    created, used and dropped between :meth:`push` and :meth:`pop`. A stream or event is destroyed with its last
    reference. PyCUDA's errors carry CUDA's text without the error's name; the name is looked up in the driver.
    Source: pycuda 2026.1, ``src/cpp/cuda.hpp`` and ``src/wrapper/wrap_cudadrv.cpp``.
    """

    name = "pycuda"
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
        return np.asarray(_PageLocked(array.ctypes.data, array.nbytes, self.free_host, [array])).reshape(shape), pointer

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

    def event_create(self) -> Any:
        kinds = self._cuda.event_flags
        flags = int(kinds.DISABLE_TIMING) | int(kinds.BLOCKING_SYNC)
        return self._call("creating an event", self._cuda.Event, flags)

    def event_record(self, event: Any, stream: Any) -> None:
        self._call("recording an event", event.record, stream)

    def event_synchronize(self, event: Any) -> None:
        self._call("computing a tile", event.synchronize)

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        self._call("copying to the GPU", self._cuda.memcpy_htod_async, pointer, array, stream)

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        self._call("copying from the GPU", self._cuda.memcpy_dtoh_async, array, pointer, stream)

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        self._call("filling GPU memory", self._cuda.memset_d8_async, pointer, value, size, stream)


class _PageLocked:
    """Owns page-locked memory: frees it when the last array over it is gone, in whichever thread."""

    def __init__(self, address: int, size: int, free: Callable[..., None], *arguments: Any) -> None:
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        # Not at exit: other threads may still use the memory, and the driver frees it anyway.
        weakref.finalize(self, free, *arguments).atexit = False


def _import_cuda_python() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ModuleNotFoundError:
        return import_module("cuda.cuda")


def _text(value: Any) -> str:
    """Text of a C string."""
    if isinstance(value, bytes):
        return value.split(b"\0")[0].decode(errors="replace")
    return "" if value is None else str(value)


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
