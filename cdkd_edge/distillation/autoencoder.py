"""Masked autoencoding (He et al., CVPR 2022): reconstructing the hidden patches from the visible tokens (torch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdkd_edge.core.errors import UsageError
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD, NetworkConfig
from cdkd_edge.model.network import Block

PIXELS = ("normalized", "patch", "raw")
_HEADS = 8
_LEAST_VARIANCE = 1e-6  # of the values of a patch, as in the published code of masked autoencoders


class Reconstruction(nn.Module):
    """Predicts the pixels of hidden patches from an encoder's last tokens.

    Linear layers start as in the published code of masked autoencoders: Xavier, biases at zero.

    Args:
        inputs: width of the encoder's tokens.
        tile, patch: of the encoder, px.
        width: of the decoder's tokens, a multiple of 8. None: that of the encoder.
        depth: blocks of the decoder.
    """

    def __init__(self, inputs: int, tile: int, patch: int, width: int | None = None, depth: int = 4) -> None:
        super().__init__()
        width = width or inputs
        if width % _HEADS:
            raise UsageError(
                f"a decoder of width {width} cannot have {_HEADS} heads", hint="--decoder-width takes a multiple of 8"
            )
        config = NetworkConfig(
            tile=tile, patch=patch, embed_dim=width, heads=_HEADS, mlp_dim=4 * width,
            pool_scales=(1,),
        )  # fmt: skip
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, width))
        self.blocks = nn.Sequential(*(Block(config, index) for index in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, 3 * patch**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Values of all patches, ``[N, L, 3 P P]``, from the tokens ``[N, V, D]`` of the visible ones ``[N, V]``.

        Only those of hidden patches mean anything: only they are trained.
        """
        known = self.embed(tokens)  # [N, V, W]
        all_tokens = self.mask_token.to(known.dtype).expand(len(tokens), self.pos_embed.shape[1], -1)
        all_tokens = all_tokens.scatter(1, visible[..., None].expand_as(known), known) + self.pos_embed
        return self.predict(self.norm(self.blocks(all_tokens)))  # type: ignore[no-any-return]


def patch_values(tiles: Tensor, patch: int, pixels: str = "normalized") -> Tensor:
    """Values of the patches ``[N, L, 3 P P]``, channel by channel, of RGB tiles ``[N, 3, T, T]``, 0..255.

    Args:
        pixels: ``normalized`` by the encoder's mean and standard deviation; ``patch``: each patch by its own, as masked
            autoencoders do; or ``raw``, 0..255.
    """
    values = tiles.float()
    if pixels != "raw":
        mean, std = (values.new_tensor(part).view(1, 3, 1, 1) for part in (PIXEL_MEAN, PIXEL_STD))
        values = (values - mean) / std
    patches = F.unfold(values, patch, stride=patch).transpose(1, 2)  # [N, L, 3 P P]
    if pixels == "patch":
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        patches = (patches - mean) / (variance + _LEAST_VARIANCE).sqrt()
    return patches


def reconstruction_loss(predicted: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the hidden patches; ``[N, L, 3 P P]`` twice and the visible ``[N, V]``."""
    each = (predicted.float() - values).square().mean(dim=-1)  # [N, L]
    hidden = torch.ones_like(each).scatter(1, visible, 0.0)
    return (each * hidden).sum() / hidden.sum()
