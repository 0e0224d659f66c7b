"""Which nodes of a graph are which layers of the network: the one place that knows names and forms of :mod:`.build`.

Whoever changes the operators there changes here how linears, convolutions and logits are found, and in
:mod:`.attention` how attention is. INT8, FP16, further outputs, the roofline and the times of layers ask these
functions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cdkd_edge.core.errors import GraphError
from cdkd_edge.core.manifest import LABELS
from cdkd_edge.graph.files import inferred_sizes
from cdkd_edge.graph.nodes import GraphIndex, NodeWriter, replace_nodes

Array = npt.NDArray[np.float32]

_AGAIN = "export the checkpoint again with this release"
_BLOCK_LINEAR = re.compile(r"(blocks\.\d+)\.(attn\.proj|mlp\.fc1|mlp\.fc2)$")


class NetworkPart(NamedTuple):
    """A layer of the network as people know it; a runtime computes it in one kernel or in several."""

    name: str
    block: int | None = None  # number of the encoder's block, from 0; None outside the blocks


_PARTS = tuple(
    (re.compile(rf"(?<![\w.])(?:{pattern})"), name)
    for pattern, name in (
        (r"\{?ForeignNode\[", "several at once"),  # TensorRT did not list what is in it
        (r"blocks\.(\d+)\.norm(?:[12]|ed)", "LayerNorm"),
        (r"blocks\.(\d+)\.attn\.(?:(?:[qkv]|qkv|input)(?![\w.])|means)", "queries, keys, values"),
        (r"blocks\.(\d+)\.(?:attn\.proj|after_attn)", "attention output"),
        (r"blocks\.(\d+)\.attn\.", "attention"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1|gelu|swiglu)", "MLP fc1, activation"),
        (r"blocks\.(\d+)\.(?:mlp\.fc2|out)", "MLP fc2"),
        (r"image|pixels|patch|squares|all_tokens|tokens", "patch embedding"),
        (r"pool\.|context|deep\.|bottleneck", "pyramid pooling"),
        (r"lateral\.|level\.|blocks\.\d+\.patches", "laterals"),
        (r"smooth\.", "smoothing"),
        (r"levels|fuse", "fuse"),
        (r"logits|scores|best|labels|rounded|confidence|probabilities", "classifier, up-sampling"),
    )
)
_PRODUCT = re.compile(r"/(?:MatMul|Conv|Gemm|MultiHeadAttention)")


def parts_of(kernels: Sequence[Iterable[str]]) -> list[NetworkPart]:
    """The parts that kernels compute, which are given in their order by the names of their nodes.

    A kernel of several nodes computes the part of its first product, else of its first node; quantisation belongs to
    the product after it. A kernel that names no node of the graph (a copy, another layout) serves the one after it.
    """
    parts = [NetworkPart("others")]
    for names in reversed(kernels):
        parts.append(_part(names) or parts[-1])
    return parts[:0:-1]


def _part(names: Iterable[str]) -> NetworkPart | None:
    def rank(name: str) -> int:
        return 0 if _PRODUCT.search(name) else 2 if "QuantizeLinear" in name else 1

    for name in sorted(names, key=rank):
        for pattern, title in _PARTS:
            if found := pattern.search(name):
                return NetworkPart(title, int(found[1]) if found.groups() else None)
    return None


@dataclass(frozen=True)
class QuantizableLayer:
    """A ``MatMul`` or ``Conv`` of an exported FP32 graph, with constant weights."""

    name: str  # of the module, e.g. ``blocks.3.mlp.fc1`` or ``fuse``
    node: str  # name of the node
    op: str
    input: str  # the value that is quantised: tokens ``[N, L, K]``, or a map ``[N, C, G, G]``
    weight: str  # the initialiser: ``[K, M]`` of a MatMul, ``[M, C, 3, 3]`` of a Conv
    product: str  # the node's output, ``[N, L, M]`` or ``[N, M, G, G]``
    macs: int  # multiply-accumulates per tile

    @property
    def output_axis(self) -> int:
        """Axis of the weight along which every output channel has its own scale."""
        return 1 if self.op == "MatMul" else 0


def quantizable_layers(model: onnx.ModelProto) -> list[QuantizableLayer]:
    """The layers that INT8 is for, in the order of computation: proj, fc1, fc2 and 3x3 convolutions.

    Attention's own products stay FP16: TensorRT fuses INT8 attention only up to 512 tokens, and these tiles have 4096.
    So do the projections to q, k and v: quantised, they would each store their input once more. Residual sums,
    LayerNorm, softmax and GELU lose most and gain nothing. The rest (patch embedding, 1x1 convolutions, pyramid
    pooling) is 3 % of the work.

    Raises:
        GraphError: the graph has none; :mod:`cdkd_edge.graph.build` did not write it.
    """
    constants = {item.name: item for item in model.graph.initializer}
    if "context.spread" not in constants:
        raise GraphError("the graph has no layer that INT8 is for", hint=_AGAIN)
    sizes = inferred_sizes(model)
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Conv") or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        name = node.name.rsplit("/", 1)[0].removesuffix(".product")
        if node.op_type == "MatMul":
            quantizable = bool(_BLOCK_LINEAR.match(name)) and len(weight.dims) == 2
        else:
            quantizable = list(weight.dims[2:]) == [3, 3]
            name = name.removesuffix(".conv")
        if quantizable:
            values = (node.input[0], node.input[1], node.output[0])
            _, shape = sizes[node.output[0]]  # [N, L, M] or [N, M, G, G]
            per_output = math.prod(weight.dims) // shape[2 if node.op_type == "MatMul" else 1]
            layers.append(QuantizableLayer(name, node.name, node.op_type, *values, math.prod(shape[1:]) * per_output))
    if not layers:
        raise GraphError("the graph has no layer that INT8 is for", hint=_AGAIN)
    return layers


def weight_only_layers(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Matrices stored as INT8 and multiplied in FP16: the node and the initialiser of each.

    This is the bottleneck's share of the pyramid: a fifth of the 3x3 convolution's weights, used on 50 cells per tile.
    INT8 arithmetic would gain nothing there, but the file becomes 2.4 MB smaller.
    """
    constants = {item.name for item in model.graph.initializer}
    taps = [node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith("context.taps/")]
    return [(node.name, node.input[1]) for node in taps if node.input[1] in constants]


def sparse_linears(model: onnx.ModelProto) -> tuple[int, int]:
    """How many linear layers of the blocks have 2:4 sparse weights, and how many there are.

    Of four successive inputs of an output at most two then have a weight (:mod:`cdkd_edge.model.sparsity`).
    """
    constants = {item.name: item for item in model.graph.initializer}
    makers = GraphIndex(model.graph).maker
    sparse = total = 0
    for node in model.graph.node:
        name = node.name.rsplit("/", 1)[0].removesuffix(".product")
        if node.op_type != "MatMul" or not _BLOCK_LINEAR.match(name):
            continue
        source = node.input[1]
        while source in makers:  # casts and quantised weights
            source = makers[source].input[0]
        weight = numpy_helper.to_array(constants[source])  # [K, M]
        total += 1
        groups = weight[: len(weight) // 4 * 4].reshape(-1, 4, weight.shape[1])
        sparse += len(weight) % 4 == 0 and int((groups == 0).sum(axis=1).min()) >= 2
    return sparse, total


def weight_of(model: onnx.ModelProto, name: str) -> Array:
    """An initialiser as FP32."""
    item = next(item for item in model.graph.initializer if item.name == name)
    return numpy_helper.to_array(item).astype(np.float32)


class NodeConstant(NamedTuple):
    """A constant that is an input of a node."""

    node: onnx.NodeProto
    position: int  # which input
    part: int | None = None  # which part of it along its first axis; None: all of it


def multiply_constant(
    model: onnx.ModelProto, users: Counter[str], constant: NodeConstant, factor: npt.ArrayLike
) -> None:
    """Multiply the constant that is an input of a node, for this node alone.

    ``users`` are the graph's nodes by the name of what they use, counted; they are kept up to date.
    """
    node, position, part = constant
    name = node.input[position]
    stored = numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))
    factors = np.ones(stored.shape)
    factors[... if part is None else part] = factor
    if users[name] > 1:  # simplification stores equal constants once
        users[name] -= 1
        name = f"{node.name}.scaled_{position}"
        users[name] = 1
        node.input[position] = name
        model.graph.initializer.add(name=name)
    item = next(item for item in model.graph.initializer if item.name == name)
    with np.errstate(over="ignore"):  # infinity in FP16 is found when the graph is checked
        item.CopyFrom(numpy_helper.from_array((stored * factors).astype(stored.dtype), name))


def constant_users(model: onnx.ModelProto) -> Counter[str]:
    """How many times the nodes of a graph use each value."""
    return Counter(name for node in model.graph.node for name in node.input)


def part_makers(index: GraphIndex, block: str, part: str) -> list[NodeConstant]:
    """The constants that scale the queries, keys or values (``q``, ``k``, ``v``) of ``block``, ``blocks.3.attn``.

    Those of the norm of queries or keys if there is one, else the projection, which may be stacked with others.
    """
    for name in (f"{part}.normed", f"{part}.both_normed", part, "qkv"):
        node = index.maker.get(f"{block}.{name}")
        if node is not None and node.op_type in ("MatMul", "LayerNormalization"):
            which = "qkv".index(part) if name == "qkv" else None
            return _constants_of(index, node, which)
    return []


def _constants_of(index: GraphIndex, node: onnx.NodeProto, part: int | None = None) -> list[NodeConstant]:
    return [NodeConstant(node, at, part) for at, name in enumerate(node.input) if name in index.constants]


def input_makers(model: onnx.ModelProto, layer: QuantizableLayer) -> list[NodeConstant]:
    """The constants by which SmoothQuant divides a layer's input; empty where no constant makes it.

    For fc1: LayerNorm's scale and shift. For proj: the projection to v, because attention mixes tokens only.
    """
    index, found = GraphIndex(model.graph), _BLOCK_LINEAR.match(layer.name)
    if not found or found[2] == "mlp.fc2":
        return []
    if found[2] == "attn.proj":
        return part_makers(index, f"{found[1]}.attn", "v")
    maker = index.maker.get(layer.input)
    return _constants_of(index, maker) if maker is not None and maker.op_type == "LayerNormalization" else []


def scores_of(model: onnx.ModelProto) -> str:
    """The name of the logits at full resolution, ``[N, K, T, T]``, if the graph ends in the best class and casts."""
    best = _best_class(GraphIndex(model.graph))
    if [output.name for output in model.graph.output] != [LABELS] or best is None:
        raise GraphError(
            "the graph does not end in labels alone, as the best class of its logits",
            hint="use the graph that `cdkd-edge export` wrote",
        )
    return str(best.input[0])


def _best_class(index: GraphIndex) -> onnx.NodeProto | None:
    """The ArgMax before the labels, or the Split with which the comparisons of :func:`compare_classes` begin."""
    node: onnx.NodeProto | None = index.maker.get(LABELS)
    while node is not None and node.op_type == "Cast":
        node = index.maker.get(node.input[0])
    for op in ("Squeeze", "Where", "Greater"):  # each made from the next one's output
        if node is None or node.op_type == "ArgMax":
            return node
        node = index.maker.get(node.input[0]) if node.op_type == op else None
    return node if node is not None and node.op_type == "Split" else None


def compare_classes(model: onnx.ModelProto) -> None:
    """Write ArgMax of the scores as a chain of comparisons, in place: what TensorRT runs with less memory traffic.

    The first of equal scores wins, as with ArgMax. TensorRT reduces over the classes in a kernel of its own that
    reads scores from memory; comparisons become one kernel with the up-sampling. Class numbers are in FP16, which
    holds integers to 2048, because TensorRT casts only floating point to uint8. On a CPU the chain is slower.
    """
    index = GraphIndex(model.graph)
    argmax = _best_class(index)
    classifier = index.maker.get(logits_of(model))
    if argmax is None or argmax.op_type != "ArgMax" or classifier is None or classifier.op_type != "Conv":
        raise GraphError("the graph does not end in a classifier, up-sampling and ArgMax", hint=_AGAIN)
    scores, classes = argmax.input[0], index.constants[classifier.input[1]].dims[0]
    if classes < 2:
        return
    writer = NodeWriter()
    numbers = [writer.constant(f"class_{number}", np.full((1,) * 4, number, np.float16)) for number in range(classes)]
    parts = [f"best.score_{number}" for number in range(classes)]
    last = index.maker[LABELS].input[0]
    for node in model.graph.node:
        if node.output[0] != last:
            if node.output[0] != argmax.output[0]:  # whose cast to floats, which is `last`, the chain does not need
                writer.nodes.append(node)
            continue
        sizes = writer.constant("best.sizes", np.ones(classes, np.int64))
        best, label = writer.add("Split", "best.scores", scores, sizes, outputs=parts, axis=1), numbers[0]
        for number in range(1, classes):
            better = writer.add("Greater", f"best.better_{number}", parts[number], best)
            label = writer.add("Where", f"best.label_{number}", better, numbers[number], label)
            if number < classes - 1:
                best = writer.add("Max", f"best.score_to_{number}", best, parts[number])
        axis = writer.constant("best.axis", np.array([1], np.int64))
        writer.add("Squeeze", last, label, axis)
    writer.replace_nodes(model)


def search_classes(model: onnx.ModelProto) -> None:
    """Undo :func:`compare_classes`, in place, for a CPU."""
    index = GraphIndex(model.graph)
    split = _best_class(index)
    if split is None or split.op_type != "Split":
        return
    best = index.maker[LABELS].input[0]
    chain, waiting = {best}, list(split.output)
    while waiting:
        value = waiting.pop()
        if value not in chain:
            chain.add(value)
            waiting += [
                output for user in index.users.get(value, []) if user.op_type != "Cast" for output in user.output
            ]
    writer = NodeWriter()
    for node in model.graph.node:
        if node.output[0] == best:
            writer.add("ArgMax", best, split.input[0], axis=1, keepdims=0)
        elif node.output[0] not in chain:
            writer.nodes.append(node)
    used = {name for node in writer.nodes for name in node.input}
    replace_nodes(model.graph, writer.nodes, [item for item in model.graph.initializer if item.name in used])


def logits_of(model: onnx.ModelProto) -> str:
    """The name of the logits as the network computes them, ``[N, K, G, G]``, if the graph up-samples these."""
    resize = GraphIndex(model.graph).maker.get(scores_of(model))
    if resize is None or resize.op_type != "Resize":
        raise GraphError("the graph does not end in up-sampled logits", hint="export the checkpoint again")
    return str(resize.input[0])
