"""The engine that runs on every machine: ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import shutil
import time
from bisect import bisect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from cdkd_edge.core.errors import EngineError, NumericalCheckError, SystemRefusalError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.machine import describe_machine, library_versions
from cdkd_edge.core.manifest import (
    LABELS,
    ONNXRUNTIME_CPU,
    EngineManifest,
    FileRecord,
    GraphManifest,
    build_options,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import (
    PROFILE_WARM_UP,
    ArtefactLabeller,
    Engine,
    KernelTimes,
    Labeller,
    UInt8Array,
    blank_value,
    median_times,
    timed_run,
)
from cdkd_edge.graph.cpu import cpu_twin, fuse_attention, open_session, session_options, signed_weights_are_exact
from cdkd_edge.graph.files import read_graph
from cdkd_edge.graph.fp16_simulation import fp16_on_cpu

# Share of pixels on which engine and graph must agree: additions in another order change the rest; before a quantiser
# they can change a value by a whole step. BF16 differs from its FP32 graph by rounding, and has the limit that INT8 has
# against FP32.
MIN_AGREEMENT = {"fp32": 0.9999, "int8": 0.99, "bf16": 0.98}
SLOTS = 3  # one tile being read, one computed, one written


def build_cpu_engine(graph: Path, destination: Path) -> EngineManifest:
    """Optimise a graph for ONNX Runtime's CPU kernels, compare the result with the graph, and write it.

    The file holds the optimisations that any CPU can run. Those that depend on the CPU (blocked convolution layouts)
    are applied when it is loaded. The engine of an INT8 graph is its twin (:mod:`cdkd_edge.graph.cpu`).

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is a file that no build wrote.
        EngineError: ONNX Runtime cannot build it.
        NumericalCheckError: the engine gives other labels than the graph (of INT8, its twin).
    """
    started = time.perf_counter()
    require_replaceable(destination)
    source = read_manifest(graph, GraphManifest)
    if source.precision not in ("fp32", "int8"):
        raise EngineError(
            f"{graph} is an {source.precision} graph; a CPU runs fp32 and int8",
            hint="build it where TensorRT is, or build the fp32 graph here",
        )
    model = read_graph(graph, source)
    if source.precision == "int8":
        model = cpu_twin(model)
    plain = model.SerializeToString()
    fused, blocks = fuse_attention(model)
    serialized = model.SerializeToString()
    del model
    with whole_file(destination) as temporary:
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(temporary)
        try:
            _session(serialized, options, f"optimising {graph.name}")
        except EngineError:
            # ONNX Runtime does not say why it cannot write.
            if shutil.disk_usage(temporary.parent).free < len(serialized):
                raise SystemRefusalError(f"{destination}: no space left on the device") from None
            raise
        del serialized
        expected = sample_outputs(plain, source)
        del plain
        with OnnxLabeller(temporary, source) as engine:
            require_same_outputs(engine, expected, source.precision)
        manifest = EngineManifest.of_graph(
            source,
            runtime=ONNXRUNTIME_CPU,
            artefact=FileRecord.of(temporary, destination.name),
            device=describe_machine().cpu,
            attention_blocks=blocks,
            attention_fused=fused,
            build_seconds=time.perf_counter() - started,
            # From the module, because the package may be onnxruntime-gpu or a vendor's build.
            libraries={**library_versions(("onnx", "numpy")), "onnxruntime": onnxruntime.__version__},
        )
        write_manifest(destination, manifest)  # before the engine gets its name: no engine without a manifest
    return manifest


class OnnxLabeller(ArtefactLabeller):
    """An ONNX file in ONNX Runtime on the CPU. See :class:`cdkd_edge.engines.protocol.Labeller`."""

    def __init__(
        self,
        path: Path,
        manifest: GraphManifest | EngineManifest,
        threads: int | None = None,
        model: bytes | None = None,
        profile: Path | None = None,
    ) -> None:
        """Load a graph or an engine whose manifest has been read.

        Args:
            path: the file.
            manifest: its manifest.
            threads: threads for one tile. Default: the cores this process may use.
            model: runs instead of the file: the same function in operators that a CPU has.
            profile: how the name of the file begins that ONNX Runtime's profiler writes. Default: no profiler.

        Raises:
            EngineError: ONNX Runtime refuses it.
        """
        super().__init__(manifest)
        self.slots = SLOTS
        options = engine_options(manifest.precision, threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self._session = _session(model or str(path), options, f"loading {path.name}")
        self._inputs = [np.zeros((self.batch, 3, self.tile, self.tile), np.uint8) for _ in range(SLOTS)]
        self._outputs = [
            {name: np.zeros(shape, np.uint8) for name, shape in manifest.outputs.items()} for _ in range(SLOTS)
        ]
        for slot in range(SLOTS):
            self._clear(slot)
        self._bindings = []
        for image, outputs in zip(self._inputs, self._outputs, strict=True):
            # ONNX Runtime reads and writes the buffers: no copy and no allocation per tile.
            binding = self._session.io_binding()
            binding.bind_input("image", "cpu", 0, np.uint8, image.shape, image.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, np.uint8, array.shape, array.ctypes.data)
            self._bindings.append(binding)

    def input(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.input`."""
        return self._inputs[slot]

    def named_output(self, slot: int, name: str) -> UInt8Array:
        """An output of the slot by name."""
        return self._outputs[slot][name]

    def _clear(self, slot: int) -> None:
        """Reset the outputs: no labels, confidence 0."""
        for name, array in self._outputs[slot].items():
            array.fill(blank_value(name))

    def launch(self, slot: int) -> None:
        """Compute the slot; returns when it is done."""
        self._clear(slot)
        try:
            self._session.run_with_iobinding(self._bindings[slot])
        except Exception as error:  # ONNX Runtime's own types share no base but Exception
            self._clear(slot)
            raise EngineError(f"the engine failed on a tile: {' '.join(str(error).split())[:300]}") from None

    def wait(self, slot: int) -> None:
        """Return at once: :meth:`launch` has waited."""

    def close(self) -> None:
        """Release the session; buffers go with the object."""
        self._bindings.clear()
        self._session = None


def graph_labeller(path: Path, manifest: GraphManifest, threads: int | None = None) -> OnnxLabeller:
    """A graph in ONNX Runtime on the CPU, of any precision.

    An FP32 graph runs as it was exported; of an FP16 graph every value is rounded as an FP16 engine stores it
    (:func:`cdkd_edge.graph.fp16_simulation.fp16_on_cpu`); of an INT8 graph the twin runs (:mod:`cdkd_edge.graph.cpu`).

    Raises:
        GraphError: it is no graph, or not one of its precision.
        EngineError: ONNX Runtime refuses it.
    """
    model = read_graph(path, manifest)
    if manifest.precision == "fp32":
        del model
        return OnnxLabeller(path, manifest, threads)
    if manifest.precision == "fp16":
        model = fp16_on_cpu(model)
    else:
        model = cpu_twin(model)
        fuse_attention(model)
    return OnnxLabeller(path, manifest, threads, model.SerializeToString())


class CpuEngine(OnnxLabeller, Engine):
    """An engine file. See :class:`cdkd_edge.engines.protocol.Engine`."""

    def __init__(self, path: Path, manifest: EngineManifest, threads: int | None = None) -> None:
        """Load an engine whose manifest has been read; arguments as for :class:`OnnxLabeller`.

        Raises:
            EngineError: it was built with another release of ONNX Runtime, or this one refuses it.
        """
        require_release(path, manifest, "onnxruntime", onnxruntime.__version__)
        read_graph(path, manifest)
        self.manifest = manifest
        self._path, self._threads = path, threads
        super().__init__(path, manifest, threads)

    def kernel_times(self, runs: int) -> KernelTimes:
        """See :meth:`cdkd_edge.engines.protocol.Engine.kernel_times`."""
        with (
            scratch_folder() as folder,
            OnnxLabeller(self._path, self.manifest, self._threads, profile=folder / "profile") as copy,
        ):
            copy.input(0)[:] = self.input(0)
            pairs = [(timed_run(self), timed_run(copy)) for _ in range(PROFILE_WARM_UP + runs)]
            events = json.loads(Path(copy._session.end_profiling()).read_bytes())
        # An event of the session for each run, and one of a node for each of its kernels. A name ends in what it timed.
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
        reported: list[list[tuple[str, float]]] = [[] for _ in starts]
        for event in sorted(events, key=lambda one: int(one["ts"])):
            name = str(event["name"]).removesuffix("_kernel_time")
            if event["cat"] == "Node" and name != event["name"]:
                reported[bisect(starts, event["ts"]) - 1].append((name, event["dur"] / 1e6))
        plain, profiled = zip(*pairs, strict=True)
        # A kernel is named after the node that it was made from.
        return median_times(plain, profiled, reported, lambda name: (name,))


def require_release(path: Path, manifest: EngineManifest, library: str, here: str) -> None:
    """Make sure that an engine was built with this release of its library, ``2026.4`` for ``2026.4.1``.

    Raises:
        EngineError: it was built with another one.
    """
    built_with = manifest.libraries.get(library, "an unknown release")
    if built_with.split(".")[:2] != here.split(".")[:2]:
        raise EngineError(
            f"{path} was built with {library} {built_with}; this is {here}",
            hint=f"build it again from {manifest.graph.file}: cdkd-edge build "
            f"{build_options(manifest.precision, manifest.output)}",
        )


def sample_outputs(graph: bytes, source: GraphManifest) -> dict[str, UInt8Array]:
    """What a graph gives for sample tiles, by output; an INT8 graph cannot run here, so give its twin."""
    session = _session(graph, session_options(), f"running {source.artefact.file}")
    names = list(source.outputs)
    return dict(zip(names, session.run(names, {"image": _sample_batch(source)}), strict=True))


def require_same_outputs(engine: Labeller, expected: Mapping[str, UInt8Array], precision: str) -> None:
    """Make sure that an engine gives what its graph gave: :func:`sample_outputs`. Every CPU engine passes this check.

    Raises:
        NumericalCheckError: fewer pixels agree than :data:`MIN_AGREEMENT` asks for.
    """
    engine.input(0)[:] = _sample_batch(engine)
    engine.launch(0)
    engine.wait(0)
    for name, values in expected.items():
        step = 0 if name == LABELS else 1  # a confidence may round up or down
        agreement = float((np.abs(values.astype(np.int16) - engine.named_output(0, name)) <= step).mean())
        if agreement < MIN_AGREEMENT[precision]:
            raise NumericalCheckError(
                f"the {precision.upper()} engine gives {'another label' if name == LABELS else f'another {name}'} than "
                f"the graph on {1 - agreement:.3%} of the pixels; at most {1 - MIN_AGREEMENT[precision]:.2%} may differ"
            )


def _sample_batch(sized: Labeller | GraphManifest) -> UInt8Array:
    return np.repeat(sample_tiles(sized.tile, 1), sized.batch, axis=0)


def engine_options(precision: str, threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of an engine's session: where signed products saturate, signed weights are made unsigned."""
    options = session_options(threads)
    if precision == "int8" and not signed_weights_are_exact():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _session(model: str | bytes, options: onnxruntime.SessionOptions, doing: str) -> Any:
    return open_session(model, options, lambda reason: EngineError(f"{doing} failed in ONNX Runtime: {reason}"))
