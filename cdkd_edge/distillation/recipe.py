"""What a distillation is asked to do: its recipe, and the options besides (torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdkd_edge.distillation.adapters import GATES
from cdkd_edge.distillation.autoencoder import PIXELS
from cdkd_edge.distillation.masks import MASKS
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.recipe import LoopRecipe
from cdkd_edge.training.views import Augmentation

MASKED, FEATURES, MAE = METHODS = ("masked", "features", "mae")
FEEDBACK = ("both", "student")
TARGETS = ("standardized", "raw")
PROJECTIONS = ("auto", "linear", "none")
WITHOUT_ADAPTERS = (0.6, 0.0, 0.4)  # weights of the losses: a teacher that reconstructs nothing gives no ratio
RATE_BATCH = 4  # tiles for which the learning rate is given; the paper's


@dataclass(frozen=True)
class DistillRecipe(LoopRecipe):
    """How a student is distilled. Defaults: the Mask-CDKD paper's, with the changes that docs/distillation.md gives."""

    method: str = MASKED
    epochs: int = 120
    steps: int = 0  # 0: all steps of the epochs
    batch: int = 4  # tiles per process and pass
    learning_rate: float = 1e-5  # for a step of RATE_BATCH tiles; in proportion for others
    clip_norm: float = 1.0
    views: int = 0
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(scale=(0.7, 1.4), light=0.2))
    precision: str = "auto"  # see :func:`cdkd_edge.model.device.chosen_precision`
    adapters: bool = True
    gate: str = "identity"
    feedback: str = "both"  # what distillation trains: teacher and student, or the student alone
    mask: str = "cells"
    cell: int = 2  # one patch of each cell of so many by so many stays visible
    pairs: tuple[tuple[int, int], ...] = ()  # blocks of teacher and student, from 1; empty: at their quarters
    projection: str = "auto"  # ``none`` where a student of the teacher's width is to give the same features
    target: str = "standardized"
    pixels: str = "normalized"
    decoder_width: int = 0  # of both reconstructions; 0: that of their encoder
    decoder_depth: int = 4
    loss_weights: tuple[float, ...] = ()  # of distillation, teacher's and student's pixels; empty: by the schedule
    logits: float = 1.0  # weight of the divergence of class probabilities, where both networks have heads

    def _limits(self) -> list[tuple[str, Any, bool, str]]:
        def choice(option: str, value: str, choices: tuple[str, ...]) -> tuple[str, Any, bool, str]:
            return option, value, value in choices, f"one of {', '.join(choices)}"

        weights = self.loss_weights
        usable = all(0 <= one < math.inf for one in weights) and sum(weights) > 0
        return [
            choice("--method", self.method, METHODS),
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--steps", self.steps, self.steps >= 0, "0 or more"),
            choice("--gate", self.gate, GATES),
            choice("--feedback", self.feedback, FEEDBACK),
            choice("--mask", self.mask, MASKS),
            ("--cell", self.cell, 2 <= self.cell <= 8, "2 to 8"),
            ("--pairs", self.pairs, all(min(pair) >= 1 for pair in self.pairs), "blocks from 1 on"),
            choice("--projection", self.projection, PROJECTIONS),
            choice("--target", self.target, TARGETS),
            choice("--pixels", self.pixels, PIXELS),
            ("--decoder-width", self.decoder_width, self.decoder_width >= 0, "0 or more"),
            ("--decoder-depth", self.decoder_depth, 1 <= self.decoder_depth <= 48, "1 to 48"),
            ("--loss-weights", weights, not weights or (len(weights) == 3 and usable), "three numbers, not all 0"),
            ("--loss-weights", weights, not weights or self.method == MASKED, "left out: only method masked has them"),
            ("--logits", self.logits, 0 <= self.logits < 1e6, "0 or more"),
            *super()._limits(),
        ]

    @property
    def _precisions(self) -> tuple[str, ...]:
        return ("auto", *super()._precisions)

    @property
    def masked(self) -> bool:
        """Whether patches are hidden and reconstructed."""
        return self.method in (MASKED, MAE)

    @property
    def gate_used(self) -> str | None:
        """The gate of the adapters; None where the teacher stays as it is: without adapters, and for ``features``."""
        return self.gate if self.adapters and self.method == MASKED else None


@dataclass(frozen=True)
class DistillOptions:
    """Everything but tiles, teacher, student and output."""

    recipe: DistillRecipe = field(default_factory=DistillRecipe)
    tile: int | None = None  # side of the tiles to train on, px; None: the student's own
    teacher_patch: int | None = None  # side of the teacher's patches, px, resampled to it; None: the student's
    heads: int | None = None  # of the teacher, where its file does not say
    layer_norm_eps: float | None = None  # likewise
    recompute: bool | None = None  # compute the teacher's blocks again in the backward pass. None: on a GPU
    exclude: tuple[str, ...] = ()  # evaluation sets, see :class:`.imagery.Imagery`
    reading: SegmentOptions = field(default_factory=SegmentOptions)
    probe: Path | None = None  # labelled images on which a linear probe is scored
    schema: str | None = None  # of the probe's images
    probe_scenes: tuple[str, ...] = ()  # on which it is scored; it learns on the others
    probe_list: Path | None = None  # or on the images of this list
    device: str = "auto"
    workers: int = 1  # threads that read tiles
    weights: str | None = None  # of teacher and student, see :func:`cdkd_edge.model.checkpoint.read_checkpoint`
    resume: bool = False
    overwrite: bool = False
    command: str = "cdkd-edge distill"

    @property
    def probe_identity(self) -> list[Any] | None:
        """What decides the scores of the probe, and so which student is the best."""
        if self.probe is None:
            return None
        return [self.probe.name, self.schema, self.probe_scenes, self.probe_list and self.probe_list.name]
