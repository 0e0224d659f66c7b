"""Scenes, networks small enough to distil in a test, and the words of the command (needs torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import run
from sam_reference import official_file, sam_weights
from scene_helpers import noise, write_raster
from training_helpers import CONFIG, SCHEMA, blocks, painted

from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint
from cdkd_edge.model.config import NetworkConfig
from cdkd_edge.model.network import Encoder, SegmentationNetwork

LOOP = ("--device", "cpu", "--precision", "fp32", "--batch", 4)
FEATURES = (
    *("--method", "features", *LOOP, "--batch", 3, "--steps", 60, "--lr", 0.0027, "--warm-up", 4, "--clip-norm", 0),
    *("--views", 1, "--no-flips", "--scale", 1, 1, "--light", 0),
)
MASKED = (*LOOP, "--steps", 12, "--lr", 0.002)


def write_scenes(folder: Path) -> Path:
    """Twenty places of 64 px in two GeoTIFFs: two are kept out of training."""
    for seed, name in enumerate("ab"):
        image = painted(blocks(128, 320, seed)).astype(int) + noise(128, 320, seed=seed) // 8
        write_raster(folder / f"{name}.tif", np.clip(image, 0, 255).astype(np.uint8))
    return folder


def network_of(weights: Mapping[str, Any], config: NetworkConfig = CONFIG) -> SegmentationNetwork:
    network = SegmentationNetwork(config)
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=False)
    return network.eval()


def write_network(path: Path, weights: Mapping[str, Any], config: NetworkConfig = CONFIG) -> Path:
    save_checkpoint(
        network_of(weights, config),
        path,
        schema=SCHEMA if config.classes == len(SCHEMA) else None,
        training={"tool": "someone's"},
    )
    return path


def write_encoder(path: Path, weights: Mapping[str, Any], config: NetworkConfig = CONFIG) -> Path:
    encoder = Encoder(config)
    encoder.load_state_dict(network_of(weights, config).encoder.state_dict())
    save_checkpoint(encoder, path)
    return path


def write_sam(path: Path) -> Path:
    """A SAM of 8 x 8 patches of 4 px under the official names; for students of other patches it is resampled."""
    torch.save({key: torch.from_numpy(value) for key, value in official_file(sam_weights()).items()}, path)
    return path


def distilled(*words: object) -> dict[str, Any]:
    """The record of a run that has to succeed."""
    result = run("distill", *words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    record: dict[str, Any] = json.loads(result.stdout)["distilled"]
    return record


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, of its encoder if there is no head."""
    encoder, report = load_encoder(path)
    network: torch.nn.Module = load_checkpoint(path)[0] if report.has_head else encoder
    return dict(network.state_dict())


def identical(one: Path, other: Path) -> bool:
    ours, theirs = state_of(one), state_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_nearly_identical(one: Path, other: Path, start: Path) -> None:
    """Tensors agree to 1e-5 of their size, and to 2e-3 of how far they moved from the start."""
    ours, theirs, before = state_of(one), state_of(other), state_of(start)
    for name, value in ours.items():
        parts = (value, theirs[name], before[name])
        if name.endswith("qkv.bias"):
            # Keys' biases have no effect: their gradients are rounding errors, which AdamW makes as large as others.
            parts = tuple(torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in parts)
        mine, its, first = parts
        apart, moved = float((mine - its).norm()), float((mine - first).norm())
        assert apart < 1e-5 * mine.norm(), name
        assert apart < 2e-3 * moved, name
