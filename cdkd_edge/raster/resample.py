"""Resamples scenes to a ground sample distance, so that a network sees objects at the size it was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.areas import WGS84, to_wgs84
from cdkd_edge.raster.bands import Validity

_WARP_MB = 32  # memory of GDAL's warper in each reading thread, MB
_SAME = 0.01  # relative difference of equal ground sample distances: a map's scale varies by as much within a scene
_FINEST = 100  # times that pixels may become finer (30 m for a network of 0.3 m); more is a mistake in the unit
_KINDS = {
    "uint8": "Byte",
    "int8": "Int8",
    "uint16": "UInt16",
    "int16": "Int16",
    "uint32": "UInt32",
    "int32": "Int32",
    "uint64": "UInt64",
    "int64": "Int64",
    "float32": "Float32",
    "float64": "Float64",
}
"""GDAL's names of NumPy types."""
_NOT_TOLD = "the scene's reference system does not tell its ground sample distance"


def ground_sample_distance(dataset: Any) -> tuple[float, float]:
    """Metres on the ground from pixel to pixel along rows and columns, in the middle of a scene.

    Measured on the ellipsoid, because units of a projection may be degrees, or far from metres on the ground (Web
    Mercator at 60 degrees: half). Where the two are within 1 %, the projection's own units count.

    Raises:
        SceneError: the scene has no place on Earth.
    """
    crs, place = dataset.crs, dataset.transform
    if crs is None or place.is_identity:
        raise SceneError(
            "a ground sample distance needs a scene with a reference system and a transform",
            hint="georeference it first, e.g. with gdalwarp",
        )
    if not (crs.is_projected or crs.is_geographic):
        raise SceneError(_NOT_TOLD)
    steps = []
    x, y = dataset.width / 2, dataset.height / 2
    for dx, dy in ((1, 0), (0, 1)):
        far = (place * (x - 5 * dx, y - 5 * dy)), (place * (x + 5 * dx, y + 5 * dy))
        placed = to_wgs84(crs, *zip(*far, strict=True))
        if placed is None:
            raise SceneError(_NOT_TOLD)
        on_ground = math.dist(*WGS84.positions(*placed)) / 10
        nominal = math.hypot(far[1][0] - far[0][0], far[1][1] - far[0][1]) / 10
        if not on_ground > 0:
            raise SceneError(_NOT_TOLD)
        if crs.is_projected:
            nominal *= crs.linear_units_factor[1]
            on_ground = nominal if abs(nominal / on_ground - 1) < _SAME else on_ground
        if not (math.isfinite(on_ground) and on_ground > 0):
            raise SceneError(_NOT_TOLD)
        steps.append(on_ground)
    return steps[0], steps[1]


def resampled(dataset: Any, metres: float, bands: Sequence[int], validity: Validity) -> tuple[Any, str]:
    """Resample a dataset to pixels of ``metres`` on the ground; its corner and its axes stay where they are.

    Larger pixels are means of the pixels they cover, smaller ones bilinear; pixels without data take no part. GDAL
    computes in blocks of its own, so a pixel does not depend on the window in which it is read.

    Returns:
        The dataset (the same one if its pixels have that size already; otherwise red, green, blue and, if any pixel
        may have no data, alpha), and a sentence on what was done.

    Raises:
        UsageError: ``metres`` is no distance.
        SceneError: the scene has no place on Earth, or would not be a pixel large, or out of all proportion.
    """
    if not (math.isfinite(metres) and metres > 0):
        raise UsageError(f"--gsd must be a positive number of metres, got {metres:g}")
    own = ground_sample_distance(dataset)
    ratios = metres / own[0], metres / own[1]
    if all(abs(ratio - 1) < _SAME for ratio in ratios):
        return dataset, f"its pixels are {own[0]:.3g} m already"
    if min(ratios) < 1 / _FINEST:
        raise SceneError(
            f"--gsd {metres:g} is {1 / min(ratios):.3g} times finer than the scene's {max(own):.3g} m; at most "
            f"{_FINEST} times is possible"
        )
    width, height = (round(size / ratio) for size, ratio in zip((dataset.width, dataset.height), ratios, strict=True))
    if width < 1 or height < 1:
        raise SceneError(f"--gsd {metres:g} would leave less than a pixel of {dataset.width} x {dataset.height} px")
    options: dict[str, Any] = {}
    if any(np.dtype(dataset.dtypes[band - 1]).kind == "f" for band in bands):
        options.update(src_nodata=math.nan, nodata=math.nan)
    shrinks = max(ratios) > 1
    vrt = WarpedVRT(
        rasterio.open(_of_bands(dataset, bands, validity)),
        crs=dataset.crs,
        transform=dataset.transform * Affine.scale(*ratios),
        width=width,
        height=height,
        resampling=Resampling.average if shrinks else Resampling.bilinear,
        warp_mem_limit=_WARP_MB,
        UNIFIED_SRC_NODATA="YES",
        **options,
    )
    how = "means" if shrinks else "bilinear"
    return vrt, f"resampled from {own[0]:.3g} to {metres:g} m ({how}), {width} x {height} px"


def _of_bands(dataset: Any, bands: Sequence[int], validity: Validity) -> str:
    """The text of a VRT of the bands used and, if any pixel may have no data, of their validity as alpha.

    GDAL's warper would ask all bands of the file for nodata, and take no alpha that is not its own.
    """

    def source(band: int | str, then: str = "", kind: str = "SimpleSource") -> str:
        # Not shared: readers in two threads would get one handle.
        file = f'<SourceFilename relativeToVRT="0" shared="0">{escape(dataset.name)}</SourceFilename>'
        return f"<{kind}>{file}<SourceBand>{band}</SourceBand>{then}</{kind}>"

    parts = [
        f'<VRTRasterBand dataType="{_KINDS[dataset.dtypes[band - 1]]}" band="{number}">{source(band)}</VRTRasterBand>'
        for number, band in enumerate(bands, 1)
    ]
    # A sum above 0 is valid: masks add 255, and alpha of 0 takes more away than all masks can add.
    table = "<LUT>0:-10000,1e-9:0</LUT>" if validity.masked else "<LUT>0:-10000,1e-9:255</LUT>"
    sources = [source(f"mask,{band}") for band in validity.masked]
    sources += [source(band, table, "ComplexSource") for band in validity.alpha]
    if sources:
        both = "".join(sources if len(sources) > 1 else sources * 2)  # the function takes two or more
        parts.append(
            '<VRTRasterBand dataType="Byte" band="4" subClass="VRTDerivedRasterBand"><ColorInterp>Alpha</ColorInterp>'
            "<PixelFunctionType>sum</PixelFunctionType><SourceTransferType>Float32</SourceTransferType>"
            f"{both}</VRTRasterBand>"
        )
    place = ", ".join(repr(float(value)) for value in dataset.transform.to_gdal())
    return (
        f'<VRTDataset rasterXSize="{dataset.width}" rasterYSize="{dataset.height}"><SRS>{escape(dataset.crs.to_wkt())}'
        f"</SRS><GeoTransform>{place}</GeoTransform>{''.join(parts)}</VRTDataset>"
    )
