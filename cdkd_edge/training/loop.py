"""A training loop of any kind: batches, steps, a running mean, and the state that a run resumes from (torch)."""

from __future__ import annotations

import contextlib
import copy
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cdkd_edge.core.errors import NumericalCheckError
from cdkd_edge.training.ranks import Ranks
from cdkd_edge.training.recipe import LoopRecipe
from cdkd_edge.training.views import View, draw_view

_AHEAD = 1  # steps whose tiles are read while another one is trained on
_EPOCH, _VIEW, _ORDER = 1, 2, 3  # added to a seed, so that draws for different purposes differ


@dataclass
class TrainingProgress:
    """Progress of a run; with the weights and the state of the optimiser, all that resuming needs."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch completed
    step: int = 0
    loss: float = 0.0  # of the last batch
    loss_sum: float = 0.0  # over the batches of the current epoch
    seconds: float = 0.0  # training and validation so far, in all processes that worked on the run
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class TrainingLoop(ABC):
    """Trains a module, on the device it is on. One epoch reads one view of every place.

    Args:
        trained: the module whose weights and statistics change; what resuming restores.
        groups: of parameters for AdamW, each with its learning rate as ``base``.
        recipe: see there.
        places: how many there are.
        averaged: the part of ``trained`` whose running mean is kept. Default: all of it.
        ranks: the processes that share each step. The same steps are made as by one process with their whole batch.
        workers: threads that read.
    """

    drops_incomplete = False  # whether the last step of an epoch is left out if it would have fewer tiles

    def __init__(
        self,
        trained: nn.Module,
        groups: list[dict[str, Any]],
        recipe: LoopRecipe,
        places: int,
        *,
        averaged: nn.Module | None = None,
        ranks: Ranks = Ranks(),
        workers: int = 1,
    ) -> None:
        self.recipe, self.places, self.ranks = recipe, places, ranks
        self.progress = TrainingProgress()
        self.waited = 0.0  # seconds for which this process waited for tiles
        self._workers = workers
        self.device = next(trained.parameters()).device
        self._trained, self._averaged = trained, trained if averaged is None else averaged
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        # float16 has no room for small gradients; the scaler does nothing in other precisions.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self._mean = copy.deepcopy(self._averaged).requires_grad_(False) if recipe.mean_decay else None

    @property
    def tiles_per_step(self) -> int:
        """Tiles of a step, in all processes."""
        return self.recipe.batch * self.recipe.accumulate * self.ranks.size

    @property
    def batches(self) -> int:
        """Steps in an epoch; the last may have fewer tiles."""
        if self.drops_incomplete:
            return self.places // self.tiles_per_step
        return -(-self.places // self.tiles_per_step)

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps in the whole run."""

    @abstractmethod
    def read(self, place: int, view: View, epoch: int) -> tuple[npt.NDArray[Any], ...]:
        """What a step needs of a view of a place, arrays; called in other threads."""

    @abstractmethod
    def loss(self, *batch: Tensor) -> Tensor | None:
        """The loss of a batch of what :meth:`read` gave; None if there is nothing to learn from it."""

    def joined(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Entered for each pass of a step; where processes share a step, they join their gradients in the last."""
        return contextlib.nullcontext()

    def run_epoch(self, after_batch: Callable[[], None] = lambda: None) -> float:
        """Train to the end of the current epoch; returns its mean loss. NumericalCheckError if a loss is not finite."""
        progress = self.progress
        mark = time.perf_counter()
        for passes in self._prefetched(progress.batch):
            self.waited += time.perf_counter() - mark
            progress.loss = self.step(passes)
            progress.loss_sum += progress.loss
            progress.batch += 1
            progress.step += 1
            progress.seconds += time.perf_counter() - mark
            after_batch()
            mark = time.perf_counter()
        loss = progress.loss_sum / max(1, progress.batch)
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        return loss

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

    def trained_module(self) -> nn.Module:
        """A copy of what is trained in its present state, its running mean if the recipe has one."""
        return copy.deepcopy(self._mean or self._averaged).eval()

    def step(self, passes: Sequence[Sequence[Tensor]]) -> float:
        """Make a step with the batches of its passes; returns the mean loss of this process."""
        recipe, losses = self.recipe, []
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * recipe.rate_factor(self.progress.step, self.steps)
        self._optimizer.zero_grad(set_to_none=True)
        tiles = sum(len(batch[0]) for batch in passes)
        for index, batch in enumerate(passes):
            with self.joined(index == len(passes) - 1):
                loss = self.loss(*(part.to(self.device) for part in batch))
                if loss is None:
                    continue
                if not torch.isfinite(loss):
                    value = float(loss.detach())
                    raise NumericalCheckError(
                        f"the loss is {value} at step {self.progress.step}", hint="lower the learning rate"
                    )
                share = len(batch[0]) / tiles  # the last pass may have fewer tiles
                self._scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()) * share)
        if not losses:
            return 0.0
        if recipe.clip_norm:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained.parameters(), recipe.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average()
        return sum(losses)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the mean weights and batch-norm statistics towards the current ones."""
        if self._mean is None:
            return
        done = self.progress.step
        keep = min(self.recipe.mean_decay, (1 + done) / (10 + done))  # the first steps soon lose their weight
        current = self._averaged.state_dict()
        for name, value in self._mean.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[name], 1 - keep)
            else:
                value.copy_(current[name])

    def _prefetched(self, first: int) -> Iterator[list[list[Tensor]]]:
        """The passes of the steps of the current epoch from ``first`` on, read while the step before is trained on."""
        recipe, epoch, tiles = self.recipe, self.progress.epoch, self.tiles_per_step
        order = np.random.default_rng([recipe.seed, _ORDER, epoch]).permutation(self.places)
        last = min(self.batches, first + self.steps - self.progress.step)
        coming: deque[list[Future[tuple[npt.NDArray[Any], ...]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tiles")
        try:
            for index in range(first, last + _AHEAD):
                if index < last:
                    share = order[index * tiles : (index + 1) * tiles][self.ranks.rank :: self.ranks.size]
                    coming.append([pool.submit(self._read, int(place), epoch) for place in share])
                if index >= first + _AHEAD and coming:
                    read = [future.result() for future in coming.popleft()]
                    yield [_batch(read[i : i + recipe.batch]) for i in range(0, len(read), recipe.batch)]
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, place: int, epoch: int) -> tuple[npt.NDArray[Any], ...]:
        return self.read(place, self._view(place, epoch), epoch)

    def _view(self, place: int, epoch: int) -> View:
        """The view of a place in an epoch. Fixed ones take turns, in an order of the place's own."""
        recipe = self.recipe
        if not recipe.views:
            return draw_view(recipe.augmentation, [recipe.seed, _EPOCH, epoch, place], None)
        turn, position = divmod(epoch, recipe.views)
        order = np.random.default_rng([recipe.seed, _VIEW, place, turn]).permutation(recipe.views)
        return draw_view(recipe.augmentation, [recipe.seed, _VIEW, place], int(order[position]))


def _batch(read: Sequence[tuple[npt.NDArray[Any], ...]]) -> list[Tensor]:
    return [torch.from_numpy(np.stack(part)) for part in zip(*read, strict=True)]
