"""The calls into the CUDA driver that an engine needs; two bindings implement them.

Both work in the device's *primary* context. PyTorch and the CUDA runtime inside TensorRT use that one too, so memory
and streams can be passed between them. The context is retained once per process and device and never released,
because the CUDA runtime keeps state in it.

Sources: CUDA driver API, https://docs.nvidia.com/cuda/cuda-driver-api/; memory on integrated GPUs,
https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cdkd_edge.core.errors import EngineError
from cdkd_edge.engines.protocol import UInt8Array

_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close other programs that use the GPU; on a Jetson GPU and CPU share memory (free -h)",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible; start a container with --runtime nvidia or --gpus all",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number; nvidia-smi lists them",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "kernel module and driver library differ: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "this CUDA needs a newer driver than the one installed",
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
    runtime_version: str  # the CUDA that the binding was made for, e.g. ``12.6``.


class CudaDriver(Protocol):
    """One device through one binding. Handles are the binding's own objects; pointers are integers.

    Methods that take or make memory, streams, events or graphs are called while the context is current in
    the calling thread (:meth:`push`). They raise :class:`CudaError`.
    """

    name: str  # the binding
    no_graphs: str | None = None  # why this binding has no CUDA graphs; None if it has

    def info(self) -> DeviceInfo:
        """Describe the device."""

    def push(self) -> None:
        """Make the device's context current in this thread."""

    def pop(self) -> None:
        """Restore the context that was current before."""

    def memory(self) -> tuple[int, int]:
        """Bytes of GPU memory: free, and in all."""

    def host_array(self, shape: Sequence[int], *, mapped: bool) -> tuple[UInt8Array, int]:
        """Allocate a page-locked uint8 array; returns it and its address on the device (0 unless ``mapped``).

        The memory is freed when the last array over it is gone.
        """

    def device_alloc(self, size: int) -> Any:
        """Allocate bytes on the device; ``int()`` of the allocation is its address."""

    def device_free(self, allocation: Any) -> None:
        """Free an allocation."""

    def stream_create(self) -> Any:
        """Create a stream that does not synchronise with the legacy default stream."""

    def stream_handle(self, stream: Any) -> int:
        """The ``cudaStream_t`` of a stream."""

    def stream_synchronize(self, stream: Any) -> None:
        """Wait for all work of a stream."""

    def stream_destroy(self, stream: Any) -> None:
        """Destroy a stream. A binding that does so with the last reference leaves this as it is.

        The caller drops its reference before it pops the context.
        """

    def event_create(self) -> Any:
        """Create an event without timing; a thread that waits for it sleeps."""

    def event_record(self, event: Any, stream: Any) -> None:
        """Mark the end of the work that is in a stream now."""

    def event_synchronize(self, event: Any) -> None:
        """Wait for the marked work, and report its errors."""

    def event_destroy(self, event: Any) -> None:
        """Destroy an event; see :meth:`stream_destroy`."""

    def copy_in(self, pointer: int, array: UInt8Array, stream: Any) -> None:
        """Start copying a page-locked array to the device."""

    def copy_out(self, array: UInt8Array, pointer: int, stream: Any) -> None:
        """Start copying from the device into a page-locked array."""

    def fill(self, pointer: int, value: int, size: int, stream: Any) -> None:
        """Start filling device memory with a byte."""

    # CUDA graphs: a binding without them says so in no_graphs, and these stay as they are.

    def capture_begin(self, stream: Any) -> None:
        """Record what this thread puts into a stream, instead of running it (thread-local mode)."""
        raise CudaError("CUDA_ERROR_NOT_SUPPORTED", str(self.no_graphs), "recording a CUDA graph")

    def capture_end(self, stream: Any) -> Any:
        """End the recording; returns the graph, ready to launch."""
        self.capture_begin(stream)

    def graph_launch(self, graph: Any, stream: Any) -> None:
        """Start a graph in a stream."""
        self.capture_begin(stream)

    def graph_destroy(self, graph: Any) -> None:
        """Destroy a graph."""
