"""Room on the disk: a warning while there is time, and none without need."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest
from scene_helpers import FakeEngine, ProbabilityEngine, names_in, noise, write_raster

from cdkd_edge.cli.segment import SceneLines
from cdkd_edge.core.errors import SceneError
from cdkd_edge.segmentation import spool as spool_file
from cdkd_edge.segmentation.jobs import EngineRef, Job, file_state
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.products import ProductOptions
from cdkd_edge.segmentation.spool import DiskSpaceWatch
from cdkd_edge.segmentation.worker import do_job

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

MB = 1 << 20


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(spool_file.shutil, "disk_usage", lambda path: usage)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """40 MB, that take no room."""
    (tmp_path / "map.tif.partial").mkdir()
    path = tmp_path / "map.tif.partial" / "labels.spool"
    with open(path, "wb") as file:
        file.truncate(40 * MB)
    return path


@pytest.mark.parametrize(
    ("done", "free", "warned"),
    [
        (0.1, 959, True),  # 400 MB in all, 2.5 times that with finishing, 40 MB of it written
        (0.1, 961, False),
        (1.0, 59, True),
        (1.0, 61, False),
        (0.0, 0, False),
    ],
)
def test_what_is_done_says_what_will_be_needed(
    spool: Path, monkeypatch: pytest.MonkeyPatch, done: float, free: int, warned: bool
) -> None:
    with_free(monkeypatch, free * MB)
    said: list[str] = []
    watch = DiskSpaceWatch(spool.parent, said.append)
    for _ in range(3):
        watch.check(spool, done)
    assert len(said) == warned
    if warned:
        assert "are free. Free some space now" in said[0]
        assert str(spool.parent) in said[0]


def test_what_is_written_meanwhile_is_needed_no_more(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 30 * MB)
    (spool.parent / "finish").mkdir()
    with open(spool.parent / "finish" / "label_map.tif", "wb") as file:
        file.truncate(31 * MB)
    said: list[str] = []
    DiskSpaceWatch(spool.parent, said.append).check(spool, 1.0)
    assert said == []


def test_small_maps_need_no_word(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0)
    with open(spool, "wb") as file:
        file.truncate(MB)
    said: list[str] = []
    DiskSpaceWatch(spool.parent, said.append).check(spool, 0.5)
    assert said == []


def test_a_run_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_file, "_SMALL_NEED", 1)
    with_free(monkeypatch, 5000)
    scene = write_raster(tmp_path / "scene.tif", noise(300, 200))
    said: list[str] = []
    segment_scene(FakeEngine(64), scene, tmp_path / "map.tif", warn=said.append)
    assert len(said) == 1
    assert "will be full before the label map is done" in said[0]
    assert names_in(tmp_path) == ["map.qml", "map.tif", "map.tif.aux.xml", "scene.tif"]


def test_of_one_scene_it_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    SceneLines(as_json=False).note("no room\x1b[31m")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: no room [31m\n")


# --- what killed runs leave beside a label map ----------------------------------------------------------------------


def job_of(folder: Path, **wanted: Any) -> Job:
    sha = ProbabilityEngine(64).artefact.sha256
    ref = EngineRef("fake.onnx", "fake", "fp32", "fake", sha, "cd" * 32)
    path = folder / "map.tif"
    return Job(
        str(folder / "scene.tif"), str(path), ref, SegmentOptions(), ProductOptions(**wanted), before=file_state(path)
    )


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    write_raster(tmp_path / "scene.tif", noise(70, 90))
    for name in (".map_preview.png.0123abcd.part", ".map_labels.0123abcd.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / "map_preview.0123abcd.part.png").write_text("somebody else's")
    do_job(ProbabilityEngine(64), job_of(tmp_path, preview=True))
    assert [name for name in names_in(tmp_path) if "part" in name] == ["map_preview.0123abcd.part.png"]


def test_products_are_made_by_one_run_at_a_time(tmp_path: Path) -> None:
    write_raster(tmp_path / "scene.tif", noise(70, 90))
    do_job(ProbabilityEngine(64), job_of(tmp_path))
    with open(tmp_path / "map.tif", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SceneError, match=r"another run is writing the products of .*map\.tif"):
            do_job(ProbabilityEngine(64), job_of(tmp_path, preview=True))
    do_job(ProbabilityEngine(64), job_of(tmp_path, preview=True))
    assert (tmp_path / "map_preview.png").exists()
