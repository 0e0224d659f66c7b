"""Reads what lies beside a file of weights: the ``config.json`` and ``preprocessor_config.json`` of a hub.

Hugging Face's transformers and timm write them; the names are those of their ``configuration_dinov2.py``,
``configuration_dinov3_vit.py``, ``image_processing_*.py`` and of timm's ``_hub.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.config import GELU, NO_NORM, SWIGLU, NetworkConfig
from cdkd_edge.model.layouts import HF_DINOV3, OURS, TIMM, TIMM_DINOV3, Layout

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Beside:
    """What the files beside the weights say, in fields of :class:`NetworkConfig`."""

    stated: Mapping[str, Any] = field(default_factory=dict)  # what no tensor shows
    repeated: Mapping[str, tuple[str, Any]] = field(default_factory=dict)  # what tensors show, and its name in CONFIG
    notes: tuple[str, ...] = ()
    class_names: tuple[Any, ...] | None = None

    def require(self, config: NetworkConfig) -> None:
        """Raise a CheckpointError if the weights are those of another network than ``config.json`` describes."""
        for name, (theirs, value) in self.repeated.items():
            if getattr(config, name) != value:
                raise CheckpointError(
                    f"{CONFIG} contradicts the weights beside it: its {theirs} makes {name} {value}, the weights have "
                    f"{getattr(config, name)}",
                    hint=f"get the {CONFIG} that belongs to the weights",
                )


def weights_file(path: Path) -> Path:
    """The file of weights in a folder of a hub, or the file itself; raises a CheckpointError if there is none."""
    if not path.is_dir():
        return path
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    if (path / f"{_WEIGHTS[0]}.index.json").exists():
        return path / f"{_WEIGHTS[0]}.index.json"  # read_container says what it is
    raise CheckpointError(f"{path} is not a file, and a folder without {' or '.join(_WEIGHTS)}")


def read_beside(weights: Path, layout: Layout) -> Beside:
    """What lies beside ``weights``; nothing is asked of this package's own files.

    Raises:
        CheckpointError: a file cannot be read, is no JSON, or describes a network that this package does not have.
    """
    if layout is OURS:
        return Beside()
    stated: dict[str, Any] = {}
    repeated: dict[str, tuple[str, Any]] = {}
    notes = []
    names = None
    path = weights.with_name(CONFIG)
    if path.exists() and (layout.model_type or layout in (TIMM, TIMM_DINOV3)):
        document = _Document(path)
        if layout.model_type and document.values.get("model_type") == "upernet":
            stated, names = _of_upernet(document)
        read = _of_transformers if layout.model_type else _of_timm
        of_encoder, repeated = read(document, layout)
        stated |= of_encoder
        if stated:
            notes.append(f"{CONFIG} beside the weights gives {', '.join(stated)}")
    path = weights.with_name(PREPROCESSOR)
    if path.exists():
        stated |= _pixels(_Document(path))
        notes.append(f"{PREPROCESSOR} beside the weights gives the input normalisation")
    return Beside(stated, repeated, tuple(notes), names)


class _Document:
    """A JSON object in a file; its values are checked when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_bytes()
            values = json.loads(text) if len(text) <= _MAX_BYTES else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise self.error(f"is damaged: {str(error)[:99]}") from None
        if not isinstance(values, dict):
            raise self.error("is no JSON object")
        self.values: dict[str, Any] = values

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} {what}",
            hint="it describes the weights beside it: get it again, or move it away, and what it says is assumed",
        )

    def get(self, name: str, kind: type | tuple[type, ...], otherwise: Any = None) -> Any:
        """A value of one of these types; ``otherwise`` if it is not there or null."""
        value = self.values.get(name)
        if value is None:
            return otherwise
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"says {name} is {json.dumps(value)[:60]}")
        return value

    def whole(self, name: str) -> int | None:
        """A number above 0; of a pair for height and width, both must be equal."""
        value = self.get(name, (int, list))
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if value is not None and not (type(value) is int and value > 0):
            raise self.error(f"says {name} is {json.dumps(value)[:60]}")
        return value

    def number(self, name: str, otherwise: Any = None) -> Any:
        """A finite number."""
        value = self.get(name, (int, float), otherwise)
        if value is not None and not math.isfinite(value):
            raise self.error(f"says {name} is {value}")
        return value

    def colors(self, name: str) -> tuple[float, ...]:
        """Three finite numbers."""
        value = self.get(name, list)
        if (
            value is None
            or len(value) != 3
            or not all(type(one) in (int, float) and math.isfinite(one) for one in value)
        ):
            raise self.error(f"lacks three numbers as {name}")
        return tuple(value)


def _of_upernet(document: _Document) -> tuple[dict[str, Any], tuple[Any, ...] | None]:
    """What is said of the head, and the class names; leaves the configuration of the encoder in ``document``."""
    stated: dict[str, Any] = {}
    if (scales := document.get("pool_scales", list)) is not None:
        if not all(type(scale) is int for scale in scales):
            raise document.error(f"says pool_scales is {json.dumps(scales)[:60]}")
        stated["pool_scales"] = tuple(scales)
    labels = document.get("id2label", dict, {})
    names = tuple(labels.get(str(index)) for index in range(len(labels)))
    # Without names of its own a model has those that transformers makes up.
    named = all(names) and names != tuple(f"LABEL_{index}" for index in range(len(names)))
    document.values = {**document.get("backbone_config", dict, {}), "architectures": ["Backbone"]}
    return stated, names if named and names else None


def _of_transformers(document: _Document, layout: Layout) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    said = document.get("model_type", str)
    if said != layout.model_type:
        raise document.error(
            f"says model_type is {json.dumps(said)}; the tensors beside it are those of {layout.model_type!r}"
        )
    rotary = layout is HF_DINOV3
    gated = document.get("use_gated_mlp" if rotary else "use_swiglu_ffn", bool, False)
    known = "silu" if rotary and gated else "gelu"
    if (activation := document.get("hidden_act", str, known)) != known:
        kind = "a gated MLP" if gated else "an MLP without gate"
        raise document.error(f"says hidden_act is {activation!r}; {kind} is read with {known!r} alone")
    stated = {
        "heads": document.whole("num_attention_heads"),
        "layer_norm_eps": document.number("layer_norm_eps"),
        "rotary_base": document.number("rope_theta") if rotary else None,
        "tile": document.whole("image_size") if rotary else None,
        **_taps(document),
    }
    width, ratio = document.whole("hidden_size"), document.number("mlp_ratio")
    repeated = {
        "embed_dim": ("hidden_size", width),
        "depth": ("num_hidden_layers", document.whole("num_hidden_layers")),
        "patch": ("patch_size", document.whole("patch_size")),
        "registers": ("num_register_tokens", document.get("num_register_tokens", int)),
        "mlp": ("use_gated_mlp" if rotary else "use_swiglu_ffn", SWIGLU if gated else GELU),
    }
    if rotary:
        repeated["mlp_dim"] = ("intermediate_size", document.whole("intermediate_size"))
    else:
        repeated["tile"] = ("image_size", document.whole("image_size"))
        if width and ratio and not gated:
            repeated["mlp_dim"] = ("mlp_ratio", int(width * ratio))
    return (
        {name: value for name, value in stated.items() if value is not None},
        {name: pair for name, pair in repeated.items() if pair[1] is not None},
    )


def _taps(document: _Document) -> dict[str, Any]:
    """Which blocks are tapped and normed, if the weights are of one of the ``Backbone`` classes."""
    classes = document.get("architectures", list, [])
    if not any(str(name).endswith("Backbone") for name in classes):
        return {}
    normed = document.get("apply_layernorm", bool, True)
    # DINOv3ViTBackbone always norms its last map (modeling_dinov3_vit.py).
    always = document.values["model_type"] == HF_DINOV3.model_type
    stages = document.get("out_features", list, [])
    blocks = [int(match[1]) for stage in stages if (match := re.fullmatch(r"stage(\d{1,3})", str(stage)))]
    if len(blocks) != len(stages) or 0 in blocks:
        raise document.error(f"says out_features is {json.dumps(stages)[:60]}; stage1, stage2, ... are blocks")
    return {
        "final_norm": "taps" if normed else "last" if always else NO_NORM,
        "tapped": tuple(block - 1 for block in sorted(set(blocks))) if len(set(blocks)) > 1 else None,
    }


def _of_timm(document: _Document, layout: Layout) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """``architecture``, ``model_args`` and ``pretrained_cfg``; nothing if the file is not timm's."""
    architecture = document.get("architecture", str)
    if architecture is None:
        return {}, {}
    if layout is TIMM and re.search(r"rope|eva", architecture):
        raise document.error(
            f"says the network is timm's {json.dumps(architecture)[:60]}; DINOv3 is the only one with rotary "
            "positions that is read"
        )
    stated: dict[str, Any] = {}
    pretrained, arguments = (document.get(name, dict, {}) for name in ("pretrained_cfg", "model_args"))
    if type(heads := arguments.get("num_heads")) is int:
        stated["heads"] = heads
    document.values = pretrained
    if "mean" in pretrained or "std" in pretrained:
        stated["pixel_mean"], stated["pixel_std"] = (_scaled(document.colors(name), 255) for name in ("mean", "std"))
    size = pretrained.get("input_size")
    if layout is TIMM_DINOV3 and isinstance(size, list) and len(size) == 3 and type(size[1]) is int and size[1] > 0:
        stated["tile"] = size[1]
    return stated, {}


def _pixels(document: _Document) -> dict[str, Any]:
    """Mean and standard deviation on 0..255."""
    scale = document.number("rescale_factor", 1 / 255) if document.get("do_rescale", bool, True) else 1
    if scale <= 0:
        raise document.error(f"says rescale_factor is {scale}")
    normed = document.get("do_normalize", bool, True)
    mean, std = (document.colors("image_mean"), document.colors("image_std")) if normed else ((0,) * 3, (1,) * 3)
    return {"pixel_mean": _scaled(mean, 1 / scale), "pixel_std": _scaled(std, 1 / scale)}


def _scaled(values: tuple[float, ...], scale: float) -> tuple[float, ...]:
    return tuple(round(value * scale, 6) for value in values)
