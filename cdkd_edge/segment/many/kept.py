"""Is the label map that is there the one that would be made?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.core.errors import CdkdEdgeError, SceneError
from cdkd_edge.core.files import occupied, write_text
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.areas import Areas, class_areas
from cdkd_edge.raster.open import gdal, is_gdal_name, open_scene
from cdkd_edge.raster.styles import (
    describes,
    is_somebodys_own,
    label_map_style,
    label_map_xml,
    sidecar_path,
    style_path,
)
from cdkd_edge.segment.options import TAG_OPTIONS, SegmentOptions
from cdkd_edge.segment.outputs import confidence_path
from cdkd_edge.segment.partial import scene_identity
from cdkd_edge.segment.pipeline import label_map_tags
from cdkd_edge.segment.products import mismatch, source_of

_NOT_COMPARED = ("CDKD_EDGE", "ENGINE", "GRAPH", "SCENE_SAMPLE")
"""Tags that may differ, or are compared in another way. (Another release labels alike; its notes say if not.)"""


@dataclass(frozen=True)
class KeptMap:
    """A label map that was there; it was read once, so it is whole, and counted."""

    output: Path
    height: int
    width: int
    tiles: int
    class_pixels: dict[str, int]
    no_data_pixels: int
    areas: Areas
    confidence: Path | None = None
    """The confidence raster beside it, if one was asked for."""


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
    reader = dataclasses.replace(options, strict=False).open(scene)
    try:
        tiles = len(options.grid_over(reader, engine.tile))
        wanted = label_map_tags(engine, reader, options, scene_identity(reader))
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
        sample = wanted["SCENE_SAMPLE"]
        if reason is None and tags.get("SCENE_SAMPLE", sample) != sample:  # earlier releases took none
            reason = f"was made of another scene named {Path(scene).name}"
        if reason is None and _is_older(output, scene):
            reason = f"is older than {scene}"
        if reason is not None:
            raise _foreign(output, reason)
    try:
        areas = class_areas(output, engine.schema)  # reads all of it
    except SceneError as error:
        raise _foreign(output, f"is damaged: {error.message}") from None
    if options.confidence:
        beside = confidence_path(output)
        if (reason := mismatch("confidence", beside, source_of(output))) is not None:
            raise _foreign(output, f"{beside.name} {reason}")
    return KeptMap(
        output=output,
        height=size[0],
        width=size[1],
        tiles=tiles,
        class_pixels={area.name: area.pixels for area in areas.classes},
        no_data_pixels=areas.no_data.pixels,
        areas=areas,
        confidence=confidence_path(output) if options.confidence else None,
    )


def complete(kept: KeptMap, schema: LabelSchema) -> None:
    """Put beside a label map that was there what is missing, or of another map: class names and areas, QGIS's style.

    (Somebody copied the ``.tif`` alone, or an older release wrote it.) A folder that cannot be written stays as it is.
    """
    sidecar, style = sidecar_path(kept.output), style_path(kept.output)
    with contextlib.suppress(OSError):
        if not describes(sidecar, schema, kept.areas.classes):
            write_text(sidecar, label_map_xml(schema, kept.areas.classes))
    with contextlib.suppress(OSError):
        if not is_somebodys_own(style, schema):
            wanted = label_map_style(schema)
            if not style.exists() or style.read_bytes() != wanted.encode():
                write_text(style, wanted)


def is_label_map(path: str) -> bool:
    """Whether a raster is a label map that this package wrote."""
    try:
        with open_scene(path) as dataset:
            return "CDKD_EDGE" in dataset.tags()
    except SceneError:
        return False


def _foreign(output: Path, reason: str) -> CdkdEdgeError:
    return occupied(output, SceneError, reason)


def _difference(wanted: Mapping[str, str], tags: Mapping[str, str], identity: str) -> str | None:
    """What tells a label map from the one that would be made; None: nothing."""
    if "CDKD_EDGE" not in tags:
        return "is no label map of cdkd-edge"
    if _hash(tags.get(identity, "")) != _hash(wanted.get(identity, "")):
        return f"was made by another {identity.lower()} ({tags.get(identity, 'unknown').partition(' ')[0]})"
    for name, value in wanted.items():
        # GDAL drops the blanks that a value (a scene's name) begins with.
        if name not in _NOT_COMPARED and tags.get(name, "").lstrip() != value.lstrip():
            return _other_option(name, tags.get(name), value)
    for name in sorted(tags.keys() - wanted.keys()):
        if name not in _NOT_COMPARED and name != "AREA_OR_POINT" and not name.startswith("TIFFTAG_"):  # GDAL's
            return _other_option(name, tags[name], None)
    return None


def _other_option(tag: str, was: str | None, wanted: str | None) -> str:
    if tag == "AREA_OF_INTEREST":
        return "was made of another area (--aoi)"
    return f"was made with {TAG_OPTIONS.get(tag, tag)} {was or 'not given'}; now it is {wanted or 'not given'}"


def _hash(tag: str) -> str:
    return tag.rpartition("sha256:")[2]


def _is_older(output: Path, scene: str) -> bool:
    """Whether the scene was changed after the map was finished, as far as the file system tells."""
    if is_gdal_name(scene):
        return False
    return output.stat().st_mtime_ns < Path(scene).stat().st_mtime_ns
