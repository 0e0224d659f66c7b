"""A Jetson's rails through the service of jetson-stats (``jtop``).

Only the sampling process imports jtop: that sets multiprocessing's start method for the whole process, and connecting
may block for good. Traps that this module avoids, each with a test:

- ``power["tot"]`` is VDD_IN only if its name says so. When VDD_IN cannot be read, it is the sum of the other rails.
- ``avg`` is an exponential mean; only ``power`` is used.
- The client returns the same data again when there is nothing new. ``uptime`` is the service's stamp; equal stamps are
  one reading.
- The client may return what the service measured minutes ago for another client.
- ``ok()`` with waiting ends the client after three intervals of silence; here it is called without waiting.
- The first client sets the interval for all.
- Batteries and chargers of ``/sys/class/power_supply`` are listed among the rails, and before 7.2.2 also what USB-C
  ports have negotiated. Nothing in an entry tells them from the INA3221's: the service keeps their type to itself.

Source: https://rnext.it/jetson_stats/reference/jtop.html; jtop/core/power.py of jetson-stats 4.2.9, 7.2.0 and 7.2.2.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cdkd_edge.board.power.ina3221 import COVERS, MOST_WATTS, TOTAL
from cdkd_edge.board.power.protocol import (
    MODULE,
    WATTS,
    Accuracy,
    LostSourceError,
    Sample,
    SourceInfo,
    UnusableSourceError,
)

UNROUND = 0.953
"""Share of the interval that the service is asked for, so that readings are not in step with the load: what ripples
comes from timers and regulators, in round numbers of hertz, and readings in step with a ripple see one phase of it. At
this rate (10.49 Hz for 10) the phases of all multiples pass by within seconds. A ripple of just this rate still does
not show; only moments drawn at random are in step with nothing."""
ATTEMPTS = 3  # attempts to connect: a service that is slow with its first measurement refuses with 'Error connection'
MIN_INTERVAL = 0.02  # seconds; the service breaks at 0.01 s and below
LONGEST_DELAY = 2.0  # largest shortest delay from stamp to arrival, seconds; above it, the stamps are of another clock
SUPPLIES = Path("/sys/class/power_supply")  # where the service finds entries that are no rails
UCSI = "ucsi-source-psy-"  # prefix of USB-C ports, which the service takes off
STAMP = 0.01  # resolution of /proc/uptime, seconds; it is cut off, not rounded


class JtopStream:
    """Samples at the pace of the service."""

    def __init__(
        self, interval: float = 0.1, first_reading: float = 5.0, accuracy: Mapping[str, Accuracy] | None = None
    ) -> None:
        """Connect and wait ``first_reading`` seconds for a sample; UnusableSourceError says why none came."""
        if interval < MIN_INTERVAL:
            text = f"--interval must be at least {MIN_INTERVAL} s, not {interval:g} s, where its service breaks"
            raise UnusableSourceError(f"jtop: {text}")
        try:
            from jtop import JtopException, jtop
        except ImportError:
            raise UnusableSourceError(
                "jtop: jetson-stats is not installed in this Python",
                "sudo pip3 install jetson-stats (from JetPack 7 on with --break-system-packages); a virtual environment"
                " needs --system-site-packages or its own",
            ) from None
        self._failure = JtopException
        self._arrived: queue.SimpleQueue[tuple[float, float, Any]] = queue.SimpleQueue()
        self._clock = StampClock()
        self._last_stamp = -math.inf
        self._began = time.monotonic()
        self._first: Sample | None = None
        self._client = self._connect(jtop, interval * UNROUND)
        self._first = first = self._first_sample(max(first_reading, 5 * self._client.interval))
        own = float(self._client.interval)
        notes: tuple[str, ...] = ()
        if own > interval * 1.5:
            notes = (f"another jtop client has set the interval to {own:g} s; close it for {interval:g} s",)
        self.info = SourceInfo(
            name="jtop",
            scope=MODULE,
            covers=COVERS,
            quantity=WATTS,
            rails=tuple(first.values),
            total=TOTAL,
            interval=interval,
            source_interval=own if own > 0 else None,
            notes=notes,
            accuracy={rail: one for rail, one in (accuracy or {}).items() if rail in first.values},
        )

    def next(self, timeout: float) -> Sample | str | None:
        """The next sample, or what was wrong with it, or None after ``timeout`` seconds without news.

        Raises:
            LostSourceError: the connection broke.
        """
        if self._first is not None:
            kept, self._first = self._first, None
            return kept
        deadline = time.monotonic() + timeout
        while True:
            try:
                received, uptime, power = self._arrived.get(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except queue.Empty:
                self._check()
            else:
                first, again = self._last_stamp == -math.inf, uptime == self._last_stamp
                self._last_stamp = uptime
                earlier = first and self._clock.stamped(uptime) < self._began  # measured for an earlier client
                if not again and not earlier:
                    moment, uncertainty = self._clock.moment(uptime, received)
                    values = rails_of(power)
                    return values if isinstance(values, str) else Sample(moment, uncertainty, values)
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Disconnect from the service."""
        with contextlib.suppress(Exception):
            self._client.close()

    def _connect(self, jtop: Callable[..., Any], interval: float) -> Any:
        left = ATTEMPTS
        while True:
            client, left = jtop(interval=interval), left - 1
            client.attach(self._observe)
            try:
                client.start()
                return client
            except (self._failure, OSError, EOFError) as error:
                if "Error connection" not in str(error) or not left:
                    raise _refusal(error) from None

    def _observe(self, client: Any) -> None:
        """Keep what the client has fetched; called by its thread."""
        self._arrived.put((time.monotonic(), client.uptime.total_seconds(), client.power))

    def _first_sample(self, patience: float) -> Sample:
        deadline = time.monotonic() + patience
        wrong = "no measurement arrived"
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self.next(left)
            except LostSourceError as error:
                raise UnusableSourceError(f"jtop: {error}") from None
            if isinstance(answer, Sample):
                return answer
            wrong = answer or wrong
        self.close()
        raise UnusableSourceError(f"jtop: {wrong}")

    def _check(self) -> None:
        try:
            going_on = self._client.ok(spin=True)
        except Exception as error:  # whatever ended the client's thread: BrokenPipeError, EOFError, KeyError ...
            raise LostSourceError(f"the jtop service stopped ({type(error).__name__}: {_line(error)})") from None
        if not going_on:
            raise LostSourceError("jtop's client ended")


def rails_of(power: Any) -> dict[str, float] | str:
    """Watts per rail of ``jtop.power``, or why it is not a reading of the module.

    ``{}`` means that the service found no sensor. VDD_IN is in ``tot``, if that is its name.
    """
    if not power:
        return "the service finds no power sensor"
    total = power.get("tot") or {}
    if total.get("name") != TOTAL:
        return f"the total is {total.get('name') or 'a sum of other rails'}, not {TOTAL}"
    values = {}
    supplies = {folder.name.removeprefix(UCSI) for folder in SUPPLIES.glob("*")}
    rails = {rail: reading for rail, reading in power.get("rail", {}).items() if rail not in supplies}
    for rail, reading in {TOTAL: total, **rails}.items():
        milliwatts = reading.get("power")
        possible = isinstance(milliwatts, (int, float)) and abs(milliwatts) <= MOST_WATTS * 1000  # nan is not
        if possible and reading.get("online", True):
            values[rail] = milliwatts / 1000
    return values if TOTAL in values else f"{TOTAL} has no value"


class StampClock:
    """Estimates when a reading was taken: after the service's stamp and before it arrived.

    The service stamps ``/proc/uptime`` before it measures. Arrivals are delayed by other work of the processor, stamps
    are not, so the shortest delay so far is used for every reading.
    """

    def __init__(self, offset: Callable[[], float] | None = None) -> None:
        """``offset`` gives CLOCK_MONOTONIC minus uptime, for tests."""
        self._offset = offset or _monotonic_minus_uptime
        self._delay = math.inf
        self._shortest = math.inf

    def moment(self, uptime: float, received: float) -> tuple[float, float]:
        """Best estimate and uncertainty, by the service's stamp and the arrival; seconds, on CLOCK_MONOTONIC."""
        stamped = self.stamped(uptime)
        self._shortest = min(self._shortest, received - uptime)
        self._delay = min(self._delay, received - stamped)
        if not -2 * STAMP <= self._delay <= LONGEST_DELAY:
            # The uptime of another system (a container with its own): only differences mean anything.
            return uptime + self._shortest, 0.1
        delay = max(0.0, self._delay)
        return stamped + delay / 2, delay / 2 + STAMP / 2

    def stamped(self, uptime: float) -> float:
        """An uptime as a moment on CLOCK_MONOTONIC."""
        return uptime + STAMP / 2 + self._offset()


def _monotonic_minus_uptime() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_BOOTTIME)


def _refusal(error: BaseException) -> UnusableSourceError:
    text, hint = _line(error) or type(error).__name__, "sudo systemctl restart jtop"
    if "not active" in text:
        text = "the service is not active"
        if not _group_exists():
            text += "; the group jtop does not exist"
            hint = f"sudo groupadd jtop, sudo usermod -aG jtop $USER, log in again, {hint}"
    elif "can't access" in text or isinstance(error, PermissionError):
        text = "this user may not talk to the service (group jtop)"
        hint = "sudo usermod -aG jtop $USER, then log in again"
    elif "ismatch" in text:
        hint = "install the same jetson-stats for the service and for this Python"
    return UnusableSourceError(f"jtop: {text}", hint)


def _group_exists() -> bool:
    import grp

    try:
        grp.getgrnam("jtop")
    except KeyError:
        return False
    return True


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
