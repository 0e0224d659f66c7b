"""The TensorRT and the GPU of this machine, and whether an engine fits them.

NVIDIA's ``tensorrt`` (10.3 to 11.x) and TensorRT-RTX have the same Python API with small differences. Where one
matters, the code asks for the attribute (``hasattr``) and does not compare versions.

TensorRT-RTX is either ``tensorrt_rtx``, with its libraries, or the bindings alone (``tensorrt_rtx_bindings``). The
libraries of the latter are taken from ONNX Runtime's plug-in for TensorRT-RTX, without importing that.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.core.output_kinds import build_options

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"  # the two kinds; an engine of one does not load in the other

_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_MODULES = (("tensorrt", TENSORRT), ("tensorrt_rtx", TENSORRT_RTX), ("tensorrt_rtx_bindings", TENSORRT_RTX))
_INSTALL = (
    "on a Jetson TensorRT comes with JetPack: apt install python3-libnvinfer, and a virtual environment made with "
    "--system-site-packages; on a desktop: pip install tensorrt"
)

# CUdevice_attribute and CUresult in cuda.h.
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

LogSink = Callable[[str, str], None]
"""Called with a severity (``error``, ``warning``, ``info``, ``verbose``) and a text, perhaps from other threads."""
LogTo = Callable[[LogSink], AbstractContextManager[None]]  # as :func:`log_to`


# --- TensorRT -------------------------------------------------------------------------------------


class TensorRTMissingError(EngineError):
    """There is no TensorRT in this Python."""

    def __init__(self, reason: str = "TensorRT is not installed in this Python") -> None:
        super().__init__(reason, hint=_INSTALL)


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT that was imported."""

    module: Any  # ``tensorrt``, or the module of TensorRT-RTX
    kind: str  # ``tensorrt`` or ``tensorrt-rtx``
    version: str

    @property
    def name(self) -> str:
        """For messages, e.g. ``TensorRT 10.3.0``."""
        return f"{'TensorRT' if self.kind == TENSORRT else 'TensorRT-RTX'} {self.version}"

    @property
    def logger(self) -> Any:
        """The logger for builders and runtimes; :func:`log_to` says where its lines go."""
        return _process_logger(self.module)


def tensorrt_is_installed() -> bool:
    """Whether :func:`find_tensorrt` would find something to import. Imports nothing."""
    return any(_is_there(name) for name in ("tensorrt", "tensorrt_rtx")) or _bindings_are_there()


def find_tensorrt() -> TensorRT:
    """Import TensorRT, or TensorRT-RTX if there is no TensorRT.

    Raises:
        TensorRTMissingError: neither is installed, or what is installed cannot be loaded.
    """
    failures = []
    for name, kind in _MODULES:
        bindings_alone = name == "tensorrt_rtx_bindings"
        if not _is_there(name) or (bindings_alone and not _bindings_are_there()):
            continue
        try:
            if bindings_alone:
                _load_rtx_libraries()
            module = import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())[:200]}")
            continue
        if hasattr(module, "Builder"):  # not type stubs, nor another package of that name
            return TensorRT(module, kind, str(module.__version__))
    if failures:
        raise TensorRTMissingError(f"TensorRT is installed but cannot be imported ({'; '.join(failures)})")
    raise TensorRTMissingError


@contextlib.contextmanager
def log_to(sink: LogSink) -> Iterator[None]:
    """Send the lines of TensorRT's log to ``sink`` while the block runs.

    TensorRT keeps the first logger it is given for the whole process, so there is one logger, and its target changes.
    """
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


class ErrorLog:
    """Keeps the last errors that TensorRT logged inside ``with``: its functions return no reasons. Reusable."""

    def __init__(self, log_to: LogTo | None) -> None:
        self._log_to = log_to
        self._errors: list[str] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ErrorLog:
        self._errors.clear()
        if self._log_to is not None:
            self._stack.enter_context(self._log_to(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keep(self, severity: str, text: str) -> None:
        if severity == "error":
            del self._errors[:-1]
            self._errors.append(" ".join(text.split())[:300])

    def reason(self) -> str:
        """``: what it said``, for the end of a message; empty if it said nothing."""
        return f": {'; '.join(self._errors)}" if self._errors else ""


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
    """Whether a package can be imported. Type stubs leave a folder without code, which cannot."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _bindings_are_there() -> bool:
    return _is_there("tensorrt_rtx_bindings") and (_is_there("tensorrt_rtx_libs") or _rtx_folder() is not None)


def _rtx_folder() -> Path | None:
    spec = find_spec(_RTX_LIBRARIES)  # found without importing: the plug-in must not register with ONNX Runtime here
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _load_rtx_libraries() -> None:
    """Load the plug-in's libraries for the bindings, which search no path."""
    folder = _rtx_folder()
    if _is_there("tensorrt_rtx_libs") or folder is None:
        return
    for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        candidates = sorted(folder.glob(f"{stem}.so*"), key=_so_version, reverse=True)
        if not candidates:
            raise ImportError(f"no {stem}.so in {_RTX_LIBRARIES}")
        ctypes.CDLL(str(candidates[0]), ctypes.RTLD_GLOBAL)


def _so_version(path: Path) -> tuple[int, ...]:
    """The version in a library's file name; the longest is the file itself, the others are links to it."""
    return tuple(int(part) for part in re.findall(r"\d+", path.name.partition(".so")[2]))


# --- the GPU, asked of the CUDA driver: needs no CUDA package and no torch ------------------------


@dataclass(frozen=True)
class GpuInfo:
    """What an engine is built for."""

    name: str
    compute_capability: str  # e.g. ``8.7``.
    integrated: bool  # whether it shares the CPU's memory, as on a Jetson
    multiprocessors: int
    memory_bytes: int
    cuda: str  # CUDA version of the driver, e.g. ``12.6``.


@dataclass(frozen=True)
class NoGpu:
    """Why there is no GPU to use."""

    reason: str


def find_gpu(ordinal: int = 0) -> GpuInfo | NoGpu:
    """The GPU that TensorRT would use, or why there is none. Makes no CUDA context."""
    driver = _driver()
    if isinstance(driver, NoGpu):
        return driver
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value <= ordinal:
        return NoGpu("the CUDA driver sees no GPU")
    device, name, memory, version = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    values = [_attribute(driver, device, number) for number in (_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS)]
    if failed or None in values:
        return NoGpu("the CUDA driver does not describe its GPU")
    major, minor, integrated, multiprocessors = (int(value or 0) for value in values)
    return GpuInfo(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        integrated=bool(integrated),
        multiprocessors=multiprocessors,
        memory_bytes=memory.value,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def free_gpu_memory(ordinal: int = 0) -> int | None:
    """Bytes free on a GPU now; None if the driver does not say. Uses the primary context, then releases it."""
    driver = _driver()
    if isinstance(driver, NoGpu):
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver() -> Any:
    """The driver's library, initialised, or :class:`NoGpu`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NoGpu("there is no CUDA driver")
    code = driver.cuInit(0)
    if code == _NO_DEVICE:  # also if CUDA_VISIBLE_DEVICES hides them
        return NoGpu("the CUDA driver sees no GPU")
    return NoGpu(f"the CUDA driver does not start (cuInit: {code})") if code else driver


def _attribute(driver: Any, device: ctypes.c_int, number: int) -> int | None:
    value = ctypes.c_int()
    return None if driver.cuDeviceGetAttribute(ctypes.byref(value), number, device) else value.value


# --- does an engine fit? --------------------------------------------------------------------------


def require_loadable(manifest: EngineManifest, api: TensorRT, device: GpuInfo | NoGpu) -> None:
    """Make sure that an engine was built by this TensorRT for this GPU, before TensorRT is given the file.

    Engines are portable neither across TensorRT releases nor across GPU models. TensorRT answers to a foreign engine
    with anything from a log line about a "magic tag" to a crash.

    Args:
        manifest: of the engine, checked against its file.
        api: the TensorRT here.
        device: the GPU here.

    Raises:
        ManifestError: the manifest does not say what built the engine.
        EngineError: another TensorRT, or another GPU; says which, and what builds it here.
    """
    name, build = manifest.artefact.file, manifest.tensorrt
    if build is None:
        raise ManifestError(f"the manifest of {name} does not say which TensorRT built it", hint=rebuild_hint(manifest))
    if isinstance(device, NoGpu):
        raise EngineError(
            f"{name} is a TensorRT engine and {device.reason}",
            hint="here the CPU engine runs: cdkd-edge build --runtime cpu",
        )
    differences = []
    if (manifest.runtime, build.version) != (api.kind, api.version):
        built_by = TensorRT(None, manifest.runtime, build.version)
        differences.append(f"it was built by {built_by.name}, here is {api.name}")
    if build.targets:
        if device.compute_capability not in build.targets:
            differences.append(
                f"it was compiled for compute capability {', '.join(build.targets)}, "
                f"the {device.name} here has {device.compute_capability}"
            )
    elif (build.gpu, build.compute_capability) != (device.name, device.compute_capability):
        differences.append(
            f"it was built on {build.gpu} (compute capability {build.compute_capability}), "
            f"here is {device.name} ({device.compute_capability})"
        )
    if differences:
        raise EngineError(f"{name} does not fit: {'; '.join(differences)}", hint=rebuild_hint(manifest))


def rebuild_hint(manifest: EngineManifest) -> str:
    """The command that builds the engine again."""
    options = build_options(manifest.precision, manifest.output)
    return f"build it again here from {manifest.graph.file}: cdkd-edge build {options} --runtime tensorrt"
