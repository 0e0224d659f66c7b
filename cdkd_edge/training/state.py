"""Files of a run: what lies beside a checkpoint, and the state from which a killed run goes on (torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cdkd_edge.core.errors import CheckpointError, UsageError
from cdkd_edge.core.files import occupied, whole_file
from cdkd_edge.model.container import save_tensors
from cdkd_edge.training.start import PRESET_PREFIX


def card_path(output: Path) -> Path:
    """Where the card of a checkpoint lies."""
    return output.with_suffix(".md")


def state_path(output: Path) -> Path:
    """Where the state of an unfinished run lies."""
    return output.with_name(f"{output.stem}.state.pt")


def what_is_kept(output: Path) -> str:
    """What to tell somebody who interrupted a run."""
    state = state_path(output)
    if not state.exists():
        return "nothing was trained yet that could be kept; the same command starts again"
    best = f", its best epoch so far in {output}" if output.exists() else ""
    return f"the run is kept in {state}{best}; the same command with --resume goes on"


def require_free(source: str, output: Path, *, resume: bool, overwrite: bool) -> None:
    """Make sure that nothing of value is overwritten, before anything is computed.

    Raises:
        UsageError: a checkpoint, a card or an unfinished run is in the way.
    """
    if output.suffix not in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"{output} is no name for a checkpoint", hint="end it in .pt, .pth or .safetensors")
    if output.exists() and not source.startswith(PRESET_PREFIX) and Path(source).exists() and output.samefile(source):
        raise UsageError("the checkpoint would overwrite what it starts from")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint="choose another --output")
    if overwrite:
        return
    state = state_path(output)
    if state.exists() and not resume:
        raise UsageError(
            f"{state} holds an unfinished run", hint="go on with --resume, or start again with --overwrite"
        )
    if output.exists() and not state.exists():
        if resume:
            raise UsageError(f"{output} is finished; there is nothing to resume", hint="train anew with --overwrite")
        raise occupied(output, UsageError)
    if not state.exists() and card_path(output).exists():
        raise occupied(card_path(output), UsageError)


def save_state(output: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run, whole or not at all.

    Args:
        output: the run's checkpoint.
        identity: JSON data that must be the same where it is resumed.
        state: what :meth:`cdkd_edge.training.trainer.Trainer.state` gives.
    """
    with whole_file(state_path(output)) as temporary:
        save_tensors(temporary, {"identity": json.dumps(identity), **state})


def load_state(output: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of a run, if it is the run of that identity.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: it belongs to a run with other options or data; the first difference is named.
    """
    path = state_path(output)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        theirs = json.loads(state.pop("identity"))
    except Exception as error:  # torch raises half a dozen unrelated types for damaged files
        raise CheckpointError(
            f"the state {path} cannot be read: {' '.join(str(error).split())[:200]}",
            hint="start again with --overwrite",
        ) from None
    ours = json.loads(json.dumps(identity))
    if other := [key for key in ours if theirs.get(key) != ours[key]]:
        raise UsageError(
            f"{path} belongs to a run with other {', '.join(other)}: {_difference(theirs, ours, other[0])}",
            hint="give the same options to resume it, or start again with --overwrite",
        )
    return state


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], key: str) -> str:
    """One thing in which two runs differ, in words."""
    if isinstance(ours[key], dict) and isinstance(theirs.get(key), dict):
        for name, value in ours[key].items():
            if theirs[key].get(name) != value:
                return f"{name} was {theirs[key].get(name)}, now {value}"
    if isinstance(ours[key], list):
        return f"{len(theirs.get(key) or [])} then, {len(ours[key])} now"
    return f"{theirs.get(key)} then, {ours[key]} now"
