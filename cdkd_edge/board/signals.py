"""Signals that must not stop something half way."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # nohup; a handler that Python does not know
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
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
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
