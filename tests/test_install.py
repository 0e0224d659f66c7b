"""What is installed on a board: the lock files, the install script, and a wheelhouse without a network."""

from __future__ import annotations

import hashlib
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


UNREACHED = r"error sending request|dns error|Failed to fetch|timed out|Could not find a version|NewConnectionError"


def make(folder: Path, *arguments: str) -> None:
    """A target of the Makefile with this Python's programs, on a copy of what it needs; skips without an index."""
    (folder / "bin").mkdir()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name in ("uv", "pip"):
        if program := shutil.which(name, path=programs):
            (folder / "bin" / name).symlink_to(program)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "Makefile", "install.sh"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "locks", folder / "locks")
    shutil.copytree(ROOT / "cdkd_edge", folder / "cdkd_edge", ignore=shutil.ignore_patterns("__pycache__"))
    for done in (".package", ".tests"):
        (folder / done).touch()
    command = ["make", "--silent", "--old-file=./.package", "--old-file=./.tests", "VENV=.", *arguments]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if re.search(UNREACHED, made.stderr):
        pytest.skip(f"no package index can be reached from here: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr


@pytest.mark.slow
def test_the_locks_are_what_a_resolver_gives(tmp_path: Path) -> None:
    if not shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("uv is not installed here")
    # Without --upgrade the resolver keeps what is there, where it still fits.
    make(tmp_path, "locks", "LOCK=")
    for board in LOCKS:
        assert (tmp_path / "locks" / f"{board}.txt").read_text() == lock(board).read_text(), "make locks"


def install(
    folder: Path, *arguments: object, prefix: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """install.sh of a folder, without this machine's settings of pip."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [*prefix, str(folder / "install.sh"), *map(str, arguments)],
        env={**kept, "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable, **more},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


def fake_python(folder: Path, version: str) -> str:
    """A program that says it is a Python of that version."""
    python = folder / f"python{version}"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    return str(python)


class TestScript:
    @pytest.mark.parametrize(
        ("release", "said"),
        [
            ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "jetpack6 has Python 3.10"),
            ("# R39 (release), REVISION: 2.1, GCID: 45755727, BOARD: generic", "jetpack7 has Python 3.12"),
            ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref", "Jetson Linux 35 is neither"),
        ],
    )
    def test_it_knows_a_board_by_its_release(self, release: str, said: str, tmp_path: Path) -> None:
        etc = tmp_path / "etc"
        etc.mkdir()
        (etc / "nv_tegra_release").write_text(release + "\n")
        inside = ("unshare", "--map-root-user", "--mount")
        if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("this user may not mount")
        prefix = (*inside, "sh", "-c", f'mount --bind {etc} /etc && exec "$@"', "sh")
        refused = install(ROOT, prefix=prefix, PYTHON=fake_python(tmp_path, "3.9"))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert said in refused.stderr

    def test_it_says_what_boards_there_are(self, tmp_path: Path) -> None:
        refused = install(ROOT, "orin", tmp_path / "venv")
        assert refused.returncode == 2
        assert "no board is called orin: take cpu, desktop, jetpack6 or jetpack7" in refused.stderr
        assert not (tmp_path / "venv").exists()

    def test_it_names_the_python_of_a_board(self, tmp_path: Path) -> None:
        refused = install(ROOT, "jetpack7", tmp_path / "venv", PYTHON=fake_python(tmp_path, "3.9"))
        assert refused.returncode == 2
        assert "PYTHON=python3.12 ./install.sh jetpack7" in refused.stderr


def without_network() -> tuple[tuple[str, ...], dict[str, str]]:
    """How to start a program that reaches no other machine."""
    alone = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
        return alone, {}
    return (), dict.fromkeys(("http_proxy", "https_proxy", "PIP_PROXY"), "http://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_a_wheelhouse_is_all_that_is_needed(tmp_path: Path) -> None:
    """Without a network; and it refuses a wheel that is not the one it was made with, whoever changed it."""
    make(tmp_path, "wheelhouse", "BOARD=x86-64")
    folder = tmp_path / "out" / "wheelhouse" / "x86-64"
    prefix, more = without_network()
    installed = install(folder, "cpu", "ready", prefix=prefix, **more)
    assert installed.returncode == 0, installed.stderr
    command = folder.parent / "ready" / "bin" / "cdkd-edge"
    diagnosis = subprocess.run([*prefix, command, "doctor"], capture_output=True, text=True, timeout=120)
    assert diagnosis.returncode == 0, diagnosis.stdout + diagnosis.stderr

    assert "TensorRT's libraries come from NVIDIA" in install(folder, "desktop", "no").stderr
    assert "nothing for jetpack7" in install(folder, "jetpack7", "no", PYTHON=fake_python(tmp_path, "3.12")).stderr
    assert "not for Python 3.9" in install(folder, "cpu", "no", PYTHON=fake_python(tmp_path, "3.9")).stderr

    (wheel,) = (folder / "wheels").glob("jinja2-*.whl")
    whole = bytearray(wheel.read_bytes())
    whole[len(whole) // 2] ^= 1
    wheel.write_bytes(whole)
    refused = install(folder, "cpu", "no", prefix=prefix, **more)
    assert refused.returncode == 2
    assert f"wheels/{wheel.name}: FAILED" in refused.stdout + refused.stderr
    # Even if the list of checksums was changed with it: the lock has hashes of its own.
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256(whole).hexdigest()
    (folder / "SHA256SUMS").write_text(
        "\n".join(f"{digest}  wheels/{wheel.name}" if wheel.name in line else line for line in sums) + "\n"
    )
    refused = install(folder, "cpu", "no", prefix=prefix, **more)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
