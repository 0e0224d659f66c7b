"""Files appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


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
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
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
        OSError: the folder exists (and is not to be replaced), or its parent cannot be written.
    """
    # Behind a symbolic link it is the folder that is replaced, not the link.
    path = Path(os.path.realpath(path)) if replace else Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    if not replace:
        _require_new(path)
    try:
        temporary.mkdir(parents=True)
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
        raise


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
