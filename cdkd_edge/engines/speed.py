"""Two engines, the same tile, in turn: which is faster here?"""

from __future__ import annotations

import statistics
import time

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Engine

ROUNDS = 7


def speed_ratio(engine: Engine, other: Engine, rounds: int = ROUNDS) -> float:
    """Tiles per second of an engine over those of another.

    After one run of each to warm up, both run in turn; the ratio of the medians is taken, so that a machine that
    is slow for a while is slow for both.

    Raises:
        EngineError: their tiles differ in size, or one of them fails.
    """
    if engine.tile != other.tile:
        raise EngineError(f"tiles of {engine.tile} and {other.tile} px cannot be timed against each other")
    tile = sample_tiles(engine.tile, 1)[0]
    for one in (engine, other):
        one.input(0)[:] = tile
    seconds: tuple[list[float], list[float]] = ([], [])
    for count in range(rounds + 1):
        for one, times in ((engine, seconds[0]), (other, seconds[1])):
            started = time.perf_counter()
            one.launch(0)
            one.wait(0)
            if count:
                times.append((time.perf_counter() - started) / one.batch)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])
