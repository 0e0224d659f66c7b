"""A drawn satellite scene with exact labels: real-looking tiles where no imagery is at hand.

The demonstration, the benchmarks and the numerical checks need pictures with the colours, textures
and shapes of a city from space, on any machine, without a download. :func:`draw_scene` makes them
from a seed: a shore, a street grid bent by a smooth warp, blocks of houses, parks, fields and sand,
half a metre to the pixel, in the colours of the imagery behind the ``dubai`` schema.

``plan`` decides where things are, ``ground`` paints materials (a material has one label, so labels
are exact by construction), ``town`` places houses, cars and trees, ``objects`` stamps them. A shadow
darkens the ground it falls on and leaves its label alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.scenery.ground import paint_ground
from cdkd_edge.scenery.plan import FloatArray, draw_plan, value_noise
from cdkd_edge.scenery.town import build_town


@dataclass(frozen=True)
class Scenery:
    """A drawn scene: ``image`` uint8 RGB ``[H, W, 3]``; ``labels`` uint8 ``[H, W]``, indices into ``dubai``."""

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


def draw_scene(width: int, height: int, *, seed: int = 0) -> Scenery:
    """Draw a scene of ``width`` x ``height`` pixels; the same arguments draw the same scene.

    Raises:
        ValueError: a side is less than one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a scene has at least one pixel; asked for {width} x {height}")
    rng = np.random.default_rng(seed)
    plan = draw_plan(width, height, rng)
    picture = paint_ground(plan, rng)
    build_town(plan, picture, rng)
    return Scenery(_expose(picture.image, rng), picture.labels)


def _expose(image: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What a sensor makes of it: a slight blur, an illumination gradient, contrast, noise; uint8 ``[H, W, 3]``."""
    height, width = image.shape[:2]
    for axis in (0, 1):  # a binomial filter (1 4 1) / 6 along each axis, borders kept
        flat = np.swapaxes(image, 0, axis)
        middle = flat[1:-1] * np.float32(4 / 6)
        middle += flat[:-2] * np.float32(1 / 6)
        middle += flat[2:] * np.float32(1 / 6)
        flat[1:-1] = middle
    slope = rng.uniform(-0.05, 0.05, 2).astype(np.float32)
    light = 1 + slope[0] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = light + slope[1] * np.linspace(-1, 1, width, dtype=np.float32)
    light *= 1 + 0.02 * value_noise(rng, height, width, 1024, 256)
    image *= (light * np.float32(rng.uniform(0.9, 1.06)))[..., None]
    image += (rng.uniform(1.5, 3.2) * rng.standard_normal((height, width), np.float32))[..., None]
    np.clip(image, 0, 255, out=image)
    return np.asarray(image + np.float32(0.5)).astype(np.uint8)


def sample_tiles(tile: int, count: int) -> npt.NDArray[np.uint8]:
    """Drawn satellite tiles, uint8 ``[count, 3, tile, tile]``, always the same."""
    scene = draw_scene(count * tile, tile, seed=7).image
    return np.stack([scene[:, i * tile : (i + 1) * tile].transpose(2, 0, 1) for i in range(count)])
