"""A sweep: builds, evaluates and benchmarks every combination of graph, precision, tile, batch and power mode.

Each step is a command of cdkd-edge (``export``, ``build``, ``evaluate``, ``bench``) in a child process, so that a
crash costs one point. Its result is a file or folder that appears whole, under a name that holds a digest of
everything it depends on. Those files are the only state: a sweep that was killed finds them and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from cdkd_edge import __version__
from cdkd_edge.benchmark.compare_checks import read_scores
from cdkd_edge.benchmark.describe import device_of
from cdkd_edge.benchmark.folder import read_summary
from cdkd_edge.benchmark.record import INVALID, BenchSummary
from cdkd_edge.benchmark.run import LIBRARIES
from cdkd_edge.benchmark.sweep_table import (
    FAILED,
    LOSS,
    MISSING,
    Sweep,
    SweepPoint,
    judged,
    measured_point,
    write_sweep,
)
from cdkd_edge.board.jetson import PowerMode
from cdkd_edge.core.errors import BenchError, CdkdEdgeError, UsageError
from cdkd_edge.core.files import sha256_of, sole_use
from cdkd_edge.core.machine import describe_machine, library_versions
from cdkd_edge.core.manifest import (
    PRECISIONS,
    AnyManifest,
    EngineManifest,
    GraphManifest,
    is_artefact_name,
    kind_of,
    precision_of,
    read_manifest,
)
from cdkd_edge.core.process import run_command
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import choose_runtime, runtime_of
from cdkd_edge.graph.files import derived_path, is_derived_from
from cdkd_edge.graph.nodes import Note
from cdkd_edge.graph.tiles import CalibrationSet, is_calibration_set
from cdkd_edge.model.config import attention_text
from cdkd_edge.quality.datasets import Dataset

LOCK_SECONDS = 20.0  # how long to wait for a step of a killed sweep, which ends when the sweep does


@dataclass(frozen=True)
class Source:
    """A graph or checkpoint to make engines of."""

    path: Path
    sha256: str
    graph: GraphManifest | None  # None: it is a checkpoint


@dataclass(frozen=True)
class SweepOptions:
    """What is crossed, and how each point is measured. Options of commands are given as their words."""

    runtime: str = "auto"  # as for `build`
    precisions: tuple[str, ...] = ()  # default: what the runtime can run; of a graph that is not FP32, its own
    tiles: tuple[int, ...] = ()  # px; default: those of the graph or checkpoint
    batches: tuple[int, ...] = ()  # default: that of the graph; 1
    modes: tuple[PowerMode | None, ...] = (None,)  # None: the mode that the machine is in
    calibrations: tuple[Path, ...] = ()  # folders of calibration sets. Default: those of the workspace
    overlap: int | None = None  # of neighbouring tiles, px. Default: that of `segment`
    dataset: Dataset | None = None  # labelled images
    evaluate: tuple[str, ...] = ()  # options of `evaluate`, the data among them
    bench: tuple[str, ...] = ()  # options of `bench`
    loss: float = LOSS  # points of mIoU that the chosen point may lie below the best
    step: tuple[str, ...] = ("cdkd-edge",)  # what stands before the words of a step


@dataclass(frozen=True)
class Combination:
    """What a point is made of. ``tile`` None: the checkpoint's own."""

    source: Source
    tile: int | None
    batch: int
    precision: str
    mode: PowerMode | None


class _StepError(Exception):
    """A step failed; the message is the reason."""


# --- what is swept --------------------------------------------------------------------------------


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Read what the graphs and checkpoints are. A graph that was made of another one of them is left out.

    Raises:
        UsageError: one is an engine or does not exist.
        ManifestError: a graph is not what its manifest says.
    """
    found: dict[str, Source] = {}
    for path in paths:
        if kind_of(path) == EngineManifest.kind:
            raise UsageError(f"{path} is an engine", hint="name the graph it was built of, or its checkpoint")
        if is_artefact_name(path):
            graph = read_manifest(path, GraphManifest)
            found.setdefault(graph.artefact.sha256, Source(path, graph.artefact.sha256, graph))
        elif path.is_file():
            sha256 = sha256_of(path)
            found.setdefault(sha256, Source(path, sha256, None))
        else:
            raise UsageError(f"{path} is no graph (.onnx) and no checkpoint", hint="cdkd-edge sweep CKPT|GRAPH ...")
    return [one for one in found.values() if not (one.graph and one.graph.parent and one.graph.parent.sha256 in found)]


def combinations(sources: Sequence[Source], options: SweepOptions) -> list[Combination]:
    """The cross, graph by graph; power modes change fastest."""
    if unknown := sorted(set(options.precisions) - set(PRECISIONS)):
        raise UsageError(f"{unknown[0]!r} is no precision", hint=f"--precision is of {', '.join(PRECISIONS)}")
    found, able = [], choose_runtime(options.runtime).precisions
    for source in sources:
        graph = source.graph
        own = able if graph is None or graph.precision == "fp32" else (graph.precision,)
        tiles: tuple[int | None, ...] = options.tiles or ((graph.tile,) if graph else (None,))
        batches = options.batches or ((graph.batch,) if graph else (1,))
        cross = product(tiles, batches, options.precisions or own, options.modes)
        found += [Combination(source, *one) for one in cross]
    return found


# --- the sweep ------------------------------------------------------------------------------------


def run_sweep(
    sources: Sequence[Source],
    folder: Path,
    space: Workspace,
    options: SweepOptions,
    command: str = "",
    note: Note = lambda text: None,
) -> Sweep:
    """Measure every combination that is not measured yet; ``sweep.json`` is up to date after each.

    A point that fails has a reason, and the others go on. The next sweep tries it again.

    Args:
        sources: from :func:`open_sources`.
        folder: the sweep's own folder, new or that of an earlier sweep.
        space: where calibration sets are, and graphs for the modelled bound.
        command: the command line, for the record.

    Raises:
        BenchError: another sweep is at work in the folder.
        UsageError: a precision is unknown.
        OSError: the folder cannot be written.
    """
    points = combinations(sources, options)
    with _alone_in(folder, note) as lock:  # steps hold it too: what a killed sweep left running ends first
        work = _Work(folder, space, options, note, lock)
        rows = [work.unmeasured(number, point) for number, point in enumerate(points, 1)]
        data, machine = options.dataset, describe_machine()
        sweep = Sweep(
            tuple(rows), device=machine.board or machine.cpu, data=str(data.folder) if data else None,
            images=len(data) if data else 0, command=command,
        )  # fmt: skip
        for index, point in enumerate(points):
            write_sweep(folder, judged(replace(sweep, points=tuple(rows)), options.loss))
            place = f"point {index + 1} of {len(points)}: "
            rows[index], where = work.measure(rows[index], point, place)
            sweep = replace(sweep, device=where or sweep.device)
        sweep = judged(replace(sweep, points=tuple(rows)), options.loss)
        write_sweep(folder, sweep)
    return sweep


@contextlib.contextmanager
def _alone_in(folder: Path, note: Note) -> Iterator[int]:
    try:
        with sole_use(folder, LOCK_SECONDS, partial(note, "waiting for another sweep in this folder to end")) as lock:
            yield lock
    except BlockingIOError:
        hint = "wait until it has ended, or name another --output"
        raise BenchError(f"another sweep is at work in {folder}", hint=hint) from None


class _Work:
    """Does the steps of a sweep whose results are not there yet."""

    def __init__(self, folder: Path, space: Workspace, options: SweepOptions, note: Note, lock: int) -> None:
        self.folder, self.space, self.options, self._note, self._lock = folder, space, options, note, lock
        machine = describe_machine()
        about = machine.cpu, machine.cores, machine.board, machine.l4t
        self._where = [__version__, *about, sorted(library_versions(LIBRARIES).items())]  # figures hold for these alone
        self._failed: dict[Path, str] = {}  # what was tried in vain in this sweep
        self._data = _state_of(options.dataset) if options.dataset else None

    def unmeasured(self, number: int, point: Combination) -> SweepPoint:
        """The point before anything was done for it."""
        source, graph, mode = point.source, point.source.graph, point.mode
        return SweepPoint(
            number=number, source=str(source.path), source_sha256=source.sha256, precision=point.precision,
            tile=point.tile, batch=point.batch, power_mode=mode.name if mode else None, status=MISSING,
            reason="not measured yet", attention=_attention(graph) if graph else None,
            rebuild=self._rebuild(point, self.options.runtime),
        )  # fmt: skip

    def measure(self, row: SweepPoint, point: Combination, place: str) -> tuple[SweepPoint, str]:
        """The point with its figures, or with the reason why it has none; and the device, where it is known."""
        try:
            self._note(f"{place}{point.source.path.name}, {point.precision}: graph and engine")
            graph = self._graph(point)
            manifest = read_manifest(graph, GraphManifest)
            row = replace(row, attention=_attention(manifest), tile=manifest.tile)
            engine = self._engine(point, graph)
            built = read_manifest(engine, EngineManifest)
            row = replace(row, engine=self._own(engine), engine_sha256=built.artefact.sha256, runtime=built.runtime)
            row = replace(row, rebuild=self._rebuild(point, runtime_of(built).name, self._calibration(point, graph)))
            if self.options.dataset:
                self._note(f"{place}{engine.name}: accuracy")
                row = self._with_score(row, engine, built)
            self._note(f"{place}{engine.name}: benchmark" + (f" in {point.mode.name}" if point.mode else ""))
            run, summary = self._run(point, engine, built)
        except (_StepError, CdkdEdgeError) as error:
            return replace(row, status=FAILED, reason=str(error)), ""
        return measured_point(replace(row, run=self._own(run)), summary, self.options.overlap), device_of(summary)

    def _own(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _graph(self, point: Combination) -> Path:
        """The graph of a point that is FP32 or has been named: found, or exported from the checkpoint."""
        source, graph = point.source, point.source.graph
        if graph is not None:
            if (point.tile, point.batch) != (graph.tile, graph.batch):
                raise _StepError(
                    f"{source.path.name} takes {graph.batch} x {graph.tile} px; other tiles and batches are exported "
                    f"from the checkpoint, where PyTorch is: {shlex.join(self._export(point, Path('GRAPH')))}"
                )
            return source.path
        path = self._exported(point)
        if find_spec("torch") is None and not path.exists():
            command = shlex.join(self._export(point, Path("GRAPH")))
            raise _StepError(f"a checkpoint is exported where PyTorch is, and its graph named here: {command}")
        if not _is_made_of(path, GraphManifest, source.sha256):
            self._do(path, self._export(point, path)[1:])
        return path

    def _exported(self, point: Combination) -> Path:
        shape = (f"-{point.tile}" if point.tile else "") + (f"-b{point.batch}" if point.batch > 1 else "")
        key = _digest(__version__, point.source.sha256, point.tile, point.batch)
        return self.folder / "export" / f"{point.source.path.stem}{shape}.{key}.onnx"

    def _engine(self, point: Combination, graph: Path) -> Path:
        runtime, precision = self.options.runtime, point.precision
        suffix = choose_runtime(runtime, precision=precision).suffix.rpartition(".")[2]
        sha256 = read_manifest(graph, GraphManifest).artefact.sha256
        key = _digest(self._where, sha256, precision, runtime)
        name = graph.stem.removesuffix(f".{precision}")
        path = self.folder / "engines" / f"{name}.{precision}.{key}.{suffix}"
        wanted = self._lower(graph, precision)
        digest = read_manifest(wanted, GraphManifest).artefact.sha256 if wanted else ""
        if not _is_made_of(path, EngineManifest, digest):
            calibration = self._calibration(point, graph) if wanted is None else ()
            place = ("-o", str(path), "-w", str(self.space.root))  # where calibration sets are
            self._do(path, [*self._build(graph, precision, runtime, calibration), *place])
        return path

    def _lower(self, graph: Path, precision: str) -> Path | None:
        """The graph of a precision that an engine is built of; None if it has to be made."""
        if precision_of(graph) == ("fp32" if precision == "bf16" else precision):
            return graph
        path = derived_path(graph, precision)
        if not is_derived_from(path, graph):
            return None
        if precision == "int8" and self.options.calibrations:
            found = read_manifest(path, GraphManifest).quantization.get("calibration_set", {})
            if found.get("sha256") not in {CalibrationSet.load(one).sha256 for one in self.options.calibrations}:
                return None
        return path

    def _calibration(self, point: Combination, graph: Path) -> tuple[str, ...]:
        """``--calibration SET`` with the set that has the graph's tiles; nothing if `build` is to choose or refuse."""
        if point.precision != "int8" or precision_of(graph) != "fp32":
            return ()
        within = self.space.engines / "calibration"
        there = sorted(within.iterdir()) if within.is_dir() else []
        named = self.options.calibrations or tuple(path for path in there if is_calibration_set(path))
        tile = read_manifest(graph, GraphManifest).tile
        fitting = [path for path in named if CalibrationSet.load(path).tile == tile]
        if len(fitting) > 1 and self.options.calibrations:
            raise _StepError(f"{len(fitting)} of the calibration sets have tiles of {tile} px; name one of them")
        chosen = fitting if len(fitting) == 1 else list(self.options.calibrations[:1])
        return ("--calibration", str(chosen[0])) if chosen else ()

    def _with_score(self, row: SweepPoint, engine: Path, built: EngineManifest) -> SweepPoint:
        """The point with the mIoU of its engine, which is measured once for all power modes."""
        sha256 = built.artefact.sha256
        place = self.folder / "accuracy" / f"{engine.name}.{_digest(sha256, self.options.evaluate, self._data)}"
        try:
            if not place.is_dir():
                self._do(place, ["evaluate", str(engine), *self.options.evaluate, "-o", str(place)])
            (score,) = read_scores(place)
        except (_StepError, CdkdEdgeError) as error:
            return replace(row, mean_iou_reason=str(error))
        return replace(row, mean_iou=score.mean_iou)

    def _run(self, point: Combination, engine: Path, built: EngineManifest) -> tuple[Path, BenchSummary]:
        mode = ("--set-mode", str(point.mode.id)) if point.mode else ()
        key = _digest(self._where, built.artefact.sha256, self.options.bench, mode)
        where = f".{point.mode.name}" if point.mode else ""
        path = self.folder / "runs" / f"{engine.name}{where}.{key}"
        with contextlib.suppress(BenchError):
            summary = read_summary(path)
            if summary.verdict.status != INVALID:
                return path, summary
        if path.is_dir():  # an invalid run; the cause may be gone
            shutil.rmtree(path)
        # The modelled bound is computed from the graph in the export/ of a workspace.
        space = self.folder if point.source.graph is None else self.space.root
        words = ["bench", str(engine), *self.options.bench, *mode, "-o", str(path), "-w", str(space)]
        try:
            self._do(path, words)
        except _StepError:
            if not path.is_dir():
                raise
        return path, read_summary(path)  # that of an invalid run says why it is

    def _export(self, point: Combination, path: Path) -> list[str]:
        tile = ["--tile", str(point.tile)] if point.tile else []
        batch = ["--batch", str(point.batch)] if point.batch > 1 else []
        checkpoint = "CKPT" if point.source.graph else str(point.source.path)
        return ["cdkd-edge", "export", checkpoint, *tile, *batch, "--no-fp16", "-o", str(path)]

    def _build(self, graph: Path, precision: str, runtime: str, calibration: tuple[str, ...]) -> list[str]:
        return ["build", str(graph), f"--{precision}", "--runtime", runtime, *calibration]

    def _rebuild(self, point: Combination, runtime: str, calibration: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The commands that make a point's engine in a workspace, and set the board."""
        graph, commands = point.source.path, []
        if point.source.graph is None:
            graph = Path("export", f"{self._exported(point).name.rsplit('.', 2)[0]}.onnx")
            commands.append(self._export(point, graph))
        else:
            calibration = ()  # its INT8 graph lies beside it
        commands.append(["cdkd-edge", *self._build(graph, point.precision, runtime, calibration)])
        if point.mode:
            commands.append(["sudo", "nvpmodel", "-m", str(point.mode.id)])
        return tuple(map(shlex.join, commands))

    def _do(self, result: Path, words: Sequence[str]) -> None:
        """Run a command that makes ``result``, once in a sweep; _StepError with the reason if it fails."""
        if result not in self._failed:
            try:
                self._failed[result] = run_command([*self.options.step, *words], (self._lock,))
            except OSError as error:
                raise _StepError(f"{words[0]} cannot be started: {error.strerror}") from None
        if reason := self._failed[result]:
            raise _StepError(f"{words[0]}: {reason}")


def _is_made_of(path: Path, kind: type[AnyManifest], sha256: str) -> bool:
    """Whether an exported graph or an engine is whole and was made of the checkpoint or graph with this digest."""
    try:
        made = read_manifest(path, kind)
    except CdkdEdgeError:
        return False
    return (made.graph if isinstance(made, EngineManifest) else made.checkpoint).sha256 == sha256


def _attention(graph: GraphManifest) -> str:
    found = graph.network.get("attention") or ()
    return attention_text([str(one) for one in found])


def _state_of(dataset: Dataset) -> list[object]:
    """What identifies labelled images without reading them: names, sizes and times of the files."""
    files = [path for pair in dataset for path in (pair.image, pair.mask)]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _digest(*parts: object) -> str:
    """A short digest of JSON data."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:8]
