"""Ctrl-C, SIGTERM and SIGHUP end a program, wherever it is when they come.

Python's handlers raise an exception in the main thread, between two of its instructions. While a compiled module
initialises itself that exception can be dropped on the way (importing ``numpy.random`` does so: Cython clears errors of
the look-ups it tries), and the program goes on as if nobody had asked. Therefore a signal is remembered here as well:
long work asks (:func:`check`) each time it tells how far it is, and the program's exit code is made of it
(:func:`received`).
"""

from __future__ import annotations

import sys
from _signal import (  # type: ignore[import-not-found]  # signal.py takes 10 ms, in which Ctrl-C is a traceback
    SIG_DFL,
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGTERM,
    getsignal,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Any, NoReturn

NUMBERS = (SIGINT, SIGTERM, SIGHUP)

_first: int | None = None
_pending: int | None = None


def end_on_signals() -> None:
    """Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP leave with 128 + their number, and temporary files go.

    What is ignored (``nohup``, jobs in the background of a script) stays ignored.
    """
    for number in NUMBERS:
        if getsignal(number) is not SIG_IGN:
            signal(number, _receive)


def end_at_once() -> None:
    """From now on signals end the process without a word: there is nothing left to clean up."""
    for number in NUMBERS:
        if getsignal(number) is _receive:
            signal(number, SIG_DFL)


def received() -> int | None:
    """The first signal that came since the program began."""
    return _first


def check() -> None:
    """Raise what a signal should have raised, if that was lost.

    Does nothing where an exception is on its way already, and raises once.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        SystemExit: SIGTERM or SIGHUP came.
    """
    global _pending
    if _pending is not None and sys.exc_info()[0] is None:
        number, _pending = _pending, None
        _raise(number)


def _receive(number: int, frame: FrameType | None) -> NoReturn:
    global _first, _pending
    _pending = number
    if _first is None:
        _first = number
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


class HeldSignals:
    """Keeps Ctrl-C, SIGTERM and SIGHUP back while ``holding`` is true; the first one kept back comes afterwards.

    Blocking them in the main thread would not do: the system then hands them to another thread, and Python's handler
    runs in the main thread all the same. Outside the main thread no handler runs, and this does nothing.
    """

    def __init__(self) -> None:
        """Held from the moment it is entered."""
        self.holding = True
        self._kept: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                before = getsignal(number)
                if before not in (SIG_IGN, None):  # nohup; a handler that Python does not know
                    self._before[number] = before
                    signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal(number, before)
        self.holding = False
        if kind is None:  # what is under way ends the program anyway
            self._pass_kept()

    def release(self) -> None:
        """Let signals through again, the one that was kept back first."""
        self.holding = False
        self._pass_kept()

    def _pass_kept(self) -> None:
        number, self._kept = self._kept, None
        if number is not None:
            self._pass(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.holding:
            self._kept = self._kept or number
        else:
            self._pass(number, frame)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        # The default would end the process on the spot, with nothing put back.
        elif number == SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
