"""The INT8 graph as a whole: quantise, judge, keep layers in FP16 where the gate asks for it, write, report.

Judged is what an engine will compute: the twin of the graph, with integer arithmetic, against the FP32 graph on the
check tiles of the calibration set, and on a labelled dataset where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.core.errors import GraphError, NumericalCheckError, UsageError
from cdkd_edge.core.files import scratch_folder, whole_file
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphManifest,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.output_kinds import LABELS
from cdkd_edge.graph.cpu import cpu_twin
from cdkd_edge.graph.fp16_check import check_half
from cdkd_edge.graph.int8.calibrate import Calibrated, CalibrationOptions, calibrate
from cdkd_edge.graph.int8.graphs import int8_graph
from cdkd_edge.graph.int8.layers import quantizable_layers
from cdkd_edge.graph.int8.sensitivity import signal_to_noise
from cdkd_edge.graph.int8.tiles import CalibrationSet, Role
from cdkd_edge.graph.read import read_graph
from cdkd_edge.precision.int8_gate import Judge, Judgement, LabelledData, require_own_report, write_report
from cdkd_edge.quality.evaluate import check_dataset, require_same_classes

FIRST_KEPT = 1
"""Layers that ``--auto`` keeps in FP16 at its first attempt; twice as many at each further one."""


@dataclass(frozen=True)
class Gate:
    """What an INT8 graph must reach."""

    agreement: float = 0.98
    """Share of the check tiles' pixels that keep the FP32 graph's label."""
    loss: float = 0.5
    """Points of mIoU it may lose on a labelled dataset."""

    def __post_init__(self) -> None:
        if not 0.01 < self.agreement <= 1:
            raise UsageError(
                f"a gate of {100 * self.agreement:g} % agreement makes no sense",
                hint="it is given in per cent, e.g. --min-agreement 98",
            )
        if not 0 <= self.loss <= 100:
            raise UsageError(f"a network cannot lose {self.loss:g} points of mIoU at most")

    def failures(self, judgement: Judgement) -> list[str]:
        """Why a graph does not pass, in words; empty if it does."""
        reasons = []
        if not judgement.agreement >= self.agreement:
            reasons.append(f"{judgement.agreement:.2%} of the pixels keep their label; {self.agreement:.2%} must")
        if judgement.loss is not None and not judgement.loss <= self.loss:
            reasons.append(f"mIoU falls by {judgement.loss:.2f} points; at most {self.loss:.2f} are allowed")
        return reasons


@dataclass(frozen=True)
class Int8Options:
    """How to quantise."""

    calibration: CalibrationOptions = CalibrationOptions()
    gate: Gate = Gate()
    auto: bool = False
    """Keep the worst layers in FP16 until the gate passes."""
    keep: tuple[str, ...] = ()
    """Layers to keep in FP16 whatever the gate says; each once."""


@dataclass(frozen=True)
class Attempt:
    """One graph that was judged."""

    kept: tuple[str, ...]
    judgement: Judgement
    failures: list[str]


@dataclass(frozen=True)
class Int8Result:
    """An INT8 graph that passed its gate."""

    path: Path
    report: Path
    manifest: GraphManifest
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True)
class SetTiles:
    """The tiles of one role of a calibration set, to be read again and again."""

    source: CalibrationSet
    role: Role

    def __len__(self) -> int:
        return self.source.count(self.role)

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return self.source.tiles(self.role)


def write_int8(
    plain: Path,
    destination: Path,
    tiles: CalibrationSet,
    options: Int8Options = Int8Options(),
    data: LabelledData | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Int8Result:
    """Make the INT8 graph of an exported FP32 graph, judge it, write it with its manifest and report.

    Args:
        plain: the FP32 graph with its manifest.
        destination: final path of the INT8 graph (``.onnx``); the report lies beside it (``.md``).
        tiles: calibration tiles to set ranges with, check tiles to judge on.
        options: calibrators, gate.
        data: labelled images; without them mIoU is not measured, and not part of the gate.
        progress: called with the name of each step.

    Raises:
        UsageError: the set's tiles have another size than the graph's, or none is kept for checking; or all layers are
            to be kept.
        GraphError: it is not an FP32 graph of this tool, or no layer of a name in ``keep``.
        DatasetError, SchemaError: the labelled data cannot be read, or have other classes.
        ManifestError: graph or tiles are not what their manifests say, or something of the user's is in the place of
            the graph or its report.
        NumericalCheckError: the gate is missed, with ``auto`` even when nothing is left in INT8.
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
    if data is not None:  # a mistake that evaluate() would tell after minutes
        require_same_classes(source.schema, data.schema)
        check_dataset(data.dataset, source.tile, data.options)
    model = read_graph(plain, source)
    require_layers(model, options.keep)
    calibrated = calibrate(
        model,
        SetTiles(tiles, "calibration"),
        options.calibration,
        lambda what, done, total: progress(f"{what}: tile {done} of {total}"),
    )
    progress("noise of every layer")
    noise = signal_to_noise(calibrated.model, calibrated.layers, calibrated.scales, SetTiles(tiles, "check"))
    with scratch_folder() as scratch:
        judge = Judge(model, source, SetTiles(tiles, "check"), data, scratch, progress)
        del model
        attempts = _attempts(calibrated, noise, judge, options, progress)
        del judge
    last = attempts[-1]
    if last.failures:
        raise NumericalCheckError(
            f"INT8 misses its gate: {'; '.join(last.failures)}",
            hint="no graph was written; --auto keeps the worst layers in FP16"
            if not options.auto
            else "no graph was written, FP16 is what this network needs",
        )
    graph = _graph(calibrated, last.kept)
    progress("the graph as TensorRT will compute it")
    conversion = check_half(plain, graph, SetTiles(tiles, "check"), tiles.name, progress, least=options.gate.agreement)
    with whole_file(destination) as temporary:
        onnx.save(graph, temporary)
        artefact = FileRecord.of(temporary, destination.name)
        manifest = source.derived(
            artefact,
            len(graph.graph.node),
            precision="int8",
            conversion=conversion,
            quantization=_record(calibrated, noise, tiles, options, attempts, artefact.bytes / source.artefact.bytes),
        )
        write_manifest(destination, manifest)
        write_report(report, manifest)  # before the graph: one that is there is not made again
    return Int8Result(destination, report, manifest, attempts)


def require_fitting(tiles: CalibrationSet, source: GraphManifest, *roles: Role) -> None:
    """Make sure that a calibration set is of a graph's tile size and has tiles of these roles.

    Raises:
        UsageError: it is not, or has none.
    """
    if tiles.tile != source.tile:
        raise UsageError(
            f"the tiles of {tiles.name} are {tiles.tile} px wide, those of {source.artefact.file} {source.tile} px",
            hint=f"cdkd-edge calibrate SCENES --tile {source.tile}",
        )
    for role in roles:
        if not tiles.count(role):
            raise UsageError(f"{tiles.name} has no {role} tiles", hint="make it again: cdkd-edge calibrate")


def require_layers(model: onnx.ModelProto, keep: Sequence[str]) -> None:
    """Make sure that the layers to be kept in FP16 exist, and that others are left.

    Raises:
        GraphError: there is no such layer.
        UsageError: no layer would be INT8.
    """
    names = [layer.name for layer in quantizable_layers(model)]
    if unknown := sorted(set(keep) - set(names)):
        raise GraphError(f"the graph has no layer {unknown[0]!r}", hint=f"layers are {', '.join(names[:5])}, ...")
    if set(keep) == set(names):
        raise UsageError(f"with all {len(names)} layers kept, nothing is left for INT8", hint="build --fp16")


def _graph(calibrated: Calibrated, kept: tuple[str, ...]) -> onnx.ModelProto:
    scales = {name: scale for name, scale in calibrated.scales.items() if name not in kept}
    return int8_graph(calibrated.model, calibrated.layers, scales)


def _attempts(
    calibrated: Calibrated,
    noise: dict[str, float],
    judge: Judge,
    options: Int8Options,
    progress: Callable[[str], None],
) -> list[Attempt]:
    """Judge the graph; with ``auto``, again and again with more of the noisiest layers in FP16."""
    worst = [name for name in sorted(noise, key=lambda name: noise[name]) if name not in options.keep]
    attempts: list[Attempt] = []
    more = 0
    while True:
        kept = (*dict.fromkeys(options.keep), *worst[:more])
        progress(f"judging INT8 with {len(kept)} layers in FP16" if kept else "judging INT8")
        judgement = judge(cpu_twin(_graph(calibrated, kept)))
        attempts.append(Attempt(kept, judgement, options.gate.failures(judgement)))
        if not attempts[-1].failures or not options.auto:
            return attempts
        more = max(FIRST_KEPT, 2 * more)
        if more >= len(worst):  # a graph without a single INT8 layer is the FP16 graph
            return attempts


def _record(
    calibrated: Calibrated,
    noise: dict[str, float],
    tiles: CalibrationSet,
    options: Int8Options,
    attempts: list[Attempt],
    size: float,
) -> dict[str, Any]:
    """For the manifest."""
    last = attempts[-1]
    return {
        "calibration_set": {"name": tiles.name, "sha256": tiles.sha256},
        "calibration_tiles": tiles.count("calibration"),
        "check_tiles": tiles.count("check"),
        "calibrator": options.calibration.calibrator,
        "percentile": options.calibration.percentile if options.calibration.calibrator == "percentile" else None,
        "smoothquant_alpha": options.calibration.alpha,
        "smoothed_layers": len(calibrated.smoothed),
        "gate": dataclasses.asdict(options.gate),
        "judgement": last.judgement.document(),
        "size_over_fp32": size,
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
