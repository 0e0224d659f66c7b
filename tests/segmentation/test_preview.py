"""The picture: scene and overlay, a legend with areas, a scale bar that is as long as it says, north."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio.transform import Affine, from_origin
from scene_helpers import SCHEMA, names_in, noise, write_raster

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.areas import Areas, class_areas
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.segmentation import preview
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.preview import overlaid, round_length, write_preview

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]

COLORS = {cls.name: cls.shown for cls in SCHEMA.classes}
UTM = {"crs": "EPSG:32640", "transform": from_origin(320_000, 2_780_000, 0.5, 0.5)}

TURNED = Affine.translation(320_000, 2_780_000) * Affine.rotation(33) * Affine.scale(2, -2)


def drawn(folder: Path, scene: np.ndarray, labels: np.ndarray, side: int = 1200, **place: Any) -> np.ndarray:
    """RGB pixels of the preview."""
    write_raster(folder / "scene.tif", scene, **place)
    path = write_raster(folder / "map.tif", labels[None], nodata=NO_LABEL, **place)
    areas = class_areas(path, SCHEMA)
    write_preview(folder / "scene.tif", path, SCHEMA, areas, folder / "look.png", longest_side=side)
    with Image.open(folder / "look.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((pixels == color).all(-1).sum())


def stripes(height: int, width: int, classes: int = 4) -> np.ndarray:
    return np.broadcast_to((np.arange(width) * classes // width).astype(np.uint8), (height, width)).copy()


def test_scene_overlay_and_legend(tmp_path: Path) -> None:
    scene = np.broadcast_to(np.array([90, 120, 60], np.uint8).reshape(3, 1, 1), (3, 300, 400))
    pixels = drawn(tmp_path, scene, stripes(300, 400), **UTM)
    assert count(pixels, (90, 120, 60)) >= 300 * 400, "the scene as it is"
    for name, color in COLORS.items():
        assert (count(pixels, color) > 100) == (name != "water"), "a swatch for every class that occurs, no other"
    expected = overlaid(scene.transpose(1, 2, 0), stripes(300, 400), SCHEMA, line=1)
    middle = expected[150, 50]
    assert count(pixels, tuple(map(int, middle))) > 300 * 90, "a stripe of the overlay"
    assert names_in(tmp_path) == ["look.png", "map.tif", "scene.tif"]


def test_colours_are_recognisable_over_black_and_white() -> None:
    """Nearer to their own class than to any other, whatever lies below them."""
    labels = np.arange(5, dtype=np.uint8).repeat(20)[None].repeat(9, 0)
    colors = np.array(list(COLORS.values()), float)
    for value in (0, 128, 255):
        washed = overlaid(np.full((9, 100, 3), value, np.uint8), labels, SCHEMA).astype(float)
        inner = washed[4, 10::20]
        ground = washed.mean() * 0 + 70 + value * 185 / 255
        tints = (inner - 0.5 * ground) / 0.5
        nearest = ((tints[:, None] - colors[None]) ** 2).sum(-1).argmin(1)
        assert nearest.tolist() == [0, 1, 2, 3, 4]


def test_no_data_shows_the_scene_or_grey(tmp_path: Path) -> None:
    scene = noise(200, 300)
    labels = stripes(200, 300)
    labels[:, :100] = NO_LABEL
    scene[:, :, :50] = 0
    pixels = drawn(tmp_path, scene, labels, **UTM)
    assert count(pixels, (232, 232, 232)) >= 2 * 200 * 50, "black without data, in both pictures, and the legend"
    untouched = scene[:, :, 60:90].transpose(1, 2, 0)
    margin = next(i for i in range(100) if (pixels[i] != 255).any())
    right = margin + 300 + margin
    assert (pixels[margin : margin + 200, right + 60 : right + 90] == untouched).all()


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(1, 1, 1200), (1, 500, 1200), (500, 1, 1200), (100, 200, 50), (900, 300, 300), (5, 7, 1)],
)
def test_any_size(tmp_path: Path, height: int, width: int, side: int) -> None:
    pixels = drawn(tmp_path, noise(height, width), stripes(height, width), side, **UTM)
    scale = min(1, side / max(height, width))
    shown = (max(1, round(height * scale)), max(1, round(width * scale)))
    assert pixels.shape[0] >= shown[0]
    assert pixels.shape[1] >= shown[1]


def test_wide_scenes_are_stacked(tmp_path: Path) -> None:
    wide = drawn(tmp_path, noise(100, 400), stripes(100, 400), **UTM)
    assert wide.shape[1] < 500
    (tmp_path / "tall").mkdir()
    tall = drawn(tmp_path / "tall", noise(400, 100), stripes(400, 100), **UTM)
    assert tall.shape[0] < 650


def test_an_overview_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than twice the size that is shown."""
    seen = []
    original = SceneReader.overview
    monkeypatch.setattr(SceneReader, "overview", lambda self, side: (seen.append(side), original(self, side))[1])
    pixels = drawn(tmp_path, noise(600, 800), stripes(600, 800), 100, **UTM)
    assert seen == [200]
    assert pixels.shape[1] < 300


@pytest.mark.parametrize(
    ("place", "metres"),
    [
        (UTM, 0.5),
        ({"crs": "EPSG:2263", "transform": from_origin(990_000, 200_000, 10, 10)}, 3.048),
        ({"crs": "EPSG:3857", "transform": from_origin(0, 8_399_738, 1, 1)}, 0.5017),
        ({"crs": "EPSG:4326", "transform": from_origin(10, 60, 1e-4, 1e-4)}, 5.580),
        ({"crs": "EPSG:32640", "transform": TURNED}, 2.0),
    ],
    ids=["metres", "feet", "mercator", "degrees", "rotated"],
)  # fmt: skip
def test_the_scale_bar_is_as_long_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any], metres: float
) -> None:
    said: list[float] = []
    monkeypatch.setattr(preview, "round_length", lambda longest: said.append(longest) or 40 * metres)
    pixels = drawn(tmp_path, np.full((3, 300, 400), 200, np.uint8), np.zeros((300, 400), np.uint8), **place)
    assert said[0] / 100 == pytest.approx(metres, rel=1e-3), "a quarter of 400 px"
    ink = (pixels == (28, 32, 38)).all(-1)
    runs = [len(run) for line in ink for run in "".join("x" if dark else " " for dark in line).split()]
    assert 40 <= max(runs) <= 42


def test_without_a_map_grid_there_is_no_bar(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, np.full((3, 300, 400), 200, np.uint8), np.zeros((300, 400), np.uint8))
    inside = pixels[20:300, 440:830]
    assert not (inside == (28, 32, 38)).all(-1).any(), "neither bar nor arrow"


@pytest.mark.parametrize(("degrees", "expected"), [(0, (0, -1)), (90, (1, 0)), (-90, (-1, 0)), (180, (0, 1))])
def test_north(tmp_path: Path, degrees: float, expected: tuple[float, float]) -> None:
    transform = Affine.translation(320_000, 2.78e6) * Affine.rotation(degrees) * Affine.scale(2, -2)
    path = write_raster(tmp_path / "map.tif", np.zeros((1, 4, 4), np.uint8), crs="EPSG:32640", transform=transform)
    with preview.open_scene(path) as dataset:
        assert preview._north(dataset) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("longest", "length"), [(1, 1), (1.9, 1), (2, 2), (4.99, 2), (730, 500), (0.03, 0.02), (1e4, 1e4)]
)
def test_round_lengths(longest: float, length: float) -> None:
    assert round_length(longest) == pytest.approx(length)


@pytest.mark.parametrize(
    ("hectares", "text"),
    [
        (None, ""),
        (0.0123, "0.0123 ha"),
        (0.234, "0.23 ha"),
        (12.34, "12.3 ha"),
        (54_321, "54 321 ha"),
        (3e6, "3 000 000 ha"),
    ],
)
def test_areas_in_words(hectares: float | None, text: str) -> None:
    assert preview._hectares(hectares) == text


def test_shares_are_of_what_has_a_label(tmp_path: Path) -> None:
    labels = stripes(10, 40)
    labels[:, :10] = NO_LABEL
    areas = class_areas(write_raster(tmp_path / "map.tif", labels[None], **UTM), SCHEMA)
    legend = preview._legend(SCHEMA, areas)
    assert [(entry.name, entry.share) for entry in legend] == [
        ("land", "33.3 %"), ("road", "33.3 %"), ("vegetation", "33.3 %"), ("no data", ""),
    ]  # fmt: skip


def test_bands_and_stretch_are_those_of_the_run(tmp_path: Path) -> None:
    scene = np.zeros((5, 40, 60), np.uint16)
    scene[4], scene[0], scene[1] = 250, 500, 1000
    write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK")
    path = write_raster(tmp_path / "map.tif", stripes(40, 60)[None], nodata=NO_LABEL)
    options = SegmentOptions(bands=(5, 1, 2), stretch=Stretch(0, 1000, percentiles=False))
    areas = class_areas(path, SCHEMA)
    write_preview(tmp_path / "scene.tif", path, SCHEMA, areas, tmp_path / "look.png", options)
    with Image.open(tmp_path / "look.png") as picture:
        assert count(np.asarray(picture), (64, 128, 255)) >= 40 * 60


@pytest.mark.parametrize("absent", ["scene.tif", "map.tif"])
def test_nothing_is_left_when_it_cannot_be_drawn(tmp_path: Path, absent: str) -> None:
    write_raster(tmp_path / "scene.tif", noise(40, 40))
    path = write_raster(tmp_path / "map.tif", stripes(40, 40)[None])
    areas: Areas = class_areas(path, SCHEMA)
    (tmp_path / absent).unlink()
    before = names_in(tmp_path)
    with pytest.raises(SceneError, match=absent):
        write_preview(tmp_path / "scene.tif", path, SCHEMA, areas, tmp_path / "look.png")
    assert names_in(tmp_path) == before
