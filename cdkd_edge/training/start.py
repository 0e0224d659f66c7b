"""What training starts from: an encoder gets a new head, a whole network may keep its own (torch)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.model.checkpoint import OPENMMLAB_SCHEMA, CheckpointReport, load_checkpoint, load_encoder
from cdkd_edge.model.config import PRESETS
from cdkd_edge.model.network import SegmentationNetwork

DEFAULT_TILE = 1024
"""The paper's crops; for an encoder alone. A network keeps the tile it has."""
DEFAULT_PATCH = 16
"""For encoders whose own patch does not divide the tile (DINOv2's 14)."""
PRESET_PREFIX = "preset:"


@dataclass(frozen=True)
class Shape:
    """What a user may say about the network; None leaves it to the checkpoint."""

    tile: int | None = None
    patch: int | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    head_channels: int | None = None
    """Of a new head. Default: those of the head it replaces, or of the preset, or 256."""
    new_head: bool = False
    """Start with a new head also where the checkpoint has one that fits."""
    weights: str | None = None
    """``raw``, ``ema`` or a name, where the checkpoint holds several sets of weights."""


@dataclass(frozen=True)
class Start:
    """A network before training."""

    network: SegmentationNetwork
    kept_head: bool
    layout: str
    notes: tuple[str, ...]


def starting_network(source: str | Path, schema: LabelSchema, shape: Shape, seed: int) -> Start:
    """Load what training starts from.

    Args:
        source: an encoder or a whole network, in any layout of :mod:`cdkd_edge.model.layouts`; or
            ``preset:NAME`` for random weights.
        schema: the classes to be.
        shape: tile, patch and what the checkpoint does not say.
        seed: of the weights that are new.

    Raises:
        CheckpointError: as the loaders do; the tile and patch do not fit each other.
    """
    if str(source).startswith(PRESET_PREFIX):
        return _from_preset(str(source), schema, shape, seed)
    source = Path(source)
    encoder, report = load_encoder(
        source, heads=shape.heads, layer_norm_eps=shape.layer_norm_eps, weights=shape.weights
    )
    own = report.config
    tile = shape.tile or (own.tile if report.has_head else DEFAULT_TILE)
    patch = shape.patch or (own.patch if tile % own.patch == 0 else DEFAULT_PATCH)
    if tile % patch:
        raise CheckpointError(f"a tile of {tile} px is a multiple of neither {own.patch} nor {patch} px patches")
    loading: dict[str, Any] = {
        "tile": tile,
        "patch": patch,
        "heads": shape.heads,
        "layer_norm_eps": shape.layer_norm_eps,
        "weights": shape.weights,
    }
    reason = _why_not_its_head(report, schema, shape)
    if reason is None:
        network, report = load_checkpoint(source, **loading)
        return Start(network, True, report.layout, report.notes)
    encoder, report = load_encoder(source, **loading)
    config = dataclasses.replace(
        report.config, classes=len(schema), head_channels=shape.head_channels or own.head_channels
    )
    torch.manual_seed(seed)
    network = SegmentationNetwork(config)
    network.encoder.load_state_dict(encoder.state_dict())
    return Start(network, False, report.layout, (*report.notes, *([reason] if report.has_head else [])))


def _from_preset(source: str, schema: LabelSchema, shape: Shape, seed: int) -> Start:
    name = source.removeprefix(PRESET_PREFIX)
    if name not in PRESETS:
        raise CheckpointError(f"there is no preset {name!r}", hint=f"presets: {', '.join(PRESETS)}")
    config = PRESETS[name]
    config = dataclasses.replace(
        config,
        classes=len(schema),
        tile=shape.tile or config.tile,
        patch=shape.patch or config.patch,
        heads=shape.heads or config.heads,
        layer_norm_eps=config.layer_norm_eps if shape.layer_norm_eps is None else shape.layer_norm_eps,
        head_channels=shape.head_channels or config.head_channels,
    )
    torch.manual_seed(seed)
    return Start(SegmentationNetwork(config), False, f"preset {name}, random weights", ())


def _why_not_its_head(report: CheckpointReport, schema: LabelSchema, shape: Shape) -> str | None:
    """Why a checkpoint's head cannot be tuned further; None where it can."""
    if not report.has_head:
        return "an encoder alone"
    if shape.new_head:
        return "the checkpoint's head was replaced, as asked"
    if report.config.classes != len(schema):
        return f"the checkpoint's head was replaced: it has {report.config.classes} classes, the data {len(schema)}"
    own = report.schema and not report.schema.numbered and report.schema.name != OPENMMLAB_SCHEMA
    if report.schema and own and report.schema.class_names != schema.class_names:
        return f"the checkpoint's head was replaced: its classes are {', '.join(report.schema.class_names)}"
    return None
