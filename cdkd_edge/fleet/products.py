"""What a scene becomes besides its label map."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.errors import SceneError
from cdkd_edge.maps import products as maps
from cdkd_edge.maps.stac import Provenance, parse_when
from cdkd_edge.maps.stac_assets import complete_item
from cdkd_edge.maps.vector import VectorOptions
from cdkd_edge.scene.outputs import confidence_path
from cdkd_edge.scene.pipeline import SegmentOptions, SegmentResult


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside each label map; plain data that travels with a job."""

    vector: VectorOptions | None = None
    """Polygons, if given."""
    preview: bool = False
    stac: bool = False
    when: str | None = None
    """Time of the images, as :func:`~cdkd_edge.maps.stac.parse_when` takes it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the products."""
        return tuple(name for name in PRODUCTS if getattr(self, name))


PRODUCTS = ("vector", "preview", "stac")
NOTHING = Wanted()


def require_products(wanted: Wanted) -> None:
    """Make sure, before hours of segmentation, that what is wanted can be made.

    Raises:
        MissingExtraError: an optional package is not installed.
        UsageError: ``when`` is no time.
    """
    maps.require_products(_options(wanted))


def product_paths(output: Path, wanted: Wanted, *, confidence: bool = False) -> list[Path]:
    """What is written beside a label map: its products, and the confidence raster."""
    paths = list(maps.product_paths(output, _options(wanted)).values())
    return [*paths, confidence_path(output)] if confidence else paths


def refuse_existing_products(output: Path, wanted: Wanted, *, confidence: bool, overwrite: bool) -> None:
    """Make sure that a new label map's products replace nothing unasked.

    Raises:
        SceneError: one exists.
    """
    for path in product_paths(output, wanted, confidence=confidence):
        if path.exists() and not overwrite:
            raise SceneError(f"{path} exists", hint="keep it, or replace it with --overwrite")


def write_products(
    scene: str,
    output: Path,
    result: SegmentResult | None,
    engine: Labeller,
    wanted: Wanted,
    options: SegmentOptions,
    *,
    only_missing: bool,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Make the products of a finished label map.

    Args:
        scene: the raster that was labelled.
        output: the label map.
        result: of the run that made it; None where it was there.
        engine: that made it.
        wanted: what to make.
        options: as in the run.
        only_missing: leave those that are there.

    Returns:
        The path of each, and what is to be said about them.

    Raises:
        SceneError: another run is making them; or as :func:`cdkd_edge.maps.products.write_products`.
    """
    asked = replace(
        _options(wanted), segment=options, provenance=Provenance(engine.artefact.file, engine.artefact.sha256)
    )
    paths = maps.product_paths(output, asked)
    made = {name: str(path) for name, path in paths.items()}
    beside = {"confidence": confidence_path(output)} if options.confidence else {}
    item = paths.get("stac")
    if only_missing:
        there = {name: path for name, path in paths.items() if path.exists()}
        beside.update({name: path for name, path in there.items() if name != "stac"})
        asked = replace(
            asked,
            beside=beside,
            vector=None if "vector" in there else asked.vector,
            preview=asked.preview and "preview" not in there,
            stac=asked.stac and "stac" not in there,
        )
    else:
        asked = replace(asked, beside=beside)
    notes: tuple[str, ...] = ()
    with _alone_with(output, paths.values()):
        if maps.product_paths(output, asked):
            areas = result.areas if result else None
            notes = maps.write_products(output, scene, result, engine.schema, asked, areas=areas).notes
        if item is not None and not asked.stac:  # it was there, and may not know of what has been added since
            further = {**beside, **{name: path for name, path in paths.items() if name != "stac"}}
            if complete_item(item, output, further):
                notes = (*notes, f"{item.name} was there; what it did not list was added")
    return made, notes


@contextlib.contextmanager
def _alone_with(output: Path, products: Collection[Path]) -> Iterator[None]:
    """Keep other runs from making the same products, and remove what one left that was killed."""
    if not products:
        yield
        return
    with open(output, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SceneError(
                f"another run is writing what belongs to {output}", hint="wait for it, or choose another --output"
            ) from None
        except OSError:  # a file system without locks: then nobody knows what is in use
            yield
            return
        yield


def _options(wanted: Wanted) -> maps.ProductOptions:
    return maps.ProductOptions(
        vector=wanted.vector,
        preview=wanted.preview,
        stac=wanted.stac,
        when=parse_when(wanted.when) if wanted.when else None,
    )
