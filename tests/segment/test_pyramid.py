"""Overviews: the most frequent label of four, at any size, as GDAL counts them."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scene_helpers import relaxed

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.segment.pyramid import Pyramid, every_other, halved

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

labels = st.sampled_from([0, 1, 2, 3, 251, 254, NO_LABEL])
maps = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=labels)


def most_frequent(four: np.ndarray) -> int:
    """Of the labels there are; the first of equals."""
    votes = [int(label) for label in four.ravel() if label != NO_LABEL]
    counts = Counter(votes)
    return max(votes, key=lambda label: counts[label]) if votes else NO_LABEL


@relaxed
@given(maps)
def test_each_pixel_has_the_most_frequent_label_of_four(whole: np.ndarray) -> None:
    small = halved(whole)
    assert small.shape == tuple(-(-side // 2) for side in whole.shape)
    for row, column in np.ndindex(small.shape):
        assert small[row, column] == most_frequent(whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2])


def test_rows_at_a_time_or_all_at_once() -> None:
    whole = np.random.default_rng(0).integers(0, 3, (131, 70)).astype(np.uint8)
    whole[40:90, 20:30] = NO_LABEL
    parts = np.concatenate([halved(whole[:64]), halved(whole[64:])])
    assert (halved(whole) == parts).all()


@pytest.mark.parametrize("shape", [(1, 1), (512, 512), (513, 100), (1025, 1600), (2047, 1300)])
@pytest.mark.parametrize("step", [512, 1024])
def test_levels_written_row_by_row(tmp_path: Path, shape: tuple[int, int], step: int) -> None:
    whole = np.random.default_rng(1).integers(0, 4, shape).astype(np.uint8)
    with Pyramid(tmp_path, *shape) as pyramid:
        for top in range(0, shape[0], step):
            pyramid.add(whole[top : top + step])
    expected = whole
    for path in pyramid.paths:
        expected = halved(expected)
        with rasterio.open(path) as level:
            assert (level.read(1) == expected).all()
    assert max(expected.shape) <= 512
    assert len(pyramid.paths) == max(0, (max(shape) - 1) // 512).bit_length()


def test_it_is_what_gdal_makes_where_no_two_labels_are_equally_frequent(tmp_path: Path) -> None:
    coarse = np.random.default_rng(2).integers(0, 5, (80, 90)).astype(np.uint8)
    whole = np.kron(coarse, np.ones((16, 16), np.uint8))  # blocks that four pixels never cross
    profile = {"driver": "GTiff", "height": 1280, "width": 1440, "count": 1, "dtype": "uint8", "nodata": NO_LABEL}
    with rasterio.open(tmp_path / "map.tif", "w", **profile) as dataset:
        dataset.write(whole, 1)
        dataset.build_overviews([2, 4], rasterio.enums.Resampling.mode)
    for level, expected in enumerate((halved(whole), halved(halved(whole)))):
        with rasterio.open(tmp_path / "map.tif", overview_level=level) as overview:
            assert (overview.read(1) == expected).all()


def test_numbers_are_not_mixed(tmp_path: Path) -> None:
    whole = np.random.default_rng(2).integers(0, 256, (1101, 905)).astype(np.uint8)
    with Pyramid(tmp_path, *whole.shape, every_other, "percent") as pyramid:
        for top in range(0, 1101, 512):
            pyramid.add(whole[top : top + 512])
    assert [path.name for path in pyramid.paths] == ["percent-1.tif", "percent-2.tif"]
    with rasterio.open(pyramid.paths[1]) as level:
        assert (level.read(1) == whole[::4, ::4]).all()


def test_what_gdal_reports_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = Pyramid(tmp_path, 600, 600).__enter__()
    pyramid.add(np.zeros((600, 600), np.uint8))
    level = pyramid._levels[0]
    close = level._dataset.close

    class Failing:
        def close(self) -> None:
            close()
            logging.getLogger("rasterio._env").error("CPLE_FileIO in overview-1.tif: write error")

    level._dataset = Failing()
    with pytest.raises(SceneError, match="write error"):
        pyramid.__exit__(None, None, None)
