"""The measurement of seams, on maps whose seams are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdkd_edge.raster.grid import TileGrid

GRID = TileGrid.over(150, 200, 64, 16)


@pytest.fixture(scope="module")
def seams() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
        return importlib.import_module("seams")


def test_changes_are_counted_where_tiles_meet(seams: Any) -> None:
    labels = np.zeros((150, 200), np.uint8)
    for number, column in enumerate(GRID.columns):
        labels[:, column.first : column.last] = number % 2
    at, elsewhere = seams.changes(labels, GRID)
    borders = len(GRID.columns) - 1
    assert at == (150 * borders + 200 * (len(GRID.rows) - 1), 150 * borders)
    assert elsewhere[1] == 0
    assert at[0] + elsewhere[0] == 150 * 199 + 149 * 200


def test_tiles_cut_from_one_map_agree_everywhere(seams: Any) -> None:
    whole = np.random.default_rng(0).integers(0, 5, (300, 300)).astype(np.uint8)
    tiles = {
        (i, j): whole[row.start + 50 :, column.start + 50 :][:64, :64]
        for i, row in enumerate(GRID.rows)
        for j, column in enumerate(GRID.columns)
    }
    pairs = list(seams.disagreements(tiles, GRID, 150, 200))
    assert len(pairs) == 2 * len(GRID) - len(GRID.rows) - len(GRID.columns)
    assert all(not different.any() and distance.min() == 0 for distance, different in pairs)
    tiles[0, 0] = 4 - tiles[0, 0]
    assert sum(different.any() for _, different in seams.disagreements(tiles, GRID, 150, 200)) == 2
