"""The picture to look at: opens, has a sensible size, shows scene, labels and the colours of its legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_helpers import SCHEMA, FakeEngine, names_in, noise, write_raster

from cdkd_edge.core.errors import SceneError
from cdkd_edge.raster.read import Stretch
from cdkd_edge.segment.options import SegmentOptions, SegmentResult
from cdkd_edge.segment.pipeline import segment_scene
from cdkd_edge.segment.quicklook import write_quicklook

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

COLORS = {cls.name: cls.color for cls in SCHEMA.classes}


def striped(height: int, width: int) -> np.ndarray:
    """Four equal stripes of red 0, 64, 128 and 192: labels 0, 1, 2, 3."""
    scene = np.zeros((3, height, width), np.uint8)
    scene[0] = (np.arange(width) * 4 // width * 64).astype(np.uint8)
    scene[1], scene[2] = 17, 33
    return scene


def segmented(folder: Path, scene: np.ndarray, **profile: object) -> tuple[Path, SegmentResult]:
    path = write_raster(folder / "scene.tif", scene, **profile)
    return path, segment_scene(FakeEngine(), path, folder / "map.tif")


def colors_in(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        colors, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, color)): int(count) for color, count in zip(colors, counts, strict=True)}


def test_scene_labels_and_legend(tmp_path: Path) -> None:
    path, result = segmented(tmp_path, striped(100, 200))
    write_quicklook(path, result, SCHEMA, tmp_path / "look.png")
    found = colors_in(tmp_path / "look.png")
    for name in ("building", "land", "road", "vegetation"):
        assert found[COLORS[name]] > 100 * 50, "a stripe of the label map and a swatch of the legend"
    assert COLORS["water"] not in found, "a class that does not occur is not in the legend"
    for red in (0, 64, 128, 192):
        assert found[red, 17, 33] >= 100 * 50, "a stripe of the scene"
    assert names_in(tmp_path) == ["look.png", "map.qml", "map.tif", "map.tif.aux.xml", "scene.tif"]


@pytest.mark.parametrize(
    ("height", "width", "longest", "shown"),
    [(100, 200, 900, (100, 200)), (100, 200, 50, (25, 50)), (300, 100, 150, (150, 50)), (1, 1, 900, (1, 1))],
)
def test_size(tmp_path: Path, height: int, width: int, longest: int, shown: tuple[int, int]) -> None:
    path, result = segmented(tmp_path, striped(height, width))
    write_quicklook(path, result, SCHEMA, tmp_path / "look.png", longest_side=longest)
    with Image.open(tmp_path / "look.png") as picture:
        assert 2 * shown[1] <= picture.width <= 2 * shown[1] + 100
        assert shown[0] + 20 <= picture.height <= shown[0] + 300, "the picture and its legend"


def test_pixels_without_data_are_shown_as_such(tmp_path: Path) -> None:
    scene = striped(100, 200)
    scene[:, :50] = 0
    path, result = segmented(tmp_path, scene, nodata=0)
    write_quicklook(path, result, SCHEMA, tmp_path / "look.png")
    assert colors_in(tmp_path / "look.png")[235, 235, 235] >= 50 * 200


def test_a_scene_without_any_label(tmp_path: Path) -> None:
    path, result = segmented(tmp_path, np.zeros((3, 40, 40), np.uint8), nodata=0)
    write_quicklook(path, result, SCHEMA, tmp_path / "look.png")
    assert not set(COLORS.values()) & set(colors_in(tmp_path / "look.png"))


def test_bands_and_stretch_are_those_of_the_run(tmp_path: Path) -> None:
    scene = np.zeros((5, 40, 60), np.uint16)
    scene[4], scene[0], scene[1] = 250, 500, 1000
    path = write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK")
    options = SegmentOptions(bands=(5, 1, 2), stretch=Stretch(0, 1000, percentiles=False))
    result = segment_scene(FakeEngine(), path, tmp_path / "map.tif", options)
    write_quicklook(path, result, SCHEMA, tmp_path / "look.png", options)
    assert colors_in(tmp_path / "look.png")[64, 128, 255] >= 40 * 60


def test_nothing_is_left_when_it_cannot_be_drawn(tmp_path: Path) -> None:
    path, result = segmented(tmp_path, noise(40, 40))
    (tmp_path / "map.tif").unlink()
    with pytest.raises(SceneError, match=r"map\.tif"):
        write_quicklook(path, result, SCHEMA, tmp_path / "look.png")
    assert "look.png" not in "".join(names_in(tmp_path))
