"""Checkpoints: read safely, recognised by their keys, turned into the network of this package.

Files are told apart by their content (:mod:`cdkd_edge.model.container`); of several sets of weights one is chosen
(:mod:`cdkd_edge.model.unwrap`) and renamed (:mod:`cdkd_edge.model.layouts`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError, EncoderOnlyError, SchemaError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import LabelSchema, schema_from_document, schema_of_lists
from cdkd_edge.model.config import NetworkConfig
from cdkd_edge.model.container import FORMAT, FORMAT_VERSION, as_float32, read_container, require_in_file, save_tensors
from cdkd_edge.model.infer import (
    add_missing_qkv_bias,
    fold_layer_scale,
    inferred_config,
    resample_patches,
    resample_position,
    stored_config,
)
from cdkd_edge.model.layouts import OURS, Dropped, listed, recognise, translate
from cdkd_edge.model.network import Encoder, SegmentationNetwork
from cdkd_edge.model.unwrap import find_weights

_Module = TypeVar("_Module", SegmentationNetwork, Encoder)
OPENMMLAB_SCHEMA = "OpenMMLab meta"
"""Name of a schema of OpenMMLab's class names; one that a user names goes before it."""
_MAX_HEADER = 4 << 20
"""Characters of configuration, schema and training notes as JSON."""


@dataclass(frozen=True)
class CheckpointReport:
    """What was found in a checkpoint, in the words of :mod:`cdkd_edge.model.layouts`."""

    path: Path
    layout: str
    config: NetworkConfig
    has_head: bool
    unwrapped: tuple[str, ...]
    """Wrapper keys and prefixes that were taken off, outermost first."""
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    """Assumptions and rewrites a user should know about."""
    schema: LabelSchema | None = None
    """The checkpoint's own, or made of the class names that OpenMMLab leaves in its files."""
    averaged: bool = False
    """Whether the weights are a running mean of those that were trained (EMA, SWA)."""
    taken: tuple[str, ...] = ()
    """Which of several sets of weights these are; also among the notes."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    path: str | Path,
    *,
    tile: int | None = None,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
) -> tuple[SegmentationNetwork, CheckpointReport]:
    """Load a segmentation network in evaluation mode, FP32, on the CPU.

    Args:
        path: a file of ``torch.save`` or safetensors in any layout of :mod:`cdkd_edge.model.layouts`.
        tile: side of the input tiles, px; the position embedding is resampled to it. Default: the
            tile the checkpoint was trained with.
        patch: side of the patches, px; the patch embedding is resampled to it. Default: the checkpoint's.
        heads: attention heads, where the checkpoint does not say. Default: 64-wide heads.
        layer_norm_eps: LayerNorm's epsilon, where the checkpoint does not say. Default: what the
            project behind the layout uses.
        weights: ``raw``, ``ema`` (averaged) or the name of one of several sets in the file. Default: averaged
            weights where there are.

    Raises:
        EncoderOnlyError: there is an encoder but no segmentation head.
        CheckpointError: the file cannot be read safely, or does not hold a network we know.
    """
    config, state, report = _read(Path(path), tile, patch, heads, layer_norm_eps, weights)
    if not report.has_head:
        raise EncoderOnlyError(
            f"{path} holds an encoder ({report.layout} layout) but no segmentation head, so it cannot label anything",
            hint="tune a decoder on labelled tiles first: cdkd-edge finetune ENCODER --data DIR --schema S -o ckpt.pt",
        )
    return _filled(SegmentationNetwork, config, state, report), report


def load_encoder(
    path: str | Path,
    *,
    tile: int | None = None,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
) -> tuple[Encoder, CheckpointReport]:
    """Load the encoder alone, from a checkpoint with or without a head. See :func:`load_checkpoint`."""
    config, state, report = _read(Path(path), tile, patch, heads, layer_norm_eps, weights)
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return _filled(Encoder, config, state, report), report


def save_checkpoint(
    network: SegmentationNetwork,
    path: str | Path,
    *,
    schema: LabelSchema | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network with its configuration, label schema and training notes.

    The suffix chooses the format: ``.safetensors``, anything else a ``torch.save`` file of plain data.
    ``training`` must be JSON data. ``dtype`` float16 halves the file; loading returns to FP32.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": dataclasses.asdict(network.config),
        "schema": schema.to_document() if schema else None,
        "training": dict(training or {}),
    }
    state = {
        key: tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_tensors(temporary, state, {"cdkd-edge": json.dumps(header)})
        else:
            save_tensors(temporary, {**header, "state_dict": state})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def _read(
    path: Path,
    tile: int | None,
    patch: int | None,
    heads: int | None,
    layer_norm_eps: float | None,
    weights: str | None,
) -> tuple[NetworkConfig, dict[str, Tensor], CheckpointReport]:
    document, header = read_container(path)
    for part in ("version", "config", "schema", "training"):
        if part in header and not _is_plain(header[part], dict if part != "version" else int):
            raise CheckpointError(f"{path} has a damaged header: its {part} is not plain data")
    found = find_weights(document, path, weights)
    layout = recognise(list(found.tensors))
    state, dropped = translate(found.tensors, layout)
    require_in_file(state.values(), path)
    state = {key: as_float32(key, tensor) for key, tensor in state.items()}
    notes = list(found.notes)
    fold_layer_scale(state, notes)
    add_missing_qkv_bias(state, notes)
    config = stored_config(header, state, path) if layout is OURS and header else None
    if config is None:
        config = inferred_config(state, layout, heads, layer_norm_eps, notes)
    elif (heads and heads != config.heads) or (layer_norm_eps and layer_norm_eps != config.layer_norm_eps):
        raise CheckpointError(f"{path} states {config.heads} heads and LayerNorm eps {config.layer_norm_eps:g} itself")
    config = _resampled(state, config, tile, patch, notes)
    training = header.get("training") or {}
    schema = None
    if header.get("schema"):
        schema = schema_from_document(header["schema"], source=str(path))
    elif "head.classifier.weight" in state:
        schema = _schema_of_openmmlab(document.get("meta"), config.classes, notes)
    report = CheckpointReport(
        path=path,
        layout=layout.name,
        config=config,
        has_head=any(key.startswith("head.") for key in state),
        unwrapped=found.unwrapped,
        dropped=(*found.dropped, *dropped),
        notes=tuple(notes),
        schema=schema,
        averaged=found.averaged,
        taken=found.notes,
        training=training,
    )
    if schema and report.has_head and len(schema) != config.classes:
        raise CheckpointError(f"{path}: its label schema has {len(schema)} classes, its classifier {config.classes}")
    return config, state, report


def _schema_of_openmmlab(meta: object, classes: int, notes: list[str]) -> LabelSchema | None:
    """The class names and colours that mmcv and mmengine leave in ``meta``, if there are some of use."""
    told: dict[str, object] = {}
    for table in (meta, meta.get("dataset_meta") if isinstance(meta, Mapping) else None):
        if isinstance(table, Mapping):
            told |= {key.lower(): part for key, part in table.items() if isinstance(key, str) and part is not None}
    if "classes" not in told:
        return None
    palettes = [told["palette"], None] if "palette" in told else [None]
    for palette in palettes:
        try:
            schema = schema_of_lists(OPENMMLAB_SCHEMA, told["classes"], palette, classes)
        except SchemaError as error:
            notes.append(f"{'colours' if palette is not None else 'class names'} of the file's meta not used: {error}")
        else:
            what = "class names" if palette is None else "class names and colours"
            notes.append(f"{what} are those of the file's meta, unless --schema names others")
            return schema
    return None


def _resampled(
    state: dict[str, Tensor], config: NetworkConfig, tile: int | None, patch: int | None, notes: list[str]
) -> NetworkConfig:
    """The configuration for another tile and patch; what depends on them is resampled in ``state``."""
    patch = config.patch if patch is None else patch
    resized = dataclasses.replace(config, tile=config.grid * patch if tile is None else tile, patch=patch)
    if patch != config.patch:
        key = "encoder.patch_embed.proj.weight"
        state[key] = resample_patches(state[key], patch)
        notes.append(f"patch embedding resampled from {config.patch} to {patch} px patches")
    if resized.grid != config.grid:
        key = "encoder.pos_embed"
        state[key] = resample_position(state[key], resized.grid, config.class_token)
        notes.append(
            f"position embedding resampled (bicubic) from {config.tile} to {resized.tile} px tiles"
            if patch == config.patch
            else f"position embedding resampled (bicubic) from {config.grid} x {config.grid} to "
            f"{resized.grid} x {resized.grid} patches"
        )
    return resized


def _is_plain(value: object, kind: type) -> bool:
    """Whether a manifest can hold it. Lists that hold one another by reference may be endless as text."""
    size = 0
    try:
        for part in json.JSONEncoder().iterencode(value):
            size += len(part)
            if size > _MAX_HEADER:
                return False
    except (TypeError, ValueError, RecursionError):
        return False
    return value is None or isinstance(value, kind)


def _filled(
    kind: type[_Module], config: NetworkConfig, state: Mapping[str, Tensor], report: CheckpointReport
) -> _Module:
    """A network with these weights in evaluation mode; every missing, unexpected or misshapen tensor is named."""
    blocks = sum(".norm1.weight" in key for key in state)
    if blocks < config.depth:
        raise CheckpointError(f"{report.path} has norm1.weight for {blocks} of its {config.depth} transformer blocks")
    with torch.device("meta"):  # before anything of that size is allocated
        plan = kind(config).state_dict()
    expected = {key: tensor for key, tensor in plan.items() if not key.endswith("num_batches_tracked")}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing: {listed(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected: {listed(unexpected)}")
    if misshapen := [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]:
        problems.append(listed(misshapen))
    if problems:
        raise CheckpointError(f"{report.path} ({report.layout} layout) does not fit the network: {'; '.join(problems)}")
    module = kind(config)
    module.load_state_dict(dict(state), strict=False)
    return module.eval()
