"""``cdkd-edge distill``: tiles without labels, a teacher and a student to a better student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typer import Argument, BadParameter, Option

from cdkd_edge.cli.finetune import LoopLines, live_training
from cdkd_edge.cli.options import (
    DEVICE,
    HEADS,
    JSON,
    NORM_EPS,
    SCHEMA,
    WEIGHTS,
    ReadingOptions,
    command_line,
    require_package,
    split_names,
)
from cdkd_edge.cli.progress import saying_what_is_kept
from cdkd_edge.cli.report import Report, Rows
from cdkd_edge.core.numbers import duration, percent, significant

if TYPE_CHECKING:
    from cdkd_edge.distillation.distill import DistillResult


@dataclass(frozen=True)
class MethodOptions:
    """The fields of :class:`~cdkd_edge.distillation.recipe.DistillRecipe` about the method."""

    PANEL: ClassVar[str] = "Method (defaults: the paper's)"

    method: str = Option(
        "masked",
        help="masked: reconstruct hidden patches and learn the teacher's features. features: the features alone, of "
        "whole tiles. mae: reconstruct alone, without a teacher.",
        metavar="NAME",
    )
    adapters: str = Option("multiscale", help="What the teacher may change: multiscale adapters, or none.")
    gate: str = Option("identity", help="How adapters start: identity, so that the teacher is as it was; or convex.")
    feedback: str = Option("both", help="What the teacher's features train: both networks, or the student.")
    mask: str = Option("cells", help="Visible patches: one drawn in each cell (cells), or the same in all (grid).")
    cell: int = Option(2, help="Side of a cell in patches: 2 hides 75 % of a tile, 3 hides 89 %.")
    pairs: str = Option(
        "", help="Blocks of teacher and student, e.g. 6:3,12:6,18:9. Default: at their quarters.", metavar="T:S,..."
    )
    projection: str = Option(
        "auto",
        help="linear: features are compared through a linear layer. none: they have to agree. auto: none where a "
        "trained student is as wide as its teacher.",
    )
    target: str = Option("standardized", help="The teacher's features: standardized by channel, or raw.")
    pixels: str = Option("normalized", help="What is reconstructed: normalized pixels, or by patch, or raw.")
    decoder_width: int = Option(0, help="Width of the reconstructing blocks. Default: that of the encoder.")
    decoder_depth: int = Option(4, help="Number of reconstructing blocks.")
    loss_weights: str = Option(
        "", help="Fixed weights of features, teacher's and student's pixels, e.g. .6,.2,.2. Default: in three stages."
    )
    logits: float = Option(1.0, help="Weight of class probabilities, if both have heads; method features.")


@dataclass(frozen=True)
class LoopOptions:
    """The fields of :class:`~cdkd_edge.distillation.recipe.DistillRecipe` about training."""

    PANEL: ClassVar[str] = "Recipe (defaults: the paper's)"

    epochs: int = Option(120, help="Passes over the tiles.")
    steps: int = Option(0, help="Steps. Default: those of the epochs.")
    batch: int = Option(4, help="Tiles per process and pass.")
    accumulate: int = Option(1, help="Passes per step.")
    learning_rate: float = Option(
        1e-5, "--lr", help="AdamW's learning rate for 4 tiles a step; in proportion for more."
    )
    weight_decay: float = Option(0.01, help="AdamW's weight decay.")
    schedule: str = Option("constant", help="Course of the learning rate: constant, cosine or poly.")
    warm_up: int = Option(0, help="Steps over which the learning rate rises to its value.")
    clip_norm: float = Option(1.0, help="Largest norm of the gradient; 0: no limit.")
    mean_decay: float = Option(0.0, help="Save a running mean of the weights with this decay, e.g. 0.99; 0: no mean.")
    precision: str = Option(
        "auto", help="What PyTorch computes in: fp32, bf16 or fp16. auto: bf16 where there are instructions for it."
    )
    seed: int = Option(0, help="The same seed on the same machine gives the same weights.")


@dataclass(frozen=True)
class DistillViewOptions:
    """How tiles are varied."""

    PANEL: ClassVar[str] = "Views of a tile"

    views: int = Option(0, help="Fixed views of a tile (8: all turns and mirrorings); 0: new random ones each epoch.")
    no_flips: bool = Option(False, help="Do not turn or mirror tiles.")
    scale: tuple[float, float] = Option((0.7, 1.4), help="Range of random scaling.", metavar="LOW HIGH")
    light: float = Option(0.2, help="Strength of random changes of gamma, gain and tint, 0 to 1.")


@dataclass(frozen=True)
class ProbeOptions:
    """Whether and on what a linear probe is scored while the student is trained."""

    PANEL: ClassVar[str] = "Linear probe"

    probe: Path | None = Option(None, help="Labelled images; a linear layer on the student's features is scored.")
    schema: str | None = SCHEMA
    val_scenes: str | None = Option(None, help="Score on these scenes; the layer learns on the others.", metavar="A,B")
    val_list: Path | None = Option(None, help="Score on the images that this text file names, one per line.")


@dataclass(frozen=True)
class TeacherOptions:
    """What the teacher's file does not say."""

    PANEL: ClassVar[str] = "Teacher"

    teacher_patch: int | None = Option(
        None, help="Resample the teacher's patches to this side, px. Default: the student's.", min=1
    )
    heads: int | None = HEADS
    layer_norm_eps: float | None = NORM_EPS
    recompute: bool | None = Option(
        None,
        "--recompute/--no-recompute",
        help="Compute the teacher's blocks twice, which saves memory. Default: on a GPU.",
    )


def distill(
    tiles: list[str] = Argument(
        ..., help="Images without labels: files, .tar shards, folders, patterns in quotes, or @LIST."
    ),
    *,
    teacher: Path | None = Option(None, help="SAM, or any encoder that can be loaded; it stays as it is."),
    student: str = Option("preset:paper", help="What is trained: a checkpoint, or preset:paper, tiny."),
    output: Path = Option(..., "--output", "-o", help="The checkpoint (.pt, .pth, .safetensors)."),
    tile: int | None = Option(None, help="Side of the tiles to train on, px. Default: the student's.", min=1),
    exclude: list[str] | None = Option(
        None, help="Evaluation set whose images must not be used: folder, or list (.txt). Repeatable.", metavar="SET"
    ),
    method: MethodOptions,
    loop: LoopOptions,
    views: DistillViewOptions,
    about: TeacherOptions,
    probe: ProbeOptions,
    device: str = DEVICE,
    workers: int = Option(2, help="Threads that read tiles.", min=1),
    weights: str | None = WEIGHTS,
    reading: ReadingOptions,
    resume: bool = Option(False, help="Continue a run that was interrupted."),
    overwrite: bool = Option(False, help="Replace an existing checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Train a student on tiles without labels, with the features of a teacher. Writes a checkpoint and its card.

    On several GPUs or machines: torchrun --nproc-per-node N -m cdkd_edge distill ...
    """
    require_package("torch", "export", "training")
    from cdkd_edge.distillation.distill import best_path
    from cdkd_edge.distillation.distill import distill as train
    from cdkd_edge.distillation.recipe import DistillOptions, DistillRecipe
    from cdkd_edge.training.files import interruption_notice
    from cdkd_edge.training.ranks import this_process_writes
    from cdkd_edge.training.views import Augmentation

    if method.adapters not in ("multiscale", "none"):
        raise BadParameter("multiscale or none", param_hint="--adapters")
    given = asdict(method) | {
        "adapters": method.adapters == "multiscale",
        "pairs": _pairs(method.pairs),
        "loss_weights": _numbers(method.loss_weights),
    }
    augmentation = Augmentation(not views.no_flips, views.scale, views.light)
    options = DistillOptions(
        recipe=DistillRecipe(**asdict(loop), **given, views=views.views, augmentation=augmentation),
        tile=tile,
        exclude=tuple(exclude or ()),
        **asdict(about),
        reading=reading.segment_options(),
        probe=probe.probe,
        schema=probe.schema,
        probe_scenes=split_names(probe.val_scenes),
        probe_list=probe.val_list,
        device=device,
        workers=workers,
        weights=weights,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    quiet = not this_process_writes()
    with (
        saying_what_is_kept(lambda: interruption_notice(output, best_path(output)), quiet=quiet),
        live_training(_Lines, quiet=quiet) as listener,
    ):
        result = train(tiles, teacher, student, output, options, listener)
    if result is not None:
        _describe(result).show(as_json)


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for part in filter(None, text.split(",")):
        first, colon, second = part.partition(":")
        if not (colon and first.strip().isdecimal() and second.strip().isdecimal()):
            raise BadParameter("blocks of teacher and student, counted from 1: 6:3,12:6,18:9", param_hint="--pairs")
        pairs.append((int(first), int(second)))
    return tuple(pairs)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in filter(None, text.split(",")))
    except ValueError:
        raise BadParameter("three numbers with commas, e.g. .6,.2,.2", param_hint="--loss-weights") from None


class _Lines(LoopLines):
    def row(self, row: Mapping[str, Any], steps: int, seconds_left: float | None) -> None:
        """A part of the run ended."""
        parts = [f"step {row['step']}/{steps}", f"loss {significant(row['loss'], 4)}"]
        if "stage" in row:
            parts.append(f"stage {row['stage']}, ratio {row['ratio']:.3f}")
        if "probe" in row["check"]:
            parts.append(f"probe mIoU {percent(row['check']['probe']['mean_iou'], 2)}")
        if row["step"] < steps and seconds_left is not None:
            parts.append(f"{duration(seconds_left)} left")
        self.console.print_line("  ".join(parts))


def _describe(result: DistillResult) -> Report:
    from cdkd_edge.distillation.card import measure_rows

    record = result.record
    run = record["run"]
    rows: Rows = [
        *(("note", note) for note in record["notes"]),
        *((folder["name"], folder["text"]) for folder in record["imagery"]),
        *((name, f"{before} before, {after} after") for name, before, after in measure_rows(record)),
        *(("stage", f"{one['stage']} from step {one['step']} on") for one in record["transitions"]),
        ("time", f"{duration(run['seconds'])} on {run['device']}"),
        ("card", str(result.card)),
        *([("best", f"{result.best}, step {run['best_step']}")] if result.best else []),
        ("next", f"cdkd-edge finetune {result.checkpoint} --data DATA tunes the decoder"),
    ]
    data = {"path": result.checkpoint, "card": result.card, "best": result.best, "distilled": dict(record)}
    return Report(f"checkpoint {result.checkpoint}", rows, data)
