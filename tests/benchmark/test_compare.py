"""Runs beside each other: what is comparable, what is shown, and when CI is told to stop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import assert_answer, assert_wrong_usage, run
from labelled_images import build_data
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from run_helpers import make_run
from scene_helpers import names_in

from cdkd_edge.benchmark.compare import Comparison, compare_runs
from cdkd_edge.benchmark.compare_checks import Limits, judge_limit, read_scores
from cdkd_edge.benchmark.folder import read_summary, write_summary
from cdkd_edge.benchmark.pareto import draw_picture, front, write_picture
from cdkd_edge.benchmark.statistics import Interval, Ratio
from cdkd_edge.board.power.protocol import GPU_BOARD
from cdkd_edge.cli.compare import describe_comparison, markdown
from cdkd_edge.core.errors import BenchError, CompareError
from cdkd_edge.core.manifest import FileRecord

SHORT: dict[str, Any] = {"seconds": 8.0, "idle_seconds": 0.5, "warm_up": 0.5}
REPEATED: dict[str, Any] = {**SHORT, "repeats": 5, "spread": 0.01}


def sha(letter: str) -> FileRecord:
    return FileRecord(f"{letter}.engine", letter * 64, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that is a quarter faster on the same watts. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "slow", fps=8.0, seed=1, engine={"artefact": sha("a")}, **REPEATED)
    make_run(folder / "fast", fps=10.0, seed=2, engine={"artefact": sha("b")}, **REPEATED)
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the two."""
    for name in ("slow", "fast"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "slow", tmp_path / "fast"


def change(folder: Path, **changes: Any) -> None:
    write_summary(folder, replace(read_summary(folder), **changes))


def ratio_in(found: Comparison, index: int = 1) -> tuple[float, float, float]:
    ratio = found.rows[index].speed
    assert ratio is not None
    assert ratio.interval is not None
    return ratio.interval.low, ratio.value, ratio.interval.high


def test_faster_on_the_same_watts_needs_less_energy(pair: tuple[Path, Path]) -> None:
    found = compare_runs(pair)
    low, value, high = ratio_in(found)
    assert low < 1.25 < high
    assert high - low < 0.08
    one, other = found.rows
    assert value == pytest.approx(other.tiles_per_second.mean / one.tiles_per_second.mean)
    assert (one.verdict, other.verdict) == ("baseline", "faster")
    assert (one.energy_verdict, other.energy_verdict) == ("baseline", "less energy")
    assert one.energy is not None
    assert one.energy.rail == "VDD_IN"
    assert other.gross_energy is not None
    assert other.gross_energy.interval is not None
    assert other.gross_energy.interval.low < 0.8 < other.gross_energy.interval.high
    assert one.speed is one.gross_energy is None
    assert one.interval_basis == "5 repeats"
    assert not found.not_comparable


def test_the_baseline_can_be_any_run(pair: tuple[Path, Path]) -> None:
    forward, back = compare_runs(pair), compare_runs(pair, baseline=1)
    assert [row.verdict for row in back.rows] == ["slower", "baseline"]
    low, value, high = ratio_in(back, 0)
    assert [1 / high, 1 / value, 1 / low] == pytest.approx(ratio_in(forward))


def test_the_same_speed_shows_no_difference(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / str(seed), fps=10, seed=seed, started=f"moment {seed}", **REPEATED)
    found = compare_runs([tmp_path / "1", tmp_path / "2"])
    assert found.rows[1].verdict == found.rows[1].energy_verdict == "no difference shown"


def test_one_repeat_has_an_interval_of_speed_and_none_of_energy(tmp_path: Path) -> None:
    make_run(tmp_path / "one", fps=5, **SHORT)
    make_run(tmp_path / "two", fps=7, seed=1, **SHORT)
    row = compare_runs([tmp_path / "one", tmp_path / "two"]).rows[1]
    assert row.verdict == "faster"
    assert row.interval_basis == "blocks of 5 of 56 batches"
    assert row.energy_verdict == "cannot tell"
    assert row.gross_energy is not None
    assert row.gross_energy.interval is None
    assert "one integral of energy" in row.gross_energy.basis
    table = run("compare", tmp_path / "one", tmp_path / "two").stdout
    assert "faster, one repeat" in table
    assert "measure with --repeat 3" in table


def test_few_batches_tell_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "one", fps=0.5, **SHORT)
    make_run(tmp_path / "two", fps=5, **SHORT)
    found = compare_runs([tmp_path / "one", tmp_path / "two"])
    assert found.rows[1].verdict == "cannot tell"
    assert found.rows[1].speed is not None
    assert found.rows[1].speed.basis == "one repeat of 4 batches; 20 are needed"
    assert found.rows[0].tiles_per_second_interval is None


def test_batches_of_another_run_are_not_used(tmp_path: Path) -> None:
    make_run(tmp_path / "one", fps=5, **SHORT)
    make_run(tmp_path / "two", fps=7, **SHORT)
    shutil.copy(tmp_path / "one" / "tiles.csv", tmp_path / "two" / "tiles.csv")
    row = compare_runs([tmp_path / "one", tmp_path / "two"]).rows[1]
    assert row.verdict == "cannot tell"
    assert row.interval_basis == "tiles.csv and summary.json do not belong to the same run"


def test_the_same_run_twice_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    found = compare_runs([pair[0], tmp_path / "copy"])
    assert found.rows[1].verdict == "same run"
    assert "slow and copy are the same run" in found.notes
    again = compare_runs([pair[0], pair[0] / "summary.json"])
    assert [row.name for row in again.rows] == [str(pair[0]), f"{pair[0]} (2)"]
    with pytest.raises(CompareError, match="copy is the baseline's own run"):
        compare_runs([pair[0], tmp_path / "copy"], limits=Limits(slower=0.05))


BOARD = {"model": "emulated", "power_mode": {"id": 0, "name": "MAXN"}, "jetson_clocks": True}


def as_seen(folder: Path, what: str) -> None:
    """Make a run one that may not be compared."""
    summary = read_summary(folder)
    assert summary.figures is not None
    assert summary.figures.power is not None
    power, rails = summary.figures.power, summary.figures.power.rails
    figures = {
        "scope": replace(power, scope=GPU_BOARD),
        "rail": replace(power, total="POM_5V_IN", rails={"POM_5V_IN": rails["VDD_IN"]}),
        "source": replace(power, source="ina3221"),
    }
    if what in figures:
        change(folder, figures=replace(summary.figures, power=figures[what]))
    elif what == "mode":
        change(folder, board={**BOARD, "power_mode": {"id": 3, "name": "25W"}})
    elif what == "unknown mode":
        change(folder, board={**BOARD, "power_mode": None})
    elif what == "clocks":
        change(folder, board={**BOARD, "jetson_clocks": False})
    elif what == "classes":
        labels = {**summary.engine.labels, "classes": summary.engine.labels["classes"][:-1]}
        change(folder, engine=replace(summary.engine, labels=labels))
    else:
        change(folder, verdict=replace(summary.verdict, status=what, reasons=("too hot",)))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("scope", "power is that of the module in slow and GPU board in fast"),
        ("rail", "the total rail is VDD_IN in slow and POM_5V_IN in fast"),
        ("mode", "power mode is MAXN in slow and 25W in fast"),
        ("unknown mode", "power mode is MAXN in slow and not known in fast"),
        ("clocks", "jetson_clocks is on in slow and off in fast"),
        ("classes", "slow and fast have different classes"),
        ("invalid", "fast is invalid: too hot"),
        ("not_steady", "fast is not steady: too hot"),
    ],
)
def test_what_is_not_comparable_is_refused_and_marked_if_forced(
    pair: tuple[Path, Path], tmp_path: Path, what: str, said: str
) -> None:
    change(pair[0], board=BOARD)
    change(pair[1], board=BOARD)
    compare_runs(pair)
    as_seen(pair[1], what)
    assert_answer(run("compare", *pair, "-o", tmp_path / "out"), 20, f"not comparable: {said}.* --force$")
    assert not (tmp_path / "out").exists()
    result = run("compare", *pair, "--force")
    assert result.exit_code == 0, result.stderr
    assert "NOT COMPARABLE" in result.stdout
    assert said in result.stdout
    report = describe_comparison(compare_runs(pair, force=True))
    assert report.data["not_comparable"][0].startswith(said)
    assert f"- **NOT COMPARABLE**: {said}" in markdown(report)


def test_a_run_without_figures_is_refused_even_if_forced(pair: tuple[Path, Path]) -> None:
    verdict = replace(read_summary(pair[1]).verdict, status="invalid", reasons=("it throttled",))
    change(pair[1], figures=None, verdict=verdict)
    assert_answer(
        run("compare", *pair, "--force"), 20, "fast has no figures: it is invalid: it throttled.*keep-invalid"
    )


def test_jtop_and_ina3221_read_the_same_sensor(pair: tuple[Path, Path]) -> None:
    as_seen(pair[1], "source")
    assert "fast beside slow: power from ina3221 instead of jtop" in str(describe_comparison(compare_runs(pair)).data)


def test_another_machine_is_allowed_and_said(pair: tuple[Path, Path]) -> None:
    """A power mode is a mode of its board: on another one the same name is something else."""
    change(pair[1], board={"model": "another board", "power_mode": {"id": 2, "name": "15W"}})
    found = compare_runs(pair)
    assert "fast beside slow: another machine" in found.notes
    assert [row.power_mode for row in found.rows] == ["MAXN", "15W"]


def test_what_else_differs_is_said(pair: tuple[Path, Path]) -> None:
    summary = read_summary(pair[1])
    change(
        pair[1],
        libraries={"python": "3.12", "numpy": "2"},
        tool="cdkd-edge 9",
        protocol=replace(summary.protocol, preset="paper"),
        engine=replace(summary.engine, batch=2),
        machine=replace(summary.machine, cores=99),
        verdict=replace(summary.verdict, warnings=("clocks below their maximum",)),
    )
    notes = " | ".join(compare_runs(pair).notes)
    for said in (
        "python 3.12 instead of 3.11, cdkd-edge 9 instead",
        "99 cores",
        "protocol paper",
        "batches of 2 tiles",
    ):
        assert said in notes
    assert "fast: clocks below their maximum" in notes
    assert "numpy" not in notes, "only what both name"


def test_tiles_of_other_sides_are_compared_by_the_pixel(pair: tuple[Path, Path]) -> None:
    summary = read_summary(pair[1])
    figures = summary.figures
    assert figures is not None
    small = replace(
        figures,
        megapixels_per_second=replace(figures.megapixels_per_second, mean=figures.megapixels_per_second.mean / 4),
    )
    change(pair[1], engine=replace(summary.engine, tile=512), figures=small)
    found = compare_runs(pair)
    assert found.unit == "megapixel"
    assert found.rows[1].verdict == "slower"
    assert ratio_in(found)[1] == pytest.approx(1.25 / 4, rel=0.03)
    assert any("tiles have different sides" in note for note in found.notes)


def test_without_power_there_is_speed_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "one", fps=8, **REPEATED)
    make_run(tmp_path / "two", fps=10, power=False, seed=3, **REPEATED)
    found = compare_runs([tmp_path / "one", tmp_path / "two"])
    row = found.rows[1]
    assert (row.verdict, row.energy, row.energy_verdict, row.gross_energy) == ("faster", None, "", None)
    assert "not asked for" in run("compare", tmp_path / "one", tmp_path / "two").stdout
    with pytest.raises(CompareError, match="two has no energy to judge by a limit: not asked for"):
        compare_runs([tmp_path / "one", tmp_path / "two"], limits=Limits(hungrier=0.1))
    with pytest.raises(CompareError, match=r"one has no energy .* the baseline has none"):
        compare_runs([tmp_path / "one", tmp_path / "two"], baseline=1, limits=Limits(hungrier=0.1))


def test_net_energy_of_next_to_nothing_has_no_ratio(tmp_path: Path) -> None:
    make_run(tmp_path / "one", idle=19.5, **REPEATED)
    make_run(tmp_path / "two", **REPEATED)
    row = compare_runs([tmp_path / "one", tmp_path / "two"]).rows[1]
    assert row.net_energy is None
    assert row.gross_energy is not None


def test_a_total_that_no_rail_is_has_no_energy(pair: tuple[Path, Path]) -> None:
    figures = read_summary(pair[1]).figures
    assert figures is not None
    assert figures.power is not None
    change(pair[1], figures=replace(figures, power=replace(figures.power, total=None)))
    assert compare_runs(pair).rows[1].energy_reason == "there is no total rail"


@pytest.mark.parametrize(
    ("quantity", "value", "low", "high", "outcome"),
    [
        ("speed", 1.0, 0.98, 1.02, "pass"),
        ("speed", 0.96, 0.951, 0.97, "pass"),
        ("speed", 0.96, 0.94, 0.98, "pass"),  # slower, and by less than is allowed
        ("speed", 0.94, 0.93, 0.95, "fail"),
        ("speed", 0.94, 0.89, 0.99, "fail"),
        ("speed", 0.94, 0.88, 1.01, "cannot tell"),
        ("speed", 1.01, 0.90, 1.12, "cannot tell"),
        ("speed", 1.3, 1.2, 1.4, "pass"),
        ("speed", 0.95, 0.95, 0.95, "pass"),
        ("energy", 1.0, 0.98, 1.02, "pass"),
        ("energy", 1.04, 1.01, 1.07, "pass"),
        ("energy", 1.06, 1.02, 1.10, "fail"),
        ("energy", 1.06, 0.99, 1.14, "cannot tell"),
        ("energy", 0.7, 0.6, 0.8, "pass"),
        ("energy", 1.05, 1.05, 1.05, "pass"),
    ],
)
def test_limits(quantity: Any, value: float, low: float, high: float, outcome: str) -> None:
    assert judge_limit("run", quantity, 0.05, Ratio(value, Interval(low, high), "")).outcome == outcome


def test_ci_is_told_to_stop(pair: tuple[Path, Path], tmp_path: Path) -> None:
    slow, fast = pair
    for limit in ("5%", "0.05", " 5 %"):
        assert run("compare", slow, fast, "--fail-if-slower", limit).exit_code == 0
    result = run("compare", fast, slow, "--fail-if-slower", "5%", "-o", tmp_path / "out")
    assert result.exit_code == 20
    assert "limit: fail" in result.stdout, "the table is shown all the same"
    assert result.stderr.startswith("error: slow: speed x 0.8")
    assert (tmp_path / "out" / "comparison.md").exists()
    assert run("compare", fast, slow, "--fail-if-slower", "30%").exit_code == 0


def test_ci_is_told_to_stop_for_energy(pair: tuple[Path, Path]) -> None:
    slow, fast = pair
    assert run("compare", slow, fast, "--fail-if-hungrier", "5%").exit_code == 0
    result = run("compare", fast, slow, "--fail-if-hungrier", "5%", "--json")
    assert result.exit_code == 20
    assert json.loads(result.stdout)["gates"][0]["outcome"] == "fail"


def test_what_cannot_be_told_is_said_and_fails_if_strict(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        make_run(tmp_path / name, seed=seed, **{**REPEATED, "repeats": 2, "spread": 0.05})
    command = ("compare", tmp_path / "one", tmp_path / "two", "--fail-if-slower", "5%")
    result = run(*command)
    assert result.exit_code == 0
    assert "neither shown nor excluded; measure with more --repeat" in result.stderr
    assert run(*command, "--strict").exit_code == 20


def test_a_limit_that_nothing_can_decide_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "one", **SHORT)
    make_run(tmp_path / "two", seed=1, fps=3, **SHORT)
    command = ("compare", tmp_path / "one", tmp_path / "two")
    assert run(*command, "--fail-if-slower", "5%").exit_code == 0
    assert_answer(run(*command, "--fail-if-hungrier", "5%"), 20, "two: a limit for energy needs .*--repeat 3")


@pytest.mark.parametrize("wrong", ["5", "-1%", "100%", "nan", "five", "", "%", "inf%"])
def test_limits_that_are_none(pair: tuple[Path, Path], wrong: str) -> None:
    assert_wrong_usage(run("compare", *pair, "--fail-if-slower", wrong), "e.g. 5% or 0.05")


def test_wrong_usage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for wrong in ("0", "3", "last", "-1", "²"):
        assert_wrong_usage(run("compare", *pair, f"--baseline={wrong}"), "first, or a number from 1 to 2")
    assert_wrong_usage(run("compare", *pair, "--strict"), "a limit is needed")
    assert_answer(run("compare", pair[0]), 2, "at least two runs")
    assert_answer(run("compare", tmp_path), 2, f"cdkd-edge compare {tmp_path}/fast {tmp_path}/slow")
    assert_answer(run("compare", pair[0], tmp_path / "nowhere"), 19, "nowhere is not a benchmark run")
    assert_answer(run("compare", *pair, "-o", pair[0]), 2, "not empty")
    with pytest.raises(CompareError, match="no run 3"):
        compare_runs(pair, baseline=2)
    (pair[1] / "tiles.csv").unlink()
    with pytest.raises(BenchError, match=r"tiles\.csv cannot be read"):
        compare_runs(pair)


def evaluation(path: Path, letter: str, mean_iou: Any, pixels: int = 5) -> Path:
    document = {"subject": {"sha256": letter * 64}, "mean_iou": mean_iou}
    path.write_text(json.dumps({**document, "classes": [{"name": "a", "truth_pixels": pixels}]}))
    return path


def test_scores_find_their_engine_by_content(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = [
        evaluation(tmp_path / f"{name}.json", name, score) for name, score in (("b", 0.61), ("a", 0.6), ("c", 0.1))
    ]
    found = compare_runs(pair, evaluations=files)
    assert [row.mean_iou for row in found.rows] == [0.6, 0.61]
    assert any("c.json is about another engine" in note for note in found.notes)
    assert compare_runs(pair).rows[0].mean_iou is None
    (tmp_path / "scores").mkdir()
    evaluation(tmp_path / "scores" / "accuracy.json", "b", 0.61)
    assert compare_runs(pair, evaluations=[tmp_path / "scores"]).rows[1].mean_iou == 0.61, "the folder of evaluate -o"


def test_scores_on_other_data_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = [evaluation(tmp_path / "a.json", "a", 0.6), evaluation(tmp_path / "b.json", "b", 0.6, pixels=6)]
    with pytest.raises(CompareError, match="mIoU of slow and fast were measured on different data"):
        compare_runs(pair, evaluations=files)
    assert len(compare_runs(pair, evaluations=files, force=True).not_comparable) == 1
    files = [evaluation(tmp_path / "a.json", "a", 0.6), evaluation(tmp_path / "a2.json", "a", 0.7)]
    with pytest.raises(CompareError, match=r"a\.json and .*a2\.json contradict each other"):
        compare_runs(pair, evaluations=files)
    files[1] = evaluation(tmp_path / "a2.json", "a", 0.6, pixels=7)
    with pytest.raises(CompareError, match="contradict each other"):
        compare_runs(pair, evaluations=files, force=True)
    evaluation(tmp_path / "a2.json", "a", 0.6)
    assert compare_runs(pair, evaluations=files).rows[0].mean_iou == 0.6


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"candidate": 1}', "\xff", "{" * 5000, None])
def test_what_is_no_evaluation(pair: tuple[Path, Path], tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert_answer(run("compare", *pair, "--evaluation", path), 20, r"x\.json (cannot be read|does not hold the mIoU)")


@pytest.mark.parametrize("score", [None, 1.5, -0.1, "0.5"])
def test_a_score_that_is_none(tmp_path: Path, score: Any) -> None:
    with pytest.raises(CompareError):
        read_scores(evaluation(tmp_path / "a.json", "a", score))


def test_scores_of_the_real_commands(tmp_path: Path, small_graph: Path, small_engine_path: Path) -> None:
    data = build_data(tmp_path / "data").folder
    assert run("evaluate", small_engine_path, "--data", data, "-o", tmp_path / "judged").exit_code == 0
    assert run("parity", small_graph, small_engine_path, "--data", data, "-o", tmp_path / "pair").exit_code == 0
    (own,) = read_scores(tmp_path / "judged" / "accuracy.json")
    graph, engine = read_scores(tmp_path / "pair" / "parity.json")
    assert own.sha256 == engine.sha256 == FileRecord.of(small_engine_path).sha256
    assert graph.sha256 == FileRecord.of(small_graph).sha256
    assert own.mean_iou == pytest.approx(engine.mean_iou)
    assert own.data == engine.data


def test_the_output_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("compare", *pair, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert names_in(tmp_path / "out") == ["comparison.json", "comparison.md", "pareto.png"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(result.stdout)
    assert json.loads(result.stdout)["comparison_version"] == 1
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert "| fast | faster |" in markdown
    assert Image.open(tmp_path / "out" / "pareto.png").size[0] == 1440


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    names = ["a|b`<i>*", "_\x1b[31mred\nname", "$x_{ 50% Überfahrt 東京"]
    for index, name in enumerate(names):
        make_run(tmp_path / name, seed=index, started=str(index), **REPEATED)
    result = run("compare", *(tmp_path / name for name in names), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    tables = [line.replace("\\|", "").count("|") for line in lines if line.startswith("|")]
    assert tables == [8] * 5 + [13] * 5 + [11] * 5, "a title, a rule and three runs, three times"
    assert "\x1b" not in "".join(lines)


def test_the_front_is_what_nobody_beats() -> None:
    assert front([(1, 1), (2, 2), (3, 1.5), (2, 1), (4, 4)]) == [0, 1, 4]
    assert front([(1, 1), (1, 1)]) == [0, 1], "equal runs do not beat each other"
    assert front([(1, 1), (1, 2)]) == [1]
    assert front([(5, 0)]) == [0]


def pixels_of(path: Path, color: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        return sum(count for count, seen in image.convert("RGB").getcolors(1 << 24) or [] if seen == color)


def test_pictures(tmp_path: Path) -> None:
    """With power, with mIoU alone, with neither; and what is missing or not comparable is in the picture."""
    for name, options in {"a": {"fps": 8.0}, "b": {"fps": 10.0}, "c": {"fps": 12.0, "power": False}}.items():
        make_run(tmp_path / name, engine={"artefact": sha(name)}, **{**SHORT, **options})
    files = [evaluation(tmp_path / f"{name}.json", name, 0.6) for name in "ab"]
    folders = [tmp_path / name for name in "abc"]
    whole = compare_runs(folders, evaluations=files)
    powerless = replace(whole, rows=tuple(replace(row, energy=None) for row in whole.rows))
    unscored = replace(powerless, rows=tuple(replace(row, mean_iou=None) for row in powerless.rows))
    forced = replace(whole, not_comparable=("a reason that is said",))
    pictures = {"energy": whole, "scores": powerless, "bars": unscored, "forced": forced}
    for name, found in pictures.items():
        write_picture(tmp_path / f"{name}.png", found)
    contents = {name: (tmp_path / f"{name}.png").read_bytes() for name in pictures}
    assert len(set(contents.values())) == 4
    first, second = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    for name in ("energy", "scores"):
        assert pixels_of(tmp_path / f"{name}.png", first) > 100
        assert pixels_of(tmp_path / f"{name}.png", second) > 100
    assert pixels_of(tmp_path / "bars.png", first) > 10_000
    assert pixels_of(tmp_path / "forced.png", (0xB0, 0, 0x20)) > 100
    assert pixels_of(tmp_path / "energy.png", (0xB0, 0, 0x20)) == 0


def test_bars_have_three_digits_and_no_whiskers_where_there_is_no_interval(tmp_path: Path) -> None:
    for name, fps in (("a", 3.0), ("b", 1240.0)):
        make_run(tmp_path / name, engine={"artefact": sha(name)}, fps=fps, seconds=2, warm_up=1, power=False)
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    rows = [replace(row, tiles_per_second_interval=None) for row in found.rows]
    figure = draw_picture(replace(found, rows=rows))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"{rows[1].tiles_per_second.mean:.0f}", "3.00"]
    assert figure._supxlabel is None or "whiskers" not in figure._supxlabel.get_text()


@pytest.mark.parametrize("kind", ["one letter", "long names", "thirty", "equal", "without power"])
def test_nothing_is_cut_off_from_the_picture(tmp_path: Path, kind: str) -> None:
    count = 30 if kind in ("thirty", "without power") else 3
    names = [("W" * 100 if kind == "long names" else "run-of-an-engine-") + str(number) for number in range(count)]
    for number, name in enumerate(names):
        options = {"fps": 5.0 if kind == "equal" else 5.0 + number, "power": kind != "without power"}
        make_run(tmp_path / name, engine={"artefact": sha(name)}, seconds=2, idle_seconds=1, warm_up=1, **options)
    found = compare_runs([tmp_path / name for name in names])
    figure = draw_picture(replace(found, not_comparable=("a reason that goes on and on, " * 40,)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    assert axes.get_window_extent().height > 2.0 * figure.dpi, "the legend leaves room"
    parts = [part for part in (*figure.legends, figure._supxlabel, figure._suptitle, axes.yaxis.label) if part]
    boxes = [part.get_window_extent(canvas.get_renderer()) for part in (*parts, *axes.get_yticklabels())]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in figure.legends)


def test_a_wide_range_is_drawn_too(tmp_path: Path) -> None:
    for name, fps in (("a", 0.5), ("b", 20.0)):
        make_run(tmp_path / name, fps=fps, repeats=2, **SHORT)
    write_picture(tmp_path / "x.png", compare_runs([tmp_path / "a", tmp_path / "b"]))
    assert pixels_of(tmp_path / "x.png", (0, 0x72, 0xB2)) > 100


def test_the_report_names_every_run_in_every_table(pair: tuple[Path, Path]) -> None:
    report = describe_comparison(compare_runs(pair))
    assert [listing.title.split()[0] for listing in report.listings] == ["speed", "power", "what"]
    for listing in report.listings:
        assert [row[0] for row in listing.rows] == ["slow", "fast"]
        assert all(len(row) == len(listing.columns) for row in listing.rows)
