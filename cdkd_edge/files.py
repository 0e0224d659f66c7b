"""Files appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
"""Name of a temporary folder."""

_LOCK_SECONDS = 2.0
"""A folder of folders is locked for milliseconds, unless somebody else uses the lock (``flock FOLDER COMMAND``)."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    The suffix is kept, because libraries choose a format by it. The data and the directory entry
    are synced before and after the rename, so that a power cut leaves the old file or the new one.
    On any exception, Ctrl-C included, the temporary file is removed and ``path`` is untouched.

    Raises:
        OSError: the directory cannot be created or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        temporary.touch()  # the system says why it refuses to write there; GDAL and SQLite do not
        temporary.unlink()
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses that too, and why is told already
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)  # the name that the user knows
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what :func:`whole_file` left beside ``path`` in a process that was killed.

    Whoever calls this knows that nobody is writing ``path`` just now.
    """
    pattern = f".{glob.escape(path.stem)}.{'[0-9a-f]' * 8}.part{glob.escape(path.suffix)}*"  # and journals of SQLite
    for leftover in path.parent.glob(pattern):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Like :func:`whole_file`, for a folder that must not exist yet: it appears when the block succeeds.

    With ``replace``, what is there until then makes room at the last moment, and comes back if that fails.

    Raises:
        OSError: the folder exists or is being made (and is not to be replaced), or its parent cannot be written; known
            at the start.
    """
    # Behind a symbolic link it is the folder that is replaced, not the link.
    path = Path(os.path.realpath(path)) if replace else Path(path)
    made = [folder for folder in path.parents if not folder.exists()]  # nearest first
    try:
        temporary, lock = _locked_folder(path, new=not replace)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    try:
        yield temporary
        if replace and path.exists():
            _swap(temporary, path)
        else:
            _require_new(path)
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else is using it by now
            for folder in made:
                folder.rmdir()
        raise
    finally:
        os.close(lock)


def being_made(path: Path) -> bool:
    """Whether :func:`whole_folder` is making this folder now, in any process."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        try:
            with _opened(part) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # gone by now; or a file system that cannot
            continue
    return False


def remove_abandoned(parent: Path) -> tuple[Path, ...]:
    """Remove what :func:`whole_folder` left in ``parent`` when its process was killed.

    A folder in the making is locked by its process, and the lock goes with it. Where folders cannot be locked (NFS),
    nothing is removed.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError), _opened(parent) as lock:
        _lock(lock)  # nobody is about to lock one
        for folder in sorted(parent.iterdir()):
            if not _PART.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            with contextlib.suppress(OSError), _opened(folder) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
    return tuple(removed)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically (UTF-8)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _locked_folder(path: Path, *, new: bool) -> tuple[Path, int]:
    """A temporary folder beside ``path``, and the open descriptor that locks it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    with _opened(path.parent) as parent:
        _lock(parent)  # one at a time, so that no two make the same
        if new:
            _require_new(path)
            if being_made(path):
                raise FileExistsError(errno.EEXIST, "another process is making it", str(path))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return temporary, descriptor


def _lock(descriptor: int) -> None:
    """Lock a folder for a moment, or do without: where its file system cannot, or somebody holds it for longer."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
        except OSError:
            pass
        return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _require_new(path: Path) -> None:
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _swap(temporary: Path, path: Path) -> None:
    """Put ``temporary`` in the place of the folder ``path``, and remove that."""
    old = path.with_name(f"{temporary.name}.old")
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)
