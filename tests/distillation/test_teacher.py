"""Teachers: SAM by its keys, every other encoder through the loader of checkpoints; all with the same few parts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from reference import reference_features  # noqa: E402
from sam_reference import GLOBAL, official_file, sam_blocks, sam_tokens, sam_weights  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.core.errors import CheckpointError  # noqa: E402
from cdkd_edge.distillation.teacher import load_network, load_student, load_teacher, quarter_pairs  # noqa: E402
from cdkd_edge.model.checkpoint import save_checkpoint  # noqa: E402
from cdkd_edge.model.network import Encoder, SegmentationNetwork  # noqa: E402
from cdkd_edge.model.sam import SAM_CONFIGS, SamEncoder  # noqa: E402

pytestmark = pytest.mark.needs_torch


def saved(path, arrays):
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}, path)
    return path


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sam") / "sam.pth", official_file(sam_weights()))


@pytest.fixture(scope="module")
def weights(make_weights):
    return make_weights(CONFIG)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory, weights):
    network = SegmentationNetwork(CONFIG)
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=False)
    path = tmp_path_factory.mktemp("network") / "network.pt"
    save_checkpoint(network, path)
    return path


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory, weights):
    """A ViT with a class token under timm's names, as DINOv2 has it."""
    state = {key[8:]: value for key, value in weights.items() if key.startswith("encoder.")}
    state["cls_token"] = np.ones((1, 1, CONFIG.embed_dim), np.float32)
    state["pos_embed"] = np.concatenate([state["cls_token"], state["pos_embed"]], axis=1)
    return saved(tmp_path_factory.mktemp("timm") / "vit.pth", state)


def by_hand(teacher, tiles):
    """Tokens after each block, through the parts that a teacher has."""
    tokens, after = teacher.embed(tiles), []
    for block in teacher.blocks:
        halfway = block.attend(tokens)
        tokens = halfway + block.mlp(block.norm2(halfway))
        after.append(tokens)
    return after


def tiles_of(side, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, side, side), np.uint8)


def test_sam_is_known_by_its_keys(sam_file):
    teacher, report = load_teacher(sam_file, 32)
    assert isinstance(teacher, SamEncoder)
    assert (report.layout, report.has_head, teacher.config.extra_tokens) == ("SAM", False, False)
    tiles = tiles_of(32)
    expected = sam_blocks(sam_weights(), sam_tokens(sam_weights(), tiles))
    with torch.inference_mode():
        after = by_hand(teacher, torch.from_numpy(tiles))
        for one, other in zip(after, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other.reshape(2, 64, -1), rtol=1e-3, atol=1e-3)
        for one, index in zip(teacher(torch.from_numpy(tiles)), GLOBAL, strict=True):
            torch.testing.assert_close(one.flatten(2).transpose(1, 2), after[index])


@pytest.mark.parametrize("kind", ["network", "timm"])
def test_every_other_encoder_has_the_same_parts(kind, network_file, timm_file, weights):
    path = network_file if kind == "network" else timm_file
    heads = None if kind == "network" else CONFIG.heads
    teacher, report = load_teacher(path, CONFIG.tile, heads=heads)
    assert isinstance(teacher, Encoder)
    assert report.has_head == (kind == "network")
    tiles = torch.from_numpy(tiles_of(CONFIG.tile))
    with torch.inference_mode():
        after = by_hand(teacher, tiles)
        maps = teacher(tiles)
    assert after[0].shape == (2, CONFIG.grid**2 + teacher.config.class_token, CONFIG.embed_dim)
    for one, index in zip(maps, teacher.config.taps, strict=True):
        torch.testing.assert_close(one.flatten(2).transpose(1, 2), after[index][:, teacher.config.class_token :])
    if kind == "network":
        expected = reference_features(weights, tiles.numpy(), heads=CONFIG.heads, eps=CONFIG.layer_norm_eps)
        for one, other in zip(maps, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-3, atol=1e-3)


def test_tile_patch_and_eps_are_passed_on(sam_file, timm_file):
    teacher, _ = load_teacher(sam_file, 32, patch=8, layer_norm_eps=1e-5)
    assert (teacher.config.grid, teacher.blocks[1].norm2.eps) == (4, 1e-5)
    teacher, _ = load_teacher(timm_file, 32, patch=4, heads=2, layer_norm_eps=1e-4)
    assert (teacher.config.grid, teacher.config.layer_norm_eps) == (8, 1e-4)


def test_weights_are_chosen_by_name(tmp_path, sam_file):
    state = torch.load(sam_file)
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"a": state, "b": other}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="more than one set of weights"):
        load_teacher(tmp_path / "two.pth", 32)
    teacher, _ = load_teacher(tmp_path / "two.pth", 32, weights="b")
    assert torch.equal(teacher.pos_embed, other["image_encoder.pos_embed"].flatten(1, 2))


def test_a_network_comes_with_its_head_if_there_is_one(network_file, timm_file, sam_file):
    network, report = load_network(network_file, tile=128)
    assert isinstance(network, SegmentationNetwork)
    assert report.config.tile == 128
    encoder, report = load_network(timm_file, heads=2)
    assert isinstance(encoder, Encoder)
    assert not report.has_head
    with pytest.raises(CheckpointError, match="holds the image encoder of SAM"):
        load_network(sam_file)


@pytest.mark.parametrize("file", ["sam_file", "network_file"])
def test_a_tile_that_the_patch_does_not_divide_is_refused(request, file):
    with pytest.raises(CheckpointError, match="tile 30 is not divisible by patch"):
        load_teacher(request.getfixturevalue(file), 30)


def test_files_that_are_no_teacher_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_teacher(tmp_path / "gone.pth", 32)
    other = {"image_encoder.patch_embed.seq.0.c.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"MobileSAM \(TinyViT\), whose image encoder is no plain ViT"):
        load_teacher(saved(tmp_path / "mobile_sam.pt", other), 32)


def test_errors_name_the_file(tmp_path, network_file, sam_file):
    state = torch.load(sam_file, weights_only=True)
    del state["image_encoder.blocks.1.attn.rel_pos_h"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"short\.pth: the checkpoint lacks encoder\.blocks\.1\.attn\.rel_pos_h"):
        load_teacher(tmp_path / "short.pth", 32)
    with pytest.raises(CheckpointError, match=rf"{network_file.name}: tile 30 is not divisible"):
        load_teacher(network_file, 30)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: the checkpoint's layout is not known"):
        load_student(str(tmp_path / "other.pt"), None, 0)


def test_pairs_are_the_papers_and_end_at_the_first_global_blocks_of_sam():
    assert quarter_pairs(24, 12) == ((6, 3), (12, 6), (18, 9))
    assert quarter_pairs(12, 6) == ((3, 1), (6, 3), (9, 4))
    assert quarter_pairs(12, 12, 4) == ((3, 3), (6, 6), (9, 9), (12, 12))
    assert quarter_pairs(2, 4) == ((1, 1), (1, 2), (1, 3))
    for config in SAM_CONFIGS.values():
        assert tuple(one - 1 for one, _ in quarter_pairs(config.depth, 12)) == config.taps[:3]
