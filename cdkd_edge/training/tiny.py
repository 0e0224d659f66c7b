"""Train and judge the bundled demonstration checkpoint ``tiny``: real Dubai imagery plus drawn scenery.

    python -m cdkd_edge.training.tiny --data DATA --output tiny.safetensors --steps 2400
    python -m cdkd_edge.training.tiny --data DATA --evaluate tiny.safetensors

DATA holds the Dubai scenes (``images/``, ``masks/``). One scene is held out of training whole and is
looked at only to report. The weights saved are an exponential mean over the steps; the last ones are
kept, not the ones that score best on the held-out scene, so its score stays an honest one. With
``--steps`` a run is repeatable on the same machine and versions; ``--minutes`` chooses the steps by
timing a few of them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdkd_edge.errors import CdkdEdgeError
from cdkd_edge.labels import NO_LABEL, LabelSchema, load_schema
from cdkd_edge.model.checkpoint import load_checkpoint, save_checkpoint
from cdkd_edge.model.config import PRESETS, NetworkConfig
from cdkd_edge.model.network import SegmentationNetwork
from cdkd_edge.training.crops import CropSampler, LabelledImage, drawn_pairs, read_pairs, scenes_in
from cdkd_edge.training.judge import judge_colors, judge_network, table

HELD_OUT = "tile5"
"""The Dubai scene that is never trained on."""

DRAWN_SIDE = 1024
DRAWN_TRAINING_SEEDS = range(1000, 1048)
DRAWN_HELD_OUT_SEEDS = range(100, 108)
DRAWN_SHARE = 1 / 3
_SAVE_EVERY_S = 240.0


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the bundled checkpoint."""

    steps: int
    seed: int = 0
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warm_up: int = 150
    """Steps over which the learning rate rises; never more than a tenth of all."""
    mean_decay: float = 0.995
    """How much of the running mean of the weights survives a step."""
    rarity: float = 0.25
    """Classes weigh (share of pixels) ** -rarity in the loss."""
    bf16: bool = False
    """Forward pass under bfloat16 autocast."""


class Training:
    """A network on its way; :meth:`step` trains on one batch."""

    def __init__(self, config: NetworkConfig, sampler: CropSampler, weights: Tensor, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.sampler, self.weights = recipe, sampler, weights
        self.network = SegmentationNetwork(config).train()
        self.mean = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.done = 0
        # Decay pulls on matrices and kernels; biases, norms and positions are left alone.
        parameters = dict(self.network.named_parameters())
        decayed = [p for name, p in parameters.items() if p.ndim > 1 and "pos_embed" not in name]
        free = [p for name, p in parameters.items() if p.ndim <= 1 or "pos_embed" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def step(self) -> float:
        """Train on one batch; returns its loss.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        images, labels = self.sampler.batch(self.recipe.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            logits = self.network(torch.from_numpy(images))  # [N, K, G, G]
        full = self.network.upsample(logits.float())  # [N, K, T, T]
        truth = torch.from_numpy(labels).long()
        loss = F.cross_entropy(full, truth, weight=self.weights, ignore_index=NO_LABEL)
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {float(loss)} at step {self.done}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        self._average()
        return float(loss.detach())

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a hundredth."""
        recipe = self.recipe
        warm_up = max(1, min(recipe.warm_up, recipe.steps // 10))
        if self.done < warm_up:
            return recipe.learning_rate * (self.done + 1) / warm_up
        progress = min((self.done - warm_up) / max(1, recipe.steps - warm_up), 1.0)
        return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    @torch.no_grad()
    def _average(self) -> None:
        """Move the mean weights and batch-norm statistics towards the current ones."""
        keep = min(self.recipe.mean_decay, (1 + self.done) / (10 + self.done))
        current = self.network.state_dict()
        for name, value in self.mean.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[name], 1 - keep)
            else:
                value.copy_(current[name])


def class_weights(images: Sequence[LabelledImage], classes: int, rarity: float) -> Tensor:
    """Loss weights ``[K]`` with mean 1: (share of labelled pixels) ** -rarity, for classes that occur."""
    counts = sum((np.bincount(i.labels.ravel(), minlength=256)[:classes] for i in images), np.zeros(classes, np.int64))
    share = np.maximum(counts / max(int(counts.sum()), 1), 1e-4)
    weights = share**-rarity
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def bf16_is_faster(config: NetworkConfig, batch: int) -> bool:
    """Whether this CPU trains faster under bfloat16 autocast (it does with AVX-512 BF16 or AMX)."""
    times = {}
    images = np.zeros((1, config.tile, config.tile, 3), np.uint8)
    blank = LabelledImage("blank", images[0], images[0, ..., 0])
    for bf16 in (False, True):
        sampler = CropSampler([(1.0, [blank])], config.tile, 0)
        trial = Training(config, sampler, torch.ones(config.classes), Recipe(steps=10, batch=batch, bf16=bf16))
        trial.step()
        start = time.perf_counter()
        trial.step()
        trial.step()
        times[bf16] = time.perf_counter() - start
    return times[True] < times[False]


def train(
    data: Path,
    output: Path,
    recipe: Recipe,
    *,
    schema: LabelSchema,
    minutes: float | None = None,
    stop_at: int | None = None,
) -> None:
    """Train ``tiny`` on the scenes of ``data`` but one, and on drawn scenery; write it to ``output``.

    The file is written every few minutes, whole each time. With ``minutes``, ``recipe.steps`` is
    replaced by what fits. With ``stop_at`` the run ends after that many steps of the schedule, as an
    interrupted one would have.
    """
    config = PRESETS["tiny"]
    names = [scene for scene in scenes_in(data) if scene != HELD_OUT]
    real, drawn = read_pairs(data, schema, names), drawn_pairs(DRAWN_TRAINING_SEEDS, DRAWN_SIDE)
    sources = [(1 - DRAWN_SHARE, real), (DRAWN_SHARE, drawn)]
    weights = class_weights([*real, *drawn], len(schema), recipe.rarity)

    def start(chosen: Recipe) -> Training:
        return Training(config, CropSampler(sources, config.tile, chosen.seed), weights, chosen)

    if minutes is not None:
        trial = start(recipe)
        trial.step()
        began = time.perf_counter()
        for _ in range(5):
            trial.step()
        steps = max(1, int(60 * minutes / ((time.perf_counter() - began) / 5)))
        recipe = Recipe(**{**vars(recipe), "steps": steps})
    training, notes = start(recipe), _notes(recipe, names)
    began = saved = time.perf_counter()
    running = None
    last = min(stop_at or recipe.steps, recipe.steps)
    for step in range(1, last + 1):
        loss = training.step()
        running = loss if running is None else 0.98 * running + 0.02 * loss
        now = time.perf_counter()
        if step % 50 == 0 or step == last:
            left = (now - began) / step * (last - step) / 60
            print(f"step {step}/{last}  loss {running:.3f}  {left:.0f} min left", file=sys.stderr, flush=True)
        if now - saved > _SAVE_EVERY_S:
            save_checkpoint(
                training.mean, output, schema=schema, training={**notes, "stopped_at": step}, dtype=torch.float16
            )
            saved = time.perf_counter()
    notes |= {"stopped_at": last, "minutes": round((time.perf_counter() - began) / 60, 1)}
    save_checkpoint(training.mean, output, schema=schema, training=notes, dtype=torch.float16)


def _notes(recipe: Recipe, scenes: Sequence[str]) -> dict[str, object]:
    """What a checkpoint says about its training."""
    return {
        "task": "land cover of very-high-resolution satellite imagery; a demonstration, not a product",
        "data": "MBRSC Dubai imagery, annotated by Humans in the Loop (CC0 1.0), and drawn scenery",
        "training_scenes": list(scenes),
        "held_out_scene": HELD_OUT,
        "drawn_seeds": [DRAWN_TRAINING_SEEDS.start, DRAWN_TRAINING_SEEDS.stop - 1],
        "recipe": vars(recipe),
    }


def evaluate(checkpoint: Path, data: Path, schema: LabelSchema) -> str:
    """Scores of a checkpoint as stored, and of colour alone, on what was held out; Markdown tables."""
    network, _ = load_checkpoint(checkpoint)
    names = [scene for scene in scenes_in(data) if scene != HELD_OUT]
    parts = [f"{checkpoint.name}, {checkpoint.stat().st_size / 1e6:.2f} MB"]
    for title, training_images, held_out in (
        (f"Dubai scene {HELD_OUT}", read_pairs(data, schema, names), read_pairs(data, schema, {HELD_OUT})),
        (
            f"drawn scenes {DRAWN_HELD_OUT_SEEDS.start}-{DRAWN_HELD_OUT_SEEDS.stop - 1}",
            drawn_pairs(DRAWN_TRAINING_SEEDS, DRAWN_SIDE),
            drawn_pairs(DRAWN_HELD_OUT_SEEDS, DRAWN_SIDE),
        ),
    ):
        scores = {"tiny": judge_network(network, held_out)}
        scores |= judge_colors(training_images, held_out, len(schema))
        parts.append(table(title, schema, scores))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cdkd_edge.training.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Dubai images/ and masks/")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--output", type=Path, help="train, and write the checkpoint here")
    job.add_argument("--evaluate", type=Path, metavar="FILE", help="judge this checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=2400, help="training steps (repeatable; default 2400)")
    length.add_argument("--minutes", type=float, help="train for about this long instead")
    parser.add_argument("--stop-at", type=int, help="end after this many steps, the schedule unchanged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: the faster here")
    options = parser.parse_args(arguments)
    schema = load_schema("dubai")
    try:
        if options.evaluate:
            print(evaluate(options.evaluate, options.data, schema))
            return 0
        recipe = Recipe(steps=options.steps, seed=options.seed)
        bf16 = options.precision == "bf16" or (
            options.precision == "auto" and bf16_is_faster(PRESETS["tiny"], recipe.batch)
        )
        recipe = Recipe(**{**vars(recipe), "bf16": bf16})
        print(f"training in {'bf16' if bf16 else 'fp32'} with {torch.get_num_threads()} threads", file=sys.stderr)
        train(options.data, options.output, recipe, schema=schema, minutes=options.minutes, stop_at=options.stop_at)
    except CdkdEdgeError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
