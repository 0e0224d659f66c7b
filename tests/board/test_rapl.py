"""RAPL: joules from a counter, wrap-around undone, absence explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cdkd_edge.board.power.protocol import UnusableSourceError
from cdkd_edge.board.power.rapl import RaplReader

RANGE = 262_143_328_850


def zone(root: Path, folder: str, name: str, microjoules: int, limit: int = RANGE) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


def make_unreadable(path: Path) -> None:
    """A folder in the file's place: root may read any file."""
    path.unlink()
    path.mkdir()


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A powercap tree with two packages, a core zone and what else lies there."""
    root = tmp_path / "powercap"
    zone(root, "intel-rapl:0", "package-0", 1_000_000)
    zone(root, "intel-rapl:0:0", "core", 5)
    zone(root, "intel-rapl:1", "package-1", 7_000_000)
    zone(root, "intel-rapl:2", "psys", 9)
    (root / "intel-rapl").mkdir()
    (root / "dtpm").mkdir()
    return root


def test_packages_are_found_and_counted_from_the_first_reading(powercap: Path) -> None:
    source = RaplReader(powercap)
    assert (source.name, source.scope) == ("RAPL", "CPU package")
    assert source.read() == {"package-0": 0.0, "package-1": 0.0}
    (powercap / "intel-rapl:0/energy_uj").write_text("3500000\n")
    (powercap / "intel-rapl:1/energy_uj").write_text("7000001\n")
    assert source.read() == pytest.approx({"package-0": 2.5, "package-1": 1e-6})
    assert source.read() == pytest.approx({"package-0": 2.5, "package-1": 1e-6})


def test_wrap_around_is_undone(powercap: Path) -> None:
    counter = powercap / "intel-rapl:0/energy_uj"
    counter.write_text(f"{RANGE - 1_000_000}\n")
    source = RaplReader(powercap)
    for lap in range(1, 4):
        counter.write_text("500000\n")  # 1 J to the end and 0.5 J from 0
        assert source.read()["package-0"] == pytest.approx(lap * 1.5 + (lap - 1) * (RANGE / 1e6 - 1.5))
        counter.write_text(f"{RANGE - 1_000_000}\n")
        source.read()


def test_amd_calls_it_the_same(tmp_path: Path) -> None:
    zone(tmp_path, "amd-rapl:0", "package-0", 1)
    assert list(RaplReader(tmp_path).read()) == ["package-0"]


@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("harm", [make_unreadable, Path.unlink, lambda path: path.write_text("no number\n")])
def test_a_counter_that_cannot_be_read_is_no_source(powercap: Path, file: str, harm: Callable[[Path], object]) -> None:
    harm(powercap / "intel-rapl:1" / file)
    with pytest.raises(UnusableSourceError, match=r"^RAPL: .*root"):
        RaplReader(powercap)


def test_a_zone_without_a_name_is_passed_over(powercap: Path) -> None:
    make_unreadable(powercap / "intel-rapl:1/name")
    source = RaplReader(powercap)
    assert list(source.read()) == ["package-0"]


@pytest.mark.parametrize("there", [True, False])
def test_no_counter_has_a_reason(tmp_path: Path, there: bool) -> None:
    root = tmp_path / "powercap"
    if there:
        zone(root, "intel-rapl:0:0", "core", 5)
    with pytest.raises(UnusableSourceError, match=f"^RAPL: no CPU package under {root}$"):
        RaplReader(root)
