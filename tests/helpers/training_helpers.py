"""Labelled images in which a pixel's colour tells its class, and networks small enough to train in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cdkd_edge.core.labels import NO_LABEL, Palette, load_schema
from cdkd_edge.model.config import NetworkConfig

UInt8Array = npt.NDArray[np.uint8]

SCHEMA = load_schema("dubai")
COLORS = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (230, 230, 60), (20, 20, 20)], np.uint8)
"""Of the image, by label; far from each other, so that bicubic resampling and noise leave them apart."""

CONFIG = NetworkConfig(tile=64, patch=8, embed_dim=32, depth=4, heads=2, mlp_dim=64, classes=5, head_channels=16)


def blocks(height: int, width: int, seed: int = 0, cell: int = 16, classes: int = 5) -> UInt8Array:
    """Labels ``[H, W]`` in squares of one class each."""
    cells = np.random.default_rng(seed).integers(0, classes, (-(-height // cell), -(-width // cell)), np.uint8)
    return np.kron(cells, np.ones((cell, cell), np.uint8))[:height, :width]


def painted(labels: UInt8Array) -> UInt8Array:
    """The image ``[3, H, W]`` of labels; what has no label is grey."""
    table = np.full((256, 3), 128, np.uint8)
    table[: len(COLORS)] = COLORS
    return np.ascontiguousarray(table[labels].transpose(2, 0, 1))


def guessed(image: UInt8Array) -> UInt8Array:
    """The label that each pixel's colour tells, ``[H, W]``."""
    distance = ((image[None].astype(int) - COLORS[:, :, None, None]) ** 2).sum(axis=1)  # [K, H, W]
    return distance.argmin(axis=0).astype(np.uint8)


def write_pair(folder: Path, name: str, labels: UInt8Array, image: UInt8Array | None = None) -> None:
    """``images/NAME.png`` and ``masks/NAME.png``, the mask in the colours of ``dubai``."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    picture = painted(labels) if image is None else image
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(folder / "images" / f"{name}.png")
    colors = SCHEMA.in_palette(Palette.DATASET).palette()
    colors[NO_LABEL] = SCHEMA.ignore_colors[0]
    Image.fromarray(colors[labels]).save(folder / "masks" / f"{name}.png")


def write_dataset(folder: Path, names: Mapping[str, tuple[int, int]]) -> Path:
    """A folder pair of images of these heights and widths; every image is another one."""
    for seed, (name, (height, width)) in enumerate(names.items()):
        write_pair(folder, name, blocks(height, width, seed))
    return folder


def student(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder under the names of ``student_vit_mae.py``; tensors, needs torch."""
    import torch

    encoder = {key: value for key, value in weights.items() if key.startswith("encoder.")}
    return {key.removeprefix("encoder."): torch.from_numpy(np.array(value)) for key, value in encoder.items()}
