"""Checkpoint files: read without executing anything in them, and unwrapped to a flat state dict.

``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` files are pickles. They are read with ``weights_only=True`` alone;
``.safetensors`` files cannot hold code at all.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdkd_edge.errors import CheckpointError, MissingExtraError
from cdkd_edge.model.layouts import Dropped

FORMAT = "cdkd-edge checkpoint"
FORMAT_VERSION = 1

_WRAPPERS = ("state_dict", "model", "model_state_dict", "student", "network")
_MAX_WRAPPERS = 8
"""A pickle can hold a dict that contains itself."""
_TEACHER = "teacher beside the student"
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The top-level mapping of a checkpoint file, and our header (empty if it is not ours).

    Raises:
        CheckpointError: missing, empty, damaged, of another kind, or refused because reading it could run code.
        MissingExtraError: a ``.safetensors`` file, and safetensors is not installed.
    """
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
    safetensors = safetensors_torch()
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
    return CheckpointError(
        f"{path} is damaged or not a PyTorch checkpoint" + (f" ({reason})" if reason else ""),
        hint=None if reason else "other pickles are never loaded",
    )


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError("safetensors", "export", "reading and writing .safetensors") from None
    return safetensors.torch


def unwrap(document: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[Dropped, ...]]:
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


def as_float32(key: str, tensor: Tensor) -> Tensor:
    """A copy of a weight in FP32, whatever floating-point type it is stored in.

    Raises:
        CheckpointError: it is no dense floating-point tensor, or not finite everywhere.
    """
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
