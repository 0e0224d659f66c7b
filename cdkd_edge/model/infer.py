"""The network's shape, from what a checkpoint states or from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.config import HEAD_DIM, PIXEL_MEAN, PIXEL_STD, NetworkConfig
from cdkd_edge.model.container import FORMAT_VERSION
from cdkd_edge.model.layouts import OURS, Layout


def stored_config(header: Mapping[str, Any], state: dict[str, Tensor], path: Path) -> NetworkConfig:
    """The configuration that a checkpoint of this package states, held against its weights.

    Raises:
        CheckpointError: another version, or a configuration that is damaged or contradicts the weights.
    """
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a version {header.get('version')} checkpoint; this release reads {FORMAT_VERSION}"
        )
    try:
        values = dict(header["config"])
        stored = NetworkConfig(**{**values, "pool_scales": tuple(values["pool_scales"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged configuration: {str(error)[:200]}") from None
    if any(type(number) is not int for number in (stored.heads, *stored.pool_scales)):
        raise CheckpointError(f"{path} has a damaged configuration: heads and pool_scales are whole numbers")
    # Before anything of that size is allocated.
    sizes = ("tile", "patch", "embed_dim", "depth", "mlp_dim", "classes", "head_channels", "class_token")
    found = inferred_config(state, OURS, stored.heads, stored.layer_norm_eps, [], stored.pool_scales)
    for size in sizes:
        said, is_ = getattr(stored, size), getattr(found, size)
        if said != is_ or type(said) is not type(is_):
            raise CheckpointError(f"{path} has a damaged configuration: {size} is {said!r}, its weights say {is_!r}")
    return stored


def inferred_config(
    state: dict[str, Tensor],
    layout: Layout,
    heads: int | None,
    layer_norm_eps: float | None,
    notes: list[str],
    pool_scales: tuple[int, ...] = NetworkConfig.pool_scales,
) -> NetworkConfig:
    """The configuration that fits the weights.

    Args:
        state: weights in this package's names; a position embedding without the class token's row gets one.
        layout: where they come from; it decides what no tensor shows.
        heads, layer_norm_eps: None to assume them.
        notes: assumptions are appended here.
        pool_scales: of the pyramid pooling; no tensor shows them.

    Raises:
        CheckpointError: the weights do not describe a network.
    """
    patches = _need(state, "encoder.patch_embed.proj.weight", 4)
    position = _need(state, "encoder.pos_embed", 3)
    hidden = _need(state, "encoder.blocks.0.mlp.fc1.weight", 2)
    dim, channels, patch, patch_width = patches.shape
    if channels != 3 or patch != patch_width:
        raise CheckpointError(f"the patch embedding is {tuple(patches.shape)}; RGB and square patches are needed")
    class_token = "encoder.cls_token" in state
    tokens = position.shape[1]
    if tokens <= class_token or (position.shape[0], position.shape[2]) != (1, dim):
        raise CheckpointError(f"a position embedding of shape {tuple(position.shape)} does not fit a width of {dim}")
    grid = math.isqrt(tokens - class_token)
    if class_token and grid**2 + 1 != tokens and math.isqrt(tokens) ** 2 == tokens:
        # timm's "no_embed_class": positions for the patches alone.
        grid = math.isqrt(tokens)
        state["encoder.pos_embed"] = torch.cat([torch.zeros(1, 1, dim), position], dim=1)
        tokens += 1
    if grid**2 + class_token != tokens:
        raise CheckpointError(f"a position embedding of {tokens} tokens is not a square grid")
    if heads is None:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"the number of attention heads is not stored, and {HEAD_DIM}-wide heads do not divide {dim}",
                hint="state it with --heads",
            )
        heads = dim // HEAD_DIM
        notes.append(f"{heads} attention heads assumed ({HEAD_DIM} wide; not stored in the checkpoint)")
    if layer_norm_eps is None:
        layer_norm_eps = layout.layer_norm_eps
        notes.append(f"LayerNorm eps {layer_norm_eps:g} assumed (as in {layout.name}; not stored in the checkpoint)")
    if layout is not OURS:
        notes.append(
            f"input normalisation assumed: RGB mean {PIXEL_MEAN}, std {PIXEL_STD} on 0..255, as SAM, ImageNet "
            "and OpenMMLab have it (not stored)"
        )
    blocks = {int(match[1]) for key in state if (match := re.match(r"encoder\.blocks\.(\d{1,4})\.", key))}
    if gaps := sorted(set(range(max(blocks) + 1)) - blocks)[:8]:
        raise CheckpointError(f"the checkpoint lacks transformer blocks {gaps} of {max(blocks) + 1}")
    shapes: dict[str, Any] = {}
    if any(key.startswith("head.") for key in state):
        classifier = _need(state, "head.classifier.weight", 4)
        shapes = {"classes": classifier.shape[0], "head_channels": classifier.shape[1]}
        if layout is not OURS:
            notes.append(f"pyramid pooling to {', '.join(map(str, pool_scales))} cells assumed (not stored)")
    return NetworkConfig(
        tile=grid * patch,
        patch=patch,
        embed_dim=dim,
        depth=len(blocks),
        heads=heads,
        mlp_dim=hidden.shape[0],
        pool_scales=pool_scales,
        layer_norm_eps=layer_norm_eps,
        class_token=class_token,
        **shapes,
    )


def _need(state: Mapping[str, Tensor], key: str, rank: int) -> Tensor:
    if key not in state:
        raise CheckpointError(f"the checkpoint lacks {key}, so the network's shape cannot be known")
    if state[key].ndim != rank:
        raise CheckpointError(f"{key} has shape {tuple(state[key].shape)}; {rank} dimensions are expected")
    return state[key]


def fold_layer_scale(state: dict[str, Tensor], notes: list[str]) -> None:
    """gamma * (W x + b) = (gamma W) x + (gamma b): LayerScale costs nothing at inference."""
    scales = [key for key in state if re.search(r"\.scale[12]$", key)]
    for key in scales:
        target = key.replace(".scale1", ".attn.proj").replace(".scale2", ".mlp.fc2")
        gamma = state.pop(key)
        for part in ("weight", "bias"):
            if f"{target}.{part}" not in state:
                raise CheckpointError(f"LayerScale without the layer it scales: {target}.{part} is missing")
            scaled = state[f"{target}.{part}"]
            if gamma.shape != scaled.shape[:1]:
                raise CheckpointError(f"LayerScale of {tuple(gamma.shape)} does not fit {target}.{part}")
            scaled *= gamma.reshape(-1, *[1] * (scaled.ndim - 1))
    if scales:
        notes.append(f"LayerScale folded into {len(scales)} linear layers")


def add_missing_qkv_bias(state: dict[str, Tensor], notes: list[str]) -> None:
    """Encoders built with ``qkv_bias=False`` have none; a bias of zero is the same function."""
    weights = [key for key in state if key.endswith(".attn.qkv.weight")]
    if weights and not any(key.endswith(".attn.qkv.bias") for key in state):
        for key in weights:
            state[key.replace(".weight", ".bias")] = torch.zeros(state[key].shape[:1])
        notes.append("attention without qkv bias: zeros supplied")


def resample_position(position: Tensor, grid: int, class_token: bool) -> Tensor:
    """Resample a learned position embedding to another token grid (bicubic, the class token kept).

    Args:
        position: ``[1, (1 +) g*g, D]``.
        grid: the new side; the result is ``[1, (1 +) grid*grid, D]``.
    """
    prefix, cells = position[:, : int(class_token)], position[:, int(class_token) :]
    side = math.isqrt(cells.shape[1])
    maps = cells.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


def resample_patches(kernel: Tensor, patch: int) -> Tensor:
    """Resample a patch embedding to another patch size.

    A patch that is enlarged (bicubic, anti-aliased) keeps its inner product with the kernel, as far as the new
    size allows: the pseudo-inverse resize of FlexiViT (Beyer et al., CVPR 2023, section 3.4).

    Args:
        kernel: ``[D, C, p, p]``.
        patch: the new side; the result is ``[D, C, patch, patch]``.
    """
    side = kernel.shape[-1]
    basis = torch.eye(side * side, dtype=torch.float64).reshape(side * side, 1, side, side)
    enlarged = F.interpolate(basis, size=(patch, patch), mode="bicubic", align_corners=False, antialias=True)
    enlarge = enlarged.flatten(1).T  # [patch*patch, side*side]: a flat patch to its enlarged self
    resample = torch.linalg.pinv(enlarge.T)  # [patch*patch, side*side]
    flat = kernel.double().flatten(2)  # [D, C, side*side]
    resampled: Tensor = (flat @ resample.T).reshape(*kernel.shape[:2], patch, patch)
    return resampled.to(kernel.dtype)
