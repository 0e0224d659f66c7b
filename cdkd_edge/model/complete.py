"""Brings another project's weights into the form that this network has; what they compute stays the same."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.infer import block_count, member_count, need


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


_PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.value")}
"""Layers that this network has in one, and others apart, in the order of their rows."""
_BIASED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Layers that some projects build without a bias."""


def complete_blocks(state: dict[str, Tensor], notes: list[str]) -> None:
    """Bring all blocks into the form that this network has.

    Parts of a layer are stacked (gate and value of SwiGLU, if both are there), biases that no block has become zeros,
    which is the same function, and a masked bias is multiplied by its mask.

    Raises:
        CheckpointError: a block lacks a part that another has, or a layer has some of its parts; names it.
    """
    blocks = range(block_count(state))
    names = {match[1] for key in state if (match := re.fullmatch(r"encoder\.blocks\.\d+\.(.*)", key))}
    apart = {f"{part}.{kind}" for parts in _PARTS.values() for part in parts for kind in ("weight", "bias")}
    optional = apart | {f"{layer}.bias" for layer in _BIASED} | {"attn.qkv.bias_mask"}
    for name in sorted(names & optional):
        for prefix in (f"encoder.blocks.{block}." for block in blocks):
            layer = f"{prefix}{name.rpartition('.')[0]}.weight"
            if prefix + name not in state and (name in apart or layer in state):
                raise CheckpointError(f"the checkpoint lacks {prefix}{name}, which other blocks have")
    for parts in _PARTS.values():
        held = [part for part in parts if f"{part}.weight" in names]
        if held in ([], ["mlp.value"]):  # without a gate, Hugging Face's up_proj is the first layer of a plain MLP
            continue
        if missing := [part for part in parts if part not in held]:
            raise CheckpointError(
                f"the checkpoint lacks {missing[0]}.weight of all blocks, though it has {held[0]}.weight"
            )
    zeros: set[str] = set()
    for block in blocks:
        prefix = f"encoder.blocks.{block}."
        for whole, parts in _PARTS.items():
            _stack(state, prefix, whole, parts, zeros)
        for layer in _BIASED:
            if f"{prefix}{layer}.bias" not in state and f"{prefix}{layer}.weight" in state:
                state[f"{prefix}{layer}.bias"] = torch.zeros(state[f"{prefix}{layer}.weight"].shape[:1])
                zeros.add(layer)
        mask = state.pop(f"{prefix}attn.qkv.bias_mask", None)
        if mask is not None:
            bias = need(state, f"{prefix}attn.qkv.bias", 1)
            if mask.shape != bias.shape:
                raise CheckpointError(
                    f"{prefix}attn.qkv.bias_mask is {tuple(mask.shape)}, its bias {tuple(bias.shape)}"
                )
            bias *= mask
    if zeros:
        notes.append(f"no bias of {', '.join(sorted(zeros))} in any block: zeros supplied")


def _stack(state: dict[str, Tensor], prefix: str, whole: str, parts: tuple[str, ...], zeros: set[str]) -> None:
    """Stack the parts of one layer, if they are apart; those without a bias among others are added to ``zeros``."""
    weights = [key for part in parts if (key := f"{prefix}{part}.weight") in state]
    biases = [key for part in parts if (key := f"{prefix}{part}.bias") in state]
    if not weights and not biases:
        return
    if weights:
        shapes = {tuple(need(state, key, 2).shape) for key in weights}
        if len(shapes) > 1:
            raise CheckpointError(f"{', '.join(weights)} are parts of one layer, but of the shapes {sorted(shapes)}")
        held = tuple(part for part in parts if f"{prefix}{part}.weight" in weights)
        rows = shapes.pop()[0]
        state[f"{prefix}{whole}.weight"] = torch.cat([state.pop(key) for key in weights])
    else:  # timm's Eva: one weight, but biases apart
        held, rows = parts, len(need(state, f"{prefix}{whole}.weight", 2)) // len(parts)
    if biases:
        for key in biases:
            if len(need(state, key, 1)) != rows:
                raise CheckpointError(f"{key} has {len(state[key])} values; its layer has {rows} rows")
        zeros |= {part for part in held if f"{prefix}{part}.bias" not in state}
        state[f"{prefix}{whole}.bias"] = torch.cat(
            [state.pop(f"{prefix}{part}.bias", torch.zeros(rows)) for part in held]
        )


def drop_part(state: dict[str, Tensor], start: str) -> list[str]:
    """Take the tensors out whose names start so; gives their names."""
    names = [key for key in state if key.startswith(start)]
    for name in names:
        del state[name]
    return names


def complete_head(state: dict[str, Tensor], stated: dict[str, Any], eps: float, notes: list[str]) -> None:
    """Bring a head's weights into the form that this network has; what they compute stays the same.

    Args:
        state: weights in this package's names.
        stated: known fields of :class:`NetworkConfig`; norms of the maps make the encoder's final norm of them.
        eps: the epsilon of the encoder's LayerNorms.
        notes: changes are appended here.
    """
    for kind in ("laterals", "smooth"):
        count = member_count(state, f"deep_{kind}")
        for key in [key for key in state if key.startswith(f"head.deep_{kind}.")]:
            _, _, index, rest = key.split(".", 3)
            state[f"head.{kind}.{count - 1 - int(index)}.{rest}"] = state.pop(key)
    for key in [key for key in state if re.fullmatch(r"head\..*\.conv\.bias", key)]:
        bias, norm = state.pop(key), key.replace(".conv.bias", ".bn.")
        if f"{norm}running_mean" in state:
            state[f"{norm}running_mean"] = state[f"{norm}running_mean"] - bias
        else:  # no norm: one that adds the bias alone; PyTorch adds 1e-5 to the variance
            ones = torch.ones_like(bias)
            state |= {f"{norm}weight": ones, f"{norm}bias": bias, f"{norm}running_mean": torch.zeros_like(bias)}
            state[f"{norm}running_var"] = ones - 1e-5
    if member_count(state, "norms"):
        _fold_norms(state, stated, eps)
        notes.append("LayerNorms of the head's maps folded into the encoder's final norm and the laterals")


def _fold_norms(state: dict[str, Tensor], stated: dict[str, Any], eps: float) -> None:
    """Make the LayerNorms of the maps (segmentation-models-pytorch) one final norm.

    Its scale and shift are those of the deepest map; a lateral, which is linear in its map, takes up the difference:
    W (g n + b) = (W g/g') (g' n + b') + W b - (W g/g') b'.
    """
    if stated.get("final_norm", "none") != "none" or eps != 1e-6:
        raise CheckpointError(
            f"the head's LayerNorms have an epsilon of 1e-06 and the encoder's {eps:g}"
            if eps != 1e-6
            else "the maps pass the encoder's final norm and then the head's; this network has one of them",
            hint="train a UPerNet on the encoder: cdkd-edge finetune",
        )
    count = member_count(state, "norms")
    norms = [(state.pop(f"head.norms.{i}.weight"), state.pop(f"head.norms.{i}.bias")) for i in range(count)]
    last_scale, last_shift = norms[-1]
    if float(last_scale.abs().min()) < 1e-4:
        raise CheckpointError("a LayerNorm of the head scales a channel by almost zero, and cannot be folded")
    state |= {"encoder.norm.weight": last_scale, "encoder.norm.bias": last_shift}
    stated["final_norm"] = "taps"
    for index, (scale, shift) in enumerate(norms[:-1]):
        unit = f"head.laterals.{index}"
        weight = need(state, f"{unit}.conv.weight", 4)
        folded = weight * (scale / last_scale).reshape(1, -1, 1, 1)
        moved = (folded[:, :, 0, 0] @ last_shift) - (weight[:, :, 0, 0] @ shift)
        state[f"{unit}.conv.weight"] = folded
        state[f"{unit}.bn.running_mean"] = need(state, f"{unit}.bn.running_mean", 1) + moved
