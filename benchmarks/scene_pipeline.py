"""What `segment` costs besides the engine: tiles per second, memory by size of the scene, time by stage.

    python benchmarks/scene_pipeline.py --output benchmarks/results/scene-pipeline

writes ``scene-pipeline.json`` and ``.md``. Every run is a process of its own whose engine answers at once (its labels
are a drawn map, so that they compress as labels do). Its peak memory (VmHWM) is set back when the engine is ready, and
the parent reads it from /proc then and when the label map is written; the difference is what the pipeline takes
above the engine's buffers and the libraries. Processor seconds say what it costs also where the machine is busy.
Speed: a drawn scene repeated to ``--side`` px. Memory: the same picture repeated by a VRT to each width, three rows of
tiles high, and to one scene 100,000 px high; and stored as compressed strips 100,000 px wide, the layout that is
hardest to read in pieces. ``--engine`` adds a run with an engine: the time from end to end over the engine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from script_tools import machine_of_run, write_results

from cdkd_edge.engines.protocol import Labeller

TILE = 1024
WIDTHS = (2_000, 10_000, 50_000, 100_000)
ROWS = 3
TALL = 100_000


class InstantEngine(Labeller):
    """An engine whose labels are there before they are asked for."""

    def __init__(self, tile: int, slots: int = 3) -> None:
        from cdkd_edge.core.labels import load_schema
        from cdkd_edge.core.manifest import FileRecord

        self.tile, self.batch, self.slots = tile, 1, slots
        self.schema = load_schema("dubai")
        self.artefact = FileRecord("instant", "0" * 64, 0)
        with (resources.files("cdkd_edge.demo") / "scene-labels.png").open("rb") as file:
            labels = np.resize(np.asarray(Image.open(file))[:tile, :tile], (tile, tile))
        self._inputs = [np.zeros((1, 3, tile, tile), np.uint8) for _ in range(slots)]
        self._outputs = [labels[None].copy() for _ in range(slots)]

    def input(self, slot: int) -> npt.NDArray[np.uint8]:
        """The slot's tiles."""
        return self._inputs[slot]

    def output(self, slot: int) -> npt.NDArray[np.uint8]:
        """The slot's labels, always the same."""
        return self._outputs[slot]

    def launch(self, slot: int) -> None:
        """Nothing to compute."""

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to release."""


# --- scenes ---------------------------------------------------------------------------------------


def make_scenes(folder: Path, side: int) -> dict[str, Path]:
    """GeoTIFFs of ``side`` px in the layouts whose speed is measured."""
    import rasterio

    from cdkd_edge.core.sample import sample_tiles

    picture = sample_tiles(2048, 1)[0]
    repeated = np.tile(picture, (1, -(-side // 2048), -(-side // 2048)))[:, :side, :side]
    layouts: dict[str, dict[str, Any]] = {
        "uncompressed, blocks of 512": {"tiled": True, "blockxsize": 512, "blockysize": 512},
        "uncompressed, strips": {},
        "deflate, blocks of 512": {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"},
        "deflate, strips": {"compress": "deflate"},
    }
    scenes = {}
    for name, layout in layouts.items():
        path = scenes[name] = folder / f"{name.replace(', ', '-').replace(' ', '-')}.tif"
        profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8"}
        with rasterio.open(path, "w", **profile, photometric="RGB", **layout) as dataset:
            dataset.write(repeated)
    return scenes


def repeated_by_vrt(source: Path, path: Path, height: int, width: int) -> Path:
    """A VRT that repeats a raster of 2048 px and takes no room."""
    bands = []
    for band in (1, 2, 3):
        sources = []
        for top in range(0, height, 2048):
            for left in range(0, width, 2048):
                h, w = min(2048, height - top), min(2048, width - left)
                sources.append(
                    f'<SimpleSource><SourceFilename relativeToVRT="1">{source.name}</SourceFilename>'
                    f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="{w}" ySize="{h}"/>'
                    f'<DstRect xOff="{left}" yOff="{top}" xSize="{w}" ySize="{h}"/></SimpleSource>'
                )
        color = ("Red", "Green", "Blue")[band - 1]
        bands.append(
            f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{color}</ColorInterp>'
            f"{''.join(sources)}</VRTRasterBand>"
        )
    path.write_text(f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{"".join(bands)}</VRTDataset>')
    return path


def wide_strips(path: Path, height: int, width: int) -> Path:
    """Compressed strips as wide as the scene, written a few rows at a time."""
    import rasterio
    from rasterio.windows import Window

    from cdkd_edge.core.sample import sample_tiles

    picture = sample_tiles(2048, 1)[0]
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8", "compress": "deflate"}
    with rasterio.open(path, "w", **profile, zlevel=1, photometric="RGB", BIGTIFF="IF_SAFER") as dataset:
        for top in range(0, height, 64):
            rows = picture[:, top % 2048 : top % 2048 + min(64, height - top)]
            wide = np.tile(rows, (1, 1, -(-width // 2048)))[:, :, :width]
            dataset.write(wide, window=Window(0, top, width, wide.shape[1]))
    return path


# --- one run --------------------------------------------------------------------------------------


def child(scene: str, output: str, engine_path: str, readers: int) -> None:
    """Segment when told to; say when, and stay until the parent has looked."""
    warnings.simplefilter("ignore")
    import rasterio  # noqa: F401 - libraries belong to the baseline

    from cdkd_edge.segmentation.options import SegmentOptions
    from cdkd_edge.segmentation.pipeline import segment_scene

    engine: Any
    if engine_path:
        from cdkd_edge.engines.runtimes import load_engine

        engine = load_engine(Path(engine_path))
        for slot in range(engine.slots):  # what the engine needs belongs to the baseline too
            engine.launch(slot)
            engine.wait(slot)
    else:
        engine = InstantEngine(TILE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: Linux, proc(5)
    print("ready", flush=True)
    sys.stdin.readline()
    processor = time.process_time()
    result = segment_scene(engine, scene, Path(output), SegmentOptions(readers=readers))
    print(
        json.dumps(
            {
                "tiles": result.tiles,
                "seconds": result.seconds,
                "processor_seconds": time.process_time() - processor,
                "engine_seconds": result.engine_seconds,
                "stages": result.stages,
                "megabytes_written": Path(output).stat().st_size / 1e6,
            }
        ),
        flush=True,
    )
    sys.stdin.readline()


def peak_mb(process: int) -> float:
    """VmHWM of a process, MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("no VmHWM in /proc: this needs Linux")


def watched(command: Sequence[str]) -> tuple[dict[str, Any], float, float]:
    """Run a child (see :func:`child`), and look at its memory when it is ready and when it is done.

    Returns:
        What it printed, and the peaks until then, MB.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the child failed; see above")
        before = peak_mb(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError("the child failed; see above")
        after = peak_mb(process.pid)
        process.stdin.write("end\n")
        process.stdin.flush()
    return json.loads(answer), before, after


def measure(scene: Path, folder: Path, readers: int, engine: Path | None = None) -> dict[str, Any]:
    """One run in a process of its own."""
    output = folder / "labels.tif"
    run, before, after = watched(
        [sys.executable, __file__, "--child", str(scene), str(output), str(engine or ""), str(readers)]
    )
    output.unlink()
    return {
        **run,
        "tiles_per_second": run["tiles"] / run["seconds"],
        "peak_mb": after,
        "above_engine_mb": after - before,
    }


def copying_speed() -> float:
    """MB/s of copying 64 MB in memory: how busy the machine is, roughly."""
    block = np.zeros(64 << 20, np.uint8)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        block.copy()
        best = max(best, block.nbytes / 1e6 / (time.perf_counter() - started))
    return best


# --- all of it ------------------------------------------------------------------------------------


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, as data."""

    results: dict[str, Any] = {
        "command": "python benchmarks/scene_pipeline.py",
        "machine": {
            **machine_of_run(),
            "load_average_before": os.getloadavg()[0],
            "memory_copy_mb_per_s": copying_speed(),
        },
        "tile": TILE,
        "readers": arguments.readers,
        "speed": [],
        "memory": [],
        "engine": None,
    }
    with tempfile.TemporaryDirectory(prefix="cdkd-edge-", dir=arguments.scratch) as temporary:
        folder = Path(temporary)
        if "speed" in arguments.parts:
            for name, scene in make_scenes(folder, arguments.side).items():
                runs = [measure(scene, folder, arguments.readers) for _ in range(arguments.repeats)]
                rate = statistics.median(run["tiles_per_second"] for run in runs)
                middle = min(runs, key=lambda run: abs(run["tiles_per_second"] - rate))
                results["speed"].append({"scene": name, "side": arguments.side, "runs": len(runs), **middle})
                print(f"{name}: {rate:.1f} tiles/s", file=sys.stderr)
        if "memory" in arguments.parts:
            results["memory"] = memory_runs(folder, arguments)
        if arguments.engine:
            scene = make_scenes(folder, arguments.engine_side)["deflate, blocks of 512"]
            run = measure(scene, folder, arguments.readers, arguments.engine)
            results["engine"] = {
                "engine": arguments.engine.name,
                "side": arguments.engine_side,
                **run,
                "end_to_end_over_engine": run["seconds"] / run["engine_seconds"],
            }
    results["machine"]["load_average_after"] = os.getloadavg()[0]
    return results


def memory_runs(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory by size of the scene."""
    import rasterio

    from cdkd_edge.core.sample import sample_tiles
    from cdkd_edge.raster.grid import default_overlap

    profile = {"driver": "GTiff", "height": 2048, "width": 2048, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(folder / "picture.tif", "w", **profile, photometric="RGB") as dataset:
        dataset.write(sample_tiles(2048, 1)[0])
    height = ROWS * (TILE - default_overlap(TILE)) + default_overlap(TILE)
    sizes = [("VRT of blocks", width, height) for width in WIDTHS]
    sizes += [("VRT of blocks", 2_000, TALL), ("deflate, strips", WIDTHS[-1], height)]
    rows = []
    for kind, width, tall in sizes:
        path = folder / ("scene.vrt" if kind.startswith("VRT") else "strips.tif")
        scene = repeated_by_vrt(folder / "picture.tif", path, tall, width) if path.suffix == ".vrt" else None
        run = measure(scene or wide_strips(path, tall, width), folder, arguments.readers)
        rows.append({"scene": kind, "width": width, "height": tall, **run})
        print(f"{kind} {width} x {tall}: {run['above_engine_mb']:.0f} MB above the engine", file=sys.stderr)
        path.unlink()
    return rows


def as_markdown(results: dict[str, Any]) -> str:
    """The tables of a README."""
    machine = results["machine"]
    lines = [
        "# The scene pipeline",
        "",
        f"`{results['command']}` on {machine['cpus']} cores ({machine['processor']}), Python {machine['python']}, "
        f"GDAL {machine['gdal']}; load average {machine['load_average_before']:.1f} before, "
        f"{machine['load_average_after']:.1f} after. Engine: one that answers at once, tiles of {results['tile']} px, "
        f"{results['readers']} reading threads.",
        "",
    ]
    if results["speed"]:
        lines += [
            "| scene | px | tiles/s | ms of processor per tile | seconds | read | cut | merge | finish |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in results["speed"]:
            stages = " | ".join(f"{row['stages'].get(name, 0):.2f}" for name in ("read", "cut", "merge", "finish"))
            lines.append(
                f"| {row['scene']} | {row['side']} x {row['side']} | {row['tiles_per_second']:.1f} "
                f"| {1000 * row['processor_seconds'] / row['tiles']:.1f} | {row['seconds']:.2f} | {stages} |"
            )
        lines += ["", "Stages in seconds, those of several threads added up; the median of the runs.", ""]
    if results["memory"]:
        lines += ["| scene | width | height | peak, MB | above the engine, MB |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['scene']} | {row['width']:,} | {row['height']:,} | {row['peak_mb']:.0f} "
            f"| {row['above_engine_mb']:.0f} |"
            for row in results["memory"]
        ]
        lines += ["", "Peak: VmHWM of the process, read from outside.", ""]
    if results["engine"]:
        row = results["engine"]
        lines += [
            f"With `{row['engine']}` on {row['side']} x {row['side']} px: {row['seconds']:.1f} s from end to end, "
            f"{row['engine_seconds']:.1f} s in the engine, a factor of {row['end_to_end_over_engine']:.3f}; "
            f"{row['above_engine_mb']:.0f} MB above the engine.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Where results go, without suffix. Default: printed.")
    parser.add_argument("--side", type=int, default=10_000, help="Side of the scenes whose speed is measured, px.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each; the median counts.")
    parser.add_argument("--readers", type=int, default=2, help="Reading threads.")
    parser.add_argument("--parts", nargs="*", default=["speed", "memory"], choices=["speed", "memory"])
    parser.add_argument("--engine", type=Path, help="Also run this engine, end to end.")
    parser.add_argument("--engine-side", type=int, default=10_000, help="Side of its scene, px.")
    parser.add_argument("--scratch", type=Path, help="Folder for scenes, some 1 GB. Default: the system's.")
    arguments = parser.parse_args()
    results = run_all(arguments)
    write_results(arguments.output, results, as_markdown(results))


if __name__ == "__main__":
    main()
