"""Reconstruction of hidden patches: targets, decoder and loss against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distillation_reference import reference_patches, reference_reconstruction  # noqa: E402

from cdkd_edge.core.errors import UsageError  # noqa: E402
from cdkd_edge.distillation.autoencoder import (  # noqa: E402
    PIXELS,
    Reconstruction,
    patch_values,
    reconstruction_loss,
)
from cdkd_edge.distillation.masks import visible_patches  # noqa: E402
from cdkd_edge.distillation.recipe import DistillRecipe  # noqa: E402

pytestmark = pytest.mark.needs_torch

TILE, PATCH, GRID = 16, 4, 4


def tiles_of(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, TILE, TILE), np.uint8)


def masks_of(*seeds):
    return np.stack([visible_patches("cells", GRID, 2, [seed]) for seed in seeds])


def decoder_of(inputs=12, width=16, depth=2, seed=0):
    """In FP64, with random values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Reconstruction(inputs, TILE, PATCH, width, depth).double()
    for parameter in decoder.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder


@pytest.mark.parametrize("pixels", PIXELS)
def test_targets_are_the_pixels_of_the_patches(pixels):
    found = patch_values(torch.from_numpy(tiles_of()), PATCH, pixels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), reference_patches(tiles_of().astype(float), PATCH, pixels), atol=2e-5)


def test_values_of_a_patch_are_channel_by_channel_and_row_by_row():
    tile = np.arange(3 * TILE * TILE).reshape(1, 3, TILE, TILE)
    found = patch_values(torch.from_numpy(tile), PATCH, "raw")[0, GRID + 2].numpy()  # second row, third column
    assert found.tolist() == tile[0, :, 4:8, 8:12].ravel().tolist()


def test_patches_of_one_colour_have_a_target_too():
    tiles = torch.full((1, 3, TILE, TILE), 77, dtype=torch.uint8)
    tiles[:, 1:] = 200
    tiles[0, :, :PATCH, :PATCH] = 0
    assert patch_values(tiles, PATCH, "patch").isfinite().all()


def test_the_decoder_computes_what_is_described():
    decoder, visible = decoder_of(), masks_of(1, 2)
    tokens = np.random.default_rng(1).standard_normal((2, 4, 12))
    weights = {name: value.detach().numpy() for name, value in decoder.named_parameters()}
    expected = reference_reconstruction(weights, tokens, visible, 2)
    with torch.no_grad():
        found = decoder(torch.from_numpy(tokens), torch.from_numpy(visible)).numpy()
    assert found.shape == (2, GRID**2, 3 * PATCH**2)
    for one, other, places in zip(found, expected, visible, strict=True):
        np.testing.assert_allclose(np.delete(one, places, axis=0), other, atol=1e-9)
    assert expected.std(axis=1).min() > 0.01  # the places differ


def test_the_order_of_the_visible_tokens_does_not_matter():
    decoder, visible = decoder_of(), torch.from_numpy(masks_of(1, 2))
    tokens = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 12)))
    order = [2, 0, 3, 1]
    with torch.no_grad():
        plain, mixed = decoder(tokens, visible), decoder(tokens[:, order], visible[:, order])
        wrong = decoder(tokens[:, order], visible)
    torch.testing.assert_close(mixed, plain)
    assert (wrong - plain).abs().max() > 0.1


def test_the_loss_is_that_of_the_hidden_patches_alone():
    rng, visible = np.random.default_rng(0), masks_of(1, 2)
    predicted, values = rng.standard_normal((2, 2, GRID**2, 48))
    errors = [np.delete((p - v) ** 2, places, axis=0) for p, v, places in zip(predicted, values, visible, strict=True)]
    found = reconstruction_loss(*map(torch.from_numpy, (predicted, values, visible)))
    assert float(found) == pytest.approx(np.mean(errors), rel=1e-5)
    for tile, places in enumerate(visible):
        predicted[tile, places] = 1e6
    assert float(reconstruction_loss(*map(torch.from_numpy, (predicted, values, visible)))) == float(found)


def test_a_mask_that_hides_nothing_is_refused():
    with pytest.raises(UsageError, match="--cell must be 2 to 8, got 1"):
        DistillRecipe(cell=1)


def test_counts_of_parameters_are_the_published_ones():
    with torch.device("meta"):
        student, teacher = Reconstruction(384, 1024, 16), Reconstruction(1024, 1024, 16)
        narrow = Reconstruction(1024, 1024, 16, 512, 2)
    student, teacher, narrow = (
        {name: value.numel() for name, value in decoder.named_parameters()} for decoder in (student, teacher, narrow)
    )
    assert sum(student.values()) == 9_115_392
    assert sum(teacher.values()) == 56_419_072
    assert {name.split(".")[1] for name in narrow if name.startswith("blocks.")} == {"0", "1"}
    assert narrow["pos_embed"] == 4096 * 512


def test_a_decoder_starts_with_xavier_weights_and_no_biases():
    torch.manual_seed(0)
    decoder = Reconstruction(48, TILE, PATCH, 96)
    for name, layer in decoder.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound, name
            assert not layer.bias.any()
    assert 0.015 < decoder.pos_embed.std() < 0.025
    assert decoder.mask_token.any()


def test_a_width_that_eight_heads_do_not_share_is_refused():
    with pytest.raises(UsageError, match="a decoder of width 100 cannot have 8 heads") as caught:
        Reconstruction(64, TILE, PATCH, 100)
    assert "multiple of 8" in caught.value.hint
