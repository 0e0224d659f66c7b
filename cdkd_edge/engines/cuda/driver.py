"""What an engine needs of CUDA, as a protocol that two bindings implement.

Both work in the device's *primary* context, the one that PyTorch and the CUDA runtime inside TensorRT use, so that
memory, streams and errors are of one world. It is retained once per process and device and never released:
the runtime keeps state in it that would not survive its destruction.

References: CUDA driver API, https://docs.nvidia.com/cuda/cuda-driver-api/; memory on integrated GPUs,
https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cdkd_edge.core.errors import EngineError
from cdkd_edge.engines.protocol import UInt8Array

_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close what else uses the GPU; on a Jetson GPU and CPU share their memory (free -h)",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible; in a container, start it with --runtime nvidia or --gpus all",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number; nvidia-smi lists them",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "kernel module and driver library differ: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this CUDA needs a newer driver than the GPU has",
}
_CONTEXT_LOST = {
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_ASSERT",
}
"""After these, every call in the process fails with the same error."""


class CudaError(EngineError):
    """A CUDA call failed."""

    def __init__(self, name: str, text: str, doing: str) -> None:
        hint = _HINTS.get(name)
        if name in _CONTEXT_LOST:
            hint = "the GPU's state in this process is lost: start it again; if it recurs, build the engine again"
        super().__init__(f"{doing} failed: {name}" + (f" ({text})" if text else ""), hint=hint)
        self.name = name


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU, and what talks to it."""

    ordinal: int
    name: str
    compute_capability: str
    """e.g. ``8.7``."""
    integrated: bool
    """Whether it shares the CPU's memory, as on a Jetson."""
    memory_bytes: int
    driver_version: str
    """The newest CUDA that the driver supports, e.g. ``12.6``."""
    runtime_version: str
    """The CUDA that the binding was made for."""


def dotted(version: int) -> str:
    """CUDA's version number 12060 as ``12.6``."""
    return f"{version // 1000}.{version % 1000 // 10}"


class CudaDriver(Protocol):
    """One device through one binding. Handles are the binding's own objects; pointers are integers.

    Every method but :meth:`push` and :meth:`info` needs the context to be current in the calling thread; any thread
    may make it so. Every method raises :class:`CudaError`.
    """

    name: str
    """``cuda-python`` or ``pycuda``."""
    no_graphs: str | None
    """Why there are no CUDA graphs; None where there are."""

    def info(self) -> DeviceInfo:
        """Describe the device."""

    def push(self) -> None:
        """Make the primary context current in this thread, on top of what was."""

    def pop(self) -> None:
        """Undo the last :meth:`push` of this thread."""

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all on the device."""

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        """A page-locked uint8 array, and where the device sees it (0 unless ``mapped``).

        The memory is freed when the last array over it is gone, so none can be left without memory.
        """

    def device_alloc(self, size: int) -> Any:
        """Allocate bytes on the device."""

    def pointer(self, allocation: Any) -> int:
        """Address of an allocation."""

    def device_free(self, allocation: Any) -> None:
        """Free an allocation."""

    def stream_create(self) -> Any:
        """A stream that does not wait for the legacy default stream, nor that for it."""

    def stream_handle(self, stream: Any) -> int:
        """The ``cudaStream_t`` of a stream."""

    def stream_synchronize(self, stream: Any) -> None:
        """Wait for all work of a stream."""

    def stream_destroy(self, stream: Any) -> None:
        """Destroy a stream; the caller drops its reference before it pops the context."""

    def event_create(self) -> Any:
        """An event without timing, on which a waiting thread sleeps instead of spinning."""

    def event_record(self, event: Any, stream: Any) -> None:
        """Mark this place in a stream."""

    def event_synchronize(self, event: Any) -> None:
        """Wait until the marked place is reached; reports errors of the work before it."""

    def event_destroy(self, event: Any) -> None:
        """Destroy an event; as for a stream."""

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        """Start copying a page-locked array to the device."""

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        """Start copying from the device into a page-locked array."""

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        """Start filling device memory with a byte."""

    def capture_begin(self, stream: Any) -> None:
        """Record what is put into a stream, from this thread, instead of running it (thread-local mode)."""

    def capture_end(self, stream: Any) -> Any:
        """End recording; returns the graph, ready to launch."""

    def graph_launch(self, graph: Any, stream: Any) -> None:
        """Start a graph in a stream."""

    def graph_destroy(self, graph: Any) -> None:
        """Destroy a graph."""
