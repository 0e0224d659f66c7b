"""From observed values to scales: symmetric INT8, one per tensor for activations, one per output channel for weights.

q = clip(round(x / s), -128, 127), x ~ s q, with s = range / 127. Scales are rounded to FP16, which is what the
graph for TensorRT stores, before weights are quantised with them: both graphs compute with the same numbers.

Calibrators choose the range of an activation: ``max`` keeps every value, ``percentile`` lets the largest 0.001 % be cut
off so that the rest gets finer steps, ``mse`` takes the range with the least squared error of the histogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.quantization.layers import Array
from cdkd_edge.quantization.observe import Observation, magnitudes

CALIBRATORS = ("max", "percentile", "mse")
PERCENTILE = 99.999

_LARGEST = 127
_MIN_SCALE = float(np.finfo(np.float16).tiny)  # the smallest with FP16's full precision


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer."""

    activation: float
    weight: Array
    """``[M]``, one per output channel."""


def activation_scale(observation: Observation, calibrator: str, percentile: float = PERCENTILE) -> float:
    """The scale of a layer's input.

    Args:
        observation: what the layer saw.
        calibrator: one of :data:`CALIBRATORS`.
        percentile: of magnitudes, for ``percentile``.
    """
    if calibrator not in CALIBRATORS:
        raise ValueError(f"there is no calibrator {calibrator!r}; there are {', '.join(CALIBRATORS)}")
    largest = observation.max
    if calibrator == "percentile":
        largest = min(largest, _percentile(observation.histogram, percentile))
    elif calibrator == "mse":
        largest = min(largest, _least_squares(observation.histogram, largest))
    return _fp16(largest / _LARGEST)


def weight_scales(weight: Array, axis: int) -> Array:
    """Scales ``[M]`` that keep every weight of each output channel."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    return np.array([_fp16(value / _LARGEST) for value in np.abs(weight).max(axis=others).tolist()], np.float32)


def quantize_weight(weight: Array, scales: Array, axis: int) -> npt.NDArray[np.int8]:
    """Weights as INT8, in the layout they came in. -128 is not used, so that products stay symmetric."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    integers = np.clip(np.rint(weight / scales.reshape(shape)), -_LARGEST, _LARGEST)
    result: npt.NDArray[np.int8] = integers.astype(np.int8)
    return result


def _fp16(scale: float) -> float:
    """Rounded up to FP16, so that rounding never cuts a value off."""
    half = np.float16(max(scale, _MIN_SCALE))
    if float(half) < scale:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def _percentile(histogram: npt.NDArray[np.int64], percentile: float) -> float:
    counts = histogram.cumsum()
    index = int(np.searchsorted(counts, percentile / 100 * counts[-1]))
    return float(magnitudes()[index])


def _least_squares(histogram: npt.NDArray[np.int64], largest: float) -> float:
    """The range with the least mean squared error: rounding inside, s^2 / 12, and cutting off outside."""
    value = magnitudes()
    used = np.flatnonzero(histogram)
    value, count = value[used], histogram[used].astype(np.float64)
    candidates = largest * np.linspace(0.05, 1, 96)
    errors = []
    for candidate in candidates:
        step = candidate / _LARGEST
        inside = value <= candidate
        # Values far below a step round to zero; their error is themselves.
        rounding = np.minimum(step**2 / 12, value[inside] ** 2)
        errors.append((count[inside] * rounding).sum() + (count[~inside] * (value[~inside] - candidate) ** 2).sum())
    return float(candidates[int(np.argmin(errors))])
