"""What the scene, benchmark and command-line tests share: tiny rasters and an engine whose labels are arithmetic."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from hypothesis import settings
from rasterio.errors import NotGeoreferencedWarning

from cdkd_edge.core.labels import NO_LABEL, load_schema
from cdkd_edge.core.manifest import PROBABILITIES, EngineManifest, FileRecord, GraphCheck, Preprocessing
from cdkd_edge.engines.protocol import Labeller

UInt8Array = npt.NDArray[np.uint8]

relaxed = settings(deadline=None, max_examples=60)
"""For properties: cores are shared, so no example is failed for being slow."""

SCHEMA = load_schema("dubai")
"""Five classes: building, land, road, vegetation, water."""


def write_raster(path: Path, bands: npt.NDArray[Any], *, driver: str = "GTiff", **profile: Any) -> Path:
    """Write ``[B, H, W]`` as a GeoTIFF; keyword arguments go to rasterio."""
    count, height, width = bands.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        profile = {"dtype": bands.dtype, "count": count, "height": height, "width": width, **profile}
        with rasterio.open(path, "w", driver=driver, **profile) as dataset:
            dataset.write(bands)
    return path


def sparse_raster(path: Path, height: int, width: int) -> Path:
    """An RGB GeoTIFF of zeros that takes next to no room on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        profile = {"count": 3, "dtype": "uint8", "photometric": "RGB", "tiled": True, "sparse_ok": True}
        rasterio.open(path, "w", driver="GTiff", height=height, width=width, **profile).close()
    return path


def noise(height: int, width: int, bands: int = 3, seed: int = 0) -> UInt8Array:
    """Incompressible pixels ``[B, H, W]``."""
    return np.random.default_rng(seed).integers(0, 256, (bands, height, width), np.uint8)


def read_labels(path: Path) -> UInt8Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            return dataset.read(1)


def engine_manifest(tile: int, batch: int = 1, sha256: str = "ab" * 32) -> EngineManifest:
    return EngineManifest(
        name="fake",
        runtime="onnxruntime-cpu",
        precision="fp32",
        artefact=FileRecord("fake.onnx", sha256, 1),
        graph=FileRecord("fake-graph.onnx", "cd" * 32, 1),
        labels=SCHEMA.to_document(),
        preprocessing=Preprocessing("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        tile=tile,
        batch=batch,
        device="none",
        attention_blocks=0,
        attention_fused=0,
        build_seconds=0.0,
        graph_check=GraphCheck(0, 0.0, 1.0, "none", "none"),
        libraries={},
    )


def red_labels(tiles: UInt8Array) -> UInt8Array:
    """Label = red // 64 of ``[N, 3, T, T]``; needs no neighbourhood, so any tiling gives the same map."""
    return tiles[:, 0] // 64


def red_probabilities(tiles: UInt8Array) -> UInt8Array:
    """``[N, 5, T, T]`` whose largest is that of the label that :func:`red_labels` gives; 255 in all."""
    labels, sure = red_labels(tiles), 128 + tiles[:, 1] // 2
    rest = (255 - sure) // 4
    given = np.repeat(rest[:, None], 5, axis=1)
    np.put_along_axis(given, labels[:, None], (255 - 4 * rest)[:, None], axis=1)
    return given


class FakeEngine(Labeller):
    """An engine in Python that keeps the protocol's promises and checks that its user keeps them too.

    Args:
        tile, batch, slots: its shape.
        function: tiles ``[N, 3, T, T]`` to labels ``[N, T, T]``.
        delay: seconds that ``wait`` takes; or a function of the number of the launch.
        fail_at: number of the launch (from 0) at which ``error`` is raised.
        fail_in: ``launch``, ``wait`` or ``input``.
    """

    def __init__(
        self,
        tile: int = 64,
        batch: int = 1,
        slots: int = 3,
        function: Callable[[UInt8Array], UInt8Array] = red_labels,
        delay: float | Callable[[int], float] = 0.0,
        fail_at: int | None = None,
        error: BaseException | None = None,
        fail_in: str = "launch",
    ) -> None:
        self.manifest = engine_manifest(tile, batch)
        self.tile, self.batch = tile, batch
        self.schema, self.artefact = self.manifest.schema, self.manifest.artefact
        self.slots = slots
        self.launches = 0
        self.closed = False
        self._function = function
        self._delay = delay
        self._fail_at, self._error, self._fail_in = fail_at, error, fail_in
        self._inputs = [np.zeros((batch, 3, tile, tile), np.uint8) for _ in range(slots)]
        self._outputs = [np.full((batch, tile, tile), NO_LABEL, np.uint8) for _ in range(slots)]
        self._running: dict[int, UInt8Array] = {}
        self._thread: int | None = None
        self._inputs_asked = 0

    def input(self, slot: int) -> UInt8Array:
        self._maybe_fail("input", self._inputs_asked)
        self._inputs_asked += 1
        assert slot not in self._running, "a slot was written to while it was computed"
        return self._inputs[slot]

    def output(self, slot: int) -> UInt8Array:
        assert slot not in self._running, "a slot was read while it was computed"
        return self._outputs[slot]

    def launch(self, slot: int) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "two threads launched"
        self._outputs[slot].fill(NO_LABEL)
        self._maybe_fail("launch", self.launches)
        self._running[slot] = self._inputs[slot].copy()

    def wait(self, slot: int) -> None:
        number, self.launches = self.launches, self.launches + 1
        time.sleep(self._delay(number) if callable(self._delay) else self._delay)
        tiles = self._running.pop(slot)
        self._maybe_fail("wait", number)
        assert (tiles == self._inputs[slot]).all(), "a slot was written to while it was computed"
        self._outputs[slot][:] = self._function(tiles)

    def close(self) -> None:
        self.closed = True

    def _maybe_fail(self, where: str, number: int) -> None:
        if self._error is not None and where == self._fail_in and number == self._fail_at:
            raise self._error


class ProbabilityEngine(FakeEngine):
    """A fake engine with probabilities; its labels are the likeliest.

    Args:
        probabilities: tiles ``[N, 3, T, T]`` to ``[N, 5, T, T]``.
    """

    def __init__(
        self,
        tile: int = 64,
        probabilities: Callable[[UInt8Array], UInt8Array] = red_probabilities,
        kind: str = PROBABILITIES,
        **options: Any,
    ) -> None:
        super().__init__(tile, function=lambda tiles: probabilities(tiles).argmax(axis=1).astype(np.uint8), **options)
        self._probabilities = probabilities
        self.manifest = replace(self.manifest, output=kind)

    @property
    def output_kind(self) -> str:
        return self.manifest.output

    def probabilities(self, slot: int) -> UInt8Array:
        self.output(slot)
        return self._probabilities(self._inputs[slot])

    def confidence(self, slot: int) -> UInt8Array:
        return np.rint(self.probabilities(slot).max(axis=1) / 2.55).astype(np.uint8)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread and return or raise what it does; fail if it takes longer."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="test")
    thread.start()
    thread.join(seconds)
    assert outcome, f"not finished after {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def pipeline_threads() -> list[str]:
    """Names of this package's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("read", "write", "power")]


def names_in(folder: Path) -> list[str]:
    """Everything below a folder, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
