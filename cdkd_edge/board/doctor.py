"""The doctor: what works on this machine, and how to repair what does not. A probe returns a :class:`Finding`."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdkd_edge.board import jetson
from cdkd_edge.board.conditions import ConditionsReader
from cdkd_edge.board.jetson import is_jetson, read
from cdkd_edge.board.modes import pending_restore
from cdkd_edge.board.power.ina3221 import TOTAL
from cdkd_edge.board.software import FAIL, OK, WARN, Finding, Software, examine_software, numbers, read_software
from cdkd_edge.core.errors import BoardError, printable

JETPACK_HINT = "flash JetPack 6.1 or newer (NVIDIA SDK Manager): it has TensorRT 10.3"
SOCKET = "/run/jtop.sock"
MOUNTS = {
    "board": "-v /sys/firmware/devicetree/base:/device-tree:ro",
    "JetPack": f"-v {jetson.RELEASE}:{jetson.RELEASE}:ro",
    "power mode": f"-v {jetson.CONFIG}:{jetson.CONFIG}:ro -v /var/lib/nvpmodel:/var/lib/nvpmodel:ro",
    "jtop service": f"-v {SOCKET}:{SOCKET} --group-add $(getent group jtop | cut -d: -f3)",
}
"""Options of ``docker run`` that let a container see what the finding of that name is about."""
_MANAGED = 38
"""First Jetson Linux on Ubuntu 24.04, where pip needs ``--break-system-packages`` to install into the system's Python
(PEP 668); the pip of JetPack 6 does not know the option."""
_JTOP_OF_JETPACK_7 = (7, 2)
"""First jetson-stats that knows Jetson Linux 39.2, and whose service outlives a `jetson_clocks --show` that fails
(https://github.com/rbonghi/jetson_stats/issues/876)."""
_VOLTS = (4.75, 20.0)
"""At VDD_IN of Orin NX and Orin Nano. Carrier boards give 5 V or any voltage up to 20 V (NVIDIA's design guide
DG-10931-001, pin 217); 4.75 V is the least (ARK Electronics, ark_jetson_kernel, docs/power.md)."""
GIB = 1 << 30
BUILD_BYTES = 4 * GIB  # free memory that a build of the paper's network needs on a board; an estimate
RUN_BYTES = 1 * GIB  # free memory below which neither a build nor a scene is likely to run
_SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not work."""
        return tuple(finding for finding in self.findings if finding.status == FAIL)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by status."""
        counted = Counter(finding.status for finding in self.findings)
        return {status: counted[status] for status in (OK, WARN, FAIL)}


def examine(
    workspace: Path, *, root: Path = Path("/"), software: Software | None = None, user: User | None = None
) -> Diagnosis:
    """Examine this machine, or a tree of files in its place.

    Args:
        workspace: where disk space is needed.
        root: of the file tree.
        software: what is installed. Default: that of this Python.
        user: who asks. Default: the user of this process.
    """
    software = software or read_software(ask_jtop=socket_exists(root))
    findings = (
        probe_board(root),
        probe_jetpack(root),
        *examine_software(root, software),
        probe_jtop_service(root, software),
        probe_jtop_group(root, user or current_user()),
        probe_power_mode(root, software.nvpmodel),
        probe_clocks(root),
        probe_throttling(root),
        probe_supply(root),
        probe_restore(root),
        probe_memory(root),
        probe_swap(root),
        probe_disk(workspace),
    )
    return Diagnosis(findings)


# --- the board ------------------------------------------------------------------------------------


def probe_board(root: Path) -> Finding:
    """Which machine it is."""
    model, known = jetson.device_tree(root, "model"), is_jetson(root)
    data = {"model": printable(model.text) if model.text else None, "jetson": known}
    if model.text:
        return Finding("board", OK, printable(model.text), data=data)
    if known:
        text = f"a Jetson of unknown model: /proc/device-tree cannot be read: {model.reason or 'there is none'}"
        return Finding("board", WARN, text, f"in a container: docker run {MOUNTS['board']} ...", data)
    if model.reason:
        return Finding("board", WARN, f"/proc/device-tree/model cannot be read: {model.reason}", data=data)
    return Finding("board", OK, "no device tree: not a Jetson", data=data)


def probe_jetpack(root: Path) -> Finding:
    """Jetson Linux and JetPack: TensorRT 10.3 is needed, which came with JetPack 6.1 (R36.4)."""
    name = "JetPack"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed", data={"l4t": None})
    release = jetson.jetson_linux(root)
    if release is None:
        file = read(root, jetson.RELEASE)
        said = file.reason or ("says no release" if file.text is not None else "does not exist")
        container = f"in a container: docker run {MOUNTS['JetPack']} ..."
        mend = container if file.text is None else JETPACK_HINT
        return Finding(name, WARN, f"{jetson.RELEASE}: {said}", mend, {"l4t": None})
    major, l4t = release
    jetpack = jetson.installed_jetpack(root)
    data = {"l4t": l4t, "jetpack": jetpack}
    kit = f"nvidia-jetpack {jetpack}" if jetpack else f"of JetPack {jetson.generation(major)}"
    text = f"Jetson Linux {l4t}, {kit}"
    if numbers(l4t, 2) < (36, 4):
        return Finding(name, FAIL, f"{text}: its TensorRT is older than 10.3", JETPACK_HINT, data)
    return Finding(name, OK, text, data=data)


def probe_power_mode(root: Path, asked: str | None = None) -> Finding:
    """The power mode, by the answer of ``nvpmodel -q`` or its status file, and whether another lets the GPU do more."""
    name, container = "power mode", f"in a container: docker run {MOUNTS['power mode']} ..."
    mend = f"{container}; else sudo apt install --reinstall nvidia-l4t-nvpmodel"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: none")
    config = read(root, jetson.CONFIG)
    if config.text is None:
        return Finding(name, WARN, f"/etc/nvpmodel.conf: {config.reason or 'does not exist'}", mend)
    modes = jetson.parse_modes(config.text)
    data: dict[str, Any] = {
        "modes": [{"id": mode.id, "name": mode.name} for mode in modes],
        "default": jetson.default_mode(config.text),
    }
    if not modes:
        return Finding(name, WARN, "/etc/nvpmodel.conf names no power mode", mend, data)
    number = jetson.current_mode(root, asked)
    current = jetson.mode_of(tuple(modes), number)
    if current is None:
        said = "is not known" if number is None else f"{number} is not in /etc/nvpmodel.conf"
        return Finding(name, WARN, f"the current mode {said}", f"{container}; else sudo nvpmodel -q", data)
    frequencies = read(root, f"{jetson.gpu_folder(root)}/available_frequencies").text or ""
    top = max((int(word) for word in frequencies.split() if word.isdigit()), default=None)
    best = max(modes, key=lambda mode: modes[mode].rate(top))
    data |= {"id": current.id, "mode": current.name}
    text = f"{current}{_gpu_text(modes[current])}"
    if modes[best].rate(top) > modes[current].rate(top):
        more = f"{best.name} lets the GPU do more"
        return Finding(name, WARN, f"{text}; {more}", f"sudo nvpmodel -m {best.id}", data)
    return Finding(name, OK, text, data=data)


def probe_clocks(root: Path) -> Finding:
    """The GPU's clock, and whether it is held at its maximum (`jetson_clocks`)."""
    name = "clocks"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: set by the driver")
    folder, files = jetson.gpu_folder(root), jetson.gpu_clock(root)
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


def probe_throttling(root: Path) -> Finding:
    """The counters by which `bench` notices that the board was throttled."""
    name, events = "throttling", ConditionsReader(root).read().throttle_events
    data = {"counters": sorted(events)}
    if events:
        return Finding(name, OK, f"counted by {', '.join(sorted(events))}", data=data)
    if not is_jetson(root):
        return Finding(name, OK, "not counted on this machine", data=data)
    text = "no over-current counter can be read: `bench` does not notice throttling"
    return Finding(name, WARN, text, "ls -l /sys/class/hwmon/hwmon*/oc*_event_cnt", data)


def probe_supply(root: Path) -> Finding:
    """The voltage at the input of an Orin NX or Orin Nano. Only `oc1` of a run tells whether it holds under load."""
    labels = root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")
    label = next((path for path in labels if read(path.parent, path.name).text == TOTAL), None)
    known = "Orin N" in (jetson.device_tree(root, "model").text or "")
    millivolts = read(label.parent, label.name.replace("label", "input")).number if label and known else None
    if millivolts is None:
        return Finding("supply", OK, "its voltage is not judged on this machine")
    volts, data = millivolts / 1000, {"volts": millivolts / 1000}
    if _VOLTS[0] <= volts <= _VOLTS[1]:
        return Finding("supply", OK, f"{volts:.2f} V at the module", data=data)
    text = f"{volts:.2f} V at the module, which needs {_VOLTS[0]:g} to {_VOLTS[1]:g} V"
    return Finding("supply", WARN, text, "use a stronger supply, or a shorter cable", data)


def probe_restore(root: Path) -> Finding:
    """Power mode and clocks that a killed `bench --set-mode` or `--max-clocks` has not restored."""
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


def _gpu_text(limits: jetson.GpuLimits) -> str:
    parts = [f"{limits.multiprocessors} multiprocessors"] if limits.multiprocessors else []
    parts += [f"GPU at most {limits.hertz / 1e6:.0f} MHz"] if limits.hertz else []
    return f", {', '.join(parts)}" if parts else ""


# --- the jtop service -----------------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """A user of this machine."""

    name: str
    uid: int
    groups: frozenset[int]  # numbers of the groups of this process


def current_user() -> User:
    """The user of this process."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return User(name, uid, frozenset((*os.getgroups(), os.getegid())))


def socket_exists(root: Path) -> bool:
    """Whether the jtop service has opened its socket."""
    try:
        return jetson.resolve(root, SOCKET).exists()
    except OSError:
        return False


def probe_jtop_service(root: Path, software: Software) -> Finding:
    """The jtop client and service, and whether they measure VDD_IN."""
    name, version = "jtop service", software.packages.get("jetson-stats")
    data = {"client": version, "socket": socket_exists(root), **software.jtop}
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed", data=data)
    release = jetson.jetson_linux(root)
    if version and release and release[0] >= _MANAGED and numbers(version, 2) < _JTOP_OF_JETPACK_7:
        text = f"jetson-stats {version} does not know JetPack 7, and its service may end there"
        return Finding(name, WARN, text, _install(root), data)
    if not socket_exists(root):
        mend = "sudo systemctl restart jtop.service" if version else _install(root)
        missing = "" if version else ", jetson-stats is not installed in this Python"
        mend = f"{mend}; in a container: docker run {MOUNTS[name]} ..."
        return Finding(name, WARN, f"does not run ({SOCKET} is not there){missing}", mend, data)
    if version is None:
        text = "runs, but jetson-stats is not installed in this Python"
        return Finding(name, WARN, text, "pip install 'cdkd-edge[jetson]'", data)
    if "error" in software.jtop or not software.jtop:
        said = printable(str(software.jtop.get("error", "was not asked")))
        return Finding(name, WARN, f"jetson-stats {version} does not get an answer: {said}", _install(root), data)
    rail = software.jtop.get("rail")
    if rail != "VDD_IN" and "AGX Orin" in (jetson.device_tree(root, "model").text or ""):
        text = f"jetson-stats {version} answers; an AGX Orin has no VDD_IN, its power is read from its INA3221 chips"
        return Finding(name, OK, text, data=data)
    if rail != "VDD_IN":
        total = printable(str(rail)) if rail else "missing"
        text = f"answers, but its total is {total} and not VDD_IN, the module's input"
        return Finding(name, WARN, text, _install(root), data)
    return Finding(name, OK, f"jetson-stats {version} answers, VDD_IN is measured", data=data)


def probe_jtop_group(root: Path, user: User) -> Finding:
    """Whether the user may use the jtop service."""
    name = "jtop group"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed")
    if user.uid == 0:
        return Finding(name, OK, "root needs none")
    groups = read(root, "/etc/group")
    entry = _group(groups.text or "", "jtop")
    if entry is None:
        number = _socket_group(root)
        if number in user.groups:  # in a container, which has the group's number alone
            return Finding(name, OK, f"{user.name} has the socket's group {number}", data={"gid": number})
        said = f"/etc/group: {groups.reason}" if groups.reason else "there is no group jtop"
        mend = f"sudo groupadd -f jtop && sudo usermod -aG jtop {user.name} && sudo systemctl restart jtop.service"
        if number is not None:
            mend = f"in a container: docker run --group-add {number} ...; else {mend}"
        return Finding(name, WARN, said, mend)
    number, members = entry
    if number in user.groups:
        return Finding(name, OK, f"{user.name} is a member", data={"gid": number})
    if user.name in members:
        text = f"{user.name} is a member, but logged in before becoming one"
        return Finding(name, WARN, text, "log out and in again, or: newgrp jtop", {"gid": number})
    return Finding(name, WARN, f"{user.name} is not a member", f"sudo usermod -aG jtop {user.name}", {"gid": number})


def _socket_group(root: Path) -> int | None:
    try:
        return jetson.resolve(root, SOCKET).stat().st_gid
    except OSError:
        return None


def _install(root: Path) -> str:
    release = jetson.jetson_linux(root)
    option = "--break-system-packages " if release and release[0] >= _MANAGED else ""
    return f"sudo pip3 install {option}-U jetson-stats && sudo systemctl restart jtop.service"


def _group(text: str, name: str) -> tuple[int, frozenset[str]] | None:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 4 and fields[0] == name and fields[2].isdigit():
            return int(fields[2]), frozenset(filter(None, fields[3].split(",")))
    return None


# --- memory and disk ------------------------------------------------------------------------------


def probe_memory(root: Path) -> Finding:
    """Free memory."""
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
    """Swap, without which a builder that runs out of memory is killed."""
    swaps = read(root, "/proc/swaps")
    if swaps.text is None:
        return Finding("swap", WARN, f"/proc/swaps: {swaps.reason or 'does not exist'}", "swapon --show")
    rows = [line.split() for line in swaps.text.splitlines()[1:]]
    sizes = [int(row[2]) for row in rows if len(row) >= 5 and row[2].isdigit()]
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
    """Free space on the disk of the workspace."""
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
