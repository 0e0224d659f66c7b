"""Writes the tables of checkpoints, from the layouts in cdkd_edge/model/layouts.py, into README.md and encoders.md."""

from __future__ import annotations

import re
from pathlib import Path

from cdkd_edge.model.layouts import LAYOUTS, Layout

DOCS = Path(__file__).parent
START, END = "<!-- checkpoints -->\n", "<!-- /checkpoints -->"


def short_table() -> str:
    """A row for each project: examples of its checkpoints."""
    projects: dict[str, list[Layout]] = {}
    for layout in LAYOUTS:
        projects.setdefault(layout.project, []).append(layout)
    rows = [f"| {name} | {'; '.join(one.example for one in layouts)} |" for name, layouts in projects.items()]
    return "\n".join(["| checkpoints of | for example |", "|---|---|", *rows])


def table() -> str:
    """A row for each layout: how it is recognised, and what is as in its project where no file says it."""
    rows = [
        f"| {layout.name} | {layout.known_by} | {layout.layer_norm_eps:g} | "
        f"{f'base {layout.rotary_base:g}' if layout.rotary_base else _resampling(layout)} | {layout.example} |"
        for layout in LAYOUTS
    ]
    header = ["| family | recognised by | LayerNorm eps | positions | for example |", "|---|---|---|---|---|"]
    return "\n".join([*header, *rows])


def _resampling(layout: Layout) -> str:
    extra = ["anti-aliased"] * layout.antialias + [f"offset {layout.offset:g}"] * (layout.offset > 0)
    return ", ".join(["bicubic", *extra])


def texts() -> dict[Path, str]:
    """What each file should hold."""
    wanted = {}
    for path, rows in {DOCS.parent / "README.md": short_table(), DOCS / "encoders.md": table()}.items():
        text = path.read_text(encoding="utf-8")
        wanted[path] = re.sub(f"(?s){START}.*?{END}", lambda _, rows=rows: f"{START}{rows}\n{END}", text)  # type: ignore[misc]
    return wanted


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
