"""Images in ``.tar`` files, in the manner of webdataset: where each lies, so that GDAL reads it in place."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cdkd_edge.core.errors import SceneError
from cdkd_edge.raster.open import RASTER_SUFFIXES

SHARD = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_BLOCK = 512  # of a tar file, bytes


class Member(NamedTuple):
    """An image in a shard: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


def gdal_name(shard: str, offset: int, size: int) -> str:
    """The name by which GDAL opens a part of a file."""
    return f"/vsisubfile/{offset}_{size},{shard}"


def images_of(shard: str) -> list[Member]:
    """The images of a shard, in its order; only headers are read.

    Members with the suffix of a raster count, without hidden ones. ``KEY.seg.png`` is no image where there is also
    ``KEY.png`` or ``KEY.jpg``: it belongs to that sample.

    Raises:
        SceneError: the file is compressed, no tar file, cut off or damaged, or holds no image.
    """
    try:
        with open(shard, "rb") as file:
            _require_plain(shard, file)
            images = list(_images(shard, file))
    except OSError as error:
        raise SceneError(f"shard {shard} cannot be read: {error.strerror}") from None
    plain = {key for key, parts in map(_key_of, images) if parts == 1}
    kept = [image for image in images if (found := _key_of(image))[1] == 1 or found[0] not in plain]
    if not kept:
        raise SceneError(f"shard {shard} holds no image ({', '.join(RASTER_SUFFIXES)})")
    return kept


def _images(shard: str, file: BinaryIO) -> Iterator[Member]:
    found = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                found += 1
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps a kilobyte of each
                name = PurePosixPath(member.name)
                is_image = name.suffix.lower() in RASTER_SUFFIXES and not name.name.startswith(".")
                if is_image and member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError:
        end = None
    # For tarfile, a broken header ends the file, and so does a file that ends between two members.
    if end is not None:
        file.seek(end)
        if file.read(_BLOCK) == bytes(_BLOCK):
            return
    if not found:
        raise SceneError(f"shard {shard} is not a tar file")
    hint = "copy it again"
    if end == file.tell():
        hint += f"; if all members are there, write the end mark: head -c 1024 /dev/zero >> {Path(shard).name}"
    raise SceneError(f"shard {shard} is cut off or damaged after {found} members", hint=hint)


def _key_of(image: Member) -> tuple[str, int]:
    """What the members of a sample have in common, and how many suffixes follow."""
    folder, _, name = image.name.rpartition("/")
    key, *suffixes = name.split(".")
    return f"{folder}/{key}", len(suffixes)


def _require_plain(shard: str, file: BinaryIO) -> None:
    """SceneError if the shard is compressed: an image in it could only be read from the beginning."""
    start = file.read(8)
    file.seek(0)
    tool = next((tool for magic, tool in _MAGIC.items() if start.startswith(magic)), None)
    if tool is None and not shard.lower().endswith(COMPRESSED):
        return
    raise SceneError(
        f"shard {shard} is compressed; its images can only be read in place if it is not",
        hint=f"unpack it: {tool or 'gunzip'} {Path(shard).name}, and name the .tar",
    )
