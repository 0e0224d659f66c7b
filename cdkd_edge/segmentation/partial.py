"""The folder ``NAME.tif.partial`` beside a label map, from which an interrupted run is resumed.

It holds ``run.json`` (scene, engine and options), ``labels.spool`` and ``lock``. A run that ends early, for whatever
reason, leaves it, and the same command resumes from it. A folder of another scene (known by a fingerprint), engine or
options is never resumed, and never removed unless asked: it may hold hours of work. Nor is a folder not made here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.files import make_folders, read_small, write_text
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.options import TAG_OPTIONS

_PIECE, _PIECES = 1 << 16, 64  # bytes of a piece of a file, and pieces, that are hashed
_WINDOW, _STEPS = 64, 2  # where there is no file: side of a window of pixels, steps between windows along each side
_BESIDE = (".aux.xml", ".ovr")
_FORMAT = 1
_LARGEST_NOTE = 256 << 20  # bytes of ``run.json``; a virtual raster may have a hundred thousand files
_KEPT = ("lock", "run.json", "labels.spool")
# Names of everything in such a folder: with temporary files, and what NFS keeps of a file removed while open.
_MADE = re.compile(r"lock|run\.json|labels\.spool|finish|\..*\.part.*|\.nfs.*")


def scene_identity(reader: SceneReader) -> dict[str, Any]:
    """Fingerprint of an open scene as JSON data.

    For every file of the scene (also sidecars, masks, overviews and the files of a VRT): size, time of change, and a
    SHA-256 of 64 pieces of 64 KB spread over it, so that a scene of 100 GB takes a moment. For a scene without local
    files (``/vsi...``, URLs): a SHA-256 of nine windows of 64 px spread over it.
    """
    files = [name for name in reader.files if not is_gdal_name(name) and Path(name).is_file()]
    remote = len(files) < max(1, len(reader.files))
    return {
        "name": Path(str(reader.path)).name,
        "height": reader.height,
        "width": reader.width,
        "files": [_file_identity(Path(name)) for name in files],
        "pixels": _pixels(reader) if remote else None,
    }


def scene_sample(identity: dict[str, Any]) -> str:
    """SHA-256 of a fingerprint that is the same for a copy of the scene.

    It leaves out names, times of change, and the statistics that GDAL and QGIS keep beside a raster.
    """
    files = [(one["bytes"], one["sample"]) for one in identity["files"] if not one["name"].endswith(_BESIDE)]
    return hashlib.sha256(json.dumps([files, identity["pixels"]]).encode()).hexdigest()


def _file_identity(path: Path) -> dict[str, Any]:
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
    """Size and time of change (ns) of every file of a scene; cheap enough to ask again at the end."""
    times = {}
    for name in reader.files:
        try:
            status = os.stat(name)  # noqa: PTH116 - names may be GDAL's own
        except (OSError, ValueError):
            continue
        times[name] = (status.st_size, status.st_mtime_ns)
    return times


def _pixels(reader: SceneReader) -> str:
    """SHA-256 of windows spread over a scene."""
    digest = hashlib.sha256()
    height, width = min(_WINDOW, reader.height), min(_WINDOW, reader.width)
    for i, j in itertools.product(range(_STEPS + 1), repeat=2):
        top, left = i * (reader.height - height) // _STEPS, j * (reader.width - width) // _STEPS
        pixels, valid = reader.read_window(top, left, height, width)
        digest.update(pixels.tobytes())
        digest.update(b"" if valid is None else valid.tobytes())
    return digest.hexdigest()


def partial_folder(output: Path) -> Path:
    """The folder in which a label map is made."""
    return output.with_name(output.name + ".partial")


def continues_replacing(output: Path) -> bool:
    """Whether an interrupted run was to replace a label map, so that resuming it may do so."""
    return bool(_document(partial_folder(output)).get("replaces"))


def was_finishing(output: Path) -> bool:
    """Whether a run was killed after its rasters were whole, when some may have had their final names."""
    return bool(_document(partial_folder(output)).get("finished"))


def drop_finished(output: Path) -> None:
    """Remove the folder of a run that was killed after its label map was whole; leave any other."""
    folder = partial_folder(output)
    if not was_finishing(output) or not _is_ours(folder):
        return
    with contextlib.suppress(OSError), open(folder / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)


def resume_advice(output: Path) -> str | None:
    """What to tell the user after an interrupted run; None if nothing was done yet."""
    folder = partial_folder(output)
    if not (folder / "labels.spool").exists():
        return None
    how = " without --overwrite" if continues_replacing(output) else ""
    return f"interrupted; finished tiles are kept in {folder}, and the same command{how} resumes from there"


class Partial:
    """The folder of one run, locked against all others; a context manager.

    It is removed at the end, unless the spool holds something (``worth_keeping``) and the map is not ``finished``.
    Raises OSError if it cannot be made, SceneError if another run is writing the label map, if the folder was not made
    by this package, or if an earlier run had another scene, engine or options, or does not say which.

    Args:
        identity: scene, engine and options of the run as JSON data, compared with those of an earlier run.
        resume: resume an earlier run; otherwise drop what it left.
        replaces: whether the label map exists and is to be replaced.
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
        """The file with the finished rows of tiles."""
        return self.folder / "labels.spool"

    def finishing(self) -> None:
        """Note that all rasters are whole and are about to get their final names, see :func:`drop_finished`."""
        write_text(self.folder / "run.json", json.dumps({**self._note, "finished": True}, indent=1) + "\n")

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *error: object) -> None:
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
                    f"{self.folder} was not made by cdkd-edge, which needs this name for the unfinished label map",
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
            self._require_same(found.get("identity"), identity)
            replaces = replaces or bool(found.get("replaces"))
        self._tidy(_KEPT if self.worth_keeping else ("lock",))
        self._note = {"identity": identity, "replaces": replaces}
        write_text(self.folder / "run.json", json.dumps(self._note, indent=1) + "\n")

    def _require_same(self, earlier: Any, identity: dict[str, Any]) -> None:
        """Raise :class:`SceneError` unless an earlier run made the spool of the same scene in the same way."""
        if not earlier:
            raise SceneError(
                f"{self.folder / 'run.json'} is damaged, so it is unknown which scene {self.spool} is of",
                hint="restore it, or start anew with --overwrite",
            )
        if isinstance(earlier, dict) and earlier.get("confidence") and not identity.get("confidence"):
            earlier = {**earlier, "confidence": False}  # the spool holds more than is needed
        differing = differences(earlier, identity)
        what, hint = (
            f"of another run: {'; '.join(differing)}",
            "start anew with --overwrite, or choose another --output",
        )
        if len(differing) == 1 and differing[0].startswith("confidence "):
            what, hint = "without --confidence", "finish it without --confidence, or start anew with --overwrite"
        if differing:
            raise SceneError(f"{self.folder} holds an unfinished label map {what}", hint=hint)

    def _tidy(self, kept: tuple[str, ...]) -> None:
        """Remove the other files that a killed run left, such as half a GeoTIFF."""
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is missing or holds only files that a run makes."""
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
    """Remove a folder, its lock last, without which it would not be recognised as ours."""
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
    """The differences of two JSON documents, a phrase for each value; options are named as a user types them."""
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
    """The content of ``run.json``; empty if it cannot be read."""
    try:
        document = json.loads(read_small(folder / "run.json", _LARGEST_NOTE))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
