"""What the rounds of a comparison say: medians, ratios of the same round, an interval, and whether labels agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
MIN_ROUNDS = 6
"""With fewer rounds no pair of them encloses the median with a probability of 95 %."""

LIMITS = {"fp32": 0.999}
REDUCED_LIMIT = 0.98
"""Share of pixels that must get the FP32 network's label: the limits of ``cdkd-edge parity``, FP32 and INT8."""


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """An interval that encloses the median of what was sampled, with at least this probability.

    Between the k-th smallest and the k-th largest of n values; the number of values below the median is binomial
    (n, 1/2), so nothing is assumed of their distribution, and the few slow rounds of a busy machine do not
    widen it (Conover, Practical Nonparametric Statistics, 3rd ed., 1999, ch. 3.2). None if n is too small: below 6
    for 95 %.
    """
    n, ordered = len(values), sorted(values)
    outside, best = 0.0, None
    for k in range(1, n // 2 + 1):
        outside += 2 * math.comb(n, k - 1) / 2**n
        if 1 - outside < level:
            break
        best = (ordered[k - 1], ordered[n - k])
    return best


def ratio_of(seconds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Time over the baseline's time of the same round: median, interval or why there is none.

    Raises:
        ValueError: the two have another number of rounds.
    """
    ratios = [one / other for one, other in zip(seconds, base, strict=True)]
    interval = median_interval(ratios)
    low, high = interval or (None, None)
    reason = None if interval else f"an interval of the median takes {MIN_ROUNDS} rounds, not {len(ratios)}"
    return {"median": statistics.median(ratios), "low": low, "high": high, "reason": reason}


def agreement(labels: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float:
    """Share of the pixels with the reference's label, 0..1.

    Raises:
        ValueError: their shapes differ.
    """
    if labels.shape != reference.shape:
        raise ValueError(f"labels are {list(labels.shape)}, those of the network {list(reference.shape)}")
    return float(np.mean(labels == reference))


def verdict(share: float, precision: str, trained: bool) -> str | None:
    """Why a peer with this agreement is no peer; None if it is one.

    With random weights, classes hardly differ, and reduced precision decides many pixels otherwise; then only FP32
    is judged.
    """
    limit = LIMITS.get(precision, REDUCED_LIMIT)
    if share >= limit or (precision not in LIMITS and not trained):
        return None
    return f"computes something else: {share:.2%} of the labels are the FP32 network's, {limit:.1%} must be"


def leads(seconds: Mapping[str, Sequence[float]], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time of our fastest engine over that of the fastest peer on the same device, in FP32 and in any precision.

    Args:
        seconds: seconds per tile of each round, by peer; our engines are those called ``ours-``.
        results: ``baseline``, ``precision``, ``seconds_median`` and ``no_peer`` of each.

    Returns:
        ``precision`` (``fp32`` or ``any``), ``ours``, ``peer`` and what :func:`ratio_of` gives. No entry where one of
        the two sides has nobody.
    """
    found = []
    for baseline in dict.fromkeys(one["baseline"] for one in results.values()):
        for precision in ("fp32", "any"):
            racing = [
                key
                for key, one in results.items()
                if one["baseline"] == baseline and not one["no_peer"] and precision in (one["precision"], "any")
            ]
            racing.sort(key=lambda key: float(results[key]["seconds_median"]))
            ours = next((key for key in racing if key.startswith("ours-")), None)
            peer = next((key for key in racing if not key.startswith("ours-")), None)
            if ours and peer:
                found.append(
                    {"precision": precision, "ours": ours, "peer": peer, **ratio_of(seconds[ours], seconds[peer])}
                )
    return found


def summarise(
    seconds: Mapping[str, Sequence[float]],
    baselines: Mapping[str, str],
    memories: Mapping[str, Mapping[str, int | None]],
) -> dict[str, dict[str, Any]]:
    """Median seconds, ratios of time and memory to the baseline of every peer.

    Args:
        seconds: seconds per tile of each round, the same rounds for all.
        baselines: the peer that each is compared with.
        memories: ``peak_memory_bytes`` and ``running_memory_bytes`` of each; None is not known.
    """
    results: dict[str, dict[str, Any]] = {}
    for key, values in seconds.items():
        base = baselines[key]
        memory_ratio: float | None = None
        if base in seconds:
            time_ratio: dict[str, Any] = ratio_of(values, seconds[base])
            ours, theirs = memories[base]["peak_memory_bytes"], memories[key]["peak_memory_bytes"]
            memory_ratio = theirs / ours if ours and theirs else None
        else:
            time_ratio = {"median": None, "low": None, "high": None, "reason": f"{base} did not run"}
        results[key] = {
            "seconds_median": statistics.median(values),
            "seconds_fastest": min(values),
            "seconds": list(values),
            "baseline": base,
            "time_ratio": time_ratio,
            "memory_ratio": memory_ratio,
            **memories[key],
        }
    return results
