"""``cdkd-edge finetune``: an encoder and labelled images to a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from cdkd_edge.cli.options import (
    DATA,
    HEADS,
    JSON,
    NORM_EPS,
    SCHEMA,
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
    from cdkd_edge.training.finetune import FinetuneResult, TrainingListener


@dataclass(frozen=True)
class SplitOptions:
    """Which images validate, and which train."""

    PANEL: ClassVar = "What is validated on"

    val_scenes: str | None = typer.Option(None, help="Validate on these scenes and train on the others.", metavar="A,B")
    train_scenes: str | None = typer.Option(None, help="Train on these scenes. Default: all others.", metavar="A,B")
    val_list: Path | None = typer.Option(None, help="Validate on the images that this text file names, one per line.")
    train_list: Path | None = typer.Option(
        None, help="Train on the images that this text file names. Default: all others."
    )


@dataclass(frozen=True)
class RecipeOptions:
    """How it is trained."""

    PANEL: ClassVar = "Recipe (defaults: the paper's)"

    epochs: int = typer.Option(30, help="Passes over the data.")
    batch: int = typer.Option(4, help="Crops per step.")
    lr: float = typer.Option(1e-4, help="AdamW's learning rate for the head.")
    weight_decay: float = typer.Option(0.01, help="AdamW's weight decay.")
    encoder_lr: float = typer.Option(0.0, help="Learning rate of the encoder; 0 freezes it.")
    schedule: str = typer.Option("constant", help="Course of the learning rate: constant, cosine or poly.")
    warm_up: int = typer.Option(0, help="Steps over which the learning rate rises to its value.")
    clip_norm: float = typer.Option(0.0, help="Largest norm of the gradient; 0: no limit.")
    mean_decay: float = typer.Option(
        0.0, help="Decay of a running mean of the weights, which is saved, e.g. 0.99; 0: no mean."
    )
    class_weights: str = typer.Option(
        "none", help="Weights of classes in the loss: none, sqrt, balanced, or numbers with commas."
    )
    validate_every: int = typer.Option(1, help="Epochs between validations.", min=1)
    seed: int = typer.Option(0, help="The same seed on the same machine gives the same weights.")


@dataclass(frozen=True)
class ViewOptions:
    """How crops are varied."""

    PANEL: ClassVar = "Views of a crop"

    views: int = typer.Option(
        8,
        help="Fixed views of each crop, encoded once and stored: 8 for all turns and mirrorings, 1 for the crop as "
        "it is. 0: new random views in every epoch.",
    )
    no_flips: bool = typer.Option(False, "--no-flips", help="Do not turn or mirror crops.")
    scale: tuple[float, float] = typer.Option(
        (1.0, 1.0), help="Range of random magnification, e.g. 0.5 2.", metavar="LOW HIGH"
    )
    light: float = typer.Option(0.0, help="Strength of random changes of gamma, gain and tint, 0 to 1.")
    texture: float = typer.Option(0.0, help="Strength of random grain in patches (waves, glint), 0 to 1.")


@dataclass(frozen=True)
class NetworkOptions:
    """The network that is trained."""

    PANEL: ClassVar = "Network"

    tile: int | None = typer.Option(
        None, help="Side of crops and tiles, px. Default: a network's own, 1024 for an encoder.", min=1
    )
    patch: int | None = typer.Option(
        None, help="Side of a patch, px. Default: the encoder's, or 16 if that does not divide the tile.", min=1
    )
    heads: int | None = HEADS
    norm_eps: float | None = NORM_EPS
    head_channels: int | None = typer.Option(
        None, help="Channels of a new head. Default: those of the head that it replaces, or 256.", min=1
    )
    new_head: bool = typer.Option(False, "--new-head", help="Replace the checkpoint's head.")
    half: bool = typer.Option(False, "--half", help="Store weights as float16.")


@dataclass(frozen=True)
class FeatureOptions:
    """Where the features of a frozen encoder are stored."""

    PANEL: ClassVar = "Features of a frozen encoder"

    features: Path | None = typer.Option(
        None, help="Folder for stored features. Default: beside the output.", file_okay=False
    )
    remember: bool | None = typer.Option(
        None, "--remember/--no-remember", help="Store the features of fixed views on disk. Default: only on a CPU."
    )


def finetune(
    source: str = typer.Argument(
        ..., metavar="ENCODER|CKPT", help="Encoder or whole network; or preset:paper, preset:tiny."
    ),
    *,
    data: Path = DATA,
    output: Path = typer.Option(..., "--output", "-o", help="The checkpoint (.pt, .pth, .safetensors)."),
    schema: str | None = SCHEMA,
    split: SplitOptions,
    recipe: RecipeOptions,
    views: ViewOptions,
    network: NetworkOptions,
    torch: TorchOptions,
    features: FeatureOptions,
    reading: ReadingOptions,
    resume: bool = typer.Option(False, "--resume", help="Continue a run that was interrupted."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Train a decoder on labelled images, by the paper's protocol. Writes a checkpoint and its model card."""
    require_package("torch", "export", "training")
    from cdkd_edge.training.files import interruption_notice
    from cdkd_edge.training.finetune import FinetuneOptions
    from cdkd_edge.training.finetune import finetune as train
    from cdkd_edge.training.recipe import NetworkSettings

    options = FinetuneOptions(
        recipe=_recipe(recipe, views, torch.precision),
        network=NetworkSettings(
            network.tile,
            network.patch,
            network.heads,
            network.norm_eps,
            network.head_channels,
            network.new_head,
            torch.weights,
        ),
        schema=schema,
        training_scenes=split_names(split.train_scenes),
        validation_scenes=split_names(split.val_scenes),
        training_list=split.train_list,
        validation_list=split.val_list,
        reading=reading.segment_options(),
        device=torch.device,
        features=features.features,
        remember=features.remember,
        validate_every=recipe.validate_every,
        half=network.half,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    with saying_what_is_kept(lambda: interruption_notice(output)), live_training() as listener:
        result = train(source, data, output, options, listener)
    _describe(result).show(as_json)


def _recipe(options: RecipeOptions, views: ViewOptions, precision: str) -> Any:
    from cdkd_edge.training.recipe import Recipe
    from cdkd_edge.training.views import Augmentation

    return Recipe(
        epochs=options.epochs,
        batch=options.batch,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        encoder_learning_rate=options.encoder_lr,
        schedule=options.schedule,
        warm_up=options.warm_up,
        clip_norm=options.clip_norm,
        mean_decay=options.mean_decay,
        class_weights=options.class_weights,
        views=views.views,
        augmentation=Augmentation(not views.no_flips, views.scale, views.light, views.texture),
        precision=precision,
        seed=options.seed,
    )


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
    data = {"path": str(result.checkpoint), "card": str(result.card), "training": dict(result.record)}
    return Report(f"checkpoint {result.checkpoint}", rows, data)


@contextlib.contextmanager
def live_training() -> Iterator[TrainingListener]:
    """Epochs as lines on stderr; below them a bar with the time left, or in a log file a line a minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as note:
            yield _TrainingLines(console, lambda description, **fields: note(f"{description}{fields.get('text', '')}"))
        return

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with bar(console, columns, left="") as update:
        yield _TrainingLines(console, update)


class _TrainingLines:
    def __init__(self, console: Console, update: Callable[..., None]) -> None:
        self._console, self._update = console, update

    def step(self, text: str) -> None:
        self._update(description=text)

    def note(self, text: str) -> None:
        self._console.print_line(f"note: {text}")

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        self._update(
            description="training",
            completed=done,
            total=total,
            left=f"steps{left}",
            text=f", step {done} of {total}{left}",
        )

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {significant(row['loss'], 4)}"]
        if row["mean_iou"] is not None:
            parts.append(f"validation mIoU {percent(row['mean_iou'], 2)} (best {percent(best, 2)})")
        if row["epoch"] < epochs:
            parts.append(f"{duration(seconds_left)} left")
        self._console.print_line("  ".join(parts))
