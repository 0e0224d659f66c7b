"""A scene from file to label map, timed.

Before a measurement: room on the disk for what it will write, and tiles in the engine's slots.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from cdkd_edge.bench.record import EndToEnd, Protocol
from cdkd_edge.core.files import scratch_folder
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.pipeline import segment_scene

RESERVED = ".reserved"
"""The file that takes the room."""


def reserve_room(folder: Path, protocol: Protocol) -> None:
    """Take the room that the tables will need now, so that a disk that fills up meanwhile costs no measurement.

    Raises:
        OSError: there is not so much.
    """
    seconds = protocol.repeats * (protocol.load_seconds + protocol.warm_up_cap_seconds + protocol.idle_seconds)
    # 40 readings of 60 bytes and 30 tiles of 40 bytes a second, the pictures and the page.
    size = int(4e6 + seconds * 4000)
    with open(folder / RESERVED, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            error.filename = f"{size / 1e6:.0f} MB in {folder.parent}"
            raise


def fill_inputs(engine: Engine) -> None:
    """A different tile in every slot, so that no cache sees the same image twice in a row."""
    tile, batch = engine.manifest.tile, engine.manifest.batch
    (picture,) = sample_tiles(tile, 1)
    for slot in range(engine.slots):
        for index in range(batch):
            shift = (slot * batch + index) * 37 % tile
            engine.input(slot)[index] = np.roll(picture, (shift, shift), (1, 2))


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
    TileGrid.over(1, 1, tile, options.overlap_of(tile))
    options.open(scene).close()


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
    (image,) = sample_tiles(piece, 1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        for top in range(0, side, piece):
            for left in range(0, side, piece):
                height, width = min(piece, side - top), min(piece, side - left)
                dataset.write(image[:, :height, :width], window=Window(left, top, width, height))
