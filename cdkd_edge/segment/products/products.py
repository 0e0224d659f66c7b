"""What a label map gets beside it: polygons, a preview, a STAC Item; and whether one that is there is of this map.

Each product says in itself which label map it was made of (``LABEL_MAP``, the file's SHA-256) and with which options:
the GeoPackage in its metadata, the picture in text chunks, the Item in the checksum of its asset ``labels``, the raster
of confidence in a TIFF tag.
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
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.outputs import LABEL_MAP, confidence_path
from cdkd_edge.segment.partial import differences
from cdkd_edge.segment.products.polygons import VectorOptions, require_vector, write_vector
from cdkd_edge.segment.products.preview import write_preview
from cdkd_edge.segment.products.stac import (
    Provenance,
    complete_item,
    item_for,
    label_map_of,
    parse_when,
    read_item,
    times_of,
    write_item,
)

OPTIONS = "OPTIONS"
"""Key of a product's options, as JSON."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside each label map; plain data that travels with a job."""

    vector: VectorOptions | None = None
    """Polygons, if given."""
    preview: bool = False
    stac: bool = False
    when: str | None = None
    """Time of the images, as :func:`~cdkd_edge.segment.products.stac.parse_when` takes it."""


PRODUCTS = ("vector", "preview", "stac")
NOTHING = Wanted()
_EVERYTHING = Wanted(VectorOptions(), preview=True, stac=True)


def product_paths(label_map: Path, wanted: Wanted, *, confidence: bool = False) -> dict[str, Path]:
    """Where what is wanted goes, by name: ``confidence``, then :data:`PRODUCTS`."""
    stem = label_map.with_suffix("")
    ends = {"vector": ".gpkg", "preview": "_preview.png", "stac": ".stac.json"}
    paths = {"confidence": confidence_path(label_map)} if confidence else {}
    return paths | {name: stem.with_name(stem.name + ends[name]) for name in PRODUCTS if getattr(wanted, name)}


def require_products(wanted: Wanted) -> None:
    """Make sure, before hours of segmentation, that what is wanted can be made.

    Raises:
        MissingExtraError: an optional package is not installed.
        UsageError: ``when`` is no time.
    """
    if wanted.vector is not None:
        require_vector()
    if wanted.when:
        parse_when(wanted.when)


def write_products(
    scene: str | Path,
    label_map: Path,
    areas: Areas,
    engine: Labeller,
    wanted: Wanted,
    options: SegmentOptions = SegmentOptions(),
    *,
    kept: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Make the products of a finished label map, each file only whole, the STAC Item last.

    Products of the map that was here before, which nobody wants now, are removed: they would be taken for this map's.

    Args:
        scene: the raster it was made from.
        label_map: the finished map.
        areas: its pixels and hectares.
        engine: that made it.
        wanted: what to make.
        options: how the scene was read: the preview shows the same bands and stretch.
        kept: the map was there; then products that are of it stay, too.
        overwrite: replace products that are of another map or were made with other options.
        progress: of the polygons: tiles done and tiles in all.

    Returns:
        The path of each, and what is to be said about them.

    Raises:
        MissingExtraError: polygons are wanted and the extra ``vector`` is not installed.
        SceneError: another run is making them; one that is there is not of this map; or the scene or the map cannot be
            read.
        SystemRefusalError: the disk is full.
        OSError: the folder cannot be written.
    """
    require_products(wanted)
    paths = product_paths(label_map, wanted, confidence=options.confidence)
    notes: list[str] = []
    with _alone_with(label_map):
        made_of = stamp_of(label_map)
        if kept:
            there = _of_this_map(paths, made_of, wanted, replace=overwrite)
        else:
            there = set()
            notes += _remove_untrue(label_map, paths, made_of)
        making = [name for name in PRODUCTS if name in paths and name not in there]
        stamp = {LABEL_MAP: made_of}
        if making:
            hand_memory_back()
            notes += areas.notes
        if "vector" in making and wanted.vector is not None:
            made_with = {**stamp, OPTIONS: _options_text(wanted.vector)}
            notes += write_vector(
                label_map, paths["vector"], engine.schema, wanted.vector, progress, metadata=made_with
            ).notes
        if "preview" in making:
            write_preview(scene, label_map, engine.schema, areas, paths["preview"], options, stamp=stamp)
        beside = {name: path for name, path in paths.items() if name != "stac"}
        if "stac" in making:
            # Also what an earlier run made of this map and this one does not want.
            others = product_paths(label_map, _EVERYTHING, confidence=True)
            others = {k: p for k, p in others.items() if k not in paths and misfit(k, p, made_of, NOTHING) is None}
            item = item_for(
                label_map,
                scene,
                engine.schema,
                areas,
                provenance=Provenance(engine.artefact.file, engine.artefact.sha256),
                when=parse_when(wanted.when) if wanted.when else None,
                assets={**others, **beside},
            )
            write_item(paths["stac"], item)
        elif "stac" in paths and complete_item(paths["stac"], label_map, beside):
            notes.append(f"{paths['stac'].name} was there; what it did not list was added")
    made = {name: str(paths[name]) for name in PRODUCTS if name in paths}
    return made, tuple(dict.fromkeys(notes))


def stamp_of(label_map: Path) -> str:
    """What a product of a label map says it was made of."""
    return f"sha256:{sha256_of(label_map)}"


def misfit(name: str, path: Path, made_of: str, wanted: Wanted) -> str | None:
    """Why a product that is there is not the one that would be made; None: it is. All of the file is read.

    Args:
        name: ``confidence`` or one of :data:`PRODUCTS`.
        path: the product.
        made_of: :func:`stamp_of` the label map.
        wanted: its options.
    """
    if not path.exists():
        return "is not there"
    try:
        stamp = _STAMPS[name](path)
    except _UNREADABLE as error:
        return f"is damaged, or something else: {' '.join(str(error).split()) or type(error).__name__}"
    if not stamp.get(LABEL_MAP):
        return "does not say which label map it was made of"
    if stamp[LABEL_MAP] != made_of:
        return "was made of another label map"
    differing: list[str] = []
    if name == "vector" and wanted.vector is not None and stamp.get(OPTIONS) != _options_text(wanted.vector):
        with contextlib.suppress(ValueError, RecursionError):
            differing = differences(json.loads(stamp.get(OPTIONS, "")), dataclasses.asdict(wanted.vector))
        return f"was made with other options: {'; '.join(differing) or 'unknown ones'}"
    if name == "stac" and wanted.when and stamp[OPTIONS] != json.dumps(times_of(parse_when(wanted.when))):
        return f"has another time: {stamp[OPTIONS]}"
    return None


def _of_this_map(paths: Mapping[str, Path], made_of: str, wanted: Wanted, *, replace: bool) -> set[str]:
    """Products that are there and stay; those that are not of this map are refused, or to be replaced."""
    fitting = set()
    for name in PRODUCTS:
        if name in paths and paths[name].exists():
            reason = misfit(name, paths[name], made_of, wanted)
            if reason is None:
                fitting.add(name)
            elif not replace:
                raise occupied(paths[name], SceneError, reason)
    return fitting


def _remove_untrue(label_map: Path, wanted: Mapping[str, Path], made_of: str) -> list[str]:
    """Remove products of the map that was here before; only what says that it is one, so nothing of the user's."""
    removed = []
    for name, path in product_paths(label_map, _EVERYTHING, confidence=True).items():
        if name in wanted or not path.is_file() or path.is_symlink():
            continue
        try:
            stamp = _STAMPS[name](path)
        except _UNREADABLE:  # nobody knows whose it is
            continue
        if LABEL_MAP in stamp and stamp[LABEL_MAP] != made_of:
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)  # GDAL's statistics of it
            removed.append(path.name)
    return [f"removed {', '.join(removed)}: made of the label map that was here before"] if removed else []


# --- what a product was made of: read together with all of the file -----------------------------------------------


def _raster_stamp(path: Path) -> dict[str, str]:
    with open_scene(path) as dataset, gdal(f"reading {path}"):
        for _, window in dataset.block_windows(1):
            dataset.read(window=window)
        tags = dataset.tags()
    # Earlier releases did not say of which map.
    return {LABEL_MAP: tags.get(LABEL_MAP, "")} if "CDKD_EDGE" in tags else {}


def _package_stamp(path: Path) -> dict[str, str]:
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


def _picture_stamp(path: Path) -> dict[str, str]:
    with Image.open(path, formats=("PNG",)) as picture:
        picture.verify()  # checksums
    with Image.open(path, formats=("PNG",)) as picture:
        picture.load()
        return {str(key): str(value) for key, value in getattr(picture, "text", {}).items()}


def _item_stamp(path: Path) -> dict[str, str]:
    item = read_item(path)
    properties = item["properties"]
    times = [properties.get(key) for key in ("datetime", "start_datetime", "end_datetime")]
    return {LABEL_MAP: f"sha256:{label_map_of(item)}", OPTIONS: json.dumps(times)}


_UNREADABLE = (SceneError, OSError, sqlite3.Error, ValueError, SyntaxError, Image.DecompressionBombError)
_STAMPS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "confidence": _raster_stamp,
    "vector": _package_stamp,
    "preview": _picture_stamp,
    "stac": _item_stamp,
}


def _options_text(options: VectorOptions) -> str:
    return json.dumps(dataclasses.asdict(options))


@contextlib.contextmanager
def _alone_with(label_map: Path) -> Iterator[None]:
    """Keep other runs from making the same products."""
    with open(label_map, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SceneError(
                f"another run is writing what belongs to {label_map}", hint="wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
