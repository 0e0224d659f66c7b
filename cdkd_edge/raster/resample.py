"""Resamples scenes to a ground sample distance, so that a network sees objects at the size it was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from rasterio.dtypes import dtype_rev, typename_fwd  # GDAL's names of NumPy's types
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.areas import WGS84, to_wgs84
from cdkd_edge.raster.bands import Validity

_WARP_MB = 32  # memory of GDAL's warper in each reading thread, MB
_SAME = 0.01  # relative difference of equal ground sample distances: a map's scale varies by as much within a scene
_FINEST = 100  # times that pixels may become finer (30 m for a network of 0.3 m); more is a mistake in the unit
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
    for dx, dy in ((5, 0), (0, 5)):
        ends = place * (x - dx, y - dy), place * (x + dx, y + dy)
        placed = to_wgs84(crs, *zip(*ends, strict=True))
        on_ground = math.dist(*WGS84.positions(*placed)) / 10 if placed else 0.0
        if not 0 < on_ground < math.inf:
            raise SceneError(_NOT_TOLD)
        nominal = math.dist(*ends) / 10 * crs.linear_units_factor[1] if crs.is_projected else on_ground
        steps.append(nominal if abs(nominal / on_ground - 1) < _SAME else on_ground)
    return steps[0], steps[1]


def resampled(dataset: Any, metres: float, bands: Sequence[int], validity: Validity) -> tuple[Any, str]:
    """Resample a dataset to pixels of ``metres`` on the ground; its corner and its axes stay where they are.

    Larger pixels are means of the pixels they cover, smaller ones bilinear; pixels without data take no part. GDAL
    computes in blocks of its own, so a pixel does not depend on the window in which it is read.

    Returns:
        The dataset (the same one if its pixels have that size already; otherwise red, green, blue and, if any pixel
        may have no data, alpha), and a sentence on what was done.

    Raises:
        UsageError, SceneError: no distance; no place on Earth, less than a pixel left, or out of all proportion.
    """
    if not (math.isfinite(metres) and metres > 0):
        raise UsageError(f"--gsd must be a positive number of metres, got {metres:g}")
    own = ground_sample_distance(dataset)
    ratios = metres / own[0], metres / own[1]
    if all(abs(ratio - 1) < _SAME for ratio in ratios):
        return dataset, f"its pixels are {own[0]:.3g} m already"
    if min(ratios) < 1 / _FINEST:
        times = f"{1 / min(ratios):.3g} times finer than the scene's {max(own):.3g} m"
        raise SceneError(f"--gsd {metres:g} is {times}; at most {_FINEST} times is possible")
    width, height = round(dataset.width / ratios[0]), round(dataset.height / ratios[1])
    if width < 1 or height < 1:
        raise SceneError(f"--gsd {metres:g} would leave less than a pixel of {dataset.width} x {dataset.height} px")
    is_float = any(np.dtype(dataset.dtypes[band - 1]).kind == "f" for band in bands)
    options = {"src_nodata": math.nan, "nodata": math.nan} if is_float else {}
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

    kinds = [typename_fwd[dtype_rev[dataset.dtypes[band - 1]]] for band in bands]
    parts = [
        f'<VRTRasterBand dataType="{kind}" band="{number}">{source(band)}</VRTRasterBand>'
        for number, (band, kind) in enumerate(zip(bands, kinds, strict=True), 1)
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
