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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cdkd_edge.core.errors import CdkdEdgeError, ManifestError

T = TypeVar("T")

_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
"""Name of a temporary folder. Its process locks it, and the system releases the lock when the process ends."""
_LOCK_SECONDS = 2.0  # how long to wait for the lock of a parent folder, which is normally held for milliseconds
_READER_SECONDS = 5.0  # how long to wait for somebody to read a named pipe
SMALL = 16 << 20  # largest document that is read whole: manifests, schemas, lists, journals; bytes

_swept: set[Path] = set()  # folders that this process has already swept (:func:`remove_abandoned`)
_held: set[str] = set()  # temporary folders that this process has locked; it must not wait for its own lock


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """Read a file, or a pipe to its end; OSError if it is larger than ``limit`` bytes (``EFBIG``)."""
    # Without O_NONBLOCK, a named pipe that nobody writes to would block forever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20 or 1} MiB", str(path))
    return content


def read_json(path: Path, limit: int = SMALL) -> Any:
    """The data of a JSON file; ValueError if it is none, or nested too deeply. OSError as from :func:`read_small`."""
    import msgspec

    return _decoded(msgspec.json.decode, read_small(path, limit).removeprefix(b"\xef\xbb\xbf"))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file of at most 1 MiB; OSError and ValueError as from :func:`read_json`."""
    import msgspec

    return _decoded(msgspec.toml.decode, read_small(path, 1 << 20))


def _decoded(decode: Callable[[bytes], T], content: bytes) -> T:
    import msgspec

    try:
        return decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def converted(document: Any, kind: type[T]) -> T:
    """Parsed JSON or TOML as an instance of a dataclass or ``msgspec.Struct``, strictly checked.

    Raises:
        ValueError: what is wrong, and where: ``classes[0].color: expected array of length 3, got 2``.
    """
    import msgspec

    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        fault, _, place = str(error).replace("`", "").partition(" - at $")
        where = f"{place.removeprefix('.')}: " if place else ""
        raise ValueError(f"{where}{fault[:1].lower()}{fault[1:]}") from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there becomes ``path`` when the block succeeds.

    The temporary file has the same name, in a temporary folder beside ``path``. Data and directory entry are synced,
    so that a power cut leaves the old file or the new one. On any exception, Ctrl-C included, the temporary file is
    removed and ``path`` is untouched. Behind a link, its target is replaced; a device or a pipe is written to.

    Raises:
        OSError: the directory cannot be created or written, or ``path`` is a folder.
    """
    path = Path(path)
    if is_stream(path):
        with scratch_folder() as scratch:
            yield scratch / path.name
            try:
                with open(scratch / path.name, "rb") as source, open(_stream(path), "wb") as stream:
                    shutil.copyfileobj(source, stream)
            except OSError as error:
                error.filename = str(path)  # an error of a write names no file
                raise
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    with _locked_folder(target, path) as folder, _named(path, folder / target.name) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Like :func:`whole_file`, for a folder that must not exist yet.

    With ``replace`` an existing folder is replaced at the last moment, and comes back if that fails.

    Raises:
        OSError: the folder exists or another process is making it, or its parent cannot be written.
    """
    # Behind a symbolic link it is the folder that is replaced, not the link.
    path = Path(os.path.realpath(path)) if replace else Path(path)
    made = [folder for folder in path.parents if not folder.exists()]  # nearest first
    try:
        with _locked_folder(path, path, new=not replace) as folder, _named(path, folder) as temporary:
            yield temporary
            if replace and path.exists():
                _swap(temporary, path)
            else:
                _require_new(path)
                os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for folder in made:
                folder.rmdir()
        raise


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a private temporary folder in the system's folder for these; it is removed after the block."""
    place = Path(tempfile.gettempdir(), "cdkd-edge")
    with _locked_folder(place, place.parent) as folder:
        folder.chmod(0o700)
        yield folder


@contextlib.contextmanager
def sole_use(folder: Path, seconds: float, wait: Callable[[], None]) -> Iterator[int]:
    """Make a folder and lock it against others who call this; yields the descriptor that holds the lock.

    A child that inherits the descriptor holds the lock too. While another process holds it, ``wait`` is called now and
    then, for at most so many seconds. Where files cannot be locked (NFS), nothing is.

    Raises:
        BlockingIOError: another process still holds the lock.
    """
    make_folders(folder)
    with open(folder / ".lock", "wb") as file:
        until = time.monotonic() + seconds
        while _is_held(file.fileno()):
            if time.monotonic() > until:
                raise BlockingIOError(errno.EAGAIN, "another process uses it", str(folder))
            wait()
            time.sleep(0.2)
        yield file.fileno()


def being_made(path: Path) -> bool:
    """Whether :func:`whole_folder` is making this folder now, in any process."""
    for part in path.parent.glob(f"{glob.escape(_part_prefix(path))}*.part"):
        with contextlib.suppress(OSError), _opened(part) as descriptor:  # gone by now; or a file system that cannot
            if not _locked(descriptor):
                return True
    return False


def remove_abandoned(parent: Path) -> tuple[Path, ...]:
    """Remove, and return, what :func:`whole_file` and :func:`whole_folder` left in ``parent`` when they were killed.

    Both call this, once per process and folder. Folders in use are locked by their process. Where folders cannot be
    locked (NFS), nothing is removed.
    """
    removed = []
    with contextlib.suppress(OSError), _opened(parent) as lock:
        _lock(lock)  # nobody is about to lock one
        for folder in sorted(parent.iterdir()):
            if not _PART.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            with contextlib.suppress(OSError), _opened(folder) as descriptor:
                if _locked(descriptor):
                    shutil.rmtree(folder)
                    removed.append(folder)
    return tuple(removed)


def make_folders(path: Path) -> None:
    """Make a folder, and those above it, where they are missing; OSError also where they are nested too deeply."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except RecursionError:  # each folder is made within the making of the one below it
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path)) from None


def require_own(path: Path, is_own: Callable[[Path], bool]) -> None:
    """Make sure that writing ``path`` replaces nothing but an earlier file of this program.

    Raises:
        ManifestError: ``is_own`` says that the existing file is not ours, or raises any exception.
    """
    if not path.exists():
        return
    try:
        own = is_own(path)
    except Exception:  # whatever a parser throws at a file of the user's
        own = False
    if not own:
        text = f"{path} exists and is not cdkd-edge's to replace"
        raise ManifestError(text, hint="choose another --output, or move it away")


def occupied(path: Path, error: type[CdkdEdgeError], reason: str = "") -> CdkdEdgeError:
    """The error for an output that exists, with the ``reason`` why it cannot count as this command's result."""
    text = f"{path} exists and {reason}" if reason else f"{path} exists"
    return error(text, hint="keep it, or replace it with --overwrite")


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


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[Path]:
    """Yield the temporary path; errors name the final one instead, also where a failed write names no file at all."""
    try:
        yield temporary
    except OSError as error:
        if error.errno is not None and not isinstance(error.filename, int):
            name = os.fsdecode(error.filename or temporary)
            error.filename = str(path) + name.removeprefix(str(temporary)) if name.startswith(str(temporary)) else name
        raise


@contextlib.contextmanager
def _locked_folder(path: Path, shown: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a locked temporary folder beside ``path``, and remove it after the block.

    Args:
        path: what is being made.
        shown: its name in an error.
        new: refuse if ``path`` exists, or another process is making it.
    """
    try:
        temporary, lock = _make_locked(path, new=new)
    except OSError as error:
        error.filename = str(shown)
        raise
    held = os.path.realpath(temporary)
    _held.add(held)
    try:
        yield temporary
    finally:
        _held.discard(held)
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _make_locked(path: Path, *, new: bool) -> tuple[Path, int]:
    """Make the folder of :func:`_locked_folder`; also returns the open descriptor that locks it."""
    try:
        make_folders(path.parent)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    held = os.path.realpath(path.parent) in _held
    if path.parent not in _swept and not held:
        _swept.add(path.parent)
        remove_abandoned(path.parent)
    with _opened(path.parent) as parent:
        if not held:
            _lock(parent)  # so that no two make the same folder, and none is swept before it is locked
        if new:
            _require_new(path)
            if being_made(path):
                raise FileExistsError(errno.EEXIST, "another process is making it", str(path))
        temporary = path.with_name(f"{_part_prefix(path)}{secrets.token_hex(4)}.part")
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return temporary, descriptor


def _part_prefix(path: Path) -> str:
    """How the temporary folders for ``path`` begin; shortened, because names have a greatest length."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe or an open file (``/dev/stdout``), which cannot be replaced."""
    return path.exists() and (
        not (path.is_file() or path.is_dir()) or os.fspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/self/fd/"))
    )


def _stream(path: Path) -> int:
    """Open a device or a pipe for writing; wait a limited time for a reader of a named pipe."""
    until = time.monotonic() + _READER_SECONDS
    while time.monotonic() < until:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(descriptor, True)
            return descriptor
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.05)
    raise OSError(errno.ENXIO, "nobody reads from this pipe", str(path))


def _lock(descriptor: int) -> None:
    """Lock a folder; go on without if its file system cannot, or somebody else holds the lock for long."""
    until = time.monotonic() + _LOCK_SECONDS
    with contextlib.suppress(OSError):
        while not _locked(descriptor) and time.monotonic() < until:
            time.sleep(0.01)


def _locked(descriptor: int) -> bool:
    """Lock a folder now; False if another process has. Raises OSError where the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(descriptor: int) -> bool:
    """Whether another process holds the lock; this one does if not, where the file system can lock."""
    try:
        return not _locked(descriptor)
    except OSError:
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _require_new(path: Path) -> None:
    if os.path.lexists(path):  # a link that leads nowhere is something, too
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
