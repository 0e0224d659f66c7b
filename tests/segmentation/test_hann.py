"""Blending tiles: the weights, the sums, the ties; and that it is probabilities that are blended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scene_helpers import FakeEngine, ProbabilityEngine, noise, read_labels, red_labels, relaxed, write_raster

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.merge import HannMerge, hann_weights
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 32


Values = npt.NDArray[np.uint8]


def by_place(tiles: Values) -> Values:
    """Probabilities that depend on the place in the tile, so that tiles disagree where they overlap."""
    count, _, height, width = tiles.shape
    y, x = np.mgrid[:height, :width]
    layers = [(tiles[:, 0].astype(int) * (3 + k) + 7 * k * y + 5 * (k + 1) * x) % 256 for k in range(5)]
    return np.stack(layers, axis=1).astype(np.uint8).reshape(count, 5, height, width)


def reference(path: Path, overlap: int) -> tuple[Values, Values]:
    """Blended labels and confidence, the plain way: the whole scene at once."""
    reader = SceneReader(path)
    height, width = reader.height, reader.width
    sums, weights = np.zeros((5, height, width), np.int64), np.zeros((height, width), np.int64)
    axis = hann_weights(TILE, overlap).astype(np.int64)
    valid = np.zeros((height, width), bool)
    for row, column in TileGrid.over(height, width, TILE, overlap):
        tile = np.zeros((3, TILE, TILE), np.uint8)
        mask = reader.read_tile(row, column, tile)
        if mask is not None and not mask.any():
            continue
        top, left = max(row.start, 0), max(column.start, 0)
        bottom, right = min(row.start + TILE, height), min(column.start + TILE, width)
        inner = np.s_[..., top - row.start : bottom - row.start, left - column.start : right - column.start]
        sums[:, top:bottom, left:right] += (np.outer(axis, axis) * by_place(tile[None])[0])[inner]
        weights[top:bottom, left:right] += np.outer(axis, axis)[inner]
        valid[top:bottom, left:right] |= True if mask is None else mask[inner]
    reader.close()
    percent = np.floor(100 * sums.max(axis=0) / np.maximum(255 * weights, 1) + 0.5)
    labels = np.where(valid, sums.argmax(axis=0), NO_LABEL)
    return labels.astype(np.uint8), np.where(valid, percent, 255).astype(np.uint8)


@settings(relaxed, max_examples=20)
@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    overlap=st.integers(0, TILE // 2),
    batch=st.integers(1, 4),
    hole=st.booleans(),
)
@example(height=1, width=1, overlap=8, batch=1, hole=False)
@example(height=33, width=33, overlap=16, batch=2, hole=False)
@example(height=130, width=130, overlap=16, batch=1, hole=True)
def test_blending_by_tiles_is_blending_at_once(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, overlap: int, batch: int, hole: bool
) -> None:
    folder = tmp_path_factory.mktemp("scene")
    scene = np.maximum(noise(height, width, seed=height * width), 1)
    if hole:
        scene[:, height // 3 :, width // 4 : width // 4 + 70] = 0
    path = write_raster(folder / "scene.tif", scene, nodata=0)
    options = SegmentOptions(merge="hann", overlap=overlap, confidence=True)
    result = segment_scene(ProbabilityEngine(TILE, by_place, batch=batch), path, folder / "map.tif", options)
    labels, confidence = reference(path, overlap)
    assert (read_labels(folder / "map.tif") == labels).all()
    assert result.confidence == folder / "map_confidence.tif"
    assert (read_labels(result.confidence) == confidence).all()


@pytest.mark.parametrize("overlap", [2, 16, 128])
def test_weights_of_neighbours_add_up_to_the_same(overlap: int) -> None:
    weights = hann_weights(1024, overlap).astype(int)
    assert (weights == weights[::-1]).all()
    assert weights.min() >= 1
    assert (weights[overlap:-overlap] == 255).all()
    both = weights[:overlap] + weights[-overlap:]
    assert abs(both - 255).max() <= 1


def test_without_overlap_nothing_is_blended() -> None:
    assert (hann_weights(32, 0) == 255).all()


def test_kept_parts_still_partition_the_scene() -> None:
    for size in (1, 31, 32, 33, 200):
        grid = HannMerge.arranged(TileGrid.over(size, size, 32, 16))
        assert [y for span in grid.rows for y in range(span.first, span.last)] == list(range(size))
        assert all(span.start <= span.first and span.last <= span.start + 32 for span in grid.rows)


def test_a_constant_scene_gives_a_constant_map(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", np.full((3, 150, 170), 130, np.uint8))
    options = SegmentOptions(merge="hann", confidence=True)
    segment_scene(ProbabilityEngine(TILE), path, tmp_path / "map.tif", options)
    assert (read_labels(tmp_path / "map.tif") == 2).all()
    confidence = read_labels(tmp_path / "map_confidence.tif")
    assert (confidence == confidence[0, 0]).all()


def test_ties_go_to_the_lower_label(tmp_path: Path) -> None:
    def undecided(tiles: Values) -> Values:
        values = np.zeros((len(tiles), 5, TILE, TILE), np.uint8)
        values[:, [4, 1, 3]] = 85
        return values

    path = write_raster(tmp_path / "scene.tif", noise(70, 70))
    segment_scene(ProbabilityEngine(TILE, undecided), path, tmp_path / "map.tif", SegmentOptions(merge="hann"))
    assert (read_labels(tmp_path / "map.tif") == 1).all()


def test_the_map_changes_gradually_where_crop_has_a_seam(tmp_path: Path) -> None:
    """Two tiles, each sure of another class to its own degree: the border lies where their weights say."""

    def opinion(tiles: Values) -> Values:
        values = np.zeros((len(tiles), 5, TILE, TILE), np.uint8)
        left = tiles[:, 0, 0, 0] < 100  # the left tile sees a dark corner
        values[left, 0], values[~left, 1] = 250, 150
        return values

    scene = np.zeros((3, 32, 48), np.uint8)
    scene[:, :, 16:] = 200
    path = write_raster(tmp_path / "scene.tif", scene)
    places = {}
    for merge in ("crop", "hann"):
        options = SegmentOptions(merge=merge, overlap=16)
        segment_scene(ProbabilityEngine(TILE, opinion), path, tmp_path / "map.tif", options)
        labels = read_labels(tmp_path / "map.tif")
        assert (labels == labels[0]).all()
        places[merge] = int(np.flatnonzero(np.diff(labels[0]))[0]) + 1
    assert places["crop"] == 24
    weights = hann_weights(TILE, 16).astype(int)
    assert places["hann"] == 16 + int(np.argmax(250 * weights[16:] < 150 * weights[:16])) > 24


@pytest.mark.parametrize("options", [SegmentOptions(merge="hann"), SegmentOptions(confidence=True)])
def test_an_engine_with_labels_alone_is_refused(tmp_path: Path, options: SegmentOptions) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 70))
    with pytest.raises(SceneError, match=r"fake\.onnx gives labels") as caught:
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    assert ("--probabilities" if options.merge == "hann" else "--confidence") in str(caught.value.hint)


def test_an_engine_with_confidence_gives_confidence_but_no_blending(tmp_path: Path) -> None:
    engine = ProbabilityEngine(TILE, kind="confidence")
    path = write_raster(tmp_path / "scene.tif", np.maximum(noise(70, 70), 1), nodata=0)
    with pytest.raises(SceneError, match="gives confidence, not probabilities, which --merge hann needs"):
        segment_scene(engine, path, tmp_path / "map.tif", SegmentOptions(merge="hann"))
    segment_scene(engine, path, tmp_path / "map.tif", SegmentOptions(confidence=True))
    assert (read_labels(tmp_path / "map.tif") == red_labels(noise(70, 70)[None])[0]).all()


def test_a_confidence_raster_is_numbers_in_the_place_of_the_map(tmp_path: Path) -> None:
    scene = np.maximum(noise(70, 90), 1)
    scene[:, 20:, :30] = 0
    path = write_raster(
        tmp_path / "scene.tif", scene, nodata=0, crs="EPSG:32640", transform=rasterio.Affine(2, 0, 5, 0, -2, 9)
    )
    options = SegmentOptions(confidence=True)
    segment_scene(ProbabilityEngine(TILE), path, tmp_path / "map.tif", options)
    with rasterio.open(tmp_path / "map.tif") as labels, rasterio.open(tmp_path / "map_confidence.tif") as confidence:
        assert (confidence.crs, confidence.transform) == (labels.crs, labels.transform)
        assert (confidence.nodata, confidence.dtypes) == (255, ("uint8",))
        values = confidence.read(1)
        assert ((values == 255) == (labels.read(1) == 255)).all()
        assert values[values != 255].max() <= 100
        assert confidence.tags()["UNIT"].startswith("per cent")
    assert not (tmp_path / "map_confidence.tif.aux.xml").exists()


def test_more_overlap_than_half_a_tile_is_refused(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 70))
    with pytest.raises(UsageError, match="at most half a tile, 16 px, not 17"):
        segment_scene(ProbabilityEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(merge="hann", overlap=17))


def test_another_merge_there_is_not(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 70))
    with pytest.raises(UsageError, match="no merge 'mean'"):
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(merge="mean"))
