"""What the tests on a GPU share: is there one, labelled tiles, time."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from cdkd_edge.core.labels import load_schema


def no_gpu():
    """Why there is no GPU to test on; None where there is one. Makes no CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit: {code})"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no GPU"
    return None


@dataclass(frozen=True)
class Timing:
    """Tiles from a host array to labels in a host array, one after the other."""

    what: str
    tiles_per_second: float
    p50: float
    p95: float
    p99: float
    """Milliseconds."""


def timed(what, run, batch=1, seconds=5.0, warmup=1.0):
    """Call ``run(index)``, which returns when labels are there, for a while."""
    index, until = 0, time.perf_counter() + warmup
    while index < 10 or time.perf_counter() < until:
        run(index)
        index += 1
    laps = [time.perf_counter()]
    while len(laps) < 30 or laps[-1] - laps[0] < seconds:
        run(index + len(laps))
        laps.append(time.perf_counter())
    latencies = np.diff(laps) * 1e3
    rate = batch * len(latencies) / (laps[-1] - laps[0])
    return Timing(what, rate, *(float(np.percentile(latencies, q, method="inverted_cdf")) for q in (50, 95, 99)))


def timed_labeller(what, labeller, tiles):
    """One of :class:`cdkd_edge.engines.protocol.Labeller`, with tiles written to its inputs as a reader would."""

    def run(index):
        slot = index % labeller.slots
        labeller.input(slot)[...] = tiles[index % len(tiles)]
        labeller.launch(slot)
        labeller.wait(slot)

    return timed(what, run, labeller.batch)


def draw_labelled_set(folder: Path, side: int, count: int = 8):
    """Windows of the bundled picture with exact masks in the colours of ``dubai``, as a folder pair."""
    bundled = resources.files("cdkd_edge.demo")
    with (bundled / "scene.jpg").open("rb") as file:
        picture = np.asarray(Image.open(file))
    with (bundled / "scene-labels.png").open("rb") as file:
        labels = np.asarray(Image.open(file))
    colors = np.array([entry.color for entry in load_schema("dubai").classes], np.uint8)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        top, left = index % 3 * (len(picture) - side) // 2, index * (picture.shape[1] - side) // count
        part = np.s_[top : top + side, left : left + side]
        Image.fromarray(picture[part]).save(folder / "images" / f"drawn{index}.png")
        Image.fromarray(colors[labels[part]]).save(folder / "masks" / f"drawn{index}.png")
    return folder


def tiles_of(folder: Path, dataset, side: int, most: int = 24):
    """Tiles ``[M, 3, T, T]`` out of a dataset's images; an image that is smaller than a tile is repeated."""
    tiles = []
    for pair in dataset:
        with Image.open(pair.image) as image:
            pixels = np.asarray(image.convert("RGB"))
        repeats = [-(-side // length) for length in pixels.shape[:2]]
        pixels = np.tile(pixels, (*repeats, 1))
        for top in range(0, pixels.shape[0] - side + 1, side):
            for left in range(0, pixels.shape[1] - side + 1, side):
                tiles.append(pixels[top : top + side, left : left + side].transpose(2, 0, 1))
        if len(tiles) >= most:
            break
    return np.ascontiguousarray(np.stack(tiles[:most]))


def resident_bytes():
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
