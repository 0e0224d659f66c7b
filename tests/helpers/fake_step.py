"""Stands in for the commands that a sweep calls: writes what they write, at once, with figures that a test chooses.

``python fake_step.py build GRAPH --int8 -o ENGINE ...``; the JSON file that ``$FAKE_STEP`` names says what goes wrong.
Its keys: ``log`` (a file that gets a line per call), ``fps`` and ``mean_iou`` (by ``GRAPH PRECISION``),
``trouble`` (by ``COMMAND GRAPH PRECISION``: ``crash``, ``kill``, ``hang``, ``invalid``, or the text of an error).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

Plan = dict[str, Any]


def run_here(command: Sequence[str], inherited: Sequence[int] = ()) -> str:
    """In place of :func:`cdkd_edge.core.process.run_command`: what a test's fake does without a process is fast."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(command[2], Path(command[3]), list(command[4:]))
    return said.getvalue().rpartition("error: ")[2].strip() if code else ""


def main(command: str, artefact: Path, words: list[str]) -> int:
    plan: Plan = json.loads(Path(os.environ["FAKE_STEP"]).read_text())
    output = Path(words[words.index("-o") + 1])
    graph, precision = artefact.name.split(".")[:2]
    if command == "build":
        precision = next(word[2:] for word in words if word in ("--fp32", "--fp16", "--int8"))
    what = f"{graph} {precision}"
    with open(plan["log"], "a") as log:
        named = [Path(words[words.index(one) + 1]).name for one in ("--set-mode", "--calibration") if one in words]
        log.write(" ".join([command, what, *named]) + "\n")
    trouble = plan["trouble"].get(f"{command} {what}")
    if trouble in ("crash", "kill"):
        os.kill(os.getpid(), signal.SIGSEGV if trouble == "crash" else signal.SIGKILL)
    if trouble == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        time.sleep(60)
    if trouble not in (None, "invalid"):
        print(f"note\nerror: {trouble}", file=sys.stderr)
        return 9
    {"build": build, "evaluate": evaluate, "bench": bench}[command](plan, artefact, output, what, words)
    return 19 if trouble == "invalid" else 0


def build(plan: Plan, graph: Path, engine: Path, what: str, words: list[str]) -> None:
    from cdkd_edge.core.manifest import EngineManifest, FileRecord, GraphManifest, read_manifest, write_manifest
    from cdkd_edge.graph.files import derived_path, is_derived_from, load_graph, save_derived

    source, precision = read_manifest(graph, GraphManifest), what.split()[1]
    if source.precision != precision:
        made = derived_path(graph, precision)
        if not is_derived_from(made, graph):
            model = load_graph(graph)
            model.doc_string = precision
            save_derived(model, made, source, precision=precision)
        source = read_manifest(made, GraphManifest)
    engine.parent.mkdir(exist_ok=True)
    engine.write_text(f"{what} of {source.artefact.sha256}")
    fields = {"runtime": "onnxruntime-cpu", "artefact": FileRecord.of(engine), "device": "none", "libraries": {}}
    numbers = {"attention_blocks": 4, "attention_fused": 4, "build_seconds": 1.0}
    write_manifest(engine, EngineManifest.of_graph(source, **fields, **numbers))


def evaluate(plan: Plan, engine: Path, folder: Path, what: str, words: list[str]) -> None:
    from cdkd_edge.core.files import sha256_of

    folder.mkdir(parents=True)
    score = {"mean_iou": plan["mean_iou"][what], "classes": [{"name": "land", "truth_pixels": 10}]}
    (folder / "accuracy.json").write_text(json.dumps({"subject": {"sha256": sha256_of(engine)}, **score}))


def bench(plan: Plan, engine: Path, folder: Path, what: str, words: list[str]) -> None:
    from run_helpers import make_run

    from cdkd_edge.benchmark.folder import write_summary
    from cdkd_edge.benchmark.record import Verdict
    from cdkd_edge.core.manifest import EngineManifest, read_manifest

    mode = words[words.index("--set-mode") + 1] if "--set-mode" in words else None
    slower = 2.0 if mode == "3" else 1.0
    summary = make_run(
        folder, fps=plan["fps"][what] / slower, load=18.95 / slower, idle=4.0,
        power="--power-trace" in words, mode={"0": "MAXN", "3": "25W"}.get(mode or ""), seconds=20.0, warm_up=1.0,
    )  # fmt: skip
    summary = replace(summary, engine=read_manifest(engine, EngineManifest))
    if plan["trouble"].get(f"bench {what}") == "invalid":
        summary = replace(summary, verdict=Verdict("invalid", ("throttled: oc1 rose",)), figures=None, end_to_end=None)
    write_summary(folder, summary)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
