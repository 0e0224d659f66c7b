"""The model card that lies beside a tuned checkpoint: data, split, scores, recipe, command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cdkd_edge.quality.evaluate import Evaluation
from cdkd_edge.quality.metrics import METRICS


def scores_of(evaluation: Evaluation) -> dict[str, Any]:
    """The scores that a training record keeps."""
    document = evaluation.document()
    return {
        **evaluation.matrix.scores(),
        "iou": {row["name"]: row["iou"] for row in document["classes"]},
    }


def score_table(title: str, classes: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of scores in percent; a class without a score has a dash."""
    header = [title, *(f"{name} IoU" for name in classes), *(metric.label for metric in METRICS.values())]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for name, scores in rows.items():
        values = [*(scores["iou"].get(name) for name in classes), *(scores.get(key) for key in METRICS)]
        lines.append(f"| {name} | {' | '.join(percent(value) for value in values)} |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A score as a card prints it."""
    return "–" if value is None else f"{100 * value:.1f}"


def card_text(name: str, record: Mapping[str, Any]) -> str:
    """The card of a checkpoint from its training record."""
    data, network, scores, run = record["data"], record["network"], record["scores"], record["run"]
    classes = data["classes"]
    finished = run["epochs_done"] == record["recipe"]["epochs"]
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
        f"makes them. The weights are those of epoch {run['best_epoch']} of {record['recipe']['epochs']}, chosen by "
        "their mIoU on these same images, which flatters a little; the last epoch was not chosen by anything.",
        "",
        score_table("validation", classes, scores),
        "",
    ]
    if any(rule in scores for rule in ("nearest mean", "colour histogram")):
        lines += [
            "*nearest mean* and *colour histogram* see a pixel's colour and nothing else, learned from the same "
            "training images: the class whose mean RGB is nearest, and the class seen most often with that colour "
            "(32 x 32 x 32 bins).",
            "",
        ]
    lines += [
        "## Data",
        "",
        f"{data['layout']} `{data['folder']}`, schema `{data['schema']}`; split: {data['rule']}.",
        "",
        "| | images | tiles | scenes |",
        "|---|---:|---:|---|",
        f"| training | {len(record['training_images'])} | {data['training_tiles']} | "
        f"{_some(data['training_scenes'])} |",
        f"| validation | {len(record['validation_images'])} | {data['validation_tiles']} | "
        f"{_some(data['validation_scenes'])} |",
        "",
        "Share of the labelled pixels, percent:",
        "",
        f"| | {' | '.join(classes)} |",
        f"|---{'|---:' * len(classes)}|",
        *(f"| {side} | {' | '.join(_shares(data[f'{side}_pixels']))} |" for side in ("training", "validation")),
        "",
        "## Training",
        "",
        f"- from `{record['source']['file']}` ({record['source']['layout']}"
        + (f", SHA-256 `{record['source']['sha256'][:16]}...`)" if record["source"]["sha256"] else ")"),
        *(f"- {note}" for note in record["notes"]),
        *(f"- {key}: {_shown(value)}" for key, value in record["recipe"].items()),
        f"- {run['seconds'] / 60:.1f} minutes on {run['device']}, {run['libraries']}"
        + (f"; features computed for {run['tiles_encoded']} tiles" if run["tiles_encoded"] else ""),
        "",
        "| epoch | loss | validation mIoU |",
        "|---:|---:|---:|",
        *(f"| {row['epoch']} | {row['loss']:.4f} | {percent(row['mean_iou'])} |" for row in run["history"]),
    ]
    return "\n".join(lines) + "\n"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _shares(pixels: Sequence[int]) -> list[str]:
    total = max(1, sum(pixels))
    return [f"{100 * count / total:.2f}" for count in pixels]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
