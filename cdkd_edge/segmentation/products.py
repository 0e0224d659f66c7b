"""Makes the products of a label map: polygons, a preview, a STAC Item; or keeps one that is there and is of this map.

Each product names the label map that it was made from (``LABEL_MAP``, the SHA-256 of the file) and its options: the
GeoPackage in its metadata, the picture in text chunks, the Item in the checksum of its asset ``labels``, the confidence
raster in a TIFF tag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes
from xml.etree import ElementTree

from PIL import Image

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.files import occupied, sha256_of
from cdkd_edge.core.machine import hand_memory_back
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.areas import Areas
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.styles import sidecar_path
from cdkd_edge.segmentation import stac
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.outputs import LABEL_MAP, confidence_path
from cdkd_edge.segmentation.partial import differences
from cdkd_edge.segmentation.polygons import VectorOptions, require_vector, write_vector
from cdkd_edge.segmentation.preview import write_preview

_OPTIONS = "OPTIONS"  # key under which a product keeps its options, as JSON


@dataclass(frozen=True)
class ProductOptions:
    """What to make beside each label map."""

    vector: VectorOptions | None = None  # polygons, if given
    preview: bool = False
    stac: bool = False
    when: str | None = None  # time of the images, as :func:`.stac.parse_when` reads it

    def require(self) -> None:
        """Make sure, before hours of segmentation, that the products can be made.

        Raises MissingExtraError if an optional package is not installed, UsageError if ``when`` is not a time.
        """
        if self.vector is not None:
            require_vector()
        if self.when:
            stac.parse_when(self.when)


PRODUCTS = ("vector", "preview", "stac")
NO_PRODUCTS = ProductOptions()
_ALL_PRODUCTS = ProductOptions(VectorOptions(), preview=True, stac=True)


def product_paths(label_map: Path, options: ProductOptions, *, confidence: bool = False) -> dict[str, Path]:
    """Where the products go, by name: ``confidence``, then :data:`PRODUCTS`."""
    stem = label_map.with_suffix("")
    ends = {"vector": ".gpkg", "preview": "_preview.png", "stac": ".stac.json"}
    paths = {"confidence": confidence_path(label_map)} if confidence else {}
    return paths | {name: stem.with_name(stem.name + ends[name]) for name in PRODUCTS if getattr(options, name)}


def write_products(
    scene: str | Path,
    label_map: Path,
    areas: Areas,
    engine: Labeller,
    options: ProductOptions,
    scene_options: SegmentOptions = SegmentOptions(),
    *,
    kept: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Make the products of a finished label map. Each file appears only when it is complete, the STAC Item last.

    Products of an earlier label map that are not made again are removed: they would be taken for this one's. Returns
    the path of each product, and notes for the user. Raises MissingExtraError if polygons are asked for and the extra
    ``vector`` is not installed; SceneError if another run is making the products, if one that is there is not of this
    map, or if a file is unreadable; SystemRefusalError or OSError if writing failed.

    Args:
        scene, label_map, areas, engine: what was labelled, the map, its pixels and hectares, and what made it.
        scene_options: how the scene was read: the preview shows the same bands and stretch.
        kept: the map was there before; then products that are of it stay, too.
        overwrite: replace products of another map or with other options.
    """
    options.require()
    schema = engine.schema.in_palette(scene_options.palette)
    paths = product_paths(label_map, options, confidence=scene_options.confidence)
    with _locked(label_map):
        source = source_of(label_map)
        stamp = {LABEL_MAP: source}
        notes = [] if kept else _remove_outdated(label_map, paths, source)
        wanted = [name for name in PRODUCTS if name in paths]
        making = [one for one in wanted if not (kept and _stays(one, paths[one], source, options, overwrite))]
        if making:
            hand_memory_back()
            notes += areas.notes
        if "vector" in making and options.vector is not None:
            metadata = {**stamp, _OPTIONS: _options_text(options.vector)}
            notes += write_vector(label_map, paths["vector"], schema, options.vector, metadata=metadata)
        if "preview" in making:
            write_preview(scene, label_map, schema, areas, paths["preview"], scene_options, metadata=stamp)
        assets = {name: path for name, path in paths.items() if name != "stac"}
        if "stac" in making:
            # Also list what an earlier run made of this map.
            others = product_paths(label_map, _ALL_PRODUCTS, confidence=True)
            others = {k: p for k, p in others.items() if k not in paths and mismatch(k, p, source) is None}
            when = stac.parse_when(options.when) if options.when else None
            item = stac.item_for(
                label_map, scene, schema, areas, engine=engine.artefact, when=when, assets={**others, **assets}
            )
            stac.write_item(paths["stac"], item)
        elif "stac" in paths and stac.complete_item(paths["stac"], label_map, assets):
            notes.append(f"{paths['stac'].name} was there; what it did not list was added")
    return {name: str(paths[name]) for name in wanted}, tuple(dict.fromkeys(notes))


def source_of(label_map: Path) -> str:
    """What the products of a label map store as :data:`.outputs.LABEL_MAP`."""
    return f"sha256:{sha256_of(label_map)}"


def mismatch(name: str, path: Path, source: str, options: ProductOptions = NO_PRODUCTS) -> str | None:
    """Why a product is not the one that would be made; None: it is. The whole file is read.

    ``name`` is ``confidence`` or one of :data:`PRODUCTS`; ``source`` is :func:`source_of` the label map.
    """
    if not path.exists():
        return "is not there"
    try:
        stored = _READERS[name](path)
    except _UNREADABLE as error:
        return f"is damaged, or something else: {' '.join(str(error).split()) or type(error).__name__}"
    if not stored.get(LABEL_MAP):
        return "does not say which label map it was made of"
    if stored[LABEL_MAP] != source:
        return "was made of another label map"
    if name == "vector" and options.vector is not None and stored.get(_OPTIONS) != _options_text(options.vector):
        changes: list[str] = []
        with contextlib.suppress(ValueError, RecursionError):
            changes = differences(json.loads(stored.get(_OPTIONS, "")), dataclasses.asdict(options.vector))
        return f"was made with other options: {'; '.join(changes) or 'unknown ones'}"
    if name == "stac" and options.when and stored[_OPTIONS] != json.dumps(stac.parse_when(options.when).fields):
        return f"has another time: {stored[_OPTIONS]}"
    return None


def _stays(name: str, path: Path, source: str, options: ProductOptions, overwrite: bool) -> bool:
    """Whether a product is there and can stay; refuses another one unless it may be overwritten."""
    if not path.exists():
        return False
    reason = mismatch(name, path, source, options)
    if reason is not None and not overwrite:
        raise occupied(path, SceneError, reason)
    return reason is None


def _remove_outdated(label_map: Path, wanted: Mapping[str, Path], source: str) -> list[str]:
    """Remove products that say they are of another label map, never a file of the user's."""
    removed = []
    for name, path in product_paths(label_map, _ALL_PRODUCTS, confidence=True).items():
        if name in wanted or not path.is_file() or path.is_symlink():
            continue
        try:
            stored = _READERS[name](path)
        except _UNREADABLE:
            continue
        if LABEL_MAP in stored and stored[LABEL_MAP] != source:
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)  # GDAL's statistics of it
            removed.append(path.name)
    return [f"removed {', '.join(removed)}: made of the label map that was here before"] if removed else []


def _read_raster(path: Path) -> dict[str, str]:
    with open_scene(path) as dataset, gdal(f"reading {path}"):
        for _, window in dataset.block_windows(1):
            dataset.read(window=window)
        tags = dataset.tags()
    # Earlier releases did not name the label map.
    return {LABEL_MAP: tags.get(LABEL_MAP, "")} if "CDKD_EDGE" in tags else {}


def _read_geopackage(path: Path) -> dict[str, str]:
    name = quote_from_bytes(bytes(path.absolute()))
    with contextlib.closing(sqlite3.connect(f"file:{name}?mode=ro&immutable=1", uri=True)) as database:
        (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise ValueError(str(found))
        if path.stat().st_size % database.execute("PRAGMA page_size").fetchone()[0]:
            raise ValueError("its end is missing")
        rows = database.execute("SELECT metadata FROM gpkg_metadata WHERE length(metadata) < 10000").fetchmany(100)
    items = (item for (text,) in rows for item in ElementTree.fromstring(text).iter("MDI"))
    return {item.get("key", ""): item.text or "" for item in items}


def _read_picture(path: Path) -> dict[str, str]:
    with Image.open(path, formats=("PNG",)) as picture:
        picture.verify()  # checksums
    with Image.open(path, formats=("PNG",)) as picture:
        picture.load()
        return {str(key): str(value) for key, value in getattr(picture, "text", {}).items()}


def _read_item(path: Path) -> dict[str, str]:
    item = stac.read_item(path)
    times = [item["properties"].get(key) for key in ("datetime", "start_datetime", "end_datetime")]
    return {LABEL_MAP: f"sha256:{stac.label_map_of(item)}", _OPTIONS: json.dumps(times)}


_UNREADABLE = (SceneError, OSError, sqlite3.Error, ValueError, SyntaxError, Image.DecompressionBombError)
_READERS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "confidence": _read_raster,
    "vector": _read_geopackage,
    "preview": _read_picture,
    "stac": _read_item,
}


def _options_text(options: VectorOptions) -> str:
    return json.dumps(dataclasses.asdict(options))


@contextlib.contextmanager
def _locked(label_map: Path) -> Iterator[None]:
    """Keep other runs from making the same products."""
    with open(label_map, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SceneError(
                f"another run is writing the products of {label_map}", hint="wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
