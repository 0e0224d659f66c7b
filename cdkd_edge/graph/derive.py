"""Graphs of lower precision from the exported one: FP16. On any machine, without torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.core.errors import GraphError, ManifestError, NumericalCheckError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphManifest,
    Refusal,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.graph.fp16 import SUFFIX, WeightRangeError, to_fp16
from cdkd_edge.graph.fp16_check import OutOfRangeError, check_half
from cdkd_edge.graph.read import read_graph

CHECK_TILES = 2


def fp16_path(plain: Path) -> Path:
    """Where the FP16 graph of an FP32 graph lies: ``ckpt.onnx`` has ``ckpt.fp16.onnx`` beside it."""
    return plain.with_name(f"{plain.stem}.{SUFFIX}.onnx")


def int8_path(plain: Path) -> Path:
    """Where the INT8 graph of an FP32 graph lies: ``ckpt.onnx`` has ``ckpt.int8.onnx`` beside it."""
    return plain.with_name(f"{plain.stem}.int8.onnx")


def outdated_graphs(plain: Path, manifest: GraphManifest) -> tuple[Path, ...]:
    """The graphs of lower precision beside an FP32 graph that were made from another one of its name.

    Args:
        plain: the FP32 graph.
        manifest: its manifest.
    """
    found = []
    for path in (fp16_path(plain), int8_path(plain)):
        try:
            derived = read_manifest(path, GraphManifest, verify=False)
        except ManifestError:  # none, or none of ours
            continue
        if derived.parent is not None and derived.parent.sha256 != manifest.artefact.sha256:
            found.append(path)
    return tuple(found)


def write_fp16(
    plain: Path,
    destination: Path,
    *,
    tiles: Iterable[npt.NDArray[np.uint8]] | None = None,
    imagery: str = "drawn",
    least: float | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> GraphManifest:
    """Make the FP16 graph of an exported FP32 graph, check it, write it and its manifest.

    Args:
        plain: the FP32 graph with its manifest.
        destination: final path of the FP16 graph; see :func:`fp16_path`.
        tiles: uint8 ``[3, T, T]`` tiles to compare labels on. Default: two drawn ones.
        imagery: what they are.
        least: share of labels that must stay the same, in place of the default judgement; see :func:`check_half`.
        progress: called with the name of each step.

    Raises:
        ManifestError: the graph is not what its manifest says, or the destination is not ours to replace.
        GraphError: it is not an FP32 graph, or a weight does not fit FP16.
        NumericalCheckError: FP16 breaks the network. If a value is too large, or it was judged in the default
            way, this is noted in the FP32 graph's manifest.
    """
    require_replaceable(destination)
    source = read_manifest(plain, GraphManifest)
    if source.precision != "fp32":
        raise GraphError(f"{plain} is an {source.precision} graph; FP16 is made from the FP32 graph")
    progress("casting the graph to FP16")
    model = read_graph(plain, source)
    chosen = sample_tiles(source.tile, CHECK_TILES) if tiles is None else tiles
    try:
        half = to_fp16(model)
        del model
        check = check_half(plain, half, chosen, imagery, progress, least=least)
    except (WeightRangeError, NumericalCheckError) as error:
        out_of_range = isinstance(error, (WeightRangeError, OutOfRangeError))
        if out_of_range or (tiles is None and least is None):
            _note(plain, source, Refusal(error.message, out_of_range))
        raise
    if source.fp16_refused:
        _note(plain, source, None)
    with whole_file(destination) as temporary:
        onnx.save(half, temporary)
        manifest = source.derived(
            FileRecord.of(temporary, destination.name), len(half.graph.node), precision="fp16", conversion=check
        )
        write_manifest(destination, manifest)  # before the graph gets its name: no graph without a manifest
    return manifest


def _note(plain: Path, source: GraphManifest, refusal: Refusal | None) -> None:
    with contextlib.suppress(OSError):  # in a folder that cannot be written, it is found out again the next time
        write_manifest(plain, dataclasses.replace(source, fp16_refused=refusal))
