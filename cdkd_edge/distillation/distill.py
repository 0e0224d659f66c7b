"""``cdkd-edge distill``: trains a student on a frozen teacher's features, without labels (torch).

The state of the run lies beside the output until the run is finished. A run that was killed resumes from it and ends as
it would have ended.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from cdkd_edge import __version__
from cdkd_edge.core.files import sha256_of, write_text
from cdkd_edge.core.machine import describe_machine
from cdkd_edge.core.numbers import significant
from cdkd_edge.distillation.align import Aligner, AlignRecipe, Network, encoder_of
from cdkd_edge.distillation.tiles import SceneTiles
from cdkd_edge.model.checkpoint import CheckpointReport, load_checkpoint, load_encoder, save_checkpoint
from cdkd_edge.model.config import attention_text
from cdkd_edge.model.device import chosen_device
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.files import card_path, load_state, require_free, save_state, shown, state_path

_SAVE_STATE_EVERY_S = 120.0
_ROWS = 20  # of the history in the card


@dataclass(frozen=True)
class DistillOptions:
    """Everything but tiles, teacher, student and output."""

    recipe: AlignRecipe = field(default_factory=AlignRecipe)
    tile: int | None = None  # side of the tiles to train on, px; None: the student's own
    reading: SegmentOptions = field(default_factory=SegmentOptions)
    device: str = "auto"
    exclude: tuple[str, ...] = ()  # evaluation sets, see :class:`.imagery.Imagery`
    weights: str | None = None  # of teacher and student, see :func:`cdkd_edge.model.checkpoint.read_checkpoint`
    resume: bool = False
    overwrite: bool = False
    command: str = "cdkd-edge distill"


class DistillListener(Protocol):
    """Receives the progress of a run."""

    def step(self, text: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something to know before hours are spent."""

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many batches of the run are done."""

    def row(self, row: Mapping[str, Any], steps: int, seconds_left: float) -> None:
        """A part of the run ended; ``row`` as in the history of the card."""


@dataclass(frozen=True)
class DistillResult:
    """A finished run."""

    checkpoint: Path
    card: Path
    record: Mapping[str, Any]


def distill(
    tiles: Sequence[str],
    teacher: Path,
    student: Path,
    output: Path,
    options: DistillOptions,
    listener: DistillListener,
) -> DistillResult:
    """Train a student's encoder on the features of a frozen teacher.

    Args:
        tiles: scenes and images, folders of them, or patterns; no labels.
        teacher: a checkpoint of any known layout.
        student: a checkpoint whose features are as wide; for example the teacher, converted.
        output: the trained student with its head, if it has one; its card goes beside it (``.md``).
        options, listener: see there.

    Raises:
        SceneError, CheckpointError: tiles or networks cannot be used.
        UsageError, NumericalCheckError: the output exists, a state belongs to another run; the loss is not finite.
    """
    for source in (student, teacher):
        require_free(str(source), output, resume=options.resume, overwrite=options.overwrite)
    run = _Distillation(tiles, teacher, student, output, options, listener)
    if not options.resume:  # only now: tiles and networks have proved to be usable
        state_path(output).unlink(missing_ok=True)
    return run.finish()


def _load(path: Path, **reading: Any) -> tuple[Network, CheckpointReport]:
    """A network, or an encoder if there is no head."""
    network, report = load_encoder(path, **reading)
    return load_checkpoint(path, **reading) if report.has_head else (network, report)


class _Distillation:
    """One run, from the tiles to the card."""

    def __init__(
        self,
        tiles: Sequence[str],
        teacher: Path,
        student: Path,
        output: Path,
        options: DistillOptions,
        listener: DistillListener,
    ) -> None:
        self.output, self.options, self.listener = output, options, listener
        device, recipe = chosen_device(options.device), options.recipe
        listener.step("loading the networks")
        self.student, self.report = _load(student, weights=options.weights)
        tile = options.tile or self.student.config.tile
        self.resized = tile != self.student.config.tile
        apart, _ = _load(student, weights=options.weights, tile=tile)
        guide, about_teacher = _load(teacher, weights=options.weights, tile=tile)
        scenes = SceneTiles(
            tiles,
            tile,
            recipe.augmentation,
            options.reading,
            exclude=options.exclude,
            progress=lambda done, total: listener.step(f"looking at the images: {done:,} of {total:,}"),
            note=listener.note,
        )
        listener.step("looking at the images")
        self.aligner = Aligner(apart.to(device), guide.to(device), scenes, recipe, position=not self.resized)
        self.sources = {
            role: {"file": path.name, "sha256": sha256_of(path), "layout": report.layout}
            for role, path, report in (("teacher", teacher, about_teacher), ("student", student, self.report))
        }
        self.notes = [*(f"teacher: {note}" for note in about_teacher.notes)]
        self.notes += [f"student: {note}" for note in self.report.notes]
        if self.resized:
            self.notes.append(
                f"trained on tiles of {tile} px, used with {self.student.config.tile} px: its position embedding stays "
                "as it is"
            )
        self.identity = {  # what must be the same in the run that resumes this one
            "recipe": dataclasses.asdict(recipe),
            "network": dataclasses.asdict(apart.config),
            "teacher": self.sources["teacher"]["sha256"],
            "student": self.sources["student"]["sha256"],
            "weights": options.weights,
            "images": scenes.imagery.digest,
            "reading": dataclasses.asdict(options.reading),
        }
        self._saved_state = time.perf_counter()
        self._started = (0, 0.0)  # step and time at which this process began to train
        self.before: dict[str, Any] = {}
        self.losses: list[float] = []  # since the last row of the history
        if options.resume and state_path(output).exists():
            state = load_state(output, self.identity, device)
            self.before, self.losses = state.pop("before"), state.pop("losses")
            self.aligner.restore(state)

    def finish(self) -> DistillResult:
        """Train the steps that are left, compare, and write the student."""
        aligner, listener, recipe = self.aligner, self.listener, self.options.recipe
        for note in [*aligner.tiles.notes, *self.notes]:
            listener.note(note)
        if not self.before:
            listener.step("measuring the teacher's features")
            aligner.measure_teacher()
            self.before = aligner.compare(aligner.student)
        progress = aligner.progress
        self._started = (progress.step, time.perf_counter())
        try:
            while progress.step < recipe.steps:
                aligner.run_epoch(self._after_batch)
        except (KeyboardInterrupt, SystemExit):  # between two steps, see _after_batch
            self._save_state()
            raise
        listener.step("comparing with the teacher")
        trained = aligner.trained_module()
        encoder_of(aligner.student).load_state_dict(trained.state_dict())
        after = aligner.compare(aligner.student)
        weights = {key: value for key, value in trained.state_dict().items() if key != "pos_embed" or not self.resized}
        encoder_of(self.student).load_state_dict(weights, strict=False)
        record = self._record(after)
        training = {**self.report.training, "distilled": record}
        save_checkpoint(self.student, self.output, schema=self.report.schema, training=training)
        write_text(card_path(self.output), card_text(self.output.name, record))
        state_path(self.output).unlink(missing_ok=True)
        return DistillResult(self.output, card_path(self.output), record)

    def _after_batch(self) -> None:
        aligner, steps = self.aligner, self.options.recipe.steps
        progress = aligner.progress
        self.losses.append(progress.loss)
        row = None
        if progress.step * _ROWS // steps > (progress.step - 1) * _ROWS // steps:
            row = {"step": progress.step, "loss": sum(self.losses) / len(self.losses)}
            progress.history.append(row)
            self.losses = []
        if time.perf_counter() - self._saved_state > _SAVE_STATE_EVERY_S:
            self._save_state()
        # Last, because a signal is raised here.
        self.listener.batch(progress.step, steps, self._seconds_left())
        if row:
            self.listener.row(row, steps, self._seconds_left())

    def _save_state(self) -> None:
        save_state(self.output, self.identity, {**self.aligner.state(), "before": self.before, "losses": self.losses})
        self._saved_state = time.perf_counter()

    def _seconds_left(self) -> float:
        """By the pace since this process began to train."""
        first, since = self._started
        step = self.aligner.progress.step
        return (time.perf_counter() - since) / max(1, step - first) * (self.options.recipe.steps - step)

    def _record(self, after: Mapping[str, Any]) -> dict[str, Any]:
        """What the checkpoint stores about the run; JSON data."""
        aligner, device = self.aligner, self.aligner.device
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine().cpu
        record = {
            "tool": f"cdkd-edge {__version__}",
            "command": self.options.command,
            "method": "features",
            **self.sources,
            "network": dataclasses.asdict(self.student.config),
            "notes": [*aligner.tiles.notes, *self.notes],
            "recipe": {**dataclasses.asdict(self.options.recipe), "tile": aligner.tiles.tile},
            "imagery": [
                dataclasses.asdict(folder) | {"text": folder.text} for folder in aligner.tiles.imagery.report()
            ],
            "skipped": aligner.tiles.skipped,
            "training_tiles": aligner.places,
            "check_tiles": len(aligner.check),
            "before": self.before,
            "after": dict(after),
            "run": {
                "seconds": aligner.progress.seconds,
                "history": aligner.progress.history,
                "device": f"{machine}, {torch.get_num_threads()} threads" if device.type == "cpu" else machine,
                "libraries": f"torch {torch.__version__}",
            },
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))  # lists, not tuples, in every kind of checkpoint
        return plain


def card_text(name: str, record: Mapping[str, Any]) -> str:
    """The card of a distilled checkpoint (Markdown), from its record."""
    network, run, before, after = (record[key] for key in ("network", "run", "before", "after"))
    measures = {f"missed of map {index + 1}": [row["missed"][index] for row in (before, after)] for index in range(4)}
    if "divergence" in before:
        measures["divergence of class probabilities"] = [before["divergence"], after["divergence"]]
    measures["loss"] = [before["loss"], after["loss"]]
    rows = [(what, *(significant(value, 4) for value in values)) for what, values in measures.items()]
    if "agreement" in before:
        same = (100 * row["agreement"] for row in (before, after))
        rows.append(("cells with the teacher's label, percent", *(f"{share:.2f}" for share in same)))
    lines = [
        f"# `{name}`",
        "",
        f"A ViT encoder for {network['tile']} px tiles, patch {network['patch']}, {network['depth']} blocks of width "
        f"{network['embed_dim']}, attention: {attention_text(network['attention'])}. Trained without labels on the "
        f"features of a teacher by `cdkd-edge distill` ({record['tool']}).",
        "",
        f"    {record['command']}",
        "",
        "## How close it is to its teacher",
        "",
        f"On {record['check_tiles']} tiles that it did not train on, of the same scenes."
        if record["check_tiles"] < record["training_tiles"]
        else f"On the {record['check_tiles']} tiles that it trained on.",
        "*Missed*: mean squared difference over the variance of the teacher's channel, for each of the four feature "
        "maps.",
        "",
        "| | before | after |",
        "|---|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "## Training",
        "",
        *(
            f"- {role}: `{record[role]['file']}` ({record[role]['layout']}, SHA-256 `{record[role]['sha256'][:16]}...`)"
            for role in ("teacher", "student")
        ),
        f"- {record['training_tiles']:,} tiles, and {record['check_tiles']} to check on, of:",
        *(f"  - {Path(folder['name']).name or '.'}: {folder['text']}" for folder in record["imagery"]),
        *(f"- {note}" for note in record["notes"]),
        *(f"- {key}: {shown(value)}" for key, value in record["recipe"].items()),
        f"- {run['seconds'] / 60:.1f} minutes on {run['device']}, {run['libraries']}",
        "",
        "| step | loss |",
        "|---:|---:|",
        *(f"| {row['step']} | {row['loss']:.4f} |" for row in run["history"]),
    ]
    return "\n".join(lines) + "\n"
