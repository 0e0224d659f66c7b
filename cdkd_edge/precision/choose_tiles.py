"""Chooses tiles that cover an archive: a share of extreme ones, the others typical ones.

An INT8 range must hold the extremes, and its resolution should serve what is frequent. Farthest-point selection
(Gonzalez 1985: within a factor of two of the smallest radius possible) finds the extremes, k-means medoids what is
typical. So part of the tiles is chosen by farthest points, starting from the mean; they stay as fixed centres while
k-means++ (Arthur, Vassilvitskii 2007) and Lloyd's iteration place the others, and each of those becomes the candidate
nearest to it. ``benchmarks/calibration_coverage.py`` compares other parts; docs/decisions.md has the figures.

Matrix products are avoided: their rounding changes with the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.precision.describe_tiles import FEATURES, standardise
from cdkd_edge.precision.scan_scenes import Candidates, LabelMaps

Points = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Crowds = Callable[[int], Mask]  # from a candidate to those near it, itself included

EXTREMES = 0.25  # share of the tiles that are chosen as extremes
MAX_KINDS = 8  # kinds of imagery that the contact sheet tells apart
_CROWDED = 0.5  # two calibration tiles of one scene share at most this part of their pixels
_ROUNDS = 25
_RANDOM_CHOICES = 5


@dataclass(frozen=True)
class ChosenTile:
    """A candidate that becomes a tile of the set."""

    index: int
    why: str  # ``extreme`` or ``typical``
    score: float  # extreme: distance from the nearest one chosen before. Typical: distance from its centre.
    kind: int = 0  # kind of imagery, 0 is the most frequent
    represents: int = 0  # candidates that are nearer to it than to any other tile of its role
    stratum: str | None = None  # the class that it was chosen for


@dataclass(frozen=True)
class Choice:
    """All tiles of a set. Those of a role are in order of kind, the most frequent first."""

    calibration: tuple[ChosenTile, ...]
    check: tuple[ChosenTile, ...]
    kind_shares: tuple[float, ...]  # share of the candidates that are of each kind
    method: dict[str, Any]
    notes: tuple[str, ...]


def choose_tiles(
    candidates: Candidates, count: int, check: int, seed: int, label_maps: LabelMaps | None = None
) -> Choice:
    """Choose tiles for calibration, then tiles to check on that share no pixel with them.

    If there are fewer candidates than tiles, both roles get their share of them.
    """
    points = standardise(candidates.features)
    strata_of = np.full(len(candidates), -1) if candidates.labels is None else strata(candidates.labels)
    available, notes = len(candidates), []
    wanted, wanted_check = count, check
    if available < count + check:
        wanted_check = available * check // (count + check)
        wanted = available - wanted_check
        asked = f"{count} tiles for calibration and {check} to check on were asked for"
        notes.append(f"there are {available} candidates; {asked}")
    crowds, touches = _neighbours(candidates, _CROWDED), _neighbours(candidates, 0.0)
    free = np.ones(available, bool)
    calibration = _stratified(points, wanted, free, seed, crowds, strata_of)
    for tile in calibration:
        free &= ~touches(tile.index)
    checks = _stratified(points, wanted_check, free, seed, touches, strata_of)
    if len(calibration) < count:
        notes.append(
            f"tiles for calibration: {len(calibration)} instead of {count}; "
            "the other candidates overlap these, or are kept to check on"
        )
    if len(checks) < check:
        notes.append(
            f"tiles to check on: {len(checks)} instead of {check}; the other candidates overlap tiles for calibration "
            "(ask for fewer of those, or give more scenes)"
        )
    kinds, shares = _kinds(points, min(MAX_KINDS, len(calibration)), seed)

    def stratum(index: int) -> str | None:
        label = int(strata_of[index])
        return None if label_maps is None else "unlabelled" if label < 0 else label_maps.name(label)

    def described(chosen: list[ChosenTile]) -> tuple[ChosenTile, ...]:
        nearest, _ = nearest_of(points, points[[tile.index for tile in chosen]])
        tiles = [
            replace(
                tile, kind=int(kinds[tile.index]), represents=int((nearest == at).sum()), stratum=stratum(tile.index)
            )
            for at, tile in enumerate(chosen)
        ]
        return tuple(sorted(tiles, key=lambda tile: (tile.kind, -tile.represents, tile.index)))

    reflected = sum(bool((candidates.place[tile.index] < 0).any()) for tile in (*calibration, *checks))
    if reflected:
        notes.append(f"tiles larger than their scenes, completed by reflection as `segment` does: {reflected}")
    method = _method(points, [tile.index for tile in calibration], seed, stratified=candidates.labels is not None)
    return Choice(described(calibration), described(checks), shares, method, tuple(notes))


def strata(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """The class ``[N]`` that each tile is chosen for (-1: none), from pixels per tile and label, ``[N, 255]``.

    It is the one whose share in the tile is largest, compared with the whole archive: rare classes (roads, water in a
    desert) prevail in no tile, but some tile is always richest in them.
    """
    total = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(total, 1)
    mean = share.sum(axis=0) / max(1, np.count_nonzero(total))
    richest = np.argmax(share / np.where(mean > 0, mean, 1), axis=1)
    return np.where(total[:, 0] > 0, richest, -1)


def _stratified(
    points: Points, count: int, usable: Mask, seed: int, crowds: Crowds, strata_of: npt.NDArray[np.intp]
) -> list[ChosenTile]:
    """Choose as many tiles in each stratum; strata that have fewer leave theirs to the others, rarest first.

    Tiles without labels are no class: they get their share of all tiles.
    """
    usable = usable.copy()
    members = {int(label): int((usable & (strata_of == label)).sum()) for label in np.unique(strata_of[usable])}
    by_size = sorted(members, key=lambda label: (label >= 0, members[label], label))
    chosen: list[ChosenTile] = []
    for position, label in enumerate(by_size):
        part = -(-(count - len(chosen)) // (len(by_size) - position))
        if label < 0 and len(members) > 1:
            part = max(1, round(count * members[label] / sum(members.values())))
        new = choose(points, part, usable & (strata_of == label), seed, crowds)
        chosen += new
        for tile in new:
            usable &= ~crowds(tile.index)
    return chosen


def _neighbours(candidates: Candidates, share: float) -> Crowds:
    """A function from a candidate to those, itself included, that share more than ``share`` of their pixels with it."""
    x, y = candidates.place.astype(np.int64).T
    side = candidates.scenes[0].tile

    def neighbours(index: int) -> Mask:
        across = np.maximum(side - np.abs(x - x[index]), 0)
        down = np.maximum(side - np.abs(y - y[index]), 0)
        return np.asarray((candidates.scene == candidates.scene[index]) & (across * down > share * side * side))

    return neighbours


def _kinds(points: Points, count: int, seed: int) -> tuple[npt.NDArray[np.intp], tuple[float, ...]]:
    """Divide candidates roughly into kinds of imagery, most frequent first: kind per candidate, share per kind."""
    assigned, _ = nearest_of(points, k_means(points, points[:0], count, seed))
    sizes = np.bincount(assigned, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty(count, np.intp)
    rank[order] = np.arange(count)
    return rank[assigned], tuple(round(float(size) / len(points), 4) for size in sizes[order])


def _method(points: Points, chosen: list[int], seed: int, *, stratified: bool) -> dict[str, Any]:
    """How tiles were chosen, and how well they cover the candidates, compared with random choices."""
    generator = np.random.default_rng(seed)
    draws = [generator.choice(len(points), len(chosen), replace=False) for _ in range(_RANDOM_CHOICES)]
    largest, mean = coverage_radius(points, points[chosen])
    random_largest, random_mean = np.median([coverage_radius(points, points[draw]) for draw in draws], axis=0)
    return {
        "descriptor": f"opponent colour and Haar texture, {FEATURES} numbers",
        "selection": f"farthest points ({EXTREMES:.0%}), k-means medoids",
        "stratified_by_class": stratified,
        "coverage": {
            "largest_distance": round(largest, 4),
            "mean_distance": round(mean, 4),
            "random_largest_distance": round(float(random_largest), 4),
            "random_mean_distance": round(float(random_mean), 4),
        },
    }


def choose(
    points: Points, count: int, usable: Mask, seed: int, crowds: Crowds | None = None, extremes: float = EXTREMES
) -> list[ChosenTile]:
    """Choose candidates that cover all usable ones (see the module): extremes, then typical ones.

    Args:
        points: where candidates lie, ``[N, D]``.
        count: how many to choose; fewer are chosen when fewer are usable.
        usable: which may be chosen, ``[N]``.
        seed: of k-means++.
        crowds: the candidates that a chosen one rules out.
        extremes: share that is chosen by farthest points.
    """
    usable = usable.copy()
    members = np.flatnonzero(usable)
    chosen: list[ChosenTile] = []
    if not len(members) or count < 1:
        return chosen

    def take(index: int, why: str, score: float) -> None:
        chosen.append(ChosenTile(index, why, round(score, 4)))
        usable[index] = False
        if crowds is not None:
            usable[crowds(index)] = False

    # Seed the distances from the mean, so that the first choice is an outlier and not arbitrary.
    nearest = distances(points, points[members].mean(axis=0, dtype=np.float64).astype(np.float32))

    def take_farthest(wanted: int) -> None:
        nonlocal nearest
        while len(chosen) < wanted and usable.any():
            index = int(np.argmax(np.where(usable, nearest, -1.0)))
            take(index, "extreme", float(nearest[index]))
            nearest = np.minimum(nearest, distances(points, points[index]))

    take_farthest(round(extremes * count))
    fixed = points[[tile.index for tile in chosen]]
    centres = k_means(points[members], fixed, count - len(chosen), seed)
    assigned, _ = nearest_of(points[members], np.concatenate([fixed, centres]))
    sizes = np.bincount(assigned, minlength=len(fixed) + len(centres))[len(fixed) :]
    for position in np.argsort(-sizes, kind="stable"):
        if not usable.any():
            break
        distance = np.where(usable, distances(points, centres[position]), np.inf)
        index = int(np.argmin(distance))
        take(index, "typical", float(distance[index]))
    nearest = np.minimum(nearest, nearest_of(points, points[[tile.index for tile in chosen]])[1])
    take_farthest(count)
    return chosen


def k_means(points: Points, fixed: Points, count: int, seed: int) -> Points:
    """k-means of points ``[N, D]`` with some fixed centres ``[F, D]``, seeded by k-means++.

    Returns:
        The moving centres ``[count, D]``, fewer if there are fewer different points.
    """
    generator = np.random.default_rng(seed)
    _, nearest = nearest_of(points, fixed)
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
        assigned, _ = nearest_of(points, np.concatenate([fixed, centres]))
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


def nearest_of(points: Points, centres: Points) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """For each point the nearest centre, the first of equals, ``[N]``, and its distance (infinite without centres)."""
    best = np.full(len(points), np.inf)
    index = np.zeros(len(points), np.intp)
    for position, centre in enumerate(centres):
        distance = distances(points, centre)
        closer = distance < best
        best[closer] = distance[closer]
        index[closer] = position
    return index, best


def coverage_radius(points: Points, centres: Points) -> tuple[float, float]:
    """The largest and the mean distance of a point from its nearest centre."""
    _, nearest = nearest_of(points, centres)
    return float(nearest.max()), float(nearest.mean())
