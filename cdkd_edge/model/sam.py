"""SAM's image encoder (Kirillov et al., Segment Anything, ICCV 2023), without the neck after its last block.

    image [N,3,T,T] -> normalise -> patches [N,L,D] -> blocks: attention in windows, in a few of them over all tokens

with T the tile side, G = T / patch the token grid, L = G*G, D the width. The blocks add relative positions to the
attention (decomposed by rows and columns: Li et al., MViTv2, CVPR 2022, section 4.1) and are otherwise those of
:mod:`cdkd_edge.model.network`. A block takes any square map: its side is the root of the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.config import MAX_DEPTH, MAX_GRID, PIXEL_MEAN, PIXEL_STD
from cdkd_edge.model.network import MLP, PatchEmbedding


@dataclass(frozen=True)
class SamConfig:
    """Shape of a SAM image encoder; defaults are ``vit_l``.

    Raises:
        CheckpointError: the numbers do not describe an encoder; names the field.
    """

    tile: int = 1024  # side of a square input, px
    patch: int = 16  # side of a patch, px
    embed_dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    window: int = 14  # side of the windows within which most blocks attend, tokens
    global_blocks: tuple[int, ...] = (5, 11, 17, 23)  # blocks in which every token attends to every token, from 0
    layer_norm_eps: float = 1e-6  # segment_anything/build_sam.py
    extra_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name in ("tile", "patch", "embed_dim", "heads", "mlp_dim", "window"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.layer_norm_eps < 1:
            raise CheckpointError(f"layer_norm_eps must be between 0 and 1, not {self.layer_norm_eps:g}")
        if self.tile % self.patch:
            raise CheckpointError(
                f"tile {self.tile} is not divisible by patch {self.patch}",
                hint=f"choose a multiple, such as {(self.grid + 1) * self.patch}",
            )
        if self.grid > MAX_GRID:
            raise CheckpointError(f"tile {self.tile} is larger than {MAX_GRID} patches of {self.patch} px")
        if self.embed_dim % self.heads:
            raise CheckpointError(f"embed_dim {self.embed_dim} is not divisible by heads {self.heads}")
        if not 1 <= self.depth <= MAX_DEPTH:
            raise CheckpointError(f"depth {self.depth} is not 1 to {MAX_DEPTH} blocks")
        if not self.global_blocks or not set(self.global_blocks) <= set(range(self.depth)):
            raise CheckpointError(
                f"global_blocks must be one or more of 0 to {self.depth - 1}, not {self.global_blocks}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def taps(self) -> tuple[int, ...]:
        """0-based blocks whose outputs ``forward`` gives: the global ones."""
        return self.global_blocks


# segment_anything/build_sam.py
SAM_CONFIGS = {
    "vit_b": SamConfig(embed_dim=768, depth=12, heads=12, mlp_dim=3072, global_blocks=(2, 5, 8, 11)),
    "vit_l": SamConfig(),
    "vit_h": SamConfig(embed_dim=1280, depth=32, heads=16, mlp_dim=5120, global_blocks=(7, 15, 23, 31)),
}


def resample_offsets(table: Tensor, side: int) -> Tensor:
    """Relative positions ``[R, C]`` for a map of another side, ``[2*side-1, C]``: linear, as in SAM."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.T[None], size=2 * side - 1, mode="linear", align_corners=False)[0].T


def split_windows(tokens: Tensor, window: int) -> Tensor:
    """Maps ``[N, S, S, D]`` to their windows ``[N*W*W, window, window, D]``; zeros fill the last ones."""
    n, side, _, dim = tokens.shape
    count = math.ceil(side / window)  # W
    missing = count * window - side
    padded = F.pad(tokens, (0, 0, 0, missing, 0, missing))  # at the bottom and on the right
    windows = padded.view(n, count, window, count, window, dim).transpose(2, 3)  # [N, W, W, window, window, D]
    return windows.reshape(-1, window, window, dim)


def join_windows(windows: Tensor, side: int) -> Tensor:
    """The inverse of :func:`split_windows`: ``[N*W*W, window, window, D]`` to ``[N, S, S, D]``."""
    _, window, _, dim = windows.shape
    count = math.ceil(side / window)
    rows = windows.view(-1, count, count, window, window, dim).transpose(2, 3)  # [N, W, window, W, window, D]
    return rows.reshape(-1, count * window, count * window, dim)[:, :side, :side]


class SamAttention(nn.Module):
    """Multi-head self-attention over the tokens of a square, with relative positions.

    The logit of a query q and a key gets q·h + q·w on top, with h the entry of ``rel_pos_h`` for the rows from key to
    query and w that of ``rel_pos_w`` for the columns. This q is not scaled by the root of its width.

    Args:
        dim, heads: see :class:`SamConfig`.
        side: of the squares, tokens. The tables are interpolated for squares of another side.
    """

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, squares: Tensor) -> Tensor:
        """Squares ``[B, S, S, D]`` of tokens that attend to one another; gives the same shape."""
        b, side, _, dim = squares.shape
        qkv = self.qkv(squares).view(b, side * side, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S*S, D/heads]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._positions(q, side))
        return self.proj(mixed.transpose(1, 2).reshape(b, side, side, dim))  # type: ignore[no-any-return]

    def _positions(self, q: Tensor, side: int) -> Tensor:
        """What relative positions add to the logits, ``[B, heads, S*S, S*S]``, of queries ``[B, heads, S*S, C]``."""
        place = torch.arange(side, device=q.device)
        offset = place[:, None] - place + side - 1  # [S, S], of a query and a key
        by_row = resample_offsets(self.rel_pos_h, side)[offset]  # [S, S, C]
        by_column = resample_offsets(self.rel_pos_w, side)[offset]
        q = q.reshape(*q.shape[:2], side, side, -1)
        rows = torch.einsum("bnyxc,ykc->bnyxk", q, by_row)  # [B, heads, S, S, S]
        columns = torch.einsum("bnyxc,xkc->bnyxk", q, by_column)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class SamBlock(nn.Module):
    """Pre-norm transformer block; attends within windows, or over the whole map if it is global."""

    def __init__(self, config: SamConfig, index: int) -> None:
        super().__init__()
        self.window = None if index in config.global_blocks else config.window
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = SamAttention(config.embed_dim, config.heads, self.window or config.grid)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config.embed_dim, config.mlp_dim)

    def attend(self, tokens: Tensor, turn: None = None) -> Tensor:
        """The first half of the block. The zeros that fill windows take part as keys, as in SAM."""
        side = math.isqrt(tokens.shape[1])
        squares = self.norm1(tokens).unflatten(1, (side, side))  # [N, S, S, D]
        if self.window is None:
            mixed = self.attn(squares)
        else:
            mixed = join_windows(self.attn(split_windows(squares, self.window)), side)
        return tokens + mixed.flatten(1, 2)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, turn: None = None) -> Tensor:
        """Tokens ``[N, L, D]`` of square maps, row by row; gives the same shape."""
        tokens = self.attend(tokens)
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class SamEncoder(nn.Module):
    """SAM's image encoder; gives the outputs of its global blocks as maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        self.patch_embed = PatchEmbedding(config.patch, config.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.embed_dim))
        self.blocks = nn.ModuleList(SamBlock(config, index) for index in range(config.depth))

    def embed(self, image: Tensor) -> Tensor:
        """Tokens with their positions, ``[N, L, D]`` row by row, of RGB images ``[N, 3, T, T]``, 0..255."""
        tokens = self.patch_embed((image.to(self.mean.dtype) - self.mean) / self.std)
        return tokens + self.pos_embed  # type: ignore[no-any-return]

    def turn(self, visible: Tensor | None = None) -> None:
        """None: SAM has no rotary positions; see :meth:`.network.Encoder.turn`."""

    def run(self, tokens: Tensor, wanted: Collection[int], turn: None = None) -> list[Tensor]:
        """The tokens ``[N, L, D]`` after each wanted block (0-based), of any square maps, row by row."""
        found = []
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = block(tokens)
            if index in wanted:
                found.append(tokens)
        return found

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps ``[N, D, G, G]`` after the global blocks, of RGB images ``[N, 3, T, T]``, 0..255, any real dtype."""
        shape = (-1, self.config.embed_dim, self.config.grid, self.config.grid)
        return [tokens.transpose(1, 2).reshape(shape) for tokens in self.run(self.embed(image), self.config.taps)]
