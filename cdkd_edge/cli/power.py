"""The command power: which sources of power answer here."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import show
from cdkd_edge.cli.options import JsonOption


@app.command()
def power(
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--source", help="Only this one: jtop, ina3221, nvml or rapl."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to watch.", min=0.2, max=3600)] = 2.0,
    interval: Annotated[float, typer.Option(help="Seconds between readings to ask for.", min=0.02, max=60)] = 0.1,
    as_json: JsonOption = False,
) -> None:
    """Which sources of power answer here: what they cover, watts now, readings per second, or why there are none.

    Leaves with 16 if the one that --source names cannot be used.
    """
    from cdkd_edge.board.power.sampler import list_sources
    from cdkd_edge.cli.show.power import describe_power
    from cdkd_edge.core.errors import PowerError

    reports = list_sources(source, seconds, interval)
    if source is not None and reports[0].info is None:
        raise PowerError(reports[0].reason, hint=reports[0].hint)
    show(describe_power(reports), as_json)
