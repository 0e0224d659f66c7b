"""What `build` builds: from which graph (:func:`prepare_graph`), into which file, and whether INT8 is faster."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.core.errors import EngineError, ManifestError, NumericalCheckError, UsageError, WorkspaceError
from cdkd_edge.core.manifest import LABELS, EngineManifest, GraphManifest, output_of, precision_of, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import speed_ratio
from cdkd_edge.engines.runtimes import Runtime, load_engine, require_precision, runtime_of
from cdkd_edge.graph.files import derived_path, is_derived_from
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.nodes import Note
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.graph.tiles import CalibrationSet, is_calibration_set
from cdkd_edge.precision.int8 import Int8Options, Int8Result, require_fitting, write_int8
from cdkd_edge.precision.int8_gate import Int8Gate, LabelledData


@dataclass(frozen=True)
class GraphRequest:
    """How to make an FP16 or INT8 graph."""

    calibration: Path | None = None  # folder of a calibration set. Default: the workspace's only one.
    int8: Int8Options = Int8Options()
    data: LabelledData | None = None
    again: bool = False  # make the graph even if there is one, or if FP16 is known to break it
    # Share of labels that must stay the same, 0..1. Default: that of ``int8``; for FP16, see :func:`.fp16.check_fp16`
    least: float | None = None


@dataclass(frozen=True)
class PreparedGraph:
    """A graph to build."""

    path: Path
    made: bool = False  # whether it was made just now
    int8: Int8Result | None = None  # the result of making it, if it is an INT8 graph that was made just now


def prepare_graph(
    space: Workspace,
    graph: Path | None,
    precision: str | None,
    request: GraphRequest = GraphRequest(),
    note: Note = lambda text: None,
    output: str | None = None,
    runtime: Runtime | None = None,
) -> PreparedGraph:
    """Find the graph for an engine, or make it.

    An FP16 or INT8 graph beside its FP32 graph is taken if its manifest says that it was made from it; otherwise it is
    made. Where there is no FP32 graph, as on a board to which one graph was carried, that one is taken. A graph that
    gives more than labels is made from the one of the same precision that gives labels, unless it is there.

    Args:
        space: where to look for graphs and calibration sets.
        graph: the named graph: FP32, or of the precision that is asked for.
        precision: ``fp32``, ``fp16``, ``int8``. Default: that of the named graph, or ``fp32``.
        request: how to make it.
        output: one of :data:`cdkd_edge.core.manifest.OUTPUT_KINDS`. Default: what the named graph gives, or labels.
        runtime: what the engine is for: no FP16 graph is made for the CPU, which cannot run it.

    Raises:
        WorkspaceError: no graph is named, and the workspace has none or more than one; the same for calibration sets.
        UsageError: the named graph is not FP32 and not what is asked for, or can only be taken as it is.
        NumericalCheckError: FP16 is known to break the network; ``request.again`` tries it again.
        EngineError: an FP16 graph would have to be made, and this machine cannot build an engine from it.
        CdkdEdgeError: as :func:`write_fp16`, :func:`write_int8` and :func:`write_variant` do.
    """
    if graph is not None and output_of(graph) != LABELS:
        own = (precision_of(graph), output_of(graph))
        if (precision or own[0], output or own[1]) != own:
            raise UsageError(
                f"{graph} is a graph of {own[0]} that gives {own[1]}, and something else was asked for",
                hint="name the graph it was made from, or leave out the options",
            )
        return _as_it_is(graph, request)
    if request.least is not None:
        Int8Gate(request.least)  # raises the error for an impossible share
    if output is None or output == LABELS:
        return _labels_graph(space, graph, precision, request, note, runtime)
    wanted = precision or "fp32"
    can_be_made = graph is not None or space.graphs_of(wanted) or space.graphs_of("fp32")
    if not can_be_made and space.graphs_of(wanted, output):
        return _as_it_is(space.only_graph(wanted, f"cdkd-edge build --{output}", output), request)
    labels = _labels_graph(space, graph, precision, request, note, runtime)
    destination = derived_path(labels.path, output)
    there = is_derived_from(destination, labels.path, output)
    if not there:
        write_variant(labels.path, destination, output, note)
    return dataclasses.replace(labels, path=destination, made=labels.made or not there)


def _labels_graph(
    space: Workspace,
    graph: Path | None,
    precision: str | None,
    request: GraphRequest,
    note: Note,
    runtime: Runtime | None,
) -> PreparedGraph:
    """The graph that gives labels alone; see :func:`prepare_graph`."""
    wanted = precision or (precision_of(graph) if graph else None) or "fp32"
    _require_useful(request, wanted)
    found, is_wanted = _find(space, graph, wanted)
    if is_wanted:
        return _as_it_is(found, request)
    destination = derived_path(found, wanted)
    if request == GraphRequest() and is_derived_from(destination, found):
        return PreparedGraph(destination)
    source = read_manifest(found, GraphManifest)
    _require_not_refused(found, source, wanted, request)
    if wanted == "fp16":
        if runtime is not None:
            require_precision(runtime, wanted, found)
        check, imagery = None, "sample"
        if request.calibration is not None:
            tiles = CalibrationSet.load(request.calibration)
            require_fitting(tiles, source, "check")
            check, imagery = tiles.tiles("check"), tiles.name
        write_fp16(found, destination, tiles=check, imagery=imagery, least=request.least, note=note)
        return PreparedGraph(destination, made=True)
    tiles = CalibrationSet.load(request.calibration or _only_calibration_set(space))
    options = request.int8
    if request.least is not None:
        options = dataclasses.replace(options, gate=Int8Gate(request.least, options.gate.loss))
    result = write_int8(found, destination, tiles, options, request.data, note)
    return PreparedGraph(destination, made=True, int8=result)


def _find(space: Workspace, graph: Path | None, precision: str) -> tuple[Path, bool]:
    """A graph that gives labels, and whether it already has the precision; otherwise it is the FP32 graph."""
    if graph is not None:
        own = precision_of(graph)
        if own == precision or (precision == "fp32" and own is None):
            return graph, True
        if own not in ("fp32", None):
            raise UsageError(
                f"{graph} is a graph of {own}, and --{precision} was asked for",
                hint=f"name the FP32 graph, leave out --{precision}, or leave out the graph",
            )
        return graph, False
    has_plain = bool(space.graphs_of("fp32"))
    if precision == "fp32" or (not has_plain and space.graphs_of(precision)):
        return space.only_graph(precision), True
    if not has_plain:
        raise WorkspaceError(
            f"there is no {precision} graph in {space.graphs}, and no exported graph to make it from",
            hint="make one: cdkd-edge export CKPT",
        )
    return space.only_graph("fp32", f"cdkd-edge build --{precision}"), False


def _as_it_is(graph: Path, request: GraphRequest) -> PreparedGraph:
    """A graph that is not made here; options about its making are an error."""
    if request != GraphRequest():
        raise UsageError(
            f"{graph} can only be taken as it is: the options are for making it from the FP32 graph",
            hint="name the FP32 graph, or leave them out",
        )
    return PreparedGraph(graph)


def _only_calibration_set(space: Workspace) -> Path:
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


def _require_useful(request: GraphRequest, precision: str) -> None:
    """Refuse options that would have no effect."""
    int8 = request.int8 != Int8Options() or request.data is not None
    if request.int8.gate.loss != Int8Gate().loss and request.data is None:
        raise UsageError("loss of mIoU is measured on labelled images", hint="--data DIR names them")
    if precision != "int8" and int8:
        raise UsageError("--data, --auto and the options of ranges and gate are for INT8 graphs", hint="add --int8")
    if precision == "fp32" and request != GraphRequest():
        raise UsageError("an FP32 graph is exported, not made from another", hint="add --fp16 or --int8")


def _require_not_refused(graph: Path, source: GraphManifest, precision: str, request: GraphRequest) -> None:
    """Raise the error of an earlier check that found FP16, which INT8 graphs use too, to break the network."""
    refusal = source.fp16_refused
    if refusal is None or not refusal.holds or request.again:
        return
    if not refusal.out_of_range and (precision == "int8" or request.calibration or request.least is not None):
        return
    asked = "FP16" if refusal.out_of_range else "FP16 (without --calibration or --min-agreement)"
    found = f"{asked} is not for {graph.name}, as was found before"
    if precision == "int8":
        found = f"INT8 keeps parts of {graph.name} in FP16, and was found before"
    advice = "build it in FP32: cdkd-edge build; --again checks it once more"
    raise NumericalCheckError(f"{found}: {refusal.reason}", hint=advice)


def engine_path(space: Workspace, graph: Path, runtime: Runtime) -> Path:
    """Where the engine of a graph goes: ``engines/NAME.fp32.cpu.onnx``, ``engines/NAME.fp16.confidence.engine``."""
    precision = precision_of(graph) or "fp32"
    kind = _kind_suffix(output_of(graph))
    name = graph.stem.removesuffix(kind).removesuffix(f".{precision}")
    return space.engines / f"{name}.{precision}{kind}{runtime.suffix}"


@dataclass(frozen=True)
class SpeedComparison:
    """An INT8 engine timed against the engine that it has to be faster than."""

    path: Path  # the other engine
    ratio: float  # tiles per second of the INT8 engine over those of the other


def compare_speed(engine: Path, manifest: EngineManifest, note: Note = lambda text: None) -> SpeedComparison | None:
    """Time a new INT8 engine against the FP16 engine beside it (on a CPU: FP32); on ViTs, INT8 can be slower.

    Returns:
        None for other precisions, where there is no such engine, and where one of the two cannot run here.
    """
    kind, runtime = _kind_suffix(manifest.output), runtime_of(manifest)
    suffix = f".int8{kind}{runtime.suffix}"
    path = engine.with_name(f"{engine.name.removesuffix(suffix)}.{runtime.fastest_float}{kind}{runtime.suffix}")
    if manifest.precision != "int8" or not engine.name.endswith(suffix) or not path.is_file():
        return None
    note(f"timing against {path.name}")
    try:
        with contextlib.closing(load_engine(engine)) as new, contextlib.closing(load_engine(path)) as other:
            return SpeedComparison(path, speed_ratio(new, other))
    except (EngineError, ManifestError):
        return None  # compiled for another machine, for example


def _kind_suffix(kind: str) -> str:
    return "" if kind == LABELS else f".{kind}"
