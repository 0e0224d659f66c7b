"""Whether distillation helps: students of several arms, judged by a decoder on their frozen features.

    python benchmarks/distill_dubai.py DATA --teacher encoder.safetensors --folder out/distillation \
        --output benchmarks/results/distillation

``DATA`` has ``images/`` and ``masks/``. Every arm starts from the same random student of a seed and trains for the same
time of one core on unlabelled tiles of all scenes but the one held out. Then `finetune` trains a decoder on the frozen
encoder with labels of the training scenes, and the held-out scene is scored, which no student and no decoder has seen.
The last epoch counts; nothing is chosen by its score. The teacher's own frozen features are the upper end of the range,
random ones the lower.

Arms, besides ``random`` and ``teacher``:

    mae                  method mae: reconstruction alone
    features             method features: the teacher's features of whole tiles
    masked               method masked without adapters
    adapters, student    method masked with adapters, --feedback student
    adapters, both       method masked with adapters, --feedback both, as in the paper

The learning rate of an arm is the one of 1e-3 and 3e-3 (for 4 tiles a step) that brought its own training loss lower in
600 to 900 steps; arms with masks have that of ``masked``.

Every stage is kept in ``--folder``; a killed run goes on where it was. The steps of an arm follow from
the median time of a step of the first seed: a median, because processor time on busy cores can be twice what it is on
idle ones. OMP_NUM_THREADS=1 makes it that of one core.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from script_tools import run_cdkd_edge, run_reporting_errors, shown_command, write_results

from cdkd_edge.core.files import write_text
from cdkd_edge.core.machine import describe_machine

RANDOM, TEACHER = "random", "teacher"
ARMS: dict[str, tuple[str, ...]] = {
    RANDOM: (),
    "mae": ("--method", "mae"),
    "features": ("--method", "features"),
    "masked": ("--method", "masked", "--adapters", "none"),
    "adapters, student": ("--method", "masked", "--feedback", "student"),
    "adapters, both": ("--method", "masked", "--feedback", "both"),
    TEACHER: (),
}
RATES = {"features": 3e-3}  # for 4 tiles a step
RATE = 1e-3  # of other arms
CLASSES = ("building", "road")  # that colour does not tell
_PROBE_STEPS = 60  # from which the steps of an arm are worked out


class Study:
    """All arms and seeds, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        scenes = {path.name.split("_")[0] for path in (options.data / "images").iterdir()}
        self.tiles = [options.data / "images" / f"{scene}_*" for scene in sorted(scenes - {options.val_scene})]

    def run(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Train and score what is missing."""
        for seed in seeds:
            for arm in arms:
                self.kept(arm, seed, "distill", lambda: self.distill(arm, seed))  # noqa: B023
                self.kept(arm, seed, "score", lambda: self.score(arm, seed))  # noqa: B023

    def place(self, arm: str, seed: int, name: str) -> Path:
        """A file of an arm and a seed. The teacher is the same for all."""
        folder = self.folder / arm.replace(", ", "-") / ("" if arm == TEACHER else str(seed))
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def kept(self, arm: str, seed: int, stage: str, make: Any) -> dict[str, Any]:
        """The result of a stage, made if it is not there."""
        path = self.place(arm, seed, f"{stage}.json")
        if not path.exists():
            print(f"{stage}: {arm}, seed {seed}", file=sys.stderr, flush=True)
            write_text(path, json.dumps(make(), indent=2) + "\n")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def command(self, *words: object) -> dict[str, Any]:
        """What a command prints."""
        return run_cdkd_edge(words, self.folder / "log.txt")[0]

    def encoder(self, arm: str, seed: int) -> Path:
        """The encoder that is judged."""
        return self.options.teacher if arm == TEACHER else self.place(arm, seed, "encoder.pt")

    def student(self, seed: int) -> Path:
        """A student with random weights; the same for all arms of a seed."""
        path = self.folder / f"student-{seed}.pt"
        if not path.exists():
            import torch

            from cdkd_edge.model.checkpoint import save_checkpoint
            from cdkd_edge.model.config import NetworkConfig
            from cdkd_edge.model.network import Encoder

            options = self.options
            torch.manual_seed(seed)
            width = options.width
            config = NetworkConfig(
                tile=options.tile, patch=options.patch, embed_dim=width, depth=6, heads=width // 64, mlp_dim=4 * width
            )
            save_checkpoint(Encoder(config), path)
        return path

    def distill(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm for the processor time that all have."""
        target = self.encoder(arm, seed)
        if arm in (RANDOM, TEACHER):
            if arm == RANDOM:
                target.write_bytes(self.student(seed).read_bytes())
            return {"steps": 0}
        first = self.kept(arm, self.options.seeds[0], "pace", lambda: self.pace(arm))
        steps = round(60 * self.options.minutes / first["seconds_per_step"])
        record = self._distilled(arm, seed, target, steps, "--resume")
        return {
            "steps": steps,
            "before": record["before"],
            "after": record["after"],
            "transitions": record["transitions"],
        }

    def pace(self, arm: str) -> dict[str, Any]:
        """The median time of a step."""
        target = self.place(arm, self.options.seeds[0], "pace.pt")
        self._distilled(arm, self.options.seeds[0], target, _PROBE_STEPS, "--overwrite")
        with target.with_suffix(".steps.csv").open(newline="", encoding="utf-8") as table:
            ends = [float(row["seconds"]) for row in csv.DictReader(table)]
        return {"seconds_per_step": statistics.median(end - start for start, end in itertools.pairwise(ends))}

    def _distilled(self, arm: str, seed: int, target: Path, steps: int, how: str) -> dict[str, Any]:
        options = self.options
        teacher = [] if arm == "mae" else ["--teacher", options.teacher]
        found = self.command(
            *("distill", *self.tiles, "--student", self.student(seed), *teacher, *ARMS[arm], "--tile", options.tile),
            *("--steps", steps, "--batch", options.batch, "--lr", RATES.get(arm, RATE), "--schedule", "cosine"),
            *("--warm-up", min(50, steps // 4), "--weight-decay", 0.05, "--decoder-width", options.width),
            *("--seed", seed, "--precision", options.precision, "-o", target, how),
        )
        distilled: dict[str, Any] = found["distilled"]
        return distilled

    def score(self, arm: str, seed: int) -> dict[str, Any]:
        """A decoder on the frozen encoder, scored on the scene held out."""
        options = self.options
        found = self.command(
            *("finetune", self.encoder(arm, seed), "--data", options.data, "--schema", options.schema, "--resume"),
            *("--val-scenes", options.val_scene, "--tile", options.tile, "--patch", options.patch, "--seed", seed),
            *("--epochs", options.epochs, "--validate-every", options.epochs, "--lr", 1e-3, "--schedule", "cosine"),
            *("--head-channels", 64, "--precision", options.precision, "-o", self.place(arm, seed, "network.pt")),
        )
        shutil.rmtree(self.place(arm, seed, "network.features"))  # gigabytes
        scores = next(iter(found["training"]["scores"].values()))
        return {"mean_iou": scores["mean_iou"], "iou": scores["iou"]}

    def rows(self) -> list[dict[str, Any]]:
        """The arms with what is known of them."""
        rows = []
        for arm in ARMS:
            seeds = [seed for seed in self.options.seeds if self.place(arm, seed, "score.json").exists()]
            read = [
                {
                    stage: json.loads(self.place(arm, seed, f"{stage}.json").read_text())
                    for stage in ("distill", "score")
                }
                for seed in (seeds[:1] if arm == TEACHER else seeds)
            ]
            rows.append({"arm": arm, "runs": read})
        return rows


def as_markdown(results: dict[str, Any]) -> str:
    """The table."""

    def spread(values: list[float]) -> str:
        if not values:
            return "–"
        mean = f"{100 * statistics.mean(values):.1f}"
        return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")

    lines = [
        "# Whether distillation helps",
        "",
        f"`{results['command']}`",
        "",
        f"{results['machine']['cpu']}. Percent on scene {results['val_scene']}, held out: mean and standard deviation "
        f"over seeds. {results['minutes']:g} minutes of one core for each arm and seed, {results['tile']} px tiles, "
        f"patch {results['patch']}, student of width {results['width']} and 6 blocks, decoder trained on the frozen "
        "encoder.",
        "",
        "| arm | mIoU | " + " | ".join(f"IoU {name}" for name in CLASSES) + " | steps | seeds |",
        "|---|" + "---:|" * (3 + len(CLASSES)),
    ]
    for row in results["rows"]:
        runs = row["runs"]
        cells = [row["arm"], spread([run["score"]["mean_iou"] for run in runs])]
        cells += [spread([run["score"]["iou"][name] for run in runs]) for name in CLASSES]
        cells.append(str(runs[0]["distill"]["steps"]) if runs else "–")
        lines.append(f"| {' | '.join([*cells, str(len(runs))])} |")
    return "\n".join([*lines, ""])


def main(words: Sequence[str] | None = None) -> int:
    """Parse, run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where every stage is kept")
    parser.add_argument("--output", type=Path, help="where results go, without suffix. Default: printed")
    parser.add_argument("--schema", default="dubai")
    parser.add_argument("--val-scene", default="tile7")
    parser.add_argument("--minutes", type=float, default=20, help="time of one core for each arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--width", type=int, default=192, help="of the student's tokens")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="of the decoder")
    parser.add_argument("--precision", default="bf16", help="of PyTorch")
    options = parser.parse_args(words)
    study = Study(options)
    study.run(options.arms, options.seeds)
    names = ("val_scene", "tile", "patch", "width", "minutes", "batch", "epochs")
    results = {
        "command": shown_command("distill_dubai.py"),
        "machine": vars(describe_machine()),
        **{name: getattr(options, name) for name in names},
        "rows": study.rows(),
    }
    write_results(options.output, results, as_markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
