"""A drawn satellite scene with exact labels, for the demonstration and for training where no imagery is at hand.

:func:`draw_scene` draws a shore, a street grid bent by a smooth warp, blocks of houses, parks, fields and sand, half a
metre to the pixel, in the colours of the imagery behind the ``dubai`` schema. ``ground`` plans and paints what is flat;
this module puts houses, cars and trees on it. Angles are radians from x (to the right) towards y (down). A shadow
darkens the ground and leaves its label alone. Objects may reach over the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ground import (
    BUILDING,
    FLATS,
    GROVE,
    HALLS,
    LAND,
    ROAD,
    SITE,
    VEGETATION,
    VILLAS,
    BoolArray,
    ByteArray,
    FloatArray,
    Plan,
    draw_plan,
    paint_ground,
    value_noise,
)

_PLAIN, _ANGLED, _COURT, _ROUND = range(4)
"""Outlines of a house: a rectangle, an L, a rectangle around a court, a disc."""
_SHADOW = np.float32(0.45)
_CARS = np.array([(240, 240, 240), (222, 222, 226), (52, 52, 58), (160, 62, 52), (140, 145, 155)], np.float32)
_PALM, _LEAFY = (np.array(color, np.float32) for color in ((62, 74, 50), (66, 80, 54)))
_ROOFS = np.array(
    (232, 229, 224, 218, 205, 183, 160, 158, 158, 110, 108, 110, 158, 98, 76, 124, 132, 150, 186, 168, 146), np.float32
).reshape(7, 3)
_TREE_ODDS = np.array((0.16, 0.07, 0.02, 0.0, 0.25, 0.0, 0.006, 0.0), np.float32)


@dataclass(frozen=True)
class _Lots:
    """How a block is built on: the side of a lot in pixels, the odds that there is a house, its share of the lot."""

    side: float
    odds: float
    share: tuple[float, float]
    roofs: tuple[float, ...]
    """Odds of the colours of roofs."""


_LOTS = {
    VILLAS: _Lots(42.0, 0.93, (0.55, 0.8), (0.30, 0.22, 0.08, 0.04, 0.20, 0.06, 0.10)),
    FLATS: _Lots(72.0, 0.9, (0.55, 0.82), (0.30, 0.22, 0.18, 0.08, 0.04, 0.06, 0.12)),
    HALLS: _Lots(120.0, 0.9, (0.6, 0.88), (0.40, 0.06, 0.22, 0.12, 0.00, 0.16, 0.04)),
    SITE: _Lots(90.0, 0.3, (0.3, 0.6), (0.10, 0.10, 0.50, 0.20, 0.00, 0.00, 0.10)),
}


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
    image, labels = paint_ground(plan, rng)
    houses = _place_houses(plan, rng)
    shade = np.ones((height, width), np.float32)
    for house in houses:
        _cast_shadow(shade, house, plan.sun)
    _park_cars(image, labels, plan, rng)
    image *= shade[..., None]
    for house in houses:
        _paint_roof(image, labels, house, plan.sun, rng)
    _plant_trees(image, labels, plan, rng)
    return Scenery(_expose(image, rng), labels)


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


@dataclass(frozen=True)
class _House:
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

    def window(self, shape: tuple[int, ...], margin: float) -> tuple[tuple[slice, slice], FloatArray, FloatArray]:
        """The part of the picture within ``margin`` of the house, and its pixels' positions in the house's own axes."""
        reach = np.hypot(self.length, self.depth) + margin
        top, bottom = max(int(self.y - reach), 0), max(min(int(self.y + reach) + 2, shape[0]), 0)
        left, right = max(int(self.x - reach), 0), max(min(int(self.x + reach) + 2, shape[1]), 0)
        y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(self.y)
        x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(self.x)
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return (slice(top, bottom), slice(left, right)), x * cos + y * sin, y * cos - x * sin

    def towards(self, sun: FloatArray) -> tuple[float, float]:
        """The direction of the sun in the house's own axes."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return sun[0] * cos + sun[1] * sin, sun[1] * cos - sun[0] * sin

    def covers(self, p: FloatArray, q: FloatArray) -> BoolArray:
        """Whether the house stands at positions in its own axes."""
        if self.outline == _ROUND:
            return np.asarray(p * p + q * q < self.depth * self.depth)
        inside = (np.abs(p) < self.length) & (np.abs(q) < self.depth)
        if self.outline == _ANGLED:
            inside &= ~((p > 0.1 * self.length) & (q > 0.05 * self.depth))
        elif self.outline == _COURT:
            inside &= ~((np.abs(p) < 0.45 * self.length) & (np.abs(q) < 0.4 * self.depth))
        return np.asarray(inside)


def _cast_shadow(shade: FloatArray, house: _House, sun: FloatArray) -> None:
    """Darken ``shade`` where the house keeps the sun from the ground."""
    place, p, q = house.window(shade.shape, house.height + 2)
    step_p, step_q = house.towards(sun)
    dark = np.zeros(p.shape, np.bool_)
    for distance in np.arange(1, house.height + 1, 3, dtype=np.float32):  # walls are thicker than 3 px
        dark |= house.covers(p + distance * step_p, q + distance * step_q)
    shade[place][dark] = _SHADOW


def _paint_roof(image: FloatArray, labels: ByteArray, house: _House, sun: FloatArray, rng: np.random.Generator) -> None:
    """Paint a roof, flat with a parapet and plant on it or pitched with facets, and label it building."""
    place, p, q = house.window(labels.shape, 1)
    if not p.size:
        return
    inside = house.covers(p, q)
    sun_p, sun_q = house.towards(sun)
    if house.pitched:
        ends = house.length - np.abs(p) < house.depth - np.abs(q)
        light = 1 + 0.24 * np.where(ends, np.sign(p) * sun_p, np.sign(q) * sun_q)
        light -= 0.05 * (np.mod(q + p, 3) < 1)  # rows of tiles
    else:
        light = np.full(p.shape, 1.0 + 0.04 * rng.standard_normal(), np.float32)
        # The parapet is bright; inside it, the side towards the sun lies in its shadow.
        core = house.covers(p * (1 + 2.2 / house.length), q * (1 + 2.2 / house.depth))
        light[~core] *= 1.12
        light[core & ~house.covers((p + 3 * sun_p) * 1.04, (q + 3 * sun_q) * 1.04)] *= 0.7
        for _ in range(int(rng.integers(1, 3 + int(house.length * house.depth) // 260))):
            at_p, at_q = rng.uniform(-0.7, 0.7) * house.length, rng.uniform(-0.7, 0.7) * house.depth
            half_p, half_q = rng.uniform(1.5, 4.5, 2)
            light[(np.abs(p - at_p + 2 * sun_p) < half_p) & (np.abs(q - at_q + 2 * sun_q) < half_q)] *= 0.66
            light[(np.abs(p - at_p) < half_p) & (np.abs(q - at_q) < half_q)] = rng.uniform(0.75, 1.25)
    image[place][inside] = light[inside][:, None] * house.color
    labels[place][inside] = BUILDING


def _place_houses(plan: Plan, rng: np.random.Generator) -> list[_House]:
    """One house on most lots of every built-up block that is not too near to the water."""
    streets_u, streets_v = plan.across_u.streets, plan.across_v.streets
    lots: list[tuple[float, float, float, float, int]] = []  # u, v, half sides along u and v, use
    for i in range(1, len(streets_u.at)):
        for j in range(1, len(streets_v.at)):
            use = int(plan.uses[i, j])
            if use not in _LOTS:
                continue
            (left, right), (top, bottom) = streets_u.building_land(i), streets_v.building_land(j)
            if use in (FLATS, HALLS):
                left += 28.0  # car parks behind the u streets
            count_u = max(round((right - left) / _LOTS[use].side), 1)
            count_v = max(round((bottom - top) / _LOTS[use].side), 1)
            half_u, half_v = (right - left) / count_u / 2, (bottom - top) / count_v / 2
            lots += [
                (left + (2 * k + 1) * half_u, top + (2 * m + 1) * half_v, half_u, half_v, use)
                for k in range(count_u)
                for m in range(count_v)
            ]
    if not lots:
        return []
    u, v, side_u, side_v, uses = np.array(lots, np.float32).T
    x, y = plan.to_pixels(u, v)
    angle = plan.heading(u, v, x, y)
    fits = plan.near(x, y, 150) & (plan.sample(plan.shore, x, y) > 84 + np.maximum(side_u, side_v))
    houses = []
    for n in np.nonzero(fits)[0]:
        use = int(uses[n])
        if rng.random() < _LOTS[use].odds:
            place = float(x[n]), float(y[n]), float(angle[n])
            houses.append(_design_house(*place, float(side_u[n]), float(side_v[n]), use, rng))
    return houses


def _design_house(
    x: float, y: float, angle: float, half_u: float, half_v: float, use: int, rng: np.random.Generator
) -> _House:
    """A house that suits the use of its block and fits its lot."""
    lot = _LOTS[use]
    color = _ROOFS[rng.choice(len(_ROOFS), p=lot.roofs)] * np.float32(rng.uniform(0.86, 1.08))
    length, depth = half_u * rng.uniform(*lot.share), half_v * rng.uniform(*lot.share)
    outline, height, pitched, chance = _PLAIN, rng.uniform(7, 12), False, rng.random()
    if use == VILLAS:
        outline = _ANGLED if chance < 0.4 else _PLAIN
        pitched = chance > 0.65
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    elif use == FLATS and chance > 0.8:  # a tower
        length = depth = 0.5 * min(half_u, half_v)
        height = rng.uniform(45, 80)
    elif use == FLATS:
        outline = (_ANGLED, _COURT, _PLAIN)[int(chance * 3 / 0.8) % 3]
        height = rng.uniform(16, 28)
    elif chance > 0.85:  # a tank
        outline, length, depth = _ROUND, 0.6 * min(length, depth), 0.6 * min(length, depth)
    quarter = int(rng.integers(2))  # which way the open corner of an L looks
    return _House(x, y, angle + np.pi * quarter, length, depth, height, outline, pitched, color)


def _squares(
    x: FloatArray, y: FloatArray, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], BoolArray]:
    """Rows and columns ``[n, 15, 15]`` of squares around points, and which of them lie in the picture."""
    span = np.arange(-7, 8)
    rows = np.floor(y).astype(np.intp)[:, None, None] + span[:, None]
    columns = np.floor(x).astype(np.intp)[:, None, None] + span[None, :]
    rows, columns = np.broadcast_arrays(rows, columns)
    return rows, columns, (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])


def _park_cars(image: FloatArray, labels: ByteArray, plan: Plan, rng: np.random.Generator) -> None:
    """Cars in the lanes of main roads, at the kerbs of streets and in rows on car parks."""
    spots: list[tuple[npt.NDArray[Any], npt.NDArray[Any], float, bool]] = []  # u, v, turn, whether in a bay
    for axis, other, along_u in ((plan.across_u, plan.across_v, False), (plan.across_v, plan.across_u, True)):
        start, stop = float(other.streets.at[0]), float(other.streets.at[-1])
        for at, half, main in zip(axis.streets.at, axis.streets.half, axis.streets.main, strict=True):
            run = rng.uniform(start, stop, int((stop - start) / (45 if main else 60)))
            lanes = np.array((8.2, 15.8) if main else (half - 3.0,)) * rng.choice((-1, 1), (run.size, 1))
            side = at + rng.permuted(lanes, axis=1)[:, 0]
            if along_u:
                spots.append((run, side, 0.0, False))
                continue
            spots.append((side, run, np.pi / 2, False))
            bays = np.arange(start, stop, 6.0)
            for distance in (13.5, 29.0):  # two rows on a car park, noses to the street
                taken = bays[rng.random(bays.size) < 0.6]
                spots.append((np.full(taken.size, at + half + distance), taken, 0.0, True))
    u, v = (np.concatenate([spot[n] for spot in spots]).astype(np.float32) for n in (0, 1))
    turned, parked = (np.concatenate([np.full(spot[0].size, spot[n]) for spot in spots]) for n in (2, 3))
    x, y = plan.to_pixels(u, v)
    edge, road = plan.sample(plan.edge, x, y), plan.sample(labels, x, y) == ROAD
    kept = plan.near(x, y, 8) & road & np.where(parked, edge > 8, edge < -1)
    if kept.any():
        x, y, angle = x[kept], y[kept], plan.heading(u[kept], v[kept], x[kept], y[kept])
        _paint_cars(image, x, y, angle + turned[kept].astype(np.float32), rng)


def _paint_cars(image: FloatArray, x: FloatArray, y: FloatArray, angle: FloatArray, rng: np.random.Generator) -> None:
    """Paint a car of about 4.5 m x 2 m at each point; roads keep their label under them."""
    rows, columns, visible = _squares(x, y, image.shape)
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    p, q = dx * cos + dy * sin, dy * cos - dx * sin
    color = _CARS[rng.choice(len(_CARS), len(x), p=(0.42, 0.2, 0.16, 0.08, 0.14))]
    shadow = visible & (np.abs(p - 1) < 5) & (np.abs(q - 1) < 2.9)
    image[rows[shadow], columns[shadow]] *= 0.62
    body = visible & (np.abs(p) < 4.5) & (np.abs(q) < 2)
    glass = np.where(np.abs(p[body] - 1.6) < 0.8, np.float32(0.6), np.float32(1))
    image[rows[body], columns[body]] = color[np.nonzero(body)[0]] * glass[:, None]


def _plant_trees(image: FloatArray, labels: ByteArray, plan: Plan, rng: np.random.Generator) -> None:
    """Crowns here and there in parks and gardens; palms in rows on medians and in groves."""
    count = max(plan.width * plan.height // 150, 1)
    x = rng.uniform(0, plan.width, count).astype(np.float32)
    y = rng.uniform(0, plan.height, count).astype(np.float32)
    ground, edge = plan.sample(labels, x, y), plan.sample(plan.edge, x, y)
    odds = _TREE_ODDS[plan.sample(plan.use, x, y)] * np.where(ground == VEGETATION, 1.5, 1.0)
    odds *= ((ground == LAND) | (ground == VEGETATION)) & (edge > 7) & (plan.sample(plan.shore, x, y) > 16)
    chosen = rng.random(count) < odds
    x, y = x[chosen], y[chosen]

    row_x, row_y = plan.to_pixels(*_palm_rows(plan, rng))
    ground, edge = plan.sample(labels, row_x, row_y), plan.sample(plan.edge, row_x, row_y)
    grove = (plan.sample(plan.use, row_x, row_y) == GROVE) & (ground == LAND) & (edge > 12)
    kept = plan.near(row_x, row_y, 6) & (grove | ((ground == VEGETATION) & (edge < 0)))

    palm = np.concatenate((rng.random(x.size) < 0.35, np.ones(np.count_nonzero(kept), np.bool_)))
    x, y = np.concatenate((x, row_x[kept])), np.concatenate((y, row_y[kept]))
    for start in range(0, len(x), 4000):  # a few megabytes of squares at a time
        part = slice(start, start + 4000)
        _paint_trees(image, labels, x[part], y[part], palm[part], plan.sun, rng)


def _palm_rows(plan: Plan, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Street coordinates of palms: a lattice for groves, and a row along each main road's median."""
    ends = [(float(a.streets.at[0]), float(a.streets.at[-1])) for a in (plan.across_u, plan.across_v)]
    lattice_u, lattice_v = (axis.ravel() for axis in np.mgrid[slice(*ends[0], 15), slice(*ends[1], 15)])
    rows = [(lattice_u, lattice_v)]
    for axis, (start, stop), along_u in ((plan.across_u, ends[1], False), (plan.across_v, ends[0], True)):
        run = np.arange(start, stop, 17)
        for at in axis.streets.at[axis.streets.main]:
            beside = np.full(run.size, at)
            rows.append((run, beside) if along_u else (beside, run))
    u, v = (np.concatenate(column) for column in zip(*rows, strict=True))
    jitter = rng.normal(0, 0.9, (2, u.size))
    return (u + jitter[0]).astype(np.float32), (v + jitter[1]).astype(np.float32)


def _paint_trees(
    image: FloatArray,
    labels: ByteArray,
    x: FloatArray,
    y: FloatArray,
    palm: BoolArray,
    sun: FloatArray,
    rng: np.random.Generator,
) -> None:
    """Paint a palm's star or a round crown at each point, label it vegetation and cast its shadow."""
    radius = rng.uniform(3.2, 6.2, len(x)).astype(np.float32)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, len(x)).astype(np.float32)[:, None, None]
    fronds = palm[:, None, None]

    def crown(dx: FloatArray, dy: FloatArray) -> BoolArray:
        bearing = np.arctan2(dy, dx) + phase
        outline = np.where(fronds, 0.5 + 0.5 * np.abs(np.cos(3.5 * bearing)), 0.88 + 0.12 * np.sin(5 * bearing))
        return np.asarray(dx * dx + dy * dy < (radius * outline) ** 2)

    rows, columns, visible = _squares(x - 5 * sun[0], y - 5 * sun[1], labels.shape)
    dx, dy = (columns - x[:, None, None] + 5 * sun[0]), (rows - y[:, None, None] + 5 * sun[1])
    dark = visible & crown(dx.astype(np.float32), dy.astype(np.float32))
    image[rows[dark], columns[dark]] *= 0.6

    rows, columns, visible = _squares(x, y, labels.shape)
    dx, dy = (columns - x[:, None, None]).astype(np.float32), (rows - y[:, None, None]).astype(np.float32)
    green = visible & crown(dx, dy)
    which = np.nonzero(green)[0]
    base = np.where(palm[:, None], _PALM, _LEAFY) * rng.uniform(0.65, 1.15, (len(x), 1)).astype(np.float32)
    light = 1 + 0.5 * ((dx * sun[0] + dy * sun[1]) / radius)[green] + 0.15 * rng.standard_normal(which.size, np.float32)
    image[rows[green], columns[green]] = base[which] * light[:, None]
    labels[rows[green], columns[green]] = VEGETATION
