"""What stands on the ground of a drawn scene: houses, cars and trees, stamped from above.

Pictures are float32 ``[H, W, 3]`` on 0..255, labels uint8 ``[H, W]``, shade float32 ``[H, W]`` (1 in
the sun); all are changed in place. Positions are pixels (x to the right, y down), angles radians from
x towards y, and ``sun`` is the unit vector (x, y) towards the sun. Objects may reach over the border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

PLAIN, ANGLED, COURT, ROUND = range(4)
"""Outlines of a house: a rectangle, an L, a rectangle around a court, a disc."""

_SHADOW = np.float32(0.45)
_CARS = np.array([(240, 240, 240), (222, 222, 226), (52, 52, 58), (160, 62, 52), (140, 145, 155)], np.float32)
_PALM, _LEAFY = (np.array(color, np.float32) for color in ((62, 74, 50), (66, 80, 54)))


@dataclass(frozen=True)
class House:
    """A house at (``x``, ``y``), turned by ``angle``; ``length`` and ``depth`` are half sides in pixels."""

    x: float
    y: float
    angle: float
    length: float
    depth: float
    height: float
    outline: int
    pitched: bool
    color: FloatArray


@dataclass(frozen=True)
class _Patch:
    """The window of the picture around a house, and each pixel's position in the house's own axes."""

    rows: slice
    columns: slice
    p: FloatArray
    q: FloatArray


def _patch(house: House, shape: tuple[int, int], margin: float) -> _Patch | None:
    """The window that reaches ``margin`` pixels beyond the house; ``None`` outside the picture."""
    reach = np.hypot(house.length, house.depth) + margin
    top, bottom = max(int(house.y - reach), 0), min(int(house.y + reach) + 2, shape[0])
    left, right = max(int(house.x - reach), 0), min(int(house.x + reach) + 2, shape[1])
    if top >= bottom or left >= right:
        return None
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(house.y)
    x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(house.x)
    cos, sin = np.float32(np.cos(house.angle)), np.float32(np.sin(house.angle))
    return _Patch(slice(top, bottom), slice(left, right), x * cos + y * sin, y * cos - x * sin)


def _footprint(house: House, p: FloatArray, q: FloatArray) -> BoolArray:
    """Where the house stands, for positions in its own axes."""
    if house.outline == ROUND:
        return np.asarray(p * p + q * q < house.depth * house.depth)
    inside = (np.abs(p) < house.length) & (np.abs(q) < house.depth)
    if house.outline == ANGLED:
        inside &= ~((p > 0.1 * house.length) & (q > 0.05 * house.depth))
    elif house.outline == COURT:
        inside &= ~((np.abs(p) < 0.45 * house.length) & (np.abs(q) < 0.4 * house.depth))
    return np.asarray(inside)


def cast_shadow(shade: FloatArray, house: House, sun: FloatArray) -> None:
    """Darken ``shade`` where the house keeps the sun from the ground."""
    patch = _patch(house, (shade.shape[0], shade.shape[1]), house.height + 2)
    if patch is None:
        return
    cos, sin = np.cos(house.angle), np.sin(house.angle)
    step_p, step_q = sun[0] * cos + sun[1] * sin, sun[1] * cos - sun[0] * sin
    dark = np.zeros(patch.p.shape, np.bool_)
    for distance in np.arange(1, house.height + 1, 3, dtype=np.float32):  # walls are thicker than 3 px
        dark |= _footprint(house, patch.p + distance * step_p, patch.q + distance * step_q)
    shade[patch.rows, patch.columns][dark] = _SHADOW


def raise_roof(
    image: FloatArray, labels: npt.NDArray[np.uint8], house: House, sun: FloatArray, rng: np.random.Generator
) -> None:
    """Paint a roof, flat with a parapet and plant on it or pitched with facets, and label it building (0)."""
    patch = _patch(house, (labels.shape[0], labels.shape[1]), 1)
    if patch is None:
        return
    p, q = patch.p, patch.q
    inside = _footprint(house, p, q)
    cos, sin = np.cos(house.angle), np.sin(house.angle)
    sun_p, sun_q = sun[0] * cos + sun[1] * sin, sun[1] * cos - sun[0] * sin
    if house.pitched:
        ends = house.length - np.abs(p) < house.depth - np.abs(q)
        light = 1 + 0.24 * np.where(ends, np.sign(p) * sun_p, np.sign(q) * sun_q)
        light -= 0.05 * (np.mod(q + p, 3) < 1)  # rows of tiles
    else:
        light = np.full(p.shape, 1.0 + 0.04 * rng.standard_normal(), np.float32)
        # The parapet is bright; inside it, the side towards the sun lies in its shadow.
        core = _footprint(house, p * (1 + 2.2 / house.length), q * (1 + 2.2 / house.depth))
        light[~core] *= 1.12
        light[core & ~_footprint(house, (p + 3 * sun_p) * 1.04, (q + 3 * sun_q) * 1.04)] *= 0.7
        for _ in range(int(rng.integers(1, 3 + int(house.length * house.depth) // 260))):
            at_p, at_q = rng.uniform(-0.7, 0.7) * house.length, rng.uniform(-0.7, 0.7) * house.depth
            half_p, half_q = rng.uniform(1.5, 4.5, 2)
            light[(np.abs(p - at_p + 2 * sun_p) < half_p) & (np.abs(q - at_q + 2 * sun_q) < half_q)] *= 0.66
            light[(np.abs(p - at_p) < half_p) & (np.abs(q - at_q) < half_q)] = rng.uniform(0.75, 1.25)
    image[patch.rows, patch.columns][inside] = light[inside][:, None] * house.color
    labels[patch.rows, patch.columns][inside] = 0


def _disc_pixels(
    x: FloatArray, y: FloatArray, radius: int, shape: tuple[int, int]
) -> tuple[IntArray, IntArray, BoolArray]:
    """Rows and columns ``[n, S, S]`` of squares around points, and which of them lie in the picture."""
    span = np.arange(-radius, radius + 1)
    rows = np.floor(y).astype(np.intp)[:, None, None] + span[:, None]
    columns = np.floor(x).astype(np.intp)[:, None, None] + span[None, :]
    rows, columns = np.broadcast_arrays(rows, columns)
    return rows, columns, (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])


def park_cars(image: FloatArray, x: FloatArray, y: FloatArray, angle: FloatArray, rng: np.random.Generator) -> None:
    """Paint a car of about 4.5 m x 2 m at each point; roads keep their label under them."""
    if not len(x):
        return
    rows, columns, visible = _disc_pixels(x, y, 7, (image.shape[0], image.shape[1]))
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    p, q = dx * cos + dy * sin, dy * cos - dx * sin
    color = _CARS[rng.choice(len(_CARS), len(x), p=(0.42, 0.2, 0.16, 0.08, 0.14))]
    shadow = visible & (np.abs(p - 1) < 5) & (np.abs(q - 1) < 2.9)
    image[rows[shadow], columns[shadow]] *= 0.62
    body = visible & (np.abs(p) < 4.5) & (np.abs(q) < 2)
    which = np.nonzero(body)[0]
    glass = np.where(np.abs(p[body] - 1.6) < 0.8, np.float32(0.6), np.float32(1))
    image[rows[body], columns[body]] = color[which] * glass[:, None]


def plant_trees(
    image: FloatArray,
    labels: npt.NDArray[np.uint8],
    x: FloatArray,
    y: FloatArray,
    palm: BoolArray,
    sun: FloatArray,
    rng: np.random.Generator,
) -> None:
    """Paint a palm's star or a round crown at each point, label it vegetation (3) and cast its shadow."""
    for start in range(0, len(x), 4000):  # a few megabytes of squares at a time
        part = slice(start, start + 4000)
        _plant(image, labels, x[part], y[part], palm[part], sun, rng)


def _plant(
    image: FloatArray,
    labels: npt.NDArray[np.uint8],
    x: FloatArray,
    y: FloatArray,
    palm: BoolArray,
    sun: FloatArray,
    rng: np.random.Generator,
) -> None:
    shape = (labels.shape[0], labels.shape[1])
    radius = rng.uniform(3.2, 6.2, len(x)).astype(np.float32)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, len(x)).astype(np.float32)[:, None, None]
    fronds = palm[:, None, None]

    def crown(dx: FloatArray, dy: FloatArray) -> BoolArray:
        bearing = np.arctan2(dy, dx) + phase
        outline = np.where(fronds, 0.5 + 0.5 * np.abs(np.cos(3.5 * bearing)), 0.88 + 0.12 * np.sin(5 * bearing))
        return np.asarray(dx * dx + dy * dy < (radius * outline) ** 2)

    rows, columns, visible = _disc_pixels(x - 5 * sun[0], y - 5 * sun[1], 7, shape)
    dx, dy = (columns - x[:, None, None] + 5 * sun[0]), (rows - y[:, None, None] + 5 * sun[1])
    dark = visible & crown(dx.astype(np.float32), dy.astype(np.float32))
    image[rows[dark], columns[dark]] *= 0.6

    rows, columns, visible = _disc_pixels(x, y, 7, shape)
    dx, dy = (columns - x[:, None, None]).astype(np.float32), (rows - y[:, None, None]).astype(np.float32)
    green = visible & crown(dx, dy)
    which = np.nonzero(green)[0]
    base = np.where(palm[:, None], _PALM, _LEAFY) * rng.uniform(0.65, 1.15, (len(x), 1)).astype(np.float32)
    light = 1 + 0.5 * ((dx * sun[0] + dy * sun[1]) / radius)[green] + 0.15 * rng.standard_normal(which.size, np.float32)
    image[rows[green], columns[green]] = base[which] * light[:, None]
    labels[rows[green], columns[green]] = 3
