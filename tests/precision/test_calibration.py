"""Making calibration sets: repeatable, covering, and nothing of an evaluation set in them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from calibration_helpers import TILE, archive, contents, crop, make, opened, picture
from PIL import Image
from scene_helpers import names_in, sparse_raster, write_raster

from cdkd_edge.core.errors import DatasetError, ManifestError, SceneError, UsageError
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.graph.tiles import CalibrationSet
from cdkd_edge.precision import calibrate as module
from cdkd_edge.precision import describe_tiles as descriptors
from cdkd_edge.precision.calibrate import calibrate, default_folder, default_tile
from cdkd_edge.precision.scan_scenes import CalibrateOptions
from cdkd_edge.precision.write_set import shrink_tile, thumbnail_side
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.segmentation.options import SegmentOptions

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four scenes of 4 x 3 tiles. Not to be changed."""
    return archive(tmp_path_factory.mktemp("scenes"))


def windows(result: Any, role: str) -> list[tuple[str, int, int]]:
    return [(tile.scene, tile.x, tile.y) for tile in result.manifest.of_role(role)]


# --- the same again -------------------------------------------------------------------------------


def test_the_same_again_to_the_byte(scenes: list[str], tmp_path: Path) -> None:
    make(scenes, tmp_path / "one" / "name")
    shuffled = scenes[:]
    random.Random(1).shuffle(shuffled)
    make([*shuffled, scenes[2]], tmp_path / "two" / "name")
    assert contents(tmp_path / "one" / "name") == contents(tmp_path / "two" / "name")
    assert names_in(tmp_path / "one" / "name")[-1] == "set.json"


def test_the_number_of_threads_does_not_matter(scenes: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[3])}
    for threads in ("1", "2"):
        arguments = ["--tile", str(TILE), "--count", "12", "-o", str(tmp_path / threads / "set"), *scenes]
        subprocess.run(
            [sys.executable, "-m", "cdkd_edge", "calibrate", *arguments],
            env=environment | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
        )
    assert contents(tmp_path / "1" / "set") == contents(tmp_path / "2" / "set")


def test_another_seed_is_another_choice(scenes: list[str], tmp_path: Path) -> None:
    sets = {frozenset(windows(make(scenes, tmp_path / str(seed), seed=seed), "calibration")) for seed in range(4)}
    assert len(sets) > 1


# --- what is chosen -------------------------------------------------------------------------------


def test_check_tiles_share_no_pixel_with_calibration_tiles(tmp_path: Path) -> None:
    paths = archive(tmp_path / "scenes", 2, 200, 300)  # tiles overlap: 200 and 300 are no multiples of 64
    result = make(paths, tmp_path / "set", count=10, check=6)
    painted = {path: np.zeros((200, 300), bool) for path in paths}
    for tile in result.manifest.of_role("calibration"):
        painted[tile.scene][tile.y : tile.y + TILE, tile.x : tile.x + TILE] = True
    checks = result.manifest.of_role("check")
    assert len(checks) >= 2
    for tile in checks:
        assert not painted[tile.scene][tile.y : tile.y + TILE, tile.x : tile.x + TILE].any()


def test_a_rare_population_is_covered(tmp_path: Path) -> None:
    """One tile in fifty is bright and rough; random choices of eight mostly miss it."""
    common = picture(64 * 7, 64 * 14, contrast=10, base=90, grain=3)
    rare = picture(64, 64 * 2, seed=1, contrast=60, base=200, grain=30)
    paths = [str(write_raster(tmp_path / "common.tif", common)), str(write_raster(tmp_path / "rare.tif", rare))]
    result = make(paths, tmp_path / "set", count=8, check=0)
    assert sum(tile.scene == paths[1] for tile in result.manifest.tiles) >= 1
    generator = np.random.default_rng(0)
    drawn = [(generator.choice(100, 8, replace=False) >= 98).any() for _ in range(500)]
    assert np.mean(drawn) < 0.25
    coverage = result.manifest.method["coverage"]
    assert coverage["largest_distance"] < 0.7 * coverage["random_largest_distance"]
    assert sum(tile.scene == paths[0] for tile in result.manifest.tiles) >= 4  # and the common one is, too


def test_records_say_what_tiles_stand_for(scenes: list[str], tmp_path: Path) -> None:
    manifest = make(scenes, tmp_path / "set").manifest
    calibration = manifest.of_role("calibration")
    assert sum(tile.represents for tile in calibration) == manifest.counts["candidates"] == 48
    assert {tile.why for tile in calibration} == {"extreme", "typical"}
    assert sum(tile.why == "extreme" for tile in calibration) == 2
    assert [tile.cluster for tile in calibration] == sorted(tile.cluster for tile in calibration)
    for record in manifest.scenes:
        assert record.bytes == Path(record.path).stat().st_size


def test_fewer_candidates_than_asked_for(scenes: list[str], tmp_path: Path) -> None:
    result = make(scenes[:1], tmp_path / "set", count=64, check=8)
    assert (len(result.manifest.of_role("calibration")), len(result.manifest.of_role("check"))) == (11, 1)
    assert "there are 12 candidates; 64 tiles for calibration and 8" in result.manifest.notes[0]
    assert len(set(windows(result, "calibration") + windows(result, "check"))) == 12


def test_a_single_tile(tmp_path: Path) -> None:
    path = str(write_raster(tmp_path / "one.tif", picture(TILE, TILE)))
    result = make([path], tmp_path / "set")
    assert len(result.manifest.tiles) == 1
    assert any("tiles to check on: 0 instead of 2" in note for note in result.manifest.notes)
    (tile,) = opened(result).tiles()
    assert (tile == picture(TILE, TILE)).all()


def test_tiles_of_small_scenes_are_what_segment_would_see(tmp_path: Path) -> None:
    paths = [str(write_raster(tmp_path / f"{index}.tif", picture(40, 100, seed=index))) for index in range(3)]
    result = make(paths, tmp_path / "set", count=3, check=1)
    assert any("completed by reflection" in note for note in result.manifest.notes)
    for record, tile in zip(result.manifest.of_role("calibration"), opened(result).tiles(), strict=True):
        assert record.y == -12
        with rasterio.open(record.scene) as dataset:
            pixels = dataset.read()
        padded = np.pad(pixels, ((0, 0), (12, 12), (0, 0)), mode="reflect")
        assert (tile == padded[:, :, record.x : record.x + TILE]).all()


def test_options_are_checked() -> None:
    for wrong in ({"tile": 31}, {"count": 0}, {"check": -1}, {"candidates": 0}, {"max_nodata": 1.1}):
        with pytest.raises(UsageError):
            CalibrateOptions(**wrong)


# --- what is passed over --------------------------------------------------------------------------


def test_near_duplicates_count_once(scenes: list[str], tmp_path: Path) -> None:
    with rasterio.open(scenes[0]) as dataset:
        pixels = dataset.read()
    copy = write_raster(tmp_path / "copy.tif", pixels, compress="deflate")
    again = tmp_path / "again.jpg"
    Image.fromarray(pixels.transpose(1, 2, 0)).save(again, quality=80, subsampling=0)
    result = make([*scenes, str(copy), str(again)], tmp_path / "set", count=60, check=6)
    assert result.manifest.counts["near_duplicate"] == 24
    assert result.manifest.counts["candidates"] == 48
    assert len({tile.sha256 for tile in result.manifest.tiles}) == len(result.manifest.tiles)


def test_many_near_duplicates_are_found_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0, 255, (70, 192))
    thumbnails = np.concatenate([base, base + generator.normal(0, 0.3, base.shape)])[generator.permutation(140)]
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(descriptors, "_CHUNK", chunk)
        assert descriptors.find_duplicates(thumbnails.astype(np.float32)).sum() == 70


def test_nodata_and_blank_tiles(tmp_path: Path) -> None:
    pixels = picture(TILE, TILE * 6)
    pixels[:, :, :TILE] = 0  # nodata
    pixels[:, :, TILE : TILE + 4] = 0  # 6 % of the second tile
    pixels[:, :, 2 * TILE : 2 * TILE + 10] = 0  # 16 % of the third
    pixels[:, :, 3 * TILE : 4 * TILE] = 77
    pixels[:, :5, 4 * TILE : 5 * TILE] = 255
    pixels[:, 5:, 4 * TILE : 5 * TILE] = 254  # next to nothing
    path = str(write_raster(tmp_path / "scene.tif", pixels, nodata=0))
    result = make([path], tmp_path / "set", check=0)
    counts = result.manifest.counts
    assert (counts["nodata"], counts["blank"], counts["candidates"]) == (2, 2, 2)
    assert sorted(tile.x for tile in result.manifest.tiles) == [TILE, 5 * TILE]
    assert make([path], tmp_path / "more", check=0, max_nodata=0.2).manifest.counts["candidates"] == 3


def test_border_without_a_nodata_value(tmp_path: Path) -> None:
    pixels = picture(TILE, TILE * 2)
    pixels[:, 3:, TILE:] = 0
    path = str(write_raster(tmp_path / "scene.tif", pixels))
    assert make([path], tmp_path / "set", check=0).manifest.counts["blank"] == 1


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    path = str(write_raster(tmp_path / "flat.tif", np.full((3, TILE, 2 * TILE), 9, np.uint8)))
    with pytest.raises(DatasetError, match="none of 2 tiles can be used: 2 blank"):
        make([path], tmp_path / "set")
    empty = str(write_raster(tmp_path / "empty.tif", np.zeros((3, TILE, TILE), np.uint8), nodata=0))
    with pytest.raises(DatasetError, match="1 nodata") as caught:
        make([empty], tmp_path / "set")
    assert "--max-nodata" in str(caught.value.hint)
    assert names_in(tmp_path) == ["empty.tif", "flat.tif"]


# --- evaluation sets ------------------------------------------------------------------------------


def test_evaluation_scenes_stay_out_by_name(scenes: list[str], tmp_path: Path) -> None:
    listing = tmp_path / "val.txt"
    for line in ("scene1", "scene1.tif", "elsewhere/scene1.jpg", "scene1*", "# none\n scene1  # this one"):
        listing.write_text(f"{line}\n\n")
        result = make(scenes, tmp_path / "set", exclude=(str(listing),), overwrite=True)
        assert {Path(tile.scene).stem for tile in result.manifest.tiles} <= {"scene0", "scene2", "scene3"}
        assert result.manifest.counts["scenes_excluded"] == 1
        assert "scene1.tif (its name is in" in result.manifest.notes[0]
    listing.write_text("scene\n")
    assert make(scenes, tmp_path / "all", exclude=(str(listing),)).manifest.counts["scenes_excluded"] == 0


def test_evaluation_scenes_stay_out_by_content(scenes: list[str], tmp_path: Path) -> None:
    (tmp_path / "evaluation" / "images").mkdir(parents=True)
    (tmp_path / "evaluation" / "masks").mkdir()
    shutil.copy(scenes[1], tmp_path / "evaluation" / "images" / "renamed.tif")
    write_raster(tmp_path / "evaluation" / "masks" / "renamed.tif", np.zeros((1, 9, 9), np.uint8))
    result = make(scenes, tmp_path / "set", exclude=(str(tmp_path / "evaluation"),))
    assert "it is the same file as" in result.manifest.notes[0]
    assert scenes[1] not in {tile.scene for tile in result.manifest.tiles}


def test_evaluation_scenes_stay_out_when_stored_anew(scenes: list[str], tmp_path: Path) -> None:
    """Neither name nor file is known: the tiles are."""
    with rasterio.open(scenes[1]) as dataset:
        Image.fromarray(dataset.read().transpose(1, 2, 0)).save(tmp_path / "other.jpg", quality=85, subsampling=0)
    result = make(scenes, tmp_path / "set", exclude=(str(tmp_path / "other.jpg"),), count=30)
    assert result.manifest.counts["excluded"] == 12
    assert scenes[1] not in {tile.scene for tile in result.manifest.tiles}


def test_tiles_of_another_set_stay_out(scenes: list[str], tmp_path: Path) -> None:
    one = make(scenes, tmp_path / "one")
    for name in ("one", "one/set.json"):
        two = make(scenes, tmp_path / "two", exclude=(str(tmp_path / name),), count=38, check=0, overwrite=True)
        taken = set(windows(one, "calibration") + windows(one, "check"))
        assert not taken & set(windows(two, "calibration"))
        assert two.manifest.counts["excluded"] == len(taken) == 10
    renamed = shutil.copy(one.manifest.tiles[0].scene, tmp_path / "renamed.tif")
    mine = [tile for tile in one.manifest.tiles if tile.scene == one.manifest.tiles[0].scene]
    three = make([str(renamed)], tmp_path / "three", exclude=(str(tmp_path / "one"),))
    assert three.manifest.counts["excluded"] == len(mine)


def test_windows_of_a_list_stay_out(scenes: list[str], tmp_path: Path) -> None:
    listing = tmp_path / "val.txt"
    listing.write_text("scene0.tif 60 0 10 10\nscene3 0, 0, 256, 192\n")
    result = make(scenes, tmp_path / "set", exclude=(str(listing),), count=40)
    assert result.manifest.counts["excluded"] == 2 + 12
    places = windows(result, "calibration") + windows(result, "check")
    assert not {(scenes[0], 0, 0), (scenes[0], 64, 0)} & set(places)
    assert scenes[3] not in {scene for scene, _, _ in places}


def test_nothing_left_by_exclusion(scenes: list[str], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing is left to calibrate on: 4 of 4 scenes are of an evaluation set"):
        make(scenes, tmp_path / "set", exclude=(str(Path(scenes[0]).parent),))
    assert names_in(tmp_path) == []


def test_evaluation_sets_that_cannot_be_read(scenes: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "set.json").write_text('{"kind": "calibration-set", "set_version": 9}')
    for name, kind in (
        ("nowhere", DatasetError),
        ("empty", DatasetError),
        ("none.txt", DatasetError),
        ("binary.txt", DatasetError),
        ("*.tif", SceneError),
        ("broken", ManifestError),
    ):
        with pytest.raises(kind):
            make(scenes, tmp_path / "set", exclude=(str(tmp_path / name),))
        assert not (tmp_path / "set").exists()


# --- scenes ---------------------------------------------------------------------------------------


def test_folders_and_patterns(scenes: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(Path(scenes[0]).parent, folder)
    (folder / ".hidden.tif").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    write_raster(folder / "scene0_labels.tif", np.zeros((1, 9, 9), np.uint8))
    for arguments in ([str(folder)], [str(folder / "scene*.tif")], [str(folder), str(folder / "scene1.tif")]):
        result = make(arguments, tmp_path / "set", overwrite=True)
        assert result.manifest.counts["scenes"] == 4
    with pytest.raises(SceneError, match="holds no raster") as caught:
        make([str(tmp_path)], tmp_path / "set2")
    assert str(folder) in str(caught.value.hint)
    (tmp_path / "above" / "below").mkdir(parents=True)
    with pytest.raises(SceneError, match="holds no raster") as caught:
        make([str(tmp_path / "above")], tmp_path / "set2")
    assert f"'{tmp_path}/above/**/*.tif'" in str(caught.value.hint)
    for wrong in ("nowhere.tif", "nowhere*.tif", str(folder / "notes.txt")):
        with pytest.raises(SceneError):
            make([wrong], tmp_path / "set2")


def test_a_scene_with_brackets_in_its_name(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene [1] ü 中.tif", picture(TILE, 2 * TILE))
    result = make([str(path)], tmp_path / "set é", check=0)
    assert {tile.scene for tile in opened(result).manifest.tiles} == {str(path)}
    listing = tmp_path / "list.txt"
    listing.write_text("scene [[]1] *\n", encoding="utf-8")
    with pytest.raises(DatasetError):
        make([str(path)], tmp_path / "other", exclude=(str(listing),))
    with pytest.raises(DatasetError):
        make([str(path)], tmp_path / "other", exclude=(str(path),))


def test_a_broken_scene_is_named(scenes: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0nothing")
    torn = tmp_path / "torn.tif"
    data = Path(scenes[0]).read_bytes()
    torn.write_bytes(data[: len(data) // 2])
    for path in (broken, torn):
        with pytest.raises(SceneError, match=path.name):
            make([*scenes, str(path)], tmp_path / "set")
        assert not (tmp_path / "set").exists()
    result = make([*scenes, str(broken), str(torn)], tmp_path / "set", skip_broken=True)
    assert result.manifest.counts["scenes_broken"] == 2
    assert sum(note.startswith("skipped: ") for note in result.manifest.notes) == 2
    assert {tile.scene for tile in result.manifest.tiles} <= set(scenes)
    for only in (broken, torn):
        with pytest.raises(SceneError, match=f"no scene can be read.*{only.name}"):
            make([str(only)], tmp_path / "none", skip_broken=True)


def test_deep_scenes_are_stretched_as_segment_does(tmp_path: Path) -> None:
    pixels = picture(3 * TILE, 3 * TILE).astype(np.uint16) * 40 + 7
    path = str(write_raster(tmp_path / "deep.tif", pixels))
    with pytest.raises(SceneError, match="uint16") as caught:
        make([path], tmp_path / "set")
    assert "--stretch" in str(caught.value.hint)
    stretch = Stretch(2, 98, percentiles=True)
    result = make([path], tmp_path / "set", reading=SegmentOptions(stretch=stretch))
    reader = SceneReader(path, stretch=stretch)
    assert reader.limits is not None
    assert result.manifest.scenes[0].stretch == reader.limits.tolist()
    record, tile = result.manifest.tiles[0], next(iter(opened(result).tiles()))
    low, high = reader.limits[:, :1, None], reader.limits[:, 1:, None]
    expected = np.clip(np.rint((crop(path, record).astype(np.float32) - low) * (255 / (high - low))), 0, 255)
    assert (tile == expected).all()
    reader.close()


def test_four_bands(tmp_path: Path) -> None:
    pixels = picture(2 * TILE, 3 * TILE)
    four = np.concatenate([pixels, pixels[:1]])
    path = str(write_raster(tmp_path / "bgrn.tif", four, photometric="MINISBLACK", alpha="NO"))
    result = make([path], tmp_path / "set", check=0)
    assert any("B, G, R, NIR" in note for note in result.manifest.notes)
    record = result.manifest.tiles[0]
    assert (next(iter(opened(result).tiles())) == crop(path, record)[[2, 1, 0]]).all()
    chosen = make([path], tmp_path / "bands", check=0, reading=SegmentOptions(bands=[4, 2, 1]))
    record = chosen.manifest.tiles[0]
    assert (next(iter(opened(chosen).tiles())) == crop(path, record)[[3, 1, 0]]).all()


def test_a_huge_scene_takes_little_memory_and_time(tmp_path: Path) -> None:
    path = sparse_raster(tmp_path / "huge.tif", 100_000, 100_000)
    with rasterio.open(path, "r+") as dataset:
        for index in range(4):
            dataset.write(picture(512, 512, seed=index), window=rasterio.windows.Window(512 * index, 0, 512, 512))
    tracemalloc.start()
    with pytest.raises(
        DatasetError, match="none of 50 tiles"
    ):  # fifty of 38000 tiles: none of those that show anything
        make([str(path)], tmp_path / "set", tile=512, candidates=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_the_budget_is_shared(tmp_path: Path) -> None:
    small = [str(write_raster(tmp_path / f"small{i}.tif", picture(TILE, 2 * TILE, seed=i))) for i in range(3)]
    large = [str(write_raster(tmp_path / f"large{i}.tif", picture(8 * TILE, 8 * TILE, seed=9 + i))) for i in range(2)]
    result = make([*small, *large], tmp_path / "set", candidates=30, count=20, check=0)
    assert result.manifest.counts["tiles_seen"] == 6 + 2 * 12
    more = make([*small, *large], tmp_path / "more", candidates=10_000, check=0)
    assert more.manifest.counts["tiles_seen"] == 6 + 2 * 64


def test_a_scene_that_changes_meanwhile(scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changing = str(shutil.copy(scenes[0], tmp_path / "changing.tif"))
    write_set = module.write_set

    def late(*arguments: Any) -> Any:
        write_raster(Path(changing), picture(192, 256, seed=77))
        return write_set(*arguments)

    monkeypatch.setattr(module, "write_set", late)
    with pytest.raises(SceneError, match=r"changing\.tif changed while it was read"):
        make([changing], tmp_path / "set")
    assert names_in(tmp_path) == ["changing.tif"]


# --- label maps -----------------------------------------------------------------------------------


def label_map(folder: Path, scene: str, labels: Any, classes: str = "land, road, water") -> None:
    folder.mkdir(exist_ok=True)
    path = write_raster(folder / f"{Path(scene).stem}_labels.tif", labels[None].astype(np.uint8), nodata=255)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(CLASSES=classes)


def test_every_class_gets_its_part(scenes: list[str], tmp_path: Path) -> None:
    for index, scene in enumerate(scenes):
        labels = np.zeros((192, 256))
        if index == 0:
            labels[:TILE, : 2 * TILE : 8] = 1  # narrow roads in two tiles of 48
        if index == 1:
            labels[:TILE] = 2
            labels[TILE : 2 * TILE, :TILE] = 255
        label_map(tmp_path / "maps", scene, labels)
    result = make(scenes, tmp_path / "set", labels=tmp_path / "maps", count=9, check=0)
    strata = [tile.stratum for tile in result.manifest.tiles]
    assert Counter(strata) == {"land": 3, "road": 2, "water": 3, "unlabelled": 1}
    assert result.manifest.method["stratified_by_class"]


def test_scenes_without_label_map_are_noted(scenes: list[str], tmp_path: Path) -> None:
    label_map(tmp_path / "maps", scenes[0], np.zeros((192, 256)))
    result = make(scenes, tmp_path / "set", labels=tmp_path / "maps")
    assert any("3 scenes have no label map" in note for note in result.manifest.notes)
    assert {tile.stratum for tile in result.manifest.tiles} == {"land", "unlabelled"}


def test_label_maps_that_do_not_fit(scenes: list[str], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        make(scenes, tmp_path / "set", labels=tmp_path / "maps")
    (tmp_path / "maps").mkdir()
    with pytest.raises(DatasetError, match="holds no label map"):
        make(scenes, tmp_path / "set", labels=tmp_path / "maps")
    label_map(tmp_path / "maps", scenes[0], np.zeros((192, 255)))
    with pytest.raises(DatasetError, match="is 255 x 192 px, its scene 256 x 192"):
        make(scenes, tmp_path / "set", labels=tmp_path / "maps")
    label_map(tmp_path / "maps", scenes[0], np.zeros((192, 256)))
    with rasterio.open(tmp_path / "maps" / f"{Path(scenes[0]).stem}_labels.tif", "r+") as dataset:
        dataset.transform = rasterio.Affine(1, 0, 30, 0, -1, 0)
    placed = tmp_path / "placed" / Path(scenes[0]).name
    placed.parent.mkdir()
    with rasterio.open(scenes[0]) as source:
        write_raster(placed, source.read(), transform=rasterio.Affine(1, 0, 0, 0, -1, 0))
    with pytest.raises(DatasetError, match="is not where its image is: 30 px to the right"):
        make([str(placed)], tmp_path / "set", labels=tmp_path / "maps")
    label_map(tmp_path / "maps", scenes[0], np.zeros((192, 256)))
    label_map(tmp_path / "maps", scenes[1], np.zeros((192, 256)), classes="sea, ice")
    with pytest.raises(DatasetError, match="has the classes sea, ice"):
        make(scenes, tmp_path / "set", labels=tmp_path / "maps")
    (tmp_path / "maps" / "scene0_labels.tif").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read"):
        make(scenes, tmp_path / "set", labels=tmp_path / "maps")


# --- where it goes --------------------------------------------------------------------------------


def test_only_a_set_is_replaced(scenes: list[str], tmp_path: Path) -> None:
    before = contents(make(scenes, tmp_path / "set").folder)
    with pytest.raises(UsageError, match="exists"):
        make(scenes, tmp_path / "set", seed=1)
    assert contents(tmp_path / "set") == before
    make(scenes, tmp_path / "set", seed=1, count=3, overwrite=True)
    assert len(CalibrationSet.load(tmp_path / "set").manifest.tiles) == 5
    assert not (tmp_path / "set" / "calibration" / "0005.png").exists()
    (tmp_path / "other").mkdir()
    make(scenes, tmp_path / "other")  # an empty folder is as good as none
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(UsageError):
            make(scenes, tmp_path / name, overwrite=True)
    assert names_in(tmp_path / "mine") == ["thesis.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"set", "other", "mine", "file"}


def test_folders_that_cannot_be_meant(scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="current folder"):
        make(scenes, Path())
    make(scenes, Path("set"))
    with pytest.raises(UsageError, match="lie in set"):
        make([str(Path("set") / "calibration")], Path("set"), overwrite=True, tile=32)
    (tmp_path / "link").symlink_to("set")
    make(scenes, Path("link"), overwrite=True, count=3)
    assert (tmp_path / "link").is_symlink()
    assert len(CalibrationSet.load(tmp_path / "set").manifest.tiles) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"set", "link"}


def test_links_in_a_loop(scenes: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.tif").symlink_to("y.tif")
    (tmp_path / "y.tif").symlink_to("x.tif")
    with pytest.raises(SceneError, match=r"x\.tif does not exist"):
        make([*scenes, str(tmp_path / "x.tif")], tmp_path / "set")
    with pytest.raises(SceneError, match=r"[xy]\.tif does not exist"):
        make([str(tmp_path)], tmp_path / "set")
    with pytest.raises(OSError, match="File exists"):
        make(scenes, tmp_path / "x.tif")


def test_a_failure_leaves_the_old_set(scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(make(scenes, tmp_path / "set").folder)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_set", fail)
    for name, options in (("set", {"overwrite": True}), ("new", {})):
        with pytest.raises(KeyboardInterrupt):
            make(scenes, tmp_path / name, **options)
    assert contents(tmp_path / "set") == before
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    scene = write_raster(tmp_path / "scene.tif", picture(64 * 40, 64 * 40))
    process = subprocess.Popen(
        [sys.executable, "-m", "cdkd_edge", "calibrate", str(scene), "--tile", "32", "-o", str(tmp_path / "set")],
        env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob(".set.*.part")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert names_in(tmp_path) == ["scene.tif"]


def test_defaults_of_a_workspace(tmp_path: Path, small_graph: Path) -> None:
    space = Workspace(tmp_path)
    assert default_tile(space) == 1024
    (tmp_path / "export").mkdir()
    for suffix in (".onnx", ".json"):
        shutil.copy(small_graph.with_suffix(suffix), tmp_path / "export")
    assert default_tile(space) == 64
    (tmp_path / "images").mkdir()
    names = {
        ("a/b/scene 1.tif",): "scene_1",
        (str(tmp_path / "images"),): "images",
        ("a/x.tif", "a/y.tif"): "a",
        ("a/x.tif", "b/y.tif"): "set",
    }
    for arguments, name in names.items():
        assert default_folder(space, arguments) == tmp_path / "engines" / "calibration" / name


def test_a_folder_that_cannot_be_made(scenes: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory") as caught:
        make(scenes, tmp_path / "file" / "set")
    assert caught.value.filename == str(tmp_path / "file" / "set")


# --- the command ----------------------------------------------------------------------------------


def test_the_command(scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from commands import assert_answer, run

    monkeypatch.chdir(tmp_path)
    common = ("calibrate", *scenes, "--tile", TILE, "--count", 8, "--check", 2)
    result = run(*common, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert "note" not in result.stderr
    with monkeypatch.context() as patch:
        patch.setattr("cdkd_edge.precision.calibrate.tile_sides", lambda space: {512})
        assert f"tiles of 512 px, not {TILE} px" in run(*common, "-o", "out2").stderr
    assert "8 for calibration, 2 to check on" in result.stdout
    assert str(Path("out") / "contact-sheet.png") in result.stdout
    document = json.loads(run(*common, "--json").stdout)
    assert document["path"] == str(Path("engines") / "calibration" / Path(scenes[0]).parent.name)
    stored = json.loads((tmp_path / document["path"] / "set.json").read_text())
    assert document["manifest"] == {key: value for key, value in stored.items() if key != "kind"}
    assert_answer(run(*common, "-o", "out"), 2, "exists — keep it, or replace it with --overwrite")
    assert_answer(run("calibrate", "nowhere.tif"), 10, "does not exist")
    assert_answer(run(*common, "-o", "x", "--exclude", Path(scenes[0]).parent), 13, "nothing is left")


def test_the_contact_sheet_shows_every_tile(scenes: list[str], tmp_path: Path) -> None:
    result = make(scenes, tmp_path / "set", count=20, check=3)
    with Image.open(result.folder / "contact-sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    corners = []
    for tile in (*opened(result).tiles(), *opened(result).tiles("check")):
        shown = shrink_tile(tile, thumbnail_side(23))
        places = np.argwhere((pixels[:-160, :-160] == shown[0, 0]).all(axis=2)).tolist()
        corners += [(top, left) for top, left in places if (pixels[top : top + 160, left : left + 160] == shown).all()]
    assert len(set(corners)) == 23
    assert corners == sorted(corners), "in the order of their files, those to check on below the others"


def test_calibrate_leaves_the_scenes_alone(scenes: list[str], tmp_path: Path) -> None:
    before = contents(Path(scenes[0]).parent)
    calibrate(scenes, tmp_path / "set", CalibrateOptions(tile=TILE, count=4, check=1))
    assert contents(Path(scenes[0]).parent) == before
