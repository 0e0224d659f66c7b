"""How an engine is built: what a person may choose, checked before anything starts.

How much memory the builder's workspace may take: less than is free at this moment.

TensorRT's own default is all memory of the device. On boards whose CPU and GPU share it, a builder that
takes that at its word is killed by the kernel, or fails with "could not find any implementation".

The rule: free memory less a reserve, and at least 64 MiB.

- *free* is ``MemAvailable`` where CPU and GPU share memory, the driver's free memory elsewhere;
- the *reserve* is 1 GiB (512 MiB where the GPU has its own memory) for CUDA's context, kernels and activations,
  and four times the graph's size for its weights: read, parsed, in the builder and in the engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cdkd_edge.core.errors import UsageError
from cdkd_edge.engines.tensorrt.device import Gpu, free_gpu_memory

MINIMUM = 64 << 20
_RESERVE, _RESERVE_INTEGRATED = 512 << 20, 1 << 30
_GRAPH_COPIES = 4


def default_workspace(gpu: Gpu, graph_bytes: int) -> int | None:
    """The limit for a build on ``gpu`` just now; None, TensorRT's own, where free memory cannot be read."""
    free = available_memory() if gpu.integrated else free_gpu_memory()
    return None if free is None else workspace_within(free, graph_bytes, integrated=gpu.integrated)


def workspace_within(free: int, graph_bytes: int, *, integrated: bool) -> int:
    """The rule of this module for so much free memory."""
    reserve = (_RESERVE_INTEGRATED if integrated else _RESERVE) + _GRAPH_COPIES * graph_bytes
    return max(MINIMUM, free - reserve)


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """``MemAvailable`` in bytes; None where the system does not say."""
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * 1024 if match else None


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of a TensorRT build; the defaults are what a board wants."""

    workspace_bytes: int | None = None
    """Most memory a layer may use for scratch while kernels are chosen. None: what is free just now, see
    :func:`cdkd_edge.engines.tensorrt.options.default_workspace`."""
    optimization_level: int | None = None
    """0 (fast build) to 5 (slow build, more kernels tried). None: TensorRT's own default, 3."""
    timing_cache: bool = True
    """Keep kernel timings in the user's cache folder, so that the next build of a like network is short."""
    sparse: bool = False
    """Let TensorRT use 2:4 sparse kernels where weights happen to be so; it never changes weights."""
    verbose: bool = False
    """Pass on all that TensorRT logs, not only warnings and errors."""
    weakly_typed: bool = False
    """Let TensorRT 10.x choose precisions itself by builder flags: a fallback for its early versions."""
    targets: tuple[str, ...] = field(default=())
    """Compute capabilities to compile for without their GPU, e.g. ``8.6`` (TensorRT-RTX only)."""

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"optimisation level {self.optimization_level} is not 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            raise UsageError("a workspace is at least 1 MiB", hint="give a size such as 512M or 2G")


def parse_size(text: str) -> int:
    """Bytes of ``512M``, ``1.5G``, ``2GiB``: units of 1024, as trtexec has them.

    Raises:
        UsageError: it is no size, or has no unit.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMG])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is not a size", hint="give a number with K, M or G, such as 512M or 1.5G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_target(text: str) -> str:
    """``8.6`` of ``sm86``, ``SM_86``, ``86`` or ``8.6``.

    Raises:
        UsageError: it is no compute capability.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2}?)\.?(\d)", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is not a compute capability", hint="give it as sm86 or 8.6")
    return f"{int(match[1])}.{match[2]}"
