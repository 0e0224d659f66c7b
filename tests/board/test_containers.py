"""What a container knows of its board, an Orin NX, with and without the mounts that the doctor names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from board import make_tree, write

from cdkd_edge.benchmark.roofline.devices import default_device
from cdkd_edge.board.conditions import ConditionsReader
from cdkd_edge.board.doctor import MOUNTS, Diagnosis, User, examine
from cdkd_edge.board.jetson import PowerMode, describe_board, is_jetson
from cdkd_edge.board.software import FAIL, OK, WARN, Software

CONFIG = """\
< POWER_MODEL ID=0 NAME=MAXN_SUPER >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ -1
< POWER_MODEL ID=3 NAME=25W >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ 408000000
"""
Container = Callable[..., Path]


@pytest.fixture
def container(tmp_path: Path) -> Container:
    """Make the file tree of a container on an Orin NX, for options of ``docker run``."""
    board = tmp_path / "board"
    make_tree(board / "sys")
    for name, text in (
        ("sys/firmware/devicetree/base/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super\0"),
        ("sys/firmware/devicetree/base/compatible", "nvidia,p3768-0000+p3767-0000-super\0nvidia,tegra234\0"),
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"),
        ("etc/nvpmodel.conf", CONFIG),
        ("var/lib/nvpmodel/status", "pmode:0000 fmode:quiet"),
        ("run/jtop.sock", ""),
    ):
        write(board / name, text)

    def start(options: str = "") -> Path:
        root = tmp_path / f"container {len(list(tmp_path.iterdir()))}"
        shutil.copytree(board / "sys", root / "sys", symlinks=True)
        shutil.rmtree(root / "sys/firmware")  # one of Docker's masked paths
        write(root / "proc/sys/kernel/osrelease", "5.15.148-tegra")
        write(root / "proc/meminfo", "MemTotal: 16071120 kB\nMemAvailable: 12000000 kB")
        write(root / "etc/group", "root:x:0:")
        for source, target in re.findall(r"-v (/[^:]+):(/[^: ]+)", options):
            place = root / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (board / source.lstrip("/")).is_dir() else shutil.copy
            copy(board / source.lstrip("/"), place)
        return root

    return start


def ask(root: Path, *groups: int) -> Diagnosis:
    software = Software("3.10.12", {"jetson-stats": "4.3.2"}, jtop={"version": "4.3.2", "rail": "VDD_IN"})
    return examine(root, root=root, software=software, user=User("edge", 1000, frozenset(groups)))


def test_a_container_without_mounts_is_told_each_of_them(container: Container) -> None:
    root = container()
    assert is_jetson(root)
    found = {one.name: one for one in ask(root).findings}
    for name, options in MOUNTS.items():
        assert found[name].status == WARN, name
        assert f"in a container: docker run {options} ..." in (found[name].mend or ""), name
    assert found["board"].text.startswith("a Jetson of unknown model")
    board = describe_board(root)
    assert (board.jetson, board.model, board.l4t, board.power_mode) == (True, None, None, None)


def test_with_the_mounts_it_knows_its_board(container: Container) -> None:
    root = container(" ".join(MOUNTS.values()))
    found = {one.name: one for one in ask(root, (root / "run/jtop.sock").stat().st_gid).findings}
    for name in (*MOUNTS, "jtop group", "throttling"):
        assert found[name].status == OK, found[name]
    assert found["board"].text == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super"
    assert found["JetPack"].text == "Jetson Linux R36.4.3, of JetPack 6"
    assert found["power mode"].text == "MAXN_SUPER (id 0), 8 multiprocessors"
    board = describe_board(root)
    assert (board.l4t, board.power_mode) == ("R36.4.3", PowerMode(0, "MAXN_SUPER"))
    assert default_device(root).name == "orin-nx-16gb"


def test_each_mount_mends_its_line_alone(container: Container) -> None:
    for name, options in MOUNTS.items():
        fine = {one.name for one in ask(container(options)).findings if one.status == OK}
        assert fine & set(MOUNTS) == {name}


def test_throttling_is_seen_without_any_mount(container: Container) -> None:
    root = container()
    reader = ConditionsReader(root)
    assert reader.read().throttle_events == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert reader.read().power_mode is None
    write(root / "sys/class/hwmon/hwmon4/oc3_event_cnt", 7)
    assert reader.read().throttle_events["oc3"] == 7
    shutil.rmtree(root / "sys/class/hwmon/hwmon4")
    (found,) = (one for one in ask(root).findings if one.name == "throttling")
    assert (found.status, found.data["counters"]) == (WARN, [])


def test_a_socket_of_a_group_that_the_container_was_not_given(container: Container) -> None:
    root = container(MOUNTS["jtop service"])
    (found,) = (one for one in ask(root).findings if one.name == "jtop group")
    assert found.status == WARN
    assert f"docker run --group-add {(root / 'run/jtop.sock').stat().st_gid} ..." in (found.mend or "")


@pytest.mark.parametrize(("kernel", "jetson"), [("6.8.12-1021-tegra", True), ("6.8.0-60-generic", False)])
def test_the_kernel_tells_a_jetson_whose_gpu_has_another_name(tmp_path: Path, kernel: str, jetson: bool) -> None:
    write(tmp_path / "proc/sys/kernel/osrelease", kernel)
    assert is_jetson(tmp_path) is jetson
    assert (FAIL in [one.status for one in ask(tmp_path).findings if one.name == "GPU"]) is jetson
