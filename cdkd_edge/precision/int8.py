"""Make an INT8 graph: quantise, judge its CPU twin, keep layers in FP16 if the gate fails, write graph and report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from cdkd_edge.core.errors import GraphError, NumericalCheckError, UsageError
from cdkd_edge.core.files import scratch_folder
from cdkd_edge.core.manifest import LABELS, GraphManifest, read_manifest, require_replaceable
from cdkd_edge.graph.cpu import cpu_twin
from cdkd_edge.graph.files import read_graph, save_derived
from cdkd_edge.graph.fp16 import check_fp16
from cdkd_edge.graph.int8 import Calibrated, CalibrationOptions, calibrate, int8_graph
from cdkd_edge.graph.int8_ranges import signal_to_noise
from cdkd_edge.graph.layers import quantizable_layers
from cdkd_edge.graph.nodes import Note
from cdkd_edge.graph.tiles import CalibrationSet, Role
from cdkd_edge.precision.int8_gate import Int8Gate, Judge, Judgement, LabelledData, require_own_report, write_report
from cdkd_edge.quality.evaluate import check_dataset, require_same_classes
from cdkd_edge.segmentation.options import SegmentOptions

FIRST_KEPT = 1  # layers that ``--auto`` keeps in FP16 at first; twice as many at each further attempt


@dataclass(frozen=True)
class Int8Options:
    """How to quantise."""

    calibration: CalibrationOptions = CalibrationOptions()
    gate: Int8Gate = Int8Gate()
    auto: bool = False  # keep the worst layers in FP16 until the gate passes
    keep: tuple[str, ...] = ()  # layers to keep in FP16 in any case


@dataclass(frozen=True)
class Attempt:
    """An INT8 graph that was judged."""

    kept: tuple[str, ...]
    judgement: Judgement
    failures: list[str]


@dataclass(frozen=True)
class Int8Result:
    """An INT8 graph that passed its gate."""

    path: Path
    report: Path
    manifest: GraphManifest
    attempts: list[Attempt]


def write_int8(
    plain: Path,
    destination: Path,
    tiles: CalibrationSet,
    options: Int8Options = Int8Options(),
    data: LabelledData | None = None,
    note: Note = lambda text: None,
) -> Int8Result:
    """Make the INT8 graph of an exported FP32 graph and judge it; write it with its manifest and report.

    Args:
        plain, destination: the FP32 graph and the INT8 graph (``.onnx``); the report lies beside that (``.md``).
        tiles: calibration tiles to set ranges with, check tiles to judge on.
        options: how to quantise, and the gate.
        data: labelled images. Without them mIoU is not measured and not part of the gate.

    Raises:
        UsageError: the set does not fit (:func:`require_fitting`), or all layers are to be kept in FP16.
        GraphError: it is not an FP32 graph of this package, or has no layer of a name in ``keep``.
        DatasetError, SchemaError: the labelled data cannot be read, or have other classes.
        ManifestError: graph or tiles are not what their manifests say, or a file of the user's would be replaced.
        NumericalCheckError: the graph fails the gate, with ``auto`` even when nothing is left in INT8.
    """
    report = destination.with_suffix(".md")
    require_replaceable(destination)
    require_own_report(report, destination.name)
    source = read_manifest(plain, GraphManifest)
    if source.precision != "fp32":
        raise GraphError(f"{plain} is an {source.precision} graph; INT8 is made from the FP32 graph")
    if source.output != LABELS:
        raise GraphError(f"{plain} gives {source.output}; INT8 is made from the graph with labels alone")
    require_fitting(tiles, source, "calibration", "check")
    if data is not None:  # evaluate() would find these mistakes only after minutes
        require_same_classes(source.schema, data.schema)
        check_dataset(data.dataset, source.tile, SegmentOptions())
    model = read_graph(plain, source)
    names = [layer.name for layer in quantizable_layers(model)]
    if unknown := sorted(set(options.keep) - set(names)):
        raise GraphError(f"the graph has no layer {unknown[0]!r}", hint=f"layers are {', '.join(names[:5])}, ...")
    if set(options.keep) == set(names):
        raise UsageError(f"with all {len(names)} layers kept in FP16, none is left for INT8", hint="build --fp16")
    checks = tiles.tiles("check")
    calibrated = calibrate(model, tiles.tiles("calibration"), options.calibration, note)
    note("noise of every layer")
    noise = signal_to_noise(calibrated.model, calibrated.layers, calibrated.scales, checks)
    with scratch_folder() as scratch:
        judge = Judge(model, source, checks, data, scratch, note)
        del model
        attempts = _attempts(calibrated, noise, judge, options, note)
        del judge
    last = attempts[-1]
    if last.failures:
        advice = "build the network in FP16" if options.auto else "--auto keeps the worst layers in FP16"
        raise NumericalCheckError(
            f"INT8 misses its gate: {'; '.join(last.failures)}", hint=f"no graph was written; {advice}"
        )
    graph = _graph(calibrated, last.kept)
    note("the graph as TensorRT will compute it")
    conversion = check_fp16(plain, graph, checks, tiles.name, note, least=options.gate.agreement)
    record = _record(calibrated, noise, tiles, options, attempts)
    record["size_over_fp32"] = graph.ByteSize() / source.artefact.bytes
    made = {"precision": "int8", "conversion": conversion, "quantization": record}
    # The report comes before the graph, because a graph that is there is not made again.
    manifest = save_derived(graph, destination, source, lambda manifest: write_report(report, manifest), **made)
    return Int8Result(destination, report, manifest, attempts)


def require_fitting(tiles: CalibrationSet, source: GraphManifest, *roles: Role) -> None:
    """Make sure that a calibration set is of a graph's tile size and has tiles of these roles, or raise UsageError."""
    if tiles.tile != source.tile:
        raise UsageError(
            f"the tiles of {tiles.name} are {tiles.tile} px wide, those of {source.artefact.file} {source.tile} px",
            hint=f"cdkd-edge calibrate SCENES --tile {source.tile}",
        )
    for role in roles:
        if not tiles.tiles(role):
            raise UsageError(f"{tiles.name} has no {role} tiles", hint="make it again: cdkd-edge calibrate")


def _graph(calibrated: Calibrated, kept: tuple[str, ...]) -> onnx.ModelProto:
    scales = {name: scale for name, scale in calibrated.scales.items() if name not in kept}
    return int8_graph(calibrated.model, calibrated.layers, scales)


def _attempts(
    calibrated: Calibrated, noise: dict[str, float], judge: Judge, options: Int8Options, note: Note
) -> list[Attempt]:
    """Judge the graph; with ``auto``, until it passes, with more and more of the noisiest layers in FP16."""
    worst = [name for name in sorted(noise, key=lambda name: noise[name]) if name not in options.keep]
    attempts: list[Attempt] = []
    more = 0
    while more == 0 or more < len(worst):  # a graph without a single INT8 layer is the FP16 graph
        kept = (*dict.fromkeys(options.keep), *worst[:more])
        note(f"judging INT8 with {len(kept)} layers in FP16" if kept else "judging INT8")
        judgement = judge(cpu_twin(_graph(calibrated, kept)))
        attempts.append(Attempt(kept, judgement, options.gate.failures(judgement)))
        if not attempts[-1].failures or not options.auto:
            break
        more = max(FIRST_KEPT, 2 * more)
    return attempts


def _record(
    calibrated: Calibrated,
    noise: dict[str, float],
    tiles: CalibrationSet,
    options: Int8Options,
    attempts: list[Attempt],
) -> dict[str, Any]:
    """The manifest's ``quantization``."""
    last = attempts[-1]
    return {
        "calibration_set": {"name": tiles.name, "sha256": tiles.sha256},
        "calibration_tiles": len(tiles.tiles("calibration")),
        "check_tiles": len(tiles.tiles("check")),
        "calibrator": options.calibration.calibrator,
        "percentile": options.calibration.percentile if options.calibration.calibrator == "percentile" else None,
        "smoothquant_alpha": options.calibration.alpha,
        "smoothed_layers": len(calibrated.smoothed),
        "gate": dataclasses.asdict(options.gate),
        "judgement": last.judgement.document(),
        "kept_in_fp16": list(last.kept),
        "attempts": [
            {"kept_in_fp16": list(attempt.kept), "failures": attempt.failures, **attempt.judgement.document()}
            for attempt in attempts
        ],
        "layers": [
            {
                "name": layer.name,
                "precision": "fp16" if layer.name in last.kept else "int8",
                "snr_db": noise[layer.name],
                "input_scale": calibrated.scales[layer.name].activation,
                "macs": layer.macs,
            }
            for layer in calibrated.layers
        ],
    }
