"""What labels tiles: the base class of networks, graphs and engines, so that callers need not know which one runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import EngineError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.core.manifest import (
    CONFIDENCE,
    LABELS,
    PERCENT,
    PROBABILITIES,
    PROBABILITY_ONE,
    EngineManifest,
    FileRecord,
    GraphManifest,
    missing_output,
)
from cdkd_edge.core.sample import sample_tiles

if TYPE_CHECKING:
    from typing_extensions import Self

UInt8Array = npt.NDArray[np.uint8]
Note = Callable[[str], None]  # called with what is being done
Log = Callable[[str, str], None]
"""Called with a severity (``error``, ``warning``, ``info``, ``verbose``) and a text, perhaps from other threads."""
SPEED_ROUNDS = 7  # timed runs of each engine in :func:`speed_ratio`
PROFILE_WARM_UP = 2  # runs with a profiler before those that count: the first one allocates


@dataclass(frozen=True)
class TimedKernel:
    """What one kernel of an engine took."""

    name: str  # as the runtime calls it
    nodes: tuple[str, ...]  # names of nodes of the graph that it computes, as far as the runtime tells
    seconds: float  # for one batch, an average of the runs


@dataclass(frozen=True)
class KernelTimes:
    """What the kernels of an engine took in runs with the runtime's profiler."""

    kernels: tuple[TimedKernel, ...]  # in the order of computation
    profiled_seconds: float  # for a whole run, from launch to outputs
    plain_seconds: float  # for one without a profiler; they were made in turn
    runs: int
    average: str  # of the runs: ``median``, or ``mean`` where the runtime tells no more


class Labeller:
    """Takes batches of N uint8 tiles of T x T px and gives uint8 labels, some also confidence or probabilities.

    A slot holds one batch: write tiles to ``input(slot)``, call ``launch(slot)`` and ``wait(slot)``, read
    ``output(slot)``. Buffers are allocated once; several slots let reading, computing and writing overlap.
    One thread launches and waits; other threads may fill inputs and read outputs of other slots.
    A subclass gives ``input``, ``launch``, ``wait``, and ``named_output`` or, for labels alone, ``output``.
    """

    slots: int  # batches that can be under way
    tile: int  # side of a tile, T px
    batch: int  # tiles per run, N
    schema: LabelSchema  # what the labels mean
    artefact: FileRecord  # the file that gives the labels
    output_kind: str = LABELS  # one of :data:`cdkd_edge.core.manifest.OUTPUT_KINDS`
    warning: str | None = None  # why it may be slower here than it could be

    def input(self, slot: int) -> UInt8Array:
        """The slot's tiles, ``[N, 3, T, T]`` RGB, to be written in place."""
        raise NotImplementedError

    def launch(self, slot: int) -> None:
        """Start computing the slot; may return before it is done. Raises an EngineError if the engine fails."""
        raise NotImplementedError

    def wait(self, slot: int) -> None:
        """Wait until the slot's outputs are there. Raises an EngineError if the engine fails."""
        raise NotImplementedError

    def named_output(self, slot: int, name: str) -> UInt8Array:
        """An output of the slot that the labeller has: ``labels``, ``confidence`` or ``probabilities``."""
        raise NotImplementedError

    def output(self, slot: int) -> UInt8Array:
        """The slot's labels, ``[N, T, T]``; 255 everywhere unless the last run of the slot succeeded."""
        return self.named_output(slot, LABELS)

    def confidence(self, slot: int) -> UInt8Array:
        """Probability of the slot's labels in per cent, ``[N, T, T]``; 0 where the label is 255.

        Computed at every call if the kind is ``probabilities``.

        Raises:
            EngineError: the labeller does not give it.
        """
        if self.output_kind == PROBABILITIES:
            return confidence_of(self.named_output(slot, PROBABILITIES))
        return self._extra(slot, CONFIDENCE)

    def probabilities(self, slot: int) -> UInt8Array:
        """255 times the probability of each class, ``[N, K, T, T]``; 0 where the label is 255.

        Raises:
            EngineError: the labeller does not give them.
        """
        return self._extra(slot, PROBABILITIES)

    def _extra(self, slot: int, name: str) -> UInt8Array:
        if self.output_kind != name:
            raise missing_output(self.output_kind, name, self.artefact.file)
        return self.named_output(slot, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the network or engine, and its buffers."""


class ArtefactLabeller(Labeller):
    """A labeller that runs a graph or an engine."""

    def __init__(self, manifest: GraphManifest | EngineManifest) -> None:
        self.tile, self.batch = manifest.tile, manifest.batch
        self.schema, self.artefact, self.output_kind = manifest.schema, manifest.artefact, manifest.output


def confidence_of(probabilities: UInt8Array) -> UInt8Array:
    """Confidence ``[N, T, T]`` in per cent from probabilities ``[N, K, T, T]``.

    Within one per cent of what a graph of kind ``confidence`` gives, which rounds once.
    """
    largest = probabilities.max(axis=1).astype(np.uint16)
    # In integers, because a float image would take four times the memory. No value lies halfway between two.
    return np.asarray((largest * (2 * PERCENT) + PROBABILITY_ONE) // (2 * PROBABILITY_ONE), np.uint8)


def blank_value(name: str) -> int:
    """The value of an output where nothing was computed."""
    return NO_LABEL if name == LABELS else 0


class Engine(Labeller):
    """A labeller built for a machine."""

    manifest: EngineManifest

    def kernel_times(self, runs: int) -> KernelTimes:
        """Time every kernel in ``runs`` runs of the tiles in slot 0, with the runtime's profiler.

        They run in a copy of the engine, or in another context of it, in turn with plain runs of slot 0. So nothing
        that is measured later is slower.

        Raises:
            EngineError: the engine fails, or the profiler tells no times.
        """
        raise NotImplementedError


def segment_tiles(engine: Labeller, tiles: UInt8Array) -> UInt8Array:
    """Labels ``[M, T, T]`` of any number of tiles ``[M, 3, T, T]``, one batch after the other."""
    batch = engine.batch
    labels = np.empty((len(tiles), *tiles.shape[2:]), np.uint8)
    for start in range(0, len(tiles), batch):
        chunk = tiles[start : start + batch]
        engine.input(0)[: len(chunk)] = chunk
        engine.launch(0)
        engine.wait(0)
        labels[start : start + batch] = engine.output(0)[: len(chunk)]
    return labels


def timed_run(labeller: Labeller) -> float:
    """Seconds that slot 0 takes, from launch to outputs."""
    started = time.perf_counter()
    labeller.launch(0)
    labeller.wait(0)
    return time.perf_counter() - started


def median_times(
    plain: Sequence[float],
    profiled: Sequence[float],
    reported: Sequence[Iterable[tuple[str, float]]],
    nodes_of: Callable[[str], tuple[str, ...]],
) -> KernelTimes:
    """The medians of profiled runs, without the first :data:`PROFILE_WARM_UP`.

    Args:
        plain, profiled: seconds of each run.
        reported: of each profiled run, the names and seconds of its kernels; those of one name are added up.
        nodes_of: the nodes of a kernel, by its name.

    Raises:
        EngineError: no kernel was reported.
    """
    totals: list[dict[str, float]] = []
    for run in reported[PROFILE_WARM_UP:]:
        totals.append({})
        for name, value in run:
            totals[-1][name] = totals[-1].get(name, 0.0) + value
    names = dict.fromkeys(name for total in totals for name in total)
    if not names:
        raise EngineError("the runtime's profiler told no times")
    medians = {name: statistics.median(total.get(name, 0.0) for total in totals) for name in names}
    kernels = tuple(TimedKernel(name, nodes_of(name), value) for name, value in medians.items())
    plain, profiled = plain[PROFILE_WARM_UP:], profiled[PROFILE_WARM_UP:]
    return KernelTimes(kernels, statistics.median(profiled), statistics.median(plain), len(totals), "median")


def speed_ratio(engine: Engine, other: Engine) -> float:
    """Tiles per second of an engine over those of another, as the ratio of the medians.

    Both label the same tile in turn, after one run each to warm up, so that a slow moment of the machine hits both.

    Raises:
        EngineError: their tiles differ in size, or one of them fails.
    """
    if engine.tile != other.tile:
        raise EngineError(f"tiles of {engine.tile} and {other.tile} px cannot be timed against each other")
    tile = sample_tiles(engine.tile, 1)[0]
    for one in (engine, other):
        one.input(0)[:] = tile
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(SPEED_ROUNDS + 1):
        for one, times in ((engine, ours), (other, theirs)):
            times.append(timed_run(one) / one.batch)
    return statistics.median(theirs[1:]) / statistics.median(ours[1:])
