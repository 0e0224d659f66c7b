"""Kernel timings kept between builds: one file per TensorRT and GPU, shared by processes.

A build reads the file when it starts and merges what it has measured into the file's content of *that*
moment when it ends, under a lock: of two builds at a time, neither loses its timings. The file is
replaced whole. A damaged one is ignored; timings are only ever a shortcut.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.machine import cache_folder
from cdkd_edge.engines.tensorrt.api import TENSORRT_RTX, TensorRT
from cdkd_edge.engines.tensorrt.device import Gpu, NoGpu

if TYPE_CHECKING:
    import tensorrt as trt


def cache_path(kind: str, version: str, gpu: Gpu, folder: Path | None = None) -> Path:
    """The file for a TensorRT and a GPU: timings of others do not apply."""
    name = f"{kind}-{version}-{gpu.name}-sm{gpu.compute_capability.replace('.', '')}"
    return (folder or cache_folder() / "timing") / (re.sub(r"[^\w.-]+", "_", name) + ".cache")


def read_cache(path: Path) -> bytes:
    """The file's content; empty where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def update_cache(path: Path, merge: Callable[[bytes], bytes]) -> None:
    """Replace the file by ``merge(its content now)``, while no other process does.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        content = merge(read_cache(path))
        with whole_file(path) as temporary:
            temporary.write_bytes(content)


class TimingCache:
    """The cache file, around one build. What goes wrong with it is a note and never the end of a build."""

    def __init__(self, api: TensorRT, config: trt.IBuilderConfig, gpu: Gpu | NoGpu) -> None:
        self.notes: list[str] = []
        self.used = False
        self._config = config
        if api.kind == TENSORRT_RTX or isinstance(gpu, NoGpu):  # TensorRT-RTX times nothing when it builds
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
        self.used = True

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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of its own: the cache itself is replaced, and a lock would go with it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and the lock with it
