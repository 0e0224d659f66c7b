"""Everything that is made beside a finished label map, by what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cdkd_edge.errors import SceneError
from cdkd_edge.labels import LabelSchema
from cdkd_edge.maps.memory import hand_memory_back
from cdkd_edge.maps.preview import write_preview
from cdkd_edge.maps.stac import Provenance, When, item_for
from cdkd_edge.maps.stac_assets import write_item
from cdkd_edge.maps.vector import VectorOptions, VectorResult, require_vector, write_vector
from cdkd_edge.scene.areas import Areas, class_areas
from cdkd_edge.scene.pipeline import SegmentOptions


@dataclass(frozen=True)
class ProductOptions:
    """What to make; areas are always there."""

    vector: VectorOptions | None = None
    """Polygons, if given."""
    preview: bool = False
    stac: bool = False
    when: When | None = None
    """Time of the image, for the STAC Item (:func:`.stac.parse_when`)."""
    segment: SegmentOptions = SegmentOptions()
    """How the scene was read: the preview shows the same bands and stretch."""
    provenance: Provenance | None = None
    """The engine."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """What lies beside the label map already, as :func:`.stac.item_for` takes it."""


class Segmented(Protocol):
    """What is needed of a run's result; :class:`cdkd_edge.scene.pipeline.SegmentResult` has it."""

    @property
    def class_pixels(self) -> dict[str, int]:
        """Pixels by class name."""

    @property
    def no_data_pixels(self) -> int:
        """Pixels without a label."""


@dataclass(frozen=True)
class Products:
    """What was made."""

    areas: Areas
    vector: VectorResult | None
    preview: Path | None
    stac: Path | None
    notes: tuple[str, ...]


def product_paths(label_map: Path, options: ProductOptions) -> dict[str, Path]:
    """Where the products of a label map go, by name: ``vector``, ``preview``, ``stac``; only what is asked for."""
    stem = label_map.with_suffix("")
    paths = {}
    if options.vector is not None:
        paths["vector"] = stem.with_name(f"{stem.name}.gpkg")
    if options.preview:
        paths["preview"] = stem.with_name(f"{stem.name}_preview.png")
    if options.stac:
        paths["stac"] = stem.with_name(f"{stem.name}.stac.json")
    return paths


def require_products(options: ProductOptions) -> None:
    """Make sure, before hours of segmentation, that what is asked for can be made.

    Raises:
        MissingExtraError: an optional package is not installed.
    """
    if options.vector is not None:
        require_vector()


def write_products(
    label_map: Path,
    scene: str | Path,
    result: Segmented | None,
    schema: LabelSchema,
    options: ProductOptions,
    *,
    row_counts: npt.NDArray[np.integer[Any]] | None = None,
    areas: Areas | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Products:
    """Make what ``options`` ask for beside a finished label map, each file only whole, the STAC Item last.

    Args:
        label_map: the finished map.
        scene: the raster it was made from.
        result: of the run, if there was one; its counts must be the map's.
        schema: classes of the map.
        options: what to make.
        row_counts: per row, as :func:`.areas.class_areas` takes them; spares reading the map once more.
        areas: if they are known already.
        progress: of the polygons: tiles done and tiles in all.

    Raises:
        MissingExtraError: polygons are asked for and the extra ``vector`` is not installed.
        SceneError: the scene or the map cannot be read, or does not fit the schema, or is not that of ``result``.
        SystemRefusalError: the disk is full.
        OSError: the folder cannot be written.
    """
    require_products(options)
    hand_memory_back()
    paths = product_paths(label_map, options)
    areas = areas or class_areas(label_map, schema, row_counts)
    if result is not None:
        _require_same(areas, result, label_map)
    vector = None
    if options.vector is not None:
        vector = write_vector(label_map, paths["vector"], schema, options.vector, progress)
    if options.preview:
        write_preview(scene, label_map, schema, areas, paths["preview"], options.segment)
    if options.stac:
        assets = {**options.beside, **{name: path for name, path in paths.items() if name != "stac"}}
        item = item_for(
            label_map, scene, schema, areas, provenance=options.provenance, when=options.when, assets=assets
        )
        write_item(paths["stac"], item)
    notes = tuple(dict.fromkeys([*areas.notes, *(vector.notes if vector else ())]))
    return Products(areas, vector, paths.get("preview"), paths.get("stac"), notes)


def _require_same(areas: Areas, result: Segmented, label_map: Path) -> None:
    counted = {area.name: area.pixels for area in areas.classes}
    if counted != result.class_pixels or areas.no_data.pixels != result.no_data_pixels:
        raise SceneError(f"{label_map} is not the map of this run: its pixels per class are others")
