"""Options that several commands have, single ones and groups.

A group is a dataclass whose fields are options. A command takes it as one parameter; :func:`grouped` makes the options.
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

from typer import Argument, BadParameter, Option
from typer.models import OptionInfo

from cdkd_edge.core.errors import MissingExtraError
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, Palette

if TYPE_CHECKING:
    from cdkd_edge.core.workspace import Workspace
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.segmentation.options import SegmentOptions

WORKSPACE = Option(Path(), "--workspace", "-w", help="Folder with export/, engines/ and benchmarks/.", file_okay=False)
JSON = Option(False, "--json", help="Print the result as JSON.")
CHECKPOINT = Argument(..., help="Checkpoint of torch.save, a safetensors file, or a folder of Hugging Face or timm.")
ENGINE = Option(None, "--engine", "-e", help="Engine file. Default: the workspace's only one.")
BANDS = Option(None, help="Bands to read as red, green and blue, counted from 1, e.g. 3,2,1.", metavar="R,G,B")
STRETCH = Option(False, help="Stretch percentiles 2 to 98 of the scene to 0..255 (for 16-bit and float scenes).")
PALETTE = Option(Palette.DISPLAY, help="Colours of maps: the schema's for display, or those of the dataset's masks.")
OVERLAP = Option(None, help="Overlap of neighbouring tiles, px. Default: 128, or a quarter of a small tile.", min=0)
DATA = Option(..., help="Labelled images: images/ and masks/, or a folder as of OpenMMLab, DeepGlobe or LoveDA.")
SCHEMA = Option(None, help=f"Schema of masks: {', '.join(BUILTIN_SCHEMAS)}, or a .toml file. Default: the data's.")
SCENES = Option(None, help="Use only these scenes of --data, e.g. tile5 or Val. Default: all.", metavar="A,B")
WEIGHTS = Option(None, help="Which weights to take. Default: averaged ones, if any.", metavar="raw|ema|NAME")
HEADS = Option(None, help="Attention heads. Default: one per 64 of the width.", min=1)
NORM_EPS = Option(None, "--norm-eps", help="LayerNorm's epsilon. Default: that of the layout.")
TAPS = Option(
    None, help="Blocks that feed the head, from 0: 2,5,8,11. Default: the file's, or evenly spaced.", metavar="N,N,..."
)
POOL_SCALES = Option(None, help="Sizes that the head pools to. Default: the file's, or 1,2,3,6.", metavar="N,N,...")
DEVICE = Option("auto", help="Where PyTorch computes: cpu, cuda, cuda:1, mps, or auto (CUDA if there is any).")
THREADS = Option(None, help="CPU threads for the engine. Default: one per core.", min=1)


@dataclass(frozen=True)
class StretchOptions:
    """How a scene's bands become 8-bit red, green and blue."""

    bands: str | None = BANDS
    stretch: bool = STRETCH
    stretch_percentiles: tuple[float, float] | None = Option(
        None, help="Stretch these percentiles of the scene to 0..255.", metavar="LOW HIGH"
    )
    stretch_range: tuple[float, float] | None = Option(None, help="Stretch these values to 0..255.", metavar="LOW HIGH")

    def segment_options(self, **more: Any) -> SegmentOptions:
        """The same, and ``more``, as :class:`~cdkd_edge.segmentation.options.SegmentOptions`.

        Raises:
            BadParameter: they are malformed or exclude each other.
        """
        from cdkd_edge.raster.stretch import Stretch
        from cdkd_edge.segmentation.options import SegmentOptions

        if self.bands is not None and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*,\s*\d+\s*", self.bands):
            raise BadParameter(f"three numbers, e.g. 3,2,1, not {self.bands!r}", param_hint="--bands")
        percentiles = self.stretch_percentiles or ((2.0, 98.0) if self.stretch else None)
        if self.stretch_range and percentiles:
            raise BadParameter("choose percentiles or a range", param_hint="--stretch-range")
        limits = self.stretch_range or percentiles
        return SegmentOptions(
            bands=[int(number) for number in self.bands.split(",")] if self.bands is not None else None,
            stretch=Stretch(*limits, percentiles=limits is percentiles) if limits else None,
            **more,
        )


@dataclass(frozen=True)
class ReadingOptions(StretchOptions):
    """How scenes and images are read."""

    PANEL: ClassVar[str] = "How images are read"

    strict: bool = Option(False, help="Stop at what GDAL only warns of while it reads (damaged files, mostly).")

    def segment_options(self, **more: Any) -> SegmentOptions:
        """See :meth:`StretchOptions.segment_options`."""
        return super().segment_options(strict=self.strict, **more)


@dataclass(frozen=True)
class TorchOptions:
    """How PyTorch runs a checkpoint."""

    PANEL: ClassVar[str] = "PyTorch, for checkpoints"

    device: str = DEVICE
    precision: str = Option("fp32", help="What PyTorch computes in: fp32, bf16 or fp16.")
    weights: str | None = WEIGHTS


@dataclass(frozen=True)
class AccuracyOptions:
    """On which images evaluate and parity work, and where their results go."""

    schema: str | None = SCHEMA
    scenes: str | None = SCENES
    image_list: Path | None = Option(None, "--list", help="Use only the images that this text file names, one a line.")
    overlap: int | None = OVERLAP
    save_maps: bool = Option(False, help="Also write label maps, and pictures that show the errors.")
    output: Path | None = Option(
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
            raise BadParameter("choose scenes or a list", param_hint="--list")
        if self.scenes:
            return dataset.of_scenes(split_names(self.scenes))
        return dataset.of_list(self.image_list) if self.image_list else dataset

    def folder(self, space: Workspace, name: str) -> Path | None:
        """The folder for results; None if only the terminal shows them."""
        return self.output or (space.new_run(name) if self.save_maps else None)


def chosen_engine(space: Workspace, command: str, argument: Path | None, option: Path | None) -> Path:
    """The engine that was named, as an argument or with ``--engine``; else the only one in the workspace.

    Raises:
        BadParameter: two were named.
        WorkspaceError: none was named, and there is not exactly one.
    """
    if argument is not None and option is not None:
        raise BadParameter("an engine is named already", param_hint="--engine")
    return argument or option or space.only_engine(command, typed=command_line())


def split_names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its groups as options, below the group's ``PANEL`` in the help."""
    hints = get_type_hints(function)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        fields = dataclasses.fields(group) if group else [parameter]
        kinds, panel = (get_type_hints(group) if group else hints), getattr(group, "PANEL", None)
        for name, default in ((field.name, field.default) for field in fields):
            option = _shown_briefly(name, kinds[name], default, panel)
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kinds[name])
            )
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


_METAVARS = {bool: " ", int: "N", float: "X", Path: "PATH", str: "TEXT"}  # in place of Typer's longer words


def _shown_briefly(name: str, kind: Any, option: Any, panel: str | None) -> Any:
    """The option with a short word for its value; one that is off by default has no ``--no-NAME``."""
    if not isinstance(option, OptionInfo):
        return option
    option = copy.copy(option)
    option.rich_help_panel = panel
    types = [one for one in get_args(kind) or [kind] if one in _METAVARS]
    option.metavar = option.metavar or (_METAVARS[types[0]] if types else None)
    if option.default is False and not option.param_decls:
        option.param_decls = (f"--{name.replace('_', '-')}",)
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
