"""The Python API, offered by :mod:`cdkd_edge` itself: what the commands do, as functions.

Paths may be strings. ``workspace`` is the folder with ``export/``, ``engines/`` and ``benchmarks/``. Functions raise
:class:`cdkd_edge.core.errors.CdkdEdgeError`, whose message and ``hint`` are those of the command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.protocol import Engine, Labeller

if TYPE_CHECKING:
    from cdkd_edge.benchmark.record import BenchSummary
    from cdkd_edge.board.power.window import PowerWindow
    from cdkd_edge.core.labels import LabelSchema
    from cdkd_edge.graph.export import ExportResult
    from cdkd_edge.model.checkpoint import CheckpointReport
    from cdkd_edge.model.network import SegmentationNetwork
    from cdkd_edge.quality.datasets import Dataset
    from cdkd_edge.quality.evaluate import Evaluation
    from cdkd_edge.quality.parity import Parity
    from cdkd_edge.segmentation.options import SegmentOptions, SegmentResult

UInt8Array = npt.NDArray[np.uint8]
StrPath = str | Path


def load_checkpoint(
    path: StrPath, *, tile: int | None = None, weights: str | None = None
) -> tuple[SegmentationNetwork, CheckpointReport]:
    """Load a network in PyTorch, and a report of what the file held.

    Args:
        path: checkpoint of cdkd-edge, Mask-CDKD, timm or OpenMMLab.
        tile: side of the tiles, px. Default: the checkpoint's.
        weights: ``raw``, ``ema`` or a name, where the file has several sets. Default: averaged weights.

    Raises:
        CheckpointError: the file cannot be read safely, or holds no network of this kind.
    """
    from cdkd_edge.model.checkpoint import load_checkpoint as load

    return load(path, tile=tile, weights=weights)


def load_engine(path: StrPath, *, threads: int | None = None) -> Engine:
    """Load an engine after checking its manifest against the file and this machine.

    Use it in a ``with`` block, or call ``close()``. Pass it to :func:`segment` and :func:`bench`.

    Args:
        path: an engine that :func:`build` or ``cdkd-edge build`` wrote.
        threads: CPU threads, for a CPU engine. Default: all cores.

    Raises:
        ManifestError, EngineError: it cannot run here.
    """
    from cdkd_edge.engines.runtimes import load_engine as load

    return load(Path(path), threads=threads)


def export(
    checkpoint: StrPath,
    output: StrPath | None = None,
    *,
    schema: str | None = None,
    tile: int | None = None,
    batch: int = 1,
    fp16: bool | None = None,
    weights: str | None = None,
    workspace: StrPath = ".",
) -> ExportResult:
    """Write the ONNX graph of a checkpoint, checked against PyTorch.

    Args:
        checkpoint, tile, weights: as for :func:`load_checkpoint`.
        output: the graph (``.onnx``). Default: ``export/NAME.onnx`` in the workspace.
        schema: class names: a built-in schema or a ``.toml`` file. Default: the checkpoint's.
        batch: tiles per run.
        fp16: also write the FP16 graph: True, False, or None: if it passes its check.

    Raises:
        CheckpointError, SchemaError, GraphError, NumericalCheckError: it cannot be exported.
    """
    from cdkd_edge.core.errors import printable
    from cdkd_edge.graph.export import ExportOptions, export_checkpoint

    source = Path(checkpoint)
    destination = Path(output) if output else Workspace(Path(workspace)).graphs / f"{printable(source.stem)}.onnx"
    options = ExportOptions(tile=tile, batch=batch, schema=schema, fp16=fp16, weights=weights)
    return export_checkpoint(source, destination, options)


def build(
    graph: StrPath | None = None,
    output: StrPath | None = None,
    *,
    precision: str | None = None,
    runtime: str = "auto",
    outputs: str = "labels",
    calibration: StrPath | None = None,
    data: StrPath | None = None,
    schema: str | None = None,
    workspace: StrPath = ".",
) -> Path:
    """Build an engine for this machine; returns its path.

    Args:
        graph: exported graph (``.onnx``). Default: the only one in the workspace.
        output: the engine. Default: in ``engines/`` of the workspace.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``; a missing graph is made and checked. Default: the graph's.
        runtime: a runtime of :data:`cdkd_edge.engines.runtimes.RUNTIMES`, or ``auto``: the first that can run here; of
            several on a CPU, the fastest.
        outputs: ``labels``, ``confidence`` or ``probabilities``.
        calibration: calibration set for INT8. Default: the workspace's only one.
        data: labelled images on which an INT8 graph is judged.
        schema: how the masks of ``data`` are read.

    Raises:
        WorkspaceError, GraphError, NumericalCheckError, EngineError: it cannot be built.
    """
    from cdkd_edge.board.jetson import describe_board
    from cdkd_edge.engines.runtimes import choose_runtime
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions
    from cdkd_edge.precision.choose import GraphRequest, build_fastest, engine_places, prepare_graph
    from cdkd_edge.precision.int8_gate import labelled_data

    space, chosen = Workspace(Path(workspace)), choose_runtime(runtime, precision=precision)
    request = GraphRequest(
        calibration=Path(calibration) if calibration else None,
        data=labelled_data(Path(data), schema, None) if data else None,
    )
    extra = None if outputs == "labels" else outputs
    given = Path(graph) if graph else None
    source = prepare_graph(space, given, precision, request, output=extra, runtime=chosen).path
    places = engine_places(space, source, runtime, chosen, Path(output) if output else None, precision)
    mode = describe_board().power_mode
    return build_fastest(source, places, precision, TensorRTOptions(power_mode=mode.name if mode else None)).path


@overload
def segment(scene: UInt8Array, engine: Labeller | StrPath, **options: Any) -> UInt8Array: ...
@overload
def segment(
    scene: StrPath, engine: Labeller | StrPath, output: StrPath, *, resume: bool = True, **options: Any
) -> SegmentResult: ...
def segment(
    scene: UInt8Array | StrPath,
    engine: Labeller | StrPath,
    output: StrPath | None = None,
    *,
    resume: bool = True,
    **options: Any,
) -> UInt8Array | SegmentResult:
    """Label a scene: a raster of any size to a file, or an array to an array.

    Args:
        scene: anything GDAL opens, or an array uint8 ``[3, H, W]``, RGB.
        engine: a loaded engine, or the path of one.
        output: the label map (``.tif``); needed for a file, absent for an array.
        resume: continue what an interrupted run left.
        options: fields of :class:`cdkd_edge.segmentation.options.SegmentOptions`, e.g. ``overlap=128``.

    Returns:
        For a file a :class:`cdkd_edge.segmentation.options.SegmentResult`; for an array labels uint8 ``[H, W]``.

    Raises:
        SceneError, EngineError: the scene cannot be read, the label map not be written, or the engine failed.
    """
    from cdkd_edge.segmentation.options import SegmentOptions
    from cdkd_edge.segmentation.pipeline import segment_scene

    chosen = SegmentOptions(**options)
    with _opened(engine) as labeller:
        if isinstance(scene, np.ndarray):
            if output is not None:
                raise UsageError("labels of an array are returned, not written; give no output")
            return _labels_of(scene, labeller, chosen)
        if output is None:
            raise UsageError(f"where should the label map of {scene} go? Give output='NAME.tif'")
        return segment_scene(labeller, scene, Path(output), chosen, resume=resume)


def _labels_of(image: UInt8Array, labeller: Labeller, options: SegmentOptions) -> UInt8Array:
    """Labels ``[H, W]`` of an image ``[3, H, W]``, by the path that makes label maps."""
    import rasterio
    from rasterio.io import MemoryFile

    from cdkd_edge.segmentation.pipeline import label_rows

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise UsageError(f"an array must be uint8 [3, H, W], RGB; this one is {image.dtype} {list(image.shape)}")
    rows: list[UInt8Array] = []
    with MemoryFile() as memory:
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": image.shape[1], "width": image.shape[2]}
        with memory.open(**profile, photometric="RGB") as written:
            written.write(image)
        with rasterio.Env(), contextlib.closing(options.open(memory.name)) as reader:
            grid = options.grid_over(reader, labeller.tile)
            label_rows(labeller, reader, grid, lambda part: rows.append(part.copy()))
    return np.concatenate(rows)


def evaluate(
    artefact: StrPath,
    data: StrPath,
    *,
    schema: str | None = None,
    scenes: tuple[str, ...] = (),
    tile: int | None = None,
) -> Evaluation:
    """Score a checkpoint, a graph or an engine on labelled images.

    Args:
        artefact: the file.
        data: folder of images and masks.
        schema: how the masks are read. Default: what the data or the artefact says.
        scenes: only these scenes. Default: every image.
        tile: side of a checkpoint's tiles, px. Default: its own.

    Raises:
        DatasetError, SchemaError, EngineError: it cannot be judged.
    """
    from cdkd_edge.quality.artefacts import open_artefact
    from cdkd_edge.quality.evaluate import evaluate as judge

    opened = open_artefact(Path(artefact), tile=tile)
    with opened.labeller as labeller:
        return judge(labeller, *_labelled(data, scenes, schema, labeller), trained_on=opened.training)


def parity(
    reference: StrPath,
    candidate: StrPath,
    data: StrPath,
    *,
    schema: str | None = None,
    scenes: tuple[str, ...] = (),
    tolerance: float | None = None,
    min_agreement: float | None = None,
) -> Parity:
    """Compare an engine with its network on labelled images, tile for tile.

    Args:
        reference: what the labels should be: checkpoint, graph or engine.
        candidate: what is to be proved.
        data, schema, scenes: as for :func:`evaluate`.
        tolerance: largest loss of mIoU, percentage points. Default: 0.02; 0.5 for INT8.
        min_agreement: smallest share of pixels with the same label, 0..1. Default: 0.999; 0.98 for INT8.

    Returns:
        Scores of both, differences with intervals, and ``failures``: empty if the candidate passes.

    Raises:
        DatasetError, SchemaError, EngineError: nothing could be decided.
    """
    from cdkd_edge.quality.artefacts import open_artefacts
    from cdkd_edge.quality.parity import ParityGate, measure_parity

    with open_artefacts(Path(reference), Path(candidate)) as (ours, theirs):
        dataset, classes = _labelled(data, scenes, schema, theirs.labeller, ours.labeller)
        gate = ParityGate.of(theirs.precision, tolerance, min_agreement)
        trained_on = ours.training or theirs.training
        return measure_parity(ours.labeller, theirs.labeller, dataset, classes, gate, trained_on=trained_on)


def _labelled(
    data: StrPath, scenes: tuple[str, ...], schema: str | None, *labellers: Labeller
) -> tuple[Dataset, LabelSchema]:
    """Labelled images, and how their masks are read: by the first labeller whose classes have names, at the latest."""
    from cdkd_edge.quality.datasets import find_dataset
    from cdkd_edge.quality.evaluate import data_schema

    dataset = find_dataset(Path(data))
    dataset = dataset.of_scenes(scenes) if scenes else dataset
    named = next((one.schema for one in labellers if not one.schema.numbered), None)
    return dataset, data_schema(dataset, schema, named)


def bench(
    engine: Engine | StrPath,
    folder: StrPath | None = None,
    *,
    seconds: float | None = None,
    repeats: int | None = None,
    max_warm_up: float | None = None,
    power: bool | str = False,
    protocol: Literal["default", "paper", "mlperf"] = "default",
    workspace: StrPath = ".",
) -> BenchSummary:
    """Measure an engine: speed, latency, and with ``power`` watts and joules.

    Args:
        engine: a loaded engine, or the path of one.
        folder: a new folder for report and tables. Default: in ``benchmarks/`` of the workspace.
        seconds: of load. Default: the protocol's, 60.
        repeats: idle, warm-up and load so many times. Default: the protocol's, 1.
        max_warm_up: seconds after which warm-up ends though the engine is not steady. Default: the protocol's, 120.
        power: True: the first source that answers; or the name of one.
        protocol: ``default``, ``paper`` or ``mlperf``.

    Returns:
        What ``summary.json`` holds. Look at ``verdict`` first: an invalid run has no figures.

    Raises:
        EngineError, PowerError, SceneError: nothing could be measured.
    """
    from cdkd_edge.benchmark.phases import protocol_of
    from cdkd_edge.benchmark.run import BenchOptions, run_benchmark

    options = BenchOptions(
        protocol=protocol_of(protocol, load=seconds, repeats=repeats, warm_up_cap=max_warm_up),
        power=bool(power),
        power_source=power if isinstance(power, str) else None,
    )
    with _opened(engine) as loaded:
        space = Workspace(Path(workspace))
        return run_benchmark(loaded, Path(folder) if folder else space.new_run(loaded.manifest.name), options)


@contextlib.contextmanager
def power_window(
    name: str = "", *, source: str | None = None, interval: float = 0.1, idle: float = 0.0
) -> Iterator[PowerWindow]:
    """Measure the energy of a block of code.

    ::

        with ce.power_window("labelling", idle=5) as window:
            for scene in scenes:
                with window.part(scene) as part:
                    work(scene)
        print(window.joules, window.bound, window.net_joules, window.seconds)

    Args:
        name: what errors call it.
        source: a key of :data:`cdkd_edge.board.power.sources.SOURCES`. Default: the first that answers.
        interval: seconds between readings to ask for.
        idle: measure idle power for so many seconds before the block, for the net figures.

    Yields:
        A :class:`cdkd_edge.board.power.window.PowerWindow`; its figures can be read after the block.

    Raises:
        PowerError: no source answers; the message has the reason of each.
        UsageError: there is no source of that name, or a time is not one.
    """
    from cdkd_edge.board.power.window import open_window

    with open_window(name, source=source, interval=interval, idle=idle) as window:
        yield window


@contextlib.contextmanager
def _opened(engine: Any) -> Iterator[Any]:
    """A loaded engine as it is; a path is loaded, and closed when the block ends."""
    if not isinstance(engine, str | Path):
        yield engine
        return
    with load_engine(engine) as loaded:
        yield loaded
