"""An emulated Orin NX: NVIDIA's files in a private mount namespace, and on it the unmodified jetson-stats service.

The tree is an ordinary folder that the namespace sees as ``/sys``; tests write to it from outside. ``/run`` (the
service's socket) and ``/etc/group`` (its group) are private as well. Programs run on the board by prefixing
:meth:`Board.enter`. Reads of the power monitor's files wait for its conversions, and give values in its steps:
``ina3221_chip.c`` is preloaded to them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CHIP = "bus/i2c/devices/1-0040"
HWMON = f"{CHIP}/hwmon/hwmon3"
RAILS = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
VOLTS = 5.0
SHUNT = 5e-3
"""Ohm, of VDD_IN on a p3767 (an Orin NX)."""
CYCLE = 6 * 1.1e-3
"""Seconds in which the chip converts its three channels."""
REPOSITORY = Path(__file__).resolve().parents[2]

NVPMODEL = """#!/bin/sh
id=$(sed 's/pmode:...//' /var/lib/nvpmodel/status 2>/dev/null || echo 0)
case "$1" in
-q) case $id in 0) echo 'NV Power Mode: MAXN';; *) echo 'NV Power Mode: 10W';; esac; echo $id ;;
-m) echo "pmode:000$2" > /var/lib/nvpmodel/status ;;
-p) printf 'POWER_MODEL: ID=0 NAME=MAXN\\nPOWER_MODEL: ID=1 NAME=10W\\nPM_CONFIG: DEFAULT=MAXN(0)\\n' ;;
esac
"""

INSIDE = r"""
set -e
for place in etc var/lib; do
    [ ! -d "$BOARD/$place" ] || mount --bind "$BOARD/$place" "/$place"
done
mount --bind "$BOARD/sys" /sys
mount --bind "$BOARD/run" /run
mount --bind "$BOARD/group" /etc/group
echo ready
exec sleep 100000
"""


class NoBoardError(Exception):
    """Why no board can be emulated here."""


def write(path: Path, text: object) -> None:
    """Replace a file by rename: a reader sees the old text or the new one, never an empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f".{path.name}.{threading.get_ident()}")
    other.write_text(f"{text}\n")
    os.replace(other, path)


def make_tree(root: Path, watts: Sequence[float] = (6.0, 1.5, 1.0)) -> Path:
    """The part of an Orin NX's ``/sys`` that power readers look at; the folder to pass as ``/sys``."""
    write(root / CHIP / "name", "ina3221")
    for channel, (rail, power) in enumerate(zip(RAILS, watts, strict=True), 1):
        write(root / HWMON / f"in{channel}_label", rail)
        write(root / HWMON / f"in{channel}_input", round(VOLTS * 1000))
        write(root / HWMON / f"curr{channel}_input", round(power / VOLTS * 1000))
        write(root / HWMON / f"shunt{channel}_resistor", round(SHUNT * 1e6))
    write(root / HWMON / "update_interval", round(CYCLE * 1000))
    write(root / HWMON / "samples", 1)
    write(root / HWMON / "in7_label", "sum of shunt voltages")
    write(root / HWMON / "in7_input", 40)
    drivers = root / "bus/i2c/drivers/ina3221"
    drivers.mkdir(parents=True)
    (drivers / "1-0040").symlink_to("../../devices/1-0040")

    for cpu in range(os.cpu_count() or 1):
        folder = root / f"devices/system/cpu/cpu{cpu}"
        write(folder / "online", 1)
        for name, text in (
            ("scaling_governor", "schedutil"), ("scaling_cur_freq", 1_984_000), ("scaling_max_freq", 1_984_000),
            ("scaling_min_freq", 115_200), ("cpuinfo_cur_freq", 1_984_000), ("cpuinfo_max_freq", 1_984_000),
            ("cpuinfo_min_freq", 115_200),
        ):  # fmt: skip
            write(folder / "cpufreq" / name, text)
    write(root / "devices/virtual/dmi/id/product_name", "emulated")
    gpu = root / "devices/platform/17000000.gpu"
    write(gpu / "of_node/name", "gpu")
    for name, text in (("load", 0), ("railgate_enable", 0), ("enable_3d_scaling", 1)):
        write(gpu / name, text)
    devfreq = root / "class/devfreq/17000000.gpu"
    devfreq.mkdir(parents=True)
    (devfreq / "device").symlink_to("../../../devices/platform/17000000.gpu")
    for name, text in (
        ("governor", "nvhost_podgov"), ("cur_freq", 918_000_000), ("max_freq", 918_000_000), ("min_freq", 306_000_000),
    ):  # fmt: skip
        write(devfreq / name, text)
    for zone, name in enumerate(("cpu-thermal", "gpu-thermal", "tj-thermal")):
        write(root / f"devices/virtual/thermal/thermal_zone{zone}/type", name)
        write(root / f"devices/virtual/thermal/thermal_zone{zone}/temp", 47_500)
    fan = root / "class/hwmon/hwmon1"
    write(fan / "name", "pwmfan")
    write(fan / "pwm1", 80)
    write(root / "class/hwmon/hwmon2/name", "pwm_tach")
    write(root / "class/hwmon/hwmon2/rpm", 1800)
    write(root / "class/hwmon/hwmon4/name", "soctherm_oc")
    for number in (1, 2, 3):
        write(root / f"class/hwmon/hwmon4/oc{number}_event_cnt", 0)
        write(root / f"class/hwmon/hwmon4/oc{number}_throt_en", 1)
    (root / "kernel").mkdir()
    (root / "class/powercap").mkdir(parents=True)
    return root


@functools.cache
def chip_library() -> Path:
    """``ina3221_chip.c``, compiled; NoBoardError where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoBoardError("no C compiler, to make reads of the power monitor wait")
    folder = Path(tempfile.mkdtemp(prefix="ina3221-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "ina3221_chip.so"
    source = Path(__file__).with_name("ina3221_chip.c")
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, source, "-lm"], check=True)
    return path


def on_chip(*command: object) -> tuple[str, ...]:
    """A command line that runs ``command`` where files of trees with a chip answer at its pace."""
    return ("env", f"LD_PRELOAD={chip_library()}", *map(str, command))


SAMPLER = (sys.executable, "-m", "cdkd_edge.board.power.sampler_child")


def make_chip(tree: Path, offset: float = 0.0, every_read_waits: bool = False, fails: int = 0) -> None:
    """Let the power monitor of a tree answer as the chip does, to programs that :func:`on_chip` runs.

    Args:
        tree: from :func:`make_tree`.
        offset: volts across the shunt that are measured in addition.
        every_read_waits: each read takes a whole cycle, also where a value is ready.
        fails: every read of this number fails with ETIMEDOUT (3: the third, the sixth ...); 0: none.
    """
    (tree / HWMON / ".chip").write_bytes(struct.pack("7d", CYCLE, offset, SHUNT, every_read_waits, fails, 0, 0))


def set_watts(tree: Path, *watts: float) -> None:
    """Of VDD_IN, VDD_CPU_GPU_CV and VDD_SOC, in this order; fewer leave the others. Ends a pattern."""
    (tree / HWMON / ".truth").unlink(missing_ok=True)
    for channel, power in enumerate(watts, 1):
        write(tree / HWMON / f"curr{channel}_input", round(power / VOLTS * 1000))


class Board:
    """An emulated board, and its jtop service."""

    def __init__(self, root: Path, modes: bool = False) -> None:
        """Build the tree under ``root`` and make the namespace.

        With ``modes`` it is known as a Jetson, and ``nvpmodel`` sets its power mode (MAXN, 10W); its ``/etc`` is a
        copy of this machine's, its ``/var/lib`` is empty.

        Raises:
            NoBoardError: no private mount namespace can be had, with what was tried.
        """
        self.root = root
        self.sys = make_tree(root / "sys")
        make_chip(self.sys)
        chip_library()
        (root / "run").mkdir()
        (root / "bin").mkdir()
        (root / "bin/nvpmodel").write_text(NVPMODEL)
        (root / "bin/nvpmodel").chmod(0o755)
        (root / "service").mkdir()
        if modes:
            subprocess.run(["cp", "-a", "/etc", root / "etc"], capture_output=True, check=False)  # what can be read
            write(root / "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
            write(root / "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=10W >")
            write(root / "var/lib/nvpmodel/status", "pmode:0000")
        groups = [line for line in Path("/etc/group").read_text().splitlines() if not line.startswith("jtop:")]
        # Root's group: in a user namespace it is the only one there is.
        self._group_lines = groups
        self.set_group(True)
        self.service: subprocess.Popen[bytes] | None = None
        self._holder, self._flags = self._enter_namespace()

    def set_group(self, there: bool) -> None:
        """Have the group ``jtop``, or not."""
        lines = [*self._group_lines, *(["jtop:x:0:"] if there else [])]
        # In place: the namespace sees this very file.
        (self.root / "group").write_text("\n".join(lines) + "\n")

    def _enter_namespace(self) -> tuple[subprocess.Popen[bytes], tuple[str, ...]]:
        if not (shutil.which("unshare") and shutil.which("nsenter")):
            raise NoBoardError("unshare and nsenter (util-linux) are not installed")
        ways = [(("-m",), ("-m",))] if os.geteuid() == 0 else []
        ways.append((("-rm",), ("-U", "-m", "--preserve-credentials")))
        reasons = []
        for unshare, nsenter in ways:
            holder = subprocess.Popen(
                ["unshare", *unshare, "sh", "-c", INSIDE],
                env={**os.environ, "BOARD": str(self.root)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline().strip() == b"ready":
                return holder, nsenter
            reasons.append(f"unshare {' '.join(unshare)}: {holder.stderr.read().decode().strip()}")
            _end(holder)
        raise NoBoardError("; ".join(reasons))

    def enter(self, *command: object) -> tuple[str, ...]:
        """A command line that runs ``command`` on the board.

        A board has its processors for itself. Here other tests want them at the same time, so what runs on the board
        comes first, where that may be asked for.
        """
        return (*granted("nice", "-n", "-5"), *self._enter(*command))

    def _enter(self, *command: object) -> tuple[str, ...]:
        return ("nsenter", "-t", str(self._holder.pid), *self._flags, *on_chip(*command))

    @property
    def sampler_command(self) -> tuple[str, ...]:
        """Of the sampling process, on the board."""
        return self.enter(*SAMPLER)

    def environment(self) -> dict[str, str]:
        """For programs on the board."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        return {
            **os.environ,
            "PYTHONPATH": path,
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def start_service(self, timeout: float = 30.0) -> None:
        """Start the service and wait until it listens."""
        log = (self.root / "service.log").open("wb")
        # Its configuration goes under sys.base_prefix; here, into the board's folder.
        code = (
            f"import sys; sys.base_prefix = {str(self.root / 'service')!r}; sys.argv = ['jtop', '--force']; "
            "from jtop.__main__ import main; main()"
        )
        self.service = subprocess.Popen(
            # Niceness does not reach beyond a session, and this is one of its own.
            (*granted("chrt", "--rr", "1"), *self._enter(sys.executable, "-c", code)),
            env={**self.environment(), "JTOP_SERVICE": "True"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        deadline = time.monotonic() + timeout
        while "service ready" not in self.log():
            if self.service.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the jtop service did not start:\n{self.log()}")
            time.sleep(0.05)

    def log(self) -> str:
        """What the service said."""
        return (self.root / "service.log").read_text(errors="replace")

    def signal_service(self, number: int) -> None:
        """To all of its processes."""
        assert self.service is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.service.pid, number)

    def stop_service(self) -> None:
        """Kill it."""
        if self.service is not None:
            self.signal_service(signal.SIGKILL)
            self.service.wait()
            self.service = None

    def set_watts(self, *watts: float) -> None:
        """Of VDD_IN, VDD_CPU_GPU_CV and VDD_SOC, in this order; fewer leave the others."""
        set_watts(self.sys, *watts)

    def close(self) -> None:
        """End everything."""
        self.stop_service()
        _end(self._holder)


@functools.cache
def granted(*command: str) -> tuple[str, ...]:
    """What makes a command come before others, where that is allowed; else nothing."""
    try:
        tried = subprocess.run([*command, "true"], capture_output=True)
    except OSError:
        return ()
    return () if tried.returncode or tried.stderr else command


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def jtop_missing() -> str:
    """Why there is no jetson-stats to start; empty where there is."""
    if importlib.util.find_spec("jtop") is None:
        return "jetson-stats is not installed (pip install 'cdkd-edge[board-tests]')"
    return ""


class Pattern(threading.Thread):
    """VDD_IN in known steps, from :meth:`start` on, on a tree with a chip; the other rails keep their watts.

    The chip's readings are computed from the steps themselves, so nothing that keeps this machine busy moves them.
    """

    def __init__(self, tree: Path, steps: Sequence[tuple[float, float]]) -> None:
        """``steps`` are (seconds, watts) of the ``/sys`` at ``tree``."""
        super().__init__(name="pattern", daemon=True)
        self._tree, self._steps = tree, steps
        self.times: list[float] = []
        self.watts = [watts for _, watts in steps]
        self.finished = 0.0
        """Moment at which the last step ends, s on time.monotonic's clock."""

    def start(self) -> None:
        """Begin now."""
        folder = self._tree / HWMON
        others = [int((folder / f"curr{channel}_input").read_text()) / 1000 * VOLTS for channel in (2, 3)]
        moment = time.monotonic()
        rows = []
        for seconds, watts in self._steps:
            rows.append((moment, watts, *others, VOLTS))
            self.times.append(moment)
            moment += seconds
        self.finished = moment
        truth = folder / ".truth.new"
        truth.write_bytes(b"".join(struct.pack("5d", *row) for row in rows))
        truth.rename(folder / ".truth")
        super().start()

    def run(self) -> None:
        time.sleep(max(0.0, self.finished - time.monotonic()))

    def joules(self, start: float, stop: float) -> float:
        """True energy between two moments."""
        ends = [*self.times[1:], max(stop, self.times[-1])]
        return sum(
            watts * max(0.0, min(stop, end) - max(start, begin))
            for begin, end, watts in zip(self.times, ends, self.watts, strict=True)
        )


class Ripple(Pattern):
    """VDD_IN as 15 W with a ripple of 6 W."""

    def __init__(self, tree: Path, hertz: float, shape: str, seconds: float) -> None:
        """``shape`` is ``square``, or ``sine`` in 20 steps."""
        parts = 2 if shape == "square" else 20
        turns = [(part + 0.5) / parts for part in range(parts)]
        heights = [1.0 if turn < 0.5 else -1.0 for turn in turns]
        if shape == "sine":
            heights = [math.sin(2 * math.pi * turn) for turn in turns]
        count = round(seconds * hertz)
        super().__init__(tree, [(1 / hertz / parts, 15 + 6 * height) for height in heights] * count)


@contextlib.contextmanager
def running_board(root: Path, service: bool = True, modes: bool = False) -> Iterator[Board]:
    """A board for a test."""
    board = Board(root, modes)
    try:
        if service:
            board.start_service()
        yield board
    finally:
        board.close()
