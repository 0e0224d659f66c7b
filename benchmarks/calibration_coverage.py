"""Does choosing tiles beat drawing them? Coverage of descriptors and of a network's activation ranges.

    cdkd-edge export cdkd_edge/demo/tiny.safetensors
    python benchmarks/calibration_coverage.py DATA/images --graph export/tiny.onnx

Every candidate runs through the graph once; of each tensor that INT8 would quantise (inputs of convolutions and of
products with a weight) its largest magnitude is kept. A choice of tiles is then judged by what its ranges, the largest
magnitude over the chosen tiles, leave to the other tiles: how far they exceed it, and how many of them do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cdkd_edge.core.manifest import GraphManifest, read_manifest
from cdkd_edge.precision.choose_tiles import choose, coverage_radius
from cdkd_edge.precision.describe_tiles import standardise
from cdkd_edge.precision.scan_scenes import CalibrateOptions, Candidates, TiledScene, scan_scenes
from cdkd_edge.raster.grid import Span
from cdkd_edge.raster.open import scenes_named
from cdkd_edge.raster.read import SceneReader

Array = npt.NDArray[np.float32]


def quantised_inputs(model: onnx.ModelProto) -> list[str]:
    """Tensors that enter a convolution or a product with a weight."""
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Conv" or (node.op_type in ("MatMul", "Gemm") and node.input[1] in weights)
    ]
    return list(dict.fromkeys(names))


def largest_magnitudes(candidates: Candidates, graph: Path) -> Array:
    """Of every candidate and tensor, ``[N, L]``."""
    import onnxruntime  # after cdkd_edge, which turns its telemetry off

    model = onnx.load(graph)
    tensors = quantised_inputs(model)
    for position, name in enumerate(tensors):
        model.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"size_{position}"]),
                helper.make_node("ReduceMax", [f"size_{position}"], [f"largest_{position}"], keepdims=0),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(f"largest_{position}", TensorProto.FLOAT, []))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [f"largest_{index}" for index in range(len(tensors))]
    rows = []
    for source_index, source in enumerate(candidates.scenes):
        reader = SceneReader(source.path)
        tile = np.empty((1, 3, source.tile, source.tile), np.uint8)
        for index in np.flatnonzero(candidates.scene == source_index):
            x, y = candidates.place[index].tolist()
            reader.read_tile(Span(y, 0, 0), Span(x, 0, 0), tile[0])
            rows.append(session.run(wanted, {"image": tile}))
        reader.close()
    return np.array(rows, np.float32)


def judged(points: Array, magnitudes: Array, chosen: list[int]) -> npt.NDArray[np.float64]:
    """Largest and mean distance; share of the full range, mean and worst over tensors; tiles beyond it, %."""
    ranges = magnitudes[chosen].max(axis=0)
    share = ranges / magnitudes.max(axis=0)
    beyond = (magnitudes > ranges).mean()
    return np.array([*coverage_radius(points, points[chosen]), share.mean(), share.min(), 100 * beyond])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="+")
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=20, help="seeds")
    arguments = parser.parse_args()
    tile = read_manifest(arguments.graph, GraphManifest).tile
    scenes = [TiledScene.open(path, tile) for path in scenes_named(arguments.scenes)]
    candidates = scan_scenes(scenes, CalibrateOptions(tile)).without_duplicates()
    points = standardise(candidates.features)
    magnitudes = largest_magnitudes(candidates, arguments.graph)
    everything = np.ones(len(points), bool)
    print(f"{len(points)} candidates of {tile} px, {magnitudes.shape[1]} tensors, medians of {arguments.repeats} seeds")
    print("tiles  choice             largest  mean dist.  range mean  range worst  tiles beyond it")
    for count in arguments.counts:
        for extremes in (None, 0.0, 0.25, 0.5, 1.0):
            rows = []
            for seed in range(arguments.repeats):
                if extremes is None:
                    chosen = np.random.default_rng(seed).choice(len(points), count, replace=False).tolist()
                else:
                    chosen = [one.index for one in choose(points, count, everything, seed, extremes=extremes)]
                rows.append(judged(points, magnitudes, chosen))
            name = "random" if extremes is None else f"{extremes:4.0%} extremes"
            row = np.median(rows, axis=0)
            print(
                f"{count:5}  {name:18} {row[0]:7.2f}  {row[1]:10.3f}  {row[2]:10.3f}  {row[3]:11.3f}  {row[4]:12.2f} %"
            )


if __name__ == "__main__":
    main()
