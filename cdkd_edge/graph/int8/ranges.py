"""What values the layers see: one streaming pass over tiles, memory that does not grow with their number.

From observed values to scales: symmetric INT8, one per tensor for activations, one per output channel for weights.

q = clip(round(x / s), -128, 127), x ~ s q, with s = range / 127. Scales are rounded to FP16, which is what the
graph for TensorRT stores, before weights are quantised with them: both graphs compute with the same numbers.

Calibrators choose the range of an activation: ``max`` keeps every value, ``percentile`` lets the largest 0.001 % be cut
off so that the rest gets finer steps, ``mse`` takes the range with the least squared error of the histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cdkd_edge.graph.fuse import fuse_attention
from cdkd_edge.graph.int8.layers import Array, QuantizableLayer
from cdkd_edge.graph.session import cpu_session

UInt8Array = npt.NDArray[np.uint8]

BINS = 1 << 15
"""A bin per sign-less upper half of an FP32 number: 8 bits of exponent, 7 of mantissa. Bins are 0.8 % wide at any
magnitude, so that no range has to be known beforehand and histograms of different tiles simply add."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Observation:
    """The values of one layer's input over all tiles."""

    channel_max: npt.NDArray[np.float32]
    """Largest magnitude per channel, ``[K]``."""
    histogram: npt.NDArray[np.int64]
    """How many values have a magnitude in each bin, ``[BINS]``; see :func:`magnitudes`."""

    @property
    def max(self) -> float:
        """Largest magnitude, as the upper edge of its bin: rounding differs between CPUs, and bins hide it."""
        return float(magnitudes()[self.histogram.nonzero()[0][-1]])


def magnitudes() -> npt.NDArray[np.float64]:
    """Upper edge of every bin of a histogram, ``[BINS]``."""
    with np.errstate(invalid="ignore"):
        edges = ((np.arange(BINS, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32).astype(np.float64)
    edges[~np.isfinite(edges)] = np.finfo(np.float32).max
    return edges


def observe(
    model: onnx.ModelProto,
    layers: Sequence[QuantizableLayer],
    tiles: Iterable[UInt8Array],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Observation]:
    """Run the FP32 graph on every tile and gather the inputs of ``layers``.

    Args:
        model: the FP32 graph.
        layers: what to look at.
        tiles: uint8 ``[3, T, T]``, one at a time.
        progress: called with the number of tiles done.

    Returns:
        An observation per layer name. (Layers that read the same value share the work.)

    Raises:
        ValueError: there is no tile.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fuse_attention(probe)
    values = list(dict.fromkeys(layer.input for layer in layers))
    channels_last = {layer.input: layer.op == "MatMul" for layer in layers}
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values)
    batch = probe.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    session = cpu_session(probe)
    del probe

    channel_max: dict[str, npt.NDArray[np.float32]] = {}
    histograms = {name: np.zeros(BINS, np.int64) for name in values}
    done = 0
    for tile in tiles:
        # A static batch is filled with the same tile; one of them is looked at.
        results = session.run(values, {"image": np.repeat(tile[None], batch, axis=0)})
        for name in reversed(values):
            value: npt.NDArray[np.float32] = results.pop()[:1]
            axes = (0, 1) if channels_last[name] else (0, 2, 3)
            largest = np.maximum(value.max(axis=axes), -value.min(axis=axes))
            channel_max[name] = np.maximum(channel_max[name], largest) if name in channel_max else largest
            _count(value, histograms[name])
        done += 1
        progress(done)
    if not done:
        raise ValueError("there is no tile to observe")
    return {layer.name: Observation(channel_max[layer.input], histograms[layer.input]) for layer in layers}


def _count(value: npt.NDArray[np.float32], histogram: npt.NDArray[np.int64]) -> None:
    upper = np.ascontiguousarray(value).ravel().view(np.uint16)[1::2]  # little-endian, as every machine of ours
    for start in range(0, len(upper), _CHUNK):
        histogram += np.bincount(upper[start : start + _CHUNK] & (BINS - 1), minlength=BINS)


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
