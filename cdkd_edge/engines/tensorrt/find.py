"""The TensorRT and the GPU of this machine, and whether an engine fits them.

NVIDIA's ``tensorrt`` (10.3 to 11.x) and TensorRT-RTX have the same Python API with small differences. Where one
matters, the code asks for the attribute (``hasattr``) and does not compare versions. TensorRT-RTX is ``tensorrt_rtx``
with its libraries, or the bindings alone (``tensorrt_rtx_bindings``) with the libraries of ONNX Runtime's plug-in for
TensorRT-RTX, which is not imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.machine import jetson_module
from cdkd_edge.core.manifest import EngineManifest, TensorRTBuild, build_options

if TYPE_CHECKING:
    import tensorrt as trt

    from cdkd_edge.engines.protocol import Log

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"  # the two kinds; an engine of one does not load in the other

_RTX_BINDINGS, _RTX_LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
_MODULES = {"tensorrt": TENSORRT, "tensorrt_rtx": TENSORRT_RTX, _RTX_BINDINGS: TENSORRT_RTX}
_INSTALL = (
    "on a Jetson TensorRT comes with JetPack: apt install python3-libnvinfer, and a virtual environment made with "
    "--system-site-packages; on a desktop: pip install tensorrt"
)

# CUdevice_attribute and CUresult in cuda.h.
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


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


def scratch_bytes(engine: trt.ICudaEngine) -> int:
    """Scratch memory of a loaded engine. TensorRT 10 renamed what it is called, 11 dropped the first name."""
    size: Any = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", 0)
    return int(size)


def tensorrt_is_installed() -> bool:
    """Whether :func:`find_tensorrt` would find something to import. Imports nothing."""
    return any(map(_is_there, _MODULES))


def find_tensorrt() -> TensorRT:
    """Import TensorRT, or TensorRT-RTX if there is no TensorRT.

    Raises:
        TensorRTMissingError: neither is installed, or what is installed cannot be loaded.
    """
    failures = []
    for name in filter(_is_there, _MODULES):
        try:
            if name == _RTX_BINDINGS:
                _load_rtx_libraries()
            module = import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())[:200]}")
            continue
        if hasattr(module, "Builder"):  # not type stubs, nor another package of that name
            return TensorRT(module, _MODULES[name], str(module.__version__))
    if failures:
        raise TensorRTMissingError(f"TensorRT is installed but cannot be imported ({'; '.join(failures)})")
    raise TensorRTMissingError


def _is_there(name: str) -> bool:
    """Whether a module can be imported; the bindings of TensorRT-RTX need libraries as well."""
    if name == _RTX_BINDINGS and not (_origin("tensorrt_rtx_libs") or _origin(_RTX_LIBRARIES)):
        return False
    return _origin(name) is not None


def _origin(name: str) -> Path | None:
    """The file of a module, found without importing it. Type stubs leave a folder without one."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _load_rtx_libraries() -> None:
    """Load the plug-in's libraries for the bindings, which search no path."""
    plugin = _origin(_RTX_LIBRARIES)
    if plugin is None or _origin("tensorrt_rtx_libs"):
        return
    for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        found = [*plugin.parent.glob(f"{stem}.so*")]
        if not found:
            raise ImportError(f"no {stem}.so in {_RTX_LIBRARIES}")
        # The newest; of one version the longest name is the file itself, the others are links to it.
        ctypes.CDLL(str(max(found, key=lambda path: [*map(int, re.findall(r"\d+", path.name))])), ctypes.RTLD_GLOBAL)


# --- its log --------------------------------------------------------------------------------------

_sink: Log | None = None
_logger: Any = None


@contextlib.contextmanager
def log_to(sink: Log) -> Iterator[None]:
    """Send the lines of TensorRT's log to ``sink`` while the block runs.

    TensorRT keeps the first logger it is given for the whole process, so there is one logger, and its target changes.
    """
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


class Errors(list[str]):
    """Errors of TensorRT. As text the last two of them, ``: what; it said``, for the end of a message."""

    def __str__(self) -> str:
        return f": {'; '.join(self[-2:])}" if self else ""


@contextlib.contextmanager
def errors_said() -> Iterator[Errors]:
    """The errors that TensorRT logs while the block runs: its functions return no reasons."""
    errors = Errors()

    def keep(severity: str, text: str) -> None:
        if severity == "error":
            errors.append(" ".join(text.split())[:300])

    with log_to(keep):
        yield errors


def _process_logger(trt: Any) -> Any:
    global _logger
    if _logger is None:
        members = trt.ILogger.Severity.__members__
        severities = {int(member): name.lower().replace("internal_", "") for name, member in members.items()}

        class Forwarding(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if _sink is not None:
                    _sink(severities[int(severity)], message)

        _logger = Forwarding()
    return _logger


# --- the GPU, asked of the CUDA driver: needs no CUDA package and no torch ------------------------


@dataclass(frozen=True)
class GpuInfo:
    """What an engine is built for."""

    name: str
    compute_capability: str  # e.g. ``8.7``
    integrated: bool  # whether it shares the CPU's memory, as on a Jetson
    multiprocessors: int  # that are on: some power modes of a Jetson turn half of them off
    memory_bytes: int
    cuda: str  # CUDA version of the driver, e.g. ``12.6``
    module: str | None = None  # part number of a Jetson's module: see :func:`cdkd_edge.core.machine.jetson_module`


@dataclass(frozen=True)
class NoGpu:
    """Why there is no GPU to use."""

    reason: str


def find_gpu() -> GpuInfo | NoGpu:
    """The GPU that TensorRT would use, or why there is none. Makes no CUDA context."""
    driver = _driver()
    if isinstance(driver, NoGpu):
        return driver
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return NoGpu("the CUDA driver sees no GPU")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    attributes = {number: ctypes.c_int() for number in (_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS)}
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
        or any(driver.cuDeviceGetAttribute(ctypes.byref(into), number, device) for number, into in attributes.items())
    )
    if failed:
        return NoGpu("the CUDA driver does not describe its GPU")
    return GpuInfo(
        name=name.value.decode(errors="replace").removesuffix(" (nvgpu)"),  # NVML adds that since JetPack 7.2.1
        compute_capability=f"{attributes[_MAJOR].value}.{attributes[_MINOR].value}",
        integrated=bool(attributes[_INTEGRATED].value),
        multiprocessors=attributes[_MULTIPROCESSORS].value,
        memory_bytes=memory.value,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        module=jetson_module(),
    )


def free_gpu_memory() -> int | None:
    """Bytes free on the GPU now; None if the driver does not say. Uses the primary context, then releases it."""
    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if isinstance(driver, NoGpu) or driver.cuDeviceGet(ctypes.byref(device), 0):
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


# --- does an engine fit? --------------------------------------------------------------------------


def require_loadable(manifest: EngineManifest, api: TensorRT, device: GpuInfo | NoGpu) -> str | None:
    """Make sure that an engine was built by this TensorRT for this GPU, before TensorRT is given the file.

    Engines are portable neither across TensorRT releases nor across GPU models. TensorRT answers to a foreign engine
    with anything from a log line about a "magic tag" to a crash. Where the number of multiprocessors alone differs it
    only warns ("Compatibility Checks" of NVIDIA's TensorRT Developer Guide), and so does this function if the board is
    known to be the same: its power modes turn multiprocessors off.

    Args:
        manifest: of the engine, checked against its file.
        api: the TensorRT here.
        device: the GPU here.

    Returns:
        A warning if the engine runs here and may be slow; else None.

    Raises:
        ManifestError: the manifest does not say what built the engine.
        EngineError: another TensorRT, or another GPU or board; says which, and what builds it here.
    """
    name, build = manifest.artefact.file, manifest.tensorrt
    if build is None:
        raise ManifestError(f"the manifest of {name} does not say which TensorRT built it", hint=rebuild_hint(manifest))
    if isinstance(device, NoGpu):
        raise EngineError(
            f"{name} is a TensorRT engine and {device.reason}",
            hint="here the CPU engine runs: cdkd-edge build --runtime cpu",
        )
    differences, hint = [], rebuild_hint(manifest)
    if (manifest.runtime, build.version) != (api.kind, api.version):
        built_by = TensorRT(None, manifest.runtime, build.version)
        differences.append(f"it was built by {built_by.name}, here is {api.name}")
    if build.targets:
        if device.compute_capability not in build.targets:
            differences.append(
                f"it was compiled for compute capability {', '.join(build.targets)}, "
                f"the {device.name} here has {device.compute_capability}"
            )
    elif build.compute_capability != device.compute_capability or (build.gpu != device.name and not build.portable):
        differences.append(
            f"it was built on {build.gpu} (compute capability {build.compute_capability}), "
            f"here is {device.name} ({device.compute_capability})"
        )
    elif not build.portable and (difference := _other_board(build, device)):
        differences.append(difference)
        hint += f"; one engine for all with compute capability {device.compute_capability}: --portable"
    if differences:
        raise EngineError(f"{name} does not fit: {'; '.join(differences)}", hint=hint)
    return None if build.targets or build.portable else _other_setting(build, device)


def _other_board(build: TensorRTBuild, device: GpuInfo) -> str | None:
    """How the board an engine was built on differs from this one, whose GPU has the same name; None if it does not.

    Every Orin module, from the Nano with 4 multiprocessors to the AGX with 16, calls its GPU ``Orin``.
    """
    if build.module and device.module:
        if build.module == device.module:
            return None
        return f"it was built on the module {build.module} ({build.board}), here is {device.module}"
    if build.multiprocessors in (None, device.multiprocessors):
        return None
    return (
        f"it was built for {build.multiprocessors} multiprocessors, here are {device.multiprocessors}, "
        "and whether this is the same module in another power mode is not known"
    )


def _other_setting(build: TensorRTBuild, device: GpuInfo) -> str | None:
    """A warning if other multiprocessors are on than when an engine was built; None if they are the same."""
    if build.multiprocessors is None:
        return "the engine's manifest does not say for which module and how many multiprocessors it was built"
    if build.multiprocessors == device.multiprocessors:
        return None
    mode = f" (power mode {build.power_mode})" if build.power_mode else ""
    return (
        f"the engine was built with {build.multiprocessors} multiprocessors{mode}, and {device.multiprocessors} are on "
        "now: its kernels were chosen for the former; build it again in this mode, or go back to that one"
    )


def rebuild_hint(manifest: EngineManifest) -> str:
    """The command that builds the engine again."""
    options = build_options(manifest.precision, manifest.output)
    return f"build it again here from {manifest.graph.file}: cdkd-edge build {options} --runtime tensorrt"
