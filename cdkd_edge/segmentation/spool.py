"""The spool: an append-only file of labels, from which the label map is made when all of them are there.

Every record has a checksum. Wherever the file ends (``kill -9``, a full disk, a power cut), it is good up to its last
whole record, and only its end is ever written. A row of tiles is done when the record that closes it is there. The
label map is made from it in a fixed order, wherever a run was interrupted. It takes about twice the map's disk space.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdkd_edge.core import numbers
from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.segmentation.geotiff import BLOCK

_BAND = 3  # the kind of the record that closes a row of tiles
_CODES = {LABELS: 1, CONFIDENCE: 2}  # the kinds of the other records in the file

# A record is a header, its CRC-32 and a payload. Header: kind, row, column, height, width, length and CRC-32 of the
# payload, an unused number. Each record lies within one block row of the label map. Payload: zlib, or a single byte if
# all pixels have its value.
_MAGIC = b"cdkd-edge spool 1\n"
_HEADER = struct.Struct("<IIIIIQII")
_CRC = struct.Struct("<I")
_RECORD = _HEADER.size + _CRC.size
_LEVEL = 1
# Disk use of the rasters that are made of a spool, over that of the spool. Measured: 2.0, with confidence 1.9 (81 MP of
# synthetic labels); less here, so that there is rarely a warning for nothing.
_FINISHING = 1.5
_SMALL_NEED = 16 << 20  # bytes; a smaller need is not worth a warning
_SYNC_EVERY_S = 2.0  # a power cut may cost this much work, and the current row of tiles; a killed process only the row


class Spool:
    """A spool file of a label map, opened to append to its good part; a context manager that closes it.

    The file is made if it is missing, otherwise cut off behind the last finished row of tiles. Raises OSError if it
    cannot be read or written, SceneError if it is not a spool file.
    """

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path = path
        self.height, self.width = height, width
        self.bands = 0  # rows of tiles that are done
        self.tiles_without_data = 0  # tiles without a valid pixel in those rows
        self.damaged = False  # whether it was cut off before its end, at a damaged record
        # By kind and block row: row, column, height, width, offset, length and CRC of each record.
        self._pieces: dict[tuple[int, int], array[int]] = {}
        self._pending: list[tuple[int, ...]] = []
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__()
        try:
            self._end = self._recover()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def put(
        self, kind: str, row: int, column: int, values: npt.NDArray[np.uint8] | int, shape: tuple[int, int]
    ) -> None:
        """Append a rectangle ``row, column, h, w`` of ``labels`` or ``confidence``.

        ``values`` are ``[h, w]``, or one value for all of it.
        """
        height, width = shape
        for top in _block_rows(row, height):
            bottom = min(row + height, (top // BLOCK + 1) * BLOCK)
            if isinstance(values, int):
                payload = bytes([values])
            else:
                part = values[top - row : bottom - row]
                first = int(part[0, 0])
                same = (part == first).all()
                payload = bytes([first]) if same else zlib.compress(part.tobytes(), _LEVEL)
            self._append(_CODES[kind], top, column, bottom - top, width, payload)

    def finish_band(self, tiles_without_data: int) -> None:
        """Close a row of tiles, with the number of its tiles that have no valid pixel."""
        self._append(_BAND, self.bands, 0, 0, tiles_without_data, b"")
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self._accept(tiles_without_data)

    def row_of_blocks(self, kind: str, top: int) -> npt.NDArray[np.uint8]:
        """The rows from ``top`` on, a multiple of 512, as ``[up to 512, width]``.

        For rows that are whole, any thread may call this while another one appends. Raises SceneError if the file was
        damaged since it was written, or the rows are not whole.
        """
        rows = np.empty((min(BLOCK, self.height - top), self.width), np.uint8)
        missing = rows.size
        pieces = self._pieces.get((_CODES[kind], top // BLOCK), array("Q"))
        for start in range(0, len(pieces), 7):
            row, column, height, width, offset, length, crc = pieces[start : start + 7]
            payload = os.pread(self._file.fileno(), length, offset)
            if zlib.crc32(payload) != crc:
                raise self._damaged()
            target = rows[row - top : row - top + height, column : column + width]
            if length == 1:
                target.fill(payload[0])
            else:
                target[:] = np.frombuffer(zlib.decompress(payload), np.uint8).reshape(height, width)
            missing -= target.size
        if missing:
            raise self._damaged()
        return rows

    def _damaged(self) -> SceneError:
        return SceneError(f"{self.path} is damaged", hint="start anew with --overwrite")

    def _append(self, kind: int, row: int, column: int, height: int, width: int, payload: bytes) -> None:
        crc = zlib.crc32(payload)
        header = _HEADER.pack(kind, row, column, height, width, len(payload), crc, 0)
        record = header + _CRC.pack(zlib.crc32(header)) + payload
        written = 0
        while written < len(record):  # a nearly full disk may take a part of it
            written += self._file.write(record[written:])
        if kind != _BAND:
            self._pending.append((kind, row, column, height, width, self._end + _RECORD, len(payload), crc))
        self._end += len(record)

    def _accept(self, tiles_without_data: int) -> None:
        for kind, row, *rest in self._pending:
            self._pieces.setdefault((kind, row // BLOCK), array("Q")).extend((row, *rest))
        self._pending = []
        self.bands += 1
        self.tiles_without_data += tiles_without_data

    def _recover(self) -> int:
        """Index the file up to the last finished row of tiles, cut off the rest, and return its length."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if size < len(_MAGIC):
            self._file.truncate(0)
            self._file.write(_MAGIC)
            return len(_MAGIC)
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise SceneError(f"{self.path} is not a spool file of this release", hint="start anew with --overwrite")
        position = good = len(_MAGIC)
        while (record := self._record_at(position, size)) is not None:
            kind, row, column, height, width, length, crc = record
            position += _RECORD
            if kind == _BAND:
                self._accept(width)
                good = position
            else:
                self._pending.append((kind, row, column, height, width, position, length, crc))
            position += length
        self._pending = []
        self._file.truncate(good)
        return good

    def _record_at(self, position: int, size: int) -> tuple[int, ...] | None:
        """The header of the record at a position in the file, or None if no whole record is there."""
        head = os.pread(self._file.fileno(), _RECORD, position)
        if len(head) < _RECORD:
            return None
        if _CRC.unpack(head[_HEADER.size :])[0] != zlib.crc32(head[: _HEADER.size]):
            self.damaged = True
            return None
        kind, row, column, height, width, length, crc, _ = _HEADER.unpack(head[: _HEADER.size])
        if position + _RECORD + length > size:
            return None
        inside = kind == _BAND or (row + height <= self.height and column + width <= self.width)
        if not inside or zlib.crc32(os.pread(self._file.fileno(), length, position + _RECORD)) != crc:
            self.damaged = True
            return None
        return kind, row, column, height, width, length, crc


def _block_rows(row: int, height: int) -> Iterator[int]:
    """The rows at which a rectangle is cut along the label map's blocks."""
    yield row
    yield from range((row // BLOCK + 1) * BLOCK, row + height, BLOCK)


class DiskSpaceWatch:
    """Warns once, minutes into a run of hours, if the disk will not hold what the run is going to write.

    Disk use of the whole run is extrapolated from the part of the spool that is written. What is in ``folder``, where
    all is written, counts as written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._warned = False

    def check(self, spool: Path, done: float) -> None:
        """Compare free and needed space, when a share ``done`` (0..1) of the scene is in the file ``spool``."""
        if self._warned or done <= 0:
            return
        try:
            whole = (1 + _FINISHING) * spool.stat().st_size / done
            written = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            free = shutil.disk_usage(self._folder).free
        except OSError:  # files come and go
            return
        need = whole - written
        if need < _SMALL_NEED or need <= free:
            return
        self._warned = True
        self._warn(
            f"the disk of {self._folder} will be full before the label map is done: about {numbers.size(need)} more "
            f"are needed, {numbers.size(free)} are free. Free some space now; if the disk does fill up, run the same "
            "command again to continue"
        )
