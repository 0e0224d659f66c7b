"""The command line: three commands in a workspace, one line for every mistake, nothing half-written."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from commands import assert_answer, assert_wrong_usage, finish, run, start
from PIL import Image
from rasterio.transform import from_origin
from scene_helpers import SCHEMA, names_in, noise, read_labels, sparse_raster, write_raster

from cdkd_edge import __version__, cli
from cdkd_edge.core.files import whole_folder
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segmentation.pipeline import segment_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

COMMANDS = [
    "info", "convert", "distill", "finetune", "export", "calibrate", "build", "inspect", "segment", "bench", "sweep",
    "compare", "power", "roofline", "evaluate", "parity", "demo", "doctor",
]  # fmt: skip
QUICK = ("--duration", "0.1", "--max-warm-up", "0")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, small_graph: Path) -> Path:
    """A workspace with a graph, and an engine that `build` made of it. Not to be changed."""
    workspace = tmp_path_factory.mktemp("built")
    (workspace / "export").mkdir()
    for path in (small_graph, small_graph.with_suffix(".json")):
        shutil.copy(path, workspace / "export")
    result = run("build", "--workspace", workspace)
    assert result.exit_code == 0, result.stderr
    return workspace


@pytest.fixture
def workspace(built: Path, tmp_path: Path) -> Path:
    """A copy of ``built`` with a scene in it, which is also the current directory."""
    path = tmp_path / "workspace"
    shutil.copytree(built, path)
    write_raster(path / "scene.tif", noise(70, 90))
    return path


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is the default workspace; it must not be the repository."""
    monkeypatch.chdir(tmp_path)


def untouched(folder: Path) -> Callable[[], bool]:
    """Whether what is in a folder is still the same."""

    def state() -> dict[str, bytes | None]:
        return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names_in(folder)}

    before = state()
    return lambda: state() == before


# --- help -----------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "--workspace" in result.stdout or command in (
        "info",
        "convert",
        "distill",
        "finetune",
        "compare",
        "power",
    )  # they are told where everything is
    assert "--json" in result.stdout


def test_the_list_above_is_complete() -> None:
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert sorted(names) == sorted(COMMANDS)


def test_help_lists_the_commands_as_they_are_used() -> None:
    lines = run("--help").stdout.partition("Commands")[2].splitlines()
    first_words = [line.strip(" │").split(" ")[0] for line in lines]
    assert [word for word in first_words if word in COMMANDS] == COMMANDS


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"cdkd-edge {__version__}\n")


def test_without_a_command_there_is_help() -> None:
    result = run()
    assert "Usage:" in result.stdout + result.stderr
    assert "segment" in result.stdout + result.stderr


def test_as_a_process() -> None:
    helping, versioning = start("--help"), start("--version")
    code, out, err = finish(helping)
    assert (code, err) == (0, "")
    assert "segment" in out
    assert finish(versioning) == (0, f"cdkd-edge {__version__}\n", "")


# --- the way it is meant --------------------------------------------------------------------------


def test_build_leaves_an_engine_where_the_next_command_looks(built: Path) -> None:
    assert names_in(built / "engines") == ["small.fp32.cpu.json", "small.fp32.cpu.onnx"]


def test_build_as_json(workspace: Path) -> None:
    result = run("build", "-w", workspace, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["path"] == str(workspace / "engines" / "small.fp32.cpu.onnx")
    assert document["manifest"]["tile"] == 64
    assert names_in(workspace / "engines") == ["small.fp32.cpu.json", "small.fp32.cpu.onnx"]


def test_build_from_and_to_a_place(workspace: Path, tmp_path: Path) -> None:
    result = run("build", workspace / "export" / "small.onnx", "-o", tmp_path / "new" / "other.onnx")
    assert result.exit_code == 0, result.stderr
    assert names_in(tmp_path / "new") == ["other.json", "other.onnx"]
    assert f"engine {tmp_path / 'new' / 'other.onnx'}" in result.stdout


def test_segment_in_the_current_directory(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    result = run("segment", "scene.tif")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("label map scene_labels.tif\n")
    assert "90 x 70 px" in result.stdout
    engine = load_engine(workspace / "engines" / "small.fp32.cpu.onnx")
    segment_scene(engine, "scene.tif", Path("again.tif"))
    engine.close()
    assert (read_labels(Path("scene_labels.tif")) == read_labels(Path("again.tif"))).all()


def test_segment_several_scenes_into_a_folder_as_json(workspace: Path, tmp_path: Path) -> None:
    transform = from_origin(5, 9, 2, 2)
    second = write_raster(workspace / "second.tif", noise(64, 64), crs="EPSG:32640", transform=transform)
    result = run(
        "segment",
        workspace / "scene.tif",
        second,
        "-w",
        workspace,
        "-o",
        tmp_path / "maps",
        "--json",
        "--preview",
        "--stac",
    )
    assert result.exit_code == 0, result.stderr
    first, other = json.loads(result.stdout)
    assert first["scene"] == str(workspace / "scene.tif")
    assert first["output"] == str(tmp_path / "maps" / "scene_labels.tif")
    assert sum(first["class_pixels"].values()) + first["no_data_pixels"] == 70 * 90
    assert list(first["class_pixels"]) == list(SCHEMA.class_names)
    assert (other["tiles"], other["height"], other["width"]) == (1, 64, 64)
    assert names_in(tmp_path / "maps") == sorted(
        f"{stem}_labels{end}"
        for stem in ("scene", "second")
        for end in (".tif", ".tif.aux.xml", ".qml", "_preview.png", ".stac.json")
    )
    assert json.loads(Path(other["stac"]).read_text())["stac_version"].startswith("1.")
    with Image.open(other["preview"]) as picture:
        assert picture.format == "PNG"


def test_segment_a_scene_of_one_pixel(workspace: Path, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "pixel.tif", noise(1, 1))
    result = run("segment", path, "-w", workspace, "-o", tmp_path / "map.tif")
    assert result.exit_code == 0, result.stderr
    assert read_labels(tmp_path / "map.tif").shape == (1, 1)


def test_options_reach_the_run(workspace: Path, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "deep.tif", noise(70, 90, bands=5).astype(np.uint16), photometric="MINISBLACK")
    common = ("segment", path, "-w", workspace, "--json", "--bands", "5,4,1", "--overlap", "20", "--threads", "1")
    documents = []
    for index, stretch in enumerate(
        [("--stretch",), ("--stretch-percentiles", "2", "98"), ("--stretch-range", "0", "255")]
    ):
        result = run(*common, *stretch, "-o", tmp_path / f"{index}.tif")
        assert result.exit_code == 0, result.stderr
        documents += json.loads(result.stdout)
    assert [document["tiles"] for document in documents] == [4, 4, 4]
    assert documents[0]["class_pixels"] == documents[1]["class_pixels"]
    eight_bit = write_raster(tmp_path / "bytes.tif", noise(70, 90, bands=5)[[4, 3, 0]])
    assert run("segment", eight_bit, "-w", workspace, "--overlap", 20, "-o", tmp_path / "bytes_map.tif").exit_code == 0
    assert (read_labels(tmp_path / "bytes_map.tif") == read_labels(tmp_path / "2.tif")).all()


def test_overwrite(workspace: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    command = ("segment", workspace / "scene.tif", "-w", workspace, "-o", output)
    assert run(*command).exit_code == 0
    unchanged = untouched(tmp_path)
    result = run(*command)
    assert result.exit_code == 0
    assert "map.tif, kept: it was there" in result.stdout
    assert unchanged()
    assert_answer(
        run(*command, "--overlap", "3"),
        10,
        r"map\.tif exists and was made with other options: --overlap was 16 and is 3 — ",
    )
    assert unchanged()
    assert run(*command, "--overwrite").exit_code == 0


def test_bench(workspace: Path) -> None:
    result = run("bench", "-w", workspace, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "tiles/s" in result.stdout
    assert "not measured: not asked for" in result.stdout
    (folder,) = (workspace / "benchmarks").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-small", folder.name)
    assert {"summary.json", "tiles.csv"} <= set(names_in(folder))


def test_bench_as_json(workspace: Path) -> None:
    result = run("bench", "-w", workspace, *QUICK, "--scene", workspace / "scene.tif", "--json", "--power-trace")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads((Path(document["folder"]) / "summary.json").read_text()) == document["summary"]
    assert document["summary"]["end_to_end"]["scene"] == "scene.tif"
    figures = document["summary"]["figures"]
    assert (figures["power"] is None) == bool(figures["power_reason"])


def test_bench_into_a_named_folder(workspace: Path, tmp_path: Path) -> None:
    assert run("bench", "-w", workspace, *QUICK, "-o", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert_answer(run("bench", "-w", workspace, *QUICK, "-o", tmp_path / "run"), 12, "File exists")


def test_two_benchmarks_in_the_same_second_do_not_meet(workspace: Path) -> None:
    for _ in range(3):
        assert run("bench", "-w", workspace, *QUICK, "--scene", workspace / "scene.tif").exit_code == 0
    assert len(list((workspace / "benchmarks").iterdir())) == 3


def test_two_benchmarks_at_the_same_time_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the later one learns of it when its measurement is over."""

    class Noon(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Noon:
            return cls(2026, 1, 1, 12, tzinfo=tz)

    monkeypatch.setattr("cdkd_edge.core.workspace.datetime.datetime", Noon)
    space, made = Workspace(tmp_path), []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            made.append(space.new_run("engine"))
            stack.enter_context(whole_folder(made[-1]))
    assert [path.name for path in made] == [f"20260101T120000Z-engine{number}" for number in ("", "-2", "-3")]
    assert all(path.is_dir() for path in made)


@pytest.mark.needs_torch
def test_export_build_segment_with_nothing_but_defaults(
    tmp_path: Path, small_weights: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from cdkd_edge.model.checkpoint import save_checkpoint
    from cdkd_edge.model.network import SegmentationNetwork

    network = SegmentationNetwork(small_config)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in small_weights.items()}, strict=False)
    save_checkpoint(network.eval(), tmp_path / "ckpt.pt")
    write_raster(tmp_path / "scene.tif", noise(70, 90))
    unknown = run("export", "ckpt.pt", "--schema", "atlantis")
    assert_answer(unknown, 4, r"unknown label schema 'atlantis' — use one of deepglobe, loveda, dubai")
    assert names_in(tmp_path) == ["ckpt.pt", "scene.tif"]
    for command in (("export", "ckpt.pt", "--schema", "dubai"), ("build",), ("segment", "scene.tif")):
        result = run(*command)
        assert result.exit_code == 0, result.stderr
    assert names_in(tmp_path / "export") == ["ckpt.fp16.json", "ckpt.fp16.onnx", "ckpt.json", "ckpt.onnx"]
    assert names_in(tmp_path / "engines") == ["ckpt.fp32.cpu.json", "ckpt.fp32.cpu.onnx"]
    assert read_labels(tmp_path / "scene_labels.tif").max() < 5


# --- mistakes: the workspace ----------------------------------------------------------------------


HOSTILE = "\x1b]0;owned\x07\x9b31m[red]x[/nothing]\u202ecba\ufffe\n:smile:"
SHOWN = "]0;owned  31m[red]x[/nothing] cba  :smile:"


@pytest.mark.parametrize("terminal", [False, True])
def test_text_from_files_does_not_steer_the_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cdkd_edge.cli.progress import steps, tile_bar
    from cdkd_edge.cli.report import Listing, Report, print_json, say

    if terminal:
        for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "200")):
            monkeypatch.setenv(name, value)
    listing = Listing((HOSTILE, "b"), ((HOSTILE, HOSTILE),))
    Report(HOSTILE, [(HOSTILE, HOSTILE), ("ok", HOSTILE, HOSTILE)], {}, (listing,)).print()
    with tile_bar(HOSTILE) as progress:
        progress(1, 2)
    with steps() as step:
        step(HOSTILE)
    say(HOSTILE)
    out, err = capsys.readouterr()
    rich = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # its colours and movements, which we ask for
    for text in (rich.sub("", out), rich.sub("", err)):
        assert text.replace("\n", "").isprintable()
        assert "owned" in text
    assert SHOWN in rich.sub("", err)
    assert rich.sub("", out).count(SHOWN) == 8
    assert ("\x1b[1m" in out) == terminal
    print_json({"name": HOSTILE})
    written = capsys.readouterr().out
    assert json.loads(written) == {"name": HOSTILE}
    assert written.replace("\n", "").isprintable()


@pytest.mark.needs_torch
def test_averaged_weights_and_a_name_with_many_suffixes(tmp_path: Path, small_weights: dict[str, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")

    raw = {key: torch.from_numpy(value.copy()) for key, value in small_weights.items()}
    mean = {key: value * 0.5 for key, value in raw.items()}
    checkpoint = tmp_path / "model_best.pth.tar"
    torch.save({"model": raw, "model_ema": mean, "criterion": {"weight": torch.ones(5)}, HOSTILE: 1}, checkpoint)
    for options, averaged in (((), True), (("--weights", "raw"), False), (("--weights", "ema"), True)):
        found = json.loads(run("info", checkpoint, "--json", *options).stdout)
        assert found["averaged"] == averaged
        assert {"what": "used only in training", "tensors": 1, "example": "criterion.weight"} in found["dropped"]
    result = run("export", checkpoint, "--no-fp16", "--weights", "raw", "-w", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "export" / "model_best.onnx").exists()
    assert "raw weights taken, as asked" in result.stdout
    assert_answer(run("info", checkpoint, "--weights", "best"), 3, "holds no weights 'best'.*model, model_ema")


def duplicate(path: Path, name: str) -> None:
    shutil.copy(path, path.with_name(name))
    shutil.copy(path.with_suffix(".json"), path.with_name(name).with_suffix(".json"))


def test_no_graph(tmp_path: Path) -> None:
    assert_answer(run("build"), 5, r"there is no exported graph in export — make one: cdkd-edge export")
    assert names_in(tmp_path) == []


def test_two_graphs(workspace: Path) -> None:
    duplicate(workspace / "export" / "small.onnx", "other.onnx")
    unchanged = untouched(workspace)
    result = run("build", "-w", workspace)
    assert_answer(result, 5, r"2 candidates for the exported graph .*: other\.onnx, small\.onnx — say which: ")
    assert f"cdkd-edge build {workspace / 'export' / 'other.onnx'}" in result.stderr
    assert unchanged()


@pytest.mark.parametrize(
    "command", [("bench",), ("inspect",), ("evaluate", "--data", "."), ("parity", "ckpt.pt", "--data", ".")]
)
def test_an_engine_is_named_in_the_same_way_everywhere(tmp_path: Path, command: tuple[str, ...]) -> None:
    first, *options = command
    place = options[:1] if first == "parity" else []
    rest = options[len(place) :]
    assert_answer(run(first, *place, "a.engine", "-e", "b.engine", *rest), 2, "engine is named already")
    if first not in ("evaluate", "parity"):
        for named in (("a.engine",), ("-e", "a.engine"), ("--engine", "a.engine")):
            assert_answer(run(first, *named, *rest), 6, r"a\.engine does not exist")
    assert_answer(run(first, *place, *rest), 5, "there is no engine in engines")


def test_no_engine(tmp_path: Path) -> None:
    write_raster(tmp_path / "scene.tif", noise(70, 90))
    assert_answer(
        run("segment", "scene.tif"),
        5,
        r"there is no engine in engines — make one: cdkd-edge export CKPT && cdkd-edge build",
    )
    assert_answer(run("bench"), 5, r"there is no engine")
    assert names_in(tmp_path) == ["scene.tif"]


def test_two_engines(workspace: Path) -> None:
    duplicate(workspace / "engines" / "small.fp32.cpu.onnx", "other.onnx")
    unchanged = untouched(workspace)
    for command in (("bench",), ("segment", workspace / "scene.tif")):
        result = run(*command, "-w", workspace)
        assert_answer(result, 5, r"2 candidates for the engine .*other\.onnx, small\.fp32\.cpu\.onnx")
        assert f"{workspace / 'engines' / 'other.onnx'}" in result.stderr
    assert unchanged()
    assert (
        run("segment", workspace / "scene.tif", "-w", workspace, "-e", workspace / "engines/other.onnx").exit_code == 0
    )


def test_an_engine_without_its_manifest(workspace: Path) -> None:
    engine = workspace / "engines" / "small.fp32.cpu.onnx"
    engine.with_suffix(".json").unlink()
    unchanged = untouched(workspace)
    assert_answer(run("bench", engine, "-w", workspace), 6, r"no manifest \(small\.fp32\.cpu\.json\) beside it")
    assert_answer(run("segment", workspace / "scene.tif", "-w", workspace), 5, "there is no engine")
    assert unchanged()


def tampered(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("harm", [tampered, lambda content: content[:1000], lambda content: b""])
def test_an_engine_that_was_changed(workspace: Path, harm: Callable[[bytes], bytes]) -> None:
    engine = workspace / "engines" / "small.fp32.cpu.onnx"
    engine.write_bytes(harm(engine.read_bytes()))
    unchanged = untouched(workspace)
    for command in (("bench",), ("segment", workspace / "scene.tif")):
        assert_answer(run(*command, "-w", workspace), 6, r"is not the file its manifest describes")
    assert unchanged()


@pytest.mark.parametrize("harm", [tampered, lambda content: content[:1000]])
def test_a_graph_that_was_changed(workspace: Path, harm: Callable[[bytes], bytes]) -> None:
    graph = workspace / "export" / "small.onnx"
    graph.write_bytes(harm(graph.read_bytes()))
    unchanged = untouched(workspace)
    assert_answer(run("build", "-w", workspace), 6, r"small\.onnx is not the file its manifest describes")
    assert unchanged()


def test_a_graph_is_no_engine_and_an_engine_no_graph(workspace: Path) -> None:
    graph, engine = workspace / "export/small.onnx", workspace / "engines/small.fp32.cpu.onnx"
    assert_answer(run("bench", graph, "-w", workspace), 6, "is a graph, not an engine")
    assert_answer(run("build", engine, "-w", workspace), 6, "is an engine, not a graph")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile", 32),
        ("tile", 0),
        ("tile", -64),
        ("tile", "64"),
        ("tile", 10**9),
        ("batch", 2),
        ("batch", 0),
        ("batch", -1),
        ("labels", {}),
        ("labels", {"name": "x", "classes": [{"name": "\x1b[31m", "color": [0, 0, 0]}]}),
        ("libraries", {"onnxruntime": "0.1.0"}),
        ("libraries", {}),
        ("runtime", "abacus"),
        ("manifest_version", 99),
        ("kind", "graph"),
    ],
)
def test_a_manifest_that_was_changed(workspace: Path, key: str, value: object) -> None:
    manifest = workspace / "engines" / "small.fp32.cpu.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {key: value}))
    unchanged = untouched(workspace)
    result = run("segment", workspace / "scene.tif", "-w", workspace)
    assert result.exit_code in (6, 9, 10, 12)
    assert_answer(result, result.exit_code, "error: .")
    assert unchanged()


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x08\x07\x12\x00garbage" * 100], ids=["empty", "text", "bytes"])
def test_a_manifest_that_was_made_to_fit(workspace: Path, content: bytes) -> None:
    for path in (workspace / "export/small.onnx", workspace / "engines/small.fp32.cpu.onnx"):
        path.write_bytes(content)
        document = json.loads(path.with_suffix(".json").read_text())
        document["artefact"]["sha256"] = hashlib.sha256(content).hexdigest()
        path.with_suffix(".json").write_text(json.dumps(document))
    unchanged = untouched(workspace)
    for command in (("build",), ("bench",), ("segment", workspace / "scene.tif")):
        result = run(*command, "-w", workspace)
        assert result.exit_code in (7, 9)
        assert_answer(result, result.exit_code, r"small")
    assert unchanged()


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json", "null", '{"kind": "engine"}'])
def test_a_manifest_that_is_none(workspace: Path, text: str) -> None:
    (workspace / "engines" / "small.fp32.cpu.json").write_text(text)
    assert_answer(run("segment", workspace / "scene.tif", "-w", workspace), 6, "small.fp32.cpu.json")


def test_the_engine_of_another_release_says_how_to_make_it_again(workspace: Path) -> None:
    manifest = workspace / "engines" / "small.fp32.cpu.json"
    document = msgspec.json.decode(manifest.read_bytes())
    document["libraries"]["onnxruntime"] = "0.1.0"
    manifest.write_bytes(msgspec.json.encode(document))
    result = run("segment", workspace / "scene.tif", "-w", workspace)
    assert_answer(result, 9, r"was built with onnxruntime 0\.1\.0; .* build it again from small\.onnx")


def test_a_file_that_does_not_exist(workspace: Path) -> None:
    assert_answer(run("build", "nowhere.onnx"), 6, r"graph nowhere\.onnx does not exist")
    assert_answer(run("bench", "nowhere.onnx"), 6, r"engine nowhere\.onnx does not exist")
    assert_answer(run("segment", "s.tif", "-e", "nowhere.onnx"), 6, r"engine nowhere\.onnx does not exist")


def test_the_engine_must_not_overwrite_its_graph(workspace: Path) -> None:
    graph = workspace / "export" / "small.onnx"
    unchanged = untouched(workspace)
    assert_wrong_usage(run("build", graph, "-o", graph), "overwrite its graph")
    assert_wrong_usage(run("build", graph, "-o", workspace / "engine.trt"), r"an \.onnx file")
    assert unchanged()


@pytest.mark.parametrize("command", [("build",), ("bench",), ("segment", "scene.tif")])
def test_a_workspace_that_is_a_file(workspace: Path, command: tuple[str, ...]) -> None:
    assert_wrong_usage(run(*command, "-w", workspace / "scene.tif"), "--workspace")


# --- mistakes: the scene --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no raster"),
        (lambda path: path.write_text("hello\n"), "is not a raster that GDAL can read"),
        (lambda path: path.write_bytes(b""), "is not a raster that GDAL can read"),
        (lambda path: write_raster(path, noise(70, 90).astype(np.uint16)), "--stretch-range LOW HIGH"),
        (lambda path: write_raster(path, noise(70, 90, bands=1)), "--bands 1,1,1"),
        (lambda path: write_raster(path, noise(70, 90).astype(np.complex64)), "complex"),
    ],
    ids=["missing", "folder", "text", "empty", "16 bit", "grey", "complex"],
)
def test_what_is_no_scene(workspace: Path, tmp_path: Path, make: Callable[[Path], object], pattern: str) -> None:
    path = tmp_path / "bad.tif"
    make(path)
    unchanged = untouched(tmp_path)
    assert_answer(run("segment", path, "-w", workspace, "-o", tmp_path / "new" / "map.tif"), 10, pattern)
    assert unchanged()


def test_a_truncated_scene(workspace: Path, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "bad.tif", noise(300, 300), compress="deflate")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_answer(run("segment", path, "-w", workspace, "-o", tmp_path / "map.tif"), 10, r"reading .*bad\.tif failed")
    assert not [name for name in names_in(tmp_path) if name.startswith("map") and "partial" not in name]


def test_the_scene_is_not_overwritten(workspace: Path) -> None:
    unchanged = untouched(workspace)
    scene = workspace / "scene.tif"
    assert_answer(run("segment", scene, "-w", workspace, "-o", scene, "--overwrite"), 10, "overwrite the scene")
    assert unchanged()


def test_no_scene_of_the_list_is_overwritten(workspace: Path) -> None:
    """`segment *.tif --overwrite`, where one scene has the name that the label map of another gets."""
    shutil.copy(workspace / "scene.tif", workspace / "scene_labels.tif")
    unchanged = untouched(workspace)
    scenes = (workspace / "scene.tif", workspace / "scene_labels.tif")
    result = run("segment", *scenes, "-w", workspace, "--overwrite")
    assert_answer(result, 10, "overwrite")
    assert unchanged()


def test_the_preview_does_not_overwrite_the_scene(workspace: Path) -> None:
    scene = workspace / "map_preview.png"
    write_raster(scene, noise(70, 90), driver="PNG")
    content = scene.read_bytes()
    run("segment", scene, "-w", workspace, "-o", workspace / "map.tif", "--preview")
    assert scene.read_bytes() == content


@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [("doctor", ">&-", 0), ("doctor", "<&- >&- 2>&-", 0), ("inspect nothing.onnx", "2>&-", 6), ("--version", "<&-", 0)],
)
def test_streams_that_were_closed(tmp_path: Path, command: str, closed: str, code: int) -> None:
    """As by some daemons."""
    script = f'"$0" -m cdkd_edge {command} {closed}; echo "left with $?"'
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    made = subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert made.stdout.endswith(f"left with {code}\n")
    assert made.stderr == ""


@pytest.mark.parametrize("command", [("doctor",), ("doctor", "--json"), ("power", "--json"), ("--help",)])
def test_who_reads_no_further_hears_no_complaint(command: tuple[str, ...]) -> None:
    """As with ``| head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    ours = [sys.executable, "-m", "cdkd_edge", *command]
    done = subprocess.run(ours, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("cdkd_edge.board.doctor.examine", broken)
    assert_answer(run("doctor"), 12, "Broken pipe")


def test_two_scenes_of_one_name(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(workspace / "scene.tif", tmp_path / "other")
    unchanged = untouched(tmp_path)
    scenes = (workspace / "scene.tif", tmp_path / "other" / "scene.tif")
    assert_answer(run("segment", *scenes, "-w", workspace), 10, r"two scenes would both become .*scene_labels\.tif")
    assert_wrong_usage(run("segment", *scenes, "-w", workspace, "-o", tmp_path / "map.tif"), "name a directory")
    assert unchanged()


# --- mistakes: the output -------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["file/map.tif", "file/deeper/map.tif", "file"])
def test_an_output_below_a_file(workspace: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("here first")
    unchanged = untouched(tmp_path)
    result = run("segment", workspace / "scene.tif", "-w", workspace, "-o", tmp_path / output)
    assert_answer(result, 12, "file")
    assert unchanged()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_that_is_a_folder_called_tif(workspace: Path, tmp_path: Path, overwrite: tuple[str, ...]) -> None:
    (tmp_path / "map.tif").mkdir()
    unchanged = untouched(tmp_path)
    result = run("segment", workspace / "scene.tif", "-w", workspace, "-o", tmp_path / "map.tif", *overwrite)
    assert result.exit_code in (10, 12)
    assert_answer(result, result.exit_code, r"map\.tif")
    assert unchanged()


def test_an_output_folder_that_exists(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    result = run("segment", workspace / "scene.tif", "-w", workspace, "-o", tmp_path / "maps")
    assert result.exit_code == 0, result.stderr
    assert names_in(tmp_path / "maps") == ["scene_labels.qml", "scene_labels.tif", "scene_labels.tif.aux.xml"]


def test_a_build_that_cannot_be_written(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    unchanged = untouched(tmp_path)
    assert_answer(run("build", "-w", workspace, "-o", tmp_path / "file" / "engine.onnx"), 12, "file")
    assert unchanged()


def test_a_benchmark_that_cannot_be_written(workspace: Path) -> None:
    (workspace / "benchmarks").write_text("here first")
    assert_answer(run("bench", "-w", workspace, *QUICK), 12, "benchmarks")


def test_a_benchmark_that_fails_leaves_no_folder(workspace: Path) -> None:
    unchanged = untouched(workspace)
    for options, code, said in (
        (("--scene", workspace / "nowhere.tif"), 10, "does not exist"),
        (("--power-source", "wattmeter"), 2, "no source of power named"),
        (("--device", "toaster"), 2, "toaster"),
        (("--paper",), 2, "one tile of 1024 px"),
    ):
        answer = run("bench", "-w", workspace, *options, *(() if "--paper" in options else QUICK))
        assert_answer(answer, code, said)
        assert unchanged(), "not even an empty benchmarks/"
    (workspace / "benchmarks").mkdir()
    assert_answer(run("bench", "-w", workspace, *QUICK, "--scene", workspace / "nowhere.tif"), 10, "does not exist")
    assert (workspace / "benchmarks").is_dir()


def test_what_a_killed_benchmark_left_goes_with_the_next(workspace: Path) -> None:
    left = workspace / "benchmarks/.20260101T000000Z-small.fp32.0123abcd.part"
    left.mkdir(parents=True)
    (left / ".reserved").write_bytes(bytes(1000))
    answer = run("bench", "-w", workspace, *QUICK, "--json")
    assert answer.exit_code == 0
    assert not left.exists()
    assert f"removed {left}, which a killed run had left" in answer.stderr.replace("\n", "")
    assert list(json.loads(answer.stdout)) == ["folder", "summary"]


# --- mistakes: the options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "pattern"),
    [
        (("--bands", "1,2"), 2, "--bands: three numbers"),
        (("--bands", "1,2,9"), 10, r"bands 1\.\.3; --bands 1,2,9"),
        (("--bands", "0,1,2"), 10, r"--bands 0,1,2"),
        (("--bands", "a,b,c"), 2, "--bands: three numbers"),
        (("--bands", ""), 2, "--bands: three numbers"),
        (("--overlap", "64"), 2, "an overlap of 64 px does not fit tiles of 64 px"),
        (("--overlap", "-1"), 2, "--overlap"),
        (("--overlap", "much"), 2, "--overlap"),
        (("--stretch-range", "5", "5"), 2, "low < high"),
        (("--stretch-range", "nan", "5"), 2, "low < high"),
        (("--stretch-percentiles", "2", "101"), 2, r"0\.\.100"),
        (("--stretch-percentiles", "2", "98", "--stretch-range", "0", "9"), 2, "--stretch-range"),
        (("--stretch-range", "5"), 2, "--stretch-range"),
        (("--threads", "0"), 2, "--threads"),
        (("--nonsense",), 2, "--nonsense"),
    ],
)
@pytest.mark.parametrize("command", ["segment", "bench"])
def test_wrong_options(
    workspace: Path, tmp_path: Path, command: str, options: tuple[str, ...], code: int, pattern: str
) -> None:
    unchanged = untouched(workspace)
    scene = workspace / "scene.tif"
    rest = (scene, "-o", tmp_path / "map.tif") if command == "segment" else ("--scene", scene, *QUICK)
    result = run(command, "-w", workspace, *rest, *options)
    if code == 2:
        assert_wrong_usage(result, pattern)
    else:
        assert_answer(result, code, pattern)
    assert not (tmp_path / "map.tif").exists()
    if command == "segment":
        assert unchanged()


@pytest.mark.parametrize(
    "arguments", [("segment",), ("nonsense",), ("bench", "--duration", "0"), ("segment", "--json")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "pattern"),
    [
        (("--merge", "hann"), 5, "no engine with probabilities in .*build --probabilities"),
        (("--merge", "mean"), 2, "no merge 'mean'"),
        (("--confidence",), 5, "no engine with confidence in .*build --confidence"),
        (("--readers", "0"), 2, "--readers"),
        (("--gsd", "-1"), 2, "positive number of metres"),
        (("--gsd", "1"), 10, "needs a scene with a reference system"),
        (("--aoi", "nowhere.geojson"), 10, "does not exist.*a GeoPackage"),
        (("--aoi", "1,2,3,4"), 10, "needs a scene with a reference system"),
    ],
)
def test_options_of_segment_that_do_not_fit(
    workspace: Path, tmp_path: Path, options: tuple[str, ...], code: int, pattern: str
) -> None:
    result = run("segment", workspace / "scene.tif", "-w", workspace, "-o", tmp_path / "maps" / "map.tif", *options)
    if code == 2:
        assert_wrong_usage(result, pattern)
    else:
        assert_answer(result, code, pattern)
    assert not (tmp_path / "maps").exists()


def test_an_export_without_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert_answer(run("export", "nowhere.pt"), 3, r"nowhere\.pt does not exist")
    assert_answer(run("info", "nowhere.pt"), 3, r"nowhere\.pt does not exist")
    (tmp_path / "text.pt").write_text("hello")
    assert_answer(run("export", "text.pt"), 3, r"text\.pt")
    assert names_in(tmp_path) == ["text.pt"]


def test_the_demo_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a board: the same graph without PyTorch, and what was skipped is said."""
    for name in ("torch", "onnxsim", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "cdkd_edge.graph.export", raising=False)
    for name, value in (("SCENE_HEIGHT", 256), ("SCENE_WIDTH", 512), ("LOAD_SECONDS", 0.5)):
        monkeypatch.setattr(f"cdkd_edge.demo.run.{name}", value)
    result = run("demo", "-w", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert "the check against PyTorch" in data["export"]["skipped"]
    assert "torch" in data["export"]["skipped"]
    assert data["export"]["manifest"]["check"]["tiles"] == 0
    assert data["mean_iou"] > 0.5
    assert data["engine"]["attention_fused"] == 6


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "ckpt.pt").touch()
    for command in (("export", "ckpt.pt"), ("info", "ckpt.pt")):
        assert_answer(run(*command), 11, r"needs torch, which is not installed — pip install 'cdkd-edge\[export\]'")
    assert names_in(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 12, "out of memory"),
        (PermissionError(13, "Permission denied", "/data/map.tif"), 12, "/data/map.tif: Permission denied"),
        (OSError("odd"), 12, "odd"),
        (ModuleNotFoundError("No module named 'rasterio'"), 1, "No module named 'rasterio' — .*reinstall"),
    ],
    ids=repr,
)
def test_what_the_system_refuses(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cdkd_edge.segmentation.pipeline.segment_scene", refuse)
    assert_answer(run("segment", workspace / "scene.tif", "-w", workspace), code, f"^error: {message}")


def test_messages_cannot_steer_the_terminal(workspace: Path) -> None:
    result = run("segment", "\x1b[31mred\nsecond.tif", "-w", workspace)  # the bracket makes it a pattern
    assert_answer(result, 10, "no raster matches")
    assert "\x1b" not in result.stderr


def test_a_scene_whose_name_is_not_utf8(workspace: Path) -> None:
    name = str(workspace / "scene-\udcff.tif")
    os.replace(workspace / "scene.tif", name)
    assert_answer(run("segment", name, "-w", workspace), 10, "scene-")


def test_what_nobody_foresaw_is_one_line_and_a_log(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("pos\x1b[31m_embed")

    monkeypatch.setattr("cdkd_edge.core.workspace.Workspace.only_graph", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    assert_answer(run("build", "-w", workspace), 70, "fault of cdkd-edge: KeyError: 'pos")
    (log,) = (workspace / "cache/cdkd-edge/errors").iterdir()
    assert "only_graph" in log.read_text()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert_answer(run("build", "-w", workspace), 70, "--debug")


def test_a_name_that_gdal_cannot_write_is_refused_before_the_work(workspace: Path) -> None:
    for name in ("a\x1bb.tif", "a\udcff.tif", "a\ufffeb.tif"):
        assert_answer(run("segment", workspace / "scene.tif", "-w", workspace, "-o", workspace / name), 10, "GDAL")
    assert not list(workspace.glob("a*"))


def test_an_error_ends_somewhere(workspace: Path) -> None:
    assert len(run("roofline", "--device", "x" * 100_000).stderr) < 2500


def test_where_stderr_takes_nothing_the_exit_code_remains(workspace: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cdkd_edge", "inspect", "nowhere.onnx"]
        assert subprocess.run(command, stderr=full, check=False).returncode == 6


def test_debug_shows_the_traceback(workspace: Path) -> None:
    result = run("--debug", "segment", "nowhere.tif", "-w", workspace)
    assert result.exit_code == 1
    assert not isinstance(result.exception, SystemExit)
    assert "does not exist" in str(result.exception)


# --- processes ------------------------------------------------------------------------------------


def test_a_process_prints_its_result_and_nothing_else(workspace: Path, tmp_path: Path) -> None:
    """No progress where nobody watches, no warning about the missing georeference."""
    good = start("segment", workspace / "scene.tif", "-w", workspace, "-o", tmp_path / "map.tif", "--json")
    bad = start("segment", workspace / "nowhere.tif", "-w", workspace, "-o", tmp_path / "other.tif")
    code, out, err = finish(good)
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["tiles"] == 4
    code, out, err = finish(bad)
    assert (code, out) == (10, "")
    assert err == f"error: scene {workspace / 'nowhere.tif'} does not exist\n"


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("segment", signal.SIGINT, 130),
        ("segment", signal.SIGTERM, 143),
        ("segment", signal.SIGHUP, 129),
        ("bench", signal.SIGINT, 130),
    ],
    ids=["segment INT", "segment TERM", "segment HUP", "bench INT"],
)
def test_a_signal_leaves_nothing_half_written(
    workspace: Path, tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    """Ctrl-C, a job scheduler, a lost ssh connection."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, and so does what they start")
    (workspace / "scene.tif").unlink()
    scene = sparse_raster(workspace / "large.tif", 6000, 6000)
    folder = tmp_path / "maps" if command == "segment" else workspace / "benchmarks"
    folder.mkdir()
    options = (scene, "-o", folder / "map.tif") if command == "segment" else ("--duration", "60")
    process = start(command, "-w", workspace, *options)
    deadline = time.monotonic() + 30
    while not names_in(folder):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert not {"map.tif", "summary.json"} & {path.name for path in folder.rglob("*")}, "still at work"
    process.send_signal(number)
    sent = time.monotonic()
    returned, out, err = finish(process)
    assert time.monotonic() - sent < 5
    assert returned == code
    left = names_in(folder)
    assert [name for name in left if not name.startswith("map.tif.partial")] == []
    assert ("resumes from there" in err) == (left != []), "a part of a map that waits, and the way to go on"
    assert out == ""
    assert "Traceback" not in err


def test_a_detour_to_the_scene_is_still_the_scene(workspace: Path) -> None:
    """`missing/..` exists only once `missing` has been made, on the way to writing."""
    scene = workspace / "scene.tif"
    before = scene.read_bytes()
    detour = workspace / "missing" / ".." / "scene.tif"
    assert_answer(run("segment", scene, "-w", workspace, "-o", detour), 10, "exists")
    assert_answer(run("segment", scene, "-w", workspace, "-o", detour, "--overwrite"), 10, "overwrite the scene")
    assert scene.read_bytes() == before
    assert not (workspace / "missing").exists()


def test_an_existing_picture_is_kept(workspace: Path) -> None:
    picture = workspace / "map_preview.png"
    picture.write_text("mine")
    command = ("segment", workspace / "scene.tif", "-w", workspace, "-o", workspace / "map.tif", "--preview")
    assert_answer(run(*command), 10, "map_preview.png exists")
    assert picture.read_text() == "mine"
    assert not (workspace / "map.tif").exists()


def test_segment_goes_on_where_it_was_interrupted(workspace: Path, tmp_path: Path) -> None:
    from scene_helpers import FakeEngine

    folder = tmp_path / "maps"
    scene = write_raster(workspace / "large.tif", noise(400, 300))
    engine = load_engine(workspace / "engines" / "small.fp32.cpu.onnx")

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_scene(engine, scene, folder / "map.tif", progress=stop)
    engine.close()
    result = run("segment", scene, "-w", workspace, "-o", folder / "map.tif", "--json")
    assert result.exit_code == 0, result.stderr
    (document,) = json.loads(result.stdout)
    assert 0 < document["tiles_resumed"] < document["tiles"]
    assert "row_class_pixels" not in document
    assert names_in(folder) == ["map.qml", "map.tif", "map.tif.aux.xml"]
    with pytest.raises(ZeroDivisionError):
        segment_scene(FakeEngine(64, fail_at=20, error=ZeroDivisionError()), scene, folder / "other.tif")
    command = ("segment", scene, "-w", workspace, "-o", folder / "other.tif")
    assert_answer(run(*command), 10, r"label map of another run: engine .* — start anew with --overwrite")
    assert run(*command, "--overwrite").exit_code == 0
    assert names_in(folder) == [f"{name}{end}" for name in ("map", "other") for end in (".qml", ".tif", ".tif.aux.xml")]


def test_area_and_ground_sample_distance(workspace: Path, tmp_path: Path) -> None:
    transform = from_origin(325_000, 2_785_000, 1, 1)
    scene = write_raster(workspace / "placed.tif", noise(400, 300), crs="EPSG:32640", transform=transform)
    box = "325000,2784900,325100,2785000"
    result = run("segment", scene, "-w", workspace, "-o", tmp_path / "map.tif", "--gsd", 2, "--aoi", box, "--json")
    assert result.exit_code == 0, result.stderr
    (document,) = json.loads(result.stdout)
    assert (document["height"], document["width"]) == (200, 150)
    assert sum(document["class_pixels"].values()) == 50 * 50


def test_a_label_map_is_a_geotiff(workspace: Path) -> None:
    assert_wrong_usage(run("segment", workspace / "scene.tif", "-w", workspace, "-o", "map.png"), r"\.tif")


def test_results_before_a_broken_scene_are_reported(workspace: Path) -> None:
    (workspace / "broken.tif").write_text("no raster")
    result = run("segment", workspace / "scene.tif", workspace / "broken.tif", "-w", workspace, "--json")
    assert result.exit_code == 18
    first, second = json.loads(result.stdout)
    assert (Path(first["output"]).name, first["status"], first["error"]) == ("scene_labels.tif", "done", None)
    assert (second["status"], second["error"]["exit_code"]) == ("failed", 10)
    assert "not a raster" in second["error"]["message"]


def test_a_full_disk_is_named_when_onnxruntime_does_not(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdkd_edge.core.errors import EngineError
    from cdkd_edge.engines import onnxruntime as cpu

    def refuse(*_: object) -> None:
        raise EngineError("Protobuf serialization failed")

    monkeypatch.setattr(cpu, "_session", refuse)
    usage = shutil.disk_usage(workspace)._replace(free=0)
    monkeypatch.setattr(cpu.shutil, "disk_usage", lambda _: usage)
    assert_answer(run("build", "-w", workspace, "-o", workspace / "new.onnx"), 12, r"new\.onnx: no space left")
    assert not (workspace / "new.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("bench", "--repeat", "0"), "--repeat must be at least 1, got 0"),
        (("bench", "--repeat", "two"), "--repeat must be a whole number, got two"),
        (("bench", "--idle", "nan"), "--idle must be at least 0.1, got nan"),
        (("export", "ckpt.pt", "--opset", "30"), "--opset must be at most 20, got 30"),
        (("segment", "a.tif", "--palette", "grey"), "'grey' is not one of 'display', 'dataset'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(arguments: tuple[str, ...], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
