"""Where the time of a batch goes: every layer by the runtime's profiler, beside its share in the roofline.

A profiler slows an engine, so these are runs of their own, made after everything else was measured, in turn with plain
runs. Shares of their sum can be compared with the model; the sum itself stands beside the plain runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cdkd_edge.benchmark.record import LayerProfile, LayerTime
from cdkd_edge.benchmark.roofline.bound import ModelledEngine, graph_of
from cdkd_edge.benchmark.roofline.operators import read_operators
from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.protocol import Engine, KernelTimes
from cdkd_edge.engines.runtimes import runtime_of
from cdkd_edge.graph.files import load_graph
from cdkd_edge.graph.layers import NetworkPart, parts_of

PROFILED_SECONDS = 10.0  # of all profiled runs together, between these numbers of runs
LEAST_RUNS, MOST_RUNS = 5, 50
DEAREST = 10  # layers that are listed
OPERATIONS = "operations"  # what the shares are modelled from on a CPU

Shares = Mapping[NetworkPart, float]


def time_kernels(engine: Engine, batch_seconds: float) -> KernelTimes:
    """The times of an engine's kernels, over a number of runs that fits its seconds per batch.

    Raises:
        EngineError: the engine failed, or its runtime tells no times.
    """
    return engine.kernel_times(int(min(MOST_RUNS, max(LEAST_RUNS, PROFILED_SECONDS / batch_seconds))))


def modelled_shares(
    engine: EngineManifest, folders: Sequence[Path], model: ModelledEngine | None, no_model: str
) -> tuple[Shares, str, str]:
    """The share of every part in the modelled time, what it was modelled from, and why there is none.

    There is no model of a CPU. Its shares are those of the operations, as if memory cost nothing.

    Args:
        folders: folders to look for the engine's graph in.
        model: of an engine on a GPU; ``no_model`` says why there is none.
    """
    if model is not None:
        times = model.estimate.times
        parts = parts_of([time.kernel.operators for time in times])
        return _shares(parts, [time.seconds for time in times]), model.source, ""
    if not runtime_of(engine).on_cpu:
        return {}, "", no_model
    graph, reason = graph_of(engine, folders)
    if graph is None:
        return {}, "", reason
    try:
        operators = read_operators(load_graph(graph)).operators
    except CdkdEdgeError as error:
        return {}, "", error.message
    parts = parts_of([[operator.name] for operator in operators])
    counts = [operator.product_flop + operator.vector_flop for operator in operators]
    return _shares(parts, counts), OPERATIONS, ""


def _shares(parts: Iterable[NetworkPart], values: Sequence[float]) -> Shares:
    total, found = sum(values), Counter[NetworkPart]()
    for part, value in zip(parts, values, strict=True):
        found[part] += value / total  # type: ignore[assignment]
    return found


def layer_profile(times: KernelTimes, modelled: tuple[Shares, str, str]) -> LayerProfile:
    """The times of kernels by layer of the network, beside their shares of :func:`modelled_shares`."""
    shares, source, reason = modelled
    parts = parts_of([kernel.nodes for kernel in times.kernels])
    total_ms = 1e3 * sum(kernel.seconds for kernel in times.kernels)
    kernels, milliseconds = Counter(parts), Counter[NetworkPart]()
    for part, kernel in zip(parts, times.kernels, strict=True):
        milliseconds[part] += 1e3 * kernel.seconds  # type: ignore[assignment]

    def times_of(groups: Mapping[NetworkPart, Sequence[NetworkPart]]) -> tuple[LayerTime, ...]:
        """The times of groups of parts, the dearest first."""
        found = []
        for (name, block), members in groups.items():
            spent = sum(milliseconds[one] for one in members)
            model = sum(shares.get(one, 0.0) for one in members) if shares else None
            count = sum(kernels[one] for one in members)
            found.append(LayerTime(name, block, len(members), count, spent, spent / total_ms, model))
        return tuple(sorted(found, key=lambda one: -one.ms))

    names: dict[NetworkPart, list[NetworkPart]] = {}
    for part in dict.fromkeys((*parts, *shares)):
        names.setdefault(NetworkPart(part.name), []).append(part)
    single = times_of({part: [part] for part in dict.fromkeys(parts)})
    return LayerProfile(
        runs=times.runs, average=times.average, plain_ms=1e3 * times.plain_seconds,
        profiled_ms=1e3 * times.profiled_seconds, sum_ms=total_ms, parts=times_of(names), dearest=single[:DEAREST],
        modelled_from=source, modelled_reason=reason,
    )  # fmt: skip


def kernel_rows(times: KernelTimes) -> list[tuple[str, str, str, str]]:
    """Name, part, block and milliseconds of every kernel, in the order of computation."""
    parts = parts_of([kernel.nodes for kernel in times.kernels])
    return [
        (kernel.name, part.name, "" if part.block is None else str(part.block), f"{1e3 * kernel.seconds:.4f}")
        for kernel, part in zip(times.kernels, parts, strict=True)
    ]
