"""What is installed on a board: the lock files, the install script, and a wheelhouse without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "jetpack6": ("aarch64", ["3.10"], ["jetson"]),
    "jetpack7": ("aarch64", ["3.12"], ["jetson"]),
    "x86-64": ("x86_64", ["3.10", "3.11", "3.12", "3.13"], []),
}

pytestmark = pytest.mark.skipif(not (ROOT / "locks").is_dir(), reason="not a checkout")
cases = pytest.mark.parametrize(
    ("board", "python"), [(board, python) for board, (_, pythons, _) in LOCKS.items() for python in pythons]
)


def environment(board: str, python: str) -> dict[str, str]:
    here = {name: str(value) for name, value in default_environment().items()}
    return here | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": LOCKS[board][0],
        "sys_platform": "linux",
        "platform_system": "Linux",
    }


def pins(path: Path, where: dict[str, str]) -> dict[str, str]:
    """Version of every package that a file of pins gives to a machine."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)(?: ; ([^\\]+?))?(?: \\)?$", line)
        if match and (not match[3] or Marker(match[3]).evaluate(where)):
            assert match[1] not in found, f"{path.name} names {match[1]} twice"
            found[match[1]] = match[2]
    return found


def lock(board: str) -> Path:
    return ROOT / "locks" / f"{board}.txt"


@cases
def test_a_lock_agrees_with_the_project(board: str, python: str) -> None:
    where = environment(board, python)
    locked = pins(lock(board), where)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = list(project["dependencies"])
    for extra in LOCKS[board][2]:
        asked += project["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        if not requirement.marker or requirement.marker.evaluate(where):
            assert requirement.specifier.contains(locked[requirement.name]), requirement
    for package, version in pins(ROOT / "constraints.txt", where).items():
        assert locked.get(package, version) == version, f"constraints.txt has another {package}"
    assert not {"torch", "onnxsim", "pytest"} & set(locked)


@pytest.mark.parametrize("board", LOCKS)
def test_a_lock_is_of_wheels_with_hashes(board: str) -> None:
    lines = [line for line in lock(board).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "--only-binary :all:"
    packages = [line for line in lines if re.match(r"[\w.-]+==", line)]
    assert len(packages) > 30
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line in packages:
            assert re.match(r" +--hash=sha256:[0-9a-f]{64}", following), line


def test_a_board_has_the_binding_of_its_cuda() -> None:
    """JetPack 6 has CUDA 12.6 and JetPack 7.2 has 13.2; a binding shares its first two numbers with CUDA."""
    six, seven = (pins(lock(f"jetpack{n}"), environment(f"jetpack{n}", LOCKS[f"jetpack{n}"][1][0])) for n in (6, 7))
    assert six["cuda-python"].startswith("12.6.")
    assert seven["cuda-python"].startswith("13.2.")
    assert "cuda-bindings" not in six, "12.6 is one wheel"
    assert seven["cuda-bindings"].startswith("13.2.")


@pytest.mark.slow
def test_the_locks_are_what_a_resolver_gives(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not uv:
        pytest.skip("uv is not installed here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(uv)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / ".tests").touch()
    # Without --upgrade the resolver keeps what is there, where it still fits.
    command = ["make", "--silent", "--old-file=./.tests", "locks", "VENV=.", "LOCK="]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if re.search(r"error sending request|dns error|Failed to fetch|timed out", made.stderr):
        pytest.skip("no package index can be reached from here")
    assert made.returncode == 0, made.stderr
    for board in LOCKS:
        assert (tmp_path / "locks" / f"{board}.txt").read_text() == lock(board).read_text(), "make locks"
