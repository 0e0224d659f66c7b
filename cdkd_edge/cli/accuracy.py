"""The commands of accuracy: evaluate, finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import (
    command_line,
    need,
    new_folder,
    progress_bar,
    show,
    stem_of,
    telling_what_is_kept,
    workspace_at,
    write_json,
)
from cdkd_edge.cli.options import (
    BandsOption,
    DataOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    OverlapOption,
    PercentilesOption,
    PrecisionOption,
    RangeOption,
    SchemaOption,
    StretchOption,
    StrictOption,
    ThreadsOption,
    WeightsOption,
    WorkspaceOption,
    chosen_images,
    named_engine,
    names,
    segment_options,
)

SPLIT, RECIPE, VIEWS, NETWORK, MEMORY = (
    "What is validated on",
    "Recipe (default: the paper's)",
    "Views of a crop",
    "Network",
    "Features of a frozen encoder",
)
"""Panels of the help."""


@app.command()
def evaluate(
    data: DataOption,
    artefact: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            metavar="CKPT|GRAPH|ENGINE",
            help="Checkpoint, exported graph (.onnx) or engine. Default: the only engine in the workspace.",
        ),
    ] = None,
    engine: EngineOption = None,
    schema: SchemaOption = None,
    scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Judge on these scenes only, e.g. tile5 or Val. Default: every image.", metavar="A,B"),
    ] = None,
    image_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--list", help="Judge on the images that this text file names, one a line."),
    ] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Keep label maps, and pictures of image, truth, prediction, errors.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="Folder for accuracy.json, and for maps. Default: benchmarks/RUN, for maps."
        ),
    ] = None,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of a checkpoint's tiles, px. Default: its own.", min=1),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    weights: WeightsOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Accuracy on labelled images: IoU per class, mIoU, OA, mF1. The same path for every kind of artefact."""
    from cdkd_edge.cli.show.accuracy import describe_evaluation
    from cdkd_edge.quality.artefacts import open_artefact
    from cdkd_edge.quality.evaluate import data_schema
    from cdkd_edge.quality.evaluate import evaluate as judge

    space = workspace_at(workspace)
    subject = named_engine(artefact, engine) or space.only_engine("cdkd-edge evaluate", typed=command_line())
    options = segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range, strict)
    dataset = chosen_images(data, scenes, image_list)
    folder = output or (space.new_run(f"{stem_of(subject)}-accuracy") if save_maps else None)
    loaded = open_artefact(
        subject, schema=schema, tile=tile, device=device, precision=precision, threads=threads, weights=weights
    )
    try:
        classes = data_schema(dataset, schema, loaded.labeller.schema)
        with new_folder(folder) as place, progress_bar(subject.name) as progress:
            result = judge(
                loaded.labeller,
                dataset,
                classes,
                options=options,
                maps=place / "maps" if place and save_maps else None,
                trained_on=loaded.training,
                progress=progress,
            )
            report = describe_evaluation(loaded, dataset, result, folder)
            if place:
                write_json(place / "accuracy.json", report.data)
    finally:
        loaded.labeller.close()
    show(report, as_json)


@app.command()
def finetune(
    source: Annotated[
        str, typer.Argument(metavar="ENCODER|CKPT", help="Encoder or whole network; or preset:paper, preset:tiny.")
    ],
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint (.pt, .pth, .safetensors).")],
    schema: SchemaOption = None,
    val_scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Validate on these scenes; train on the others.", metavar="A,B", rich_help_panel=SPLIT),
    ] = None,
    train_scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Train on these scenes.", metavar="A,B", rich_help_panel=SPLIT),
    ] = None,
    val_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Validate on the images that this text file names, one a line.", rich_help_panel=SPLIT),
    ] = None,
    train_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Train on the images that this text file names.", rich_help_panel=SPLIT),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=RECIPE)] = 30,
    batch: Annotated[int, typer.Option(help="Crops per step.", rich_help_panel=RECIPE)] = 4,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate, for the head.", rich_help_panel=RECIPE)] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=RECIPE)] = 0.01,
    encoder_lr: Annotated[
        float, typer.Option(help="Learning rate of the encoder; 0 freezes it.", rich_help_panel=RECIPE)
    ] = 0.0,
    schedule: Annotated[
        str, typer.Option(help="Learning rate: constant, cosine or poly.", rich_help_panel=RECIPE)
    ] = "constant",
    warm_up: Annotated[int, typer.Option(help="Steps over which the learning rate rises.", rich_help_panel=RECIPE)] = 0,
    clip_norm: Annotated[
        float, typer.Option(help="Largest norm of the gradient; 0: any.", rich_help_panel=RECIPE)
    ] = 0.0,
    mean_decay: Annotated[
        float, typer.Option(help="Use a running mean of the weights, e.g. 0.99; 0: don't.", rich_help_panel=RECIPE)
    ] = 0.0,
    class_weights: Annotated[
        str,
        typer.Option(
            help="Class weights in the loss: none, sqrt, balanced, or numbers with commas.", rich_help_panel=RECIPE
        ),
    ] = "none",
    views: Annotated[
        int,
        typer.Option(
            help="Fixed views of each crop (8: all turns and mirrorings; 1: none of them), encoded once and "
            "remembered. 0: fresh random views in every epoch.",
            rich_help_panel=VIEWS,
        ),
    ] = 8,
    no_flips: Annotated[
        bool, typer.Option("--no-flips", help="Don't turn or mirror crops.", rich_help_panel=VIEWS)
    ] = False,
    scale: Annotated[
        tuple[float, float],
        typer.Option(help="Range of random magnification, e.g. 0.5 2.", metavar="LOW HIGH", rich_help_panel=VIEWS),
    ] = (1.0, 1.0),
    light: Annotated[
        float, typer.Option(help="Strength of random changes of gamma, gain, tint; 0..1.", rich_help_panel=VIEWS)
    ] = 0.0,
    texture: Annotated[
        float,
        typer.Option(help="Strength of random grain in patches (waves, glint); 0..1.", rich_help_panel=VIEWS),
    ] = 0.0,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Side of crops and tiles, px. Default: a network's own, 1024 for an encoder.",
            min=1,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    patch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Side of patches, px. Default: the encoder's, or 16 if that does not divide the tile.",
            min=1,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    heads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Attention heads, if not 64 wide.", min=1, rich_help_panel=NETWORK),
    ] = None,
    norm_eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="LayerNorm epsilon, if not the layout's own.", rich_help_panel=NETWORK),
    ] = None,
    head_channels: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Channels of a new head. Default: those of the head it replaces, or 256.",
            min=1,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Replace the checkpoint's head.", rich_help_panel=NETWORK)
    ] = False,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations.", min=1, rich_help_panel=RECIPE)] = 1,
    seed: Annotated[
        int, typer.Option(help="The same seed on the same machine gives the same weights.", rich_help_panel=RECIPE)
    ] = 0,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    features: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Where features are remembered. Default: beside the output.",
            file_okay=False,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    remember: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--remember/--no-remember",
            help="Remember features of fixed views on disk. Default: on a CPU.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights as float16.", rich_help_panel=NETWORK)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encoder and labelled images to a checkpoint, by the paper's protocol. Writes a model card beside it."""
    need("torch", "export", "training")
    from cdkd_edge.cli.show.training import describe_finetune, live_training
    from cdkd_edge.training.files import interruption_notice
    from cdkd_edge.training.finetune import FinetuneOptions
    from cdkd_edge.training.finetune import finetune as tune
    from cdkd_edge.training.recipe import NetworkSettings, Recipe
    from cdkd_edge.training.views import Augmentation

    recipe = Recipe(
        epochs=epochs,
        batch=batch,
        learning_rate=lr,
        weight_decay=weight_decay,
        encoder_learning_rate=encoder_lr,
        schedule=schedule,
        warm_up=warm_up,
        clip_norm=clip_norm,
        mean_decay=mean_decay,
        class_weights=class_weights,
        views=views,
        augmentation=Augmentation(not no_flips, scale, light, texture),
        precision=precision,
        seed=seed,
    )
    options = FinetuneOptions(
        recipe=recipe,
        network=NetworkSettings(tile, patch, heads, norm_eps, head_channels, new_head, weights),
        schema=schema,
        training_scenes=names(train_scenes),
        validation_scenes=names(val_scenes),
        training_list=train_list,
        validation_list=val_list,
        reading=segment_options(None, bands, stretch, stretch_percentiles, stretch_range, strict),
        device=device,
        features=features,
        remember=remember,
        validate_every=validate_every,
        half=half,
        resume=resume,
        overwrite=overwrite,
        command=command_line(),
    )
    with telling_what_is_kept(lambda: interruption_notice(output)), live_training() as listener:
        result = tune(source, data, output, options, listener)
    show(describe_finetune(result), as_json)
