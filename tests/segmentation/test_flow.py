"""How scenes are read: every block once, in any layout, by any number of threads; remote files like local ones."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_helpers import (
    FakeEngine,
    ProbabilityEngine,
    names_in,
    noise,
    pipeline_threads,
    read_labels,
    red_labels,
    relaxed,
    write_raster,
)

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation import plan as plan_module
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.plan import CellLayout, Cells, TilePlan

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 64


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert pipeline_threads() == []


LAYOUTS = {
    "blocks": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
    "strips": {},
    "strips of 7": {"blockysize": 7, "compress": "lzw"},
    "bands apart": {"interleave": "band", "tiled": True, "blockxsize": 32, "blockysize": 48},
}


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pixel_is_read_once(tmp_path: Path, layout: str, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = noise(300, 410)
    path = write_raster(tmp_path / "scene.tif", scene, **LAYOUTS[layout])
    monkeypatch.setattr(plan_module, "CELL_ROWS", 64)
    monkeypatch.setattr(plan_module, "CELL_COLUMNS", 128)
    monkeypatch.setattr(plan_module, "_CELL_PIXELS", 64 * 128)
    seen = np.zeros((300, 410), int)
    lock, read_window = threading.Lock(), SceneReader.read_window

    def watched(self: SceneReader, top: int, left: int, height: int, width: int, **how: Any) -> Any:
        with lock:
            seen[top : top + height, left : left + width] += 1
        return read_window(self, top, left, height, width, **how)

    monkeypatch.setattr(SceneReader, "read_window", watched)
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(readers=readers))
    assert (seen == 1).all()
    assert (read_labels(tmp_path / "map.tif") == red_labels(scene[None])[0]).all()


@settings(relaxed, max_examples=30)
@given(
    height=st.integers(1, 220),
    width=st.integers(1, 260),
    cell_rows=st.integers(1, 100),
    cell_columns=st.integers(1, 300),
    panel=st.integers(1, 300),
    overlap=st.integers(0, TILE // 2),
    readers=st.integers(1, 4),
    batch=st.integers(1, 3),
    slots=st.integers(1, 3),
    hann=st.booleans(),
)
def test_nothing_but_the_scene_decides_about_the_map(
    tmp_path_factory: pytest.TempPathFactory,
    height: int,
    width: int,
    cell_rows: int,
    cell_columns: int,
    panel: int,
    overlap: int,
    readers: int,
    batch: int,
    slots: int,
    hann: bool,
) -> None:
    """Sizes of cells and panels, threads, batches, slots: one pixel, one label, and always the same."""
    folder = tmp_path_factory.mktemp("flow")
    scene = noise(height, width, seed=width)
    path = write_raster(folder / "scene.tif", scene, tiled=True, blockxsize=16, blockysize=16)
    options = SegmentOptions(readers=readers, overlap=overlap, merge="hann" if hann else "crop")
    engine = ProbabilityEngine(TILE, batch=batch, slots=slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "CELL_ROWS", cell_rows)
        patch.setattr(plan_module, "CELL_COLUMNS", cell_columns)
        patch.setattr("cdkd_edge.segmentation.pipeline.PANEL_BYTES", 3 * TILE * panel)
        result = segment_scene(engine, path, folder / "map.tif", options)
    assert (read_labels(folder / "map.tif") == red_labels(scene[None])[0]).all()
    assert sum(result.class_pixels.values()) == height * width


def test_cells_are_given_up_after_their_last_tile() -> None:
    grid = TileGrid.over(300, 500, TILE, 16)
    for blends in (False, True):
        plan = TilePlan.over(grid, TILE, panel_bytes=3 * TILE * 200, blends=blends)
        for start in (0, 3, plan.bands - 1):
            held = Cells(CellLayout(300, 500, 48, 80), plan, start)
            most, read = 0, Counter[tuple[int, int, int]]()
            for place in plan.places(start):
                under, new = held.of(place)
                read.update((place.panel, cell.top, cell.left) for cell in new)
                most = max(most, len(held._cells))
                held.release(under)
            assert held._cells == {}
            assert set(read.values()) == {1}, "no cell is read twice"
            assert most < 30


@pytest.mark.parametrize(
    ("block", "size", "rows", "columns"),
    [
        ((512, 512), (9000, 9000), 512, 2048),
        ((256, 256), (9000, 9000), 256, 2048),
        ((1, 9000), (9000, 9000), 58, None),
        ((3, 100_000), (9000, 100_000), 3, None),
        ((128, 512), (9000, 9000), 256, 2048),
        ((9000, 9000), (9000, 9000), 58, None),
        ((10, 500), (600, 500), 250, 2000),
    ],
)
def test_cells_follow_the_blocks(block: tuple[int, int], size: tuple[int, int], rows: int, columns: int | None) -> None:
    class Reader:
        block_shape = block
        height, width = size

    layout = CellLayout.of(Reader())  # type: ignore[arg-type]
    assert abs(layout.rows - rows) <= 8
    assert layout.columns == columns


def test_a_failure_to_read_in_one_of_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(400, 400), tiled=True, blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    monkeypatch.setattr(plan_module, "CELL_ROWS", 64)
    monkeypatch.setattr(plan_module, "CELL_COLUMNS", 64)
    with pytest.raises(SceneError, match=r"reading .*scene\.tif failed"):
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(readers=4))


@pytest.mark.parametrize("driver", ["PNG", "JPEG"])
def test_formats_that_are_decoded_from_the_beginning_have_one_reader(tmp_path: Path, driver: str) -> None:
    path = write_raster(tmp_path / "scene.img", np.full((3, 200, 300), 77, np.uint8), driver=driver)
    reader = SceneReader(path)
    assert reader.sequential
    reader.close()
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(readers=4))
    assert (read_labels(tmp_path / "map.tif") == 1).all()


# --- files that are not here ----------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An address and the folder behind it."""
    folder = tmp_path / "served"
    folder.mkdir()
    command = [sys.executable, Path(__file__).parents[1] / "helpers" / "range_server.py", folder]
    with (
        (tmp_path / "requests").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", folder
        process.kill()


@pytest.mark.parametrize("prefix", ["", "/vsicurl/"])
def test_a_scene_on_a_server(tmp_path: Path, server: tuple[str, Path], prefix: str) -> None:
    address, folder = server
    scene = np.maximum(noise(300, 260), 1)
    scene[:, :, 200:] = 0
    write_raster(folder / "scene.tif", scene, nodata=0, tiled=True, blockxsize=64, blockysize=64)
    segment_scene(FakeEngine(TILE), f"{prefix}{address}/scene.tif", tmp_path / "map.tif")
    expected = red_labels(scene[None])[0]
    expected[:, 200:] = NO_LABEL
    assert (read_labels(tmp_path / "map.tif") == expected).all()
    assert "GET bytes=" in (tmp_path / "requests").read_text()


def test_a_server_that_sends_whole_files_only(tmp_path: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    (folder / "whole").mkdir()
    write_raster(folder / "whole" / "scene.tif", noise(300, 260), tiled=True, blockxsize=64, blockysize=64)
    with pytest.raises(SceneError, match="Range downloading not supported") as caught:
        segment_scene(FakeEngine(TILE), f"{address}/whole/scene.tif", tmp_path / "map.tif")
    assert "download the file" in str(caught.value.hint)


def test_work_on_a_remote_scene_is_gone_on_with_unless_it_changed(tmp_path: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    for number, change in enumerate((False, True)):
        name = f"scene{number}.tif"  # GDAL remembers what a server said
        write_raster(folder / name, noise(300, 260, seed=number), tiled=True, blockxsize=64, blockysize=64)
        output = tmp_path / f"{number}.tif"
        with pytest.raises(ZeroDivisionError):
            segment_scene(FakeEngine(TILE, fail_at=14, error=ZeroDivisionError()), f"{address}/{name}", output)
        if not change:
            assert segment_scene(FakeEngine(TILE), f"{address}/{name}", output).tiles_resumed > 0
            continue
        write_raster(folder / "other.tif", noise(300, 260, seed=9), tiled=True, blockxsize=64, blockysize=64)
        (folder / "other.tif").replace(folder / name)
        with pytest.raises(SceneError, match="scene pixels was"):
            segment_scene(FakeEngine(TILE), f"/vsicurl?use_head=no&url={address}/{name}", output)


def test_a_scene_that_a_server_does_not_have(tmp_path: Path, server: tuple[str, Path]) -> None:
    with pytest.raises(SceneError, match=r"opening http.*nowhere\.tif"):
        segment_scene(FakeEngine(TILE), f"{server[0]}/nowhere.tif", tmp_path / "map.tif")
    assert names_in(tmp_path) == ["requests", "served"]


def test_a_scene_in_an_archive(tmp_path: Path) -> None:
    scene = noise(150, 160)
    path = write_raster(tmp_path / "scene.tif", scene)
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "scene.tif")
    segment_scene(FakeEngine(TILE), f"/vsizip/{tmp_path / 'scenes.zip'}/scene.tif", tmp_path / "map.tif")
    assert (read_labels(tmp_path / "map.tif") == red_labels(scene[None])[0]).all()
