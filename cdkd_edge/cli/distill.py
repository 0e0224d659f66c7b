"""``cdkd-edge distill``: tiles without labels, a teacher and a student to a better student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typer import Argument, Option

from cdkd_edge.cli.finetune import LoopLines, live_training
from cdkd_edge.cli.options import DEVICE, JSON, WEIGHTS, ReadingOptions, command_line, require_package
from cdkd_edge.cli.progress import saying_what_is_kept
from cdkd_edge.cli.report import Report, Rows
from cdkd_edge.core.numbers import duration, percent, significant

if TYPE_CHECKING:
    from cdkd_edge.distillation.distill import DistillResult


class Method(str, Enum):
    """What a student learns from."""

    features = "features"


@dataclass(frozen=True)
class AlignOptions:
    """The fields of :class:`~cdkd_edge.distillation.align.AlignRecipe`."""

    PANEL: ClassVar[str] = "Recipe"

    steps: int = Option(1000, help="Steps.")
    batch: int = Option(2, help="Tiles per step.")
    learning_rate: float = Option(1e-5, "--lr", help="AdamW's learning rate.")
    weight_decay: float = Option(0.01, help="AdamW's weight decay.")
    schedule: str = Option("cosine", help="Course of the learning rate: constant, cosine or poly.")
    warm_up: int = Option(50, help="Steps over which the learning rate rises to its value.")
    clip_norm: float = Option(1.0, help="Largest norm of the gradient; 0: no limit.")
    mean_decay: float = Option(0.0, help="Save a running mean of the weights with this decay, e.g. 0.99; 0: no mean.")
    logits: float = Option(1.0, help="Weight of the class probabilities, through the heads; 0: features alone.")
    precision: str = Option("bf16", help="What PyTorch computes in: fp32, bf16 or fp16.")
    seed: int = Option(0, help="The same seed on the same machine gives the same weights.")


@dataclass(frozen=True)
class AlignViewOptions:
    """How tiles are varied."""

    PANEL: ClassVar[str] = "Views of a tile"

    views: int = Option(0, help="Fixed views of a tile (8: all turns and mirrorings); 0: new random ones each epoch.")
    no_flips: bool = Option(False, help="Do not turn or mirror tiles.")
    scale: tuple[float, float] = Option((0.7, 1.4), help="Range of random scaling.", metavar="LOW HIGH")
    light: float = Option(0.2, help="Strength of random changes of gamma, gain and tint, 0 to 1.")


def distill(
    tiles: list[str] = Argument(
        ..., help="Images without labels: files, .tar shards, folders, patterns in quotes, or @LIST."
    ),
    *,
    teacher: Path = Option(..., help="Checkpoint whose features are learned; it stays as it is."),
    student: Path = Option(..., help="Checkpoint that learns them; its head stays as it is."),
    output: Path = Option(..., "--output", "-o", help="The checkpoint (.pt, .pth, .safetensors)."),
    method: Method = Option(Method.features, help="What is learned: the teacher's feature maps.", metavar="NAME"),
    tile: int | None = Option(None, help="Side of the tiles to train on, px. Default: the student's.", min=1),
    exclude: list[str] | None = Option(
        None, help="Evaluation set whose images must not be used: folder, or list (.txt). Repeatable.", metavar="SET"
    ),
    recipe: AlignOptions,
    views: AlignViewOptions,
    device: str = DEVICE,
    weights: str | None = WEIGHTS,
    reading: ReadingOptions,
    resume: bool = Option(False, help="Continue a run that was interrupted."),
    overwrite: bool = Option(False, help="Replace an existing checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Train a student on a teacher's features, without labels. Writes a checkpoint and its card."""
    require_package("torch", "export", "training")
    from cdkd_edge.distillation.align import AlignRecipe
    from cdkd_edge.distillation.distill import DistillOptions
    from cdkd_edge.distillation.distill import distill as train
    from cdkd_edge.training.files import interruption_notice
    from cdkd_edge.training.views import Augmentation

    augmentation = Augmentation(not views.no_flips, views.scale, views.light)
    options = DistillOptions(
        recipe=AlignRecipe(**asdict(recipe), views=views.views, augmentation=augmentation),
        tile=tile,
        exclude=tuple(exclude or ()),
        reading=reading.segment_options(),
        device=device,
        weights=weights,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    with saying_what_is_kept(lambda: interruption_notice(output)), live_training(_Lines) as listener:
        result = train(tiles, teacher, student, output, options, listener)
    _describe(result).show(as_json)


class _Lines(LoopLines):
    def row(self, row: Mapping[str, Any], steps: int, seconds_left: float) -> None:
        """A part of the run ended."""
        left = f"  {duration(seconds_left)} left" if row["step"] < steps else ""
        self.console.print_line(f"step {row['step']}/{steps}  loss {significant(row['loss'], 4)}{left}")


def _describe(result: DistillResult) -> Report:
    record = result.record
    before, after, run = record["before"], record["after"], record["run"]

    def change(name: str) -> str:
        return f"{significant(before[name], 4)} before, {significant(after[name], 4)} after"

    missed = zip(before["missed"], after["missed"], strict=True)
    rows: Rows = [
        *(("note", note) for note in record["notes"]),
        *((folder["name"], folder["text"]) for folder in record["imagery"]),
        ("loss", change("loss")),
        ("missed, by map", "   ".join(f"{a:.3f} > {b:.3f}" for a, b in missed)),
    ]
    if "agreement" in before:
        same = f"{percent(before['agreement'], 2)} before, {percent(after['agreement'], 2)} after"
        rows += [("divergence", change("divergence")), ("teacher's label", f"{same} (of the cells)")]
    rows += [
        ("time", f"{duration(run['seconds'])} on {run['device']}"),
        ("card", str(result.card)),
        ("next", f"cdkd-edge finetune {result.checkpoint} --data DATA tunes the decoder"),
    ]
    data = {"path": result.checkpoint, "card": result.card, "distilled": dict(record)}
    return Report(f"checkpoint {result.checkpoint}", rows, data)
