"""The engine of OpenVINO on the CPU, which is faster than ONNX Runtime on many.

The file is the graph itself: OpenVINO compiles it for the CPU at hand when it is loaded, in about a second for the
paper's network. So it holds no path and runs on every CPU of the kinds that OpenVINO knows. OpenVINO's own stored form
would save that second, and holds what was decided for one CPU.

OpenVINO computes in BF16 or FP16 unless it is told not to, where a CPU has them. Here it is told: FP32, or BF16 for an
engine that was asked for in BF16. INT8 graphs are for ONNX Runtime: docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cdkd_edge.core.errors import EngineError, MissingExtraError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.machine import available_cores, describe_machine, hand_memory_back, library_versions
from cdkd_edge.core.manifest import (
    OPENVINO_CPU,
    EngineManifest,
    FileRecord,
    GraphManifest,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.engines.onnxruntime import SLOTS, require_release, require_same_outputs, sample_outputs
from cdkd_edge.engines.protocol import (
    PROFILE_WARM_UP,
    ArtefactLabeller,
    Engine,
    KernelTimes,
    TimedKernel,
    UInt8Array,
    blank_value,
    timed_run,
)
from cdkd_edge.graph.files import read_graph
from cdkd_edge.graph.layers import attention_blocks

_COMPUTES_IN = {"fp32": "f32", "bf16": "bf16"}


def build_openvino_engine(graph: Path, destination: Path, precision: str) -> EngineManifest:
    """Compile an FP32 graph with OpenVINO, compare the result with the graph, and write the engine.

    Args:
        graph, destination: the graph and the engine, both ``.onnx``.
        precision: what OpenVINO computes in: ``fp32`` or ``bf16``.

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is a file that no build wrote.
        MissingExtraError: OpenVINO is not installed.
        EngineError: OpenVINO refuses the graph, or this CPU has no BF16.
        NumericalCheckError: the engine gives other labels than the graph.
    """
    started = time.perf_counter()
    require_replaceable(destination)
    source = read_manifest(graph, GraphManifest)
    if source.precision != "fp32":
        raise EngineError(f"{graph} is an {source.precision} graph; OpenVINO runs fp32", hint="name the fp32 graph")
    openvino = import_openvino()
    model = read_graph(graph, source)
    blocks = len(attention_blocks(model))
    serialized = model.SerializeToString()
    del model
    expected = sample_outputs(serialized, source)
    compiled = _compile(serialized, precision, None, graph.name)
    fused = _fused_attention(compiled)
    with OpenVinoLabeller(source, compiled) as engine:
        require_same_outputs(engine, expected, precision)
    with whole_file(destination) as temporary:
        temporary.write_bytes(serialized)
        manifest = EngineManifest.of_graph(
            source,
            precision=precision,
            runtime=OPENVINO_CPU,
            artefact=FileRecord.of(temporary, destination.name),
            device=describe_machine().cpu,
            attention_blocks=blocks,
            attention_fused=fused,
            build_seconds=time.perf_counter() - started,
            libraries={**library_versions(("onnx", "numpy")), "openvino": _release(openvino)},
        )
        write_manifest(destination, manifest)  # before the engine gets its name: no engine without a manifest
    return manifest


class OpenVinoLabeller(ArtefactLabeller):
    """A compiled graph. See :class:`cdkd_edge.engines.protocol.Labeller`."""

    def __init__(self, manifest: GraphManifest | EngineManifest, compiled: Any) -> None:
        """Allocate the slots of a compiled graph; ``manifest`` gives its sizes and outputs."""
        super().__init__(manifest)
        openvino = import_openvino()
        self.slots = SLOTS
        self._compiled = compiled
        self._inputs = [np.zeros((self.batch, 3, self.tile, self.tile), np.uint8) for _ in range(SLOTS)]
        self._outputs = [
            {name: np.full(shape, blank_value(name), np.uint8) for name, shape in manifest.outputs.items()}
            for _ in range(SLOTS)
        ]
        self._requests = []
        for image, outputs in zip(self._inputs, self._outputs, strict=True):
            # OpenVINO reads and writes these arrays: no copy per tile.
            request = compiled.create_infer_request()
            request.set_tensor("image", openvino.Tensor(image, shared_memory=True))
            for name, array in outputs.items():
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            self._requests.append(request)

    def input(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.input`."""
        return self._inputs[slot]

    def named_output(self, slot: int, name: str) -> UInt8Array:
        """An output of the slot by name."""
        return self._outputs[slot][name]

    def launch(self, slot: int) -> None:
        """Start computing the slot; returns at once."""
        self._clear(slot)
        with self._failures(slot):
            self._requests[slot].start_async()

    def wait(self, slot: int) -> None:
        """Wait until the slot is done."""
        with self._failures(slot):
            self._requests[slot].wait()

    @contextlib.contextmanager
    def _failures(self, slot: int) -> Iterator[None]:
        """Turn an error of OpenVINO into an EngineError, and leave no labels in the slot."""
        try:
            yield
        except Exception as error:  # OpenVINO raises RuntimeError; IndexError: closed
            self._clear(slot)
            raise EngineError(f"the engine failed on a tile: {_one_line(error)}") from None

    def _clear(self, slot: int) -> None:
        """Reset the outputs: no labels, confidence 0."""
        for name, array in self._outputs[slot].items():
            array.fill(blank_value(name))

    def close(self) -> None:
        """Release the compiled graph, after what runs has ended; buffers go with the object."""
        self._requests.clear()
        self._compiled = None


class OpenVinoEngine(OpenVinoLabeller, Engine):
    """An engine file. See :class:`cdkd_edge.engines.protocol.Engine`."""

    def __init__(self, path: Path, manifest: EngineManifest, threads: int | None = None) -> None:
        """Load an engine whose manifest has been read.

        Args:
            path: the file.
            manifest: its manifest.
            threads: threads for one tile. Default: the cores this process may use.

        Raises:
            MissingExtraError: OpenVINO is not installed.
            EngineError: it was built with another release of OpenVINO, this one refuses it, or this CPU has no BF16.
        """
        require_release(path, manifest, "openvino", _release(import_openvino()))
        read_graph(path, manifest)
        self.manifest = manifest
        self._path, self._threads = path, threads
        super().__init__(manifest, _compile(str(path), manifest.precision, threads, path.name))
        hand_memory_back()  # 120 MB of the paper's network: what reading and compiling left

    def kernel_times(self, runs: int) -> KernelTimes:
        """See :meth:`cdkd_edge.engines.protocol.Engine.kernel_times`; means, because OpenVINO keeps only these."""
        compiled = _compile(str(self._path), self.manifest.precision, self._threads, self._path.name, profile=True)
        nodes = _nodes_of_kernels(compiled)
        with OpenVinoLabeller(self.manifest, compiled) as copy:
            copy.input(0)[:] = self.input(0)
            for _ in range(PROFILE_WARM_UP):
                timed_run(copy)
            before = _totals_of_kernels(copy._requests[0], PROFILE_WARM_UP)
            plain, profiled = zip(*((timed_run(self), timed_run(copy)) for _ in range(runs)), strict=True)
            totals = _totals_of_kernels(copy._requests[0], PROFILE_WARM_UP + runs)
        kernels = tuple(
            TimedKernel(name, (*nodes.get(name, ()), name), (total - before.get(name, 0.0)) / runs)
            for name, total in totals.items()
        )
        return KernelTimes(kernels, sum(profiled) / runs, sum(plain) / runs, runs, "mean")


def cpu_precisions() -> tuple[str, ...]:
    """Precisions that OpenVINO has instructions for on this CPU, as it names them: ``FP32``, ``BF16``, ``INT8``.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    return tuple(import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def import_openvino() -> Any:
    """The package, without its telemetry, which would report the import to a server."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it was not installed
    try:
        import openvino
    except ModuleNotFoundError:
        raise MissingExtraError("OpenVINO", "openvino", "an engine of OpenVINO") from None
    except ImportError as error:  # a library of another platform or release
        raise EngineError(f"OpenVINO is installed and does not start: {_one_line(error)}") from None
    return openvino


def _release(openvino: Any) -> str:
    """``2026.4.1``, without the number of the build."""
    return str(openvino.__version__).partition("-")[0]


def _compile(model: bytes | str, precision: str, threads: int | None, name: str, *, profile: bool = False) -> Any:
    """Compile a graph, or the file of one, for the CPU and one tile at a time; ``profile``: to time its kernels.

    Property names: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
    """
    if precision == "bf16" and "BF16" not in cpu_precisions():
        raise EngineError(f"{name} is to run in BF16, which this CPU does not have", hint="build it in FP32")
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _COMPUTES_IN[precision],  # else it takes BF16 or FP16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads or available_cores(),
        # Pinned threads of two engines would share the first cores, and leave the others idle.
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": profile,
    }
    if threads:  # otherwise it leaves out the second thread of a core
        options["ENABLE_HYPER_THREADING"] = True
    core = import_openvino().Core()
    try:
        return core.compile_model(core.read_model(model), "CPU", options)
    except Exception as error:  # RuntimeError, by release also others
        raise EngineError(f"loading {name} failed in OpenVINO: {_one_line(error)}") from None


def _nodes_of_kernels(compiled: Any) -> dict[str, tuple[str, ...]]:
    """By name of a kernel, the nodes of the graph that it stands for."""
    return {
        node.get_friendly_name(): tuple(node.get_rt_info()["originalLayersNames"].astype(str).split(","))
        for node in compiled.get_runtime_model().get_ops()
    }


def _totals_of_kernels(request: Any, runs: int) -> dict[str, float]:
    """By name of a kernel, its seconds in all runs so far. OpenVINO gives the mean over all runs, in microseconds."""
    return {one.node_name: runs * one.real_time.total_seconds() for one in request.profiling_info if one.real_time}


def _fused_attention(compiled: Any) -> int:
    """How many attention blocks OpenVINO computes in one kernel: without writing the scores to memory.

    Such a kernel stands for the softmax of a block and both of its products.
    """
    kernels = map(" ".join, _nodes_of_kernels(compiled).values())
    return sum("/Softmax" in names and names.count("/MatMul") > 1 for names in kernels)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
