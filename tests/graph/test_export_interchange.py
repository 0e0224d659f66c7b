"""`export --qgis` and `export --stac` from the command line."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxsim")

from commands import assert_answer, assert_wrong_usage, run  # noqa: E402
from quantization_helpers import CONFIG  # noqa: E402

from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.model.checkpoint import save_checkpoint  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402

pytestmark = pytest.mark.needs_torch

HEADS = ("--heads", str(CONFIG.heads), "--no-fp16")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path, make_weights):
    network = SegmentationNetwork(CONFIG)
    weights = make_weights(CONFIG, seed=2)
    network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()}, strict=False)
    save_checkpoint(network, tmp_path / "city.pt", schema=load_schema("dubai"))
    return tmp_path / "city.pt"


def test_everything_at_once_and_again(checkpoint, tmp_path):
    result = run("export", checkpoint, *HEADS, "--batch", 2, "--qgis", "--stac", "--gsd", 0.3, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["qgis"]["path"], data["stac"]) == ("export/city.qgis.onnx", "export/city.stac.json")
    assert data["qgis"]["label_agreement"] >= 0.9999
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"city.onnx", "city.json", "city.qgis.onnx", "city.stac.json"}

    graph = onnx.load("export/city.qgis.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert metadata["resolution"] == 30
    session = onnxruntime.InferenceSession("export/city.qgis.onnx", providers=["CPUExecutionProvider"])
    side = CONFIG.tile
    assert session.get_inputs()[0].shape == [1, 3, side, side], "one tile, whatever the batch of the other"
    (found,) = session.run(None, {"image": np.zeros((1, 3, side, side), np.float32)})
    assert found.shape == (1, 5, side, side)

    item = json.loads((tmp_path / "export" / "city.stac.json").read_text(encoding="utf-8"))
    network = SegmentationNetwork(CONFIG)
    assert item["properties"]["mlm:total_parameters"] == sum(tensor.numel() for tensor in network.parameters())
    assert item["properties"]["gsd"] == 0.3
    assert set(item["assets"]) == {"model", "manifest", "qgis"}
    assert item["properties"]["mlm:batch_size_suggestion"] == 2

    shown = run("export", checkpoint, *HEADS, "--qgis", "--stac", "--gsd", 0.25)
    assert shown.exit_code == 0, shown.stderr
    assert "city.qgis.onnx, 25 cm per pixel" in shown.stdout
    assert "city.stac.json" in shown.stdout

    later = json.loads(run("export", checkpoint, *HEADS, "--json").stdout)
    assert (later["qgis"], later["stac"]) == (None, None)
    assert later["outdated"] == ["export/city.qgis.onnx", "export/city.stac.json"]
    assert run("build", "--runtime", "cpu").exit_code == 0, "what lies beside the graph makes nothing ambiguous"


def test_a_pixel_size_is_asked_for_before_any_work(checkpoint, tmp_path):
    assert_answer(run("export", checkpoint, *HEADS, "--qgis"), 2, r"the size of a pixel — --gsd METRES")
    assert_answer(
        run("export", checkpoint, *HEADS, "--qgis", "--gsd", 50_000),
        2,
        r"--gsd must be between 0\.001 and 1000 m, got 50000",
    )
    assert_wrong_usage(run("export", checkpoint, *HEADS, "--gsd", 0.5), "without --qgis or --stac")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["city.qgis.onnx", "city.stac.json"])
def test_what_is_the_users_stays(checkpoint, tmp_path, name):
    mine = tmp_path / "export" / name
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    result = run("export", checkpoint, *HEADS, "--qgis", "--stac", "--gsd", 0.3)
    assert_answer(result, 6, f"{name} exists and is not cdkd-edge's to replace")
    assert [path.name for path in mine.parent.iterdir()] == [name], "found before any work"
    assert mine.read_bytes() == b"mine"


def test_stac_alone_needs_no_pixel_size(checkpoint, tmp_path):
    assert run("export", checkpoint, *HEADS, "--stac").exit_code == 0
    item = json.loads((tmp_path / "export" / "city.stac.json").read_text(encoding="utf-8"))
    assert "gsd" not in item["properties"]
