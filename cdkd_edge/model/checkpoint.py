"""Loads a checkpoint of any known layout as this package's network, and saves one.

:mod:`cdkd_edge.model.container` reads the file safely, :mod:`cdkd_edge.model.unwrap` picks one set of weights,
:mod:`cdkd_edge.model.layouts` and :mod:`cdkd_edge.model.heads` rename it, :mod:`cdkd_edge.model.infer` finds the
network's configuration, with what :mod:`cdkd_edge.model.within` and :mod:`cdkd_edge.model.beside` read.
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

from cdkd_edge.core.errors import CheckpointError, EncoderOnlyError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import LabelSchema, schema_from_document
from cdkd_edge.model.beside import read_beside, weights_file
from cdkd_edge.model.complete import complete_blocks, complete_head, drop_part, fold_layer_scale
from cdkd_edge.model.config import NO_NORM, NetworkConfig, attention_of, numbers_of, shown
from cdkd_edge.model.container import FORMAT, FORMAT_VERSION, as_float32, read_container, require_in_file, save_tensors
from cdkd_edge.model.heads import Head, recognise, translate_parts
from cdkd_edge.model.infer import block_count, inferred_config, patch_shape, require_agreement
from cdkd_edge.model.layouts import FINAL_NORM, OPENMMLAB, OURS, SAM, TIMM, Dropped, Layout, listed
from cdkd_edge.model.network import Encoder, SegmentationNetwork
from cdkd_edge.model.resample import resample_patches, resample_position
from cdkd_edge.model.sam import SamEncoder
from cdkd_edge.model.unwrap import Weights, find_weights
from cdkd_edge.model.within import read_within, schema_within

_Module = TypeVar("_Module", SegmentationNetwork, Encoder, SamEncoder)
_MAX_HEADER = 4 << 20  # most characters of a part of the header as JSON; a number or bracket counts as 16


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What was found in a file of weights."""

    path: Path
    layout: str
    has_head: bool
    unwrapped: tuple[str, ...]  # wrapper keys and prefixes that were removed, outermost first
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]  # assumptions and changes a user should know about
    averaged: bool = False  # whether the weights are a running mean of the trained ones (EMA, SWA)
    taken: tuple[str, ...] = ()  # which of several sets of weights these are; also in ``notes``


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(FileReport):
    """What was found in a checkpoint of a network."""

    config: NetworkConfig
    schema: LabelSchema | None = None  # the checkpoint's own, or made from the class names in another project's files
    other_head: str = ""  # a head that this network does not have, and a key of it
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_HIDDEN = (
    "heads", "layer_norm_eps", "pool_scales", "attention", "rotary_base", "final_norm", "tapped", "align_corners",
    "pixel_mean", "pixel_std",
)  # fmt: skip
"""Fields of a configuration that no tensor shows; with rotary positions, the tile is one more."""


@dataclass(frozen=True)
class Opened:
    """One set of weights of a file: FP32 copies under this package's names, and where they come from."""

    path: Path
    document: Mapping[str, Any]  # the top level of the file
    header: Mapping[str, Any]  # of this package's own files
    found: Weights
    layout: Layout  # of the encoder
    head: Head | None  # another project's, beside it
    prefix: str  # of the encoder's keys
    state: dict[str, Tensor]
    dropped: tuple[Dropped, ...]

    def facts(self, has_head: bool, notes: list[str]) -> dict[str, Any]:
        """The fields of a :class:`FileReport`."""
        found = self.found
        return {
            "path": self.path, "layout": self.layout.name + (f", {self.head.name}" if has_head and self.head else ""),
            "has_head": has_head, "unwrapped": found.unwrapped,
            "dropped": (*found.dropped, *self.dropped), "notes": (*found.notes, *notes), "averaged": found.averaged,
            "taken": found.notes,
        }  # fmt: skip


def load_checkpoint(path: str | Path, **reading: Any) -> tuple[SegmentationNetwork, CheckpointReport]:
    """Load a segmentation network in evaluation mode, FP32, on the CPU.

    Args:
        path: a file of ``torch.save`` or safetensors in any layout of :mod:`cdkd_edge.model.layouts`, or a hub's folder
            with one (:mod:`cdkd_edge.model.beside`).
        reading: see :func:`read_checkpoint`.

    Raises:
        EncoderOnlyError: there is an encoder but no segmentation head.
        CheckpointError: the file cannot be read safely, or holds no network of a known layout.
    """
    config, state, report = read_checkpoint(Path(path), **reading)
    if not report.has_head:
        lacking = f"{report.other_head} instead of a UPerNet" if report.other_head else "no segmentation head"
        raise EncoderOnlyError(
            f"{path} holds an encoder ({report.layout} layout) but {lacking}, so it cannot label anything",
            hint="train a decoder on labelled tiles first: cdkd-edge finetune ENCODER --data DIR --schema S -o ckpt.pt",
        )
    return filled(SegmentationNetwork, config, state, report), report


def load_encoder(path: str | Path, **reading: Any) -> tuple[Encoder, CheckpointReport]:
    """Load the encoder alone, from a checkpoint with or without a head. See :func:`load_checkpoint`."""
    config, state, report = read_checkpoint(Path(path), **reading)
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    return filled(Encoder, config, state, report), report


def save_checkpoint(
    network: SegmentationNetwork | Encoder,
    path: str | Path,
    *,
    schema: LabelSchema | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network, or an encoder alone, with its configuration, label schema and training notes.

    The suffix chooses the format: ``.safetensors``, anything else a ``torch.save`` file of plain data.
    ``training`` must be JSON data. ``dtype`` float16 halves the file; loading returns to FP32.
    """
    path, alone = Path(path), isinstance(network, Encoder)
    config = dataclasses.asdict(network.config)
    if alone:
        config |= {name: getattr(NetworkConfig, name) for name in ("classes", "head_channels", "pool_scales")}
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": config,
        "schema": schema.to_document() if schema else None,
        "training": dict(training or {}),
    }
    state = {
        f"encoder.{key}" if alone else key: tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_tensors(temporary, state, {"cdkd-edge": json.dumps(header)})
        else:
            save_tensors(temporary, {**header, "state_dict": state})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def read_checkpoint(
    path: Path,
    *,
    tile: int | None = None,
    patch: int | None = None,
    heads: int | None = None,
    layer_norm_eps: float | None = None,
    weights: str | None = None,
    attention: str | None = None,
    taps: str | None = None,
    pool_scales: str | None = None,
) -> tuple[NetworkConfig, dict[str, Tensor], CheckpointReport]:
    """Configuration and weights of a checkpoint, under this package's names.

    Args:
        path: the file.
        tile: side of the input tiles, px; the position embedding is resampled to it. Default: the checkpoint's.
        patch: side of the patches, px; the patch embedding is resampled to it. Default: the checkpoint's.
        heads: attention heads, if the checkpoint does not say. Default: heads of width 64.
        layer_norm_eps: LayerNorm's epsilon, if the checkpoint does not say. Default: that of the layout's project.
        weights: ``raw``, ``ema`` (averaged) or the name of one of several sets in the file. Default: averaged weights
            if there are any.
        attention: that each block gets (:func:`.config.attention_of`), with the same weights; a class token is
            dropped. Default: the checkpoint's.
        taps: blocks that feed the head, counted from 0, with commas. Default: what the file says, or evenly spaced.
        pool_scales: sizes that the head pools to, with commas. Default: what the file says, or 1,2,3,6.
    """
    opened = open_weights(path, weights)
    header, layout, state = opened.header, opened.layout, opened.state
    notes: list[str] = []
    complete_blocks(state, notes)
    fold_layer_scale(state, notes)
    given = {
        "heads": heads,
        "layer_norm_eps": layer_norm_eps,
        "tapped": None if taps is None else numbers_of(taps, "--taps"),
        "pool_scales": None if pool_scales is None else numbers_of(pool_scales, "--pool-scales"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if layout is OURS and header:
        config, found = _stored_config(header, state, path), _Found(opened.dropped)
        require_agreement(path, {**dataclasses.asdict(config), "tapped": config.taps}, given)
    else:
        config, found = _inferred_config(opened, given, notes)
    config = _changed(state, config, layout, tile, patch, attention, notes)
    has_head = any(key.startswith("head.") for key in state)
    schema = None
    if header.get("schema"):
        schema = schema_from_document(header["schema"], source=str(path))
        if has_head and (said := len(schema)) != config.classes:
            raise CheckpointError(f"{path}: its label schema has {said} classes, its classifier {config.classes}")
    elif has_head:
        schema = schema_within(found.class_names, found.palette, config.classes, notes)
    training = header.get("training") or {}
    opened = dataclasses.replace(opened, dropped=found.dropped)
    facts = opened.facts(has_head, notes)
    report = CheckpointReport(**facts, config=config, schema=schema, training=training, other_head=found.other_head)
    return config, state, report


@dataclass(frozen=True)
class _Found:
    """What a file holds beside the network that is made of it."""

    dropped: tuple[Dropped, ...]
    other_head: str = ""
    class_names: object = None
    palette: object = None


def _inferred_config(opened: Opened, given: Mapping[str, Any], notes: list[str]) -> tuple[NetworkConfig, _Found]:
    """The configuration of another project's network, from its weights, its file, what lies beside it and ``given``.

    Brings ``opened.state`` into the form of this network.
    """
    layout, head, state, dropped = opened.layout, opened.head, opened.state, opened.dropped
    normed = "encoder.norm.weight" in state
    within = read_within(opened.document, layout, head, opened.prefix, block_count(state), normed)
    beside = read_beside(opened.path, layout)
    notes += [*within.notes, *beside.notes]
    own = {**within.stated, **beside.stated}
    require_agreement(opened.path, own, {name: given[name] for name in given.keys() & {"heads", "layer_norm_eps"}})
    for name in given.keys() & own.keys() & {"tapped", "pool_scales"}:
        if given[name] != own[name]:
            notes.append(f"{name} {shown(given[name])} taken, as asked; the file says {shown(own[name])}")
    stated = {**own, **given}
    if within.other_head and (names := drop_part(state, "head.")):
        dropped += (Dropped(f"head behind {within.other_head}", len(names), names[0]),)
    if stated.get("final_norm", NO_NORM) == NO_NORM and (names := drop_part(state, "encoder.norm.")):
        dropped += (Dropped(FINAL_NORM, len(names), names[0]),)
    if layout is OPENMMLAB and "encoder.patch_embed.proj.bias" not in state:  # patch_bias=False
        state["encoder.patch_embed.proj.bias"] = torch.zeros(patch_shape(state)[0])
    complete_head(state, stated, stated.get("layer_norm_eps", layout.layer_norm_eps), notes)
    if layout is TIMM and any(key.endswith(".gamma_1") for key in opened.found.tensors):
        notes.append("learned positions alone assumed, as in DeiT III; timm's vit_*_rope_ape have the same names")
    try:
        config = inferred_config(state, layout, stated, notes)
    except CheckpointError as error:
        told = "; ".join((error.message, *within.notes, *beside.notes))
        raise CheckpointError(told, hint=error.hint) from None
    beside.require(config)
    other = within.other_head or (head.name if head and not head.usable else "")
    class_names = beside.class_names or within.class_names
    return config, _Found(dropped, other, class_names, within.palette)


def layout_of(path: Path, weights: str | None = None) -> Layout:
    """The layout of a file's weights; raises as :func:`read_checkpoint`."""
    path = weights_file(path)
    return recognise(list(find_weights(read_container(path)[0], path, weights).tensors))[0]


def open_weights(path: Path, weights: str | None = None, *, sam: bool = False) -> Opened:
    """One set of weights of a file, of SAM's image encoder if ``sam``; raises as :func:`read_checkpoint`."""
    path = weights_file(path)
    document, header = read_container(path)
    for part, kind in {"version": int, "config": dict, "schema": dict, "training": dict}.items():
        if not _is_plain(header.get(part), kind):
            raise CheckpointError(f"{path} has a damaged header: its {part} is not plain data")
    found = find_weights(document, path, weights)
    layout, head, prefix = (OURS, None, "") if header else recognise(list(found.tensors))
    if (layout is SAM) != sam:
        raise CheckpointError(
            f"{path} holds {'no' if sam else 'the'} image encoder of SAM",
            hint=None if sam else "it can be the teacher of a student: cdkd-edge distill --teacher",
        )
    state, dropped = translate_parts(found.tensors, layout, head, prefix)
    require_in_file(state.values(), path)
    state = {key: as_float32(key, tensor) for key, tensor in state.items()}
    return Opened(path, document, header, found, layout, head, prefix, state, dropped)


def _stored_config(header: Mapping[str, Any], state: dict[str, Tensor], path: Path) -> NetworkConfig:
    """The configuration in the header of this package's checkpoints, which has to be what the weights say."""
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a version {header.get('version')} checkpoint; this release reads {FORMAT_VERSION}"
        )
    stored = {**dataclasses.asdict(NetworkConfig()), **(header.get("config") or {})}
    try:
        hidden: dict[str, Any] = {name: stored[name] for name in _HIDDEN}
        for name in ("pool_scales", "attention", "tapped", "pixel_mean", "pixel_std"):
            hidden[name] = tuple(hidden[name])
        whole = (hidden["heads"], *hidden["pool_scales"], *hidden["tapped"])
        if any(type(number) is not int for number in whole):
            raise TypeError("heads, pool_scales and tapped are whole numbers")
        attention = hidden["attention"]
        if attention and attention_of(",".join(attention), len(attention), ()) != attention:
            raise ValueError("attention is not in its usual form")
        if stored["rotary_base"]:
            hidden["tile"] = stored["tile"]
        config = inferred_config(state, OURS, hidden, [])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged configuration: {str(error)[:200]}") from None
    weights_say = dataclasses.asdict(config)
    for name, value in stored.items():
        said, is_ = json.dumps(value), json.dumps(weights_say.get(name))  # 128.0 is not 128
        if said != is_:
            raise CheckpointError(f"{path} has a damaged configuration: {name} is {said[:99]}, its weights say {is_}")
    return config


def _changed(
    state: dict[str, Tensor],
    config: NetworkConfig,
    layout: Layout,
    tile: int | None,
    patch: int | None,
    attention: str | None,
    notes: list[str],
) -> NetworkConfig:
    """The configuration for another tile, patch and attention; changes what depends on them in ``state``."""
    patch = config.patch if patch is None else patch
    kinds = config.attention if attention is None else attention_of(attention, config.depth, config.taps)
    if attention is not None and config.extra_tokens:
        for key in ("encoder.cls_token", "encoder.registers"):
            state.pop(key, None)
        if config.class_token and "encoder.pos_embed" in state:
            state["encoder.pos_embed"] = state["encoder.pos_embed"][:, 1:]
        what = " and ".join(["class token"] * config.class_token + ["registers"] * (config.registers > 0))
        notes.append(f"{what} dropped: windows and pooled keys are of patches alone, and no head sees other tokens")
        config = dataclasses.replace(config, class_token=False, registers=0)
    tile = config.grid * patch if tile is None else tile
    resized = dataclasses.replace(config, tile=tile, patch=patch, attention=kinds)
    if patch != config.patch:
        key = "encoder.patch_embed.proj.weight"
        state[key] = resample_patches(state[key], patch)
        notes.append(f"patch embedding resampled from {config.patch} to {patch} px patches")
    if resized.grid != config.grid and not config.rotary_base:
        key = "encoder.pos_embed"
        state[key] = resample_position(
            state[key], resized.grid, config.class_token, antialias=layout.antialias, offset=layout.offset
        )
        change = f"from {config.tile} to {resized.tile} px tiles"
        if patch != config.patch:
            change = f"from {config.grid} x {config.grid} to {resized.grid} x {resized.grid} patches"
        notes.append(f"position embedding resampled (bicubic) {change}")
    return resized


def _is_plain(value: object, kind: type) -> bool:
    """Whether it is JSON data of bounded size: lists that contain one another would be endless as text."""
    size = 0
    try:
        for part in json.JSONEncoder().iterencode(value):
            size += max(16, len(part))  # brackets alone take time, too
            if size > _MAX_HEADER:
                return False
    except (TypeError, ValueError, RecursionError):
        return False
    return value is None or isinstance(value, kind)


def filled(kind: type[_Module], config: Any, state: Mapping[str, Tensor], report: FileReport) -> _Module:
    """A network with these weights in evaluation mode; see :func:`require_fit`."""
    require_fit(kind, config, state, report.path, report.layout)
    module = kind(config)
    module.load_state_dict(dict(state), strict=False)
    return module.eval()


def require_fit(kind: type[_Module], config: Any, state: Mapping[str, Tensor], path: Path, layout: str) -> None:
    """Refuse weights that are not a network's: a CheckpointError names missing, unexpected and misshapen tensors."""
    with torch.device("meta"):  # allocates nothing
        plan = kind(config).state_dict()
    expected = {key: tensor for key, tensor in plan.items() if not key.endswith("num_batches_tracked")}
    misshapen = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    wrong = {"missing: ": expected.keys() - state.keys(), "unexpected: ": state.keys() - expected.keys(), "": misshapen}
    problems = "; ".join(what + listed(sorted(names)) for what, names in wrong.items() if names)
    if problems:
        raise CheckpointError(f"{path} ({layout} layout) does not fit the network: {problems}")
