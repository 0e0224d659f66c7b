"""The GPU through the CUDA binding that is installed.

cuda-python comes first where both are: it has CUDA graphs and wheels for Jetson and desktop. PyCUDA is compiled
at installation and has no graphs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from cdkd_edge.core.errors import EngineError, MissingExtraError, UsageError
from cdkd_edge.engines.cuda import cuda_python as cuda_python_backend
from cdkd_edge.engines.cuda import pycuda as pycuda_backend
from cdkd_edge.engines.cuda.driver import CudaDriver
from cdkd_edge.engines.cuda.memory import Gpu

VARIABLE = "CDKD_EDGE_CUDA_BINDING"
"""Environment variable that names the binding to use."""

BINDINGS: dict[str, Callable[[int], CudaDriver]] = {
    cuda_python_backend.NAME: cuda_python_backend.CudaPythonDriver,
    pycuda_backend.NAME: pycuda_backend.PyCudaDriver,
}
"""In order of preference."""

_open: dict[tuple[str, int], Gpu] = {}
_lock = threading.Lock()


def open_gpu(binding: str | None = None, ordinal: int = 0) -> Gpu:
    """The GPU, through one binding. The same object for the same arguments, for the life of the process.

    Args:
        binding: ``cuda-python`` or ``pycuda``. Default: what ``CDKD_EDGE_CUDA_BINDING`` names, else the first of
            them that is installed.
        ordinal: number of the device.

    Raises:
        UsageError: no such binding.
        MissingExtraError: it, or either of them, is not installed.
        EngineError: there is no driver or no GPU.
    """
    named = binding or os.environ.get(VARIABLE) or None
    if named is not None and named not in BINDINGS:
        source = "" if binding else f" ({VARIABLE})"
        raise UsageError(f"no CUDA binding is called {named!r}{source}; there are {' and '.join(BINDINGS)}")
    failures = []
    for name in (named,) if named else BINDINGS:
        try:
            with _lock:
                if (name, ordinal) not in _open:
                    _open[name, ordinal] = Gpu(BINDINGS[name](ordinal))
                return _open[name, ordinal]
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # installed, but not for this CUDA or Python
            failures.append(f"{name} cannot be imported: {' '.join(str(error).split())[:200]}")
    if failures:
        raise EngineError("; ".join(failures), hint="install it for this Python and this CUDA again")
    raise MissingExtraError(named or "cuda-python or pycuda", "jetson" if named == "pycuda" else "gpu", "a GPU engine")
