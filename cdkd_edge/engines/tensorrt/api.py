"""Whichever TensorRT is here: NVIDIA's ``tensorrt`` (10.3 ... 11.x), or TensorRT-RTX.

Both have the same Python API but for details, which are told apart where they matter by asking for the
attribute (``hasattr``), never by comparing versions.

TensorRT-RTX comes as ``tensorrt_rtx`` with its libraries, or as the bindings alone (``tensorrt_rtx_bindings``);
then the libraries are taken from ONNX Runtime's TensorRT-RTX plug-in, without importing that.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import EngineError

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
"""The two kinds; engines of one do not load in the other."""

_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_HINT = (
    "on a Jetson TensorRT comes with JetPack: apt install python3-libnvinfer, and a virtual environment made with "
    "--system-site-packages; on a desktop `pip install tensorrt` takes the libraries from NVIDIA's own index"
)

LogSink = Callable[[str, str], None]
"""Called with a severity (``error``, ``warning``, ``info``, ``verbose``) and a text, perhaps from other threads."""


class TensorRTMissingError(EngineError):
    """There is no TensorRT in this Python."""

    def __init__(self, reason: str = "TensorRT is not installed in this Python") -> None:
        super().__init__(reason, hint=_HINT)


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT that was found and imported."""

    module: Any
    """``tensorrt``, or the module of TensorRT-RTX."""
    kind: str
    """``tensorrt`` or ``tensorrt-rtx``."""
    version: str

    @property
    def name(self) -> str:
        """For messages, e.g. ``TensorRT 10.3.0``."""
        return f"{'TensorRT' if self.kind == TENSORRT else 'TensorRT-RTX'} {self.version}"

    @property
    def logger(self) -> Any:
        """The logger to make builders and runtimes with; see :func:`log_to` for where its lines go."""
        return _process_logger(self.module)


def tensorrt_is_installed() -> bool:
    """Whether :func:`find_tensorrt` would find something to import. Imports nothing."""
    return any(_is_there(name) for name in ("tensorrt", "tensorrt_rtx")) or _bindings_are_there()


def find_tensorrt() -> TensorRT:
    """Import TensorRT, or TensorRT-RTX where there is no TensorRT.

    Raises:
        TensorRTMissingError: there is neither, or what is there cannot be loaded.
    """
    failures = []
    for name, kind in (("tensorrt", TENSORRT), ("tensorrt_rtx", TENSORRT_RTX), ("tensorrt_rtx_bindings", TENSORRT_RTX)):
        if not _is_there(name) or (name == "tensorrt_rtx_bindings" and not _bindings_are_there()):
            continue
        try:
            if name == "tensorrt_rtx_bindings":
                _load_rtx_libraries()
            module = import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())[:200]}")
            continue
        if hasattr(module, "Builder"):  # a package of the same name, or stubs
            return TensorRT(module, kind, str(module.__version__))
    if failures:
        raise TensorRTMissingError(f"TensorRT is installed but cannot be imported ({'; '.join(failures)})")
    raise TensorRTMissingError


@contextlib.contextmanager
def log_to(sink: LogSink) -> Iterator[None]:
    """Send the lines of the process's TensorRT logger to ``sink`` while the block runs.

    TensorRT keeps the first logger that it is given for the whole process, so there is one, and what
    changes is where it writes.
    """
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


_sink: LogSink | None = None
_logger: Any = None


def _process_logger(trt: Any) -> Any:
    global _logger
    if _logger is None:
        severities = {
            int(getattr(trt.ILogger.Severity, name)): name.lower()
            for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
        }

        class Forwarding(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if _sink is not None:
                    _sink(severities[int(severity)].replace("internal_", ""), message)

        _logger = Forwarding()
    return _logger


def _is_there(name: str) -> bool:
    """Whether a package can be imported; type stubs leave a folder without code, which cannot."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _bindings_are_there() -> bool:
    return _is_there("tensorrt_rtx_bindings") and (_is_there("tensorrt_rtx_libs") or _rtx_folder() is not None)


def _rtx_folder() -> Path | None:
    spec = find_spec(_RTX_LIBRARIES)  # finds it without importing: the plug-in must not meet ONNX Runtime here
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _load_rtx_libraries() -> None:
    """Load the libraries of the plug-in for all that is loaded later; the bindings look for no path."""
    folder = _rtx_folder()
    if _is_there("tensorrt_rtx_libs") or folder is None:
        return
    for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        candidates = sorted(folder.glob(f"{stem}.so*"), key=_so_version, reverse=True)
        if not candidates:
            raise ImportError(f"no {stem}.so in {_RTX_LIBRARIES}")
        ctypes.CDLL(str(candidates[0]), ctypes.RTLD_GLOBAL)


def _so_version(path: Path) -> tuple[int, ...]:
    """The version in a library's file name; the longest is the file itself and not a link."""
    return tuple(int(part) for part in re.findall(r"\d+", path.name.partition(".so")[2]))
