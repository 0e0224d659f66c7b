"""How ``trace.png`` looks: size, colours, lines, letters."""

from __future__ import annotations

import textwrap
import unicodedata
from typing import Final

from cdkd_edge.benchmarks.folder import Run
from cdkd_edge.benchmarks.record import IDLE, LOAD, VALID, WARM_UP

WIDTH: Final = 3.5
"""Inches: a column of a two-column paper."""
DPI: Final = 300

POWER, SPEED, GREY = "#003f6b", "#d55e00", "#595959"
RAILS: Final = ("#0072b2", "#009e73", "#cc79a7", "#7f6000", "#56b4e9")
"""Of Okabe and Ito's palette, which readers with any colour vision tell apart; dashes do it in greyscale."""
DASHES: Final = ("-", "--", ":")
SHADES: Final = {IDLE: "#ffffff", WARM_UP: "#f4f4f4", LOAD: "#e6e6e6"}
TRACK: Final = {IDLE: "#ffffff", WARM_UP: "#dcdcdc", LOAD: "#b0b0b0"}

STYLE: Final = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 6.5,
    "axes.labelsize": 6.5,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "hatch.linewidth": 0.4,
    "legend.fontsize": 6,
    "lines.linewidth": 0.7,
    "text.parse_math": False,  # names of engines and rails may hold dollars
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


def banner_lines(run: Run) -> list[str]:
    """Lines that say that the run is not to be trusted; none of a valid run."""
    verdict = run.summary.verdict
    if verdict.status == VALID:
        return []
    word = verdict.status.upper().replace("_", " ")
    words = drawable(f"{word}: {'; '.join(verdict.reasons)}" if verdict.reasons else word)
    return textwrap.wrap(words, 48, max_lines=3, placeholder=" …")


def drawable(text: str, length: int = 200) -> str:
    """What the font can draw of a text, on one line."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(one for one in " ".join(text.split()) if unicodedata.category(one) not in ("Cc", "Cf"))
    text = "".join(letter if ord(letter) in known else "?" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"
