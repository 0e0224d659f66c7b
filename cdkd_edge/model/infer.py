"""Finds a network's configuration from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.config import HEAD_DIM, PIXEL_MEAN, PIXEL_STD, SWIGLU, NetworkConfig, evenly_spaced, shown
from cdkd_edge.model.layouts import OURS, Layout


def inferred_config(
    state: dict[str, Tensor], layout: Layout, stated: Mapping[str, Any], notes: list[str]
) -> NetworkConfig:
    """The network's configuration, from the shapes of its weights.

    Args:
        state: weights in this package's names. A position embedding without a row for the class token gets one, one
            with rows for registers loses them to the registers; rotary periods are taken out.
        layout: where they come from; decides what neither a tensor nor ``stated`` shows.
        stated: fields of :class:`NetworkConfig` that no tensor shows, as far as they are known: ``heads``,
            ``layer_norm_eps``, ``pool_scales``, ``attention``, ``rotary_base``, ``final_norm``, ``tapped``,
            ``align_corners``, ``pixel_mean``, ``pixel_std``; with rotary positions, ``tile``.
        notes: assumptions are appended here.

    Raises:
        CheckpointError: the weights do not describe a network, or not one as stated.
    """
    dim, patch = patch_shape(state)
    shown: dict[str, Any] = {"patch": patch, "embed_dim": dim, "depth": block_count(state)}
    shown["class_token"] = "encoder.cls_token" in state
    if "encoder.registers" in state:
        shown["registers"] = need(state, "encoder.registers", 3).shape[1]
    stated = {name: value for name, value in stated.items() if value is not None}
    shown |= _heads(state, dim, stated, notes)
    shown |= _positions(state, layout, patch, shown, stated, notes)
    shown["mlp_dim"] = need(state, "encoder.blocks.0.mlp.fc2.weight", 2).shape[1]
    if need(state, "encoder.blocks.0.mlp.fc1.weight", 2).shape[0] == 2 * shown["mlp_dim"]:
        shown["mlp"] = SWIGLU
    if "encoder.blocks.0.attn.q_norm.weight" in state:
        shown["query_key_norm"] = "layer" if "encoder.blocks.0.attn.q_norm.bias" in state else "rms"
    if "layer_norm_eps" not in stated:
        shown["layer_norm_eps"] = eps = layout.layer_norm_eps
        notes.append(f"LayerNorm eps {eps:g} assumed (as in {layout.name}; not stored in the checkpoint)")
    if layout is not OURS and "pixel_mean" not in stated:
        notes.append(
            f"input normalisation assumed: RGB mean {PIXEL_MEAN}, std {PIXEL_STD} on 0..255, as in SAM, ImageNet "
            "and OpenMMLab (not stored); a preprocessor_config.json beside the file can say otherwise"
        )
    if any(key.startswith("head.") for key in state):
        shown |= _head(state, shown["depth"], stated, notes)
        if shown["classes"] == 1 and layout is not OURS:
            raise CheckpointError(
                "the classifier has one output, for two classes and a threshold; labels need an output per class",
                hint="if the threshold is a probability of 0.5, put a row of zeros before its weight and its bias",
            )
    return NetworkConfig(**{**shown, **stated})


def _head(state: Mapping[str, Tensor], depth: int, stated: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Classes, channels and taps of a head; a CheckpointError if ``stated`` contradicts it, or nothing says a part."""
    classifier = need(state, "head.classifier.weight", 4)
    shown: dict[str, Any] = {"classes": classifier.shape[0], "head_channels": classifier.shape[1]}
    taps, pools = member_count(state, "laterals") + 1, member_count(state, "pooled")
    if not 2 <= taps <= depth:
        raise CheckpointError(f"the head is fed by {taps} blocks, and the encoder has {depth}; 2 or more are possible")
    even = evenly_spaced(depth, taps)
    if "tapped" not in stated:
        shown["tapped"] = even if taps != 4 else ()
        blocks = ", ".join(map(str, even))
        notes.append(f"head fed by the outputs of blocks {blocks} assumed (not stored); --taps names others")
    elif (told := len(stated["tapped"]) or 4) != taps:
        raise CheckpointError(
            f"the head is fed by {taps} blocks, as its tensors show, not by {told}",
            hint=f"name as many, counted from 0: --taps {','.join(map(str, even))}",
        )
    if any(key.startswith("head.neck.") for key in state):
        shown["neck"] = (
            need(state, "head.neck.first.weight", 4).shape[1],
            need(state, "head.neck.first_again.weight", 4).shape[1],
            need(state, "head.neck.second.weight", 4).shape[1],
        )
    if "pool_scales" in stated:
        if (told := len(stated["pool_scales"])) != pools:
            raise CheckpointError(f"the head pools to {pools} sizes, as its tensors show, not to {told}")
    elif pools == len(NetworkConfig.pool_scales):
        scales = ", ".join(map(str, NetworkConfig.pool_scales))
        notes.append(f"pyramid pooling to {scales} cells assumed (not stored); --pool-scales names others")
    else:
        raise CheckpointError(
            f"the head pools to {pools} sizes, and nothing says to which",
            hint=f"name them: --pool-scales {','.join(map(str, range(1, pools + 1)))}, or what they are",
        )
    return shown


def member_count(state: Mapping[str, Tensor], module: str) -> int:
    """The number of members of a list of modules in the head, such as ``laterals``."""
    return len({match[1] for key in state if (match := re.match(rf"head\.{module}\.(\d{{1,4}})\.", key))})


def _heads(state: Mapping[str, Tensor], dim: int, stated: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    """The number of attention heads, if it is not stated: as tensors show it, or of the usual width."""
    width = None
    if "encoder.periods" in state:
        width = 4 * need(state, "encoder.periods", 1).shape[0]
    elif "encoder.blocks.0.attn.q_norm.weight" in state:
        width = need(state, "encoder.blocks.0.attn.q_norm.weight", 1).shape[0]
    if width is not None:
        if not width or dim % width:
            raise CheckpointError(
                f"the tensors show attention heads {width} wide, which do not divide a width of {dim}"
            )
        if stated.get("heads", dim // width) != dim // width:
            raise CheckpointError(
                f"the checkpoint has {dim // width} attention heads, as its tensors show, not {stated['heads']}"
            )
        return {"heads": dim // width}
    if "heads" in stated:
        return {}
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"the number of attention heads is not stored, and {HEAD_DIM}-wide heads do not divide {dim}",
            hint="state it with --heads",
        )
    notes.append(f"{dim // HEAD_DIM} attention heads assumed ({HEAD_DIM} wide; not stored in the checkpoint)")
    return {"heads": dim // HEAD_DIM}


def _positions(
    state: dict[str, Tensor],
    layout: Layout,
    patch: int,
    shown: Mapping[str, Any],
    stated: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The tile of learned positions, or the base of rotary ones."""
    if "encoder.periods" in state:
        base = _rotary_base(state.pop("encoder.periods"), notes)
    elif not layout.rotary_base or "rotary_base" in stated:
        base = stated.get("rotary_base", 0.0)
    else:
        base = layout.rotary_base
        notes.append(f"rotary positions of base {base:g} assumed (as in {layout.name}; not stored in the checkpoint)")
    if not base or "encoder.pos_embed" in state:
        return {"tile": patch * _grid(state, shown)}
    if "tile" not in stated:
        notes.append(f"tiles of {NetworkConfig.tile} px unless others are asked for: rotary positions fit any")
    return {"rotary_base": base}


def _rotary_base(periods: Tensor, notes: list[str]) -> float:
    """The base b of stored periods b^(i/n), i = 0..n-1; a CheckpointError if they are others."""
    count = len(periods)
    powers = torch.arange(count, dtype=torch.float64) / max(1, count)
    logs = periods.double().clamp_min(1e-9).log()
    fitted = float(torch.exp((powers * logs).sum() / powers.square().sum().clamp_min(1e-9)))
    rounded = bool((periods.bfloat16().float() == periods).all())
    for base in (float(f"{fitted:.{digits}g}") for digits in (2, 3, 6)):
        if torch.allclose(logs, powers * math.log(base), rtol=0, atol=2**-8 if rounded else 1e-5):
            if rounded:
                notes.append(
                    f"rotary periods are stored in bfloat16; base {base:g} is taken, as Hugging Face and timm do"
                )
            return base
    raise CheckpointError(
        f"rope_embed.periods are no powers b^(i/{count}) of a base, such as DINOv3 has: they begin with "
        f"{', '.join(f'{period:g}' for period in periods[:4].tolist())}"
    )


def _grid(state: dict[str, Tensor], shown: Mapping[str, Any]) -> int:
    """Side of the position embedding, in patches.

    In ``state`` it gets a row for the class token where there is none, and those of registers become theirs.
    """
    dim, class_token, registers = shown["embed_dim"], shown["class_token"], shown.get("registers", 0)
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
    elif registers and grid**2 + class_token != tokens:
        # timm without it: positions for class token and registers, too.
        first, own, cells = position.tensor_split([int(class_token), class_token + registers], dim=1)
        grid = math.isqrt(cells.shape[1])
        state["encoder.registers"] = state["encoder.registers"] + own
        state["encoder.pos_embed"] = torch.cat([first, cells], dim=1)
        tokens -= registers
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


def require_agreement(path: Path, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to be told otherwise than the file, or the configuration beside it, says itself."""
    texts = {
        "heads": "attention heads",
        "layer_norm_eps": "as LayerNorm's epsilon",
        "tapped": "as the blocks that feed the head",
        "pool_scales": "as the sizes that the head pools to",
    }
    for name, value in given.items():
        if own.get(name, value) != value:
            raise CheckpointError(f"{path} states {shown(own[name])} {texts[name]} itself, not {shown(value)}")
