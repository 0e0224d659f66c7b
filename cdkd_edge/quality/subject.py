"""What can be judged: a checkpoint, a graph or an engine, each as something that labels tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import MissingExtraError, UsageError
from cdkd_edge.core.manifest import (
    ONNXRUNTIME_CPU,
    EngineManifest,
    GraphManifest,
    is_artefact_name,
    kind_of,
    read_manifest,
)
from cdkd_edge.engines.onnxruntime import graph_labeller
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.engines.runtimes import load_engine


@dataclass(frozen=True)
class Subject:
    """A loaded artefact and what is known of it."""

    path: Path
    kind: str
    """``checkpoint``, ``graph`` or ``engine``."""
    runtime: str
    precision: str
    labeller: Labeller
    training: Mapping[str, Any] = field(default_factory=dict)
    """What the artefact says of its training."""
    notes: tuple[str, ...] = ()
    """Which weights of a checkpoint these are, where it holds several sets."""


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is to be read as a checkpoint; which kind it is, its content says."""
    return not is_artefact_name(path) and not path.is_dir()


def open_subject(
    path: Path,
    *,
    schema: str | None = None,
    tile: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    weights: str | None = None,
) -> Subject:
    """Load a checkpoint (PyTorch), a graph (ONNX Runtime) or an engine.

    Args:
        path: the file; graphs and engines with their manifest beside them.
        schema: class names for a checkpoint that has none.
        tile: side of the tiles, px, for a checkpoint. Default: its own.
        device, precision: for a checkpoint; see :func:`cdkd_edge.quality.network.load_network`.
        threads: CPU threads for a graph or a CPU engine.
        weights: ``raw``, ``ema`` or a name, for a checkpoint with several sets of weights.

    Raises:
        CdkdEdgeError: as the loaders do.
    """
    if _is_checkpoint(path):
        try:
            import torch

            from cdkd_edge.quality.network import load_network
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingExtraError("torch", "export", "judging a checkpoint") from None
        labeller, report = load_network(
            path, schema=schema, tile=tile, device=device, precision=precision, weights=weights
        )
        runtime = f"torch {torch.__version__} on {labeller.device}"
        return Subject(path, "checkpoint", runtime, precision, labeller, report.training, report.taken)
    if precision != "fp32" or device not in ("auto", "cpu") or tile is not None or weights:
        raise UsageError(
            f"{path.name} has its own tile, precision and device, and one set of weights; "
            "only a checkpoint can be given others"
        )
    if kind_of(path) == GraphManifest.kind:
        graph = read_manifest(path, GraphManifest)
        runtime = ONNXRUNTIME_CPU + (", values rounded to FP16" if graph.precision == "fp16" else "")
        return Subject(path, "graph", runtime, graph.precision, graph_labeller(path, graph, threads), graph.training)
    engine = load_engine(path, threads=threads)
    manifest: EngineManifest = engine.manifest
    return Subject(path, "engine", manifest.runtime, manifest.precision, engine, manifest.training)


@contextlib.contextmanager
def open_pair(
    reference: Path,
    candidate: Path,
    *,
    schema: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    weights: str | None = None,
) -> Iterator[tuple[Subject, Subject]]:
    """Two artefacts that are to be compared, closed when the block ends.

    A checkpoint is opened with the tile of the other one, if that is a graph or an engine. ``device``, ``precision``
    and ``weights`` are for checkpoints, and wrong where there is none.

    Raises:
        CdkdEdgeError: as :func:`open_subject` does.
    """
    paths = (reference, candidate)
    flexible = [_is_checkpoint(path) for path in paths]
    with contextlib.ExitStack() as stack:
        opened: dict[int, Subject] = {}
        tile = None
        for index in sorted(range(2), key=lambda i: flexible[i]):  # what has its own tile comes first
            extra: dict[str, Any] = {"device": device, "precision": precision, "weights": weights}
            if flexible[index]:
                extra["tile"] = tile
            elif any(flexible):
                extra = {}
            subject = open_subject(paths[index], schema=schema, threads=threads, **extra)
            stack.callback(subject.labeller.close)
            tile = subject.labeller.tile
            opened[index] = subject
        yield opened[0], opened[1]
