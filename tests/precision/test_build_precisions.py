"""`build --int8` and `build --fp16` from the command line, and what other commands make of the result."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from commands import assert_answer, assert_wrong_usage, run
from PIL import Image
from quantization_helpers import CONFIG, nodes_of, session_of, tiles_of, write_set
from scene_helpers import noise, read_labels, write_raster

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.manifest import EngineManifest, GraphManifest, manifest_path, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import speed_ratio
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.graph.cpu import cpu_twin
from cdkd_edge.precision import choose
from cdkd_edge.precision.choose import prepare_graph

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

GATE = ("--min-agreement", "80")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)
    monkeypatch.setattr("cdkd_edge.engines.protocol.SPEED_ROUNDS", 1)


@pytest.fixture(scope="module")
def weights(make_weights):
    return make_weights(CONFIG, seed=2)


@pytest.fixture(scope="module")
def template(tmp_path_factory, make_graph, weights):
    """A workspace with an FP32 graph and a calibration set. Not to be changed."""
    root = tmp_path_factory.mktemp("template") / "space"
    make_graph(root / "export", weights, CONFIG)
    write_set(root / "engines" / "calibration" / "mission", tiles_of(4, seed=1), tiles_of(2, seed=2))
    return root


@pytest.fixture(scope="module")
def template_int8(tmp_path_factory, template):
    """The same after `build` and `build --int8`, with what the second said. Not to be changed."""
    root = tmp_path_factory.mktemp("int8") / "space"
    shutil.copytree(template, root)
    first = run("build", "--workspace", root, "--json")
    assert first.exit_code == 0, first.stderr
    second = run("build", "--int8", *GATE, "--workspace", root, "--json")
    assert second.exit_code == 0, second.stderr
    return root, json.loads(second.stdout)


@pytest.fixture
def space(template, tmp_path):
    shutil.copytree(template, tmp_path / "space")
    return Workspace(tmp_path / "space")


@pytest.fixture
def built(template_int8, tmp_path):
    shutil.copytree(template_int8[0], tmp_path / "space")
    return Workspace(tmp_path / "space")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# --- build --int8 ---------------------------------------------------------------------------------


def test_graph_report_and_engine(template_int8):
    root, _ = template_int8
    assert names(root / "export") == [
        "small.int8.json", "small.int8.md", "small.int8.onnx", "small.json", "small.onnx",
    ]  # fmt: skip
    assert names(root / "engines") == [
        "small.fp32.cpu.json", "small.fp32.cpu.onnx", "small.int8.cpu.json", "small.int8.cpu.onnx",
    ]  # fmt: skip
    engine = read_manifest(root / "engines" / "small.int8.cpu.onnx", EngineManifest)
    graph = read_manifest(root / "export" / "small.int8.onnx", GraphManifest)
    assert (engine.precision, engine.runtime, engine.graph) == ("int8", "onnxruntime-cpu", graph.artefact)
    assert (engine.attention_fused, engine.attention_blocks) == (4, 4)
    assert (engine.tile, engine.labels) == (48, graph.labels)


def test_the_json_of_a_build(template_int8):
    root, data = template_int8
    assert set(data) == {"path", "manifest", "graph", "graph_made", "quantization", "speed", "refused"}
    assert data["path"] == str(root / "engines" / "small.int8.cpu.onnx")
    assert data["graph"] == str(root / "export" / "small.int8.onnx")
    assert data["graph_made"] is True
    assert data["quantization"] == read_manifest(root / "export" / "small.int8.onnx", GraphManifest).quantization
    assert set(data["quantization"]) == {
        "calibration_set", "calibration_tiles", "check_tiles", "calibrator", "percentile", "smoothquant_alpha",
        "smoothed_layers", "gate", "judgement", "size_over_fp32", "kept_in_fp16", "attempts", "layers",
    }  # fmt: skip
    assert data["speed"]["against"] == str(root / "engines" / "small.fp32.cpu.onnx")
    assert data["speed"]["ratio"] > 0


def test_what_a_person_reads_of_a_graph_made_again(built):
    result = run("build", "--int8", "--again", *GATE, "--workspace", built.root)
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "graph " in text
    assert "INT8 layers 17 of 17" in text
    assert re.search(r"labels \d+\.\d+ % of the pixels of 2 check tiles keep theirs", text)
    assert "mIoU not measured; --data gives labelled images" in text
    assert re.search(r"noisiest \S+ \d+ dB, \S+ \d+ dB, \S+ \d+ dB", text)
    assert re.search(r"speed \d+(\.\d+)? x the tiles/s of small\.fp32\.cpu\.onnx", text)
    assert "small.int8.md" in text


def test_a_second_build_takes_the_graph_that_is_there(built):
    before = (built.graphs / "small.int8.onnx").stat().st_mtime_ns
    result = run("build", "--int8", "--workspace", built.root, "--json")
    data = json.loads(result.stdout)
    assert (data["graph_made"], data["quantization"]) == (False, None)
    assert (built.graphs / "small.int8.onnx").stat().st_mtime_ns == before
    again = run("build", "--int8", *GATE, "--keep", "fuse", "--workspace", built.root, "--json")
    assert json.loads(again.stdout)["graph_made"] is True
    record = read_manifest(built.graphs / "small.int8.onnx", GraphManifest).quantization
    assert record["kept_in_fp16"] == ["fuse"]


def test_the_engine_computes_what_the_twin_computes(built):
    engine = load_engine(built.engines / "small.int8.cpu.onnx")
    twin = session_of(cpu_twin(onnx.load(built.graphs / "small.int8.onnx")))
    try:
        for tile in tiles_of(3, seed=30):
            engine.input(0)[:] = tile
            engine.launch(0)
            engine.wait(0)
            (expected,) = twin.run(["labels"], {"image": tile[None]})
            assert (engine.output(0) == expected).mean() > 0.99
    finally:
        engine.close()
    stored = onnx.load(built.engines / "small.int8.cpu.onnx")
    assert len(nodes_of(stored, "MatMulIntegerToFloat")) == 17, "integer kernels are in the file"


def test_only_the_int8_graph_was_carried(built, tmp_path):
    board = tmp_path / "board"
    (board / "export").mkdir(parents=True)
    for suffix in ("onnx", "json"):
        shutil.copy(built.graphs / f"small.int8.{suffix}", board / "export")
    result = run("build", "--int8", "--workspace", board, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["speed"] is None
    assert names(board / "engines") == ["small.int8.cpu.json", "small.int8.cpu.onnx"]
    assert_answer(run("build", "--int8", "--again", "--workspace", board), 2, "can only be taken as it is")
    assert_answer(run("build", "--int8", "--auto", "--workspace", board), 2, "can only be taken as it is")


def test_a_missed_gate(space):
    result = run("build", "--int8", "--min-agreement", "100", "--workspace", space.root)
    # With every label to be kept, older releases of ONNX Runtime meet the second check first.
    assert_answer(result, 8, r"(INT8 misses its gate: |in lower precision .* )\d+\.\d\d% of the pixels")
    assert names(space.graphs) == ["small.json", "small.onnx"]
    assert names(space.engines) == []


def test_int8_that_is_no_faster_is_called_that(built, monkeypatch):
    monkeypatch.setattr(choose, "speed_ratio", lambda engine, other: 0.9)
    text = " ".join(run("build", "--int8", "--workspace", built.root).stdout.split())
    assert "INT8 is not faster than small.fp32.cpu.onnx here; prefer that engine" in text
    monkeypatch.setattr(choose, "speed_ratio", lambda engine, other: 1.1)
    assert "not faster" not in run("build", "--int8", "--workspace", built.root).stdout


def test_a_rival_that_cannot_run_is_no_rival(built):
    path = built.engines / "small.fp32.cpu.onnx"
    document = json.loads(manifest_path(path).read_text())
    document["libraries"]["onnxruntime"] = "0.1.0"
    manifest_path(path).write_text(json.dumps(document))
    assert json.loads(run("build", "--int8", "--workspace", built.root, "--json").stdout)["speed"] is None


def test_the_faster_of_two_engines(template_int8):
    """Which is told by the medians, and by tiles: an engine of twice the batch has twice the time."""

    class Clocked:
        def __init__(self, seconds, batch=1, tile=48):
            self.batch, self.tile, self.seconds = batch, tile, seconds
            self.pixels = np.zeros((batch, 3, tile, tile), np.uint8)

        def input(self, slot):
            return self.pixels

        def launch(self, slot):
            clock[0] += self.seconds

        def wait(self, slot):
            pass

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdkd_edge.engines.protocol.time.perf_counter", lambda: clock[0])
        assert speed_ratio(Clocked(1.0), Clocked(3.0)) == pytest.approx(3)
        assert speed_ratio(Clocked(2.0, batch=2), Clocked(1.0)) == pytest.approx(1)
        with pytest.raises(EngineError, match="48 and 64 px"):
            speed_ratio(Clocked(1.0), Clocked(1.0, tile=64))


# --- what other commands make of it ---------------------------------------------------------------


def test_segment_inspect_bench_and_evaluate(built, tmp_path):
    engine = built.engines / "small.int8.cpu.onnx"
    write_raster(tmp_path / "scene.tif", noise(70, 90))
    result = run("segment", tmp_path / "scene.tif", "--engine", engine, "-o", tmp_path / "map.tif")
    assert result.exit_code == 0, result.stderr
    assert read_labels(tmp_path / "map.tif").shape == (70, 90)

    for path, kind in ((engine, "engine"), (built.graphs / "small.int8.onnx", "graph")):
        found = json.loads(run("inspect", path, "--json").stdout)
        assert (found["kind"], found["manifest"]["precision"]) == (kind, "int8")
    assert found["contents"]["quantize_nodes"] == 17
    assert found["contents"]["dequantize_nodes"] == 35

    result = run("bench", engine, "--duration", "0.1", "--max-warm-up", "0", "--workspace", built.root, "--json")
    assert result.exit_code == 0, result.stderr

    for part, pixels in (("images", noise(60, 60).transpose(1, 2, 0)), ("masks", np.zeros((60, 60), np.uint8))):
        (tmp_path / "data" / part).mkdir(parents=True)
        Image.fromarray(pixels.copy()).save(tmp_path / "data" / part / "a_0.png")
    result = run("evaluate", engine, "--data", tmp_path / "data", "--json")
    assert result.exit_code == 0, result.stderr


def test_labelled_data(space, tmp_path):
    for part, pixels in (("images", noise(60, 60).transpose(1, 2, 0)), ("masks", np.zeros((60, 60), np.uint8))):
        (tmp_path / "data" / part).mkdir(parents=True)
        for scene in ("a_0", "b_0"):
            Image.fromarray(pixels.copy()).save(tmp_path / "data" / part / f"{scene}.png")
    given = ("--data", tmp_path / "data", "--schema", "dubai", "--max-loss", "100")
    result = run("build", "--int8", *GATE, *given, "--scenes", "a", "--workspace", space.root, "--json")
    assert result.exit_code == 0, result.stderr
    judgement = json.loads(result.stdout)["quantization"]["judgement"]
    assert judgement["mean_iou"] is not None
    assert [image["name"] for image in judgement["scores"]["int8"]["images"]] == ["a_0"]
    command = ("build", "--int8", "--workspace", space.root, "--again")
    assert_answer(run(*command, "--data", tmp_path / "data"), 4, "nothing says how the masks")
    assert_answer(run(*command, *given, "--scenes", "c"), 13, "no scene c")
    assert_answer(run(*command, "--data", tmp_path / "nowhere", "--schema", "dubai"), 13, "nowhere")
    loveda = ("--data", tmp_path / "data", "--schema", "loveda")
    assert_answer(run(*command, *loveda), 4, "the network has 5 classes .*--schema")


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--auto",), "INT8 graphs .*add --int8"),
        (("--fp16", "--keep", "fuse"), "INT8 graphs"),
        (("--fp16", "--alpha", "0.7"), "INT8 graphs"),
        (("--fp32", "--again"), "FP32 graph is exported"),
        (("--int8", "--max-loss", "1"), "labelled images"),
        (("--int8", "--calibrator", "kl"), "no calibrator 'kl'"),
        (("--int8", "--calibrator", "max", "--percentile", "99"), "max calibrator has no percentile"),
        (("--int8", "--percentile", "0.99"), "--percentile must be above 50"),
        (("--int8", "--alpha", "-1"), "between 0 and 1"),
        (("--int8", "--min-agreement", "0.98"), "per cent"),
        (("--int8", "--min-agreement", "101"), "--min-agreement must be above 1 and at most 100"),
    ],
)
def test_options_that_mean_nothing(space, options, pattern):
    assert_answer(run("build", *options, "--workspace", space.root), 2, pattern)
    assert names(space.graphs) == ["small.json", "small.onnx"]


def test_usage(space):
    at = ("--workspace", space.root)
    assert_wrong_usage(run("build", "--int8", "--fp16", *at), "one precision at a time")
    assert_wrong_usage(run("build", "--int8", "--schema", "dubai", *at), "they say how to read --data")
    assert_wrong_usage(run("build", "-o", "x.engine", *at), r"on the CPU is an \.onnx file")
    assert_wrong_usage(run("build", "-o", space.graphs / "small.onnx", *at), "would overwrite its graph")


def test_a_layer_that_is_not_there(space):
    result = run("build", "--int8", "--keep", "blocks.7.mlp.fc1", "--workspace", space.root)
    assert_answer(result, 7, r"no layer 'blocks\.7\.mlp\.fc1'.*layers are blocks\.0\.attn\.proj")


def test_wrong_kinds(space, tmp_path):
    at = ("--workspace", space.root)
    (tmp_path / "ckpt.pt").write_bytes(b"PK\3\4 not really")
    (tmp_path / "folder").mkdir()
    broken = space.graphs / "broken.onnx"
    shutil.copy(space.graphs / "small.json", broken.with_suffix(".json"))
    broken.write_bytes(b"no graph")
    for precision in ("--int8", "--fp16", "--fp32"):
        for path in (tmp_path / "ckpt.pt", tmp_path / "folder", tmp_path / "none.onnx", broken):
            result = run("build", precision, path, *at)
            assert_answer(result, result.exit_code or -1, re.escape(path.name))
    assert names(space.engines) == []


def test_an_engine_is_no_graph(built):
    for name in ("small.int8.cpu.onnx", "small.fp32.cpu.onnx"):
        result = run("build", "--int8", built.engines / name, "--workspace", built.root)
        assert_answer(result, 6, "is an engine, not a graph")


def test_a_set_that_is_none(space, tmp_path):
    at = ("--workspace", space.root)
    assert_answer(run("build", "--int8", "--calibration", tmp_path, *at), 6, r"has no set\.json")
    half = ("--fp16", "--runtime", "tensorrt")
    assert_answer(run("build", *half, "--calibration", tmp_path / "none", *at), 6, "does not exist")
    write_set(tmp_path / "wide", tiles_of(1, 64), tiles_of(1, 64), side=64)
    for precision in (("--int8",), half):
        assert_answer(run("build", *precision, "--calibration", tmp_path / "wide", *at), 2, "64 px wide")


# --- build --fp16 where no GPU is -----------------------------------------------------------------


def test_fp16_is_for_a_board_and_not_made_first(space):
    """That this machine has no FP16 engine is known before the graph is made; a board makes it from either graph."""
    answer = (
        r"an FP16 engine needs TensorRT on a GPU.*carry \S*{} and its \.json to a board.*for this machine: cdkd-edge"
    )
    for options in ((), ("--again",), ("--min-agreement", "99")):
        result = run("build", "--fp16", *options, "--workspace", space.root)
        assert_answer(result, 9, answer.format(r"small\.onnx"))
    assert names(space.graphs) == ["small.json", "small.onnx"]
    prepare_graph(space, None, "fp16")
    assert_answer(run("build", "--fp16", "--workspace", space.root), 9, answer.format(r"small\.fp16\.onnx"))
    assert names(space.engines) == []
