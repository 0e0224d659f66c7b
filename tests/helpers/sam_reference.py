"""SAM's image encoder once more, in plain NumPy and FP64, written from the papers; and files of it with random weights.

Shares no line with the package: loops over images, windows, heads and queries. Weights have the official names, without
``image_encoder.`` (Kirillov et al., ICCV 2023; relative positions: Li et al., MViTv2, CVPR 2022, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

DIM, DEPTH, HEADS, MLP, WINDOW, GLOBAL, GRID, PATCH = 64, 4, 2, 96, 3, (1, 3), 8, 4
"""Of :func:`sam_weights`."""
EPS = 1e-6

_erf = np.vectorize(math.erf, otypes=[np.float64])


def sam_weights(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """A small image encoder under the official names, large enough values for every part to matter."""
    random = np.random.default_rng(seed)

    def values(*shape: int, around: float = 0.0, size: float = 0.3) -> npt.NDArray[np.float32]:
        return (around + size * random.standard_normal(shape)).astype(np.float32)

    weights = {
        "pos_embed": values(1, GRID, GRID, DIM),
        "patch_embed.proj.weight": values(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": values(DIM),
    }
    for index in range(DEPTH):
        block = f"blocks.{index}"
        side = GRID if index in GLOBAL else WINDOW
        for norm in ("norm1", "norm2"):
            weights[f"{block}.{norm}.weight"] = values(DIM, around=1.0)
            weights[f"{block}.{norm}.bias"] = values(DIM)
        for layer, rows, columns in (
            ("attn.qkv", 3 * DIM, DIM),
            ("attn.proj", DIM, DIM),
            ("mlp.lin1", MLP, DIM),
            ("mlp.lin2", DIM, MLP),
        ):
            weights[f"{block}.{layer}.weight"] = values(rows, columns, size=0.15)
            weights[f"{block}.{layer}.bias"] = values(rows)
        for axis in "hw":
            weights[f"{block}.attn.rel_pos_{axis}"] = values(2 * side - 1, DIM // HEADS)
    return weights


def official_file(weights: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
    """The encoder as it lies in SAM's own files, beside a few tensors of the other parts."""
    others = {
        "image_encoder.neck.0.weight": (8, DIM, 1, 1),
        "image_encoder.neck.1.weight": (8,),
        "image_encoder.neck.1.bias": (8,),
        "image_encoder.neck.2.weight": (8, 8, 3, 3),
        "image_encoder.neck.3.weight": (8,),
        "image_encoder.neck.3.bias": (8,),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 4),
        "prompt_encoder.point_embeddings.0.weight": (1, 8),
        "prompt_encoder.mask_downscaling.0.weight": (4, 1, 2, 2),
        "mask_decoder.transformer.layers.0.self_attn.q_proj.weight": (8, 8),
        "mask_decoder.iou_token.weight": (1, 8),
        "mask_decoder.iou_prediction_head.layers.0.weight": (8, 8),
    }
    state = {f"image_encoder.{key}": value for key, value in weights.items()}
    return state | {key: np.ones(shape, np.float32) for key, shape in others.items()}


def sam_tokens(weights: Mapping[str, npt.ArrayLike], image: npt.NDArray[np.uint8]) -> Array:
    """Tokens with positions ``[N, G, G, D]`` of images ``[N, 3, T, T]``."""
    kernel = np.asarray(weights["patch_embed.proj.weight"], np.float64)
    dim, _, patch, _ = kernel.shape
    count, _, tile, _ = image.shape
    pixels = (image - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
    tokens = np.zeros((count, tile // patch, tile // patch, dim))
    for row in range(tile // patch):
        for column in range(tile // patch):
            piece = pixels[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens[:, row, column] = piece.reshape(count, -1) @ kernel.reshape(dim, -1).T
    return tokens + np.asarray(weights["patch_embed.proj.bias"]) + np.asarray(weights["pos_embed"])


def sam_blocks(weights: Mapping[str, npt.ArrayLike], tokens: Array) -> list[Array]:
    """Maps ``[N, S, S, D]`` after each block, of such a map. ``S`` need not be the grid of the weights."""
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    maps = []
    for index in range(DEPTH):
        name = f"blocks.{index}"
        normed = _layer_norm(tokens, w, f"{name}.norm1")
        tokens = tokens + _attention(normed, w, f"{name}.attn", None if index in GLOBAL else WINDOW)
        hidden = _linear(_layer_norm(tokens, w, f"{name}.norm2"), w, f"{name}.mlp.lin1")
        tokens = tokens + _linear(0.5 * hidden * (1 + _erf(hidden / math.sqrt(2))), w, f"{name}.mlp.lin2")
        maps.append(tokens)
    return maps


def resampled_line(values: Array, size: int) -> Array:
    """``[R, C]`` -> ``[size, C]``: linear between centres, constant beyond the outer ones."""
    old, new = ((np.arange(count) + 0.5) / count for count in (len(values), size))
    return np.stack([np.interp(new, old, column) for column in np.asarray(values, np.float64).T], axis=1)


def resampled_map(values: Array, size: int) -> Array:
    """``[G, G, D]`` -> ``[size, size, D]`` by cubic convolution (Keys, 1981, with a = -0.75), edges repeat."""
    grid = len(values)
    matrix = np.zeros((size, grid))
    for place in range(size):
        centre = (place + 0.5) * grid / size - 0.5
        for cell in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - cell)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[place, min(max(cell, 0), grid - 1)] += near if x <= 1 else far
    return np.einsum("yr,xc,rcd->yxd", matrix, matrix, np.asarray(values, np.float64))


def _attention(maps: Array, w: Mapping[str, Array], name: str, window: int | None) -> Array:
    """Attention of maps ``[N, S, S, D]``, within windows or over all."""
    count, size, _, dim = maps.shape
    side = window or size
    full = -(-size // side) * side
    padded = np.zeros((count, full, full, dim))
    padded[:, :size, :size] = maps
    out = np.zeros_like(padded)
    for image in range(count):
        for top in range(0, full, side):
            for left in range(0, full, side):
                part = (image, slice(top, top + side), slice(left, left + side))
                out[part] = _square(padded[part], w, name)
    return out[:, :size, :size]


def _square(square: Array, w: Mapping[str, Array], name: str) -> Array:
    """Attention among all tokens of one square ``[S, S, D]``."""
    side, _, dim = square.shape
    width = dim // HEADS
    by_row, by_column = (resampled_line(w[f"{name}.rel_pos_{axis}"], 2 * side - 1) for axis in "hw")
    places = [(row, column) for row in range(side) for column in range(side)]
    q, k, v = np.split(_linear(square.reshape(-1, dim), w, f"{name}.qkv"), 3, axis=-1)
    mixed = np.zeros((side * side, dim))
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        for query, (row, column) in enumerate(places):
            positions = np.array([by_row[row - y + side - 1] + by_column[column - x + side - 1] for y, x in places])
            scores = (k[:, part] / math.sqrt(width) + positions) @ q[query, part]
            scores = np.exp(scores - scores.max())
            mixed[query, part] = scores / scores.sum() @ v[:, part]
    return _linear(mixed, w, f"{name}.proj").reshape(square.shape)


def _linear(x: Array, w: Mapping[str, Array], name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _layer_norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w[f"{name}.bias"]
