"""What a network costs: parameters and multiply-accumulates (MACs), counted on the real modules.

The paper's "119.76 GFLOPs" is the MAC count of convolutions and linear layers alone. The two
attention products (query-key and attention-value) are counted apart, because at 4096 tokens they are
more than half of the work. One MAC is two floating-point operations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdkd_edge.model.network import Attention, Encoder, SegmentationNetwork


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of one tile."""

    parameters: int
    """All parameters, the position embedding included."""
    position_parameters: int
    conv_linear_macs: int
    """What the paper's table counts."""
    attention_macs: int
    """The query-key and attention-value products."""

    @property
    def total_macs(self) -> int:
        """Convolutions, linear layers and attention products together."""
        return self.conv_linear_macs + self.attention_macs


def network_cost(network: SegmentationNetwork | Encoder) -> Cost:
    """Count parameters and the MACs of one tile by running the modules on shapes alone."""
    macs = {"conv_linear": 0, "attention": 0}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs["conv_linear"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs["conv_linear"] += output.numel() * module.in_features
        elif isinstance(module, Attention):
            n, length, dim = inputs[0].shape
            macs["attention"] += 2 * n * length * length * dim

    shapes_only = copy.deepcopy(network).to("meta").eval()
    for module in shapes_only.modules():
        module.register_forward_hook(count)
    tile = network.config.tile
    with torch.inference_mode():
        shapes_only(torch.empty(1, 3, tile, tile, device="meta"))

    encoder = network.encoder if isinstance(network, SegmentationNetwork) else network
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        position_parameters=encoder.pos_embed.numel(),
        conv_linear_macs=macs["conv_linear"],
        attention_macs=macs["attention"],
    )
