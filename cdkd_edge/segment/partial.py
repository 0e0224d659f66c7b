"""The folder beside a label map in which its parts wait until it is whole.

``NAME.tif.partial/`` holds ``run.json`` (of what, by what and how), ``labels.spool`` and ``lock``. A run that ends
before it is done, however it ends, leaves it; the same command goes on from there. A folder that belongs to another
scene, engine or options is never gone on with and never removed unasked: it may hold hours of work. A folder of this
name that was not made here is left alone.

What a scene is, so that work on it is gone on with only if it is still the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.files import make_folders, read_small, write_text
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segment.options import TAG_OPTIONS

_PIECE = 1 << 16
_PIECES = 64
_WINDOW = 64
_WINDOWS_A_SIDE = 3
_BESIDE = (".aux.xml", ".ovr")


def scene_identity(reader: SceneReader) -> dict[str, Any]:
    """Size and content of an open scene as JSON data.

    Of every file it consists of (sidecars, masks, overviews and what a VRT refers to included): size, time of change,
    and a SHA-256 of 64 pieces of 64 KB spread over it, so that a scene of 100 GB is known in a moment. What has no
    files here (``/vsi...``, URLs) is known by pixels: nine windows of 64 px spread over the scene.

    Raises:
        SceneError: it cannot be read.
        OSError: likewise.
    """
    files = [name for name in reader.files if not is_gdal_name(name) and Path(name).is_file()]
    remote = len(files) < max(1, len(reader.files))
    return {
        "name": Path(str(reader.path)).name,
        "height": reader.height,
        "width": reader.width,
        "files": [file_identity(Path(name)) for name in files],
        "pixels": _pixels(reader) if remote else None,
    }


def scene_sample(identity: dict[str, Any]) -> str:
    """SHA-256 of what :func:`scene_identity` found, the same for a copy of the scene.

    Without names, times of change, and statistics that GDAL and QGIS keep beside a raster.
    """
    files = [(one["bytes"], one["sample"]) for one in identity["files"] if not one["name"].endswith(_BESIDE)]
    return hashlib.sha256(json.dumps([files, identity["pixels"]]).encode()).hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size, time of change (ns) and a SHA-256 of pieces of a file."""
    status = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        pieces = min(_PIECES, -(-status.st_size // _PIECE))
        for index in range(pieces):
            file.seek(index * (status.st_size - _PIECE) // max(1, pieces - 1) if status.st_size > _PIECE else 0)
            digest.update(file.read(_PIECE))
    return {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


def times_of_change(reader: SceneReader) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a scene; cheap enough to ask again at the end."""
    times = {}
    for name in reader.files:
        try:
            status = os.stat(name)  # noqa: PTH116 - names may be GDAL's own
        except (OSError, ValueError):
            continue
        times[name] = (status.st_size, status.st_mtime_ns)
    return times


def _pixels(reader: SceneReader) -> str:
    digest = hashlib.sha256()
    height, width = min(_WINDOW, reader.height), min(_WINDOW, reader.width)
    for i in range(_WINDOWS_A_SIDE):
        for j in range(_WINDOWS_A_SIDE):
            top = i * (reader.height - height) // (_WINDOWS_A_SIDE - 1)
            left = j * (reader.width - width) // (_WINDOWS_A_SIDE - 1)
            pixels, valid = reader.read_window(top, left, height, width)
            digest.update(pixels.tobytes())
            digest.update(b"" if valid is None else valid.tobytes())
    return digest.hexdigest()


_FORMAT = 1
_LARGEST_NOTE = 256 << 20
"""Bytes; a virtual raster may have a hundred thousand files."""
_KEPT = ("lock", "run.json", "labels.spool")
_MADE = re.compile(r"lock|run\.json|labels\.spool|finish|\..*\.part.*|\.nfs.*")
"""Names of what is in such a folder: with temporary files, and what NFS keeps of a file that was removed while open."""


def partial_folder(output: Path) -> Path:
    """Where the parts of a label map wait."""
    return output.with_name(output.name + ".partial")


def continues_replacing(output: Path) -> bool:
    """Whether an interrupted run was about to replace a label map, so that going on with it may."""
    return bool(_document(partial_folder(output)).get("replaces"))


def was_finishing(output: Path) -> bool:
    """Whether a run was killed after all its rasters were whole, so that some may have their final names."""
    return bool(_document(partial_folder(output)).get("finished"))


def drop_finished(output: Path) -> None:
    """Remove what a run left that was killed after its label map was whole; nothing else is touched."""
    folder = partial_folder(output)
    if not was_finishing(output) or not _is_ours(folder):
        return
    with contextlib.suppress(OSError), open(folder / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)


def way_to_go_on(output: Path) -> str | None:
    """What to tell somebody who interrupted a run; None if nothing was done yet."""
    folder = partial_folder(output)
    if not (folder / "labels.spool").exists():
        return None
    how = " without --overwrite" if continues_replacing(output) else ""
    return f"interrupted; what is done is kept in {folder}, and the same command{how} goes on from there"


class Partial:
    """The folder of one run, held against all others.

    Use as a context manager. On leaving it is kept if something is in the spool (``worth_keeping``) and the label
    map is not ``finished``.

    Args:
        output: the label map.
        identity: what the run is of: JSON data, compared with what an earlier run left.
        resume: go on with what is there; otherwise start anew.
        replaces: the label map exists and is to be replaced.

    Raises:
        SceneError: another run is at work; what is there was made of something else, or does not say of what; or the
            folder is somebody else's.
        OSError: the folder cannot be made.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool = True, replaces: bool = False) -> None:
        self.folder = partial_folder(output)
        self.worth_keeping = False
        self.finished = False
        self._output = output
        self._lock = self._locked()
        try:
            self._begin(identity, resume=resume, replaces=replaces)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def spool(self) -> Path:
        """Where finished rows of tiles are."""
        return self.folder / "labels.spool"

    def finishing(self) -> None:
        """Note that all rasters are whole and are about to get their final names; see :func:`drop_finished`."""
        write_text(self.folder / "run.json", json.dumps({**self._note, "finished": True}, indent=1) + "\n")

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.finished or not self.worth_keeping:
                _remove(self.folder)
            else:
                self._tidy(_KEPT)
        finally:
            os.close(self._lock)

    def _locked(self) -> int:
        while True:
            if not _is_ours(self.folder):
                raise SceneError(
                    f"{self.folder} was not made by cdkd-edge, and parts of the label map would go there",
                    hint="move it away, or choose another --output",
                )
            make_folders(self.folder)
            path = self.folder / "lock"
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the run before has just finished and removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 20).decode("ascii", "replace").strip()
                os.close(lock)
                raise SceneError(
                    f"another run is writing {self._output}" + (f" (process {owner})" if owner else ""),
                    hint="wait for it, or choose another --output",
                ) from None
            except OSError:
                pass  # a file system without locks: better unguarded than not at all
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                    return lock
            os.close(lock)  # it was removed while we waited

    def _begin(self, identity: dict[str, Any], *, resume: bool, replaces: bool) -> None:
        identity = json.loads(json.dumps({"format": _FORMAT, **identity}))
        found = _document(self.folder)
        if resume and self.spool.exists():
            self.worth_keeping = True
            earlier = found.get("identity")
            if not earlier:
                raise SceneError(
                    f"{self.folder / 'run.json'} is damaged, so nobody knows of what the part in {self.spool} is",
                    hint="put it back, or drop the part and start anew with --overwrite",
                )
            if isinstance(earlier, dict) and earlier.get("confidence") and not identity.get("confidence"):
                earlier = {**earlier, "confidence": False}  # what is there is more than is wanted
            differing = differences(earlier, identity)
            if len(differing) == 1 and differing[0].startswith("confidence "):
                raise SceneError(
                    f"{self.folder} holds a part that was made without --confidence",
                    hint="finish the label map without it, or start anew with --overwrite",
                )
            if differing:
                raise SceneError(
                    f"{self.folder} holds a part of another run: {'; '.join(differing)}",
                    hint="start anew with --overwrite, or choose another --output",
                )
            replaces = replaces or bool(found.get("replaces"))
        self._tidy(_KEPT if self.worth_keeping else ("lock",))
        self._note = {"identity": identity, "replaces": replaces}
        write_text(self.folder / "run.json", json.dumps(self._note, indent=1) + "\n")

    def _tidy(self, kept: tuple[str, ...]) -> None:
        """Remove what a run left that was killed, such as half a GeoTIFF."""
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether a folder, if it is there, holds nothing but what a run puts into it."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - tells a file from a folder that is missing
        if folder.is_symlink() or any(not _MADE.fullmatch(name) or (folder / name).is_symlink() for name in names):
            return False
        if "run.json" in names and (note := _document(folder)) and "identity" not in note:
            return False
        if not names:
            return True
        lock = folder / "lock"
        known = "lock" in names and stat.S_ISREG(lock.stat().st_mode) and lock.stat().st_size <= 20
        return known and re.fullmatch(r"\d*\n?", lock.read_text("ascii")) is not None
    except FileNotFoundError:  # or it is being removed
        return not folder.is_symlink()
    except NotADirectoryError:
        return False
    except ValueError:  # a lock of another kind
        return False


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: a folder without one is not taken for ours."""
    for name in sorted(os.listdir(folder), key=lambda name: name == "lock"):  # noqa: PTH208
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """The differences of two JSON documents, one phrase per value; options are named as a user types them."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        names = {key: TAG_OPTIONS.get(key, f"{name} {key}".strip()) for key in keys}
        return [text for key in keys for text in differences(found.get(key), wanted.get(key), names[key])]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True), 1)
        return [text for index, (a, b) in pairs for text in differences(a, b, f"{name} {index}")]
    if found == wanted:
        return []
    return [f"{name} was {_shown(found)} and is {_shown(wanted)}"]


def _shown(value: Any) -> str:
    text = "not given" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_small(folder / "run.json", _LARGEST_NOTE))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
