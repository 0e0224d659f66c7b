"""Ctrl-C, SIGTERM and SIGHUP end the program, also where Python loses the exception that they raise.

A signal handler raises an exception in the main thread, between two instructions. A compiled module that is being
imported can swallow it (``numpy.random`` does: Cython clears the errors of failed look-ups), and the program continues
as if nothing had happened. So this module remembers the signal as well: long work calls :func:`check` with every
progress report, and the exit code follows from :func:`received`.
"""

from __future__ import annotations

import contextlib
import sys

# Not `signal`, whose import takes 10 ms in which Ctrl-C is a traceback.
from _signal import SIG_DFL, SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any, NoReturn

NUMBERS = (SIGINT, SIGTERM, SIGHUP)

_first: int | None = None
_pending: int | None = None


def end_on_signals() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP exit with 128 + their number after cleaning up.

    An ignored signal (``nohup``, background jobs of a script) stays ignored.
    """
    for number in NUMBERS:
        if getsignal(number) is not SIG_IGN:
            signal(number, _receive)


def end_at_once() -> None:
    """From now on, let signals end the process at once: there is nothing left to clean up."""
    for number in NUMBERS:
        if getsignal(number) is _receive:
            signal(number, SIG_DFL)


def received() -> int | None:
    """The first signal since the program began."""
    return _first


def check() -> None:
    """Raise KeyboardInterrupt (Ctrl-C) or SystemExit once more, if the first one was lost; once, and not while an
    exception is being handled."""
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


@contextlib.contextmanager
def forwarded(send: Callable[[int], None]) -> Iterator[None]:
    """Give Ctrl-C, SIGTERM and SIGHUP to ``send`` while the block runs, instead of ending the program.

    An ignored signal stays ignored. Outside the main thread, where no handler can be set, this does nothing.
    """
    import threading

    main = threading.current_thread() is threading.main_thread()
    before = {number: getsignal(number) for number in NUMBERS if main and getsignal(number) is not SIG_IGN}
    for number in before:
        signal(number, lambda received, frame: send(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)


class HeldSignals:
    """Holds back Ctrl-C, SIGTERM and SIGHUP while ``holding`` is true; the first one takes effect afterwards.

    Blocking them in the main thread would not help: the system delivers them to another thread, and Python runs the
    handler in the main thread all the same. Outside the main thread no handler runs, and this does nothing.
    """

    def __init__(self) -> None:
        """Signals are held from entering the block on."""
        self.holding = True
        self._kept: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                before = getsignal(number)
                if before not in (SIG_IGN, None):  # ignored (nohup), or a handler that Python does not know
                    self._before[number] = before
                    signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, before in self._before.items():
            signal(number, before)
        if kind is None:  # an exception ends the program anyway
            self.release()

    @property
    def waiting(self) -> bool:
        """Whether a signal is held back."""
        return self._kept is not None

    def release(self) -> None:
        """Let signals through again, first the one that was held back."""
        self.holding = False
        number, self._kept = self._kept, None
        if number is not None:
            self._receive(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if self.holding:
            self._kept = self._kept or number
        elif callable(before):
            before(number, frame)
        else:  # the default action would end the process at once, with nothing put back
            _raise(number)
