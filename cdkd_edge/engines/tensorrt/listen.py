"""What TensorRT says while it fails, for the message of the error: its functions return no reasons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

LogTo = Callable[[Callable[[str, str], None]], AbstractContextManager[None]]
"""As ``log_to`` of the TensorRT module's finder: while it is entered, log lines go to the sink."""


class Listener:
    """Remembers the last errors that TensorRT logged while it was entered; usable again and again."""

    def __init__(self, log_to: LogTo | None) -> None:
        self._log_to = log_to
        self._errors: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Listener:
        self._errors.clear()
        if self._log_to is not None:
            self._stack.enter_context(self._log_to(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _hear(self, severity: str, text: str) -> None:
        if severity == "error":
            del self._errors[:-1]
            self._errors.append(" ".join(text.split())[:300])

    def said(self) -> str:
        """``: what it said``, for the end of a message; empty if nothing."""
        return f": {'; '.join(self._errors)}" if self._errors else ""
