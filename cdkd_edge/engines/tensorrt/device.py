"""The GPU here, asked of the CUDA driver itself: no CUDA package, no context, no torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute of cuda.h.
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for."""

    name: str
    compute_capability: str
    """e.g. ``8.7``."""
    integrated: bool
    """Whether it shares the CPU's memory, as on a Jetson."""
    multiprocessors: int
    memory_bytes: int
    cuda: str
    """CUDA version of the driver, e.g. ``12.6``."""


@dataclass(frozen=True)
class NoGpu:
    """Why there is none to use."""

    reason: str


def find_gpu(ordinal: int = 0) -> Gpu | NoGpu:
    """The GPU that TensorRT would use, or why there is none. Makes no CUDA context."""
    driver = _driver()
    if isinstance(driver, NoGpu):
        return driver
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value <= ordinal:
        return NoGpu("the CUDA driver sees no GPU")
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    version = ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    values = [_attribute(driver, device, number) for number in (_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS)]
    if failed or None in values:
        return NoGpu("the CUDA driver does not describe its GPU")
    major, minor, integrated, multiprocessors = (int(value or 0) for value in values)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        integrated=bool(integrated),
        multiprocessors=multiprocessors,
        memory_bytes=memory.value,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def free_gpu_memory(ordinal: int = 0) -> int | None:
    """Bytes free on a GPU just now; None if the driver does not say. Uses the primary context, then releases it."""
    driver = _driver()
    if isinstance(driver, NoGpu):
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver() -> Any:
    """The driver's library, initialised; or :class:`NoGpu`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NoGpu("there is no CUDA driver")
    code = driver.cuInit(0)
    if code == _NO_DEVICE:  # also where CUDA_VISIBLE_DEVICES hides them
        return NoGpu("the CUDA driver sees no GPU")
    return NoGpu(f"the CUDA driver does not start (cuInit: {code})") if code else driver


def _attribute(driver: Any, device: ctypes.c_int, number: int) -> int | None:
    value = ctypes.c_int()
    return None if driver.cuDeviceGetAttribute(ctypes.byref(value), number, device) else value.value
