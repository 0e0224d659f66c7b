"""What everything that labels tiles offers, so that scenes, scores and benchmarks need not know what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import EngineManifest, FileRecord
from cdkd_edge.core.output_kinds import CONFIDENCE, LABELS, PROBABILITIES, confidence_of, missing_output

if TYPE_CHECKING:
    from typing_extensions import Self

UInt8Array = npt.NDArray[np.uint8]


class Labeller(Protocol):
    """uint8 tiles in, uint8 labels out, through a fixed number of buffer slots; some give confidence as well.

    A network in PyTorch, a graph or an engine; N tiles of T x T px at a time.

    A slot is one batch on its way: write tiles to ``input(slot)``, ``launch(slot)``, ``wait(slot)``, read
    ``output(slot)``. Buffers are allocated once; slots let reading, computing and writing overlap.
    One thread launches and waits; other threads may fill inputs and read outputs of other slots.
    """

    slots: int

    @property
    def tile(self) -> int:
        """Side of a tile, T px."""

    @property
    def batch(self) -> int:
        """Tiles per run, N."""

    @property
    def schema(self) -> LabelSchema:
        """What the labels mean."""

    @property
    def artefact(self) -> FileRecord:
        """The file that gives the labels."""

    @property
    def output_kind(self) -> str:
        """What it gives: one of :data:`cdkd_edge.core.output_kinds.OUTPUT_KINDS`."""

    def input(self, slot: int) -> UInt8Array:
        """The slot's tiles, ``[N, 3, T, T]`` RGB, to be written in place."""

    def output(self, slot: int) -> UInt8Array:
        """The slot's labels, ``[N, T, T]``; 255 everywhere unless the last run of the slot succeeded."""

    def confidence(self, slot: int) -> UInt8Array:
        """Per cent of the probability of the slot's labels, ``[N, T, T]``; 0 everywhere where those are 255.

        Of kind ``probabilities`` it is derived from them, anew at every call.

        Raises:
            EngineError: it is not given.
        """

    def probabilities(self, slot: int) -> UInt8Array:
        """255 times the probability of each class, ``[N, K, T, T]``; 0 everywhere where the labels are 255.

        Raises:
            EngineError: they are not given.
        """

    def launch(self, slot: int) -> None:
        """Start computing the slot; may return before it is done.

        Raises:
            EngineError: the engine failed.
        """

    def wait(self, slot: int) -> None:
        """Return when the slot's labels, and what else it gives, are there.

        Raises:
            EngineError: the engine failed.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def close(self) -> None:
        """Release what runs, and its buffers."""


class Closing:
    """Closes itself at the end of a ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held."""


class LabelsOnly(Closing):
    """The part of :class:`Labeller` that is about other outputs, of what gives labels alone."""

    artefact: FileRecord

    @property
    def output_kind(self) -> str:
        """See :attr:`Labeller.output_kind`."""
        return LABELS

    def confidence(self, slot: int) -> UInt8Array:
        """See :meth:`Labeller.confidence`."""
        raise missing_output(LABELS, CONFIDENCE, self.artefact.file)

    def probabilities(self, slot: int) -> UInt8Array:
        """See :meth:`Labeller.probabilities`."""
        raise missing_output(LABELS, PROBABILITIES, self.artefact.file)


class NamedOutputs(Closing):
    """The part of :class:`Labeller` that is about outputs, for a class that keeps them by name."""

    artefact: FileRecord
    output_kind: str

    def named_output(self, slot: int, name: str) -> UInt8Array:
        """An output of the slot that the engine has: ``labels``, ``confidence`` or ``probabilities``."""
        raise NotImplementedError

    def output(self, slot: int) -> UInt8Array:
        """See :meth:`Labeller.output`."""
        return self.named_output(slot, LABELS)

    def confidence(self, slot: int) -> UInt8Array:
        """See :meth:`Labeller.confidence`."""
        if self.output_kind == PROBABILITIES:
            return confidence_of(self.named_output(slot, PROBABILITIES))
        return self._extra(slot, CONFIDENCE)

    def probabilities(self, slot: int) -> UInt8Array:
        """See :meth:`Labeller.probabilities`."""
        return self._extra(slot, PROBABILITIES)

    def _extra(self, slot: int, name: str) -> UInt8Array:
        if self.output_kind != name:
            raise missing_output(self.output_kind, name, self.artefact.file)
        return self.named_output(slot, name)


class Engine(Labeller, Protocol):
    """A labeller built for a machine."""

    manifest: EngineManifest


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
