"""Writes the table and the picture of the rooms, from rooms.toml, into architecture.md, CONTRIBUTING.md, rooms.svg."""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DOCS = Path(__file__).parent
ROOMS: dict[str, dict[str, str]] = tomllib.loads((DOCS / "rooms.toml").read_text(encoding="utf-8"))
"""From the ground up."""
START, END = "<!-- rooms -->\n", "<!-- /rooms -->"


def table() -> str:
    """The rooms as a Markdown table, the top one first."""
    rows = [f"| `{name}` | {room['what']} |" for name, room in reversed(ROOMS.items())]
    return "\n".join(["| room | what is in it |", "|---|---|", *rows])


def picture() -> str:
    """The rooms as floors of a house, SVG."""
    height, width, step = 34, 860, 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {step * len(ROOMS) + 46}"'
        ' font-family="sans-serif" font-size="14">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for floor, (name, room) in enumerate(reversed(ROOMS.items())):
        y = 10 + floor * step
        lines += [
            f'<rect x="10" y="{y}" width="{width - 60}" height="{height}" rx="4" fill="#eef3f8" stroke="#5b7a99"/>',
            f'<text x="22" y="{y + 22}" font-weight="bold" fill="#1f3a56">{name}</text>',
            f'<text x="142" y="{y + 22}" fill="#222222">{escape(room["what"].replace("`", ""))}</text>',
        ]
    bottom = 10 + step * len(ROOMS)
    lines += [
        f'<path d="M {width - 30} 20 V {bottom - 16}" stroke="#5b7a99" stroke-width="2"/>',
        f'<path d="M {width - 36} {bottom - 22} l 6 12 l 6 -12 z" fill="#5b7a99"/>',
        f'<text x="22" y="{bottom + 22}" fill="#222222">A room imports from itself and from rooms below it.</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def texts() -> dict[Path, str]:
    """What each file should hold."""
    wanted = {DOCS / "rooms.svg": picture()}
    for path in (DOCS / "architecture.md", DOCS.parent / "CONTRIBUTING.md"):
        text = path.read_text(encoding="utf-8")
        wanted[path] = re.sub(f"(?s){START}.*?{END}", lambda _: f"{START}{table()}\n{END}", text)
    return wanted


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
