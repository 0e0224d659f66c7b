"""A record of comparisons as a table that a person reads."""

from __future__ import annotations

from typing import Any

HEADER = "| peer | precision | s per tile | time / ours | peak memory, MB | / ours | labels as the network |"
RULE = "|---|---|---|---|---|---|---|"


def table_of(record: dict[str, Any]) -> str:
    """Markdown of all runs of a record."""
    parts = [
        "# Our engines beside their peers",
        "",
        "Made by `benchmarks/peers.py` from the `.json` beside it; do not edit.",
        "",
    ]
    for run in record["runs"]:
        parts += _run(run)
    return "\n".join(parts)


def _run(run: dict[str, Any]) -> list[str]:
    machine, load, tiles = run["machine"], run["load_average"], run["tiles"]
    where = f"{machine['cpu']}, {run['threads']} threads of {machine['cores']} cores"
    if run["gpu"]:
        where += f"; {run['gpu']}"
    lines = [
        f"## {run['network']}, tiles of {run['tile']} px",
        "",
        f"`{run['command']}`",
        "",
        f"{run['created'][:10]}; {where}; {machine['os']}; load average {load['before'][0]:.1f} before, "
        f"{load['after'][0]:.1f} after. {run['rounds']} interleaved rounds; {tiles['count']} tiles, {tiles['source']}. "
        f"{', '.join(f'{name} {version}' for name, version in run['libraries'].items())}.",
        "",
        HEADER,
        RULE,
    ]
    if run.get("clock") == "processor":
        lines[-3:-3] = ["", "Seconds are processor time, which other programs hardly change."]
    for result in run["peers"].values():
        ratio, share = result["time_ratio"], result["label_agreement"]
        if result["no_peer"]:
            time = "-"
        else:
            time = _number(ratio["median"], ".2f")
            if ratio["low"] is not None:
                time += f" ({ratio['low']:.2f} ... {ratio['high']:.2f})"
        peak = result["peak_memory_bytes"]
        runtime = result["details"].get("runtime")
        cells = [
            f"{result['title']} ({runtime})" if runtime else result["title"],
            result["precision"],
            f"{result['seconds_median']:.4g}",
            time,
            _number(peak and peak / 1e6, ".0f"),
            _number(result["memory_ratio"], ".2f"),
            "unknown" if share is None else f"{_percent(share)}" + (" (no peer)" if result["no_peer"] else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [_lead(one, run["peers"]) for one in run.get("leads", ())]
    notes += [f"No interval: {reason}." for reason in sorted(_reasons(run))]
    notes += [f"{result['title']}: {result['no_peer']}." for result in run["peers"].values() if result["no_peer"]]
    if not run["trained"]:
        notes.append("The weights are random, so the labels of reduced precisions are not judged.")
    notes += [
        f"Absent: {entry['title']} ({entry['precision']}): {entry['reason']}." for entry in run["absent"].values()
    ]
    return [*lines, "", *(f"- {note}" for note in notes), ""]


def _lead(one: dict[str, Any], peers: dict[str, Any]) -> str:
    ours, peer = (peers[one[side]]["title"] for side in ("ours", "peer"))
    interval = "" if one["low"] is None else f" ({one['low']:.2f} ... {one['high']:.2f})"
    where = "In any precision" if one["precision"] == "any" else f"In {one['precision'].upper()}"
    return f"{where} our fastest, `{ours}`, takes {one['median']:.2f}{interval} x the time of the fastest peer, {peer}."


def _reasons(run: dict[str, Any]) -> set[str]:
    found = {result["time_ratio"]["reason"] for result in run["peers"].values()}
    return {reason for reason in found if reason}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(share: float) -> str:
    """With as many digits as it takes not to call 99.9999 % all."""
    if share == 1:
        return "100 %"
    for digits in (2, 3, 4, 5, 6):
        text = f"{100 * share:.{digits}f}"
        if not text.startswith("100"):
            return f"{text} %"
    return "> 99.999999 %"
