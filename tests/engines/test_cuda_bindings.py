"""The real bindings, where they are installed, making their real calls into a library that stands in for the driver.

A simulation in Python has the names and signatures that its author believed in. Here cuda-python, or PyCUDA, checks
them: the library (``simulated_libcuda.c``) is compiled for the test and is all that is not real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import cdkd_edge

HERE = Path(__file__).parents[1] / "helpers"


def installed(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """libcuda.so.1, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", path, HERE / "simulated_libcuda.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    ("binding", "modules"), [("cuda-python", ("cuda.bindings.driver", "cuda.cuda")), ("pycuda", ("pycuda._driver",))]
)
def test_a_binding_makes_the_calls(library, binding, modules):
    if not any(installed(module) for module in modules):
        pytest.skip(f"{binding} is not installed")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library.parent),
        "PYTHONPATH": os.pathsep.join([str(Path(cdkd_edge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    answer = subprocess.run(
        [sys.executable, "-W", "error", HERE / "binding_check.py", binding, library],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("ok "), answer.stdout
    assert answer.stderr == ""
