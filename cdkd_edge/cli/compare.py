"""The command that puts benchmark runs beside each other: compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import new_folder, say, show, write_json
from cdkd_edge.cli.options import JsonOption


def _share(text: str | None, option: str) -> float | None:
    """A loss in 0..1, from ``5%`` or ``0.05``."""
    if text is None:
        return None
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise typer.BadParameter("per cent or a share below 1, e.g. 5% or 0.05", param_hint=option)
    return value


def _index(text: str, runs: int) -> int:
    """An index from ``first`` or a number that begins at 1."""
    number = 1 if text == "first" else int(text) if text.isdecimal() else 0
    if not 1 <= number <= runs:
        raise typer.BadParameter(f"first, or a number from 1 to {runs}", param_hint="--baseline")
    return number - 1


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders that `cdkd-edge bench` wrote.")],
    baseline: Annotated[
        str, typer.Option("--baseline", help="Which run ratios are taken against: first, or its number.", metavar="N")
    ] = "first",
    force: Annotated[
        bool, typer.Option("--force", help="Show runs that are not comparable; every output then says why not.")
    ] = False,
    fail_if_slower: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--fail-if-slower", help="Leave with 20 if a run is slower by more, e.g. 5%.", metavar="SHARE"),
    ] = None,
    fail_if_hungrier: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--fail-if-hungrier",
            help="Leave with 20 if a run needs more gross energy per tile, e.g. 5%.",
            metavar="SHARE",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A limit that is neither shown nor excluded is a failure too.")
    ] = False,
    evaluation: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--evaluation",
            help="Folder of `evaluate -o` or `parity -o`, or the JSON file in it, for mIoU; may be repeated.",
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder for comparison.json, comparison.md and pareto.png."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Benchmark runs beside each other: speed, energy, mIoU, ratios with 95 % intervals.

    Leaves with 20 if the runs are not comparable, or if one is slower or hungrier than allowed.
    """
    from cdkd_edge.bench.compare.checks import Limits, require_kept
    from cdkd_edge.bench.compare.compare import compare_runs
    from cdkd_edge.cli.show.compare import describe_comparison

    limits = Limits(
        slower=_share(fail_if_slower, "--fail-if-slower"), hungrier=_share(fail_if_hungrier, "--fail-if-hungrier")
    )
    if strict and limits == Limits():
        raise typer.BadParameter("a limit is needed: --fail-if-slower or --fail-if-hungrier", param_hint="--strict")
    found = compare_runs(
        runs, baseline=_index(baseline, len(runs)), force=force, limits=limits, evaluations=evaluation or ()
    )
    report = describe_comparison(found)
    with new_folder(output) as place:
        if place:
            from cdkd_edge.bench.compare.pareto import write_picture
            from cdkd_edge.core.files import write_text

            write_picture(place / "pareto.png", found)
            write_text(place / "comparison.md", report.markdown())
            write_json(place / "comparison.json", report.data)
    show(report, as_json)
    for gate in found.gates:
        if gate.outcome == "cannot tell" and not strict:
            say(f"warning: {gate.text}")
    require_kept(found.gates, strict=strict)
