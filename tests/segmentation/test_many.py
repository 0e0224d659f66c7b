"""Many scenes: each for itself, nothing lost, a report of all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from scene_helpers import FakeEngine, names_in, noise, read_labels, sparse_raster, write_raster

from cdkd_edge.core.errors import EngineError, FleetError, SceneError, SystemRefusalError, UsageError
from cdkd_edge.core.process import child_environment
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.raster.read import SceneReader, Stretch
from cdkd_edge.segmentation import dispatch
from cdkd_edge.segmentation.dispatch import InProcess, ProcessPool, RunObserver
from cdkd_edge.segmentation.jobs import EngineRef, Failure, Job, JobReport, decode, encode, file_state
from cdkd_edge.segmentation.many import engine_ref, plan_outputs, scenes_of, segment_many, workers_for
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.outputs import label_map_paths
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.products import NO_PRODUCTS, ProductOptions
from cdkd_edge.segmentation.worker import run_job as run_and_catch

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

REF = EngineRef("fake.onnx", "fake", "fp32", "fake", "ab" * 32, "cd" * 32)


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scenes(tmp_path: Path) -> list[str]:
    """Three scenes in ``scenes/``, named relative to the current directory."""
    (tmp_path / "scenes").mkdir()
    return [
        str(write_raster(Path("scenes") / f"{name}.tif", noise(70, 90 + index, seed=index)))
        for index, name in enumerate("abc")
    ]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``use(engine)``: this process loads this engine."""

    def use(engine: FakeEngine) -> FakeEngine:
        monkeypatch.setattr(dispatch, "load_engine", lambda path, threads: engine)
        return engine

    return use


def segment(scenes: list[str], out: str = "maps", **options: Any) -> Any:
    """The scenes through this process; returns the report."""
    observer = options.pop("observer", None)
    segment_options = options.pop("options", SegmentOptions())
    products = options.pop("products", NO_PRODUCTS)
    overwrite, keep_folders = options.get("overwrite", False), options.pop("keep_folders", False)
    names, outputs = plan_outputs(scenes, Path(out), Path(), products, keep_folders=keep_folders, overwrite=overwrite)
    return segment_many(names, outputs, InProcess(REF), REF, segment_options, products, observer=observer, **options)


def rows(path: Path = Path("report.json")) -> dict[str, str]:
    return {Path(row["scene"]).stem: row["status"] for row in json.loads(path.read_text())["scenes"]}


# --- which scenes -----------------------------------------------------------------------------------


def test_patterns_folders_lists_and_names(scenes: list[str], tmp_path: Path) -> None:
    (tmp_path / "scenes" / "deep").mkdir()
    deep = shutil.copy(scenes[0], "scenes/deep/d.tif")
    Path("list.txt").write_text("# first\nscenes/c.tif\n\nscenes/[ab].tif\n")
    remote = "/vsicurl/https://example.org/*.tif?x=[1]"
    assert scenes_of(["scenes/*.tif"]) == scenes
    assert scenes_of(["scenes/**/*.tif"]) == sorted([*scenes, deep])
    assert scenes_of(["scenes"]) == scenes
    assert scenes_of(["@list.txt"]) == [scenes[2], *scenes[:2]]
    assert scenes_of([remote, "https://example.org/a.tif"]) == [remote, "https://example.org/a.tif"]
    assert scenes_of([scenes[1], "scenes/*.tif", str(tmp_path / "scenes/a.tif")]) == [scenes[1], scenes[0], scenes[2]]
    assert scenes_of(["gone.tif", scenes[0]]) == ["gone.tif", scenes[0]]


def test_links_that_go_in_circles(scenes: list[str], tmp_path: Path) -> None:
    """Two of them in one folder are 2 ** 40 paths."""
    for name in ("up", "again"):
        (tmp_path / "scenes" / name).symlink_to("..")
    (tmp_path / "scenes" / "circle.tif").symlink_to("circle.tif")
    assert [path for path in scenes_of(["scenes/**/*.tif"]) if "circle" not in path] == sorted(scenes)
    with pytest.raises(SceneError, match="does not exist"):
        SceneReader("scenes/circle.tif")


def test_a_name_that_looks_like_a_pattern_or_a_list_is_a_file_first(tmp_path: Path) -> None:
    for name in ("a[1].tif", "@odd.tif"):
        write_raster(tmp_path / name, noise(8, 8))
        assert scenes_of([name]) == [name]


@pytest.mark.parametrize(
    ("argument", "pattern"),
    [
        ("scenes/*.jp2", r"no raster matches scenes/\*\.jp2"),
        ("empty", "empty holds no raster"),
        ("@gone.txt", r"the list gone\.txt cannot be read"),
        ("@blank.txt", r"the list blank\.txt names no scene"),
        ("@/dev/zero", "the list /dev/zero cannot be read: larger than"),
        ("@scenes/a.tif", "is no text file"),
        ("@long.txt", "names 100001 scenes"),
    ],
)
def test_what_names_no_scene(scenes: list[str], argument: str, pattern: str) -> None:
    Path("empty").mkdir()
    Path("blank.txt").write_text("\n# nothing\n")
    Path("long.txt").write_text("a\n" * 100_001)
    with pytest.raises(SceneError, match=pattern):
        scenes_of([argument])


def test_a_link_gives_way_to_the_file_it_leads_to(scenes: list[str]) -> None:
    """``latest.tif`` leads elsewhere tomorrow, and its label map would be of another scene."""
    Path("scenes/a-latest.tif").symlink_to("b.tif")
    Path("scenes/z.tif").symlink_to("b.tif")
    assert sorted(scenes_of(["scenes"])) == sorted(scenes)
    assert scenes_of(["scenes/z.tif"]) == ["scenes/z.tif"]


def test_links_in_a_loop_are_a_scene_that_fails(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    for name in ("x", "y"):
        Path(f"scenes/{name}.tif").symlink_to(f"{'y' if name == 'x' else 'x'}.tif")
    with pytest.raises(FleetError, match=r"1 of 2 scenes failed: x\.tif"):
        segment([scenes[0], "scenes/x.tif"])
    with pytest.raises(SceneError, match="is a link"):
        plan_outputs([scenes[0]], Path("scenes/x.tif"), Path(), overwrite=True)


def test_a_pipe_beside_a_label_map_is_refused_before_gdal_waits_for_it(scenes: list[str]) -> None:
    os.mkfifo("a_labels.tif.aux.xml")
    with pytest.raises(SceneError, match="is a device or a pipe"):
        plan_outputs(scenes[:1], Path(), Path(), overwrite=False)


def test_a_link_to_nothing_is_a_scene_that_fails(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    Path("scenes/gone.tif").symlink_to("../unmounted/gone.tif")
    with pytest.raises(FleetError, match=r"1 of 4 scenes failed: gone\.tif"):
        segment(["scenes/*.tif"])


def test_two_scenes_of_one_name_are_refused_up_front(scenes: list[str]) -> None:
    Path("other").mkdir()
    shutil.copy(scenes[0], "other/a.tif")
    with pytest.raises(SceneError, match=r"two scenes would both become maps/a_labels\.tif: scenes/a\.tif and other/a"):
        plan_outputs(["scenes", "other"], Path("maps"), Path(), (), overwrite=False)
    with pytest.raises(UsageError, match="is one file for 3 scenes; name a directory"):
        plan_outputs(["scenes"], Path("map.tif"), Path(), (), overwrite=False)


@pytest.mark.parametrize(
    ("scene", "label_map"),
    [
        ("scenes/a.tif", "maps/scenes/a_labels.tif"),
        ("./scenes/../scenes/deep/a.tif", "maps/scenes/deep/a_labels.tif"),
        ("../../scenes/a.tif", "maps/scenes/a_labels.tif"),
        ("/data/pass 1/a.tif", "maps/data/pass 1/a_labels.tif"),
        ("a.tif", "maps/a_labels.tif"),
        ("/vsicurl/https://example.org/pass/a.tif", "maps/a_labels.tif"),
    ],
)
def test_folders_are_kept_below_the_output(scene: str, label_map: str) -> None:
    assert label_map_paths([scene], Path("maps"), Path(), keep_folders=True) == [Path(label_map)]


def test_scenes_of_one_name_in_folders_of_their_own(scenes: list[str], use: Any) -> None:
    Path("other/deep").mkdir(parents=True)
    shutil.copy(scenes[0], "other/deep/a.tif")
    use(FakeEngine())
    for status in ("done", "kept"):
        document = segment(["scenes", "other/**/*.tif"], keep_folders=True, report_path=Path("report.json"))
        assert {row.status for row in document.rows()} == {status}
    assert sorted(str(path) for path in Path("maps").rglob("*.tif")) == [
        "maps/other/deep/a_labels.tif",
        *(f"maps/scenes/{name}_labels.tif" for name in "abc"),
    ]
    with pytest.raises(FleetError, match=r"1 of 2 scenes failed: gone/a\.tif"):
        segment(["scenes/a.tif", "gone/a.tif"], keep_folders=True)
    with pytest.raises(SceneError, match="two scenes would both become") as caught:
        plan_outputs(["scenes/a.tif", "../scenes/a.tif"], Path("maps"), Path(), keep_folders=True, overwrite=False)
    assert "separately" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--keep-folders needs a directory"):
        plan_outputs(["scenes/a.tif"], Path("map.tif"), Path(), keep_folders=True, overwrite=False)


def test_label_maps_among_the_scenes_are_left_out(scenes: list[str], use: Any) -> None:
    """`segment scenes/*.tif --out scenes`, expanded by the shell, for the second time."""
    use(FakeEngine())
    segment(scenes, "scenes")
    again = [*scenes, *(f"scenes/{name}_labels.tif" for name in "abc")]
    planned, outputs = plan_outputs(again, Path("scenes"), Path(), overwrite=True)
    assert planned == scenes
    assert [path.name for path in outputs] == ["a_labels.tif", "b_labels.tif", "c_labels.tif"]


def test_a_scene_in_a_label_maps_place_is_not_replaced(scenes: list[str]) -> None:
    shutil.copy(scenes[0], "scenes/b_labels.tif")
    everything = [*scenes, "scenes/b_labels.tif"]
    with pytest.raises(SceneError, match=r"would overwrite the scene scenes/b_labels\.tif"):
        plan_outputs(everything, Path("scenes"), Path(), overwrite=True)


# --- each scene for itself --------------------------------------------------------------------------


def test_a_broken_scene_does_not_stop_the_others(scenes: list[str], use: Any) -> None:
    Path(scenes[1]).write_text("no raster")
    engine = use(FakeEngine())
    with pytest.raises(FleetError, match=r"2 of 4 scenes failed: b\.tif, gone\.tif") as caught:
        segment([*scenes, "gone.tif"], report_path=Path("report.json"))
    assert caught.value.exit_code == 18
    assert engine.closed
    report = json.loads(Path("report.json").read_text())
    assert rows() == {"a": "done", "b": "failed", "c": "done", "gone": "failed"}
    assert report["ended"] == "complete"
    assert report["report_version"] == 1
    totals = report["totals"]
    assert (totals["scenes"], totals["done"], totals["failed"], totals["not_begun"]) == (4, 2, 2, 0)
    assert sum(totals["class_pixels"].values()) == 70 * 90 + 70 * 92
    broken = report["scenes"][1]["error"]
    assert (broken["exit_code"], broken["reach"], broken["traceback"]) == (10, "scene", None)
    assert "not a raster" in broken["message"]
    done = report["scenes"][0]
    assert (done["engine_sha256"], done["attempts"], done["tiles"]) == ("ab" * 32, 1, 4)
    assert names_in(Path("maps")) == [f"{n}_labels{end}" for n in "ac" for end in (".qml", ".tif", ".tif.aux.xml")]


def test_the_one_scene_that_fails_says_why_itself(use: Any) -> None:
    use(FakeEngine())
    with pytest.raises(SceneError, match="does not exist"):
        segment(["gone.tif"])


def test_a_bug_that_one_scene_meets_is_that_scenes(
    scenes: list[str], use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeEngine())
    genuine = segment_scene

    def stumble(engine: Any, scene: Any, *rest: Any, **more: Any) -> Any:
        if scene == scenes[1]:
            raise ZeroDivisionError("a bug")
        return genuine(engine, scene, *rest, **more)

    monkeypatch.setattr("cdkd_edge.segmentation.pipeline.segment_scene", stumble)
    with pytest.raises(FleetError, match="1 of 3"):
        segment(scenes, report_path=Path("report.json"))
    error = json.loads(Path("report.json").read_text())["scenes"][1]["error"]
    assert (error["kind"], error["exit_code"]) == ("ZeroDivisionError", 1)
    assert "in stumble" in error["traceback"]
    with pytest.raises(ZeroDivisionError):  # with its traceback, where it is all there is to say
        segment([scenes[1]])


@pytest.mark.parametrize(
    "error",
    [
        EngineError("the GPU fell off the bus"),
        SystemRefusalError("writing failed: no space left on the device"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
    ids=["engine", "no space", "ENOSPC", "EROFS"],
)
def test_what_every_scene_would_meet_ends_the_run(scenes: list[str], use: Any, error: Exception) -> None:
    use(FakeEngine(fail_at=5, error=error))  # in the second scene
    with pytest.raises(type(error)):
        segment(scenes, report_path=Path("report.json"))
    assert rows() == {"a": "done", "b": "failed", "c": "not begun"}
    report = json.loads(Path("report.json").read_text())
    assert report["ended"] == "stopped"
    assert report["error"]["exit_code"] == (9 if isinstance(error, EngineError) else 12)
    assert report["totals"]["not_begun"] == 1


def test_an_engine_that_does_not_load_is_reported_too(scenes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise EngineError("made for another GPU")

    monkeypatch.setattr(dispatch, "load_engine", refuse)
    with pytest.raises(EngineError):
        segment(scenes, report_path=Path("report.json"))
    assert set(rows().values()) == {"not begun"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_a_report(scenes: list[str], use: Any, interruption: type[BaseException]) -> None:
    class Impatient(RunObserver):
        def begun(self, index: int, job: Job) -> None:
            if index == 1:
                raise interruption

    use(FakeEngine())
    with pytest.raises(interruption):
        segment(scenes, report_path=Path("report.json"), observer=Impatient())
    assert rows() == {"a": "done", "b": "interrupted", "c": "not begun"}
    assert json.loads(Path("report.json").read_text())["ended"] == "interrupted"


def test_a_report_that_cannot_be_written_shows_before_work_begins(scenes: list[str], use: Any) -> None:
    engine = use(FakeEngine())
    Path("file").write_text("here first")
    with pytest.raises(OSError, match="file"):
        segment(scenes, report_path=Path("file/report.json"))
    assert engine.launches == 0
    assert not Path("maps").exists()


@pytest.mark.parametrize("name", ["scenes/a.tif", "maps/a_labels.tif", "notes.txt"])
def test_a_report_replaces_nothing_but_a_report(scenes: list[str], use: Any, name: str) -> None:
    use(FakeEngine())
    segment(scenes[:1])
    Path("notes.txt").write_text('{"report": "mine"}')
    before = Path(name).read_bytes()
    with pytest.raises(FileExistsError, match="is no report"):
        segment(scenes[:1], report_path=Path(name))
    assert Path(name).read_bytes() == before
    Path("report.json").touch()  # as mktemp makes one
    for _ in range(2):
        segment(scenes[:1], report_path=Path("report.json"))
    assert rows() == {"a": "kept"}


def test_a_name_that_is_not_utf8_is_in_the_report(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    odd = "scenes/odd-\udcff.tif"
    shutil.copy(scenes[0], odd)
    with pytest.raises(FleetError):  # GDAL takes only UTF-8
        segment([scenes[0], odd], report_path=Path("report.json"))
    assert json.loads(Path("report.json").read_text())["scenes"][1]["scene"] == odd


# --- what is there is kept --------------------------------------------------------------------------


def test_what_a_kept_map_lacks_is_made_again(scenes: list[str], use: Any) -> None:
    """Of maps whose ``.tif`` alone was copied, and of those that an older release wrote without a style."""
    use(FakeEngine())
    segment(scenes[:1])
    beside = {name: Path("maps", name).read_text() for name in ("a_labels.qml", "a_labels.tif.aux.xml")}
    for name in beside:
        Path("maps", name).unlink()
    report = segment(scenes[:1])
    assert report.rows()[0].status == "kept"
    assert {name: Path("maps", name).read_text() for name in beside} == beside
    Path("maps/a_labels.qml").write_text("somebody's own")
    segment(scenes[:1])
    assert Path("maps/a_labels.qml").read_text() == "somebody's own"


def test_a_scene_whose_name_begins_with_a_blank_is_kept(scenes: list[str], use: Any) -> None:
    """TIFF drops it from the tag that names the scene."""
    use(FakeEngine())
    shutil.copy(scenes[0], "scenes/ a.tif")
    for status in ("done", "kept"):
        assert segment(["scenes/ a.tif"]).rows()[0].status == status


def test_finished_scenes_are_kept(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    first = segment(scenes[:2])
    before = {path.name: file_state(path) for path in Path("maps").iterdir()}
    engine = use(FakeEngine())
    report = segment(scenes, report_path=Path("report.json"))
    assert rows() == {"a": "kept", "b": "kept", "c": "done"}
    assert engine.launches == 4, "the third scene alone"
    assert {name: file_state(Path("maps") / name) for name in before} == before
    assert report.rows()[0].pixels == first.rows()[0].pixels
    assert report.document()["totals"]["tiles"] == 4


def change_engine(engine: FakeEngine) -> None:
    engine.artefact = dataclasses.replace(engine.artefact, sha256="ef" * 32)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (change_engine, SegmentOptions(), "was made by another engine"),
        (None, SegmentOptions(overlap=3), "was made with other options: --overlap was 16 and is 3"),
        (None, SegmentOptions(bands=(3, 2, 1)), "--bands was 1,2,3 and is 3,2,1"),
        (None, SegmentOptions(stretch=Stretch(0, 100, percentiles=False)), "--stretch was not given and is 0..100"),
    ],
)
def test_a_map_made_otherwise_is_not_kept(
    scenes: list[str], use: Any, change: Any, options: SegmentOptions, reason: str
) -> None:
    use(FakeEngine())
    segment(scenes[:1])
    before = Path("maps/a_labels.tif").read_bytes()
    engine = use(FakeEngine())
    if change:
        change(engine)
    with pytest.raises(SceneError, match=f"exists and .*{reason}") as caught:
        segment(scenes[:1], options=options)
    assert "--overwrite" in str(caught.value.hint)
    assert Path("maps/a_labels.tif").read_bytes() == before
    assert segment(scenes[:1], options=options, overwrite=True).rows()[0].status == "done"


def test_a_map_with_a_stretch_is_not_one_without(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    segment(scenes[:1], options=SegmentOptions(stretch=Stretch(0, 255, percentiles=False)))
    with pytest.raises(SceneError, match=r"--stretch was 0\.\.255.* and is not given"):
        segment(scenes[:1])


def test_what_else_may_be_in_a_maps_place(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    segment(scenes[:1])
    output = Path("maps/a_labels.tif")
    whole = output.read_bytes()

    def refused(reason: str) -> None:
        content = output.read_bytes()
        with pytest.raises(SceneError, match=reason):
            segment(scenes[:1])
        assert output.read_bytes() == content

    output.write_text("mine")
    refused("is no label map: .* is not a raster")
    write_raster(output, noise(70, 90, bands=1))
    refused("is no label map of cdkd-edge")
    output.write_bytes(whole[:-60])
    refused("damaged|no label map")
    shutil.copy("maps/a_labels.tif", "other.tif")
    output.write_bytes(whole)
    os.utime(output, (1, 1))
    refused(r"is older than scenes/a\.tif")
    write_raster(Path(scenes[0]), noise(70, 95))
    output.touch()
    output.write_bytes(whole)
    refused("has 90 x 70 px; the scene has 95 x 70")


def test_products_of_a_kept_map_are_made_if_they_are_missing(scenes: list[str], use: Any) -> None:
    use(FakeEngine())
    segment(scenes[:2])
    report = segment(scenes[:2], products=ProductOptions(preview=True))
    assert [row.status for row in report.rows()] == ["kept", "kept"]
    picture = Path("maps/a_labels_preview.png")
    assert report.rows()[0].document()["preview"] == str(picture)
    before = file_state(picture)
    segment(scenes[:2], products=ProductOptions(preview=True))
    assert file_state(picture) == before


# --- jobs as data -----------------------------------------------------------------------------------


def run_job(engine: FakeEngine, job: Job) -> JobReport:
    return run_and_catch(engine, job)[0]


def job_of(scene: str, output: str = "map.tif", **changes: Any) -> Job:
    return Job(scene=scene, output=output, engine=REF, before=file_state(Path(output)), **changes)


def test_jobs_and_reports_survive_the_wire(scenes: list[str]) -> None:
    options = SegmentOptions(overlap=4, bands=[3, 2, 1], stretch=Stretch(2, 98, percentiles=True))
    job = job_of(
        "odd-\udcff.tif", options=options, products=ProductOptions(preview=True), token="t", scene_is_file=True
    )
    assert decode(encode(job), Job) == job
    for scene in (scenes[0], "gone.tif"):
        report = run_job(FakeEngine(), job_of(scene, products=ProductOptions(preview=True)))
        assert decode(encode(report), JobReport) == report
    kept = run_job(FakeEngine(), job_of(scenes[0]))
    assert kept.status == "kept"
    assert decode(encode(kept), JobReport) == kept


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_begun_again_does_not_redo_what_was_finished(scenes: list[str], overwrite: bool) -> None:
    """Its worker was lost after the map got its name and before the answer arrived."""
    engine = FakeEngine()
    run_job(engine, job_of(scenes[0]))
    job = job_of(scenes[0], overwrite=overwrite)
    if not overwrite:
        Path("map.tif").unlink()
        job = dataclasses.replace(job, before=None)
    assert run_job(engine, job).status == "done"
    finished, launches = file_state(Path("map.tif")), engine.launches
    again = run_job(engine, dataclasses.replace(job, attempt=2))
    assert (again.status, again.attempts) == ("done", 2)
    assert again.notes == ("finished by an earlier attempt, whose answer was lost",)
    assert file_state(Path("map.tif")) == finished
    assert engine.launches == launches


def test_overwriting_is_done_once_asked_for(scenes: list[str]) -> None:
    run_job(FakeEngine(), job_of(scenes[0]))
    write_raster(Path(scenes[0]), np.zeros((3, 70, 90), np.uint8))
    report = run_job(FakeEngine(), job_of(scenes[0], overwrite=True))
    assert (report.status, report.result is not None) == ("done", True)
    assert not read_labels(Path("map.tif")).any()


def test_out_of_memory_is_the_scenes_own_failure() -> None:
    failure = Failure.of(MemoryError())
    assert (failure.reach, failure.exit_code) == ("scene", 12)


def test_label_maps_name_graph_and_bands(scenes: list[str]) -> None:
    run_job(FakeEngine(), job_of(scenes[0]))
    with rasterio.open("map.tif") as dataset:
        assert dataset.tags()["BANDS"] == "1,2,3"
        assert dataset.tags()["GRAPH"] == f"fake-graph.onnx sha256:{'cd' * 32}"


def test_boards_with_engines_of_one_graph_keep_each_others_maps(scenes: list[str]) -> None:
    job = dataclasses.replace(job_of(scenes[0]), engine=dataclasses.replace(REF, sha256=None, folder="engines"))
    run_job(FakeEngine(), job)
    job = dataclasses.replace(job, before=file_state(Path("map.tif")))
    other = FakeEngine()
    change_engine(other)
    assert run_job(other, job).status == "kept"
    assert run_job(other, dataclasses.replace(job, engine=REF)).status == "failed"


def test_an_option_that_fits_no_scene_is_wrong_usage_and_said_once(scenes: list[str], use: Any, tmp_path: Path) -> None:
    use(FakeEngine(64))
    with pytest.raises(UsageError, match="an overlap of 64 px"):
        segment(scenes, options=SegmentOptions(overlap=64), report_path=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["status"] for row in report["scenes"]] == ["failed", "not begun", "not begun"]


# --- in processes of their own ----------------------------------------------------------------------


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def filled(spool: Path) -> bool:
    """Whether rows of tiles are in it."""
    return spool.exists() and spool.stat().st_size > 1 << 15


class Killing(RunObserver):
    """Kills the process that has the first scene, so many times, as soon as it tells of tiles."""

    def __init__(self, workers: ProcessPool, times: int) -> None:
        self.workers, self.times = workers, times
        self.notes: list[str] = []

    def tiles(self, index: int, done: int, total: int) -> None:
        if index == 0 and len(self.notes) < self.times and 0 < done < total:
            (worker,) = [
                one for one in self.workers._workers.values() if one._task is not None and one._task.index == 0
            ]
            worker.process.kill()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("times", [1, 3])
def test_a_scene_whose_process_is_killed_goes_to_another_one_at_most_three_times(
    small_engine_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    names = [str(write_raster(tmp_path / "large.tif", noise(1200, 1000)))]
    names += [str(write_raster(tmp_path / f"s{i}.tif", noise(200, 150, seed=i))) for i in range(3)]
    outputs = [Path("maps") / f"{Path(name).stem}_labels.tif" for name in names]
    workers, ref = workers_for(engine_ref(small_engine_path, threads=1), None, 2)
    assert isinstance(workers, ProcessPool)
    observer = Killing(workers, times)
    failing = pytest.raises(FleetError, match=r"1 of 4 scenes failed: large\.tif")
    with failing if times == 3 else contextlib.nullcontext():
        segment_many(names, outputs, workers, ref, report_path=Path("report.json"), observer=observer)
    report = json.loads(Path("report.json").read_text())
    assert [row["attempts"] for row in report["scenes"]] == [min(times + 1, 3), 1, 1, 1]
    assert [row["status"] for row in report["scenes"]] == ["done" if times == 1 else "failed", "done", "done", "done"]
    assert report["crew"] == {"kind": "workers", "workers": 2}
    assert len(observer.notes) == times
    assert all("large.tif" in note for note in observer.notes)
    with contextlib.closing(load_engine(small_engine_path, threads=1)) as engine:
        for name, output in list(zip(names, outputs, strict=True))[times == 3 :]:
            segment_scene(engine, name, tmp_path / "undisturbed.tif")
            assert output.read_bytes() == (tmp_path / "undisturbed.tif").read_bytes(), name
    assert all(one.process.returncode is not None for one in workers._workers.values())


@pytest.mark.parametrize(
    ("number", "code", "when"),
    [
        (signal.SIGTERM, 143, "starting"),
        (signal.SIGINT, 130, "starting"),
        (signal.SIGTERM, 143, "working"),
        (signal.SIGKILL, -9, "working"),
    ],
)
def test_a_signal_ends_the_run_and_its_processes(
    small_engine_path: Path, tmp_path: Path, number: signal.Signals, code: int, when: str
) -> None:
    names = [sparse_raster(tmp_path / f"large{i}.tif", 4000, 4000) for i in range(2)]
    command = [sys.executable, "-m", "cdkd_edge", "segment", *names, "-o", "maps", "-e", small_engine_path]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=child_environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    started: list[int] = []
    spools = [Path("maps") / f"large{i}_labels.tif.partial" / "labels.spool" for i in range(2)]
    while len(started) < 2 or (when == "working" and not any(map(filled, spools))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        started = children(process.pid)
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in said
    assert (b"the same command resumes from there" in said) == (when == "working" and code > 0)
    assert not list(Path("maps").glob("*.tif"))
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_share_the_cores(small_engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdkd_edge.segmentation.many.available_cores", lambda: 6)
    assert workers_for(engine_ref(small_engine_path), None, 3)[1].threads == 2
    assert workers_for(engine_ref(small_engine_path), None, 100)[1].threads == 1
    assert workers_for(engine_ref(small_engine_path, threads=5), None, 3)[1].threads == 5


def test_an_engine_that_no_process_can_load(small_engine_path: Path, scenes: list[str], tmp_path: Path) -> None:
    for path in (small_engine_path, small_engine_path.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    engine = tmp_path / small_engine_path.name
    engine.write_bytes(engine.read_bytes()[:-1])
    workers, ref = workers_for(engine_ref(engine), None, 2)
    with pytest.raises(EngineError, match=r"no worker can do this: .*small"):
        segment_many(scenes, [Path(f"{i}.tif") for i in range(3)], workers, ref)
