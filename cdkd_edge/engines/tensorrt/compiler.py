"""Parse and compile with TensorRT: the part that needs it, run in a process of its own by :mod:`.child`.

Releases differ; what one has and another does not is asked of the module where it matters.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.core.errors import EngineError
from cdkd_edge.engines.tensorrt.api import TensorRT, find_tensorrt, log_to
from cdkd_edge.engines.tensorrt.device import Gpu, NoGpu, find_gpu
from cdkd_edge.engines.tensorrt.messages import ParserComplaint, explain
from cdkd_edge.engines.tensorrt.options import default_workspace
from cdkd_edge.engines.tensorrt.timing import TimingCache

if TYPE_CHECKING:
    import tensorrt as trt

_STEP_EVERY_S = 0.1
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|insufficient memory|Could not find any implementation|MemoryAllocation|bad_alloc"
    r"|Requested amount of GPU memory|MEM_ALLOC_FAILED",
    re.IGNORECASE,
)
"""In TensorRT's error lines. The third is what it says when no kernel fits into what is left."""


Send = Callable[..., None]
"""Tells the parent an event by name, with its fields."""


class BuilderMemoryError(EngineError):
    """There was not enough memory to build."""


@dataclass(frozen=True)
class BuildRequest:
    """What the parent asks for."""

    graph: str
    destination: str
    precision: str
    workspace_bytes: int | None
    optimization_level: int | None
    timing_cache: bool
    sparse: bool
    weakly_typed: bool
    targets: tuple[str, ...]
    verbose: bool


class _Log:
    """Where TensorRT's lines go: to the parent as far as it cares, and what is needed of them is kept."""

    def __init__(self, send: Send, verbose: bool) -> None:
        self._send, self._verbose = send, verbose
        self.errors: list[str] = []
        self.layer_lines: list[str] = []

    def __call__(self, severity: str, text: str) -> None:
        if severity == "error":
            self.errors.append(text)
        if "LayerType:" in text or "Memory:" in text:
            self.layer_lines.append(text)
        if self._verbose or severity in ("error", "warning"):
            self._send("log", severity=severity, text=text)

    def failure(self, api: TensorRT, doing: str) -> EngineError:
        """The error for a step that TensorRT did not do, from what it logged."""
        if any(_OUT_OF_MEMORY.search(line) for line in self.errors):
            return BuilderMemoryError(f"out of memory {doing}")
        said = " ".join(self.errors[0].split())[:300] if self.errors else "it does not say why"
        return EngineError(f"{api.name} failed {doing}: {said}", hint="--verbose shows all that it logs")


def compile_engine(request: BuildRequest, send: Send) -> dict[str, Any]:
    """Parse, build, write the engine; return the fields of ``finished``.

    Raises:
        EngineError: TensorRT refuses the options, the graph, or runs out of memory.
        OSError: the engine cannot be written.
    """
    api = find_tensorrt()
    gpu = find_gpu()
    log = _Log(send, request.verbose)
    with log_to(log):
        builder: trt.Builder = api.module.Builder(api.logger)
        network = _create_network(api, builder, request)
        config = builder.create_builder_config()
        _set_targets(api, config, request.targets, gpu)
        workspace = _configure(api, config, request, gpu)
        send(
            "started",
            kind=api.kind,
            version=api.version,
            gpu=None if isinstance(gpu, NoGpu) else dataclasses.asdict(gpu),
            workspace_bytes=workspace,
        )
        _parse(api, network, Path(request.graph))
        send("parsed", tensors=_tensors(network), attention_nodes=_attention_nodes(api, network))
        monitor = _monitor(api, send)
        config.progress_monitor = monitor
        cache = TimingCache(api, config, gpu) if request.timing_cache and not request.targets else None
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise log.failure(api, "while building")
        if cache:
            cache.keep()
        Path(request.destination).write_bytes(plan)
        inspector = scratch = None
        if not request.targets and isinstance(gpu, Gpu):
            inspector, scratch = _inspect(api, plan, log)
    return {
        "flags": _flags(api, config),
        "optimization_level": config.builder_optimization_level,
        "timing_cache": bool(cache and cache.used),
        "inspector": inspector,
        "scratch_bytes": scratch,
        "layer_lines": log.layer_lines,
        "notes": cache.notes if cache else [],
    }


def _create_network(api: TensorRT, builder: trt.Builder, request: BuildRequest) -> trt.INetworkDefinition:
    flags = 0
    if request.weakly_typed:
        if not hasattr(api.module.BuilderFlag, "FP16"):
            raise EngineError(
                f"{api.name} has no weak typing: precisions are those of the graph", hint="build without --weakly-typed"
            )
    elif strongly := getattr(api.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None):
        flags = 1 << int(strongly)
    return builder.create_network(flags)


def _set_targets(api: TensorRT, config: trt.IBuilderConfig, targets: tuple[str, ...], gpu: Gpu | NoGpu) -> None:
    if not targets:
        if isinstance(gpu, NoGpu):
            hint = "TensorRT-RTX compiles for a GPU that is not here: --target sm86"
            raise EngineError(f"{api.name} builds for the GPU at hand, and {gpu.reason}", hint=hint)
        return
    rtx: Any = config
    if not hasattr(rtx, "set_compute_capability"):
        raise EngineError(
            f"{api.name} builds for the GPU at hand alone; --target needs TensorRT-RTX",
            hint="carry the graph and its .json to the board, and build there",
        )
    known = {
        f"{match[1]}.{match[2]}": name
        for name in dir(api.module.ComputeCapability)
        if (match := re.fullmatch(r"SM(\d+)(\d)", name))
    }
    rtx.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if target not in known:
            names = ", ".join(sorted(known.values(), key=lambda name: int(name[2:])))
            raise EngineError(f"{api.name} does not compile for {target}; it knows {names}")
        rtx.set_compute_capability(getattr(api.module.ComputeCapability, known[target]), index)


def _configure(api: TensorRT, config: trt.IBuilderConfig, request: BuildRequest, gpu: Gpu | NoGpu) -> int | None:
    """Set what the request asks; the workspace limit in bytes, None if it is TensorRT's own."""
    config.profiling_verbosity = api.module.ProfilingVerbosity.DETAILED  # names and types of layers, for `inspect`
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    flag = api.module.BuilderFlag
    if request.sparse:
        config.set_flag(flag.SPARSE_WEIGHTS)
    if request.precision == "fp32" and hasattr(flag, "TF32"):
        config.clear_flag(flag.TF32)  # on by default; its 10 bits of mantissa are FP16's, and FP32 is the reference
    if request.weakly_typed and request.precision in ("fp16", "int8"):
        config.set_flag(flag.FP16)
    if request.weakly_typed and request.precision == "int8":
        config.set_flag(flag.INT8)
    workspace = request.workspace_bytes
    if workspace is None and isinstance(gpu, Gpu) and not request.targets:
        workspace = default_workspace(gpu, Path(request.graph).stat().st_size)
    if workspace is not None:
        config.set_memory_pool_limit(api.module.MemoryPoolType.WORKSPACE, workspace)
    return workspace


def _parse(api: TensorRT, network: trt.INetworkDefinition, graph: Path) -> None:
    parser: trt.OnnxParser = api.module.OnnxParser(network, api.logger)
    if parser.parse(graph.read_bytes()):
        if not network.num_outputs:
            raise EngineError(f"{api.name} finds no outputs in {graph.name}: it is no graph", hint="export it again")
        return
    error: Any = parser.get_error(0) if parser.num_errors else None
    # Not every release has all of them.
    said = {name: str(getattr(error, name, lambda: "")()) for name in ("node_name", "node_operator", "desc")}
    complaint = ParserComplaint(
        node=said["node_name"],
        operator=said["node_operator"],
        text=said["desc"] or "its parser does not say why",
        **_origin(graph, said["node_operator"]),
    )
    message, hint = explain(complaint, api.name)
    raise EngineError(message, hint=hint)


def _origin(graph: Path, operator: str) -> dict[str, Any]:
    """Domain of an operator and opset of the graph; the parser's errors have neither."""
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception:  # protobuf's own types: it is no graph, and the parser has said so
        return {"domain": "", "opset": 0}
    domains = [node.domain for node in model.graph.node if node.op_type == operator]
    opsets = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    return {"domain": domains[0] if domains else "", "opset": opsets[0] if opsets else 0}


def _tensors(network: trt.INetworkDefinition) -> list[dict[str, Any]]:
    """Inputs, then outputs."""
    found = [network.get_input(index) for index in range(network.num_inputs)]
    found += [network.get_output(index) for index in range(network.num_outputs)]
    return [{"name": item.name, "dtype": item.dtype.name.lower(), "shape": _sizes(item.shape)} for item in found]


def _sizes(dimensions: trt.Dims) -> list[int]:
    return [dimensions[index] for index in range(len(dimensions))]


def _attention_nodes(api: TensorRT, network: trt.INetworkDefinition) -> list[str]:
    """Names of the softmaxes, and of attentions that are one operator in the graph already."""
    kinds = api.module.LayerType
    attention = {kinds.SOFTMAX, getattr(kinds, "ATTENTION_INPUT", kinds.SOFTMAX)}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [layer.name for layer in layers if layer.type in attention]


def _monitor(api: TensorRT, send: Send) -> Any:
    class Monitor(api.module.IProgressMonitor):  # type: ignore[name-defined,misc]
        """Called from several threads. The parent ends this process if it has lost interest."""

        def __init__(self) -> None:
            api.module.IProgressMonitor.__init__(self)
            self._last = 0.0
            self._outermost: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outermost.add(phase_name)
            send("phase", name=phase_name, parent=parent_phase, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._last >= _STEP_EVERY_S or phase_name in self._outermost:
                self._last = now
                send("step", name=phase_name, done=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _inspect(api: TensorRT, plan: Any, log: _Log) -> tuple[str, int | None]:
    """What the engine says of itself: layers as JSON, activation memory in bytes."""
    runtime: trt.Runtime = api.module.Runtime(api.logger)
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise log.failure(api, "loading the engine it has just built")
    text = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    size = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None)
    return str(text), None if size is None else int(size)


def _flags(api: TensorRT, config: trt.IBuilderConfig) -> list[str]:
    members: Mapping[str, Any] = api.module.BuilderFlag.__members__
    return sorted(name for name, flag in members.items() if config.get_flag(flag))
