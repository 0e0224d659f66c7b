"""Caches the features of a frozen encoder on disk, so that it encodes each tile once, not in every epoch (torch).

Features are found by the SHA-256 of the encoder's weights and of the tile's pixels. So they are never out of date, and
training, validation and later runs with other settings share them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import Encoder

_TAPS = 4


class FeatureCache:
    """A frozen encoder with a cache, called like one: uint8 tiles ``[N, 3, T, T]`` to four maps ``[N, D, G, G]``.

    Maps are stored as float16 (rounded to 11 bits). Maps that were just computed are rounded too, so that all epochs
    see the same numbers. Maps with values beyond the range of float16 are not stored, and not rounded.

    Args:
        encoder, precision: what computes, on any device, and in which precision.
        folder: of the stored features; None: nothing is stored.
        limit: bytes that this run may add; beyond it, features are computed each time.
    """

    def __init__(self, encoder: Encoder, folder: Path | None, *, precision: str = "fp32", limit: int = 0) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.device = next(encoder.parameters()).device
        self._precision, self._left = precision, limit
        self.hits = self.misses = 0
        self.folder = None
        if folder is not None:
            digest = hashlib.sha256(f"{encoder.config} {precision}".encode())
            for name, tensor in sorted(encoder.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            self.folder = folder / digest.hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
        config = encoder.config
        self._shape = (_TAPS, config.embed_dim, config.grid, config.grid)

    @property
    def bytes_per_tile(self) -> int:
        """Bytes of one tile on disk."""
        return 2 * int(np.prod(self._shape))

    @torch.no_grad()
    def __call__(self, tiles: Tensor) -> list[Tensor]:
        """Features of tiles, float32 on the encoder's device."""
        if self.folder is None:
            self.misses += len(tiles)
            return [maps.float() for maps in self._compute(tiles)]
        paths = [self._path(tile) for tile in tiles.cpu()]
        found = [self._load(path) for path in paths]
        missing = [index for index, features in enumerate(found) if features is None]
        self.hits, self.misses = self.hits + len(tiles) - len(missing), self.misses + len(missing)
        if missing:
            computed = torch.stack(self._compute(tiles[missing]), dim=1).cpu()  # [M, taps, D, G, G]
            for index, features in zip(missing, computed, strict=True):
                found[index] = features
                if torch.isfinite(rounded := features.half()).all():
                    self._store(paths[index], rounded)
                    found[index] = rounded
        stacked = torch.stack([features.float() for features in found if features is not None])
        return list(stacked.to(self.device).unbind(dim=1))

    def _compute(self, tiles: Tensor) -> list[Tensor]:
        with autocast(self.device, self._precision):
            maps: list[Tensor] = self.encoder(tiles.to(self.device))
        return maps

    def _path(self, tile: Tensor) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(tile.contiguous().numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.f16"

    def _load(self, path: Path) -> Tensor | None:
        try:
            values = np.fromfile(path, np.float16)
        except FileNotFoundError:
            return None
        # A file cut short by a full disk or a power failure is computed again.
        return torch.from_numpy(values.reshape(self._shape)) if values.size == np.prod(self._shape) else None

    def _store(self, path: Path, features: Tensor) -> None:
        if self._left < self.bytes_per_tile:
            return
        temporary = path.with_name(f".{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            features.numpy().tofile(temporary)
            os.replace(temporary, path)
            self._left -= self.bytes_per_tile
        except OSError:
            self._left = 0  # the disk is full: continue without storing
        finally:
            temporary.unlink(missing_ok=True)
