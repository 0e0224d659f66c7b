"""The end-to-end time of a scene, from file to label map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from cdkd_edge.bench.record import EndToEnd
from cdkd_edge.core.files import scratch_folder
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.pipeline import segment_scene

LEAST_TILES, MOST_TILES = 4, 100
"""Number of tiles in a drawn scene."""
PICTURE_SIDE = 1024
"""Side of the picture that is repeated in a drawn scene, px. Drawing the whole scene would take gigabytes."""


def check_scene(engine: Engine, scene: Path, options: SegmentOptions) -> None:
    """Check that the scene can be read and tiled, before anything is measured.

    Raises:
        SceneError: as the scene's reader does.
    """
    tile = engine.manifest.tile
    TileGrid.over(1, 1, tile, options.overlap_of(tile))
    options.open(scene).close()


def time_scene(engine: Engine, scene: Path | None, options: SegmentOptions, tiles: float) -> EndToEnd:
    """Segment a scene and time it; the label map is discarded.

    Args:
        engine: loaded.
        scene: a raster. Default: a drawn one of about ``tiles`` tiles, at least 4 and at most 100.
        options: how the scene is read and tiled.
        tiles: size of the drawn scene.

    Raises:
        EngineError, SceneError: the engine or the scene failed.
    """
    with scratch_folder() as temporary:
        path = scene
        if path is None:
            path = temporary / "drawn.tif"
            _draw_scene(path, _side(engine.manifest.tile, tiles))
        result = segment_scene(engine, path, temporary / "labels.tif", options)
    computed = result.tiles - result.tiles_without_data
    return EndToEnd(
        scene=scene.name if scene else "drawn",
        width=result.width,
        height=result.height,
        tiles=result.tiles,
        seconds=result.seconds,
        engine_seconds=result.engine_seconds,
        tiles_per_second=computed / result.seconds,
        megapixels_per_second=result.width * result.height / result.seconds / 1e6,
        overhead=result.seconds / result.engine_seconds if result.engine_seconds else None,
    )


def _side(tile: int, tiles: float) -> int:
    """Side of a square scene of about ``tiles`` tiles."""
    overlap = default_overlap(tile)
    across = int(np.clip(round(tiles**0.5), LEAST_TILES**0.5, MOST_TILES**0.5))
    return across * (tile - overlap) + overlap


def _draw_scene(path: Path, side: int) -> None:
    piece = min(side, PICTURE_SIDE)
    (image,) = sample_tiles(piece, 1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        for top in range(0, side, piece):
            for left in range(0, side, piece):
                height, width = min(piece, side - top), min(piece, side - left)
                dataset.write(image[:, :height, :width], window=Window(left, top, width, height))
