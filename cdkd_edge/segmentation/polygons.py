"""Writes a label map as polygons into a GeoPackage, batch by batch as they are found."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine

from cdkd_edge.core.errors import MissingExtraError, SceneError, SystemRefusalError, UsageError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.raster.areas import Ground, ground_of
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.styles import polygon_style
from cdkd_edge.segmentation.outlines import Bools, Floats, Outlines
from cdkd_edge.segmentation.regions import RegionBatch, trace_regions

LAYER = "classes"

_BATCH, _BATCH_BYTES = 10_000, 4 << 20  # polygons, and bytes of them, that are written at once
_MIN_FREE_BYTES = 1 << 20
_EPOCH = "1970-01-01T00:00:00.000Z"  # time of change in the file, so that the same map gives the same bytes
_NOTHING: tuple[npt.NDArray[Any], ...] = (np.empty(0, object), np.empty(0, np.uint8), np.empty(0))
# The table "layer_styles", in which QGIS finds a layer's style.
_STYLE_FIELDS = [
    "f_table_catalog", "f_table_schema", "f_table_name", "f_geometry_column", "styleName", "styleQML", "styleSLD",
    "useAsDefault", "description", "owner", "ui", "update_time",
]  # fmt: skip
_M2 = {"m2": 1.0, "ha": 1e4, "km2": 1e6}
_AREA = re.compile(r"(\d+\.?\d*|\.\d+)\s*(m2|ha|km2|px)")


@dataclass(frozen=True)
class VectorOptions:
    """Which polygons are written, and how smooth they are."""

    # Smaller polygons are left out and smaller holes closed. Small polygons between several larger ones leave gaps.
    minimum_m2: float = 0.0  # for maps whose areas are known
    minimum_px: float = 0.0  # for the others
    simplify_px: float = 0.0  # tolerance; neighbours keep a common border (:func:`.regions.trace_regions`)

    def __post_init__(self) -> None:
        for name, value in (("--min-area", self.minimum_m2 + self.minimum_px), ("--simplify", self.simplify_px)):
            if not 0 <= value < float("inf"):
                raise SceneError(f"{name} must be a number from 0 up, got {value:g}")
        if self.minimum_m2 and self.minimum_px:
            raise SceneError("give the smallest area in m2 or in pixels, not in both")


def vector_options(min_area: str | None = None, simplify_px: float = 0.0) -> VectorOptions:
    """Read ``--min-area`` as a user types it: ``100m2``, ``0.5ha``, ``1km2`` or ``20px``."""
    if min_area is None:
        return VectorOptions(simplify_px=simplify_px)
    match = _AREA.fullmatch(min_area.strip())
    if match is None:
        raise UsageError(f"{min_area!r} is no area", hint="type for example 100m2, 0.5ha or 20px")
    value, unit = float(match[1]), match[2]
    if unit == "px":
        return VectorOptions(minimum_px=value, simplify_px=simplify_px)
    return VectorOptions(minimum_m2=value * _M2[unit], simplify_px=simplify_px)


def write_vector(
    label_map: Path,
    output: Path,
    schema: LabelSchema,
    options: VectorOptions = VectorOptions(),
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write the regions of a label map as polygons (GeoPackage, layer ``classes``) with a style for QGIS.

    Fields: ``class_id``, ``class``, ``color`` (#rrggbb), ``area_ha`` (of the polygon as drawn, on the ellipsoid for
    geographic grids; null where unknown). Pixels connected by an edge make one polygon; regions of more than 200,000
    vertices come in parts. Without georeference, x is the column and y the negative row, where QGIS puts such rasters.
    The file appears only when it is complete; ``metadata`` is stored in it. Returns notes for the user. Raises
    MissingExtraError without pyogrio or Shapely; SceneError if the map cannot be read, or a minimum in m2 is asked for
    where areas are unknown; SystemRefusalError or OSError if writing failed.
    """
    require_vector()
    dataset = open_scene(label_map)
    with dataset, gdal(f"reading {label_map}"), whole_file(output) as temporary, _plain_name(temporary) as plain:
        ground = ground_of(dataset)
        if options.minimum_m2 and not ground.known:
            raise SceneError(
                f"the smallest area cannot be in m2: {ground.reason}", hint="give it in pixels, for example 20px"
            )
        package = _GeoPackage(plain, output, schema, dataset, ground, options, metadata)
        try:
            for batch in trace_regions(dataset, simplify=options.simplify_px):
                package.add(batch)
            package.finish()
        finally:
            for suffix in ("-journal", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
    return tuple(package.notes)


def require_vector() -> None:
    """Raise :class:`MissingExtraError` if Shapely or pyogrio is not installed."""
    for package in ("shapely", "pyogrio"):
        try:
            found = importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package, "vector", "drawing polygons of a label map") from None
        if package == "shapely" and not hasattr(found, "coverage_simplify"):
            raise MissingExtraError("shapely 2.1 or newer", "vector", "drawing polygons of a label map")


def large_enough(
    outlines: Outlines, ground: Ground, minimum_m2: float = 0.0, minimum_px: float = 0.0
) -> tuple[Outlines, Floats, Bools]:
    """Keep polygons of at least a minimum area (in one of the two units; 0: all), and close holes below it.

    Returns the polygons that are kept; the area of each, m2 (pixels where the ground is not known); and whether each
    of the given polygons is kept.
    """
    areas = outlines.ring_areas(_equal_area(outlines.points, ground))
    measure, smallest = (outlines.ring_areas(outlines.points), minimum_px) if minimum_px else (areas, minimum_m2)
    outer, owners = outlines.outer, outlines.owners
    rings = outer | (measure >= smallest)
    sign = np.where(outer, 1.0, -1.0) * rings
    # Without its holes: the shore around a lake is as small as its land.
    kept = np.bincount(owners, measure * sign, len(outlines)) >= smallest
    own = np.bincount(owners, areas * sign, len(outlines)).astype(np.float64)
    return outlines.select(kept, rings), own[kept], kept


def _equal_area(points: Floats, ground: Ground) -> Floats:
    """Project points to a plane in which areas are those on the ground, m2 (pixels if that is unknown)."""
    if ground.ellipsoid is None:
        return np.asarray(points * np.sqrt(ground.pixel_m2 or 1.0))
    # Cylindrical equal-area projection: area below a parallel, per radian, times radians.
    longitude, latitude = _on_map(points, ground.transform).T * ground.radians
    scale = ground.ellipsoid.semi_major
    return np.stack([longitude * scale, ground.ellipsoid.area_to_parallel(latitude) / scale], axis=1)


def _on_map(points: Floats, transform: Any) -> Floats:
    """Map coordinates of pixel corners ``[P, 2]``."""
    (x, y), t = points.T, transform
    return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f], axis=1)


@contextlib.contextmanager
def _plain_name(path: Path) -> Iterator[Path]:
    """A name of the same file that pyogrio does not take for a URI, as it does with ``!``, ``;`` and the like."""
    if "!" not in str(path) and urlparse(str(path), allow_fragments=False).path == str(path):
        yield path
        return
    with scratch_folder() as folder:
        link = folder / "polygons.gpkg"
        link.symlink_to(path.absolute())
        yield link


class _GeoPackage:
    """A GeoPackage that is being written."""

    def __init__(
        self,
        temporary: Path,
        output: Path,
        schema: LabelSchema,
        dataset: Any,
        ground: Ground,
        options: VectorOptions,
        metadata: Mapping[str, str] | None,
    ) -> None:
        self._temporary, self._output, self._schema, self._ground = temporary, output, schema, ground
        self._crs = dataset.crs.to_wkt() if dataset.crs is not None else None
        self._transform = Affine.scale(1, -1) if dataset.transform.is_identity else dataset.transform
        self._limits = options.minimum_m2, options.minimum_px
        self._metadata = dict(metadata) if metadata else None
        self._waiting = [_NOTHING]
        self._count = self._bytes = 0  # of what is waiting
        self._created = self._in_parts = False
        self.notes = [] if ground.known else [f"no areas: {ground.reason}"]
        if dataset.transform.is_identity and (dataset.gcps[0] or dataset.tags(ns="RPC")):
            self.notes.append("polygons are in pixels; for polygons on a map, put the scene on a grid first (gdalwarp)")

    def add(self, batch: RegionBatch) -> None:
        """Take finished regions, and write when there are many."""
        import shapely

        if batch.labels.max() >= len(self._schema):
            wrong = int(batch.labels.max())
            raise SceneError(f"the label map holds the label {wrong}; its schema has {len(self._schema)} classes")
        outlines = batch.outlines.without_straight_vertices()
        for in_parts in (False, True):
            chosen = batch.parts == in_parts
            if not chosen.any():
                continue
            # A part of a large region is never too small.
            limits = (0.0, 0.0) if in_parts else self._limits
            drawn, areas, kept = large_enough(outlines.select(chosen), self._ground, *limits)
            if len(drawn):
                drawn.points = _on_map(drawn.points, self._transform)
                wkb = shapely.to_wkb(drawn.to_shapely())
                self._waiting.append((wkb, batch.labels[chosen][kept], areas))
                self._count, self._bytes = self._count + len(wkb), self._bytes + sum(map(len, wkb))
        self._in_parts |= bool(batch.parts.any())
        if self._count >= _BATCH or self._bytes >= _BATCH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the waiting polygons (an empty layer if there are none) and the style."""
        if self._count or not self._created:
            self._flush()
        style, about = polygon_style(self._schema), "colours of the label schema"
        row = ["", "", LAYER, "geom", "classes", style, "", True, about, "", "", _EPOCH]
        values = [np.array([value], object if isinstance(value, str) else None) for value in row]
        self._write(None, values, _STYLE_FIELDS, layer="layer_styles", geometry_type=None)
        if self._in_parts:
            self.notes.insert(0, "regions of more than 200,000 vertices are in parts")

    def _flush(self) -> None:
        wkb, labels, areas = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting, self._count, self._bytes = [_NOTHING], 0, 0
        names = np.array(self._schema.class_names, object)
        colors = np.array(["#{:02x}{:02x}{:02x}".format(*cls.shown) for cls in self._schema.classes], object)
        hectares = areas / 10_000 if self._ground.known else np.full(len(areas), np.nan)
        self._write(
            wkb,
            [labels.astype(np.int32), names[labels], colors[labels], hectares],
            ["class_id", "class", "color", "area_ha"],
            field_mask=[None, None, None, np.isnan(hectares)],
            layer=LAYER,
            geometry_type="Polygon",
            crs=self._crs,
            nan_as_null=True,
            dataset_metadata=None if self._created else self._metadata,
            dataset_options=None if self._created else {"VERSION": "1.2"},  # older GDAL and QGIS warn of newer ones
        )
        self._created = True

    def _write(self, wkb: npt.NDArray[Any] | None, values: list[Any], fields: list[str], **options: Any) -> None:
        """Write with pyogrio, and turn its errors into ours."""
        import pyogrio

        size = 0 if wkb is None else sum(map(len, wkb))
        before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _EPOCH})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="'crs' was not provided")
                pyogrio.raw.write(
                    str(self._temporary), wkb, values, fields, driver="GPKG", append=self._created, **options
                )
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, RuntimeError) as error:
            # With its journal and index a batch takes about three times its own size, which a failed write frees again.
            if shutil.disk_usage(self._output.parent).free < _MIN_FREE_BYTES + 4 * size:
                raise SystemRefusalError(f"writing {self._output} failed: no space left on the device") from None
            reason = " ".join(str(error).split()).replace(str(self._temporary), str(self._output))
            raise SceneError(f"writing {self._output} failed: {reason}") from None
        finally:
            pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})
