"""Runs the chain and some tests as a board does, on x86-64: `make test-aarch64`, with qemu's user mode.

The desktop's part (export, calibration, INT8 graph) runs on this machine. Its graphs go into an arm64 root file system;
doctor, build, segment and bench run there, and the label maps of both are compared. ``--record FOLDER`` writes
aarch64.json and aarch64.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from arm64_root import CPU, QEMU, REPOSITORY, environment, inside, make_root, why_not
from PIL import Image

from cdkd_edge.core.files import sha256_of, write_text
from cdkd_edge.core.machine import library_versions

BUNDLED = REPOSITORY / "cdkd_edge" / "demo"
PART = (1200, 700, 1840, 1148)
"""Of the bundled picture, px: six tiles, since qemu takes seconds for each."""
LIBRARIES = ("msgspec", "numpy", "onnx", "onnxruntime", "pillow", "rasterio")
TESTS = [
    "tests/core",
    "tests/quality/test_metrics.py",
    "tests/board/test_energy.py",
    "tests/board/test_throttling.py",
    "tests/board/test_power_sampler.py",
    "tests/segmentation/test_stitch.py",
    "tests/segmentation/test_writer.py",
    "tests/raster/test_grid.py",
    "tests/graph/test_integers.py",
    "tests/engines/test_cpu_engine.py",
]
NOT_THERE = ["--ignore=tests/core/test_signals.py", "-k", "not last_digits"]
"""Signals at moments of a command that is not emulated; a comparison of x86-64 CPUs."""
OTHERS = 1e-4
"""Largest share of pixels with another label than on x86-64."""
LIMIT = 7200
"""Seconds for one command; on a quiet machine the longest takes minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    record = parser.parse_args().record
    folder = REPOSITORY / "out" / "aarch64"
    try:
        if missing := why_not():
            raise OSError(missing)
        root = make_root(folder)
        _run(inside(root, "python3", "--version"), environment())
    except (OSError, subprocess.SubprocessError) as error:
        print(f"AARCH64 NOT TESTED: {error}")
        return 1
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tests = pool.submit(_test, root)
        chain = pool.submit(_chain, root, folder / "desktop")
        try:
            results: dict[str, Any] = {**chain.result(), "tests": tests.result()}
        except (OSError, subprocess.SubprocessError) as error:
            print(f"aarch64: FAILED: {error}")
            return 1
    if record:
        write_text(record / "aarch64.json", json.dumps(results, indent=2) + "\n")
        write_text(record / "aarch64.md", _markdown(results))
    print(_markdown(results))
    found = results["precisions"].values()
    same = all(one["other_labels"] <= OTHERS * one["pixels"] for one in found)
    good = same and results["tests"]["passed"]
    print("aarch64: passed" if good else "aarch64: FAILED")
    return not good


def _chain(root: Path, desktop: Path) -> dict[str, Any]:
    """Desktop, then board; the versions of both, what the board answered, and how far it agrees."""
    board = root / "board"
    for folder in (desktop, board):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    with Image.open(BUNDLED / "scene.jpg") as picture:
        picture.crop(PART).save(board / "part.png")
    here = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ORT_DISABLE_TELEMETRY": "1"}
    there = {**environment(), "ORT_DISABLE_TELEMETRY": "1"}
    seconds = {}

    def cdkd_edge(*arguments: str, emulated: bool = True) -> Any:
        command = inside(root, "python3") if emulated else [sys.executable]
        started = time.monotonic()
        said = _run([*command, "-m", "cdkd_edge", *arguments, "--json"], there if emulated else here)
        if emulated:
            seconds[" ".join(arguments)] = round(time.monotonic() - started)
            print(f"as aarch64: {' '.join(arguments)}: {time.monotonic() - started:.0f} s", flush=True)
        return json.loads(said)

    def label(folder: Path, seen: Path, precision: str, *, emulated: bool) -> Any:
        """The label map of an engine in a workspace, which the command sees as another folder."""
        engine, output = f"{seen}/engines/tiny.{precision}.cpu.onnx", f"{seen}/{precision}.tif"
        picture = f"{seen if emulated else board}/part.png"
        cdkd_edge("segment", picture, "-e", engine, "-o", output, emulated=emulated)
        with rasterio.open(folder / f"{precision}.tif") as labels:
            return labels.read(1)

    cdkd_edge("export", str(BUNDLED / "tiny.safetensors"), "-w", str(desktop), emulated=False)
    counts = ("--count", "8", "--check", "2")
    cdkd_edge("calibrate", str(BUNDLED / "scene.jpg"), *counts, "-w", str(desktop), emulated=False)
    for precision in ("int8", "fp32"):
        cdkd_edge("build", f"--{precision}", "--runtime", "cpu", "-w", str(desktop), emulated=False)
    shutil.copytree(desktop / "export", board / "export")

    doctor = {found["name"]: found for found in cdkd_edge("doctor", "-w", "/board")["findings"]}
    precisions = {}
    for precision in ("fp32", "int8"):
        cdkd_edge("build", f"--{precision}", "-w", "/board")
        name = f"engines/tiny.{precision}.cpu.onnx"
        ours = label(board, Path("/board"), precision, emulated=True)
        theirs = label(desktop, desktop, precision, emulated=False)
        precisions[precision] = {
            "same_engine_file": sha256_of(board / name) == sha256_of(desktop / name),
            "pixels": ours.size,
            "classes": int(np.unique(ours).size),
            "other_labels": int((ours != theirs).sum()),
        }
    bench = ("--duration", "5", "--max-warm-up", "5")
    verdict = cdkd_edge("bench", "-e", "/board/engines/tiny.fp32.cpu.onnx", *bench, "-w", "/board")["verdict"]
    versions = doctor["packages"]["data"]["versions"]
    return {
        "command": "make test-aarch64",
        "qemu": _run([QEMU, "--version"], here).splitlines()[0].removeprefix("qemu-aarch64 version "),
        "cpu": CPU,
        "x86_64": library_versions(LIBRARIES),
        "aarch64": {"python": doctor["Python"]["text"], **{name: versions[name] for name in LIBRARIES}},
        "precisions": precisions,
        "doctor": {name: f"{found['status']}: {found['text']}" for name, found in doctor.items()},
        "bench": verdict["status"],
        "seconds": seconds,
    }


def _test(root: Path) -> dict[str, Any]:
    """Run tests; how many passed."""
    command = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *NOT_THERE, *TESTS]
    started = time.monotonic()
    enter = inside(root, "sh", "-c", 'cd /repository && exec "$@"', "sh", *command)
    run = subprocess.run(enter, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    lines = run.stdout.splitlines() or run.stderr.splitlines()
    took = time.monotonic() - started
    print("\n".join(lines[-2:] if run.returncode == 0 else lines[-200:]), flush=True)
    return {
        "files": TESTS,
        "options": NOT_THERE,
        "passed": run.returncode == 0,
        "said": lines[-1],
        "seconds": round(took),
    }


def _run(command: list[str], variables: dict[str, str]) -> str:
    """What a command printed; OSError with the end of what it said if it fails."""
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT)
    if run.returncode:
        what = command[command.index("-m") + 1 :] if "-m" in command else command[-2:]
        raise OSError(f"{' '.join(what)} ended with {run.returncode}: {run.stderr.strip()[-2000:]}")
    return run.stdout


def _markdown(results: dict[str, Any]) -> str:
    versions = [f"| {name} | {results['x86_64'][name]} | {results['aarch64'][name]} |" for name in results["aarch64"]]
    labels = [
        f"| {name.upper()} | {found['pixels']:,} | {found['other_labels']:,} | "
        f"{'the same' if found['same_engine_file'] else 'another'} |"
        for name, found in results["precisions"].items()
    ]
    steps = [f"| `{name}` | {seconds} |" for name, seconds in results["seconds"].items()]
    tests = results["tests"]
    return "\n".join(
        [
            "# The board's commands as aarch64, under emulation",
            "",
            f"`{results['command']}`: qemu {results['qemu']}, user mode, as {results['cpu']}; Debian's Python.",
            "No board, no GPU: engines of the CPU. The seconds are those of an emulator and say nothing about a board.",
            "",
            "| version of | x86-64 | aarch64 |",
            "|---|---|---|",
            *versions,
            "",
            "| engine of the bundled network | pixels | with another label than on x86-64 | engine file |",
            "|---|---|---|---|",
            *labels,
            "",
            f"Doctor: {sum(text.startswith('fail') for text in results['doctor'].values())} of "
            f"{len(results['doctor'])} lines fail. Verdict of `bench`: {results['bench']}.",
            "",
            f"Tests: {tests['said'].strip('= ')}: `{' '.join([*tests['options'], *tests['files']])}`.",
            "",
            "| command | seconds |",
            "|---|---|",
            *steps,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
