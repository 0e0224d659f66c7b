"""Is the graph the same function as the network? Asked of every export, on tiles that look real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from cdkd_edge.errors import NumericalCheckError
from cdkd_edge.export.graph import LOGITS
from cdkd_edge.manifest import GraphCheck
from cdkd_edge.model.network import SegmentationNetwork

MIN_AGREEMENT = 0.9999
"""Share of pixels that must get the same label. The rest is rounding at the border of two classes."""

MAX_LOGIT_ERROR = 1e-4
"""Largest difference of a logit, as a share of the largest logit; FP32 rounding stays far below. Needed because a
network that sees one class everywhere gives the same labels whatever the graph computes."""


def check_graph(graph: Path, network: SegmentationNetwork, tiles: npt.NDArray[np.uint8], batch: int = 1) -> GraphCheck:
    """Run the graph in ONNX Runtime and the network in PyTorch on the same tiles.

    Args:
        graph: an exported FP32 graph.
        network: the network it was made from, in evaluation mode.
        tiles: uint8 ``[M, 3, T, T]``, M a multiple of ``batch``.
        batch: the graph's static batch.

    Raises:
        NumericalCheckError: a logit differs by more than rounding.
    """
    model = onnx.load(graph)
    model.graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    del model

    worst, largest, agreeing = 0.0, 0.0, 0
    labels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    for start in range(0, len(tiles), batch):
        chunk = tiles[start : start + batch]
        labels, logits = session.run(["labels", LOGITS], {"image": chunk})
        with torch.inference_mode():
            expected = network(torch.from_numpy(chunk))
            expected_labels = network.upsample(expected).argmax(dim=1)
        worst = float(np.maximum(worst, np.abs(logits - expected.numpy()).max()))  # keeps NaN, unlike max()
        largest = max(largest, float(expected.abs().max()))
        agreeing += int(np.count_nonzero(labels == expected_labels.numpy()))
    if not worst <= MAX_LOGIT_ERROR * largest:
        raise NumericalCheckError(
            f"the graph's logits differ from PyTorch's by up to {worst:.2g}, where the largest is {largest:.2g}",
            hint="please report this checkpoint's layout; no graph was written",
        )
    return GraphCheck(
        tiles=len(tiles),
        max_logit_error=worst,
        label_agreement=agreeing / _pixels(tiles.shape),
        network_runtime=f"torch {torch.__version__}",
        graph_runtime=f"onnxruntime {onnxruntime.__version__}",
    )


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * shape[2] * shape[3]
