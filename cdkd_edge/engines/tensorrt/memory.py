"""How much memory the builder's workspace may take: less than is free at this moment.

TensorRT's own default is all memory of the device. On boards whose CPU and GPU share it, a builder that
takes that at its word is killed by the kernel, or fails with "could not find any implementation".

The rule: free memory less a reserve, and at least 64 MiB.

- *free* is ``MemAvailable`` where CPU and GPU share memory, the driver's free memory elsewhere;
- the *reserve* is 1 GiB (512 MiB where the GPU has its own memory) for CUDA's context, kernels and activations,
  and four times the graph's size for its weights: read, parsed, in the builder and in the engine.
"""

from __future__ import annotations

import re
from pathlib import Path

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
