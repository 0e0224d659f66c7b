"""How an engine is built: options, the builder's memory, and the kernel timings that builds share.

TensorRT's builder takes all memory of the device by default. On boards whose CPU and GPU share memory, the kernel then
kills it, or it fails with "could not find any implementation". So the workspace is limited to the free memory
less a reserve, and is at least 64 MiB:

- free: ``MemAvailable`` if CPU and GPU share memory, else what the driver says is free;
- reserve: 1 GiB (512 MiB on a GPU with its own memory) for CUDA's context, kernels and activations, and four times the
  graph's size for its weights (read, parsed, in the builder, in the engine).
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.machine import cache_folder
from cdkd_edge.engines.tensorrt.find import TENSORRT_RTX, GpuInfo, NoGpu, TensorRT, free_gpu_memory

if TYPE_CHECKING:
    import tensorrt as trt

MINIMUM = 64 << 20
_RESERVE, _RESERVE_INTEGRATED = 512 << 20, 1 << 30
_GRAPH_COPIES = 4
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of a TensorRT build; the defaults suit a board."""

    workspace_bytes: int | None = None  # most memory for the builder's workspace. None: :func:`default_workspace`
    optimization_level: int | None = None  # 0 (fast build) to 5 (slow, more kernels tried). None: TensorRT's own, 3
    timing_cache: bool = True  # keep kernel timings in the user's cache folder, for short builds of similar networks
    sparse: bool = False  # let TensorRT use 2:4 sparse kernels where weights are sparse; it never changes weights
    verbose: bool = False  # pass on everything TensorRT logs, not only warnings and errors
    weakly_typed: bool = False  # let TensorRT 10.x choose precisions by builder flags: a fallback for early versions
    targets: tuple[str, ...] = ()  # compute capabilities to compile for without their GPU, e.g. ``8.6`` (TensorRT-RTX)
    portable: bool = False  # build for every GPU of this compute capability, e.g. all Orin modules (TensorRT 10.9)
    power_mode: str | None = None  # the board's power mode now, for the manifest

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"--opt-level must be 0 to 5, got {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1 << 20:
            size = f"{self.workspace_bytes} bytes"
            raise UsageError(f"--workspace-size must be at least 1M, got {size}", hint="give a size such as 512M or 2G")
        if self.portable and self.targets:
            raise UsageError("--portable builds for the GPU of this machine and its like, --target for others")


def parse_size(text: str) -> int:
    """Bytes of ``512M``, ``1.5G``, ``2GiB``: units of 1024, as in trtexec.

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


def default_workspace(gpu: GpuInfo, graph_bytes: int) -> int | None:
    """The limit for a build on ``gpu`` now; None (TensorRT's own) if the free memory is not known."""
    free = available_memory() if gpu.integrated else free_gpu_memory()
    return None if free is None else workspace_within(free, graph_bytes, integrated=gpu.integrated)


def workspace_within(free: int, graph_bytes: int, *, integrated: bool) -> int:
    """The limit for so much free memory, in bytes."""
    reserve = (_RESERVE_INTEGRATED if integrated else _RESERVE) + _GRAPH_COPIES * graph_bytes
    return max(MINIMUM, free - reserve)


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """``MemAvailable`` in bytes; None if the system does not say."""
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * 1024 if match else None


# --- kernel timings: one file per TensorRT, GPU and number of multiprocessors, shared by processes


class TimingCache:
    """The timing cache during one build. A problem with it becomes a note and never ends a build."""

    def __init__(self, api: TensorRT, config: trt.IBuilderConfig, gpu: GpuInfo | NoGpu) -> None:
        self.notes: list[str] = []
        self._config = config
        self.used = api.kind != TENSORRT_RTX and isinstance(gpu, GpuInfo)  # TensorRT-RTX times nothing when it builds
        if not isinstance(gpu, GpuInfo) or not self.used:
            return
        self._path = cache_path(api.kind, api.version, gpu)
        try:
            content = read_cache(self._path)
        except OSError as error:
            self.notes.append(f"timings were not read: {error}")
            content = b""
        if not self._adopt(content):
            self.notes.append(f"{self._path} is damaged or of another device; it is ignored and replaced")
            self._adopt(b"")

    def keep(self) -> None:
        """Merge the build's timings into the file."""
        if not self.used:
            return
        try:
            update_cache(self._path, self._merged)
        except OSError as error:
            self.notes.append(f"timings were not kept: {error}")

    def _adopt(self, content: bytes) -> bool:
        cache = self._create(content)
        return cache is not None and self._config.set_timing_cache(cache, False)

    def _create(self, content: bytes) -> trt.ITimingCache | None:
        try:
            return self._config.create_timing_cache(content)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _merged(self, current: bytes) -> bytes:
        ours = self._config.get_timing_cache()
        theirs = self._create(current) if current else None
        if theirs is not None:
            ours.combine(theirs, False)  # False if they do not fit together: then the file was damaged
        return bytes(ours.serialize())


def cache_path(kind: str, version: str, gpu: GpuInfo) -> Path:
    """The file for a TensorRT and a GPU with so many multiprocessors on: timings of others do not apply."""
    name = f"{kind}-{version}-{gpu.name}-sm{gpu.compute_capability.replace('.', '')}-{gpu.multiprocessors}sm"
    return cache_folder() / "timing" / (re.sub(r"[^\w.-]+", "_", name) + ".cache")


def read_cache(path: Path) -> bytes:
    """The file's content; empty if there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def update_cache(path: Path, merge: Callable[[bytes], bytes]) -> None:
    """Replace the file by ``merge(its content now)`` under a lock, so that parallel builds lose no timings.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own is locked: a lock on the cache would be lost when that is replaced.
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = merge(read_cache(path))
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
