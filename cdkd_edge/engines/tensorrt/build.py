"""Graph to TensorRT engine, with its manifest and its layers."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import EngineError, GraphError, ManifestError, SystemRefusalError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.machine import describe_machine
from cdkd_edge.core.manifest import (
    EngineManifest,
    EngineTensor,
    FileRecord,
    GraphManifest,
    TensorRTBuild,
    kind_of,
    library_versions,
    manifest_path,
    precision_of,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.engines.tensorrt.compiler import BuilderMemoryError, BuildRequest
from cdkd_edge.engines.tensorrt.layers import EngineLayers, layers_of_inspector, layers_of_log, write_layers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.engines.tensorrt.process import COMMAND, LineListener, StepListener, run_builder


def build_tensorrt_engine(
    graph: Path,
    destination: Path,
    options: TensorRTOptions = TensorRTOptions(),
    progress: StepListener = lambda step: None,
    log: LineListener = lambda severity, text: None,
    *,
    command: tuple[str, ...] = COMMAND,
) -> EngineManifest:
    """Build an engine with the TensorRT that is here, in a process of its own.

    The engine file is what TensorRT serialises, nothing else, so that trtexec loads it too.

    Args:
        graph: an exported graph with its manifest; its precision is the engine's.
        destination: final path of the engine (``.engine``); the manifest and the layer list appear beside it.
        options: see there.
        progress: called with what is being done.
        log: called with what TensorRT logs: warnings and errors, all with ``options.verbose``.
        command: the building process, for tests.

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is a file that no build wrote.
        TensorRTMissingError: there is no TensorRT.
        BuilderMemoryError: there is too little memory, said with what can be done.
        EngineError: TensorRT refuses the graph or the options, or crashes.
        SystemRefusalError: the engine cannot be written.
    """
    started = time.perf_counter()
    require_replaceable(destination)
    if kind_of(destination) == GraphManifest.kind:  # ckpt.fp16.onnx and ckpt.fp16.engine would share one
        raise ManifestError(
            f"{manifest_path(destination)} is the manifest of a graph, which the engine's would replace",
            hint="write the engine to another folder, such as engines/",
        )
    source = read_manifest(graph, GraphManifest)
    facts: dict[str, Any] = {}

    def heard(event: dict[str, Any]) -> None:
        facts.update(event)
        if event["event"] == "parsed":
            _require_tensors(graph, source, _tensors(event))

    with whole_file(destination) as temporary:
        request = _request(graph, temporary, source.precision, options)
        try:
            facts.update(run_builder(request, heard, progress, log, command))
        except BuilderMemoryError as error:
            raise _with_levers(error, facts, source) from None
        except SystemRefusalError as error:  # the process knows a temporary name only
            raise SystemRefusalError(f"{destination}: {error.message}", hint=error.hint) from None
        compiled = _layers(facts)
        manifest = _manifest(source, FileRecord.of(temporary, destination.name), options, facts, compiled, started)
        write_layers(destination, manifest.artefact.sha256, compiled)
        write_manifest(destination, manifest)  # before the engine gets its name: no engine without a manifest
    return manifest


def compile_layers(graph: Path, options: TensorRTOptions) -> EngineLayers:
    """What TensorRT makes of any ONNX file; the engine itself is thrown away.

    Raises:
        EngineError: see :func:`build_tensorrt_engine`.
    """
    facts: dict[str, Any] = {}
    with scratch_folder() as folder:
        request = _request(graph, folder / "engine", precision_of(graph) or "fp32", options)
        facts.update(run_builder(request, facts.update, lambda step: None, lambda severity, text: None))
    return _layers(facts)


def _request(graph: Path, destination: Path, precision: str, options: TensorRTOptions) -> BuildRequest:
    return BuildRequest(
        graph=str(graph.absolute()),
        destination=str(destination.absolute()),
        precision=precision,
        workspace_bytes=options.workspace_bytes,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
        sparse=options.sparse,
        weakly_typed=options.weakly_typed,
        targets=options.targets,
        verbose=options.verbose,
    )


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
    """From the engine itself where it could be loaded, else from the builder's log."""
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
    gpu = None if options.targets else facts["gpu"]
    notes = list(facts.get("notes", ()))
    if not compiled.layers:
        notes.append("TensorRT did not list the engine's layers: whether attention is fused is not known")
    build = TensorRTBuild(
        version=facts["version"],
        gpu=gpu and gpu["name"],
        compute_capability=gpu and gpu["compute_capability"],
        targets=options.targets,
        cuda=facts["gpu"] and facts["gpu"]["cuda"],
        l4t=describe_machine().l4t,
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
    )
    return EngineManifest(
        name=source.name,
        runtime=facts["kind"],
        precision=source.precision,
        artefact=artefact,
        graph=source.artefact,
        labels=source.labels,
        preprocessing=source.preprocessing,
        tile=source.tile,
        batch=source.batch,
        device=gpu["name"] if gpu else "compiled for " + ", ".join(f"SM {target}" for target in options.targets),
        attention_blocks=len(compiled.attention_nodes),
        attention_fused=compiled.fused_attention,
        build_seconds=time.perf_counter() - started,
        graph_check=source.check,
        libraries={**library_versions(("onnx", "numpy")), facts["kind"]: facts["version"]},
        training=source.training,
        tensorrt=build,
        output=source.output,
    )


def _with_levers(error: EngineError, facts: dict[str, Any], source: GraphManifest) -> EngineError:
    """The error with the things that help, in the order in which they are worth trying."""
    limit = facts.get("workspace_bytes")
    levers = [
        "lower --workspace-size" + (f" (it was {limit / (1 << 20):.0f}M)" if limit else " (e.g. 512M)"),
        "lower --opt-level",
        "close other programs (a desktop session takes 1 to 2 GB)",
        "add swap",
    ]
    if source.batch > 1:
        levers.append(f"export with --batch 1 (this graph has {source.batch})")
    return BuilderMemoryError(error.message, hint="what helps: " + ", ".join(levers))
