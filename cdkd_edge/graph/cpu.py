"""What ONNX Runtime runs on a CPU in place of a graph, and the sessions that run it.

:func:`fuse_attention` writes attention as one operator. ONNX Runtime's optimiser does not find attention in ViT graphs,
so a block of 4096 tokens would store 6 x 4096 x 4096 scores (402 MB in FP32); the flash kernel of
``com.microsoft.MultiHeadAttention`` never does. Only ONNX Runtime has the operator, so exported graphs do not use it.

:func:`cpu_twin` rewrites an INT8 graph, which is written for TensorRT (FP16, Q/DQ on inputs, floating-point biases) and
would run far slower than FP32. The twin uses the same integers and scales in ``MatMulIntegerToFloat``, ONNX Runtime's
integer kernel for products that are not quantised again. Only unsigned activations are fast there, so it stores
``q + 128`` as uint8. A 3x3 convolution becomes such a product of the nine shifted copies of its map side by side: ONNX
Runtime's integer convolutions either round their result to 8 bits, which TensorRT does not, or take four times as long
as FP32. Everything else is FP32 with the weights of the INT8 graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import CdkdEdgeError, GraphError
from cdkd_edge.core.machine import available_cores
from cdkd_edge.graph.layers import attention_blocks, search_classes
from cdkd_edge.graph.nodes import CONTRIB_DOMAIN, GraphIndex, NodeWriter, attribute_of, copy_of, replace_nodes, retype

_ZERO = 128  # the uint8 that stands for 0
_END = np.iinfo(np.int64).max


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of every session; ``threads`` for one run are by default the cores this process may use."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions; the log would repeat them on stderr
    # ONNX Runtime would count the cores of the machine, not those of the container.
    options.intra_op_num_threads = threads or available_cores()
    return options


def open_session(
    model: bytes | str,
    options: onnxruntime.SessionOptions | None = None,
    refused: Callable[[str], CdkdEdgeError] = lambda reason: GraphError(f"ONNX Runtime refuses the graph: {reason}"),
) -> Any:
    """A session on the CPU for a serialised graph or the path of a file. No other function makes one.

    ``refused`` makes the error that is raised from ONNX Runtime's reason.
    """
    try:
        return onnxruntime.InferenceSession(model, options or session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own types share no base but Exception
        raise refused(" ".join(str(error).split())[:300]) from None


def cpu_session(model: onnx.ModelProto) -> Any:
    """A session for reading values out of a graph of at most 2 GB, on all cores this process may use."""
    options = session_options()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # they would never give back large outputs
    # As the graph lists nodes; the default order leaves side branches for the end and keeps their inputs until then.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return open_session(model.SerializeToString(), options)


def fuse_attention(model: onnx.ModelProto) -> tuple[int, int]:
    """Write every attention of the known form as one operator, in place; returns how many, and of how many."""
    found = attention_blocks(model)
    blocks = [block for block in found if block is not None]
    if not blocks:
        return 0, len(found)
    block_of = {name: block for block in blocks for name in block.nodes}
    writer = NodeWriter()
    for node in model.graph.node:
        block = block_of.get(node.output[0])
        if block is None:
            writer.nodes.append(node)
        elif node.output[0] == block.joined:  # the block's last node: all inputs exist
            name, parts, mixed = block.joined, [block.q, block.k, block.v], block.joined
            if block.windows > 1:
                by_window = writer.constant(f"{name}.sizes", np.array([0, -1, block.width], np.int64))
                parts = [writer.add("Reshape", f"{part}.by_window", part, by_window) for part in parts]
                mixed = f"{name}.by_window"
            # The query scale is folded into the projection; the default scale, 0, would apply it again.
            fused: dict[str, Any] = {"num_heads": block.heads, "scale": block.scale, "domain": CONTRIB_DOMAIN}
            writer.add("MultiHeadAttention", mixed, *parts, **fused)
            if block.windows > 1:
                whole = writer.constant(f"{name}.whole", np.array([0, -1, block.width // block.windows], np.int64))
                writer.add("Reshape", name, mixed, whole)
    writer.replace_nodes(model)
    _import_contrib(model)
    return len(blocks), len(found)


def to_fp32(half: onnx.ModelProto) -> onnx.ModelProto:
    """An FP16 graph with its constants and casts widened to FP32."""
    model = copy_of(half)
    retype(model.graph, TensorProto.FLOAT16, TensorProto.FLOAT)
    return model


def cpu_twin(int8: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime computes on a CPU in place of an INT8 graph of :mod:`.int8`, which is not changed."""
    twin = to_fp32(int8)
    search_classes(twin)
    graph = twin.graph
    index = GraphIndex(graph)
    layers = {node.output[0]: layer for node in graph.node if (layer := _quantized_layer(index, node))}
    if not layers:
        raise GraphError("the graph has no quantised layer", hint="make it again: cdkd-edge build --int8")
    merged = {layer.output for layer in layers.values() if layer.bias_node}
    writer = _TwinWriter(index.constants)
    for node in graph.node:
        layer = layers.get(node.output[0])
        if layer is None:
            if node.output[0] not in merged:
                writer.nodes.append(node)
        elif node.op_type == "MatMul":
            writer.linear(layer)
        else:
            writer.convolution(layer)
    used, needed = {output.name for output in graph.output}, []
    for node in reversed(writer.nodes):  # those that contribute to the outputs
        if not used.isdisjoint(node.output):
            used.update(node.input)
            needed.append(node)
    replace_nodes(graph, reversed(needed), [item for name, item in writer.constants.items() if name in used])
    _import_contrib(twin)
    return twin


@dataclass(frozen=True)
class _QuantizedLayer:
    """``Q -> DQ -> MatMul or Conv (DQ of integers) -> Add``; a convolution's bias is its own input."""

    input: str
    input_scale: str
    weight: str
    weight_scale: str
    bias: str
    bias_node: bool  # whether a separate ``Add`` adds the bias
    output: str


def _quantized_layer(index: GraphIndex, node: onnx.NodeProto) -> _QuantizedLayer | None:
    """The layer around a node; None if its input or its weight is not quantised."""
    if node.op_type not in ("MatMul", "Conv"):
        return None
    real, weight = (index.maker.get(name) for name in node.input[:2])
    if real is None or weight is None or {real.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    quantized = index.maker.get(real.input[0])
    if quantized is None or quantized.op_type != "QuantizeLinear" or weight.input[0] not in index.constants:
        return None
    parts = quantized.input[0], quantized.input[1], weight.input[0], weight.input[1]
    if node.op_type == "Conv":
        # Only a 3x3 convolution that is zero-padded, dense, of one group and without a stride
        plain = all(set(np.ravel(attribute_of(node, name, 1))) == {1} for name in ("strides", "dilations", "group"))
        sides = list(index.constants[weight.input[0]].dims[2:])
        if sides != [3, 3] or not plain or attribute_of(node, "pads") != [1, 1, 1, 1]:
            return None
        return _QuantizedLayer(*parts, node.input[2] if len(node.input) > 2 else "", False, node.output[0])
    addition = index.only_user(node.output[0])
    if addition is not None and addition.op_type == "Add":
        for name in addition.input:
            if name in index.constants:
                return _QuantizedLayer(*parts, name, True, addition.output[0])
    return _QuantizedLayer(*parts, "", False, node.output[0])


class _TwinWriter(NodeWriter):
    """Writes quantised layers in integer operators."""

    def __init__(self, constants: dict[str, onnx.TensorProto]) -> None:
        super().__init__(constants)
        self.constant("uint8_zero", np.array(_ZERO, np.uint8))

    def linear(self, layer: _QuantizedLayer) -> None:
        """``[N, L, K]`` to ``[N, L, M]``."""
        self._product(self._integers(layer), layer.weight, layer, layer.output)

    def convolution(self, layer: _QuantizedLayer) -> None:
        """``[N, C, G, G]`` to ``[N, M, G, G]``, 3x3, zero-padded."""
        kernel = numpy_helper.to_array(self.constants[layer.weight])  # [M, C, 3, 3]
        rows = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))  # [9 C, M], tap by tap
        weight = self.constant(f"{layer.weight}.rows", rows)
        name = layer.output
        last = self.add("Transpose", f"{name}.channels_last", self._integers(layer), perm=[0, 2, 3, 1])
        pads = self.constant("pad_map", np.array([0, 1, 1, 0, 0, 1, 1, 0], np.int64))
        padded = self.add("Pad", f"{name}.padded", last, pads, "uint8_zero")  # [N, G + 2, G + 2, C]
        axes = self.constant("map_axes", np.array([1, 2], np.int64))
        taps = []
        for down, right in np.ndindex(3, 3):
            first = self.constant(f"tap_{down}_{right}", np.array([down, right], np.int64))
            ends = [_END if start == 2 else start - 2 for start in (down, right)]
            end = self.constant(f"tap_end_{down}_{right}", np.array(ends, np.int64))
            taps.append(self.add("Slice", f"{name}.tap_{down}_{right}", padded, first, end, axes))
        shifted = self.add("Concat", f"{name}.taps", *taps, axis=3)  # [N, G, G, 9 C]
        product = f"{name}.product"
        self._product(shifted, weight, layer, product)
        self.add("Transpose", product, product, outputs=[name], perm=[0, 3, 1, 2])

    def _integers(self, layer: _QuantizedLayer) -> str:
        return self.add("QuantizeLinear", f"{layer.output}.uint8", layer.input, layer.input_scale, "uint8_zero")

    def _product(self, integers: str, weight: str, layer: _QuantizedLayer, output: str) -> None:
        zero = ""
        if not signed_weights_are_exact():
            signed = numpy_helper.to_array(self.constants[weight]).astype(np.int16)
            weight, zero = self.constant(f"{weight}.unsigned", (signed + _ZERO).astype(np.uint8)), "uint8_zero"
        inputs = [integers, weight, layer.input_scale, layer.weight_scale, "uint8_zero", zero]
        inputs += [layer.bias] if layer.bias else []
        self.add("MatMulIntegerToFloat", output, *inputs, domain=CONTRIB_DOMAIN)


def _import_contrib(model: onnx.ModelProto) -> None:
    if all(entry.domain != CONTRIB_DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))


@functools.cache
def signed_weights_are_exact() -> bool:
    """Whether this CPU multiplies the largest uint8 and int8 correctly in ``MatMulIntegerToFloat``.

    x86-64 CPUs without VNNI add pairs of uint8 x int8 products in 16 bits, which saturate at 32767; two of 255 x 127
    are 64770. Labels would be wrong without any error. Products of uint8 and uint8 are exact on every CPU, but take
    more than twice as long where there is VNNI.
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html ("saturation issues")
    """
    size = 64
    writer = NodeWriter()
    constants: dict[str, np.ndarray] = {
        "weight": np.full((size, size), 127, np.int8),
        "one": np.array(1, np.float32),
        "ones": np.ones(size, np.float32),
        "zero": np.array(0, np.uint8),
    }
    inputs = [writer.constant(name, value) for name, value in constants.items()]
    writer.add("MatMulIntegerToFloat", "y", "x", *inputs, domain=CONTRIB_DOMAIN)
    shape = (size, size)
    model = writer.model("product", {"x": (TensorProto.UINT8, shape)}, {"y": (TensorProto.FLOAT, shape)}, opset=19)
    _import_contrib(model)
    (product,) = open_session(model.SerializeToString()).run(["y"], {"x": np.full((size, size), 255, np.uint8)})
    return bool((product == size * 255 * 127).all())
