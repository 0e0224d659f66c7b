"""Where and how precisely PyTorch computes."""

from __future__ import annotations

import contextlib

import torch

from cdkd_edge.core.errors import UsageError

PRECISIONS = ("fp32", "bf16", "fp16")

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: torch knows no such device, or it is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # "meta" makes tensors, but none that can be read
    except (RuntimeError, AssertionError) as error:  # "Torch not compiled with CUDA enabled" is an AssertionError
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}") from None
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision of the ops that stand it, by torch's own lists; nothing for ``fp32``.

    Raises:
        UsageError: not one of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", hint=f"choose {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])
