"""Opens a checkpoint, a graph or an engine as a labeller, with its runtime, precision and training record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import MissingExtraError, UsageError
from cdkd_edge.core.manifest import ONNXRUNTIME_CPU, GraphManifest, is_artefact_name, kind_of, read_manifest
from cdkd_edge.engines.onnxruntime import graph_labeller
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.engines.runtimes import load_engine


@dataclass(frozen=True)
class LoadedArtefact:
    """A checkpoint, graph or engine that is ready to label tiles."""

    path: Path
    kind: str  # ``checkpoint``, ``graph`` or ``engine``
    runtime: str
    precision: str
    labeller: Labeller
    training: Mapping[str, Any] = field(default_factory=dict)  # its training record
    notes: tuple[str, ...] = ()  # which weights were taken, where a checkpoint holds several sets


def open_artefact(
    path: Path,
    *,
    schema: str | None = None,
    tile: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    weights: str | None = None,
) -> LoadedArtefact:
    """Load a checkpoint (PyTorch), a graph (ONNX Runtime) or an engine.

    Args:
        path: the file; graphs and engines with their manifest beside them.
        schema, tile, device, precision, weights: of a checkpoint, see :func:`cdkd_edge.quality.network.load_network`.
        threads: CPU threads for a graph or a CPU engine.

    Raises:
        UsageError, CdkdEdgeError: an option for checkpoints, and the file is none; as the loaders do.
    """
    if _is_checkpoint(path):
        try:
            import torch

            from cdkd_edge.quality.network import load_network
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingExtraError("torch", "export", "judging a checkpoint") from None
        network, report = load_network(
            path, schema=schema, tile=tile, device=device, precision=precision, weights=weights
        )
        runtime = f"torch {torch.__version__} on {network.device}"
        return LoadedArtefact(path, "checkpoint", runtime, precision, network, report.training, report.taken)
    if precision != "fp32" or device not in ("auto", "cpu") or tile is not None or weights:
        raise UsageError(
            f"{path.name} has its own tile, precision and device, and one set of weights; "
            "only a checkpoint can be given others"
        )
    if kind_of(path) == GraphManifest.kind:
        graph = read_manifest(path, GraphManifest)
        runtime = ONNXRUNTIME_CPU + (", values rounded to FP16" if graph.precision == "fp16" else "")
        labeller = graph_labeller(path, graph, threads)
        return LoadedArtefact(path, "graph", runtime, graph.precision, labeller, graph.training)
    engine = load_engine(path, threads=threads)
    manifest = engine.manifest
    return LoadedArtefact(path, "engine", manifest.runtime, manifest.precision, engine, manifest.training)


@contextlib.contextmanager
def open_artefacts(
    reference: Path, candidate: Path, *, threads: int | None = None, schema: str | None = None, **network: Any
) -> Iterator[tuple[LoadedArtefact, LoadedArtefact]]:
    """Open two artefacts as :func:`open_artefact` does, to be compared; both are closed when the block ends.

    A checkpoint gets the tile of the other one, if that is a graph or an engine. ``network`` is the ``device``,
    ``precision`` and ``weights`` of checkpoints, and wrong where there is none.
    """
    paths, tile = (reference, candidate), None
    checkpoints = [_is_checkpoint(path) for path in paths]
    with contextlib.ExitStack() as stack:
        opened: dict[int, LoadedArtefact] = {}
        for index in sorted((0, 1), key=checkpoints.__getitem__):  # checkpoints come last
            own = {**network, "schema": schema, "tile": tile} if checkpoints[index] else network
            own = own if checkpoints[index] or not any(checkpoints) else {}
            opened[index] = open_artefact(paths[index], threads=threads, **own)
            tile = stack.enter_context(opened[index].labeller).tile
        yield opened[0], opened[1]


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is read as a checkpoint; its content then says which kind."""
    return not is_artefact_name(path) and not path.is_dir()
