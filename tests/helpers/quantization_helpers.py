"""What the tests of FP16 and INT8 share: networks with several heads, values inside a graph, calibration sets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import session_options
from cdkd_edge.graph.tiles import (
    CalibrationSet,
    SceneRecord,
    SetManifest,
    TileRecord,
    pixels_sha256,
    write_set_manifest,
    write_tile,
)
from cdkd_edge.model.config import NetworkConfig

UInt8Array = npt.NDArray[np.uint8]

CONFIG = NetworkConfig(
    tile=48, patch=8, embed_dim=48, depth=4, heads=3, mlp_dim=96, classes=5, head_channels=8, pool_scales=(1, 2, 3, 6)
)
"""Three heads of 16, 6 x 6 tokens; small enough for loops in Python."""
WINDOWS = dataclasses.replace(CONFIG, attention=("window 3", "pooled 3", "window 3", "global"))
CLASS_TOKEN = NetworkConfig(
    tile=48, patch=8, embed_dim=32, depth=4, heads=2, mlp_dim=64, classes=5, head_channels=8, class_token=True
)
ROTARY = dataclasses.replace(CLASS_TOKEN, registers=4, rotary_base=100.0, final_norm="taps")
"""As DINOv3."""
NECK = dataclasses.replace(CLASS_TOKEN, neck=(24, 12, 16), pool_scales=(1, 2, 3))
NORMED = dataclasses.replace(
    CONFIG, rotary_base=20.0, query_key_norm="rms", attention=("window 3", "global", "window 3", "global"), mlp="swiglu"
)


def tiles_of(count: int, side: int = 48, seed: int = 0) -> UInt8Array:
    """Colour fields with grain, uint8 ``[count, 3, side, side]``."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (count, 3, 4, 4))
    fields = np.kron(coarse, np.ones((1, 1, side // 4, side // 4)))
    return np.clip(fields + generator.normal(0, 15, fields.shape), 0, 255).astype(np.uint8)


def session_of(model: onnx.ModelProto, names: Sequence[str] = ()) -> Any:
    """ONNX Runtime on a copy of a graph that also gives some inner values; nothing is fused or moved."""
    clone = onnx.ModelProto.FromString(model.SerializeToString())
    known = {output.name for output in clone.graph.output}
    types = {
        item.name: item.type.tensor_type.elem_type for item in onnx.shape_inference.infer_shapes(clone).graph.value_info
    }
    for name in names:
        if name not in known:
            clone.graph.output.append(
                helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT) or TensorProto.FLOAT, None)
            )
    options = session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(clone.SerializeToString(), options, providers=["CPUExecutionProvider"])


def values(model: onnx.ModelProto, names: Sequence[str], image: UInt8Array) -> dict[str, Any]:
    """Values inside a graph."""
    wanted = list(dict.fromkeys(names))
    return dict(zip(wanted, session_of(model, wanted).run(wanted, {"image": image}), strict=True))


def constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def nodes_of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def set_constant(model: onnx.ModelProto, name: str, value: npt.NDArray[Any]) -> None:
    item = next(item for item in model.graph.initializer if item.name == name)
    item.CopyFrom(numpy_helper.from_array(value, name))


def centred(weights: Mapping[str, npt.NDArray[np.float32]], config: NetworkConfig) -> dict[str, Any]:
    """The weights with a classifier that gives every class, on average, the same logit."""
    weights = {name: value.copy() for name, value in weights.items()}
    logits = values(build_graph(weights, config, batch=4), ["logits"], tiles_of(4, config.tile, seed=9))["logits"]
    weights["head.classifier.bias"] -= logits.mean(axis=(0, 2, 3))
    return weights


def write_set(
    folder: Path, calibration: Iterable[UInt8Array], check: Iterable[UInt8Array], side: int = 48
) -> CalibrationSet:
    """A calibration set of given tiles."""
    records = []
    for role, tiles in (("calibration", calibration), ("check", check)):
        for number, tile in enumerate(tiles):
            file = f"{role}/{number:04}.png"
            (folder / role).mkdir(parents=True, exist_ok=True)
            write_tile(folder / file, tile)
            records.append(TileRecord(file, pixels_sha256(tile), "a.tif", 0, 0, side, side, role, 0, "typical", 0.0, 1))
    manifest = SetManifest(side, 0, {}, {}, {"scenes": 1}, (SceneRecord("a.tif", None, None),), tuple(records))
    folder.mkdir(parents=True, exist_ok=True)
    write_set_manifest(folder, manifest)
    return CalibrationSet.load(folder)


def casts(model: onnx.ModelProto) -> Counter[str]:
    """How many casts a graph has, by what they cast to (``FLOAT16``, ``UINT8``, ...)."""
    return Counter(
        TensorProto.DataType.Name(next(item.i for item in node.attribute if item.name == "to"))
        for node in nodes_of(model, "Cast")
    )
