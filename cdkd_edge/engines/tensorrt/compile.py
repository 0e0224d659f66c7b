"""The child process that builds an engine: parses and compiles with TensorRT, which may crash or be killed here.

``python -m cdkd_edge.engines.tensorrt.compile`` reads a :class:`BuildRequest` as JSON from stdin, writes the engine to
the path it names, and answers on stdout with JSON lines, each with an ``event``:

- ``started``: kind and version of TensorRT, GPU, workspace limit;
- ``parsed``: inputs and outputs, and the attention blocks (softmaxes) by name;
- ``phase`` with ``name``, ``parent``, ``steps``, and ``step`` with ``name``, ``done``: TensorRT's progress;
- ``log`` with ``severity`` and ``text``;
- the last one: ``finished`` with what the manifest needs, or ``failed`` with ``reason``, ``message``, ``hint``.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.core.errors import CdkdEdgeError, EngineError, SystemRefusalError
from cdkd_edge.core.process import EventWriter, end_with_parent
from cdkd_edge.engines.tensorrt.advice import ParserComplaint, advice, explain, is_out_of_memory
from cdkd_edge.engines.tensorrt.find import GpuInfo, NoGpu, TensorRT, find_gpu, find_tensorrt, log_to, scratch_bytes
from cdkd_edge.engines.tensorrt.options import TensorRTOptions, TimingCache, default_workspace

if TYPE_CHECKING:
    import tensorrt as trt

_SECONDS_BETWEEN_STEPS = 0.1
_PORTABLE = (
    "portable: made for every GPU of compute capability {}. NVIDIA says that this may be slower than an engine for one "
    "GPU (`bench` measures both), and advises to build it on the smallest of the boards"
)
"""By the description of ``SAME_COMPUTE_CAPABILITY`` and "Compatibility Checks" of the TensorRT Developer Guide."""

Send = Callable[..., None]  # sends an event to the parent: its name, then its fields by keyword


class BuilderMemoryError(EngineError):
    """There was not enough memory to build."""


@dataclass(frozen=True)
class BuildRequest:
    """What the parent asks for."""

    graph: str
    destination: str
    precision: str
    options: TensorRTOptions


def main() -> int:
    """Read the request, build, answer."""
    import msgspec

    end_with_parent()
    warnings.simplefilter("ignore", DeprecationWarning)
    answers = EventWriter.to_parent()

    def send(event: str, **fields: Any) -> None:
        answers.write(event=event, **fields)

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildRequest)
    try:
        result = compile_engine(request, send)
    except (MemoryError, BuilderMemoryError) as error:
        send("failed", reason="memory", message=str(error) or "out of memory while building", hint=None)
    except (CdkdEdgeError, OSError) as error:
        reason = "system" if isinstance(error, (OSError, SystemRefusalError)) else "build"
        text = getattr(error, "strerror", None) or str(error)
        send("failed", reason=reason, message=text, hint=getattr(error, "hint", None))
    else:
        send("finished", **result)
    return 0


def compile_engine(request: BuildRequest, send: Send) -> dict[str, Any]:
    """Parse, build and write the engine; returns the fields of ``finished``.

    Raises:
        EngineError: TensorRT refuses the options or the graph, or runs out of memory.
        OSError: the engine cannot be written.
    """
    api = find_tensorrt()
    gpu = find_gpu()
    options = request.options
    log = _Log(send, options.verbose)
    with log_to(log):
        builder: trt.Builder = api.module.Builder(api.logger)
        network = _create_network(api, builder, request)
        config = builder.create_builder_config()
        _set_targets(api, config, options.targets, gpu)
        workspace = _configure(api, config, request, gpu)
        notes = _make_portable(api, config, gpu) if options.portable else []
        facts = None if isinstance(gpu, NoGpu) else dataclasses.asdict(gpu)
        send("started", kind=api.kind, version=api.version, gpu=facts, workspace_bytes=workspace)
        _parse(api, network, Path(request.graph))
        send("parsed", tensors=_tensors(network), attention_nodes=_attention_nodes(api, network))
        monitor = _monitor(api, send)
        config.progress_monitor = monitor
        cache = TimingCache(api, config, gpu) if options.timing_cache and not options.targets else None
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise log.failure(api, "while building")
        if cache:
            cache.keep()
        Path(request.destination).write_bytes(plan)
        inspector = scratch = None
        if not options.targets and isinstance(gpu, GpuInfo):
            inspector, scratch = _inspect(api, plan, log)
    return {
        "flags": _flags(api, config),
        "optimization_level": config.builder_optimization_level,
        "timing_cache": bool(cache and cache.used),
        "inspector": inspector,
        "scratch_bytes": scratch,
        "layer_lines": log.layer_lines,
        "notes": [*notes, *(cache.notes if cache else ())],
    }


class _Log:
    """Receives TensorRT's log: sends it to the parent as far as wanted, keeps errors and the list of layers."""

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
        """The error for a step that failed, from what TensorRT logged."""
        if any(map(is_out_of_memory, self.errors)):
            return BuilderMemoryError(f"out of memory {doing}")
        said = " ".join(self.errors[0].split())[:300] if self.errors else "it does not say why"
        hint = advice(self.errors) or "--verbose shows everything it logs"
        return EngineError(f"{api.name} failed {doing}: {said}", hint=hint)


def _create_network(api: TensorRT, builder: trt.Builder, request: BuildRequest) -> trt.INetworkDefinition:
    flags = 0
    if request.options.weakly_typed:
        if not hasattr(api.module.BuilderFlag, "FP16"):
            raise EngineError(
                f"{api.name} has no weak typing: precisions are those of the graph", hint="build without --weakly-typed"
            )
    elif strongly := getattr(api.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None):
        flags = 1 << int(strongly)
    return builder.create_network(flags)


def _set_targets(api: TensorRT, config: trt.IBuilderConfig, targets: tuple[str, ...], gpu: GpuInfo | NoGpu) -> None:
    if not targets:
        if isinstance(gpu, NoGpu):
            hint = "TensorRT-RTX compiles for a GPU that is not here: --target sm86"
            raise EngineError(f"{api.name} builds only for the GPU of this machine, and {gpu.reason}", hint=hint)
        return
    rtx: Any = config
    if not hasattr(rtx, "set_compute_capability"):
        raise EngineError(
            f"{api.name} builds only for the GPU of this machine; --target needs TensorRT-RTX",
            hint="carry the graph and its .json to the board, and build there",
        )
    members = api.module.ComputeCapability.__members__
    known = {f"{match[1]}.{match[2]}": name for name in members if (match := re.fullmatch(r"SM(\d+)(\d)", name))}
    rtx.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if target not in known:
            names = ", ".join(sorted(known.values(), key=lambda name: int(name[2:])))
            raise EngineError(f"{api.name} does not compile for {target}; it knows {names}")
        rtx.set_compute_capability(members[known[target]], index)


def _make_portable(api: TensorRT, config: trt.IBuilderConfig, gpu: GpuInfo | NoGpu) -> list[str]:
    """Let the engine run on every GPU of this compute capability; returns a note about what that costs."""
    levels = api.module.HardwareCompatibilityLevel
    if hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
        config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY
        if config.hardware_compatibility_level == levels.SAME_COMPUTE_CAPABILITY:
            return [_PORTABLE.format(gpu.compute_capability if isinstance(gpu, GpuInfo) else "")]
        # TensorRT-RTX has the name, logs that it is unsupported, and changes nothing.
        hint = "name the compute capabilities: --target sm86 --target sm89"
        raise EngineError(f"{api.name} has no --portable: its engines are made for compute capabilities", hint=hint)
    raise EngineError(
        f"{api.name} cannot build an engine for several GPUs: --portable needs TensorRT 10.9 or newer (JetPack 7.2)",
        hint="build on each board, without --portable",
    )


def _configure(api: TensorRT, config: trt.IBuilderConfig, request: BuildRequest, gpu: GpuInfo | NoGpu) -> int | None:
    """Set the options; returns the workspace limit in bytes, None if it is TensorRT's own."""
    options, flag = request.options, api.module.BuilderFlag
    config.profiling_verbosity = api.module.ProfilingVerbosity.DETAILED  # names and types of layers, for `inspect`
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.sparse:
        config.set_flag(flag.SPARSE_WEIGHTS)
    if request.precision == "fp32" and hasattr(flag, "TF32"):
        config.clear_flag(flag.TF32)  # on by default; its mantissa has FP16's 10 bits, and FP32 is the reference
    if options.weakly_typed and hasattr(flag, "FP16"):  # without it, _create_network has refused
        for kind in {"fp16": (flag.FP16,), "int8": (flag.FP16, flag.INT8)}.get(request.precision, ()):
            config.set_flag(kind)
    workspace = options.workspace_bytes
    if workspace is None and isinstance(gpu, GpuInfo) and not options.targets:
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
    node, operator, text = (str(getattr(error, name, lambda: "")()) for name in ("node_name", "node_operator", "desc"))
    domain, opset = _origin(graph, operator)
    complaint = ParserComplaint(node, operator, domain, opset, text or "its parser does not say why")
    message, hint = explain(complaint, api.name)
    raise EngineError(message, hint=hint)


def _origin(graph: Path, operator: str) -> tuple[str, int]:
    """Domain of an operator and opset of the graph, which the parser's errors do not name."""
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception:  # protobuf's own types: it is no graph, as the parser's error says
        return "", 0
    domain = next((node.domain for node in model.graph.node if node.op_type == operator), "")
    return domain, next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def _tensors(network: trt.INetworkDefinition) -> list[dict[str, Any]]:
    """Inputs, then outputs."""
    found = [network.get_input(index) for index in range(network.num_inputs)]
    found += [network.get_output(index) for index in range(network.num_outputs)]
    return [
        {"name": item.name, "dtype": item.dtype.name.lower(), "shape": [item.shape[i] for i in range(len(item.shape))]}
        for item in found
    ]


def _attention_nodes(api: TensorRT, network: trt.INetworkDefinition) -> list[str]:
    """Names of the softmaxes, and of attentions that are one operator in the graph already."""
    kinds = api.module.LayerType
    attention = {kinds.SOFTMAX, getattr(kinds, "ATTENTION_INPUT", kinds.SOFTMAX)}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [layer.name for layer in layers if layer.type in attention]


def _monitor(api: TensorRT, send: Send) -> Any:
    class Monitor(api.module.IProgressMonitor):  # type: ignore[name-defined,misc]
        """Called from several threads. Never cancels: the parent kills this process instead."""

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
            if now - self._last >= _SECONDS_BETWEEN_STEPS or phase_name in self._outermost:
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
    return str(text), scratch_bytes(engine)


def _flags(api: TensorRT, config: trt.IBuilderConfig) -> list[str]:
    members: Mapping[str, Any] = api.module.BuilderFlag.__members__
    return sorted(name for name, flag in members.items() if config.get_flag(flag))


if __name__ == "__main__":
    sys.exit(main())
