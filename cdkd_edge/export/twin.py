"""The CPU twin of an INT8 graph: the same integers and scales, in operators that ONNX Runtime has kernels for.

The INT8 graph is written for TensorRT: FP16, Q/DQ on inputs, floating-point biases. ONNX Runtime on a CPU runs that
far slower than FP32. Its integer kernel for a linear without a quantised output is ``MatMulIntegerToFloat`` (domain
``com.microsoft``), and only unsigned activations are fast there: the twin stores ``q + 128`` as uint8, the same number.
Convolutions multiply dequantised integers in FP32, which is as exact: ONNX Runtime's integer convolutions either round
their output or take four times as long. Everything else is FP32, with the weights of the INT8 graph.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.errors import GraphError
from cdkd_edge.export.fuse import CONTRIB_DOMAIN


def cpu_twin(int8: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime computes on a CPU in place of an INT8 graph.

    Args:
        int8: a graph that :mod:`cdkd_edge.quantization` wrote; left as it is.

    Raises:
        GraphError: it has no quantised linear.
    """
    twin = to_fp32(int8)
    graph = twin.graph
    maker = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    constants = {item.name for item in graph.initializer}

    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        linear = _quantized_linear(node, maker, users, constants)
        if linear:
            replaced[node.output[0]] = linear.nodes()
            if linear.bias:
                replaced[linear.output] = []
    if not replaced:
        raise GraphError("the graph has no quantised linear", hint="make it again: cdkd-edge build --int8")
    nodes = []
    for node in graph.node:
        nodes += replaced.get(node.output[0], [_copy(node)])
    needed = _needed(nodes, [output.name for output in graph.output])
    graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "uint8_zero"))
    kept = [_copy_tensor(item) for item in graph.initializer if item.name in {n for node in needed for n in node.input}]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(needed)
    graph.initializer.extend(kept)
    twin.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return twin


def to_fp32(half: onnx.ModelProto) -> onnx.ModelProto:
    """An FP16 graph with its constants and casts widened to FP32."""
    model = onnx.ModelProto()
    model.CopyFrom(half)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT16:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    return model


@dataclass(frozen=True)
class _Linear:
    """``Q -> DQ -> MatMul(DQ of integers) -> Add``."""

    input: str
    input_scale: str
    weight: str
    weight_scale: str
    bias: str
    output: str

    def nodes(self) -> list[onnx.NodeProto]:
        name = self.output
        return [
            helper.make_node(
                "QuantizeLinear",
                [self.input, self.input_scale, "uint8_zero"],
                [f"{name}.input_uint8"],
                name=f"{name}.input_uint8/QuantizeLinear",
            ),
            helper.make_node(
                "MatMulIntegerToFloat",
                [
                    f"{name}.input_uint8", self.weight, self.input_scale, self.weight_scale, "uint8_zero", "",
                    *([self.bias] if self.bias else []),
                ],
                [name],
                name=f"{name}/MatMulIntegerToFloat",
                domain=CONTRIB_DOMAIN,
            ),
        ]  # fmt: skip


def _quantized_linear(
    node: onnx.NodeProto,
    maker: dict[str, onnx.NodeProto],
    users: dict[str, list[onnx.NodeProto]],
    constants: set[str],
) -> _Linear | None:
    if node.op_type != "MatMul":
        return None
    real, weight = (maker.get(name) for name in node.input)
    if real is None or weight is None or {real.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    quantized = maker.get(real.input[0])
    if quantized is None or quantized.op_type != "QuantizeLinear" or weight.input[0] not in constants:
        return None
    output, bias = node.output[0], ""
    following = users.get(output, [])
    if len(following) == 1 and following[0].op_type == "Add" and (found := set(following[0].input) & constants):
        output, bias = following[0].output[0], found.pop()
    return _Linear(quantized.input[0], quantized.input[1], weight.input[0], weight.input[1], bias, output)


def _needed(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """Nodes that something still uses, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _copy_tensor(item: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(item)
    return copy
