"""Which patches stay visible: one in each cell, in order, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from cdkd_edge.distillation.masks import MASKS, visible_patches


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("grid", "cell", "hidden"), [(8, 2, 0.75), (64, 2, 0.75), (6, 3, 8 / 9), (16, 4, 15 / 16)])
def test_one_patch_of_each_cell_is_visible_in_the_order_of_the_cells(kind, grid, cell, hidden):
    found = visible_patches(kind, grid, cell, [0, 1])
    assert found.dtype == np.int64
    rows, columns = np.divmod(found, grid)
    cells = [(row, column) for row in range(grid // cell) for column in range(grid // cell)]
    assert list(zip(rows // cell, columns // cell, strict=True)) == cells
    assert 1 - len(found) / grid**2 == pytest.approx(hidden)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_depend_on_the_seed_alone(kind):
    first = visible_patches(kind, 16, 2, [3, 4, 0, 7])
    np.random.default_rng(0).random(5)
    assert np.array_equal(first, visible_patches(kind, 16, 2, [3, 4, 0, 7]))
    others = {tuple(visible_patches(kind, 16, 2, [3, 4, epoch, place])) for epoch in range(8) for place in range(8)}
    assert len(others) == (64 if kind == "cells" else 4)


def test_every_place_of_a_cell_is_drawn_equally_often():
    rows, columns = np.divmod(np.concatenate([visible_patches("cells", 32, 2, [seed]) for seed in range(40)]), 32)
    share = np.bincount(2 * (rows % 2) + columns % 2) / len(rows)
    np.testing.assert_allclose(share, 0.25, atol=0.02)  # 10,240 draws: a standard deviation of 0.004


def test_a_grid_mask_is_one_shift_for_all_cells():
    masks = {tuple(visible_patches("grid", 6, 3, [seed])) for seed in range(200)}
    shifts = {tuple(divmod(mask[0], 6)) for mask in masks}
    assert shifts == {(row, column) for row in range(3) for column in range(3)}
    for mask in masks:
        rows, columns = np.divmod(np.reshape(mask, (2, 2)), 6)
        assert (np.diff(rows, axis=0) == 3).all()
        assert (np.diff(columns, axis=1) == 3).all()
        assert (np.diff(rows, axis=1) == 0).all()
