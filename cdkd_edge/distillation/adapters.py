"""The multi-scale adapters of the Mask-CDKD paper (MMoA): what a frozen teacher may learn about new imagery (torch).

Beside the MLP of every block stand two adapters, one that looks near and one that looks far, and a gate that weighs the
three for each token. The published code starts with random adapters and weights of a third each, so the teacher has
forgotten what it knew before the first step. Here the last layer of the adapters and the gate's values start at zero,
and the weights are three times as large, so the first step sees the teacher as it is. ``convex`` is the published form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATES = ("identity", "convex")
NEAR, FAR = (1, 3, 5), (7, 9, 11)  # dilations, tokens; on a map of S x S, those from S on see a token alone
_SHRINK = 4  # an adapter works at a quarter of the tokens' width
_SQUEEZE = 16  # and its channel attention at a sixteenth of that


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _depthwise(channels: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False)


class Adapter(nn.Module):
    """Dilated convolutions over a map of tokens, with their mean and channel attention."""

    def __init__(self, dim: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        width = dim // _SHRINK
        self.down = nn.Linear(dim, width)
        self.branches = nn.ModuleList(
            nn.Sequential(_depthwise(width, dilation), nn.GELU(), _pointwise(width, width), nn.GELU())
            for dilation in dilations
        )
        self.overall = nn.Sequential(nn.AdaptiveAvgPool2d(1), _pointwise(width, width), nn.GELU())
        self.join = _pointwise((len(dilations) + 1) * width, width)
        self.squeeze = nn.Linear(width, max(1, width // _SQUEEZE), bias=False)
        self.excite = nn.Linear(max(1, width // _SQUEEZE), width, bias=False)
        self.mix = _depthwise(width)
        self.up = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """What is added to the tokens ``[N, L, D]`` of a square map."""
        side = math.isqrt(tokens.shape[1])
        grid = F.gelu(self.down(tokens)).transpose(1, 2).reshape(len(tokens), -1, side, side)  # [N, W, G, G]
        seen = [branch(grid) for branch in self.branches]
        seen.append(self.overall(grid).expand_as(grid))
        joined = F.gelu(self.join(torch.cat(seen, dim=1)))
        attention = torch.sigmoid(self.excite(F.gelu(self.squeeze(joined.mean((2, 3))))))  # [N, W]
        mixed = F.gelu(self.mix(joined * attention[:, :, None, None]))
        return self.up(mixed.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]  # [N, L, D]


class Gate(nn.Module):
    """Weights of three streams for each token, in FP32.

    Queries, keys and values are three numbers each. The weights are ``softmax(softmax(q k) v)``, which sum to 1, times
    ``factor``.
    """

    def __init__(self, dim: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.query, self.key, self.value = (nn.Linear(dim, 3, bias=False) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        """The weights ``[N, L, 3]`` of tokens ``[N, L, D]``."""
        q, k, v = (layer(tokens).float() for layer in (self.query, self.key, self.value))  # each [N, L, 3]
        attention = (q[..., :, None] * k[..., None, :]).softmax(dim=-1)  # [N, L, 3, 3]
        mixed = (attention * v[..., None, :]).sum(dim=-1)  # not a matrix product, which autocast would round
        weights: Tensor = self.factor * mixed.softmax(dim=-1)
        return weights


class Mixture(nn.Module):
    """Adds up what the MLP of a block gives and what two adapters give, with the weights of a gate.

    Args:
        dim: width of the tokens.
        gate: one of :data:`GATES`. ``identity``: weights that sum to 3, and a start at the MLP alone; ``convex``:
            weights that sum to 1, and a random start, as published.
    """

    def __init__(self, dim: int, gate: str = "identity") -> None:
        super().__init__()
        self.near, self.far = Adapter(dim, NEAR), Adapter(dim, FAR)
        self.gate = Gate(dim, 3.0 if gate == "identity" else 1.0)
        if gate == "identity":
            for layer in (self.near.up, self.far.up):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.gate.value.weight)

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """What is added to the tokens.

        Args:
            tokens: normalised, ``[N, L, D]``, of a square map.
            known: what the frozen MLP gives for them, ``[N, L, D]``.
        """
        mlp, near, far = self.gate(tokens).to(known.dtype).split(1, dim=-1)  # each [N, L, 1]
        return mlp * known + near * self.near(tokens) + far * self.far(tokens)  # type: ignore[no-any-return]
