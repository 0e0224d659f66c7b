"""Sample tiles for numerical checks and timings: patches of land cover with texture, roofs and streets.

A graph or an engine is compared with what it was made from on pixels that look like imagery: flat areas, sharp edges
and fine texture together. Noise alone would exercise neither the confident labels nor the boundaries between them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_COLORS = np.array([(189, 181, 170), (78, 92, 60), (99, 94, 95), (22, 36, 38), (207, 198, 182)], np.float32)
"""Land, vegetation, road, water and beach as in the imagery of the ``dubai`` schema."""
_TEXTURE = np.array([0.06, 0.16, 0.04, 0.10, 0.03], np.float32)
_LOT, _ROOF = 28, 17  # distance between roofs and side of a roof, px


def sample_tiles(tile: int, count: int, seed: int = 7) -> npt.NDArray[np.uint8]:
    """Draw ``count`` different tiles, uint8 RGB ``[count, 3, tile, tile]``; the same arguments draw the same tiles."""
    rng = np.random.default_rng(seed)
    return np.stack([_draw_tile(tile, rng) for _ in range(count)])


def _draw_tile(tile: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    feature = max(4, min(96, tile // 3))
    cover = np.argmax([_smooth_noise(rng, tile, feature) for _ in _COLORS], axis=0)
    fine, broad = _smooth_noise(rng, tile, 2), _smooth_noise(rng, tile, 24)
    image = _COLORS[cover] * (1 + _TEXTURE[cover] * fine + 0.08 * broad)[..., None]  # [T, T, 3]

    y, x = np.ogrid[:tile, :tile]
    lots = rng.uniform(size=(tile // _LOT + 1, tile // _LOT + 1, 3)).astype(np.float32)
    lot = lots[y // _LOT, x // _LOT]
    built = (cover == 0) & (lot[..., 0] < 0.8)
    for offset, roof in ((3, False), (0, True)):  # the shadow, then the roof over it
        inside = built & ((y - offset) % _LOT < _ROOF) & ((x - offset) % _LOT < _ROOF)
        image[inside] = (110 + 120 * lot[..., 1:2] + (20, 0, -15))[inside] if roof else image[inside] * 0.45
    image += 2.5 * rng.standard_normal((tile, tile, 1), np.float32)
    return np.asarray(np.clip(image + 0.5, 0, 255).transpose(2, 0, 1), np.uint8)


def _smooth_noise(rng: np.random.Generator, side: int, feature: int) -> npt.NDArray[np.float32]:
    """Random values between which is interpolated linearly, one per ``feature`` px along each axis."""
    lattice = rng.standard_normal((side // feature + 2,) * 2, np.float32)
    first, share = np.divmod(np.arange(side, dtype=np.float32) / feature, 1)
    low, share = first.astype(np.intp), share.astype(np.float32)
    rows = lattice[low] * (1 - share)[:, None] + lattice[low + 1] * share[:, None]
    return np.asarray(rows[:, low] * (1 - share) + rows[:, low + 1] * share)
