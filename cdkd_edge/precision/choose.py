"""What `build` builds: from which graph (:func:`prepare_graph`), for which runtime (:func:`build_fastest`), into which
file, and whether INT8 is faster (:func:`compare_speed`)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import (
    EngineError,
    ManifestError,
    MissingExtraError,
    NumericalCheckError,
    UsageError,
    WorkspaceError,
)
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.manifest import (
    LABELS,
    EngineManifest,
    GraphManifest,
    output_of,
    precision_of,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import speed_ratio
from cdkd_edge.engines.runtimes import RUNTIMES, Runtime, build_engine, load_engine, require_precision, runtime_of
from cdkd_edge.graph.files import derived_path, is_derived_from
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.nodes import Note
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.graph.tiles import CalibrationSet, is_calibration_set
from cdkd_edge.precision.int8 import Int8Options, Int8Result, require_fitting, write_int8
from cdkd_edge.precision.int8_gate import Int8Gate, LabelledData

if TYPE_CHECKING:
    from cdkd_edge.engines.protocol import Log
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions

NOISE = 0.03  # another runtime has to be faster than the first one by more than this


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
        precision: ``fp32``, ``fp16``, ``int8``; ``bf16`` takes the FP32 graph. Default: that of the named graph, or
            ``fp32``.
        request: how to make it.
        output: one of :data:`cdkd_edge.core.manifest.OUTPUT_KINDS`. Default: what the named graph gives, or labels.
        runtime: what the engine is for: no FP16 graph is made for the CPU, and no INT8 graph for OpenVINO.

    Raises:
        WorkspaceError: no graph is named, and the workspace has none or more than one; the same for calibration sets.
        UsageError: the named graph is not FP32 and not what is asked for, or can only be taken as it is.
        NumericalCheckError: FP16 is known to break the network; ``request.again`` tries it again.
        EngineError: an FP16 or INT8 graph would have to be made, and the runtime cannot build an engine from it.
        CdkdEdgeError: as :func:`write_fp16`, :func:`write_int8` and :func:`write_variant` do.
    """
    if precision == "bf16":
        precision = "fp32"
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
    if runtime is not None:
        require_precision(runtime, wanted, found)
    if wanted == "fp16":
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


def engine_path(space: Workspace, graph: Path, runtime: Runtime, precision: str | None = None) -> Path:
    """Where the engine of a graph goes: ``engines/NAME.fp32.cpu.onnx``, ``engines/NAME.fp16.confidence.engine``."""
    own = precision_of(graph) or "fp32"
    kind = _kind_suffix(output_of(graph))
    name = graph.stem.removesuffix(kind).removesuffix(f".{own}")
    return space.engines / f"{name}.{precision or own}{kind}{runtime.suffix}"


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that was built and kept."""

    path: Path
    manifest: EngineManifest
    refused: dict[str, str] = field(default_factory=dict)  # why another runtime's engine is no choice, by its title


def engine_places(
    space: Workspace, graph: Path, name: str, runtime: Runtime, output: Path | None = None, precision: str | None = None
) -> dict[str, Path]:
    """Where `build` would put the engine of a graph, by runtime; several if it may choose the runtime.

    Args:
        space, graph, precision: as for :func:`engine_path`.
        name: the runtime as the user named it; with ``auto`` on a CPU, every runtime of CPUs that is installed.
        runtime: what :func:`cdkd_edge.engines.runtimes.choose_runtime` made of that name; it is preferred.
        output: the engine as the user named it.
    """
    choice = [runtime]
    if name == "auto" and runtime.on_cpu:
        wanted = precision or precision_of(graph) or "fp32"
        able = (one for one in RUNTIMES.values() if one.on_cpu and wanted in one.precisions and one is not runtime)
        choice += [one for one in able if one.why_not_here() is None]
    return {one.name: output or engine_path(space, graph, one, precision) for one in choice}


def build_fastest(
    graph: Path,
    places: Mapping[str, Path],
    precision: str | None = None,
    options: TensorRTOptions | None = None,
    note: Note = lambda text: None,
    log: Log = lambda severity, text: None,
) -> BuiltEngine:
    """Build the engine of a graph for the only runtime, or for every one, and then keep the fastest that is right.

    The engines that pass their checks label the same tile in turn. The first runtime is preferred: it is kept unless
    another is faster by more than :data:`NOISE`. The others leave no file.

    Args:
        graph, precision, options, note, log: as for :func:`cdkd_edge.engines.runtimes.build_engine`.
        places: where the engine goes, by runtime; see :func:`engine_places`.

    Raises:
        CdkdEdgeError: no engine can be built; the error is that of the first runtime.
    """
    first, *others = places
    if not others:
        manifest = build_engine(graph, places[first], RUNTIMES[first], options, note, log, precision)
        return BuiltEngine(places[first], manifest)
    for path in places.values():
        require_replaceable(path)
    errors: dict[str, EngineError | NumericalCheckError] = {}
    built: dict[str, tuple[Path, EngineManifest]] = {}
    with scratch_folder() as scratch:
        for name, place in places.items():
            note(f"building for {RUNTIMES[name].title}")
            path = scratch / name / place.name
            try:
                built[name] = path, build_engine(graph, path, RUNTIMES[name], None, note, log, precision)
            except (EngineError, NumericalCheckError) as error:
                errors[name] = error
        if not built:
            raise errors[first]
        chosen, over = _fastest(built, note)
        path, manifest = places[chosen], dataclasses.replace(built[chosen][1], speed_over=over)
        with whole_file(path) as temporary:
            shutil.copyfile(built[chosen][0], temporary)
            write_manifest(path, manifest)
    return BuiltEngine(path, manifest, {RUNTIMES[name].title: error.message for name, error in errors.items()})


def _fastest(built: Mapping[str, tuple[Path, EngineManifest]], note: Note) -> tuple[str, dict[str, float]]:
    """The runtime to keep, and its tiles per second over those of the others, by what manifests call these."""
    first, *others = built
    speeds = {first: 1.0}
    for name in others:
        note(f"timing {RUNTIMES[name].title} against {RUNTIMES[first].title}")
        with load_engine(built[name][0]) as new, load_engine(built[first][0]) as old:
            speeds[name] = speed_ratio(new, old)
    fastest = max(speeds, key=lambda name: speeds[name])
    chosen = fastest if speeds[fastest] > 1 + NOISE else first
    return chosen, {built[name][1].runtime: speeds[chosen] / speeds[name] for name in built if name != chosen}


@dataclass(frozen=True)
class SpeedComparison:
    """An INT8 engine timed against the fastest engine that it has to be faster than."""

    path: Path  # the other engine
    ratio: float  # tiles per second of the INT8 engine over those of the other


def compare_speed(engine: Path, manifest: EngineManifest, note: Note = lambda text: None) -> SpeedComparison | None:
    """Time a new INT8 engine against the FP16 engine beside it (on a CPU: FP32, BF16); on ViTs, INT8 can be slower.

    Returns:
        Of several, the comparison with the fastest. None for other precisions, and where there is no such engine that
        can run here.
    """
    kind, runtime = _kind_suffix(manifest.output), runtime_of(manifest)
    suffix = f".int8{kind}{runtime.suffix}"
    if manifest.precision != "int8" or not engine.name.endswith(suffix):
        return None
    name = engine.name.removesuffix(suffix)
    comparisons = []
    for rival in (other for other in RUNTIMES.values() if other.on_cpu == runtime.on_cpu):
        for precision in rival.rivals_of_int8:
            path = engine.with_name(f"{name}.{precision}{kind}{rival.suffix}")
            if not path.is_file():
                continue
            note(f"timing against {path.name}")
            try:
                with load_engine(engine) as new, load_engine(path) as old:
                    comparisons.append(SpeedComparison(path, speed_ratio(new, old)))
            except (EngineError, ManifestError, MissingExtraError):
                continue  # compiled for another machine, for example
    return min(comparisons, key=lambda one: one.ratio, default=None)


def _kind_suffix(kind: str) -> str:
    return "" if kind == LABELS else f".{kind}"
