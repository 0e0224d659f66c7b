"""The parts of calibration: descriptors, choice, budget, names, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_helpers import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scene_helpers import relaxed

from cdkd_edge.core.errors import SystemRefusalError
from cdkd_edge.core.files import whole_folder
from cdkd_edge.precision.choose_tiles import choose, coverage_radius, distances, k_means, nearest_of, strata
from cdkd_edge.precision.describe_tiles import COLOUR_FEATURES, FEATURES, describe_tile, make_thumbnail, standardise
from cdkd_edge.precision.exclusions import Exclusions, escape_pattern, overlaps
from cdkd_edge.precision.scan_scenes import TiledScene, fair_limit
from cdkd_edge.precision.write_set import Sheet, SheetTile, shrink_tile, thumbnail_side, write_sheet

# --- descriptors ----------------------------------------------------------------------------------


def test_colour_is_measured_in_opponent_axes() -> None:
    tile = picture(128, 128)
    red, green, blue = tile.astype(float)
    features = describe_tile(tile)
    light, first, second = (red + green + blue) / 3, (red - blue) / 2, (2 * green - red - blue) / 4
    assert features[:3] == pytest.approx([light.mean(), first.mean(), second.mean()], abs=0.01)
    assert features[3] == pytest.approx(light.std(), abs=0.01)

    def halved(plane: Any) -> Any:
        return plane.reshape(64, 2, 64, 2).mean(axis=(1, 3))

    assert features[4] == pytest.approx(halved(first).std(), abs=0.01)
    assert features[6:9] == pytest.approx([np.percentile(halved(p), 2) for p in (light, first, second)], abs=0.01)
    assert features[9:12] == pytest.approx([np.percentile(halved(p), 98) for p in (light, first, second)], abs=0.01)


def test_texture_is_found_at_its_scale() -> None:
    """A board of n x n fields has all its energy in the band that pairs those fields."""
    for band in range(6):
        rows = np.arange(256) >> band & 1
        board = np.where(rows[:, None] ^ rows, 160, 100).astype(np.uint8)
        texture = describe_tile(np.stack([board] * 3))[COLOUR_FEATURES:]
        expected = np.zeros(6)
        expected[band] = np.log2(1 + 30)
        assert texture[:6] == pytest.approx(expected, abs=1e-3)
        assert texture[6:12] == pytest.approx(np.zeros(6), abs=1e-3)


def test_an_uneven_tile_is_told_from_an_even_one() -> None:
    generator = np.random.default_rng(0)
    rough = np.clip(generator.normal(120, 40, (3, 128, 128)), 0, 255).astype(np.uint8)
    half = rough.copy()
    half[:, :, :64] = 120
    assert describe_tile(half)[-1] > 5 * describe_tile(rough)[-1]


@pytest.mark.parametrize("side", [32, 33, 50, 257])
@pytest.mark.parametrize("value", [0, 255, None])
def test_descriptors_are_finite(side: int, value: int | None) -> None:
    tile = np.full((3, side, side), value, np.uint8) if value is not None else picture(side, side)
    features = describe_tile(tile)
    assert (features.shape, features.dtype) == ((FEATURES,), np.float32)
    assert np.isfinite(features).all()
    assert np.isfinite(standardise(np.stack([features] * 3))).all()
    assert (describe_tile(tile.copy()) == features).all()


def test_thumbnails_are_means_of_cells() -> None:
    tile = picture(64, 64)
    cells = tile.reshape(3, 8, 8, 8, 8).mean(axis=(2, 4))
    assert make_thumbnail(tile) == pytest.approx(cells.ravel(), abs=0.07)  # float16 below 256


def test_colour_and_texture_have_the_same_weight() -> None:
    features = np.random.default_rng(0).normal(size=(500, FEATURES)).astype(np.float32) * np.arange(1, FEATURES + 1)
    points = standardise(features.astype(np.float32))
    assert np.square(points[:, :COLOUR_FEATURES]).sum(axis=1).mean() == pytest.approx(1, rel=0.01)
    assert np.square(points[:, COLOUR_FEATURES:]).sum(axis=1).mean() == pytest.approx(1, rel=0.01)


# --- choice ---------------------------------------------------------------------------------------


def points_of(groups: list[tuple[int, float]], seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.normal(centre, 0.1, (size, 3)) for size, centre in groups]).astype(np.float32)


def test_every_group_is_hit() -> None:
    points = points_of([(500, 0), (300, 4), (20, 9), (1, 20)])
    chosen = choose(points, 8, np.ones(821, bool), seed=0)
    bounds = np.cumsum([0, 500, 300, 20, 1])
    hit = {int(np.searchsorted(bounds, one.index, side="right")) for one in chosen}
    assert hit == {1, 2, 3, 4}
    assert [one.why for one in chosen] == ["extreme"] * 2 + ["typical"] * 6
    assert chosen[0].index == 820, "the farthest from the mean comes first"


@relaxed
@given(
    size=st.integers(1, 40), count=st.integers(0, 50), seed=st.integers(0, 5), share=st.sampled_from([0.0, 0.25, 1.0])
)
def test_no_candidate_twice_and_as_many_as_there_are(size: int, count: int, seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 3, (size, 2)).astype(np.float32)  # many at the same place
    usable = generator.random(size) < 0.7
    chosen = [one.index for one in choose(points, count, usable, seed, extremes=share)]
    assert len(chosen) == len(set(chosen)) == min(count, usable.sum())
    assert usable[chosen].all()
    assert chosen == [one.index for one in choose(points, count, usable, seed, extremes=share)]


def test_crowds_keep_their_distance() -> None:
    points = points_of([(60, 0)])

    def crowds(index: int) -> Any:
        return np.abs(np.arange(60) - index) <= 2

    chosen = sorted(one.index for one in choose(points, 60, np.ones(60, bool), 0, crowds))
    assert 12 <= len(chosen) <= 20
    assert np.diff(chosen).min() > 2


def test_farthest_points_cover_within_twice_the_optimum() -> None:
    """Gonzalez' bound, with the centres that the points were drawn around as an upper bound of the optimum."""
    points = points_of([(40, 0), (40, 5), (40, 11), (40, 17)])
    best, _ = coverage_radius(points, np.array([[c] * 3 for c in (0, 5, 11, 17)], np.float32))
    chosen = [one.index for one in choose(points, 4, np.ones(160, bool), 0, extremes=1.0)]
    assert coverage_radius(points, points[chosen])[0] <= 2 * best


def test_means_find_the_middles_and_leave_fixed_centres() -> None:
    points = points_of([(50, 0), (50, 5), (50, 11)])
    centres = k_means(points, np.array([[5.0] * 3], np.float32), 2, seed=3)
    assert sorted(centres[:, 0].round(1).tolist()) == pytest.approx([0, 11], abs=0.1)
    assert len(k_means(points[:1], np.empty((0, 3), np.float32), 4, seed=0)) == 1


def test_the_nearest_centre_is_the_nearest() -> None:
    generator = np.random.default_rng(0)
    points, centres = generator.normal(size=(200, 5)).astype(np.float32), generator.normal(size=(9, 5))
    every = np.linalg.norm(points[:, None] - centres, axis=2)
    nearest, distance = nearest_of(points, centres.astype(np.float32))
    assert (nearest == every.argmin(axis=1)).all()
    assert distance == pytest.approx(every.min(axis=1), rel=1e-5)
    assert distances(points, centres[3].astype(np.float32)) == pytest.approx(every[:, 3], rel=1e-5)


def test_strata_are_what_a_tile_has_most_of_compared_with_others() -> None:
    counts = np.zeros((4, 255), np.int64)
    counts[0, 0], counts[1, 0], counts[2, 0] = 100, 95, 90
    counts[1, 1], counts[2, 2] = 5, 10
    assert strata(counts).tolist() == [0, 1, 2, -1]


# --- budget, names --------------------------------------------------------------------------------


@relaxed
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), budget=st.integers(1, 500))
def test_a_budget_is_used_and_kept(sizes: list[int], budget: int) -> None:
    limit = fair_limit(sizes, budget)
    total = sum(min(size, limit) for size in sizes)
    assert limit >= 1
    assert total <= max(budget, len(sizes))
    if total < sum(sizes) and budget >= len(sizes):
        assert sum(min(size, limit + 1) for size in sizes) > budget


def test_a_random_choice_of_places_is_in_order_and_repeatable() -> None:
    source = TiledScene("folder/scene.tif", 640, 640, 64)
    every = list(source.sample(1000, seed=0))
    some = list(source.sample(20, seed=0))
    assert (len(every), len(some), len(set(some))) == (100, 20, 20)
    assert some == [place for place in every if place in set(some)]
    assert some == list(TiledScene("elsewhere/scene.tif", 640, 640, 64).sample(20, seed=0))
    assert some != list(source.sample(20, seed=1))


def test_names_mean_themselves() -> None:
    exclusions = Exclusions(names={escape_pattern("tile[1]*"): "a list"})
    assert exclusions.reason("x/tile[1]*.tif") == "its name is in a list"
    assert exclusions.reason("x/tile1.tif") is None
    assert exclusions.reason("/vsizip/x.zip/tile[1]*.tif") is not None


def test_overlap_is_of_pixels() -> None:
    assert overlaps((0, 0, 10, 10), (9, 9, 5, 5))
    assert not overlaps((0, 0, 10, 10), (10, 0, 5, 5))
    assert not overlaps((0, 0, 10, 10), (0, -5, 5, 5))


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "set"
    for text in ("old", "new"):
        with whole_folder(target, replace=True) as place:
            (place / text).write_text(text)
            assert target.exists() == (text == "new")
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(SystemRefusalError), whole_folder(target, replace=True) as place:
        raise SystemRefusalError("full")
    import cdkd_edge.core.files as files

    replace = files.os.replace

    def failing(source: Path, destination: Path) -> None:
        if Path(source).name.endswith(".part") and Path(destination) == target:
            raise OSError("no")
        replace(source, destination)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no"), whole_folder(target, replace=True) as place:
        (place / "newer").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- the sheet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "checks"), [(1, 0), (9, 2), (130, 5)])
def test_sheets_of_any_size(tmp_path: Path, count: int, checks: int) -> None:
    side = thumbnail_side(count + checks)
    tiles = tuple(
        SheetTile(
            shrink_tile(picture(64, 64, seed=index % 7), side), "a name \n that is too long " * 3, "0, 0", index % 8
        )
        for index in range(count + checks)
    )
    sheet = Sheet(
        "A title " * 40,
        ("a line " * 50,),
        tuple(f"kind {kind}" for kind in range(8)),
        (("tiles", "remark " * 40, tiles[:count]), ("to check on", "", tiles[count:])),
    )
    write_sheet(tmp_path / "sheet.png", sheet)
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width < 1700
        pixels = np.asarray(drawn)
    assert (pixels[:, :20] == 255).all(), "nothing leaves the margins"
    assert (pixels[:, -20:] == 255).all()
    assert (pixels[-10:] == 255).all()
