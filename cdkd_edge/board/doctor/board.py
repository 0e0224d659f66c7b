"""The board: model, Jetson Linux, power mode, clocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cdkd_edge.board.doctor.finding import FAIL, OK, WARN, Finding
from cdkd_edge.board.jetson import (
    MODEL,
    RELEASE,
    current_mode,
    generation,
    gpu_folder,
    installed_jetpack,
    is_jetson,
    jetson_linux,
)
from cdkd_edge.board.modes import pending_restore
from cdkd_edge.board.nvpmodel import CONFIG, NvpMode, default_mode, parse_modes
from cdkd_edge.board.tree import Text, read
from cdkd_edge.core.errors import BoardError, printable

JETPACK_HINT = "flash JetPack 6.1 or newer (NVIDIA SDK Manager): it has TensorRT 10.3"


def probe_board(root: Path) -> Finding:
    """Which machine it is."""
    model = read(root, MODEL)
    if model.text:
        return Finding(
            "board", OK, printable(model.text), data={"model": printable(model.text), "jetson": is_jetson(root)}
        )
    if model.reason:
        return Finding("board", WARN, f"{MODEL} cannot be read: {model.reason}", data={"jetson": is_jetson(root)})
    text = "a Jetson whose device tree is not visible" if is_jetson(root) else "no device tree: not a Jetson"
    return Finding("board", OK, text, data={"model": None, "jetson": is_jetson(root)})


def probe_jetpack(root: Path) -> Finding:
    """Jetson Linux and JetPack: TensorRT 10.3 is needed, which came with JetPack 6.1 (R36.4)."""
    name = "JetPack"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed", data={"l4t": None})
    release = jetson_linux(root)
    if release is None:
        file = read(root, RELEASE)
        said = file.reason or ("says no release" if file.text is not None else "does not exist")
        mend = f"in a container: docker run -v {RELEASE}:{RELEASE}:ro ..." if file.text is None else JETPACK_HINT
        return Finding(name, WARN, f"{RELEASE}: {said}", mend, {"l4t": None})
    major, l4t = release
    jetpack = installed_jetpack(root)
    data = {"l4t": l4t, "jetpack": jetpack}
    text = f"Jetson Linux {l4t}, " + (f"nvidia-jetpack {jetpack}" if jetpack else f"of JetPack {generation(major)}")
    if _numbers(l4t) < (36, 4):
        return Finding(name, FAIL, f"{text}: its TensorRT is older than 10.3", JETPACK_HINT, data)
    return Finding(name, OK, text, data=data)


def probe_power_mode(root: Path, asked: str | None = None) -> Finding:
    """The power mode, and whether another one lets the GPU do more.

    Args:
        root: of the tree.
        asked: what ``nvpmodel -q`` answered, if it was asked; else its status file is read.
    """
    name = "power mode"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: none")
    config = read(root, CONFIG)
    if config.text is None:
        said = config.reason or "does not exist"
        return Finding(name, WARN, f"/etc/nvpmodel.conf: {said}", "sudo apt install --reinstall nvidia-l4t-nvpmodel")
    modes = parse_modes(config.text)
    data: dict[str, Any] = {
        "modes": [{"id": mode.id, "name": mode.name} for mode in modes],
        "default": default_mode(config.text),
    }
    if not modes:
        mend = "sudo apt install --reinstall nvidia-l4t-nvpmodel"
        return Finding(name, WARN, "/etc/nvpmodel.conf names no power mode", mend, data)
    number = current_mode(root, asked)
    current = next((mode for mode in modes if mode.id == number), None)
    if current is None:
        said = "is not known" if number is None else f"{number} is not in /etc/nvpmodel.conf"
        return Finding(name, WARN, f"the current mode {said}", "sudo nvpmodel -q", data)
    top = _highest(read(root, f"{gpu_folder(root)}/available_frequencies"))
    best = max(modes, key=lambda mode: mode.gpu_rate(top))
    data |= {"id": current.id, "mode": current.name}
    text = f"{current.name} (id {current.id}){_gpu_text(current)}"
    if best.gpu_rate(top) > current.gpu_rate(top):
        more = f"{best.name} lets the GPU do more"
        return Finding(name, WARN, f"{text}; {more}", f"sudo nvpmodel -m {best.id}", data)
    return Finding(name, OK, text, data=data)


def probe_clocks(root: Path) -> Finding:
    """The GPU's clock, and whether it is held at its maximum (`jetson_clocks`)."""
    name = "clocks"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: set by the driver")
    folder = gpu_folder(root)
    files = {key: read(root, f"{folder}/{key}_freq") for key in ("min", "cur", "max")}
    hertz = {key: file.number for key, file in files.items()}
    data = {f"{key}_hz": value for key, value in hertz.items()}
    low, now, high = hertz["min"], hertz["cur"], hertz["max"]
    if low is None or high is None or high <= 0:
        said = next((file.reason for file in files.values() if file.reason), "not there, or no numbers")
        return Finding(name, WARN, f"{folder}: {said}", "sudo jetson_clocks --show", data)
    text = f"GPU at {now / 1e6:.0f} MHz, " if now is not None else "GPU "
    if low < high:
        text += f"free between {low / 1e6:.0f} and {high / 1e6:.0f} MHz; measurements vary more than with fixed clocks"
        return Finding(name, WARN, text, "sudo jetson_clocks", data)
    return Finding(name, OK, f"{text}held at {high / 1e6:.0f} MHz", data=data)


def probe_restore(root: Path) -> Finding:
    """Power mode and clocks that a killed `bench --set-mode` or `--max-clocks` has left changed."""
    name = "to be put back"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: nothing")
    try:
        left = pending_restore(root)
    except BoardError as error:
        return Finding(name, WARN, error.message, error.hint)
    if left is None:
        return Finding(name, OK, "nothing", data={"since": None})
    data = {
        "since": left.since,
        "mode": {"id": left.mode.id, "name": left.mode.name} if left.mode else None,
        "clocks": str(left.clocks) if left.clocks else None,
    }
    return Finding(name, WARN, printable(str(left)), " && ".join(left.commands), data)


def _numbers(l4t: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", l4t))


def _highest(frequencies: Text) -> int | None:
    numbers = [int(word) for word in (frequencies.text or "").split() if word.isdigit()]
    return max(numbers, default=None)


def _gpu_text(mode: NvpMode) -> str:
    parts = [f"{mode.multiprocessors} multiprocessors"] if mode.multiprocessors else []
    parts += [f"GPU at most {mode.gpu_hz / 1e6:.0f} MHz"] if mode.gpu_hz else []
    return f", {', '.join(parts)}" if parts else ""
