"""Adapters, gate and reconstruction once more, in plain NumPy and FP64, written from their description.

Shares no line with the package. Weights have the names of the package's modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from reference import Array, gelu, layer_norm, linear, reference_block, reference_tokens

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Weights = Mapping[str, Array]


def reference_adapter(w: Weights, name: str, tokens: Array, dilations: Sequence[int]) -> Array:
    """What an adapter adds to tokens ``[N, L, D]`` of a square map: token by token, tap by tap."""
    count, length, _ = tokens.shape
    side = math.isqrt(length)
    low = gelu(linear(tokens, w, f"{name}.down")).reshape(count, side, side, -1)
    parts = []
    for index, dilation in enumerate(dilations):
        near = gelu(_depthwise(low, w[f"{name}.branches.{index}.0.weight"], dilation))
        parts.append(gelu(near @ w[f"{name}.branches.{index}.2.weight"][:, :, 0, 0].T))
    mean = low.mean(axis=(1, 2))
    overall = gelu(mean @ w[f"{name}.overall.1.weight"][:, :, 0, 0].T)
    parts.append(np.broadcast_to(overall[:, None, None], low.shape))
    joined = gelu(np.concatenate(parts, axis=-1) @ w[f"{name}.join.weight"][:, :, 0, 0].T)
    squeezed = gelu(joined.mean(axis=(1, 2)) @ w[f"{name}.squeeze.weight"].T)
    attention = 1 / (1 + np.exp(-(squeezed @ w[f"{name}.excite.weight"].T)))
    mixed = gelu(_depthwise(joined * attention[:, None, None], w[f"{name}.mix.weight"], 1))
    return linear(mixed.reshape(count, length, -1), w, f"{name}.up")


def reference_gate(w: Weights, name: str, tokens: Array) -> Array:
    """The convex weights ``[N, L, 3]``, one token after another."""
    found = np.zeros((*tokens.shape[:2], 3))
    for place in np.ndindex(*tokens.shape[:2]):
        q, k, v = (w[f"{name}.{part}.weight"] @ tokens[place] for part in ("query", "key", "value"))
        found[place] = _softmax(np.stack([_softmax(q[row] * k) for row in range(3)]) @ v)
    return found


def reference_mixture(w: Weights, name: str, tokens: Array, known: Array, factor: float) -> Array:
    """What is added to the tokens: the MLP's, the near and the far adapter's, weighed."""
    weights = factor * reference_gate(w, f"{name}.gate", tokens)
    near = reference_adapter(w, f"{name}.near", tokens, (1, 3, 5))
    far = reference_adapter(w, f"{name}.far", tokens, (7, 9, 11))
    return weights[..., :1] * known + weights[..., 1:2] * near + weights[..., 2:] * far


def reference_run(
    w: Weights, tiles: Array, visible: Array | None, *, heads: int, mixtures: Weights | None = None
) -> list[Array]:
    """The tokens ``[N, V, D]`` of visible patches after each block of a plain encoder, without its class token.

    With ``mixtures``, named ``0.near.down.weight`` and so on, adapters with an identity gate stand beside each MLP.
    """
    tokens = reference_tokens(w, tiles)
    first = int("encoder.cls_token" in w)
    if visible is not None:
        rows = [one[[*range(first), *(places + first)]] for one, places in zip(tokens, visible, strict=True)]
        tokens = np.stack(rows)
    found = []
    for index in range(1 + max(int(key.split(".")[2]) for key in w if key.startswith("encoder.blocks."))):

        def mixture(normed: Array, known: Array, name: str = str(index)) -> Array:
            if mixtures is None:
                return known
            added = reference_mixture(mixtures, name, normed[:, first:], known[:, first:], 3.0)
            return np.concatenate([known[:, :first], added], axis=1)

        tokens = reference_block(tokens, w, f"encoder.blocks.{index}", heads=heads, eps=1e-5, mixture=mixture)
        found.append(tokens[:, first:])
    return found


def tent(maps: Array, side: int) -> Array:
    """Maps ``[N, C, G, G]`` to another side: each cell a mean by a tent that is as wide as the coarser grid asks."""
    size = maps.shape[-1]
    scale = size / side
    centres, cells = (np.arange(side) + 0.5) * scale, np.arange(size) + 0.5
    weight = np.maximum(0, 1 - np.abs(centres[:, None] - cells) / max(1, scale))
    weight /= weight.sum(axis=1, keepdims=True)
    return weight @ maps @ weight.T


def reference_reconstruction(w: Weights, tokens: Array, visible: Array, depth: int) -> Array:
    """Values of the hidden patches ``[N, L - V, 3 P P]`` in the order of their places.

    As published: the visible tokens first, then a mask token for each hidden place, each with its place's position.
    """
    position, rows = w["pos_embed"][0], []
    for known, places in zip(linear(tokens, w, "embed"), visible, strict=True):
        hidden = [place for place in range(len(position)) if place not in places]
        x = np.concatenate([known + position[places], w["mask_token"][0] + position[hidden]])[None]
        for index in range(depth):
            x = reference_block(x, w, f"blocks.{index}", heads=8, eps=1e-5)
        rows.append(linear(layer_norm(x, w, "norm", 1e-5), w, "predict")[0, len(places) :])
    return np.stack(rows)


def reference_patches(tiles: Array, patch: int, pixels: str) -> Array:
    """Values of the patches ``[N, L, 3 P P]``, channel by channel, of tiles ``[N, 3, T, T]``."""
    if pixels != "raw":
        tiles = (tiles - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
    grid = tiles.shape[-1] // patch
    rows = []
    for tile in tiles:
        for place in range(grid * grid):
            top, left = (patch * part for part in divmod(place, grid))
            values = [tile[c, top + y, left + x] for c in range(3) for y in range(patch) for x in range(patch)]
            if pixels == "patch":
                centred = np.subtract(values, np.mean(values))
                values = centred / np.sqrt(np.sum(centred**2) / (len(centred) - 1) + 1e-6)
            rows.append(values)
    return np.reshape(rows, (len(tiles), grid * grid, -1))


def _depthwise(maps: Array, kernel: Array, dilation: int) -> Array:
    """Maps ``[N, S, S, C]`` with zeros around them, through a kernel ``[C, 1, 3, 3]``."""
    side = maps.shape[1]
    out = np.zeros(maps.shape)
    for row, column in np.ndindex(side, side):
        for i, j in np.ndindex(3, 3):
            y, x = row + dilation * (i - 1), column + dilation * (j - 1)
            if 0 <= y < side and 0 <= x < side:
                out[:, row, column] += maps[:, y, x] * kernel[:, 0, i, j]
    return out


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()
