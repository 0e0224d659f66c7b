"""The plan of a drawn scene: where the shore, the streets and the blocks between them are.

Streets run along two coordinates, u and v: pixel axes turned by an angle and bent by smooth noise.
In (u, v) every street is a straight line, so "how far is the next street" is arithmetic on whole
arrays, and in the picture it is a curve. All fields are ``[H, W]`` and all distances are in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.intp]
_Value = TypeVar("_Value", bound=np.generic)

VILLAS, FLATS, HALLS, SITE, PARK, FIELD, EMPTY, GROVE = range(8)
"""What a block is used for; the first four are built on."""

_USE_ODDS = (0.38, 0.17, 0.10, 0.03, 0.12, 0.06, 0.10, 0.04)
_FAR = np.float32(99)
BANK = 58
"""Nothing but beach, scrub and bridges lies nearer to the water than this; then comes a road."""


def value_noise(
    rng: np.random.Generator, height: int, width: int, coarsest: int, finest: int, gain: float = 0.5
) -> FloatArray:
    """Smooth random values of standard deviation about 1, float32 ``[height, width]``.

    Octaves with features from ``coarsest`` down to ``finest`` pixels (powers of two), each ``gain``
    times as strong as the one before. A lattice is doubled with quadratic B-spline weights until it
    covers the picture; every sum has two terms, so the values do not depend on a BLAS.
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
    shape = list(field.shape)
    shape[axis] *= 2
    result = np.empty(shape, np.float32)
    source, target = np.swapaxes(field, 0, axis), np.swapaxes(result, 0, axis)
    near, far = source * np.float32(0.75), source * np.float32(0.25)
    target[0::2] = near
    target[1::2] = near
    target[2::2] += far[:-1]
    target[0] += far[0]
    target[1:-1:2] += far[1:]
    target[-1] += far[-1]
    return result


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
        self.at = np.array(positions, np.float32)
        self.half = np.array(widths, np.float32)
        self.main = np.array(mains, np.bool_)
        self._low = low
        # Looked up at whole pixels: the switch between neighbours lies where nobody sees it.
        grid = low + np.arange(int(high - low) + 2)
        self._block = np.searchsorted(self.at, grid).astype(np.uint16)
        self._nearest = np.searchsorted((self.at[1:] + self.at[:-1]) / 2, grid).astype(np.uint16)

    def locate(self, coordinate: FloatArray) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16], FloatArray]:
        """Block index (block k lies before street k), nearest street and signed distance to its axis."""
        step = (coordinate - np.float32(self._low)).astype(np.int32)
        nearest = self._nearest[step]
        return self._block[step], nearest, coordinate - self.at[nearest]

    def room(self, block: int) -> tuple[float, float]:
        """Where a block between two streets begins and ends, kerbs and a strip of ground left out."""
        return float(self.at[block - 1] + self.half[block - 1] + 9), float(self.at[block] - self.half[block] - 9)


@dataclass(frozen=True)
class Axis:
    """One family of streets, seen from every pixel."""

    streets: Streets
    run: FloatArray
    """The coordinate along these streets."""
    block: npt.NDArray[np.uint16]
    off: FloatArray
    """Signed distance to the axis of the nearest street."""
    edge: FloatArray
    """Distance to that street's kerb, negative on the street; 99 where it is missing."""
    main: BoolArray
    """Whether that street is a main road."""


@dataclass(frozen=True)
class Plan:
    """The plan of a scene; ``sun`` is the unit vector (x, y) towards the sun."""

    width: int
    height: int
    turn: float
    u: FloatArray
    v: FloatArray
    shore: FloatArray
    """Distance to the shore, negative on the water."""
    across_u: Axis
    across_v: Axis
    edge: FloatArray
    """Distance to the nearest kerb, negative on a road."""
    use: ByteArray
    """What the block around each pixel is used for."""
    uses: ByteArray
    """The same by block indices (u, v)."""
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

    def sample(self, field: npt.NDArray[_Value], x: FloatArray, y: FloatArray) -> npt.NDArray[_Value]:
        """A field's values at points; points outside the picture take those of its border."""
        return field[self._nearest_pixel(x, y)]

    def near(self, x: FloatArray, y: FloatArray, margin: float) -> BoolArray:
        """Which points lie in the picture or within ``margin`` of it."""
        return (x > -margin) & (x < self.width + margin) & (y > -margin) & (y < self.height + margin)

    def _nearest_pixel(self, x: FloatArray, y: FloatArray) -> tuple[IntArray, IntArray]:
        return (
            np.clip(y, 0, self.height - 1).astype(np.intp),
            np.clip(x, 0, self.width - 1).astype(np.intp),
        )


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
    across_u = _axis(streets_u, v, located_u, located_v[0], len(streets_v.at), rng)
    across_v = _axis(streets_v, u, located_v, located_u[0], len(streets_u.at), rng)
    uses = rng.choice(8, size=(len(streets_u.at) + 1, len(streets_v.at) + 1), p=_USE_ODDS).astype(np.uint8)
    use = uses[across_u.block, across_v.block]
    use[shore < BANK + 26] = EMPTY
    sun = np.array((np.cos(towards_sun), np.sin(towards_sun)), np.float32)
    edge = _kerbs(across_u, across_v, shore)
    return Plan(width, height, turn, u, v, shore, across_u, across_v, edge, use, uses, sun)


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


def _axis(
    streets: Streets,
    run: FloatArray,
    located: tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16], FloatArray],
    crossing_block: npt.NDArray[np.uint16],
    crossings: int,
    rng: np.random.Generator,
) -> Axis:
    """One family of streets; a side street is missing between some of its crossings."""
    block, nearest, off = located
    kept = (rng.random((len(streets.at), crossings + 1)) < 0.82) | streets.main[:, None]
    edge = np.where(kept[nearest, crossing_block], np.abs(off) - streets.half[nearest], _FAR)
    return Axis(streets, run, block, off, edge, streets.main[nearest])


def _kerbs(across_u: Axis, across_v: Axis, shore: FloatArray) -> FloatArray:
    """Distance to the nearest kerb of the whole network, with rounded corners, bridges and a shore road."""
    edge = np.minimum(across_u.edge, across_v.edge)
    corner = np.nonzero(np.maximum(across_u.edge, across_v.edge) < 9)
    rounded = 9 - np.hypot(9 - across_u.edge[corner], 9 - across_v.edge[corner])
    edge[corner] = np.minimum(edge[corner], rounded)
    closed = shore < BANK
    if float(shore.min()) > -120:  # main roads cross narrow water
        closed &= ~((across_u.main & (across_u.edge < 0)) | (across_v.main & (across_v.edge < 0)))
    edge[closed] = _FAR
    return np.asarray(np.minimum(edge, np.abs(shore - (BANK + 8)) - 8))
