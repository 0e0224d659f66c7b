"""The network once more, in plain NumPy and FP64, written from the papers: what all forms of it must compute.

Shares no line with the package and is in no hurry: loops where the package uses a trick. It also knows
the parts that the package folds away on loading (class token, LayerScale, attention without bias).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

_erf = np.vectorize(math.erf, otypes=[np.float64])


def reference_features(
    weights: Mapping[str, npt.ArrayLike],
    image: npt.NDArray[np.uint8],
    *,
    heads: int,
    eps: float,
    attention: Sequence[str] = (),
    rotary_base: float = 0.0,
    tapped: Sequence[int] = (),
    final_norm: str = "none",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> list[Array]:
    """The tapped maps ``[N, D, G, G]`` of images ``[N, 3, T, T]``; weights in this package's names.

    ``attention`` has a kind for each block: ``global``, ``window N`` or ``pooled N``; tokens stay row by row. Which
    blocks are ``tapped`` counts from 0. What the tensors show is read from them: class token, registers, SwiGLU, norms
    of queries and keys.
    """
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    tokens = reference_tokens(w, image, mean, std)
    count, dim, grid = len(image), tokens.shape[-1], image.shape[-1] // w["encoder.patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("encoder.blocks."))
    ends = [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]  # a map after each quarter of the blocks
    ends = list(tapped) or ends
    turns = None
    if rotary_base:
        turns = np.ones((tokens.shape[1], dim // heads // 2), np.complex128)
        turns[-grid * grid :] = rotary_turns(grid, dim // heads, rotary_base)
    maps = []
    for index in range(depth):
        name = f"encoder.blocks.{index}"
        kind = attention[index] if attention else "global"
        tokens = reference_block(tokens, w, name, heads=heads, eps=eps, kind=kind, turns=turns)
        if index in ends:
            normed = final_norm == "taps" or (final_norm == "last" and index == ends[-1])
            patches = (layer_norm(tokens, w, "encoder.norm", eps) if normed else tokens)[:, -grid * grid :]
            maps.append(patches.transpose(0, 2, 1).reshape(count, dim, grid, grid))
    assert len(maps) == len(ends)
    return maps


def rotary_turns(grid: int, width: int, base: float) -> Array:
    """What DINOv3 multiplies pairs of channels of a head by, as complex numbers ``[G*G, width / 2]``.

    Channel i of the first half of a head is the real part, channel i of the second half the imaginary part.
    """
    turns = np.empty((grid * grid, width // 2), np.complex128)
    for row in range(grid):
        for column in range(grid):
            places = [2 * (cell + 0.5) / grid - 1 for cell in (row, column)]
            angles = [2 * math.pi * place / base ** (4 * i / width) for place in places for i in range(width // 4)]
            turns[row * grid + column] = np.exp(1j * np.array(angles))
    return turns


def reference_tokens(
    w: Mapping[str, Array],
    image: npt.NDArray[np.uint8],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Array:
    """Tokens with their positions ``[N, L, D]`` of images ``[N, 3, T, T]``, after class token and registers."""
    kernel = w["encoder.patch_embed.proj.weight"]
    dim, _, patch, _ = kernel.shape
    count, _, tile, _ = image.shape
    grid = tile // patch
    pixels = (image - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    tokens = np.zeros((count, grid * grid, dim))
    for row in range(grid):
        for column in range(grid):
            piece = pixels[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens[:, row * grid + column] = piece.reshape(count, -1) @ kernel.reshape(dim, -1).T
    tokens += w["encoder.patch_embed.proj.bias"]

    extra = [
        np.repeat(w[f"encoder.{name}"], count, axis=0) for name in ("cls_token", "registers") if f"encoder.{name}" in w
    ]
    position = w.get("encoder.pos_embed", np.zeros((1, grid * grid, dim)))
    if position.shape[1] > grid * grid:  # the first is the class token's
        extra[0] = extra[0] + position[:, :1]
    return np.concatenate([*extra, tokens + position[:, -grid * grid :]], axis=1)


def reference_block(
    tokens: Array,
    w: Mapping[str, Array],
    name: str,
    *,
    heads: int,
    eps: float,
    kind: str = "global",
    turns: Array | None = None,
    mixture: Callable[[Array, Array], Array] = lambda normed, added: added,
) -> Array:
    """The tokens ``[N, L, D]`` after the block called ``name``.

    ``turns`` are those of the rotary positions, ``[L, d / 2]``. ``mixture`` makes what is added to the tokens from
    them, normed, and from what the MLP gives for them.
    """
    normed = layer_norm(tokens, w, f"{name}.norm1", eps)
    groups = _groups(kind, math.isqrt(tokens.shape[1]), tokens.shape[1])
    tokens = tokens + _attention(normed, w, f"{name}.attn", heads, groups, eps, turns) * w.get(f"{name}.scale1", 1.0)
    normed = layer_norm(tokens, w, f"{name}.norm2", eps)
    hidden = linear(normed, w, f"{name}.mlp.fc1")
    if hidden.shape[-1] > w[f"{name}.mlp.fc2.weight"].shape[1]:  # SwiGLU
        gate, value = np.split(hidden, 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * value
    else:
        hidden = gelu(hidden)
    added = linear(hidden, w, f"{name}.mlp.fc2")
    return tokens + mixture(normed, added) * w.get(f"{name}.scale2", 1.0)


def reference_logits(
    weights: Mapping[str, npt.ArrayLike],
    image: npt.NDArray[np.uint8],
    *,
    heads: int,
    eps: float,
    scales: Sequence[int] = (1, 2, 3, 6),
    align: bool = False,
    **encoder: Any,
) -> Array:
    """Logits ``[N, K, G, G]``, with a neck ``[N, K, 4G, 4G]``; ``align``: the head up-samples with aligned corners.

    ``encoder`` are options of :func:`reference_features`.
    """
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    maps = reference_features(w, image, heads=heads, eps=eps, **encoder)
    *shallow, deep = _neck(maps, w) if "head.neck.first.weight" in w else maps
    grid = deep.shape[-1]
    pyramid = [deep]
    for index, scale in enumerate(scales):
        cells = _unit(adaptive_average(deep, scale), w, f"head.pooled.{index}")
        pyramid.append(bilinear(cells, grid, align))
    top = _unit(np.concatenate(pyramid, axis=1), w, "head.bottleneck")
    level = top
    levels = []
    for index in reversed(range(len(shallow))):
        lateral = _unit(shallow[index], w, f"head.laterals.{index}")
        level = lateral + bilinear(level, lateral.shape[-1], align)
        levels.insert(0, level)
    smooth = [_unit(level, w, f"head.smooth.{index}") for index, level in enumerate(levels)]
    joined = [bilinear(level, smooth[0].shape[-1], align) for level in (*smooth, top)]
    fused = _unit(np.concatenate(joined, axis=1), w, "head.fuse")
    return _conv(fused, w["head.classifier.weight"]) + w["head.classifier.bias"][:, None, None]


def _neck(maps: list[Array], w: Mapping[str, Array]) -> list[Array]:
    """Maps of 4, 2, 1 and 1/2 times the side of four maps."""

    def doubled(x: Array, name: str) -> Array:
        """A transposed convolution of 2 x 2, stride 2: each cell becomes four."""
        count, _, side, _ = x.shape
        cells = np.einsum("ncij,cdyx->ndiyjx", x, w[f"head.neck.{name}.weight"])
        return cells.reshape(count, -1, 2 * side, 2 * side) + w[f"head.neck.{name}.bias"][:, None, None]

    first, second, third, fourth = maps
    count, dim, side, _ = fourth.shape
    halved = fourth.reshape(count, dim, side // 2, 2, side // 2, 2).max(axis=(3, 5))
    four_times = doubled(gelu(_batch_norm(doubled(first, "first"), w, "head.neck.bn")), "first_again")
    return [four_times, doubled(second, "second"), third, halved]


def reference_labels(logits: Array, tile: int, align: bool = False) -> npt.NDArray[np.int64]:
    """Labels ``[N, T, T]``: bilinear to pixels, argmax."""
    return bilinear(logits, tile, align).argmax(axis=1)


def adaptive_average(maps: Array, cells: int) -> Array:
    """``[N, C, G, G]`` -> ``[N, C, cells, cells]``, windows as in PyTorch's adaptive pooling."""
    grid = maps.shape[-1]
    spans = [(math.floor(i * grid / cells), math.ceil((i + 1) * grid / cells)) for i in range(cells)]
    rows = [[maps[:, :, a:b, c:d].mean(axis=(2, 3)) for c, d in spans] for a, b in spans]
    return np.array(rows).transpose(2, 3, 0, 1)


def bilinear(maps: Array, side: int, align: bool = False) -> Array:
    """``[N, C, g, g]`` -> ``[N, C, side, side]``; pixel centres are aligned and borders repeat, or corners are."""
    size = maps.shape[-1]
    centres = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    if align:
        centres = np.linspace(0, size - 1, side)
    weight = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size)))  # a tent on every source cell
    return weight @ maps @ weight.T


def gelu(x: Array) -> Array:
    """The exact one, by the error function."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def linear(x: Array, w: Mapping[str, Array], name: str) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", np.zeros(1))


def layer_norm(x: Array, w: Mapping[str, Array], name: str, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _groups(kind: str, grid: int, count: int) -> list[tuple[list[int], Array]]:
    """Groups of tokens, and the keys that each sees, as means of tokens ``[keys, count]``."""
    everyone = list(range(count))
    if kind == "global":
        return [(everyone, np.eye(count))]
    name, side = kind.split()[0], int(kind.split()[1])
    assert count == grid * grid
    squares: dict[tuple[int, int], list[int]] = {}
    for row in range(grid):
        for column in range(grid):
            squares.setdefault((row // side, column // side), []).append(row * grid + column)
    if name == "window":
        return [(square, np.eye(count)[square]) for square in squares.values()]
    assert name == "pooled"
    return [(everyone, np.array([np.eye(count)[square].mean(axis=0) for square in squares.values()]))]


def _attention(
    x: Array,
    w: Mapping[str, Array],
    name: str,
    heads: int,
    groups: list[tuple[list[int], Array]],
    eps: float,
    turns: Array | None,
) -> Array:
    def placed(part: Array, which: str, tokens: list[int]) -> Array:
        """One head's queries or keys after their norm and the turn of their tokens."""
        if f"{name}.{which}_norm.bias" in w:
            part = layer_norm(part, w, f"{name}.{which}_norm", eps)
        elif f"{name}.{which}_norm.weight" in w:
            part = part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + eps) * w[f"{name}.{which}_norm.weight"]
        if turns is None:
            return part
        turned = (part[:, : width // 2] + 1j * part[:, width // 2 :]) * turns[tokens]
        return np.concatenate([turned.real, turned.imag], axis=1)

    dim = x.shape[-1]
    width = dim // heads
    q, k, v = np.split(linear(x, w, f"{name}.qkv"), 3, axis=-1)
    mixed = np.zeros_like(x)
    for image in range(len(x)):
        for tokens, means in groups:
            keys, values = means @ k[image], means @ v[image]
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = placed(q[image, tokens, part], "q", tokens) @ placed(keys[:, part], "k", tokens).T
                scores /= math.sqrt(width)
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                mixed[image, tokens, part] = scores / scores.sum(axis=1, keepdims=True) @ values[:, part]
    return linear(mixed, w, f"{name}.proj")


def _conv(x: Array, kernel: Array) -> Array:
    """Same-size cross-correlation with zero padding."""
    side = kernel.shape[-1]
    edge = side // 2
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    out = np.zeros((len(x), len(kernel), height, width))
    for row in range(side):
        for column in range(side):
            window = padded[:, :, row : row + height, column : column + width]
            out += np.tensordot(kernel[:, :, row, column], window, (1, 1)).swapaxes(0, 1)
    return out


def _unit(x: Array, w: Mapping[str, Array], name: str) -> Array:
    """Convolution, batch norm with stored statistics, ReLU."""
    return np.maximum(0, _batch_norm(_conv(x, w[f"{name}.conv.weight"]), w, f"{name}.bn"))


def _batch_norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    gain = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
    mean, bias = w[f"{name}.running_mean"], w[f"{name}.bias"]
    return (x - mean[:, None, None]) * gain[:, None, None] + bias[:, None, None]
