"""Which graph is built: found where it fits, made where it is missing or out of date, and no option passed over."""

from __future__ import annotations

import shutil

import pytest
from quantization_helpers import CONFIG, tiles_of, write_set

from cdkd_edge.core.errors import ManifestError, UsageError, WorkspaceError
from cdkd_edge.core.manifest import GraphManifest, manifest_path, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.graph.int8 import CalibrationOptions
from cdkd_edge.precision.choose import GraphRequest, prepare_graph
from cdkd_edge.precision.int8 import Int8Options
from cdkd_edge.precision.int8_gate import Int8Gate

LENIENT = Int8Options(gate=Int8Gate(0.8))


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


@pytest.fixture
def space(tmp_path):
    return Workspace(tmp_path / "space")


@pytest.fixture
def export(space, make_graph, make_weights):
    """Writes the FP32 graph of one network or another, as an export does."""

    def write(seed=2, **options):
        return make_graph(space.graphs, make_weights(CONFIG, seed=seed), CONFIG, **options)

    return write


@pytest.fixture
def add_set(space):
    def write(name="mission", check=2, side=48):
        write_set(space.engines / "calibration" / name, tiles_of(3, side), tiles_of(check, side, seed=3), side)
        return space.engines / "calibration" / name

    return write


def precision(path):
    return read_manifest(path, GraphManifest).precision


def rename(path, stem):
    """A pair under another name."""
    for file in (path, manifest_path(path)):
        file.rename(file.with_name(stem + file.suffix))
    return path.with_name(f"{stem}.onnx")


# --- what is found and what is made ---------------------------------------------------------------


def test_fp32_unless_asked_otherwise(space, export):
    graph = export()
    for named, wanted in ((None, None), (None, "fp32"), (graph, None), (graph, "fp32")):
        prepared = prepare_graph(space, named, wanted)
        assert (prepared.path, prepared.made, prepared.int8) == (graph, False, None)


@pytest.mark.parametrize("named", [True, False])
def test_fp16_is_made_once(space, export, named):
    graph = export()
    first = prepare_graph(space, graph if named else None, "fp16")
    assert (first.path.name, first.made) == ("small.fp16.onnx", True)
    assert precision(first.path) == "fp16"
    content = first.path.read_bytes()
    written = first.path.stat().st_mtime_ns
    second = prepare_graph(space, graph if named else None, "fp16")
    assert (second.path, second.made) == (first.path, False)
    assert first.path.stat().st_mtime_ns == written
    again = prepare_graph(space, None, "fp16", GraphRequest(again=True))
    assert again.made
    assert first.path.read_bytes() == content
    assert first.path.stat().st_mtime_ns > written


def test_int8_is_made_once_from_the_only_set(space, export, add_set):
    export()
    add_set()
    told = []
    first = prepare_graph(space, None, "int8", GraphRequest(int8=LENIENT), told.append)
    assert (first.path.name, first.made) == ("small.int8.onnx", True)
    assert first.int8.manifest.quantization["calibration_set"]["name"] == "mission"
    assert told
    second = prepare_graph(space, None, "int8")
    assert (second.path, second.made, second.int8) == (first.path, False, None)
    named = prepare_graph(space, first.path, None)
    assert (named.path, named.made) == (first.path, False)
    assert prepare_graph(space, first.path, "int8").path == first.path


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_a_graph_of_another_export_is_made_again(space, export, add_set, wanted):
    export()
    add_set()
    request = GraphRequest(int8=LENIENT) if wanted == "int8" else GraphRequest()
    first = prepare_graph(space, None, wanted, request)
    before = first.path.read_bytes()
    plain = export(seed=1)
    second = prepare_graph(space, None, wanted, request)
    assert second.made
    assert second.path == first.path
    assert second.path.read_bytes() != before
    source = read_manifest(plain, GraphManifest).artefact
    assert read_manifest(second.path, GraphManifest).parent == source


def test_a_damaged_graph_is_made_again(space, export):
    export()
    first = prepare_graph(space, None, "fp16")
    content = first.path.read_bytes()
    first.path.write_bytes(content[:-7])
    second = prepare_graph(space, None, "fp16")
    assert second.made
    assert second.path.read_bytes() == content


def test_a_graph_that_lost_its_manifest_is_not_replaced(space, export):
    export()
    first = prepare_graph(space, None, "fp16")
    manifest_path(first.path).unlink()
    with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
        prepare_graph(space, None, "fp16")


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_a_board_with_one_graph(space, export, add_set, tmp_path, wanted):
    """Only the graph of lower precision was carried there."""
    export()
    add_set()
    made = prepare_graph(space, None, wanted, GraphRequest(int8=LENIENT) if wanted == "int8" else GraphRequest()).path
    board = Workspace(tmp_path / "board")
    board.graphs.mkdir(parents=True)
    for file in (made, manifest_path(made)):
        shutil.copy(file, board.graphs)
    prepared = prepare_graph(board, None, wanted)
    assert (prepared.path, prepared.made) == (board.graphs / made.name, False)
    for request in (GraphRequest(again=True), GraphRequest(calibration=tmp_path)):
        for named in (None, board.graphs / made.name):
            with pytest.raises(UsageError, match="can only be taken as it is") as caught:
                prepare_graph(board, named, wanted, request)
            assert "FP32" in caught.value.hint
    other = "int8" if wanted == "fp16" else "fp16"
    with pytest.raises(WorkspaceError, match=f"no {other} graph in .* no exported graph to make it from"):
        prepare_graph(board, None, other)
    with pytest.raises(WorkspaceError, match="no exported graph"):
        prepare_graph(board, None, None)


# --- what is ambiguous ----------------------------------------------------------------------------


def test_an_empty_workspace(space):
    for wanted in ("fp16", "int8"):
        with pytest.raises(WorkspaceError, match=f"no {wanted} graph") as caught:
            prepare_graph(space, None, wanted)
        assert "cdkd-edge export" in caught.value.hint


def test_two_networks(space, export):
    rename(export(), "city")
    graph = export(seed=1)
    with pytest.raises(WorkspaceError, match="2 candidates") as caught:
        prepare_graph(space, None, "fp16")
    assert f"cdkd-edge build --fp16 {graph}" in caught.value.hint, "what the hint says builds what was asked for"
    assert prepare_graph(space, graph, "fp16").path.name == "small.fp16.onnx"


def test_two_calibration_sets(space, export, add_set):
    export()
    with pytest.raises(WorkspaceError, match="no set in") as caught:
        prepare_graph(space, None, "int8")
    assert "cdkd-edge calibrate" in caught.value.hint
    add_set("summer")
    winter = add_set("winter")
    (space.engines / "calibration" / "notes").mkdir()
    with pytest.raises(WorkspaceError, match=r"2 calibration sets .*: summer, winter") as caught:
        prepare_graph(space, None, "int8")
    assert f"--calibration {winter}" in caught.value.hint
    made = prepare_graph(space, None, "int8", GraphRequest(winter, LENIENT))
    assert made.int8.manifest.quantization["calibration_set"]["name"] == "winter"


# --- what does not fit ----------------------------------------------------------------------------


def test_the_named_graph_has_another_precision(space, export, add_set):
    export()
    add_set()
    half = prepare_graph(space, None, "fp16").path
    for wanted in ("fp32", "int8"):
        with pytest.raises(UsageError, match=f"is a graph of fp16, and --{wanted} was asked for"):
            prepare_graph(space, half, wanted)


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_things_that_are_no_graph(space, tmp_path, add_set, wanted):
    """The graph is looked at before the calibration set."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "ckpt.pt").write_bytes(b"PK\3\4")
    for name in ("missing.onnx", "folder", "ckpt.pt"):
        with pytest.raises(ManifestError, match=name):
            prepare_graph(space, tmp_path / name, wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "folder"]


def test_fp16_on_tiles_of_a_set(space, export, add_set):
    export()
    chosen = add_set(check=3)
    made = prepare_graph(space, None, "fp16", GraphRequest(calibration=chosen))
    check = read_manifest(made.path, GraphManifest).conversion
    assert (check.tiles, check.imagery) == (3, "mission")
    with pytest.raises(UsageError, match="64 px wide"):
        prepare_graph(space, None, "fp16", GraphRequest(calibration=add_set("wide", side=64), again=True))
    with pytest.raises(UsageError, match="has no check tiles"):
        prepare_graph(space, None, "fp16", GraphRequest(calibration=add_set("bare", check=0), again=True))
    with pytest.raises(ManifestError, match="does not exist"):
        prepare_graph(space, None, "fp16", GraphRequest(calibration=space.root / "nowhere", again=True))


@pytest.mark.parametrize(
    "request_",
    [
        GraphRequest(int8=Int8Options(auto=True)),
        GraphRequest(int8=Int8Options(keep=("fuse",))),
        GraphRequest(int8=Int8Options(gate=Int8Gate(0.9))),
        GraphRequest(int8=Int8Options(CalibrationOptions("max"))),
    ],
)
def test_options_of_int8_mean_nothing_elsewhere(space, export, request_):
    graph = export()
    for wanted in ("fp16", "fp32", None):
        with pytest.raises(UsageError, match="are for INT8 graphs") as caught:
            prepare_graph(space, graph, wanted, request_)
        assert caught.value.hint == "add --int8"


def test_options_that_mean_nothing(space, export, tmp_path):
    graph = export()
    for request in (GraphRequest(again=True), GraphRequest(calibration=tmp_path)):
        with pytest.raises(UsageError, match="an FP32 graph is exported"):
            prepare_graph(space, graph, "fp32", request)
    with pytest.raises(UsageError, match="measured on labelled images"):
        prepare_graph(space, graph, "int8", GraphRequest(int8=Int8Options(gate=Int8Gate(loss=1))))
    assert sorted(path.name for path in space.graphs.iterdir()) == ["small.json", "small.onnx"]
