"""The journal of what a run changes on the board: written first, so that the next run can undo what a killed one left.

It lies in ``/var/lib/cdkd-edge``, not in a user's folder: all users share the board, so the next run may be another
user's, and root must not act on a file that others can write.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.board.jetson import PowerMode, read
from cdkd_edge.core.errors import BoardError
from cdkd_edge.core.files import converted, write_text

FOLDER = "var/lib/cdkd-edge"
_VERSION = 1
_CLOCKS = re.compile(r"clocks-[0-9a-f]{8}\.conf")


@dataclass(frozen=True)
class Change:
    """What a run changes."""

    before: PowerMode | None  # power mode to be put back; None: it is not changed
    during: PowerMode | None
    clocks: Path | None  # file of ``jetson_clocks --store``; None: clocks are not touched
    maximised: bool  # whether the run calls ``jetson_clocks``
    held_before: bool | None  # whether clocks were held at their maximum already
    since: str = ""  # local time, ISO 8601
    boot: str = ""  # the kernel's identifier of this start of the machine


class Journal:
    """The journal below a root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = root / FOLDER
        self.path = self.folder / "board.json"
        self._lock = self.folder / "board.lock"

    @property
    def boot(self) -> str:
        """The kernel's identifier of this start of the machine; a reboot resets the clocks."""
        return read(self._root, "/proc/sys/kernel/random/boot_id").text or ""

    def new_clocks_file(self) -> Path:
        """A free name: ``jetson_clocks --store`` asks before it overwrites. It does not take spaces."""
        return self.folder / f"clocks-{secrets.token_hex(4)}.conf"

    def write(self, change: Change) -> None:
        """Write a change durably."""
        import msgspec

        since = change.since or datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        fields = msgspec.to_builtins(replace(change, since=since, boot=self.boot, clocks=None))
        clocks = change.clocks.name if change.clocks else None
        data = {"version": _VERSION, "process": os.getpid(), **fields, "clocks": clocks}
        with self._refused():
            write_text(self.path, json.dumps(data, indent=2) + "\n")
            self.path.chmod(0o644)

    def read(self) -> Change | None:
        """The change that is written there, or None; BoardError if the file is damaged."""
        file = read(self._root, f"/{FOLDER}/board.json")
        if file.text is None and not file.reason:
            return None
        try:
            data = json.loads(file.text or "")
            clocks = data["clocks"]
            if data["version"] != _VERSION or (clocks is not None and not _CLOCKS.fullmatch(clocks)):
                raise ValueError
            change = converted({**data, "clocks": None}, Change)
            return replace(change, clocks=None if clocks is None else self.folder / clocks)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            fault = file.reason or "it is damaged, or of another version"
            raise BoardError(
                f"{self.path} does not say what an earlier run changed on the board: {fault}",
                hint=f"set the power mode by hand (sudo nvpmodel -m ID), then: sudo rm {self.path}",
            ) from error

    def clear(self) -> None:
        """Remove the journal: everything is as it was before."""
        with self._refused():
            self.path.unlink(missing_ok=True)
            for left in self.folder.glob("clocks-*.conf"):
                left.unlink(missing_ok=True)

    def in_use(self) -> bool:
        """Whether a running process has changed the board."""
        try:
            with open(self._lock, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from changing the board. The system releases the lock when the process ends.

        Raises:
            BoardError: another process has it, or the folder cannot be written.
        """
        with self._refused():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o755)
            file = open(self._lock, "ab")  # noqa: SIM115
        with file:
            os.fchmod(file.fileno(), 0o644)
            for attempt in range(10):  # `in_use` of another process may hold it for a moment
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 9:
                        text = "another run has changed the board's power mode or clocks"
                        raise BoardError(text, hint="wait until it has ended") from None
                    time.sleep(0.05)
            yield

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BoardError(f"{error.filename or self.folder}: {error.strerror}") from error
