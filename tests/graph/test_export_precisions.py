"""`export --fp16`, and FP16 and INT8 of the bundled trained network."""

from __future__ import annotations

import json
import re
import shutil
from importlib import resources

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxsim")

from commands import assert_answer, run  # noqa: E402
from quantization_helpers import CONFIG, casts, nodes_of, tiles_of, write_set  # noqa: E402

from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.core.manifest import GraphManifest, read_manifest  # noqa: E402
from cdkd_edge.core.sample import sample_tiles  # noqa: E402
from cdkd_edge.engines.onnxruntime import build_cpu_engine  # noqa: E402
from cdkd_edge.graph.export import ExportOptions, export_checkpoint  # noqa: E402
from cdkd_edge.graph.files import derived_path  # noqa: E402
from cdkd_edge.graph.layers import quantizable_layers  # noqa: E402
from cdkd_edge.model.checkpoint import save_checkpoint  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402
from cdkd_edge.precision.int8 import Int8Options, write_int8  # noqa: E402
from cdkd_edge.precision.int8_gate import Int8Gate  # noqa: E402

pytestmark = pytest.mark.needs_torch


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, weights):
    network = SegmentationNetwork(CONFIG)
    network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()}, strict=False)
    save_checkpoint(network, path, schema=load_schema("dubai"))
    return path


@pytest.fixture
def sound(tmp_path, make_weights):
    """A checkpoint that FP16 does no harm."""
    return save(tmp_path / "city.pt", make_weights(CONFIG, seed=2))


@pytest.fixture
def loud(tmp_path, make_weights):
    """A checkpoint whose activations leave FP16's range."""
    weights = make_weights(CONFIG, seed=2)
    weights["encoder.blocks.1.mlp.fc1.weight"] *= 6e4
    weights["encoder.blocks.1.mlp.fc2.weight"] *= 1e-5
    return save(tmp_path / "city.pt", weights)


def exported(folder):
    return sorted(path.name for path in (folder / "export").iterdir())


HEADS = ("--heads", CONFIG.heads)


def test_fp16_comes_with_an_export(tmp_path, sound):
    result = run("export", sound, *HEADS, "--json")
    assert result.exit_code == 0, result.stderr
    assert exported(tmp_path) == ["city.fp16.json", "city.fp16.onnx", "city.json", "city.onnx"]
    data = json.loads(result.stdout)
    assert data["fp16_refused"] is None
    assert data["fp16"]["precision"] == "fp16"
    conversion = data["fp16"]["conversion"]
    assert conversion["label_agreement"] >= 0.999
    assert 0 < conversion["max_logit_error"] < conversion["logit_tolerance"]
    half = onnx.load(tmp_path / "export" / "city.fp16.onnx")
    assert casts(half) == {"FLOAT16": 1, "UINT8": 1}
    text = " ".join(run("export", sound, *HEADS).stdout.split())
    assert "FP16 city.fp16.onnx" in text
    assert "of the pixels of 2 sample tiles keep their label" in text


def test_an_attention_that_was_changed_is_told(tmp_path, make_weights):
    """By the export, and by what looks into the graph."""
    weights = make_weights(CONFIG, seed=2)
    for name in ("weight", "bias"):
        weights[f"encoder.blocks.1.attn.qkv.{name}"][2 * CONFIG.embed_dim :] *= 3000
    weights["encoder.blocks.1.attn.proj.weight"] /= 3000
    path = save(tmp_path / "city.pt", weights)
    row = r"blocks\.1\.attn: values divided by \d+, because values may sum to \S+ on"
    for typed in (("export", path, *HEADS), ("inspect", tmp_path / "export" / "city.fp16.onnx")):
        result = run(*typed)
        assert result.exit_code == 0, result.stderr
        assert re.search(row, " ".join(result.stdout.split())), result.stdout
    data = json.loads(run("inspect", tmp_path / "export" / "city.fp16.onnx", "--json").stdout)
    (change,) = data["manifest"]["conversion"]["attention"]
    assert change["values_divided_by"] > 1


def test_no_fp16_where_none_is_wanted(tmp_path, sound):
    result = run("export", sound, *HEADS, "--no-fp16", "--json")
    assert exported(tmp_path) == ["city.json", "city.onnx"]
    data = json.loads(result.stdout)
    assert (data["fp16"], data["fp16_refused"]) == (None, None)


def test_a_network_that_fp16_is_not_for(tmp_path, loud):
    """It is exported in FP32, and the reason is given."""
    result = run("export", loud, *HEADS, "--json")
    assert result.exit_code == 0, result.stderr
    assert exported(tmp_path) == ["city.json", "city.onnx"]
    data = json.loads(result.stdout)
    assert data["fp16"] is None
    assert "leaves FP16's range" in data["fp16_refused"]


def test_what_an_export_found_is_known_to_the_commands_after_it(tmp_path, loud, make_weights, monkeypatch):
    text = " ".join(run("export", loud, *HEADS).stdout.split())
    assert "no FP16 on the imagery blocks.1.mlp.fc1 leaves FP16's range" in text
    kept = read_manifest(tmp_path / "export" / "city.onnx", GraphManifest).fp16_refused
    assert kept.out_of_range
    write_set(tmp_path / "engines" / "calibration" / "mission", tiles_of(1), tiles_of(1))
    typed = ["cdkd-edge", "bench", "--power-trace"]
    with monkeypatch.context() as patch:
        patch.setattr("cdkd_edge.graph.fp16.to_fp16", None)  # nothing is computed again
        patch.setattr("cdkd_edge.precision.int8.calibrate", None)
        for runtime in ("cpu", "tensorrt"):
            result = run("build", "--fp16", "--runtime", runtime)
            assert_answer(result, 8, r"found before: on the imagery blocks\.1\.mlp\.fc1 leaves.*FP32: cdkd-edge build;")
        assert_answer(run("build", "--int8"), 8, r"INT8 keeps parts of city\.onnx in FP16.*fc1 leaves FP16's range")
        patch.setattr("sys.argv", typed)
        answer = r"; FP16 was refused for city\.onnx: .*fc1 leaves.*build && cdkd-edge bench --power-trace"
        assert_answer(run(*typed[1:]), 5, answer)
    assert_answer(run("build", "--fp16", "--again", "--runtime", "tensorrt"), 8, r"^error: on the imagery blocks\.1")
    run("export", save(tmp_path / "city.pt", make_weights(CONFIG, seed=2)), *HEADS)
    assert read_manifest(tmp_path / "export" / "city.onnx", GraphManifest).fp16_refused is None


def test_a_share_of_labels_may_be_asked_for_instead(tmp_path, sound):
    for options in (("--min-agreement", "0.5"), ("--min-agreement", "101")):
        assert_answer(run("export", sound, *HEADS, *options), 2, "--min-agreement must be above 1")
    assert_answer(run("export", sound, *HEADS, "--no-fp16", "--min-agreement", "99"), 2, "no effect with --no-fp16")
    data = json.loads(run("export", sound, *HEADS, "--fp16", "--min-agreement", "99", "--json").stdout)
    assert data["fp16"]["conversion"]["max_logit_error"] is None


def test_asked_for_it_is_an_error_and_the_fp32_graph_stays(tmp_path, loud):
    assert_answer(run("export", loud, *HEADS, "--fp16"), 8, r"blocks\.1\.mlp\.fc1 leaves FP16's range.*FP32")
    assert exported(tmp_path) == ["city.json", "city.onnx"]
    assert read_manifest(tmp_path / "export" / "city.onnx", GraphManifest).precision == "fp32"


def test_a_weight_beyond_fp16(tmp_path, make_weights):
    weights = make_weights(CONFIG, seed=2)
    weights["encoder.blocks.0.mlp.fc1.bias"][-1] = -7e4
    path = save(tmp_path / "city.pt", weights)
    text = " ".join(run("export", path, *HEADS).stdout.split())
    assert "no FP16 weight blocks.0.mlp.fc1.bias holds 7e+04; FP16 ends at 65504" in text
    assert_answer(run("export", path, *HEADS, "--fp16"), 7, "FP16 ends at 65504")
    assert exported(tmp_path) == ["city.json", "city.onnx"]


def test_graphs_of_an_earlier_export_are_pointed_out(tmp_path, sound, make_weights):
    """Beside a new FP32 graph they are another network's."""
    first = run("export", sound, *HEADS, "--json")
    assert json.loads(first.stdout)["outdated"] == []
    half = tmp_path / "export" / "city.fp16.onnx"
    for suffix in (".onnx", ".json"):
        shutil.copy(half.with_suffix(suffix), half.with_name(f"city.int8{suffix}"))
    assert json.loads(run("export", sound, *HEADS, "--no-fp16", "--json").stdout)["outdated"] == []
    weights = make_weights(CONFIG, seed=2)
    weights["encoder.blocks.0.mlp.fc1.bias"][-1] = -7e4
    text = " ".join(run("export", save(sound, weights), *HEADS).stdout.split())
    for name in ("city.fp16.onnx", "city.int8.onnx"):
        assert f"warning {name} was made from an earlier graph" in text


def test_a_foreign_file_in_the_place_of_the_fp16_graph(tmp_path, sound):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "city.fp16.onnx").write_text("mine")
    result = run("export", sound, *HEADS)
    assert_answer(result, 6, r"city\.fp16\.onnx exists and is not cdkd-edge's to replace")
    assert (tmp_path / "export" / "city.fp16.onnx").read_text() == "mine"
    assert exported(tmp_path) == ["city.fp16.onnx"], "it is known before the work begins"
    plain = run("export", sound, *HEADS, "--no-fp16")
    assert plain.exit_code == 0
    assert "FP16" not in plain.stdout


# --- the bundled network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bundled trained network, exported for small tiles with FP16. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    with resources.as_file(resources.files("cdkd_edge.demo") / "tiny.safetensors") as checkpoint:
        return export_checkpoint(checkpoint, folder / "tiny.onnx", ExportOptions(tile=128, fp16=True))


def test_the_bundled_network_in_fp16(tiny):
    assert tiny.half.conversion.label_agreement >= 0.999
    assert tiny.half.conversion.attention == ()
    assert 1e-5 < tiny.half.conversion.attention_error < 5e-3
    half = onnx.load(derived_path(tiny.path, "fp16"))
    assert casts(half) == {"FLOAT16": 1, "UINT8": 1}
    assert tiny.half.artefact.bytes < 0.55 * tiny.manifest.artefact.bytes


def test_the_bundled_network_in_int8(tiny, tmp_path):
    drawn = sample_tiles(128, 5)
    chosen = write_set(tmp_path / "set", drawn[:4], drawn[4:], side=128)
    graph = tmp_path / "tiny.onnx"
    for suffix in (".onnx", ".json"):
        shutil.copy(tiny.path.with_suffix(suffix), graph.with_suffix(suffix))
    result = write_int8(graph, tmp_path / "tiny.int8.onnx", chosen, Int8Options(gate=Int8Gate(0.95)))
    count = len(quantizable_layers(onnx.load(graph)))
    made = onnx.load(result.path)
    onnx.checker.check_model(made, full_check=True)
    assert len(nodes_of(made, "QuantizeLinear")) == count
    assert all(layer["snr_db"] > 10 for layer in result.manifest.quantization["layers"])
    assert result.manifest.conversion.label_agreement > 0.95
    engine = build_cpu_engine(result.path, tmp_path / "tiny.int8.cpu.onnx")
    assert engine.attention_fused == engine.attention_blocks > 0
    assert len(nodes_of(onnx.load(tmp_path / "tiny.int8.cpu.onnx"), "MatMulIntegerToFloat")) == count
    assert np.isfinite([layer["input_scale"] for layer in result.manifest.quantization["layers"]]).all()
