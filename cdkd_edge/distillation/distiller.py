"""The training loop of a distillation (torch)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cdkd_edge.core.errors import UsageError
from cdkd_edge.distillation.masks import visible_patches
from cdkd_edge.distillation.networks import LOSSES, Distillation, Losses, encoder_of
from cdkd_edge.distillation.recipe import FEATURES, MAE, RATE_BATCH, WITHOUT_ADAPTERS, DistillRecipe
from cdkd_edge.distillation.schedule import LEAST_STEPS, Schedule
from cdkd_edge.distillation.tiles import SceneTiles
from cdkd_edge.model.sparsity import sparse_weights
from cdkd_edge.training.loop import TrainingLoop
from cdkd_edge.training.ranks import Ranks
from cdkd_edge.training.views import View

STATISTICS_TILES = 64  # tiles on which the teacher's features are measured; 64 of 1024 px are 65,536 visible tokens
CHECK_TILES = 16  # most tiles that are kept out of training, to show what it gained
_CHECK_SHARE = 8  # one tile in so many is kept out
_TRIED = 1000  # tiles among which usable ones are looked for
_STUCK_AFTER = 0.25  # share of the run after which a schedule that is still at its first stage is worth a note
_LEAST_SPREAD = 0.5  # of the teacher's features, against those without adapters
_MASK, _CHECK = 4, 5  # added to a seed, as in :mod:`cdkd_edge.training.loop`


class Distiller(TrainingLoop):
    """Trains a student, and what helps it, on tiles without labels.

    Args:
        networks: see there; changed while it is trained.
        tiles, recipe: see there.
        ranks, workers: as for :class:`~cdkd_edge.training.loop.TrainingLoop`.

    Raises:
        UsageError: there are fewer tiles than the processes take in a step.
    """

    recipe: DistillRecipe
    drops_incomplete = True  # all processes then have as many tiles in every step

    def __init__(
        self,
        networks: Distillation,
        tiles: SceneTiles,
        recipe: DistillRecipe,
        *,
        ranks: Ranks = Ranks(),
        workers: int = 1,
    ) -> None:
        self.networks, self.tiles = networks, tiles
        order = np.random.default_rng(recipe.seed).permutation(len(tiles))
        # Only usable tiles are kept out: a few may all be blank or damaged, and then nothing could take their places.
        usable = (index for index in order[:_TRIED].tolist() if tiles.usable(tiles.places[index]))
        self.check = np.array(list(islice(usable, min(CHECK_TILES, len(tiles) // _CHECK_SHARE))), np.int64)
        self._training = order[~np.isin(order, self.check)]  # indices of places
        if not len(self.check):
            self.check = order[:CHECK_TILES]
        encoder = encoder_of(networks.student)
        trained = networks.trained()
        factor = recipe.batch * recipe.accumulate * ranks.size / RATE_BATCH
        groups = parameter_groups(trained, recipe.learning_rate * factor, recipe.weight_decay)
        super().__init__(trained, groups, recipe, len(self._training), averaged=encoder, ranks=ranks, workers=workers)
        if ranks.size > 1 and self.places < self.tiles_per_step:
            raise UsageError(
                f"{self.places} tiles to train on are fewer than the {self.tiles_per_step} of a step",
                hint="fewer processes, or a smaller --batch",
            )
        self.schedule = Schedule()
        self.measures: dict[str, Any] = {}  # of the last step, means over all processes
        self._seen: list[tuple[int, Losses]] = []  # tiles of the passes of this step, and what they gave
        self._shared = ranks.shared(networks)
        for weight in sparse_weights(encoder).values():  # AdamW leaves a zero without a gradient at zero
            weight.register_hook(partial(torch.mul, weight != 0))  # type: ignore[no-untyped-call]

    @property
    def batches(self) -> int:
        """Steps in an epoch."""
        return max(1, super().batches)

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.recipe.steps or self.recipe.epochs * self.batches

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weights of the losses now, in the order of :data:`.networks.LOSSES`."""
        recipe = self.recipe
        if recipe.method == FEATURES:
            return (1.0, 0.0, 0.0, recipe.logits)
        if recipe.method == MAE:
            return (0.0, 0.0, 1.0, 0.0)
        if recipe.loss_weights:
            return (*recipe.loss_weights, 0.0)
        return (*(self.schedule.weights if recipe.adapters else WITHOUT_ADAPTERS), 0.0)

    @property
    def scheduled(self) -> bool:
        """Whether the stages of the schedule weigh the losses."""
        return self.networks.teacher_decoder is not None and not self.recipe.loss_weights

    def measure_teacher(self) -> None:
        """Measure the teacher's features, on up to :data:`STATISTICS_TILES` tiles."""
        if self.networks.teacher is not None:
            self.networks.measure_teacher(self.plain(self._training[:STATISTICS_TILES]))

    def read(self, place: int, view: View, epoch: int) -> tuple[npt.NDArray[Any], ...]:
        """Pixels ``[3, T, T]`` of a view of a place, and the visible patches ``[V]``."""
        pixels = self._read_tile(int(self._training[place]), view, epoch)
        return (pixels, *self._mask(_MASK, epoch, place))

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss of uint8 tiles ``[N, 3, T, T]`` with their visible patches ``[N, V]``."""
        found: Losses = self._shared(*batch)
        self._seen.append((len(batch[0]), found._replace(parts=found.parts.detach())))
        return found.parts @ found.parts.new_tensor(self.loss_weights)

    def step(self, passes: Any) -> float:
        """See :meth:`.loop.TrainingLoop.step`; then the schedule goes on."""
        self._seen = []
        weights = self.loss_weights
        super().step(passes)
        tiles = sum(count for count, _ in self._seen)
        flat = sum(torch.cat([one.parts, one.missed, one.spread]) * (count / tiles) for count, one in self._seen)
        assert isinstance(flat, Tensor)
        pairs = len(self.networks.pairs)
        parts, missed, spread = torch.split(self.ranks.mean(flat), [len(LOSSES), pairs, pairs])
        self.measures = {
            "loss": float(parts @ parts.new_tensor(weights)),
            **dict(zip(LOSSES, parts.tolist(), strict=True)),
            "missed": missed.tolist(),
            "spread": spread.tolist(),
            "weights": weights,
        }
        if self.scheduled:
            self.schedule.update(self.measures["teacher_pixels"], self.measures["student_pixels"])
        return float(self.measures["loss"])

    def joined(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See :meth:`.loop.TrainingLoop.joined`."""
        alone = not isinstance(self._shared, nn.parallel.DistributedDataParallel)
        return contextlib.nullcontext() if last or alone else self._shared.no_sync()  # type: ignore[operator]

    def log_row(self) -> dict[str, Any]:
        """What the table of the run has of the last step."""
        found, progress = self.measures, self.progress
        return {
            **{name: found[name] for name in ("loss", *LOSSES)},
            **{f"weight_{name}": weight for name, weight in zip(LOSSES, found["weights"], strict=True)},
            **{
                f"{name}_{index + 1}": value for name in ("missed", "spread") for index, value in enumerate(found[name])
            },
            "step": progress.step,
            "epoch": progress.epoch,
            "seconds": progress.seconds,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "ratio": self.schedule.ratio,
            "stage": self.schedule.stage if self.scheduled else "",
            "waited": self.waited,
        }

    def oddities(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
        """What a user should know about the run as it is now, by kind; both arguments are of :meth:`compare`."""
        step, found = self.progress.step, {}
        spread = [one / max(start, 1e-9) for start, one in zip(before["spread"], now["spread"], strict=True)]
        if self.scheduled and self.schedule.stage == "early" and step > max(LEAST_STEPS, _STUCK_AFTER * self.steps):
            found["stage"] = (
                f"step {step}: still at the first stage, as the teacher reconstructs hardly better than the student "
                f"(ratio {self.schedule.ratio:.2f}); --loss-weights .6,.2,.2 lets distillation count most"
            )
        if self.recipe.gate_used and spread and min(spread) < _LEAST_SPREAD:
            found["spread"] = (
                f"step {step}: the teacher's features at pair {spread.index(min(spread)) + 1} vary {min(spread):.2f} "
                "times as much as at the start; --feedback student keeps it from making itself easy to predict"
            )
        return found

    @torch.no_grad()
    def compare(self) -> dict[str, Any]:
        """The losses on the tiles that are kept out of training, with the weights that would be saved; JSON data.

        ``missed`` and ``spread`` are by pair; ``agreement`` is the share of cells with the teacher's label, where both
        have heads.
        """
        rows = []
        with self.saved_weights():
            for tiles, visible in self.plain(self.check):
                found: Losses = self.networks(tiles, visible)
                rows.append(torch.cat([found.parts, found.agreement[None], found.missed, found.spread]))
        mean, names, pairs = torch.stack(rows).mean(0).tolist(), (*LOSSES, "agreement"), len(self.networks.pairs)
        by_pair = mean[len(names) :]
        return {**dict(zip(names, mean, strict=False)), "missed": by_pair[:pairs], "spread": by_pair[pairs:]}

    def state(self) -> dict[str, Any]:
        """See :meth:`.loop.TrainingLoop.state`."""
        targets = {"target_mean": self.networks.mean, "target_std": self.networks.std}
        return {**super().state(), **targets, "schedule": vars(self.schedule)}

    def restore(self, state: dict[str, Any]) -> None:
        """See :meth:`.loop.TrainingLoop.restore`."""
        super().restore(state)
        self.networks.mean.copy_(state["target_mean"])
        self.networks.std.copy_(state["target_std"])
        self.schedule = Schedule(**state["schedule"])

    @contextlib.contextmanager
    def saved_weights(self) -> Iterator[None]:
        """The student with its running mean, if there is one."""
        encoder = encoder_of(self.networks.student)
        if self._mean is None:
            yield
            return
        own = copy.deepcopy(encoder.state_dict())
        encoder.load_state_dict(self._mean.state_dict())
        try:
            yield
        finally:
            encoder.load_state_dict(own)

    def _read_tile(self, index: int, view: View, *epoch: int) -> npt.NDArray[np.uint8]:
        """A view of a place, or of another place of the same part of the tiles if it cannot be used."""
        among = self.check if index in self.check else self._training
        return self.tiles.read(self.tiles.places[index], view, (self.recipe.seed, *epoch), among)

    def _mask(self, purpose: int, epoch: int, place: int) -> tuple[npt.NDArray[np.int64], ...]:
        recipe = self.recipe
        if not recipe.masked:
            return ()
        grid = encoder_of(self.networks.student).config.grid
        return (visible_patches(recipe.mask, grid, recipe.cell, [recipe.seed, purpose, epoch, place]),)

    def plain(self, places: npt.NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tiles ``[1, 3, T, T]`` as they are with fixed masks ``[1, V]``, on the device."""
        for index in places.tolist():
            tile = torch.from_numpy(self._read_tile(index, View()))[None].to(self.device)
            mask = [torch.from_numpy(part)[None].to(self.device) for part in self._mask(_CHECK, 0, index)]
            yield tile, mask[0] if mask else None


def parameter_groups(trained: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW; position embeddings, mask tokens, biases and norms do not decay."""
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            is_token = name.rpartition(".")[2] in ("pos_embed", "mask_token", "cls_token", "registers")
            (constant if parameter.ndim < 2 or is_token else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": decay}, {"params": constant, "weight_decay": 0.0}]
    return [{**group, "base": rate} for group in groups if group["params"]]
