"""Whether a disk will hold what a run is going to write: told after minutes, not after hours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

_FINISHING = 1.5
"""Room for finishing over that of the spool: plain rasters, overviews, Cloud-optimised GeoTIFFs. Measured: 1.8, with
confidence 2.3 (81 MP of drawn labels); less here, since an alarm should be none too many."""

_LITTLE = 16 << 20
"""A need below this is not worth a word, bytes."""


class RoomWatch:
    """Compares the room that is left with the need that what is done so far lets expect, and warns once.

    Args:
        folder: where all is written; what is in it counts as written.
        warn: is told.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._warned = False

    def look(self, spool: Path, done: float) -> None:
        """Look, when a share ``done`` (0..1) of the scene is in the file ``spool``."""
        if self._warned or done <= 0:
            return
        try:
            whole = (1 + _FINISHING) * spool.stat().st_size / done
            written = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            free = shutil.disk_usage(self._folder).free
        except OSError:  # files come and go
            return
        need = whole - written
        if need < _LITTLE or need <= free:
            return
        self._warned = True
        self._warn(
            f"going on like this, {_bytes(need)} more will be written beside {self._folder}, and {_bytes(free)} are "
            "free; make room meanwhile. (On a full disk the run stops, and the same command goes on.)"
        )


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, count / 1e6):.0f} MB"
