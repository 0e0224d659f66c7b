"""The network of the Mask-CDKD paper (ISPRS 2026): a plain ViT encoder and a UPerNet head.

    image [N,3,T,T] -> normalise -> patches [N,L,D] -> 12 blocks, four of them tapped
          -> UPerNet -> logits [N,K,G,G] -> bilinear x patch -> argmax -> labels [N,T,T]

with T the tile side, G = T / patch the token grid, L = G*G, D the width, C the head's channels, K the classes.
The ViT has pre-norm blocks (Dosovitskiy et al., ICLR 2021); UPerNet (Xiao et al., ECCV 2018) is arranged as in
OpenMMLab's ``UPerHead``. All four feature maps have stride ``patch``, so UPerNet's top-down path needs no resizing.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdkd_edge.model.config import GELU, NO_NORM, SWIGLU, NetworkConfig


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Queries or keys ``[..., L, d]``, each pair of channels (i, i + d/2) turned by its angle.

    ``turn`` has the cosines and sines of the angles, each ``[..., L, d/2]`` along its first axis.
    """
    cosine, sine = turn.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention: over all tokens, within windows, or over the means of squares of tokens.

    In the order of :meth:`NetworkConfig.token_order`, attention in W windows is global attention of W times as many
    heads, and the means of squares of ``pool`` tokens are the means of ``pool`` successive parts of the tokens.
    """

    def __init__(self, config: NetworkConfig, index: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.heads, self.windows, self.pool = config.heads, config.windows(index), config.pooling(index) ** 2
        self.qkv = nn.Linear(dim, 3 * dim)
        norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(config.query_key_norm, nn.Identity)
        self.q_norm, self.k_norm = (norm(dim // config.heads, eps=config.layer_norm_eps) for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, turn: Tensor | None = None) -> Tensor:
        n, length, dim = tokens.shape
        if self.pool == 1:
            q, k, v = self.qkv(tokens).chunk(3, dim=-1)  # each [N, L, D]
        else:
            means = tokens.reshape(n, self.pool, -1, dim).mean(dim=1)  # [N, L/pool, D]
            q = F.linear(tokens, self.qkv.weight[:dim], self.qkv.bias[:dim])  # [N, L, D]
            k, v = F.linear(means, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)  # each [N, L/pool, D]
        q, k, v = self.q_norm(self._by_head(q)), self.k_norm(self._by_head(k)), self._by_head(v)
        if turn is not None:
            by_window = turn.reshape(*turn.shape[:-2], -1, self.windows, turn.shape[-1])  # [2, ..., L/W, W, d/2]
            by_head = by_window.movedim(-2, -3).repeat_interleave(self.heads, dim=-3)  # [2, ..., W*heads, L/W, d/2]
            q, k = rotated(q, by_head), rotated(k, by_head)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [N, W*heads, L/W, D/heads]
        mixed = mixed.transpose(1, 2).reshape(n, length, dim)  # [N, L, D]
        return self.proj(mixed)  # type: ignore[no-any-return]

    def _by_head(self, x: Tensor) -> Tensor:
        """``[N, L, D]`` to ``[N, W*heads, L/W, D/heads]``."""
        n, length, dim = x.shape
        return x.reshape(n, length // self.windows, -1, dim // self.heads).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around an exact (erf) GELU, or SwiGLU (Shazeer, 2020): silu of one half times the other."""

    def __init__(self, dim: int, hidden: int, kind: str = GELU) -> None:
        super().__init__()
        self.gated = kind == SWIGLU
        self.fc1 = nn.Linear(dim, (1 + self.gated) * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * value)  # type: ignore[no-any-return]
        return self.fc2(F.gelu(hidden))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: NetworkConfig, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = Attention(config, index)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, config.mlp)

    def attend(self, tokens: Tensor, turn: Tensor | None = None) -> Tensor:
        """The first half of the block; ``turn`` as in :meth:`Encoder.turn`."""
        return tokens + self.attn(self.norm1(tokens), turn)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, turn: Tensor | None = None) -> Tensor:
        tokens = self.attend(tokens, turn)
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """Non-overlapping patches to tokens, row by row."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.proj(image)  # [N, D, G, G]
        return patches.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # [N, L, D]


class Encoder(nn.Module):
    """ViT encoder; gives the outputs of the tapped blocks as maps.

    Tokens are class token and registers, if there are any (E of them), then the patches row by row.
    """

    mean: Tensor
    std: Tensor
    order: Tensor
    place: Tensor
    turns: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if config.attention:
            order = torch.from_numpy(config.token_order())
            self.register_buffer("order", order, persistent=False)  # [L], the cell of each token
            self.register_buffer("place", order.argsort(), persistent=False)  # [L], the token of each cell
        self.register_buffer("mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)
        self.patch_embed = PatchEmbedding(config.patch, dim)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.registers:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, dim))
        if config.rotary_base:
            self.register_buffer("turns", torch.from_numpy(config.rotary_turns()).float(), persistent=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.class_token + config.grid**2, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        if config.final_norm != NO_NORM:
            self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def embed(self, image: Tensor) -> Tensor:
        """Tokens with their learned positions, ``[N, E+L, D]``, of RGB images ``[N, 3, T, T]``, 0..255."""
        tokens: Tensor = self.patch_embed((image.to(self.mean.dtype) - self.mean) / self.std)  # [N, L, D]
        if self.config.class_token:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # [N, 1+L, D]
        if not self.config.rotary_base:
            tokens = tokens + self.pos_embed
        if self.config.registers:
            first, rest = tokens.tensor_split([int(self.config.class_token)], dim=1)
            tokens = torch.cat([first, self.registers.expand(len(tokens), -1, -1), rest], dim=1)  # [N, E+L, D]
        return tokens

    def turn(self, visible: Tensor | None = None) -> Tensor | None:
        """Cosines and sines of the rotary positions for the blocks, ``[2, E+L, d/2]``; None if they are learned.

        With ``visible``, the patches ``[N, V]`` that are kept of each tile, ``[2, N, E+V, d/2]``.
        """
        if not self.config.rotary_base:
            return None
        if visible is None:
            return self.turns[:, self.order] if self.config.attention else self.turns
        extra = torch.arange(self.config.extra_tokens, device=visible.device).expand(len(visible), -1)
        return self.turns[:, torch.cat([extra, visible + self.config.extra_tokens], dim=1)]

    def run(self, tokens: Tensor, wanted: Collection[int], turn: Tensor | None = None) -> list[Tensor]:
        """The tokens ``[N, E+L, D]`` after each wanted block (0-based), in the order in which :meth:`embed` gives them.

        Where all attention is global, they may be any part of the tokens of a tile, with the ``turn`` of that part.
        """
        if self.config.attention:
            tokens = tokens[:, self.order]
        found = []
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = block(tokens, turn)
            if index in wanted:
                found.append(tokens[:, self.place] if self.config.attention else tokens)
        return found

    def forward(self, image: Tensor) -> list[Tensor]:
        """A map ``[N, D, G, G]`` per tap, the shallowest first, of RGB images ``[N, 3, T, T]``, 0..255."""
        config, shape = self.config, (-1, self.config.embed_dim, self.config.grid, self.config.grid)
        tapped = self.run(self.embed(image), config.taps, self.turn())
        patches = [
            (self.norm(tokens) if block in config.normed_taps else tokens)[:, config.extra_tokens :]
            for block, tokens in zip(config.taps, tapped, strict=True)
        ]
        return [tokens.transpose(1, 2).reshape(shape) for tokens in patches]


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; the spatial size is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Neck(nn.Module):
    """Four maps of one side as maps of 4, 2, 1 and 1/2 times that side, as in BEiT (Bao et al., ICLR 2022)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim, (inner, first, second) = config.embed_dim, config.neck
        self.first = nn.ConvTranspose2d(dim, inner, 2, stride=2)
        self.bn = nn.BatchNorm2d(inner)
        self.first_again = nn.ConvTranspose2d(inner, first, 2, stride=2)
        self.second = nn.ConvTranspose2d(dim, second, 2, stride=2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps  # each [N, D, G, G]
        four_times = self.first_again(F.gelu(self.bn(self.first(first))))  # [N, C1, 4G, 4G]
        return [four_times, self.second(second), third, F.max_pool2d(fourth, 2)]


class UPerHead(nn.Module):
    """UPerNet: pyramid pooling of the deepest map, added to the shallower ones; all are fused and classified."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels, (*shallow_dims, dim) = config.head_channels, config.map_channels
        self.pool_scales, self.align = config.pool_scales, config.pools_align
        self.neck = Neck(config) if config.neck else nn.Identity()
        self.pooled = nn.ModuleList(ConvNormReLU(dim, channels, 1) for _ in config.pool_scales)
        self.bottleneck = ConvNormReLU(dim + len(config.pool_scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(one, channels, 1) for one in shallow_dims)
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in shallow_dims)
        self.fuse = ConvNormReLU(len(config.taps) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, config.classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        *shallow, deep = self.neck(maps)  # each [N, D, G, G], without a neck
        pyramid = [deep]
        for scale, unit in zip(self.pool_scales, self.pooled, strict=True):
            cells = unit(F.adaptive_avg_pool2d(deep, scale))  # [N, C, s, s]
            pyramid.append(self._as_large(cells, deep))  # [N, C, G, G]
        top = self.bottleneck(torch.cat(pyramid, dim=1))  # [N, D+4C, G, G] -> [N, C, G, G]

        levels = [lateral(x) for lateral, x in zip(self.laterals, shallow, strict=True)]  # each [N, C, G, G]
        above = top
        for index in reversed(range(len(levels))):
            above = levels[index] = levels[index] + self._as_large(above, levels[index])
        smoothed = [unit(x) for unit, x in zip(self.smooth, levels, strict=True)]  # each [N, C, G, G]
        joined = torch.cat([self._as_large(x, smoothed[0]) for x in (*smoothed, top)], dim=1)  # [N, taps C, G, G]
        return self.classifier(self.fuse(joined))  # type: ignore[no-any-return]  # [N, K, G, G]

    def _as_large(self, x: Tensor, other: Tensor) -> Tensor:
        """``x`` up-sampled to the size of another map."""
        if x.shape[-2:] == other.shape[-2:]:
            return x
        return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=self.align)


class SegmentationNetwork(nn.Module):
    """Encoder and head: RGB tiles to class logits at stride :attr:`NetworkConfig.logit_stride`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = UPerHead(config)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, K, G, G]`` (with a neck, ``[N, K, 4G, 4G]``) of RGB images ``[N, 3, T, T]``, 0..255."""
        return self.head(self.encoder(image))  # type: ignore[no-any-return]

    def upsample(self, logits: Tensor) -> Tensor:
        """Logits at pixel resolution, ``[N, K, T, T]``, bilinear."""
        scale, align = self.config.logit_stride, self.config.logits_align
        return F.interpolate(logits, scale_factor=scale, mode="bilinear", align_corners=align)

    @torch.inference_mode()
    def segment(self, image: Tensor) -> Tensor:
        """Labels uint8 ``[N, T, T]`` of RGB tiles ``[N, 3, T, T]``."""
        return self.upsample(self(image)).argmax(dim=1).to(torch.uint8)
