"""Each folded constant is the linear map it stands for: against NumPy loops, and against PyTorch's operators."""

from __future__ import annotations

import numpy as np
import pytest
from reference import MEAN, STD, adaptive_average, bilinear

from cdkd_edge.graph import fold

GRIDS = (6, 7, 8, 16, 37)
SCALES = (1, 2, 3, 6)
PART_OF_SCALE = {1: slice(0, 1), 2: slice(1, 5), 3: slice(5, 14), 6: slice(14, 50)}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_unit(rng, inputs=5, outputs=7, kernel=3):
    """Weights of a convolution with batch norm, as a state dict holds them."""
    return {
        "u.conv.weight": rng.standard_normal((outputs, inputs, kernel, kernel)).astype(np.float32),
        "u.bn.weight": rng.standard_normal(outputs).astype(np.float32),
        "u.bn.bias": rng.standard_normal(outputs).astype(np.float32),
        "u.bn.running_mean": rng.standard_normal(outputs).astype(np.float32),
        "u.bn.running_var": rng.uniform(1e-6, 3, outputs).astype(np.float32),
    }


# --- without torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_pooling_matrix_is_adaptive_average_pooling(rng, grid):
    maps = rng.standard_normal((1, 3, grid, grid))
    matrix = fold.pooling_matrix(grid, SCALES)
    assert matrix.shape == (50, grid * grid)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    cells = matrix.astype(np.float64) @ maps.reshape(3, -1).T
    for scale, part in PART_OF_SCALE.items():
        expected = adaptive_average(maps, scale)[0].reshape(3, -1).T
        np.testing.assert_allclose(cells[part], expected, atol=1e-6)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_upsampling_matrix_is_bilinear(rng, grid, align):
    matrix = fold.upsampling_matrix(grid, SCALES, align)
    assert matrix.shape == (grid * grid, 50)
    assert matrix.dtype == np.float32
    for scale, part in PART_OF_SCALE.items():
        cells = rng.standard_normal((1, 3, scale, scale))
        found = matrix[:, part].astype(np.float64) @ cells.reshape(3, -1).T
        np.testing.assert_allclose(found, bilinear(cells, grid, align)[0].reshape(3, -1).T, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_spread_taps_are_the_padded_convolution_of_the_upsampled_cells(rng, grid):
    """Cells of several scales, each with channels of its own, up-sampled, side by side, convolved 3x3."""
    scales, channels = (1, 2, 3, 6), 2
    kernel = rng.standard_normal((5, len(scales) * channels, 3, 3)).astype(np.float32)
    maps = [rng.standard_normal((channels, scale, scale)) for scale in scales]
    upsampled = np.concatenate([bilinear(cells[None], grid)[0] for cells in maps])
    padded = np.pad(upsampled, ((0, 0), (1, 1), (1, 1)))
    expected = np.zeros((5, grid, grid))
    for y in range(grid):
        for x in range(grid):
            expected[:, y, x] = (kernel * padded[:, y : y + 3, x : x + 3]).sum(axis=(1, 2, 3))

    cells = np.zeros((50, len(scales) * channels))  # one row per cell, zero outside its own scale's channels
    for index, scale in enumerate(scales):
        part = slice(index * channels, (index + 1) * channels)
        cells[PART_OF_SCALE[scale], part] = maps[index].reshape(channels, -1).T
    taps, spread = fold.kernel_taps(kernel), fold.spreading_matrix(grid, scales)
    assert taps.shape == (len(scales) * channels, 9 * 5)
    assert spread.shape == (grid * grid, 9 * 50)
    assert taps.dtype == spread.dtype == np.float32
    found = spread.astype(np.float64) @ (cells @ taps).reshape(9 * 50, 5)
    np.testing.assert_allclose(found.T.reshape(5, grid, grid), expected, atol=1e-5)


def test_other_scales_than_the_usual():
    assert fold.pooling_matrix(8, (8,)).tolist() == np.eye(64).tolist()
    assert fold.upsampling_matrix(8, (8,)).tolist() == np.eye(64).tolist()
    assert fold.pooling_matrix(5, (5, 1)).shape == (26, 25)


def test_scale_mask_keeps_each_scale_to_itself():
    mask = fold.scale_mask((1, 2), 3)
    assert mask.dtype == np.float32
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0]] + 4 * [[0, 0, 0, 1, 1, 1]]


def test_normalisation_folds_into_the_patch_embedding(rng):
    weight = rng.standard_normal((4, 3, 2, 2)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    pixels = rng.integers(0, 256, (3, 2, 2)).astype(np.float64)
    folded_weight, folded_bias = fold.fold_normalisation(weight, bias, MEAN, STD)
    assert folded_weight.dtype == folded_bias.dtype == np.float32
    normalised = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    expected = (weight * normalised).sum(axis=(1, 2, 3)) + bias
    np.testing.assert_allclose((folded_weight * pixels).sum(axis=(1, 2, 3)) + folded_bias, expected, atol=1e-4)


def test_batch_norm_folds_into_its_convolution(rng):
    unit = random_unit(rng, kernel=1)
    weight, bias = fold.fold_batch_norm(unit, "u")
    assert weight.dtype == bias.dtype == np.float32
    x = rng.standard_normal(5)
    y = unit["u.conv.weight"][:, :, 0, 0].astype(np.float64) @ x
    y = (y - unit["u.bn.running_mean"]) / np.sqrt(unit["u.bn.running_var"].astype(np.float64) + 1e-5)
    expected = y * unit["u.bn.weight"] + unit["u.bn.bias"]
    np.testing.assert_allclose(weight[:, :, 0, 0].astype(np.float64) @ x + bias, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_without_biases_is_attention_with_them(rng, heads):
    """Softmax attention of LayerNorm's output with scale, shift and all biases, large ones too, in FP64 loops."""
    dim, length, eps = 8, 12, 1e-5
    part = dim // heads
    w = {
        "b.norm1.weight": rng.uniform(0.2, 3, dim),
        "b.norm1.bias": rng.normal(0, 2, dim),
        "b.attn.qkv.weight": rng.normal(0, 0.5, (3 * dim, dim)),
        "b.attn.qkv.bias": rng.normal(0, 20, 3 * dim),
        "b.attn.proj.weight": rng.normal(0, 1, (dim, dim)),
        "b.attn.proj.bias": rng.normal(0, 1, dim),
    }
    w = {name: value.astype(np.float32) for name, value in w.items()}
    x = rng.normal(0, 3, (length, dim))
    normed = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + eps)

    def attend(q, k, v):
        mixed = np.zeros((length, dim))
        for head in range(heads):
            columns = slice(head * part, (head + 1) * part)
            share = np.exp((scores := q[:, columns] @ k[:, columns].T) - scores.max(axis=1, keepdims=True))
            mixed[:, columns] = share / share.sum(axis=1, keepdims=True) @ v[:, columns]
        return mixed

    q, k, v = np.split(
        (normed * w["b.norm1.weight"] + w["b.norm1.bias"]) @ w["b.attn.qkv.weight"].T + w["b.attn.qkv.bias"], 3, axis=1
    )
    expected = attend(q / np.sqrt(part), k, v) @ w["b.attn.proj.weight"].T + w["b.attn.proj.bias"]

    folded = fold.fold_attention(w, "b", heads)
    shifted = normed + fold.SHIFT
    q, k, v = (shifted @ matrix.astype(np.float64).T for matrix in (folded.query, folded.key, folded.value))
    found = attend(q, k, v) @ folded.proj.T + folded.proj_bias
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert {value.dtype for value in vars(folded).values()} == {np.dtype(np.float32)}
    for matrix in (folded.key, folded.value):
        np.testing.assert_allclose(matrix.sum(axis=1), 0, atol=1e-5)


def test_folding_leaves_the_weights_alone(rng):
    unit = random_unit(rng)
    before = {key: value.copy() for key, value in unit.items()}
    fold.fold_batch_norm(unit, "u")
    assert all(np.array_equal(unit[key], before[key]) for key in unit)


# --- against torch --------------------------------------------------------------------------------


@pytest.mark.needs_torch
@pytest.mark.parametrize("grid", GRIDS)
def test_pooling_and_upsampling_are_torchs(rng, grid):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    maps = torch.from_numpy(rng.standard_normal((1, 2, grid, grid)))
    pool = torch.from_numpy(fold.pooling_matrix(grid, SCALES)).double()
    spread = torch.from_numpy(fold.upsampling_matrix(grid, SCALES)).double()
    for scale, part in PART_OF_SCALE.items():
        cells = functional.adaptive_avg_pool2d(maps, scale)
        found = (pool[part] @ maps[0].flatten(1).T).T.reshape(cells.shape)
        torch.testing.assert_close(found, cells, atol=1e-6, rtol=0)
        wide = functional.interpolate(cells, size=(grid, grid), mode="bilinear", align_corners=False)
        found = (spread[:, part] @ cells[0].flatten(1).T).T.reshape(wide.shape)
        torch.testing.assert_close(found, wide, atol=1e-6, rtol=0)


@pytest.mark.needs_torch
def test_normalisation_then_patch_embedding_is_torchs(rng):
    torch = pytest.importorskip("torch")
    embed = torch.nn.Conv2d(3, 6, 4, stride=4)
    weight, bias = embed.weight.detach().numpy(), embed.bias.detach().numpy()
    folded = [torch.from_numpy(part).double() for part in fold.fold_normalisation(weight, bias, MEAN, STD)]
    pixels = torch.from_numpy(rng.integers(0, 256, (2, 3, 12, 12)).astype(np.float64))
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = torch.nn.functional.conv2d(pixels, *folded, stride=4)
    torch.testing.assert_close(found, embed.double()(normalised), atol=1e-5, rtol=0)


@pytest.mark.needs_torch
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_and_batch_norm_are_torchs(rng, kernel):
    torch = pytest.importorskip("torch")
    unit = random_unit(rng, kernel=kernel)
    conv = torch.nn.Conv2d(5, 7, kernel, padding=kernel // 2, bias=False)
    norm = torch.nn.BatchNorm2d(7)
    conv.load_state_dict({"weight": torch.from_numpy(unit["u.conv.weight"])})
    state = {key[len("u.bn.") :]: torch.from_numpy(value) for key, value in unit.items() if ".bn." in key}
    norm.load_state_dict(state, strict=False)
    x = torch.from_numpy(rng.standard_normal((2, 5, 8, 8)))
    with torch.inference_mode():
        expected = norm.double().eval()(conv.double()(x))
        weight, bias = (torch.from_numpy(part).double() for part in fold.fold_batch_norm(unit, "u"))
        found = torch.nn.functional.conv2d(x, weight, bias, padding=kernel // 2)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
