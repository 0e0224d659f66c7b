"""Kinds of output of a graph: labels alone, with their confidence, or with the probability of each class.

====================  ==============================================================================
kind                  uint8 outputs of N tiles of T x T px, K classes
====================  ==============================================================================
``labels``            ``labels`` ``[N, T, T]``
``confidence``        the same, and ``confidence`` ``[N, T, T]``: per cent of the label's probability
``probabilities``     the same, and ``probabilities`` ``[N, K, T, T]``: ``round(255 p)``
====================  ==============================================================================

Probabilities are the softmax of the logits at full resolution, as the network was trained; they are not calibrated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdkd_edge.core.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LABELS, CONFIDENCE, PROBABILITIES = "labels", "confidence", "probabilities"
OUTPUT_KINDS = (LABELS, CONFIDENCE, PROBABILITIES)

PERCENT = 100  # a confidence of 1
PROBABILITY_ONE = 255  # a probability of 1


def provides(kind: str, wanted: str) -> bool:
    """Whether an artefact of ``kind`` can give ``wanted``; confidence follows from probabilities."""
    return wanted in (LABELS, kind) or (kind, wanted) == (PROBABILITIES, CONFIDENCE)


def output_shapes(kind: str, batch: int, tile: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of a kind by name, the labels first."""
    shapes: dict[str, tuple[int, ...]] = {LABELS: (batch, tile, tile)}
    if kind == CONFIDENCE:
        shapes[CONFIDENCE] = (batch, tile, tile)
    elif kind == PROBABILITIES:
        shapes[PROBABILITIES] = (batch, classes, tile, tile)
    return shapes


def confidence_of(probabilities: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Confidence ``[N, T, T]`` in per cent from probabilities ``[N, K, T, T]``.

    Within one per cent of what a graph of kind ``confidence`` gives, which rounds once.
    """
    import numpy as np

    largest = probabilities.max(axis=1).astype(np.uint16)
    # In integers, because a float image would take four times the memory. No value lies halfway between two.
    confidence: npt.NDArray[np.uint8] = ((largest * (2 * PERCENT) + PROBABILITY_ONE) // (2 * PROBABILITY_ONE)).astype(
        np.uint8
    )
    return confidence


def missing_output(kind: str, wanted: str, artefact: str) -> EngineError:
    """The error for an output that an artefact does not have."""
    return EngineError(
        f"{artefact} gives {_WORDS[kind]}, not {_WORDS[wanted]}",
        hint=f"build one that does: cdkd-edge build --{wanted}",
    )


def build_options(precision: str, kind: str) -> str:
    """What to type after ``cdkd-edge build`` for an engine like this."""
    return f"--{precision}" if kind == LABELS else f"--{precision} --{kind}"


_WORDS = {LABELS: "labels alone", CONFIDENCE: "confidence", PROBABILITIES: "probabilities"}
