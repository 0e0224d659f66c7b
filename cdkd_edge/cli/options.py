"""Options that several commands have, single ones and groups, and what they become.

A group is a dataclass whose fields are options. A command takes it as one parameter, which :func:`grouped` turns into
the options of its fields.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import typer
import typer.models

from cdkd_edge.core.errors import MissingExtraError
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, Palette

if TYPE_CHECKING:
    from cdkd_edge.core.workspace import Workspace
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.segmentation.options import SegmentOptions

WORKSPACE = typer.Option(
    Path(), "--workspace", "-w", help="Folder with export/, engines/ and benchmarks/.", file_okay=False
)
JSON = typer.Option(False, "--json", help="Print the result as JSON.")
CHECKPOINT = typer.Argument(..., help="Checkpoint written by torch.save, or a safetensors file.")
ENGINE = typer.Option(None, "--engine", "-e", help="Engine file. Default: the only one in the workspace.")
BANDS = typer.Option(None, help="Bands to read as red, green and blue, counted from 1, e.g. 3,2,1.", metavar="R,G,B")
STRETCH = typer.Option(
    False, "--stretch", help="Stretch percentiles 2 to 98 of the scene to 0..255 (for 16-bit and float scenes)."
)
PALETTE = typer.Option(
    Palette.DISPLAY, help="Colours of maps: the schema's for display, or those of the dataset's masks."
)
OVERLAP = typer.Option(
    None, help="Overlap of neighbouring tiles, px. Default: 128, or a quarter of a small tile.", min=0
)
DATA = typer.Option(
    ..., help="Labelled images: a folder with images/ and masks/, or one laid out as by OpenMMLab, DeepGlobe or LoveDA."
)
SCHEMA = typer.Option(
    None, help=f"How masks encode classes: {', '.join(BUILTIN_SCHEMAS)}, or a .toml file. Default: what the data says."
)
SCENES = typer.Option(None, help="Use only these scenes of --data, e.g. tile5 or Val. Default: all.", metavar="A,B")
WEIGHTS = typer.Option(
    None,
    help="Which weights of a checkpoint: raw, ema (averaged), or the name of a set in it. Default: averaged ones.",
    metavar="raw|ema|NAME",
)
HEADS = typer.Option(None, help="Attention heads. Default: one per 64 of the width.", min=1)
NORM_EPS = typer.Option(None, help="LayerNorm's epsilon. Default: that of the layout.")
THREADS = typer.Option(None, help="CPU threads for the engine. Default: one per core.", min=1)


@dataclass(frozen=True)
class StretchOptions:
    """How a scene's bands become 8-bit red, green and blue."""

    bands: str | None = BANDS
    stretch: bool = STRETCH
    stretch_percentiles: tuple[float, float] | None = typer.Option(
        None, help="Stretch these percentiles of the scene to 0..255.", metavar="LOW HIGH"
    )
    stretch_range: tuple[float, float] | None = typer.Option(
        None, help="Stretch these values to 0..255.", metavar="LOW HIGH"
    )

    def segment_options(self, **more: Any) -> SegmentOptions:
        """The same, and ``more``, as :class:`~cdkd_edge.segmentation.options.SegmentOptions`.

        Raises:
            BadParameter: they are malformed or exclude each other.
        """
        from cdkd_edge.raster.stretch import Stretch
        from cdkd_edge.segmentation.options import SegmentOptions

        numbers = None
        if self.bands is not None:
            try:
                red, green, blue = (int(part) for part in self.bands.split(","))
            except ValueError:
                raise typer.BadParameter("three numbers, e.g. 3,2,1", param_hint="--bands") from None
            numbers = [red, green, blue]
        percentiles = self.stretch_percentiles or ((2.0, 98.0) if self.stretch else None)
        if self.stretch_range and percentiles:
            raise typer.BadParameter("choose percentiles or a range", param_hint="--stretch-range")
        stretch = None
        if self.stretch_range:
            stretch = Stretch(*self.stretch_range, percentiles=False)
        elif percentiles:
            stretch = Stretch(*percentiles, percentiles=True)
        return SegmentOptions(bands=numbers, stretch=stretch, **more)


@dataclass(frozen=True)
class ReadingOptions(StretchOptions):
    """How scenes and images are read."""

    PANEL: ClassVar[str] = "How images are read"

    strict: bool = typer.Option(
        False, "--strict", help="Stop at what GDAL only warns of while it reads (damaged files, mostly)."
    )

    def segment_options(self, **more: Any) -> SegmentOptions:
        """See :meth:`StretchOptions.segment_options`."""
        return super().segment_options(strict=self.strict, **more)


@dataclass(frozen=True)
class TorchOptions:
    """How PyTorch runs a checkpoint."""

    PANEL: ClassVar[str] = "PyTorch, for checkpoints"

    device: str = typer.Option(
        "auto", help="Where PyTorch computes: cpu, cuda, cuda:1, mps, or auto (CUDA if there is any)."
    )
    precision: str = typer.Option("fp32", help="What PyTorch computes in: fp32, bf16 or fp16.")
    weights: str | None = WEIGHTS


@dataclass(frozen=True)
class AccuracyOptions:
    """On which images evaluate and parity work, and where their results go."""

    schema: str | None = SCHEMA
    scenes: str | None = SCENES
    image_list: Path | None = typer.Option(
        None, "--list", help="Use only the images that this text file names, one per line."
    )
    overlap: int | None = OVERLAP
    save_maps: bool = typer.Option(
        False, "--save-maps", help="Also write label maps, and pictures that show the errors."
    )
    output: Path | None = typer.Option(
        None, "--output", "-o", help="Folder for the result as JSON, and for maps. Default: benchmarks/RUN for maps."
    )
    threads: int | None = THREADS

    def dataset(self, data: Path) -> Dataset:
        """The labelled images of a folder, of some of its scenes, or of a list.

        Raises:
            BadParameter: scenes and a list.
            DatasetError: there are no such images.
        """
        from cdkd_edge.quality.datasets import find_dataset

        dataset = find_dataset(data)
        if self.scenes and self.image_list:
            raise typer.BadParameter("choose scenes or a list", param_hint="--list")
        if self.scenes:
            return dataset.of_scenes(split_names(self.scenes))
        return dataset.of_list(self.image_list) if self.image_list else dataset

    def folder(self, space: Workspace, name: str) -> Path | None:
        """The folder for results; None if only the terminal shows them."""
        return self.output or (space.new_run(name) if self.save_maps else None)


def named_engine(argument: Path | None, option: Path | None) -> Path | None:
    """The engine that was named, as an argument or with ``--engine``; None: the only one in the workspace.

    Raises:
        BadParameter: two were named.
    """
    if argument is not None and option is not None:
        raise typer.BadParameter("an engine is named already", param_hint="--engine")
    return option if argument is None else argument


def split_names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options of its groups as parameters: a dataclass stands for its fields.

    A group's ``PANEL`` is the heading that its options get in the help.
    """
    hints = get_type_hints(function)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        own = [(parameter.name, hints[parameter.name], parameter.default)]
        for name, kind, option in own if group is None else _options_of(group):
            default = _shown_briefly(option, kind, getattr(group, "PANEL", None))
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=default, annotation=kind))
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and option of each field of a group."""
    hints = get_type_hints(group)
    return [(field.name, hints[field.name], field.default) for field in dataclasses.fields(group)]


_METAVARS = {bool: " ", int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""What the help shows for a value, in place of Typer's longer words."""


def _shown_briefly(option: Any, kind: Any, panel: str | None) -> Any:
    """The option with a short word for its value, below the heading of its group."""
    if not isinstance(option, typer.models.OptionInfo):
        return option
    option = copy.copy(option)
    option.rich_help_panel = panel
    types = [one for one in get_args(kind) or [kind] if one in _METAVARS]
    option.metavar = option.metavar or (_METAVARS[types[0]] if types else None)
    return option


def stem_of(artefact: Path) -> str:
    """A file's name without its suffix, or without all that checkpoints have: ``best`` of ``best.pth.tar``."""
    name = re.sub(r"(?i)(?<=.)(\.(pt|pth|bin|ckpt|safetensors|tar|zip))+$", "", artefact.name)
    return artefact.stem if name == artefact.name else name


def command_line() -> str:
    """What was typed. LIST stands for a pipe (``<(...)``), whose number means nothing later."""
    piped = re.compile(r"/dev/(fd/\d+|stdin)$|/proc/\w+/fd/\d+$")
    return shlex.join(["cdkd-edge", *(piped.sub("LIST", part) for part in sys.argv[1:])])


def require_package(package: str, extra: str, purpose: str) -> None:
    """Make sure that an optional package is installed, before work begins.

    Raises:
        MissingExtraError: it is not.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)
