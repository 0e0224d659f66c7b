"""How a run trains: every number of it, and what makes two runs the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import UsageError
from cdkd_edge.model.device import PRECISIONS
from cdkd_edge.training.views import Augmentation

SCHEDULES = ("constant", "cosine", "poly")
_POLY_POWER = 0.9


@dataclass(frozen=True)
class Recipe:
    """Defaults are the Mask-CDKD paper's protocol for its head: frozen encoder, AdamW, 1e-4, 30 epochs of 4 crops.

    Raises:
        UsageError: numbers that cannot train anything.
    """

    epochs: int = 30
    batch: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    encoder_learning_rate: float = 0.0
    """0: the encoder is frozen."""
    schedule: str = "constant"
    """``constant``; ``cosine`` to zero; ``poly``: (1 - progress) ** 0.9, as OpenMMLab does."""
    warm_up: int = 0
    """Steps over which the learning rate rises from zero."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: not limited."""
    mean_decay: float = 0.0
    """Weights are validated and saved as a running mean that keeps this share per step; 0: as they are."""
    class_weights: str = "none"
    """``none``, ``sqrt``, ``balanced``, or one number per class with commas; see :func:`class_weights`."""
    views: int = 8
    """Fixed views of each place; 0: fresh ones in every epoch."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            ("--epochs", self.epochs, self.epochs >= 1),
            ("--batch", self.batch, self.batch >= 2),  # batch norm after pooling to one cell needs two values
            ("--lr", self.learning_rate, 0 < self.learning_rate < 1),
            ("--weight-decay", self.weight_decay, 0 <= self.weight_decay < 1),
            ("--encoder-lr", self.encoder_learning_rate, 0 <= self.encoder_learning_rate < 1),
            ("--schedule", self.schedule, self.schedule in SCHEDULES),
            ("--warm-up", self.warm_up, self.warm_up >= 0),
            ("--clip-norm", self.clip_norm, 0 <= self.clip_norm < math.inf),
            ("--mean-decay", self.mean_decay, 0 <= self.mean_decay < 1),
            ("--views", self.views, self.views >= 0),
            ("--precision", self.precision, self.precision in PRECISIONS),
            ("--seed", self.seed, 0 <= self.seed < 1 << 63),  # what torch takes
        ]
        for name, value, fine in wrong:
            if not fine:
                hint = "batches hold at least 2 crops: batch norm needs more than one" if name == "--batch" else None
                raise UsageError(f"{name} {value} cannot train anything", hint=hint)

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.encoder_learning_rate == 0

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rates at a step of a run of ``steps``, 0..1."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        progress = min(1.0, (step - self.warm_up) / max(1, steps - self.warm_up))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "poly":
            return (1 - progress) ** _POLY_POWER  # type: ignore[no-any-return]
        return 1.0


def class_weights(rule: str, pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
    """Weights of the classes in the loss, ``[K]``, or None for none.

    ``balanced`` is median frequency balancing (Eigen & Fergus, ICCV 2015, section 6.3.2): median share over the
    class's share; ``sqrt`` is its square root. A class that never occurs weighs 1: no pixel asks.

    Raises:
        UsageError: neither a rule nor K positive numbers.
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
