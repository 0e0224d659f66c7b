"""What values the layers see: one streaming pass over tiles, memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cdkd_edge.export.fuse import fuse_attention
from cdkd_edge.export.session import cpu_session
from cdkd_edge.quantization.layers import QuantizableLayer

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
