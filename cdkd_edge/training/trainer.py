"""The training loop: batches, steps, and the state that a run resumes from (torch)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.core.errors import NumericalCheckError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.training.recipe import Recipe, class_weights
from cdkd_edge.training.views import TrainingTiles, draw_view

Batch = tuple[Tensor, Tensor]  # uint8 tiles ``[N, 3, T, T]`` and labels ``[N, T, T]``

_EPOCH, _VIEW, _ORDER = 1, 2, 3  # added to a seed, so that draws for different purposes differ


@dataclass
class TrainingProgress:
    """Progress of a run; with the weights and the state of the optimiser, all that resuming needs."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch completed
    step: int = 0
    loss_sum: float = 0.0  # over the batches of the current epoch
    seconds: float = 0.0  # training and validation so far, in all processes that worked on the run
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a network, on the device it is on. One epoch reads one view of every place.

    ``encode`` replaces a frozen encoder, for example by one that caches. Default: the network's own.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        tiles: TrainingTiles,
        recipe: Recipe,
        encode: Callable[[Tensor], list[Tensor]] | None = None,
    ) -> None:
        self.network, self.tiles, self.recipe = network, tiles, recipe
        self.device = next(network.parameters()).device
        self.progress = TrainingProgress()
        self._encode = encode or network.encoder
        weights = class_weights(recipe.class_weights, tiles.class_pixels)
        self._weights = None if weights is None else torch.from_numpy(weights).to(self.device)
        network.encoder.requires_grad_(not recipe.frozen)
        groups: list[dict[str, Any]] = [{"params": list(network.head.parameters()), "base": recipe.learning_rate}]
        if not recipe.frozen:
            groups.append({"params": list(network.encoder.parameters()), "base": recipe.encoder_learning_rate})
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        # float16 has no room for small gradients; the scaler does nothing in other precisions.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self._trained = network.head if recipe.frozen else network
        self._mean = copy.deepcopy(self._trained).requires_grad_(False) if recipe.mean_decay else None

    @property
    def batches(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-len(self.tiles) // self.recipe.batch)

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.batches * self.recipe.epochs

    def run_epoch(self, after_batch: Callable[[], None] = lambda: None) -> float:
        """Train to the end of the current epoch; returns its mean loss. NumericalCheckError if a loss is not finite."""
        self.network.encoder.train(not self.recipe.frozen)
        self.network.head.train()
        progress = self.progress
        mark = time.perf_counter()
        for tiles, labels in self._prefetched(progress.batch):
            progress.loss_sum += self._step(tiles, labels)
            progress.batch += 1
            progress.step += 1
            progress.seconds, mark = progress.seconds + time.perf_counter() - mark, time.perf_counter()
            after_batch()
        loss = progress.loss_sum / self.batches
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        return loss

    def trained_network(self) -> SegmentationNetwork:
        """The network in its present state; further training does not change it."""
        trained: Any = copy.deepcopy(self._mean or self._trained)
        if self.recipe.frozen:
            network = copy.copy(self.network)
            network._modules = {**self.network._modules, "head": trained}
            return network.eval()
        return trained.eval()  # type: ignore[no-any-return]

    def state(self) -> dict[str, Any]:
        """All that resuming needs, as tensors and plain data."""
        return {
            "progress": vars(self.progress),
            "trained": self._trained.state_dict(),
            "mean": self._mean.state_dict() if self._mean else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the state of a run with the same recipe and data."""
        self.progress = TrainingProgress(**state["progress"])
        self._trained.load_state_dict(state["trained"])
        if self._mean:
            self._mean.load_state_dict(state["mean"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _step(self, tiles: Tensor, labels: Tensor) -> float:
        recipe, network = self.recipe, self.network
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * recipe.rate_factor(self.progress.step, self.steps)
        tiles, truth = tiles.to(self.device), labels.to(self.device).long()
        with autocast(self.device, recipe.precision):
            logits = network.head(self._encode(tiles))  # [N, K, G, G]
        full = network.upsample(logits.float())  # [N, K, T, T]
        if not (truth != NO_LABEL).any():
            return 0.0  # a view may show only pixels without label; a mean over none is not a number
        loss = F.cross_entropy(full, truth, weight=self._weights, ignore_index=NO_LABEL)
        if not torch.isfinite(loss):
            raise NumericalCheckError(
                f"the loss is {float(loss.detach())} at step {self.progress.step}", hint="lower the learning rate"
            )
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained.parameters(), recipe.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        """Move the mean weights and batch-norm statistics towards the current ones."""
        if self._mean is None:
            return
        done = self.progress.step
        keep = min(self.recipe.mean_decay, (1 + done) / (10 + done))  # the first steps soon lose their weight
        current = self._trained.state_dict()
        for name, value in self._mean.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[name], 1 - keep)
            else:
                value.copy_(current[name])

    def _prefetched(self, first: int) -> Iterator[Batch]:
        """The batches of the current epoch from ``first`` on, each read while the one before is trained on."""
        order = np.random.default_rng([self.recipe.seed, _ORDER, self.progress.epoch]).permutation(len(self.tiles))
        groups = [order[i : i + self.recipe.batch] for i in range(0, len(order), self.recipe.batch)][first:]
        with ThreadPoolExecutor(1, thread_name_prefix="tiles") as pool:
            coming: Future[Batch] | None = None
            for group in groups:
                ready, coming = coming, pool.submit(self._read, group, self.progress.epoch)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def _read(self, group: np.ndarray[Any, Any], epoch: int) -> Batch:
        read = [self.tiles.read(self.tiles.places[index], self._view(int(index), epoch)) for index in group]
        if len(read) == 1:  # batch norm after pooling to one cell needs two values
            read *= 2
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*read, strict=True))
        return images, labels

    def _view(self, place: int, epoch: int) -> Any:
        """The view of a place in an epoch. Fixed ones take turns, in an order of the place's own."""
        recipe = self.recipe
        if not recipe.views:
            return draw_view(recipe.augmentation, [recipe.seed, _EPOCH, epoch, place], None)
        turn, position = divmod(epoch, recipe.views)
        order = np.random.default_rng([recipe.seed, _VIEW, place, turn]).permutation(recipe.views)
        return draw_view(recipe.augmentation, [recipe.seed, _VIEW, place], int(order[position]))
