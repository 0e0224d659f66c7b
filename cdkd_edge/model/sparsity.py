"""2:4 sparsity: of four successive inputs of a linear layer, each output uses at most two.

NVIDIA's GPUs from Ampere on multiply such matrices at up to twice the rate (Mishra et al., 2021, "Accelerating sparse
deep neural networks"). The layers are proj, fc1 and fc2: a graph has queries, keys and values with LayerNorm folded
into them (:func:`cdkd_edge.graph.fold.fold_attention`), which fills their zeros.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from cdkd_edge.core.errors import CheckpointError

_LAYER = re.compile(r"(^|.*\.)blocks\.\d+\.(attn\.proj|mlp\.fc1|mlp\.fc2)\.weight$")


def sparsifiable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights ``[out, in]`` that may be 2:4 sparse, by name."""
    return {name: weight for name, weight in network.named_parameters() if _LAYER.match(name)}


def sparse_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are."""
    return {name: weight for name, weight in sparsifiable(network).items() if is_sparse(weight)}


def is_sparse(weight: Tensor) -> bool:
    """Whether of every four successive inputs of an output at least two have weight zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(len(weight), -1, 4) == 0).sum(-1).min() >= 2)


@torch.no_grad()
def prune(network: nn.Module) -> int:
    """Set the two smallest of every four weights to zero, in place; returns how many layers that concerns.

    Raises:
        CheckpointError: a layer's inputs cannot be divided by four.
    """
    layers = sparsifiable(network)
    for name, weight in layers.items():
        if weight.shape[1] % 4:
            raise CheckpointError(f"{name} has {weight.shape[1]} inputs, which cannot be divided by four")
        groups = weight.view(len(weight), -1, 4)
        groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0.0)
    return len(layers)
