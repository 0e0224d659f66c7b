"""Words and numbers as HTML. Whatever comes out of a file passes :func:`escaped`."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence

from cdkd_edge.bench.statistics import Figure

ABSENT = "—"


class Html(str):
    """Text that is HTML already."""


def escaped(words: object) -> str:
    """Words as HTML; what cannot be seen or turns the direction of writing becomes U+FFFD."""
    if isinstance(words, Html):
        return str(words)
    shown = "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn") else "\ufffd"
        for letter in str(words)
    )
    return html.escape(shown)


def tag(name: str, words: object, **attributes: str) -> Html:
    """An element; ``class_`` is written as ``class``, ``aria_label`` as ``aria-label``."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{escaped(words)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other."""
    return Html(escaped(between).join(escaped(part) for part in parts))


def table(caption: str, header: Sequence[object], rows: Iterable[Sequence[object]], *, class_: str = "") -> Html:
    """A table that scrolls within itself where it is too wide; the first column heads its row."""
    head = tag("tr", joined(tag("th", one, scope="col") for one in header))
    body = joined(
        tag("tr", joined([tag("th", row[0], scope="row"), *(tag("td", one) for one in row[1:])])) for row in rows
    )
    inner = joined([tag("thead", head), tag("tbody", body)])
    scrolling = tag("table", inner, class_=class_, aria_label=caption)
    # Above what scrolls, so that it is read without scrolling.
    return joined(
        [
            tag("p", caption, class_="caption"),
            tag("div", scrolling, class_="scroll", role="region", aria_label=caption, tabindex="0"),
        ]
    )


def pairs(rows: Iterable[tuple[object, object]]) -> Html:
    """Names and values."""
    return tag("dl", joined(tag("div", joined([tag("dt", name), tag("dd", value)])) for name, value in rows))


def bullets(items: Iterable[object], class_: str = "") -> Html:
    """A list."""
    return tag("ul", joined(tag("li", item) for item in items), class_=class_)


def number(value: float | None, digits: int = 4) -> str:
    """In so many significant digits; whole numbers of more digits stay whole."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(12, max(0, digits - 1 - math.floor(math.log10(abs(value)))))}f}"


def figure(one: Figure) -> Html:
    """Mean, and below it the interval where there is one, to two digits of its half width."""
    if one.interval is None:
        return Html(number(one.mean))
    low, high = one.interval.low, one.interval.high
    half = (high - low) / 2
    if half <= 0:
        return joined([number(one.mean), tag("small", "no spread")])
    decimals = min(12, max(0, 1 - math.floor(math.log10(half))))
    mean, low_text, high_text = (f"{value:.{decimals}f}" for value in (one.mean, low, high))
    return joined([mean, tag("small", f"{low_text} … {high_text}")])


def size(count: int | float | None) -> str:
    """Bytes."""
    if count is None:
        return ABSENT
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{number(value, 3)} GB"
