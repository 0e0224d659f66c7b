"""From the values that layers see to INT8 scales, and the noise that these scales add.

:func:`observe` runs the FP32 graph on tiles in one streaming pass; its memory does not grow with their number.
Quantisation is symmetric: q = clip(round(x / s), -128, 127), x ~ s q, with s = range / 127; one scale per tensor for
activations, one per output channel for weights. Scales are rounded to FP16, as the graph for TensorRT stores them,
before weights are quantised with them, so that TensorRT and the CPU compute with the same numbers.

Calibrators choose the range of an activation: ``max`` keeps every value; ``percentile`` cuts off the largest 0.001 %,
so that the rest gets finer steps; ``mse`` takes the range with the least squared error of the histogram.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.graph.cpu import cpu_session, fuse_attention
from cdkd_edge.graph.layers import Array, QuantizableLayer, weight_of
from cdkd_edge.graph.nodes import NodeWriter, batch_of, copy_of, show_values

UInt8Array = npt.NDArray[np.uint8]

# One bin per upper half of an FP32 number without its sign: 8 bits of exponent, 7 of mantissa. Bins are 0.8 % wide at
# any magnitude, so no range has to be known beforehand and histograms of tiles can be added.
BINS = 1 << 15
_CHUNK = 1 << 20
CALIBRATORS = ("max", "percentile", "mse")
PERCENTILE = 99.999
NOISELESS = 200.0  # dB; a number, because JSON has no infinity
_LARGEST = 127
_MIN_SCALE = float(np.finfo(np.float16).tiny)  # the smallest with FP16's full precision


@dataclass(frozen=True)
class Observation:
    """Statistics of one layer's input over all tiles."""

    channel_max: npt.NDArray[np.float32]  # largest magnitude per channel, ``[K]``
    histogram: npt.NDArray[np.int64]  # number of values per bin of magnitude, ``[BINS]``; see :func:`magnitudes`

    @property
    def max(self) -> float:
        """Largest magnitude, as the upper edge of its bin, so that the rounding of a CPU does not show."""
        return float(magnitudes()[self.histogram.nonzero()[0][-1]])


def magnitudes() -> npt.NDArray[np.float64]:
    """Upper edge of every bin of a histogram, ``[BINS]``."""
    with np.errstate(invalid="ignore"):
        edges = ((np.arange(BINS, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32).astype(np.float64)
    edges[~np.isfinite(edges)] = np.finfo(np.float32).max
    return edges


def observe(
    model: onnx.ModelProto, layers: Sequence[QuantizableLayer], tiles: Iterable[UInt8Array]
) -> dict[str, Observation]:
    """Run the FP32 graph on every tile ``[3, T, T]``; returns statistics of the inputs of ``layers``, by name."""
    probe = copy_of(model)
    fuse_attention(probe)
    channels_last = {layer.input: layer.op == "MatMul" for layer in layers}
    values = list(channels_last)
    channel_max: dict[str, npt.NDArray[np.float32]] = {}
    histograms = {name: np.zeros(BINS, np.int64) for name in values}
    for results in _run(probe, values, tiles):
        for name in reversed(values):
            value: npt.NDArray[np.float32] = results.pop()[:1]
            axes = (0, 1) if channels_last[name] else (0, 2, 3)
            largest = np.maximum(value.max(axis=axes), -value.min(axis=axes))
            channel_max[name] = np.maximum(channel_max[name], largest) if name in channel_max else largest
            upper = np.ascontiguousarray(value).ravel().view(np.uint16)[1::2]  # supported machines are little-endian
            for start in range(0, len(upper), _CHUNK):
                histograms[name] += np.bincount(upper[start : start + _CHUNK] & (BINS - 1), minlength=BINS)
    if not channel_max:
        raise ValueError("there is no tile to observe")
    return {layer.name: Observation(channel_max[layer.input], histograms[layer.input]) for layer in layers}


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer."""

    activation: float
    weight: Array  # ``[M]``, one per output channel


def _run(probe: onnx.ModelProto, values: list[str], tiles: Iterable[UInt8Array]) -> Iterator[list[Any]]:
    """Values of a graph, which is emptied, tile by tile; the same tile fills the static batch."""
    del probe.graph.output[:]
    show_values(probe, values)
    batch, session = batch_of(probe), cpu_session(probe)
    probe.Clear()
    for tile in tiles:
        yield session.run(values, {"image": np.repeat(tile[None], batch, axis=0)})


def activation_scale(observation: Observation, calibrator: str, percentile: float = PERCENTILE) -> float:
    """The scale of a layer's input, by one of :data:`CALIBRATORS`; ``percentile`` is what it keeps, in per cent."""
    largest = observation.max
    if calibrator == "percentile":
        counts = observation.histogram.cumsum()
        largest = min(largest, float(magnitudes()[np.searchsorted(counts, percentile / 100 * counts[-1])]))
    elif calibrator == "mse":
        largest = min(largest, _least_squares(observation.histogram, largest))
    return _fp16(largest / _LARGEST)


def weight_scales(weight: Array, axis: int) -> Array:
    """Scales ``[M]``, each of which covers all weights of its output channel."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    return np.array([_fp16(value / _LARGEST) for value in np.abs(weight).max(axis=others).tolist()], np.float32)


def quantize_weight(weight: Array, scales: Array, axis: int) -> npt.NDArray[np.int8]:
    """Weights as INT8 in the same layout. -128 is not used, so that products stay symmetric."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    integers = np.clip(np.rint(weight / scales.reshape(shape)), -_LARGEST, _LARGEST)
    result: npt.NDArray[np.int8] = integers.astype(np.int8)
    return result


def _fp16(scale: float) -> float:
    """A scale rounded up to FP16, so that rounding never cuts a value off."""
    half = np.float16(max(scale, _MIN_SCALE))
    if float(half) < scale:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def _least_squares(histogram: npt.NDArray[np.int64], largest: float) -> float:
    """The range with the least mean squared error: s^2 / 12 from rounding inside it, and clipping outside."""
    value = magnitudes()
    used = np.flatnonzero(histogram)
    value, count = value[used], histogram[used].astype(np.float64)
    candidates = largest * np.linspace(0.05, 1, 96)
    errors = []
    for candidate in candidates:
        step = candidate / _LARGEST
        inside = value <= candidate
        # Values far below a step round to zero; their error is their own magnitude.
        rounding = np.minimum(step**2 / 12, value[inside] ** 2)
        errors.append((count[inside] * rounding).sum() + (count[~inside] * (value[~inside] - candidate) ** 2).sum())
    return float(candidates[int(np.argmin(errors))])


def signal_to_noise(
    model: onnx.ModelProto,
    layers: Sequence[QuantizableLayer],
    scales: Mapping[str, LayerScales],
    tiles: Iterable[UInt8Array],
) -> dict[str, float]:
    """The signal-to-noise ratio of every layer of a (smoothed) FP32 graph that has scales, dB; all in one pass.

    Each layer is computed twice on the same FP32 input, plain and quantised. The ratio is 10 log10 of the sum of
    squares of the layer's product (its output without the bias) over that of the difference, over all tiles
    ``[3, T, T]``; at most :data:`NOISELESS`.
    """
    probe = copy_of(model)
    fuse_attention(probe)
    measured = {layer.product: layer for layer in layers if layer.name in scales}
    writer = NodeWriter()
    outputs: list[str] = []
    for node in probe.graph.node:
        writer.nodes.append(node)
        if layer := measured.get(node.output[0]):
            outputs += _add_quantized_copy(writer, model, layer, node, scales[layer.name])
    writer.replace_nodes(probe)
    del writer
    totals = np.zeros(len(outputs))
    for results in _run(probe, outputs, tiles):
        totals += [float(value) for value in results]
    signal, noise = totals[::2], totals[1::2]
    least = 10 ** (-NOISELESS / 10)
    ratio = np.full_like(signal, 1 / least)  # also for a layer that gives nothing but zeros
    np.divide(signal, noise, out=ratio, where=noise > signal * least)
    decibels = 10 * np.log10(np.maximum(ratio, least))
    names = [layer.name for layer in measured.values()]
    return dict(zip(names, decibels.tolist(), strict=True))


def _add_quantized_copy(
    writer: NodeWriter, model: onnx.ModelProto, layer: QuantizableLayer, node: onnx.NodeProto, scales: LayerScales
) -> tuple[str, str]:
    """Compute a layer in INT8, too; returns the names of the sums of squares of signal and noise."""
    name = f"{layer.name}.quantized"
    integers = quantize_weight(weight_of(model, layer.weight), scales.weight, layer.output_axis)
    # q + 128: ONNX Runtime has its fast kernel for unsigned inputs only, and unsigned weights never saturate.
    grid = (
        writer.constant(f"{name}.scale", np.array(scales.activation, np.float32)),
        writer.constant(f"{name}.zero", np.array(128, np.uint8)),
    )
    per_channel = (
        writer.constant(f"{name}.integers", (integers.astype(np.int16) + 128).astype(np.uint8)),
        writer.constant(f"{name}.weight_scale", scales.weight),
        writer.constant(f"{name}.zeros", np.full(len(scales.weight), 128, np.uint8)),
    )
    stored = writer.add("QuantizeLinear", f"{name}.input_integers", layer.input, *grid)
    real = writer.add("DequantizeLinear", f"{name}.input", stored, *grid)
    real_weight = writer.add("DequantizeLinear", f"{name}.weight", *per_channel, axis=layer.output_axis)
    quantized = copy_of(node)
    quantized.name, quantized.output[0] = name, f"{name}.output"
    quantized.input[0], quantized.input[1] = real, real_weight
    writer.nodes.append(quantized)
    signal = layer.product
    if layer.op == "Conv" and len(node.input) > 2:  # a large bias would make noise look small
        bias = writer.constant(f"{name}.bias", weight_of(model, node.input[2]).reshape(-1, 1, 1))
        signal = writer.add("Sub", f"{name}.without_bias", signal, bias)
    difference = writer.add("Sub", f"{name}.difference", layer.product, quantized.output[0])
    return (
        writer.add("ReduceSumSquare", f"{name}.signal", signal, keepdims=0),
        writer.add("ReduceSumSquare", f"{name}.noise", difference, keepdims=0),
    )
