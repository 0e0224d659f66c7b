"""The spool: good up to its last finished row of tiles, wherever it ends."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_helpers import relaxed

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.segmentation.spool import Spool


def some_labels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    labels = np.random.default_rng(seed).integers(0, 6, (height, width), np.uint8)
    labels[labels == 5] = NO_LABEL
    labels[: height // 3] = 2
    return labels


def fill(path: Path, labels: npt.NDArray[np.uint8], rows: list[int], columns: list[int], seed: int = 0) -> list[int]:
    """Put labels in pieces cut at ``rows`` and ``columns``, in any order in a band; the size after each band."""
    sizes = []
    with Spool(path, *labels.shape) as spool:
        for top, bottom in pairwise(rows):
            cuts = list(pairwise(columns))
            random.Random(seed).shuffle(cuts)
            for left, right in cuts:
                piece = labels[top:bottom, left:right]
                spool.put(LABELS, top, left, piece, piece.shape)
            spool.finish_band(1)
            sizes.append(path.stat().st_size)
    return sizes


def whole(spool: Spool, kind: int = LABELS) -> npt.NDArray[np.uint8]:
    return np.concatenate([spool.row_of_blocks(kind, top) for top in range(0, spool.height, 512)])


def read(path: Path, height: int, width: int, kind: int = LABELS) -> npt.NDArray[np.uint8]:
    with Spool(path, height, width) as spool:
        return whole(spool, kind)


@settings(relaxed, max_examples=15)
@given(height=st.integers(1, 1700), width=st.integers(1, 200), seed=st.integers(0, 2**20))
def test_what_was_put_comes_back(tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("spool") / "labels.spool"
    labels = some_labels(height, width, seed)
    rows = sorted({0, height, *(rng.randrange(height) for _ in range(3))})
    columns = sorted({0, width, *(rng.randrange(width) for _ in range(3))})
    fill(path, labels, rows, columns, seed)
    assert (read(path, height, width) == labels).all()
    with Spool(path, height, width) as spool:
        assert (spool.bands, spool.tiles_without_data) == (len(rows) - 1, len(rows) - 1)


def test_two_kinds_do_not_meet(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", 600, 5) as spool:
        spool.put(LABELS, 0, 0, 3, (600, 5))
        spool.put(CONFIDENCE, 0, 0, np.full((600, 5), 80, np.uint8), (600, 5))
        spool.finish_band(0)
    assert (read(tmp_path / "s", 600, 5) == 3).all()
    assert (read(tmp_path / "s", 600, 5, CONFIDENCE) == 80).all()


def test_a_spool_that_ends_anywhere_is_good_up_to_its_last_band(tmp_path: Path) -> None:
    labels = some_labels(90, 40)
    rows = [0, 30, 60, 90]
    sizes = fill(tmp_path / "whole", labels, rows, [0, 17, 40])
    content = (tmp_path / "whole").read_bytes()
    for length in sorted({*range(0, len(content), 7), *sizes, *(size - 1 for size in sizes)}):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        with Spool(path, 90, 40) as spool:
            assert spool.bands == sum(length >= size for size in sizes)
            for band in range(spool.bands, 3):
                spool.put(LABELS, rows[band], 0, labels[rows[band] : rows[band + 1]], (30, 40))
                spool.finish_band(1)
            assert (whole(spool) == labels).all()


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    labels = some_labels(90, 40)
    sizes = fill(tmp_path / "whole", labels, [0, 30, 60, 90], [0, 17, 40])
    content = (tmp_path / "whole").read_bytes()
    for position in range(18, len(content), 7):
        path = tmp_path / "changed"
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with Spool(path, 90, 40) as spool:
            assert spool.bands == sum(position >= size for size in sizes)


def test_damage_while_it_is_open_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "s", some_labels(90, 40), [0, 90], [0, 40])
    with Spool(tmp_path / "s", 90, 40) as spool:
        content = bytearray((tmp_path / "s").read_bytes())
        content[100] ^= 1
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(SceneError, match="damaged"):
            whole(spool)


def test_another_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("somebody's notes, longer than the first line")
    with pytest.raises(SceneError, match="not a spool file"):
        Spool(tmp_path / "s", 9, 9)
    assert (tmp_path / "s").read_text().startswith("somebody's")


def test_rows_that_are_missing_are_no_raster(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", 600, 5) as spool:
        spool.put(LABELS, 0, 0, 3, (599, 5))
        spool.finish_band(0)
        with pytest.raises(SceneError, match="damaged"):
            whole(spool)


def test_labels_take_little_room(tmp_path: Path) -> None:
    labels = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 5, (32, 32), np.uint8), 32, 0), 32, 1)
    fill(tmp_path / "s", labels, [0, 1024], [0, 1024])
    assert (tmp_path / "s").stat().st_size < labels.size / 20
