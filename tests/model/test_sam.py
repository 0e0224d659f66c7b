"""SAM's image encoder computes what the papers say, and its files are read whole or refused.

What is right is decided by the NumPy reference, never by this package's own network.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sam_reference as reference  # noqa: E402
from commands import loading_refused  # noqa: E402
from sam_reference import official_file, sam_blocks, sam_tokens, sam_weights  # noqa: E402

from cdkd_edge.core.errors import CheckpointError  # noqa: E402
from cdkd_edge.model.checkpoint import load_encoder  # noqa: E402
from cdkd_edge.model.sam import SAM_CONFIGS, SamConfig, SamEncoder  # noqa: E402
from cdkd_edge.model.sam_files import load_sam  # noqa: E402

pytestmark = pytest.mark.needs_torch

CONFIG = SamConfig(
    tile=32, patch=4, embed_dim=64, depth=4, heads=2, mlp_dim=96, window=3, global_blocks=(1, 3), layer_norm_eps=1e-6
)


@pytest.fixture(scope="module")
def weights():
    """Official names, without ``image_encoder.``; not to be changed."""
    return sam_weights()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(5).integers(0, 256, (2, 3, CONFIG.tile, CONFIG.tile), np.uint8)


def tensors(arrays):
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def saved(path, arrays):
    torch.save(tensors(arrays), path)
    return path


def exact(encoder):
    """In FP64, so that the comparison is sharp."""
    encoder = encoder.double()
    encoder.mean.copy_(torch.tensor(reference.MEAN, dtype=torch.float64).view(1, 3, 1, 1))
    encoder.std.copy_(torch.tensor(reference.STD, dtype=torch.float64).view(1, 3, 1, 1))
    return encoder


def assert_computes(encoder, weights, image):
    """Equal maps after the global blocks."""
    expected = sam_blocks(weights, sam_tokens(weights, image))
    with torch.inference_mode():
        found = exact(encoder)(torch.from_numpy(image))
    assert len(found) == len(reference.GLOBAL)
    for one, index in zip(found, reference.GLOBAL, strict=True):
        np.testing.assert_allclose(one.permute(0, 2, 3, 1).numpy(), expected[index], atol=1e-9)


def refusal(path, load=load_sam, **options):
    return loading_refused(load, path, **options)


# --- what it computes -----------------------------------------------------------------------------


def test_it_computes_what_the_papers_say(tmp_path, weights, image):
    encoder, report = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    assert encoder.config == CONFIG
    assert not encoder.training
    assert (report.layout, report.has_head) == ("SAM", False)
    assert_computes(encoder, weights, image)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 10])
def test_blocks_take_square_maps_of_any_side(tmp_path, weights, side):
    """As packed by a mask: windows lie on the packed map, and the global blocks' tables are interpolated to it."""
    encoder, _ = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    tokens = np.random.default_rng(side).standard_normal((2, side, side, reference.DIM))
    found = torch.from_numpy(tokens.reshape(2, side * side, -1))
    with torch.inference_mode():
        for block, expected in zip(exact(encoder).blocks, sam_blocks(weights, tokens), strict=True):
            halfway = block.attend(found)
            torch.testing.assert_close(block(found), halfway + block.mlp(block.norm2(halfway)))
            found = block(found)
            np.testing.assert_allclose(found.numpy().reshape(expected.shape), expected, atol=1e-9)
        first, last = encoder.run(torch.from_numpy(tokens.reshape(2, side * side, -1)), {0, 3})
    assert torch.equal(last, found)
    np.testing.assert_allclose(first.numpy().reshape(tokens.shape), sam_blocks(weights, tokens)[0], atol=1e-9)


def test_tokens_lie_row_by_row(tmp_path, weights, image):
    encoder, _ = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    with torch.inference_mode():
        tokens = exact(encoder).embed(torch.from_numpy(image))
    np.testing.assert_allclose(tokens.numpy(), sam_tokens(weights, image).reshape(2, 64, -1), atol=1e-9)


def test_tokens_that_are_no_square_are_an_error():
    with pytest.raises(RuntimeError):
        SamEncoder(CONFIG).blocks[0](torch.zeros(1, 56, 64))


def test_bf16_is_close_and_gradients_reach_the_tokens(tmp_path, weights, image):
    encoder, _ = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    pixels = torch.from_numpy(image)
    plain = encoder.requires_grad_(False)(pixels)[-1]
    tokens = encoder.embed(pixels).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        halved = encoder(pixels)[-1]
        for block in encoder.blocks:
            tokens_after = block(tokens)
    assert torch.nn.functional.cosine_similarity(halved.float(), plain, dim=1).min() > 0.99
    tokens_after.float().square().mean().backward()
    assert tokens.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b", 88_883_456), ("vit_l", 307_425_280), ("vit_h", 636_107_520)]
)
def test_the_published_sizes(name, parameters):
    """As counted in SAM's own module without the neck."""
    with torch.device("meta"):
        encoder = SamEncoder(SAM_CONFIGS[name])
        assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
        maps = encoder(torch.empty(1, 3, 1024, 1024))
    width = SAM_CONFIGS[name].embed_dim
    assert [tuple(one.shape) for one in maps] == 4 * [(1, width, 64, 64)]


# --- whose names ----------------------------------------------------------------------------------


def hugging_face(weights):
    """``SamModel`` of transformers, written down from its ``modeling_sam.py``."""
    state = {}
    for key, value in weights.items():
        name = re.sub(r"^blocks\.(\d)\.", r"layers.\1.", key).replace("patch_embed.proj", "patch_embed.projection")
        state["vision_encoder." + re.sub(r"\.norm([12])", r".layer_norm\1", name)] = value
    others = (
        "vision_encoder.neck.conv1.weight", "vision_encoder.neck.layer_norm1.bias",
        "shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding",
        "prompt_encoder.mask_embed.conv1.weight", "mask_decoder.iou_token.weight",
        "mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
    )  # fmt: skip
    return state | {key: np.ones((2, 4), np.float32) for key in others}


def timm(weights):
    """``samvit_*`` of timm, written down from its ``vision_transformer_sam.py``."""
    state = {key.replace("mlp.lin", "mlp.fc"): value for key, value in weights.items()}
    return state | {"neck.0.weight": np.ones((8, 64, 1, 1), np.float32), "neck.1.bias": np.ones(8, np.float32)}


def vision_model(weights):
    """``SamVisionModel`` of transformers."""
    return {key: value for key, value in hugging_face(weights).items() if key.startswith("vision_encoder.")}


NAMES = {
    "Hugging Face": (hugging_face, {"neck": 2, "prompt encoder": 3, "mask decoder": 2}),
    "Hugging Face's vision model": (vision_model, {"neck": 2}),
    "timm": (timm, {"neck": 2}),
    "official, wrapped": (
        lambda w: {f"module.{key}": value for key, value in official_file(w).items()},
        {"neck": 6, "prompt encoder": 3, "mask decoder": 3},
    ),
    "the encoder alone": (lambda w: dict(w), {}),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_the_same_weights(tmp_path, weights, name, suffix):
    rename, parts = NAMES[name]
    expected, _ = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    path = tmp_path / f"other{suffix}"
    if suffix == ".pth":
        saved(path, rename(weights))
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors(rename(weights)), path)
    encoder, report = load_sam(path)
    assert encoder.config == expected.config
    state = encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert {part.what.partition(" and")[0]: part.tensors for part in report.dropped} == parts


def test_weights_in_a_training_run_are_found(tmp_path, weights):
    torch.save({"model": tensors(official_file(weights)), "epoch": 3}, tmp_path / "run.pth")
    encoder, report = load_sam(tmp_path / "run.pth")
    assert report.unwrapped == ("model",)
    assert encoder.config == CONFIG


def test_the_report_names_what_was_left_out(tmp_path, weights):
    _, report = load_sam(saved(tmp_path / "sam.pth", official_file(weights)))
    assert {part.what: part.tensors for part in report.dropped} == {
        "neck and head, after the last block": 6,
        "prompt encoder": 3,
        "mask decoder": 3,
    }
    assert any("eps 1e-06" in note for note in report.notes)
    assert report.path == tmp_path / "sam.pth"


# --- other tiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [16, 20, 48])
def test_another_tile_resamples_positions(tmp_path, weights, tile):
    encoder, report = load_sam(saved(tmp_path / "sam.pth", official_file(weights)), tile=tile)
    grid = tile // 4
    assert encoder.config == dataclasses.replace(CONFIG, tile=tile)
    assert any(f"from 8 x 8 to {grid} x {grid} patches" in note for note in report.notes)
    truth = dict(weights)
    truth["pos_embed"] = reference.resampled_map(weights["pos_embed"][0], grid)[None]
    for index in reference.GLOBAL:
        for key in (f"blocks.{index}.attn.rel_pos_{axis}" for axis in "hw"):
            truth[key] = reference.resampled_line(weights[key], 2 * grid - 1)
    with torch.inference_mode():
        for key in ("pos_embed", *(key for key in truth if "rel_pos" in key)):
            found = encoder.state_dict()[key].numpy()
            np.testing.assert_allclose(found, truth[key].reshape(found.shape), atol=1e-5)
    image = np.random.default_rng(6).integers(0, 256, (1, 3, tile, tile), np.uint8)
    # With the resampled values themselves, which are FP32.
    truth |= {key: value.numpy() for key, value in encoder.state_dict().items() if "rel_pos" in key}
    truth["pos_embed"] = encoder.pos_embed.detach().numpy().reshape(1, grid, grid, -1)
    assert_computes(encoder, truth, image)


def test_another_patch_keeps_the_grid_unless_a_tile_is_given(tmp_path, weights):
    path = saved(tmp_path / "sam.pth", official_file(weights))
    encoder, report = load_sam(path, patch=8)
    assert (encoder.config.tile, encoder.config.grid) == (64, 8)
    assert any("patch embedding resampled from 4 to 8 px" in note for note in report.notes)
    encoder, _ = load_sam(path, patch=8, tile=32)
    assert encoder.config.grid == 4


@pytest.mark.parametrize("tile", [30, 0, -32, 4 * 513])
def test_a_tile_that_does_not_fit_is_refused(tmp_path, weights, tile):
    error = refusal(saved(tmp_path / "sam.pth", official_file(weights)), tile=tile)
    assert f"{tile}" in error.message
    if tile == 30:
        assert error.message == "tile 30 is not divisible by patch 4"
        assert error.hint == "choose a multiple, such as 32"


def test_heads_are_those_of_the_file_and_eps_can_be_stated(tmp_path, weights):
    path = saved(tmp_path / "sam.pth", official_file(weights))
    assert "has 2 attention heads, as its relative positions show, not 4" in refusal(path, heads=4).message
    encoder, report = load_sam(path, heads=2, layer_norm_eps=1e-5)
    assert encoder.blocks[0].norm1.eps == encoder.config.layer_norm_eps == 1e-5
    assert not any("eps" in note for note in report.notes)


# --- files that are not right ---------------------------------------------------------------------


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != f"image_encoder.{key}"}


def with_(key, value):
    return lambda state: state | {f"image_encoder.{key}" if "." in key or key == "pos_embed" else key: value}


def ones(*shape):
    return np.ones(shape, np.float32)


def spoilt(key, number):
    def change(state):
        value = np.array(state[f"image_encoder.{key}"])
        value.flat[7] = number
        return state | {f"image_encoder.{key}": value}

    return change


WRONG = {
    "unknown key": (with_("blocks.0.adapter.weight", ones(4)), r"unexpected .*blocks\.0\.adapter"),
    "unknown part": (with_("memory", ones(4, 4)), "memory"),
    "no patch embedding": (without("patch_embed.proj.weight"), r"lacks encoder\.patch_embed\.proj\.weight"),
    "no position": (without("pos_embed"), r"lacks encoder\.pos_embed"),
    "no bias": (without("blocks.2.attn.proj.bias"), r"missing: blocks\.2\.attn\.proj\.bias"),
    "no relative positions": (without("blocks.2.attn.rel_pos_h"), r"lacks encoder\.blocks\.2\.attn\.rel_pos_h"),
    "no columns": (without("blocks.2.attn.rel_pos_w"), r"missing: blocks\.2\.attn\.rel_pos_w"),
    "a block is gone": (
        lambda state: {key: value for key, value in state.items() if ".blocks.1." not in key},
        r"lacks transformer blocks \[1\] of 4",
    ),
    "not a number": (spoilt("blocks.1.mlp.lin2.weight", np.nan), r"mlp\.fc2\.weight holds values that are not finite"),
    "infinite": (spoilt("pos_embed", np.inf), "pos_embed holds values that are not finite"),
    "whole numbers": (with_("blocks.0.norm1.bias", np.ones(64, np.int64)), r"0\.norm1\.bias is stored as torch.int64"),
    "wrong shape": (with_("blocks.3.mlp.lin1.bias", ones(95)), r"3\.mlp\.fc1\.bias is \(95,\) instead of \(96,\)"),
    "flat position": (with_("pos_embed", ones(1, 64, 64)), r"pos_embed has shape \(1, 64, 64\); 4 dimensions"),
    "oblong position": (with_("pos_embed", ones(1, 8, 9, 64)), r"position embedding of \(1, 8, 9, 64\)"),
    "empty position": (with_("pos_embed", ones(1, 0, 0, 64)), r"position embedding of \(1, 0, 0, 64\)"),
    "grey images": (with_("patch_embed.proj.weight", ones(64, 1, 4, 4)), r"patch embedding is \(64, 1, 4, 4\)"),
    "two windows": (with_("blocks.0.attn.rel_pos_h", ones(9, 32)), "relative positions of 9, 15, 5, 15 offsets"),
    "even table": (with_("blocks.0.attn.rel_pos_h", ones(6, 32)), "relative positions of 6, 15, 5, 15 offsets"),
    "empty table": (with_("blocks.0.attn.rel_pos_h", ones(0, 32)), "relative positions of 0, 15, 5, 15 offsets"),
    "positions of another grid": (with_("pos_embed", ones(1, 6, 6, 64)), "with 6 x 6 tokens, global blocks have 11"),
    "empty columns": (with_("blocks.1.attn.rel_pos_w", ones(0, 32)), r"rel_pos_w is \(0, 32\) instead of \(15, 32\)"),
    "no heads": (with_("blocks.0.attn.rel_pos_h", ones(5, 0)), "relative positions 0 wide"),
    "heads that do not fit": (with_("blocks.0.attn.rel_pos_h", ones(5, 30)), "relative positions 30 wide"),
    "two names": (with_("layers.0.norm1.bias", ones(64)), r"both mean encoder\.blocks\.0\.norm1\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_whole_is_refused(tmp_path, weights, case):
    change, message = WRONG[case]
    path = saved(tmp_path / "sam.pth", change(official_file(weights)))
    for tile in (None, 16):
        assert re.search(message, refusal(path, tile=tile).message)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, weights, share):
    whole = saved(tmp_path / "whole.pth", official_file(weights)).read_bytes()
    path = tmp_path / "sam.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "sam.pth" in refusal(path).message


def test_a_file_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "sam.pth").write_bytes(pickle.dumps({"image_encoder.pos_embed": Code()}, 2))
    assert "could execute anything" in refusal(tmp_path / "sam.pth").message
    assert not (tmp_path / "made").exists()


def test_a_file_of_another_network_is_no_sam(tmp_path):
    state = {"blocks.0.norm1.weight": ones(4), "pos_embed": ones(1, 4, 4)}
    assert "holds no image encoder of SAM" in refusal(saved(tmp_path / "vit.pth", state)).message


def test_sam_is_no_network_of_ours_and_the_error_says_what_it_is_for(tmp_path, weights):
    error = refusal(saved(tmp_path / "sam.pth", official_file(weights)), load_encoder)
    assert "holds the image encoder of SAM" in error.message
    assert "cdkd-edge distill --teacher" in error.hint


# Keys of those projects: mobile_sam/modeling/tiny_vit_sam.py, edge_sam/modeling/rep_vit.py, sam2's hieradet.py,
# and transformers' modeling_sam2.py.
RELATIVES = {
    "MobileSAM": ("image_encoder.patch_embed.seq.0.c.weight", "image_encoder.layers.0.blocks.0.conv1.c.weight"),
    "EdgeSAM": ("image_encoder.features.0.0.c.weight", "image_encoder.features.1.token_mixer.0.conv.c.weight"),
    "SAM 2": ("image_encoder.trunk.pos_embed_window", "image_encoder.trunk.blocks.0.attn.qkv.weight"),
    "SAM 2 of Hugging Face": ("vision_encoder.backbone.pos_embed_window", "vision_encoder.neck.convs.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("load", [load_sam, load_encoder])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_without_vit_blocks_are_refused_by_name(tmp_path, name, load):
    state = dict.fromkeys((*RELATIVES[name], "mask_decoder.iou_token.weight"), ones(2, 2))
    torch.save({"model": tensors(state)}, tmp_path / "sam.pt")
    error = refusal(tmp_path / "sam.pt", load)
    assert name.removesuffix(" of Hugging Face") in error.message
    assert "no plain ViT" in error.message
    assert "vit_l" in error.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "embed_dim 64 is not divisible by heads 3"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"depth": 0}, "depth 0 is not 1 to 256 blocks"),
        ({"global_blocks": (1, 4)}, r"global_blocks must be one or more of 0 to 3, not \(1, 4\)"),
        ({"global_blocks": ()}, r"global_blocks must be .* not \(\)"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be between 0 and 1"),
    ],
)
def test_numbers_that_are_no_encoder_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(CONFIG, **changes)
