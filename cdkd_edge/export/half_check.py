"""Is the FP16 graph good enough to build? Asked on a CPU, on imagery and on tiles made to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from cdkd_edge.errors import NumericalCheckError
from cdkd_edge.export.fuse import fuse_attention
from cdkd_edge.export.half import FP16_MAX, fp16_on_cpu, rounded_values
from cdkd_edge.export.session import cpu_session
from cdkd_edge.manifest import ConversionCheck

UInt8Array = npt.NDArray[np.uint8]

MIN_AGREEMENT = 0.999
"""Share of pixels that must keep their label in FP16."""


def check_half(
    plain: Path,
    half: onnx.ModelProto,
    tiles: Iterable[UInt8Array],
    imagery: str,
    progress: Callable[[str], None] = lambda step: None,
    *,
    least: float = MIN_AGREEMENT,
) -> ConversionCheck:
    """Compare an FP16 graph, with or without INT8 layers, with the FP32 graph it was made from.

    Args:
        plain: the FP32 graph.
        half: the FP16 graph.
        tiles: uint8 ``[3, T, T]`` tiles; as many as the caller has time for, a few seconds each at 1024 px.
        imagery: what they are, for the manifest.
        progress: called with the name of each step.
        least: share of pixels that must keep their label.

    Raises:
        NumericalCheckError: fewer pixels keep their label, or a value leaves FP16's range, be it
            on these tiles or on one that is all 0, all 255, a checkerboard or noise.
        ValueError: there is no tile.
    """
    model = onnx.load(plain)
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    shown = list(tiles)
    if not shown:
        raise ValueError("there is no tile to check FP16 on")
    batches = list(_batches(shown, shape[0]))
    fuse_attention(model)
    progress("labels of the FP32 graph")
    session = cpu_session(model, in_order=True)
    del model
    expected = [session.run(["labels"], {"image": batch})[0] for batch in batches]
    del session

    rehearsal = fp16_on_cpu(half)
    probes = _add_probes(rehearsal)
    # In ONNX Runtime's own order probes run last, and keep what they look at.
    session = cpu_session(rehearsal, in_order=True)
    del rehearsal

    def labels_of(batch: UInt8Array, what: str) -> UInt8Array:
        found, *values = session.run(["labels", *probes.sums, *probes.bounds], {"image": batch})
        _require_range(what, probes, values)
        labels: UInt8Array = found
        return labels

    progress("labels in FP16")
    agreeing, left = 0, len(shown)
    for batch, labels in zip(batches, expected, strict=True):
        agreeing += int(np.count_nonzero((labels_of(batch, "the imagery") == labels)[:left]))
        left -= len(batch)
    progress("extreme tiles in FP16")
    for name, tile in extreme_tiles(shape[-1]).items():
        labels_of(np.repeat(tile[None], shape[0], axis=0), name)
    agreement = agreeing / (len(shown) * shape[-1] ** 2)
    if agreement < least:
        raise NumericalCheckError(
            f"in lower precision the network gives another label on {1 - agreement:.2%} of the pixels of {imagery} "
            f"tiles (at most {1 - least:.1%} is allowed)",
            hint="keep more layers in FP16 (--auto with a higher --min-agreement), or build --fp16"
            if any(node.op_type == "QuantizeLinear" for node in half.graph.node)
            else "deploy it in FP32, or give tiles of your own imagery (--calibration): those may be less ambiguous",
        )
    return ConversionCheck(
        tiles=len(shown),
        imagery=imagery,
        label_agreement=agreement,
        finite=True,
        runtime=f"onnxruntime {onnxruntime.__version__}, values rounded to FP16",
    )


def extreme_tiles(tile: int) -> dict[str, UInt8Array]:
    """Tiles that no scene holds and every network must survive, uint8 ``[3, T, T]``."""
    squares = np.indices((tile, tile)).sum(axis=0) % 2 * np.uint8(255)
    return {
        "a black tile": np.zeros((3, tile, tile), np.uint8),
        "a white tile": np.full((3, tile, tile), 255, np.uint8),
        "a checkerboard": np.repeat(squares[None].astype(np.uint8), 3, axis=0),
        "noise": np.random.default_rng(0).integers(0, 256, (3, tile, tile), np.uint8),
    }


def _batches(tiles: Iterable[UInt8Array], size: int) -> Iterator[UInt8Array]:
    """Tiles in batches; the last tile fills up the last batch."""
    batch: list[UInt8Array] = []
    for tile in tiles:
        batch.append(tile)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch + [batch[-1]] * (size - len(batch)))


@dataclass(frozen=True)
class _Probes:
    """Outputs of a graph that tell whether all its values are in FP16's range."""

    sums: dict[str, str]
    """By name of the output, the value that it is the sum of."""
    bounds: dict[str, str]
    """By name of the output, the attention that it bounds the scores of."""


def _add_probes(model: onnx.ModelProto) -> _Probes:
    """Sums of all values that an engine stores, and bounds of what fused attention never shows, as outputs.

    A sum is finite if and only if all its terms are (FP16's largest number, ten million times, is far from FP32's end).
    Finite logits prove nothing: a quantiser makes 127 of infinity and -128 of NaN. What ReLU alone takes is looked at
    behind it, where -infinity has become 0 as it should.
    """
    graph = model.graph
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    watched = set()
    for name in rounded_values(model):
        following = users.get(name, [])
        only_relu = len(following) == 1 and following[0].op_type == "Relu"
        watched.add(following[0].output[0] if only_relu else name)
    probes = _Probes({}, {})
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "MultiHeadAttention":
            nodes += _score_bound(model, node)
            probes.bounds[nodes[-1].output[0]] = node.output[0].removesuffix(".exact")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if node.output[0] in watched:
            made = f"{node.output[0]}.sum_of_all"
            nodes.append(helper.make_node("ReduceSum", [node.output[0]], [made], keepdims=0))
            probes.sums[made] = node.output[0]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*probes.sums, *probes.bounds)
    )
    return probes


def _score_bound(model: onnx.ModelProto, attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that bound the scores of fused attention; the last gives one float per head.

    No score of a head exceeds its longest query times its longest key (Cauchy-Schwarz).
    """
    graph = model.graph
    by_attribute = next(item.version for item in model.opset_import if item.domain == "") < 18
    heads = next(item.i for item in attention.attribute if item.name == "num_heads")
    nodes, sides = [], []
    for side, value in zip(("q", "k"), attention.input[:2], strict=True):
        name = f"{attention.output[0]}.{side}_length"
        graph.initializer.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [4], [0, 0, heads, -1]))
        nodes.append(helper.make_node("Reshape", [value, f"{name}.shape"], [f"{name}.heads"]))
        for op, source, made, axes in (
            ("ReduceL2", f"{name}.heads", f"{name}.norms", [3]),
            ("ReduceMax", f"{name}.norms", name, [0, 1]),
        ):
            if by_attribute:
                nodes.append(helper.make_node(op, [source], [made], axes=axes, keepdims=0))
                continue
            graph.initializer.append(helper.make_tensor(f"{made}.axes", TensorProto.INT64, [len(axes)], axes))
            nodes.append(helper.make_node(op, [source, f"{made}.axes"], [made], keepdims=0))
        sides.append(name)
    return [*nodes, helper.make_node("Mul", sides, [f"{attention.output[0]}.score_bound"])]


def _require_range(what: str, probes: _Probes, values: list[npt.NDArray[np.float32]]) -> None:
    """Values are those of the sums, then those of the bounds."""
    for name, value in zip(probes.sums.values(), values, strict=False):
        if not np.isfinite(value):
            raise NumericalCheckError(f"on {what} {name} leaves FP16's range", hint="deploy this network in FP32")
    for name, value in zip(probes.bounds.values(), values[len(probes.sums) :], strict=True):
        if not (value <= FP16_MAX).all():
            raise NumericalCheckError(
                f"on {what} attention scores ({name}) may reach {value.max():.3g}, beyond FP16's {FP16_MAX:.0f}",
                hint="deploy this network in FP32",
            )
