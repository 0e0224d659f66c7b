"""Whether tiles leave seams: how far neighbouring tiles agree where they overlap, and whether labels change at borders.

    python benchmarks/seams.py ENGINE DATA/images --output benchmarks/results/seams

writes ``seams.json`` and ``.md``. Images are labelled as ``segment`` does it, with the default overlap. Two figures:

- Agreement: the share of pixels in the overlap of two tiles that both give the same label, by distance from the nearer
  of the two borders. It is the network's own: where a tile ends, it sees less of the surroundings.
- Changes: how often two neighbouring pixels have different labels, across the lines where one tile's pixels end and the
  next one's begin, and across all other lines of the same direction. A ratio of 1 is a map without seams; how much of a
  ratio is chance is told by an interval over images (95 %, bootstrap).

With an engine that gives probabilities (``build --probabilities``) both merges are measured, else crop alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from script_tools import write_results

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.open import open_scene
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

BIN = 8
"""Width of the bins of distance, px."""
RESAMPLES = 2000

Labels = npt.NDArray[np.uint8]


@dataclass
class Counts:
    """Pairs of pixels and how many of them differ, one entry per image."""

    pairs: list[int] = field(default_factory=list)
    different: list[int] = field(default_factory=list)

    def add(self, pairs: int, different: int) -> None:
        """One image."""
        self.pairs.append(pairs)
        self.different.append(different)

    @property
    def rate(self) -> float:
        """Share of pairs that differ."""
        return sum(self.different) / sum(self.pairs)


def tiles_of(engine: Labeller, reader: SceneReader, grid: TileGrid) -> dict[tuple[int, int], Labels]:
    """Labels of every whole tile, ``[T, T]``, by row and column of the grid."""
    labels = {}
    for i, row in enumerate(grid.rows):
        for j, column in enumerate(grid.columns):
            reader.read_tile(row, column, engine.input(0)[0])
            engine.launch(0)
            engine.wait(0)
            labels[i, j] = engine.output(0)[0].copy()
    return labels


def disagreements(
    tiles: dict[tuple[int, int], Labels], grid: TileGrid, height: int, width: int
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]]:
    """For every pair of neighbours: distance of the pixels they share from the nearer border, and where they differ."""
    for (i, j), labels in tiles.items():
        for di, dj, spans, size in ((0, 1, grid.columns, width), (1, 0, grid.rows, height)):
            if (i + di, j + dj) not in tiles:
                continue
            number, other = (j, tiles[i, j + 1]) if dj else (i, tiles[i + 1, j])
            one, two = labels, other
            if di:
                one, two = one.T, two.T
            first, second, tile = spans[number].start, spans[number + 1].start, len(one)
            across = grid.rows[i] if dj else grid.columns[j]
            length = height if dj else width
            # Only what lies on the scene counts, along the border too.
            along = slice(max(0, -across.start), min(tile, length - across.start))
            shared = np.arange(max(second, 0), min(first + tile, size))
            distance = np.minimum(shared - second, first + tile - 1 - shared)
            different = one[along, shared - first] != two[along, shared - second]
            yield distance, different


def changes(labels: Labels, grid: TileGrid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pairs of neighbouring pixels and how many differ: across borders of kept parts, and elsewhere."""
    at, elsewhere = [0, 0], [0, 0]
    for array, spans in ((labels.T, grid.rows), (labels, grid.columns)):
        borders = np.zeros(array.shape[1] - 1, bool)
        borders[[span.last - 1 for span in spans[:-1]]] = True
        known = (array[:, 1:] != NO_LABEL) & (array[:, :-1] != NO_LABEL)
        differ = (array[:, 1:] != array[:, :-1]) & known
        for chosen, total in ((borders, at), (~borders, elsewhere)):
            total[0] += int(known[:, chosen].sum())
            total[1] += int(differ[:, chosen].sum())
    return (at[0], at[1]), (elsewhere[0], elsewhere[1])


def interval(at: Counts, elsewhere: Counts, seed: int = 0) -> tuple[float, float]:
    """95 % of the ratio of rates, over images drawn with replacement."""
    counts = np.array([at.pairs, at.different, elsewhere.pairs, elsewhere.different], np.float64)
    drawn = np.random.default_rng(seed).integers(0, counts.shape[1], (RESAMPLES, counts.shape[1]))
    pairs, different, other_pairs, other_different = counts[:, drawn].sum(axis=2)
    ratios = (different / pairs) / (other_different / other_pairs)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def measure(engine_path: Path, images: list[Path], overlap: int | None = None) -> dict[str, Any]:
    """Everything, as data; ``overlap`` of tiles in px, by default that of ``segment``."""
    engine = load_engine(engine_path)
    options = SegmentOptions(overlap=overlap)
    overlap = options.overlap_of(engine.tile)
    merges = ["crop", "hann"] if engine.output_kind == "probabilities" else ["crop"]
    shared, same = np.zeros(engine.tile, np.int64), np.zeros(engine.tile, np.int64)
    counted = {merge: (Counts(), Counts()) for merge in merges}
    tiles = 0
    with tempfile.TemporaryDirectory(prefix="cdkd-edge-") as folder:
        for image in images:
            reader = SceneReader(image)
            try:
                grid = options.grid_over(reader, engine.tile)
                labels = tiles_of(engine, reader, grid)
                tiles += len(labels)
                for distance, different in disagreements(labels, grid, reader.height, reader.width):
                    np.add.at(shared, distance, different.shape[0])
                    np.add.at(same, distance, (~different).sum(axis=0))
            finally:
                reader.close()
            for merge in merges:
                output = Path(folder) / f"{merge}.tif"
                segment_scene(engine, image, output, replace(options, merge=merge))
                with open_scene(output) as dataset:
                    at, elsewhere = changes(dataset.read(1), grid)
                for counts, found in zip(counted[merge], (at, elsewhere), strict=True):
                    counts.add(*found)
    bins = []
    for low in range(0, engine.tile, BIN):
        pixels = int(shared[low : low + BIN].sum())
        if pixels:
            agreeing = int(same[low : low + BIN].sum())
            bins.append({"from_px": low, "to_px": low + BIN - 1, "pixels": pixels, "agreement": agreeing / pixels})
    rows = [
        {
            "merge": merge,
            "at_borders": at.rate,
            "elsewhere": elsewhere.rate,
            "ratio": at.rate / elsewhere.rate,
            "ratio_95": interval(at, elsewhere),
        }
        for merge, (at, elsewhere) in counted.items()
    ]
    kept = TileGrid.over(4 * engine.tile, 4 * engine.tile, engine.tile, overlap)
    return {
        "engine": engine.artefact.file,
        "tile": engine.tile,
        "overlap": overlap,
        "border_of_kept_parts_px": kept.columns[0].last - kept.columns[1].start,
        "images": len(images),
        "tiles": tiles,
        "agreement": bins,
        "changes": rows,
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Seams between tiles",
        "",
        f"`{results['command']}`: {results['images']} images, {results['tiles']} tiles of {results['tile']} px that "
        f"overlap by {results['overlap']} px, engine `{results['engine']}`.",
        "",
        "Labels of two neighbouring tiles in their overlap:",
        "",
        "| px from the nearer border | pixels | same label |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['from_px']} to {row['to_px']} | {row['pixels']:,} | {row['agreement']:.2%} |"
        for row in results["agreement"]
    ]
    lines += [
        "",
        f"With `crop`, parts that are kept end {results['border_of_kept_parts_px']} px from the border of a tile, "
        "the furthest from both. How often the label changes from a pixel to the next:",
        "",
        "| merge | across borders of tiles | elsewhere | ratio (95 % over images) |",
        "|---|---|---|---|",
    ]
    for row in results["changes"]:
        low, high = row["ratio_95"]
        lines.append(
            f"| {row['merge']} | {row['at_borders']:.3%} | {row['elsewhere']:.3%} "
            f"| {row['ratio']:.2f} ({low:.2f} .. {high:.2f}) |"
        )
    edge = results["border_of_kept_parts_px"]
    differing = [1 - row["agreement"] for row in results["agreement"] if row["from_px"] <= edge <= row["to_px"]]
    if differing:
        lines += [
            "",
            "The pixels to either side of such a border come from different tiles, so a step of `crop` is the "
            f"network's own: {edge} px from their borders two tiles differ in {differing[0]:.1%} of the pixels, and "
            f"{results['changes'][0]['at_borders']:.1%} of the labels change across borders. "
            "`hann` blends what differs.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("images", type=Path, help="A folder of images.")
    parser.add_argument("--limit", type=int, help="Take only so many images, spread evenly.")
    parser.add_argument("--overlap", type=int, help="Of tiles, px. Default: that of segment.")
    parser.add_argument("--output", type=Path, help="Where results go, without suffix. Default: printed.")
    arguments = parser.parse_args()
    images = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in (".jpg", ".png", ".tif"))
    if arguments.limit:
        images = images[:: max(1, len(images) // arguments.limit)][: arguments.limit]
    limit = f" --limit {arguments.limit}" if arguments.limit else ""
    overlap = f" --overlap {arguments.overlap}" if arguments.overlap is not None else ""
    command = f"python benchmarks/seams.py {arguments.engine.name} DATA/images{limit}{overlap}"
    results = {"command": command, **measure(arguments.engine, images, arguments.overlap)}
    write_results(arguments.output, results, as_markdown(results))


if __name__ == "__main__":
    main()
