"""The power sources that there are. A new one is a module of its own and a row of :data:`SOURCES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.power.protocol import Reader, Stream, UnusableSourceError

Opener = Callable[[float, Path], "Stream | Reader"]
"""Opens a source, given the seconds between samples and where ``/sys`` is; raises :class:`UnusableSourceError`. Only
the sampling process calls it, so this is where a source's library is imported."""


@dataclass(frozen=True)
class PowerSource:
    """A row of the table."""

    open: Opener
    if_silent: str | None = None  # what to type if it does not answer in time


def _jtop(interval: float, sys_root: Path) -> Stream:
    from cdkd_edge.board.power.jtop import JtopStream

    return JtopStream(interval)


def _ina3221(interval: float, sys_root: Path) -> Reader:
    from cdkd_edge.board.power.ina3221 import Ina3221Reader

    return _found(*Ina3221Reader.probe(sys_root))


def _nvml(interval: float, sys_root: Path) -> Reader:
    from cdkd_edge.board.power.nvml import NvmlReader

    return _found(*NvmlReader.probe())


def _rapl(interval: float, sys_root: Path) -> Reader:
    from cdkd_edge.board.power.rapl import RaplReader

    return _found(*RaplReader.probe(sys_root / "class/powercap"))


def _found(reader: Reader | None, reason: str) -> Reader:
    if reader is None:
        raise UnusableSourceError(reason)
    return reader


SOURCES: Mapping[str, PowerSource] = {
    "jtop": PowerSource(_jtop, if_silent="sudo systemctl restart jtop"),
    "ina3221": PowerSource(_ina3221),
    "nvml": PowerSource(_nvml),
    "rapl": PowerSource(_rapl),
}  # by name, in the order in which they are tried
