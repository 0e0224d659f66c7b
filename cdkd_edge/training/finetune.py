"""``cdkd-edge finetune``: trains a decoder on labelled images and writes a checkpoint and its model card (torch).

The checkpoint with the best validation score is written whenever there is a better one. The state of the run lies
beside it until the run is finished; a run that was killed resumes from it and ends as it would have ended.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cdkd_edge import __version__
from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.files import make_folders, sha256_of, write_text
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.machine import describe_machine
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.model.beside import weights_file
from cdkd_edge.model.checkpoint import load_encoder, save_checkpoint
from cdkd_edge.model.device import chosen_device
from cdkd_edge.quality.baselines import score_color_rules
from cdkd_edge.quality.datasets import Dataset, Split, find_dataset, split_dataset
from cdkd_edge.quality.evaluate import Evaluation, absent_classes, check_dataset, data_schema, evaluate, no_labels
from cdkd_edge.quality.masks import HiddenLabels, read_labels
from cdkd_edge.quality.network import NetworkLabeller, load_network
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.features import FeatureCache
from cdkd_edge.training.files import card_path, card_text, load_state, require_free, save_state, scores_of, state_path
from cdkd_edge.training.recipe import PRESET_PREFIX, NetworkSettings, Recipe, starting_network
from cdkd_edge.training.trainer import Trainer
from cdkd_edge.training.views import TrainingTiles

_SAVE_STATE_EVERY_S = 120.0
_SHARE_OF_FREE_DISK = 0.5
_RANDOM_AND_FROZEN = (
    "the encoder has random weights and is frozen, so it learns nothing and the scores stay low; train it as well with "
    "--encoder-lr 1e-4, or start from a trained encoder"
)


@dataclass(frozen=True)
class FinetuneOptions:
    """Everything but source, data and output."""

    recipe: Recipe = field(default_factory=Recipe)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    schema: str | None = None
    training_scenes: tuple[str, ...] = ()
    validation_scenes: tuple[str, ...] = ()
    training_list: Path | None = None
    validation_list: Path | None = None
    reading: SegmentOptions = field(default_factory=SegmentOptions)
    device: str = "auto"
    features: Path | None = None  # folder of cached features; None: ``<stem of the output>.features`` beside the output
    remember: bool | None = None  # cache features; None: on a CPU, where computing takes longer than reading
    validate_every: int = 1  # epochs
    half: bool = False  # store weights as float16 (half the file)
    resume: bool = False
    overwrite: bool = False
    command: str = "cdkd-edge finetune"


class TrainingListener(Protocol):
    """Receives the progress of a run."""

    def step(self, text: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something to know before hours are spent."""

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many batches of the run are done."""

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        """An epoch ended; ``row`` as in the history of the model card."""


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run."""

    checkpoint: Path
    card: Path
    record: Mapping[str, Any]
    evaluation: Evaluation  # of the written checkpoint, on the validation images


def finetune(
    source: str, data: Path, output: Path, options: FinetuneOptions, listener: TrainingListener
) -> FinetuneResult:
    """Tune a decoder (and, if asked, the encoder) on labelled images.

    Args:
        source: encoder or whole network, or ``preset:NAME``.
        data: a dataset of :mod:`cdkd_edge.quality.datasets`.
        output: the checkpoint; its card goes beside it (``.md``).
        options, listener: see there.

    Raises:
        DatasetError, SchemaError, CheckpointError: data or source cannot be used.
        UsageError, NumericalCheckError: the output exists, a state belongs to another run; the loss is not finite.
    """
    frozen, wanted = options.recipe.frozen, options.remember or (options.features and options.remember is None)
    if wanted and not (options.recipe.views and frozen):
        what = "fresh views (--views 0)" if frozen else "an encoder that changes (--encoder-lr)"
        raise UsageError(f"features of {what} differ in every epoch; there is nothing to remember")
    require_free(source, output, resume=options.resume, overwrite=options.overwrite)
    run = _Tuning(source, data, output, options, listener)
    if not options.resume:  # only now: data and source have proved to be usable
        state_path(output).unlink(missing_ok=True)
    return run.finish()


class _Tuning:
    """One run, from the data to the model card."""

    def __init__(
        self, source: str, data: Path, output: Path, options: FinetuneOptions, listener: TrainingListener
    ) -> None:
        self.output, self.options, self.listener = output, options, listener
        listener.step("looking at the data")
        self.split, self.schema = split, schema = _find_data(source, data, options)
        device, recipe = chosen_device(options.device), options.recipe
        listener.step("loading the network")
        self.start = starting_network(source, schema, options.network, recipe.seed)
        network = self.start.network.to(device)
        listener.step(f"reading {len(split.training)} training masks")
        tiles = TrainingTiles(split.training, schema, network.config.tile, recipe.augmentation, options.reading)
        listener.step(f"reading {len(split.validation)} validation masks")
        hidden = HiddenLabels()
        notes = check_dataset(split.validation, network.config.tile, options.reading)
        self.validation_pixels = _class_pixels(split.validation, schema, hidden)
        self.early_notes = [
            *([_RANDOM_AND_FROZEN] if recipe.frozen and source.startswith(PRESET_PREFIX) else []),
            *(f"training: {note}" for note in tiles.notes),
            *(f"validation: {note}" for note in (*hidden.notes(), *notes)),
        ]
        self.features = self._feature_cache(device) if recipe.frozen else None
        self.trainer = Trainer(network, tiles, recipe, self.features)
        file, digest = source, ""
        if not source.startswith(PRESET_PREFIX):
            file, digest = Path(source).name, sha256_of(weights_file(Path(source)))
        self.source_record = {"file": file, "sha256": digest, "layout": self.start.layout}
        weights = options.network.weights
        self.identity = {  # what must be the same in the run that resumes this one
            "recipe": dataclasses.asdict(recipe),
            "network": dataclasses.asdict(network.config),
            "source": digest or file,
            **({"weights": weights} if weights else {}),
            "classes": list(schema.class_names),
            "training images": [pair.name for pair in split.training],
            "validation images": [pair.name for pair in split.validation],
            "labelled pixels": tiles.class_pixels.tolist(),
            "reading": dataclasses.asdict(options.reading),
        }
        self._saved_state = time.perf_counter()
        self._started = (0, 0.0)  # step and time at which this process began to train
        if options.resume and state_path(output).exists():
            self.trainer.restore(load_state(output, self.identity, device))

    def finish(self) -> FinetuneResult:
        """Train the epochs that are left, then evaluate the written file."""
        trainer, listener, recipe = self.trainer, self.listener, self.options.recipe
        for note in self.early_notes:
            listener.note(note)
        self._started = (trainer.progress.step, time.perf_counter())
        while trainer.progress.epoch < recipe.epochs:
            loss = trainer.run_epoch(self._after_batch)
            progress = trainer.progress
            row: dict[str, Any] = {"epoch": progress.epoch, "loss": loss, "mean_iou": None}
            if progress.epoch % self.options.validate_every == 0 or progress.epoch == recipe.epochs:
                row |= self._validate()
            progress.history.append(row)
            listener.epoch(row, recipe.epochs, progress.best, self._seconds_left())
            self._save_state()
        listener.step("evaluating the written checkpoint")
        labeller, _ = load_network(self.output, device=str(trainer.device))
        evaluation = evaluate(labeller, self.split.validation, self.schema, options=self.options.reading)
        record = self._record(self._final_scores(evaluation), evaluation.tiles)
        self._write(labeller.network, record)
        state_path(self.output).unlink(missing_ok=True)
        return FinetuneResult(self.output, card_path(self.output), record, evaluation)

    def _final_scores(self, evaluation: Evaluation) -> dict[str, Any]:
        """Scores of the checkpoint, of the last epoch and of the colour rules, for the card."""
        progress = self.trainer.progress
        scores = {f"this checkpoint (epoch {progress.best_epoch})": scores_of(evaluation.matrix, self.schema)}
        if progress.best_epoch != progress.epoch:
            scores[f"epoch {progress.epoch}, the last"] = progress.history[-1]
        training, validation, reading = self.split.training, self.split.validation, self.options.reading
        rules = score_color_rules(training, validation, self.schema, options=reading, note=self.listener.step)
        return scores | {name: scores_of(matrix, self.schema) for name, matrix in rules.items()}

    def _validate(self) -> dict[str, Any]:
        """Score the network as it is; write it if it is the best so far."""
        trainer = self.trainer
        started = time.perf_counter()
        network, precision = trainer.trained_network(), self.options.recipe.precision
        file = FileRecord(self.output.name, "", 0)
        labeller = NetworkLabeller(network, self.schema, file, precision=precision, encode=self.features)
        self.listener.step("validating")
        evaluation = evaluate(labeller, self.split.validation, self.schema, options=self.options.reading)
        progress = trainer.progress
        progress.seconds += time.perf_counter() - started
        scores = scores_of(evaluation.matrix, self.schema)
        score = scores["mean_iou"]
        if progress.best is None or score > progress.best:
            progress.best, progress.best_epoch = score, progress.epoch
            self._write(network, self._record({f"epoch {progress.epoch}": scores}, evaluation.tiles))
        return scores

    def _write(self, network: Any, record: Mapping[str, Any]) -> None:
        dtype = torch.float16 if self.options.half else torch.float32
        save_checkpoint(network, self.output, schema=self.schema, training=record, dtype=dtype)
        write_text(card_path(self.output), card_text(self.output.name, record))

    def _after_batch(self) -> None:
        progress = self.trainer.progress
        self.listener.batch(progress.step, self.trainer.steps, self._seconds_left())
        # Also before every validation, which takes time and may write a checkpoint that needs a state beside it.
        if progress.batch == self.trainer.batches or time.perf_counter() - self._saved_state > _SAVE_STATE_EVERY_S:
            self._save_state()

    def _seconds_left(self) -> float:
        """By the pace since this process began to train, with validation."""
        first, since = self._started
        done = self.trainer.progress.step - first
        return (time.perf_counter() - since) / max(1, done) * (self.trainer.steps - self.trainer.progress.step)

    def _feature_cache(self, device: torch.device) -> FeatureCache:
        options, folder = self.options, None
        by_default = options.features is not None or device.type == "cpu"
        if options.recipe.views and (by_default if options.remember is None else options.remember):
            folder = options.features or self.output.with_name(f"{self.output.stem}.features")
            make_folders(folder)
        limit = int(_SHARE_OF_FREE_DISK * shutil.disk_usage(folder).free) if folder else 0
        return FeatureCache(self.start.network.encoder, folder, precision=options.recipe.precision, limit=limit)

    def _save_state(self) -> None:
        save_state(self.output, self.identity, self.trainer.state())
        self._saved_state = time.perf_counter()

    def _record(self, scores: Mapping[str, Any], validation_tiles: int) -> dict[str, Any]:
        """The training record that the checkpoint stores; JSON data."""
        split, tiles, progress, device = self.split, self.trainer.tiles, self.trainer.progress, self.trainer.device
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine().cpu
        notes = [*self.start.notes, *split.notes, *self.early_notes]
        notes += [f"training: {note}" for note in reading_notes(tiles.warnings)]
        for side, pixels in (("training", tiles.class_pixels), ("validation", self.validation_pixels)):
            if absent := absent_classes(self.schema, pixels):
                notes.append(f"no {side} pixel is {absent}")
        record = {
            "tool": f"cdkd-edge {__version__}",
            "command": self.options.command,
            "source": self.source_record,
            "network": self.identity["network"],
            "notes": notes,
            "recipe": self.identity["recipe"],
            "data": {
                "folder": split.training.folder.name,
                "layout": split.training.layout,
                "schema": self.schema.name,
                "rule": split.rule,
                "classes": list(self.schema.class_names),
                "training_tiles": len(tiles),
                "validation_tiles": validation_tiles,
                "training_scenes": list(split.training.scenes),
                "validation_scenes": list(split.validation.scenes),
                "training_pixels": tiles.class_pixels.tolist(),
                "validation_pixels": self.validation_pixels.tolist(),
            },
            "training_images": self.identity["training images"],
            "validation_images": self.identity["validation images"],
            "scores": dict(scores),
            "run": {
                "epochs_done": progress.epoch,
                "best_epoch": progress.best_epoch,
                "seconds": progress.seconds,
                "history": list(progress.history),
                "device": f"{machine}, {torch.get_num_threads()} threads" if device.type == "cpu" else machine,
                "libraries": f"torch {torch.__version__}",
                "tiles_encoded": self.features.misses if self.features else 0,
            },
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))  # lists, not tuples, in every kind of checkpoint
        return plain


def _find_data(source: str, data: Path, options: FinetuneOptions) -> tuple[Split, LabelSchema]:
    dataset = find_dataset(data)
    fallback = None
    if not (options.schema or dataset.schema_name) and not source.startswith(PRESET_PREFIX):
        fallback = load_encoder(source, **options.network.loading())[1].schema
    schema = data_schema(dataset, options.schema, fallback)
    sides = ("training_scenes", "validation_scenes", "training_list", "validation_list")
    return split_dataset(dataset, **{side: getattr(options, side) for side in sides}), schema


def _class_pixels(dataset: Dataset, schema: LabelSchema, hidden: HiddenLabels) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Labelled pixels by class; reading every mask also finds bad ones before hours are spent."""
    counts = np.zeros(256, np.int64)
    for pair in dataset:
        counts += np.bincount(read_labels(pair.mask, schema, hidden).ravel(), minlength=256)
    if not counts[: len(schema)].any():
        raise no_labels(f"the {len(dataset)} validation masks", hidden)
    return counts[: len(schema)]
