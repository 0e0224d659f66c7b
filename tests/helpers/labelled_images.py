"""A labelled folder of noise, with truth that depends on the colours alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scene_helpers import noise

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.quality.datasets import Dataset, find_dataset

UInt8Array = npt.NDArray[np.uint8]

SIZES = {"t1_a": (150, 200), "t1_b": (64, 64), "t2_a": (65, 17), "t2_b": (130, 70)}


def truth_of(image: UInt8Array) -> UInt8Array:
    """Mostly what :func:`red_labels` says; class 4 and errors where green is high; no label where blue is high."""
    labels = np.where(image[1] < 150, image[0] // 64, image[1] % 5).astype(np.uint8)
    labels[image[2] > 220] = NO_LABEL
    return labels


def build_data(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> Dataset:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        image = noise(height, width, seed=seed)
        Image.fromarray(image.transpose(1, 2, 0).copy()).save(folder / "images" / f"{name}.png")
        Image.fromarray(truth_of(image)).save(folder / "masks" / f"{name}.png")
    return find_dataset(folder)
