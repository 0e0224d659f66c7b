"""Which patches of a tile stay visible.

One patch in each cell of ``cell x cell`` patches stays, so the visible tokens, packed in the order of their cells, are
a smaller square map that is still in order: windows, relative positions and convolutions keep their meaning on it.
Patches drawn without cells would scramble it. ``cells`` draws the patch of each cell. ``grid``, as published
with Mask-CDKD, draws one shift for all cells, and so has only ``cell ** 2`` different masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MASKS = ("cells", "grid")


def visible_patches(kind: str, grid: int, cell: int, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """The visible patches of a tile of ``grid x grid`` patches, counted row by row, in the order of their cells.

    Args:
        kind: one of :data:`MASKS`.
        grid: side of a tile in patches, a multiple of ``cell``.
        cell: side of a cell in patches; ``1 / cell ** 2`` of the patches stay visible.
        seed: numbers that no other tile and epoch has.

    Returns:
        ``[(grid / cell) ** 2]``.
    """
    side = grid // cell
    drawn = np.random.default_rng(list(seed)).integers(cell**2, size=(side, side) if kind == "cells" else (1, 1))
    row, column = np.divmod(drawn, cell)
    start = cell * np.arange(side)
    return ((start[:, None] + row) * grid + start + column).ravel()
