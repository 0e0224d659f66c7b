"""Time, memory and operations of one step of distillation at full size, and what a whole run would cost.

    python benchmarks/distill_step.py                                        # SAM ViT-L, the paper's student, 1024 px
    python benchmarks/distill_step.py --teacher vit_b --tile 512 --no-recompute

The networks have random weights, so no file is needed. The cost of a run is worked out from the operations and an
assumed speed; it is not measured.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from script_tools import run_reporting_errors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cdkd_edge.core.machine import describe_machine
from cdkd_edge.distillation.distiller import parameter_groups
from cdkd_edge.distillation.masks import visible_patches
from cdkd_edge.distillation.networks import Distillation
from cdkd_edge.distillation.recipe import DistillRecipe
from cdkd_edge.model.config import PRESETS
from cdkd_edge.model.network import Encoder
from cdkd_edge.model.sam import SAM_CONFIGS, SamEncoder

PAPER_TILES = 100_801 * 120  # of LuoJiaCDKD-100K, in the paper's 120 epochs


def operations(networks: Distillation, tiles: torch.Tensor, visible: torch.Tensor) -> tuple[int, int]:
    """Floating-point operations of the forward pass, and of both passes, counted on shapes alone."""
    shapes = copy.deepcopy(networks).to("meta")
    assert shapes.teacher is not None
    shapes.recipe, shapes.teacher.recompute = replace(shapes.recipe, precision="fp32"), False  # meta has no autocast
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which is counted on every device
        found = shapes(tiles.to("meta"), visible.to("meta"))
        forward = counter.get_total_flops()
        found.parts[:3].mean().backward()
    return forward, counter.get_total_flops()


def main(words: Sequence[str] | None = None) -> int:
    """Make one step, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SAM_CONFIGS, default="vit_l")
    parser.add_argument("--student", choices=PRESETS, default="paper")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--decoder-width", type=int, default=0)
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tflops", type=float, nargs="+", default=[150, 300], help="assumed speeds of a GPU, TFLOP/s")
    options = parser.parse_args(words)
    recipe = DistillRecipe(precision=options.precision, decoder_width=options.decoder_width)
    torch.manual_seed(0)
    student = Encoder(replace(PRESETS[options.student], tile=options.tile))
    teacher = SamEncoder(replace(SAM_CONFIGS[options.teacher], tile=options.tile))
    networks = Distillation(student, teacher, recipe, recompute=not options.no_recompute).to(options.device)
    optimizer = torch.optim.AdamW(parameter_groups(networks.trained(), recipe.learning_rate, recipe.weight_decay), lr=1)
    tiles = torch.randint(0, 256, (options.batch, 3, options.tile, options.tile), dtype=torch.uint8)
    masks = [visible_patches("cells", student.config.grid, recipe.cell, [index]) for index in range(options.batch)]
    visible = torch.stack([torch.from_numpy(mask) for mask in masks])
    forward, total = operations(networks, tiles[:1], visible[:1])
    started = time.perf_counter()
    networks(tiles.to(options.device), visible.to(options.device)).parts[:3].mean().backward()
    optimizer.step()
    seconds = time.perf_counter() - started
    if options.device.startswith("cuda"):
        memory, machine = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        memory, machine = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, describe_machine().cpu
    print(f"machine        {machine}, torch {torch.__version__}")
    print(f"step           {seconds:.1f} s, {options.batch} tile(s) of {options.tile} px, {options.precision}")
    print(f"memory         {memory / 1e9:.2f} GB at most, everything included")
    print(
        f"operations     {total / 1e12:.2f} TFLOP per tile, {forward / 1e12:.2f} of them forward; without recomputing"
    )
    for speed in options.tflops:
        hours = PAPER_TILES * total / speed / 1e12 / 3600
        print(f"the paper's run, 120 epochs of 100,801 tiles, at {speed:g} TFLOP/s: {hours:.0f} hours (worked out)")
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
