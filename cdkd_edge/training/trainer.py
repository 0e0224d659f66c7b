"""Trains a decoder, and if asked the encoder, on tiles with labels (torch)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.training.loop import TrainingLoop
from cdkd_edge.training.recipe import Recipe, class_weights
from cdkd_edge.training.views import TrainingTiles, View


class Trainer(TrainingLoop):
    """Trains a network on labels.

    ``encode`` replaces a frozen encoder, for example by one that caches. Default: the network's own.
    """

    recipe: Recipe

    def __init__(
        self,
        network: SegmentationNetwork,
        tiles: TrainingTiles,
        recipe: Recipe,
        encode: Callable[[Tensor], list[Tensor]] | None = None,
    ) -> None:
        self.network, self.tiles = network, tiles
        self._encode = encode or network.encoder
        network.encoder.requires_grad_(not recipe.frozen)
        groups: list[dict[str, Any]] = [{"params": list(network.head.parameters()), "base": recipe.learning_rate}]
        if not recipe.frozen:
            groups.append({"params": list(network.encoder.parameters()), "base": recipe.encoder_learning_rate})
        super().__init__(network.head if recipe.frozen else network, groups, recipe, len(tiles))
        weights = class_weights(recipe.class_weights, tiles.class_pixels)
        self._weights = None if weights is None else torch.from_numpy(weights).to(self.device)

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.batches * self.recipe.epochs

    def run_epoch(self, after_batch: Callable[[], None] = lambda: None) -> float:
        """See :meth:`.loop.TrainingLoop.run_epoch`."""
        self.network.encoder.train(not self.recipe.frozen)
        self.network.head.train()
        return super().run_epoch(after_batch)

    def read(self, place: int, view: View, epoch: int) -> tuple[npt.NDArray[np.uint8], ...]:
        """Pixels ``[3, T, T]`` and labels ``[T, T]`` of a view of a place."""
        return self.tiles.read(self.tiles.places[place], view)

    def loss(self, *batch: Tensor) -> Tensor | None:
        """Cross-entropy of tiles ``[N, 3, T, T]`` and labels ``[N, T, T]``, both uint8."""
        tiles, labels = batch
        if len(tiles) == 1:  # batch norm after pooling to one cell needs two values
            tiles, labels = tiles.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1)
        truth = labels.long()
        with autocast(self.device, self.recipe.precision):
            logits = self.network.head(self._encode(tiles))  # [N, K, G, G]
        full = self.network.upsample(logits.float())  # [N, K, T, T]
        if not (truth != NO_LABEL).any():
            return None  # a view may show only pixels without label; a mean over none is not a number
        return F.cross_entropy(full, truth, weight=self._weights, ignore_index=NO_LABEL)

    def trained_network(self) -> SegmentationNetwork:
        """The network in its present state; further training does not change it."""
        trained: Any = self.trained_module()
        if not self.recipe.frozen:
            return trained  # type: ignore[no-any-return]
        network = copy.copy(self.network)
        network._modules = {**self.network._modules, "head": trained}
        return network.eval()
