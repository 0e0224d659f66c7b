"""Where tiles lie: every pixel labelled once, as deep inside a tile as can be, by as few tiles as can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scene_helpers import relaxed

from cdkd_edge.core.errors import UsageError
from cdkd_edge.raster.grid import Span, TileGrid, default_overlap, tile_axis

SIZES = st.integers(1, 5000)


@st.composite
def tiles_and_overlaps(draw: st.DrawFn) -> tuple[int, int]:
    tile = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 256, 512, 1024])))
    return tile, draw(st.one_of(st.integers(0, tile - 1), st.just(default_overlap(tile))))


def least_tiles(size: int, tile: int, overlap: int) -> int:
    """Counted, not computed: one more tile adds ``tile - overlap`` px."""
    count, covered = 1, tile
    while covered < size:
        count, covered = count + 1, covered + tile - overlap
    return count


@relaxed
@given(SIZES, tiles_and_overlaps())
@example(1, (1, 0))
@example(5000, (1024, 128))
@example(1025, (1024, 1023))
def test_kept_parts_partition_the_axis(size: int, shape: tuple[int, int]) -> None:
    spans = tile_axis(size, *shape)
    assert [pixel for span in spans for pixel in range(span.first, span.last)] == list(range(size))


@relaxed
@given(SIZES, tiles_and_overlaps())
@example(1, (1, 0))
def test_every_tile_covers_what_it_keeps(size: int, shape: tuple[int, int]) -> None:
    tile, overlap = shape
    for span in tile_axis(size, tile, overlap):
        assert span.first < span.last
        assert span.start <= span.first
        assert span.last <= span.start + tile
        assert span.kept == slice(span.first - span.start, span.last - span.start)
        assert 0 <= span.kept.start < span.kept.stop <= tile


@relaxed
@given(SIZES, tiles_and_overlaps())
@example(1025, (1024, 128))
@example(1920, (1024, 128))
@example(1921, (1024, 128))
def test_the_number_of_tiles_is_the_least(size: int, shape: tuple[int, int]) -> None:
    tile, overlap = shape
    count = len(tile_axis(size, tile, overlap))
    assert count == least_tiles(size, tile, overlap)
    assert count == (1 if size <= tile else -(-(size - overlap) // (tile - overlap)))


@relaxed
@given(SIZES, tiles_and_overlaps())
@example(2000, (1024, 128))
@example(2001, (1024, 127))
def test_kept_pixels_lie_deep_inside_their_tile(size: int, shape: tuple[int, int]) -> None:
    tile, overlap = shape
    spans = tile_axis(size, tile, overlap)
    for span in spans[1:]:
        assert span.first - span.start >= overlap // 2
    for span in spans[:-1]:
        assert span.start + tile - span.last >= overlap // 2
    for left, right in pairwise(spans):
        assert left.start < right.start
        assert left.start + tile - right.start >= overlap
        # the cut runs through the middle of the overlap
        assert abs((left.start + tile - left.last) - (right.first - right.start)) <= 1
    overlaps = [left.start + tile - right.start for left, right in pairwise(spans)]
    assert not overlaps or max(overlaps) - min(overlaps) <= 1, "what is to spare is shared evenly"


@relaxed
@given(SIZES, tiles_and_overlaps())
@example(1, (1024, 128))
@example(1024, (1024, 128))
@example(1100, (1024, 128))
def test_what_is_to_spare_becomes_a_margin_at_the_borders_of_the_scene(size: int, shape: tuple[int, int]) -> None:
    tile, overlap = shape
    spans = tile_axis(size, tile, overlap)
    before, after = -spans[0].start, spans[-1].start + tile - size
    assert 0 <= before <= after <= before + 1
    spare = len(spans) * tile - (len(spans) - 1) * overlap - size
    assert before + after == (spare if len(spans) == 1 else min(spare, overlap))


@relaxed
@given(st.integers(1, 300), st.integers(1, 300), tiles_and_overlaps())
def test_a_grid_labels_every_pixel_once_row_by_row(height: int, width: int, shape: tuple[int, int]) -> None:
    tile, overlap = shape
    grid = TileGrid.over(height, width, max(tile, 24), overlap)
    places = list(grid)
    assert len(places) == len(grid) == len(grid.rows) * len(grid.columns)
    assert sum((row.last - row.first) * (column.last - column.first) for row, column in places) == height * width
    assert places == sorted(places, key=lambda place: (place[0].first, place[1].first))


@pytest.mark.parametrize(("tile", "overlap"), [(64, 64), (64, 65), (64, -1), (1, 1), (0, 0)])
@pytest.mark.parametrize("size", [1, 64, 5000])
def test_an_overlap_that_leaves_no_progress_is_refused(size: int, tile: int, overlap: int) -> None:
    with pytest.raises(UsageError, match=rf"an overlap of {overlap} px does not fit tiles of {tile} px"):
        tile_axis(size, tile, overlap)


@pytest.mark.parametrize(
    ("tile", "overlap"), [(1024, 128), (512, 128), (511, 127), (256, 64), (64, 16), (3, 0), (1, 0)]
)
def test_the_default_overlap_fits_every_tile(tile: int, overlap: int) -> None:
    assert default_overlap(tile) == overlap
    assert tile_axis(5000, tile, overlap)


def test_a_scene_of_one_tile_and_its_neighbours_by_hand() -> None:
    assert tile_axis(64, 64, 16) == [Span(0, 0, 64)]
    assert tile_axis(62, 64, 16) == [Span(-1, 0, 62)]
    assert tile_axis(112, 64, 16) == [Span(0, 0, 56), Span(48, 56, 112)]
    assert tile_axis(65, 64, 16) == [Span(-8, 0, 32), Span(9, 32, 65)]
