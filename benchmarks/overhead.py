"""What a scene costs beyond its tiles: end-to-end time over the time in the engine.

    python benchmarks/overhead.py engines/ckpt.fp32.cpu.onnx --scene scene.tif --output benchmarks/results

``segment_scene`` (reading, tiling, labelling, stitching, writing) runs several times. ``ratio`` is its seconds over the
seconds in the engine, launch to labels; the target is 1.05. Because reading and writing share the cores with a CPU
engine, they could also slow the engine and hide in that ratio: ``ratio_alone`` therefore divides by the time that the
same number of tiles takes the engine alone, right after. ``before`` and ``after`` say where the rest went: until the
first tile's labels are placed, less a tile; and from the last tile to the finished file.

One scene is drawn; ``--scene`` adds others. ``--output FOLDER`` writes ``overhead.json``; a run replaces the recorded
run of the same engine and scene.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rasterio
from rasterio.transform import from_origin
from script_tools import read_record, run_reporting_errors, shown_command

from cdkd_edge.core.files import write_text
from cdkd_edge.core.machine import available_cores, describe_machine, library_versions
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segmentation.pipeline import segment_scene

SCHEMA = 1
TARGET = 1.05


def draw(path: Path, side: int) -> None:
    """A drawn scene of ``side`` x ``side`` px as a tiled, compressed, georeferenced GeoTIFF."""
    (image,) = sample_tiles(side, 1)
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 3,
        "dtype": "uint8",
        "photometric": "RGB",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "crs": "EPSG:32640",
        "transform": from_origin(325_000, 2_785_000, 0.5, 0.5),
    }
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(image)


def measure(engine: Labeller, scene: str | Path, repeats: int) -> dict[str, Any]:
    """Segment a scene several times, and run its tiles through the engine alone after each.

    Args:
        engine: what labels tiles.
        scene: what :func:`cdkd_edge.segmentation.pipeline.segment_scene` takes.
        repeats: measured runs; one more warms up.

    Raises:
        CdkdEdgeError: as ``segment_scene`` does.
        ValueError: the engine took no time, so that there is nothing to divide by.
    """
    rows: list[dict[str, float]] = []
    size = (0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            moments: list[tuple[float, int]] = []

            def note(done: int, total: int, moments: list[tuple[float, int]] = moments) -> None:
                moments.append((time.perf_counter(), done))

            started = time.perf_counter()
            result = segment_scene(engine, scene, Path(folder, "labels.tif"), progress=note)
            ended = time.perf_counter()
            if result.engine_seconds <= 0:
                raise ValueError(f"the engine did nothing on {scene}")
            batches = -(-(result.tiles - result.tiles_without_data) // engine.batch)
            alone = engine_alone(engine, batches)
            size = (result.height, result.width, result.tiles)
            placed = [moment for moment, done in moments if done > 0]
            if number:
                rows.append(
                    {
                        "seconds": result.seconds,
                        "engine_seconds": result.engine_seconds,
                        "engine_alone_seconds": alone,
                        "ratio": result.seconds / result.engine_seconds,
                        "ratio_alone": result.seconds / alone,
                        "before": placed[0] - started - result.engine_seconds / batches,
                        "after": ended - placed[-1],
                    }
                )
    figures = {
        key: {
            "median": statistics.median(row[key] for row in rows),
            "minimum": min(row[key] for row in rows),
            "maximum": max(row[key] for row in rows),
        }
        for key in rows[0]
    }
    return {
        "height": size[0],
        "width": size[1],
        "tiles": size[2],
        "repeats": rows,
        "figures": figures,
        "target": TARGET,
        "within_target": figures["ratio"]["median"] <= TARGET,
    }


def engine_alone(engine: Labeller, batches: int) -> float:
    """Seconds of that many batches, of what lies in the engine's slots."""
    started = time.perf_counter()
    for number in range(batches):
        engine.launch(number % engine.slots)
        engine.wait(number % engine.slots)
    return time.perf_counter() - started


def merge(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The record with this run in the place of the one of the same engine, tile and scene."""

    def identity(one: dict[str, Any]) -> tuple[str, ...]:
        return one["engine"], f"{one['tile']:05}", one["scene"]

    runs = [one for one in record["runs"] if identity(one) != identity(run)]
    return {"schema": SCHEMA, "runs": sorted([*runs, run], key=identity)}


def main(words: Sequence[str] | None = None) -> int:
    """Parse, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+", metavar="ENGINE")
    parser.add_argument("--scene", action="append", default=[], help="repeatable")
    parser.add_argument("--side", type=int, help="of the drawn scene, px; 0: none. Default: about 3 tiles")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--output", type=Path, help="folder for overhead.json")
    arguments = parser.parse_args(words)
    if arguments.repeats < 1 or arguments.threads < 1 or (arguments.side or 0) < 0:
        parser.error("repeats and threads are at least 1, side is not negative")
    return run_reporting_errors(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    path = arguments.output / "overhead.json" if arguments.output else None
    record = read_record(path, SCHEMA)
    print(
        f"{'engine':24} {'scene':24} {'tiles':>5} {'s':>8} {'/ engine':>21} {'/ engine alone':>15} "
        f"{'before':>7} {'after':>7}"
    )
    for file in arguments.engines:
        engine = load_engine(file, threads=arguments.threads)
        try:
            for name, given in _scenes(arguments, engine.tile):
                load = os.getloadavg()
                with tempfile.TemporaryDirectory() as folder:
                    scene = given or str(Path(folder, "drawn.tif"))
                    if given is None:
                        draw(Path(scene), _side(arguments, engine.tile))
                    result = measure(engine, scene, arguments.repeats)
                run = {
                    "engine": file.name,
                    "precision": engine.manifest.precision,
                    "runtime": engine.manifest.runtime,
                    "tile": engine.tile,
                    "scene": name,
                    "command": shown_command("overhead.py"),
                    "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    "machine": vars(describe_machine()),
                    "load_average": {"before": load, "after": os.getloadavg()},
                    "libraries": library_versions(("onnxruntime", "rasterio", "numpy")),
                    "threads": arguments.threads,
                    **result,
                }
                record = merge(record, run)
                _show(run)
                if path:
                    write_text(path, json.dumps(record, indent=2) + "\n")
        finally:
            engine.close()
    return 0


def _scenes(arguments: argparse.Namespace, tile: int) -> list[tuple[str, str | None]]:
    """Name and path; None is to be drawn."""
    side = _side(arguments, tile)
    drawn: list[tuple[str, str | None]] = [(f"drawn, {side} x {side} px", None)] if side else []
    return drawn + [(Path(scene).name, scene) for scene in arguments.scene]


def _side(arguments: argparse.Namespace, tile: int) -> int:
    return 3 * tile - tile // 4 if arguments.side is None else int(arguments.side)


def _show(run: dict[str, Any]) -> None:
    figures = run["figures"]
    ratio, alone = figures["ratio"], figures["ratio_alone"]
    print(
        f"{run['engine'][:24]:24} {run['scene'][:24]:24} {run['tiles']:5} {figures['seconds']['median']:8.3f} "
        f"{ratio['median']:6.3f} ({ratio['minimum']:.3f}..{ratio['maximum']:.3f}) {alone['median']:15.3f} "
        f"{figures['before']['median']:7.3f} {figures['after']['median']:7.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
