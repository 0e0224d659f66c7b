"""A scene through an engine: every pixel its label, whatever the shape; errors end everything and leave no half map."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from scene_helpers import (
    SCHEMA,
    FakeEngine,
    names_in,
    noise,
    pipeline_threads,
    read_labels,
    red_labels,
    relaxed,
    sparse_raster,
    within,
    write_raster,
)

from cdkd_edge import __version__
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.engines.protocol import segment_tiles
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.segmentation.geotiff import LabelMapWriter
from cdkd_edge.segmentation.merge import CropMerge
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.partial import partial_folder
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 64


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert pipeline_threads() == []


def expected_labels(scene: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return red_labels(scene[None])[0]


# --- labels ---------------------------------------------------------------------------------------


@settings(relaxed, max_examples=25)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    overlap=st.one_of(st.none(), st.integers(0, TILE - 1)),
    batch=st.integers(1, 5),
    slots=st.integers(1, 4),
)
@example(height=1, width=1, overlap=None, batch=1, slots=3)
@example(height=64, width=64, overlap=0, batch=4, slots=1)
@example(height=65, width=63, overlap=None, batch=3, slots=2)
@example(height=300, width=300, overlap=63, batch=7, slots=3)
def test_every_pixel_has_its_label(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, overlap: int | None, batch: int, slots: int
) -> None:
    if overlap is not None and overlap > 48:
        height, width = min(height, 90), min(width, 90)  # or there are thousands of tiles
    folder = tmp_path_factory.mktemp("scene")
    scene = noise(height, width, seed=height)
    path = write_raster(folder / "scene.tif", scene)
    engine = FakeEngine(TILE, batch, slots)
    result = segment_scene(engine, path, folder / "map.tif", SegmentOptions(overlap=overlap))
    labels = expected_labels(scene)
    assert (read_labels(folder / "map.tif") == labels).all()
    assert (result.height, result.width) == (height, width)
    tiles = len(TileGrid.over(height, width, TILE, 16 if overlap is None else overlap))
    assert (result.tiles, result.tiles_without_data) == (tiles, 0)
    assert engine.launches == -(-tiles // batch)
    assert list(result.class_pixels.values()) == np.bincount(labels.ravel(), minlength=5).tolist()
    assert list(result.class_pixels) == list(SCHEMA.class_names)
    assert result.no_data_pixels == 0
    assert names_in(folder) == ["map.qml", "map.tif", "map.tif.aux.xml", "scene.tif"]


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_slots_and_batches_do_not_change_the_map_even_when_threads_are_slow(
    tmp_path: Path, slots: int, batch: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = noise(200, 230)
    path = write_raster(tmp_path / "scene.tif", scene, tiled=True, blockxsize=16, blockysize=16)
    rng = np.random.default_rng(slots * 100 + batch)
    read_window, add = SceneReader.read_window, CropMerge.add
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_ROWS", 48)
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_COLUMNS", 80)

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            time.sleep(rng.choice([0, 0.002]))
            return function(*args)

        return run

    monkeypatch.setattr(SceneReader, "read_window", slow(read_window))
    monkeypatch.setattr(CropMerge, "add", slow(add))
    engine = FakeEngine(TILE, batch, slots, delay=lambda _: float(rng.choice([0, 0.003])))
    within(20, lambda: segment_scene(engine, path, tmp_path / "map.tif", SegmentOptions(readers=readers)))
    assert (read_labels(tmp_path / "map.tif") == expected_labels(scene)).all()


@pytest.mark.parametrize("overlap", [0, 1, 16, 17])
def test_each_pixel_comes_from_the_tile_in_which_it_lies_deepest(tmp_path: Path, overlap: int) -> None:
    """An engine that says 1 near its tiles' borders and 0 inside is only heard inside, but for the scene's borders."""
    depth = overlap // 2

    def rim(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        labels = np.ones((len(tiles), TILE, TILE), np.uint8)
        labels[:, depth : TILE - depth, depth : TILE - depth] = 0
        return labels

    path = write_raster(tmp_path / "scene.tif", noise(310, 257))
    engine = FakeEngine(TILE, function=rim)
    segment_scene(engine, path, tmp_path / "map.tif", SegmentOptions(overlap=overlap))
    labels = read_labels(tmp_path / "map.tif")
    assert (labels[depth : 310 - depth, depth : 257 - depth] == 0).all()


@pytest.mark.parametrize("value", [0, 63, 64, 255])
def test_a_constant_scene_gives_a_constant_map(tmp_path: Path, value: int) -> None:
    path = write_raster(tmp_path / "scene.tif", np.full((3, 150, 170), value, np.uint8))

    def blurred(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Sees all of its tile, padding included."""
        return np.broadcast_to(tiles[:, 0].mean(axis=(1, 2)).astype(np.uint8)[:, None, None] // 64, tiles[:, 0].shape)

    segment_scene(FakeEngine(TILE, function=blurred), path, tmp_path / "map.tif")
    assert (read_labels(tmp_path / "map.tif") == value // 64).all()


def test_bands_and_stretch_are_passed_on(tmp_path: Path) -> None:
    scene = np.linspace(0, 1000, 5 * 70 * 90).reshape(5, 70, 90).astype(np.uint16)
    path = write_raster(tmp_path / "scene.tif", scene, photometric="MINISBLACK")
    options = SegmentOptions(bands=(4, 1, 2), stretch=Stretch(0, 1000, percentiles=False))
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", options)
    assert (read_labels(tmp_path / "map.tif") == np.rint(scene[3] / 1000 * 255) // 64).all()
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags()["STRETCH"] == "0..1000; 0..1000; 0..1000"


def test_a_real_engine_on_one_tile_is_the_engine_itself(
    tmp_path: Path, small_engine_path: Path, small_tiles: npt.NDArray[np.uint8]
) -> None:
    engine = load_engine(small_engine_path, threads=1)
    expected = segment_tiles(engine, small_tiles)
    for index, tile in enumerate(small_tiles):
        path = write_raster(tmp_path / f"{index}.tif", tile)
        segment_scene(engine, path, tmp_path / "map.tif")
        assert (read_labels(tmp_path / "map.tif") == expected[index]).all()
    engine.close()
    assert len(np.unique(expected)) > 1


# --- provenance and place -------------------------------------------------------------------------


def test_the_map_lies_where_the_scene_lies_and_says_where_it_comes_from(tmp_path: Path) -> None:
    transform = from_origin(325_000, 2_785_000, 0.5, 0.5)
    path = write_raster(tmp_path / "my scene.tif", noise(70, 90), crs="EPSG:32640", transform=transform)
    result = segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(overlap=10))
    assert result.output == tmp_path / "map.tif"
    with rasterio.open(result.output) as dataset:
        assert dataset.crs.to_epsg() == 32640
        assert dataset.transform.almost_equals(transform)
        tags = dataset.tags()
    assert tags["SCENE"] == "my scene.tif"
    assert tags["ENGINE"] == "fake.onnx sha256:" + "ab" * 32
    assert tags["CLASSES"] == "building, land, road, vegetation, water"
    assert (tags["TILE_PX"], tags["OVERLAP_PX"], tags["CDKD_EDGE"]) == ("64", "10", __version__)
    assert "STRETCH" not in tags


# --- no data --------------------------------------------------------------------------------------


def test_pixels_without_data_have_no_label_and_empty_tiles_are_not_computed(tmp_path: Path) -> None:
    scene = np.maximum(noise(200, 400), 1)
    scene[:, :, 150:] = 0
    scene[:, 30:40, 20:25] = 0
    path = write_raster(tmp_path / "scene.tif", scene, nodata=0)
    engine = FakeEngine(TILE)
    result = segment_scene(engine, path, tmp_path / "map.tif")
    expected = expected_labels(scene)
    expected[(scene == 0).all(axis=0)] = NO_LABEL
    assert (read_labels(tmp_path / "map.tif") == expected).all()
    grid = TileGrid.over(200, 400, TILE, 16)
    empty = sum((expected[r.first : r.last, c.first : c.last] == NO_LABEL).all() for r, c in grid)
    assert 0 < empty < len(grid)
    assert result.tiles_without_data == empty
    assert engine.launches == len(grid) - empty
    assert result.no_data_pixels == (expected == NO_LABEL).sum()
    assert sum(result.class_pixels.values()) + result.no_data_pixels == 200 * 400


@pytest.mark.parametrize("batch", [1, 3])
def test_a_scene_without_data_is_a_map_without_labels(tmp_path: Path, batch: int) -> None:
    path = write_raster(tmp_path / "scene.tif", np.zeros((3, 100, 100), np.uint8), nodata=0)
    engine = FakeEngine(TILE, batch)
    result = segment_scene(engine, path, tmp_path / "map.tif")
    assert (read_labels(tmp_path / "map.tif") == NO_LABEL).all()
    assert engine.launches == 0
    assert result.engine_seconds == 0
    assert (result.tiles, result.tiles_without_data) == (4, 4)


def test_a_batch_of_empty_and_full_tiles(tmp_path: Path) -> None:
    """What a slot held before never shows through."""
    scene = np.maximum(noise(64, 640), 1)
    scene[:, :, 100:300] = 0
    scene[:, :, 500:] = 0
    path = write_raster(tmp_path / "scene.tif", scene, nodata=0)
    segment_scene(FakeEngine(TILE, batch=3, slots=2), path, tmp_path / "map.tif", SegmentOptions(overlap=0))
    expected = expected_labels(scene)
    expected[(scene == 0).all(axis=0)] = NO_LABEL
    assert (read_labels(tmp_path / "map.tif") == expected).all()


# --- progress and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_progress_counts_up_to_all_tiles(tmp_path: Path, batch: int) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(200, 230))
    seen: list[tuple[int, int]] = []
    engine = FakeEngine(TILE, batch)
    result = segment_scene(engine, path, tmp_path / "map.tif", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [*range(batch, result.tiles, batch), result.tiles]
    assert {total for _, total in seen} == {result.tiles}


def test_times_add_up(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(64, 256))
    engine = FakeEngine(TILE, delay=0.02)
    started = time.perf_counter()
    result = segment_scene(engine, path, tmp_path / "map.tif")
    passed = time.perf_counter() - started
    assert engine.launches * 0.02 <= result.engine_seconds <= result.seconds <= passed


@pytest.mark.parametrize(("height", "width", "limit_mb"), [(20000, 600, 5), (2000, 20000, 110)])
def test_memory_is_bounded_whatever_the_scene(tmp_path: Path, height: int, width: int, limit_mb: float) -> None:
    """A row of tiles with what is read beside it, and a row of blocks; the scenes are 36 and 120 MB."""
    path = sparse_raster(tmp_path / "scene.tif", height, width)
    engine = FakeEngine(256 if width < 1000 else 512)
    tracemalloc.start()
    try:
        segment_scene(engine, path, tmp_path / "map.tif")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit_mb * 1e6
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.shape == (height, width)


# --- refusals -------------------------------------------------------------------------------------


def test_the_scene_is_never_overwritten(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 90))
    content = path.read_bytes()
    link, hard = tmp_path / "link.tif", tmp_path / "hard.tif"
    link.symlink_to(path)
    hard.hardlink_to(path)
    for output in (path, tmp_path / "." / "scene.tif", link, hard):
        with pytest.raises(SceneError, match="would overwrite the scene"):
            segment_scene(FakeEngine(TILE), path, output)
    with pytest.raises(SceneError, match="would overwrite the scene"):
        segment_scene(FakeEngine(TILE), link, path)
    assert path.read_bytes() == content


def test_an_overlap_that_does_not_fit(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(70, 90))
    with pytest.raises(UsageError, match="overlap of 64 px"):
        segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif", SegmentOptions(overlap=64))
    assert names_in(tmp_path) == ["scene.tif"]


# --- errors ---------------------------------------------------------------------------------------

PROMPT = 3.0
"""Seconds within which a failed run must be over; to its end it would take more than twice that."""


class BoomError(Exception):
    pass


@pytest.fixture
def long_scene(tmp_path: Path) -> Path:
    """400 tiles; with 0.02 s each, 8 s."""
    return sparse_raster(tmp_path / "scene.tif", 976, 976)


def failing_run(engine: FakeEngine, scene: Path, error: BaseException, **options: Any) -> None:
    """The run ends soon, with the error itself, without a map and without a thread; it can be gone on with."""
    folder = scene.parent
    before = names_in(folder)
    with pytest.raises(type(error)) as caught:
        within(PROMPT, lambda: segment_scene(engine, scene, folder / "map.tif", **options))
    assert caught.value is error
    assert finished_names(folder) == before
    assert pipeline_threads() == []
    partial = partial_folder(folder / "map.tif")
    if partial.exists():
        assert names_in(partial) == ["labels.spool", "lock", "run.json"]
        with Spool(partial / "labels.spool", 976, 976) as spool:
            assert spool.bands > 0


def finished_names(folder: Path) -> list[str]:
    """What is in a folder besides parts that wait."""
    return [name for name in names_in(folder) if ".partial" not in name]


def once(original: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """``original``, but its call number ``at`` (from 0) raises."""
    count = iter(range(10**9))

    def run(*args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            raise error
        return original(*args, **kwargs)

    return run


ERRORS = [BoomError("boom"), EngineError("the engine failed"), MemoryError(), KeyboardInterrupt(), SystemExit(143)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fail_in", ["launch", "wait"])
@pytest.mark.parametrize("at", [0, 7])
def test_the_engine_fails(long_scene: Path, error: BaseException, fail_in: str, at: int) -> None:
    engine = FakeEngine(TILE, delay=0.02, fail_at=at, error=error, fail_in=fail_in)
    failing_run(engine, long_scene, error)
    assert engine.launches <= at + 1


@pytest.mark.parametrize(
    ("slots", "error"), [(1, BoomError("cannot read")), (3, MemoryError()), (3, KeyboardInterrupt())], ids=repr
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_the_reader_fails(
    long_scene: Path, monkeypatch: pytest.MonkeyPatch, at: int, slots: int, error: BaseException
) -> None:
    """Of four cells, 256 rows each."""
    monkeypatch.setattr(SceneReader, "read_window", once(SceneReader.read_window, at, error))
    engine = FakeEngine(TILE, delay=0.02 if at < 3 else 0, slots=slots)
    failing_run(engine, long_scene, error)
    assert engine.launches <= at * 6 * 20


def test_an_engine_without_an_input_buffer(long_scene: Path) -> None:
    error = EngineError("no buffer")
    failing_run(FakeEngine(TILE, delay=0.02, fail_at=5, error=error, fail_in="input"), long_scene, error)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("at", [0, 2, 19])
def test_the_writer_fails(long_scene: Path, monkeypatch: pytest.MonkeyPatch, at: int, slots: int) -> None:
    """The last row of tiles is written after the last tile was computed."""
    error = OSError(5, "Input/output error")
    monkeypatch.setattr(Spool, "finish_band", once(Spool.finish_band, at, error))
    engine = FakeEngine(TILE, delay=0.02 if at < 10 else 0, slots=slots)
    failing_run(engine, long_scene, error)
    assert engine.launches <= 20 * (at + 1) + slots


@pytest.mark.parametrize("at", [0, 5, 399])
def test_the_progress_callback_fails(long_scene: Path, at: int) -> None:
    error = BoomError("nobody watches")
    progress = once(lambda done, total: None, at, error)
    failing_run(FakeEngine(TILE, delay=0.02 if at < 100 else 0), long_scene, error, progress=progress)


def test_the_file_cannot_be_finished(long_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(5, "Input/output error")
    monkeypatch.setattr(LabelMapWriter, "write_rows", once(LabelMapWriter.write_rows, 1, error))
    failing_run(FakeEngine(TILE), long_scene, error)
    engine = FakeEngine(TILE)
    result = segment_scene(engine, long_scene, long_scene.parent / "map.tif")
    assert engine.launches == result.tiles - result.tiles_resumed < result.tiles, "what was computed has been kept"


def test_the_first_of_several_errors_is_the_one_to_show(long_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the engine stops, the writer stumbles over the half-written map: that is not the reason."""
    error = EngineError("the engine failed")
    monkeypatch.setattr(Spool, "finish_band", once(Spool.finish_band, 0, BoomError("second")))

    def delay(number: int) -> float:
        return 0.0 if number < 19 else 0.1

    failing_run(FakeEngine(TILE, fail_at=19, error=error, fail_in="wait", slots=1, delay=delay), long_scene, error)


def test_a_scene_that_ends_in_the_middle(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(400, 400), tiled=True, blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SceneError, match=r"reading .*scene\.tif failed"):
        within(PROMPT, lambda: segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif"))
    assert finished_names(tmp_path) == ["scene.tif"]


def test_an_older_map_survives_a_failed_run(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "scene.tif", noise(200, 200))
    segment_scene(FakeEngine(TILE), path, tmp_path / "map.tif")
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with pytest.raises(EngineError):
        segment_scene(FakeEngine(TILE, fail_at=9, error=EngineError("no")), path, tmp_path / "map.tif")
    assert {name: (tmp_path / name).read_bytes() for name in finished_names(tmp_path)} == before


def test_ctrl_c_while_the_main_thread_waits(long_scene: Path) -> None:
    """A real signal, while the engine works in the main thread."""
    import _thread

    stopper = threading.Timer(0.3, _thread.interrupt_main)
    stopper.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        segment_scene(FakeEngine(TILE, delay=0.02), long_scene, long_scene.parent / "map.tif")
    stopper.join()
    assert time.perf_counter() - started < PROMPT
    assert finished_names(long_scene.parent) == ["scene.tif"]


def test_errors_have_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CdkdEdgeError, match="does not exist"):
        segment_scene(FakeEngine(TILE), tmp_path / "missing.tif", tmp_path / "map.tif")
    assert names_in(tmp_path) == []


# --- a photograph ---------------------------------------------------------------------------------

DUBAI = Path(__file__).parents[3] / "shared" / "data" / "dubai" / "images"


@pytest.mark.skipif(not DUBAI.is_dir(), reason="the Dubai photographs are not here")
def test_a_real_photograph(tmp_path: Path, small_engine_path: Path) -> None:
    scene = min(DUBAI.glob("*.jpg"), key=lambda path: path.stat().st_size)
    engine = load_engine(small_engine_path)
    result = segment_scene(engine, scene, tmp_path / "map.tif")
    engine.close()
    labels = read_labels(tmp_path / "map.tif")
    with rasterio.open(scene) as dataset:
        assert labels.shape == dataset.shape == (result.height, result.width)
    assert labels.max() < len(SCHEMA)
    assert len(np.unique(labels)) > 1
    assert result.no_data_pixels == 0
