"""The picture of reconstructions: what is seen stays as it is, what is hidden is what the networks make of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.distillation.autoencoder import PIXELS, patch_values  # noqa: E402
from cdkd_edge.distillation.masks import visible_patches  # noqa: E402
from cdkd_edge.distillation.networks import Distillation  # noqa: E402
from cdkd_edge.distillation.pictures import pictures_path, write_reconstructions  # noqa: E402
from cdkd_edge.distillation.recipe import DistillRecipe  # noqa: E402
from cdkd_edge.model.network import Encoder  # noqa: E402

pytestmark = pytest.mark.needs_torch

GAP = 4


@pytest.fixture
def tiles():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8))


@pytest.fixture
def visible():
    return torch.from_numpy(np.stack([visible_patches("cells", CONFIG.grid, 2, [seed]) for seed in (1, 2)]))


def networks_of(config=CONFIG, **options):
    recipe = DistillRecipe(**{"precision": "fp32", "decoder_width": 16, "decoder_depth": 1, **options})
    teacher = None if recipe.method == "mae" else Encoder(dataclasses.replace(config, class_token=True))
    return Distillation(Encoder(config), teacher, recipe)


def panels(path, side, rows, columns):
    """The tiles of the picture, ``[rows][columns]`` of ``[S, S, 3]``; between them it is white."""
    picture = np.asarray(Image.open(path))
    step = side + GAP
    assert picture.shape == (rows * step - GAP, columns * step - GAP, 3)
    for gap in (picture[side:step], picture[:, side:step]):
        assert (gap == 255).all()
    return [
        [picture[row * step : row * step + side, column * step : column * step + side] for column in range(columns)]
        for row in range(rows)
    ]


def seen_pixels(visible):
    """Where each tile is seen, ``[T, T]``."""
    for places in visible.numpy():
        seen = np.zeros(CONFIG.grid**2, bool)
        seen[places] = True
        yield np.kron(seen.reshape(CONFIG.grid, -1), np.ones((8, 8), bool))


@pytest.mark.parametrize(("options", "columns"), [({}, 4), ({"method": "mae"}, 3), ({"adapters": False}, 3)])
def test_a_row_shows_the_tile_its_visible_patches_and_each_reconstruction(tmp_path, tiles, visible, options, columns):
    write_reconstructions(networks_of(**options), tiles, visible, tmp_path / "a.png")
    rows = panels(tmp_path / "a.png", 64, 2, columns)
    for row, tile, seen in zip(rows, tiles.permute(0, 2, 3, 1).numpy(), seen_pixels(visible), strict=True):
        assert np.array_equal(row[0], tile)
        assert np.array_equal(row[1], np.where(seen[..., None], tile, 127))
        for made in row[2:]:
            assert np.array_equal(made[seen], tile[seen])
            assert (made[~seen] != tile[~seen]).mean() > 0.9


@pytest.mark.parametrize("pixels", PIXELS)
def test_a_perfect_prediction_shows_the_tile_itself(tmp_path, tiles, visible, pixels):
    networks = networks_of(method="mae", pixels=pixels)
    networks.student_decoder.forward = lambda seen, places: patch_values(tiles, CONFIG.patch, pixels)
    write_reconstructions(networks, tiles, visible, tmp_path / "a.png")
    for row in panels(tmp_path / "a.png", 64, 2, 3):
        assert np.abs(row[2].astype(int) - row[0]).max() <= 1


def test_large_tiles_are_shown_smaller(tmp_path):
    config = dataclasses.replace(CONFIG, tile=512, patch=64, pool_scales=(1,))
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 512, 512), np.uint8))
    visible = torch.from_numpy(visible_patches("cells", 8, 2, [0]))[None]
    write_reconstructions(networks_of(config, method="mae"), tiles, visible, tmp_path / "a.png")
    ((first, *_),) = panels(tmp_path / "a.png", 256, 1, 3)
    means = tiles[0].numpy().reshape(3, 256, 2, 256, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
    assert np.abs(first - means).max() <= 0.5


def test_the_picture_lies_beside_the_output(tmp_path):
    assert pictures_path(tmp_path / "encoder.pth") == tmp_path / "encoder.tiles.png"
