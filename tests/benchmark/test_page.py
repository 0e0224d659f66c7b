"""``report.html``: as text, and as a real browser shows it."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import browsing, find_browser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from run_helpers import make_run

from cdkd_edge.benchmark.curves import draw_histogram, histogram
from cdkd_edge.benchmark.folder import Series, read_run
from cdkd_edge.benchmark.record import Verdict
from cdkd_edge.benchmark.report_page import visible, write_report_page
from cdkd_edge.benchmark.statistics import latency_of
from cdkd_edge.core.manifest import EngineTensor, TensorRTBuild

EVIL = "<script>alert(1)</script>\"'&\u202e\x07 漢字 " + "w" * 150
SHORT = {"seconds": 6, "idle_seconds": 2, "warm_up": 3}
TENSORRT = TensorRTBuild(
    version="10.3.0", gpu="Orin", compute_capability="8.7", targets=(), cuda="12.6", l4t="R36.4.3", strongly_typed=True,
    flags=("TF32",), workspace_bytes=2**31, optimization_level=3, timing_cache=True,
    tensors=(EngineTensor("image", "uint8", (1, 3, 1024, 1024)),), scratch_bytes=41_000_000, weights_bytes=63_000_000,
    layers=117, traffic_bytes=1_350_000_000, layer_precisions={"fp16": 110, "fp32": 7},
)  # fmt: skip

KINDS = {
    "valid": {},
    "repeats": {"repeats": 5, "spread": 0.01, "engine": {"tensorrt": TENSORRT, "precision": "fp16"}},
    "invalid": {
        "verdict": Verdict("invalid", ("throttled: oc1 rose",), ("fan off",)), "figures": None, "end_to_end": None,
    },
    "not_steady": {"verdict": Verdict("not_steady", ("power still rose by 3.1 %",))},
    "no-power": {"power": False, "roofline": None, "roofline_reason": "no device file for this machine"},
    "evil": {
        "engine": {"name": EVIL, "libraries": {EVIL: EVIL}},
        "board": {"model": EVIL, EVIL: {EVIL: [EVIL], "deep": {EVIL: None}}},
        "verdict": Verdict("not_steady", (EVIL,), (EVIL,)),
        "conditions": {
            "clocks_mhz": {EVIL: {"min": EVIL, "mean": 1.0, "max": True}}, "fan": EVIL, EVIL: {EVIL: {EVIL: EVIL}},
            "power_modes": [EVIL], "throttle_events": {EVIL: EVIL}, "memory_available_bytes": {"min": EVIL},
        },
        "libraries": {EVIL: EVIL},
        "command": EVIL,
        "roofline": None,
        "roofline_reason": EVIL,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of every kind, in its run's folder."""
    root = tmp_path_factory.mktemp("pages")
    for kind, changes in KINDS.items():
        make_run(root / kind, **SHORT, **changes)
        write_report_page(read_run(root / kind), root / kind / "report.html")
    return {kind: root / kind / "report.html" for kind in KINDS}


class Outline(HTMLParser):
    """Checks that elements are closed in order; collects links, ids and visible words."""

    VOID = frozenset({"meta"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.ids, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [
            attributes[name] for name in ("href", "src", "xlink:href", "srcset", "data") if name in attributes
        ]
        assert not any(name.startswith("on") for name in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        assert "svg" in self.open, f"<{tag}/> is HTML only within SVG"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def words(path):
    return " ".join(" ".join(Outline(path.read_text(encoding="utf-8")).words).split())


@pytest.mark.parametrize("kind", KINDS)
def test_well_formed_and_sufficient_to_itself(pages, kind):
    text = pages[kind].read_text(encoding="utf-8")
    outline = Outline(text)
    assert len(set(outline.ids)) == len(outline.ids)
    assert {"header", "nav", "main", "footer", "h1", "svg"} <= set(outline.tags)
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(outline.tags)
    for link in outline.links:
        assert link[1:] in outline.ids if link.startswith("#") else (pages[kind].parent / link).is_file()
    assert set(re.findall(r"url\((.)", text)) <= {"#"}, "clip paths of the drawings"
    assert "@import" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing


def test_names_from_files_are_only_words(pages):
    text = pages["evil"].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\u202e" not in text
    assert "\x07" not in text
    assert words(pages["evil"]).count("<script>alert(1)</script>\"'&") >= 12


def test_the_verdict_comes_first(pages):
    for kind, word in (("valid", "VALID"), ("invalid", "INVALID"), ("not_steady", "NOT STEADY")):
        shown = words(pages[kind])
        assert shown.index(f"{word} The") < shown.index("Figures")
    shown = words(pages["invalid"])
    assert shown.index("throttled: oc1 rose") < shown.index("fan off") < shown.index("Protocol")


def test_figures_stand_beside_the_papers(pages):
    shown = words(pages["valid"])
    for row in (
        "throughput, tiles/s 2.500 2.50", "idle, W 5.740 5.74", "load, W 18.95 18.95", "net, W 13.21 13.21",
        "gross, J/tile 7.580 7.58 computed", "net, J/tile 5.284 5.28 computed",
    ):  # fmt: skip
        assert row in re.sub(r"(?<=\S)  +", " ", shown)
    assert "Mask-CDKD, ISPRS 2026" in shown
    assert "another device: emulated, not an Orin NX" in shown
    assert "another precision: FP32, not FP16" in shown
    assert "MODELLED, NOT MEASURED" in shown
    assert "19.8 % of the bound" in shown


def test_conditions_are_a_table_with_units(pages):
    words = " ".join(" ".join(Outline(pages["valid"].read_text(encoding="utf-8")).words).split())
    for row in (
        "GPU clock, MHz 918 918 918",
        "memory clock, MHz 3199 3199 3199",
        "GPU clock, highest allowed, MHz 918 918 918",
        "tj, °C 47.0 58.5 70.0",
        "fan, % 31.4 31.4 31.4",
        "throttling counters rose by oc1 0, oc2 0",
        "memory available minimum 8.59 GB, mean 8.59 GB, maximum 8.59 GB",
        "power mode MAXN (id 0)",
    ):
        assert row in words, row


def test_an_invalid_run_shows_no_figure(pages):
    """Made of round, rare numbers so that none can hide among others."""
    shown = words(pages["invalid"])
    assert "An invalid run has no figures." in shown
    for number_of_it in ("18.95", "5.74", "13.21", "7.58", "5.28", "2.500", "2.621", "p50", "p99", "% of the bound"):
        assert number_of_it in words(pages["valid"])
        assert number_of_it not in shown
    assert "covered" in shown, "what helps to find the cause"
    assert "load 18.95 W" in words(pages["valid"]), "in the drawing"


def test_an_invalid_run_that_was_kept_says_both(tmp_path):
    make_run(tmp_path / "run", **SHORT, verdict=Verdict("invalid", ("mode changed",)))
    write_report_page(read_run(tmp_path / "run"), tmp_path / "run/report.html")
    shown = words(tmp_path / "run/report.html")
    assert "The figures may not be quoted" in shown
    assert "INVALID. One repeat" in shown, "a table travels without the page's head"
    assert "18.95" in shown


def test_intervals_over_repeats(pages):
    shown = words(pages["repeats"])
    summary = read_run(pages["repeats"].parent).summary
    interval = summary.figures.tiles_per_second.interval
    assert "Means of 5 repeats with 95 % t-intervals" in shown
    mean, half = re.search(r"throughput, tiles/s ([\d.]+) ± ([\d.]+)", shown).groups()
    assert float(mean) == pytest.approx((interval.low + interval.high) / 2, abs=0.06)
    assert float(half) == pytest.approx((interval.high - interval.low) / 2, abs=0.06)
    assert "10.3.0, Orin, sm 8.7, CUDA 12.6" in shown
    assert "117 (110 fp16, 7 fp32)" in shown


def test_why_there_is_no_power_and_no_bound(pages):
    shown = words(pages["no-power"])
    assert shown.count("Power was not measured: not asked for (--power-trace).") == 2
    assert "There is no modelled bound: no device file for this machine." in shown
    assert "Power rails" not in shown
    assert "trace.csv" not in shown


def test_several_rails_without_a_total(tmp_path):
    summary = make_run(tmp_path / "run", **SHORT)
    power = summary.figures.power
    power = replace(power, total=None, rails={"A": power.rails["VDD_IN"], "B": power.rails["VDD_IN"]})
    run = read_run(tmp_path / "run")
    run = replace(run, watts={"A": run.watts["VDD_IN"], "B": run.watts["VDD_IN"]})
    run = replace(run, summary=replace(summary, figures=replace(summary.figures, power=power)))
    write_report_page(run, tmp_path / "report.html")
    assert "No rail contains all others, so there is no total" in words(tmp_path / "report.html")


def test_idle_phases_are_described_only_where_there_were_any(pages, tmp_path):
    assert "idle once more after the last load" in words(pages["valid"])
    make_run(tmp_path / "run", **SHORT, power=False)
    run = read_run(tmp_path / "run")
    phases = tuple(span for span in run.summary.phases if span.name != "idle")
    write_report_page(replace(run, summary=replace(run.summary, phases=phases)), tmp_path / "report.html")
    assert "idle" not in words(tmp_path / "report.html").split("Protocol")[-1].split("Repeats")[0].lower()


def test_little_data(pages, tmp_path):
    run = read_run(pages["invalid"].parent)
    summary = replace(run.summary, phases=(), rejected_repeats=(), conditions={}, board=None)
    write_report_page(replace(run, tiles=(), watts={}, conditions={}, summary=summary), tmp_path / "report.html")
    shown = words(tmp_path / "report.html")
    assert "No repeat was finished." in shown
    assert "There was no load: clocks and temperatures until then are in conditions.csv." in shown


def test_ten_minutes_make_a_small_page(tmp_path):
    make_run(tmp_path / "run", seconds=600, fps=10)
    run = read_run(tmp_path / "run")
    times, watts = (
        run.watts["VDD_IN"].times,
        np.random.default_rng(0).normal(18, 1, (3, len(run.watts["VDD_IN"].times))),
    )
    watts[1, 3000] = 60.0
    rails = {name: Series(times, tuple(row.tolist())) for name, row in zip("ABC", watts, strict=True)}
    write_report_page(replace(run, watts=rails), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_letters_that_cannot_be_seen_are_replaced():
    assert visible("a\ud800b\x00\u200f\U000e0001") == "a\ufffdb\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("tail", [[], [5000.0], [101.0, 5000.0, 9000.0]])
def test_the_histogram_holds_every_batch(tail):
    values = np.asarray([*np.random.default_rng(0).normal(100, 2, 1000), *tail])
    counts, edges, above = histogram(values)
    assert counts.sum() + above == len(values)
    assert edges[-1] < 200, "an outlier does not squeeze the rest into one bar"


def test_equal_latencies_have_a_histogram():
    counts, _, above = histogram(np.full(50, 7.0))
    assert counts.sum() == 50
    assert above == 0


@pytest.mark.parametrize("count", [2, 8, 66, 1000])
def test_one_batch_of_a_thousandfold_latency_does_not_squeeze_the_others(count):
    counts, edges, above = histogram(np.asarray([*np.linspace(10, 11, count - 1), 10_000.0]))
    assert (counts.sum(), above) == (count - 1, 1)
    assert edges[-1] < 12


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.2])
def test_labels_of_percentiles_do_not_lie_upon_each_other(spread):
    seconds = (0.01 * (1 + spread * np.random.default_rng(0).random(400))).tolist()
    figure = draw_histogram(np.asarray(seconds) * 1e3, latency_of(seconds))
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("p")]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)
    assert all(figure.bbox.y0 < box.y0 < box.y1 < figure.bbox.y1 for box in boxes)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome on PATH: the page was not opened in a browser")
    with browsing(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(
    ("kind", "width", "scheme"),
    [
        *((kind, 390, "dark") for kind in KINDS),
        ("valid", 1200, "light"),
        ("repeats", 760, "light"),
        ("evil", 1200, "light"),
    ],
)
def test_in_a_browser(browser, pages, kind, width, scheme):
    """No complaint, no request but the page itself, nothing wider than the window, something on the screen."""
    page = browser.open(pages[kind], width=width, scheme=scheme)
    assert page.complaints() == []
    assert page.requests() == [pages[kind].resolve().as_uri()]
    assert page.evaluate("document.scrollingElement.scrollWidth") == width
    assert page.evaluate("document.title").endswith("cdkd-edge bench")
    letters = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height))"
    )
    assert letters > 7, "px: the letters of the drawings can be read"
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).astype(int)
    assert pixels.shape[1] == width
    ground = int(np.median(pixels))
    assert ground > 240 if scheme == "light" else ground < 40
    assert (np.abs(pixels - ground) > 100).mean() > 0.01, "letters and lines"


def test_the_browser_would_complain(browser, tmp_path):
    """So that the test above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><div style='width: 2000px'>wide</div><script>console.error('said'); nothing.there</script>"
        "<img src='http://example.invalid/x.png'>"
    )
    page = browser.open(bad, width=390)
    assert any("console.error" in one for one in page.complaints())
    assert any("ReferenceError" in one for one in page.complaints())
    assert "http://example.invalid/x.png" in page.requests()
    assert page.evaluate("document.scrollingElement.scrollWidth") == 2000 + 8


def test_contrast_is_enough_for_small_letters(browser, pages):
    """WCAG 2.1 AA, 4.5 to 1, of every visible run of text outside drawings."""
    for scheme in ("light", "dark"):
        page = browser.open(pages["not_steady"], scheme=scheme)
        worst = page.evaluate(CONTRAST)
        assert worst["ratio"] >= 4.5, (scheme, worst)


def test_prints_on_a4(browser, pages):
    pdf = browser.open(pages["repeats"]).pdf()
    assert pdf.startswith(b"%PDF")
    assert re.search(rb"/MediaBox \[0 0 59[45][.\d]* 84[12]", pdf)


CONTRAST = """(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let worst = {ratio: 99};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    let one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || one.closest('svg')) continue;
    const front = light(channels(getComputedStyle(one).color));
    while (one && (channels(getComputedStyle(one).backgroundColor)[3] ?? 1) === 0) one = one.parentElement;
    const back = light(one ? channels(getComputedStyle(one).backgroundColor) : [255, 255, 255]);
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < worst.ratio) worst = {ratio, text: walker.currentNode.data};
  }
  return worst;
})()"""
