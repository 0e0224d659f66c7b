"""The merge modes, the choices of ``--merge``: how tiles become one map.

This module imports nothing heavy, so that the command line can show the choices at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.manifest import LABELS, PROBABILITIES

if TYPE_CHECKING:
    from cdkd_edge.segmentation.merge import CropMerge

DEFAULT_MERGE = "crop"


@dataclass(frozen=True)
class MergeMode:
    """One choice of ``--merge``."""

    help: str
    needs: str  # what the engine must give, one of :data:`cdkd_edge.core.manifest.OUTPUT_KINDS`
    name: str  # of the class in :mod:`.merge` that merges

    def load(self) -> type[CropMerge]:
        """Import the class that merges."""
        from cdkd_edge.segmentation import merge

        kind: type[CropMerge] = getattr(merge, self.name)
        return kind


# Each is a :class:`.merge.CropMerge` and a row here; nothing else names it.
MERGES = {
    "crop": MergeMode("each pixel from the tile in which it lies deepest", LABELS, "CropMerge"),
    "hann": MergeMode("probabilities of overlapping tiles blended under a Hann window", PROBABILITIES, "HannMerge"),
}


def merge_mode(name: str) -> MergeMode:
    """The merge mode of this name. Raises UsageError if there is none."""
    if name not in MERGES:
        raise UsageError(f"there is no merge {name!r}", hint=merge_help())
    return MERGES[name]


def merge_help() -> str:
    """The help text of ``--merge``."""
    needs = {PROBABILITIES: f" (needs an engine with {PROBABILITIES})"}
    return " ".join(f"{name}: {mode.help}{needs.get(mode.needs, '')}." for name, mode in MERGES.items())
