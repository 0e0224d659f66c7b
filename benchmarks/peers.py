"""Our engines beside what a user would otherwise run: the same tiles, the same cores, interleaved.

    python benchmarks/peers.py --preset paper --tile 512 1024 --output benchmarks/results

Peers: our CPU engines in FP32, BF16 and INT8 as ``cdkd-edge build`` makes them, PyTorch eager, ``torch.compile``, ONNX
Runtime and OpenVINO on the plain ``torch.onnx.export`` and on our graph; with CUDA, our TensorRT engine and PyTorch in
FP16 (these two have not run yet). What is not installed or does not work here is recorded as absent, with its reason.

All get uint8 tiles and give uint8 labels, with the same number of threads, each in a process of its own. The rounds
are interleaved in a balanced order (:mod:`peer_rounds`); a ratio is the median over rounds of times in the same round.
Labels of every peer are compared with the FP32 network's: what computes something else is no peer.

``--output FOLDER`` writes ``peers-CPU.json`` and ``.md``, named by the processor of this machine; a run replaces the
recorded run of the same network, tile, device and clock and leaves the others. ``--folder`` keeps the artefacts, in a
folder per tile side if there are several, and uses them again. All peers stay in memory while the rounds go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peer_artefacts import prepare, put_checkpoint
from peer_children import CLOCKS, PEERS, REFERENCE, AbsentError, checkpoint_of
from peer_rounds import ChildPeer, Rounds, measure
from peer_statistics import agreement, leads, summarise, verdict
from peer_table import table_of
from script_tools import cpu_slug, read_record, run_reporting_errors, shown_command

from cdkd_edge.core.files import write_text
from cdkd_edge.core.machine import available_cores, describe_machine, library_versions

SCHEMA = 1
"""Version of the record."""

LIBRARIES = ("torch", "onnxruntime", "onnx", "onnxscript", "openvino", "numpy")


def parser() -> argparse.ArgumentParser:
    """The options."""
    new = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument(
        "--preset", choices=("tiny", "paper"), default="paper", help="bundled network; the paper's, random weights"
    )
    new.add_argument("--checkpoint", type=Path, help="a trained network instead")
    new.add_argument("--tile", type=int, nargs="+", help="side, px. Default: the network's")
    new.add_argument("--data", type=Path, help="folder of images to take tiles from. Default: drawn tiles")
    new.add_argument("--tiles", type=int, default=4, help="different tiles")
    new.add_argument("--rounds", type=int, default=15)
    new.add_argument("--seconds", type=float, default=math.inf, help="begin no further round after this time in rounds")
    new.add_argument("--threads", type=int, default=available_cores(), help="of every peer")
    new.add_argument("--clock", choices=CLOCKS, default="wall", help="processor, with --threads 1: on a busy machine")
    new.add_argument("--only", type=_keys, default=list(PEERS), metavar="A,B", help=f"of {', '.join(PEERS)}")
    new.add_argument("--pause", type=float, default=0.5, help="seconds before each turn, for threads that still spin")
    new.add_argument("--calibration-tiles", type=int, default=16, help="for our INT8 engine, when it is made")
    new.add_argument("--folder", type=Path, help="keep checkpoint, graphs and engines here")
    new.add_argument("--prepare-only", action="store_true", help="make them and measure nothing; needs --folder")
    new.add_argument("--output", type=Path, help="folder for peers-CPU.json and .md")
    return new


def compare(arguments: argparse.Namespace, folder: Path, tile: int, trained: bool) -> dict[str, Any]:
    """One run: a network with one tile side."""
    wanted = [key for key in PEERS if key in arguments.only]
    missing = prepare(
        folder,
        tile,
        wanted=wanted,
        trained=trained,
        data=arguments.data,
        tiles=arguments.tiles,
        calibration_tiles=arguments.calibration_tiles,
        progress=_tell,
    )
    if arguments.prepare_only:
        return {}
    count = len(np.load(folder / "tiles.npy", mmap_mode="r"))
    before = os.getloadavg()
    for stale in (folder / "labels").glob("*.npy"):
        stale.unlink()
    unknown = None if REFERENCE in wanted else _label_alone(folder, arguments.threads)
    racing = [ChildPeer(key, folder, arguments.threads, clock=arguments.clock) for key in wanted if key not in missing]
    rounds = measure(
        racing,
        rounds=arguments.rounds,
        tiles=count,
        seconds=arguments.seconds,
        pause=arguments.pause,
        progress=_tell,
    )
    results = _results(rounds, folder, trained, unknown)
    return {
        "network": arguments.checkpoint.stem if arguments.checkpoint else f"preset {arguments.preset}",
        "trained": trained,
        "tile": tile,
        "gpu": next((str(one["details"]["gpu"]) for one in rounds.loaded.values() if "gpu" in one["details"]), None),
        "command": shown_command("peers.py"),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": vars(describe_machine()),
        "load_average": {"before": before, "after": os.getloadavg()},
        "libraries": library_versions(LIBRARIES),
        "threads": arguments.threads,
        "clock": arguments.clock,
        "tiles": {"count": count, "source": "of images" if arguments.data else "drawn"},
        "rounds": len(rounds.orders),
        "rounds_ended_by": rounds.ended_by,
        "runs_per_turn": rounds.runs_per_turn,
        "orders": rounds.orders,
        "leads": leads(rounds.seconds, results),
        "peers": results,
        "absent": {
            key: {
                "title": PEERS[key].title,
                "precision": PEERS[key].precision,
                "reason": (missing.get(key) or rounds.absent[key]).replace(f"{folder}{os.sep}", ""),
            }
            for key in wanted
            if key in missing or key in rounds.absent
        },
    }


def _results(rounds: Rounds, folder: Path, trained: bool, unknown: str | None) -> dict[str, dict[str, Any]]:
    """Of every peer that ran: figures, and whether it labels as the network does."""
    summaries = summarise(rounds.seconds, {key: PEERS[key].baseline for key in rounds.seconds}, rounds.memory)
    reference = folder / "labels" / f"{REFERENCE}.npy"
    if unknown is None and not reference.exists():
        unknown = f"{REFERENCE} did not run: {rounds.absent[REFERENCE]}"
    results: dict[str, dict[str, Any]] = {}
    for key in (key for key in PEERS if key in summaries):
        summary = summaries[key]
        share, no_peer = None, None
        if unknown is None:
            share = agreement(np.load(folder / "labels" / f"{key}.npy"), np.load(reference))
            no_peer = verdict(share, PEERS[key].precision, trained)
        results[key] = {
            "title": PEERS[key].title,
            "precision": PEERS[key].precision,
            "label_agreement": share,
            "label_agreement_unknown": unknown,
            "no_peer": no_peer,
            **summary,
            **rounds.loaded[key],
        }
    return results


def _label_alone(folder: Path, threads: int) -> str | None:
    """Labels of the FP32 network where it takes no part in the rounds; the reason if there are none."""
    network = ChildPeer(REFERENCE, folder, threads)
    try:
        network.load()
        network.label()
    except AbsentError as error:
        return f"{REFERENCE} did not run: {error}"
    finally:
        network.close()
    return None


def merge(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The record with this run in the place of the one of the same network, tile, device and clock."""

    def identity(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["network"], one["tile"], one["gpu"] or one["machine"]["cpu"], one.get("clock", "wall")

    runs = [one for one in record["runs"] if identity(one) != identity(run)]
    return {"schema": SCHEMA, "runs": sorted([*runs, run], key=lambda one: tuple(map(str, identity(one))))}


def _keys(text: str) -> list[str]:
    keys = text.split(",")
    if unknown := [key for key in keys if key not in PEERS]:
        raise argparse.ArgumentTypeError(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    return keys


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Parse, compare, print a table, write the record. Exit code 0, or 1 if our own engine has no figures."""
    options = parser()
    arguments = options.parse_args(words)
    if arguments.prepare_only and not arguments.folder:
        options.error("--prepare-only needs --folder")
    if min(arguments.rounds, arguments.tiles, arguments.threads, arguments.calibration_tiles) < 1:
        options.error("rounds, tiles and threads are at least 1")
    return run_reporting_errors(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    record_path = None
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output).close()  # better now than after the last round
        record_path = arguments.output / f"peers-{cpu_slug()}.json"
    record = read_record(record_path, SCHEMA)
    complete = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for tile in arguments.tile or [None]:
            # Of several tile sides, each has a folder, so that none takes another's graphs for outdated.
            place = folder if len(arguments.tile or ()) < 2 else folder / str(tile)
            trained = put_checkpoint(place, arguments.preset, arguments.checkpoint)
            run = compare(arguments, place, tile or _own_tile(place), trained)
            if not run:
                continue
            record = merge(record, run)
            print(table_of({"runs": [run]}))
            complete = complete and bool(run["peers"])
            if record_path:
                write_text(record_path, json.dumps(record, indent=2) + "\n")
                write_text(record_path.with_suffix(".md"), table_of(record))
    return 0 if complete else 1


def _own_tile(folder: Path) -> int:
    from cdkd_edge.model.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint_of(folder))[0].config.tile


if __name__ == "__main__":
    sys.exit(main())
