"""A source that is read at moments of its own choice: counters at regular ones, watts at random ones."""

from __future__ import annotations

import random
import time

from cdkd_edge.board.power.protocol import (
    WATTS,
    LostSourceError,
    Reader,
    Sample,
    SourceInfo,
    UnusableSourceError,
)

PATIENCE = 5.0  # seconds without a reading after which a polled source is lost
OVERSAMPLING = 4
"""Readings per interval of a source of watts, each a sample of its own. (A counter counts between readings as well.)"""


class PolledStream:
    """A reader that is read once in every step of time. A step that has passed is not made up for.

    A counter is read at regular moments. Watts are read more often than asked for, each time at a random moment within
    the step: no load is in step with that, so the scatter of the readings tells what they miss
    (:mod:`cdkd_edge.board.power.energy`).
    """

    def __init__(self, reader: Reader, interval: float) -> None:
        """Take a first reading; if it fails, raise UnusableSourceError."""
        self._reader = reader
        self._random = reader.quantity == WATTS
        self._step = interval / OVERSAMPLING if self._random else interval
        self._due = time.monotonic()
        self._failing_since: float | None = None
        first = self._read_all()
        if isinstance(first, str):
            raise UnusableSourceError(first)
        self._first: Sample | None = first
        self.info = SourceInfo(
            name=reader.name.lower(),
            scope=reader.scope,
            covers=reader.covers,
            quantity=reader.quantity,
            rails=tuple(first.values),
            total=reader.total,
            interval=interval,
            random_moments=self._random,
        )

    def next(self, timeout: float) -> Sample | str | None:
        """Wait for the next moment and read; the reading that it was tried with comes first.

        Raises:
            LostSourceError: nothing could be read for ``PATIENCE`` seconds.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        self._wait()
        answer = self._read()
        if isinstance(answer, Sample):
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = time.monotonic()
        elif time.monotonic() - self._failing_since > PATIENCE:
            raise LostSourceError(answer)
        return answer

    def _wait(self) -> None:
        now = time.monotonic()
        self._due += self._step
        if self._due < now:  # late: the times that have passed stay without a reading
            self._due += self._step * ((now - self._due) // self._step + 1)
        moment = self._due + (random.random() * self._step if self._random else 0.0)
        time.sleep(max(0.0, moment - now))

    def _read(self) -> Sample | str:
        return self._read_all()

    def _read_all(self) -> Sample | str:
        before = time.monotonic()
        try:
            values = self._reader.read()
        except (OSError, ValueError, KeyError) as error:
            return str(error) or type(error).__name__
        after = time.monotonic()
        return Sample((before + after) / 2, (after - before) / 2, values)

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()
