"""Loads the two networks of a distillation.

A teacher is SAM's image encoder, or any encoder that the checkpoint loader knows (torch).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.model.checkpoint import CheckpointReport, FileReport, layout_of, load_checkpoint, load_encoder
from cdkd_edge.model.config import PRESETS
from cdkd_edge.model.layouts import SAM
from cdkd_edge.model.network import Encoder, SegmentationNetwork
from cdkd_edge.model.sam import SamEncoder
from cdkd_edge.model.sam_files import load_sam
from cdkd_edge.training.recipe import PRESET_PREFIX

Teacher = Encoder | SamEncoder


def load_teacher(
    path: Path,
    tile: int,
    *,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
    with_head: bool = False,
) -> tuple[Teacher | SegmentationNetwork, FileReport]:
    """Load an encoder for tiles of ``tile`` px, in evaluation mode, FP32, on the CPU.

    Its blocks have ``attend``, ``norm2`` and ``mlp``; ``embed`` gives tokens row by row, after ``config.extra_tokens``
    others; ``turn`` gives their rotary positions.

    Args:
        path: SAM (its own, Hugging Face's or timm's file), or a checkpoint of any other known layout.
        tile, patch, heads, layer_norm_eps, weights: see :func:`.checkpoint.read_checkpoint`.
        with_head: load the whole network, if there is a head.

    Raises:
        CheckpointError: the file cannot be read safely, or holds no encoder with plain ViT blocks.
    """
    load: Any = load_network if with_head else load_encoder
    reading = {"tile": tile, "patch": patch, "heads": heads, "layer_norm_eps": layer_norm_eps, "weights": weights}
    teacher: Teacher | SegmentationNetwork
    with _naming(path):
        if layout_of(path, weights) is SAM:
            load = load_sam
        teacher, report = load(path, **reading)
    return teacher, report


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Let errors name the file: a run has two."""
    try:
        yield
    except CheckpointError as error:
        if str(path) not in error.message:
            error.message = f"{path}: {error.message}"
        raise


def load_network(path: Path, **reading: Any) -> tuple[SegmentationNetwork | Encoder, CheckpointReport]:
    """Load a network, or the encoder if there is no head; ``reading`` as in :func:`.checkpoint.read_checkpoint`."""
    encoder, report = load_encoder(path, **reading)
    return load_checkpoint(path, **reading) if report.has_head else (encoder, report)


def load_student(
    source: str, tile: int | None, seed: int, weights: str | None = None
) -> tuple[SegmentationNetwork | Encoder, CheckpointReport | None]:
    """Load the network to train; one of ``preset:NAME`` has random weights, and no report.

    Raises:
        CheckpointError: the file cannot be read safely, or there is no such preset.
    """
    if not source.startswith(PRESET_PREFIX):
        with _naming(source):
            return load_network(Path(source), weights=weights)
    name = source.removeprefix(PRESET_PREFIX)
    if name not in PRESETS:
        raise CheckpointError(f"there is no preset {name!r}", hint=f"presets: {', '.join(PRESETS)}")
    config = PRESETS[name] if tile is None else dataclasses.replace(PRESETS[name], tile=tile)
    torch.manual_seed(seed)
    return Encoder(config), None


def source_record(source: str, report: FileReport | None) -> dict[str, Any]:
    """What the record of a run says of a network."""
    if report is None:
        return {"file": source, "sha256": "", "layout": "random weights"}
    return {"file": Path(source).name, "sha256": sha256_of(report.path), "layout": report.layout}


def quarter_pairs(teacher: int, student: int, quarters: int = 3) -> tuple[tuple[int, int], ...]:
    """Blocks of teacher and student that are compared, counted from 1: the last of each quarter of their depths.

    The paper's are (6, 3), (12, 6), (18, 9); those of the teacher are global blocks in each size of SAM.
    """
    ends = [[max(1, depth * quarter // 4) for quarter in range(1, quarters + 1)] for depth in (teacher, student)]
    return tuple(zip(*ends, strict=True))
