"""``cdkd-edge build``: graph to engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typer import Argument, BadParameter, Option

from cdkd_edge.cli.inspect import engine_rows
from cdkd_edge.cli.options import JSON, SCENES, SCHEMA, WORKSPACE
from cdkd_edge.cli.progress import steps
from cdkd_edge.cli.report import Report, Rows, fields_of, say
from cdkd_edge.core.errors import GraphError
from cdkd_edge.core.manifest import CONFIDENCE, PROBABILITIES
from cdkd_edge.core.numbers import duration, percent, significant, size
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import RUNTIMES, Runtime, choose_runtime

if TYPE_CHECKING:
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions
    from cdkd_edge.precision.choose import BuiltEngine, GraphRequest, PreparedGraph, SpeedComparison
    from cdkd_edge.precision.int8 import Int8Result


_SUFFIXES = " or ".join(f"{runtime.suffix} ({name})" for name, runtime in RUNTIMES.items())


@dataclass(frozen=True)
class KindOptions:
    """Which engine is built."""

    fp32: bool = Option(False, help="Build the FP32 graph (default).")
    fp16: bool = Option(False, help="Build the FP16 graph.")
    bf16: bool = Option(False, help="Build the FP32 graph to run in BF16: OpenVINO, on CPUs that have it.")
    int8: bool = Option(False, help="Build the INT8 graph.")
    confidence: bool = Option(False, help="The engine also gives the probability of each label, in per cent.")
    probabilities: bool = Option(False, help="The engine also gives the probability of each class.")
    runtime: str = Option(
        "auto", help=f"{', '.join(RUNTIMES)}, or auto: the first that can run here; of several on a CPU, the fastest."
    )

    def precision(self) -> str | None:
        """The precision that was named."""
        named = [name for name in ("fp32", "fp16", "bf16", "int8") if getattr(self, name)]
        if len(named) > 1:
            raise BadParameter("one precision at a time", param_hint=" ".join(f"--{name}" for name in named))
        return named[0] if named else None

    def output(self) -> str | None:
        """What the engine is to give besides labels."""
        if self.confidence and self.probabilities:
            raise BadParameter("probabilities include confidence", param_hint="--confidence --probabilities")
        return CONFIDENCE if self.confidence else PROBABILITIES if self.probabilities else None


@dataclass(frozen=True)
class BuilderOptions:
    """How TensorRT builds."""

    PANEL: ClassVar[str] = "TensorRT"

    workspace_size: str | None = Option(
        None,
        help="Most memory for the builder's scratch, e.g. 512M or 2G. Default: less than is free now.",
        metavar="SIZE",
    )
    optimization_level: int | None = Option(
        None, "--opt-level", help="0 (fast) to 5 (more kernels). Default: TensorRT's, 3.", min=0, max=5
    )
    timing_cache: bool = Option(True, help="Keep kernel timings in the user's cache folder for the next build.")
    portable: bool = Option(
        False, help="For every GPU of this compute capability, e.g. all Orin modules; may be slower. TensorRT 10.9+."
    )
    sparse: bool = Option(False, help="Allow 2:4 sparse kernels where the weights are sparse already.")
    weakly_typed: bool = Option(False, help="Set precisions by builder flags: a fallback for early TensorRT 10.")
    target: list[str] | None = Option(
        None,
        help="Compile for this compute capability (e.g. sm86) without its GPU; repeatable. TensorRT-RTX only.",
        metavar="SM",
    )
    verbose: bool = Option(False, help="Show everything that TensorRT logs.")

    def checked(self) -> TensorRTOptions:
        """The same, parsed."""
        from cdkd_edge.engines.tensorrt.options import TensorRTOptions, parse_size, parse_target

        return TensorRTOptions(
            workspace_bytes=parse_size(self.workspace_size) if self.workspace_size is not None else None,
            targets=tuple(dict.fromkeys(map(parse_target, self.target or ()))),
            **fields_of(self, "optimization_level", "timing_cache", "portable", "sparse", "verbose", "weakly_typed"),
        )


@dataclass(frozen=True)
class LowerPrecisionOptions:
    """How an FP16 or INT8 graph is made and judged."""

    PANEL: ClassVar[str] = "Making the FP16 or INT8 graph"

    calibration: Path | None = Option(
        None, help="Calibration set. Default: INT8: the workspace's only one, FP16: sample tiles.", file_okay=False
    )
    calibrator: str = Option("percentile", help="How ranges of activations are found: percentile, max or mse.")
    percentile: float = Option(99.999, help="Per cent of the magnitudes that --calibrator percentile keeps.")
    alpha: float = Option(0.5, help="SmoothQuant's exponent; 0 leaves activations as they are.")
    auto: bool = Option(False, help="Keep the noisiest layers in FP16 until the limits below are met.")
    keep: list[str] | None = Option(None, help="Layer to keep in FP16, e.g. fuse; repeatable.", metavar="LAYER")
    min_agreement: float | None = Option(
        None, help="Smallest share of pixels that keep their label, per cent. Default: INT8 98, FP16 all but ties."
    )
    max_loss: float = Option(0.5, help="Largest loss of mIoU on --data, percentage points.")
    data: Path | None = Option(None, help="Labelled images to measure mIoU on, laid out as for evaluate.")
    schema: str | None = SCHEMA
    scenes: str | None = SCENES
    again: bool = Option(False, help="Make the graph again, even if there is one.")

    def request(self) -> GraphRequest:
        """The same for :func:`cdkd_edge.precision.choose.prepare_graph`."""
        from cdkd_edge.graph.int8 import CalibrationOptions
        from cdkd_edge.precision.choose import GraphRequest
        from cdkd_edge.precision.int8 import Int8Options
        from cdkd_edge.precision.int8_gate import Int8Gate, labelled_data

        if (self.schema or self.scenes) and not self.data:
            raise BadParameter("they say how to read --data", param_hint="--schema, --scenes")
        ranges = CalibrationOptions(self.calibrator, self.percentile, self.alpha or None)
        return GraphRequest(
            self.calibration,
            Int8Options(ranges, Int8Gate(loss=self.max_loss), self.auto, tuple(self.keep or ())),
            labelled_data(self.data, self.schema, self.scenes) if self.data else None,
            self.again,
            None if self.min_agreement is None else self.min_agreement / 100,
        )


def build(
    graph: Path | None = Argument(None, help="Graph (.onnx). Default: the workspace's only one of that precision."),
    *,
    output: Path | None = Option(
        None, "--output", "-o", help=f"The engine. Default: engines/NAME.PRECISION with {_SUFFIXES}."
    ),
    kind: KindOptions,
    builder: BuilderOptions,
    lower: LowerPrecisionOptions,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Build an engine for this machine from a graph. Writes engines/NAME and a manifest.

    An FP16 or INT8 graph that is missing is first made from the FP32 graph and checked; so is one with confidence.
    """
    from cdkd_edge.board.doctor import probe_power_mode
    from cdkd_edge.board.modes import ROOT
    from cdkd_edge.board.software import WARN
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions
    from cdkd_edge.precision.choose import build_fastest, compare_speed, engine_places, prepare_graph

    precision, gives, options, request = kind.precision(), kind.output(), builder.checked(), lower.request()
    runtime = choose_runtime(kind.runtime, targets=options.targets, precision=precision)
    if not runtime.has_options and options != TensorRTOptions():
        wrong = f"{runtime.title} has none of TensorRT's options"
        raise BadParameter(wrong, param_hint=f"--runtime {runtime.name}")
    if runtime.has_options and not options.targets and "mode" in (found := probe_power_mode(ROOT)).data:
        options = replace(options, power_mode=found.data["mode"])
        if found.status == WARN:
            say(f"warning: the engine will fit this power mode, {found.text}; for that one: {found.mend}, then build")
    space = Workspace(workspace)
    with steps() as step:
        prepared = prepare_graph(space, graph, precision, request, step, gives, runtime)
        places = engine_places(space, prepared.path, kind.runtime, runtime, output, precision)
        for name, path in places.items():
            _require_engine_file(path, prepared.path, RUNTIMES[name])
        if options.sparse:
            _require_sparse(prepared.path)
        step(f"building from {prepared.path.name}")
        log = _show_log if builder.verbose else lambda severity, text: None
        built = build_fastest(prepared.path, places, precision, options, step, log)
        speed = compare_speed(built.path, built.manifest, step)
    describe_engine(built, prepared, speed).show(as_json)


def _require_engine_file(destination: Path, graph: Path, runtime: Runtime) -> None:
    suffix = "." + runtime.suffix.rpartition(".")[2]
    if destination.suffix != suffix:
        raise BadParameter(f"an engine for {runtime.title} is an {suffix} file", param_hint="--output")
    if destination.exists() and graph.exists() and destination.samefile(graph):
        raise BadParameter("the engine would overwrite its graph", param_hint="--output")


def _require_sparse(graph: Path) -> None:
    from cdkd_edge.graph.files import load_graph
    from cdkd_edge.graph.layers import sparse_linears

    sparse, total = sparse_linears(load_graph(graph))
    if not sparse:
        raise GraphError(
            f"none of the {total} linear layers of {graph} has 2:4 sparse weights, so --sparse would change nothing",
            hint="make such a network: cdkd-edge convert --sparse, then distill, export",
        )


def _show_log(severity: str, text: str) -> None:
    for line in text.splitlines():
        say(f"{severity}: {line}")


def describe_engine(built: BuiltEngine, prepared: PreparedGraph, speed: SpeedComparison | None = None) -> Report:
    """An engine that was just built, and the graph that was made for it."""
    from cdkd_edge.engines.inspect import attention_warnings

    path, manifest = built.path, built.manifest
    rows: Rows = [
        *engine_rows(manifest, manifest.precision),
        ("output", ", ".join(manifest.outputs)),
        ("size", size(manifest.artefact.bytes)),
        ("time", duration(manifest.build_seconds)),
        *(("warning", text) for text in attention_warnings(manifest)),
        *([("graph", str(prepared.path))] if prepared.made else []),
        *(_int8_rows(prepared.int8) if prepared.int8 else []),
        *(
            ("chosen", f"{significant(ratio)} x the tiles/s of {name}, in turn on this machine")
            for name, ratio in manifest.speed_over.items()
        ),
        *(("no choice", f"{title}: {reason}") for title, reason in built.refused.items()),
    ]
    if speed:
        times = significant(speed.ratio)
        rows.append(("speed", f"{times} x the tiles/s of {speed.path.name}, in turn on this machine"))
        if speed.ratio <= 1:
            rows.append(("warning", f"INT8 is not faster than {speed.path.name} here; prefer that engine"))
    data = {
        "path": path,
        "manifest": manifest,
        "graph": prepared.path,
        "graph_made": prepared.made,
        "quantization": prepared.int8.manifest.quantization if prepared.int8 else None,
        "speed": {"against": speed.path, "ratio": speed.ratio} if speed else None,
        "refused": built.refused,
    }
    return Report(f"engine {path}", rows, data)


def _int8_rows(result: Int8Result) -> Rows:
    from cdkd_edge.precision.int8_gate import worst_layers

    record = result.manifest.quantization
    judgement = result.attempts[-1].judgement
    kept, layers = record["kept_in_fp16"], len(record["layers"])
    same = percent(judgement.agreement, 2)
    accuracy = "not measured; --data gives labelled images"
    if judgement.loss is not None:
        before, after = percent(judgement.fp32_mean_iou, 2), percent(judgement.mean_iou, 2)
        accuracy = f"{after}, FP32 {before}, loss {judgement.loss:.2f} points"
    worst = ", ".join(f"{layer['name']} {layer['snr_db']:.0f} dB" for layer in worst_layers(record, 3))
    return [
        ("INT8 layers", f"{layers - len(kept)} of {layers}"),
        ("labels", f"{same} of the pixels of {record['check_tiles']} check tiles keep theirs"),
        ("mIoU", accuracy),
        ("graph size", f"{percent(record['size_over_fp32'])} of the FP32 graph"),
        ("CPU twin", f"{significant(judgement.speed_up)} x FP32's tiles/s on this CPU, check tiles in turn"),
        ("noisiest", worst),
        *(
            ("missed", f"with {len(one.kept)} layers in FP16: {'; '.join(one.failures)}")
            for one in result.attempts[:-1]
        ),
        *([("in FP16", ", ".join(kept))] if kept else []),
        *([("warning", "INT8 is not faster than FP32 on this CPU")] if judgement.speed_up <= 1 else []),
        ("report", str(result.report)),
    ]
