"""Small encoder files of other projects: their tensors' names, and the features that the projects themselves compute.

``encoders.json`` holds, for each family, the tensors of a file by name and shape, its ``config.json``, and samples of
the maps after two blocks at three tiles. ``peer_encoders.py`` recorded them with the projects' own code. The weights
are not stored: :func:`weights_of` makes them from the names.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RECORDED = Path(__file__).with_name("encoders.json")
FAMILIES: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
BLOCKS = (1, 3)  # whose maps are recorded, of 4
SAMPLES = 60  # values of a map
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
Array = npt.NDArray[np.float32]


def weights_of(shapes: dict[str, list[int]]) -> dict[str, Array]:
    """Weights that depend on their names alone; about as large as trained ones, large biases of queries included."""
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("rope_embed.periods"):
        return (100 ** (np.arange(shape[0]) / shape[0])).astype(np.float32)
    if name.endswith("bias_mask"):
        return np.repeat(np.array([1, 0, 1], np.float32), shape[0] // 3)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if re.search(r"gamma|lambda1", name):
        return 0.5 + 0.1 * values
    if name.endswith("running_var"):
        return 1 + 0.5 * np.abs(values)
    if len(shape) == 1 and name.endswith(".weight"):  # of a norm
        return 1 + 0.1 * values
    if len(shape) < 2:
        return values if re.search(r"q_bias|q_proj|query|qkv", name) else 0.1 * values
    fan_in = int(np.prod(shape[1:]))
    return values * np.float32(1 if len(shape) == 3 else fan_in**-0.5)


def image_of(tile: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(tile).integers(0, 256, (1, 3, tile, tile), np.uint8)


def samples(feature_map: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Some values of a map, in a fixed order."""
    flat = feature_map.ravel()
    return flat[np.linspace(0, len(flat) - 1, SAMPLES).astype(int)]


def write_encoder(folder: Path, family: str, **changes: Any) -> Path:
    """Write the files of a family; returns the file of weights, or its folder if there is a ``config.json``.

    ``changes`` are made to the configuration.
    """
    import torch
    from safetensors.torch import save_file

    recorded = FAMILIES[family]
    state = {name: torch.from_numpy(np.array(value)) for name, value in weights_of(recorded["tensors"]).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if recorded["config"] is None:
        torch.save(state, folder / "encoder.pth")
        return folder / "encoder.pth"
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**recorded["config"], **changes}))
    return folder
