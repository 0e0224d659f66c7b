"""Which candidates become tiles for calibration and for checking, and what each stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.precision.calibration.candidates import Candidates
from cdkd_edge.precision.calibration.choose import EXTREMES, Chosen, choose, means, nearest_of, radius
from cdkd_edge.precision.calibration.classes import LabelMaps, strata
from cdkd_edge.precision.calibration.describe import FEATURES, standardised
from cdkd_edge.precision.calibration.sheet import KINDS

Mask = npt.NDArray[np.bool_]

CROWDED = 0.5
"""Two tiles of one scene that share more than this part of their pixels are not both chosen."""

_RANDOM_CHOICES = 5


@dataclass(frozen=True)
class Picked:
    """A chosen candidate and what it stands for."""

    index: int
    why: str
    score: float
    kind: int
    represents: int
    stratum: str | None


@dataclass(frozen=True)
class Pick:
    """All tiles of a set. Each role is in order of kind, the most frequent first."""

    calibration: tuple[Picked, ...]
    check: tuple[Picked, ...]
    kind_shares: tuple[float, ...]
    """Of the candidates."""
    method: dict[str, Any]
    notes: tuple[str, ...]


def pick_tiles(candidates: Candidates, count: int, check: int, seed: int, label_maps: LabelMaps | None = None) -> Pick:
    """Choose tiles for calibration, and from what is left, sharing no pixel with those, tiles for checking.

    Where there are fewer candidates than asked for, both roles get their part of them.
    """
    points = standardised(candidates.features)
    strata_of = np.full(len(candidates), -1) if candidates.labels is None else strata(candidates.labels)
    wanted, wanted_check, notes = _shares(len(candidates), count, check)
    crowds = _neighbours(candidates, CROWDED)
    touches = _neighbours(candidates, 0.0)
    everything = np.ones(len(candidates), bool)
    calibration = _stratified(points, wanted, everything, seed, crowds, strata_of)
    free = everything.copy()
    for tile in calibration:
        free &= ~touches(tile.index)
    checks = _stratified(points, wanted_check, free, seed, touches, strata_of)
    if len(calibration) < count:
        notes.append(
            f"tiles for calibration: {len(calibration)} instead of {count}; "
            "the others overlap those, or are kept to check on"
        )
    if len(checks) < check:
        notes.append(
            f"tiles to check on: {len(checks)} instead of {check}; no more are clear of those for calibration "
            "(fewer of those, or more scenes, leave room)"
        )
    kinds, shares = _kinds(points, min(KINDS, len(calibration)), seed)
    names = _names(label_maps)

    def described(chosen: list[Chosen]) -> tuple[Picked, ...]:
        indices = [tile.index for tile in chosen]
        represents = np.bincount(nearest_of(points, points[indices]), minlength=len(chosen))[: len(chosen)]
        picked = [
            Picked(
                tile.index, tile.why, tile.score, int(kinds[tile.index]), int(stands), names(int(strata_of[tile.index]))
            )
            for tile, stands in zip(chosen, represents, strict=True)
        ]
        return tuple(sorted(picked, key=lambda tile: (tile.kind, -tile.represents, tile.index)))

    reflected = sum(bool((candidates.place[tile.index] < 0).any()) for tile in (*calibration, *checks))
    if reflected:
        notes.append(f"tiles larger than their scenes, completed by reflection as `segment` does: {reflected}")
    method = _method(points, [tile.index for tile in calibration], seed, stratified=candidates.labels is not None)
    return Pick(described(calibration), described(checks), shares, method, tuple(notes))


def _shares(available: int, count: int, check: int) -> tuple[int, int, list[str]]:
    """Tiles of each role, fewer than asked for where there are not enough."""
    if available >= count + check:
        return count, check, []
    checks = available * check // (count + check)
    note = f"there are {available} candidates; {count} tiles for calibration and {check} to check on were asked for"
    return available - checks, checks, [note]


def _stratified(
    points: npt.NDArray[np.float32],
    count: int,
    usable: Mask,
    seed: int,
    crowds: Callable[[int], Mask],
    strata_of: npt.NDArray[np.intp],
) -> list[Chosen]:
    """Choose in each stratum as many as in the others; strata with few give their part to the others, rarest first.

    What has no label is no class: it gets the part that it is of all.
    """
    usable = usable.copy()
    members = {int(label): int((usable & (strata_of == label)).sum()) for label in np.unique(strata_of[usable])}
    by_size = sorted(members, key=lambda label: (label >= 0, members[label], label))
    chosen: list[Chosen] = []
    for position, label in enumerate(by_size):
        part = -(-(count - len(chosen)) // (len(by_size) - position))
        if label < 0 and len(members) > 1:
            part = max(1, round(count * members[label] / sum(members.values())))
        new = choose(points, part, usable & (strata_of == label), seed, crowds)
        chosen += new
        for tile in new:
            usable &= ~crowds(tile.index)
    return chosen


def _neighbours(candidates: Candidates, share: float) -> Callable[[int], Mask]:
    """For a candidate: which, itself included, share more than ``share`` of their pixels with it."""
    x, y = candidates.place.astype(np.int64).T
    side = candidates.sources[0].tile

    def of(index: int) -> Mask:
        across = np.maximum(side - np.abs(x - x[index]), 0)
        down = np.maximum(side - np.abs(y - y[index]), 0)
        return np.asarray((candidates.scene == candidates.scene[index]) & (across * down > share * side * side))

    return of


def _kinds(points: npt.NDArray[np.float32], count: int, seed: int) -> tuple[npt.NDArray[np.intp], tuple[float, ...]]:
    """A rough division of all candidates, the most frequent kind first: kind per candidate and share per kind."""
    nothing = np.empty((0, points.shape[1]), np.float32)
    assigned = nearest_of(points, means(points, nothing, count, seed))
    sizes = np.bincount(assigned, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty(count, np.intp)
    rank[order] = np.arange(count)
    return rank[assigned], tuple(round(float(size) / len(points), 4) for size in sizes[order])


def _names(label_maps: LabelMaps | None) -> Callable[[int], str | None]:
    if label_maps is None:
        return lambda label: None
    return lambda label: "unlabelled" if label < 0 else label_maps.name(label)


def _method(points: npt.NDArray[np.float32], chosen: list[int], seed: int, *, stratified: bool) -> dict[str, Any]:
    """How tiles were chosen, and how well they cover, beside random choices of as many."""
    largest, mean = radius(points, points[chosen])
    generator = np.random.default_rng(seed)
    draws = [
        radius(points, points[generator.choice(len(points), len(chosen), replace=False)])
        for _ in range(_RANDOM_CHOICES)
    ]
    random_largest, random_mean = np.median(draws, axis=0)
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
