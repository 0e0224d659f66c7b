"""Places tiles on a scene, and says which part of each tile is kept.

Tiles overlap, and each pixel is taken from the tile in which it lies deepest: the cut between two neighbours runs
through the middle of their overlap. The number of tiles is the least that keeps the overlap. What they cover beyond the
scene first becomes a reflected margin at its borders (up to half an overlap, so that border pixels have context too),
then more overlap. No tile is spent on padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from cdkd_edge.core.errors import UsageError

DEFAULT_OVERLAP = 128
_MOST_TILES = 1_000_000  # most tiles along an axis


def default_overlap(tile: int) -> int:
    """128 px, or a quarter of the tile where that is less."""
    return min(DEFAULT_OVERLAP, tile // 4)


@dataclass(frozen=True)
class Span:
    """One tile along one axis: it begins at ``start`` (negative in a margin) and labels ``first .. last - 1``."""

    start: int
    first: int
    last: int

    @property
    def kept(self) -> slice:
        """The kept part in the tile's own coordinates."""
        return slice(self.first - self.start, self.last - self.start)


def tile_axis(size: int, tile: int, overlap: int) -> list[Span]:
    """Place tiles along an axis of ``size`` px; their kept parts partition ``0 .. size - 1`` in order.

    Raises:
        UsageError: the overlap is negative, leaves a tile no pixel of its own, or makes more than a million tiles.
    """
    if not 0 <= overlap < tile:
        problem = f"an overlap of {overlap} px does not fit tiles of {tile} px"
        raise UsageError(problem, hint=f"choose --overlap below {tile}")
    if size <= tile:
        return [Span(-((tile - size) // 2), 0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    if count > _MOST_TILES:
        problem = f"an overlap of {overlap} px makes {count:,} tiles of {size:,} px"
        raise UsageError(problem, hint="choose a smaller one")
    spare = count * tile - (count - 1) * overlap - size
    margin = min(spare, overlap)
    first_start, last_start = -(margin // 2), size + margin - margin // 2 - tile
    starts = [first_start + round(i * (last_start - first_start) / (count - 1)) for i in range(count)]
    cuts = [0, *((a + tile + b) // 2 for a, b in pairwise(starts)), size]
    return [Span(start, first, last) for start, (first, last) in zip(starts, pairwise(cuts), strict=True)]


@dataclass(frozen=True)
class TileGrid:
    """All tiles of a scene, row by row."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @classmethod
    def over(cls, height: int, width: int, tile: int, overlap: int) -> TileGrid:
        """The grid for a scene of ``height x width`` px."""
        return cls(tuple(tile_axis(height, tile, overlap)), tuple(tile_axis(width, tile, overlap)))

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return itertools.product(self.rows, self.columns)
