"""What training sees is what the dataset says: every labelled pixel, and the label that belongs to each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scene_helpers import write_raster
from training_helpers import SCHEMA, blocks, guessed, painted, write_dataset, write_pair

from cdkd_edge.core.errors import DatasetError, SchemaError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.quality.datasets import find_dataset
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training import views
from cdkd_edge.training.views import ORIENTATIONS, Augmentation, TilePlace, TrainingTiles, View, draw_view

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 64
SIZES = [(64, 64), (150, 200), (65, 128), (40, 50), (40, 130), (1, 64)]
"""A tile, several, one pixel more, smaller, smaller in one direction, next to nothing."""


def tiles_of(folder, **options):
    return TrainingTiles(find_dataset(folder), SCHEMA, TILE, **options)


def inner(labels, margin=3):
    """Pixels with a label whose neighbourhood is all of that label: resampling leaves them their colour."""
    padded = np.pad(labels, margin, constant_values=NO_LABEL - 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * margin + 1, 2 * margin + 1))
    return (windows == labels[..., None, None]).all(axis=(2, 3)) & (labels != NO_LABEL)


@pytest.fixture
def one(tmp_path):
    """One image of 150 x 200 px."""
    return write_dataset(tmp_path / "one", {"a_0": (150, 200)})


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_places_show_every_labelled_pixel(tmp_path, size):
    labels = np.arange(size[0] * size[1]).reshape(size).astype(np.uint8) % 5
    write_pair(tmp_path, "a_0", labels)
    tiles = tiles_of(tmp_path)
    seen = np.zeros(size, int)
    for place in tiles.places:
        _, truth = tiles.read(place, View())
        rows, columns = np.nonzero(truth != NO_LABEL)
        assert (truth[rows, columns] == labels[rows + place.row, columns + place.column]).all()
        seen[rows + place.row, columns + place.column] += 1
    assert (seen > 0).all()
    assert len(tiles) == -(-size[0] // TILE) * -(-size[1] // TILE)  # and none is spent twice on the same ground
    assert (tiles.class_pixels == np.bincount(labels.ravel(), minlength=5)).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_view_0_is_the_tile_of_the_grid(tmp_path, size):
    write_pair(tmp_path, "a_0", blocks(*size, cell=5))
    tiles = tiles_of(tmp_path)
    reader = SceneReader(tmp_path / "images" / "a_0.png")
    expected = np.empty((3, TILE, TILE), np.uint8)
    for place, (row, column) in zip(tiles.places, TileGrid.over(*size, TILE, 0), strict=True):
        reader.read_tile(row, column, expected)
        image, truth = tiles.read(place, draw_view(Augmentation(True, (0.5, 2), 1.0), [3, 4], 0))
        assert (image == expected).all()
        assert image.dtype == truth.dtype == np.uint8
        known = truth != NO_LABEL
        assert (guessed(image)[known] == truth[known]).all()
    reader.close()


def test_an_image_smaller_than_a_tile_is_reflected_and_has_no_labels_beyond(tmp_path):
    labels = blocks(40, 50, cell=5)
    write_pair(tmp_path, "a_0", labels)
    tiles = tiles_of(tmp_path)
    assert tiles.places == [TilePlace(0, -12, -7)]
    image, truth = tiles.read(tiles.places[0], View())
    assert (image == np.pad(painted(labels), ((0, 0), (12, 12), (7, 7)), mode="reflect")).all()
    assert (truth == np.pad(labels, ((12, 12), (7, 7)), constant_values=NO_LABEL)).all()


def test_places_without_a_label_are_left_out(tmp_path):
    labels = blocks(128, 192)
    labels[:64, 64:128] = NO_LABEL
    labels[64:, :64] = NO_LABEL
    labels[127, 0] = 2  # one pixel is enough
    write_pair(tmp_path, "a_0", labels)
    tiles = tiles_of(tmp_path)
    assert [(place.row, place.column) for place in tiles.places] == [(0, 0), (0, 128), (64, 0), (64, 64), (64, 128)]
    assert tiles.class_pixels.sum() == (labels != NO_LABEL).sum()


def test_a_dataset_without_any_label_is_refused(tmp_path):
    write_pair(tmp_path, "a_0", np.full((64, 64), NO_LABEL, np.uint8))
    with pytest.raises(DatasetError, match="no pixel of the 1 training masks"):
        tiles_of(tmp_path)


def test_an_image_and_a_mask_of_different_size_are_refused_before_training(tmp_path):
    write_dataset(tmp_path, {"a_0": (64, 64), "a_1": (64, 70)})
    Image.fromarray(np.zeros((70, 64, 3), np.uint8)).save(tmp_path / "images" / "a_1.png")
    with pytest.raises(DatasetError, match=r"a_1.png is 64 x 70 px, its mask a_1.png 70 x 64"):
        tiles_of(tmp_path)


def test_a_color_that_the_schema_does_not_know_is_found_before_training(tmp_path):
    write_dataset(tmp_path, {"a_0": (64, 64), "a_1": (64, 64)})
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[5, 5] = 1, 2, 3
    Image.fromarray(mask).save(tmp_path / "masks" / "a_1.png")
    with pytest.raises(SchemaError, match=r"a_1.png holds the color \(1, 2, 3\)"):
        tiles_of(tmp_path)


def test_an_image_that_cannot_be_read_is_found_before_training(one):
    (one / "images" / "a_0.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"a_0\.png"):
        tiles_of(one)


def test_bands_and_stretch_are_those_of_the_options(tmp_path):
    (tmp_path / "images").mkdir()
    write_pair(tmp_path, "a_0", blocks(64, 64))
    (tmp_path / "images" / "a_0.png").unlink()
    write_raster(tmp_path / "images" / "a_0.tif", painted(blocks(64, 64)).astype(np.uint16)[::-1] * 10)
    with pytest.raises(DatasetError, match="holds uint16 values"):
        tiles_of(tmp_path)
    options = SegmentOptions(bands=(3, 2, 1), stretch=Stretch(0, 2550, percentiles=False))
    tiles = tiles_of(tmp_path, options=options)
    assert (tiles.read(tiles.places[0], View())[0] == painted(blocks(64, 64))).all()


def test_percentiles_of_an_image_are_taken_once(tmp_path, monkeypatch):
    """They need a look at all of it; a tile needs a look at a tile."""
    for name in ("a_0", "a_1"):
        write_pair(tmp_path, name, blocks(128, 128))
        (tmp_path / "images" / f"{name}.png").unlink()
        write_raster(tmp_path / "images" / f"{name}.tif", painted(blocks(128, 128)).astype(np.uint16) * 7)
    options = SegmentOptions(stretch=Stretch(2, 98, percentiles=True))
    reader = SceneReader(tmp_path / "images" / "a_1.tif", stretch=options.stretch)
    expected = np.empty((3, TILE, TILE), np.uint8)
    reader.read_tile(Span(0, 0, TILE), Span(64, 64, 128), expected)
    reader.close()
    tiles = tiles_of(tmp_path, options=options)
    monkeypatch.setattr(SceneReader, "_stretch_limits", None)
    assert (tiles.read(TilePlace(1, 0, 64), View())[0] == expected).all()


# --- views ----------------------------------------------------------------------------------------


def test_the_first_eight_views_are_eight_orientations():
    for seed in range(20):
        drawn = [draw_view(Augmentation(), [seed], index) for index in range(ORIENTATIONS)]
        assert drawn[0] == View()
        assert len({(view.quarters, view.mirrored) for view in drawn}) == 8


def test_the_eight_orientations_look_different(tmp_path):
    write_pair(tmp_path, "a_0", blocks(64, 64))
    tiles = tiles_of(tmp_path)
    seen = {tiles.read(tiles.places[0], View(q, m))[0].tobytes() for q in range(4) for m in (False, True)}
    assert len(seen) == 8


def test_a_seed_names_a_view():
    wild = Augmentation(True, (0.5, 2), 0.5)
    for index in (1, 7, 8, 30, None):
        assert draw_view(wild, [1, 2, 3], index) == draw_view(wild, [1, 2, 3], index)
        assert draw_view(wild, [1, 2, 3], index) != draw_view(wild, [1, 2, 4], index)
    assert len({draw_view(wild, [1], index) for index in range(64)}) == 64


def test_nothing_varies_that_was_not_asked_for():
    for index in (1, 5, 9, None):
        view = draw_view(Augmentation(flips=False), [5], index)
        assert (view.quarters, view.mirrored, view.scale, view.light) == (0, False, 1.0, None)
        assert max(map(abs, view.shift)) <= 0.25
    assert draw_view(Augmentation(scale=(1.5, 1.5)), [5], 3).scale == 1.5


def test_scales_stay_within_their_range_and_use_all_of_it():
    scales = [draw_view(Augmentation(scale=(0.5, 2)), [seed], None).scale for seed in range(400)]
    assert 0.5 <= min(scales) < 0.55
    assert 1.8 < max(scales) <= 2
    assert 0.9 < np.median(scales) < 1.1  # even on a logarithmic scale


@pytest.mark.parametrize("size", [(150, 200), (40, 50), (40, 130)], ids=str)
def test_labels_follow_the_image_under_every_view(tmp_path, size):
    write_pair(tmp_path, "a_0", blocks(*size, cell=20))
    augmentation = Augmentation(True, (0.5, 2))
    tiles = tiles_of(tmp_path, augmentation=augmentation)
    compared = 0
    for seed in range(60):
        place = tiles.places[seed % len(tiles)]
        image, truth = tiles.read(place, draw_view(augmentation, [seed], None))
        assert image.shape == (3, TILE, TILE)
        assert truth.shape == (TILE, TILE)
        assert image.flags.c_contiguous
        assert truth.flags.c_contiguous
        sure = inner(truth)
        compared += sure.sum()
        assert (guessed(image)[sure] == truth[sure]).all()
    assert compared > 20_000


@pytest.mark.parametrize("view", [View(1), View(3, True), View(2, False, 1.0, (0.25, -0.25))], ids=str)
def test_without_scaling_views_are_exact(one, view):
    tiles = tiles_of(one)
    for place in tiles.places:
        image, truth = tiles.read(place, view)
        assert (image == painted(truth)).all()


def test_a_magnified_view_shows_the_middle_larger(tmp_path):
    labels = np.zeros((64, 64), np.uint8)
    labels[16:48, 16:48] = 1
    write_pair(tmp_path, "a_0", labels)
    tiles = tiles_of(tmp_path)
    assert (tiles.read(tiles.places[0], View(scale=2))[1] == 1).all()
    _, small = tiles.read(tiles.places[0], View(scale=0.5))
    assert (small[:16] == NO_LABEL).all()  # 128 px are shown, and 64 there are
    assert (small[24:40, 24:40] == 1).all()
    assert (small == 1).sum() == 256


def test_views_stay_on_the_image_where_it_is_large_enough(one):
    tiles = tiles_of(one)
    for seed in range(40):
        view = draw_view(Augmentation(scale=(0.5, 2)), [seed], None)
        _, truth = tiles.read(tiles.places[seed % len(tiles)], view)
        assert (truth != NO_LABEL).all()


def test_light_changes_the_image_and_not_the_labels(one):
    tiles = tiles_of(one, augmentation=Augmentation(light=1.0))
    place = tiles.places[0]
    image, truth = tiles.read(place, View())
    others = [tiles.read(place, View(light=seed)) for seed in range(5)]
    for lit, same in others:
        assert (same == truth).all()
        assert (lit != image).any()
    assert len({lit.tobytes() for lit, _ in others}) == 5
    again, _ = tiles.read(place, View(light=3))
    assert (again == others[3][0]).all()


def test_more_light_changes_more(one):
    image, _ = tiles_of(one).read(TilePlace(0, 0, 0), View())
    change = []
    for strength in (0.1, 0.4, 1.0):
        lit, _ = tiles_of(one, augmentation=Augmentation(light=strength)).read(TilePlace(0, 0, 0), View(light=8))
        change.append(np.abs(lit.astype(int) - image).mean())
    assert change[0] < change[1] < change[2]
    assert change[0] < 10


def test_grain_changes_the_image_in_places_and_not_its_labels_or_its_mean(one):
    tiles = tiles_of(one, augmentation=Augmentation(texture=1.0))
    place = tiles.places[0]
    image, truth = tiles.read(place, View())
    others = [tiles.read(place, View(texture=seed)) for seed in range(5)]
    for grainy, same in others:
        assert (same == truth).all()
        change = np.abs(grainy.astype(int) - image).max(axis=0)
        assert change.max() > 10
        assert abs(float(grainy.mean()) - float(image.mean())) < 6
    assert len({grainy.tobytes() for grainy, _ in others}) == 5
    again, _ = tiles.read(place, View(texture=3))
    assert (again == others[3][0]).all()
    weak, _ = tiles_of(one, augmentation=Augmentation(texture=0.1)).read(place, View(texture=3))
    assert np.abs(weak.astype(int) - image).mean() < np.abs(again.astype(int) - image).mean() / 3


def test_views_draw_only_what_is_asked_for():
    plain, all_of_it = Augmentation(), Augmentation(light=0.5, texture=0.5)
    assert (draw_view(plain, [1], None).light, draw_view(plain, [1], None).texture) == (None, None)
    view = draw_view(all_of_it, [1], None)
    assert view.light is not None
    assert view.texture is not None
    assert view.light != view.texture


@pytest.mark.parametrize("scale", [(2.0, 0.5), (0.0, 1.0), (1.0, 11.0), (float("nan"), 1.0)], ids=str)
def test_scales_that_make_no_sense_are_refused(scale):
    with pytest.raises(UsageError, match="scale"):
        Augmentation(scale=scale)


@pytest.mark.parametrize("light", [-0.1, 1.1, float("nan")])
def test_light_and_texture_that_make_no_sense_are_refused(light):
    with pytest.raises(UsageError, match="light"):
        Augmentation(light=light)
    with pytest.raises(UsageError, match="texture"):
        Augmentation(texture=light)


# --- nodata ---------------------------------------------------------------------------------------


def test_pixels_without_data_lose_their_label(tmp_path):
    labels = blocks(100, 64)
    write_pair(tmp_path, "a_0", labels)
    (tmp_path / "images" / "a_0.png").unlink()
    image = painted(labels)
    image[:, 10:30, 20:50] = 255
    write_raster(tmp_path / "images" / "a_0.tif", image, nodata=255)
    tiles = tiles_of(tmp_path)
    for view in (View(), View(1, True), View(shift=(0.2, 0))):
        for place in tiles.places:
            seen, truth = tiles.read(place, view)
            assert (guessed(seen)[truth != NO_LABEL] == truth[truth != NO_LABEL]).all()
    _, truth = tiles.read(tiles.places[0], View())
    assert (truth[10:30, 20:50] == NO_LABEL).all()
    assert (truth == NO_LABEL).sum() == 20 * 30


# --- labels in memory -----------------------------------------------------------------------------


def test_labels_that_left_memory_are_read_again(tmp_path, monkeypatch):
    sizes = {f"a_{index}": (64, 64) for index in range(4)}
    write_dataset(tmp_path, sizes)
    plenty = tiles_of(tmp_path)
    monkeypatch.setattr(views, "_LABELS_IN_MEMORY", 2 * 64 * 64)
    read = []
    monkeypatch.setattr(
        views,
        "read_labels",
        lambda path, schema, *lost, real=views.read_labels: (read.append(path.stem), real(path, schema, *lost))[1],
    )
    tiles = tiles_of(tmp_path)
    assert read == sorted(sizes)
    read.clear()
    for place in [*tiles.places, *tiles.places[::-1], tiles.places[1], tiles.places[0]]:
        for one, other in zip(tiles.read(place, View()), plenty.read(place, View()), strict=True):
            assert (one == other).all()
    # Two fit. After looking: 2, 3. Then 0, 1, 2, 3 | (3, 2) 1, 0 | (1, 0).
    assert read == ["a_0", "a_1", "a_2", "a_3", "a_1", "a_0"]


def test_a_mask_larger_than_the_memory_for_masks_is_still_kept(one, monkeypatch):
    monkeypatch.setattr(views, "_LABELS_IN_MEMORY", 1)
    tiles = tiles_of(one)
    monkeypatch.setattr(views, "read_labels", None)
    assert tiles.read(tiles.places[0], View())[1].shape == (TILE, TILE)


def test_a_window_beyond_the_image_does_not_reach_the_reader(tmp_path):
    """Shifts are cut off where the image ends, whatever is asked."""
    write_dataset(tmp_path, {"a_0": (70, 64)})
    tiles = tiles_of(tmp_path)
    spans = []
    real = SceneReader.read_tile

    def spy(self, row, column, out):
        spans.append((row.start, column.start))
        return real(self, row, column, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SceneReader, "read_tile", spy)
        for shift in ((-9.0, -9.0), (9.0, 9.0)):
            tiles.read(tiles.places[0], View(shift=shift))
    assert spans == [(0, 0), (6, 0)]
