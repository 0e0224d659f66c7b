"""The card of a distilled checkpoint (Markdown)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdkd_edge.core.numbers import significant
from cdkd_edge.distillation.metrics_log import curves_path
from cdkd_edge.distillation.pictures import pictures_path
from cdkd_edge.distillation.recipe import FEATURES, MAE, MASKED, WITHOUT_ADAPTERS
from cdkd_edge.model.config import attention_text
from cdkd_edge.training.files import shown

_METHODS = {
    MASKED: "by masked distillation: student and teacher see the same patches of a tile, both reconstruct the others, "
    "and the student learns the teacher's features",
    FEATURES: "on the features of a teacher",
    MAE: "as a masked autoencoder, without a teacher",
}
_OF_MASKS = ("mask", "cell", "pixels", "decoder_width", "decoder_depth")
_OF_ADAPTERS = ("gate", "feedback")
_OF_TEACHERS = ("adapters", *_OF_ADAPTERS, "pairs", "projection", "target")
_UNUSED = {  # fields of the recipe that a method does not read
    MASKED: ("logits",),
    FEATURES: ("adapters", *_OF_ADAPTERS, *_OF_MASKS, "loss_weights"),
    MAE: (*_OF_TEACHERS, "loss_weights", "logits"),
}
_OFF = {"accumulate": 1, "warm_up": 0, "clip_norm": 0.0, "mean_decay": 0.0, "views": 0, "decoder_width": 0}
MEASURES = {  # what the card and the command call the losses
    "distillation": "missed of the teacher's features",
    "teacher_pixels": "error of the teacher's reconstruction",
    "student_pixels": "error of the student's reconstruction",
    "classes": "divergence of class probabilities",
}


def measure_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What was measured before and after the run, on the tiles kept out: name and two values."""
    before, after = record["before"], record["after"]
    rows: list[tuple[str, ...]] = [
        (title, significant(before[name], 4), significant(after[name], 4))
        for name, title in MEASURES.items()
        if before[name] or after[name]
    ]
    for index, pair in enumerate(record["recipe"]["pairs"]):
        missed = [significant(one["missed"][index], 4) for one in (before, after)]
        rows.append((f"missed of the teacher's block {pair[0]} by block {pair[1]}", *missed))
    if after["classes"]:
        rows.append(("cells with the teacher's label", *(_percent(one["agreement"]) for one in (before, after))))
    if "probe" in after:
        rows.append(("mIoU of a linear probe", *(_percent(one["probe"]["mean_iou"]) for one in (before, after))))
        for name in after["probe"]["iou"]:
            rows.append((f"IoU of {name}", *(_percent(one["probe"]["iou"].get(name)) for one in (before, after))))
    return rows


def _recipe(record: Mapping[str, Any]) -> list[str]:
    """The recipe line by line, without what the method does not read or what was not asked for."""
    recipe, method = record["recipe"], record["method"]
    unused = {"method", "loss_weights", "epochs" if recipe["steps"] else "steps", *_UNUSED[method]}
    if not recipe["adapters"]:
        unused.update(_OF_ADAPTERS)
    if method == FEATURES and not record["after"]["classes"]:
        unused.add("logits")
    used = {name: value for name, value in recipe.items() if name not in unused and value != _OFF.get(name)}
    if "pairs" in used:
        used["pairs"] = ", ".join(f"{teacher}:{student}" for teacher, student in used["pairs"])
    if method == MASKED:
        fixed = recipe["loss_weights"] or (None if recipe["adapters"] else WITHOUT_ADAPTERS)
        used["loss weights"] = "in three stages" if fixed is None else ", ".join(f"{one:g}" for one in fixed)
    return [f"- {name.replace('_', ' ')}: {shown(value)}" for name, value in used.items()]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def card_text(name: str, record: Mapping[str, Any]) -> str:
    """The card of a checkpoint, from its record."""
    network, run = record["network"], record["run"]
    path = Path(name)
    kept_out = record["check_tiles"] < record["training_tiles"]
    check = f", and {record['check_tiles']} to check on" if kept_out else ""
    pictures = [f"![Losses against the step]({curves_path(path).name})", ""]
    if record["method"] != FEATURES:
        text = "Tiles, their visible patches, and what the student" + (
            " and the teacher" if record["method"] == MASKED and record["recipe"]["adapters"] else ""
        )
        pictures += [f"{text} reconstructed from these:", "", f"![Reconstructions]({pictures_path(path).name})", ""]
    about = []
    if record["method"] != MAE:
        over = " over the variance of the teacher's channel at the start"
        about = [f"*Missed*: mean squared difference{over if record['recipe']['target'] != 'raw' else ''}."]
    if "probe" in record["after"]:
        about.append("The linear probe learns and is scored on other images, those with labels.")
    transitions = [
        f"- step {one['step']}: stage {one['stage']}, at a ratio of {one['ratio']:.3f}" for one in record["transitions"]
    ]
    return (
        "\n".join(
            [
                f"# `{name}`",
                "",
                f"A ViT encoder for {network['tile']} px tiles, patch {network['patch']}, {network['depth']} blocks of "
                f"width {network['embed_dim']}, attention: {attention_text(network['attention'])}. Trained without "
                f"labels {_METHODS[record['method']]}, by `cdkd-edge distill` ({record['tool']}).",
                "",
                f"    {record['command']}",
                "",
                *(
                    []
                    if run["steps"] == run["of"]
                    else [f"**Training is not finished: step {run['steps']} of {run['of']}.**", ""]
                ),
                "## What it learned",
                "",
                f"On {record['check_tiles']} tiles that it did not train on, of the same scenes."
                if kept_out
                else f"On the {record['check_tiles']} tiles that it trained on.",
                *about,
                "",
                "| | before | after |",
                "|---|---:|---:|",
                *(f"| {' | '.join(row)} |" for row in measure_rows(record)),
                "",
                *pictures,
                "## Training",
                "",
                *(
                    f"- {role}: `{record[role]['file']}` ({record[role]['layout']}"
                    + (f", SHA-256 `{record[role]['sha256'][:16]}...`)" if record[role]["sha256"] else ")")
                    for role in ("teacher", "student")
                    if role in record
                ),
                f"- {record['training_tiles']:,} tiles{check}, of:",
                *(f"  - {Path(folder['name']).name or '.'}: {folder['text']}" for folder in record["imagery"]),
                *(f"- {note}" for note in record["notes"]),
                *transitions,
                *_recipe(record),
                f"- {run['seconds'] / 60:.1f} minutes on {run['device']}, {run['processes']} "
                f"process{'es' if run['processes'] > 1 else ''}, {run['libraries']}",
                "",
                *_history(run["history"]),
            ]
        )
        + "\n"
    )


def _history(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = [name for name in ("loss", *MEASURES) if any(row[name] for row in rows)]
    with_stage, with_probe = "stage" in rows[-1], "probe" in rows[-1]["check"]
    head = [
        "step",
        *(name.replace("_", " ") for name in names),
        *(["ratio", "stage"] if with_stage else []),
        *(["probe mIoU"] if with_probe else []),
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for row in rows:
        cells = [str(row["step"]), *(f"{row[name]:.4f}" for name in names)]
        cells += [f"{row['ratio']:.3f}", row["stage"]] if with_stage else []
        cells += [_percent(row["check"]["probe"]["mean_iou"])] if with_probe else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines
