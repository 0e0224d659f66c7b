"""Method ``features``: a student learns to compute its teacher's feature maps, and so its logits (torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError, UsageError
from cdkd_edge.distillation.tiles import SceneTiles
from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import Encoder, SegmentationNetwork
from cdkd_edge.model.sparsity import sparse_weights
from cdkd_edge.training.loop import TrainingLoop
from cdkd_edge.training.recipe import LoopRecipe
from cdkd_edge.training.views import Augmentation, View

STATISTICS_TILES = 32  # tiles on which the teacher's features are measured, to normalise them
CHECK_TILES = 16  # most tiles that are kept out of training, to show what it gained
_CHECK_SHARE = 8  # one tile in so many is kept out
_LEAST_VARIANCE = 1e-4  # of the mean of a map's channels: what a channel that hardly varies is divided by

Network = SegmentationNetwork | Encoder


@dataclass(frozen=True)
class AlignRecipe(LoopRecipe):
    """How features are aligned. The learning rate is the Mask-CDKD paper's; 1e-4 made a DINOv2 encoder worse."""

    steps: int = 1000
    batch: int = 2
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warm_up: int = 50
    clip_norm: float = 1.0
    views: int = 0
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(scale=(0.7, 1.4), light=0.2))
    precision: str = "bf16"
    logits: float = 1.0  # weight of the Kullback-Leibler divergence of class probabilities; 0: features alone

    def _limits(self) -> list[tuple[str, Any, bool, str]]:
        return [
            ("--steps", self.steps, self.steps >= 1, "at least 1"),
            ("--logits", self.logits, 0 <= self.logits < 1e6, "0 or more"),
            *super()._limits(),
        ]


def encoder_of(network: Network) -> Encoder:
    """The encoder of a network, or the encoder itself."""
    return network.encoder if isinstance(network, SegmentationNetwork) else network


def require_alignable(student: Network, teacher: Network) -> None:
    """Make sure that the maps of two networks can be compared value by value: CheckpointError with what differs."""
    ours, theirs = student.config, teacher.config
    if ours.embed_dim != theirs.embed_dim:
        raise CheckpointError(
            f"the student's features are {ours.embed_dim} wide, the teacher's {theirs.embed_dim}",
            hint="method features compares them channel by channel; take the network that the student came from",
        )
    if ours.grid != theirs.grid:
        raise CheckpointError(
            f"the student has patches of {ours.patch} px, the teacher of {theirs.patch} px; their maps differ in size"
        )


class Aligner(TrainingLoop):
    """Trains a student's encoder on the four maps of a frozen teacher of the same width.

    The loss is the mean over the maps of the squared difference over the variance of the teacher's channel: the share
    of what the teacher's features tell that the student misses (1 for a student that gives each channel's mean). If
    both have heads with the same number of classes, ``recipe.logits`` times the Kullback-Leibler divergence of the
    class probabilities is added, each through its own head; the heads stay as they are.

    Args:
        student: changed while it is trained; its position embedding only if ``position``, and zeros of 2:4 sparse
            weights stay zeros.
        teacher, tiles, recipe: see there. The teacher is not changed.
    """

    recipe: AlignRecipe

    def __init__(
        self, student: Network, teacher: Network, tiles: SceneTiles, recipe: AlignRecipe, *, position: bool = True
    ) -> None:
        require_alignable(student, teacher)
        self.student, self.teacher, self.tiles = student, teacher.eval().requires_grad_(False), tiles
        encoder = encoder_of(student.requires_grad_(False).eval())
        encoder.requires_grad_(True).pos_embed.requires_grad_(position)
        self._with_heads = recipe.logits > 0 and _have_heads(student, teacher)
        order = np.random.default_rng(recipe.seed).permutation(len(tiles))
        kept_out = min(CHECK_TILES, len(tiles) // _CHECK_SHARE)
        self._training = order[kept_out:]  # indices of places
        self.check = order[:kept_out] if kept_out else order
        parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        super().__init__(encoder, [{"params": parameters, "base": recipe.learning_rate}], recipe, len(self._training))
        self._variance: list[Tensor] = []
        for weight in sparse_weights(encoder).values():  # AdamW leaves a zero without a gradient at zero
            weight.register_hook(partial(torch.mul, weight != 0))  # type: ignore[no-untyped-call]

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.recipe.steps

    def measure_teacher(self) -> None:
        """Measure the variance of the teacher's channels, on up to :data:`STATISTICS_TILES` tiles."""
        sums: list[list[Tensor]] = []
        for tiles in self._plain(self._training[:STATISTICS_TILES]):
            maps, _ = self._seen_by(self.teacher, tiles)
            sums.append([torch.stack([m.sum((0, 2, 3)), m.square().sum((0, 2, 3))]) for m in map(Tensor.double, maps)])
        count = min(STATISTICS_TILES, len(self._training)) * self.teacher.config.grid**2
        for total in (torch.stack(parts).sum(0) / count for parts in zip(*sums, strict=True)):
            variance = total[1] - total[0] ** 2  # [D]
            least = max(float(variance.mean()) * _LEAST_VARIANCE, 1e-12)
            self._variance.append(variance.clamp_min(least).float())

    def read(self, place: int, view: View) -> tuple[npt.NDArray[np.uint8], ...]:
        """Pixels ``[3, T, T]`` of a view of a place."""
        return (self._read_tile(self._training[place], view, self.progress.epoch),)

    def loss(self, *batch: Tensor) -> Tensor | None:
        """The loss of uint8 tiles ``[N, 3, T, T]``."""
        (tiles,) = batch
        with torch.no_grad():
            target, truth = self._seen_by(self.teacher, tiles)
        maps, logits = self._seen_by(self.student, tiles)
        loss = torch.stack(self._missed(maps, target)).mean()
        if logits is None or truth is None:
            return loss
        return loss + self.recipe.logits * _divergence(logits, truth)

    @torch.no_grad()
    def compare(self, student: Network) -> dict[str, Any]:
        """How far a student is from the teacher on the tiles that it does not train on; JSON data.

        ``missed`` is the loss of each map; with heads also ``divergence`` and ``agreement``, the share of cells with
        the same label.
        """
        rows: list[list[float]] = []
        for tiles in self._plain(self.check):
            target, truth = self._seen_by(self.teacher, tiles)
            maps, logits = self._seen_by(student, tiles)
            row = [float(part) for part in self._missed(maps, target)]
            if logits is not None and truth is not None:
                same = (logits.argmax(1) == truth.argmax(1)).float().mean()
                row += [float(_divergence(logits, truth)), float(same)]
            rows.append(row)
        mean = np.mean(rows, axis=0).tolist()
        found: dict[str, Any] = {"missed": mean[:4], "loss": float(np.mean(mean[:4]))}
        if mean[4:]:
            found |= {"divergence": mean[4], "agreement": mean[5]}
            found["loss"] += self.recipe.logits * mean[4]
        return found

    def state(self) -> dict[str, Any]:
        """See :meth:`.loop.TrainingLoop.state`."""
        return {**super().state(), "variance": self._variance}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`.loop.TrainingLoop.restore`."""
        super().restore(state)
        self._variance = list(state["variance"])

    def _missed(self, maps: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
        """Per map the mean of the squared difference over the teacher's variance."""
        return [
            ((ours - theirs).square() / variance[:, None, None]).mean()
            for ours, theirs, variance in zip(maps, target, self._variance, strict=True)
        ]

    def _seen_by(self, network: Network, tiles: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The four maps ``[N, D, G, G]`` and, if they count, the logits ``[N, K, G, G]`` of a network, FP32."""
        with autocast(self.device, self.recipe.precision):
            maps = encoder_of(network)(tiles)
            head = network.head if self._with_heads and isinstance(network, SegmentationNetwork) else None
            logits = head(maps) if head is not None else None
        return [m.float() for m in maps], None if logits is None else logits.float()

    def _plain(self, places: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        """Tiles as they are, in small batches on the device."""
        for index in places:
            tile = torch.from_numpy(self._read_tile(index, View()))
            yield tile[None].to(self.device)

    def _read_tile(self, index: int, view: View, *epoch: int) -> npt.NDArray[np.uint8]:
        """A view of a place, or of another place of the same part of the tiles if it cannot be used."""
        among = self.check if index in self.check else self._training
        return self.tiles.read(self.tiles.places[index], view, (self.recipe.seed, *epoch), among)


def _have_heads(student: Network, teacher: Network) -> bool:
    """Whether both have heads. UsageError if these know other classes."""
    if not isinstance(student, SegmentationNetwork) or not isinstance(teacher, SegmentationNetwork):
        return False
    if student.config.classes != teacher.config.classes:
        raise UsageError(
            f"the student's head knows {student.config.classes} classes, the teacher's {teacher.config.classes}",
            hint="align features alone: --logits 0",
        )
    return True


def _divergence(logits: Tensor, truth: Tensor) -> Tensor:
    """Kullback-Leibler divergence of class probabilities ``[N, K, G, G]``, mean over the cells."""
    ours, theirs = logits.log_softmax(1), truth.log_softmax(1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean()
