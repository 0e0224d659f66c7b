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
    from types import FrameType
    from typing import NoReturn

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
