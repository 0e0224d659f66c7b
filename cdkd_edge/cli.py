"""The command line: parse, call one function, print. Results go to stdout, progress to stderr.

Nothing heavy is imported until a command runs, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from cdkd_edge import __version__
from cdkd_edge.errors import CdkdEdgeError, MissingExtraError, SystemRefusalError, UsageError

if TYPE_CHECKING:
    from cdkd_edge.scene.pipeline import SegmentOptions
    from cdkd_edge.workspace import Workspace


_UsageError: Any = typer.BadParameter.__base__
"""What every complaint about arguments is a kind of; Typer does not export it."""


class _AnsweringGroup(TyperGroup):
    """Turns errors into one line and an exit code; tracebacks only for bugs, or with ``--debug``."""

    def make_context(self, *arguments: Any, **extra: Any) -> Any:
        try:
            return super().make_context(*arguments, **extra)
        except _UsageError as error:
            _fail_usage(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            _fail_usage(error)
        except (CdkdEdgeError, OSError, MemoryError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            _fail(_as_answer(error))
        except RuntimeError as error:
            if "allocate memory" not in str(error) or ctx.params.get("debug"):  # torch's way to say MemoryError
                raise
            _fail(_as_answer(MemoryError()))


app = typer.Typer(
    cls=_AnsweringGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A land-cover segmentation network, from a checkpoint to a measured engine.\n\n"
    "`finetune` an encoder, `export` the checkpoint, `build` an engine, `segment` scenes with it, `bench` it, "
    "`evaluate` any of them. Each command finds what the one before left in the workspace (`export/`, `engines/`, "
    "`benchmarks/`).",
)

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help="Directory with export/, engines/ and benchmarks/.", file_okay=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
EngineOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer resolves the annotation on Python 3.10
    typer.Option("--engine", "-e", help="Engine file. Default: the only one in the workspace."),
]
BandsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--bands", help="Red, green and blue as 1-based band numbers, e.g. 3,2,1.", metavar="R,G,B"),
]
OverlapOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--overlap", help="Overlap of neighbouring tiles, px. Default: 128, a quarter of small tiles.", min=0),
]
StretchOption = Annotated[
    bool, typer.Option("--stretch", help="Stretch percentiles 2..98 of the scene to 0..255 (16-bit and float scenes).")
]
PercentilesOption = Annotated[
    Optional[tuple[float, float]],  # noqa: UP045
    typer.Option("--stretch-percentiles", help="Stretch these percentiles of the scene.", metavar="LOW HIGH"),
]
RangeOption = Annotated[
    Optional[tuple[float, float]],  # noqa: UP045
    typer.Option("--stretch-range", help="Stretch these values.", metavar="LOW HIGH"),
]
DataOption = Annotated[
    Path,
    typer.Option("--data", help="Labelled images: images/ and masks/, or DeepGlobe's or LoveDA's folders."),
]
SchemaOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--schema",
        help="How masks encode classes: deepglobe, loveda, dubai, or a .toml file. Default: what the data says.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where PyTorch computes: cpu, cuda, cuda:1, mps. auto: CUDA if it is there.")
]
PrecisionOption = Annotated[str, typer.Option("--precision", help="What PyTorch computes in: fp32, bf16 or fp16.")]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", help="CPU threads for the engine. Default: all cores.", min=1),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cdkd-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


@app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .bin, .ckpt or .safetensors.")],
    tile: Annotated[Optional[int], typer.Option(help="Count for this tile side, px.", min=1)] = None,  # noqa: UP045
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    as_json: JsonOption = False,
) -> None:
    """What a checkpoint holds: layout, parameters, multiply-accumulates, classes."""
    _need("torch", "export", "reading a checkpoint")
    from cdkd_edge.report import describe_checkpoint

    _show(describe_checkpoint(checkpoint, tile=tile, heads=heads), as_json)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .bin, .ckpt or .safetensors.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The graph (.onnx). Default: export/<checkpoint's name>.onnx."),
    ] = None,
    schema: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Class names and colors: deepglobe (6), loveda (7), dubai (5), or a .toml file."),
    ] = None,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tile side, px. Default: the checkpoint's.", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Tiles per run (static).", min=1)] = 1,
    opset: Annotated[int, typer.Option(help="ONNX opset.", min=17, max=20)] = 20,
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    norm_eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="LayerNorm epsilon, if not the layout's own."),
    ] = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to ONNX graph, checked against PyTorch. Writes export/NAME.onnx and its manifest."""
    _need("torch", "export", "exporting a checkpoint")
    from cdkd_edge.export.pipeline import ExportOptions, export_checkpoint
    from cdkd_edge.report import describe_export

    destination = output or _workspace(workspace).graphs / f"{checkpoint.stem}.onnx"
    if destination.suffix != ".onnx":
        raise typer.BadParameter("a graph is an .onnx file", param_hint="--output")
    options = ExportOptions(tile, batch, opset, schema, heads, norm_eps)
    with _steps() as step:
        result = export_checkpoint(checkpoint, destination, options, step)
    _show(describe_export(result), as_json)


@app.command()
def build(
    graph: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Exported graph (.onnx). Default: the only one in the workspace."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The engine. Default: engines/<graph's name>.fp32.cpu.onnx."),
    ] = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Graph to engine for this machine (ONNX Runtime on the CPU). Writes engines/ and a manifest."""
    from cdkd_edge.engines.cpu import build_cpu_engine
    from cdkd_edge.report import describe_engine

    space = _workspace(workspace)
    source = graph or space.only_graph()
    destination = output or space.engines / f"{source.stem}.fp32.cpu.onnx"
    if destination.suffix != ".onnx":
        raise typer.BadParameter("a CPU engine is an .onnx file", param_hint="--output")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise typer.BadParameter("the engine would overwrite its graph", param_hint="--output")
    with _steps() as step:
        step(f"building from {source.name}")
        manifest = build_cpu_engine(source, destination)
    _show(describe_engine(destination, manifest), as_json)


@app.command()
def segment(
    scenes: Annotated[list[str], typer.Argument(help="Rasters that GDAL can read: GeoTIFF, PNG, JPEG, ...")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Label map (.tif), or a directory. Default: <scene>_labels.tif here."),
    ] = None,
    engine: EngineOption = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    quicklook: Annotated[bool, typer.Option("--quicklook", help="Also write a PNG to look at.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing label maps.")] = False,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Scenes to label maps: GeoTIFF with palette, class names and the scene's georeference."""
    from cdkd_edge.engines.load import load_engine
    from cdkd_edge.report import describe_segment
    from cdkd_edge.scene.outputs import label_map_paths, quicklook_path, spare
    from cdkd_edge.scene.pipeline import segment_scene
    from cdkd_edge.scene.quicklook import write_quicklook

    space = _workspace(workspace)
    options = _segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range)
    outputs = label_map_paths(scenes, output, space.root)
    pictures = [quicklook_path(path) if quicklook else None for path in outputs]
    spare(scenes, [*outputs, *(picture for picture in pictures if picture)], overwrite=overwrite)
    loaded = load_engine(engine or space.only_engine("cdkd-edge segment SCENE --engine"), threads=threads)
    results = []
    try:
        for scene, destination, picture in zip(scenes, outputs, pictures, strict=True):
            with _progress_bar(Path(scene).name) as progress:
                result = segment_scene(loaded, scene, destination, options, progress)
            if picture:
                write_quicklook(scene, result, loaded.manifest.schema, picture, options)
            results.append(describe_segment(scene, result, picture))
            if not as_json:
                _show(results[-1], as_json)
    finally:
        loaded.close()
        if as_json:  # also what was finished before a scene failed
            _print_json([result.data for result in results])


@app.command()
def bench(
    engine: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Engine file. Default: the only one in the workspace."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of timed tiles.", min=0.1)] = 20.0,
    warmup: Annotated[float, typer.Option(help="Seconds of warm-up.", min=0)] = 3.0,
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Scene for the end-to-end figure. Default: a drawn one."),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    power_trace: Annotated[
        bool, typer.Option("--power-trace", help="Measure idle and load power, where there is a source.")
    ] = False,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure an engine: tiles per second, latency, a scene end to end, power. Writes benchmarks/RUN/."""
    from cdkd_edge.benchmarks.bench import BenchOptions, run_benchmark
    from cdkd_edge.engines.load import load_engine
    from cdkd_edge.report import describe_bench

    space = _workspace(workspace)
    options = BenchOptions(
        duration=duration,
        warmup=warmup,
        scene=scene,
        segment=_segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range),
        power=power_trace,
    )
    path = engine or space.only_engine("cdkd-edge bench")
    loaded = load_engine(path, threads=threads)
    try:
        folder = space.new_run(loaded.manifest.name)
        with _steps() as step:
            summary = run_benchmark(loaded, folder, options, step)
    finally:
        loaded.close()
    _show(describe_bench(summary, folder), as_json)


@app.command()
def evaluate(
    subject: Annotated[
        Path, typer.Argument(metavar="CKPT|GRAPH|ENGINE", help="Checkpoint, exported graph (.onnx) or engine.")
    ],
    data: DataOption,
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
        typer.Option("--output", "-o", help="Folder for the scores as JSON, and for maps. Default: benchmarks/RUN."),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Accuracy on labelled images: IoU per class, mIoU, OA, mF1. The same path for every kind of artefact."""
    from cdkd_edge.accuracy.datasets import find_dataset
    from cdkd_edge.accuracy.evaluate import data_schema
    from cdkd_edge.accuracy.evaluate import evaluate as judge
    from cdkd_edge.accuracy.subject import open_subject
    from cdkd_edge.report import describe_evaluation

    options = _segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range)
    dataset = find_dataset(data)
    if scenes and image_list:
        raise typer.BadParameter("choose scenes or a list", param_hint="--list")
    if scenes:
        dataset = dataset.of_scenes(_names(scenes))
    elif image_list:
        dataset = dataset.of_list(image_list)
    folder = output or (_workspace(workspace).new_run(f"{subject.stem}-accuracy") if save_maps else None)
    if folder and folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty", param_hint="--output")
    loaded = open_subject(subject, schema=schema, device=device, precision=precision, threads=threads)
    try:
        classes = data_schema(dataset, schema, loaded.labeller.schema)
        with _progress_bar(subject.name) as progress:
            result = judge(
                loaded.labeller,
                dataset,
                classes,
                options=options,
                maps=folder / "maps" if folder and save_maps else None,
                trained_on=loaded.training,
                progress=progress,
            )
    finally:
        loaded.labeller.close()
    report = describe_evaluation(loaded, dataset, result, folder)
    if folder:
        _write_json(folder / "accuracy.json", report.data)
    _show(report, as_json)


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
        typer.Option(help="Validate on these scenes; train on the others.", metavar="A,B"),
    ] = None,
    train_scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Train on these scenes.", metavar="A,B"),
    ] = None,
    val_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Validate on the images that this text file names, one a line."),
    ] = None,
    train_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Train on the images that this text file names."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 30,
    batch: Annotated[int, typer.Option(help="Crops per step.")] = 4,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate, for the head.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.01,
    encoder_lr: Annotated[float, typer.Option(help="Learning rate of the encoder; 0 freezes it.")] = 0.0,
    schedule: Annotated[str, typer.Option(help="Learning rate: constant, cosine or poly.")] = "constant",
    warm_up: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 0,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 0.0,
    mean_decay: Annotated[float, typer.Option(help="Use a running mean of the weights, e.g. 0.99; 0: don't.")] = 0.0,
    class_weights: Annotated[
        str, typer.Option(help="Class weights in the loss: none, sqrt, balanced, or numbers with commas.")
    ] = "none",
    views: Annotated[
        int,
        typer.Option(
            help="Fixed views of each crop (8: all turns and mirrorings; 1: none of them), encoded once and "
            "remembered. 0: fresh random views in every epoch."
        ),
    ] = 8,
    flips: Annotated[bool, typer.Option("--flips/--no-flips", help="Turn and mirror crops.")] = True,
    scale: Annotated[
        tuple[float, float], typer.Option(help="Range of random magnification, e.g. 0.5 2.", metavar="LOW HIGH")
    ] = (1.0, 1.0),
    light: Annotated[float, typer.Option(help="Strength of random changes of gamma, gain, tint; 0..1.")] = 0.0,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of crops and tiles, px. Default: a network's own, 1024 for an encoder.", min=1),
    ] = None,
    patch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Side of patches, px. Default: the encoder's, or 16 if that does not divide the tile.", min=1
        ),
    ] = None,
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    norm_eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="LayerNorm epsilon, if not the layout's own."),
    ] = None,
    head_channels: Annotated[int, typer.Option(help="Channels of a new head.", min=1)] = 256,
    new_head: Annotated[bool, typer.Option("--new-head", help="Replace the checkpoint's head.")] = False,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="The same seed on the same machine gives the same weights.")] = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    features: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where features are remembered. Default: <output>.features/.", file_okay=False),
    ] = None,
    remember: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--remember/--no-remember", help="Remember features of fixed views on disk. Default: on a CPU."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights as float16.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encoder and labelled images to a checkpoint, by the paper's protocol. Writes a model card beside it."""
    _need("torch", "export", "training")
    from cdkd_edge.report import describe_finetune, live_training
    from cdkd_edge.training.finetune import FinetuneOptions
    from cdkd_edge.training.finetune import finetune as tune
    from cdkd_edge.training.recipe import Recipe
    from cdkd_edge.training.start import Shape
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
        augmentation=Augmentation(flips, scale, light),
        precision=precision,
        seed=seed,
    )
    options = FinetuneOptions(
        recipe=recipe,
        shape=Shape(tile, patch, heads, norm_eps, head_channels, new_head),
        schema=schema,
        training_scenes=_names(train_scenes),
        validation_scenes=_names(val_scenes),
        training_list=train_list,
        validation_list=val_list,
        reading=_segment_options(None, bands, stretch, stretch_percentiles, stretch_range),
        device=device,
        features=features,
        remember=remember,
        validate_every=validate_every,
        half=half,
        resume=resume,
        overwrite=overwrite,
        command=_command_line(),
    )
    with live_training() as listener:
        result = tune(source, data, output, options, listener)
    _show(describe_finetune(result), as_json)


@app.command()
def demo(
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Your own scene. Default: a drawn one of 3000 x 2000 px."),
    ] = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Where the demo writes.", file_okay=False)
    ] = Path("cdkd-edge-demo"),
    as_json: JsonOption = False,
) -> None:
    """The whole chain with a small bundled network: export, build, segment, bench."""
    _need("torch", "export", "the demo's export")
    from cdkd_edge.demo.run import run_demo
    from cdkd_edge.report import describe_demo

    options = _segment_options(None, bands, stretch, None, None)
    with _steps() as step:
        result = run_demo(_workspace(workspace), scene, options, step)
    _show(describe_demo(result), as_json)


def main() -> None:
    """Entry point of the ``cdkd-edge`` command."""
    # So that temporary files are removed when a job scheduler ends the process or a connection is lost.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    app()


# --- helpers --------------------------------------------------------------------------------------


def _workspace(root: Path) -> Workspace:
    from cdkd_edge.workspace import Workspace

    return Workspace(root)


def _segment_options(
    overlap: int | None,
    bands: str | None,
    stretch: bool,
    percentiles: tuple[float, float] | None,
    value_range: tuple[float, float] | None,
) -> SegmentOptions:
    from cdkd_edge.scene.pipeline import SegmentOptions
    from cdkd_edge.scene.reader import Stretch

    numbers = None
    if bands is not None:
        try:
            numbers = [int(part) for part in bands.split(",")]
        except ValueError:
            raise typer.BadParameter("three numbers, e.g. 3,2,1", param_hint="--bands") from None
    if value_range and (percentiles or stretch):
        raise typer.BadParameter("choose percentiles or a range", param_hint="--stretch-range")
    chosen = None
    if value_range:
        chosen = Stretch(*value_range, percentiles=False)
    elif percentiles or stretch:
        chosen = Stretch(*(percentiles or (2.0, 98.0)), percentiles=True)
    return SegmentOptions(overlap=overlap, bands=numbers, stretch=chosen)


def _names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def _command_line() -> str:
    """What was typed, for a card."""
    import shlex

    return shlex.join(["cdkd-edge", *sys.argv[1:]])


def _write_json(path: Path, data: Any) -> None:
    import json

    from cdkd_edge.files import write_text

    write_text(path, json.dumps(data, indent=2) + "\n")


def _need(package: str, extra: str, purpose: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def _as_answer(error: BaseException) -> CdkdEdgeError:
    if isinstance(error, CdkdEdgeError):
        return error
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return SystemRefusalError(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return SystemRefusalError("out of memory")
    return CdkdEdgeError(f"{error}", hint="an installed package is incomplete; reinstall cdkd-edge")


def _fail(error: CdkdEdgeError) -> NoReturn:
    text = f"{error.message} — {error.hint}" if error.hint else error.message
    # File names and messages from inside files must not steer the terminal.
    text = "".join(char if char.isprintable() else " " for char in text)
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text}", err=True)
    raise typer.Exit(error.exit_code)


def _fail_usage(error: Any) -> NoReturn:
    if "NoArgsIsHelp" in type(error).__name__:  # its message is the help page
        raise error
    command = error.ctx.command_path if error.ctx else "cdkd-edge"
    _fail(UsageError(error.format_message().rstrip("."), hint=f"see {command} --help"))


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        _print_json(report.data)
    else:
        report.print()


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=2))


def _steps() -> Any:
    from cdkd_edge.report import live_steps

    return live_steps()


def _progress_bar(title: str) -> Any:
    from cdkd_edge.report import live_bar

    return live_bar(title)
