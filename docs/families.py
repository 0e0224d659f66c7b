"""Writes the tables of checkpoints into README.md and encoders.md.

They come from the layouts and heads in cdkd_edge/model/layouts.py and heads.py.
"""

from __future__ import annotations

from pathlib import Path

from cdkd_edge.model.heads import HEADS, refused_names
from cdkd_edge.model.layouts import LAYOUTS, Layout

DOCS = Path(__file__).parent


def short_table() -> str:
    """A row for each project: examples of its checkpoints."""
    projects: dict[str, list[Layout]] = {}
    for layout in (*LAYOUTS, *HEADS):
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


def head_table() -> str:
    """A row for each head: how it is recognised, and where its up-sampling aligns corners."""
    rows = [
        f"| {head.name} | {head.known_by} | {head.implied.get('align_corners', 'none')} | {head.example} |"
        for head in HEADS
    ]
    header = ["| head | recognised by | corners aligned | for example |", "|---|---|---|---|"]
    return "\n".join([*header, *rows])


def _resampling(layout: Layout) -> str:
    extra = ["anti-aliased"] * layout.antialias + [f"offset {layout.offset:g}"] * (layout.offset > 0)
    return ", ".join(["bicubic", *extra])


def texts() -> dict[Path, str]:
    """What each file should hold."""
    readme, page = DOCS.parent / "README.md", DOCS / "encoders.md"
    parts = {
        readme: {"checkpoints": short_table()},
        page: {"checkpoints": table(), "heads": head_table(), "other heads": f"{refused_names()}."},
    }
    return {path: _filled(path.read_text(encoding="utf-8"), named) for path, named in parts.items()}


def _filled(text: str, parts: dict[str, str]) -> str:
    for name, content in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{content}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
