"""Is the label map that is there the one that would be made?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.windows import Window

from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.errors import SceneError
from cdkd_edge.labels import NO_LABEL, LabelSchema
from cdkd_edge.scene.pipeline import SegmentOptions, grid_over, label_map_tags
from cdkd_edge.scene.raster import gdal, is_gdal_name, open_scene
from cdkd_edge.scene.reader import SceneReader
from cdkd_edge.scene.writer import BLOCK

_NOT_COMPARED = ("CDKD_EDGE", "ENGINE", "GRAPH")
"""Tags that may differ, or are compared by their hash. (Another release labels alike; its notes say if not.)"""


@dataclass(frozen=True)
class KeptMap:
    """A label map that was there; it was read once, so it is whole, and counted."""

    output: Path
    height: int
    width: int
    tiles: int
    class_pixels: dict[str, int]
    no_data_pixels: int


def refuse_foreign_map(
    output: Path, engine: Labeller, scene: str, options: SegmentOptions, *, same_graph: bool = False
) -> KeptMap:
    """Make sure that a label map is of this scene, by this engine, with these options, and can be read.

    Args:
        output: the label map that exists.
        engine: the engine that would make it.
        scene: the raster.
        options: how it would be read and tiled.
        same_graph: an engine that was built from the same graph will do.

    Raises:
        SceneError: it is not, and why; or the scene or the map cannot be read.
    """
    reader = SceneReader(scene, bands=options.bands, stretch=options.stretch)
    try:
        tiles = len(grid_over(reader, engine.tile, options))
        wanted = label_map_tags(engine, reader, options)
        size = reader.height, reader.width
    finally:
        reader.close()
    try:
        dataset = open_scene(output)
    except SceneError as error:
        raise _foreign(output, f"is no label map: {error.message}") from None
    with dataset:
        with gdal(f"reading {output}"):
            tags = dataset.tags()
        reason = _difference(wanted, tags, "GRAPH" if same_graph else "ENGINE")
        if reason is None and (dataset.height, dataset.width) != size:
            reason = f"has {dataset.width} x {dataset.height} px; the scene has {size[1]} x {size[0]}"
        if reason is None and _is_older(output, scene):
            reason = f"is older than {scene}"
        if reason is not None:
            raise _foreign(output, reason)
        try:
            counts = _counted(dataset, output)
        except SceneError as error:
            raise _foreign(output, f"is damaged: {error.message}") from None
    return _kept(output, size, tiles, counts, engine.schema)


def is_label_map(path: str) -> bool:
    """Whether a raster is a label map that this package wrote."""
    try:
        with open_scene(path) as dataset:
            return "CDKD_EDGE" in dataset.tags()
    except SceneError:
        return False


def _foreign(output: Path, reason: str) -> SceneError:
    return SceneError(f"{output} exists and {reason}", hint="keep it, or replace it with --overwrite")


def _difference(wanted: Mapping[str, str], tags: Mapping[str, str], identity: str) -> str | None:
    """What tells a label map from the one that would be made; None: nothing."""
    if "CDKD_EDGE" not in tags:
        return "is no label map of cdkd-edge"
    if _hash(tags.get(identity, "")) != _hash(wanted.get(identity, "")):
        return f"was made by another {identity.lower()} ({tags.get(identity, 'unknown').partition(' ')[0]})"
    for name, value in wanted.items():
        if name not in _NOT_COMPARED and tags.get(name) != value:
            return f"has {name} = {tags.get(name, 'nothing')}, not {value}"
    for name in sorted(tags.keys() - wanted.keys()):
        if name not in _NOT_COMPARED and name != "AREA_OR_POINT" and not name.startswith("TIFFTAG_"):  # GDAL's
            return f"has {name} = {tags[name]}, which it would not have"
    return None


def _hash(tag: str) -> str:
    return tag.rpartition("sha256:")[2]


def _is_older(output: Path, scene: str) -> bool:
    """Whether the scene was changed after the map was finished, as far as the file system tells."""
    if is_gdal_name(scene):
        return False
    return output.stat().st_mtime_ns < Path(scene).stat().st_mtime_ns


def _counted(dataset: Any, output: Path) -> Any:
    """Pixels per label, int64 ``[256]``."""
    counts = np.zeros(256, np.int64)
    with gdal(f"reading {output}"):
        for top in range(0, dataset.height, BLOCK):
            for left in range(0, dataset.width, 8 * BLOCK):
                window = Window(left, top, min(8 * BLOCK, dataset.width - left), min(BLOCK, dataset.height - top))
                labels = dataset.read(1, window=window)
                for row in range(0, len(labels), 16):  # bincount makes 8 bytes of each label
                    counts += np.bincount(labels[row : row + 16].ravel(), minlength=256)
    return counts


def _kept(output: Path, size: tuple[int, int], tiles: int, counts: Any, schema: LabelSchema) -> KeptMap:
    names = schema.class_names
    return KeptMap(
        output=output,
        height=size[0],
        width=size[1],
        tiles=tiles,
        class_pixels={name: int(count) for name, count in zip(names, counts, strict=False)},
        no_data_pixels=int(counts[NO_LABEL]),
    )
