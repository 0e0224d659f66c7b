"""``cdkd-edge demo``: every stage with a bundled trained checkpoint, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import from_origin

from cdkd_edge.accuracy.metrics import ConfusionMatrix
from cdkd_edge.benchmarks.bench import BenchOptions, run_benchmark
from cdkd_edge.benchmarks.protocol import protocol_of
from cdkd_edge.benchmarks.record import BenchSummary
from cdkd_edge.engines.cpu import build_cpu_engine
from cdkd_edge.engines.load import load_engine
from cdkd_edge.errors import WorkspaceError
from cdkd_edge.export.pipeline import ExportResult, export_checkpoint
from cdkd_edge.files import whole_file
from cdkd_edge.manifest import EngineManifest
from cdkd_edge.scene.outputs import label_map_paths, quicklook_path
from cdkd_edge.scene.pipeline import SegmentOptions, SegmentResult, segment_scene
from cdkd_edge.scene.quicklook import write_quicklook
from cdkd_edge.scene.reader import SceneReader
from cdkd_edge.scenery import draw_scene
from cdkd_edge.workspace import Workspace

SCENE_WIDTH, SCENE_HEIGHT, SCENE_SEED = 3000, 2000, 2026
SCENE_PIXEL_M = 0.5
MARK = ".cdkd-edge-demo"
"""File that marks a folder as the demo's own, so that a second run may replace what the first one wrote."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    export: ExportResult
    engine: EngineManifest
    engine_path: Path
    segment: SegmentResult
    quicklook: Path
    mean_iou: float | None
    """Against the drawn scene's exact labels, 0..1; None for a user's scene, which has none."""
    bench: BenchSummary
    bench_folder: Path


def run_demo(
    workspace: Workspace,
    scene: Path | None = None,
    options: SegmentOptions = SegmentOptions(),
    progress: Callable[[str], None] = lambda step: None,
) -> DemoResult:
    """Export, build, segment, benchmark.

    Args:
        workspace: where everything is written.
        scene: the user's own scene; default: 3000 x 2000 px drawn by the package, georeferenced.
        options: bands and stretch for ``scene``.
        progress: called with the name of each step.

    Raises:
        WorkspaceError: the workspace holds files that no demo wrote.
        CdkdEdgeError: as the stages do.
    """
    if scene is not None:  # find what is wrong with it before anything is made
        SceneReader(scene, bands=options.bands, stretch=options.stretch).close()
    _claim(workspace.root)
    truth = None
    if scene is None:
        progress("drawing a scene")
        scene = workspace.root / "demo_scene.tif"
        truth = _draw(scene)
    with resources.as_file(resources.files("cdkd_edge.demo") / "tiny.safetensors") as checkpoint:
        exported = export_checkpoint(checkpoint, workspace.graphs / "tiny.onnx", progress=progress)
    progress("building the engine")
    engine_path = workspace.engines / "tiny.fp32.cpu.onnx"
    built = build_cpu_engine(exported.path, engine_path)
    engine = load_engine(engine_path)
    try:
        progress("labelling the scene")
        (output,) = label_map_paths([str(scene)], None, workspace.root)
        result = segment_scene(engine, scene, output, options)
        quicklook = quicklook_path(output)
        write_quicklook(scene, result, built.schema, quicklook, options)
        mean_iou = None
        if truth is not None:
            confusion = ConfusionMatrix(len(built.schema))
            with rasterio.open(output) as labels:
                confusion.update(truth, labels.read(1))
            mean_iou = confusion.mean_iou
        progress("measuring the speed")
        folder = workspace.new_run("demo")
        bench = run_benchmark(engine, folder, BenchOptions(protocol_of(load=4.0, warm_up_cap=4.0)))
    finally:
        engine.close()
    return DemoResult(exported, built, engine_path, result, quicklook, mean_iou, bench, folder)


def _claim(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise WorkspaceError(
            f"{folder} is not empty, and the demo writes only into a folder of its own",
            hint="name a new one with --workspace",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _draw(path: Path) -> npt.NDArray[np.uint8]:
    """Write the demo scene as a GeoTIFF near Dubai (UTM 40N); returns its labels ``[H, W]``."""
    scenery = draw_scene(SCENE_WIDTH, SCENE_HEIGHT, seed=SCENE_SEED)
    profile = {
        "driver": "GTiff",
        "width": SCENE_WIDTH,
        "height": SCENE_HEIGHT,
        "count": 3,
        "dtype": "uint8",
        "photometric": "RGB",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "crs": "EPSG:32640",
        "transform": from_origin(325_000, 2_785_000, SCENE_PIXEL_M, SCENE_PIXEL_M),
    }
    with whole_file(path) as temporary, rasterio.open(temporary, "w", **profile) as dataset:
        dataset.write(scenery.image.transpose(2, 0, 1))
    return scenery.labels
