"""Which tiles cover an archive: some for its extremes, the rest for what is typical of it.

An INT8 range must hold the extremes, and its resolution should serve what is frequent. Farthest-point selection
(Gonzalez 1985: within a factor of two of the smallest radius possible) finds the extremes, k-means medoids what is
typical. So a part of the tiles is taken by farthest points, starting from the mean; these stay as fixed centres
while k-means++ (Arthur, Vassilvitskii 2007) and Lloyd's iteration place the others; each of those becomes the
candidate nearest to it. ``benchmarks/calibration_coverage.py`` compares the parts; docs/decisions.md has its figures.

No matrix product decides anything here: its rounding changes with the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

EXTREMES = 0.25
"""Share of the tiles that are chosen as extremes."""

_ROUNDS = 25


@dataclass(frozen=True)
class Chosen:
    """A chosen candidate."""

    index: int
    why: str
    """``extreme`` or ``typical``."""
    score: float
    """Extreme: distance from the nearest one chosen before. Typical: distance from its centre."""


def choose(
    points: Points,
    count: int,
    usable: Mask,
    seed: int,
    crowds: Callable[[int], Mask] | None = None,
    extremes: float = EXTREMES,
) -> list[Chosen]:
    """Choose candidates that cover all usable ones.

    Args:
        points: where candidates lie, ``[N, D]``.
        count: how many to choose; fewer are chosen when fewer are usable.
        usable: which may be chosen, ``[N]``.
        seed: of k-means++.
        crowds: for an index, which candidates ``[N]`` cannot be chosen once it is, itself included.
        extremes: share of the farthest points.

    Returns:
        The chosen, extremes first, each kind in the order of choice.
    """
    usable = usable.copy()
    members = np.flatnonzero(usable)
    chosen: list[Chosen] = []
    if not len(members) or count < 1:
        return chosen

    def take(index: int, why: str, score: float) -> None:
        chosen.append(Chosen(index, why, round(score, 4)))
        usable[index] = False
        if crowds is not None:
            usable[crowds(index)] = False

    # The mean is no tile; counting it as chosen keeps the first tile from being any.
    nearest = distances(points, points[members].mean(axis=0, dtype=np.float64).astype(np.float32))

    def take_farthest(wanted: int) -> None:
        nonlocal nearest
        while len(chosen) < wanted and usable.any():
            index = int(np.argmax(np.where(usable, nearest, -1.0)))
            score = float(nearest[index])
            take(index, "extreme", score)
            nearest = np.minimum(nearest, distances(points, points[index]))

    take_farthest(round(extremes * count))
    fixed = points[[tile.index for tile in chosen]]
    centres = means(points[members], fixed, count - len(chosen), seed)
    sizes = np.bincount(nearest_of(points[members], np.concatenate([fixed, centres])), minlength=count)[len(fixed) :]
    for position in np.argsort(-sizes[: len(centres)], kind="stable"):
        if not usable.any():
            break
        distance = np.where(usable, distances(points, centres[position]), np.inf)
        index = int(np.argmin(distance))
        take(index, "typical", float(distance[index]))
    for tile in chosen:
        nearest = np.minimum(nearest, distances(points, points[tile.index]))
    take_farthest(count)
    return chosen


def means(points: Points, fixed: Points, count: int, seed: int) -> Points:
    """k-means beside centres that stay: ``count`` moving centres, seeded by k-means++.

    Args:
        points: ``[N, D]``.
        fixed: centres that stay, ``[F, D]``.
        count: moving centres; no more than there are different points.
        seed: of the seeding.

    Returns:
        The moving centres ``[count, D]``, or fewer.
    """
    generator = np.random.default_rng(seed)
    nearest = np.full(len(points), np.inf)
    for centre in fixed:
        nearest = np.minimum(nearest, distances(points, centre))
    seeds: list[Points] = []
    while len(seeds) < count:
        weights = np.square(nearest) if len(fixed) + len(seeds) else np.ones(len(points))
        total = np.cumsum(weights)
        if not total[-1] > 0:
            break
        index = min(int(np.searchsorted(total, generator.random() * total[-1], side="right")), len(points) - 1)
        seeds.append(points[index])
        nearest = np.minimum(nearest, distances(points, points[index]))
    centres = np.array(seeds, np.float32).reshape(-1, points.shape[1])
    before = None
    for _ in range(_ROUNDS):
        assigned = nearest_of(points, np.concatenate([fixed, centres]))
        if before is not None and (assigned == before).all():
            break
        before = assigned
        for index in range(len(centres)):
            own = points[assigned == len(fixed) + index]
            if len(own):
                centres[index] = own.mean(axis=0, dtype=np.float64)
    return centres


def distances(points: Points, centre: Points) -> npt.NDArray[np.float64]:
    """Euclidean distance of each point ``[N, D]`` from ``centre`` ``[D]``."""
    squares: npt.NDArray[np.float64] = np.square((points - centre).astype(np.float64)).sum(axis=1)
    return np.sqrt(squares)


def nearest_of(points: Points, centres: Points) -> npt.NDArray[np.intp]:
    """For each point the nearest centre, the first of equals, ``[N]``."""
    best = np.full(len(points), np.inf)
    index = np.zeros(len(points), np.intp)
    for position, centre in enumerate(centres):
        distance = distances(points, centre)
        closer = distance < best
        best[closer] = distance[closer]
        index[closer] = position
    return index


def radius(points: Points, centres: Points) -> tuple[float, float]:
    """How well centres cover points: the largest and the mean distance of a point from its nearest centre."""
    nearest = np.full(len(points), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, distances(points, centre))
    return float(nearest.max()), float(nearest.mean())
