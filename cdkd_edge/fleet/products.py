"""What a scene becomes besides its label map. A new kind needs a line in :data:`PRODUCTS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdkd_edge.errors import SceneError
from cdkd_edge.labels import LabelSchema
from cdkd_edge.scene.outputs import quicklook_path
from cdkd_edge.scene.pipeline import SegmentOptions
from cdkd_edge.scene.quicklook import write_quicklook


@dataclass(frozen=True)
class Product:
    """A kind of file that is made from a finished label map."""

    path: Callable[[Path], Path]
    """Where it goes, from the label map's path."""
    write: Callable[[str, Any, LabelSchema, Path, SegmentOptions], None]
    """Makes it: scene, figures of the label map (its path, size and pixels per class), schema, path, options."""


PRODUCTS: dict[str, Product] = {"quicklook": Product(quicklook_path, write_quicklook)}


def product_paths(output: Path, products: Sequence[str]) -> list[Path]:
    """Where the products of a label map go."""
    return [PRODUCTS[name].path(output) for name in products]


def refuse_existing_products(output: Path, products: Sequence[str], *, overwrite: bool) -> None:
    """Make sure that a new label map's products replace nothing unasked.

    Raises:
        SceneError: one exists.
    """
    for path in product_paths(output, products):
        if path.exists() and not overwrite:
            raise SceneError(f"{path} exists", hint="keep it, or replace it with --overwrite")


def write_products(
    scene: str,
    figures: Any,
    schema: LabelSchema,
    products: Sequence[str],
    options: SegmentOptions,
    *,
    only_missing: bool,
) -> dict[str, str]:
    """Make the products of a finished label map.

    Args:
        scene: the raster that was labelled.
        figures: a :class:`~cdkd_edge.scene.pipeline.SegmentResult` or a :class:`.kept.KeptMap`.
        schema: classes of the label map.
        products: names in :data:`PRODUCTS`.
        options: as in the run.
        only_missing: leave those that are there.

    Returns:
        The path of each.
    """
    made = {}
    for name in products:
        path = PRODUCTS[name].path(figures.output)
        if not (only_missing and path.exists()):
            PRODUCTS[name].write(scene, figures, schema, path, options)
        made[name] = str(path)
    return made
