"""Checkpoints: read safely, recognised by their keys, turned into the network of this package.

``.pt``, ``.pth`` and ``.bin`` files are pickles. They are read with ``weights_only=True`` alone, so
nothing in them is ever executed; ``.safetensors`` files cannot hold code at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.errors import CheckpointError, EncoderOnlyError, MissingExtraError
from cdkd_edge.files import whole_file
from cdkd_edge.labels import LabelSchema, schema_from_document
from cdkd_edge.model.config import HEAD_DIM, NetworkConfig
from cdkd_edge.model.layouts import OURS, Dropped, Layout, recognise, translate
from cdkd_edge.model.network import Encoder, SegmentationNetwork

FORMAT = "cdkd-edge checkpoint"
FORMAT_VERSION = 1

_WRAPPERS = ("state_dict", "model", "model_state_dict", "student", "network")
_MAX_WRAPPERS = 8
"""A pickle can hold a dict that contains itself."""
_TEACHER = "teacher beside the student"
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")


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
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    path: str | Path, *, tile: int | None = None, heads: int | None = None, layer_norm_eps: float | None = None
) -> tuple[SegmentationNetwork, CheckpointReport]:
    """Load a segmentation network in evaluation mode, FP32, on the CPU.

    Args:
        path: ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` in any layout of
            :mod:`cdkd_edge.model.layouts`.
        tile: side of the input tiles, px; the position embedding is resampled to it. Default: the
            tile the checkpoint was trained with.
        heads: attention heads, where the checkpoint does not say. Default: 64-wide heads.
        layer_norm_eps: LayerNorm's epsilon, where the checkpoint does not say. Default: what the
            project behind the layout uses.

    Raises:
        EncoderOnlyError: there is an encoder but no segmentation head.
        CheckpointError: the file cannot be read safely, or does not hold a network we know.
    """
    config, state, report = _read(Path(path), tile, heads, layer_norm_eps)
    if not report.has_head:
        raise EncoderOnlyError(
            f"{path} holds an encoder ({report.layout} layout) but no segmentation head, so it cannot label anything",
            hint="tune a decoder on labelled tiles first, then use the checkpoint that comes out of that; "
            "`cdkd-edge info` shows what the encoder is",
        )
    network = SegmentationNetwork(config)
    _fill(network, state, report)
    return network.eval(), report


def load_encoder(
    path: str | Path, *, tile: int | None = None, heads: int | None = None, layer_norm_eps: float | None = None
) -> tuple[Encoder, CheckpointReport]:
    """Load the encoder alone, from a checkpoint with or without a head. See :func:`load_checkpoint`."""
    config, state, report = _read(Path(path), tile, heads, layer_norm_eps)
    encoder = Encoder(config)
    _fill(encoder, {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}, report)
    return encoder.eval(), report


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
            _safetensors().save_file(state, temporary, metadata={"cdkd-edge": json.dumps(header)})
        else:
            torch.save({**header, "state_dict": state}, temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def _read(
    path: Path, tile: int | None, heads: int | None, layer_norm_eps: float | None
) -> tuple[NetworkConfig, dict[str, Tensor], CheckpointReport]:
    document, header = _read_file(path)
    tensors, unwrapped, left_behind = _unwrap(document, path)
    layout = recognise(list(tensors))
    state, dropped = translate(tensors, layout)
    state = {key: _as_float32(key, tensor) for key, tensor in state.items()}
    notes: list[str] = []
    _fold_layer_scale(state, notes)
    _add_missing_qkv_bias(state, notes)
    config = _stored_config(header, state, path) if layout is OURS and header else None
    if config is None:
        config = _inferred_config(state, layout, heads, layer_norm_eps, notes)
    elif (heads and heads != config.heads) or (layer_norm_eps and layer_norm_eps != config.layer_norm_eps):
        raise CheckpointError(f"{path} states {config.heads} heads and LayerNorm eps {config.layer_norm_eps:g} itself")
    if tile is not None and tile != config.tile:
        notes.append(f"position embedding resampled (bicubic) from {config.tile} to {tile} px tiles")
        resized = dataclasses.replace(config, tile=tile)
        state["encoder.pos_embed"] = resample_position(state["encoder.pos_embed"], resized.grid, config.class_token)
        config = resized
    training = header.get("training") or {}
    if not all(_is_plain_table(part) for part in (header.get("schema") or {}, training)):
        raise CheckpointError(
            f"{path} has a damaged header: its schema or training notes are not a table of plain data"
        )
    schema = None
    if header.get("schema"):
        schema = schema_from_document(header["schema"], source=str(path))
    report = CheckpointReport(
        path=path,
        layout=layout.name,
        config=config,
        has_head=any(key.startswith("head.") for key in state),
        unwrapped=unwrapped,
        dropped=(*left_behind, *dropped),
        notes=tuple(notes),
        schema=schema,
        training=training,
    )
    if schema and report.has_head and len(schema) != config.classes:
        raise CheckpointError(f"{path}: its label schema has {len(schema)} classes, its classifier {config.classes}")
    return config, state, report


def _is_plain_table(value: object) -> bool:
    """Whether a manifest can hold it."""
    try:
        return isinstance(json.loads(json.dumps(value)), dict)
    except (TypeError, ValueError, RecursionError):
        return False


# --- files ----------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The top-level mapping of a checkpoint file, and our header (empty if it is not ours)."""
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not path.is_file() or path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is {'empty' if path.is_file() else 'not a file'}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise CheckpointError(f"{path} is not a checkpoint (.pt, .pth, .bin, .ckpt or .safetensors)")
    try:
        with warnings.catch_warnings():
            # What torch warns of here (TorchScript, pickle protocols) is answered below, in one sentence.
            warnings.simplefilter("ignore")
            # Mapping the file keeps a large teacher beside the student out of memory.
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen unrelated types for damaged files
        raise _unreadable(path, error) from None
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not a state dict")
    document = {str(key): value for key, value in document.items()}
    header = document if document.get("format") == FORMAT else {}
    return document, header


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    safetensors = _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        document = safetensors.load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata.get("cdkd-edge", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    return dict(document), header if isinstance(header, dict) else {}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())
    if "TorchScript" in text:
        return CheckpointError(f"{path} is a TorchScript archive, not a state dict", hint="save model.state_dict()")
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return CheckpointError(
            f"{path} is refused: it asks to load {name[1]}, and reading that could execute anything its author wrote",
            hint="where you trust it, save the tensors alone: torch.save(checkpoint['state_dict'], 'weights.pt')",
        )
    reason = re.split(r"\. |: 0x|This is an internal", text)[0][:120] if isinstance(error, RuntimeError) else ""
    return CheckpointError(f"{path} is damaged or not a PyTorch checkpoint" + (f" ({reason})" if reason else ""))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError("safetensors", "export", "reading and writing .safetensors") from None
    return safetensors.torch


# --- wrappers -------------------------------------------------------------------------------------


def _unwrap(document: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[Dropped, ...]]:
    """Descend to the student's state dict and take off prefixes that every key shares.

    Returns:
        The tensors, what was unwrapped (outermost first), and what was left behind on the way.
    """
    unwrapped: list[str] = []
    dropped: list[Dropped] = []
    while inner := next((key for key in _WRAPPERS if isinstance(document.get(key), Mapping)), None):
        if len(unwrapped) == _MAX_WRAPPERS:
            raise CheckpointError(f"{path} holds no state dict within {_MAX_WRAPPERS} wrappers")
        if isinstance(teacher := document.get("teacher"), Mapping) and teacher:
            dropped.append(Dropped(_TEACHER, len(teacher), f"teacher.{next(iter(teacher))}"))
        unwrapped.append(inner)
        document = {str(key): value for key, value in document[inner].items()}
    tensors = {key: value for key, value in document.items() if isinstance(value, Tensor)}
    if not tensors:
        shown = ", ".join(list(document)[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no state dict; its top level is: {shown}")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        unwrapped.append(prefix)
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if any(key.startswith("student.") for key in tensors):
        unwrapped.append("student.")
        if teacher_keys := [key for key in tensors if key.startswith("teacher.")]:
            dropped.append(Dropped(_TEACHER, len(teacher_keys), teacher_keys[0]))
        others = [key for key in tensors if not key.startswith(("student.", "teacher."))]
        if others:
            raise CheckpointError(f"{path} holds {len(others)} tensors beside student and teacher: {', '.join(others)}")
        tensors = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors, tuple(unwrapped), tuple(dropped)


def _as_float32(key: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or not tensor.is_floating_point():
        raise CheckpointError(
            f"{key} is stored as {tensor.dtype} ({tensor.layout}); weights must be dense floating point"
        )
    tensor = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{key} holds values that are not finite; the training run diverged or the file is damaged"
        )
    return tensor


# --- weights --------------------------------------------------------------------------------------


def _fold_layer_scale(state: dict[str, Tensor], notes: list[str]) -> None:
    """gamma * (W x + b) = (gamma W) x + (gamma b): LayerScale costs nothing at inference."""
    scales = [key for key in state if re.search(r"\.scale[12]$", key)]
    for key in scales:
        target = key.replace(".scale1", ".attn.proj").replace(".scale2", ".mlp.fc2")
        gamma = state.pop(key)
        for part in ("weight", "bias"):
            if f"{target}.{part}" not in state:
                raise CheckpointError(f"LayerScale without the layer it scales: {target}.{part} is missing")
            scaled = state[f"{target}.{part}"]
            if gamma.shape != scaled.shape[:1]:
                raise CheckpointError(f"LayerScale of {tuple(gamma.shape)} does not fit {target}.{part}")
            scaled *= gamma.reshape(-1, *[1] * (scaled.ndim - 1))
    if scales:
        notes.append(f"LayerScale folded into {len(scales)} linear layers")


def _add_missing_qkv_bias(state: dict[str, Tensor], notes: list[str]) -> None:
    weights = [key for key in state if key.endswith(".attn.qkv.weight")]
    if weights and not any(key.endswith(".attn.qkv.bias") for key in state):
        for key in weights:
            state[key.replace(".weight", ".bias")] = torch.zeros(state[key].shape[:1])
        notes.append("attention without qkv bias: zeros supplied")


def resample_position(position: Tensor, grid: int, class_token: bool) -> Tensor:
    """Resample a learned position embedding to another token grid (bicubic, the class token kept).

    Args:
        position: ``[1, (1 +) g*g, D]``.
        grid: the new side; the result is ``[1, (1 +) grid*grid, D]``.
    """
    prefix, cells = position[:, : int(class_token)], position[:, int(class_token) :]
    side = math.isqrt(cells.shape[1])
    maps = cells.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


# --- configuration --------------------------------------------------------------------------------


def _stored_config(header: Mapping[str, Any], state: dict[str, Tensor], path: Path) -> NetworkConfig:
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a version {header.get('version')} checkpoint; this release reads {FORMAT_VERSION}"
        )
    try:
        values = dict(header["config"])
        stored = NetworkConfig(**{**values, "pool_scales": tuple(values["pool_scales"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged configuration: {error}") from None
    if any(type(number) is not int for number in (stored.heads, *stored.pool_scales)):
        raise CheckpointError(f"{path} has a damaged configuration: heads and pool_scales are whole numbers")
    # Before anything of that size is allocated.
    sizes = ("tile", "patch", "embed_dim", "depth", "mlp_dim", "classes", "head_channels", "class_token")
    found = _inferred_config(state, OURS, stored.heads, stored.layer_norm_eps, [], stored.pool_scales)
    for size in sizes:
        said, is_ = getattr(stored, size), getattr(found, size)
        if said != is_ or type(said) is not type(is_):
            raise CheckpointError(f"{path} has a damaged configuration: {size} is {said!r}, its weights say {is_!r}")
    return stored


def _inferred_config(
    state: dict[str, Tensor],
    layout: Layout,
    heads: int | None,
    layer_norm_eps: float | None,
    notes: list[str],
    pool_scales: tuple[int, ...] = NetworkConfig.pool_scales,
) -> NetworkConfig:
    patches = _need(state, "encoder.patch_embed.proj.weight", 4)
    position = _need(state, "encoder.pos_embed", 3)
    hidden = _need(state, "encoder.blocks.0.mlp.fc1.weight", 2)
    dim, channels, patch, patch_width = patches.shape
    if channels != 3 or patch != patch_width:
        raise CheckpointError(f"the patch embedding is {tuple(patches.shape)}; RGB and square patches are needed")
    class_token = "encoder.cls_token" in state
    tokens = position.shape[1]
    if tokens <= class_token or (position.shape[0], position.shape[2]) != (1, dim):
        raise CheckpointError(f"a position embedding of shape {tuple(position.shape)} does not fit a width of {dim}")
    grid = math.isqrt(tokens - class_token)
    if class_token and grid**2 + 1 != tokens and math.isqrt(tokens) ** 2 == tokens:
        # timm's "no_embed_class": positions for the patches alone.
        grid = math.isqrt(tokens)
        state["encoder.pos_embed"] = torch.cat([torch.zeros(1, 1, dim), position], dim=1)
        tokens += 1
    if grid**2 + class_token != tokens:
        raise CheckpointError(f"a position embedding of {tokens} tokens is not a square grid")
    if heads is None:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"the number of attention heads is not stored, and {HEAD_DIM}-wide heads do not divide {dim}",
                hint="state it with --heads",
            )
        heads = dim // HEAD_DIM
        notes.append(f"{heads} attention heads assumed ({HEAD_DIM} wide; not stored in the checkpoint)")
    if layer_norm_eps is None:
        layer_norm_eps = layout.layer_norm_eps
        notes.append(f"LayerNorm eps {layer_norm_eps:g} assumed (as in {layout.name}; not stored in the checkpoint)")
    blocks = {int(match[1]) for key in state if (match := re.match(r"encoder\.blocks\.(\d{1,4})\.", key))}
    if gaps := sorted(set(range(max(blocks) + 1)) - blocks)[:8]:
        raise CheckpointError(f"the checkpoint lacks transformer blocks {gaps} of {max(blocks) + 1}")
    shapes: dict[str, Any] = {}
    if any(key.startswith("head.") for key in state):
        classifier = _need(state, "head.classifier.weight", 4)
        shapes = {"classes": classifier.shape[0], "head_channels": classifier.shape[1]}
        if layout is not OURS:
            notes.append(f"pyramid pooling to {', '.join(map(str, pool_scales))} cells assumed (not stored)")
    return NetworkConfig(
        tile=grid * patch,
        patch=patch,
        embed_dim=dim,
        depth=len(blocks),
        heads=heads,
        mlp_dim=hidden.shape[0],
        pool_scales=pool_scales,
        layer_norm_eps=layer_norm_eps,
        class_token=class_token,
        **shapes,
    )


def _need(state: Mapping[str, Tensor], key: str, rank: int) -> Tensor:
    if key not in state:
        raise CheckpointError(f"the checkpoint lacks {key}, so the network's shape cannot be known")
    if state[key].ndim != rank:
        raise CheckpointError(f"{key} has shape {tuple(state[key].shape)}; {rank} dimensions are expected")
    return state[key]


def _fill(module: SegmentationNetwork | Encoder, state: Mapping[str, Tensor], report: CheckpointReport) -> None:
    """Load the weights; every missing, unexpected or misshapen tensor is named."""
    expected = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    for key in sorted(expected.keys() & state.keys()):
        if state[key].shape != expected[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}")
    if problems:
        raise CheckpointError(f"{report.path} ({report.layout} layout) does not fit the network: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)
