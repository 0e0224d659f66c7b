"""Protocols of a benchmark: how long its phases last, and how often it is repeated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from cdkd_edge.bench.record import Protocol
from cdkd_edge.core.errors import UsageError

DEFAULT = Protocol(
    preset="default",
    idle_seconds=10.0,
    load_seconds=60.0,
    repeats=1,
    window_seconds=5.0,
    warm_up_cap_seconds=120.0,
    min_batches=8,
)
PAPER = replace(DEFAULT, preset="paper", idle_seconds=60.0, load_seconds=120.0, repeats=3, warm_up_cap_seconds=600.0)
"""Tiles of 1024 px, one at a time, as in the Mask-CDKD paper. It does not say how long it measured; this is longer than
MLPerf Power asks for, and has an interval."""
MLPERF = replace(DEFAULT, preset="mlperf", idle_seconds=60.0, load_seconds=600.0, warm_up_cap_seconds=600.0)
"""MLPerf Inference runs last at least 600 s; power comes from the same run (MLPerf Power: 60 s at least)."""


def protocol_of(
    preset: Literal["default", "paper", "mlperf"] = "default",
    *,
    idle: float | None = None,
    load: float | None = None,
    warm_up_cap: float | None = None,
    repeats: int | None = None,
) -> Protocol:
    """A preset, with changes; what makes a preset what it is can be exceeded and not undercut.

    Raises:
        UsageError: a time or number that is none, or less than the preset asks for.
    """
    base = {"default": DEFAULT, "paper": PAPER, "mlperf": MLPERF}[preset]
    chosen = replace(
        base,
        idle_seconds=base.idle_seconds if idle is None else idle,
        load_seconds=base.load_seconds if load is None else load,
        warm_up_cap_seconds=base.warm_up_cap_seconds if warm_up_cap is None else warm_up_cap,
        repeats=base.repeats if repeats is None else repeats,
    )
    if not (chosen.idle_seconds > 0 and chosen.load_seconds > 0 and chosen.warm_up_cap_seconds >= 0):
        raise UsageError("idle and load phases last longer than 0 s, the warm-up 0 s or longer")
    if not math.isfinite(chosen.idle_seconds + chosen.load_seconds + chosen.warm_up_cap_seconds):
        raise UsageError("phases have a length in seconds, not without end")
    if chosen.repeats < 1:
        raise UsageError("at least one repeat")
    if preset != "default":
        for name, option in (("idle_seconds", "--idle"), ("load_seconds", "--duration"), ("repeats", "--repeat")):
            if getattr(chosen, name) < getattr(base, name):
                raise UsageError(f"--{preset} asks for {option} of at least {getattr(base, name):g}")
    # Three windows have to fit.
    return replace(chosen, window_seconds=min(base.window_seconds, max(chosen.warm_up_cap_seconds / 6, 0.01)))
