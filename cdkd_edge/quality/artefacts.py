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
        schema: class names for a checkpoint that has none.
        tile: side of the tiles of a checkpoint, px. Default: its own.
        device, precision: for a checkpoint; see :func:`cdkd_edge.quality.network.load_network`.
        threads: CPU threads for a graph or a CPU engine.
        weights: ``raw``, ``ema`` or a name, for a checkpoint with several sets of weights.

    Raises:
        UsageError: an option for checkpoints, and the file is none.
        CdkdEdgeError: as the loaders do.
    """
    if _is_checkpoint(path):
        return _open_checkpoint(path, schema, tile, device, precision, weights)
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
    """Open two artefacts to be compared; both are closed when the block ends.

    A checkpoint gets the tile of the other one, if that is a graph or an engine.

    Args:
        reference, candidate: the files.
        threads, schema: see :func:`open_artefact`.
        network: ``device``, ``precision`` and ``weights`` of checkpoints; wrong where there is none.

    Raises:
        CdkdEdgeError: as :func:`open_artefact` does.
    """
    paths = (reference, candidate)
    order = sorted((0, 1), key=lambda index: _is_checkpoint(paths[index]))  # checkpoints take the other's tile
    has_checkpoint = any(map(_is_checkpoint, paths))
    tile = None
    with contextlib.ExitStack() as stack:
        opened: dict[int, LoadedArtefact] = {}
        for index in order:
            path = paths[index]
            if _is_checkpoint(path):
                artefact = open_artefact(path, threads=threads, schema=schema, tile=tile, **network)
            else:
                artefact = open_artefact(path, threads=threads, **({} if has_checkpoint else network))
            stack.callback(artefact.labeller.close)
            tile = artefact.labeller.tile
            opened[index] = artefact
        yield opened[0], opened[1]


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is read as a checkpoint; its content then says which kind."""
    return not is_artefact_name(path) and not path.is_dir()


def _open_checkpoint(
    path: Path, schema: str | None, tile: int | None, device: str, precision: str, weights: str | None
) -> LoadedArtefact:
    try:
        import torch

        from cdkd_edge.quality.network import load_network
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "export", "judging a checkpoint") from None
    labeller, report = load_network(path, schema=schema, tile=tile, device=device, precision=precision, weights=weights)
    runtime = f"torch {torch.__version__} on {labeller.device}"
    return LoadedArtefact(path, "checkpoint", runtime, precision, labeller, report.training, report.taken)
