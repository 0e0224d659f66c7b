"""Ctrl-C, SIGTERM and SIGHUP end a program, wherever it is when they come.

Python's handlers raise an exception in the main thread, between two of its instructions. While a compiled module
initialises itself that exception can be dropped on the way (importing ``numpy.random`` does so: Cython clears errors of
the look-ups it tries), and the program goes on as if nobody had asked. Therefore a signal is remembered here as well,
and long work asks (:func:`check`) each time it tells how far it is.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

_received: int | None = None


def end_on_signals() -> None:
    """Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP leave with 128 + their number, and temporary files go.

    What is ignored (``nohup``, jobs in the background of a script) stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def check() -> None:
    """Raise what a signal should have raised, if that was lost.

    Does nothing where an exception is on its way already, and raises once.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        SystemExit: SIGTERM or SIGHUP came.
    """
    global _received
    if _received is not None and sys.exc_info()[0] is None:
        number, _received = _received, None
        _raise(number)


def _receive(number: int, frame: FrameType | None) -> NoReturn:
    global _received
    _received = number
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
