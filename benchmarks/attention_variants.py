"""What cheaper attention costs and brings: accuracy before and after recovery, modelled and measured speed.

    python benchmarks/attention_variants.py dubai.pt DATA --folder out/attention --output benchmarks/results/attention

``DATA`` has ``images/`` and ``masks/``. Each variant is one row, made in stages:

    convert   `cdkd-edge convert`: the same weights with other attention
    before    accuracy on the validation scene
    speed     `export`, `build`, `roofline`: layers, traffic and modelled tiles/s in FP16 and INT8 where TensorRT-RTX is
              installed; time of the CPU engine beside that of the network as trained, in turn
    recover   `distill`: alignment with the network it came from, on the other scenes' images, without labels
    after     accuracy
    tune      `finetune`: the decoder alone, on the other scenes' labels; also of the network as trained, to be fair
    tuned     accuracy
    seams     how often labels of the recovered network change across borders of tiles (`benchmarks/seams.py`)

Every stage of every variant is kept in ``--folder``; a killed run goes on where it was. A stage that fails is a reason
in the table, and is tried again by the next run. The validation scene is never trained on, not even without labels.
Nothing is chosen by its score: decoders keep their last epoch.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from script_tools import run_cdkd_edge, run_reporting_errors, shown_command, write_results
from seams import measure as measure_seams

from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.files import write_text
from cdkd_edge.core.machine import available_cores, describe_machine
from cdkd_edge.engines.protocol import speed_ratio
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.raster.grid import default_overlap

DEVICE = "orin-nx-16gb"
MODE = "MAXN"  # of the main table; the second table has all modes
STAGES = ("convert", "before", "speed", "recover", "after", "tune", "tuned", "seams")
# AdamW 1e-5 at two tiles a step; `distill` takes the rate for four.
DISTILL = "--method features --steps 300 --batch 2 --lr 2e-5 --schedule cosine --warm-up 50"
COMPILER = ("--runtime", "tensorrt", "--target", "sm86")


@dataclass(frozen=True)
class Variant:
    """One row."""

    name: str
    attention: str = "global"
    tile: int | None = None  # None: that of the study
    overlap: int | None = None  # None: the default of the tile
    sparse: bool = False  # 2:4 sparse weights

    @property
    def folder(self) -> str:
        """Name of its folder; rows that share a network share it."""
        return re.sub(r"\W+", "-", self.attention) + ("-sparse" if self.sparse else "")

    @property
    def key(self) -> str:
        """What its own results are called."""
        return "".join(f"-{value}" for value in (self.tile, self.overlap) if value is not None)


ORIGINAL = "original"  # the checkpoint itself, perhaps with a class token, which conversion drops
VARIANTS = (
    Variant("as trained", ORIGINAL),
    Variant("global"),
    Variant("window16/global", "window16/global"),
    Variant("window16/global@5,8,11", "window16/global@5,8,11"),
    Variant("pooled2", "pooled2"),
    Variant("window16/pooled2", "window16/pooled2"),
    Variant("window16/pooled2, 2:4 sparse", "window16/pooled2", sparse=True),
    Variant("as trained, tile 512, overlap 128", ORIGINAL, tile=512, overlap=128),
    Variant("as trained, tile 512, overlap 64", ORIGINAL, tile=512, overlap=64),
)


class Study:
    """All stages of all rows, in a folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.options = arguments
        self.images = sorted(path for path in (arguments.data / "images").iterdir() if path.is_file())
        self.training = sorted({path.name.split("_")[0] for path in self.images} - set(arguments.val_scenes))
        self.stages: dict[str, Callable[[Variant], dict[str, Any]]] = {
            "convert": self.convert,
            "before": lambda variant: self.evaluate(variant, "converted"),
            "speed": self.speed,
            "recover": self.recover,
            "after": lambda variant: self.evaluate(variant, "recovered"),
            "tune": self.tune,
            "tuned": lambda variant: self.evaluate(variant, "tuned"),
            "seams": self.seams,
        }

    def run(self, variants: Sequence[Variant], stages: Sequence[str], after: Callable[[], None]) -> None:
        """Run what is missing, stage by stage."""
        for stage in stages:
            for variant in variants:
                path = self.result_path(variant, stage)
                if path.exists() and "failed" not in json.loads(path.read_text(encoding="utf-8")):
                    continue
                print(f"{stage}: {variant.name}", file=sys.stderr, flush=True)
                try:
                    result = self.stages[stage](variant)
                except (CdkdEdgeError, OSError, RuntimeError) as error:
                    result = {"failed": str(error).strip().removeprefix("error: ")[-300:]}
                    print(f"failed: {result['failed']}", file=sys.stderr, flush=True)
                write_text(path, json.dumps(result, indent=2) + "\n")
                after()

    def result_path(self, variant: Variant, stage: str) -> Path:
        """Where the result of a stage lies."""
        shared = stage in ("convert", "recover", "tune")
        folder = Path(self.options.folder, variant.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{stage}{'' if shared else variant.key}.json"

    def result(self, variant: Variant, stage: str) -> dict[str, Any]:
        """What a stage gave; empty if it has not run."""
        path = self.result_path(variant, stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def network(self, variant: Variant, which: str) -> Path:
        """A checkpoint of a variant: ``converted``, ``recovered`` or ``tuned``."""
        name = "converted" if variant.attention == ORIGINAL and which == "recovered" else which
        return Path(self.options.folder, variant.folder, f"{name}.pt")

    def tile(self, variant: Variant) -> int:
        """Side of the tiles that a row labels, px."""
        return variant.tile or self.options.tile

    def overlap(self, variant: Variant) -> int:
        """Overlap of the tiles of a row, px."""
        return default_overlap(self.tile(variant)) if variant.overlap is None else variant.overlap

    def command(self, *words: object) -> dict[str, Any]:
        """The JSON that a command of cdkd-edge prints. RuntimeError with its last line if it fails."""
        return run_cdkd_edge(words, Path(self.options.folder, "log.txt"))[0]

    # --- stages ---------------------------------------------------------------------------------

    def convert(self, variant: Variant) -> dict[str, Any]:
        """The same weights with other attention."""
        target = self.network(variant, "converted")
        if variant.attention == ORIGINAL:
            shutil.copyfile(self.options.checkpoint, target)
            return {}
        found = self.command(
            "convert",
            self.options.checkpoint,
            "--attention",
            variant.attention,
            "-o",
            target,
            "--overwrite",
            *(["--sparse"] if variant.sparse else []),
        )
        return {name: found[name] for name in ("attention", "notes")}

    def evaluate(self, variant: Variant, which: str) -> dict[str, Any]:
        """Accuracy on the validation scenes."""
        scenes, options = ",".join(self.options.val_scenes), self.options
        found = self.command(
            *("evaluate", self.network(variant, which), "--data", options.data, "--schema", options.schema),
            *("--scenes", scenes, "--tile", self.tile(variant), "--overlap", self.overlap(variant)),
            *("--precision", options.precision),
        )
        classes = {row["name"]: row["iou"] for row in found["classes"]}
        return {"mean_iou": found["mean_iou"], "classes": classes, "tiles": found["tiles"], "seconds": found["seconds"]}

    def recover(self, variant: Variant) -> dict[str, Any]:
        """Alignment with the network it came from."""
        if variant.attention == ORIGINAL:
            return {"minutes": 0.0}
        target, options = self.network(variant, "recovered"), self.options
        if not target.exists() or target.with_suffix(".state.pt").exists():
            scenes = [options.data / "images" / f"{scene}_*" for scene in self.training]
            self.command(
                *("distill", *scenes, "--teacher", options.checkpoint, "--student", self.network(variant, "converted")),
                *("-o", target, "--tile", options.training_tile, "--precision", options.precision, "--resume"),
                *options.distill.split(),
            )
        record = self.command("info", target)["training"]["distilled"]
        kept = {name: record[name] for name in ("recipe", "training_tiles", "before", "after")}
        return {"minutes": record["run"]["seconds"] / 60, **kept}

    def tune(self, variant: Variant) -> dict[str, Any]:
        """The decoder alone, with labels; the last epoch is kept."""
        target, options = self.network(variant, "tuned"), self.options
        if not target.exists() or target.with_suffix(".state.pt").exists():
            self.command(
                *("finetune", self.network(variant, "recovered"), "--data", options.data, "--schema", options.schema),
                *("--val-scenes", ",".join(options.val_scenes), "-o", target, "--tile", options.training_tile),
                *("--precision", options.precision, "--epochs", options.epochs, "--validate-every", options.epochs),
                *("--views", options.epochs, "--resume", *options.finetune.split()),
            )
        record = self.command("info", target)["training"]
        return {"recipe": record["recipe"], "minutes": record["run"]["seconds"] / 60}

    def speed(self, variant: Variant) -> dict[str, Any]:
        """Engines of the converted network: the speed does not depend on the weights."""
        space = self._space(variant, "converted")
        about = self.command("info", self.network(variant, "converted"), "--tile", self.tile(variant))
        found: dict[str, Any] = {"macs": about["cost"]["total_macs"]}
        cores = available_cores()
        paths = [self._cpu_engine(one, "converted") for one in (variant, Variant("", ORIGINAL, variant.tile))]
        with load_engine(paths[0], threads=cores) as engine, load_engine(paths[1], threads=cores) as other:
            found["cpu_times"] = 1.0 if variant.attention == ORIGINAL else 1 / speed_ratio(engine, other)
        for precision in ("fp16", "int8"):
            try:
                found[precision] = self._compiled(variant, space, precision)
            except RuntimeError as error:
                found[precision] = {"failed": str(error)}
        return found

    def seams(self, variant: Variant) -> dict[str, Any]:
        """Changes of label of the recovered network across the borders of tiles, on the validation scenes."""
        images = [path for path in self.images if path.name.split("_")[0] in self.options.val_scenes]
        which = "converted" if variant.attention == ORIGINAL else "recovered"
        found = measure_seams(self._cpu_engine(variant, which), images, self.overlap(variant))
        return {"changes": found["changes"], "agreement": found["agreement"]}

    def _space(self, variant: Variant, which: str) -> Path:
        """The workspace of a network, with its exported graph."""
        space = Path(self.options.folder, variant.folder, f"{which}-{self.tile(variant)}")
        if not (space / "export" / f"{which}.onnx").exists():
            self.command("export", self.network(variant, which), "--tile", self.tile(variant), "-w", space)
        return space

    def _cpu_engine(self, variant: Variant, which: str) -> Path:
        space = self._space(variant, which)
        engine = space / "engines" / f"{which}.fp32.cpu.onnx"
        if not engine.exists():
            self.command("build", space / "export" / f"{which}.onnx", "--runtime", "cpu", "-o", engine, "-w", space)
        return engine

    def _compiled(self, variant: Variant, space: Path, precision: str) -> dict[str, Any]:
        """What TensorRT-RTX makes of the graph, and how fast that is modelled to be."""
        graph, engine = space / "export" / "converted.onnx", space / "engines" / f"converted.{precision}.engine"
        if not engine.exists():
            more: tuple[object, ...] = ()
            if precision == "int8":
                more = ("--calibration", self._calibration(self.tile(variant)))
            more += ("--sparse",) if variant.sparse else ()
            self.command("build", graph, f"--{precision}", *COMPILER, *more, "-o", engine, "-w", space)
        manifest = self.command("inspect", engine, "-w", space)["manifest"]
        modelled = self.command("roofline", engine, "--device", DEVICE, "-w", space)
        build = manifest["tensorrt"]
        return {
            **{name: build[name] for name in ("layers", "traffic_bytes", "scratch_bytes", "weights_bytes")},
            "attention_fused": manifest["attention_fused"],
            "modes": {row["mode"]: [row["modelled_fps"], *row["modelled_fps_range"]] for row in modelled["estimates"]},
        }

    def _calibration(self, tile: int) -> Path:
        folder = Path(self.options.folder, f"calibration-{tile}")
        if not folder.exists():
            scenes = [self.options.data / "images" / f"{scene}_*" for scene in self.training]
            counts = ("--count", self.options.calibration, "--check", 2)
            self.command("calibrate", *scenes, "--tile", tile, *counts, "-o", folder)
        return folder


def row_of(study: Study, variant: Variant) -> dict[str, Any]:
    """Everything that is known of a row."""
    stages = {stage: study.result(variant, stage) for stage in study.stages}
    tile, overlap = study.tile(variant), study.overlap(variant)
    return {"name": variant.name, "attention": variant.attention, "tile": tile, "overlap": overlap, **stages}


def as_markdown(results: dict[str, Any]) -> str:
    """The tables."""

    def text(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
        return "–" if value is None else f"{factor * value:.{digits}f}"

    def modes(row: dict[str, Any], precision: str) -> dict[str, list[float]]:
        return (row["speed"].get(precision) or {}).get("modes") or {}

    def rate(row: dict[str, Any], precision: str, *, bounds: bool = False) -> str:
        if MODE not in modes(row, precision):
            return "–"
        mid, low, high = modes(row, precision)[MODE]
        return f"{mid:.1f}" + (f" ({low:.1f} to {high:.1f})" if bounds else "")

    def megapixels(row: dict[str, Any]) -> str:
        side = row["tile"] - row["overlap"]
        return text(modes(row, "fp16").get(MODE, [None])[0], 1, side * side / 1e6)

    def compiled(row: dict[str, Any], name: str, digits: int = 0, factor: float = 1.0) -> str:
        found = (row["speed"].get(precision) or {} for precision in ("fp16", "int8"))
        return " / ".join(text(one.get(name), digits, factor) for one in found)

    def seam(row: dict[str, Any]) -> str:
        changes = row["seams"].get("changes")
        return f"{changes[0]['ratio']:.2f}" if changes else "–"

    head = (
        "attention", "GMAC", "mIoU before", "after recovery", "decoder tuned", "minutes", "layers FP16 / INT8",
        "GB", "fused", "tiles/s FP16", "tiles/s INT8", "Mpx/s FP16", "CPU time", "seams",
    )  # fmt: skip
    lines = [
        "# Attention variants",
        "",
        f"`{results['command']}`",
        "",
        f"{results['machine']['cpu']}. mIoU in percent on {', '.join(results['val_scenes'])}, a validation scene, "
        f"{results['tile']} px tiles. Minutes: of recovery, on this machine. Tiles/s and Mpx/s are **modelled** for "
        f"{DEVICE} in {MODE}, from the layers that TensorRT-RTX made for SM 8.6; Mpx/s counts what tiles do not "
        "share. CPU time: of the FP32 engine over that of the network as trained with the same tile, in turn. "
        "Seams: changes of label across borders of tiles over changes elsewhere.",
        "",
        f"| {' | '.join(head)} |",
        f"|---{'|---:' * (len(head) - 1)}|",
    ]
    for row in results["rows"]:
        accuracy = [text(row[stage].get("mean_iou"), 2, 100) for stage in ("before", "after", "tuned")]
        cells = [
            *(row["name"], text(row["speed"].get("macs"), 1, 1e-9), *accuracy),
            *(text(row["recover"].get("minutes")), compiled(row, "layers"), compiled(row, "traffic_bytes", 2, 1e-9)),
            *(compiled(row, "attention_fused"), rate(row, "fp16", bounds=True), rate(row, "int8", bounds=True)),
            *(megapixels(row), text(row["speed"].get("cpu_times"), 2), seam(row)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    names = list(dict.fromkeys(mode for row in results["rows"] for mode in modes(row, "fp16")))
    if names:
        lines += ["", "Modelled tiles/s by power mode, FP16 / INT8:", "", f"| attention | {' | '.join(names)} |"]
        lines.append(f"|---{'|---:' * len(names)}|")
        for row in results["rows"]:
            pairs = ([modes(row, kind).get(mode, [None])[0] for kind in ("fp16", "int8")] for mode in names)
            lines.append(f"| {row['name']} | {' | '.join(' / '.join(map(text, pair)) for pair in pairs)} |")
    failed = [
        f"- {row['name']}, {stage}: {found['failed']}"
        for row in results["rows"]
        for stage in STAGES
        for found in _failures(row[stage])
    ]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else []), ""])


def _failures(result: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    return [part for part in parts if "failed" in part]


def main(words: Sequence[str] | None = None) -> int:
    """Parse, run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a tuned network with global attention")
    parser.add_argument("data", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--folder", type=Path, required=True, help="where every stage is kept")
    parser.add_argument("--output", type=Path, help="where results go, without suffix. Default: printed")
    parser.add_argument("--schema", default="dubai")
    parser.add_argument("--val-scenes", nargs="+", default=["tile5"])
    parser.add_argument("--tile", type=int, default=1024, help="side of the tiles that are labelled, px")
    parser.add_argument("--training-tile", type=int, default=512, help="side of the tiles that are trained on, px")
    parser.add_argument("--precision", default="bf16", help="of PyTorch")
    parser.add_argument("--distill", default=DISTILL, help="options of distill")
    parser.add_argument("--epochs", type=int, default=3, help="of decoder tuning")
    parser.add_argument(
        "--finetune",
        default="--views 0 --scale 0.5 1.6 --light 0.2 --texture 1 --class-weights sqrt --weight-decay 0.02 "
        "--mean-decay 0.985 --lr 1e-4 --batch 8 --schedule cosine --warm-up 20 --clip-norm 1",
        help="more options of finetune",
    )
    parser.add_argument("--calibration", type=int, default=4, help="tiles for INT8, whose speed is all that counts")
    parser.add_argument("--variants", nargs="+", help="names of rows. Default: all")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    arguments = parser.parse_args(words)
    known = {variant.name: variant for variant in VARIANTS}
    names = arguments.variants or list(known)
    # A row that is not in the table is an attention of its own.
    variants = [known.get(name) or Variant(name, name) for name in names]
    return run_reporting_errors(lambda: _run(arguments, variants))


def _run(arguments: argparse.Namespace, variants: Sequence[Variant]) -> int:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    study = Study(arguments)

    def write() -> None:
        results = {
            "command": shown_command("attention_variants.py"),
            "machine": vars(describe_machine()),
            "val_scenes": arguments.val_scenes,
            "tile": arguments.tile,
            "rows": [row_of(study, variant) for variant in variants],
        }
        write_results(arguments.output, results, as_markdown(results))

    study.run(variants, arguments.stages, write if arguments.output else lambda: None)
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
