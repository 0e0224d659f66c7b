"""A drawn satellite scene with exact labels: real-looking tiles where no imagery is at hand.

The demonstration, the benchmarks and the numerical checks need pictures with the colours, textures
and shapes of a city from space, on any machine, without a download. :func:`draw_scene` makes them
from a seed: a shore, a street grid bent by a smooth warp, blocks of houses, parks, fields and sand.
Half a metre to the pixel, in the colours of the ``dubai`` schema's imagery.

The ground is painted by *material*, and a material has one label, so the labels are exact by
construction. Houses, trees and cars are stamped on top; a shadow darkens the ground it falls on and
leaves its label alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.scenery_objects import (
    ANGLED,
    COURT,
    PLAIN,
    ROUND,
    BoolArray,
    FloatArray,
    House,
    cast_shadow,
    park_cars,
    plant_trees,
    raise_roof,
)

BUILDING, LAND, ROAD, VEGETATION, WATER = range(5)
"""Labels of the built-in schema ``dubai``."""

# Materials of the ground: label, colour, how strongly fine texture and broad mottling show.
_SAND, _DIRT, _PAVING, _LAWN, _CROP, _SCRUB, _ASPHALT, _TRACK, _PAINT, _SEA, _BEACH, _FOAM = range(12)
_LABEL = np.array([1, 1, 1, 3, 3, 3, 2, 2, 2, 4, 1, 4], np.uint8)
_COLOR = np.array(
    [(187, 181, 174), (158, 146, 134), (164, 159, 156), (78, 86, 62), (88, 98, 62), (96, 98, 80)]
    + [(99, 94, 95), (170, 160, 149), (205, 202, 196), (22, 32, 32), (205, 197, 184), (150, 158, 152)],
    np.float32,
)
_TEXTURE = np.array([0.05, 0.10, 0.06, 0.13, 0.10, 0.20, 0.035, 0.05, 0.03, 0.10, 0.03, 0.12], np.float32)
_MOTTLE = np.array([0.07, 0.10, 0.05, 0.09, 0.05, 0.08, 0.04, 0.05, 0.02, 0.10, 0.03, 0.05], np.float32)

# What a block is used for, and how often away from the shore.
_VILLAS, _FLATS, _HALLS, _PARK, _FIELD, _EMPTY, _SITE, _GROVE = range(8)
_USE_ODDS = (0.30, 0.16, 0.11, 0.13, 0.08, 0.13, 0.05, 0.04)

_ROOFS = np.array(
    [(232, 229, 224), (218, 205, 183), (160, 158, 158), (110, 108, 110), (158, 98, 76), (124, 132, 150), (186, 168, 146)],
    np.float32,
)


@dataclass(frozen=True)
class Scenery:
    """A drawn scene: ``image`` uint8 RGB ``[H, W, 3]`` and ``labels`` uint8 ``[H, W]``, 0 .. 4."""

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


def draw_scene(width: int, height: int, *, seed: int = 0) -> Scenery:
    """Draw a scene of ``width`` x ``height`` pixels; the same arguments draw the same scene.

    Raises:
        ValueError: a side is less than one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a scene has at least one pixel; asked for {width} x {height}")
    return _Painter(width, height, np.random.default_rng(seed)).paint()


class _Painter:
    """One scene being drawn, from the ground up."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.width, self.height, self.rng = width, height, rng
        self.y, self.x = (axis.astype(np.float32) for axis in np.ogrid[:height, :width])
        self.shade = np.ones((height, width), np.float32)
        bearing = rng.uniform(0, 2 * np.pi)
        self.sun = np.array([np.cos(bearing), np.sin(bearing)], np.float32)  # towards the sun, in (x, y)

    def paint(self) -> Scenery:
        self.shore = self._draw_shore()
        self._lay_streets()
        material = self._cover_ground()
        self.labels = _LABEL[material]
        self._color_ground(material)
        houses = self._place_houses()
        for house in houses:
            cast_shadow(self.shade, house, self.sun)
        self._park_cars()
        self.image *= self.shade[..., None]
        for house in houses:
            raise_roof(self.image, self.labels, house, self.sun, self.rng)
        self._plant_trees()
        return Scenery(self._expose(), self.labels)

    # ---- the ground ------------------------------------------------------------------------------

    def _draw_shore(self) -> FloatArray:
        """Distance to the shore in pixels, about; negative on the water. ``[H, W]``"""
        rng, bearing = self.rng, self.rng.uniform(0, 2 * np.pi)
        cos, sin = np.float32(np.cos(bearing)), np.float32(np.sin(bearing))
        along = (self.x - self.width / 2) * cos + (self.y - self.height / 2) * sin
        across = (self.y - self.height / 2) * cos - (self.x - self.width / 2) * sin
        reach = (abs(cos) * self.width + abs(sin) * self.height) / 2
        wiggle = _noise(rng, self.height, self.width, 512, 8, 0.42) * min(38.0, 0.09 * reach)
        kind = rng.random()
        if kind < 0.45:  # a coast
            distance = along + reach * rng.uniform(0.45, 0.65)
        elif kind < 0.72:  # a river, wide enough to be seen from here and narrow enough to be bridged
            bend = np.sin(across * np.float32(2 * np.pi / rng.uniform(700, 1300))) * 50 + reach * rng.uniform(-0.4, 0.4)
            distance = np.abs(along + bend) - min(rng.uniform(34, 65), 0.35 * reach)
        else:  # a lake
            along, across = along - rng.uniform(-0.3, 0.3) * reach, across * rng.uniform(0.65, 1)
            distance = np.hypot(along, across) - min(rng.uniform(0.38, 0.5) * min(self.width, self.height), 420)
        return np.asarray(distance + wiggle, np.float32)

    def _lay_streets(self) -> None:
        """Two families of parallel streets, bent by a smooth warp; their distances at each pixel."""
        rng, turn = self.rng, self.rng.uniform(0, np.pi)
        self.turn = turn
        bend = (_noise(rng, self.height, self.width, 1024, 256, 0.3) * 60 for _ in range(2))
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        self.u = self.x * cos + self.y * sin + next(bend)
        self.v = self.y * cos - self.x * sin + next(bend)
        self.streets = tuple(_Streets(rng, float(c.min()), float(c.max())) for c in (self.u, self.v))
        across_u, across_v = self.streets
        self.block_u, near_u, self.off_u = across_u.locate(self.u)
        self.block_v, near_v, self.off_v = across_v.locate(self.v)
        # Side streets are missing here and there; main roads run through.
        keep_u = (rng.random((len(across_u.at), len(across_v.at) + 1)) < 0.8) | across_u.main[:, None]
        keep_v = (rng.random((len(across_v.at), len(across_u.at) + 1)) < 0.8) | across_v.main[:, None]
        self.edge_u = np.where(keep_u[near_u, self.block_v], np.abs(self.off_u) - across_u.half[near_u], np.float32(99))
        self.edge_v = np.where(keep_v[near_v, self.block_u], np.abs(self.off_v) - across_v.half[near_v], np.float32(99))
        edge = np.minimum(self.edge_u, self.edge_v)
        corner = np.maximum(self.edge_u, self.edge_v) < 9
        rounded = 9 - np.hypot(9 - self.edge_u[corner], 9 - self.edge_v[corner])
        edge[corner] = np.minimum(edge[corner], rounded)
        self.main_u, self.main_v = across_u.main[near_u], across_v.main[near_v]
        bridge = (self.main_u & (self.edge_u < 0)) | (self.main_v & (self.edge_v < 0))
        narrow = float(self.shore.min()) > -110
        edge[(self.shore < 58) & ~(bridge if narrow else np.zeros_like(bridge))] = 99
        self.edge = np.minimum(edge, np.abs(self.shore - 66) - 8)  # the road along the shore

    def _cover_ground(self) -> npt.NDArray[np.uint8]:
        """The material of every pixel, uint8 ``[H, W]``."""
        rng, shore, edge = self.rng, self.shore, self.edge
        broad = _noise(rng, self.height, self.width, 256, 4, 0.6)
        self.broad = broad
        shape = (len(self.streets[0].at) + 1, len(self.streets[1].at) + 1)
        self.use = rng.choice(8, size=shape, p=_USE_ODDS).astype(np.uint8)
        self.tint = (1 + 0.07 * rng.standard_normal((*shape, 1)) + 0.015 * rng.standard_normal((*shape, 3))).astype("f4")
        use = self.use[self.block_u, self.block_v]
        use[shore < 84] = _EMPTY
        self.use_map = use

        base = np.array([_DIRT, _PAVING, _PAVING, _LAWN, _CROP, _SAND, _DIRT, _SAND], np.uint8)
        material = base[use]
        material[(use == _VILLAS) & (broad > 0.75)] = _LAWN
        material[(use == _FLATS) & (broad > 0.95)] = _LAWN
        material[(use == _PARK) & (np.abs(broad + 0.2) < 0.07)] = _PAVING  # footpaths follow a contour
        material[(use == _PARK) & (broad < -1.35)] = _SAND
        material[(use == _EMPTY) & (broad > 1.45)] = _SCRUB
        material[(use == _FIELD) & (edge < 12)] = _DIRT
        # Car parks in front of flats and halls: label "road", as in the imagery.
        court = (use == _FLATS) | (use == _HALLS)
        material[court & (self.edge_u > 6) & (np.abs(self.off_u) < 44) & (self.edge_u < 98)] = _ASPHALT
        material[edge < 6] = _PAVING
        road = edge < 0
        material[road] = _ASPHALT
        for off, side, main, near in (
            (self.off_u, self.edge_u, self.main_u, self.edge_v),
            (self.off_v, self.edge_v, self.main_v, self.edge_u),
        ):
            open_road = road & (side < 0) & (near > 10)
            distance = np.abs(off)
            material[open_road & main & (distance < 4)] = _LAWN  # median
        self._mark_lanes(material, road)
        material[(shore < 58) & (edge >= 0)] = _SAND
        material[(shore < 58) & (edge >= 0) & (broad > 1.1)] = _SCRUB
        material[(shore < 14 + 5 * broad) & (edge >= 0)] = _BEACH
        material[(shore < 0) & (edge >= 0)] = _SEA
        foam = (shore < 0) & (shore > -2.5 - broad) & (edge >= 0)
        material[foam] = _FOAM
        return material

    def _mark_lanes(self, material: npt.NDArray[np.uint8], road: BoolArray) -> None:
        """Dashed lane markings on streets, solid edge lines on main roads."""
        for off, run, side, main, near in (
            (self.off_u, self.v, self.edge_u, self.main_u, self.edge_v),
            (self.off_v, self.u, self.edge_v, self.main_v, self.edge_u),
        ):
            lane = road & (side < 0) & (near > 14)
            rows, columns = np.nonzero(lane)
            offset, along = np.abs(off[rows, columns]), run[rows, columns]
            dashed = np.mod(along, 22) < 9
            on_main = main[rows, columns]
            line = np.where(on_main, (np.abs(offset - 12) < 0.8) & dashed, (offset < 0.7) & dashed)
            line |= on_main & ((np.abs(offset - 4.8) < 0.6) | (np.abs(side[rows, columns] + 1.2) < 0.6))
            material[rows[line], columns[line]] = _PAINT

    def _color_ground(self, material: npt.NDArray[np.uint8]) -> None:
        """Material colours, varied by block, texture, crop rows and depth of water, into ``image``."""
        rng = self.rng
        fine = _noise(rng, self.height, self.width, 64, 2, 0.75)
        palette = _COLOR.copy()
        palette[[_SAND, _DIRT, _BEACH, _TRACK]] *= rng.uniform(0.93, 1.12) * (1 + 0.03 * rng.standard_normal(3))
        self.image = palette[material].astype(np.float32, copy=False)
        gain = 1 + _TEXTURE[material] * fine + _MOTTLE[material] * self.broad
        crops = np.nonzero(material == _CROP)
        if crops[0].size:
            block = (self.block_u[crops], self.block_v[crops])
            shape = self.use.shape
            angle, period = rng.uniform(0, np.pi, shape), rng.uniform(6, 13, shape)
            wave_u, wave_v = ((2 * np.pi * f(angle) / period).astype("f4")[block] for f in (np.cos, np.sin))
            gain[crops] *= 0.92 + 0.2 * np.sin(self.u[crops] * wave_u + self.v[crops] * wave_v)
            gain[crops] *= rng.uniform(0.75, 1.15, shape).astype("f4")[block]
        self.image *= gain[..., None]
        ground = (self.edge > 6) & (self.shore > 58) & (material != _ASPHALT)
        rows, columns = np.nonzero(ground)
        self.image[rows, columns] *= self.tint[self.block_u[rows, columns], self.block_v[rows, columns]]
        self.image[..., 2] -= 3 * self.broad * (self.labels != WATER)  # sand turns from grey to ochre

        rows, columns = np.nonzero(material == _SEA)
        depth = -self.shore[rows, columns]
        murk = np.array(((10, 14, 18), (16, 40, 26), (12, 40, 48))[rng.integers(3)], np.float32)
        shallow = np.exp(-depth / rng.uniform(9, 26))[:, None] * np.array((70, 95, 80), np.float32)
        waves = 1 + 0.12 * fine[rows, columns] + 0.1 * self.broad[rows, columns]
        self.image[rows, columns] = murk * waves[:, None] + shallow
        rim = (self.shore > 0) & (self.shore < 4) & (self.edge >= 0)
        self.image[rim] *= 0.72  # wet sand
        self.shade[(self.shore < -1) & (self.edge > 0) & (self.edge < 5)] = 0.6  # under bridges

    # ---- what stands on it -----------------------------------------------------------------------

    def _to_pixels(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Street coordinates to pixel coordinates (x, y): the warp undone by fixed-point iteration."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        x, y = u * cos - v * sin, u * sin + v * cos
        for _ in range(8):
            rows = np.clip(y, 0, self.height - 1).astype(np.intp)
            columns = np.clip(x, 0, self.width - 1).astype(np.intp)
            miss_u = u - (self.u[rows, columns] + (x - columns) * cos + (y - rows) * sin)
            miss_v = v - (self.v[rows, columns] + (y - rows) * cos - (x - columns) * sin)
            x, y = x + miss_u * cos - miss_v * sin, y + miss_u * sin + miss_v * cos
        return x.astype(np.float32), y.astype(np.float32)

    def _headings(self, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Pixel positions and the local direction of the u axis."""
        x, y = self._to_pixels(u, v)
        ahead_x, ahead_y = self._to_pixels(u + 12, v)
        return x, y, np.arctan2(ahead_y - y, ahead_x - x)

    def _sample(self, field: npt.NDArray[_T], x: FloatArray, y: FloatArray) -> npt.NDArray[_T]:
        """A field's values at points; points outside the picture take those of its border."""
        rows = np.clip(y, 0, self.height - 1).astype(np.intp)
        return field[rows, np.clip(x, 0, self.width - 1).astype(np.intp)]

    def _place_houses(self) -> list[House]:
        """Houses on the lots of every built-up block, none near the shore."""
        rng, (across_u, across_v) = self.rng, self.streets
        lots: list[tuple[float, float, float, float, int]] = []  # u, v, half room along u and v, use
        for i in range(len(across_u.at) - 1):
            left, right = across_u.inner(i)
            for j in range(len(across_v.at) - 1):
                use = int(self.use[i + 1, j + 1])
                if use > _HALLS and use != _SITE:
                    continue
                top, bottom = across_v.inner(j)
                size = {_VILLAS: 44.0, _FLATS: 88.0, _HALLS: 120.0, _SITE: 90.0}[use]
                count_u, count_v = max(int((right - left) / size), 1), max(int((bottom - top) / size), 1)
                room_u, room_v = (right - left) / count_u / 2, (bottom - top) / count_v / 2
                for k in range(count_u):
                    for m in range(count_v):
                        lots.append((left + (2 * k + 1) * room_u, top + (2 * m + 1) * room_v, room_u, room_v, use))
        if not lots:
            return []
        u, v, room_u, room_v, uses = (np.array(column, np.float32) for column in zip(*lots, strict=True))
        x, y, angle = self._headings(u, v)
        reach = np.hypot(room_u, room_v)
        near = (x > -reach) & (x < self.width + reach) & (y > -reach) & (y < self.height + reach)
        near &= self._sample(self.shore, x, y) > 78 + 0.8 * np.maximum(room_u, room_v)
        return [
            self._design(float(x[n]), float(y[n]), float(angle[n]), float(room_u[n]), float(room_v[n]), int(uses[n]))
            for n in np.nonzero(near)[0]
            if rng.random() < (0.93, 0.9, 0.9, 0, 0, 0, 0.25)[int(uses[n])]
        ]

    def _design(self, x: float, y: float, angle: float, room_u: float, room_v: float, use: int) -> House:
        """A house that suits the block's use and fits its lot."""
        rng = self.rng
        color = _ROOFS[rng.choice(len(_ROOFS), p=_ROOF_ODDS[use])] * np.float32(rng.uniform(0.88, 1.08))
        share = {_VILLAS: (0.5, 0.72), _FLATS: (0.35, 0.8), _HALLS: (0.6, 0.86), _SITE: (0.3, 0.6)}[use]
        length, depth = room_u * rng.uniform(*share), room_v * rng.uniform(*share)
        outline, height = PLAIN, rng.uniform(7, 12)
        chance = rng.random()
        if use == _VILLAS:
            outline = ANGLED if chance < 0.4 else PLAIN
            x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
        elif use == _FLATS:
            outline = (ANGLED, COURT, PLAIN, PLAIN)[int(chance * 4)]
            height = rng.uniform(16, 30)
            if chance > 0.85:  # a tower
                length = depth = min(room_u, room_v) * 0.45
                height = rng.uniform(50, 90)
        elif chance > 0.82:  # a tank
            outline, depth = ROUND, 0.7 * min(length, depth)
        if rng.random() < 0.5 and outline == ANGLED:
            angle += np.pi
        pitched = outline == PLAIN and use == _VILLAS and chance > 0.62
        return House(x, y, angle, length, depth, height, outline, pitched, color)

    def _park_cars(self) -> None:
        """Cars in the lanes of main roads, at the kerbs of streets and in rows on car parks."""
        rng = self.rng
        where: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        for axis, (across, along) in enumerate((self.streets, self.streets[::-1])):
            start, stop = along.at[0], along.at[-1]
            for at, half, main in zip(across.at, across.half, across.main, strict=True):
                count = int((stop - start) / (70 if main else 60))
                run = rng.uniform(start, stop, count).astype(np.float32)
                offset = rng.choice((8.0, 16.0) if main else (half - 3.0,), count) * rng.choice((-1, 1), count)
                side = (at + offset).astype(np.float32)
                where.append((side, run, np.float32(np.pi / 2)) if axis == 0 else (run, side, np.float32(0)))  # type: ignore[arg-type]
            # Car parks lie along the u streets: two rows, nose to the street.
            if axis == 0:
                for at, half in zip(across.at, across.half, strict=True):
                    run = np.arange(start, stop, 5.6, dtype=np.float32)
                    for offset in (half + 13, -half - 13, half + 30, -half - 30):
                        kept = run[rng.random(run.size) < 0.55]
                        where.append((np.full(kept.size, at + offset, np.float32), kept, np.float32(9)))  # type: ignore[arg-type]
        for u, v, turned in where:
            x, y, heading = self._headings(u, v)
            parked = turned == 9
            on_road = self._sample(self.labels, x, y) == ROAD
            on_road &= (self._sample(self.edge, x, y) > 6) if parked else (self._sample(self.edge, x, y) < 0)
            on_road &= (x > -9) & (x < self.width + 9) & (y > -9) & (y < self.height + 9)
            if parked:
                on_road &= self._sample(self.shade, x, y) > 0
            park_cars(self.image, x[on_road], y[on_road], heading[on_road] + (0 if parked else turned), rng)

    def _plant_trees(self) -> None:
        """Palms in groves, on medians and kerbs; round crowns in parks and gardens."""
        rng = self.rng
        count = self.width * self.height // 160
        x = rng.uniform(0, self.width, count).astype(np.float32)
        y = rng.uniform(0, self.height, count).astype(np.float32)
        use, label = self._sample(self.use_map, x, y), self._sample(self.labels, x, y)
        edge, shore = self._sample(self.edge, x, y), self._sample(self.shore, x, y)
        odds = np.array((0.16, 0.07, 0.02, 0.22, 0.0, 0.006, 0.0, 0.0), np.float32)[use]
        odds = np.where(label == VEGETATION, odds * 1.5, odds)
        odds *= (label == LAND) | (label == VEGETATION)
        odds *= (shore > 16) & (edge > 7)
        chosen = rng.random(count) < odds
        x, y = x[chosen], y[chosen]
        palm = rng.random(len(x)) < 0.35
        rows_u, rows_v = self._palm_rows()
        grove_x, grove_y = self._to_pixels(rows_u, rows_v)
        grove_x += rng.normal(0, 0.8, len(grove_x)).astype(np.float32)
        grove_y += rng.normal(0, 0.8, len(grove_y)).astype(np.float32)
        inside = (grove_x > -6) & (grove_x < self.width + 6) & (grove_y > -6) & (grove_y < self.height + 6)
        label = self._sample(self.labels, grove_x, grove_y)
        in_grove = (self._sample(self.use_map, grove_x, grove_y) == _GROVE) & (label == LAND)
        in_grove &= self._sample(self.edge, grove_x, grove_y) > 12
        on_median = (label == VEGETATION) & (self._sample(self.edge, grove_x, grove_y) < 0)
        inside &= in_grove | on_median
        x, y = np.concatenate((x, grove_x[inside])), np.concatenate((y, grove_y[inside]))
        palm = np.concatenate((palm, np.ones(int(inside.sum()), np.bool_)))
        plant_trees(self.image, self.labels, x, y, palm, self.sun, rng)
