"""Loading of tiles to distil on: time and memory to find them, and tiles per second.

    python benchmarks/tile_loading.py --find 100801
    python benchmarks/tile_loading.py --read IMAGES... --tile 512

``--find N`` makes N tiny pictures as files in ten folders, and N in ten shards, in a temporary folder; each kind is
found by a process of its own. ``--read`` reads random views in 1 and 2 threads, as a training run does.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from script_tools import machine_of_run, run_reporting_errors, write_results

from cdkd_edge.distillation.tiles import SceneTiles
from cdkd_edge.training.views import Augmentation, draw_view

_PARTS, _SIDE = 10, 64
_VIEWS = Augmentation(scale=(0.7, 1.4), light=0.2)


def memory_mb() -> float:
    """Memory of this process, resident, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def make_pictures(folder: Path, count: int) -> None:
    """Write JPEGs of 64 px in folders, and the same in shards."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)).save(file, "JPEG")
    picture = file.getvalue()
    (folder / "shards").mkdir()
    for part in range(_PARTS):
        place = folder / "files" / f"sensor-{part}"
        place.mkdir(parents=True)
        with tarfile.open(folder / "shards" / f"{part:03}.tar", "w") as tar:
            for index in range(part, count, _PARTS):
                (place / f"{index:06}.jpg").write_bytes(picture)
                member = tarfile.TarInfo(f"{index:06}.jpg")
                member.size = len(picture)
                tar.addfile(member, io.BytesIO(picture))


def find(arguments: list[str]) -> dict[str, Any]:
    """Find tiles once; seconds, processor seconds, and memory before and after."""
    Image.init()
    before, start, used = memory_mb(), time.perf_counter(), time.process_time()
    tiles = SceneTiles(arguments, _SIDE)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    found = {"tiles": len(tiles), "seconds": seconds, "cpu_seconds": used, "mb_before": before, "mb_after": memory_mb()}
    for index in range(0, len(tiles), max(1, len(tiles) // 2000)):  # an epoch does not add to it
        tiles.read(tiles.places[index], draw_view(_VIEWS, [0, index], None), (0, 0))
    return {**found, "mb_after_reading": memory_mb()}


def read(arguments: list[str], tile: int, seconds: float) -> dict[str, Any]:
    """Views per second in 1 and 2 threads, and per second of the processor in one."""
    tiles = SceneTiles(arguments, tile, _VIEWS)
    order = np.random.default_rng(0).integers(len(tiles), size=100_000)
    rows: dict[str, Any] = {"source": ", ".join(Path(name).name for name in arguments), "places": len(tiles)}

    def work(first: int, step: int, end: float) -> int:
        for done, index in enumerate(order[first::step].tolist()):
            if time.perf_counter() > end:
                return done
            tiles.read(tiles.places[index], draw_view(_VIEWS, [0, index, done], None), (0, 0))
        raise ValueError("there are not enough views for so long a run")

    for threads in (1, 2):
        start, used = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            done = sum(pool.map(lambda first: work(first, threads, start + seconds), range(threads)))  # noqa: B023
        rows[f"per_second_{threads}"] = done / (time.perf_counter() - start)
        if threads == 1:
            rows["per_cpu_second"] = done / (time.process_time() - used)
    return rows


def main() -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--find", type=int, metavar="N", help="find so many tiny pictures")
    parser.add_argument("--read", nargs="+", action="append", default=[], metavar="IMAGES", help="a source; repeatable")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of --read")
    parser.add_argument("--output", type=Path, help="results go to OUTPUT.json and OUTPUT.md")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(find(arguments.child)))
        return 0
    results: dict[str, Any] = {"machine": machine_of_run(), "find": {}, "read": []}
    lines = []
    if arguments.find:
        with tempfile.TemporaryDirectory() as name:
            make_pictures(Path(name), arguments.find)
            for kind, pattern in (("files", "files/*/*.jpg"), ("shards", "shards")):
                child = [sys.executable, __file__, "--child", f"{name}/{pattern}"]
                answer = subprocess.run(child, check=True, capture_output=True, text=True)
                results["find"][kind] = json.loads(answer.stdout)
        lines += ["| found | tiles | s | CPU s | MB before | MB after | MB after reading 2000 |", "|---|" + "---:|" * 6]
        for kind, row in results["find"].items():
            numbers = (row[key] for key in ("seconds", "cpu_seconds", "mb_before", "mb_after", "mb_after_reading"))
            lines.append(f"| {kind} | {row['tiles']:,} | {' | '.join(f'{number:.0f}' for number in numbers)} |")
        lines.append("")
    if arguments.read:
        lines += [f"| views of {arguments.tile} px of | places | /s, 1 thread | /s, 2 threads | per CPU s |"]
        lines += ["|---|" + "---:|" * 4]
        for source in arguments.read:
            row = read(source, arguments.tile, arguments.seconds)
            results["read"].append(row)
            numbers = (row[key] for key in ("per_second_1", "per_second_2", "per_cpu_second"))
            lines.append(f"| {row['source']} | {row['places']} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
        lines.append("")
    write_results(arguments.output, results, "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_reporting_errors(main))
