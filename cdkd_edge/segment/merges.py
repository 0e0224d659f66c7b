"""The ways in which tiles become one map: the choices of ``--merge``.

A merge mode is a class in a file of its own (a :class:`.crop.CropMerge`), and a row here. Nothing else names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.output_kinds import LABELS, PROBABILITIES

if TYPE_CHECKING:
    from cdkd_edge.segment.crop import CropMerge

DEFAULT_MERGE = "crop"


@dataclass(frozen=True)
class MergeMode:
    """What the command line and the pipeline need to know of a merge before its code is imported."""

    help: str
    needs: str
    """What the engine must give, one of :data:`cdkd_edge.core.output_kinds.OUTPUT_KINDS`."""
    load: Callable[[], type[CropMerge]]


def _crop() -> type[CropMerge]:
    from cdkd_edge.segment.crop import CropMerge

    return CropMerge


def _hann() -> type[CropMerge]:
    from cdkd_edge.segment.hann import HannMerge

    return HannMerge


MERGES = {
    "crop": MergeMode("each pixel from the tile in which it lies deepest", LABELS, _crop),
    "hann": MergeMode("probabilities of overlapping tiles blended under a Hann window", PROBABILITIES, _hann),
}


def merge_mode(name: str) -> MergeMode:
    """The row of a merge.

    Raises:
        UsageError: there is no such merge.
    """
    if name not in MERGES:
        choices = "; ".join(f"{known}: {mode.help}" for known, mode in MERGES.items())
        raise UsageError(f"there is no merge {name!r}", hint=choices)
    return MERGES[name]


def merge_help() -> str:
    """The help text of ``--merge``."""
    texts = []
    for name, mode in MERGES.items():
        needs = "" if mode.needs == LABELS else f" (needs an engine with {mode.needs})"
        texts.append(f"{name}: {mode.help}{needs}.")
    return " ".join(texts)
