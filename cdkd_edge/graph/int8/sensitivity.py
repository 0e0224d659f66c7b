"""How much noise INT8 adds in each layer: signal-to-noise of its output, everything before it in FP32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.graph.fuse import fuse_attention
from cdkd_edge.graph.int8.layers import QuantizableLayer, weight_of
from cdkd_edge.graph.int8.ranges import LayerScales, quantize_weight
from cdkd_edge.graph.session import cpu_session

NOISELESS = 200.0
"""dB; a number, because JSON has no infinity."""


def signal_to_noise(
    model: onnx.ModelProto,
    layers: Sequence[QuantizableLayer],
    scales: Mapping[str, LayerScales],
    tiles: Iterable[npt.NDArray[np.uint8]],
) -> dict[str, float]:
    """Signal-to-noise ratio of every layer that has scales, dB.

    Beside each layer, on the same FP32 input, its quantised self is computed; 10 log10 of the sum of squares of the
    layer's product (its output without the bias) over that of the difference, over all tiles. One pass, whatever the
    number of layers. At most :data:`NOISELESS`, which a layer without noise has.

    Args:
        model: the (smoothed) FP32 graph.
        layers: its quantisable layers.
        scales: of those that become INT8.
        tiles: uint8 ``[3, T, T]``.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    fuse_attention(probe)
    graph = probe.graph
    nodes = {node.name: node for node in graph.node}
    measured = [layer for layer in layers if layer.name in scales]
    outputs, beside = [], {}
    for layer in measured:
        names, beside[layer.product] = _beside(
            graph, layer, nodes[layer.node], weight_of(model, layer.weight), scales[layer.name]
        )
        outputs += names
    ordered = []
    for node in graph.node:
        ordered += [_copy(node), *beside.get(node.output[0], [])]
    del graph.node[:]
    graph.node.extend(ordered)
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    session = cpu_session(probe, in_order=True)
    del probe, graph, nodes, ordered, beside

    totals = np.zeros(len(outputs))
    for tile in tiles:
        totals += [float(value) for value in session.run(outputs, {"image": np.repeat(tile[None], batch, axis=0)})]
    signal, noise = totals[::2], totals[1::2]
    least = 10 ** (-NOISELESS / 10)
    ratio = np.full_like(signal, 1 / least)  # also of a layer that gives nothing but zeros
    np.divide(signal, noise, out=ratio, where=noise > signal * least)
    decibels = 10 * np.log10(np.maximum(ratio, least))
    return dict(zip((layer.name for layer in measured), decibels.tolist(), strict=True))


def _beside(
    graph: onnx.GraphProto, layer: QuantizableLayer, node: onnx.NodeProto, weight: np.ndarray, scales: LayerScales
) -> tuple[list[str], list[onnx.NodeProto]]:
    """The nodes of the quantised layer next to the layer; the names of the sums of squares of signal and noise."""
    name = f"{layer.name}.quantized"
    integers = quantize_weight(weight, scales.weight, layer.output_axis)
    for suffix, value in (
        ("scale", np.array(scales.activation, np.float32)),
        # q + 128: ONNX Runtime finds its fast kernel for unsigned inputs only, and unsigned weights never saturate.
        ("zero", np.array(128, np.uint8)),
        ("integers", (integers.astype(np.int16) + 128).astype(np.uint8)),
        ("weight_scale", scales.weight),
        ("zeros", np.full(len(scales.weight), 128, np.uint8)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, f"{name}.{suffix}"))
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.input[0], twin.input[1], twin.output[0] = name, f"{name}.input", f"{name}.weight", f"{name}.output"
    grid = [f"{name}.scale", f"{name}.zero"]
    per_channel = [f"{name}.integers", f"{name}.weight_scale", f"{name}.zeros"]
    signal = layer.product
    without: list[onnx.NodeProto] = []
    if layer.op == "Conv" and len(node.input) > 2:  # a large bias would make noise look small
        bias = next(item for item in graph.initializer if item.name == node.input[2])
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(bias).reshape(-1, 1, 1), f"{name}.bias"))
        signal = f"{name}.without_bias"
        without = [helper.make_node("Sub", [layer.product, f"{name}.bias"], [signal])]
    nodes = [
        *without,
        helper.make_node("QuantizeLinear", [layer.input, *grid], [f"{name}.input_integers"]),
        helper.make_node("DequantizeLinear", [f"{name}.input_integers", *grid], [f"{name}.input"]),
        helper.make_node("DequantizeLinear", per_channel, [f"{name}.weight"], axis=layer.output_axis),
        twin,
        helper.make_node("Sub", [layer.product, f"{name}.output"], [f"{name}.difference"]),
        helper.make_node("ReduceSumSquare", [signal], [f"{name}.signal"], keepdims=0),
        helper.make_node("ReduceSumSquare", [f"{name}.difference"], [f"{name}.noise"], keepdims=0),
    ]
    return [f"{name}.signal", f"{name}.noise"], nodes


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
