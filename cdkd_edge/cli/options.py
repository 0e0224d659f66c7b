"""Options that several commands have, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cdkd_edge.core.labels import BUILTIN_SCHEMAS, Palette

if TYPE_CHECKING:
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.segment.options import SegmentOptions

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
PaletteOption = Annotated[
    Palette,
    typer.Option("--palette", help="Colours of maps: the schema's for display, or those of the dataset's masks."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Take what GDAL warns of while images are read (damage, mostly) for an error.")
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data", help="Labelled images: images/ and masks/, or folders as OpenMMLab, DeepGlobe or LoveDA have them."
    ),
]
SchemaOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--schema",
        help=f"How masks encode classes: {', '.join(BUILTIN_SCHEMAS)}, or a .toml file. Default: what the data says.",
    ),
]
WeightsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--weights",
        help="Which weights of a checkpoint: raw, ema (averaged), or the name of a set in it. Default: averaged ones.",
        metavar="raw|ema|NAME",
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


def named_engine(argument: Path | None, option: Path | None) -> Path | None:
    """The engine that was named, as an argument or with ``--engine``; None: the only one in the workspace.

    Raises:
        BadParameter: two were named.
    """
    if argument is not None and option is not None:
        raise typer.BadParameter("an engine is named already", param_hint="--engine")
    return option if argument is None else argument


def segment_options(
    overlap: int | None,
    bands: str | None,
    stretch: bool,
    percentiles: tuple[float, float] | None,
    value_range: tuple[float, float] | None,
    strict: bool = False,
) -> SegmentOptions:
    """How a scene is read, from options.

    Raises:
        BadParameter: they are malformed or exclude each other.
    """
    from cdkd_edge.raster.read import Stretch
    from cdkd_edge.segment.options import SegmentOptions

    numbers = None
    if bands is not None:
        try:
            red, green, blue = (int(part) for part in bands.split(","))
        except ValueError:
            raise typer.BadParameter("three numbers, e.g. 3,2,1", param_hint="--bands") from None
        numbers = [red, green, blue]
    if value_range and (percentiles or stretch):
        raise typer.BadParameter("choose percentiles or a range", param_hint="--stretch-range")
    chosen = None
    if value_range:
        chosen = Stretch(*value_range, percentiles=False)
    elif percentiles or stretch:
        chosen = Stretch(*(percentiles or (2.0, 98.0)), percentiles=True)
    return SegmentOptions(overlap=overlap, bands=numbers, stretch=chosen, strict=strict)


def names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def chosen_images(data: Path, scenes: str | None, image_list: Path | None) -> Dataset:
    """The labelled images of a folder, of some of its scenes, or of a list.

    Raises:
        BadParameter: scenes and a list.
        DatasetError: there are no such images.
    """
    from cdkd_edge.quality.datasets import find_dataset

    dataset = find_dataset(data)
    if scenes and image_list:
        raise typer.BadParameter("choose scenes or a list", param_hint="--list")
    if scenes:
        return dataset.of_scenes(names(scenes))
    return dataset.of_list(image_list) if image_list else dataset
