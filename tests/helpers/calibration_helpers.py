"""What the calibration tests share: small scenes that look like something, and sets made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scene_helpers import UInt8Array, write_raster

from cdkd_edge.graph.tiles import CalibrationSet
from cdkd_edge.precision.calibrate import CalibrateResult, calibrate
from cdkd_edge.precision.scan_scenes import CalibrateOptions

TILE = 64


def picture(height: int, width: int, seed: int = 0, contrast: float = 60, base: float = 120, grain: float = 8) -> Any:
    """Smooth colour fields with grain, uint8 ``[3, H, W]``; no two parts or seeds alike."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(base, contrast, (3, height // 16 + 2, width // 16 + 2))
    smooth = np.kron(coarse, np.ones((16, 16)))[:, :height, :width]
    return np.clip(smooth + generator.normal(0, grain, smooth.shape), 0, 255).astype(np.uint8)


def archive(folder: Path, count: int = 4, height: int = 192, width: int = 256) -> list[str]:
    """``count`` scenes of 12 tiles each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        str(write_raster(folder / f"scene{index}.tif", picture(height, width, seed=index))) for index in range(count)
    ]


def make(scenes: list[str], folder: Path, **options: Any) -> CalibrateResult:
    """A set of 64 px tiles; ``overwrite`` goes to :func:`calibrate`, the rest to its options."""
    overwrite = options.pop("overwrite", False)
    chosen = {"tile": TILE, "count": 8, "check": 2, **options}
    return calibrate(scenes, folder, CalibrateOptions(**chosen), overwrite=overwrite)


def opened(result: CalibrateResult) -> CalibrationSet:
    return CalibrationSet.load(result.folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def crop(path: str, record: Any) -> UInt8Array:
    """The pixels of a tile, read by rasterio alone."""
    import rasterio

    with rasterio.open(path) as dataset:
        window = rasterio.windows.Window(record.x, record.y, record.width, record.height)
        return dataset.read(window=window)
