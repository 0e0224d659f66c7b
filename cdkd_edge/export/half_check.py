"""Is the FP16 graph good enough to build? Asked on a CPU, on imagery and on tiles made to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from cdkd_edge.errors import NumericalCheckError
from cdkd_edge.export.fuse import fuse_attention
from cdkd_edge.export.graph import LOGITS
from cdkd_edge.export.half import FP16_MAX, fp16_on_cpu
from cdkd_edge.machine import available_cores
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
    """
    model = onnx.load(plain)
    shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    batches = list(_batches(tiles, shape[0]))
    fuse_attention(model)
    progress("labels of the FP32 graph")
    session = _session(model)
    del model
    expected = [session.run(["labels"], {"image": batch})[0] for batch in batches]
    del session

    rehearsal = fp16_on_cpu(half)
    bounds = _add_score_bounds(rehearsal)
    rehearsal.graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, None))
    outputs = ["labels", LOGITS, *bounds]
    session = _session(rehearsal)
    del rehearsal
    progress("labels in FP16")
    agreeing = 0
    for batch, labels in zip(batches, expected, strict=True):
        found, *rest = session.run(outputs, {"image": batch})
        _require_range("the imagery", rest[0], rest[1:])
        agreeing += int(np.count_nonzero(found == labels))
    progress("extreme tiles in FP16")
    for name, tile in extreme_tiles(shape[-1]).items():
        _, *rest = session.run(outputs, {"image": np.repeat(tile[None], shape[0], axis=0)})
        _require_range(name, rest[0], rest[1:])
    agreement = agreeing / sum(labels.size for labels in expected)
    if agreement < least:
        raise NumericalCheckError(
            f"in lower precision the network gives another label on {1 - agreement:.2%} of the pixels of {imagery} "
            f"tiles (at most {1 - least:.1%} is allowed)",
            hint="deploy it in FP32, or give tiles of your own imagery (--calibration): those may be less ambiguous",
        )
    return ConversionCheck(
        tiles=sum(map(len, batches)),
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


def _add_score_bounds(model: onnx.ModelProto) -> list[str]:
    """Outputs that bound the attention scores, which fused attention never shows.

    No score of a head exceeds its longest query times its longest key (Cauchy-Schwarz).

    Returns:
        The names of the outputs, one float per head each.
    """
    graph, names = model.graph, []
    by_attribute = next(item.version for item in model.opset_import if item.domain == "") < 18
    for node in [node for node in graph.node if node.op_type == "MultiHeadAttention"]:
        heads = next(item.i for item in node.attribute if item.name == "num_heads")
        sides = []
        for side, value in zip(("q", "k"), node.input[:2], strict=True):
            name = f"{node.output[0]}.{side}_length"
            graph.initializer.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [4], [0, 0, heads, -1]))
            graph.node.append(helper.make_node("Reshape", [value, f"{name}.shape"], [f"{name}.heads"]))
            for op, source, made, axes in (
                ("ReduceL2", f"{name}.heads", f"{name}.norms", [3]),
                ("ReduceMax", f"{name}.norms", name, [0, 1]),
            ):
                if by_attribute:
                    graph.node.append(helper.make_node(op, [source], [made], axes=axes, keepdims=0))
                    continue
                graph.initializer.append(helper.make_tensor(f"{made}.axes", TensorProto.INT64, [len(axes)], axes))
                graph.node.append(helper.make_node(op, [source, f"{made}.axes"], [made], keepdims=0))
            sides.append(name)
        bound = f"{node.output[0]}.score_bound"
        graph.node.append(helper.make_node("Mul", sides, [bound]))
        graph.output.append(helper.make_tensor_value_info(bound, TensorProto.FLOAT, None))
        names.append(bound)
    return names


def _require_range(what: str, logits: npt.NDArray[np.float32], bounds: list[npt.NDArray[np.float32]]) -> None:
    if not np.isfinite(logits).all():
        raise NumericalCheckError(f"on {what} a value leaves FP16's range", hint="deploy this network in FP32")
    largest = max((float(bound.max()) for bound in bounds), default=0.0)
    if not largest <= FP16_MAX:
        raise NumericalCheckError(
            f"on {what} attention scores may reach {largest:.3g}, beyond FP16's {FP16_MAX:.0f}",
            hint="deploy this network in FP32",
        )


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = available_cores()
    options.enable_cpu_mem_arena = False  # an arena keeps what the largest tile needed; two sessions follow each other
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
