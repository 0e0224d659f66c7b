"""``trace.png``: what is in the pixels."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from run_helpers import make_run

from cdkd_edge.benchmark.folder import Series, TimedBatch, read_run
from cdkd_edge.benchmark.picture import DPI, POWER, STYLE, WIDTH, TracePicture, banner_lines, write_trace_picture
from cdkd_edge.benchmark.record import Verdict

RED, YELLOW = (0xA5, 0, 0), (0xF5, 0xC2, 0x42)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot") / "run"
    make_run(folder, seconds=20, idle_seconds=5, warm_up=5)
    return read_run(folder)


def drawn(run, path):
    """Pixels ``[H, W, 3]``; a letter that the font lacks would be a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        write_trace_picture(run, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels, colour):
    if isinstance(colour, str):
        colour = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return float((np.abs(pixels - colour).max(axis=-1) < 12).mean())


def with_verdict(run, status, *reasons):
    return replace(run, summary=replace(run.summary, verdict=Verdict(status, reasons)))


def test_a_column_of_a_paper_wide(run, tmp_path):
    pixels = drawn(run, tmp_path / "trace.png")
    assert pixels.shape[1] == WIDTH * DPI
    assert 500 < pixels.shape[0] < 1000
    assert share(pixels, POWER) > 0.003
    assert share(pixels[:60], RED) == share(pixels[:60], YELLOW) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["trace.png"]


@pytest.mark.parametrize(("status", "colour"), [("invalid", RED), ("not_steady", YELLOW)])
def test_what_is_not_valid_is_unmistakable(run, tmp_path, status, colour):
    marked = with_verdict(run, status, "throttled: oc1 rose from 3 to 9")
    assert banner_lines(marked)[0].startswith(("INVALID: throttled", "NOT STEADY: throttled"))
    pixels = drawn(marked, tmp_path / "trace.png")
    assert share(pixels[:45], colour) > 0.5


def test_a_long_verdict_is_cut(run):
    lines = banner_lines(with_verdict(run, "invalid", "a reason " * 100))
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert banner_lines(with_verdict(run, "invalid")) == ["INVALID"]


def test_no_line_crosses_a_gap(run, tmp_path):
    series = run.watts["VDD_IN"]
    kept = [(t, v) for t, v in zip(series.times, series.values, strict=True) if not 15 <= t < 25]
    times, values = zip(*kept, strict=True)
    whole = drawn(run, tmp_path / "whole.png")
    gap = drawn(replace(run, watts={"VDD_IN": Series(times, values)}), tmp_path / "gap.png")

    def columns_with_power(pixels):
        strong = np.abs(pixels - (0, 0x3F, 0x6B)).max(axis=-1) < 12
        return np.flatnonzero(strong.any(axis=0))

    def largest_step(columns):
        return int(np.diff(columns).max())

    inside = WIDTH * DPI - 2 * 0.43 * DPI
    assert largest_step(columns_with_power(whole)) < 10
    assert largest_step(columns_with_power(gap)) == pytest.approx(10 / 35.5 * inside, rel=0.03)


def test_without_power_the_reason_is_said(tmp_path):
    make_run(tmp_path / "run", power=False, seconds=5, idle_seconds=1, warm_up=2)
    pixels = drawn(read_run(tmp_path / "run"), tmp_path / "trace.png")
    assert share(pixels, "#d55e00") > 0.0005, "tiles/s"
    assert share(pixels, POWER) > 0.0005, "latency"


def test_the_legend_names_the_phases_that_there_were(tmp_path):
    make_run(tmp_path / "run", power=False, seconds=1, idle_seconds=1, warm_up=300)
    run = read_run(tmp_path / "run")
    for phases in (run.summary.phases, [span for span in run.summary.phases if span.name != "idle"]):
        figure, _ = TracePicture(replace(run, summary=replace(run.summary, phases=phases)), 1000).draw()
        words = {text.get_text() for text in figure.legends[0].get_texts()}
        assert words & {"idle", "warm-up", "load"} == {span.name for span in phases}


def test_no_means_of_an_invalid_run(run, tmp_path):
    """The same picture with and without figures differs by the dashes and their values."""
    with_means = drawn(run, tmp_path / "a.png")
    without = drawn(replace(run, summary=replace(run.summary, figures=None)), tmp_path / "b.png")
    body = slice(60, 400)
    assert (with_means[body] != without[body]).any(axis=-1).sum() > 500


def test_means_do_not_lie_upon_the_other_axis(tmp_path):
    make_run(tmp_path / "run", seconds=12, warm_up=300, idle_seconds=1)
    picture = TracePicture(read_run(tmp_path / "run"), 1000)
    figure, _ = picture.draw()
    axes = next(one for one in figure.axes if one.get_ylabel() == "Power (W)")
    words = [text for text in axes.texts if text.get_text().endswith(" W")]
    assert len(words) == 2
    for text in words:
        box = text.get_window_extent(picture.renderer())
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1


@pytest.mark.parametrize("repeats", [1, 5])
def test_names_from_files_are_only_letters(tmp_path, repeats):
    name = "$x^{$ \\frac <b> 漢字 \u202e\x07 " * 3
    make_run(
        tmp_path / "run", repeats=repeats, seconds=3, idle_seconds=1, warm_up=1, engine={"name": name},
        board={"model": name}, verdict=Verdict("invalid", (name,)),
    )  # fmt: skip
    run = read_run(tmp_path / "run")
    drawn(replace(run, watts={name: run.watts["VDD_IN"], "_b": run.watts["VDD_IN"]}), tmp_path / "trace.png")


def test_little_data(run, tmp_path):
    """Cut off early: one batch, one reading; no phase, no batch, no temperature."""
    first = next(iter(run.watts.values()))
    one = replace(run, tiles=run.tiles[:1], watts={"A": Series(first.times[:1], first.values[:1])})
    drawn(one, tmp_path / "one.png")
    nothing = replace(run, tiles=(), watts={}, conditions={}, summary=replace(run.summary, phases=(), repeats=()))
    drawn(nothing, tmp_path / "nothing.png")
    drawn(replace(nothing, watts={"A": Series((), ())}), tmp_path / "empty.png")


def test_a_reading_of_nothing_and_a_negative_one(run, tmp_path):
    times = run.watts["VDD_IN"].times
    drawn(replace(run, watts={"A": Series(times, (0.0,) * len(times))}), tmp_path / "zero.png")
    drawn(replace(run, watts={"A": Series(times, (-1.0,) * len(times))}), tmp_path / "negative.png")


def test_ten_minutes_and_100_000_tiles_are_quick(run, tmp_path):
    spans = run.summary.phases
    load = replace(spans[2], stop=spans[2].start + 600)
    starts = np.linspace(load.start, load.stop, 100_000, endpoint=False)
    tiles = tuple(TimedBatch(0, "load", float(start), 0.006) for start in starts)
    times = tuple(np.arange(0, 620, 0.1).tolist())
    watts = {name: Series(times, tuple(np.random.default_rng(1).normal(18, 1, len(times)))) for name in "ABC"}
    long = replace(run, tiles=tiles, watts=watts, summary=replace(run.summary, phases=(*spans[:2], load)))
    write_trace_picture(run, tmp_path / "warm.png")
    began = time.process_time()
    write_trace_picture(long, tmp_path / "trace.png")
    assert time.process_time() - began < 3


def test_the_users_matplotlib_is_neither_used_nor_changed(run, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        pixels = drawn(run, tmp_path / "trace.png")
        assert dict(matplotlib.rcParams) == before
    assert share(pixels, (255, 0, 0)) == 0


def test_pyplot_is_not_imported(run, tmp_path):
    code = (
        "import sys; from pathlib import Path; from cdkd_edge.benchmark.run import files\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from cdkd_edge.benchmark.picture import write_trace_picture\n"
        "write_trace_picture(files.read_run(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, run.folder, tmp_path / "trace.png"], check=True)


def test_a_folder_that_cannot_be_written_is_an_os_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_trace_picture(run, tmp_path / "file" / "trace.png")


def texts_of(run):
    """Every text that is drawn, with its box in inches, and the picture's size."""
    with style.context(["default", STYLE]):
        picture = TracePicture(run, 1000)
        figure, _ = picture.draw()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [
            (text.get_text(), text.get_window_extent(canvas.get_renderer()))
            for text in figure.findobj(Text)
            if text.get_text() and text.get_visible()
        ]
        # Ticks beyond the axis are not drawn.
        unseen = [
            label.get_window_extent()
            for axes in figure.axes
            for label in axes.get_xticklabels()
            if not axes.get_xlim()[0] <= label.get_position()[0] <= axes.get_xlim()[1]
        ]
        boxes = [(words, box) for words, box in boxes if not any(box.x0 == other.x0 for other in unseen)]
        return boxes, figure.bbox


@pytest.mark.parametrize("kind", ["plain", "zero watts", "outlier", "fast", "close"])
def test_no_text_lies_outside_the_picture_and_the_time_axis_begins_at_0(tmp_path, kind):
    options = {
        "zero watts": {"idle": 0.0, "load": 0.0}, "fast": {"fps": 20_000, "seconds": 1}, "close": {"idle": 18.0},
        "outlier": {"fps": 80, "power": False},
    }  # fmt: skip
    make_run(tmp_path / "run", **{"seconds": 6, "idle_seconds": 2, "warm_up": 1, **options.get(kind, {})})
    run = read_run(tmp_path / "run")
    if kind == "zero watts":
        run = replace(run, watts={"VDD_IN": Series((0.0, 5.0, 9.0), (0.0, 0.0, 0.0))})
    if kind == "outlier":
        slow = replace(run.tiles[-9], latency=1000 * run.tiles[-9].latency)
        run = replace(run, tiles=(*run.tiles[:-9], slow, *run.tiles[-8:]))
    boxes, whole = texts_of(run)
    assert TracePicture(run, 1000).start == 0
    for words, box in boxes:
        if box.y0 > 0.9 * whole.height or box.height == 0:  # ticks beyond an axis are not drawn
            continue
        assert box.x0 >= 0, words
        assert box.x1 <= whole.width, words
    means = [box for words, box in boxes if words.startswith(("idle ", "load ")) and words.endswith(" W")]
    assert not any(one.overlaps(other) for one in means for other in means if one is not other)
