"""The ground of a drawn scene: where shore, streets and blocks are, and what covers them.

Streets run along two coordinates, u and v: pixel axes turned by an angle and bent by smooth noise. In (u, v) every
street is a straight line, in the picture it is a curve. Fields are ``[H, W]``, distances are in pixels. A material
has one label, so labels are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IndexArray = npt.NDArray[np.uint16]
BoolArray = npt.NDArray[np.bool_]

BUILDING, LAND, ROAD, VEGETATION, WATER = (np.uint8(label) for label in range(5))
"""Labels of the built-in schema ``dubai``."""
VILLAS, FLATS, HALLS, SITE, PARK, FIELD, EMPTY, GROVE = range(8)
"""Uses of a block; the first four are built on."""
_USE_ODDS = (0.38, 0.17, 0.10, 0.03, 0.12, 0.06, 0.10, 0.04)
_FAR = np.float32(99)
_BANK = 58
"""Only beach, scrub and bridges are nearer to the water than this; then comes a road."""

_SAND, _DIRT, _PAVING, _BEACH, _LAWN, _CROP, _SCRUB, _ASPHALT, _PAINT, _SEA, _FOAM = range(11)
_LABEL = np.array([LAND] * 4 + [VEGETATION] * 3 + [ROAD] * 2 + [WATER] * 2, np.uint8)
_COLOR = np.array(
    [
        *((189, 181, 170), (166, 152, 136), (166, 160, 154), (207, 198, 182), (78, 86, 62), (88, 98, 62)),
        *((96, 98, 80), (99, 94, 95), (205, 202, 196), (22, 32, 32), (150, 158, 152)),
    ],
    np.float32,
)
# How strongly fine texture and broad mottling show, by material.
_TEXTURE = np.array((0.05, 0.10, 0.06, 0.03, 0.13, 0.10, 0.20, 0.035, 0.03, 0.10, 0.12), np.float32)
_MOTTLE = np.array((0.07, 0.10, 0.05, 0.03, 0.09, 0.05, 0.08, 0.04, 0.02, 0.10, 0.05), np.float32)
_BASE = np.array((_DIRT, _PAVING, _PAVING, _DIRT, _LAWN, _CROP, _SAND, _SAND), np.uint8)  # by use
_DEEP_WATER = np.array(((10, 14, 18), (16, 40, 26), (12, 40, 48)), np.float32)
_SHALLOWS = np.array((70, 95, 80), np.float32)


def value_noise(
    rng: np.random.Generator, height: int, width: int, coarsest: int, finest: int, gain: float = 0.5
) -> FloatArray:
    """Smooth random values of standard deviation about 1, float32 ``[height, width]``.

    Octaves with features from ``coarsest`` to ``finest`` pixels (powers of two), each ``gain`` times as strong as the
    one before. A lattice is doubled with quadratic B-spline weights until it covers the picture; every sum has two
    terms, so the values do not depend on a BLAS.
    """
    cell, strength, power = coarsest, 1.0, 1.0
    field = rng.standard_normal((-(-height // cell) + 3, -(-width // cell) + 3), np.float32)
    while cell > 1:
        cell //= 2
        field = _doubled(field, 0)[: -(-height // cell) + 3]
        field = _doubled(field, 1)[:, : -(-width // cell) + 3]
        if cell >= finest:
            strength *= gain
            power += strength * strength
            field += np.float32(strength) * rng.standard_normal(field.shape, np.float32)
    # Interpolation leaves about 0.55 of the standard deviation along each axis.
    return np.asarray(field[:height, :width] * np.float32(1 / (0.55 * power**0.5)))


def _doubled(field: FloatArray, axis: int) -> FloatArray:
    """A lattice of twice the density along one axis (weights 3/4 and 1/4)."""
    source = np.swapaxes(field, 0, axis)
    near, far = source * np.float32(0.75), source * np.float32(0.25)
    target = np.repeat(near, 2, axis=0)
    target[2::2] += far[:-1]
    target[0] += far[0]
    target[1:-1:2] += far[1:]
    target[-1] += far[-1]
    return np.swapaxes(target, 0, axis)


class Streets:
    """Parallel streets across one coordinate: positions ``at``, half widths ``half``, ``main`` or not."""

    def __init__(self, rng: np.random.Generator, low: float, high: float) -> None:
        positions, widths, mains = [low - rng.uniform(150, 400)], [6.0], [False]
        until_main = int(rng.integers(1, 4))
        while positions[-1] < high + 150:
            main = until_main == 0
            until_main = int(rng.integers(2, 5)) if main else until_main - 1
            positions.append(positions[-1] + rng.uniform(115, 230))
            widths.append(rng.uniform(20, 24) if main else rng.uniform(5.5, 8))
            mains.append(main)
        self.at, self.half = np.array(positions, np.float32), np.array(widths, np.float32)
        self.main = np.array(mains, np.bool_)
        self._low = low
        # Looked up at whole pixels: the switch between neighbours is too small to be seen.
        grid = low + np.arange(int(high - low) + 2)
        self._block = np.searchsorted(self.at, grid).astype(np.uint16)
        self._nearest = np.searchsorted((self.at[1:] + self.at[:-1]) / 2, grid).astype(np.uint16)

    def locate(self, coordinate: FloatArray) -> tuple[IndexArray, IndexArray, FloatArray]:
        """Block index (block k lies before street k), nearest street and signed distance to its axis."""
        step = (coordinate - np.float32(self._low)).astype(np.int32)
        nearest = self._nearest[step]
        return self._block[step], nearest, coordinate - self.at[nearest]

    def building_land(self, block: int) -> tuple[float, float]:
        """Start and end of a block between two streets, without kerbs and a strip of ground."""
        return float(self.at[block - 1] + self.half[block - 1] + 9), float(self.at[block] - self.half[block] - 9)


@dataclass(frozen=True)
class Axis:
    """One family of streets, seen from every pixel.

    ``run`` is the coordinate along the streets, ``off`` the signed distance to the axis of the nearest one, ``edge``
    the distance to its kerb (negative on the street, 99 where it is missing), ``main`` whether it is a main road.
    """

    streets: Streets
    run: FloatArray
    block: IndexArray
    off: FloatArray
    edge: FloatArray
    main: BoolArray


@dataclass(frozen=True)
class Plan:
    """The plan of a scene.

    ``shore`` is the distance to the shore (negative on water), ``edge`` that to the nearest kerb (negative on roads),
    ``use`` the use of each pixel's block, ``uses`` the same by block indices (u, v), ``sun`` the unit vector (x, y)
    towards the sun.
    """

    width: int
    height: int
    turn: float
    u: FloatArray
    v: FloatArray
    shore: FloatArray
    across_u: Axis
    across_v: Axis
    edge: FloatArray
    use: ByteArray
    uses: ByteArray
    sun: FloatArray

    def to_pixels(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Pixel positions (x, y) of street coordinates: the bend undone by fixed-point iteration."""
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        x, y = u * cos - v * sin, u * sin + v * cos
        for _ in range(8):
            rows, columns = self._nearest_pixel(x, y)
            miss_u = u - self.u[rows, columns] - (x - columns) * cos - (y - rows) * sin
            miss_v = v - self.v[rows, columns] - (y - rows) * cos + (x - columns) * sin
            x, y = x + miss_u * cos - miss_v * sin, y + miss_u * sin + miss_v * cos
        return x.astype(np.float32), y.astype(np.float32)

    def heading(self, u: FloatArray, v: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
        """The direction in which u grows at points of which both coordinates are known, radians."""
        ahead_x, ahead_y = self.to_pixels(u + 12, v)
        return np.asarray(np.arctan2(ahead_y - y, ahead_x - x))

    def sample(self, field: npt.NDArray[Any], x: FloatArray, y: FloatArray) -> npt.NDArray[Any]:
        """A field's values at points; points outside the picture take those of its border."""
        return np.asarray(field[self._nearest_pixel(x, y)])

    def near(self, x: FloatArray, y: FloatArray, margin: float) -> BoolArray:
        """Which points lie in the picture or within ``margin`` of it."""
        return (x > -margin) & (x < self.width + margin) & (y > -margin) & (y < self.height + margin)

    def _nearest_pixel(self, x: FloatArray, y: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        return np.clip(y, 0, self.height - 1).astype(np.intp), np.clip(x, 0, self.width - 1).astype(np.intp)


def draw_plan(width: int, height: int, rng: np.random.Generator) -> Plan:
    """Draw the plan of a scene of ``width`` x ``height`` pixels."""
    y, x = (axis.astype(np.float32) for axis in np.ogrid[:height, :width])
    shore = _draw_shore(x, y, rng)
    turn, towards_sun = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u = x * cos + y * sin + 60 * value_noise(rng, height, width, 1024, 256, 0.3)
    v = y * cos - x * sin + 60 * value_noise(rng, height, width, 1024, 256, 0.3)
    streets_u, streets_v = (Streets(rng, float(c.min()), float(c.max())) for c in (u, v))
    located_u, located_v = streets_u.locate(u), streets_v.locate(v)
    axes = []
    for streets, run, (block, nearest, off), crossing, crossings in (
        (streets_u, v, located_u, located_v[0], len(streets_v.at)),
        (streets_v, u, located_v, located_u[0], len(streets_u.at)),
    ):
        # A side street is missing between some of its crossings.
        kept = (rng.random((len(streets.at), crossings + 1)) < 0.82) | streets.main[:, None]
        edge = np.where(kept[nearest, crossing], np.abs(off) - streets.half[nearest], _FAR)
        axes.append(Axis(streets, run, block, off, edge, streets.main[nearest]))
    uses = rng.choice(8, size=(len(streets_u.at) + 1, len(streets_v.at) + 1), p=_USE_ODDS).astype(np.uint8)
    use = uses[axes[0].block, axes[1].block]
    use[shore < _BANK + 26] = EMPTY
    sun = np.array((np.cos(towards_sun), np.sin(towards_sun)), np.float32)
    edge = _distance_to_kerbs(axes[0], axes[1], shore)
    return Plan(width, height, turn, u, v, shore, axes[0], axes[1], edge, use, uses, sun)


def _draw_shore(x: FloatArray, y: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Distance to the shore of a coast, a river or a lake; negative on the water."""
    height, width, bearing = y.size, x.size, rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(bearing)), np.float32(np.sin(bearing))
    along = (x - width / 2) * cos + (y - height / 2) * sin
    across = (y - height / 2) * cos - (x - width / 2) * sin
    reach = float(abs(cos) * width + abs(sin) * height) / 2
    wiggle = value_noise(rng, height, width, 512, 4, 0.5) * np.float32(min(36.0, 0.09 * reach))
    kind = rng.random()
    if kind < 0.45:  # a coast
        distance = along + reach * rng.uniform(0.45, 0.65)
    elif kind < 0.72:  # a river, narrow enough to be bridged
        bend = 50 * np.sin(across * np.float32(2 * np.pi / rng.uniform(700, 1300)))
        distance = np.abs(along + bend + reach * rng.uniform(-0.4, 0.4)) - min(rng.uniform(34, 65), 0.35 * reach)
    else:  # a lake
        along, across = along - rng.uniform(-0.3, 0.3) * reach, across * rng.uniform(0.65, 1)
        distance = np.hypot(along, across) - min(rng.uniform(0.2, 0.3) * min(width, height), 420)
    return np.asarray(distance + wiggle, np.float32)


def _distance_to_kerbs(across_u: Axis, across_v: Axis, shore: FloatArray) -> FloatArray:
    """Distance to the nearest kerb of the whole network, with rounded corners, bridges and a shore road."""
    edge = np.minimum(across_u.edge, across_v.edge)
    corner = np.nonzero(np.maximum(across_u.edge, across_v.edge) < 9)
    rounded = 9 - np.hypot(9 - across_u.edge[corner], 9 - across_v.edge[corner])
    edge[corner] = np.minimum(edge[corner], rounded)
    closed = shore < _BANK
    if float(shore.min()) > -120:  # main roads cross narrow water
        closed &= ~((across_u.main & (across_u.edge < 0)) | (across_v.main & (across_v.edge < 0)))
    edge[closed] = _FAR
    return np.asarray(np.minimum(edge, np.abs(shore - (_BANK + 8)) - 8))


def paint_ground(plan: Plan, rng: np.random.Generator) -> tuple[FloatArray, ByteArray]:
    """Paint all that is flat, without shadows: float32 ``[H, W, 3]`` on 0..255, and labels."""
    mottle = value_noise(rng, plan.height, plan.width, 256, 4, 0.6)
    material = _choose_materials(plan, mottle)
    labels = _LABEL[material]
    return _color(plan, material, labels, mottle, rng), labels


def _choose_materials(plan: Plan, mottle: FloatArray) -> ByteArray:
    """The material of every pixel; later lines paint over earlier ones."""
    use, edge, shore = plan.use, plan.edge, plan.shore
    material = _BASE[use]
    material[(use == VILLAS) & (mottle > 0.75)] = _LAWN
    material[(use == FLATS) & (mottle > 0.95)] = _LAWN
    material[(use == PARK) & (np.abs(mottle + 0.2) < 0.07)] = _PAVING  # footpaths along a contour
    material[(use == PARK) & (mottle < -1.35)] = _SAND
    material[(use == EMPTY) & (mottle > 1.45)] = _SCRUB
    material[(use == FIELD) & (edge < 12)] = _DIRT
    # Car parks beside the streets of flats and halls: label "road", as in the imagery.
    side, paved = plan.across_u.edge, (use == FLATS) | (use == HALLS)
    material[paved & (plan.across_u.off > 0) & (side > 6) & (side < 36) & (edge > 6)] = _ASPHALT
    material[edge < 6] = _PAVING

    road = edge < 0
    material[road] = _ASPHALT
    for axis, crossing in ((plan.across_u, plan.across_v), (plan.across_v, plan.across_u)):
        _mark_street(material, axis, road & (axis.edge < 0) & (crossing.edge > 12))

    middle = (np.abs(shore - (_BANK + 8)) < 0.7) & (np.minimum(plan.across_u.edge, plan.across_v.edge) > 9)
    material[middle & (np.mod(plan.u + plan.v, 28) < 12)] = _PAINT
    bank = (shore < _BANK) & ~road
    material[bank] = _SAND
    material[bank & (mottle > 1.1)] = _SCRUB
    material[bank & (shore < 14 + 5 * mottle)] = _BEACH
    sea = (shore < 0) & ~road
    material[sea] = _SEA
    material[sea & (shore > -2.5 - mottle)] = _FOAM
    return material


def _mark_street(material: ByteArray, axis: Axis, clear: BoolArray) -> None:
    """Green medians and edge lines on main roads, dashed lines between lanes; only on ``clear`` pixels."""
    rows, columns = np.nonzero(clear)
    offset, main = np.abs(axis.off[rows, columns]), axis.main[rows, columns]
    kerb, dashed = axis.edge[rows, columns], np.mod(axis.run[rows, columns], 22) < 9
    line = dashed & (np.abs(offset - np.where(main, np.float32(12), np.float32(0))) < 0.8)
    line |= main & ((np.abs(offset - 5.2) < 0.6) | (np.abs(kerb + 1.4) < 0.6))
    material[rows[line], columns[line]] = _PAINT
    median = main & (offset < 4)
    material[rows[median], columns[median]] = _LAWN


def _color(
    plan: Plan, material: ByteArray, labels: ByteArray, mottle: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """The colour of every pixel: its material's, varied by block, texture, crop rows and depth of water."""
    fine = value_noise(rng, plan.height, plan.width, 64, 2, 0.75)
    palette = _COLOR.copy()
    palette[:_LAWN] *= (rng.uniform(0.93, 1.12) * (1 + 0.03 * rng.standard_normal(3))).astype(np.float32)
    image: FloatArray = palette[material]

    gain = 1 + _TEXTURE[material] * fine + _MOTTLE[material] * mottle
    blocks = plan.uses.shape
    crops = np.nonzero(material == _CROP)
    block = plan.across_u.block[crops], plan.across_v.block[crops]
    angle, period = rng.uniform(0, np.pi, blocks), rng.uniform(6, 13, blocks)
    wave_u, wave_v = ((2 * np.pi * f(angle) / period).astype(np.float32)[block] for f in (np.cos, np.sin))
    rows_of_crop = 0.92 + 0.2 * np.sin(plan.u[crops] * wave_u + plan.v[crops] * wave_v)
    gain[crops] *= rows_of_crop * rng.uniform(0.75, 1.15, blocks).astype(np.float32)[block]
    image *= gain[..., None]

    tint = 1 + 0.07 * rng.standard_normal((*blocks, 1)) + 0.01 * rng.standard_normal((*blocks, 3))
    ground = np.nonzero((plan.edge > 6) & (plan.shore > _BANK) & (material != _ASPHALT))
    image[ground] *= tint.astype(np.float32)[plan.across_u.block[ground], plan.across_v.block[ground]]
    image[..., 2] -= 3 * mottle * (labels == LAND)  # sand turns from grey to ochre

    sea = np.nonzero(material == _SEA)
    depth = np.maximum(-plan.shore[sea], 0)
    waves = 1 + 0.12 * fine[sea] + 0.1 * mottle[sea]
    shallow = np.exp(-depth / np.float32(rng.uniform(9, 26)))
    image[sea] = _DEEP_WATER[rng.integers(3)] * waves[:, None] + _SHALLOWS * shallow[:, None]
    image[(plan.shore > 0) & (plan.shore < 4) & (plan.edge >= 0)] *= 0.72  # wet sand
    return image
