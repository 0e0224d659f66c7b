"""A GPU through either of two CUDA bindings: cuda-python and PyCUDA.

Both use the device's *primary* context, as PyTorch and the CUDA runtime inside TensorRT do, so memory and streams can
be passed between them. It is retained once per process and device and never released: the CUDA runtime keeps state in
it. Sources: CUDA driver API, https://docs.nvidia.com/cuda/cuda-driver-api/; memory on integrated GPUs,
https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from operator import methodcaller
from typing import Any

import numpy as np

from cdkd_edge.core.errors import EngineError, MissingExtraError, UsageError
from cdkd_edge.engines.protocol import UInt8Array

VARIABLE = "CDKD_EDGE_CUDA_BINDING"  # environment variable that names the binding to use
_PORTABLE, _MAPPED = 1, 2  # CU_MEMHOSTALLOC_PORTABLE and CU_MEMHOSTALLOC_DEVICEMAP of cuda.h
_LAST_ERROR_CODE = 999  # CUDA_ERROR_UNKNOWN
_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close other programs that use the GPU; on a Jetson GPU and CPU share memory (free -h)",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible; start a container with --runtime nvidia or --gpus all",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number; nvidia-smi lists them",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "kernel module and driver library differ: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this CUDA needs a newer driver than the one installed",
}
_CONTEXT_LOST = {
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "ECC_UNCORRECTABLE", "ASSERT",
    )
}  # fmt: skip
"""After one of these, every later call in the process fails with the same error."""


class CudaError(EngineError):
    """A CUDA call failed."""

    def __init__(self, name: str, text: str, doing: str) -> None:
        hint = _HINTS.get(name)
        if name in _CONTEXT_LOST:
            hint = "this process can no longer use the GPU: start it again; if that happens again, rebuild the engine"
        super().__init__(f"{doing} failed: {name}" + (f" ({text})" if text else ""), hint=hint)
        self.name = name


@dataclass(frozen=True)
class DeviceInfo:
    """What an engine has to know about a GPU, and the CUDA it is used through."""

    name: str
    integrated: bool  # whether it shares the CPU's memory, as on a Jetson
    runtime_version: str  # the CUDA that the binding was made for, e.g. ``12.6``


class Gpu:
    """One device through one binding. What needs the device is done inside :meth:`current`, in any thread."""

    binding: str  # its name
    no_graphs: str | None = None  # why the binding has no CUDA graphs; None if it has
    _integrated: Any  # what the binding calls CU_DEVICE_ATTRIBUTE_INTEGRATED
    _version: str

    def _open(self, ordinal: int) -> None:
        """Retain the primary context of a device."""
        self.call("starting CUDA", "cuInit", 0)
        device = self.call(f"finding GPU {ordinal}", "cuDeviceGet", ordinal)
        self._context = self.call("using the GPU's primary context", "cuDevicePrimaryCtxRetain", device)
        name = self.call("asking for the GPU's name", "cuDeviceGetName", 256, device)
        integrated = self.call("asking for the GPU's properties", "cuDeviceGetAttribute", self._integrated, device)
        self.info = DeviceInfo(_text(name), bool(integrated), self._version)

    def call(self, doing: str, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA driver; returns its one value, or a tuple of its values.

        Args:
            doing: what for, for the error.
            function: its name in the driver API.
            arguments: its arguments; an array stands for its address.

        Raises:
            CudaError: it failed.
        """
        raise NotImplementedError

    def begin_capture(self, stream: Any) -> None:
        """Record what this thread puts into a stream, instead of running it (thread-local mode)."""
        raise CudaError("CUDA_ERROR_NOT_SUPPORTED", str(self.no_graphs), "recording a CUDA graph")

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current in this thread for the block, then restore the one before (PyTorch's)."""
        self.call("entering the GPU's context", "cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("leaving the GPU's context", "cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. An integrated GPU counts the memory that it shares with the CPU."""
        with self.current():
            free, total = self.call("asking for free GPU memory", "cuMemGetInfo")
        return int(free), int(total)

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        """Allocate a page-locked uint8 array; returns it and its address on the device (0 unless ``mapped``).

        The memory is freed when the last array over it is gone, in whichever thread.
        """
        size, flags = prod(shape), _PORTABLE | (_MAPPED if mapped else 0)
        # In a list, so that _free_host can drop the last reference to PyCUDA's array, which frees it.
        memory = [self.call(f"allocating {size} bytes of page-locked memory", "cuMemHostAlloc", size, flags)]
        address = memory[0].ctypes.data if isinstance(memory[0], np.ndarray) else int(memory[0])
        owner = _PageLocked(address, size)
        # Not at exit: other threads may still use the memory, and the driver frees it anyway.
        weakref.finalize(owner, self._free_host, memory).atexit = False
        pointer = 0
        if mapped:
            doing = "mapping page-locked memory to the GPU"
            pointer = int(self.call(doing, "cuMemHostGetDevicePointer", memory[0], 0))
        return np.asarray(owner).reshape(shape), pointer

    def _free_host(self, memory: list[Any]) -> None:
        with contextlib.suppress(CudaError), self.current():  # where the context is lost, the memory is free already
            self.call("freeing page-locked memory", "cuMemFreeHost", memory.pop())


class CudaPythonGpu(Gpu):
    """A device through cuda-python: ``cuda.bindings.driver``, or ``cuda.cuda`` of releases before 12.8.

    Every function of the binding returns a tuple that begins with a ``CUresult``, and releases Python's global lock.
    Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/driver.html
    """

    binding = "cuda-python"

    def __init__(self, ordinal: int = 0, module: Any = None) -> None:
        """Open the device of that number; ``module`` stands in for cuda-python's driver API in tests.

        Raises:
            ImportError: cuda-python is not installed.
            CudaError: there is no driver or no such device.
        """
        self._cuda = module if module is not None else _import_cuda_python()
        self._integrated = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        version = self._cuda.CUDA_VERSION  # 12060 is 12.6
        self._version = f"{version // 1000}.{version % 1000 // 10}"
        self._open(ordinal)

    def call(self, doing: str, function: str, *arguments: Any) -> Any:
        """See :meth:`Gpu.call`."""
        plain = (one.ctypes.data if isinstance(one, np.ndarray) else one for one in arguments)
        try:
            code, *values = getattr(self._cuda, function)(*plain)
        except RuntimeError as error:  # the binding loads libcuda at its first call, and could not
            raise CudaError("no CUDA driver", " ".join(str(error).split())[:200], doing) from None
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            _, text = self._cuda.cuGetErrorString(code)
            raise CudaError(getattr(code, "name", str(code)), _text(text), doing)
        return values[0] if len(values) == 1 else tuple(values)

    def begin_capture(self, stream: Any) -> None:
        """See :meth:`Gpu.begin_capture`."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("recording a CUDA graph", "cuStreamBeginCapture", stream, mode)


class PyCudaGpu(Gpu):
    """A device through PyCUDA, which JetPack users often have.

    PyCUDA keeps its own stack of contexts per thread and ties every object to the context on top of it. So objects are
    created, used and dropped inside :meth:`current`. A stream or event is destroyed with its last reference. PyCUDA's
    errors carry CUDA's text without the error's name; the name is looked up in the driver.
    Source: pycuda 2026.1, ``src/cpp/cuda.hpp`` and ``src/wrapper/wrap_cudadrv.cpp``.
    """

    binding = "pycuda"
    no_graphs = "PyCUDA has no CUDA graphs"

    def __init__(self, ordinal: int = 0, module: Any = None, error_names: Mapping[str, str] | None = None) -> None:
        """Open the device of that number; tests give ``pycuda.driver`` and CUDA's error names by their texts.

        Raises:
            ImportError: PyCUDA is not installed, or does not find the CUDA driver.
            CudaError: there is no such device.
        """
        self._cuda = cuda = module if module is not None else import_module("pycuda.driver")
        self._error_names = error_names
        self._integrated = cuda.device_attribute.INTEGRATED
        self._version = ".".join(map(str, cuda.get_version()[:2]))
        self._functions: dict[str, Callable[..., Any]] = {
            "cuInit": lambda _: cuda.init(),
            "cuDeviceGet": cuda.Device,
            "cuDeviceGetName": lambda _, device: device.name(),
            "cuDeviceGetAttribute": lambda attribute, device: device.get_attribute(attribute),
            "cuDevicePrimaryCtxRetain": methodcaller("retain_primary_context"),
            "cuCtxPushCurrent": methodcaller("push"),
            "cuCtxPopCurrent": lambda: self._context.pop(),
            "cuMemGetInfo": cuda.mem_get_info,
            "cuMemHostAlloc": lambda size, flags: cuda.pagelocked_empty((size,), np.uint8, "C", flags),
            "cuMemHostGetDevicePointer": lambda array, _: array.base.get_device_pointer(),
            "cuMemFreeHost": lambda array: None,  # freed with the last reference, as streams and events are
            "cuMemAlloc": cuda.mem_alloc,
            "cuMemFree": methodcaller("free"),
            "cuMemcpyHtoDAsync": lambda to, array, _, stream: cuda.memcpy_htod_async(to, array, stream),
            "cuMemcpyDtoHAsync": lambda array, pointer, _, stream: cuda.memcpy_dtoh_async(array, pointer, stream),
            "cuMemsetD8Async": cuda.memset_d8_async,
            "cuStreamCreate": cuda.Stream,
            "cuStreamSynchronize": methodcaller("synchronize"),
            "cuStreamDestroy": lambda stream: None,
            "cuEventCreate": cuda.Event,
            "cuEventRecord": lambda event, stream: event.record(stream),
            "cuEventSynchronize": methodcaller("synchronize"),
            "cuEventDestroy": lambda event: None,
        }
        self._open(ordinal)
        # The object must never be destroyed: PyCUDA's destructor would treat the primary context as its own.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))

    def call(self, doing: str, function: str, *arguments: Any) -> Any:
        """See :meth:`Gpu.call`."""
        try:
            return self._functions[function](*arguments)
        except self._cuda.Error as error:
            raise self._error(str(error), doing) from None

    def _error(self, message: str, doing: str) -> CudaError:
        """The error for a message such as ``cuMemAlloc failed: out of memory``."""
        match = re.match(r"\S+ failed: (.*?)(?: - .*)?$", " ".join(message.split()))
        text = match[1] if match else message
        names = _names_by_text() if self._error_names is None else self._error_names
        return CudaError(names.get(text, "CUDA error"), text, doing)


class _PageLocked:
    """Owns page-locked memory: lives as long as the last array over it."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _import_cuda_python() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ModuleNotFoundError:
        return import_module("cuda.cuda")


def _text(value: Any) -> str:
    """Text of a C string."""
    return value.split(b"\0")[0].decode(errors="replace") if isinstance(value, bytes) else str(value or "")


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
        if not (library.cuGetErrorName(code, ctypes.byref(name)) or library.cuGetErrorString(code, ctypes.byref(text))):
            names.setdefault(_text(text.value), _text(name.value))
    return names


BINDINGS: dict[str, Callable[[int], Gpu]] = {gpu.binding: gpu for gpu in (CudaPythonGpu, PyCudaGpu)}
"""The preferred one first. cuda-python has CUDA graphs, and wheels for Jetson and desktop; PyCUDA has no graphs and is
compiled at installation."""
_open: dict[tuple[str, int], Gpu] = {}
_lock = threading.Lock()


def open_gpu(binding: str | None = None, ordinal: int = 0) -> Gpu:
    """The GPU through one binding; the same object for the same arguments as long as the process lives.

    Args:
        binding: one of :data:`BINDINGS`. Default: what ``CDKD_EDGE_CUDA_BINDING`` names, else the first installed.
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
                    _open[name, ordinal] = BINDINGS[name](ordinal)
                return _open[name, ordinal]
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # installed, but for another CUDA or Python
            failures.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    if failures:
        raise EngineError("; ".join(failures), hint="install it again for this Python and this CUDA")
    raise MissingExtraError(named or "cuda-python or pycuda", "pycuda" if named == "pycuda" else "gpu", "a GPU engine")
