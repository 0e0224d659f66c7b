"""Memory, swap, disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cdkd_edge.board.doctor.finding import FAIL, OK, WARN, Finding
from cdkd_edge.board.jetson import is_jetson
from cdkd_edge.board.tree import read

GIB = 1 << 30
BUILD_BYTES = 4 * GIB
"""Free memory with which a build of the paper's network has room on a board with shared memory; an estimate."""
RUN_BYTES = 1 * GIB
"""Below it neither a build nor a scene can be expected to run."""
_SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"


def probe_memory(root: Path) -> Finding:
    """Memory that is free just now."""
    info = read(root, "/proc/meminfo")
    total, free = (_kilobytes(info.text or "", key) for key in ("MemTotal", "MemAvailable"))
    if total is None or free is None:
        return Finding("memory", WARN, f"/proc/meminfo: {info.reason or 'does not say'}", "free -h")
    data = {"total_bytes": total, "available_bytes": free}
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    mend = "sudo systemctl isolate multi-user.target" if is_jetson(root) else "ps aux --sort=-rss | head"
    if free < RUN_BYTES:
        return Finding("memory", FAIL, f"{text}: too little for an engine", mend, data)
    if free < BUILD_BYTES:
        return Finding("memory", WARN, f"{text}: a build may run out of it", mend, data)
    return Finding("memory", OK, text, data=data)


def probe_swap(root: Path) -> Finding:
    """Swap, which lets a board's builder finish where memory is short."""
    swaps = read(root, "/proc/swaps")
    if swaps.text is None:
        return Finding("swap", WARN, f"/proc/swaps: {swaps.reason or 'does not exist'}", "swapon --show")
    sizes = [
        int(words[2]) for line in swaps.text.splitlines()[1:] if len(words := line.split()) >= 5 and words[2].isdigit()
    ]
    total = sum(sizes) * 1024
    memory = _kilobytes(read(root, "/proc/meminfo").text or "", "MemTotal") or 0
    data = {"bytes": total, "areas": len(sizes)}
    if total:
        kind = " (zram, compressed memory)" if swaps.text.count("/zram") == len(sizes) else ""
        return Finding("swap", OK, f"{total / GIB:.1f} GiB{kind}", data=data)
    if is_jetson(root) or memory < 8 * GIB:
        return Finding("swap", WARN, "none: a build that runs out of memory is killed", _SWAP, data)
    return Finding("swap", OK, "none", data=data)


def probe_disk(folder: Path) -> Finding:
    """Space where the workspace is."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", FAIL, f"{folder}: {error.strerror}", "name another --workspace")
    data = {"path": str(folder), "free_bytes": free}
    text = f"{free / GIB:.1f} GiB free in {folder.absolute()}"
    if free < GIB:
        return Finding("disk", FAIL, text, f"du -xh {folder.absolute()} | sort -h | tail", data)
    if free < 5 * GIB:
        return Finding("disk", WARN, f"{text}: little for engines and label maps", "sudo apt clean", data)
    return Finding("disk", OK, text, data=data)


def _kilobytes(text: str, key: str) -> int | None:
    match = re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
