"""Which power sources there are. A new one is a module of its own and a row of :data:`SOURCES`.

Sources are opened in a process of their own, :mod:`cdkd_edge.board.power.sampler_child`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.power.protocol import Reader, Stream


@dataclass(frozen=True)
class PowerSource:
    """A row of the table."""

    open: Callable[[float, Path], Stream | Reader]
    """Given the seconds between samples and where ``/sys`` is; raises UnusableSourceError. Only the sampling process
    calls it, so this is where a source's library is imported."""
    if_silent: str | None = None  # what to type if it does not answer in time


def _jtop(interval: float, sys_root: Path) -> Stream:
    from cdkd_edge.board.power.ina3221 import find_accuracy
    from cdkd_edge.board.power.jtop import JtopStream

    return JtopStream(interval, accuracy=find_accuracy(sys_root))  # the same chip, read by the service


def _ina3221(interval: float, sys_root: Path) -> Stream:
    from cdkd_edge.board.power.ina3221 import Ina3221Reader, Ina3221Stream, find_accuracy

    return Ina3221Stream(Ina3221Reader(sys_root), interval, find_accuracy(sys_root))


def _nvml(interval: float, sys_root: Path) -> Reader:
    from cdkd_edge.board.power.nvml import NvmlReader

    return NvmlReader()


def _rapl(interval: float, sys_root: Path) -> Reader:
    from cdkd_edge.board.power.rapl import RaplReader

    return RaplReader(sys_root / "class/powercap")


SOURCES: Mapping[str, PowerSource] = {
    "jtop": PowerSource(_jtop, if_silent="sudo systemctl restart jtop"),
    "ina3221": PowerSource(_ina3221),
    "nvml": PowerSource(_nvml),
    "rapl": PowerSource(_rapl),
}  # by name, in the order in which they are tried
