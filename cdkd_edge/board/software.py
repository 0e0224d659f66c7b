"""The doctor's findings about Python, packages, TensorRT and CUDA: what is installed, and whether it works.

What only an import can tell is asked in a child process, ``python -m cdkd_edge.board.software gpu``: a driver may crash
or hang, TensorRT is large, and importing jtop changes multiprocessing for the whole process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cdkd_edge.board.jetson import is_jetson, jetson_linux, read
from cdkd_edge.core.errors import printable
from cdkd_edge.core.process import child_environment, kill_session, module_command

OK, WARN, FAIL = "ok", "warn", "fail"
"""``warn``: works, but less well or less measurably. ``fail``: something that is needed here does not work."""

NEEDED: Mapping[str, tuple[int, ...]] = {
    "msgspec": (0, 18), "numpy": (1, 26), "onnx": (1, 17), "onnxruntime": (1, 22), "pillow": (10, 1),
    "rasterio": (1, 4, 4), "rich": (13, 8), "typer": (0, 29),
}  # fmt: skip
"""Lowest versions, as in pyproject.toml."""
_OPTIONAL = ("torch", "jetson-stats", "cuda-python", "cuda-bindings", "pycuda", "onnxruntime-gpu", "openvino")
_OPENVINO = (2024, 4)
_LEAST_TENSORRT = (10, 3)
_SBSA = 38  # first Jetson Linux that takes TensorRT's packages for servers (SBSA)
_LEAST_SBSA = (10, 16)
"""First of these packages with kernels for Orin; 10.13 says "Target GPU SM 87 is not supported by this TensorRT
release" (https://github.com/NVIDIA-ISAAC-ROS/isaac-ros-cli/issues/22)."""
_DLA_COMPILER = "libnvdla_compiler.so"
"""What TensorRT of JetPack 6 is linked against. There it is a package of its own
(https://github.com/4paradigm/phanthymotus/pull/154); JetPack 7.2 has none
(https://github.com/Jonah-May-OSS/wyoming-whisper-trt/issues/1038)."""
_SYSTEM_PYTHON = {36: "3.10", 38: "3.12", 39: "3.12"}  # that JetPack's TensorRT is compiled for, by Jetson Linux
_SILENT, _CRASHED = "no answer", "the process that asked it crashed"
TIMEOUT = 30.0  # seconds in which a driver, an import or a service must answer


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    status: str  # :data:`OK`, :data:`WARN` or :data:`FAIL`
    text: str
    mend: str | None = None  # the command that repairs it
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Software:
    """What this Python has, from the packages' metadata and from child processes."""

    python: str
    packages: Mapping[str, str | None]  # versions; None where a package is not installed
    # Answers to :data:`QUESTIONS`, with ``error`` where something does not work:
    gpu: Mapping[str, Any] = field(default_factory=dict)
    tensorrt: Mapping[str, Any] = field(default_factory=dict)
    cuda: Mapping[str, Any] = field(default_factory=dict)
    openvino: Mapping[str, Any] = field(default_factory=dict)
    jtop: Mapping[str, Any] = field(default_factory=dict)
    nvpmodel: str | None = None  # answer of ``nvpmodel -q``; None if it gave none

    @property
    def has_gpu(self) -> bool:
        """Whether the CUDA driver sees a GPU."""
        return bool(self.gpu) and "error" not in self.gpu


def read_software(*, ask_jtop: bool, timeout: float = TIMEOUT) -> Software:
    """Find out what this Python has, without importing it here; ``ask_jtop``: also connect to the jtop service."""
    questions = ["gpu", "tensorrt", "cuda", "openvino", *(["jtop"] if ask_jtop else [])]
    commands = {name: module_command("cdkd_edge.board.software", name) for name in questions}
    nvpmodel = shutil.which("nvpmodel")
    if nvpmodel:
        commands["nvpmodel"] = (nvpmodel, "-q")
    said = _run_all(commands, timeout)
    answers = {name: _answer(said[name], timeout) for name in questions}
    return Software(
        python=".".join(map(str, sys.version_info[:3])),
        packages={name: _version(name) for name in (*NEEDED, *_OPTIONAL)},
        **answers,
        nvpmodel=said.get("nvpmodel"),
    )


def examine_software(root: Path, software: Software) -> tuple[Finding, ...]:
    """What this module can say."""
    return (
        probe_python(root, software),
        probe_packages(software),
        probe_gpu(root, software),
        probe_cuda(root, software),
        probe_tensorrt(root, software),
        probe_binding(software),
        probe_openvino(software),
    )


def numbers(version: str, count: int) -> tuple[int, ...]:
    """The first numbers of a version, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:count])


def probe_python(root: Path, software: Software) -> Finding:
    """Python; on a Jetson it must be the one that JetPack's TensorRT is compiled for."""
    own = numbers(software.python, 2)
    data = {"version": software.python, "executable": sys.executable}
    if own < (3, 10):
        text = f"{software.python}: 3.10 or newer is needed"
        return Finding("Python", FAIL, text, "sudo apt install python3.10", data)
    release = jetson_linux(root)
    wanted = _SYSTEM_PYTHON.get(release[0]) if release else None
    if wanted and ".".join(map(str, own)) != wanted:
        text = f"{software.python}, but JetPack's TensorRT is compiled for {wanted}"
        return Finding("Python", WARN, text, f"python{wanted} -m venv --system-site-packages .venv", data)
    return Finding("Python", OK, software.python, data=data)


def probe_packages(software: Software) -> Finding:
    """The packages that every command needs."""
    faults = []
    for name, least in NEEDED.items():
        version = software.packages.get(name)
        if version is None and name == "onnxruntime":
            version = software.packages.get("onnxruntime-gpu")
        if version is None:
            faults.append(f"{name} is missing")
        elif numbers(version, len(least)) < least:
            faults.append(f"{name} {version} is older than {'.'.join(map(str, least))}")
    data = {"versions": dict(software.packages)}
    if faults:
        return Finding("packages", FAIL, "; ".join(faults), "pip install --upgrade cdkd-edge", data)
    shown = ("onnxruntime", "onnx", "numpy", "rasterio")
    found = [f"{name} {software.packages[name]}" for name in shown if software.packages.get(name)]
    torch = software.packages.get("torch")
    return Finding("packages", OK, ", ".join([*found, f"torch {torch}" if torch else "no torch"]), data=data)


def probe_gpu(root: Path, software: Software) -> Finding:
    """The GPU, according to the CUDA driver."""
    gpu = software.gpu
    if software.has_gpu:
        kind = f"compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors"
        text = printable(f"{gpu['name']}, {kind}, {gpu['memory_bytes'] / (1 << 30):.1f} GiB")
        return Finding("GPU", OK, text, data=gpu)
    reason = str(gpu.get("error", "was not asked"))
    if is_jetson(root):
        return Finding("GPU", FAIL, reason, "in a container: docker run --runtime nvidia ...; else reboot", gpu)
    if "does not start" in reason:
        return Finding("GPU", WARN, reason, "nvidia-smi, and restart the machine after an update", gpu)
    if reason.startswith((_SILENT, _CRASHED)):  # on a machine with much to do: that says nothing about a GPU
        return Finding("GPU", WARN, f"not known: {reason}", "cdkd-edge doctor, when the machine has less to do", gpu)
    return Finding("GPU", OK, f"none ({reason}): engines run on the CPU", data=gpu)


def probe_cuda(root: Path, software: Software) -> Finding:
    """CUDA of the driver and, where it is installed, of the toolkit."""
    toolkit = _toolkit(root)
    driver = software.gpu.get("cuda")
    data = {"driver": driver, "toolkit": toolkit}
    parts = [f"driver for CUDA {driver}"] if driver else []
    parts += [f"toolkit {toolkit}"] if toolkit else []
    if driver:
        return Finding("CUDA", OK, ", ".join(parts), data=data)
    if is_jetson(root):
        text = ", ".join(["no driver that answers", *parts])
        return Finding("CUDA", FAIL, text, "sudo apt install nvidia-jetpack", data)
    return Finding("CUDA", OK, ", ".join(["no driver: not needed on the CPU", *parts]), data=data)


def probe_tensorrt(root: Path, software: Software) -> Finding:
    """TensorRT, as this Python imports it."""
    found = software.tensorrt
    release, capability = (jetson_linux(root) or (0,))[0], software.gpu.get("compute_capability")
    if "error" in found or not found:
        reason = str(found.get("error", "was not asked"))
        if is_jetson(root):
            mend = "sudo apt install python3-libnvinfer; python3 -m venv --system-site-packages .venv"
            if _DLA_COMPILER in reason:
                mend = "sudo apt install nvidia-l4t-dla-compiler"
                if release >= _SBSA:
                    reason += f": TensorRT of JetPack 6, whose {_DLA_COMPILER} JetPack 7 does not have"
                    mend = "use an image or packages made for JetPack 7"
            return Finding("TensorRT", FAIL, reason, mend, found)
        if software.has_gpu:
            return Finding("TensorRT", WARN, f"{reason}: the GPU is not used", "pip install tensorrt", found)
        return Finding("TensorRT", OK, "none: not needed on the CPU", data=found)
    least = _LEAST_SBSA if release >= _SBSA and capability == "8.7" else _LEAST_TENSORRT
    if found["kind"] == "tensorrt" and numbers(str(found["version"]), 2) < least:
        text = f"{found['name']} is older than {'.'.join(map(str, least))}"
        if least == _LEAST_SBSA:
            text += ", the first for an Orin with JetPack 7"
            return Finding("TensorRT", FAIL, text, "sudo apt install --only-upgrade python3-libnvinfer", found)
        return Finding("TensorRT", FAIL, text, "update JetPack, or pip install --upgrade tensorrt", found)
    idle = "" if software.has_gpu else ", which compiles only: there is no GPU to run on"
    return Finding("TensorRT", OK, printable(f"{found['name']}{idle}"), data=found)


def probe_binding(software: Software) -> Finding:
    """cuda-python or PyCUDA, through which engines reach the GPU's memory."""
    name = "CUDA binding"
    names = ("cuda-python", "cuda-bindings", "pycuda")
    packages = [f"{one} {version}" for one in names if (version := software.packages.get(one))]
    data = {"packages": packages, **software.cuda}
    listed = ", ".join(packages) or "neither cuda-python nor PyCUDA"
    if not software.has_gpu:
        return Finding(name, OK, f"{listed}; no GPU to use it with", data=data)
    driver = numbers(str(software.gpu.get("cuda", "")), 1)
    version = software.packages.get("cuda-bindings") or software.packages.get("cuda-python")
    newer = bool(version and driver and numbers(version, 1) > driver)
    if "error" in software.cuda or not software.cuda:
        limit = f" 'cuda-python<{driver[0] + 1}'" if driver else ""
        text, mend = f"{listed}: {software.cuda.get('error', 'was not asked')}", f"pip install 'cdkd-edge[gpu]'{limit}"
        return Finding(name, FAIL, text, mend, data)
    if newer:  # https://nvidia.github.io/cuda-python/cuda-bindings/latest/support.html
        text = f"{listed}: made for CUDA {numbers(str(version), 1)[0]}, but the driver is for CUDA {driver[0]}"
        return Finding(name, WARN, text, f"pip install 'cuda-python<{driver[0] + 1}'", data)
    return Finding(name, OK, f"{listed}, for CUDA {software.cuda.get('runtime_version')}", data=data)


def probe_openvino(software: Software) -> Finding:
    """OpenVINO, the other runtime of the CPU, and whether the CPU has BF16."""
    name, found, version = "OpenVINO", software.openvino, software.packages.get("openvino")
    if version is None:
        return Finding(name, OK, "none: engines of the CPU run in ONNX Runtime", data=found)
    mend = "pip install --upgrade 'cdkd-edge[openvino]'"
    if "error" in found or not found:
        return Finding(name, WARN, f"{version}: {found.get('error', 'was not asked')}", mend, found)
    if numbers(version, 2) < _OPENVINO:
        return Finding(name, WARN, f"{version} is older than {'.'.join(map(str, _OPENVINO))}", mend, found)
    bf16 = "with BF16" if "BF16" in found["precisions"] else "without BF16"
    return Finding(name, OK, f"{version}, on a CPU {bf16}", data=found)


def _toolkit(root: Path) -> str | None:
    text = read(root, "/usr/local/cuda/version.json").text
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return printable(str(json.loads(text or "")["cuda"]["version"]))
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, TypeError, KeyError):  # the latter: damaged metadata
        return None


def _run_all(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, str | None]:
    """Run commands side by side; what each printed, or None where one did not end in time."""
    null, pipe, environment = subprocess.DEVNULL, subprocess.PIPE, child_environment()
    running = {
        name: subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null, env=environment, start_new_session=True)
        for name, command in commands.items()
    }
    deadline = time.monotonic() + timeout
    said: dict[str, str | None] = {}
    try:
        for name, process in running.items():
            try:
                out, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                said[name] = out.decode("utf-8", errors="replace")
            except subprocess.TimeoutExpired:
                said[name] = None
    finally:
        for process in running.values():
            kill_session(process)
            if process.stdout is not None:
                process.stdout.close()
    return said


def _answer(said: str | None, timeout: float) -> dict[str, Any]:
    """The answer of a child: its last line as data. Libraries may print before it."""
    if said is None:
        return {"error": f"{_SILENT} within {timeout:.0f} s"}
    with contextlib.suppress(ValueError, IndexError):
        answer = json.loads(said.strip().splitlines()[-1])
        if isinstance(answer, dict):
            return answer
    return {"error": _CRASHED}


# --- the child process -----------------------------------------------------------------------------


def _gpu() -> dict[str, Any]:
    from cdkd_edge.engines.tensorrt.find import NoGpu, find_gpu

    found = find_gpu()
    return {"error": found.reason} if isinstance(found, NoGpu) else dataclasses.asdict(found)


def _tensorrt() -> dict[str, Any]:
    from cdkd_edge.engines.tensorrt.find import find_tensorrt

    found = find_tensorrt()
    return {"kind": found.kind, "version": found.version, "name": found.name}


def _cuda() -> dict[str, Any]:
    from cdkd_edge.engines.cuda.gpu import open_gpu

    return dataclasses.asdict(open_gpu().info)


def _openvino() -> dict[str, Any]:
    from cdkd_edge.engines.openvino import cpu_precisions

    return {"precisions": cpu_precisions()}


def _jtop() -> dict[str, Any]:
    import jtop  # type: ignore[import-not-found,unused-ignore]

    with jtop.jtop() as client:
        total = client.power.get("tot", {}) if client.ok() else {}
        return {"version": str(jtop.__version__), "rail": total.get("name")}


QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "gpu": _gpu, "tensorrt": _tensorrt, "cuda": _cuda, "openvino": _openvino, "jtop": _jtop,
}  # fmt: skip


def main() -> None:
    """The child process: print one line of JSON, the answer to the question that is the only argument."""
    try:
        answer = QUESTIONS[sys.argv[1]]()
    except Exception as error:  # whatever a driver or a service throws is the answer
        answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
