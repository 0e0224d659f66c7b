"""The board's description and its conditions, on trees of an Orin NX and of desktops, and on broken ones."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from board import make_tree, write

from cdkd_edge.board.conditions import Conditions, ConditionsMonitor, ConditionsReader
from cdkd_edge.board.jetson import BoardIdentity, PowerMode, clocks_held, describe_board

MODES = """\
< POWER_MODEL ID=0 NAME=MAXN >
GPU MAX_FREQ -1
< POWER_MODEL ID=3 NAME=25W >
GPU MAX_FREQ 408000000
< PM_CONFIG DEFAULT=3 >
"""
OC = "sys/class/hwmon/hwmon4"
GPU = "sys/class/devfreq/17000000.gpu"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """An Orin NX in MAXN whose clocks are not held."""
    make_tree(tmp_path / "sys")
    for name, text in (
        ("proc/device-tree/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0"),
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"),
        ("etc/nvpmodel.conf", MODES),
        ("etc/nvfancontrol.conf", "<FAN 1>\n\tFAN_DEFAULT_CONTROL close_loop\n\tFAN_DEFAULT_PROFILE quiet\n"),
        ("var/lib/nvpmodel/status", "pmode:0000 fmode:quiet"),
        ("proc/meminfo", "MemTotal: 16071120 kB\nMemAvailable:   12000000 kB\n"),
        ("sys/kernel/debug/bpmp/debug/clk/emc/rate", 2_133_000_000),
        ("sys/kernel/debug/bpmp/debug/clk/emc/max_rate", 3_199_000_000),
        ("sys/kernel/nvpmodel_clk_cap/emc", 2_133_000_000),
    ):
        write(tmp_path / name, text)
    return tmp_path


def hold_clocks(root: Path) -> None:
    write(root / f"{GPU}/min_freq", 918_000_000)
    for cpu in (root / "sys/devices/system/cpu").glob("cpu*"):
        write(cpu / "cpufreq/scaling_min_freq", 1_984_000)


# --- identity ---------------------------------------------------------------------------------------


def test_an_orin_nx(orin: Path) -> None:
    assert describe_board(orin) == BoardIdentity(
        model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        jetson=True,
        l4t="R36.4.3",
        jetpack="6",
        power_mode=PowerMode(0, "MAXN"),
        power_modes=(PowerMode(0, "MAXN"), PowerMode(3, "25W")),
        jetson_clocks=False,
        fan_profile="quiet",
    )


def test_settings_are_read_anew(orin: Path) -> None:
    hold_clocks(orin)
    write(orin / "var/lib/nvpmodel/status", "pmode:0003")
    write(orin / "var/lib/nvfancontrol/status", "FAN1:FAN_PROFILE:cool")
    write(orin / "var/lib/dpkg/status", "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2+b77")
    board = describe_board(orin)
    assert (board.power_mode, board.jetson_clocks, board.fan_profile) == (PowerMode(3, "25W"), True, "cool")
    assert board.jetpack == "6.2+b77"


def test_held_means_gpu_and_every_cpu(orin: Path) -> None:
    hold_clocks(orin)
    assert clocks_held(orin) is True
    write(orin / "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq", 115_200)
    assert clocks_held(orin) is False
    (orin / GPU / "min_freq").unlink()
    assert clocks_held(orin) is None


def test_a_desktop_has_none_of_it(tmp_path: Path) -> None:
    assert describe_board(tmp_path) == BoardIdentity(None, False, None, None, None, (), None, None)


def test_this_machine() -> None:
    assert isinstance(describe_board().jetson, bool)


# --- a reading --------------------------------------------------------------------------------------


def test_a_reading_of_an_orin_nx(orin: Path) -> None:
    before = time.monotonic()
    one = ConditionsReader(orin).read()
    assert before <= one.time <= time.monotonic()
    assert one.temperatures == {"cpu-thermal": 47.5, "gpu-thermal": 47.5, "tj-thermal": 47.5}
    assert one.clocks_mhz == pytest.approx({"gpu": 918, "cpu": 1984, "emc": 2133})
    assert one.clock_limits_mhz == pytest.approx({"gpu": 918, "cpu": 1984, "emc": 2133})
    assert one.fan == pytest.approx({"percent": 80 / 255 * 100, "rpm": 1800})
    assert one.throttle_events == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert one.power_mode == "MAXN"
    assert one.memory_available_bytes == 12_000_000 * 1024


def test_every_value_is_read_again(orin: Path) -> None:
    reader = ConditionsReader(orin)
    reader.read()
    write(orin / f"{GPU}/cur_freq", 306_000_000)
    write(orin / f"{GPU}/max_freq", 612_000_000)
    write(orin / "sys/devices/virtual/thermal/thermal_zone2/temp", 96_125)
    write(orin / f"{OC}/oc3_event_cnt", 27_390)
    write(orin / "var/lib/nvpmodel/status", "pmode:0003")
    one = reader.read()
    assert (one.clocks_mhz["gpu"], one.clock_limits_mhz["gpu"]) == pytest.approx((306, 612))
    assert one.temperatures["tj-thermal"] == 96.125
    assert one.throttle_events["oc3"] == 27_390
    assert one.power_mode == "25W"


def test_the_mean_of_the_cpus(orin: Path) -> None:
    cpus = sorted((orin / "sys/devices/system/cpu").glob("cpu*"))
    for number in range(40):
        write(orin / f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq", 1_000_000 + number * 1000)
    mean = ConditionsReader(orin).read().clocks_mhz["cpu"]
    assert 1010 < mean < 1030, "of some of them, spread over all"
    assert len(cpus) == (os.cpu_count() or 1)


def test_memory_without_a_cap(orin: Path) -> None:
    write(orin / "sys/kernel/nvpmodel_clk_cap/emc", 0)
    assert ConditionsReader(orin).read().clock_limits_mhz["emc"] == pytest.approx(3199)


def test_what_is_absent_is_absent(orin: Path) -> None:
    """Files vanish, are empty, half-written, nonsense, or of a sensor that is off: the others stay."""
    reader = ConditionsReader(orin)
    (orin / f"{OC}/oc1_event_cnt").unlink()
    (orin / f"{GPU}/cur_freq").write_text("")
    (orin / "sys/devices/virtual/thermal/thermal_zone0/temp").write_text("-256000\n")
    (orin / "sys/devices/virtual/thermal/thermal_zone1/temp").write_bytes(b"\xff\xfe\0")
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0099")
    (orin / "proc/meminfo").unlink()
    one = reader.read()
    assert set(one.throttle_events) == {"oc2", "oc3"}
    assert set(one.clocks_mhz) == {"cpu", "emc"}
    assert set(one.temperatures) == {"tj-thermal"}
    assert one.power_mode is None
    assert one.memory_available_bytes is None


def test_an_event_that_is_not_armed_is_no_throttling(orin: Path) -> None:
    write(orin / f"{OC}/oc3_throt_en", 0)
    assert set(ConditionsReader(orin).read().throttle_events) == {"oc1", "oc2"}


def test_a_desktop(tmp_path: Path) -> None:
    thermal, cpu = "sys/class/thermal/thermal_zone", "sys/devices/system/cpu/cpu"
    for name, text in (
        (f"{thermal}0/type", "acpitz"), (f"{thermal}0/temp", 27_800),
        (f"{thermal}1/type", "acpitz"), (f"{thermal}1/temp", 29_800),
        ("sys/class/hwmon/hwmon0/name", "nvme"), ("sys/class/hwmon/hwmon0/temp1_input", 40_000),
        ("sys/class/hwmon/hwmon1/name", "k10temp"), ("sys/class/hwmon/hwmon1/temp1_label", "Tctl"),
        ("sys/class/hwmon/hwmon1/temp1_input", 71_250),
        (f"{cpu}0/cpufreq/scaling_cur_freq", 4_200_000), (f"{cpu}0/cpufreq/scaling_max_freq", 5_000_000),
        (f"{cpu}0/thermal_throttle/core_throttle_count", 3), (f"{cpu}0/thermal_throttle/package_throttle_count", 7),
        (f"{cpu}1/thermal_throttle/core_throttle_count", 2), (f"{cpu}1/thermal_throttle/package_throttle_count", 7),
    ):  # fmt: skip
        write(tmp_path / name, text)
    one = ConditionsReader(tmp_path).read()
    assert one.temperatures == pytest.approx({"acpitz": 27.8, "acpitz 2": 29.8, "k10temp Tctl": 71.25})
    assert one.clocks_mhz == pytest.approx({"cpu": 4200})
    assert one.throttle_events == {"core_throttle": 5, "package_throttle": 7}
    assert (one.fan, one.power_mode) == ({}, None)


def test_an_empty_tree(tmp_path: Path) -> None:
    one = ConditionsReader(tmp_path).read()
    assert one == Conditions(one.time)


# --- the monitor ------------------------------------------------------------------------------------


def wait_for(monitor: ConditionsMonitor, readings: int) -> None:
    deadline = time.monotonic() + 10
    while len(monitor.readings()) < readings:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_readings_from_beginning_to_end(orin: Path) -> None:
    monitor = ConditionsMonitor(orin, interval=0.05)
    assert monitor.latest() is None
    with monitor:
        assert len(monitor.readings()) >= 1, "the first one is there at once"
        wait_for(monitor, 4)
        write(orin / f"{GPU}/cur_freq", 306_000_000)
        stopping = time.monotonic()
    readings = monitor.readings()
    assert readings[-1].time >= stopping
    assert readings[-1] is monitor.latest()
    assert readings[-1].clocks_mhz["gpu"] == pytest.approx(306)
    times = [one.time for one in readings]
    assert times == sorted(set(times))
    assert len(times) <= (times[-1] - times[0]) / 0.05 + 3, "no more than asked for"
    assert not [thread for thread in threading.enumerate() if thread.name == "conditions"]


def test_a_stop_does_not_wait_for_the_interval(orin: Path) -> None:
    monitor = ConditionsMonitor(orin, interval=60)
    with monitor:
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert len(monitor.readings()) == 2


def test_a_tree_that_vanishes(orin: Path) -> None:
    with ConditionsMonitor(orin, interval=0.02) as monitor:
        (orin / "sys").rename(orin / "gone")
        count = len(monitor.readings())
        wait_for(monitor, count + 3)
    assert monitor.readings()[-1].clocks_mhz == {}
