"""Pictures of what the networks reconstruct from the patches they see (torch)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cdkd_edge.core.files import whole_file
from cdkd_edge.distillation.autoencoder import patch_values
from cdkd_edge.distillation.networks import Distillation, encoder_of
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD

_SIDE = 256  # of a tile in the picture, px, or up to twice as much
_GREY = 127
_GAP = 4


def pictures_path(output: Path) -> Path:
    """Where the picture of a run lies."""
    return output.with_name(f"{output.stem}.tiles.png")


@torch.no_grad()
def write_reconstructions(networks: Distillation, tiles: Tensor, visible: Tensor, path: Path) -> None:
    """Write a picture with a row per tile: the tile, its visible patches, and what student and teacher make of them.

    Args:
        networks: of a method with masks.
        tiles: RGB uint8 ``[N, 3, T, T]``.
        visible: patches that are seen ``[N, V]``.
        path: a PNG.
    """
    columns = [tiles.float(), _hidden(tiles.float(), visible, encoder_of(networks.student).config.patch)]
    for decoder, features in (
        (networks.student_decoder, networks.student_features),
        (networks.teacher_decoder, networks.teacher_features),
    ):
        if decoder is not None:
            seen = features(tiles, visible)
            columns.append(_filled(networks, tiles, visible, decoder(seen[max(seen)], visible)))
    shown = F.avg_pool2d(torch.cat(columns).clamp(0, 255), max(1, tiles.shape[-1] // _SIDE)).round()  # [C N, 3, S, S]
    step = shown.shape[-1] + _GAP
    pictures = F.pad(shown, (0, _GAP, 0, _GAP), value=255).reshape(len(columns), len(tiles), 3, step, step)
    canvas = pictures.permute(1, 3, 0, 4, 2).reshape(len(tiles) * step, len(columns) * step, 3)[:-_GAP, :-_GAP]
    with whole_file(path) as temporary:
        Image.fromarray(canvas.to(torch.uint8).cpu().numpy()).save(temporary, format="png")


def _hidden(tiles: Tensor, visible: Tensor, patch: int) -> Tensor:
    """The tiles with grey patches where nothing is seen."""
    seen = _patches(tiles, patch)
    grey = torch.where(_is_visible(visible, seen.shape[1])[..., None], seen, torch.full_like(seen, _GREY))
    return _picture(grey, tiles.shape[-1], patch)


def _filled(networks: Distillation, tiles: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
    """The visible patches as they are, and the hidden ones as predicted, in 0..255."""
    patch = encoder_of(networks.student).config.patch
    own, pixels = _patches(tiles.float(), patch), networks.recipe.pixels
    values = predicted.float()
    if pixels == "patch":  # the prediction lacks the mean and the contrast of the patch
        normal = patch_values(tiles, patch)
        variance, mean = torch.var_mean(normal, dim=-1, keepdim=True)
        values = values * variance.sqrt() + mean
    if pixels != "raw":
        mean, std = (values.new_tensor(part).repeat_interleave(patch**2) for part in (PIXEL_MEAN, PIXEL_STD))
        values = values * std + mean
    values = torch.where(_is_visible(visible, own.shape[1])[..., None], own, values)
    return _picture(values, tiles.shape[-1], patch)


def _is_visible(visible: Tensor, patches: int) -> Tensor:
    """Whether each patch is seen, ``[N, L]``, from the numbers of those that are ``[N, V]``."""
    return torch.zeros(len(visible), patches, dtype=torch.bool, device=visible.device).scatter(1, visible, True)


def _patches(tiles: Tensor, patch: int) -> Tensor:
    return F.unfold(tiles, patch, stride=patch).transpose(1, 2)


def _picture(patches: Tensor, side: int, patch: int) -> Tensor:
    return F.fold(patches.transpose(1, 2), side, patch, stride=patch)
