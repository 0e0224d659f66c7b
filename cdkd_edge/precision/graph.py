"""The graph that an engine is built from: found, or made from the FP32 graph where it is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.core.errors import NumericalCheckError, UsageError, WorkspaceError
from cdkd_edge.core.manifest import GraphManifest, output_of, precision_of, read_manifest
from cdkd_edge.core.output_kinds import LABELS
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import Runtime, require_precision
from cdkd_edge.graph.files import derived_path, is_derived_from
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.graph.tiles import CalibrationSet, is_calibration_set
from cdkd_edge.precision.int8 import Gate, Int8Options, Int8Result, require_fitting, write_int8
from cdkd_edge.precision.int8_gate import LabelledData
from cdkd_edge.quality.datasets import find_dataset
from cdkd_edge.quality.evaluate import data_schema


@dataclass(frozen=True)
class Request:
    """What was asked of a graph of lower precision."""

    calibration: Path | None = None
    """Folder of a calibration set. Default: the workspace's only one."""
    int8: Int8Options = Int8Options()
    data: LabelledData | None = None
    again: bool = False
    """Make the graph even if there is one (as if anything else is asked for), or if FP16 is known to break it."""
    least: float | None = None
    """Share of labels that must stay the same, 0..1. Default: that of ``int8``; of FP16, see :func:`check_fp16`."""


@dataclass(frozen=True)
class Prepared:
    """A graph to build."""

    path: Path
    made: bool = False
    """Whether it was made just now."""
    int8: Int8Result | None = None
    """How, if it is an INT8 graph that was made just now."""


def prepare_graph(
    space: Workspace,
    graph: Path | None,
    precision: str | None,
    request: Request = Request(),
    progress: Callable[[str], None] = lambda step: None,
    output: str | None = None,
    runtime: Runtime | None = None,
) -> Prepared:
    """The graph for an engine of a precision and kind of output.

    An FP16 or INT8 graph beside its FP32 graph is taken if it was made from it, as its manifest says; otherwise it is
    made. Where there is no FP32 graph, as on a board to which only one graph was carried, that one is taken.

    Args:
        space: where to look for graphs and calibration sets.
        graph: the named graph: FP32, or of the precision that is asked for.
        precision: ``fp32``, ``fp16``, ``int8``; None: that of the named graph, or ``fp32``.
        request: how to make it.
        progress: called with the name of each step.
        output: what it is to give (:mod:`cdkd_edge.core.output_kinds`); None: what the named graph gives, or labels. A
            graph with more than labels is made from the one of that precision, unless it is there.
        runtime: what the engine is for: no FP16 graph is made for the CPU, which cannot run it.

    Raises:
        WorkspaceError: no graph is named, and there is none or more than one; likewise for calibration sets.
        UsageError: the named graph has another precision and is not FP32; or it gives something else than is asked for,
            and not labels alone; or the request says how to make a graph that is there and cannot be made, for want of
            its FP32 graph.
        NumericalCheckError: FP16 breaks the network, as is known from before. (``request.again`` tries it again.)
        EngineError: an FP16 graph would have to be made, and this machine cannot build an engine from it.
        CdkdEdgeError: as :func:`write_fp16`, :func:`write_int8` and :func:`write_variant` do.
    """
    if graph is not None and output_of(graph) != LABELS:
        return _finished(graph, precision, output, request)
    if request.least is not None:  # a share that makes no sense is an error
        Gate(request.least)
    if output is None or output == LABELS:
        return _labels_graph(space, graph, precision, request, progress, runtime)
    wanted = precision or "fp32"
    if (
        graph is None
        and not space.graphs_of(wanted)
        and not space.graphs_of("fp32")
        and space.graphs_of(wanted, output)
    ):
        return _as_it_is(space.only_graph(wanted, f"cdkd-edge build --{output}", output), request)
    plain = _labels_graph(space, graph, precision, request, progress, runtime)
    destination = derived_path(plain.path, output)
    made = not is_derived_from(destination, plain.path, output)
    if made:
        write_variant(plain.path, destination, output, progress)
    return dataclasses.replace(plain, path=destination, made=plain.made or made)


def _finished(graph: Path, precision: str | None, output: str | None, request: Request) -> Prepared:
    """A named graph that gives more than labels, if that is what was asked for."""
    own = (precision_of(graph), output_of(graph))
    if (precision or own[0], output or own[1]) != own:
        raise UsageError(
            f"{graph} is a graph of {own[0]} that gives {own[1]}, and something else was asked for",
            hint="name the graph it was made from, or leave out the options",
        )
    return _as_it_is(graph, request)


def _labels_graph(
    space: Workspace,
    graph: Path | None,
    precision: str | None,
    request: Request,
    progress: Callable[[str], None],
    runtime: Runtime | None,
) -> Prepared:
    """The graph with labels alone; see :func:`prepare_graph`."""
    own = precision_of(graph) if graph else None
    wanted = precision or own or "fp32"
    _require_meaning(request, wanted)
    if graph is None:
        plains = space.graphs_of("fp32")
        if wanted == "fp32" or (not plains and space.graphs_of(wanted)):
            return _as_it_is(space.only_graph(wanted), request)
        graph = space.only_graph("fp32", f"cdkd-edge build --{wanted}") if plains else _missing(space, wanted)
    elif own == wanted or (wanted == "fp32" and own is None):
        return _as_it_is(graph, request)
    elif own not in ("fp32", None):
        raise UsageError(
            f"{graph} is a graph of {own}, and --{wanted} was asked for",
            hint=f"name the FP32 graph, leave out --{wanted}, or leave out the graph",
        )
    destination = derived_path(graph, wanted)
    if request == Request() and is_derived_from(destination, graph):
        return Prepared(destination)
    source = read_manifest(graph, GraphManifest)
    _require_hope(graph, source, wanted, request)
    if wanted == "fp16":
        if runtime is not None:
            require_precision(runtime, wanted, graph)
        if request.calibration is None:
            write_fp16(graph, destination, least=request.least, note=progress)
        else:
            tiles = CalibrationSet.load(request.calibration)
            require_fitting(tiles, source, "check")
            write_fp16(
                graph,
                destination,
                tiles=tiles.tiles("check"),
                imagery=tiles.name,
                least=request.least,
                note=progress,
            )
        return Prepared(destination, made=True)
    tiles = CalibrationSet.load(request.calibration or only_calibration_set(space))
    options = request.int8
    if request.least is not None:
        options = dataclasses.replace(options, gate=Gate(request.least, options.gate.loss))
    result = write_int8(graph, destination, tiles, options, request.data, progress)
    return Prepared(destination, made=True, int8=result)


def labelled_data(folder: Path, schema: str | None, scenes: str | None) -> LabelledData:
    """Labelled images as `evaluate` takes them.

    Args:
        folder: the dataset.
        schema: how its masks are read. Default: what the data says.
        scenes: names of scenes with commas. Default: every image.
    """
    dataset = find_dataset(folder)
    if scenes:
        dataset = dataset.of_scenes(tuple(name.strip() for name in scenes.split(",") if name.strip()))
    return LabelledData(dataset, data_schema(dataset, schema, None))


def only_calibration_set(space: Workspace) -> Path:
    """The workspace's calibration set.

    Raises:
        WorkspaceError: there is none, or more than one.
    """
    folder = space.engines / "calibration"
    found = sorted(path for path in folder.iterdir() if is_calibration_set(path)) if folder.is_dir() else []
    if not found:
        raise WorkspaceError(
            f"INT8 needs calibration tiles, and there is no set in {folder}",
            hint="make one from imagery like the mission's: cdkd-edge calibrate SCENES",
        )
    if len(found) > 1:
        raise WorkspaceError(
            f"there are {len(found)} calibration sets in {folder}: {', '.join(path.name for path in found)}",
            hint="say which: " + "  or  ".join(f"--calibration {path}" for path in found[:4]),
        )
    return found[0]


def _require_meaning(request: Request, precision: str) -> None:
    """No option is passed over in silence."""
    int8 = request.int8 != Int8Options() or request.data is not None
    if request.int8.gate.loss != Gate().loss and request.data is None:
        raise UsageError("loss of mIoU is measured on labelled images", hint="--data DIR names them")
    if precision != "int8" and int8:
        raise UsageError("--data, --auto and the options of ranges and gate are for INT8 graphs", hint="add --int8")
    if precision == "fp32" and request != Request():
        raise UsageError("an FP32 graph is exported, not made from another", hint="add --fp16 or --int8")


def _require_hope(graph: Path, source: GraphManifest, precision: str, request: Request) -> None:
    """Don't find out again, in minutes, what is known: that FP16 breaks the network.

    INT8 graphs keep the rest of the network in FP16, so values that are too large for it end them too.
    """
    refusal = source.fp16_refused
    if refusal is None or not refusal.holds or request.again:
        return
    if precision == "fp16" and (refusal.out_of_range or (request.calibration is None and request.least is None)):
        asked = "FP16" if refusal.out_of_range else "FP16 (without --calibration or --min-agreement)"
        raise NumericalCheckError(
            f"{asked} is not for {graph.name}, as was found before: {refusal.reason}",
            hint="build it in FP32: cdkd-edge build; --again judges it once more",
        )
    if precision == "int8" and refusal.out_of_range:
        raise NumericalCheckError(
            f"INT8 keeps parts of {graph.name} in FP16, and was found before: {refusal.reason}",
            hint="build it in FP32: cdkd-edge build; --again tries it all the same",
        )


def _as_it_is(graph: Path, request: Request) -> Prepared:
    """A graph that is not made here, if nothing was said about its making."""
    if request != Request():
        raise UsageError(
            f"{graph} can only be taken as it is: the options are for making it from the FP32 graph",
            hint="name the FP32 graph, or leave them out",
        )
    return Prepared(graph)


def _missing(space: Workspace, precision: str) -> Path:
    raise WorkspaceError(
        f"there is no {precision} graph in {space.graphs}, and no exported graph to make it from",
        hint="make one: cdkd-edge export CKPT",
    )
