"""The doctor: every probe on trees of an Orin NX, of a desktop and of broken machines, and the command itself."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import assert_answer, finish, run, start

from cdkd_edge.board import doctor as probes
from cdkd_edge.board import software
from cdkd_edge.board.doctor import Diagnosis, User, examine
from cdkd_edge.board.jetson import GpuLimits, PowerMode, Text, default_mode, parse_modes, read
from cdkd_edge.board.software import FAIL, OK, WARN, Finding, Software
from cdkd_edge.core.errors import printable

CONF = """\
# comment
< PARAM TYPE=CLOCK NAME=GPU >
MAX_FREQ /sys/devices/17000000.ga10b/devfreq/17000000.ga10b/max_freq

< POWER_MODEL ID=0 NAME=MAXN >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ -1

< POWER_MODEL ID=2 NAME=15W >
TPC_POWER_GATING TPC_PG_MASK 252
GPU MAX_FREQ 612000000

< POWER_MODEL ID=3 NAME=25W >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ 408000000

< PM_CONFIG DEFAULT=3 >
"""
ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0",
    "etc/nvpmodel/nvpmodel_p3767_0000.conf": CONF,
    "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n",
    "var/lib/dpkg/status": "Package: a\nVersion: 9\n\nPackage: nvidia-jetpack\nStatus: install ok installed\n"
    "Priority: optional\nMaintainer: NVIDIA\nVersion: 6.2+b77\nDescription: x\n\nPackage: z\nVersion: 1\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "918000000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "sys/class/devfreq/17000000.gpu/available_frequencies": "306000000 408000000 612000000 918000000\n",
    "sys/class/hwmon/hwmon4/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon4/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon4/oc3_event_cnt": "2\n",
    "run/jtop.sock": "",
    "etc/group": "root:x:0:\nbroken line\njtop:x:994:someone,pilot\n",
    "proc/meminfo": "MemTotal:       16071120 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 1004440 0 5\n"
    "/dev/zram1 partition 1004440 0 5\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
}
PACKAGES = {
    "msgspec": "0.19.0", "numpy": "1.26.4", "onnx": "1.17.0", "onnxruntime": "1.23.2", "pillow": "11.0", "rich": "13.9",
    "rasterio": "1.4.4", "typer": "0.29.1", "torch": None, "jetson-stats": "4.3.2", "cuda-python": "12.6.2.post1",
    "pycuda": None,
}  # fmt: skip
SOFTWARE = Software(
    python="3.10.12",
    packages=PACKAGES,
    gpu={
        "name": "Orin", "compute_capability": "8.7", "integrated": True, "multiprocessors": 8,
        "memory_bytes": 16 << 30, "cuda": "12.6",
    },
    tensorrt={"kind": "tensorrt", "version": "10.3.0", "name": "TensorRT 10.3.0"},
    cuda={"name": "Orin", "runtime_version": "12.6"},
    jtop={"version": "4.3.2", "rail": "VDD_IN"},
)  # fmt: skip
NO_GPU = {"error": "there is no CUDA driver"}
DESKTOP = dataclasses.replace(
    SOFTWARE, python="3.12.3", gpu=NO_GPU, tensorrt={"error": "TensorRT is not installed"}, cuda=NO_GPU, jtop={}
)
PILOT = User("pilot", 1000, frozenset({1000, 994}))


def tree(folder: Path, files: dict[str, str | None]) -> Path:
    """A file tree; None leaves a file out."""
    for name, text in files.items():
        if text is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """An Orin NX 16 GB with JetPack 6.2 in MAXN, clocks held; the configuration is an absolute link, as there."""
    root = tree(tmp_path / "orin", ORIN)
    (root / "etc/nvpmodel.conf").symlink_to("/etc/nvpmodel/nvpmodel_p3767_0000.conf")
    return root


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    """A desktop without a GPU."""
    kept = {name: ORIN[name] for name in ("proc/meminfo", "proc/swaps")}
    return tree(tmp_path / "desktop", {**kept, "etc/group": "root:x:0:\n"})


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


# --- whole machines ---------------------------------------------------------------------------------


def test_an_orin_nx_in_order(orin: Path, tmp_path: Path) -> None:
    found = by_name(examine(tmp_path, root=orin, software=SOFTWARE, user=PILOT))
    assert {name: (one.status, one.text) for name, one in found.items() if one.status != OK and name != "disk"} == {}
    assert found["board"].text == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert found["JetPack"].text == "Jetson Linux R36.4.3, nvidia-jetpack 6.2+b77"
    assert found["power mode"].text == "MAXN (id 0), 8 multiprocessors"
    assert found["power mode"].data["default"] == 3
    assert found["clocks"].text == "GPU at 918 MHz, held at 918 MHz"
    assert found["throttling"].text == "counted by oc1, oc3"
    assert found["CUDA"].text == "driver for CUDA 12.6, toolkit 12.6.11"
    assert "11.4 of 15.3 GiB" in found["memory"].text
    assert found["swap"].text == "1.9 GiB (zram, compressed memory)"
    assert all(one.mend is None for name, one in found.items() if name != "disk")


def test_jetpack_7(orin: Path, tmp_path: Path) -> None:
    (orin / "etc/nv_tegra_release").write_text("# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic\n")
    (orin / "var/lib/dpkg/status").unlink()
    changed = dataclasses.replace(
        SOFTWARE, python="3.12.3", tensorrt={"kind": "tensorrt", "version": "10.16.1", "name": "T"}
    )
    found = by_name(examine(tmp_path, root=orin, software=changed, user=PILOT))
    assert found["JetPack"].text == "Jetson Linux R38.4.0, of JetPack 7"
    assert {found[name].status for name in ("JetPack", "Python", "TensorRT")} == {OK}
    old_python = by_name(examine(tmp_path, root=orin, software=SOFTWARE, user=PILOT))["Python"]
    assert (old_python.status, old_python.mend) == (WARN, "python3.12 -m venv --system-site-packages .venv")


def test_a_desktop_without_gpu(desktop: Path, tmp_path: Path) -> None:
    diagnosis = examine(tmp_path, root=desktop, software=DESKTOP, user=PILOT)
    assert diagnosis.failed == ()
    assert {one.name for one in diagnosis.findings if one.status != OK} <= {"disk"}
    assert by_name(diagnosis)["GPU"].text == "none (there is no CUDA driver): engines run on the CPU"


def test_a_desktop_with_a_gpu_and_nothing_for_it(desktop: Path, tmp_path: Path) -> None:
    changed = dataclasses.replace(DESKTOP, gpu=SOFTWARE.gpu, cuda={"error": "needs cuda-python or pycuda"})
    found = by_name(examine(tmp_path, root=desktop, software=changed, user=PILOT))
    assert (found["TensorRT"].status, found["TensorRT"].mend) == (WARN, "pip install tensorrt")
    binding = found["CUDA binding"]
    assert (binding.status, binding.mend) == (FAIL, "pip install 'cdkd-edge[gpu]' 'cuda-python<13'")


def test_an_empty_tree(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = by_name(examine(tmp_path, root=tmp_path / "empty", software=DESKTOP, user=PILOT))
    assert found["memory"].status == found["swap"].status == WARN
    assert found["memory"].text == "/proc/meminfo: does not say"


@pytest.mark.parametrize("garbage", [b"", b"\x00\xff\xfe\x1b[31m\n" * 50, b"0", b"-1\n", b"R36 (release), REVISION: ."])
def test_garbage_everywhere(orin: Path, tmp_path: Path, garbage: bytes) -> None:
    """Every file is rubbish: no traceback, nothing that steers a terminal, and no ok that rests on it."""
    for name in ORIN:
        (orin / name).write_bytes(garbage)
    (orin / "proc/device-tree/compatible").write_text("nvidia,tegra234")
    found = by_name(examine(tmp_path, root=orin, software=SOFTWARE, user=PILOT))
    assert all(one.text.isprintable() for one in found.values())
    for name in ("power mode", "clocks", "memory", "jtop group"):
        assert found[name].status == WARN, found[name]
        assert found[name].mend
    assert found["JetPack"].status in (WARN, FAIL)


COUNTERS = {name for name in ORIN if "hwmon" in name}  # read by the monitor of conditions, which leaves them out


@pytest.mark.parametrize(
    "name", sorted({*ORIN, "etc/nvpmodel.conf"} - COUNTERS - {"run/jtop.sock", "usr/local/cuda/version.json"})
)
def test_a_file_that_may_not_be_read(orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The reason is said, where the file is what a line rests on."""
    closed = (orin / name).resolve() if name != "etc/nvpmodel.conf" else orin / "etc/nvpmodel/nvpmodel_p3767_0000.conf"
    plain = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.resolve() == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    found = examine(tmp_path, root=orin, software=SOFTWARE, user=PILOT).findings
    needed = {"proc/device-tree/compatible", "var/lib/dpkg/status", "var/lib/nvpmodel/status"}
    silent = needed | {f"sys/class/devfreq/17000000.gpu/{key}" for key in ("cur_freq", "available_frequencies")}
    told = [one for one in found if "Permission denied" in one.text]
    assert bool(told) == (name not in silent), [one.text for one in found]
    assert all(one.status == WARN for one in told)


def test_a_folder_in_the_place_of_a_file(orin: Path) -> None:
    (orin / "etc/nv_tegra_release").unlink()
    (orin / "etc/nv_tegra_release").mkdir()
    assert "Is a directory" in probes.probe_jetpack(orin).text


# --- the board --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("R35 (release), REVISION: 6.0", FAIL),
        ("R36 (release), REVISION: 3.0", FAIL),
        ("R36 (release), REVISION: 4.0", OK),
    ],
)
def test_jetpack_brings_tensorrt_10_3(orin: Path, release: str, status: str) -> None:
    (orin / "etc/nv_tegra_release").write_text(f"# {release}, GCID: 1\n")
    found = probes.probe_jetpack(orin)
    assert found.status == status
    assert (found.mend == probes.JETPACK_HINT) == (status == FAIL)


def test_a_container_without_the_release_file(orin: Path) -> None:
    (orin / "etc/nv_tegra_release").unlink()
    found = probes.probe_jetpack(orin)
    assert found.status == WARN
    assert "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro" in (found.mend or "")


@pytest.mark.parametrize(
    ("status", "asked", "text"),
    [
        ("pmode:0003", None, "25W (id 3), 8 multiprocessors, GPU at most 408 MHz; MAXN lets the GPU do more"),
        ("pmode:0000", "NV Power Mode: 15W\n2\n", "15W (id 2), 4 multiprocessors, GPU at most 612 MHz; MAXN"),
        ("pmode:0009", None, "the current mode 9 is not in"),
        ("nonsense", "nonsense", "the current mode is not known"),
    ],
)
def test_power_modes_that_hold_the_gpu_back(orin: Path, status: str, asked: str | None, text: str) -> None:
    (orin / "var/lib/nvpmodel/status").write_text(status)
    found = probes.probe_power_mode(orin, asked)
    assert found.status == WARN
    assert text in found.text
    assert (found.mend or "").endswith("sudo nvpmodel -m 0" if "MAXN" in text else "else sudo nvpmodel -q")


def test_a_cap_at_the_top_clock_is_none(orin: Path) -> None:
    """40W of a super board caps the GPU at what it can do."""
    text = CONF.replace("ID=3 NAME=25W", "ID=3 NAME=40W").replace("408000000", "918000000")
    (orin / "etc/nvpmodel/nvpmodel_p3767_0000.conf").write_text(text)
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0003")
    assert probes.probe_power_mode(orin).status == OK


def test_a_configuration_as_it_stands() -> None:
    assert parse_modes(CONF) == {
        PowerMode(0, "MAXN"): GpuLimits(None, 8),
        PowerMode(2, "15W"): GpuLimits(612000000, 4),
        PowerMode(3, "25W"): GpuLimits(408000000, 8),
    }
    assert default_mode(CONF) == 3
    assert parse_modes("< POWER_MODEL ID=x NAME=y >\nGPU MAX_FREQ 5\n") == {}
    assert default_mode("") is None
    thor = parse_modes("< POWER_MODEL ID=0 NAME=MAXN >\nGPU_POWER_GATING GPU_PG_MASK 512\nGPU MAX_FREQ -1\n")
    assert thor == {PowerMode(0, "MAXN"): GpuLimits(None, None)}, "a mask of another kind"


@pytest.mark.parametrize(
    ("volts", "status"), [(4936, OK), (5160, OK), (19000, OK), (4700, WARN), (20400, WARN), ("", OK)]
)
def test_the_voltage_of_the_supply(orin: Path, volts: object, status: str) -> None:
    chip = orin / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    tree(chip, {"in1_label": "VDD_SOC\n", "in2_label": "VDD_IN\n", "in1_input": "9\n", "in2_input": f"{volts}\n"})
    found = probes.probe_supply(orin)
    assert found.status == status
    assert ("V at the module" in found.text) == bool(volts)
    (orin / "proc/device-tree/model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    assert probes.probe_supply(orin).status == OK


def test_clocks_that_may_fall(orin: Path) -> None:
    (orin / "sys/class/devfreq/17000000.gpu/min_freq").write_text("306000000\n")
    found = probes.probe_clocks(orin)
    assert (found.status, found.mend) == (WARN, "sudo jetson_clocks")
    assert "free between 306 and 918 MHz" in found.text
    old = orin / "sys/class/devfreq/17000000.gpu"
    old.rename(old.with_name("17000000.ga10b"))
    assert probes.probe_clocks(orin).text == found.text


# --- memory, swap, disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(500_000, FAIL), (2_000_000, WARN), (8_000_000, OK)])
def test_free_memory(orin: Path, free: int, status: str) -> None:
    (orin / "proc/meminfo").write_text(f"MemTotal: 16071120 kB\nMemAvailable: {free} kB\n")
    assert probes.probe_memory(orin).status == status


def test_no_swap(orin: Path, desktop: Path) -> None:
    for root, status in ((orin, WARN), (desktop, OK)):
        (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")
        assert probes.probe_swap(root).status == status
    assert "mkswap" in (probes.probe_swap(orin).mend or "")
    (orin / "proc/swaps").write_text(
        "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n/dev/zram0 p 4 0 5\n"
    )
    assert probes.probe_swap(orin).text == "8.0 GiB"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.probe_disk(tmp_path / "nowhere").status == FAIL
    usage = probes.shutil.disk_usage(tmp_path)
    for free, status in ((1 << 29, FAIL), (2 << 30, WARN), (9 << 30, OK)):
        monkeypatch.setattr(probes.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert probes.probe_disk(tmp_path).status == status


# --- jtop -------------------------------------------------------------------------------------------


def test_the_service_is_down(orin: Path) -> None:
    (orin / "run/jtop.sock").unlink()
    found = probes.probe_jtop_service(orin, SOFTWARE)
    assert found.status == WARN
    assert (found.mend or "").startswith("sudo systemctl restart jtop.service; in a container: docker run -v /run/jtop")
    absent = dataclasses.replace(SOFTWARE, packages={**PACKAGES, "jetson-stats": None})
    for release, option in (("R36", ""), ("R38", "--break-system-packages "), ("R39", "--break-system-packages ")):
        (orin / "etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 4.0, GCID: 1\n")
        mend = probes.probe_jtop_service(orin, absent).mend or ""
        assert mend.startswith(f"sudo pip3 install {option}-U jetson-stats && sudo systemctl restart jtop.service;")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"error": "no answer within 30 s"}, "does not get an answer: no answer within 30 s"),
        ({"error": "Mismatch version jtop service: [4.2.1] and client: [4.3.2]"}, "Mismatch version"),
        ({"version": "4.3.2", "rail": "ALL"}, "its total is ALL and not VDD_IN"),
        ({"version": "4.3.2", "rail": None}, "its total is missing"),
        ({}, "was not asked"),
    ],
)
def test_the_service_answers_badly(orin: Path, answer: dict[str, Any], text: str) -> None:
    found = probes.probe_jtop_service(orin, dataclasses.replace(SOFTWARE, jtop=answer))
    assert found.status == WARN
    assert text in found.text


def test_an_agx_orin_has_no_total(orin: Path) -> None:
    (orin / "proc/device-tree/model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    changed = dataclasses.replace(SOFTWARE, jtop={"version": "4.3.2", "rail": "ALL"})
    found = probes.probe_jtop_service(orin, changed)
    assert (found.status, found.mend) == (OK, None), "installing it again would mend nothing"
    assert "INA3221" in found.text


def test_the_service_without_a_client(orin: Path) -> None:
    changed = dataclasses.replace(SOFTWARE, packages={**PACKAGES, "jetson-stats": None})
    assert probes.probe_jtop_service(orin, changed).mend == "pip install 'cdkd-edge[jetson]'"


def test_the_group(orin: Path) -> None:
    assert probes.probe_jtop_group(orin, PILOT).status == OK
    assert probes.probe_jtop_group(orin, User("root", 0, frozenset({0}))).status == OK
    late = probes.probe_jtop_group(orin, User("pilot", 1000, frozenset({1000})))
    assert (late.status, late.mend) == (WARN, "log out and in again, or: newgrp jtop")
    stranger = probes.probe_jtop_group(orin, User("guest", 1001, frozenset({1001})))
    assert (stranger.status, stranger.mend) == (WARN, "sudo usermod -aG jtop guest")
    (orin / "etc/group").write_text("root:x:0:\n")
    assert "there is no group jtop" in probes.probe_jtop_group(orin, PILOT).text


# --- software ---------------------------------------------------------------------------------------


def test_packages_that_are_missing_or_old() -> None:
    changed = dataclasses.replace(SOFTWARE, packages={**PACKAGES, "onnx": None, "rasterio": "1.3.4"})
    found = software.probe_packages(changed)
    assert (found.status, found.text) == (FAIL, "onnx is missing; rasterio 1.3.4 is older than 1.4.4")
    for_gpu = {**PACKAGES, "onnxruntime": None, "onnxruntime-gpu": "1.23.0"}
    assert software.probe_packages(dataclasses.replace(SOFTWARE, packages=for_gpu)).status == OK


def test_needed_packages_are_those_of_the_project() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    text = project.read_text().split("[project.optional-dependencies]")[0]
    for name, least in software.NEEDED.items():
        assert f'"{name}>={".".join(map(str, least))}"' in text


@pytest.mark.parametrize(
    ("version", "answer", "status", "text"),
    [
        (None, {"error": "not installed"}, OK, "none: engines of the CPU run in ONNX Runtime"),
        ("2026.4.1", {"precisions": ["FP32", "BF16"]}, OK, "2026.4.1, on a CPU with BF16"),
        ("2026.4.1", {"precisions": ["FP32", "INT8"]}, OK, "2026.4.1, on a CPU without BF16"),
        ("2023.3.0", {"precisions": ["FP32"]}, WARN, "2023.3.0 is older than 2024.4"),
        ("2026.4.1", {"error": "it does not start"}, WARN, "2026.4.1: it does not start"),
        ("2026.4.1", {}, WARN, "2026.4.1: was not asked"),
    ],
)
def test_openvino(version: str | None, answer: dict[str, Any], status: str, text: str) -> None:
    there = dataclasses.replace(SOFTWARE, packages={**PACKAGES, "openvino": version}, openvino=answer)
    found = software.probe_openvino(there)
    assert (found.status, found.text) == (status, text)
    assert (found.mend == "pip install --upgrade 'cdkd-edge[openvino]'") == (status == WARN)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"openvino>={".".join(map(str, software._OPENVINO))}"' in project


@pytest.mark.parametrize(
    ("change", "name", "mend"),
    [
        ({"gpu": NO_GPU}, "GPU", "docker run --runtime nvidia"),
        ({"gpu": NO_GPU}, "CUDA", "sudo apt install nvidia-jetpack"),
        ({"tensorrt": {"error": "TensorRT is not installed"}}, "TensorRT", "--system-site-packages"),
        (
            {"tensorrt": {"kind": "tensorrt", "version": "8.6.2", "name": "TensorRT 8.6.2"}},
            "TensorRT",
            "update JetPack",
        ),
        ({"cuda": {"error": "cannot be imported"}}, "CUDA binding", "cdkd-edge[gpu]"),
        ({"python": "3.8.10"}, "Python", "python3.10"),
    ],
)
def test_a_board_that_lacks_something(orin: Path, tmp_path: Path, change: dict[str, Any], name: str, mend: str) -> None:
    found = by_name(examine(tmp_path, root=orin, software=dataclasses.replace(SOFTWARE, **change), user=PILOT))[name]
    assert found.status == FAIL
    assert mend in (found.mend or "")


@pytest.mark.parametrize(
    ("release", "capability", "version", "status"),
    [
        ("R39", "8.7", "10.13.3", FAIL),
        ("R39", "8.7", "10.16.2", OK),
        ("R38", "11.0", "10.13.3", OK),  # a Thor
        ("R36", "8.7", "10.3.0", OK),
    ],
)
def test_orin_with_jetpack_7_needs_a_tensorrt_that_knows_it(
    orin: Path, release: str, capability: str, version: str, status: str
) -> None:
    (orin / "etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 2.0, GCID: 1\n")
    gpu = {**SOFTWARE.gpu, "compute_capability": capability}
    tensorrt = {"kind": "tensorrt", "version": version, "name": f"TensorRT {version}"}
    found = software.probe_tensorrt(orin, dataclasses.replace(SOFTWARE, gpu=gpu, tensorrt=tensorrt))
    assert found.status == status
    assert ("older than 10.16" in found.text) == (status == FAIL)


@pytest.mark.parametrize(
    ("release", "mend"),
    [("R36", "sudo apt install nvidia-l4t-dla-compiler"), ("R39", "use an image or packages made for JetPack 7")],
)
def test_tensorrt_of_jetpack_6_without_the_dla_compiler(orin: Path, release: str, mend: str) -> None:
    (orin / "etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 2.0, GCID: 1\n")
    error = "tensorrt: libnvdla_compiler.so: cannot open shared object file: No such file or directory"
    found = software.probe_tensorrt(orin, dataclasses.replace(SOFTWARE, tensorrt={"error": error}))
    assert (found.status, found.mend) == (FAIL, mend)
    assert ("TensorRT of JetPack 6" in found.text) == (release == "R39")


@pytest.mark.parametrize(
    ("packages", "driver", "status"),
    [
        ({"cuda-python": "13.4.4", "cuda-bindings": "13.4.4"}, "12.6", WARN),
        ({"cuda-python": "12.6.2.post1", "cuda-bindings": "12.6.2.post1"}, "12.6", OK),
        ({"cuda-python": "12.9.4"}, "12.6", OK),
        ({"cuda-bindings": "12.9.4"}, "13.2", OK),
        ({"pycuda": "2026.1"}, "12.6", OK),
    ],
)
def test_a_binding_for_a_newer_cuda_than_the_driver_s(packages: dict[str, str], driver: str, status: str) -> None:
    changed = dataclasses.replace(SOFTWARE, packages=packages, gpu={**SOFTWARE.gpu, "cuda": driver})
    found = software.probe_binding(changed)
    assert (found.status, found.mend) == (status, "pip install 'cuda-python<13'" if status == WARN else None)
    missing = software.probe_binding(dataclasses.replace(changed, cuda={"error": "cannot be imported"}))
    assert missing.mend == f"pip install 'cdkd-edge[gpu]' 'cuda-python<{13 if driver == '12.6' else 14}'"


@pytest.mark.parametrize(
    ("release", "version", "status"), [("R39", "7.1.5", WARN), ("R39", "7.2.2", OK), ("R36", "4.2.9", OK)]
)
def test_jtop_that_does_not_know_jetpack_7(orin: Path, release: str, version: str, status: str) -> None:
    (orin / "etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 2.0, GCID: 1\n")
    changed = dataclasses.replace(SOFTWARE, packages={**PACKAGES, "jetson-stats": version})
    found = probes.probe_jtop_service(orin, changed)
    assert found.status == status
    assert ("-U jetson-stats" in (found.mend or "")) == (status == WARN)


def test_a_driver_that_does_not_start(desktop: Path) -> None:
    broken = dataclasses.replace(DESKTOP, gpu={"error": "the CUDA driver does not start (cuInit: 803)"})
    assert software.probe_gpu(desktop, broken).status == WARN


def test_silence_is_not_the_absence_of_a_gpu(desktop: Path) -> None:
    for said in (None, "aborted"):
        silent = dataclasses.replace(DESKTOP, gpu=software._answer(said, 30))
        found = software.probe_gpu(desktop, silent)
        assert found.status == WARN
        assert found.text.startswith("not known: ")


def test_children_that_hang_crash_or_chatter() -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    began = time.monotonic()
    said = software._run_all(
        {
            "hangs": python("import time; time.sleep(60)"),
            "crashes": python("import os; os.abort()"),
            "chatters": python("print('hello'); print('{\"a\": 1}')"),
            "lists": python("print('[1]')"),
        },
        timeout=3,
    )
    assert time.monotonic() - began < 20
    answers = {name: software._answer(text, 3) for name, text in said.items()}
    assert answers == {
        "hangs": {"error": "no answer within 3 s"},
        "crashes": {"error": "the process that asked it crashed"},
        "chatters": {"a": 1},
        "lists": {"error": "the process that asked it crashed"},
    }


def test_a_child_says_what_is_wrong() -> None:
    command = {"jtop": [sys.executable, "-m", "cdkd_edge.board.software", "jtop"]}
    answer = software._answer(software._run_all(command, 30)["jtop"], 30)
    assert "error" in answer or "rail" in answer


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/b")
    (tmp_path / "b").write_text("inside\0")
    assert read(tmp_path, "/a").text == "inside"
    (tmp_path / "loop").symlink_to("loop")
    assert read(tmp_path, "/loop").text is None
    assert read(tmp_path, "/a/under/a/file").text is None
    assert Text("12 apples").number == 12
    assert Text("").number is Text(None).number is Text("x").number is None
    assert printable("a\x1b[31m\nb" + "c" * 200, 20) == "a [31m b" + "c" * 12
    assert printable("a\x9b\u202e\udcff\ufffeb") == "a    b"
    assert printable("[31m\n") == "[31m"


# --- the command ------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    """Whatever it is: a line for each thing, and the exit code that belongs to them."""
    code, out, err = finish(start("doctor", "--json", "-w", tmp_path))
    data = json.loads(out)
    failed = [one["name"] for one in data["findings"] if one["status"] == FAIL]
    assert code == (15 if failed else 0), err
    assert len(data["findings"]) == 19
    assert sum(data["counts"].values()) == 19
    found = {one["name"]: one for one in data["findings"]}
    assert found["Python"]["data"]["version"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert found["disk"]["data"]["path"] == str(tmp_path)
    assert all(one["mend"] for one in data["findings"] if one["status"] != OK)
    if not Path("/proc/device-tree/model").exists():
        assert found["JetPack"]["text"] == "not a Jetson: not needed"


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, orin: Path, tmp_path: Path, broken: bool) -> None:
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0003")
    changed = dataclasses.replace(SOFTWARE, tensorrt={"error": "gone \x1b[31m"}) if broken else SOFTWARE
    diagnosis = examine(tmp_path, root=orin, software=changed, user=PILOT)
    monkeypatch.setattr("cdkd_edge.board.doctor.examine", lambda _: diagnosis)
    result = run("doctor")
    assert "repair: sudo nvpmodel -m 0" in result.stdout
    if broken:
        assert result.exit_code == 15
        assert result.stderr.strip().startswith("error: to be repaired: TensorRT")
        assert "\x1b" not in result.stdout
    else:
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""


def test_nothing_heavy_is_imported_here(tmp_path: Path) -> None:
    """jtop would change how processes start; the others are large."""
    before = multiprocessing.get_start_method(allow_none=True)
    probe = (
        "import sys, pathlib; before = set(sys.modules); from cdkd_edge.board.doctor import examine;"
        "examine(pathlib.Path('.'));"
        "print(sorted({'jtop', 'tensorrt', 'tensorrt_rtx_bindings', 'torch', 'onnxruntime', 'numpy', 'cuda', 'pycuda'}"
        " & (set(sys.modules) - before)))"
    )
    said = software._run_all({"it": [sys.executable, "-c", probe]}, 60)["it"]
    assert said is not None
    assert said.strip() == "[]"
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_wrong_usage() -> None:
    assert_answer(run("doctor", "--workspace", __file__), 2, "--workspace")
