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

from cdkd_edge.engines.tensorrt.device import Gpu
from cdkd_edge.files import whole_file


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cdkd-edge/timing``, by default below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "cdkd-edge" / "timing"


def cache_path(kind: str, version: str, gpu: Gpu, folder: Path | None = None) -> Path:
    """The file for a TensorRT and a GPU: timings of others do not apply."""
    name = f"{kind}-{version}-{gpu.name}-sm{gpu.compute_capability.replace('.', '')}"
    return (folder or cache_folder()) / (re.sub(r"[^\w.-]+", "_", name) + ".cache")


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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of its own: the cache itself is replaced, and a lock would go with it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and the lock with it
