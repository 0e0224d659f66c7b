"""From an FP32 graph and calibration tiles to scales: smoothing, observation, ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.core.errors import UsageError
from cdkd_edge.graph.int8.layers import QuantizableLayer, quantizable_layers, weight_of
from cdkd_edge.graph.int8.ranges import CALIBRATORS, PERCENTILE, LayerScales, activation_scale, observe, weight_scales
from cdkd_edge.graph.int8.smooth import ALPHA, smooth

UInt8Array = npt.NDArray[np.uint8]

SMOOTHING_TILES = 16
"""Channel maxima, which smoothing needs, settle long before the tails of histograms do."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


class Tiles(Protocol):
    """A source of tiles that can be read again and again, one tile at a time."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[UInt8Array]:
        """uint8 ``[3, T, T]``."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges are chosen."""

    calibrator: str = "percentile"
    percentile: float = PERCENTILE
    alpha: float | None = ALPHA
    """SmoothQuant's exponent, above 0, at most 1; None: no smoothing."""

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise UsageError(f"there is no calibrator {self.calibrator!r}", hint=f"there are {', '.join(CALIBRATORS)}")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"a range that keeps {self.percentile} per cent of the values makes no sense")
        if self.percentile != PERCENTILE and self.calibrator != "percentile":
            raise UsageError(
                f"the {self.calibrator} calibrator has no percentile", hint="--calibrator percentile takes one"
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UsageError(f"SmoothQuant's exponent lies between 0 and 1, it is not {self.alpha}")


@dataclass(frozen=True)
class Calibrated:
    """An FP32 graph ready to be quantised."""

    model: onnx.ModelProto
    """Smoothed; the same function as the graph it was made from."""
    layers: list[QuantizableLayer]
    scales: dict[str, LayerScales]
    """Of every layer, by name."""
    smoothed: tuple[str, ...]
    """Layers whose input was smoothed."""


def calibrate(
    plain: onnx.ModelProto,
    tiles: Tiles,
    options: CalibrationOptions = CalibrationOptions(),
    progress: Progress = lambda what, done, total: None,
) -> Calibrated:
    """Choose the scales of every quantisable layer.

    Memory does not grow with the number of tiles: one is looked at at a time; channel maxima and histograms stay.

    Args:
        plain: the exported FP32 graph; left as it is.
        tiles: the calibration tiles.
        options: how.
        progress: called as tiles are done.

    Raises:
        GraphError: the graph has no layers that INT8 is for.
        ValueError: there are no tiles.
    """
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    layers = quantizable_layers(model)
    smoothed: tuple[str, ...] = ()
    if options.alpha is not None:
        few = min(SMOOTHING_TILES, len(tiles))
        step = max(len(tiles) // max(few, 1), 1)
        spread = (tile for index, tile in enumerate(tiles) if index % step == 0)
        total = -(-len(tiles) // step)
        seen = observe(model, layers, spread, lambda done: progress("channel maxima", done, total))
        smoothed = tuple(smooth(model, layers, seen, options.alpha))
        layers = quantizable_layers(model)
    seen = observe(model, layers, tiles, lambda done: progress("ranges", done, len(tiles)))
    scales = {
        layer.name: LayerScales(
            activation_scale(seen[layer.name], options.calibrator, options.percentile),
            weight_scales(weight_of(model, layer.weight), layer.output_axis),
        )
        for layer in layers
    }
    return Calibrated(model, layers, scales, smoothed)
