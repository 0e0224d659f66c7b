"""Files beside a tuned checkpoint: its model card, and the state from which an interrupted run resumes (torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cdkd_edge.core.errors import CheckpointError, UsageError
from cdkd_edge.core.files import occupied, whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.model.container import save_tensors
from cdkd_edge.quality.datasets import listed
from cdkd_edge.quality.metrics import METRICS, ConfusionMatrix, number
from cdkd_edge.training.recipe import PRESET_PREFIX


def card_path(output: Path) -> Path:
    """Path of the model card of a checkpoint."""
    return output.with_suffix(".md")


def state_path(output: Path) -> Path:
    """Path of the state of an unfinished run."""
    return output.with_name(f"{output.stem}.state.pt")


def interruption_notice(output: Path, best: Path | None = None) -> str:
    """A message after an interruption: what was kept, and how to resume.

    ``best`` is where the best checkpoint so far lies, if not in ``output``.
    """
    state = state_path(output)
    if not state.exists():
        return "there is nothing to resume yet; the same command starts again"
    best = best or output
    found = f", its best so far in {best}" if best.exists() else ""
    return f"the run is kept in {state}{found}; the same command with --resume continues it"


def require_free(source: str, output: Path, *, resume: bool, overwrite: bool, others: Sequence[Path] = ()) -> None:
    """Make sure, before anything is computed, that no checkpoint, card or unfinished run is overwritten: UsageError.

    ``others`` are files besides the checkpoint and its card that the run writes.
    """
    if output.suffix not in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"--output {output} has no suffix of a checkpoint", hint="end it in .pt, .pth or .safetensors")
    if output.exists() and not source.startswith(PRESET_PREFIX) and Path(source).exists() and output.samefile(source):
        raise UsageError(f"{output} is a checkpoint that training reads")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint="choose another --output")
    if overwrite:
        return
    state = state_path(output)
    if state.exists() and not resume:
        hint = "continue it with --resume, or start again with --overwrite"
        raise UsageError(f"{state} holds an unfinished run", hint=hint)
    if output.exists() and not state.exists():
        if resume:
            raise UsageError(f"{output} is finished; there is nothing to resume", hint="train anew with --overwrite")
        raise occupied(output, UsageError)
    for path in (card_path(output), *others):
        if path.exists() and not state.exists():
            raise occupied(path, UsageError)


def save_state(output: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run (:meth:`.trainer.Trainer.state`) as a whole, with its identity (JSON)."""
    with whole_file(state_path(output)) as temporary:
        save_tensors(temporary, {"identity": json.dumps(identity), **state})


def load_state(output: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Load the state of a run.

    Raises:
        CheckpointError, UsageError: the file is damaged; its identity is another, of which the first part is named.
    """
    path = state_path(output)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        theirs = json.loads(state.pop("identity"))
    except Exception as error:  # torch raises half a dozen unrelated types for damaged files
        reason = " ".join(str(error).split())[:200]
        hint = "start again with --overwrite"
        raise CheckpointError(f"the state {path} cannot be read: {reason}", hint=hint) from None
    ours = json.loads(json.dumps(identity))
    if other := [key for key in ours if theirs.get(key) != ours[key]]:
        raise UsageError(
            f"{path} belongs to a run with other {', '.join(other)}: {_difference(theirs, ours, other[0])}",
            hint="give the same options to resume it, or start again with --overwrite",
        )
    return state


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], key: str) -> str:
    """Describe one difference between two runs."""
    if isinstance(ours[key], dict) and isinstance(theirs.get(key), dict):
        for name, value in ours[key].items():
            if theirs[key].get(name) != value:
                return f"{name} was {theirs[key].get(name)}, now {value}"
    if isinstance(ours[key], list):
        return f"{len(theirs.get(key) or [])} then, {len(ours[key])} now"
    return f"{theirs.get(key)} then, {ours[key]} now"


def scores_of(matrix: ConfusionMatrix, schema: LabelSchema) -> dict[str, Any]:
    """The scores that a training record stores."""
    iou = zip(schema.class_names, matrix.class_scores("iou"), strict=True)
    return {**matrix.scores(), "iou": {name: number(float(value)) for name, value in iou}}


def _score_table(classes: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of scores in percent; a dash for a class without a score."""
    header = ["validation", *(f"{name} IoU" for name in classes), *(metric.label for metric in METRICS.values())]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for name, scores in rows.items():
        values = [*(scores["iou"].get(name) for name in classes), *(scores.get(key) for key in METRICS)]
        lines.append(f"| {name} | {' | '.join(_percent(value) for value in values)} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def card_text(name: str, record: Mapping[str, Any]) -> str:
    """The model card of a checkpoint, from its training record."""
    data, network, scores, run, source = (record[key] for key in ("data", "network", "scores", "run", "source"))
    classes, epochs = data["classes"], record["recipe"]["epochs"]
    finished = run["epochs_done"] == epochs
    digest = f", SHA-256 `{source['sha256'][:16]}...`" if source["sha256"] else ""
    encoded = f"; features computed for {run['tiles_encoded']} tiles" if run["tiles_encoded"] else ""
    rules = (
        "*nearest mean* and *colour histogram* see a pixel's colour and nothing else, learned from the same training "
        "images: the class whose mean RGB is nearest, and the class seen most often with that colour (32 x 32 x 32 "
        "bins)."
    )
    lines = [
        f"# `{name}`",
        "",
        f"A ViT + UPerNet land-cover network for {network['tile']} px tiles, patch {network['patch']}, "
        f"{network['depth']} blocks of width {network['embed_dim']}; classes: {', '.join(classes)}. Made by "
        f"`cdkd-edge finetune` ({record['tool']}).",
        "",
        f"    {record['command']}",
        "",
        *([] if finished else [f"**Training is not finished: epoch {run['epochs_done']} so far.**", ""]),
        "## Scores",
        "",
        "Percent, on the validation images only, every labelled pixel once; tiles and overlaps as `cdkd-edge segment` "
        f"makes them. The weights are those of epoch {run['best_epoch']} of {epochs}, chosen by "
        "their mIoU on these images, so the score is a little too high; that of the last epoch is not.",
        "",
        _score_table(classes, scores),
        "",
        *([rules, ""] if {"nearest mean", "colour histogram"} & scores.keys() else []),
        "## Data",
        "",
        f"{data['layout']} `{data['folder']}`, schema `{data['schema']}`; split: {data['rule']}.",
        "",
        "| | images | tiles | scenes |",
        "|---|---:|---:|---|",
        *(
            f"| {side} | {len(record[f'{side}_images'])} | {data[f'{side}_tiles']} | "
            f"{listed(data[f'{side}_scenes'], 12)} |"
            for side in ("training", "validation")
        ),
        "",
        "Share of the labelled pixels, percent:",
        "",
        f"| | {' | '.join(classes)} |",
        f"|---{'|---:' * len(classes)}|",
        *(f"| {side} | {' | '.join(_shares(data[f'{side}_pixels']))} |" for side in ("training", "validation")),
        "",
        "## Training",
        "",
        f"- from `{source['file']}` ({source['layout']}{digest})",
        *(f"- {note}" for note in record["notes"]),
        *(f"- {key}: {shown(value)}" for key, value in record["recipe"].items()),
        f"- {run['seconds'] / 60:.1f} minutes on {run['device']}, {run['libraries']}{encoded}",
        "",
        "| epoch | loss | validation mIoU |",
        "|---:|---:|---:|",
        *(f"| {row['epoch']} | {row['loss']:.4f} | {_percent(row['mean_iou'])} |" for row in run["history"]),
    ]
    return "\n".join(lines) + "\n"


def _shares(pixels: Sequence[int]) -> list[str]:
    total = max(1, sum(pixels))
    return [f"{100 * count / total:.2f}" for count in pixels]


def shown(value: Any) -> str:
    """A value of a recipe for a card."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
