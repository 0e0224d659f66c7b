"""The processes of a training run: one, or those that ``torchrun`` started (torch)."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn

from cdkd_edge.core.errors import UsageError
from cdkd_edge.model.device import chosen_device

# One process scores and writes while the others wait for it. torchrun ends the others if one dies.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process, its number and how many there are. Number 0 writes all files."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the values over all processes, the same in each."""
        if self.size == 1:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values / self.size

    def require_same(self, value: str, what: str, device: torch.device) -> None:
        """Make sure that all processes have the same value of something: UsageError."""
        if self.size == 1:
            return
        number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        ends = torch.tensor([number, -number], device=device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise UsageError(
                f"the processes of torchrun do not have the same {what}",
                hint="give each the same command, and folders that all of them see",
            )

    def shared(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients become the means over all processes: DistributedDataParallel."""
        if self.size == 1:
            return module
        devices = {parameter.device for parameter in module.parameters()}
        index = [device.index for device in devices if device.type == "cuda"]
        # Depthwise kernels [C, 1, 3, 3] have gradients of other strides, which is harmless, and torch warns of it.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(module, device_ids=index or None)


def this_process_writes() -> bool:
    """Whether this process writes files and reports; known before it joins the others."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks(device: str) -> tuple[Ranks, torch.device]:
    """Join the processes that ``torchrun`` started; alone, this process is the only one.

    Args:
        device: as for :func:`~cdkd_edge.model.device.chosen_device`. With several GPUs, each process takes its own.

    Raises:
        UsageError: the device cannot be used.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(), chosen_device(device)
    chosen = chosen_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"the processes of torchrun cannot be joined: {reason}") from None
    return Ranks(torch.distributed.get_rank(), size), chosen


def leave_ranks() -> None:
    """Leave the processes that :func:`join_ranks` joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
