"""Loads teachers: SAM's image encoder, and every encoder that the checkpoint loader knows (torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdkd_edge.model.checkpoint import CheckpointReport, FileReport, layout_of, load_checkpoint, load_encoder
from cdkd_edge.model.layouts import SAM
from cdkd_edge.model.network import Encoder, SegmentationNetwork
from cdkd_edge.model.sam import SamEncoder
from cdkd_edge.model.sam_files import load_sam

Teacher = Encoder | SamEncoder


def load_teacher(
    path: Path,
    tile: int,
    *,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
) -> tuple[Teacher, FileReport]:
    """Load an encoder for tiles of ``tile`` px, in evaluation mode, FP32, on the CPU.

    Its blocks have ``attend``, ``norm2`` and ``mlp``; ``embed`` gives tokens row by row, after the class token if
    ``config.class_token``. If ``has_head`` of the report, :func:`load_network` loads the head as well.

    Args:
        path: SAM (its own, Hugging Face's or timm's file), or a checkpoint of any other known layout.
        tile, patch, heads, layer_norm_eps, weights: see :func:`.checkpoint.read_checkpoint`.

    Raises:
        CheckpointError: the file cannot be read safely, or holds no encoder with plain ViT blocks.
    """
    load: Any = load_sam if layout_of(path, weights) is SAM else load_encoder
    teacher: Teacher
    teacher, report = load(path, tile=tile, patch=patch, heads=heads, layer_norm_eps=layer_norm_eps, weights=weights)
    return teacher, report


def load_network(path: Path, **reading: Any) -> tuple[SegmentationNetwork | Encoder, CheckpointReport]:
    """Load a network, or the encoder if there is no head; ``reading`` as in :func:`.checkpoint.read_checkpoint`."""
    encoder, report = load_encoder(path, **reading)
    return load_checkpoint(path, **reading) if report.has_head else (encoder, report)


def default_pairs(student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Blocks of teacher and student that are compared, counted from 1: those after each of the first three quarters.

    The paper's are (6, 3), (12, 6), (18, 9); those of the teacher are global blocks in each size of SAM.
    """
    return tuple((teacher_depth * quarter // 4, student_depth * quarter // 4) for quarter in (1, 2, 3))
