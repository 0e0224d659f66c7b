"""Interrupted runs: nothing done is lost, and the finished file is the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scene_helpers import (
    FakeEngine,
    ProbabilityEngine,
    engine_manifest,
    names_in,
    noise,
    pipeline_threads,
    read_labels,
    write_raster,
)

from cdkd_edge.core.errors import EngineError, SceneError, SystemRefusalError
from cdkd_edge.raster.read import Stretch
from cdkd_edge.segmentation.geotiff import LabelMapWriter
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.partial import (
    Partial,
    continues_replacing,
    differences,
    drop_finished,
    partial_folder,
    was_finishing,
)
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.plan import TilePlan
from cdkd_edge.segmentation.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

TILE = 64
WHOLE = ["map.qml", "map.tif", "map.tif.aux.xml"]


class BoomError(Exception):
    pass


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = noise(500, 420)
    pixels[:, 100:230, 60:300] = 0
    return write_raster(tmp_path / "scene.tif", pixels, nodata=0, tiled=True, blockxsize=64, blockysize=64)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_in(folder) if (folder / name).is_file()}


def undisturbed(scene: Path, folder: Path, options: SegmentOptions = SegmentOptions(), **kind: Any) -> dict[str, bytes]:
    segment_scene(ProbabilityEngine(TILE, **kind), scene, folder / "map.tif", options)
    return files(folder)


def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.segmentation.pipeline.PANEL_BYTES", 3 * (TILE + 128) * 200)
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_ROWS", 64)
    monkeypatch.setattr("cdkd_edge.segmentation.plan.CELL_COLUMNS", 128)


@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize(
    "options",
    [SegmentOptions(), SegmentOptions(confidence=True), SegmentOptions(merge="hann", overlap=20, confidence=True)],
    ids=["crop", "crop and confidence", "hann and confidence"],
)
def test_a_run_that_fails_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, scene: Path, options: SegmentOptions, panels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if panels:
        narrow_panels(monkeypatch)
    expected = undisturbed(scene, tmp_path / "whole", options)
    folder, attempts, resumed = tmp_path / "again", 0, []
    while True:
        attempts += 1
        engine = ProbabilityEngine(TILE, batch=1 + attempts % 3, fail_at=14, error=BoomError())
        try:
            result = segment_scene(engine, scene, folder / "map.tif", options)
            break
        except BoomError:
            assert not [name for name in names_in(folder) if "partial" not in name]
            with Spool(partial_folder(folder / "map.tif") / "labels.spool", 500, 420) as spool:
                resumed.append(spool.bands)
    assert attempts >= 3
    assert resumed == sorted(resumed)
    assert result.tiles_resumed > 0
    assert files(folder) == expected
    assert names_in(folder) == sorted([*WHOLE, *(["map_confidence.tif"] if options.confidence else [])])


def test_panels_do_not_change_the_map(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (SegmentOptions(), SegmentOptions(merge="hann", confidence=True)):
        folder = tmp_path / options.merge
        expected = undisturbed(scene, folder / "one", options)
        with monkeypatch.context() as patched:
            narrow_panels(patched)
            assert undisturbed(scene, folder / "many", options) == expected


def test_what_was_counted_before_the_interruption_counts(tmp_path: Path, scene: Path) -> None:
    expected = segment_scene(FakeEngine(TILE), scene, tmp_path / "whole" / "map.tif")
    engine = FakeEngine(TILE, fail_at=40, error=BoomError())
    with pytest.raises(BoomError):
        segment_scene(engine, scene, tmp_path / "map.tif")
    seen: list[tuple[int, int]] = []
    result = segment_scene(
        FakeEngine(TILE), scene, tmp_path / "map.tif", progress=lambda done, total: seen.append((done, total))
    )
    assert result.tiles_resumed == seen[0][0] - 1 > 0
    assert result.class_pixels == expected.class_pixels
    assert result.tiles_without_data == expected.tiles_without_data > 0
    assert result.row_class_pixels is not None
    assert (result.row_class_pixels == expected.row_class_pixels).all()
    labels = read_labels(tmp_path / "map.tif")
    for label in range(5):
        assert (result.row_class_pixels[:, label] == (labels == label).sum(axis=1)).all()
    assert (result.row_class_pixels.sum(axis=1) == 420).all()


# --- kill -9 --------------------------------------------------------------------------------------

RUN = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from scene_helpers import ProbabilityEngine
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene
options = SegmentOptions(merge=sys.argv[4], confidence=True)
segment_scene(ProbabilityEngine(64, delay=0.0005), sys.argv[2], Path(sys.argv[3]), options)
"""


def start(scene: Path, output: Path, merge: str) -> subprocess.Popen[bytes]:
    tests = Path(__file__).parents[1] / "helpers"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(tests), str(scene), str(output), merge], env=environment, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("merge", ["crop", "hann"])
def test_kill_9_at_any_moment(tmp_path: Path, merge: str) -> None:
    scene = write_raster(tmp_path / "scene.tif", noise(900, 700), tiled=True, blockxsize=64, blockysize=64)
    expected = undisturbed(scene, tmp_path / "whole", SegmentOptions(merge=merge, confidence=True))
    folder, rng, kills = tmp_path / "killed", random.Random(merge), 0
    folder.mkdir()
    while True:
        process = start(scene, folder / "map.tif", merge)
        spool = partial_folder(folder / "map.tif") / "labels.spool"
        before = spool.stat().st_size if spool.exists() else 0
        if kills < 2:
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                if spool.exists() and spool.stat().st_size > before + 20_000:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        kills += 1
    assert kills == 2
    assert files(folder) == expected


# --- what does not fit ----------------------------------------------------------------------------


@pytest.fixture
def interrupted(scene: Path) -> Path:
    """A label map of which a part waits."""
    output = scene.parent / "map.tif"
    with pytest.raises(BoomError):
        segment_scene(FakeEngine(TILE, fail_at=30, error=BoomError()), scene, output)
    assert names_in(partial_folder(output)) == ["labels.spool", "lock", "run.json"]
    return output


def refused(engine: FakeEngine, scene: Path, output: Path, options: SegmentOptions, what: str) -> None:
    before = files(output.parent)
    with pytest.raises(SceneError, match=what) as caught:
        segment_scene(engine, scene, output, options)
    assert "--overwrite" in str(caught.value.hint)
    assert files(output.parent) == before
    segment_scene(engine, scene, output, options, resume=False)
    assert names_in(output.parent) == [*WHOLE, "scene.tif"]


def test_a_changed_scene_is_not_gone_on_with(scene: Path, interrupted: Path) -> None:
    content = bytearray(scene.read_bytes())
    content[-5000] ^= 1
    scene.write_bytes(content)
    refused(FakeEngine(TILE), scene, interrupted, SegmentOptions(), "scene files 1 (sample|mtime_ns)")


def test_another_scene_is_not_gone_on_with(scene: Path, interrupted: Path) -> None:
    write_raster(scene, noise(500, 421))
    refused(FakeEngine(TILE), scene, interrupted, SegmentOptions(), "scene width was 420 and is 421")


def test_another_engine_does_not_go_on(scene: Path, interrupted: Path) -> None:
    engine = FakeEngine(TILE)
    engine.artefact = engine_manifest(TILE, sha256="ef" * 32).artefact
    refused(engine, scene, interrupted, SegmentOptions(), "engine sha256 was")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (SegmentOptions(overlap=20), "--overlap was 16 and is 20"),
        (SegmentOptions(bands=(3, 2, 1)), "--bands"),
        (SegmentOptions(stretch=Stretch(0, 200, percentiles=False)), "LIMITS"),
    ],
    ids=["overlap", "bands", "stretch"],
)
def test_other_options_do_not_go_on(scene: Path, interrupted: Path, options: SegmentOptions, what: str) -> None:
    refused(FakeEngine(TILE), scene, interrupted, options, what)


def test_threads_and_batches_may_be_others(scene: Path, interrupted: Path) -> None:
    result = segment_scene(FakeEngine(TILE, batch=3, slots=2), scene, interrupted, SegmentOptions(readers=1))
    assert result.tiles_resumed > 0


def test_a_scene_that_changes_while_it_is_read(scene: Path) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(scene, ns=(1, done))

    with pytest.raises(SceneError, match="changed while it was read"):
        segment_scene(FakeEngine(TILE), scene, scene.parent / "map.tif", progress=touch)
    assert not (scene.parent / "map.tif").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": 5}'])
def test_a_damaged_note_is_not_trusted_and_drops_nothing(scene: Path, interrupted: Path, damage: str) -> None:
    (partial_folder(interrupted) / "run.json").write_text(damage)
    what = "label map of another run" if damage.startswith('{"') else r"run\.json is damaged"
    refused(FakeEngine(TILE), scene, interrupted, SegmentOptions(), what)


def test_a_part_without_confidence_says_so(scene: Path, tmp_path: Path) -> None:
    """And one with it may be finished without."""
    output, plain, more = tmp_path / "map.tif", SegmentOptions(), SegmentOptions(confidence=True)
    expected = undisturbed(scene, tmp_path / "whole")
    for earlier, later in ((plain, more), (more, plain)):
        with pytest.raises(BoomError):
            segment_scene(ProbabilityEngine(TILE, fail_at=30, error=BoomError()), scene, output, earlier)
        if later is more:
            with pytest.raises(SceneError, match="without --confidence") as caught:
                segment_scene(ProbabilityEngine(TILE), scene, output, later)
            assert "finish it without --confidence" in str(caught.value.hint)
        result = segment_scene(ProbabilityEngine(TILE), scene, output, plain)
        assert result.tiles_resumed > 0
        assert output.read_bytes() == expected["map.tif"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "run.json", "lock", "labels.spool"])
def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path, scene: Path, name: str, resume: bool) -> None:
    own = partial_folder(tmp_path / "map.tif")
    own.mkdir()
    (own / name).write_text('{"mine": 1}')
    before = files(tmp_path)
    with pytest.raises(SceneError, match="was not made by cdkd-edge"):
        segment_scene(FakeEngine(TILE), scene, tmp_path / "map.tif", resume=resume)
    assert files(tmp_path) == before


def test_a_part_that_was_damaged_in_the_middle_is_told(scene: Path, interrupted: Path) -> None:
    spool = partial_folder(interrupted) / "labels.spool"
    content = bytearray(spool.read_bytes())
    content[len(content) // 2] ^= 1
    spool.write_bytes(content)
    said: list[str] = []
    result = segment_scene(FakeEngine(TILE), scene, interrupted, warn=said.append)
    assert len(said) == 1
    assert "labels.spool is damaged" in said[0]
    assert result.output.read_bytes() == undisturbed(scene, scene.parent / "whole")["map.tif"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", ["map.tif", "map_confidence.tif", "map.tif.aux.xml"])
def test_links_and_pipes_are_not_replaced(tmp_path: Path, scene: Path, kind: str, name: str) -> None:
    place = tmp_path / name
    (tmp_path / "other.tif").touch()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / ("other.tif" if kind == "link" else "gone.tif"))
    before = place.lstat()
    with pytest.raises(SceneError, match=r"is a link|is a device or a pipe"):
        segment_scene(ProbabilityEngine(TILE), scene, tmp_path / "map.tif", SegmentOptions(confidence=True))
    assert place.lstat().st_ino == before.st_ino
    assert names_in(tmp_path) == sorted([name, "other.tif", "scene.tif"])


def test_differences_are_named() -> None:
    found = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": [1]}
    wanted = {"a": 1, "b": {"c": [1, 3], "d": "y" * 99}, "e": [1, 2]}
    assert differences(found, found) == []
    assert differences(found, wanted)[0] == "b c 2 was 2 and is 3"
    assert differences(found, wanted)[2] == "e was [1] and is [1, 2]"
    assert max(map(len, differences(found, wanted))) < 100


# --- two runs, and the name -----------------------------------------------------------------------


def test_two_runs_on_one_label_map(scene: Path) -> None:
    output = scene.parent / "map.tif"
    errors: list[BaseException] = []

    def second(done: int, total: int) -> None:
        if done == 20:
            try:
                segment_scene(FakeEngine(TILE), scene, output, resume=False)
            except BaseException as error:
                errors.append(error)

    segment_scene(FakeEngine(TILE), scene, output, progress=second)
    assert len(errors) == 1
    assert isinstance(errors[0], SceneError)
    assert f"another run is writing {output} (process {os.getpid()})" in errors[0].message
    assert names_in(scene.parent) == [*WHOLE, "scene.tif"]


def test_the_folder_is_free_again_after_a_run(tmp_path: Path) -> None:
    for _ in range(3):
        with Partial(tmp_path / "map.tif", {"a": 1}):
            assert partial_folder(tmp_path / "map.tif").is_dir()
        assert names_in(tmp_path) == []


def test_an_interrupted_replacement_may_go_on_replacing(tmp_path: Path, scene: Path) -> None:
    output = tmp_path / "map.tif"
    segment_scene(FakeEngine(TILE), scene, output)
    old = output.read_bytes()
    assert not continues_replacing(output)
    engine = FakeEngine(TILE, function=lambda tiles: tiles[:, 1] // 64, fail_at=40, error=BoomError())
    with pytest.raises(BoomError):
        segment_scene(engine, scene, output, resume=False)
    assert output.read_bytes() == old
    assert continues_replacing(output)
    result = segment_scene(FakeEngine(TILE, function=lambda tiles: tiles[:, 1] // 64), scene, output)
    assert result.tiles_resumed > 0
    assert output.read_bytes() != old


def test_a_confidence_raster_that_was_finished_before_its_label_map(
    tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "map.tif", SegmentOptions(confidence=True)
    with monkeypatch.context() as patch:
        patch.setattr("cdkd_edge.segmentation.outputs._publish", publish_once())
        with pytest.raises(BoomError):
            segment_scene(ProbabilityEngine(TILE), scene, output, options)
    assert names_in(tmp_path)[:1] == ["map.tif.partial"]
    assert (tmp_path / "map_confidence.tif").exists()
    assert was_finishing(output)
    engine = ProbabilityEngine(TILE)
    segment_scene(engine, scene, output, options)
    assert engine.launches == 0
    assert not was_finishing(output)


def publish_once() -> Any:
    """Publishing that fails the second time."""
    from cdkd_edge.segmentation import outputs

    publish, calls = outputs._publish, iter(range(9))

    def run(source: Path, destination: Path, *companions: Any) -> None:
        if next(calls):
            raise BoomError
        publish(source, destination, *companions)

    return run


def test_what_gdal_and_qgis_left_beside_an_older_map_goes_with_it(tmp_path: Path, scene: Path) -> None:
    """Overviews and statistics of the map that was replaced would be shown for the new one."""
    output = tmp_path / "map.tif"
    segment_scene(FakeEngine(TILE), scene, output)
    whole, table = output.read_bytes(), (tmp_path / "map.tif.aux.xml").read_text()
    (tmp_path / "map.tif.aux.xml").write_text("<PAMDataset/>")
    (tmp_path / "map.tif.ovr").write_text("older overviews")
    segment_scene(FakeEngine(TILE), scene, output)
    assert [name for name in names_in(tmp_path) if name.startswith("map")] == WHOLE
    assert (output.read_bytes(), (tmp_path / "map.tif.aux.xml").read_text()) == (whole, table)


def test_a_folder_where_the_map_should_be(tmp_path: Path, scene: Path) -> None:
    (tmp_path / "map.tif").mkdir()
    with pytest.raises(SceneError, match="is a folder"):
        segment_scene(FakeEngine(TILE), scene, tmp_path / "map.tif")
    assert not (tmp_path / "map.tif.aux.xml").exists()


def test_ctrl_c_while_waiting_for_the_last_rows_leaves_nothing_half_done(
    tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python up to 3.12 takes a thread for finished when join() is interrupted."""
    add, main = LabelMapWriter.write_rows, threading.main_thread().ident
    assert main is not None

    def slow(writer: LabelMapWriter, rows: Any) -> None:
        time.sleep(0.3)  # until the main thread has nothing left to do but wait for this one
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)
        add(writer, rows)

    monkeypatch.setattr(LabelMapWriter, "write_rows", slow)
    with pytest.raises(KeyboardInterrupt):
        segment_scene(FakeEngine(TILE), scene, tmp_path / "map.tif")
    assert pipeline_threads() == []
    assert names_in(partial_folder(tmp_path / "map.tif")) == ["labels.spool", "lock", "run.json"]


def test_what_a_finished_run_left_is_dropped_and_nothing_else(tmp_path: Path, scene: Path, interrupted: Path) -> None:
    drop_finished(interrupted)
    assert partial_folder(interrupted).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdkd_edge.segmentation.partial._remove", lambda folder: None)  # killed just before
        segment_scene(FakeEngine(TILE), scene, interrupted)
    whole = files(interrupted.parent)
    assert json.loads((partial_folder(interrupted) / "run.json").read_text())["finished"] is True
    with Partial(interrupted, {}, resume=False):
        drop_finished(interrupted)
        assert partial_folder(interrupted).exists()
    drop_finished(interrupted)
    assert names_in(interrupted.parent) == [*WHOLE, "scene.tif"]
    assert interrupted.read_bytes() == whole["map.tif"]


def test_names_in_any_script(tmp_path: Path, scene: Path) -> None:
    output = tmp_path / "карта 地図.tif"
    with pytest.raises(BoomError):
        segment_scene(FakeEngine(TILE, fail_at=30, error=BoomError()), scene, output)
    assert segment_scene(FakeEngine(TILE), scene, output).tiles_resumed > 0


# --- a disk that is full --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("NOT CHECKED: mounting a small file system needs root on Linux")
    run = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"NOT CHECKED: cannot mount a tmpfs here: {run.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def noisy(tiles: np.ndarray) -> np.ndarray:
    """Labels that cannot be compressed much."""
    return tiles[:, 0] % 5


@pytest.mark.parametrize("ballast", [1_900_000, 1_600_000, 1_000_000])
def test_a_full_disk_keeps_what_is_done(tmp_path: Path, small_disk: Path, ballast: int) -> None:
    """Full while labels are collected, or while the label map is written; with room again it goes on."""
    scene = write_raster(tmp_path / "scene.tif", noise(1100, 1100))
    segment_scene(FakeEngine(TILE, function=noisy), scene, tmp_path / "whole.tif")
    (small_disk / "ballast").write_bytes(bytes(ballast))
    with pytest.raises(SystemRefusalError, match=r"[Nn]o space left") as caught:
        segment_scene(FakeEngine(TILE, function=noisy), scene, small_disk / "map.tif")
    assert caught.value.exit_code == 12
    assert "free some space" in str(caught.value.hint)
    assert names_in(small_disk)[:2] == ["ballast", "map.tif.partial"]
    assert not (small_disk / "map.tif").exists()
    (small_disk / "ballast").unlink()
    result = segment_scene(FakeEngine(TILE, function=noisy), scene, small_disk / "map.tif")
    assert result.tiles_resumed > 0
    assert (small_disk / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path: Path, scene: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes((2 << 20) - 8192))
    with pytest.raises((OSError, SystemRefusalError)) as caught:
        segment_scene(FakeEngine(TILE, function=noisy), scene, small_disk / "map.tif")
    assert isinstance(caught.value, SystemRefusalError) or caught.value.errno == errno.ENOSPC
    assert not (small_disk / "map.tif").exists()


# --- the plan -------------------------------------------------------------------------------------


def test_a_note_says_what_it_is_of(interrupted: Path) -> None:
    note = json.loads((partial_folder(interrupted) / "run.json").read_text())
    assert note["replaces"] is False
    assert note["identity"]["scene"]["name"] == "scene.tif"
    assert note["identity"]["engine"]["sha256"] == "ab" * 32


def test_an_engine_error_is_still_itself(scene: Path) -> None:
    error = EngineError("no")
    with pytest.raises(EngineError) as caught:
        segment_scene(FakeEngine(TILE, fail_at=30, error=error), scene, scene.parent / "map.tif")
    assert caught.value is error


def test_tiles_in_bands_add_up() -> None:
    from cdkd_edge.raster.grid import TileGrid

    for blends in (False, True):
        plan = TilePlan.over(TileGrid.over(500, 700, 64, 16), 64, panel_bytes=3 * 64 * 200, blends=blends)
        assert len(plan.panels) > 2
        assert plan.tiles_in(plan.bands) == len(plan.grid)
        for start in range(plan.bands + 1):
            left = sum(place.emits for place in plan.places(start))
            assert left == len(plan.grid) - plan.tiles_in(start)
            assert sum(place.ends_band for place in plan.places(start)) == plan.bands - start
