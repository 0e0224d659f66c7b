"""A network in PyTorch that labels tiles as a graph or an engine does (torch)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdkd_edge.core.errors import EngineError, SchemaError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema, load_schema, numbered_schema
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.engines.protocol import Labeller, UInt8Array
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint
from cdkd_edge.model.device import autocast, chosen_device
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.model.within import FOUND_SCHEMA

SLOTS = 3  # as engines have: one batch being read, one computed, one written
# uint8 tiles ``[N, 3, T, T]`` on the network's device to the four feature maps ``[N, D, G, G]`` of its encoder
Encode = Callable[[Tensor], list[Tensor]]


class NetworkLabeller(Labeller):
    """A network on the device it is on, put into evaluation mode when it runs.

    Args:
        network, artefact, schema: the network, its checkpoint, and what its labels mean.
        precision: ``fp32``, or ``bf16``/``fp16`` under autocast.
        batch: tiles per run.
        encode: replaces the network's encoder, for example by one that caches its features.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        schema: LabelSchema,
        artefact: FileRecord,
        *,
        precision: str = "fp32",
        batch: int = 1,
        encode: Encode | None = None,
    ) -> None:
        self.network, self.schema, self.artefact = network, schema, artefact
        self.batch, self.tile, self.slots = batch, network.config.tile, SLOTS
        self.device = next(network.parameters()).device
        self._precision, self._encode = precision, encode or network.encoder
        self._inputs = [np.zeros((batch, 3, self.tile, self.tile), np.uint8) for _ in range(SLOTS)]
        self._outputs = [np.full((batch, self.tile, self.tile), NO_LABEL, np.uint8) for _ in range(SLOTS)]

    def input(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.input`."""
        return self._inputs[slot]

    def output(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.output`."""
        return self._outputs[slot]

    @torch.inference_mode()
    def launch(self, slot: int) -> None:
        """Compute the labels of the slot, and wait for them; EngineError if PyTorch fails (no memory, say)."""
        self._outputs[slot].fill(NO_LABEL)
        self.network.eval()
        try:
            tiles = torch.from_numpy(self._inputs[slot]).to(self.device)
            with autocast(self.device, self._precision):
                logits = self.network.head(self._encode(tiles))
            labels = self.network.upsample(logits.float()).argmax(dim=1).to(torch.uint8)
            self._outputs[slot][:] = labels.cpu().numpy()
        except RuntimeError as error:
            raise EngineError(f"PyTorch failed on a tile: {' '.join(str(error).split())[:300]}") from None

    def wait(self, slot: int) -> None:
        """Do nothing: :meth:`launch` has waited."""


def load_network(
    path: Path,
    *,
    schema: str | None = None,
    tile: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    weights: str | None = None,
) -> tuple[NetworkLabeller, CheckpointReport]:
    """Load a checkpoint that has a head as a labeller.

    Args:
        path, weights: see :func:`cdkd_edge.model.checkpoint.load_checkpoint`.
        schema: names for classes where the checkpoint has none.
        tile: side of the tiles, px. Default: the checkpoint's.
        device: ``auto`` (CUDA if there is one), or torch's name of a device.
        precision: see :class:`NetworkLabeller`.

    Raises:
        CheckpointError, SchemaError, UsageError: as their loaders do; there is no such device or precision.
    """
    where = chosen_device(device)
    autocast(where, precision)  # refuses a wrong precision before a large file is read
    network, report = load_checkpoint(path, tile=tile, weights=weights)
    names = report.schema
    if names is None or (schema and names.name == FOUND_SCHEMA):
        names = load_schema(schema) if schema else numbered_schema(network.config.classes)
        if (classes := network.config.classes) != len(names):
            raise SchemaError(f"label schema {names.name!r} has {len(names)} classes, {path.name} {classes}")
    network.to(where)
    return NetworkLabeller(network, names, FileRecord.of(report.path), precision=precision), report
