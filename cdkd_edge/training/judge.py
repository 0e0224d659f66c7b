"""Scores on held-out images: a network tile by tile, and classifiers that see only a pixel's colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cdkd_edge.accuracy.metrics import ConfusionMatrix
from cdkd_edge.labels import LabelSchema
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.training.crops import LabelledImage

_BATCH = 8
_BITS = 5
"""Colour histograms have 2**5 = 32 bins a channel."""


def segment_image(network: SegmentationNetwork, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Labels uint8 ``[H, W]`` of an RGB image ``[H, W, 3]``: tiles without overlap, the border reflected."""
    tile = network.config.tile
    height, width = image.shape[:2]
    rows, columns = -(-height // tile), -(-width // tile)
    padded = np.pad(image, ((0, rows * tile - height), (0, columns * tile - width), (0, 0)), mode="reflect")
    tiles = padded.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
    labels = [network.segment(torch.from_numpy(tiles[i : i + _BATCH])).numpy() for i in range(0, len(tiles), _BATCH)]
    grid = np.concatenate(labels).reshape(rows, columns, tile, tile).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(grid.reshape(rows * tile, columns * tile)[:height, :width])


def judge_network(network: SegmentationNetwork, images: Sequence[LabelledImage]) -> ConfusionMatrix:
    """Score a network in evaluation mode; every pixel counts once."""
    matrix = ConfusionMatrix(network.config.classes)
    for item in images:
        matrix.update(item.labels, segment_image(network.eval(), item.image))
    return matrix


def judge_colors(
    training: Sequence[LabelledImage], held_out: Sequence[LabelledImage], classes: int
) -> dict[str, ConfusionMatrix]:
    """Score what a pixel's colour alone tells, learned from ``training``.

    "nearest mean": the class whose mean colour is nearest. "colour histogram": the class seen most
    often with that colour, of 32 x 32 x 32; what the best rule on colour alone converges to.
    """
    counts = np.zeros((classes, 1 << 3 * _BITS), np.int64)
    sums = np.zeros((classes, 3))
    for item in training:
        codes = _color_codes(item.image)
        for label in range(classes):
            here = item.labels == label
            counts[label] += np.bincount(codes[here], minlength=counts.shape[1])
            sums[label] += item.image[here].sum(axis=0, dtype=np.int64)
    pixels = counts.sum(axis=1)
    means = sums / np.maximum(pixels, 1)[:, None]
    centers = _code_colors()
    distance = ((centers[:, None, :] - means) ** 2).sum(axis=-1)  # [codes, K]
    distance[:, pixels == 0] = np.inf
    nearest = distance.argmin(axis=1).astype(np.uint8)
    # A colour never seen in training goes to the nearest mean.
    frequent = np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), nearest).astype(np.uint8)
    scores = {"nearest mean": ConfusionMatrix(classes), "colour histogram": ConfusionMatrix(classes)}
    for item in held_out:
        codes = _color_codes(item.image)
        scores["nearest mean"].update(item.labels, nearest[codes])
        scores["colour histogram"].update(item.labels, frequent[codes])
    return scores


def table(title: str, schema: LabelSchema, scores: Mapping[str, ConfusionMatrix]) -> str:
    """A Markdown table of scores in percent, one row per classifier."""
    header = [title, *(f"{name} IoU" for name in schema.class_names), "mIoU", "OA", "mF1"]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for name, matrix in scores.items():
        values = [*matrix.iou(), matrix.mean_iou, matrix.overall_accuracy, matrix.mean_f1]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def _color_codes(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Histogram bin of every pixel, int32 ``[H, W]``."""
    bins = (image >> (8 - _BITS)).astype(np.int32)
    return bins[..., 0] << 2 * _BITS | bins[..., 1] << _BITS | bins[..., 2]


def _code_colors() -> npt.NDArray[np.float64]:
    """The colour in the middle of every bin, ``[codes, 3]``."""
    codes = np.arange(1 << 3 * _BITS)
    bins = np.stack([codes >> 2 * _BITS, codes >> _BITS & (1 << _BITS) - 1, codes & (1 << _BITS) - 1], axis=-1)
    return (bins + 0.5) * (1 << 8 - _BITS)
