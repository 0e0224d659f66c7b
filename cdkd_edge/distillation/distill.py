"""``cdkd-edge distill``: from tiles without labels, and a teacher, to a student (torch).

The state of the run lies beside the output until the run is finished. A run that was killed resumes from it and ends as
it would have ended. The measures of the steps are a table beside the output.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cdkd_edge import __version__
from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.files import write_text
from cdkd_edge.core.machine import describe_machine
from cdkd_edge.core.signals import HeldSignals
from cdkd_edge.distillation.card import card_text
from cdkd_edge.distillation.distiller import Distiller
from cdkd_edge.distillation.metrics_log import MetricsLog, curves_path, log_path, read_log, write_curves
from cdkd_edge.distillation.networks import LOSSES, Distillation, Network, encoder_of
from cdkd_edge.distillation.pictures import pictures_path, write_reconstructions
from cdkd_edge.distillation.probe import LinearProbe
from cdkd_edge.distillation.recipe import FEATURES, MAE, DistillOptions, DistillRecipe
from cdkd_edge.distillation.teacher import load_network, load_student, load_teacher, source_record
from cdkd_edge.distillation.tiles import SceneTiles
from cdkd_edge.model.checkpoint import CheckpointReport, save_checkpoint
from cdkd_edge.model.device import chosen_precision
from cdkd_edge.quality.datasets import find_dataset, split_dataset
from cdkd_edge.quality.evaluate import data_schema
from cdkd_edge.training.files import card_path, load_state, require_free, save_state, state_path
from cdkd_edge.training.ranks import join_ranks, leave_ranks

_SAVE_STATE_EVERY_S = 120.0
_ROWS = 20  # of the history in the card
_PICTURES = 4  # tiles in the picture of reconstructions


class DistillListener(Protocol):
    """Receives the progress of a run."""

    def step(self, text: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something to know before hours are spent."""

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many steps of the run are done."""

    def row(self, row: Mapping[str, Any], steps: int, seconds_left: float | None) -> None:
        """A part of the run ended; ``row`` as in the history of the card."""


@dataclass(frozen=True)
class DistillResult:
    """A finished run."""

    checkpoint: Path
    card: Path
    record: Mapping[str, Any]
    best: Path | None = None  # the student at its best, if that is not the last


def best_path(output: Path) -> Path:
    """Where the student at its best is kept."""
    return output.with_name(f"{output.stem}.best{output.suffix}")


def distill(
    tiles: Sequence[str],
    teacher: Path | None,
    student: str | Path,
    output: Path,
    options: DistillOptions,
    listener: DistillListener,
) -> DistillResult | None:
    """Train a student's encoder on tiles without labels.

    Args:
        tiles: see :class:`.tiles.SceneTiles`; no labels.
        teacher: a file of :func:`.teacher.load_teacher`. None for method ``mae``.
        student: a checkpoint of any known layout, whose head stays as it is; or ``preset:NAME`` for random weights.
        output: the trained student; card, table and pictures go beside it.
        options, listener: see there.

    Returns:
        None in processes of ``torchrun`` that write no files.

    Raises:
        SceneError, CheckpointError: tiles or networks cannot be used.
        UsageError, NumericalCheckError: the output exists, a state belongs to another run; the loss is not finite.
    """
    if (teacher is None) != (options.recipe.method == MAE):
        raise UsageError(
            "method mae has no teacher" if teacher else f"method {options.recipe.method} needs a --teacher"
        )
    if options.probe is None and (options.schema or options.probe_scenes or options.probe_list):
        raise UsageError("schema and validation images are for a linear probe", hint="--probe DATA names its images")
    for source in filter(None, (str(student), str(teacher or ""))):
        require_free(source, output, resume=options.resume, overwrite=options.overwrite, others=(best_path(output),))
    try:
        run = _Distilling(tiles, teacher, str(student), output, options, listener)
        if not options.resume and run.ranks.writes:  # only now: tiles and networks have proved to be usable
            for path in (state_path(output), best_path(output)):
                path.unlink(missing_ok=True)
        return run.finish()
    finally:
        leave_ranks()


class _Distilling:
    """One run, from the tiles to the card."""

    def __init__(
        self,
        tiles: Sequence[str],
        teacher: Path | None,
        student: str,
        output: Path,
        options: DistillOptions,
        listener: DistillListener,
    ) -> None:
        self.output, self.options, self.listener = output, options, listener
        self.ranks, device = join_ranks(options.device)
        listener.step("loading the networks")
        recipe = options.recipe
        self.student, self.report = load_student(student, options.tile, options.recipe.seed, options.weights)
        tile = options.tile or self.student.config.tile
        self.resized = tile != self.student.config.tile
        # What is saved lies apart from what is trained. It keeps its tile, and its position embedding.
        apart = copy.deepcopy(self.student)
        if self.resized:
            apart, _ = load_network(Path(student), weights=options.weights, tile=tile)
        guide, about_teacher = None, None
        if teacher is not None:
            reading = {name: getattr(options, name) for name in ("heads", "layer_norm_eps", "weights")}
            with_head = recipe.method == FEATURES and recipe.logits > 0
            guide, about_teacher = load_teacher(
                teacher, tile, patch=options.teacher_patch or apart.config.patch, with_head=with_head, **reading
            )
            guide = guide.to(device)
        recipe = dataclasses.replace(recipe, precision=chosen_precision(recipe.precision, device))
        if recipe.projection == "auto":
            recipe = dataclasses.replace(recipe, projection=_projection(recipe, self.report, apart, guide))
        listener.step("looking at the images")
        self.tiles = SceneTiles(
            tiles,
            tile,
            recipe.augmentation,
            options.reading,
            exclude=options.exclude,
            progress=lambda done, total: listener.step(f"looking at the images: {done:,} of {total:,}"),
            note=listener.note,
        )
        self.probe = self._find_probe(tile) if options.probe is not None and self.ranks.writes else None
        torch.manual_seed(recipe.seed)  # of adapters, projections and reconstructions
        recompute = device.type == "cuda" if options.recompute is None else options.recompute
        networks = Distillation(apart, guide, recipe, position=not self.resized, recompute=recompute).to(device)
        self.distiller = Distiller(networks, self.tiles, recipe, ranks=self.ranks, workers=options.workers)
        self.sources = {"student": source_record(student, self.report)}
        if teacher is not None:
            self.sources["teacher"] = source_record(str(teacher), about_teacher)
        self.notes: list[str] = []
        for role, report in (("teacher", about_teacher), ("student", self.report)):
            self.notes += [f"{role}: {note}" for note in report.notes] if report is not None else []
        if self.resized:
            self.notes.append(
                f"trained on tiles of {tile} px, used with {self.student.config.tile} px: its position embedding stays "
                "as it is"
            )
        self.identity = {  # what must be the same in the run that resumes this one
            "recipe": dataclasses.asdict(recipe),
            "processes": self.ranks.size,
            "network": dataclasses.asdict(apart.config),
            **{role: source["sha256"] or source["file"] for role, source in self.sources.items()},
            "teacher's settings": {
                name: getattr(options, name) for name in ("teacher_patch", "heads", "layer_norm_eps", "weights")
            },
            "images": self.tiles.imagery.digest,
            "excluded images": [Path(name).name for name in options.exclude],
            "reading": dataclasses.asdict(options.reading),
            "probe": options.probe_identity,
        }
        self._saved_state = time.perf_counter()
        self.kept: dict[str, Any] = {"before": {}, "rows": [], "sums": {}, "noted": {}}  # of the state, besides weights
        if options.resume and state_path(output).exists():
            state = load_state(output, self.identity, device)
            self.kept = state.pop("kept")
            self.distiller.restore(state)
        self.ranks.require_same(json.dumps(self.identity), "options, networks and images", device)
        self.ranks.require_same(str(self.distiller.progress.step), "state to resume from", device)
        self._started = (self.distiller.progress.step, 0.0)  # step and time at which this process began to train
        self.log: MetricsLog | None = None
        self.signals = HeldSignals()

    def _find_probe(self, tile: int) -> LinearProbe:
        options = self.options
        assert options.probe is not None
        self.listener.step("reading the probe's masks")
        dataset = find_dataset(options.probe)
        split = split_dataset(dataset, validation_scenes=options.probe_scenes, validation_list=options.probe_list)
        return LinearProbe(split, data_schema(dataset, options.schema, None), tile, options.reading)

    def finish(self) -> DistillResult | None:
        """Train the steps that are left, compare, and write the student."""
        distiller, listener, output = self.distiller, self.listener, self.output
        progress, writes = distiller.progress, self.ranks.writes
        for note in [*self.tiles.notes, *self.notes]:
            listener.note(note)
        if not progress.step:
            listener.step("measuring the teacher's features")
            distiller.measure_teacher()
            if writes:
                self.kept["before"] = self._compare()
        if writes:  # only now: tiles that cannot be used leave no file
            self.log = MetricsLog(log_path(output), len(distiller.networks.pairs), progress.step)
        if progress.step and writes and self._row_is_due():  # the run was interrupted while it compared
            self._row()
        self._started = (progress.step, time.perf_counter())
        with self.signals:  # an interrupted step could not be resumed
            while progress.step < distiller.steps:
                distiller.run_epoch(self._after_step)
        if not writes:
            return None
        assert self.log is not None
        self.log.flush()
        write_curves(read_log(self.log.path), distiller.schedule.transitions, curves_path(output))
        if distiller.recipe.masked:
            self._draw()
        record = self._record()
        self._write(output, record)
        write_text(card_path(output), card_text(output.name, record))
        if progress.best_epoch == progress.step:
            best_path(output).unlink(missing_ok=True)
        state_path(output).unlink(missing_ok=True)
        best = best_path(output) if best_path(output).exists() else None
        return DistillResult(output, card_path(output), record, best)

    def _compare(self) -> dict[str, Any]:
        """The student as it would be saved on the tiles kept out, and on the probe's images."""
        started, distiller = time.perf_counter(), self.distiller
        self.listener.step("comparing")
        found = distiller.compare()
        if self.probe is not None:
            self.listener.step("probing")
            with distiller.saved_weights():
                encoder = encoder_of(distiller.networks.student)
                found["probe"] = self.probe.score(encoder, distiller.device, distiller.recipe.precision)
        distiller.progress.seconds += time.perf_counter() - started
        return found

    def _after_step(self) -> None:
        distiller, kept = self.distiller, self.kept
        if self.log is not None:
            measures = distiller.log_row()
            self.log.add(measures)
            for name in ("loss", *LOSSES):
                kept["sums"][name] = kept["sums"].get(name, 0.0) + measures[name]
            kept["sums"]["steps"] = kept["sums"].get("steps", 0) + 1
            # Also before every comparison, which takes time and may write a checkpoint that needs a state beside it.
            if self._row_is_due() or time.perf_counter() - self._saved_state > _SAVE_STATE_EVERY_S:
                self._save_state()
        self._let_signals_through()
        if self.log is not None and self._row_is_due():
            self._row()
        self.signals.holding = True

    def _let_signals_through(self) -> None:
        """Show the progress; where a process has got a signal, save the state, and end in all of them."""
        distiller = self.distiller
        got_one = torch.tensor(float(self.signals.waiting), device=distiller.device)
        stopping = bool(self.ranks.mean(got_one) > 0)
        try:
            self.listener.batch(distiller.progress.step, distiller.steps, self._seconds_left())
            self.signals.release()
            if stopping:  # another process got it
                raise KeyboardInterrupt
        except (KeyboardInterrupt, SystemExit):
            self._save_state()
            raise

    def _row_is_due(self) -> bool:
        """Whether the history lacks a row for this step; there are up to :data:`_ROWS`, evenly spaced."""
        step, steps, rows = self.distiller.progress.step, self.distiller.steps, self.kept["rows"]
        ends_part = step * _ROWS // steps > (step - 1) * _ROWS // steps
        return ends_part and not (rows and rows[-1]["step"] == step)

    def _row(self) -> None:
        """Add a row to the history: mean losses since the last one, and the student on the tiles kept out."""
        distiller, sums = self.distiller, self.kept["sums"]
        means = {name: sums[name] / sums["steps"] for name in ("loss", *LOSSES)}
        row = {"step": distiller.progress.step, **means}
        if distiller.scheduled:
            row |= {"ratio": distiller.schedule.ratio, "stage": distiller.schedule.stage}
        row["check"] = self._compare()
        self.kept["sums"] = {}
        self.kept["rows"].append(row)
        for name, text in distiller.oddities(self.kept["before"], row["check"]).items():
            if self.kept["noted"].setdefault(name, text) is text:
                self.listener.note(text)
        self._keep_if_best(row["check"])
        self.listener.row(row, distiller.steps, self._seconds_left())

    def _keep_if_best(self, check: Mapping[str, Any]) -> None:
        """By the probe if there is one, else by what is left to learn on the tiles kept out."""
        score = check["probe"]["mean_iou"] if "probe" in check else -check[_left_to_learn(self.distiller.recipe)]
        progress = self.distiller.progress
        if progress.best is None or score > progress.best:
            progress.best, progress.best_epoch = score, progress.step
            if progress.step < self.distiller.steps:
                self._write(best_path(self.output), self._record())

    def _draw(self) -> None:
        networks = self.distiller.networks
        shown = [pair for pair, _ in zip(self.distiller.plain(self.distiller.check), range(_PICTURES), strict=False)]
        tiles, visible = (torch.cat(part) for part in zip(*shown, strict=True))
        with self.distiller.saved_weights():
            write_reconstructions(networks, tiles, visible, pictures_path(self.output))

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        """Save the student as it is now, its running mean if there is one."""
        trained = self.distiller.trained_module().state_dict()
        weights = {key: value for key, value in trained.items() if key != "pos_embed" or not self.resized}
        encoder_of(self.student).load_state_dict(weights, strict=not self.resized)
        before = self.report.training if self.report is not None else {}
        schema = self.report.schema if self.report is not None else None
        save_checkpoint(self.student, path, schema=schema, training={**before, "distilled": record})

    def _save_state(self) -> None:
        if self.ranks.writes:
            assert self.log is not None
            self.log.flush()
            save_state(self.output, self.identity, {**self.distiller.state(), "kept": self.kept})
            self._saved_state = time.perf_counter()

    def _seconds_left(self) -> float | None:
        """By the pace since this process began to train; None before its first step."""
        first, since = self._started
        step = self.distiller.progress.step
        if step == first:
            return None
        return (time.perf_counter() - since) / (step - first) * (self.distiller.steps - step)

    def _record(self) -> dict[str, Any]:
        """What the checkpoint stores about the run; JSON data."""
        distiller, device = self.distiller, self.distiller.device
        progress = distiller.progress
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine().cpu
        record = {
            "tool": f"cdkd-edge {__version__}",
            "command": self.options.command,
            "method": distiller.recipe.method,
            **self.sources,
            "network": dataclasses.asdict(self.student.config),
            "notes": [*self.tiles.notes, *self.notes, *self.kept["noted"].values()],
            "recipe": {
                **dataclasses.asdict(distiller.recipe), "tile": self.tiles.tile, "pairs": distiller.networks.pairs,
            },
            "imagery": [{**vars(one), "text": one.text} for one in self.tiles.imagery.report()],
            "skipped": self.tiles.skipped,
            "training_tiles": distiller.places,
            "check_tiles": len(distiller.check),
            "before": self.kept["before"],
            "after": self.kept["rows"][-1]["check"],
            "transitions": distiller.schedule.transitions,
            "run": {
                "steps": progress.step,
                "of": distiller.steps,
                "best_step": progress.best_epoch,
                "seconds": progress.seconds,
                "history": self.kept["rows"],
                "device": f"{machine}, {torch.get_num_threads()} threads" if device.type == "cpu" else machine,
                "processes": self.ranks.size,
                "libraries": f"torch {torch.__version__}",
            },
        }  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(record))  # lists, not tuples, in every kind of checkpoint
        return plain


def _left_to_learn(recipe: DistillRecipe) -> str:
    return "student_pixels" if recipe.method == MAE else "distillation"


def _projection(recipe: DistillRecipe, report: CheckpointReport | None, student: Network, teacher: Any) -> str:
    """``none`` if a student that was trained before can give the same features as its teacher."""
    same = teacher is not None and teacher.config.embed_dim == student.config.embed_dim
    return "none" if recipe.method == FEATURES and report is not None and same else "linear"
