"""Picks one set of weights from a checkpoint and removes the wrappers around it.

A checkpoint is a tree: what ``torch.save`` was given contains state dicts, and their keys contain the names of modules
that a network was wrapped in. It often holds several sets of weights: the trained ones, their running mean (EMA, SWA),
a teacher's. The running mean is taken if there is one, and a note says so. If the choice is ambiguous, an error lists
the sets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.container import text_keys
from cdkd_edge.model.layouts import Dropped, dropped_parts, listed

_MAX_WRAPPERS = 8  # A bound, because a pickle can hold a dict that contains itself
_OWN = ""  # name of the group of tensors that are in no other group
_AVERAGED = {"ema", "swa", "ewa", "averaged", "average", "avg", "polyak", "shadow"}
_TRAINING = {
    "criterion", "criteria", "loss", "losses", "objective", "optimizer", "optimizers", "optimiser", "optim",
    "scheduler", "schedulers", "scaler", "rng", "metric", "metrics", "acc", "accuracy", "iou", "miou", "dice",
    "confmat", "lossfn",
}  # fmt: skip
"""Words in names of what only training needs."""
_LOSS_WEIGHT = re.compile(r"(?:class|pos|ce)_?weights?")  # names of class weights in a loss
_NOTES = {"meta", "hyper", "hparams", "args", "config", "cfg"}  # words in names of what describes a training run
_COUNTERS = {
    "step", "steps", "epoch", "epochs", "iter", "iters", "iteration", "iterations", "updates", "averaged", "tracked",
    "decay", "initted", "counter", "ops", "params",
}  # fmt: skip
"""Last words in names of single numbers that only training needs."""
_STRUCTURE = {
    "encoder", "head", "blocks", "layers", "backbone", "decode_head", "auxiliary_head", "neck", "patch_embed", "norm",
    "fc_norm", "decoder", "decoder_embed",
}  # fmt: skip
"""Modules of networks; if every key begins with another name, that is a wrapper's."""
_WRAPPED = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Modules that torch and similar libraries put around others, at any depth."""
_LEFT = {"ema": "averaged weights", "raw": "other weights", "teacher": "teacher beside the student"}


@dataclass(frozen=True)
class Weights:
    """One set of weights of a checkpoint."""

    tensors: dict[str, Tensor]
    unwrapped: tuple[str, ...]  # wrapper keys and prefixes that were removed, outermost first
    dropped: tuple[Dropped, ...]
    averaged: bool
    notes: tuple[str, ...]  # which set was taken, if there was a choice


def find_weights(document: Mapping[str, Any], path: Path, choice: str | None = None) -> Weights:
    """Find one state dict and remove the wrappers from its keys.

    Args:
        document: the top level of a checkpoint.
        path: for messages.
        choice: ``raw``, ``ema``, or the name of one of several sets. Default: averaged weights if there are any.

    Raises:
        CheckpointError: there are no weights, the choice is ambiguous, or ``choice`` is not there.
    """
    search = _Search(path, choice)
    tensors = search.descend(document)
    if choice not in (None, "raw", "ema") and not search.chosen:
        held = listed(search.offered) or "one set"
        raise CheckpointError(f"{path} holds no weights {choice!r}", hint=f"it holds {held}")
    if choice in ("raw", "ema") and not search.chosen and search.averaged != (choice == "ema"):
        held = "averaged weights alone" if search.averaged else "no averaged weights"
        raise CheckpointError(f"{path} holds {held}", hint="leave --weights out")
    notes = search.notes
    if search.averaged:
        hint = "; --weights raw takes the raw ones" if _LEFT["raw"] in search.dropped else ""
        notes = ["averaged weights (EMA) taken" + hint, *notes]
    elif _LEFT["ema"] in search.dropped:
        notes = ["raw weights taken, as asked; there are averaged ones", *notes]
    dropped = dropped_parts(search.dropped)
    return Weights(tensors, tuple(search.unwrapped), dropped, search.averaged, tuple(notes))


class _Search:
    """The search through one checkpoint."""

    def __init__(self, path: Path, choice: str | None) -> None:
        self.path, self.choice = path, choice
        self.unwrapped: list[str] = []
        self.dropped: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.averaged = False
        self.chosen = False  # ``choice`` was the name of a group
        self._settled = False  # a choice between groups was made
        self.offered: list[str] = []  # names of all groups, for errors
        self._raw: Any = None  # the raw weights, if averaged ones were taken

    def descend(self, level: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The tensors of the chosen set of weights."""
        for _ in range(_MAX_WRAPPERS + 1):
            level = text_keys(level)
            groups = self._groups(level)
            if not groups:
                held = listed(level, 6) or "nothing"
                raise CheckpointError(f"{self.path} holds no state dict; its top level is: {held}")
            if list(groups) != [_OWN]:
                name = self._choose(groups, _roles(groups, level))
                self.unwrapped += [name] if name else []
                level = groups[name]
                continue
            tensors = groups[_OWN]
            shared = next(iter(tensors)).partition(".")[0] + "."
            if shared[:-1] not in _STRUCTURE and all(key.startswith(shared) for key in tensors):
                self.unwrapped.append(shared)
                level = {key.removeprefix(shared): tensor for key, tensor in tensors.items()}
            elif not any(_WRAPPED.search(key) for key in tensors):
                self._require_only_wrapped(tensors)
                return self._completed(tensors)
            else:
                level = self._without_wrappers(tensors)
        raise CheckpointError(f"{self.path} holds no state dict within {_MAX_WRAPPERS} wrappers")

    def _groups(self, level: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The sets of weights at one level, without what only training needs."""
        groups: dict[str, dict[str, Any]] = {}
        own: dict[str, Tensor] = {}
        if isinstance(callbacks := level.get("callbacks"), Mapping):  # Lightning's: only averaged weights count
            averaging = {
                name: state
                for name, state in text_keys(callbacks).items()
                if any(_role(f"{name}.{part}") == "ema" for part, _ in _tensors_in(state))
            }
            level = {**level, "callbacks": averaging}
        for name, value in level.items():
            role = _role(name.partition(".")[0], value)
            counts = isinstance(value, Tensor) and value.ndim < 2 and value.numel() == 1
            if counts and re.split(r"[._]", name[-50:])[-1].lower() in _COUNTERS:
                self.averaged |= name == "n_averaged" and not self._settled
                self._drop("training counters", [name])
            elif "mask_decoder." not in name and any(  # SAM's mask decoder predicts its own IoU
                _words(part) & _TRAINING or _LOSS_WEIGHT.fullmatch(part) for part in name.split(".")
            ):
                self._drop("used only in training", _names(name, _tensors_in(value)))
            elif not isinstance(value, Tensor):
                inside = list(_tensors_in(value))
                named = isinstance(value, Mapping) and not _words(name) & _NOTES
                if named and any(role != "raw" or tensor.ndim > 1 for _, tensor in inside):
                    groups[name] = dict(value)
                elif role == "ema" and any(tensor.ndim for _, tensor in inside):
                    groups[name] = {}
                elif inside:
                    self._drop("beside the weights", _names(name, inside))
            elif role == "raw":
                own[name] = value
            elif not value.ndim and "." not in name:  # such as torch's swa_lr
                self._drop("beside the weights", [name])
            else:
                separator = "." if "." in name else "_"  # OpenMMLab's mmcv has buffers ema_backbone_layers_0
                first, _, rest = name.partition(separator)
                groups.setdefault(first + separator, {})[rest] = value
        arrays = [name for name, value in level.items() if type(value).__name__ == "_reconstruct"]
        if own and arrays and not groups:
            raise CheckpointError(f"{self.path} holds NumPy arrays among its weights: {listed(arrays)}")
        if not all(name.endswith((".", "_")) for name in groups):
            self._drop("beside the weights", [name for name, value in own.items() if value.ndim < 2])
            own = {name: value for name, value in own.items() if value.ndim > 1}
        return {_OWN: own, **groups} if own else groups

    def _choose(self, groups: dict[str, dict[str, Any]], roles: dict[str, str]) -> str:
        """The name of the chosen group; the others are dropped."""
        self.offered += filter(None, groups)
        averaged, raw, teachers = (
            [name for name in groups if roles[name] == role] for role in ("ema", "raw", "teacher")
        )
        if teachers and len(raw) == 1:
            if self._shapes(groups[teachers[0]]) == self._shapes(groups[raw[0]]):
                if self.choice is None:
                    self._ask(groups, "a teacher with the student's shapes, perhaps its running mean")
                averaged += teachers
                roles = {**roles, **dict.fromkeys(teachers, "ema")}
        elif not raw and not averaged:
            raw = teachers
        if "ema_" in groups and self.choice is None:
            self._ask(groups, "averaged weights as buffers, which mmcv swaps with the raw ones after an epoch")
        wanted = {"ema": averaged, "raw": raw}.get(self.choice or "") or averaged or raw
        if self.choice in groups:
            wanted, self.chosen = [self.choice], True
        if len(wanted) != 1:
            self._ask(groups, "more than one set of weights")
        (name,) = wanted
        self._settled |= len(groups) > 1
        if roles[name] == "ema":
            self.averaged = True
            if len(raw) == 1:
                self._raw = groups[raw[0]]
            if not groups[name]:
                hint = "--weights raw takes the raw ones" if self._raw else "save them with the names of the network"
                raise CheckpointError(f"{self.path} holds averaged weights without names ({name})", hint=hint)
        for other in groups:
            if other != name:
                self._drop(_LEFT[roles[other]], _names(other, _tensors_in(groups[other])))
        return name

    def _shapes(self, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes of a set of weights; None if it is none."""
        try:
            return {key: tuple(tensor.shape) for key, tensor in _Search(self.path, None).descend(group).items()}
        except CheckpointError:
            return None

    def _ask(self, groups: Iterable[str], what: str) -> NoReturn:
        names = [name or "raw" for name in groups]
        hint = " or ".join(f"--weights {shlex.quote(name)}" for name in names[:4] if len(name) < 100)
        raise CheckpointError(f"{self.path} holds {what}: {listed(names)}", hint=f"choose one: {hint}")

    def _completed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Averaged weights under the raw weights' names, and with the raw BatchNorm statistics if they lack them."""
        if self._raw is None:
            return tensors
        raw = _Search(self.path, None).descend(self._raw)
        if not tensors.keys() & raw.keys():  # some write blocks_0_norm1_weight, or leave the dots out
            plain = {re.sub(r"[._]", "", key): key for key in raw}
            tensors = {plain.get(re.sub(r"[._]", "", key), key): tensor for key, tensor in tensors.items()}
        statistics = [key for key in raw if key.endswith((".running_mean", ".running_var")) and key not in tensors]
        if statistics:
            self.notes.append(f"{len(statistics)} statistics of BatchNorm are those of the raw weights")
        if lacking := [key for key in raw if key not in tensors and key not in statistics]:
            raise CheckpointError(
                f"{self.path}: the averaged weights lack {listed(lacking)}, which the raw ones have",
                hint="--weights raw takes the raw ones",
            )
        return {**tensors, **{key: raw[key] for key in statistics}}

    def _require_only_wrapped(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors beside a wrapped network."""
        first = {key.partition(".")[0] for key in tensors}
        if "embeddings.cls_token" in tensors:  # Hugging Face's DINOv3 has its blocks alone in model.layer
            return
        for wrapper in first & {"student", "model", "net", "network", "online_model"}:
            others = [key for key in tensors if not key.startswith(f"{wrapper}.")]
            raise CheckpointError(
                f"{self.path} holds tensors beside {wrapper}: {listed(others)}",
                hint=f"if only training needs them, save the weights of {wrapper} without them",
            )

    def _without_wrappers(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        level: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            self.unwrapped += [part for part in _WRAPPED.findall(key) if part not in self.unwrapped]
            plain = _WRAPPED.sub("", key)
            if plain in level:
                raise CheckpointError(f"{self.path}: two tensors both mean {plain}; one is {key}")
            level[plain] = tensor
        return level

    def _drop(self, what: str, names: list[str]) -> None:
        if names:
            self.dropped.setdefault(what, []).extend(names)


def _roles(groups: Mapping[str, dict[str, Any]], level: Mapping[str, Any]) -> dict[str, str]:
    roles = {name: _role(name, group) for name, group in groups.items()}
    meta, averages = level.get("meta"), level.get("ema_state_dict")
    mmengine = (isinstance(meta, Mapping) and "mmengine_version" in meta) or "message_hub" in level
    mmengine |= isinstance(averages, Mapping) and "steps" in averages
    # mmengine's EMAHook and Lightning's WeightAveraging swap the two when they save.
    exchanged = "current_model_state" if "current_model_state" in roles else "ema_state_dict" if mmengine else None
    if "state_dict" in roles and exchanged in roles:
        roles |= {"state_dict": "ema", exchanged: "raw"}
    return roles


def _role(name: str, value: Any = None) -> str:
    """``ema``, ``teacher`` or ``raw``, by a name; ``ema`` also if all that is inside has such a name."""
    words = _words(name)
    inside = [part for part, tensor in _tensors_in(value) if tensor.ndim > 1] if isinstance(value, Mapping) else []
    if words & _AVERAGED or (inside and all(_words(part) & _AVERAGED for part in inside)):
        return "ema"
    return "teacher" if "teacher" in words else "raw"


def _words(name: str) -> set[str]:
    """The words of a name, also ``model_ema``, ``modelEMA`` and ``EMACallback``."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name[:200])}


def _tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a value, with their names; each container once."""
    waiting, seen = [("", value)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = text_keys(value).items() if isinstance(value, Mapping) else enumerate(value)
            start = f"{name[:100]}." if name else ""
            waiting += [(f"{start}{key}", part) for key, part in items]


def _names(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    start = prefix.rstrip(".")
    return [f"{start}.{name}" if start and name else start or name for name, _ in tensors]
