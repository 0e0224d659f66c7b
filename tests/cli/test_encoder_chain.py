"""An encoder of each family goes the whole way: a decoder, a graph, an engine, a label map."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from commands import run
from encoder_files import FAMILIES, write_encoder
from head_files import TILE, write_network
from scene_helpers import noise, read_labels, write_raster
from training_helpers import write_dataset

pytestmark = pytest.mark.needs_torch

ONE_OF_EACH = {
    "timm reg4 dinov2": "timm ViT",
    "timm qk norm": "timm ViT",
    "timm dinov3 plus": "timm DINOv3",
    "transformers dinov2": "Hugging Face DINOv2",
    "transformers dinov2 registers": "Hugging Face DINOv2 with registers",
    "transformers dinov3": "Hugging Face DINOv3",
    "facebook dinov2 giant": "DINOv2",
    "facebook dinov2 registers": "DINOv2 with registers",
    "facebook dinov3": "DINOv3",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), {"t1_a": (112, 112), "t2_a": (112, 112)})


def answered(*words):
    result = run(*words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize(("family", "layout"), ONE_OF_EACH.items())
def test_from_an_encoder_to_a_label_map(tmp_path, data, family, layout):
    source, tile = write_encoder(tmp_path / "hub", family), min(map(int, FAMILIES[family]["features"]))
    assert answered("info", source)["layout"] == layout
    loop = ("--epochs", 1, "--batch", 2, "--head-channels", 8, "--device", "cpu", "--precision", "fp32")
    options = ("--schema", "dubai", "--val-scenes", "t2", "--tile", tile, *loop)
    tuned = tmp_path / "tuned.pt"
    answered("finetune", source, "--data", data, "-o", tuned, *options)
    exported = answered("export", tuned, "-w", tmp_path)
    assert exported["manifest"]["check"]["label_agreement"] >= 0.9999
    assert answered("build", "-w", tmp_path)["manifest"]["attention_blocks"] == 4
    write_raster(tmp_path / "scene.tif", noise(tile + 20, tile + 30))
    answered("segment", tmp_path / "scene.tif", "-w", tmp_path, "-o", tmp_path / "labels.tif", "--overlap", 0)
    assert read_labels(tmp_path / "labels.tif").shape == (tile + 20, tile + 30)


@pytest.mark.parametrize("name", ["terratorch, selected", "openmmlab, three taps, corners aligned, final norm"])
def test_from_a_network_of_another_project_to_a_label_map(tmp_path, name):
    source = write_network(tmp_path / "hub", name)
    exported = answered("export", source, "--tile", TILE, "-w", tmp_path)
    assert exported["manifest"]["check"]["label_agreement"] >= 0.9999
    assert answered("build", "-w", tmp_path)["manifest"]["attention_blocks"] == 6
    write_raster(tmp_path / "scene.tif", noise(TILE + 20, TILE + 30))
    answered("segment", tmp_path / "scene.tif", "-w", tmp_path, "-o", tmp_path / "labels.tif", "--overlap", 0)
    assert set(read_labels(tmp_path / "labels.tif").ravel()) <= {0, 1, 2}


def test_a_head_of_another_kind_is_replaced_by_tuning(tmp_path, data):
    """The encoder of a network with a neck of several strides gets a UPerNet."""
    import torch

    source = write_network(tmp_path, "openmmlab, four taps")
    document = torch.load(source, weights_only=True)
    document["state_dict"]["neck.convs.0.conv.weight"] = torch.ones(2, 2, 3, 3)
    torch.save(document, source)
    loop = ("--epochs", 1, "--batch", 2, "--head-channels", 8, "--device", "cpu", "--precision", "fp32")
    answered(
        "finetune", source, "--data", data, "-o", tmp_path / "tuned.pt", "--schema", "dubai", "--val-scenes", "t2",
        "--tile", TILE, *loop,
    )  # fmt: skip
    assert answered("info", tmp_path / "tuned.pt")["config"]["head_channels"] == 8


def test_a_folder_of_a_hub_is_a_teacher(tmp_path):
    folder = write_encoder(tmp_path / "dinov3-vits16", "transformers dinov3")
    write_raster(tmp_path / "a.tif", noise(192, 192))
    words = ("--student", folder, "--tile", 96, "--method", "features", "--steps", 1, "--batch", 1, "--device", "cpu")
    record = answered(
        "distill", tmp_path / "a.tif", "--teacher", folder, *words, "--precision", "fp32", "-o", tmp_path / "out.pt"
    )["distilled"]
    for role in ("teacher", "student"):
        assert record[role]["file"] == "dinov3-vits16"
        assert record[role]["layout"] == "Hugging Face DINOv3"
