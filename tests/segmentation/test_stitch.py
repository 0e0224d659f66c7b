"""Tiles to rows: nothing lost at the cuts, invalid pixels unlabelled, one row of tiles in memory."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_helpers import FakeEngine, relaxed

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.segmentation.merge import RowMerge

TILE = 16


class Sink:
    def __init__(self) -> None:
        self.rows: list[npt.NDArray[np.uint8]] = []

    def __call__(self, rows: npt.NDArray[np.uint8]) -> None:
        self.rows.append(rows.copy())  # the sink must not keep what it is given


def tile_of(scene: npt.NDArray[np.uint8], row: Span, column: Span) -> npt.NDArray[np.uint8]:
    """A tile that holds the scene where it lies on it, and 200 beyond."""
    padded = np.pad(scene, TILE, constant_values=200)
    return padded[row.start + TILE :, column.start + TILE :][:TILE, :TILE]


@relaxed
@given(
    height=st.integers(1, 60), width=st.integers(1, 60), overlap=st.integers(0, TILE - 1), seed=st.integers(0, 2**32)
)
def test_tiles_become_the_scene_again(height: int, width: int, overlap: int, seed: int) -> None:
    scene = np.random.default_rng(seed).integers(0, 5, (height, width), np.uint8)
    grid, sink = TileGrid.over(height, width, TILE, overlap), Sink()
    stitcher = RowMerge(FakeEngine(TILE), width, len(grid.columns), sink)
    for row in grid.rows:
        columns = list(grid.columns)
        random.Random(seed).shuffle(columns)  # the order within a row does not matter
        for column in columns:
            stitcher.put(row, column, tile_of(scene, row, column), None)
    assert [len(rows) for rows in sink.rows] == [row.last - row.first for row in grid.rows]
    assert (np.concatenate(sink.rows) == scene).all()


@pytest.mark.parametrize("valid_is_tile_wide", [True, False])
def test_invalid_pixels_and_empty_tiles_have_no_label(valid_is_tile_wide: bool) -> None:
    grid, sink = TileGrid.over(16, 40, TILE, 4), Sink()
    first, second, third = grid.columns
    (row,) = grid.rows
    labels = np.full((TILE, TILE), 3, np.uint8)
    valid = np.ones((TILE, TILE), bool)
    valid[2, 5] = False
    if valid_is_tile_wide:
        valid[:, second.kept.stop :] = False  # beyond the cut: another tile's business
    stitcher = RowMerge(FakeEngine(TILE), 40, 3, sink)
    stitcher.put(row, first, labels, None)
    stitcher.put(row, second, labels, valid)
    assert sink.rows == [], "a row is given on only when it is whole"
    stitcher.put(row, third, None, np.zeros((TILE, TILE), bool))
    expected = np.full((16, 40), 3, np.uint8)
    expected[2, second.start + 5] = NO_LABEL
    expected[:, third.first :] = NO_LABEL
    assert (sink.rows[0] == expected).all()


def test_the_tiles_are_not_changed() -> None:
    labels, valid = np.full((TILE, TILE), 3, np.uint8), np.zeros((TILE, TILE), bool)
    labels.flags.writeable = valid.flags.writeable = False
    span = Span(0, 0, TILE)
    RowMerge(FakeEngine(TILE), TILE, 1, Sink()).put(span, span, labels, valid)
