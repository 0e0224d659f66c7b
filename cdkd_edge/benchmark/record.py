"""The record of a benchmark run, ``summary.json``, and its JSON Schema.

All times are seconds from the start of the run, on one clock for phases, tiles, power and conditions. A figure that
could not be measured is null, and the field beside it says why.

``python -m cdkd_edge.benchmark.record > docs/schemas/summary-2.json`` writes the published schema; its descriptions are
the docstrings and comments of the fields below.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from itertools import zip_longest
from types import ModuleType
from typing import Any, Final, Literal

from cdkd_edge import __version__
from cdkd_edge.benchmark import statistics
from cdkd_edge.benchmark.statistics import Figure, Latency
from cdkd_edge.core import machine, manifest
from cdkd_edge.core.machine import Machine
from cdkd_edge.core.manifest import EngineManifest

SUMMARY_VERSION: Final = 2

VALID: Final = "valid"
INVALID: Final = "invalid"
NOT_STEADY: Final = "not_steady"
IDLE: Final = "idle"
WARM_UP: Final = "warm-up"
LOAD: Final = "load"


@dataclass(frozen=True)
class Phase:
    """Start and end of a phase. Each repeat has an idle, a warm-up and a load phase; the idle phase after the last load
    has the next repeat number. In a run that ended early, the last entry is the phase in which it ended.
    """

    name: Literal["idle", "warm-up", "load"]
    repeat: int
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.stop - self.start


@dataclass(frozen=True)
class Protocol:
    """How long the phases of a run last, and how often they are repeated."""

    preset: Literal["default", "paper", "mlperf"]
    idle_seconds: float  # length of each idle phase
    load_seconds: float  # least length of each load phase
    repeats: int
    window_seconds: float  # least length of the windows that are compared to decide whether the warm-up is over
    warm_up_cap_seconds: float  # longest warm-up; it ends then even if the engine is not steady
    min_batches: int  # least number of batches in a load phase


@dataclass(frozen=True)
class Verdict:
    """Whether the figures may be quoted."""

    status: Literal["valid", "invalid", "not_steady"]
    reasons: tuple[str, ...]  # why the run is not valid; empty if it is
    warnings: tuple[str, ...] = ()  # what a reader should know even if the run is valid


@dataclass(frozen=True)
class RailRepeat:
    """Power of one rail in one repeat."""

    idle_watts: float  # mean of ``idle_before_watts`` and ``idle_after_watts``
    idle_before_watts: float
    idle_after_watts: float
    load_watts: float
    load_joules: float  # energy over the part of the load phase that is covered by readings
    covered: float  # share of a phase that lies between readings, 0..1, in the worst of the three phases
    bound_joules: float  # largest error of ``load_joules``, for the loads that ``bound_holds`` names
    offset_joules: float = 0.0  # the part of ``bound_joules`` that is the sensor's offset; net figures do not have it
    net_bound_watts: float | None = None  # largest error of load minus idle watts; None: not recorded


@dataclass(frozen=True)
class Repeat:
    """One idle, warm-up and load."""

    steady: bool
    warm_up_seconds: float
    tiles: int
    seconds: float  # length of the load phase
    tiles_per_second: float
    latency_ms: Latency
    rails: dict[str, RailRepeat] | None  # by rail; None where power was not measured


@dataclass(frozen=True)
class RejectedRepeat:
    """A repeat of an invalid run: what helps to find the cause, but no rate, latency or watts that could be quoted."""

    steady: bool
    warm_up_seconds: float
    tiles: int
    seconds: float  # length of the load phase
    covered: dict[str, float] | None  # by rail, as in :class:`RailRepeat`; None where power was not measured


@dataclass(frozen=True)
class RailFigures:
    """Power and energy of one rail over all repeats. Net is load minus idle; gross includes idle."""

    idle_watts: Figure
    load_watts: Figure
    net_watts: Figure
    gross_joules_per_tile: Figure
    net_joules_per_tile: Figure
    gross_joules_per_megapixel: Figure
    net_joules_per_megapixel: Figure


@dataclass(frozen=True)
class PowerFigures:
    """Power over all repeats."""

    source: str
    scope: str  # ``module``, ``GPU board`` or ``CPU package``; figures of different scopes cannot be compared
    covers: str
    total: str | None  # the rail that contains all others; None if no rail does
    rails: dict[str, RailFigures]
    readings_per_second: float  # of the total, or of the first rail; as reached
    late: int  # of these, readings that came more than half an interval late
    gaps: int  # number of stretches without readings in the whole trace
    gap_seconds: float
    problems: tuple[str, ...]  # problems met while sampling, including those it recovered from
    bound_holds: str = ""  # the loads for which ``bound_joules`` holds, and its assumptions; empty: not recorded


@dataclass(frozen=True)
class Figures:
    """The main figures: the engine alone, with tiles from memory, one batch after the other."""

    tiles_per_second: Figure
    megapixels_per_second: Figure
    latency_ms: Latency  # latency per batch, over all load phases
    power: PowerFigures | None
    power_reason: str  # why there is no power figure; empty if there is one


@dataclass(frozen=True)
class EndToEnd:
    """Time of a scene from file to finished label map."""

    scene: str
    width: int
    height: int
    tiles: int
    seconds: float
    engine_seconds: float
    tiles_per_second: float
    megapixels_per_second: float  # pixels of the scene; overlaps and padding take time but do not count
    overhead: float | None  # total time divided by the engine's; 1: reading and writing cost nothing; None: no tile ran


@dataclass(frozen=True)
class ModelledBound:
    """Roofline of the engine on this device: modelled, not measured."""

    device: str
    mode: str
    precision: str
    bound_tiles_per_second: float
    expected_tiles_per_second: tuple[float, float]  # lowest and highest
    share_of_bound: float | None  # measured speed divided by the bound; None where no speed was measured
    modelled_from: str = "graph"  # ``layers`` that TensorRT listed, or ``graph``: its operators, grouped by rules


@dataclass(frozen=True)
class LayerTime:
    """Time of a layer of the network, which a runtime computes in one kernel or in several."""

    name: str  # e.g. ``attention`` or ``MLP fc1, GELU``
    block: int | None  # number of the encoder's block, from 0; None outside the blocks, and where blocks are added up
    layers: int  # how many layers are added up: those of one name in all blocks, or one
    kernels: int  # how many of the runtime's own layers they are; 0: other kernels compute them as well
    ms: float  # per batch
    measured_share: float  # of the sum over all kernels, 0..1
    modelled_share: float | None  # of the modelled time, or of the operations: see ``modelled_from``; None: no model


@dataclass(frozen=True)
class LayerProfile:
    """Where the time of a batch goes, from runs with the runtime's profiler after the measurement.

    A profiler slows an engine: no figure of the run comes from these runs.
    """

    runs: int
    average: str  # of the runs, for all times here: ``median``; ``mean`` for OpenVINO, which tells no more
    plain_ms: float  # a batch without the profiler, in turn with the profiled runs
    profiled_ms: float  # a batch with the profiler
    sum_ms: float  # sum over all kernels; without copies to and from a GPU
    parts: tuple[LayerTime, ...]  # the whole network, layers of one name in all blocks added up; the dearest first
    dearest: tuple[LayerTime, ...]  # the ten dearest layers; all kernels are in ``layers.csv``
    modelled_from: str
    """``layers`` that TensorRT listed, or ``graph``: the roofline of the device. ``operations``: their shares, because
    there is no model of a CPU. Empty: no model."""
    modelled_reason: str  # why there is no modelled share; empty if there is one


@dataclass(frozen=True)
class BenchSummary:
    """A benchmark run, as written to ``summary.json``."""

    verdict: Verdict
    figures: Figures | None  # None if the run is invalid, unless ``--keep-invalid`` was given
    engine: EngineManifest
    protocol: Protocol
    phases: tuple[Phase, ...]
    repeats: tuple[Repeat, ...]  # empty if the run is invalid, unless ``--keep-invalid`` was given
    end_to_end: EndToEnd | None  # None as for ``figures``, or if it failed; a warning then says why
    roofline: ModelledBound | None
    roofline_reason: str  # why there is no modelled bound; empty if there is one
    machine: Machine
    board: dict[str, Any] | None  # on a Jetson: model, L4T, JetPack, power mode, jetson_clocks; None elsewhere
    conditions: dict[str, Any]  # minimum, mean and maximum of clocks, temperatures and fan over the load phases
    libraries: dict[str, str]
    peak_memory_bytes: int
    """Largest resident size of the process while the engine was measured. It includes loading the engine where the
    kernel cannot reset the peak, and excludes the GPU's part where CPU and GPU share memory."""
    started: str  # start of the run: UTC, ISO 8601
    origin: float  # the start on CLOCK_MONOTONIC, s; all other times count from it. It aligns readings of other meters.
    rejected_repeats: tuple[RejectedRepeat, ...] = ()  # of an invalid run; its tiles and readings are in the tables
    layers: LayerProfile | None = None  # None if not asked for, if the run is invalid, or if it failed
    layers_reason: str = ""  # why there are no times of layers; empty if there are
    command: str = ""  # the command line; empty if the run was made from Python
    tool: str = field(default=f"cdkd-edge {__version__}")
    summary_version: Literal[2] = 2


def summary_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``summary.json``."""
    modules = sys.modules[__name__], statistics, manifest, machine
    return schema_of(BenchSummary, modules, "Benchmark run of cdkd-edge", "summary", SUMMARY_VERSION)


def schema_of(kind: type, modules: Sequence[ModuleType], title: str, name: str, version: int) -> dict[str, Any]:
    """The JSON Schema of a dataclass with a field ``NAME_version``; ``modules`` hold it and the classes it uses."""
    import msgspec

    (root,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    descriptions = _field_descriptions(modules)
    for one, definition in definitions.items():
        properties = definition["properties"]
        definition["description"] = _plain(definition["description"])
        for field_name, text in descriptions[one].items():
            properties[field_name]["description"] = text  # 2020-12 allows it beside a reference
        for value in properties.values():
            value.pop("default", None)  # every field is written; a default would only name this release
    definitions[kind.__name__]["required"].append(f"{name}_version")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:cdkd-edge:{name}-{version}",
        "title": title,
        **root,
        "$defs": definitions,
    }


def _field_descriptions(modules: Sequence[ModuleType]) -> dict[str, dict[str, str]]:
    """By class, what its source says of its fields: a comment at the end of the line, or a docstring below it."""
    found: dict[str, dict[str, str]] = {}
    for module in modules:
        source = inspect.getsource(module)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or not is_dataclass(getattr(module, node.name)):
                continue
            texts = found[node.name] = {}
            for one, below in zip_longest(node.body, node.body[1:]):
                if not isinstance(one, ast.AnnAssign) or not isinstance(one.target, ast.Name) or not one.end_lineno:
                    continue
                comment = lines[one.end_lineno - 1].encode()[one.end_col_offset :].decode().strip()
                if comment.startswith("# "):
                    texts[one.target.id] = _plain(comment[2:])
                elif isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    texts[one.target.id] = _plain(str(below.value.value))
    return found


def _plain(text: str) -> str:
    """A docstring without markup and line breaks, in the words of JSON."""
    first = str if text.startswith("``") else str.upper
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", inspect.cleandoc(text)).replace("``", "")
    sentence = " ".join(re.sub(r"\bNone\b", "null", text).split())
    return first(sentence[:1]) + sentence[1:]


if __name__ == "__main__":
    import json

    sys.stdout.write(json.dumps(summary_schema(), indent=2, ensure_ascii=False) + "\n")
