"""A linear probe: how well a linear layer tells the classes from an encoder's features as they are (torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import Encoder
from cdkd_edge.quality.datasets import Split
from cdkd_edge.quality.metrics import ConfusionMatrix
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.files import scores_of
from cdkd_edge.training.views import TrainingTiles, View

TILES = 64  # most tiles of each side that are looked at, evenly spaced
_CELLS = 32768  # most patches that the layer is trained on, over all tiles
_ITERATIONS = 100  # most iterations of L-BFGS; on Dubai features the loss has settled by then
_DECAY = 1e-2  # of the layer's squared weights; 1e-4 overfits wide features on Dubai, by up to 16 points of mIoU


class LinearProbe:
    """Trains a linear layer on the four maps of an encoder, and scores it on the validation images.

    The layer starts at zero and its loss is convex, so the score depends on the encoder alone.

    Args:
        split: labelled images; the validation side is never trained on.
        schema: their classes.
        tile: side of a tile, px.
        options: how images are read.

    Raises:
        DatasetError, SchemaError: as :class:`~cdkd_edge.training.views.TrainingTiles` does.
    """

    def __init__(self, split: Split, schema: LabelSchema, tile: int, options: SegmentOptions) -> None:
        self.schema = schema
        self._training = TrainingTiles(split.training, schema, tile, options=options)
        self._validation = TrainingTiles(split.validation, schema, tile, options=options)

    def score(self, encoder: Encoder, device: torch.device, precision: str) -> dict[str, Any]:
        """``mean_iou`` and the other scores of the validation tiles, pixel by pixel; JSON data."""
        chosen, shares = self._training_cells(encoder, device, precision)
        mean, std = chosen.mean(0), chosen.std(0, correction=0).clamp_min(1e-6)
        layer = _trained_layer((chosen - mean) / std, shares)
        matrix = ConfusionMatrix(len(self.schema))
        patch = encoder.config.patch
        with torch.no_grad():
            for features, labels in _seen(self._validation, encoder, device, precision):
                logits = layer((features - mean) / std)  # [G, G, K]
                full = F.interpolate(
                    logits.permute(2, 0, 1)[None], scale_factor=float(patch), mode="bilinear", align_corners=False
                )
                matrix.update(labels.numpy(), full[0].argmax(0).to(torch.uint8).cpu().numpy())
        return scores_of(matrix, self.schema)

    def _training_cells(self, encoder: Encoder, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
        """Features ``[M, 4 D]`` of labelled patches, and the share of each class in them ``[M, K]``."""
        config, classes = encoder.config, len(self.schema)
        most = max(1, _CELLS // min(TILES, len(self._training)))  # of a tile
        rng = np.random.default_rng(0)
        features, shares = [], []
        for maps, labels in _seen(self._training, encoder, device, precision):
            patches = labels.unfold(0, config.patch, config.patch).unfold(1, config.patch, config.patch).flatten(2)
            # Pixels without label, 255, are counted behind the classes, and left out.
            one_hot = F.one_hot(patches.flatten(0, 1).long().clamp_max(classes), classes + 1)  # [G G, P P, K + 1]
            counts = one_hot[..., :classes].sum(1).float()
            cells = torch.from_numpy(rng.permutation(counts.sum(1).nonzero()[:, 0].numpy())[:most])
            features.append(maps.flatten(0, 1)[cells.to(device)])
            shares.append(F.normalize(counts[cells], p=1, dim=1).to(device))
        return torch.cat(features), torch.cat(shares)


def _seen(
    tiles: TrainingTiles, encoder: Encoder, device: torch.device, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The four maps ``[G, G, 4 D]`` and the labels ``[T, T]`` of up to :data:`TILES` tiles."""
    for index in np.linspace(0, len(tiles) - 1, min(TILES, len(tiles))).round().astype(int):
        image, labels = tiles.read(tiles.places[index], View())
        with torch.no_grad(), autocast(device, precision):
            maps = encoder(torch.from_numpy(image)[None].to(device))
        yield torch.cat(maps, dim=1)[0].permute(1, 2, 0).float(), torch.from_numpy(labels)


def _trained_layer(features: Tensor, shares: Tensor) -> torch.nn.Linear:
    """A layer that minimises the cross-entropy of class shares ``[M, K]`` from features ``[M, C]``."""
    layer = torch.nn.Linear(features.shape[1], shares.shape[1], device=features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), shares) + _DECAY * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return layer
