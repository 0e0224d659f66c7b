"""Pieces put together by their edges: what comes out is what an overlay makes of them, to the last vertex."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import shapes
from scene_helpers import relaxed

from cdkd_edge.segmentation.outlines import Outlines, Piece, TilePieces, unite

shapely = pytest.importorskip("shapely", reason="polygons need the extra 'vector'")


def pieces_of(labels: np.ndarray, tile: int) -> tuple[list[Piece], list[int], list[object]]:
    """All pieces of a map in tiles, the label of each, and each as Shapely has it."""
    pieces: list[Piece] = []
    values: list[int] = []
    polygons: list[object] = []
    lines = [(axis, at) for axis in (0, 1) for at in range(tile, labels.shape[1 - axis], tile)]
    for top in range(0, labels.shape[0], tile):
        for left in range(0, labels.shape[1], tile):
            part = np.ascontiguousarray(labels[top : top + tile, left : left + tile])
            found = [(shapely.geometry.shape(shape), int(value)) for shape, value in shapes(part, connectivity=4)]
            geometries = shapely.transform([polygon for polygon, _ in found], lambda p, at=(left, top): p + at)
            cut = TilePieces(Outlines.from_shapely(geometries), lines)
            pieces += [cut.piece(index) for index in range(len(found))]
            values += [value for _, value in found]
            polygons += list(geometries)
    return pieces, values, polygons


def same(outlines: Outlines, expected: object) -> bool:
    """Whether polygons are equal but for the order of what is equal, and straight vertices."""
    parts = Outlines.from_shapely(shapely.get_parts(expected)).without_straight_vertices().to_shapely()
    found = outlines.without_straight_vertices().to_shapely()
    assert shapely.is_valid(found).all()
    return sorted(shapely.normalize(found).tolist(), key=str) == sorted(shapely.normalize(parts).tolist(), key=str)


@given(
    height=st.integers(1, 18), width=st.integers(1, 18), tile=st.integers(1, 9), often=st.floats(0.2, 0.9),
    kept=st.floats(0.3, 1), seed=st.integers(0, 999),
)  # fmt: skip
@settings(relaxed, max_examples=30)
def test_as_an_overlay_unites_them(height: int, width: int, tile: int, often: float, kept: float, seed: int) -> None:
    """Also where pieces are missing, so that what is there is in several parts or has other holes."""
    random = np.random.default_rng(seed)
    labels = (random.random((height, width)) < often).astype(np.uint8)
    pieces, values, polygons = pieces_of(labels, tile)
    chosen = [index for index in range(len(pieces)) if random.random() < kept] or [0]
    outlines, regions = unite([pieces[i] for i in chosen], np.array([values[i] for i in chosen]))
    for value in {values[i] for i in chosen}:
        expected = shapely.union_all([polygons[i] for i in chosen if values[i] == value])
        assert same(outlines.select(regions == value), expected)


def test_pixels_that_touch_by_corners() -> None:
    """Around a hole by a corner of its own: one ring touches another; two regions: each has its own."""
    around = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], np.uint8)
    for tile in (1, 2, 3):
        pieces, values, _ = pieces_of(around, tile)
        outlines, regions = unite(pieces, np.array(values))
        (ring,) = outlines.select(regions == 1).to_shapely()
        assert (ring.area, len(ring.interiors), ring.is_valid) == (7, 1, True)
        assert len(outlines.select(regions == 0)) == 2
    pieces, values, _ = pieces_of(np.eye(2, dtype=np.uint8), 1)
    outlines, _ = unite(pieces, np.array(values))
    assert len(outlines) == 4


def test_a_tile_of_any_side_can_be_packed() -> None:
    far = 3_000_000
    box = shapely.box(far, far, far + 70_000, far + 2)
    cut = TilePieces(Outlines.from_shapely(np.array([box])), [(0, far)])
    assert cut.touching.tolist() == [True]
    assert cut.along((0, far), far - 1, 4).tolist() == [1, 0, 0, 1]
    piece = cut.piece(0)
    assert piece.border.sum() == 2
    assert piece.offsets.dtype == np.uint32
    outlines, _ = unite([piece], np.zeros(1, np.int64))
    assert same(outlines, box)
