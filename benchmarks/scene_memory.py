"""Peak memory of `segment` on scenes 100,000 px wide, by kind of scene and by option.

    python benchmarks/scene_memory.py --output benchmarks/results/scene-memory

writes ``scene-memory.json`` and ``.md``. As in ``scene_pipeline.py`` every run is a process of its own with an engine
that answers at once, whose peak (VmHWM) is set back when the engine is ready and read from outside, in
/proc, when all files are written; the difference is what `segment` takes above the engine's own. Scenes are three rows
of tiles high. Most are VRTs that repeat a picture of 2048 px and take no room; those stored in compressed strips, the
layout that is hardest to read in pieces, are files. ``--only TEXT`` runs the cases whose name holds the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scene_pipeline import ROWS, TILE, InstantEngine, watched
from script_tools import machine_of_run, write_results

WIDTH = 100_000
_SIDE = 2048
"""Of the picture that is repeated, px."""

UTM = 'PROJCS["UTM 40N",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",57],PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1]]'  # noqa: E501
PLACES = {
    "projected": (UTM, (400_000.0, 1.0, 0.0, 2_800_000.0, 0.0, -1.0)),
    "geographic": ("EPSG:4326", (50.0, 1e-5, 0.0, 25.0, 0.0, -1e-5)),
    "rotated geographic": ("EPSG:4326", (50.0, 1e-5, 2e-6, 25.0, 2e-6, -1e-5)),
}


@dataclass(frozen=True)
class Case:
    """One run: a scene and what is asked for."""

    name: str
    bands: int = 3
    """4: the last one is alpha."""
    dtype: str = "uint8"
    validity: str | None = None
    """``nodata`` or ``mask``, if the scene has either."""
    stored: str = "VRT of blocks"
    """Or ``deflate, strips``."""
    place: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Of :class:`cdkd_edge.segmentation.options.SegmentOptions`."""
    products: tuple[str, ...] = ()
    width: int = WIDTH

    @property
    def bounded(self) -> bool:
        """Whether the bound of the crop merge is meant to hold."""
        return self.options.get("merge") != "hann"


_STRETCH = {"stretch": (2.0, 98.0)}
_ALL = ("vector", "preview", "stac")
STRIPS = "deflate, strips"
CASES = (
    Case("RGB"),
    Case("alpha band", bands=4),
    Case("mask band", validity="mask"),
    Case("nodata", validity="nodata"),
    Case("16 bit, --stretch", dtype="uint16", options=_STRETCH),
    Case("16 bit, nodata, --stretch", dtype="uint16", validity="nodata", options=_STRETCH),
    Case("float, NaN, --stretch", dtype="float32", options=_STRETCH),
    Case("geographic", place="geographic"),
    Case("rotated geographic", place="rotated geographic"),
    Case("strips", stored=STRIPS),
    Case("strips, alpha band", bands=4, stored=STRIPS),
    Case("strips, mask band", validity="mask", stored=STRIPS),
    Case("strips, 16 bit, nodata, --stretch", dtype="uint16", validity="nodata", stored=STRIPS, options=_STRETCH),
    Case("--gsd 2 (from 1 m)", place="projected", options={"gsd": 2.0}, width=2 * WIDTH),
    Case("--confidence", options={"confidence": True}),
    Case("--vector", place="projected", products=("vector",)),
    Case("--preview", place="projected", products=("preview",)),
    Case("strips, --preview", place="projected", stored=STRIPS, products=("preview",)),
    Case("alpha, geographic, --confidence --vector --preview --stac", bands=4, place="geographic",
         options={"confidence": True}, products=_ALL),
    Case("--merge hann", options={"merge": "hann"}),
    Case("alpha, --merge hann --confidence", bands=4, options={"merge": "hann", "confidence": True}),
)  # fmt: skip


class AnyEngine(InstantEngine):
    """An instant engine that gives everything."""

    output_kind = "probabilities"

    def __init__(self, tile: int) -> None:
        super().__init__(tile)
        labels = self._outputs[0][0]
        rest = 15
        self._probabilities = np.full((1, len(self.schema), tile, tile), rest, np.uint8)
        np.put_along_axis(self._probabilities[0], labels[None], 255 - rest * (len(self.schema) - 1), axis=0)
        self._confidence = np.random.default_rng(0).integers(40, 101, (1, tile, tile)).astype(np.uint8)

    def probabilities(self, slot: int) -> npt.NDArray[np.uint8]:
        """Those of the labels, always the same."""
        return self._probabilities

    def confidence(self, slot: int) -> npt.NDArray[np.uint8]:
        """Noise, which is the hardest to pack."""
        return self._confidence


# --- scenes ---------------------------------------------------------------------------------------


def picture(case: Case) -> npt.NDArray[Any]:
    """The picture that is repeated, ``[bands, 2048, 2048]``, with a hole where the case has validity."""
    from cdkd_edge.core.sample import sample_tiles

    pixels: npt.NDArray[Any] = sample_tiles(_SIDE, 1)[0]
    pixels = np.maximum(pixels, 1).astype(case.dtype) * (1 if case.dtype == "uint8" else 13)
    hole = np.s_[:, 300:700, 200:900]
    if case.dtype == "float32":
        pixels[hole] = np.nan
    elif case.validity == "nodata":
        pixels[hole] = 0
    if case.bands == 4:
        alpha = np.full((1, _SIDE, _SIDE), 255, case.dtype)
        alpha[hole] = 0
        pixels = np.concatenate([pixels, alpha])
    return pixels


def profile_of(case: Case, height: int, width: int) -> dict[str, Any]:
    """Keyword arguments of rasterio's writer."""
    import rasterio

    profile: dict[str, Any] = {"driver": "GTiff", "height": height, "width": width, "count": case.bands}
    profile.update(dtype=case.dtype, photometric="RGB", BIGTIFF="IF_SAFER")
    if case.bands == 4:
        profile["alpha"] = "YES"
    if case.validity == "nodata":
        profile["nodata"] = 0
    if case.place is not None:
        crs, place = PLACES[case.place]
        profile.update(crs=crs, transform=rasterio.Affine.from_gdal(*place))
    return profile


def scene_of(case: Case, folder: Path, height: int) -> Path:
    """The scene of a case."""
    import rasterio
    from rasterio.windows import Window

    pixels, valid = picture(case), np.full((_SIDE, _SIDE), 255, np.uint8)
    valid[300:700, 200:900] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"):
        if case.stored == STRIPS:
            path = folder / "scene.tif"
            with rasterio.open(path, "w", **profile_of(case, height, case.width), compress="deflate", zlevel=1) as out:
                for top in range(0, height, 64):
                    rows = np.s_[..., top % _SIDE : top % _SIDE + min(64, height - top), :]
                    times = -(-case.width // _SIDE)
                    window = Window(0, top, case.width, pixels[rows].shape[1])
                    out.write(np.tile(pixels[rows], (1, 1, times))[:, :, : case.width], window=window)
                    if case.validity == "mask":
                        out.write_mask(np.tile(valid[rows], (1, times))[:, : case.width], window=window)
            return path
        source = folder / "picture.tif"
        blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256}
        with rasterio.open(source, "w", **profile_of(case, _SIDE, _SIDE), **blocks) as out:
            out.write(pixels)
            if case.validity == "mask":
                out.write_mask(valid)
    return repeated(case, source, folder / "scene.vrt", height)


def repeated(case: Case, source: Path, path: Path, height: int) -> Path:
    """A VRT that repeats the picture."""
    colors = ("Red", "Green", "Blue", "Alpha")
    kind = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}[case.dtype]
    text = [f'<VRTDataset rasterXSize="{case.width}" rasterYSize="{height}">']
    if case.place is not None:
        crs, place = PLACES[case.place]
        text.append(f"<SRS>{crs.replace(chr(34), '&quot;')}</SRS><GeoTransform>{', '.join(map(str, place))}")
        text.append("</GeoTransform>")
    for band in range(1, case.bands + 1):
        text.append(f'<VRTRasterBand dataType="{kind}" band="{band}"><ColorInterp>{colors[band - 1]}</ColorInterp>')
        if case.validity == "nodata":
            text.append("<NoDataValue>0</NoDataValue>")
        text += [_sources(source, str(band), height, case.width), "</VRTRasterBand>"]
    if case.validity == "mask":
        text.append('<MaskBand><VRTRasterBand dataType="Byte">')
        text += [_sources(source, "mask,1", height, case.width), "</VRTRasterBand></MaskBand>"]
    path.write_text("".join([*text, "</VRTDataset>"]))
    return path


def _sources(source: Path, band: str, height: int, width: int) -> str:
    text = []
    for top in range(0, height, _SIDE):
        for left in range(0, width, _SIDE):
            h, w = min(_SIDE, height - top), min(_SIDE, width - left)
            text.append(
                f'<SimpleSource><SourceFilename relativeToVRT="1">{source.name}</SourceFilename>'
                f'<SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="{w}" ySize="{h}"/>'
                f'<DstRect xOff="{left}" yOff="{top}" xSize="{w}" ySize="{h}"/></SimpleSource>'
            )
    return "".join(text)


# --- one run --------------------------------------------------------------------------------------


def child(scene: str, output: str, number: int) -> None:
    """Do the work of `segment` when told to; say when it is done, and stay until the parent has looked."""
    warnings.simplefilter("ignore")
    from cdkd_edge.raster.stretch import Stretch
    from cdkd_edge.segmentation.jobs import EngineRef, Job
    from cdkd_edge.segmentation.options import SegmentOptions
    from cdkd_edge.segmentation.polygons import VectorOptions, require_vector
    from cdkd_edge.segmentation.products import ProductOptions
    from cdkd_edge.segmentation.worker import do_job

    case = CASES[number]
    options = dict(case.options)
    if "stretch" in options:
        low, high = options["stretch"]
        options["stretch"] = Stretch(low, high, percentiles=True)
    engine = AnyEngine(TILE)
    wanted = ProductOptions(
        vector=VectorOptions() if "vector" in case.products else None,
        preview="preview" in case.products,
        stac="stac" in case.products,
    )
    if wanted.vector:
        require_vector()  # libraries belong to the baseline
    ref = EngineRef("instant", "instant", "none", None, engine.artefact.sha256, "0" * 64)
    job = Job(scene, output, ref, SegmentOptions(**options), wanted)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: Linux, proc(5)
    print("ready", flush=True)
    sys.stdin.readline()
    report = do_job(engine, job)
    assert report.result is not None
    print(json.dumps({"tiles": report.result.tiles, "seconds": report.seconds}), flush=True)
    sys.stdin.readline()


def measure(number: int, scratch: Path | None) -> dict[str, Any]:
    """One run in a process of its own."""
    from cdkd_edge.raster.grid import default_overlap

    case = CASES[number]
    height = ROWS * (TILE - default_overlap(TILE)) + default_overlap(TILE)
    height = height * case.width // WIDTH
    with tempfile.TemporaryDirectory(prefix="cdkd-edge-", dir=scratch) as temporary:
        folder = Path(temporary)
        scene = scene_of(case, folder, height)
        output = folder / "labels.tif"
        run, before, after = watched([sys.executable, __file__, "--child", str(scene), str(output), str(number)])
    return {
        "case": case.name,
        "stored": case.stored,
        "width": case.width,
        "height": height,
        "bounded": case.bounded,
        **run,
        "peak_mb": after,
        "above_engine_mb": after - before,
    }


# --- all of it ------------------------------------------------------------------------------------


def as_markdown(results: dict[str, Any]) -> str:
    """The table."""
    machine = results["machine"]
    lines = [
        "# Memory of `segment` by kind of scene and by option",
        "",
        f"`{results['command']}` on {machine['cpus']} cores ({machine['processor']}), Python {machine['python']}, "
        f"GDAL {machine['gdal']}. Engine: one that answers at once, tiles of {TILE} px, 5 classes.",
        "",
        "| case | stored as | width | height | above the engine, MB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['stored']} | {row['width']:,} | {row['height']:,} | {row['above_engine_mb']:.0f} "
        f"| {row['seconds']:.0f} |"
        for row in results["runs"]
    ]
    lines += [
        "",
        "Peak: VmHWM of the process, read from outside, products included. Seconds depend on what else runs.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Where results go, without suffix. Default: printed.")
    parser.add_argument("--only", help="Run the cases whose name holds this.")
    parser.add_argument("--scratch", type=Path, help="Folder for scenes, some 1 GB. Default: the system's.")
    arguments = parser.parse_args()

    results: dict[str, Any] = {
        "command": "python benchmarks/scene_memory.py",
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine_of_run(),
        "tile": TILE,
        "runs": [],
    }
    for number, case in enumerate(CASES):
        if arguments.only is None or arguments.only in case.name:
            run = measure(number, arguments.scratch)
            results["runs"].append(run)
            print(f"{case.name}: {run['above_engine_mb']:.0f} MB, {run['seconds']:.0f} s", file=sys.stderr)
    write_results(arguments.output, results, as_markdown(results))


if __name__ == "__main__":
    main()
