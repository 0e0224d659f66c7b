"""Exact rewrites of constant linear maps, computed in FP64 and rounded once to FP32.

Linear maps with constants are merged into a neighbour or written as one matrix: the same function in fewer operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.model.config import NetworkConfig

OFF = np.float32(-3e4)  # A bias after which ReLU gives 0 whatever the activation is; far from the end of FP16's range

SHIFT = 1.0  # LayerNorm's shift c before attention, see fold_attention

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


def batch_norm(weights: Weights, norm: str, eps: float = 1e-5) -> tuple[npt.NDArray[np.float64], ...]:
    """Gain and shift of a batch norm, ``[C]`` each; ``eps`` is PyTorch's default."""
    gain = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"].astype(np.float64) + eps)
    return gain, weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain


def fold_batch_norm(weights: Weights, unit: str) -> tuple[Array, Array]:
    """Weight and bias of ``{unit}.conv`` merged with ``{unit}.bn``, which follows it."""
    gain, bias = batch_norm(weights, f"{unit}.bn")
    weight = weights[f"{unit}.conv.weight"] * gain.reshape(-1, 1, 1, 1)
    return weight.astype(np.float32), bias.astype(np.float32)


def fold_transposed(
    weights: Weights, layer: str, after: npt.NDArray[np.floating], shift: npt.NDArray[np.floating]
) -> tuple[Array, Array]:
    """A transposed convolution of 2 x 2, stride 2, and the linear map after it as a linear map of cells.

    Args:
        weights: of the network.
        layer: its name.
        after: the map after it, ``[C, M]`` for M channels.
        shift: what that adds, ``[C]``.

    Returns:
        Weight ``[4 C, D]`` and bias ``[4 C]``; rows are by place in the square, row by row, then by channel.
    """
    kernel = weights[f"{layer}.weight"].astype(np.float64).transpose(2, 3, 1, 0)  # [2, 2, M, D]
    weight, bias = after @ kernel, after @ weights[f"{layer}.bias"] + shift
    return weight.reshape(-1, weight.shape[-1]).astype(np.float32), np.tile(bias, 4).astype(np.float32)


@dataclass(frozen=True)
class AttentionWeights:
    """A block's attention behind a LayerNorm with scale 1 and shift :data:`SHIFT`; q, k and v have no bias."""

    query: Array  # ``[D, D]``, output by input, as are the others
    key: Array
    value: Array
    proj: Array
    proj_bias: Array  # ``[D]``


def fold_attention(weights: Weights, block: str, heads: int, *, after: bool = False) -> AttentionWeights:
    """Fold LayerNorm's scale and shift, the query scale and the biases of q, k and v away; the same function.

    LayerNorm gives y = g * n + h with n = (x - mean) / deviation, whose D elements sum to 0. So W y + b is V n + a with
    V = W diag(g) and a = W h + b. What is subtracted from all elements of a row of V changes nothing (the sum of n is
    0); with the row's mean subtracted, V (n + c) = V n for every constant c. Then

    - q: a / (c D) added to all elements of a row gives a / (c D) * sum(n + c) = a, because sum(n + c) = c D.
    - k: a adds q . a to all scores of a query, which softmax does not see. It is dropped.
    - v: softmax's weights sum to 1, so attention passes a on, and proj makes W_proj a of it: part of proj's bias.

    Scores are divided by sqrt(D / heads) in q. With ``after``, rotary positions or a norm of each head come after q and
    k: then k keeps its bias as q does, and the division is left to them.
    """
    gain, shift = (weights[f"{block}.norm1.{part}"].astype(np.float64) for part in ("weight", "bias"))
    dim = len(gain)
    product = weights[f"{block}.attn.qkv.weight"].astype(np.float64)  # [3 D, D]
    constant = product @ shift + weights[f"{block}.attn.qkv.bias"]  # [3 D]
    product = product * gain
    product -= product.mean(axis=1, keepdims=True)
    kept = product + constant[:, None] / (SHIFT * dim)
    query = kept[:dim] if after else kept[:dim] / math.sqrt(dim // heads)
    key = (kept if after else product)[dim : 2 * dim]
    proj = weights[f"{block}.attn.proj.weight"]
    bias = proj.astype(np.float64) @ constant[2 * dim :] + weights[f"{block}.attn.proj.bias"]
    folded = (query, key, product[2 * dim :], proj, bias)
    return AttentionWeights(*(value.astype(np.float32) for value in folded))


def positions(weights: Weights, config: NetworkConfig, bias: Array) -> Array:
    """What is added to the patches' products: bias and learned positions; and the extra tokens, ``[1, L+E, D]``.

    Tokens are in the order of :meth:`NetworkConfig.token_order`, and the extra ones come last. Where rotary positions
    leave the same for all tokens, ``[1, 1, D]``.
    """
    learned = weights.get("encoder.pos_embed")
    first = int(config.class_token)
    patches = bias[None, None] if learned is None else bias + learned[:, first:][:, config.token_order()]
    if not config.extra_tokens:
        return patches.astype(np.float32)
    extra = []
    if config.class_token:
        extra.append(weights["encoder.cls_token"] + (0 if learned is None else learned[:, :1]))
    if config.registers:
        extra.append(weights["encoder.registers"])
    cells = np.broadcast_to(patches, (1, config.grid**2, config.embed_dim))
    return np.concatenate([cells, *extra], axis=1).astype(np.float32)


def turns(config: NetworkConfig) -> tuple[Array, Array]:
    """Cosines and sines of the rotary positions, ``[L+E, d/2]`` each, for tokens in the order of :func:`positions`."""
    angles = config.rotary_angles()[config.token_order()]
    angles = np.pad(angles, ((0, config.extra_tokens), (0, 0)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def patch_matrix(kernel: Array) -> Array:
    """A patch embedding ``[D, 3, P, P]`` as a matrix ``[D, 3 P P]`` of a patch's pixels."""
    return np.ascontiguousarray(kernel.reshape(len(kernel), -1))


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


def upsampling_matrix(grid: int, scales: Sequence[int], align: bool = False) -> Array:
    """Bilinear up-sampling of every ``s x s`` map to ``grid x grid``, ``[grid*grid, sum s*s]``.

    ``align``: the corners of both maps are aligned.
    """
    columns = []
    for scale in scales:
        axis = np.zeros((grid, scale))
        for cell in range(grid):
            source = cell * (scale - 1) / max(1, grid - 1) if align else max((cell + 0.5) * scale / grid - 0.5, 0.0)
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


def spreading_matrix(grid: int, scales: Sequence[int], align: bool = False) -> Array:
    """Up-sampling and the gathering of a zero-padded 3x3 convolution in one matrix.

    A tap at pixel (y, x) reads the up-sampled map at (y + dy, x + dx), a weighted sum of cells, or the zero padding.

    Returns:
        ``[grid*grid, 9 * sum s*s]``, cell by cell and tap by tap, for the shares that :func:`kernel_taps` makes.
    """
    upsampling = upsampling_matrix(grid, scales, align)
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
