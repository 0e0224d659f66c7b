"""The paper's figures for the board, and what stands between them and a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdkd_edge.bench.record import VALID, BenchSummary
from cdkd_edge.board.power.protocol import MODULE

PAPER: Final = "Mask-CDKD, ISPRS 2026"


@dataclass(frozen=True)
class PublishedFigures:
    """One device's row of a paper; watts and tiles/s as printed, the rest computed from them."""

    device: str
    tile: int
    precision: str
    runtime: str
    tiles_per_second: float
    idle_watts: float
    load_watts: float

    @property
    def net_watts(self) -> float:
        """Load without idle, W."""
        return self.load_watts - self.idle_watts

    @property
    def megapixels_per_second(self) -> float:
        """Millions of pixels per second."""
        return self.tiles_per_second * self.tile**2 / 1e6

    @property
    def gross_joules_per_tile(self) -> float:
        """Idle included, J."""
        return self.load_watts / self.tiles_per_second

    @property
    def net_joules_per_tile(self) -> float:
        """Idle taken off, J."""
        return self.net_watts / self.tiles_per_second

    @property
    def gross_joules_per_megapixel(self) -> float:
        """Idle included, J per million pixels."""
        return self.load_watts / self.megapixels_per_second

    @property
    def net_joules_per_megapixel(self) -> float:
        """Idle taken off, J per million pixels."""
        return self.net_watts / self.megapixels_per_second


ORIN_NX: Final = PublishedFigures("Orin NX", 1024, "fp16", "tensorrt", 2.5, 5.74, 18.95)
"""The paper prints 2.5 images/s, 5.74 W idle, 18.95 W under load, 13.21 W net; TensorRT, FP16, 1024 x 1024 px."""

_BLOCKS: Final = 12
"""Attention blocks of the paper's network."""


def differences(summary: BenchSummary) -> tuple[str, ...]:
    """In what a run differs from the paper's measurement, a phrase each; empty if in nothing that is recorded."""
    engine = summary.engine
    found = []
    if summary.verdict.status != VALID:
        found.append(f"this run is {summary.verdict.status.replace('_', ' ')}")
    device = (summary.board or {}).get("model") or summary.machine.board
    if not isinstance(device, str) or ORIN_NX.device.lower() not in device.lower():
        found.append(f"another device: {device or summary.machine.cpu}, not an {ORIN_NX.device}")
    if engine.runtime != ORIN_NX.runtime:
        found.append(f"another runtime: {engine.runtime}, not TensorRT")
    if engine.precision != ORIN_NX.precision:
        found.append(f"another precision: {engine.precision.upper()}, not {ORIN_NX.precision.upper()}")
    if engine.tile != ORIN_NX.tile:
        found.append(
            f"another tile: {engine.tile} x {engine.tile} px, not {ORIN_NX.tile} x {ORIN_NX.tile} (attention grows "
            "with the square of the pixels: figures per megapixel differ as well)"
        )
    if engine.attention_blocks != _BLOCKS:
        found.append(f"another network: {engine.attention_blocks} attention blocks, not {_BLOCKS}")
    if engine.batch != 1:
        found.append(f"{engine.batch} tiles per batch")
    power = summary.figures.power if summary.figures else None
    if power is not None and power.scope != MODULE:
        found.append(f"another scope of power: {power.scope}, not the module")
    return tuple(found)
