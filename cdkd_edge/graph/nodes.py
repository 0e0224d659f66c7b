"""Nodes of an ONNX graph: write them, find them, replace them, simplify the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.core.errors import GraphError, MissingExtraError

# Operators that only ONNX Runtime has: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
CONTRIB_DOMAIN = "com.microsoft"

Note = Callable[[str], None]  # called with the name of each step

Sizes = Mapping[str, tuple[int, tuple[int, ...]]]  # ONNX type and sizes of values by name

Message = TypeVar("Message", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto)


class NodeWriter:
    """Collects nodes, and constants in a dictionary that may be shared."""

    def __init__(self, constants: dict[str, onnx.TensorProto] | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {} if constants is None else constants

    def add(self, op: str, name: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Append a node; its (first) output is called ``name`` unless ``outputs`` says otherwise."""
        outputs = list(outputs) or [name]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=f"{name}/{op}", **attributes))
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        """Store a constant; the same name is stored once."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def model(self, name: str, inputs: Sizes, outputs: Sizes, opset: int) -> onnx.ModelProto:
        """A graph of these nodes and constants."""
        given, made = (
            [helper.make_tensor_value_info(value, *kind) for value, kind in ends.items()] for ends in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, name, given, made, initializer=list(self.constants.values()))
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))

    def replace_nodes(self, model: onnx.ModelProto) -> None:
        """Put these nodes in place of a graph's, and these constants beside its own."""
        replace_nodes(model.graph, self.nodes)
        model.graph.initializer.extend(self.constants.values())


class GraphIndex:
    """Which node makes and which nodes use each value of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.maker = {output: node for node in graph.node for output in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}  # a node that uses a value twice is listed twice
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.constants = {item.name: item for item in graph.initializer}
        self.outputs = {output.name for output in graph.output}

    def only_user(self, value: str) -> onnx.NodeProto | None:
        """The node that uses a value, if there is exactly one use."""
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 else None


def copy_of(message: Message) -> Message:
    """A copy of a graph, a node or a constant."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def replace_nodes(
    graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto] | None = None
) -> None:
    """Give a graph other nodes, and other constants unless they are None; both may be the graph's own."""
    copies = [copy_of(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    if constants is not None:
        kept = [copy_of(item) for item in constants]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def retype(graph: onnx.GraphProto, old: int, new: int, keep: Iterable[str] = ()) -> None:
    """Turn constants of one ONNX type, except those to ``keep``, and casts to it into another type."""
    for item in graph.initializer:
        if item.data_type == old and item.name not in keep:
            value = numpy_helper.to_array(item).astype(helper.tensor_dtype_to_np_dtype(new))
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
                attribute.i = new


def show_values(model: onnx.ModelProto, names: Iterable[str], kind: int = TensorProto.FLOAT) -> None:
    """Make values of one ONNX type inside a graph outputs of it, beside those it has."""
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or ``default`` if it has none of that name."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a graph uses."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def batch_of(model: onnx.ModelProto) -> int:
    """The number of tiles that a graph takes at a time."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)


# TensorRT and ONNX Runtime both run [N, L, D] tokens fastest as MatMul + Add. onnxsim would turn them into rank-2
# Gemms between Reshapes: more nodes, and a form that TensorRT compiles worse in FP16. With the two transposes of
# keys merged into one, TensorRT needs four more layers per attention.
SKIPPED_PASSES = (
    "fuse_consecutive_transposes",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_transpose_into_gemm",
    "fuse_qkv",
)


def simplify_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A checked graph without dead ends, no-ops, duplicate constants; ``model`` itself if that has fewer nodes."""
    try:
        import onnxsim
    except ImportError:
        raise MissingExtraError("onnxsim", "export", "simplifying the graph") from None
    simplified: onnx.ModelProto
    simplified, valid = onnxsim.simplify(model, skipped_optimizers=list(SKIPPED_PASSES))
    if not valid:
        raise GraphError("onnxsim changed what the graph computes")
    if len(simplified.graph.node) > len(model.graph.node):
        simplified = model
    # onnxsim leaves a diary in the metadata; a deployed graph carries facts about the network only.
    del simplified.metadata_props[:]
    simplified.producer_name, simplified.producer_version = model.producer_name, model.producer_version
    try:
        onnx.checker.check_model(simplified, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {str(error)[:300]}") from None
    return simplified
