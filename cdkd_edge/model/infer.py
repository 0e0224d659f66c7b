"""Finds a network's configuration from its weights, and brings them into the form that the network has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.config import HEAD_DIM, PIXEL_MEAN, PIXEL_STD, SWIGLU, NetworkConfig
from cdkd_edge.model.layouts import OURS, Layout


def inferred_config(
    state: dict[str, Tensor], layout: Layout, stated: Mapping[str, Any], notes: list[str]
) -> NetworkConfig:
    """The network's configuration, from the shapes of its weights.

    Args:
        state: weights in this package's names; a position embedding without a row for the class token gets one.
        layout: where they come from; decides what neither a tensor nor ``stated`` shows.
        stated: fields of :class:`NetworkConfig` that no tensor shows, as far as they are known: ``heads``,
            ``layer_norm_eps``, ``pool_scales``, ``attention``, ``rotary_base``, ``final_norm``, ``tapped``,
            ``pixel_mean``, ``pixel_std``.
        notes: assumptions are appended here.

    Raises:
        CheckpointError: the weights do not describe a network.
    """
    dim, patch = patch_shape(state)
    shown: dict[str, Any] = {"patch": patch, "embed_dim": dim, "depth": block_count(state)}
    shown["class_token"] = "encoder.cls_token" in state
    if "encoder.registers" in state:
        shown["registers"] = need(state, "encoder.registers", 3).shape[1]
    if "encoder.pos_embed" in state or not stated.get("rotary_base"):
        shown["tile"] = patch * _grid(state, dim, shown["class_token"])
    shown["mlp_dim"] = need(state, "encoder.blocks.0.mlp.fc2.weight", 2).shape[1]
    if need(state, "encoder.blocks.0.mlp.fc1.weight", 2).shape[0] == 2 * shown["mlp_dim"]:
        shown["mlp"] = SWIGLU
    if "encoder.blocks.0.attn.q_norm.weight" in state:
        shown["query_key_norm"] = "layer" if "encoder.blocks.0.attn.q_norm.bias" in state else "rms"
    stated = {name: value for name, value in stated.items() if value is not None}
    if "heads" not in stated:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"the number of attention heads is not stored, and {HEAD_DIM}-wide heads do not divide {dim}",
                hint="state it with --heads",
            )
        shown["heads"] = dim // HEAD_DIM
        notes.append(f"{shown['heads']} attention heads assumed ({HEAD_DIM} wide; not stored in the checkpoint)")
    if "layer_norm_eps" not in stated:
        shown["layer_norm_eps"] = eps = layout.layer_norm_eps
        notes.append(f"LayerNorm eps {eps:g} assumed (as in {layout.name}; not stored in the checkpoint)")
    if layout is not OURS and "pixel_mean" not in stated:
        notes.append(
            f"input normalisation assumed: RGB mean {PIXEL_MEAN}, std {PIXEL_STD} on 0..255, as in SAM, ImageNet "
            "and OpenMMLab (not stored)"
        )
    if any(key.startswith("head.") for key in state):
        classifier = need(state, "head.classifier.weight", 4)
        shown |= {"classes": classifier.shape[0], "head_channels": classifier.shape[1]}
        if "pool_scales" not in stated:
            scales = ", ".join(map(str, NetworkConfig.pool_scales))
            notes.append(f"pyramid pooling to {scales} cells assumed (not stored)")
    return NetworkConfig(**{**shown, **stated})


def _grid(state: dict[str, Tensor], dim: int, class_token: bool) -> int:
    """Side of the position embedding, in patches; adds a row for the class token where there is none."""
    position = need(state, "encoder.pos_embed", 3)
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
    return grid


def patch_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width of the tokens, and side of the patches in px, by the patch embedding."""
    kernel = need(state, "encoder.patch_embed.proj.weight", 4)
    dim, channels, patch, patch_width = kernel.shape
    if channels != 3 or patch != patch_width:
        raise CheckpointError(f"the patch embedding is {tuple(kernel.shape)}; RGB and square patches are needed")
    return dim, patch


def block_count(state: Mapping[str, Tensor]) -> int:
    """The number of transformer blocks; a CheckpointError names those that are missing between others."""
    blocks = {int(match[1]) for key in state if (match := re.match(r"encoder\.blocks\.(\d{1,4})\.", key))}
    count = max(blocks, default=-1) + 1
    if gaps := sorted(set(range(count)) - blocks)[:8]:
        raise CheckpointError(f"the checkpoint lacks transformer blocks {gaps} of {count}")
    return count


def need(state: Mapping[str, Tensor], key: str, rank: int) -> Tensor:
    """A tensor that has to be there, with so many dimensions; CheckpointError."""
    if key not in state:
        raise CheckpointError(f"the checkpoint lacks {key}, so the network's shape cannot be known")
    if state[key].ndim != rank:
        raise CheckpointError(f"{key} has shape {tuple(state[key].shape)}; {rank} dimensions are expected")
    return state[key]


def fold_layer_scale(state: dict[str, Tensor], notes: list[str]) -> None:
    """Fold LayerScale into the layer before it: gamma * (W x + b) = (gamma W) x + (gamma b)."""
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
    """Give encoders that were built with ``qkv_bias=False`` a bias of zero, which is the same function."""
    weights = [key for key in state if key.endswith(".attn.qkv.weight")]
    if weights and not any(key.endswith(".attn.qkv.bias") for key in state):
        for key in weights:
            state[key.replace(".weight", ".bias")] = torch.zeros(state[key].shape[:1])
        notes.append("attention without qkv bias: zeros supplied")
