"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def hand_memory_back() -> None:
    """Give the system what has been freed.

    glibc keeps it for more arrays of that size: 150 MB of a wide scene after its segmentation, 70 MB after its
    polygons, which are many small things.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
