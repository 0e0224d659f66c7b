"""Our CPU engine beside what a user would otherwise run: the same tiles, the same cores, interleaved.

    python benchmarks/cpu_peers.py --output benchmarks/results/cpu-peers.json

Each contender lives in a process of its own, so that its peak memory (VmHWM: weights and activations,
after loading) is its own; rounds go around the contenders, so that a machine that slows down slows all
of them, and the quoted ratios are medians of per-round ratios. The paper's network with random weights:
speed and memory do not depend on their values.

Contenders: ``ours`` (cdkd-edge build), ``torch`` (PyTorch eager FP32), ``naive`` (ONNX Runtime on
``torch.onnx.export(dynamo=True)`` of the same network), ``plain`` (ONNX Runtime on our exported graph,
attention not fused).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAUSE_SECONDS = 0.5
"""Between two tiles: the threads of ONNX Runtime go on spinning for a while and would slow whoever is next."""

CONTENDERS = ("ours", "torch", "naive", "plain")


def make_artefacts(folder: Path, preset: str) -> None:
    """Write checkpoint, exported graph, CPU engine and naive export of a preset with random weights."""
    import torch

    from cdkd_edge.engines.cpu import build_cpu_engine
    from cdkd_edge.export.pipeline import export_checkpoint
    from cdkd_edge.model.checkpoint import save_checkpoint
    from cdkd_edge.model.config import PRESETS
    from cdkd_edge.model.network import SegmentationNetwork

    torch.manual_seed(0)
    network = SegmentationNetwork(PRESETS[preset]).eval()
    save_checkpoint(network, folder / "ckpt.pt")
    export_checkpoint(folder / "ckpt.pt", folder / "plain.onnx")
    build_cpu_engine(folder / "plain.onnx", folder / "ours.onnx")

    class Labels(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return network.upsample(network(image)).argmax(dim=1).to(torch.uint8)

    tile = network.config.tile
    image = torch.zeros(1, 3, tile, tile, dtype=torch.uint8)
    torch.onnx.export(
        Labels().eval(), (image,), str(folder / "naive.onnx"), dynamo=True, external_data=False, input_names=["image"]
    )


def worker(kind: str, folder: Path, threads: int, tile: int) -> None:
    """Run one tile for every line on stdin; answer with seconds and the peak memory so far, bytes."""
    run = _runner(kind, folder, threads)
    image = np.random.default_rng(0).integers(0, 256, (1, 3, tile, tile), dtype=np.uint8)
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run(image)
        print(time.perf_counter() - started, _peak_bytes(), flush=True)


def _runner(kind: str, folder: Path, threads: int) -> Callable[[Any], Any]:
    if kind == "torch":
        import torch

        from cdkd_edge.model.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        network, _ = load_checkpoint(folder / "ckpt.pt")
        return lambda image: network.segment(torch.from_numpy(image))
    if kind == "ours":
        from cdkd_edge.engines.load import load_engine
        from cdkd_edge.engines.protocol import segment_tiles

        engine = load_engine(folder / "ours.onnx", threads=threads)
        return lambda image: segment_tiles(engine, image)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(folder / f"{kind}.onnx", options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def measure(folder: Path, contenders: list[str], rounds: int, threads: int, tile: int) -> dict[str, Any]:
    """Interleaved rounds over all contenders; the first round is warm-up."""
    processes = {}
    for kind in contenders:
        command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
        command += ["--threads", str(threads), "--tile", str(tile)]
        processes[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert _answer(processes[kind]) == "ready"
    seconds: dict[str, list[float]] = {kind: [] for kind in contenders}
    peaks: dict[str, int] = {}
    for round_number in range(rounds + 1):
        for kind, process in processes.items():
            time.sleep(PAUSE_SECONDS)
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            elapsed, peak = _answer(process).split()
            peaks[kind] = int(peak)
            if round_number:
                seconds[kind].append(float(elapsed))
    for process in processes.values():
        process.communicate()
    return {
        kind: {
            "seconds_median": statistics.median(seconds[kind]),
            "seconds": seconds[kind],
            "peak_memory_bytes": peaks[kind],
            "time_ratio_to_ours": statistics.median(a / b for a, b in zip(seconds[kind], seconds["ours"], strict=True)),
            "memory_ratio_to_ours": peaks[kind] / peaks["ours"],
        }
        for kind in contenders
    }


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit(f"a contender ended early (exit code {process.wait()})")
    return line


def main() -> None:
    """Parse, measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep checkpoint, graphs and engine here")
    parser.add_argument("--tile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder, arguments.threads, arguments.tile)
        return

    import dataclasses

    from cdkd_edge.machine import describe_machine
    from cdkd_edge.manifest import library_versions
    from cdkd_edge.model.config import PRESETS

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_artefacts(folder, arguments.preset)
        tile = PRESETS[arguments.preset].tile
        results = measure(folder, arguments.contenders, arguments.rounds, arguments.threads, tile)
    print(f"{'contender':10} {'s/tile':>8} {'x ours':>8} {'peak MB':>8} {'x ours':>8}")
    for kind, result in results.items():
        print(
            f"{kind:10} {result['seconds_median']:8.3f} {result['time_ratio_to_ours']:8.3f} "
            f"{result['peak_memory_bytes'] / 1e6:8.0f} {result['memory_ratio_to_ours']:8.2f}"
        )
    if arguments.output:
        record = {
            "command": f"python benchmarks/cpu_peers.py --preset {arguments.preset} --rounds {arguments.rounds} "
            f"--threads {arguments.threads}",
            "machine": dataclasses.asdict(describe_machine()),
            "libraries": library_versions(("torch", "onnxruntime", "onnx", "numpy")),
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
