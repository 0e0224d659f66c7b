"""Where and how precisely PyTorch computes, and what a network costs there.

Cost is parameters and multiply-accumulates (MACs; one is two floating-point operations). The paper's "119.76 GFLOPs" is
the MACs of convolutions and linear layers alone. The attention products (query-key and attention-value) are counted
apart: at 4096 tokens they are more than half of the work.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdkd_edge.core.errors import UsageError
from cdkd_edge.model.network import Attention, Encoder, SegmentationNetwork

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *_AUTOCAST)
_CPU_FLAGS = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64, and of aarch64


def chosen_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is CUDA if there is a GPU, else the CPU.

    Raises:
        UsageError: torch does not know the device, or it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # .cpu() refuses "meta", whose tensors hold no values
    except (RuntimeError, AssertionError) as error:  # "Torch not compiled with CUDA enabled" is an AssertionError
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}") from None
    return device


def chosen_precision(name: str, device: torch.device) -> str:
    """The precision of that name; ``auto`` is bf16 where the device has instructions for it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and not _BF16_FLAGS.isdisjoint(_cpu_flags())
    return "bf16" if has_bf16 else "fp32"


def _cpu_flags() -> list[str]:
    return _CPU_FLAGS.read_text(encoding="utf-8", errors="replace").split() if _CPU_FLAGS.exists() else []


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for the operators of torch's own lists; does nothing for ``fp32``.

    Raises:
        UsageError: not one of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", hint=f"choose {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of one tile."""

    parameters: int  # all parameters, the position embedding included
    position_parameters: int
    conv_linear_macs: int  # what the paper's table counts
    attention_macs: int  # the query-key and attention-value products

    @property
    def total_macs(self) -> int:
        """Convolutions, linear layers and attention products together."""
        return self.conv_linear_macs + self.attention_macs


def network_cost(network: SegmentationNetwork | Encoder) -> Cost:
    """Count parameters, and the MACs of one tile by running the modules on shapes alone (device "meta")."""
    conv_linear, attention = [], []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            conv_linear.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.ConvTranspose2d):
            conv_linear.append(inputs[0].numel() * module.weight[0].numel())
        elif isinstance(module, Attention):
            n, length, dim = inputs[0].shape
            attention.append(2 * n * length * (length // (module.windows * module.pool)) * dim)
            if module.pool > 1:  # its projections run without calling the layer
                conv_linear.append(n * (length + 2 * length // module.pool) * dim * dim)

    shapes_only = copy.deepcopy(network).to("meta").eval()
    for module in shapes_only.modules():
        module.register_forward_hook(count)
    tile = network.config.tile
    with torch.inference_mode():
        shapes_only(torch.empty(1, 3, tile, tile, device="meta"))

    encoder = network.encoder if isinstance(network, SegmentationNetwork) else network
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        position_parameters=0 if encoder.config.rotary_base else encoder.pos_embed.numel(),
        conv_linear_macs=sum(conv_linear),
        attention_macs=sum(attention),
    )
