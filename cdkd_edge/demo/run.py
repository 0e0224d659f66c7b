"""``cdkd-edge demo``: every stage with a bundled trained checkpoint, on any machine.

Where PyTorch is installed, the checkpoint is exported like any other. Elsewhere, as on a board, the same graph is
written from the same weights, without simplification and without the check against PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from cdkd_edge.benchmark.phases import protocol_of
from cdkd_edge.benchmark.record import BenchSummary
from cdkd_edge.benchmark.run import BenchOptions, run_benchmark
from cdkd_edge.core.errors import WorkspaceError
from cdkd_edge.core.files import make_folders, whole_file
from cdkd_edge.core.labels import schema_from_document
from cdkd_edge.core.machine import library_versions
from cdkd_edge.core.manifest import (
    EngineManifest,
    FileRecord,
    GraphCheck,
    GraphManifest,
    Preprocessing,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.onnxruntime import build_cpu_engine
from cdkd_edge.engines.protocol import UInt8Array
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.graph.build import build_graph
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD, NetworkConfig
from cdkd_edge.quality.metrics import ConfusionMatrix
from cdkd_edge.raster.areas import class_areas
from cdkd_edge.raster.open import writing
from cdkd_edge.segmentation.options import SegmentOptions, SegmentResult
from cdkd_edge.segmentation.outputs import label_map_paths
from cdkd_edge.segmentation.pipeline import segment_scene
from cdkd_edge.segmentation.preview import write_preview

if TYPE_CHECKING:
    from cdkd_edge.graph.export import ExportResult

SCENE_HEIGHT, SCENE_WIDTH = 2000, 3000  # px of the bundled picture that are used
SCENE_PIXEL_M = 0.5
LOAD_SECONDS = 4.0  # of the benchmark
MARK = ".cdkd-edge-demo"  # marks a folder as the demo's own, so that a second run may replace what is in it


@dataclass(frozen=True)
class BundledGraph:
    """The bundled network's graph, written without PyTorch."""

    path: Path
    manifest: GraphManifest
    skipped: str  # what an export does besides, and why it was not done


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    export: ExportResult | BundledGraph
    engine: EngineManifest
    engine_path: Path
    segment: SegmentResult
    preview: Path
    mean_iou: float | None  # against the bundled scene's exact labels, 0..1; None for a user's scene, which has none
    bench: BenchSummary
    bench_folder: Path


def run_demo(
    workspace: Workspace,
    scene: Path | None = None,
    options: SegmentOptions = SegmentOptions(),
    note: Callable[[str], None] = lambda step: None,
) -> DemoResult:
    """Export, build, segment, benchmark.

    Args:
        workspace: where everything is written.
        scene: the user's own scene. Default: the bundled drawn picture, 3000 x 2000 px.
        options: bands, stretch and palette for the scene.
        note: called with the name of each step.

    Raises:
        WorkspaceError: the workspace holds files that no demo wrote.
        CdkdEdgeError: as the stages do.
    """
    if scene is not None:  # find what is wrong with it before anything is made
        options.open(scene).close()
    _claim(workspace.root)
    truth = None
    if scene is None:
        note("unpacking the bundled scene")
        scene = workspace.root / "demo_scene.tif"
        truth = _unpack(scene)
    with resources.as_file(resources.files("cdkd_edge.demo") / "tiny.safetensors") as checkpoint:
        exported = _export(checkpoint, workspace.graphs / "tiny.onnx", note)
    note("building the engine")
    engine_path = workspace.engines / "tiny.fp32.cpu.onnx"
    built = build_cpu_engine(exported.path, engine_path)
    with load_engine(engine_path) as engine:
        note("labelling the scene")
        (output,) = label_map_paths([str(scene)], None, workspace.root)
        result = segment_scene(engine, scene, output, options)
        preview = output.with_name(f"{output.stem}_preview.png")
        areas = class_areas(output, built.schema)
        write_preview(scene, output, built.schema.in_palette(options.palette), areas, preview, options)
        mean_iou = None
        if truth is not None:
            confusion = ConfusionMatrix(len(built.schema))
            with rasterio.open(output) as labels:
                confusion.update(truth, labels.read(1))
            mean_iou = confusion.mean_iou
        note("measuring the speed")
        folder = workspace.new_run("demo")
        bench = run_benchmark(engine, folder, BenchOptions(protocol_of(load=LOAD_SECONDS, warm_up_cap=LOAD_SECONDS)))
    return DemoResult(exported, built, engine_path, result, preview, mean_iou, bench, folder)


def _export(checkpoint: Path, destination: Path, note: Callable[[str], None]) -> ExportResult | BundledGraph:
    try:
        import torch  # noqa: F401, I001 - the first that is missing is named
        import onnxsim  # noqa: F401
        import safetensors  # noqa: F401

        from cdkd_edge.graph.export import export_checkpoint
    except ImportError as error:
        note("writing the graph")
        return _write_bundled(checkpoint, destination, f"the check against PyTorch, and simplification ({error})")
    return export_checkpoint(checkpoint, destination, note=note)


def _write_bundled(checkpoint: Path, destination: Path, skipped: str) -> BundledGraph:
    """The graph of a safetensors checkpoint in this package's own names and FP16, and its manifest."""
    require_replaceable(destination)
    content = checkpoint.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")  # https://github.com/huggingface/safetensors#format
    entries = json.loads(content[8:start])
    header = json.loads(entries.pop("__metadata__")["cdkd-edge"])
    weights = {}
    for name, entry in entries.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        weights[name] = np.frombuffer(content[first:end], np.float16).reshape(entry["shape"]).astype(np.float32)
    lists = {name: tuple(value) for name, value in header["config"].items() if isinstance(value, list)}
    config = NetworkConfig(**{**header["config"], **lists})
    model = build_graph(weights, config)
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        manifest = GraphManifest(
            name=destination.stem,
            precision="fp32",
            artefact=FileRecord.of(temporary, destination.name),
            checkpoint=FileRecord.of(checkpoint),
            layout="cdkd-edge",
            labels=schema_from_document(header["schema"], checkpoint.name).to_document(),
            preprocessing=Preprocessing("RGB", PIXEL_MEAN, PIXEL_STD),
            tile=config.tile,
            batch=1,
            opset=model.opset_import[0].version,
            network=dataclasses.asdict(config),
            nodes=len(model.graph.node),
            check=GraphCheck(0, 0.0, 0.0, "none", f"onnxruntime {onnxruntime.__version__}"),
            libraries=library_versions(("onnx", "onnxruntime", "numpy")),
            training=header["training"],
        )
        write_manifest(destination, manifest)
    return BundledGraph(destination, manifest, skipped)


def _claim(folder: Path) -> None:
    """Make the folder, or take one that an earlier demo wrote."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        what = f"{folder} is not empty, and the demo writes only into a folder of its own"
        raise WorkspaceError(what, hint="name a new one with --workspace")
    make_folders(folder)
    (folder / MARK).touch()


def _unpack(path: Path) -> UInt8Array:
    """Write the bundled picture as a GeoTIFF near Dubai (UTM 40N); returns its labels ``[H, W]``."""

    def bundled(name: str) -> UInt8Array:
        with resources.files("cdkd_edge.demo").joinpath(name).open("rb") as file:
            return np.asarray(Image.open(file))[:SCENE_HEIGHT, :SCENE_WIDTH]

    pixels = bundled("scene.jpg").transpose(2, 0, 1)
    count, height, width = pixels.shape
    layout = {"driver": "GTiff", "photometric": "RGB", "compress": "deflate", "tiled": True, "dtype": "uint8"}
    shape = {"count": count, "height": height, "width": width}
    place = {"crs": "EPSG:32640", "transform": from_origin(325_000, 2_785_000, SCENE_PIXEL_M, SCENE_PIXEL_M)}
    with (
        whole_file(path) as temporary,
        writing(f"writing {path}", path.parent),
        rasterio.open(temporary, "w", **layout, **shape, **place) as dataset,
    ):
        dataset.write(pixels)
    return bundled("scene-labels.png")
