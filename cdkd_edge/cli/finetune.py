"""``cdkd-edge finetune``: an encoder and labelled images to a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from typer import Argument, Option

from cdkd_edge.cli.options import (
    DATA,
    HEADS,
    JSON,
    NORM_EPS,
    POOL_SCALES,
    SCHEMA,
    TAPS,
    ReadingOptions,
    TorchOptions,
    command_line,
    require_package,
    split_names,
)
from cdkd_edge.cli.progress import bar, lines, saying_what_is_kept
from cdkd_edge.cli.report import Console, Report, Rows
from cdkd_edge.core.numbers import duration, percent, significant

if TYPE_CHECKING:
    from cdkd_edge.training.finetune import FinetuneResult

_Listener = TypeVar("_Listener", bound="LoopLines")


@dataclass(frozen=True)
class SplitOptions:
    """Which images validate, and which train."""

    PANEL: ClassVar[str] = "What is validated on"

    val_scenes: str | None = Option(None, help="Validate on these scenes and train on the others.", metavar="A,B")
    train_scenes: str | None = Option(None, help="Train on these scenes. Default: all others.", metavar="A,B")
    val_list: Path | None = Option(None, help="Validate on the images that this text file names, one per line.")
    train_list: Path | None = Option(None, help="Train on the images that this text file names. Default: all others.")
    validate_every: int = Option(1, help="Epochs between validations.", min=1)


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of :class:`~cdkd_edge.training.recipe.Recipe` about training."""

    PANEL: ClassVar[str] = "Recipe (defaults: the paper's)"

    epochs: int = Option(30, help="Passes over the data.")
    batch: int = Option(4, help="Crops per step.")
    learning_rate: float = Option(1e-4, "--lr", help="AdamW's learning rate for the head.")
    weight_decay: float = Option(0.01, help="AdamW's weight decay.")
    encoder_learning_rate: float = Option(0.0, "--encoder-lr", help="Learning rate of the encoder; 0 freezes it.")
    schedule: str = Option("constant", help="Course of the learning rate: constant, cosine or poly.")
    warm_up: int = Option(0, help="Steps over which the learning rate rises to its value.")
    clip_norm: float = Option(0.0, help="Largest norm of the gradient; 0: no limit.")
    mean_decay: float = Option(0.0, help="Save a running mean of the weights with this decay, e.g. 0.99; 0: no mean.")
    class_weights: str = Option("none", help="Class weights in the loss: none, sqrt, balanced, or numbers with commas.")
    seed: int = Option(0, help="The same seed on the same machine gives the same weights.")


@dataclass(frozen=True)
class ViewOptions:
    """How crops are varied."""

    PANEL: ClassVar[str] = "Views of a crop"

    views: int = Option(8, help="Fixed views of a crop (8: all turns and mirrorings); 0: new random ones each epoch.")
    no_flips: bool = Option(False, help="Do not turn or mirror crops.")
    scale: tuple[float, float] = Option((1.0, 1.0), help="Range of random scaling, e.g. 0.5 2.", metavar="LOW HIGH")
    light: float = Option(0.0, help="Strength of random changes of gamma, gain and tint, 0 to 1.")
    texture: float = Option(0.0, help="Strength of random grain in patches (waves, glint), 0 to 1.")


@dataclass(frozen=True)
class NetworkOptions:
    """The fields of :class:`~cdkd_edge.training.recipe.NetworkSettings`, but for the weights."""

    PANEL: ClassVar[str] = "Network"

    tile: int | None = Option(
        None, help="Side of tiles, px. Default: that of a network or a distilled encoder, else 1024.", min=1
    )
    patch: int | None = Option(
        None, help="Side of a patch, px. Default: the encoder's, or 16 if that does not divide the tile.", min=1
    )
    heads: int | None = HEADS
    layer_norm_eps: float | None = NORM_EPS
    taps: str | None = TAPS
    pool_scales: str | None = POOL_SCALES
    head_channels: int | None = Option(None, help="Channels of a new head. Default: those of the old, or 256.", min=1)
    new_head: bool = Option(False, help="Replace the checkpoint's head.")


@dataclass(frozen=True)
class FeatureOptions:
    """Where the features of a frozen encoder are stored."""

    PANEL: ClassVar[str] = "Features of a frozen encoder"

    features: Path | None = Option(None, help="Folder for features. Default: beside the output.", file_okay=False)
    remember: bool | None = Option(
        None, "--remember/--no-remember", help="Store the features of fixed views on disk. Default: only on a CPU."
    )


def finetune(
    source: str = Argument(
        ..., metavar="ENCODER|CKPT", help="Encoder or whole network; or preset:paper, paper-fast, tiny."
    ),
    *,
    data: Path = DATA,
    output: Path = Option(..., "--output", "-o", help="The checkpoint (.pt, .pth, .safetensors)."),
    schema: str | None = SCHEMA,
    split: SplitOptions,
    recipe: RecipeOptions,
    views: ViewOptions,
    network: NetworkOptions,
    torch: TorchOptions,
    features: FeatureOptions,
    reading: ReadingOptions,
    half: bool = Option(False, help="Store weights as float16."),
    resume: bool = Option(False, help="Continue a run that was interrupted."),
    overwrite: bool = Option(False, help="Replace an existing checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Train a decoder on labelled images, by the paper's protocol. Writes a checkpoint and its model card."""
    require_package("torch", "export", "training")
    from cdkd_edge.training.files import interruption_notice
    from cdkd_edge.training.finetune import FinetuneOptions
    from cdkd_edge.training.finetune import finetune as train
    from cdkd_edge.training.recipe import NetworkSettings, Recipe
    from cdkd_edge.training.views import Augmentation

    augmentation = Augmentation(not views.no_flips, views.scale, views.light, views.texture)
    options = FinetuneOptions(
        recipe=Recipe(
            **dataclasses.asdict(recipe), views=views.views, augmentation=augmentation, precision=torch.precision
        ),
        network=NetworkSettings(**dataclasses.asdict(network), weights=torch.weights),
        schema=schema,
        training_scenes=split_names(split.train_scenes),
        validation_scenes=split_names(split.val_scenes),
        training_list=split.train_list,
        validation_list=split.val_list,
        reading=reading.segment_options(),
        device=torch.device,
        features=features.features,
        remember=features.remember,
        validate_every=split.validate_every,
        half=half,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    with saying_what_is_kept(lambda: interruption_notice(output)), live_training(TrainingLines) as listener:
        result = train(source, data, output, options, listener)
    _describe(result).show(as_json)


def _describe(result: FinetuneResult) -> Report:
    from cdkd_edge.quality.metrics import METRICS

    run, scores = result.record["run"], result.record["scores"]
    rows: Rows = [
        *(("note", note) for note in result.record["notes"]),
        *(
            (name, "   ".join(f"{metric.label} {percent(row[key], 2)}" for key, metric in METRICS.items()))
            for name, row in scores.items()
        ),
        *((f"IoU {name}", percent(iou, 2)) for name, iou in next(iter(scores.values()))["iou"].items()),
        ("time", f"{duration(run['seconds'])} on {run['device']}"),
        ("card", str(result.card)),
        ("next", f"cdkd-edge export {result.checkpoint}"),
    ]
    data = {"path": result.checkpoint, "card": result.card, "training": dict(result.record)}
    return Report(f"checkpoint {result.checkpoint}", rows, data)


@contextlib.contextmanager
def live_training(listener: type[_Listener], *, quiet: bool = False) -> Iterator[_Listener]:
    """Epochs as lines on stderr; below them a bar with the time left, or in a log file a line a minute.

    A ``quiet`` one shows nothing.
    """
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        with lines(console) as note:
            yield listener(console, lambda description, **fields: note(f"{description}{fields.get('text', '')}"))
        return

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with bar(console, columns, left="") as update:
        yield listener(console, update)


class LoopLines:
    """Shows steps, notes and batches of a training loop."""

    def __init__(self, console: Console, update: Callable[..., None]) -> None:
        self.console, self._update = console, update

    def step(self, text: str) -> None:
        """A step begins."""
        self._update(description=text)

    def note(self, text: str) -> None:
        """Something to know before hours are spent."""
        self.console.print_line(f"note: {text}")

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        """So many batches of the run are done."""
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        self._update(
            description="training",
            completed=done,
            total=total,
            left=f"steps{left}",
            text=f", step {done} of {total}{left}",
        )


class TrainingLines(LoopLines):
    """Also shows the epochs of a run with labels."""

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        """An epoch ended."""
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {significant(row['loss'], 4)}"]
        if row["mean_iou"] is not None:
            parts.append(f"validation mIoU {percent(row['mean_iou'], 2)} (best {percent(best, 2)})")
        if row["epoch"] < epochs:
            parts.append(f"{duration(seconds_left)} left")
        self.console.print_line("  ".join(parts))
