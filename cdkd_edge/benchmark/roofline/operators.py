"""Count floating-point operations and bytes of every operator of an ONNX graph, from its shapes.

Products (MatMul, Gemm, convolutions) are counted exactly: two operations per multiply-accumulate. Other operators count
a fixed number of operations per output element (:data:`VECTOR_OPERATIONS`); memory limits them, so this matters little.
Bytes are those of the stored tensor: one per element after a ``DequantizeLinear``; a view (``Reshape``) has those of
the tensor that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
from onnx import TensorProto

from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph.files import sizes_of
from cdkd_edge.graph.nodes import Sizes

_ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.DOUBLE: 8,
    TensorProto.INT8: 1, TensorProto.UINT8: 1, TensorProto.INT32: 4, TensorProto.INT64: 8, TensorProto.BOOL: 1,
}  # fmt: skip
_EIGHT_BIT = (TensorProto.INT8, TensorProto.UINT8)

VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Split"))
"""They move no data: the same memory is read under another shape. (A Split is along the outer axis here.)"""
_CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = frozenset(("MatMul", "Gemm", *_CONVOLUTIONS))
POINTWISE = frozenset((
    "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Erf", "Exp", "Tanh", "Sigmoid", "Pow", "Relu", "Gelu", "Clip", "Min",
    "Max", "Where", "Greater", "Less", "Equal", "Round", "Cast", "QuantizeLinear", "DequantizeLinear",
))  # fmt: skip

VECTOR_OPERATIONS: Mapping[str, int] = {
    "LayerNormalization": 8, "Softmax": 5, "Gelu": 10, "Erf": 8, "Resize": 7, "QuantizeLinear": 3,
    "Transpose": 0, "DepthToSpace": 0, "Concat": 0, "Slice": 0, "Gather": 0, "Expand": 0, "Pad": 0, "ArgMax": 1,
    "ReduceMean": 1, "ReduceMax": 1, "ReduceSum": 1, "AveragePool": 4, "MaxPool": 4,
}  # fmt: skip
"""Operations per output element; 1 for operators that are not listed."""
KNOWN = PRODUCTS | VIEWS | POINTWISE | VECTOR_OPERATIONS.keys() | {"Constant"}


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored."""

    name: str
    elements: int
    item_bytes: int
    eight_bit: bool  # whether it is INT8 or UINT8
    constant: bool

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.elements * self.item_bytes


@dataclass(frozen=True)
class Operator:
    """A node and its cost when it runs alone."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str  # of its product: ``int8``, ``fp16``, ``fp32``; of another operator, the type of the output
    product_flop: int  # operations of a product
    vector_flop: int  # operations of any other operator
    constant_bytes: int  # bytes of weights that it reads
    read_bytes: int  # all bytes that it reads, including weights
    written_bytes: int
    swaps_last_axes: bool  # whether it is a Transpose of only the last two axes, which a product can read directly


@dataclass(frozen=True)
class GraphCost:
    """The operators of a graph in the order of computation, and its tensors."""

    operators: tuple[Operator, ...]
    tensors: Mapping[str, Tensor]
    outputs: frozenset[str]
    batch: int
    precision: str  # ``fp32``, ``fp16`` or ``int8``
    unknown: tuple[str, ...]  # types not known here: one operation per element and a kernel each

    @property
    def product_flop(self) -> int:
        """Operations of all products, including those of attention."""
        return sum(operator.product_flop for operator in self.operators)


def read_operators(model: onnx.ModelProto) -> GraphCost:
    """Count the operators of a graph with static shapes.

    Raises:
        GraphError: a shape is not known, as in a CPU engine, whose operators have no shapes.
    """
    shapes = _shapes(model)
    constants = {item.name for item in model.graph.initializer}
    tensors: dict[str, Tensor] = {"": Tensor("", 0, 0, False, True)}
    for name, (dtype, sizes) in shapes.items():
        item = _ITEM_BYTES.get(dtype, 4)
        tensors[name] = Tensor(name, math.prod(sizes), item, dtype in _EIGHT_BIT, name in constants)
    operators, unknown = [], set()
    for node in model.graph.node:
        missing = next((name for name in (*node.input, *node.output) if name not in tensors), None)
        if missing is not None:
            raise GraphError(
                f"the shape of {missing!r} (node {node.name!r}, {node.op_type}) is not known",
                hint="name a graph that `cdkd-edge export` or `build --int8` wrote, in export/",
            )
        if node.domain not in ("", "ai.onnx") or node.op_type not in KNOWN:
            unknown.add(node.op_type)
        _store_as(node, tensors)
        operators.append(_cost(node, tensors, shapes))
    first = shapes[model.graph.input[0].name][1] if model.graph.input else ()
    precisions = {operator.precision for operator in operators if operator.product_flop}
    precision = "int8" if "int8" in precisions else "fp16" if precisions == {"fp16"} else "fp32"
    outputs = frozenset(item.name for item in model.graph.output)
    return GraphCost(
        tuple(operators), tensors, outputs, int(first[0]) if first else 1, precision, tuple(sorted(unknown))
    )


def _store_as(node: onnx.NodeProto, tensors: dict[str, Tensor]) -> None:
    """Correct how the outputs of a node are stored: as its input (views), or as constants."""
    source = tensors[node.input[0]] if node.input else tensors[""]
    for name in node.output:
        if node.op_type == "DequantizeLinear" or node.op_type in VIEWS:
            tensors[name] = replace(source, name=name, elements=tensors[name].elements)
        elif node.op_type == "Constant" or (node.input and all(tensors[given].constant for given in node.input)):
            tensors[name] = replace(tensors[name], constant=True)
        elif node.op_type in _CONVOLUTIONS and all(tensors[given].eight_bit for given in node.input[:2]):
            tensors[name] = replace(tensors[name], item_bytes=4)  # INT8 convolutions of TensorRT-RTX write FP32


def _cost(node: onnx.NodeProto, tensors: Mapping[str, Tensor], shapes: Sizes) -> Operator:
    inputs = [tensors[name] for name in node.input if name]
    outputs = [tensors[name] for name in node.output if name]
    folded = bool(outputs) and all(item.constant for item in outputs)
    free = folded or node.op_type in VIEWS or node.op_type == "DequantizeLinear"
    product = 0 if folded or node.op_type not in PRODUCTS else _product_flop(node, shapes)
    per_element = VECTOR_OPERATIONS.get(node.op_type, 1)
    perm = next((list(item.ints) for item in node.attribute if item.name == "perm"), [])
    return Operator(
        name=node.name or (node.output[0] if node.output else node.op_type), op=node.op_type,
        inputs=tuple(node.input), outputs=tuple(node.output), precision=_operator_precision(node, tensors),
        product_flop=product,
        vector_flop=0 if free or product else sum(item.elements for item in outputs) * per_element,
        constant_bytes=0 if free else sum(item.bytes for item in inputs if item.constant),
        read_bytes=0 if free else sum(item.bytes for item in inputs),
        written_bytes=0 if free else sum(item.bytes for item in outputs),
        swaps_last_axes=len(perm) > 1 and perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2],
    )  # fmt: skip


def _product_flop(node: onnx.NodeProto, shapes: Sizes) -> int:
    first, second, output = (shapes[name][1] for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":  # weight [M, C / groups, kh, kw]
        return 2 * math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight [C, M / groups, kh, kw]: each input value meets all but the first
        return 2 * math.prod(first) * math.prod(second[1:])
    transposed = node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute)
    return 2 * math.prod(output) * first[-2 if transposed else -1]


def _operator_precision(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> str:
    names = {1: "int8", 2: "fp16", 4: "fp32"}
    if node.op_type in PRODUCTS:
        first, second = (tensors[name] for name in node.input[:2])
        if first.eight_bit and second.eight_bit:
            return "int8"
        # If only one side is integers, it is converted to the type of the other.
        return names.get(max(first.item_bytes, second.item_bytes), "fp32")
    kinds = [tensors[name].item_bytes for name in node.output if name]
    return names.get(max(kinds, default=4), "other")


def _shapes(model: onnx.ModelProto) -> Sizes:
    """Type and shape of every value."""
    found = sizes_of(model, "the graph")
    for info in model.graph.input:
        if info.name not in found:
            hint = "a roofline needs one; export with a static batch"
            raise GraphError(f"input {info.name!r} has no fixed shape", hint=hint)
        if 0 in found[info.name][1]:
            raise GraphError(f"input {info.name!r} is empty: its shape is {list(found[info.name][1])}")
    return found
