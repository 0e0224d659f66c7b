"""What a scene is, so that work on it is gone on with only if it is still the same."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cdkd_edge.scene.raster import is_gdal_name
from cdkd_edge.scene.reader import SceneReader

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
