"""Every name of TensorRT that builder, runner and profiler use is in TensorRT 10.3, 10.16 and 11.4.

NVIDIA's Python bindings of each are on PyPI, without the libraries they bind. With stand-ins for the nine functions
that they take from those, they can be imported, and are asked. The names are read from our source.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_names
from tensorrt_helpers import compiler_missing, needs_compiler

from cdkd_edge.engines import tensorrt

SOURCE = Path(tensorrt.__file__).parent
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")  # JetPack 6's, the nearest to JetPack 7.2's 10.16.2.10, the newest
LIBRARIES = [f"lib{name}.so.{major}" for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser") for major in (10, 11)]
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for each library; its functions return nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stand-ins of TensorRT's libraries")
    folder = tmp_path_factory.mktemp("stand-ins")
    code = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    (folder / "stub.c").write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "stub.so", "stub.c"], cwd=folder, check=True)
    for name in LIBRARIES:
        (folder / name).symlink_to("stub.so")
    return folder


Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def ask(libraries: Path, request: pytest.FixtureRequest) -> Ask:
    """``ask(version, source=SOURCE)``: what :mod:`tensorrt_names` finds; skips where the wheel cannot be had."""
    assert request.config.cache is not None
    cached = request.config.cache.mkdir("tensorrt-bindings")

    @functools.cache
    def bindings(version: str) -> Path | str:
        """The unpacked wheel, or why there is none. It is downloaded once, and kept in pytest's cache."""
        folder = cached / f"{version}-{sys.implementation.cache_tag}"
        if folder.is_dir():
            return folder
        part = Path(tempfile.mkdtemp(dir=cached))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries", "0", "--timeout", "10", "--dest", part, f"tensorrt-cu12-bindings=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for wheel in part.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)
            with contextlib.suppress(OSError):  # another process of the tests was first
                part.rename(folder)
            return folder
        shutil.rmtree(part)
        said = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        return f"no bindings of TensorRT {version} for this Python, or no package index: {said}"

    def ask(version: str, source: Path = SOURCE) -> dict[str, Any]:
        found = bindings(version)
        if isinstance(found, str):
            pytest.skip(found)
        return answer("tensorrt_bindings", source, {"PYTHONPATH": str(found), "LD_LIBRARY_PATH": str(libraries)})

    return ask


def answer(module: str, source: Path, paths: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, tensorrt_names.__file__, module, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths}, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_is_there(version: str, ask: Ask) -> None:
    found = ask(version)
    assert version.startswith(found["version"])
    assert found["missing"] == []
    assert found["unclear"] == [], "say in an annotation what this is (`trt.IBuilderConfig`), so that it is looked up"
    with_tensorrt = {path.name for path in SOURCE.glob("*.py") if ".module." in path.read_text()}
    assert {name for name, used in found["used"].items() if used} >= with_tensorrt


@needs_compiler
def test_every_name_is_in_tensorrt_rtx() -> None:
    found = answer("tensorrt-rtx", SOURCE, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert (found["missing"], found["unclear"]) == ([], [])


def test_a_name_that_is_asked_for_is_in_some_tensorrt(ask: Ask) -> None:
    """With ``hasattr``; one that none of them has is a slip of the pen, and its branch would never run."""
    if why := compiler_missing():
        pytest.skip(f"some names are TensorRT-RTX's alone: {why}")
    rtx = answer("tensorrt-rtx", SOURCE, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    there: Counter[str] = Counter()
    for found in (rtx, *map(ask, VERSIONS)):
        there.update({name: int(has) for name, has in found["asked"].items()})
    assert [name for name, times in there.items() if not times] == []
    assert there["ICudaEngine.device_memory_size"] < there["ICudaEngine.device_memory_size_v2"]


SLIPS = {
    "a method": ("compile.py", "builder.create_builder_config()", "builder.create_build_config()"),
    "a method of what a method returned": ("compile.py", ".get_engine_information(", ".get_engine_info("),
    "a property that is set": ("compile.py", "config.progress_monitor =", "config.progress_watcher ="),
    "a member of an enumeration": ("compile.py", "MemoryPoolType.WORKSPACE", "MemoryPoolType.WORK_SPACE"),
    "an enumeration": ("compile.py", "module.ProfilingVerbosity", "module.Verbosity"),
    "a method that TensorRT calls": ("compile.py", "def step_complete(", "def step_completed("),
    "a name of another TensorRT": ("compile.py", "if cache:\n", "if config.set_compute_capability:\n"),
    "an object that an annotation names": ("options.py", "ours.serialize()", "ours.serialise()"),
    "an object that an attribute holds": ("runner.py", ".execute_async_v3(", ".execute_async("),
    "an object that is not recognised": ("compile.py", "builder: trt.Builder = api.module.Builder", "builder = make"),
}


@pytest.mark.parametrize("what", SLIPS)
def test_a_name_that_is_wrong_is_found(what: str, ask: Ask, tmp_path: Path) -> None:
    file, right, wrong = SLIPS[what]
    source = shutil.copytree(SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    text = (source / file).read_text()
    assert right in text
    (source / file).write_text(text.replace(right, wrong))
    found = ask(VERSIONS[1], source)
    assert len(found["missing"]) + len(found["unclear"]) > 0
