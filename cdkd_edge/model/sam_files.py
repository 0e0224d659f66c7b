"""Loads SAM's image encoder from the files of SAM, Hugging Face and timm.

The shapes of the tensors say everything. A block's table of relative positions has a row for each offset within the
square that it attends to, and as many columns as a head is wide.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.checkpoint import (
    FileReport,
    filled,
    open_weights,
    require_fit,
)
from cdkd_edge.model.infer import block_count, need, patch_shape
from cdkd_edge.model.layouts import SAM
from cdkd_edge.model.resample import resample_patches, resample_position
from cdkd_edge.model.sam import SamConfig, SamEncoder, resample_offsets


def load_sam(
    path: str | Path,
    *,
    tile: int | None = None,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
) -> tuple[SamEncoder, FileReport]:
    """Load SAM's image encoder in evaluation mode, FP32, on the CPU.

    Args:
        path: a file of ``torch.save`` or safetensors with the whole SAM or its image encoder.
        tile, patch, weights: see :func:`.checkpoint.read_checkpoint`. For another tile or patch the position embedding
            and the relative positions of the global blocks are resampled too.
        heads: None, or the number that the file has.
        layer_norm_eps: LayerNorm's epsilon. Default: SAM's, 1e-6.

    Raises:
        CheckpointError: the file cannot be read safely, or is no plain SAM; names what is unknown, missing or wrong.
    """
    path = Path(path)
    opened = open_weights(path, weights, sam=True)
    own = _inferred_config(opened.state)
    state = {key.removeprefix("encoder."): tensor for key, tensor in opened.state.items()}
    require_fit(SamEncoder, own, state, path, SAM.name)
    if heads not in (None, own.heads):
        raise CheckpointError(
            f"{path} has {own.heads} attention heads, as its relative positions show, not {heads}",
            hint="leave the number of heads out",
        )
    notes = []
    if layer_norm_eps is None:
        notes.append(f"LayerNorm eps {own.layer_norm_eps:g} assumed (as in {SAM.name}; not stored in the checkpoint)")
    else:
        own = dataclasses.replace(own, layer_norm_eps=layer_norm_eps)
    config = _resized(state, own, tile, patch, notes)
    report = FileReport(**opened.facts(False, notes))
    return filled(SamEncoder, config, state, report), report


def _inferred_config(state: dict[str, Tensor]) -> SamConfig:
    """The encoder's configuration; flattens the position embedding ``[1, G, G, D]`` to ``[1, L, D]``."""
    dim, patch = patch_shape(state)
    position = need(state, "encoder.pos_embed", 4)
    grid = position.shape[1]
    if position.shape != (1, grid, grid, dim) or not grid:
        raise CheckpointError(f"a position embedding of {tuple(position.shape)} does not fit a width of {dim}")
    state["encoder.pos_embed"] = position.flatten(1, 2)
    depth = block_count(state)
    tables = [need(state, f"encoder.blocks.{index}.attn.rel_pos_h", 2) for index in range(depth)]
    if not tables:
        raise CheckpointError("the checkpoint holds no transformer blocks")
    head_dim = tables[0].shape[1]
    if not head_dim or dim % head_dim:
        raise CheckpointError(f"relative positions {head_dim} wide do not fit attention heads of a width of {dim}")
    sides = [(len(table) + 1) / 2 for table in tables]
    windows = sorted(set(sides) - {grid})
    if grid not in sides or len(windows) > 1 or not all(side.is_integer() for side in windows):
        raise CheckpointError(
            f"relative positions of {', '.join(str(len(table)) for table in tables)} offsets are not understood: "
            f"with {grid} x {grid} tokens, global blocks have {2 * grid - 1}, and the windows of others are all equal"
        )
    return SamConfig(
        tile=grid * patch, patch=patch, embed_dim=dim, depth=depth, heads=dim // head_dim,
        mlp_dim=need(state, "encoder.blocks.0.mlp.fc1.weight", 2).shape[0],
        window=int(windows[0]) if windows else grid,
        global_blocks=tuple(index for index, side in enumerate(sides) if side == grid),
        layer_norm_eps=SAM.layer_norm_eps,
    )  # fmt: skip


def _resized(
    state: dict[str, Tensor], own: SamConfig, tile: int | None, patch: int | None, notes: list[str]
) -> SamConfig:
    """The configuration for another tile and patch; resamples in ``state`` what depends on them."""
    patch = own.patch if patch is None else patch
    config = dataclasses.replace(own, tile=own.grid * patch if tile is None else tile, patch=patch)
    if patch != own.patch:
        state["patch_embed.proj.weight"] = resample_patches(state["patch_embed.proj.weight"], patch)
        notes.append(f"patch embedding resampled from {own.patch} to {patch} px patches")
    if config.grid != own.grid:
        state["pos_embed"] = resample_position(state["pos_embed"], config.grid, class_token=False)
        for key in (f"blocks.{index}.attn.rel_pos_{axis}" for index in config.global_blocks for axis in "hw"):
            state[key] = resample_offsets(state[key], config.grid)
        notes.append(
            "position embedding (bicubic) and relative positions of the global blocks (linear) resampled from "
            f"{own.grid} x {own.grid} to {config.grid} x {config.grid} patches"
        )
    return config
