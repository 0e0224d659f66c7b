"""2:4 sparsity: what is pruned, and where it is seen again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from commands import assert_answer, run  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.graph.build import build_graph  # noqa: E402
from cdkd_edge.graph.fp16 import to_fp16  # noqa: E402
from cdkd_edge.graph.layers import sparse_linears  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402
from cdkd_edge.model.sparsity import is_sparse  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]


@pytest.fixture
def source(tmp_path, make_weights):
    network = SegmentationNetwork(CONFIG)
    arrays = {key: torch.from_numpy(np.array(value)) for key, value in make_weights(CONFIG).items()}
    network.load_state_dict(arrays, strict=False)
    save_checkpoint(network, tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.fixture
def sparse(source):
    path = source.with_name("sparse.pt")
    assert run("convert", source, "--sparse", "-o", path).exit_code == 0
    return path


def test_the_two_largest_of_four_weights_stay(source, sparse):
    before, after = (load_checkpoint(path)[0].state_dict() for path in (source, sparse))
    pruned = set()
    for name, weight in before.items():
        if torch.equal(weight, after[name]):
            continue
        pruned.add(name)
        for row, found in zip(weight.numpy(), after[name].numpy(), strict=True):
            for start in range(0, len(row), 4):
                four = row[start : start + 4]
                largest = sorted(range(4), key=lambda index: -abs(four[index]))[:2]
                expected = [four[index] if index in largest else 0.0 for index in range(4)]
                assert found[start : start + 4].tolist() == expected
    layers = ("attn.proj", "mlp.fc1", "mlp.fc2")
    assert pruned == {f"encoder.blocks.{block}.{layer}.weight" for block in range(4) for layer in layers}


def test_info_tells(source, sparse):
    assert json.loads(run("info", sparse, "--json").stdout)["sparse_layers"] == 12
    assert "2:4 in 12 of 12 layers" in run("info", sparse).stdout
    assert json.loads(run("info", source, "--json").stdout)["sparse_layers"] == 0
    assert "2:4" not in run("info", source).stdout


def test_attention_can_change_at_once(source, tmp_path):
    words = ("convert", source, "--sparse", "--attention", "window4", "-o", tmp_path / "a.pt", "--json")
    assert json.loads(run(*words).stdout)["pruned_layers"] == 12
    assert load_checkpoint(tmp_path / "a.pt")[1].config.attention == ("window 4",) * 4
    assert_answer(run("convert", source, "-o", tmp_path / "b.pt"), 2, "--attention, --sparse or both")


def test_three_of_four_is_not_sparse():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [1, 2, 0, 0, 3, 0, 4, 0]])
    assert is_sparse(weight)
    weight[1, 5] = 1
    assert not is_sparse(weight)
    assert not is_sparse(torch.zeros(2, 6))


def test_the_graphs_weights_are_sparse_along_the_sum(source, sparse):
    for path, expected in ((source, 0), (sparse, 12)):
        state = {key: value.numpy() for key, value in load_checkpoint(path)[0].state_dict().items()}
        model = build_graph(state, CONFIG)
        assert sparse_linears(model) == (expected, 12)
        assert sparse_linears(to_fp16(model)) == (expected, 12)


def test_distillation_keeps_the_zeros(source, sparse, tmp_path):
    from scene_helpers import noise, write_raster

    write_raster(tmp_path / "scene.tif", noise(128, 128))
    words = ("distill", tmp_path / "scene.tif", "--teacher", source, "--student", sparse, "-o", tmp_path / "a.pt")
    words += ("--steps", 3, "--lr", 0.01, "--mean-decay", 0.5, "--precision", "fp32", "--device", "cpu")
    assert run(*words).exit_code == 0
    before, after = (load_checkpoint(path)[0].state_dict() for path in (sparse, tmp_path / "a.pt"))
    name = "encoder.blocks.2.mlp.fc1.weight"
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert not torch.equal(before[name], after[name])
    assert json.loads(run("info", tmp_path / "a.pt", "--json").stdout)["sparse_layers"] == 12


def test_a_dense_graph_is_not_built_as_a_sparse_one(small_graph, tmp_path, monkeypatch):
    runtime = SimpleNamespace(has_options=True, name="tensorrt", title="TensorRT", suffix=".engine", on_cpu=False)
    monkeypatch.setattr("cdkd_edge.cli.build.choose_runtime", lambda *_, **__: runtime)
    prepared = SimpleNamespace(path=small_graph)
    monkeypatch.setattr("cdkd_edge.precision.choose.prepare_graph", lambda *_: prepared)
    result = run("build", small_graph, "--sparse", "-o", tmp_path / "a.engine", "-w", tmp_path)
    assert_answer(result, 7, r"none of the 12 linear layers of .*small\.onnx has 2:4 sparse weights")
