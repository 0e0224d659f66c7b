"""Houses, cars and trees of a drawn scene: where they stand and what they look like."""

from __future__ import annotations

import numpy as np

from cdkd_edge.scenery import objects
from cdkd_edge.scenery.ground import LAND, ROAD, VEGETATION, Picture
from cdkd_edge.scenery.objects import House
from cdkd_edge.scenery.plan import FLATS, GROVE, HALLS, SITE, VILLAS, FloatArray, Plan

_ROOFS = np.array(
    [
        (232, 229, 224),
        (218, 205, 183),
        (160, 158, 158),
        (110, 108, 110),
        (158, 98, 76),
        (124, 132, 150),
        (186, 168, 146),
    ],
    np.float32,
)
# Odds of those colours, the side of a lot in pixels, the share of it that is built on, the odds that it is.
_ROOF_ODDS = {
    VILLAS: (0.30, 0.22, 0.08, 0.04, 0.20, 0.06, 0.10),
    FLATS: (0.30, 0.22, 0.18, 0.08, 0.04, 0.06, 0.12),
    HALLS: (0.40, 0.06, 0.22, 0.12, 0.00, 0.16, 0.04),
    SITE: (0.10, 0.10, 0.50, 0.20, 0.00, 0.00, 0.10),
}
_LOT = {VILLAS: 42.0, FLATS: 72.0, HALLS: 120.0, SITE: 90.0}
_BUILT_SHARE = {VILLAS: (0.55, 0.8), FLATS: (0.55, 0.82), HALLS: (0.6, 0.88), SITE: (0.3, 0.6)}
_BUILT_ODDS = {VILLAS: 0.93, FLATS: 0.9, HALLS: 0.9, SITE: 0.3}
_TREE_ODDS = np.array((0.16, 0.07, 0.02, 0.0, 0.25, 0.0, 0.006, 0.0), np.float32)


def build_town(plan: Plan, picture: Picture, rng: np.random.Generator) -> None:
    """Put houses, cars and trees on the ground, in place, the low before the high."""
    houses = _place_houses(plan, rng)
    shade = np.ones((plan.height, plan.width), np.float32)
    for house in houses:
        objects.cast_shadow(shade, house, plan.sun)
    _park_cars(plan, picture, rng)
    picture.image[...] *= shade[..., None]
    for house in houses:
        objects.raise_roof(picture.image, picture.labels, house, plan.sun, rng)
    _plant_trees(plan, picture, rng)


def _place_houses(plan: Plan, rng: np.random.Generator) -> list[House]:
    """One house on most lots of every built-up block that is not too near to the water."""
    streets_u, streets_v = plan.across_u.streets, plan.across_v.streets
    lots: list[tuple[float, float, float, float, int]] = []  # u, v, half sides along u and v, use
    for i in range(1, len(streets_u.at)):
        for j in range(1, len(streets_v.at)):
            use = int(plan.uses[i, j])
            if use not in _LOT:
                continue
            # Flats and halls leave room for the car parks behind the u streets.
            left = streets_u.room(i)[0] + (28.0 if use in (FLATS, HALLS) else 0.0)
            right, (top, bottom) = streets_u.room(i)[1], streets_v.room(j)
            count_u = max(round((right - left) / _LOT[use]), 1)
            count_v = max(round((bottom - top) / _LOT[use]), 1)
            half_u, half_v = (right - left) / count_u / 2, (bottom - top) / count_v / 2
            for k in range(count_u):
                for m in range(count_v):
                    lots.append((left + (2 * k + 1) * half_u, top + (2 * m + 1) * half_v, half_u, half_v, use))
    if not lots:
        return []
    u, v, room_u, room_v, uses = np.array(lots, np.float32).T
    x, y = plan.to_pixels(u, v)
    angle = plan.heading(u, v, x, y)
    fits = plan.near(x, y, 150) & (plan.sample(plan.shore, x, y) > 84 + np.maximum(room_u, room_v))
    houses = []
    for n in np.nonzero(fits)[0]:
        use = int(uses[n])
        if rng.random() < _BUILT_ODDS[use]:
            place = float(x[n]), float(y[n]), float(angle[n])
            houses.append(_design(*place, float(room_u[n]), float(room_v[n]), use, rng))
    return houses


def _design(
    x: float, y: float, angle: float, half_u: float, half_v: float, use: int, rng: np.random.Generator
) -> House:
    """A house that suits the use of its block and fits its lot."""
    color = _ROOFS[rng.choice(len(_ROOFS), p=_ROOF_ODDS[use])] * np.float32(rng.uniform(0.86, 1.08))
    length, depth = half_u * rng.uniform(*_BUILT_SHARE[use]), half_v * rng.uniform(*_BUILT_SHARE[use])
    outline, height, pitched, chance = objects.PLAIN, rng.uniform(7, 12), False, rng.random()
    if use == VILLAS:
        outline = objects.ANGLED if chance < 0.4 else objects.PLAIN
        pitched = chance > 0.65
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
    elif use == FLATS and chance > 0.8:  # a tower
        length = depth = 0.5 * min(half_u, half_v)
        height = rng.uniform(45, 80)
    elif use == FLATS:
        outline = (objects.ANGLED, objects.COURT, objects.PLAIN)[int(chance * 3 / 0.8) % 3]
        height = rng.uniform(16, 28)
    elif chance > 0.85:  # a tank
        outline, length, depth = objects.ROUND, 0.6 * min(length, depth), 0.6 * min(length, depth)
    quarter = int(rng.integers(2))  # which way the open corner of an L looks
    return House(x, y, angle + np.pi * quarter, length, depth, height, outline, pitched, color)


def _park_cars(plan: Plan, picture: Picture, rng: np.random.Generator) -> None:
    """Cars in the lanes of main roads, at the kerbs of streets and in rows on car parks."""
    spots_u, spots_v, turned, parked = [], [], [], []
    for axis, other, along_u in ((plan.across_u, plan.across_v, False), (plan.across_v, plan.across_u, True)):
        start, stop = float(other.streets.at[0]), float(other.streets.at[-1])
        for at, half, main in zip(axis.streets.at, axis.streets.half, axis.streets.main, strict=True):
            run = rng.uniform(start, stop, int((stop - start) / (45 if main else 60)))
            lanes = np.array((8.2, 15.8) if main else (half - 3.0,)) * rng.choice((-1, 1), (run.size, 1))
            side = at + rng.permuted(lanes, axis=1)[:, 0]
            rows = [(run, side, np.pi / 2, False)]
            if not along_u:  # two rows on a car park, noses to the street
                bays = np.arange(start, stop, 6.0)
                for distance in (13.5, 29.0):
                    taken = bays[rng.random(bays.size) < 0.6]
                    rows.append((taken, np.full(taken.size, at + half + distance), 0.0, True))
            for run, side, turn, in_bay in rows:
                spots_u.append(run if along_u else side)
                spots_v.append(side if along_u else run)
                turned.append(np.full(run.size, 0.0 if along_u else turn))
                parked.append(np.full(run.size, in_bay))
    u, v = np.concatenate(spots_u).astype(np.float32), np.concatenate(spots_v).astype(np.float32)
    x, y = plan.to_pixels(u, v)
    edge, road = plan.sample(plan.edge, x, y), plan.sample(picture.labels, x, y) == ROAD
    kept = plan.near(x, y, 8) & road & np.where(np.concatenate(parked), edge > 8, edge < -1)
    x, y, angle = x[kept], y[kept], plan.heading(u[kept], v[kept], x[kept], y[kept])
    objects.park_cars(picture.image, x, y, angle + np.concatenate(turned)[kept].astype(np.float32), rng)


def _plant_trees(plan: Plan, picture: Picture, rng: np.random.Generator) -> None:
    """Crowns here and there in parks and gardens; palms in rows on medians and in groves."""
    count = max(plan.width * plan.height // 150, 1)
    x = rng.uniform(0, plan.width, count).astype(np.float32)
    y = rng.uniform(0, plan.height, count).astype(np.float32)
    ground, edge = plan.sample(picture.labels, x, y), plan.sample(plan.edge, x, y)
    odds = _TREE_ODDS[plan.sample(plan.use, x, y)] * np.where(ground == VEGETATION, 1.5, 1.0)
    odds *= ((ground == LAND) | (ground == VEGETATION)) & (edge > 7) & (plan.sample(plan.shore, x, y) > 16)
    chosen = rng.random(count) < odds
    x, y = x[chosen], y[chosen]

    row_x, row_y = plan.to_pixels(*_palm_rows(plan, rng))
    ground, edge = plan.sample(picture.labels, row_x, row_y), plan.sample(plan.edge, row_x, row_y)
    grove = (plan.sample(plan.use, row_x, row_y) == GROVE) & (ground == LAND) & (edge > 12)
    kept = plan.near(row_x, row_y, 6) & (grove | ((ground == VEGETATION) & (edge < 0)))
    row_x, row_y = row_x[kept], row_y[kept]

    palm = np.concatenate((rng.random(x.size) < 0.35, np.ones(row_x.size, np.bool_)))
    x, y = np.concatenate((x, row_x)), np.concatenate((y, row_y))
    objects.plant_trees(picture.image, picture.labels, x, y, palm, plan.sun, rng)


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
