"""What the peers load, made once for a network and a tile: tiles, checkpoint, graphs, engines.

A folder of artefacts holds ``ckpt.*``, ``plain.onnx`` (``cdkd-edge export``), ``naive.onnx`` (``torch.onnx.export``),
``tiles.npy``, and what ``cdkd-edge build`` makes: ``ours.fp32.onnx`` of the fastest runtime, ``ours.bf16.onnx``,
``ours.int8.cpu.onnx``, ``ours.fp16.engine``. What is there already and was made from the same checkpoint for the same
tile is used again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from peer_children import PEERS, checkpoint_of

from cdkd_edge.core.errors import CdkdEdgeError, EngineError, ManifestError, SceneError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import EngineManifest, FileRecord, GraphManifest, read_manifest
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import RUNTIMES, build_engine
from cdkd_edge.graph.export import ExportOptions, export_checkpoint
from cdkd_edge.graph.tiles import CalibrationSet
from cdkd_edge.model.checkpoint import load_checkpoint, save_checkpoint
from cdkd_edge.precision.calibrate import calibrate
from cdkd_edge.precision.choose import build_fastest, engine_places
from cdkd_edge.precision.int8 import Int8Options, write_int8
from cdkd_edge.precision.int8_gate import Int8Gate
from cdkd_edge.precision.scan_scenes import CalibrateOptions, TiledScene
from cdkd_edge.raster.open import scenes_named
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.options import SegmentOptions

CHECK_TILES = 2
"""Kept apart from the calibration tiles, for the INT8 graph's own check."""

NO_GATE = Int8Gate(0.02, 100)
"""For random weights, whose labels say nothing about INT8."""

Progress = Callable[[str], None]


def put_checkpoint(folder: Path, preset: str, checkpoint: Path | None) -> bool:
    """Put ``ckpt.*`` into the folder; whether its weights are trained.

    Args:
        folder: of artefacts.
        preset: ``tiny`` is the bundled trained network, ``paper`` the paper's with random weights.
        checkpoint: a network of the user's, instead.
    """
    from cdkd_edge.model.config import PRESETS
    from cdkd_edge.model.network import SegmentationNetwork

    folder.mkdir(parents=True, exist_ok=True)
    random_weights = folder / "ckpt.pt"
    if checkpoint is None and preset == "paper":
        import torch

        _remove(folder, "ckpt.*", keep=random_weights)
        torch.manual_seed(0)
        with whole_file(random_weights) as temporary:
            save_checkpoint(SegmentationNetwork(PRESETS[preset]).eval(), temporary)
        return False
    with resources.as_file(resources.files("cdkd_edge.demo") / "tiny.safetensors") as bundled:
        source = checkpoint or bundled
        load_checkpoint(source)  # what is wrong with it is said here
        target = folder / ("ckpt.safetensors" if source.suffix == ".safetensors" else "ckpt.pt")
        _remove(folder, "ckpt.*", keep=target)
        with whole_file(target) as temporary:
            shutil.copyfile(source, temporary)
    return True


def read_tiles(data: Path, tile: int, count: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Tiles from the middle of images that are spread over a folder, uint8 ``[count, 3, T, T]``, and their images.

    Args:
        data: folder of images, or one with a folder ``images``.
        tile: T; smaller images are passed over.
        count: how many; fewer if there are not that many images.

    Raises:
        SceneError: no image is large enough.
    """
    folder = data / "images" if (data / "images").is_dir() else data
    sources = [TiledScene.open(path, tile) for path in scenes_named([str(folder)])]
    large = [source for source in sources if min(source.height, source.width) >= tile]
    if not large:
        raise SceneError(f"no image in {folder} has {tile} x {tile} px", hint="give larger ones, or a smaller --tile")
    chosen = [large[round(index)] for index in np.linspace(0, len(large) - 1, min(count, len(large)))]
    tiles = np.empty((len(chosen), 3, tile, tile), np.uint8)
    for index, source in enumerate(chosen):
        reader = SceneReader(source.path)
        try:
            rows, columns = source.grid.rows, source.grid.columns
            reader.read_tile(rows[len(rows) // 2], columns[len(columns) // 2], tiles[index])
        finally:
            reader.close()
    return tiles, [source.path for source in chosen]


def prepare(
    folder: Path,
    tile: int,
    *,
    wanted: Collection[str],
    trained: bool,
    data: Path | None = None,
    tiles: int = 4,
    calibration_tiles: int = 16,
    progress: Progress = lambda step: None,
) -> dict[str, str]:
    """Make what the wanted peers load.

    Args:
        folder: holds ``ckpt.*`` already.
        tile: side, px.
        wanted: keys of :data:`peer_children.PEERS`.
        trained: whether the INT8 graph must pass the gate of ``cdkd-edge build --int8``.
        data: folder of images; default: drawn tiles.
        tiles: tiles that all peers run.
        calibration_tiles: tiles for INT8, from other images than those.
        progress: called with the name of each step.

    Returns:
        Why an artefact could not be made, by peer.

    Raises:
        CdkdEdgeError: the checkpoint or the images cannot be used, or our own FP32 engine not be made.
    """
    checkpoint, plain, ours = checkpoint_of(folder), folder / "plain.onnx", folder / "ours.fp32.onnx"
    images: list[str] = []
    measured = sample_tiles(tile, tiles)
    if data is not None:
        measured, images = read_tiles(data, tile, tiles)
    if not _same_tiles(folder / "tiles.npy", measured):  # those of the INT8 engine may be among them
        _forget_int8(folder)
        np.save(folder / "tiles.npy", measured)
    missing: dict[str, str] = {}
    progress("exporting")
    if _stale(plain, checkpoint, tile):
        _remove(folder, "*.onnx*")
        _remove(folder, "*.engine*")
        _forget_int8(folder)
        export_checkpoint(checkpoint, plain, ExportOptions(tile=tile))
    if not _built_from(ours, plain):
        progress("building the CPU engine")
        build_fastest(plain, engine_places(Workspace(folder), plain, "auto", RUNTIMES["cpu"], ours), note=progress)
    try:
        if "ours-bf16" in wanted and not _built_from(folder / "ours.bf16.onnx", plain):
            progress("building the BF16 engine")
            build_engine(plain, folder / "ours.bf16.onnx", RUNTIMES["openvino"], precision="bf16")
    except CdkdEdgeError as error:
        missing["ours-bf16"] = error.message
    try:
        if "ours-int8" in wanted:
            _int8(folder, tile, trained, data, images, calibration_tiles, progress)
    except CdkdEdgeError as error:
        missing["ours-int8"] = error.message
    try:
        if "ours-tensorrt-fp16" in wanted:
            _tensorrt(folder, checkpoint, tile, progress)
    except CdkdEdgeError as error:
        missing["ours-tensorrt-fp16"] = error.message
    naive = [key for key in wanted if PEERS[key].artefact == "naive.onnx"]
    if naive and not (folder / "naive.onnx").exists():
        progress("torch.onnx.export")
        try:
            export_naively(checkpoint, tile, folder / "naive.onnx")
        except ModuleNotFoundError as error:
            missing.update(dict.fromkeys(naive, f"torch.onnx.export: {error.name} is not installed"))
        except Exception as error:  # torch.onnx's errors share no base
            missing.update(dict.fromkeys(naive, f"torch.onnx.export: {' '.join(str(error).split())[:300]}"))
    return missing


def export_naively(checkpoint: Path, tile: int, destination: Path) -> None:
    """What a user without this package does: ``torch.onnx.export`` of network, upsampling and argmax."""
    import torch

    network, _ = load_checkpoint(checkpoint, tile=tile)

    class Labels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.network.upsample(self.network(image)).argmax(dim=1).to(torch.uint8)

    image = torch.zeros(1, 3, tile, tile, dtype=torch.uint8)
    with whole_file(destination) as temporary:
        torch.onnx.export(
            Labels().eval(),
            (image,),
            str(temporary),
            dynamo=True,
            external_data=False,
            input_names=["image"],
            verbose=False,
        )


def _int8(
    folder: Path, tile: int, trained: bool, data: Path | None, images: list[str], count: int, progress: Progress
) -> None:
    plain, graph, engine = folder / "plain.onnx", folder / "plain.int8.onnx", folder / "ours.int8.cpu.onnx"
    if _built_from(engine, graph):
        return
    place = folder / "calibration"
    if not place.exists():
        progress("choosing calibration tiles")
        calibrate(
            _calibration_scenes(folder, tile, data, images, count + CHECK_TILES),
            place,
            CalibrateOptions(count=count, check=CHECK_TILES, tile=tile, reading=SegmentOptions()),
        )
    options = Int8Options(gate=Int8Gate() if trained else NO_GATE)
    write_int8(plain, graph, CalibrationSet.load(place), options, note=progress)
    progress("building the INT8 engine")
    build_engine(graph, engine, RUNTIMES["cpu"])


def _calibration_scenes(folder: Path, tile: int, data: Path | None, images: list[str], count: int) -> list[str]:
    """Images that are not measured on, if there are others; or a drawn scene of another seed."""
    if data is not None:
        paths = scenes_named([str(data / "images" if (data / "images").is_dir() else data)])
        return [path for path in paths if path not in images] or paths
    from PIL import Image

    side = int(np.ceil(np.sqrt(count))) + 1
    path = folder / "calibration_scene.png"
    with whole_file(path) as temporary:
        Image.fromarray(sample_tiles(side * tile, 1, seed=99)[0].transpose(1, 2, 0)).save(temporary)
    return [str(path)]


def _tensorrt(folder: Path, checkpoint: Path, tile: int, progress: Progress) -> None:
    """The FP16 graph and its engine, where TensorRT and a GPU are."""
    tensorrt = RUNTIMES["tensorrt"]
    if reason := tensorrt.why_not_here():
        raise EngineError(reason)
    graph, engine = folder / "plain.fp16.onnx", folder / "ours.fp16.engine"
    if not graph.exists():
        export_checkpoint(checkpoint, folder / "plain.onnx", ExportOptions(tile=tile, fp16=True))
    if not _built_from(engine, graph):
        progress("building the TensorRT engine")
        build_engine(graph, engine, tensorrt)


def _stale(graph: Path, checkpoint: Path, tile: int) -> bool:
    try:
        manifest = read_manifest(graph, GraphManifest)
    except (ManifestError, OSError):
        return True
    return manifest.tile != tile or manifest.checkpoint.sha256 != FileRecord.of(checkpoint).sha256


def _same_tiles(path: Path, tiles: npt.NDArray[np.uint8]) -> bool:
    return path.exists() and np.array_equal(np.load(path), tiles)


def _forget_int8(folder: Path) -> None:
    _remove(folder, "*.int8.*")
    shutil.rmtree(folder / "calibration", ignore_errors=True)


def _built_from(engine: Path, graph: Path) -> bool:
    try:
        built = read_manifest(engine, EngineManifest, verify=False)
        return built.graph.sha256 == FileRecord.of(graph).sha256
    except (ManifestError, OSError):
        return False


def _remove(folder: Path, pattern: str, keep: Path | None = None) -> None:
    for path in folder.glob(pattern):
        if path != keep:
            path.unlink()
