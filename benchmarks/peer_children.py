"""What the peers are, and the process that each of them lives in.

A child loads one peer and then obeys lines of JSON on stdin, one answer per line: so weights, activations, threads and
peak memory of a peer are its own, and the parent decides whose turn it is. Whatever libraries print goes to stderr.

    {"do": "label"}                        all tiles once; labels to labels/PEER.npy; seconds of each
    {"do": "turn", "tile": 0, "runs": 2}   one tile, that many times; seconds of all
    {"do": "memory"}                       peaks of this process, bytes
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import CdkdEdgeError

UInt8Array = npt.NDArray[np.uint8]
Run = Callable[[UInt8Array], UInt8Array]
"""A tile ``[1, 3, T, T]`` to labels ``[1, T, T]`` in an array of the host."""

Loader = Callable[[Path, int], tuple[Run, dict[str, Any]]]
"""Folder of artefacts and threads to what runs a tile, and what else is worth recording."""


class AbsentError(Exception):
    """This peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Something a user could run in our place, or one of our engines."""

    title: str
    precision: str
    artefact: str
    """File it loads, in the folder of artefacts."""
    load: Loader
    baseline: str = "ours-fp32"
    """The engine of ours that runs on the same device, and that its time is divided by."""


def _torch_network(folder: Path, threads: int) -> Any:
    import torch

    from cdkd_edge.model.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    tile = int(np.load(folder / "tiles.npy", mmap_mode="r").shape[-1])
    network, _ = load_checkpoint(checkpoint_of(folder), tile=tile)
    return network.eval()


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint of a folder of artefacts, whatever its layout."""
    return next(path for path in sorted(folder.glob("ckpt.*")) if path.suffix in (".pt", ".safetensors"))


def _torch_eager(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    import torch

    network = _torch_network(folder, threads)
    return lambda image: np.asarray(network.segment(torch.from_numpy(image)).numpy()), {"torch": torch.__version__}


def _torch_compile(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    import torch

    network = _torch_network(folder, threads)

    def labels(image: torch.Tensor) -> torch.Tensor:
        return network.upsample(network(image)).argmax(dim=1).to(torch.uint8)  # type: ignore[no-any-return]

    torch.compile(torch.neg)(torch.zeros(8))  # without a compiler this fails in seconds; a network, in minutes
    compiled = torch.compile(labels)
    tile = network.config.tile
    started = time.perf_counter()
    with torch.inference_mode():
        compiled(torch.zeros(1, 3, tile, tile, dtype=torch.uint8))

    def run(image: UInt8Array) -> UInt8Array:
        with torch.inference_mode():
            return np.asarray(compiled(torch.from_numpy(image)).numpy())

    return run, {"torch": torch.__version__, "backend": "inductor", "compile_seconds": time.perf_counter() - started}


def _torch_cuda_fp16(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        raise AbsentError(f"PyTorch {torch.__version__} sees no CUDA device")
    network = _torch_network(folder, threads).half().cuda()
    details = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    # The copy back waits for the device, so the time is from host to host.
    return lambda image: np.asarray(network.segment(torch.from_numpy(image).cuda()).cpu().numpy()), details


def _ours(name: str) -> Loader:
    def load(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
        from cdkd_edge.engines.protocol import segment_tiles
        from cdkd_edge.engines.runtimes import load_engine

        engine = load_engine(folder / name, threads=threads)
        manifest = engine.manifest
        details = {"runtime": manifest.runtime, "device": manifest.device, **manifest.libraries}
        return lambda image: segment_tiles(engine, image), details

    return load


def _onnxruntime(name: str) -> Loader:
    def load(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        return lambda image: np.asarray(session.run(None, {entry: image})[0]), {"onnxruntime": onnxruntime.__version__}

    return load


def _openvino(name: str, precision: str | None) -> Loader:
    """``precision``: what it is told to compute in; None leaves the choice, BF16 on many CPUs, to OpenVINO."""

    def load(folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
        from cdkd_edge.engines.openvino import import_openvino

        openvino = import_openvino()
        wanted = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            wanted["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino.Core().compile_model(str(folder / name), "CPU", wanted)
        request = compiled.create_infer_request()

        def run(image: UInt8Array) -> UInt8Array:
            request.infer({0: image}, share_inputs=True)
            return np.asarray(request.get_output_tensor(0).data)

        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        threads_used = compiled.get_property("INFERENCE_NUM_THREADS")
        return run, {"openvino": openvino.__version__, "computes_in": used, "threads_used": threads_used}

    return load


PEERS: dict[str, Peer] = {
    "ours-fp32": Peer("cdkd-edge build", "fp32", "ours.fp32.onnx", _ours("ours.fp32.onnx")),
    "ours-bf16": Peer("cdkd-edge build --bf16", "bf16", "ours.bf16.onnx", _ours("ours.bf16.onnx")),
    "ours-int8": Peer("cdkd-edge build --int8", "int8", "ours.int8.cpu.onnx", _ours("ours.int8.cpu.onnx")),
    "torch-eager": Peer("PyTorch eager", "fp32", "", _torch_eager),
    "torch-compile": Peer("torch.compile (inductor)", "fp32", "", _torch_compile),
    "ort-naive": Peer("ONNX Runtime, torch.onnx.export", "fp32", "naive.onnx", _onnxruntime("naive.onnx")),
    "ort-graph": Peer("ONNX Runtime, our graph", "fp32", "plain.onnx", _onnxruntime("plain.onnx")),
    "openvino-naive": Peer("OpenVINO, torch.onnx.export", "fp32", "naive.onnx", _openvino("naive.onnx", "f32")),
    "openvino-graph": Peer("OpenVINO, our graph", "fp32", "plain.onnx", _openvino("plain.onnx", "f32")),
    "openvino-default": Peer(
        "OpenVINO, torch.onnx.export, its own precision", "own choice", "naive.onnx", _openvino("naive.onnx", None)
    ),
    "ours-tensorrt-fp16": Peer(
        "cdkd-edge, TensorRT engine", "fp16", "ours.fp16.engine", _ours("ours.fp16.engine"), "ours-tensorrt-fp16"
    ),
    "torch-cuda-fp16": Peer("PyTorch eager, CUDA", "fp16", "", _torch_cuda_fp16, "ours-tensorrt-fp16"),
}
"""In the order of the table. The two with CUDA are written and have not run yet."""

REFERENCE = "torch-eager"
"""The FP32 network itself: every peer's labels are compared with its labels."""


def memory(field: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` of this process, bytes.

    Raises:
        OSError: the system does not tell.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _forget_peak() -> bool:
    """Start ``VmHWM`` anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def serve(key: str, folder: Path, threads: int, clock: str = "wall") -> None:
    """Be a peer until stdin ends, and tell seconds of this clock."""
    now = CLOCKS[clock]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**document: Any) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    started = time.perf_counter()
    try:
        run, details = PEERS[key].load(folder, threads)
    except Exception as error:  # whatever a library raises is the reason for which this peer is absent
        answer(absent=_reason(error))
        return
    tiles = np.load(folder / "tiles.npy")
    answer(load_seconds=time.perf_counter() - started, details=details)
    loading = memory("VmHWM")
    forgotten = False
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "label":
                labels, seconds = [], []
                for tile in tiles:
                    started = now()
                    labels.append(run(tile[None])[0].copy())
                    seconds.append(now() - started)
                np.save(folder / "labels" / f"{key}.npy", np.stack(labels).astype(np.uint8))
                del labels
                loading = max(loading, memory("VmHWM"))
                forgotten = _forget_peak()
                answer(seconds=seconds)
            elif order["do"] == "turn":
                tile = tiles[order["tile"]][None]
                started = now()
                for _ in range(order["runs"]):
                    run(tile)
                answer(seconds=now() - started)
            else:
                peak = memory("VmHWM")
                answer(peak_memory_bytes=max(peak, loading), running_memory_bytes=peak if forgotten else None)
        except Exception as error:  # likewise
            answer(absent=_reason(error))
            return


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = lines[0][:300] if lines else "no message"
    return what if isinstance(error, AbsentError | CdkdEdgeError) else f"{type(error).__name__}: {what}"


def main() -> None:
    """Parse and serve; started by :mod:`peer_rounds`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    serve(arguments.peer, arguments.folder, arguments.threads, arguments.clock)


if __name__ == "__main__":
    main()
