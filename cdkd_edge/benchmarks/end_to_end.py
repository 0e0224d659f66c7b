"""A scene from file to label map, timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from cdkd_edge.benchmarks.record import EndToEnd
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.files import scratch_folder
from cdkd_edge.scene.grid import TileGrid, default_overlap
from cdkd_edge.scene.pipeline import SegmentOptions, segment_scene
from cdkd_edge.scene.reader import SceneReader
from cdkd_edge.scenery import draw_scene

LEAST_TILES, MOST_TILES = 4, 100
"""In a drawn scene."""
DRAWN = 1024
"""Side of the picture that is repeated in it, px. Drawing takes about 100 bytes per pixel: 100 tiles of 1024 px in one
piece would take 8 GB, which a board does not have."""


def check_scene(engine: Engine, scene: Path, options: SegmentOptions) -> None:
    """Find what is wrong with the scene now, not after the measurement.

    Raises:
        SceneError: as the scene's reader does.
    """
    tile = engine.manifest.tile
    TileGrid.over(1, 1, tile, default_overlap(tile) if options.overlap is None else options.overlap)
    SceneReader(scene, bands=options.bands, stretch=options.stretch).close()


def time_scene(engine: Engine, scene: Path | None, options: SegmentOptions, tiles: float) -> EndToEnd:
    """Segment a scene; the label map is thrown away.

    Args:
        engine: loaded.
        scene: a raster. Default: a drawn one of about ``tiles`` tiles, within 4 and 100.
        options: how it is read and tiled.
        tiles: see ``scene``.

    Raises:
        EngineError, SceneError: the engine or the scene failed.
    """
    with scratch_folder() as temporary:
        path = scene
        if path is None:
            path = temporary / "drawn.tif"
            _draw_to(path, _side(engine, tiles))
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


def _side(engine: Engine, tiles: float) -> int:
    """Side of a square scene of about ``tiles`` tiles."""
    tile = engine.manifest.tile
    overlap = default_overlap(tile)
    across = int(np.clip(round(tiles**0.5), LEAST_TILES**0.5, MOST_TILES**0.5))
    side = across * (tile - overlap) + overlap
    assert len(TileGrid.over(side, side, tile, overlap)) == across**2
    return side


def _draw_to(path: Path, side: int) -> None:
    piece = min(side, DRAWN)
    image = draw_scene(piece, piece, seed=5).image.transpose(2, 0, 1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        for top in range(0, side, piece):
            for left in range(0, side, piece):
                height, width = min(piece, side - top), min(piece, side - left)
                dataset.write(image[:, :height, :width], window=Window(left, top, width, height))
