"""FP16 arithmetic on a CPU: an FP32 graph that rounds every value as an FP16 engine does, and a watch on its range.

Running the FP16 graph itself in ONNX Runtime on a CPU proves nothing about its activations: operators without an FP16
kernel run in FP32, and the casts between them are removed at every optimisation level, so a value of 9,000,000 passes
through an FP16 tensor unharmed (measured with 1.31). Pairs of casts that are written into the graph are kept. They
round every value that a TensorRT engine stores, and overflow as it would.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cdkd_edge.core.errors import GraphError, NumericalCheckError
from cdkd_edge.graph.cpu import cpu_session, fuse_attention, to_fp32
from cdkd_edge.graph.layers import search_classes
from cdkd_edge.graph.nodes import GraphIndex, NodeWriter, attribute_of, copy_of, replace_nodes, show_values

UInt8Array = npt.NDArray[np.uint8]

FP16_MAX = 65504.0
ROUNDOFF = 2.0**-11  # FP16 moves a number by at most this share of it
SPREADS = 5.0  # standard deviations that a logit may be off, so that none of a million is off by chance
IN_FP32 = "deploy this network in FP32"

_MOVES_ONLY = {"Reshape", "Transpose", "Split", "Concat", "Slice", "Relu"}  # their inputs were rounded
# Their outputs are integers, or integers times a scale, which products take as they are
_NOT_FP16 = {"Cast", "ArgMax", "QuantizeLinear", "DequantizeLinear"}


class OutOfRangeError(NumericalCheckError):
    """A value is too large for FP16."""


def fp16_on_cpu(half: onnx.ModelProto) -> onnx.ModelProto:
    """A graph in FP32 that computes on a CPU what an engine of an FP16 graph, with or without INT8 layers, computes.

    Every value that an engine stores is rounded to FP16, beyond 65504 to infinity. What kernels hold in FP32 is not:
    the product before a bias, what is inside normalisation, what the graph itself computes in FP32. Sums inside fused
    attention are FP32 too, which not every kernel has (:mod:`.fp16_attention`). Q/DQ stay as they are.
    """
    wide = _fp32_values(half.graph)
    model = to_fp32(half)
    search_classes(model)
    fuse_attention(model)
    index = GraphIndex(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        copy, name = copy_of(node), node.output[0]
        nodes.append(copy)
        if name not in wide and _is_stored(node, index):
            exact, rounded = f"{name}.exact", f"{name}.half"
            copy.output[0] = exact
            nodes.append(helper.make_node("Cast", [exact], [rounded], name=f"{name}/Round", to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [rounded], [name], name=f"{name}/Widen", to=TensorProto.FLOAT))
    replace_nodes(model.graph, nodes)
    return model


def rounded_values(simulation: onnx.ModelProto) -> list[str]:
    """The values that a graph of :func:`fp16_on_cpu` rounds, in the order of computation."""
    return [node.output[0] for node in simulation.graph.node if node.name.endswith("/Widen")]


def longest_rounding(simulation: onnx.ModelProto) -> int:
    """The largest number of values that are rounded one after the other on the way to a label."""
    rounded = set(rounded_values(simulation))
    before: dict[str, int] = {}
    for node in simulation.graph.node:
        most = max((before.get(name, 0) for name in node.input), default=0)
        before |= {name: most + (name in rounded) for name in node.output}
    return before["labels"]


def rounding_share(roundings: int) -> float:
    """By which share of itself a value moves at most if it is rounded ``roundings`` times one after the other.

    Each of n roundings moves it by up to u = 2^-11 of itself, with a standard deviation of u / sqrt(3) if all errors up
    to u are equally likely. Errors are independent, so n of them have sqrt(n) times that; five times this is allowed.
    """
    return SPREADS * ROUNDOFF * math.sqrt(roundings / 3)


def extreme_tiles(tile: int) -> dict[str, UInt8Array]:
    """Tiles that are in no scene and that every network must survive, uint8 ``[3, T, T]``."""
    squares = np.indices((tile, tile)).sum(axis=0) % 2 * np.uint8(255)
    return {
        "a black tile": np.zeros((3, tile, tile), np.uint8),
        "a white tile": np.full((3, tile, tile), 255, np.uint8),
        "a checkerboard": np.repeat(squares[None].astype(np.uint8), 3, axis=0),
        "noise": np.random.default_rng(0).integers(0, 256, (3, tile, tile), np.uint8),
    }


class RangeWatch:
    """Runs a graph of :func:`fp16_on_cpu` and raises an error when a value leaves FP16's range.

    Watched are the sums of all stored values: a sum is finite if and only if all its terms are (FP16's largest number
    times ten million is far from FP32's end). Finite logits prove nothing, because a quantiser turns infinity into 127
    and NaN into -128. Where ReLU alone uses a value, the sum is taken behind it, where -infinity has become 0.
    What fused attention adds up inside is another matter (:mod:`.fp16_attention`).
    """

    def __init__(self, simulation: onnx.ModelProto) -> None:
        """Add the watched outputs to a graph, which is changed, and load it."""
        self._sums: dict[str, str] = {}  # by name of the output, the value that it is the sum of
        index = GraphIndex(simulation.graph)
        watched = set()
        for name in rounded_values(simulation):
            user = index.only_user(name)
            watched.add(user.output[0] if user is not None and user.op_type == "Relu" else name)
        writer = NodeWriter()
        for node in simulation.graph.node:
            writer.nodes.append(node)
            if node.output[0] in watched:
                total = writer.add("ReduceSum", f"{node.output[0]}.sum_of_all", node.output[0], keepdims=0)
                self._sums[total] = node.output[0]
        writer.replace_nodes(simulation)
        show_values(simulation, self._sums)
        self._session = cpu_session(simulation)

    def run(self, outputs: list[str], batch: UInt8Array, what: str) -> list[npt.NDArray[Any]]:
        """Outputs of a batch ``[N, 3, T, T]``; OutOfRangeError that names ``what`` if a value leaves FP16's range."""
        names = [*outputs, *self._sums]
        found = dict(zip(names, run_session(self._session, names, batch), strict=True))
        for output, name in self._sums.items():
            if not np.isfinite(found[output]):
                raise OutOfRangeError(f"on {what} {name} leaves FP16's range", hint=IN_FP32)
        return [found[name] for name in outputs]


def run_session(session: Any, outputs: list[str], batch: UInt8Array) -> list[npt.NDArray[Any]]:
    """Run a session on a batch of tiles; GraphError if ONNX Runtime does not."""
    try:
        values: list[npt.NDArray[Any]] = session.run(outputs, {"image": batch})
    except Exception as error:  # ONNX Runtime's own types share no base but Exception
        raise GraphError(f"ONNX Runtime does not run the graph: {' '.join(str(error).split())[:300]}") from None
    return values


def _is_stored(node: onnx.NodeProto, index: GraphIndex) -> bool:
    """Whether an engine writes the node's output to memory as a value that may need rounding."""
    if node.op_type in _MOVES_ONLY | _NOT_FP16:
        return False
    user = index.only_user(node.output[0])
    if node.op_type == "MatMul" and user is not None and user.op_type == "Add":
        return not any(name in index.constants for name in user.input)
    return True


def _fp32_values(graph: onnx.GraphProto) -> set[str]:
    """The values that an FP16 graph computes in FP32: those behind a cast to it, such as confidence."""
    wide: set[str] = set()
    for node in graph.node:  # in the order of computation
        is_cast = node.op_type == "Cast"
        if attribute_of(node, "to") == TensorProto.FLOAT if is_cast else not wide.isdisjoint(node.input):
            wide.update(node.output)
    return wide
