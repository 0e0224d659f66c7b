"""Gates for CI: is a run slower, or does it need more energy, than is allowed?

An interval decides three ways. If it excludes the limit, the run passes. If it excludes 1, a loss is shown, and the run
fails where the measured loss is larger than allowed. An interval that holds both 1 and the limit decides nothing: noise
must not fail a build, nor let one pass unnoticed, so that has a word of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cdkd_edge.benchmarks.comparison.ratio import Ratio
from cdkd_edge.errors import CompareError

_ROUNDING = 1e-9
"""A loss of exactly the limit passes, whatever the last bit says."""


@dataclass(frozen=True)
class Limits:
    """Largest loss that is allowed, relative to the baseline, 0..1; None: any."""

    slower: float | None = None
    """Of speed."""
    hungrier: float | None = None
    """Of gross energy per tile (or megapixel): how much more."""


@dataclass(frozen=True)
class Gate:
    """What a limit says of a run."""

    run: str
    quantity: Literal["speed", "energy"]
    limit: float
    """Loss that is allowed, 0..1."""
    outcome: Literal["pass", "fail", "cannot tell"]
    text: str


def judge(run: str, quantity: Literal["speed", "energy"], limit: float, ratio: Ratio) -> Gate:
    """Hold a ratio against a limit.

    Raises:
        CompareError: without an interval nothing can ever be decided.
    """
    if ratio.interval is None:
        raise CompareError(
            f"{run}: the {quantity} cannot be held against a limit: {ratio.basis}",
            hint="measure both runs with --repeat 3 or more",
        )
    low, high = ratio.interval.low, ratio.interval.high
    if quantity == "speed":
        loss, least, most, word = 1 - ratio.value, 1 - high, 1 - low, "slower"
    else:
        loss, least, most, word = ratio.value - 1, low - 1, high - 1, "hungrier"
    allowed = f"{100 * limit:.3g} %"
    outcome: Literal["pass", "fail", "cannot tell"]
    if most <= limit + _ROUNDING:
        outcome, said = "pass", f"more than {allowed} {word} is excluded"
    elif least > 0 and loss > limit + _ROUNDING:
        outcome, said = "fail", f"{100 * loss:.2g} % {word}, more than {allowed}"
    elif least > 0:
        outcome, said = "pass", f"{100 * loss:.2g} % {word}, not more than {allowed}"
    else:
        outcome, said = "cannot tell", f"{allowed} {word} is neither shown nor excluded; measure with more --repeat"
    text = f"{run}: {quantity} x {ratio.value:.4g} ({low:.4g} .. {high:.4g}): {said}"
    return Gate(run, quantity, limit, outcome, text)


def require_kept(gates: Sequence[Gate], *, strict: bool = False) -> None:
    """Make sure that no limit was passed; with ``strict``, that each was shown to be kept.

    Raises:
        CompareError: one was not.
    """
    failed = [gate.text for gate in gates if gate.outcome == "fail" or (strict and gate.outcome == "cannot tell")]
    if failed:
        raise CompareError("; ".join(failed))
