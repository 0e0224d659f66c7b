"""Desktop and server GPUs, through NVIDIA's management library (package ``nvidia-ml-py``, optional).

On a Jetson NVML initialises and then answers every power query with NotSupported: only an actual reading tells.
Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import contextlib
from typing import Any

from cdkd_edge.board.power.protocol import GPU_BOARD, JOULES, WATTS, UnusableSourceError


class NvmlReader:
    """Joules (since Volta) or watts of each GPU board."""

    name = "nvml"
    scope = GPU_BOARD
    covers = "the GPU board with its memory, without the host"
    total: str | None = None

    def __init__(self) -> None:
        """Find GPUs and take a first reading.

        Raises:
            UnusableSourceError: there is none, or none that tells energy or power.
        """
        try:
            import pynvml
        except ImportError:
            raise UnusableSourceError("NVML: nvidia-ml-py is not installed") from None
        self._nvml, self._handles = pynvml, dict[str, Any]()
        try:
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = pynvml.nvmlDeviceGetName(handle)
                self._handles[f"GPU {index} {name.decode() if isinstance(name, bytes) else name}"] = handle
        except pynvml.NVMLError as error:
            raise UnusableSourceError(f"NVML: {error}") from None
        if not self._handles:
            raise UnusableSourceError("NVML: no GPU")
        reasons = []
        for quantity, word in ((JOULES, "energy"), (WATTS, "power")):
            self.quantity = quantity
            try:
                for handle in self._handles.values():
                    self._one(handle)
                return
            except (pynvml.NVMLError, ValueError) as error:
                reasons.append(f"{word}: {error}")
        raise UnusableSourceError(f"NVML: {'; '.join(reasons)}")

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
