"""Resamples what a checkpoint has for one grid of patches to another."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_position(
    position: Tensor, grid: int, class_token: bool, *, antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """Resample a position embedding ``[1, (1 +) g*g, D]`` to ``grid`` (bicubic; the class token's row is kept).

    ``antialias`` and ``offset``: see :class:`.layouts.Layout`.
    """
    prefix, cells = position[:, : int(class_token)], position[:, int(class_token) :]
    side = math.isqrt(cells.shape[1])
    maps = cells.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    how: dict[str, Any] = {"scale_factor": (grid + offset) / side} if offset else {"size": (grid, grid)}
    maps = F.interpolate(maps, **how, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


def resample_patches(kernel: Tensor, patch: int) -> Tensor:
    """Resample a patch embedding ``[D, C, p, p]`` to another patch size by FlexiViT's pseudo-inverse resize.

    A patch that is enlarged (bicubic, anti-aliased) then keeps its inner product with the kernel, as far as the new
    size allows (Beyer et al., CVPR 2023, section 3.4).
    """
    side = kernel.shape[-1]
    basis = torch.eye(side * side, dtype=torch.float64).reshape(side * side, 1, side, side)
    enlarged = F.interpolate(basis, size=(patch, patch), mode="bicubic", align_corners=False, antialias=True)
    enlarge = enlarged.flatten(1).T  # [patch*patch, side*side]: a flat patch to its enlarged self
    resample = torch.linalg.pinv(enlarge.T)  # [patch*patch, side*side]
    flat = kernel.double().flatten(2)  # [D, C, side*side]
    resampled: Tensor = (flat @ resample.T).reshape(*kernel.shape[:2], patch, patch)
    return resampled.to(kernel.dtype)
