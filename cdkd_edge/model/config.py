"""The numbers that define the network. Needs no torch, so that graphs can be built without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import CheckpointError

HEAD_DIM = 64  # width of an attention head unless given (ViT-S/B/L and the paper's student)

MAX_GRID = 512  # most patches along a side: attention over more is out of reach, and a typing error likely

MAX_REGISTERS = 64  # published encoders have 4

MIN_DEPTH, MAX_DEPTH = 4, 256
"""Transformer blocks: UPerNet taps four; the deepest ViT has 48, and a block takes milliseconds to set up."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)  # RGB statistics on 0..255 that SAM and the Mask-CDKD student are trained with

GELU, SWIGLU = "gelu", "swiglu"
NO_NORM = "none"
_CHOICES = {
    "mlp": (GELU, SWIGLU),
    "query_key_norm": (NO_NORM, "layer", "rms"),
    "final_norm": (NO_NORM, "last", "taps"),
    "align_corners": ("none", "pools", "logits", "all"),
}

GLOBAL = "global"
_MAX_SQUARES = 2  # a graph then sorts tokens with 8 axes, TensorRT's most


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a ViT encoder with a UPerNet head.

    Defaults are the Mask-CDKD paper's student (ISPRS 2026): ViT-S/16 at 1024x1024 px without class
    token or final norm, UPerNet with 256 channels.

    Raises:
        CheckpointError: the numbers do not describe a network; names the field.
    """

    tile: int = 1024  # side of a square input, px
    patch: int = 16  # side of a patch, px
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int = 1536
    classes: int = 7
    head_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    # Bilinear up-sampling that maps corners to corners: within the head (``pools``), of the logits, of both, or none.
    align_corners: str = "none"
    layer_norm_eps: float = 1e-5
    class_token: bool = False  # timm and OpenMMLab encoders carry one; the paper's student does not
    registers: int = 0  # tokens beside the patches that belong to no place (Darcet et al., ICLR 2024)
    # Base of the periods of rotary positions, as in DINOv3, where it is 100; 0: positions are learned and added.
    rotary_base: float = 0.0
    mlp: str = GELU
    query_key_norm: str = NO_NORM  # of each head's queries and keys: ``none``, ``layer`` or ``rms``
    # The LayerNorm after the last block: ``none``, ``last`` (of the deepest map alone) or ``taps`` (of all maps).
    final_norm: str = NO_NORM
    # 0-based blocks whose outputs feed the head, the last block at the end. Empty: four, evenly spaced.
    tapped: tuple[int, ...] = ()
    # A neck that makes maps of 4, 2, 1 and 1/2 times the grid of patches from four taps: the channels within and after
    # the first's up-sampling, and after the second's. Empty: all maps stay on the grid.
    neck: tuple[int, ...] = ()
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN  # of RGB, 0..255
    pixel_std: tuple[float, float, float] = PIXEL_STD
    # Of each block: ``global`` (every token attends to every token), ``window N`` (to those of its window of N x N
    # tokens) or ``pooled N`` (to the means of squares of N x N tokens). Empty: global everywhere.
    attention: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tile", "patch", "embed_dim", "heads", "mlp_dim", "classes", "head_channels"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.layer_norm_eps < 1:
            raise CheckpointError(f"layer_norm_eps must be between 0 and 1, not {self.layer_norm_eps:g}")
        if self.tile % self.patch:
            raise CheckpointError(f"tile {self.tile} is not divisible by patch {self.patch}")
        if self.grid > MAX_GRID:
            raise CheckpointError(f"tile {self.tile} is larger than {MAX_GRID} patches of {self.patch} px")
        if self.embed_dim % self.heads:
            raise CheckpointError(f"embed_dim {self.embed_dim} is not divisible by heads {self.heads}")
        if not MIN_DEPTH <= self.depth <= MAX_DEPTH:
            raise CheckpointError(f"depth {self.depth} is not {MIN_DEPTH} to {MAX_DEPTH} blocks")
        if self.classes > 255:
            raise CheckpointError(f"classes {self.classes} do not fit uint8 labels, where 255 is 'no label'")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise CheckpointError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.registers <= MAX_REGISTERS:
            raise CheckpointError(f"registers must be 0 to {MAX_REGISTERS}, not {self.registers}")
        self._require_rotary()
        self._require_tapped()
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise CheckpointError("pixel_mean and pixel_std are three numbers each, those of pixel_std above 0")
        self._require_neck()
        deepest = self.map_sides[-1]
        if not self.pool_scales or min(self.pool_scales) < 1 or max(self.pool_scales) > deepest:
            raise CheckpointError(f"pool_scales {self.pool_scales} must be 1 to {deepest}: the deepest map's side")
        if self.attention:
            self._require_attention()

    def _require_rotary(self) -> None:
        if not self.rotary_base:
            return
        if not 1 < self.rotary_base < 1e6:
            raise CheckpointError(f"rotary_base must be between 1 and 1,000,000, not {self.rotary_base:g}")
        if (self.embed_dim // self.heads) % 4:
            raise CheckpointError(
                f"rotary positions need heads whose width is a multiple of 4, not {self.embed_dim // self.heads}"
            )

    def _require_tapped(self) -> None:
        if not self.tapped:
            return
        if len(self.tapped) < 2 or list(self.tapped) != sorted(set(self.tapped)):
            raise CheckpointError(f"tapped must be two or more blocks in ascending order, not {self.tapped}")
        if self.tapped[0] < 0 or self.tapped[-1] >= self.depth:
            raise CheckpointError(f"tapped {self.tapped} names a block that the network lacks; it has {self.depth}")

    def _require_neck(self) -> None:
        if not self.neck:
            return
        if len(self.neck) != 3 or min(self.neck) < 1:
            raise CheckpointError(f"neck is three numbers of channels, not {self.neck}")
        if len(self.taps) != 4:
            raise CheckpointError(f"a neck makes four maps of different sizes; {len(self.taps)} blocks are tapped")
        if self.grid % 2:
            raise CheckpointError(
                f"the neck halves the deepest map, and a tile of {self.tile} px has {self.grid} patches a side",
                hint=f"a tile of {self.tile + self.patch} px, for example",
            )

    def _require_attention(self) -> None:
        if len(self.attention) != self.depth:
            raise CheckpointError(f"attention is given for {len(self.attention)} blocks of {self.depth}")
        for kind in self.attention:
            _require_kind(kind)
        if self.extra_tokens:
            raise CheckpointError(
                "windows and pooled keys need tokens of patches alone; this network has a class token or registers",
                hint="cdkd-edge convert --attention drops them",
            )
        if self.rotary_base and any(kind.startswith("pooled") for kind in self.attention):
            raise CheckpointError("keys that are means of squares have no place for rotary positions; use windows")
        if len(self.token_squares) > _MAX_SQUARES:
            raise CheckpointError(
                f"attention has squares of {', '.join(map(str, self.token_squares))} tokens; at most {_MAX_SQUARES} "
                "different sides are possible"
            )
        sides = [self.grid, *self.token_squares]
        for outer, inner in pairwise(sides):
            if outer % inner:
                raise CheckpointError(
                    f"squares of {inner} x {inner} tokens do not fit into {outer} x {outer} tokens",
                    hint=f"a tile of {self.tile} px has {self.grid} x {self.grid} tokens; the sides of its windows and "
                    "pools must divide that and one another",
                )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches: class token and registers, in this order."""
        return self.class_token + self.registers

    @property
    def taps(self) -> tuple[int, ...]:
        """0-based blocks whose outputs feed the head, the shallowest first; four, evenly spaced, unless tapped."""
        return self.tapped or evenly_spaced(self.depth, 4)

    @property
    def map_sides(self) -> tuple[int, ...]:
        """Sides of the head's maps, the shallowest first."""
        grid = self.grid
        return (4 * grid, 2 * grid, grid, grid // 2) if self.neck else (grid,) * len(self.taps)

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Channels of the head's maps, the shallowest first."""
        dim = self.embed_dim
        return (*self.neck[1:], dim, dim) if self.neck else (dim,) * len(self.taps)

    @property
    def logit_stride(self) -> float:
        """Side of a logit's square, px."""
        return self.tile / self.map_sides[0]

    @property
    def pools_align(self) -> bool:
        """Whether corners are aligned where the head up-samples a map to another's size."""
        return self.align_corners in ("pools", "all")

    @property
    def logits_align(self) -> bool:
        """Whether the corners of the logits are aligned with those of the tile."""
        return self.align_corners in ("logits", "all")

    @property
    def normed_taps(self) -> tuple[int, ...]:
        """The taps that pass through the final norm."""
        return {"none": (), "last": self.taps[-1:], "taps": self.taps}[self.final_norm]

    def rotary_angles(self) -> npt.NDArray[np.float64]:
        """Angles of the rotary positions in radians, ``[L, d / 2]`` row by row, d the width of a head.

        As in DINOv3 (dinov3/layers/rope_position_encoding.py): the centre of a cell has the coordinates (y, x), each
        from -1 to 1 over the tile; an angle is 2 pi times a coordinate over a period. The first half of the angles is
        of y, the second of x; their d / 4 periods are base^(4 i / d), i = 0, 1, ...
        """
        quarter = self.embed_dim // self.heads // 4
        periods = self.rotary_base ** (np.arange(quarter) / quarter)
        centres = 2 * (np.arange(self.grid) + 0.5) / self.grid - 1
        angles = 2 * np.pi * centres[:, None] / periods  # [G, d/4]
        shape = (self.grid, self.grid, quarter)
        of_y, of_x = np.broadcast_to(angles[:, None], shape), np.broadcast_to(angles, shape)
        return np.concatenate([of_y, of_x], axis=-1).reshape(self.grid**2, 2 * quarter)

    def rotary_turns(self) -> npt.NDArray[np.float64]:
        """Cosines and sines of the rotary positions, ``[2, E+L, d/2]``; those of the E extra tokens turn nothing."""
        angles = np.pad(self.rotary_angles(), ((self.extra_tokens, 0), (0, 0)))
        return np.stack([np.cos(angles), np.sin(angles)])

    def windows(self, block: int) -> int:
        """The number of windows within which a block's tokens attend; 1 if it is global."""
        return (self.grid // self._side(block, "window", self.grid)) ** 2

    def pooling(self, block: int) -> int:
        """Side in tokens of the squares over which a block averages keys and values; 1 if it averages nothing."""
        return self._side(block, "pooled", 1)

    def _side(self, block: int, kind: str, otherwise: int) -> int:
        name, _, side = (self.attention[block] if self.attention else GLOBAL).partition(" ")
        return int(side) if name == kind else otherwise

    @property
    def token_squares(self) -> tuple[int, ...]:
        """Sides of all windows and pooled squares, the largest first."""
        sides = (int(one.partition(" ")[2]) for one in self.attention if one != GLOBAL)
        return tuple(sorted(set(sides), reverse=True))

    @property
    def token_counts(self) -> tuple[int, ...]:
        """How many of each square lie side by side in the next larger one, from squares in the grid to single tokens.

        Their product is the grid's side.
        """
        sides = (self.grid, *self.token_squares, 1)
        return tuple(outer // inner for outer, inner in pairwise(sides))

    def token_order(self) -> npt.NDArray[np.int64]:
        """The cells of the grid, counted row by row, in the order of the tokens, ``[L]``.

        First come the tokens in the first place of all squares, then those in the second place, and so on. So
        attention in W windows of H heads is global attention of W H heads over tokens ``[L / W, W D]``, a view of
        ``[L, D]``; and the means of squares of p tokens are the means of p successive parts. With global attention
        alone, tokens are in the order of the cells.
        """
        counts = self.token_counts
        levels = len(counts)
        cells = np.arange(self.grid**2).reshape(*counts, *counts)  # rows by level, columns by level
        innermost_first = [axis for level in reversed(range(levels)) for axis in (level, levels + level)]
        return cells.transpose(innermost_first).ravel()


def _require_kind(kind: str) -> str:
    """The kind of attention itself, in its usual form: ``global``, ``window 16``, ``pooled 2``; CheckpointError."""
    if not re.fullmatch(r"global|(window|pooled) [1-9]\d{0,2}", kind):
        raise CheckpointError(
            f"{kind!r} is no kind of attention",
            hint="global, windowN or pooledN; for example window16/global: windows of 16 x 16 tokens, and global "
            "attention in the blocks that feed the head",
        )
    return kind


def attention_of(text: str, depth: int, taps: Sequence[int]) -> tuple[str, ...]:
    """The attention of each block from a short text; empty if all is global.

    ``KIND`` is for every block; ``KIND/OTHER`` is ``OTHER`` in the blocks whose outputs feed the head and ``KIND`` in
    the rest; ``KIND/OTHER@5,8,11`` names those blocks, counted from 0; ``KIND,KIND,...`` has one for every block.
    A kind is ``global``, ``windowN`` or ``pooledN``, with N the side of the square in tokens.

    Raises:
        CheckpointError: the text is none of these, or names other blocks than there are.
    """

    def kind(name: str) -> str:
        return _require_kind(re.sub(r"(window|pooled) ?(\d+)", r"\1 \2", name.strip()))

    kinds, _, blocks = text.partition("@")
    first, slash, other = kinds.partition("/")
    if slash:
        chosen = list(taps)
        if blocks:
            numbers = [number.strip() for number in blocks.split(",")]
            if not all(number.isdecimal() and int(number) < depth for number in numbers):
                raise CheckpointError(f"{text!r} names a block that the network lacks; it has 0 to {depth - 1}")
            chosen = [int(number) for number in numbers]
        plan = [kind(other if block in chosen else first) for block in range(depth)]
    elif blocks:
        raise CheckpointError(f"{text!r} names blocks but not their attention", hint="KIND/OTHER@BLOCKS")
    else:
        plan = [kind(one) for one in kinds.split(",")]
        plan = plan * depth if len(plan) == 1 else plan
    if len(plan) != depth:
        raise CheckpointError(f"{text!r} gives the attention of {len(plan)} blocks; the network has {depth}")
    return () if set(plan) == {GLOBAL} else tuple(plan)


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, such as ``2,5,8,11``; a CheckpointError names the option."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() and len(number) <= 4 for number in numbers):
        raise CheckpointError(f"{option} {text!r} is no list of whole numbers", hint=f"for example {option} 1,2,3,6")
    return tuple(int(number) for number in numbers)


def shown(value: Any) -> str:
    """A number, or some, as options take them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def evenly_spaced(depth: int, count: int) -> tuple[int, ...]:
    """So many blocks of a network, 0-based, the last one at the end."""
    return tuple(depth * part // count - 1 for part in range(1, count + 1))


def head_text(config: NetworkConfig) -> str:
    """The head for people: ``UPerNet, 256 channels, 4 taps, pooled to 1, 2, 3, 6 cells``."""
    scales = ", ".join(map(str, config.pool_scales))
    text = f"UPerNet, {config.head_channels} channels, {len(config.taps)} taps, pooled to {scales} cells"
    if config.neck:
        text += f", maps of 4, 2, 1 and 1/2 times the grid (neck of {', '.join(map(str, config.neck))} channels)"
    return text + f", corners aligned ({config.align_corners})" * (config.align_corners != "none")


def attention_text(attention: Sequence[str]) -> str:
    """The attention of the blocks for people, in runs: ``window 16 in blocks 0-1, 3-4; global in blocks 2, 5``."""
    if not attention:
        return GLOBAL
    places: dict[str, list[list[int]]] = {}
    for block, kind in enumerate(attention):
        runs = places.setdefault(kind, [])
        if runs and runs[-1][-1] == block - 1:
            runs[-1][-1:] = [runs[-1][0], block] if len(runs[-1]) == 1 else [block]
        else:
            runs.append([block])
    if len(places) == 1:
        return f"{attention[0]} in every block"
    return "; ".join(
        f"{kind} in blocks {', '.join('-'.join(map(str, run)) for run in runs)}" for kind, runs in places.items()
    )


def encoder_text(config: NetworkConfig) -> str:
    """The encoder for people: ``ViT, patch 16, 12 blocks, width 384, 6 heads, class token, 4 registers``."""
    parts = [f"ViT, patch {config.patch}, {config.depth} blocks, width {config.embed_dim}, {config.heads} heads"]
    parts += ["class token"] * config.class_token
    if config.registers:
        parts.append(f"{config.registers} registers")
    if config.rotary_base:
        parts.append(f"rotary positions (base {config.rotary_base:g})")
    if config.mlp == SWIGLU:
        parts.append("SwiGLU")
    if config.query_key_norm != NO_NORM:
        parts.append(f"{config.query_key_norm} norm of queries and keys")
    if config.final_norm != NO_NORM:
        parts.append(f"final norm of {'all taps' if config.final_norm == 'taps' else 'the last tap'}")
    if config.tapped:
        parts.append(f"taps after blocks {', '.join(map(str, config.tapped))}")
    return ", ".join(parts)


PRESETS: dict[str, NetworkConfig] = {
    "paper": NetworkConfig(),
    # The four blocks that feed the head see the whole tile, through means of 2 x 2 keys; `make dubai-model FAST=1`.
    "paper-fast": NetworkConfig(attention=attention_of("window16/pooled2", 12, NetworkConfig().taps)),
    "tiny": NetworkConfig(tile=256, patch=8, embed_dim=128, depth=6, heads=2, mlp_dim=512, classes=5, head_channels=64),
}
