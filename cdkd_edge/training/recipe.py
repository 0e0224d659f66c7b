"""The recipe of a training run, and the network that it starts from (torch)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cdkd_edge.core.errors import CheckpointError, UsageError
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint, load_encoder
from cdkd_edge.model.config import PRESETS
from cdkd_edge.model.device import PRECISIONS
from cdkd_edge.model.layouts import OURS
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.model.within import FOUND_SCHEMA
from cdkd_edge.training.views import Augmentation

SCHEDULES = ("constant", "cosine", "poly")
_POLY_POWER = 0.9
# Side of the paper's crops, px; for encoders of others. A network and a distilled encoder keep their tile.
DEFAULT_TILE = 1024
DEFAULT_PATCH = 16  # side of a patch, px, for encoders whose own patch does not divide the tile (DINOv2's 14)
PRESET_PREFIX = "preset:"


@dataclass(frozen=True)
class LoopRecipe:
    """What every training loop has, with or without labels. UsageError: a value is out of range."""

    batch: int = 4  # tiles per process and pass
    accumulate: int = 1  # passes per step
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"  # or ``cosine`` to zero, or ``poly``: (1 - progress) ** 0.9, as OpenMMLab does
    warm_up: int = 0  # steps over which the learning rate rises from zero
    clip_norm: float = 0.0  # largest norm of the gradient; 0: not limited
    mean_decay: float = 0.0  # validate and save a running mean of the weights that keeps this share a step; 0: none
    views: int = 8  # fixed views of each place; 0: fresh ones in every epoch
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, is_valid, limit in self._limits():
            if not is_valid:
                raise UsageError(f"{name} must be {limit}, got {value}")

    @property
    def _precisions(self) -> tuple[str, ...]:
        return PRECISIONS

    def _limits(self) -> list[tuple[str, Any, bool, str]]:
        """Option, value, whether it is valid, and its limits in words."""
        precisions = self._precisions
        return [
            ("--batch", self.batch, self.batch >= 1, "at least 1"),
            ("--accumulate", self.accumulate, self.accumulate >= 1, "at least 1"),
            ("--lr", self.learning_rate, 0 < self.learning_rate < 1, "between 0 and 1"),
            ("--weight-decay", self.weight_decay, 0 <= self.weight_decay < 1, "0 or more, and below 1"),
            ("--schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("--warm-up", self.warm_up, self.warm_up >= 0, "0 or more"),
            ("--clip-norm", self.clip_norm, 0 <= self.clip_norm < math.inf, "0 or more"),
            ("--mean-decay", self.mean_decay, 0 <= self.mean_decay < 1, "0 or more, and below 1"),
            ("--views", self.views, self.views >= 0, "0 or more"),
            ("--precision", self.precision, self.precision in precisions, f"one of {', '.join(precisions)}"),
            ("--seed", self.seed, 0 <= self.seed < 1 << 63, "0 or more, and below 2**63"),
        ]

    def rate_factor(self, step: int, steps: int) -> float:
        """Factor on the learning rates at a step of a run of ``steps`` steps, 0..1."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        progress = min(1.0, (step - self.warm_up) / max(1, steps - self.warm_up))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "poly":
            return (1 - progress) ** _POLY_POWER  # type: ignore[no-any-return]
        return 1.0


@dataclass(frozen=True)
class Recipe(LoopRecipe):
    """How a decoder is trained. Defaults: the Mask-CDKD paper's (frozen encoder, AdamW, 30 epochs of 4 crops)."""

    epochs: int = 30
    encoder_learning_rate: float = 0.0  # 0: the encoder is frozen
    class_weights: str = "none"  # or ``sqrt``, ``balanced``, a number per class with commas; see :func:`class_weights`

    def _limits(self) -> list[tuple[str, Any, bool, str]]:
        return [
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--batch", self.batch, self.batch >= 2, "at least 2: batch norm needs more than one crop"),
            ("--encoder-lr", self.encoder_learning_rate, 0 <= self.encoder_learning_rate < 1, "0 or more, and below 1"),
            *super()._limits(),
        ]

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.encoder_learning_rate == 0


def class_weights(rule: str, pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
    """Weights of the classes in the loss, ``[K]``; None if all weigh the same.

    ``balanced`` is median frequency balancing (Eigen & Fergus, ICCV 2015, section 6.3.2): the median share of a class
    over the share of this one; ``sqrt`` is its square root. A class that never occurs weighs 1.
    """
    if rule == "none":
        return None
    if rule in ("balanced", "sqrt"):
        share = pixels / max(1, int(pixels.sum()))
        weights = np.ones(len(pixels))
        np.divide(np.median(share[share > 0]), share, out=weights, where=share > 0)
        return (weights if rule == "balanced" else np.sqrt(weights)).astype(np.float32)
    try:
        numbers = [float(part) for part in rule.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(pixels) or not all(0 < number < math.inf for number in numbers):
        raise UsageError(
            f"--class-weights {rule} is neither none, sqrt nor balanced, nor {len(pixels)} positive numbers with commas"
        )
    return np.array(numbers, np.float32)


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of the network to train; None: the checkpoint's own."""

    tile: int | None = None
    patch: int | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    taps: str | None = None  # blocks that feed the head, with commas
    pool_scales: str | None = None  # of a head that another project trained, likewise
    head_channels: int | None = None  # of a new head; None: those of the head it replaces, or of the preset, or 256
    new_head: bool = False  # start with a new head even if that of the checkpoint fits
    weights: str | None = None  # ``raw``, ``ema`` or a name, for a checkpoint with several sets of weights

    def loading(self) -> dict[str, Any]:
        """What the functions of :mod:`cdkd_edge.model.checkpoint` take."""
        names = ("heads", "layer_norm_eps", "taps", "pool_scales", "weights")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StartingNetwork:
    """The network that training starts from."""

    network: SegmentationNetwork
    layout: str
    notes: tuple[str, ...]


def starting_network(source: str | Path, schema: LabelSchema, settings: NetworkSettings, seed: int) -> StartingNetwork:
    """Load the network that training starts from. An encoder gets a new head; a whole network may keep its own.

    Args:
        source: an encoder or a whole network, in any layout of :mod:`cdkd_edge.model.layouts`; or
            ``preset:NAME`` for random weights.
        schema: the classes to learn.
        settings: tile, patch and what the checkpoint does not say.
        seed: of new weights.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or its patch does not divide the tile.
    """
    if str(source).startswith(PRESET_PREFIX):
        return _from_preset(str(source), schema, settings, seed)
    _, report = load_encoder(source, **settings.loading())
    own = report.config
    keeps_tile = report.has_head or report.layout == OURS.name
    tile = settings.tile or (own.tile if keeps_tile else DEFAULT_TILE)
    patch = settings.patch or (own.patch if tile % own.patch == 0 else DEFAULT_PATCH)
    if tile % patch:
        raise CheckpointError(f"a tile of {tile} px is a multiple of neither {own.patch} nor {patch} px patches")
    reason = _why_new_head(report, schema, settings)
    if reason is None:
        network, report = load_checkpoint(source, tile=tile, patch=patch, **settings.loading())
        return StartingNetwork(network, report.layout, report.notes)
    encoder, report = load_encoder(source, tile=tile, patch=patch, **settings.loading())
    channels = settings.head_channels or own.head_channels
    config = dataclasses.replace(report.config, classes=len(schema), head_channels=channels, neck=())
    torch.manual_seed(seed)
    network = SegmentationNetwork(config)
    network.encoder.load_state_dict(encoder.state_dict())
    return StartingNetwork(network, report.layout, (*report.notes, *([reason] if report.has_head else [])))


def _from_preset(source: str, schema: LabelSchema, settings: NetworkSettings, seed: int) -> StartingNetwork:
    name = source.removeprefix(PRESET_PREFIX)
    if name not in PRESETS:
        raise CheckpointError(f"there is no preset {name!r}", hint=f"presets: {', '.join(PRESETS)}")
    given = {key: getattr(settings, key) for key in ("tile", "patch", "heads", "layer_norm_eps", "head_channels")}
    given = {key: value for key, value in given.items() if value is not None}
    config = dataclasses.replace(PRESETS[name], classes=len(schema), **given)
    torch.manual_seed(seed)
    return StartingNetwork(SegmentationNetwork(config), f"preset {name}, random weights", ())


def _why_new_head(report: CheckpointReport, schema: LabelSchema, settings: NetworkSettings) -> str | None:
    """Why the head of a checkpoint is replaced; None if it is kept."""
    if not report.has_head:
        return "an encoder alone"
    if settings.new_head:
        return "the checkpoint's head was replaced, as asked"
    if report.config.classes != len(schema):
        return f"the checkpoint's head was replaced: it has {report.config.classes} classes, the data {len(schema)}"
    own = report.schema and not report.schema.numbered and report.schema.name != FOUND_SCHEMA
    if report.schema and own and report.schema.class_names != schema.class_names:
        return f"the checkpoint's head was replaced: its classes are {', '.join(report.schema.class_names)}"
    return None
