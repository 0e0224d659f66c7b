"""A label map as polygons in a GeoPackage, written as they are found.

A layer's style as QGIS finds it inside a GeoPackage: a row of the table ``layer_styles``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine

from cdkd_edge.core.errors import MissingExtraError, SceneError, SystemRefusalError, UsageError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.raster.areas import Ground, ground_of
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.styles import qml
from cdkd_edge.segment.products.outlines import large_enough, mapped
from cdkd_edge.segment.products.regions import Regions, regions, shapely_module


def style_row(layer: str, geometry: str, schema: LabelSchema, moment: str) -> dict[str, str | bool]:
    """The row by column name.

    Args:
        layer: its name.
        geometry: name of its geometry column.
        schema: class names and colours.
        moment: time of the last change, ISO 8601.
    """
    return {
        "f_table_catalog": "",
        "f_table_schema": "",
        "f_table_name": layer,
        "f_geometry_column": geometry,
        "styleName": "classes",
        "styleQML": style_qml(schema),
        "styleSLD": "",
        "useAsDefault": True,
        "description": "colours of the label schema",
        "owner": "",
        "ui": "",
        "update_time": moment,
    }


def style_qml(schema: LabelSchema) -> str:
    """A categorised fill by ``class_id``."""
    root = ElementTree.Element("qgis", version="3.22.0", styleCategories="Symbology")
    renderer = ElementTree.SubElement(
        root, "renderer-v2", type="categorizedSymbol", attr="class_id", enableorderby="0", forceraster="0"
    )
    categories = ElementTree.SubElement(renderer, "categories")
    symbols = ElementTree.SubElement(renderer, "symbols")
    for label, cls in enumerate(schema.classes):
        ElementTree.SubElement(
            categories, "category", value=str(label), type="integer", label=cls.name, symbol=str(label), render="true"
        )
        symbol = ElementTree.SubElement(symbols, "symbol", name=str(label), type="fill", alpha="1", clip_to_extent="1")
        fill = ElementTree.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0"})
        red, green, blue = cls.color
        look = {
            "color": f"{red},{green},{blue},178",
            "style": "solid",
            "outline_color": f"{red * 3 // 5},{green * 3 // 5},{blue * 3 // 5},255",
            "outline_style": "solid",
            "outline_width": "0.1",
            "outline_width_unit": "MM",
        }
        options = ElementTree.SubElement(fill, "Option", type="Map")
        for name, value in look.items():
            ElementTree.SubElement(options, "Option", name=name, value=value, type="QString")
        for name, value in look.items():  # QGIS before 3.22
            ElementTree.SubElement(fill, "prop", k=name, v=value)
    return qml(root)


LAYER = "classes"

_BATCH, _BATCH_BYTES = 10_000, 4 << 20
"""Polygons, and bytes of them, written at once."""

_LITTLE_ROOM = 1 << 20

_EPOCH = "1970-01-01T00:00:00.000Z"
"""Written as the time of change, so that the same map gives the same file."""


@dataclass(frozen=True)
class VectorOptions:
    """Which polygons, and how they are drawn."""

    minimum_m2: float = 0.0
    """Polygons smaller than this are left out, holes smaller than this are closed; small polygons between several
    larger ones leave gaps. For maps whose areas are known."""
    minimum_px: float = 0.0
    """The same in pixels, for maps whose areas are not known."""
    simplify_px: float = 0.0
    """Tolerance of simplification, px; borders stay common to both sides (:func:`.regions.regions`)."""

    def __post_init__(self) -> None:
        if not all(0 <= value < float("inf") for value in (self.minimum_m2, self.minimum_px, self.simplify_px)):
            raise SceneError("minimum areas and the tolerance of simplification are numbers from 0 up")
        if self.minimum_m2 and self.minimum_px:
            raise SceneError("a minimum area is given in m2 or in pixels, not in both")


_AREA = re.compile(r"([0-9.]+)\s*(m2|ha|km2|px)")
_M2 = {"m2": 1.0, "ha": 1e4, "km2": 1e6}


def vector_options(min_area: str | None = None, simplify_px: float = 0.0) -> VectorOptions:
    """Options from what a person types: ``100m2``, ``0.5ha``, ``1km2`` or ``20px``.

    Raises:
        UsageError: that is no area.
    """
    if min_area is None:
        return VectorOptions(simplify_px=simplify_px)
    match = _AREA.fullmatch(min_area.strip())
    try:
        value = float(match[1]) if match else None
    except ValueError:
        value = None
    if match is None or value is None:
        raise UsageError(f"{min_area!r} is no area", hint="for example 100m2, 0.5ha or 20px")
    if match[2] == "px":
        return VectorOptions(minimum_px=value, simplify_px=simplify_px)
    return VectorOptions(minimum_m2=value * _M2[match[2]], simplify_px=simplify_px)


@dataclass(frozen=True)
class VectorResult:
    """A finished GeoPackage."""

    output: Path
    polygons: int
    left_out: int
    """Polygons below the minimum area."""
    notes: tuple[str, ...]


def write_vector(
    label_map: Path,
    output: Path,
    schema: LabelSchema,
    options: VectorOptions = VectorOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    stamp: Mapping[str, str] | None = None,
) -> VectorResult:
    """Write the regions of a label map as polygons (GeoPackage, layer ``classes``).

    Fields: ``class_id``, ``class``, ``color`` (#rrggbb), ``area_ha`` (of the polygon as drawn, on the ellipsoid for
    geographic grids; null where unknown). A style for QGIS is inside. The file appears only when whole. Pixels
    connected by an edge make one polygon, except regions of more than 200,000 vertices, which come in parts.

    Without georeference, x is the column and y the negative row, which is where QGIS puts such rasters. ``stamp`` goes
    into the file's metadata.

    Raises:
        MissingExtraError: pyogrio or Shapely is not installed.
        SceneError: the map cannot be read, or a minimum in m2 is asked for where areas are unknown.
        SystemRefusalError: the disk is full.
        OSError: the folder cannot be written.
    """
    shapely = shapely_module()
    pyogrio = _pyogrio()
    dataset = open_scene(label_map)
    with dataset, gdal(f"reading {label_map}"), whole_file(output) as temporary, _plainly_named(temporary) as plain:
        ground = ground_of(dataset)
        if options.minimum_m2 and not ground.known:
            raise SceneError(
                f"a minimum area in m2 means nothing here: {ground.reason}", hint="give the minimum in pixels"
            )
        package = _Package(pyogrio, shapely, plain, output, schema, dataset, ground, options, stamp)
        try:
            for portion in regions(dataset, simplify=options.simplify_px, progress=progress):
                package.add(portion)
            package.finish()
        finally:
            for suffix in ("-journal", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
    return VectorResult(output, package.written, package.left_out, tuple(package.notes))


def require_vector() -> None:
    """Make sure that polygons can be written.

    Raises:
        MissingExtraError: pyogrio or Shapely is not installed.
    """
    shapely_module()
    _pyogrio()


def _pyogrio() -> Any:
    try:
        import pyogrio
    except ImportError:
        raise MissingExtraError("pyogrio", "vector", "drawing polygons of a label map") from None
    return pyogrio


@contextlib.contextmanager
def _plainly_named(path: Path) -> Iterator[Path]:
    """A name of the same file that pyogrio takes as it is: it takes ``!``, ``;`` and the like for parts of a URI."""
    if "!" not in str(path) and urlparse(str(path), allow_fragments=False).path == str(path):
        yield path
        return
    with scratch_folder() as folder:
        link = folder / "polygons.gpkg"
        link.symlink_to(path.absolute())
        yield link


class _Package:
    """The GeoPackage while it grows."""

    def __init__(
        self,
        pyogrio: Any,
        shapely: Any,
        temporary: Path,
        output: Path,
        schema: LabelSchema,
        dataset: Any,
        ground: Ground,
        options: VectorOptions,
        stamp: Mapping[str, str] | None,
    ) -> None:
        self._pyogrio, self._shapely = pyogrio, shapely
        self._temporary, self._output = temporary, output
        self._schema, self._ground = schema, ground
        self._crs = dataset.crs.to_wkt() if dataset.crs is not None else None
        self._transform = Affine.scale(1, -1) if dataset.transform.is_identity else dataset.transform
        self._could_be_placed = dataset.transform.is_identity and (dataset.gcps[0] or dataset.tags(ns="RPC"))
        self._options, self._stamp = options, stamp
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._waiting_count = self._waiting_bytes = 0
        self._created = False
        self.written = self.left_out = 0
        self.notes: list[str] = []
        self._parts = False

    def add(self, found: Regions) -> None:
        """Take finished regions; write when there are many."""
        if found.labels.max() >= len(self._schema):
            wrong = int(found.labels.max())
            raise SceneError(f"the label map holds the label {wrong}; its schema has {len(self._schema)} classes")
        outlines = found.outlines.without_straight_vertices()
        # Of a region that comes in parts, no part is too small.
        for parts in (False, True):
            chosen = found.parts == parts
            if not chosen.any():
                continue
            some = outlines.only(chosen)
            labels = found.labels[chosen]
            limits = (0.0, 0.0) if parts else (self._options.minimum_m2, self._options.minimum_px)
            drawn, areas, which = large_enough(some, self._ground, *limits)
            self.left_out += len(some) - len(drawn)
            self._parts |= parts
            if len(drawn):
                drawn.points = mapped(drawn.points, self._transform)
                wkb = self._shapely.to_wkb(drawn.to_shapely(self._shapely))
                self._waiting.append((wkb, labels[which], areas))
                self._waiting_count += len(wkb)
                self._waiting_bytes += sum(map(len, wkb))
        if self._waiting_count >= _BATCH or self._waiting_bytes >= _BATCH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is waiting, and the style."""
        self._flush(last=True)
        row = style_row(LAYER, "geom", self._schema, _EPOCH)
        fields = list(row)
        values = [np.array([row[name]], object if isinstance(row[name], str) else None) for name in fields]
        with self._writing():
            self._pyogrio.raw.write(
                str(self._temporary), None, values, fields, layer="layer_styles", driver="GPKG", append=True,
                geometry_type=None,
            )  # fmt: skip
        if self._parts:
            self.notes.append("regions of more than 200,000 vertices are in parts")
        if not self._ground.known:
            self.notes.append(f"no areas: {self._ground.reason}")
        if self._could_be_placed:
            self.notes.append("polygons are in pixels; for polygons on a map, put the scene on a grid first (gdalwarp)")

    def _flush(self, *, last: bool = False) -> None:
        if not self._waiting and not (last and not self._created):
            return
        empty = (np.empty(0, object), np.empty(0, np.uint8), np.empty(0))
        wkb, labels, areas = (np.concatenate(part) for part in zip(*(self._waiting or [empty]), strict=True))
        self._waiting, self._waiting_count, self._waiting_bytes = [], 0, 0
        names = np.array(self._schema.class_names, object)
        colors = np.array([f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (c.color for c in self._schema.classes)], object)
        hectares = areas / 10_000 if self._ground.known else np.full(len(areas), np.nan)
        values = [labels.astype(np.int32), names[labels], colors[labels], hectares]
        with self._writing(sum(map(len, wkb))):
            self._pyogrio.raw.write(
                str(self._temporary),
                wkb,
                values,
                ["class_id", "class", "color", "area_ha"],
                field_mask=[None, None, None, np.isnan(hectares)],
                layer=LAYER,
                driver="GPKG",
                geometry_type="Polygon",
                crs=self._crs,
                append=self._created,
                nan_as_null=True,
                # Newer versions make older GDAL and QGIS warn, and have nothing that is needed here.
                dataset_metadata=None if self._created or not self._stamp else dict(self._stamp),
                dataset_options=None if self._created else {"VERSION": "1.2"},
            )
        self._created = True
        self.written += len(wkb)

    @contextlib.contextmanager
    def _writing(self, size: int = 0) -> Iterator[None]:
        """Turn errors into ours. ``size``: bytes of what is written, which a failed transaction sets free again."""
        before = self._pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
        self._pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": _EPOCH})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="'crs' was not provided")
                yield
        except (self._pyogrio.errors.DataSourceError, self._pyogrio.errors.DataLayerError, RuntimeError) as error:
            # With its journal and its index a batch takes some three times its own size.
            if shutil.disk_usage(self._output.parent).free < _LITTLE_ROOM + 4 * size:
                raise SystemRefusalError(f"writing {self._output} failed: no space left on the device") from None
            reason = " ".join(str(error).split()).replace(str(self._temporary), str(self._output))
            raise SceneError(f"writing {self._output} failed: {reason}") from None
        finally:
            self._pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})
