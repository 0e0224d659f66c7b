"""Exact rewrites of constant linear maps, computed in FP64 and rounded once to FP32.

Linear maps with constants are merged into a neighbour or written as one matrix: the same function in fewer operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

OFF = np.float32(-3e4)  # A bias after which ReLU gives 0 whatever the activation is; far from the end of FP16's range

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Array]


def fold_normalisation(weight: Array, bias: Array, mean: Sequence[float], std: Sequence[float]) -> tuple[Array, Array]:
    """Convolution of normalised pixels (mean and std on 0..255) as a convolution of raw ones.

    conv(W, (x - mean) / std) + b = conv(W / std, x) + (b - sum W mean / std); exact because the patch
    embedding has no padding, so every output sees the same number of pixels.
    """
    scaled = weight.astype(np.float64) / np.asarray(std).reshape(1, 3, 1, 1)
    shift = (scaled * np.asarray(mean).reshape(1, 3, 1, 1)).sum(axis=(1, 2, 3))
    return scaled.astype(np.float32), (bias - shift).astype(np.float32)


def fold_batch_norm(weights: Weights, unit: str, eps: float = 1e-5) -> tuple[Array, Array]:
    """Weight and bias of ``{unit}.conv`` merged with ``{unit}.bn``, which follows it; ``eps`` is PyTorch's default."""
    gain = weights[f"{unit}.bn.weight"] / np.sqrt(weights[f"{unit}.bn.running_var"].astype(np.float64) + eps)
    weight = weights[f"{unit}.conv.weight"] * gain.reshape(-1, 1, 1, 1)
    bias = weights[f"{unit}.bn.bias"] - weights[f"{unit}.bn.running_mean"] * gain
    return weight.astype(np.float32), bias.astype(np.float32)


def fold_query_scale(weight: Array, bias: Array, heads: int) -> tuple[Array, Array]:
    """The qkv projection ``[3 D, D]`` with 1/sqrt(head width) applied to the query rows, which come first."""
    dim = weight.shape[1]
    scale = np.ones(3 * dim)
    scale[:dim] = 1 / math.sqrt(dim // heads)
    return (weight * scale[:, None]).astype(np.float32), (bias * scale).astype(np.float32)


def pooling_matrix(grid: int, scales: Sequence[int]) -> Array:
    """Average pooling of a ``grid x grid`` map to every ``s x s`` of ``scales``, ``[sum s*s, grid*grid]``.

    Windows are those of ``adaptive_avg_pool2d``: from floor(i grid / s) to before ceil((i + 1) grid / s); overlapping.
    """
    rows = []
    for scale in scales:
        axis = np.zeros((scale, grid))
        for cell in range(scale):
            first, last = cell * grid // scale, -(-(cell + 1) * grid // scale)
            axis[cell, first:last] = 1 / (last - first)
        rows.append(np.kron(axis, axis))
    return np.concatenate(rows).astype(np.float32)


def upsampling_matrix(grid: int, scales: Sequence[int]) -> Array:
    """Bilinear up-sampling (no aligned corners) of every ``s x s`` map to ``grid x grid``, ``[grid*grid, sum s*s]``."""
    columns = []
    for scale in scales:
        axis = np.zeros((grid, scale))
        for cell in range(grid):
            source = max((cell + 0.5) * scale / grid - 0.5, 0.0)
            low = min(int(source), scale - 1)
            high = min(low + 1, scale - 1)
            axis[cell, low] += 1 - (source - low)
            axis[cell, high] += source - low
        columns.append(np.kron(axis, axis))
    return np.concatenate(columns, axis=1).astype(np.float32)


def kernel_taps(kernel: Array) -> Array:
    """A 3x3 convolution's weights ``[C, I, 3, 3]`` as a matrix that makes the share of each tap, ``[I, 9 C]``."""
    channels, inputs = kernel.shape[:2]
    return np.ascontiguousarray(kernel.transpose(1, 2, 3, 0).reshape(inputs, 9 * channels))


def spreading_matrix(grid: int, scales: Sequence[int]) -> Array:
    """Up-sampling and the gathering of a zero-padded 3x3 convolution in one matrix.

    A tap at pixel (y, x) reads the up-sampled map at (y + dy, x + dx), a weighted sum of cells, or the zero padding.

    Returns:
        ``[grid*grid, 9 * sum s*s]``, cell by cell and tap by tap, for the shares that :func:`kernel_taps` makes.
    """
    upsampling = upsampling_matrix(grid, scales)
    cells = upsampling.shape[1]
    padded = np.zeros((grid + 2, grid + 2, cells), np.float32)
    padded[1:-1, 1:-1] = upsampling.reshape(grid, grid, cells)
    taps = [padded[dy : dy + grid, dx : dx + grid].reshape(grid * grid, cells) for dy in range(3) for dx in range(3)]
    return np.stack(taps, axis=2).reshape(grid * grid, 9 * cells)


def scale_mask(scales: Sequence[int], channels: int) -> Array:
    """1 where a pooled cell belongs to the scale of a block of channels, ``[sum s*s, len(scales) * channels]``.

    All scales go through one matrix product; this keeps each scale's own cells.
    """
    own = np.repeat(np.eye(len(scales), dtype=np.float32), np.square(scales), axis=0)
    return np.repeat(own, channels, axis=1)
