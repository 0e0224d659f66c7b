"""Desktop and server GPUs, through NVIDIA's management library (package ``nvidia-ml-py``, optional).

On a Jetson NVML initialises and then answers every power query with NotSupported: ``probe`` takes an actual reading.
Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import contextlib
from typing import Any

from cdkd_edge.board.power.protocol import GPU_BOARD, JOULES, WATTS


class NvmlReader:
    """Joules (since Volta) or watts of each GPU board."""

    name = "nvml"
    scope = GPU_BOARD
    covers = "the GPU board with its memory, without the host"
    total: str | None = None

    def __init__(self, nvml: Any, handles: dict[str, Any], quantity: str) -> None:
        """Use ``probe`` instead."""
        self._nvml, self._handles = nvml, handles
        self.quantity = quantity

    @classmethod
    def probe(cls, nvml: Any = None) -> tuple[NvmlReader | None, str]:
        """Find GPUs by an actual reading.

        Args:
            nvml: the module, for tests. Default: ``pynvml`` of nvidia-ml-py.

        Returns:
            The reader and an empty string, or None and the reason.
        """
        if nvml is None:
            try:
                import pynvml
            except ImportError:
                return None, "NVML: nvidia-ml-py is not installed"
            nvml = pynvml
        try:
            nvml.nvmlInit()
            handles = {}
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                name = nvml.nvmlDeviceGetName(handle)
                handles[f"GPU {index} {name.decode() if isinstance(name, bytes) else name}"] = handle
        except nvml.NVMLError as error:
            return None, f"NVML: {error}"
        if not handles:
            return None, "NVML: no GPU"
        reasons = []
        for quantity in (JOULES, WATTS):
            reader = cls(nvml, handles, quantity)
            try:
                for handle in handles.values():
                    reader._one(handle)
                return reader, ""
            except (nvml.NVMLError, ValueError) as error:
                reasons.append(f"{'energy' if quantity == JOULES else 'power'}: {error}")
        return None, f"NVML: {'; '.join(reasons)}"

    def read(self) -> dict[str, float]:
        """Joules since the driver was loaded, or watts, per board. A board that does not answer is absent.

        Raises:
            OSError: no board answers.
        """
        values = {}
        failure: Exception | None = None
        for rail, handle in self._handles.items():
            try:
                values[rail] = self._one(handle)
            except (self._nvml.NVMLError, ValueError) as error:
                failure = error
        if not values:
            raise OSError(f"NVML: {failure}")
        return values

    def _one(self, handle: Any) -> float:
        if self.quantity == JOULES:
            value = self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # mJ
        else:
            value = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000  # mW
        if value < 0 or (value == 0 and self.quantity == JOULES):
            raise ValueError("NVML answers 0")
        return float(value)

    def close(self) -> None:
        """Shut NVML down; it may be gone already."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
