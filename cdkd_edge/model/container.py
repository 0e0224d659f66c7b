"""Reads checkpoint files safely: by content, within bounds, without executing anything in them.

``torch.save`` writes a pickle in a zip archive (before torch 1.6, plain pickles). Pickles are read only with
``weights_only=True``, after a check of what they would build. ``.safetensors`` files cannot hold code.
"""

from __future__ import annotations

import errno
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cdkd_edge.core.errors import CheckpointError, MissingExtraError
from cdkd_edge.core.manifest import is_artefact_name

FORMAT = "cdkd-edge checkpoint"
FORMAT_VERSION = 1

_MAX_ENTRIES = 100_000  # most files in a torch.save archive, which has one per tensor
_MAX_DIRECTORY = 32 << 20  # most bytes of the pickle in an archive: names, shapes and text
_MAX_NAMES = 8 << 20  # most bytes of a safetensors header, which has some 100 per tensor
_MAX_STEPS = 1_000_000  # most steps of a pickle; a tensor takes 30. torch needs about 2 us and 100 bytes per step.
_MAX_KEY = 20_000  # most parts of nested tuples: Python hashes them by recursion and crashes at about 100,000
_UNREAD = (
    "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "builtins.getattr", "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "mmengine.logging.history_buffer.HistoryBuffer",
    "terratorch.models.model.AuxiliaryHead",
    *(f"terratorch.datasets.utils.{name}Bands" for name in ("HLS", "Optical", "SAR")),
)  # fmt: skip
"""Classes of what training scripts save beside the weights (arguments, scores, logs); replaced unread by nothing."""
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}
_ALLOCATORS = r"(builtins|__builtin__) bytearray|torch(\.\w+)* \w*(Tensor|Storage)"
"""Functions that torch lets pickles call and that can allocate any amount from a number or a list."""
_SAVE_WEIGHTS = "save the weights alone: torch.save(checkpoint['state_dict'], 'weights.pt')"
_SPARE = 64 << 20  # bytes that tensors may take beyond the size of their file, because some share their storage


class _Nothing:
    """Replaces an object of a class that is never imported; ignores its content."""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


_STAND_INS: list[Any] = [
    type(name.rpartition(".")[2], (_Nothing,), {"__module__": name.rpartition(".")[0]}) for name in _UNREAD
]


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The top-level mapping of a checkpoint file, and the header if this package wrote it (else empty).

    Raises:
        CheckpointError: the file is missing, empty, damaged, of another kind, would take far more memory than its
            size, or could run code.
        MissingExtraError: it is a safetensors file, and safetensors is not installed.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not path.is_file() or path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is {'empty' if path.is_file() else 'not a file'}")
    if re.search(r"-\d+-of-0*([2-9]|[1-9]\d+)\.\w+$|\.index\.json$", path.name):
        raise CheckpointError(
            f"{path} is one part of a checkpoint in several files",
            hint="load them all and save one: torch.save(ALL, FILE)",
        )
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":
        header_bytes = struct.unpack("<Q", start[:8])[0]
        if header_bytes < path.stat().st_size or not start.startswith((b"PK", b"\x80")):
            return _read_safetensors(path, header_bytes)
    zipped = start.startswith(b"PK")
    if not zipped and not start.startswith(b"\x80"):
        raise _no_checkpoint(path, start)
    try:
        (_require_archive if zipped else _require_pickles)(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore")  # of TorchScript and pickle protocols: the errors here say the same
            # Mapped, so that a large teacher beside the student is not read into memory.
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # torch and zipfile raise half a dozen unrelated types for damaged files
        raise _unreadable(path, error) from None
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not a state dict")
    document = text_keys(document)
    return document, document if document.get("format") == FORMAT else {}


def text_keys(document: Mapping[Any, Any]) -> dict[str, Any]:
    """The mapping with text keys; other keys name no weights, and may be of any size."""
    return {
        key if isinstance(key, str) else f"{key}" if isinstance(key, int) else f"({type(key).__name__})": value
        for key, value in document.items()
    }


def _no_checkpoint(path: Path, start: bytes) -> CheckpointError:
    """The error for a file that is neither of ``torch.save`` nor safetensors; says what it is instead."""
    packed = next((name for first, name in _PACKED.items() if start.startswith(first)), None)
    if packed or start[257:262] == b"ustar":
        return CheckpointError(f"{path} is a {packed or 'tar'} archive, not a checkpoint", hint="unpack it first")
    if start.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a pointer of Git LFS, not the file itself", hint="fetch it: git lfs pull")
    if path.suffix.lower() == ".safetensors":
        return CheckpointError(f"{path} is damaged or not a safetensors file")
    return CheckpointError(
        f"{path} is damaged or not a PyTorch checkpoint: it begins neither as torch.save's files nor as .safetensors",
        hint="for graphs and engines: `cdkd-edge inspect`" if is_artefact_name(path) else None,
    )


def _read_safetensors(path: Path, header_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    if header_bytes > min(_MAX_NAMES, path.stat().st_size):
        raise CheckpointError(f"{path} is damaged or not a safetensors file: its header claims {header_bytes} bytes")
    safetensors_torch()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            document = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it is no mapping
            header = json.loads((file.metadata() or {}).get("cdkd-edge", "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {str(error)[:200]}") from None
    return document, header if isinstance(header, dict) else {}


def _require_archive(path: Path) -> None:
    """Refuse an archive that torch.save, which never compresses, did not write, or that claims to be larger inside."""
    if _entries_claimed(path) > _MAX_ENTRIES:
        raise CheckpointError(f"{path} claims more than {_MAX_ENTRIES} entries; a checkpoint has one per tensor")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if not pickled:
            held = f"{path} is a zip archive that torch.save did not write"
            raise CheckpointError(f"{held} ({', '.join(e.filename for e in entries[:3])})", hint="unpack it first")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} is a TorchScript archive, not a state dict", hint="save model.state_dict()")
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed:
            growth = f"{packed.filename} would grow from {packed.compress_size} to {packed.file_size} bytes"
            raise CheckpointError(
                f"{path} is compressed, which torch.save never does: {growth}",
                hint="if you trust it, save it again: torch.save(torch.load(FILE), NEW)",
            )
        if sum(entry.file_size for entry in entries) > (size := path.stat().st_size):
            raise CheckpointError(f"{path} is damaged: its entries claim more bytes than the file has ({size})")
        for entry in pickled:
            if entry.file_size > _MAX_DIRECTORY:
                sizes = f"{entry.file_size / 1e6:.0f} MB beside its tensors; {_MAX_DIRECTORY / 1e6:.0f} MB are read"
                raise CheckpointError(f"{path} holds {sizes}", hint=_SAVE_WEIGHTS)
            _require_bounded(path, io.BytesIO(archive.read(entry)))


def _entries_claimed(path: Path) -> int:
    """The number of entries, from the end of a zip archive's directory: cheaper than listing them."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 100))
        tail = file.read()
    where = tail.rfind(b"PK\x05\x06")
    if where < 0 or len(tail) < where + 22:
        raise CheckpointError(f"{path} is damaged: a zip archive without its end")
    count, length = struct.unpack("<HI", tail[where + 10 : where + 16])
    wide = tail.rfind(b"PK\x06\x06", 0, where)  # zip64
    if wide >= 0 and len(tail) >= wide + 48:
        count, length = struct.unpack("<QQ", tail[wide + 32 : wide + 48])
    return int(max(count, length // 46))  # the smallest entry of a directory


def _require_pickles(path: Path) -> None:
    """Check the pickles of a file from before torch 1.6: three of bookkeeping, the document, its storages."""
    with path.open("rb") as file:
        beginning = file.read(_MAX_DIRECTORY)
    stream = io.BytesIO(beginning)
    for _ in range(5):
        if beginning[stream.tell() : stream.tell() + 1] != b"\x80":
            return  # torch's error says what is wrong
        _require_bounded(path, stream)


def _require_bounded(path: Path, stream: IO[bytes]) -> None:
    """Walk through a pickle without building anything; refuse what would take far more memory than its size."""
    stack: list[Any] = []  # per object: the parts of a tuple, the name of a function, None for a mark
    memo: dict[Any, Any] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step == _MAX_STEPS:
                raise CheckpointError(f"{path} holds more than a checkpoint: its pickle takes over {_MAX_STEPS} steps")
            name = opcode.name
            taken: list[Any] = []
            if marked := pickletools.markobject in opcode.stack_before:
                taken += iter(stack.pop, None)
            if below := len(opcode.stack_before) - 2 * marked:  # the mark, and what lies above it
                taken += stack[-below:]
                del stack[-below:]
            if name == "MARK":
                stack.append(None)
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo.get(argument, 1))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "GLOBAL":
                stack.append(argument)
            elif name.startswith("TUPLE"):
                stack.append(1 + sum(one if isinstance(one, int) else 1 for one in taken))
                if stack[-1] > _MAX_KEY:
                    raise CheckpointError(f"{path} is refused: a tuple in it has more than {_MAX_KEY} parts")
            elif name in ("REDUCE", "NEWOBJ") and re.fullmatch(_ALLOCATORS, str(taken[0])):
                called = taken[0].replace(" ", ".")
                raise CheckpointError(f"{path} is refused: it calls {called}, which can allocate any amount of memory")
            else:
                stack += [1] * len(opcode.stack_after)
    except CheckpointError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return CheckpointError(
            f"{path} is refused: it asks to load {name[1]}, and reading that could execute anything its author wrote",
            hint=f"if you trust it, {_SAVE_WEIGHTS}",
        )
    reason = re.split(r"\. |: 0x|This is an internal", text)[0][:120] if isinstance(error, RuntimeError) else ""
    return CheckpointError(
        f"{path} is damaged or not a PyTorch checkpoint" + (f" ({reason})" if reason else ""),
        hint=None if reason else "other pickles are never loaded",
    )


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``; raises a MissingExtraError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError("safetensors", "export", "reading and writing .safetensors") from None
    return safetensors.torch


def save_tensors(path: Path, document: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of ``torch.save``, or with ``metadata`` one of safetensors; raises an OSError where it cannot."""
    try:
        if metadata is None:
            torch.save(dict(document), path)
        else:
            safetensors_torch().save_file(dict(document), path, metadata=dict(metadata))
    except Exception as error:
        if not re.search(r"inline_container|I/O error", str(error)):
            raise
        raise OSError(errno.EIO, "cannot be written to its end; is the disk full?", str(path)) from None


def require_in_file(tensors: Iterable[Tensor], path: Path) -> None:
    """Refuse tensors that are larger than their file: expanded over a small storage, or many over one."""
    dense = [tensor for tensor in tensors if tensor.layout is torch.strided and not tensor.is_nested]
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in dense if not tensor.is_meta)
    if claimed > path.stat().st_size + _SPARE:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and its tensors would take {claimed}")


def as_float32(key: str, tensor: Tensor) -> Tensor:
    """A copy of a weight in FP32; refuses one that is not dense, floating-point and finite everywhere."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or not tensor.is_floating_point():
        stored = f"{tensor.dtype} ({tensor.layout})"
        raise CheckpointError(f"{key} is stored as {stored}; weights must be dense floating point")
    tensor = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{key} holds values that are not finite; the training diverged or the file is damaged")
    return tensor
