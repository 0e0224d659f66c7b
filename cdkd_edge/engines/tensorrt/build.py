"""Graph to TensorRT engine, with its manifest and its list of layers. TensorRT runs in a child process."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cdkd_edge.core.errors import EngineError, GraphError, ManifestError, SystemRefusalError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.machine import describe_machine, library_versions
from cdkd_edge.core.manifest import (
    EngineManifest,
    EngineTensor,
    FileRecord,
    GraphManifest,
    TensorRTBuild,
    kind_of,
    manifest_path,
    precision_of,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.process import end_children, events, last_words, module_command, start_child, tail_of
from cdkd_edge.engines.protocol import Log, Note
from cdkd_edge.engines.tensorrt.compile import BuilderMemoryError, BuildRequest
from cdkd_edge.engines.tensorrt.layers import EngineLayers, layers_of_inspector, layers_of_log, write_layers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions

COMMAND = module_command("cdkd_edge.engines.tensorrt.compile")


def build_tensorrt_engine(
    graph: Path,
    destination: Path,
    options: TensorRTOptions = TensorRTOptions(),
    note: Note = lambda text: None,
    log: Log = lambda severity, text: None,
    *,
    command: tuple[str, ...] = COMMAND,
) -> EngineManifest:
    """Build an engine with the installed TensorRT.

    The engine file is exactly what TensorRT serialises, so trtexec loads it too.

    Args:
        graph: an exported graph with its manifest; its precision is the engine's.
        destination: final path of the engine (``.engine``); the manifest and the layer list appear beside it.
        options: see there.
        note: called with what is being done.
        log: called with TensorRT's warnings and errors; with everything it logs if ``options.verbose``.
        command: the building process, for tests.

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is a file that no build wrote.
        TensorRTMissingError: there is no TensorRT.
        BuilderMemoryError: there is too little memory; the hint says what helps.
        EngineError: TensorRT refuses the graph or the options, or crashes.
        SystemRefusalError: the engine cannot be written.
    """
    started = time.perf_counter()
    require_replaceable(destination)
    if kind_of(destination) == GraphManifest.kind:  # ckpt.fp16.onnx and ckpt.fp16.engine would share a manifest
        raise ManifestError(
            f"{manifest_path(destination)} is the manifest of a graph, which the engine's would replace",
            hint="write the engine to another folder, such as engines/",
        )
    source = read_manifest(graph, GraphManifest)
    facts: dict[str, Any] = {}

    def receive(event: dict[str, Any]) -> None:
        facts.update(event)
        if event["event"] == "parsed":
            _require_tensors(graph, source, _tensors(event))

    with whole_file(destination) as temporary:
        request = _request(graph, temporary, source.precision, options)
        try:
            run_builder(request, receive, note, log, command)
        except BuilderMemoryError as error:
            raise BuilderMemoryError(error.message, hint=_memory_hint(facts, source)) from None
        except SystemRefusalError as error:  # the child only knows the temporary name
            raise SystemRefusalError(f"{destination}: {error.message}", hint=error.hint) from None
        compiled = _layers(facts)
        manifest = _manifest(source, FileRecord.of(temporary, destination.name), options, facts, compiled, started)
        write_layers(destination, manifest.artefact.sha256, compiled)
        write_manifest(destination, manifest)  # before the engine gets its name: no engine without a manifest
    return manifest


def compile_layers(graph: Path, options: TensorRTOptions) -> EngineLayers:
    """The layers that TensorRT makes of any ONNX file; the engine is thrown away.

    Raises:
        EngineError: see :func:`build_tensorrt_engine`.
    """
    facts: dict[str, Any] = {}
    with scratch_folder() as folder:
        request = _request(graph, folder / "engine", precision_of(graph) or "fp32", options)
        run_builder(request, facts.update, lambda text: None, lambda severity, text: None)
    return _layers(facts)


def _request(graph: Path, destination: Path, precision: str, options: TensorRTOptions) -> BuildRequest:
    return BuildRequest(str(graph.absolute()), str(destination.absolute()), precision, options)


def _tensors(facts: dict[str, Any]) -> tuple[EngineTensor, ...]:
    return tuple(EngineTensor(item["name"], item["dtype"], tuple(item["shape"])) for item in facts["tensors"])


def _require_tensors(graph: Path, source: GraphManifest, tensors: tuple[EngineTensor, ...]) -> None:
    """Make sure that the engine will take uint8 tiles and give the uint8 outputs of the manifest, and nothing else.

    Raises:
        GraphError: it would not.
    """
    expected = (
        EngineTensor("image", "uint8", (source.batch, 3, source.tile, source.tile)),
        *(EngineTensor(name, "uint8", shape) for name, shape in source.outputs.items()),
    )
    if tensors != expected:
        found, wanted = ("; ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in some) for some in (tensors, expected))
        raise GraphError(f"{graph} has {found or 'no tensors'}; an engine has {wanted}", hint="export it again")


def _layers(facts: dict[str, Any]) -> EngineLayers:
    """From the engine itself if it could be loaded, else from the builder's log."""
    logged = layers_of_log(facts.get("layer_lines", ()))
    inspected = layers_of_inspector(facts["inspector"]) if facts.get("inspector") else ()
    scratch = logged.scratch_bytes if logged.scratch_bytes is not None else facts.get("scratch_bytes")
    return dataclasses.replace(
        logged,
        layers=inspected or logged.layers,
        scratch_bytes=scratch,
        attention_nodes=tuple(facts["attention_nodes"]),
    )


def _manifest(
    source: GraphManifest,
    artefact: FileRecord,
    options: TensorRTOptions,
    facts: dict[str, Any],
    compiled: EngineLayers,
    started: float,
) -> EngineManifest:
    gpu, machine = None if options.targets else facts["gpu"], describe_machine()
    notes = list(facts.get("notes", ()))
    if not compiled.layers:
        notes.append("TensorRT did not list the engine's layers: whether attention is fused is not known")
    build = TensorRTBuild(
        version=facts["version"],
        gpu=gpu and gpu["name"],
        compute_capability=gpu and gpu["compute_capability"],
        targets=options.targets,
        cuda=facts["gpu"] and facts["gpu"]["cuda"],
        l4t=machine.l4t,
        strongly_typed=not options.weakly_typed,
        flags=tuple(facts["flags"]),
        workspace_bytes=facts["workspace_bytes"],
        optimization_level=facts["optimization_level"],
        timing_cache=facts["timing_cache"],
        tensors=_tensors(facts),
        scratch_bytes=compiled.scratch_bytes,
        weights_bytes=compiled.weights_bytes,
        layers=len(compiled.layers),
        traffic_bytes=compiled.traffic_bytes,
        layer_precisions=compiled.precisions,
        notes=tuple(notes),
        multiprocessors=gpu and gpu["multiprocessors"],
        module=gpu and gpu["module"],
        board=gpu and machine.board,
        power_mode=options.power_mode,
        portable=options.portable,
    )
    return EngineManifest.of_graph(
        source,
        runtime=facts["kind"],
        artefact=artefact,
        device=gpu["name"] if gpu else "compiled for " + ", ".join(f"SM {target}" for target in options.targets),
        attention_blocks=len(compiled.attention_nodes),
        attention_fused=compiled.fused_attention,
        build_seconds=time.perf_counter() - started,
        libraries={**library_versions(("onnx", "numpy")), facts["kind"]: facts["version"]},
        tensorrt=build,
    )


def _memory_hint(facts: dict[str, Any], source: GraphManifest) -> str:
    """What helps against too little memory, in the order in which it is worth trying."""
    limit = facts.get("workspace_bytes")
    remedies = [
        "lower --workspace-size" + (f" (it was {limit / (1 << 20):.0f}M)" if limit else " (e.g. 512M)"),
        "lower --opt-level",
        "close other programs (a desktop session takes 1 to 2 GB)",
        "add swap",
    ]
    if source.batch > 1:
        remedies.append(f"export with --batch 1 (this graph has {source.batch})")
    return "what helps: " + ", ".join(remedies)


# --- the child process ----------------------------------------------------------------------------


def run_builder(
    request: BuildRequest,
    receive: Callable[[dict[str, Any]], None],
    note: Note,
    log: Log,
    command: tuple[str, ...] = COMMAND,
) -> None:
    """Build in a child process.

    Args:
        request: what to build.
        receive: called with the events ``started``, ``parsed``, ``finished``; an exception from it ends the child.
        note: called with what is being done.
        log: called with what TensorRT logs.
        command: the child, for tests.

    Raises:
        BuilderMemoryError: it was killed, or TensorRT had too little memory.
        EngineError: TensorRT refused, or crashed.
        SystemRefusalError: the engine could not be written.
    """
    progress = _Progress(note)
    with tempfile.TemporaryFile() as errors, start_child(command, errors) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says more
                child.stdin.write(msgspec.json.encode(request))
                child.stdin.close()
            for event in events(child.stdout):
                kind = event.get("event")
                if kind == "failed":
                    raise _failure(event)
                if kind == "log":
                    log(event["severity"], event["text"])
                elif kind in ("phase", "step"):
                    progress.show(event)
                elif kind in ("started", "parsed", "finished"):
                    receive(event)
                if kind == "finished":
                    child.wait()
                    return
            raise _crash(child.wait(), tail_of(errors))
        finally:
            end_children((child,), 0)


def _failure(event: dict[str, Any]) -> EngineError | SystemRefusalError:
    """The error of a ``failed`` event."""
    if event["reason"] == "memory":
        return BuilderMemoryError("out of memory while building")
    kind = SystemRefusalError if event["reason"] == "system" else EngineError
    return kind(event["message"], hint=event["hint"])


def _crash(code: int, said: str) -> EngineError:
    """The error for a child that ended without a result."""
    if code == -signal.SIGKILL:
        return BuilderMemoryError("out of memory: the system killed the builder")
    if "bad_alloc" in said or "MemoryError" in said or "out of memory" in said:
        return BuilderMemoryError("out of memory while building")
    return EngineError(
        f"the builder crashed ({last_words(code, said)})", hint="--verbose shows what TensorRT did before"
    )


class _Progress:
    """Shows TensorRT's nested phases in one line: the outermost with its steps, then the current one."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._steps: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._outer = ""

    def show(self, event: dict[str, Any]) -> None:
        """Take a ``phase`` or ``step`` event and show the line."""
        name = event["name"]
        if event["event"] == "phase":
            self._steps[name] = event["steps"]
            self._outer = self._outer if event["parent"] else name
        total = self._steps.get(name, 0)
        self._texts[name] = f"{name} {event.get('done', 0)}/{total}" if total > 1 else name
        shown = [self._outer, name] if self._outer not in ("", name) else [name]
        self._note(": ".join(self._texts[part] for part in shown))
