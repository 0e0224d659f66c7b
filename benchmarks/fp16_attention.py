"""What FP16 sums inside fused attention do to the labels of a network: every query of every block rehearsed.

    python benchmarks/fp16_attention.py export/ckpt.onnx TILE.png ...

`export` rehearses some queries of a tile and bounds the rest (`cdkd_edge/graph/fp16_attention.py`). This script
computes all of them, block after block, so that errors reach the labels, and compares these with those of FP32 sums, on
the upper left corner of each image. The graph is converted to FP16 as `export` does. Nothing runs on a GPU. A tile of
512 px takes about a minute, 1024 px ten times as long and 3 GB.

``one by one`` is a sum to which keys are added one at a time: from 2048 on, FP16 does not count ones. No known kernel
does that; it shows why the order of a sum matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import rasterio
from onnx import TensorProto, helper
from rasterio.windows import Window

from cdkd_edge.graph import fp16_attention
from cdkd_edge.graph.cpu import cpu_session
from cdkd_edge.graph.fp16 import to_fp16
from cdkd_edge.graph.fp16_simulation import fp16_on_cpu
from cdkd_edge.graph.layers import attention_blocks
from cdkd_edge.graph.nodes import attribute_of, copy_of, replace_nodes, show_values

Array = npt.NDArray[np.float32]
Attend = Callable[..., Array]


def labels_with(half: onnx.ModelProto, batch: npt.NDArray[np.uint8], attend: Attend) -> npt.NDArray[np.uint8]:
    """Labels ``[1, T, T]`` of an FP16 graph of batch 1 whose attention is ``attend(q, k, v, fp32_scores=...)``.

    Everything else is as in the simulation that `export` checks.
    """
    simulation = fp16_on_cpu(half)
    wide = {block.joined for block in attention_blocks(half) if block and block.fp32_softmax}
    given: dict[str, Array] = {}

    def run(*names: str) -> list[Any]:
        model = copy_of(simulation)
        replace_nodes(model.graph, [node for node in simulation.graph.node if node.output[0] not in given])
        for name, value in given.items():
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
        show_values(model, [name for name in names if name != "labels"])
        found: list[Any] = cpu_session(model).run(list(names), {"image": batch, **given})
        return found

    for node in simulation.graph.node:
        if node.op_type == "MultiHeadAttention":
            heads, name = attribute_of(node, "num_heads"), node.output[0]
            q, k, v = (
                np.ascontiguousarray(part[0].reshape(part.shape[1], heads, -1).transpose(1, 0, 2))
                for part in run(*node.input[:3])
            )
            joined = name.removesuffix(".exact").removesuffix(".by_window")
            mixed = attend(q * attribute_of(node, "scale"), k, v, fp32_scores=joined in wide)
            given[name] = np.ascontiguousarray(mixed.transpose(1, 0, 2)).reshape(1, q.shape[1], -1)
    labels: npt.NDArray[np.uint8] = run("labels")[0]
    return labels


def exactly(q: Array, k: Array, v: Array, *, fp32_scores: bool = False) -> Array:
    """Attention with FP32 sums, whatever the graph says."""
    scores = q @ k.transpose(0, 2, 1)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed: Array = (share @ v) / share.sum(axis=-1, keepdims=True)
    return mixed


def one_by_one(q: Array, k: Array, v: Array, *, fp32_scores: bool = False) -> Array:
    """:func:`.fp16_attention.rehearse` with a sum to which one key after the other is added."""
    mixed = fp16_attention.rehearse(q, k, v, fp32_scores=True)
    scores = q @ k.transpose(0, 2, 1)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True)).astype(np.float16)
    total = np.zeros(share.shape[:2], np.float16)
    for key in range(share.shape[-1]):
        total += share[..., key]
    result: Array = mixed * (share.sum(axis=-1, dtype=np.float32) / total)[..., None]
    return result


def main() -> None:
    """Parse, compute, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("tiles", type=Path, nargs="+")
    arguments = parser.parse_args()
    half = to_fp16(onnx.load(arguments.graph))
    side = half.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    print(f"{'tile':24} {'FP16 sums':>10} {'FP32 scores':>12} {'one by one':>11}   labels equal to those of FP32 sums")
    for path in arguments.tiles:
        with rasterio.open(path) as image:
            tile = image.read([1, 2, 3], window=Window(0, 0, side, side))[None]
        exact = labels_with(half, tile, exactly)
        shares = []
        for attend in (
            fp16_attention.rehearse,
            lambda q, k, v, **_: fp16_attention.rehearse(q, k, v, fp32_scores=True),
            one_by_one,
        ):
            shares.append(float((labels_with(half, tile, attend) == exact).mean()))
        print(f"{path.name:24} {shares[0]:>10.4%} {shares[1]:>12.4%} {shares[2]:>11.4%}", flush=True)


if __name__ == "__main__":
    main()
