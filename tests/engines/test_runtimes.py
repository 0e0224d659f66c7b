"""The table of runtimes: a new one is a row, and everything that asks for runtimes finds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import assert_answer, run

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import ARTEFACT_SUFFIXES, EngineManifest, FileRecord, GraphManifest, read_manifest
from cdkd_edge.core.manifest import write_manifest as write
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.onnxruntime import OnnxLabeller
from cdkd_edge.engines.protocol import segment_tiles
from cdkd_edge.engines.runtimes import RUNTIMES, Runtime, load_engine


class PlainEngine(OnnxLabeller):
    """The graph itself, as an engine."""

    def __init__(self, path: Path, manifest: EngineManifest, threads: int | None) -> None:
        self.manifest = manifest
        super().__init__(path, manifest, threads)


def build_plain(
    graph: Path, destination: Path, precision: str, options: object, note: object, log: object
) -> EngineManifest:
    source = read_manifest(graph, GraphManifest)
    with whole_file(destination) as temporary:
        shutil.copyfile(graph, temporary)
        manifest = EngineManifest.of_graph(
            source,
            runtime="plain-onnx",
            artefact=FileRecord.of(temporary, destination.name),
            device="this CPU",
            attention_blocks=0,
            attention_fused=0,
            build_seconds=0.0,
            libraries={},
        )
        write(destination, manifest)
    return manifest


PLAIN = Runtime(
    name="plain",
    title="the graph itself",
    manifest_names=("plain-onnx",),
    suffix=".plain.onnx",
    on_cpu=True,
    precisions=("fp32",),
    rivals_of_int8=("fp32",),
    has_options=False,
    why_not_here=lambda: None,
    build=build_plain,
    load=PlainEngine,
    read_layers=None,
)


def test_rows_do_not_overlap() -> None:
    names = [name for runtime in RUNTIMES.values() for name in runtime.manifest_names]
    assert len(names) == len(set(names))
    suffixes = [runtime.suffix for runtime in RUNTIMES.values()]
    assert len(suffixes) == len(set(suffixes))
    assert all(suffix.endswith(ARTEFACT_SUFFIXES) for suffix in suffixes)


def test_a_row_is_all_that_a_new_runtime_needs(
    small_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "plain", PLAIN)
    built = run("build", small_graph, "--runtime", "plain", "-w", tmp_path)
    assert built.exit_code == 0, built.stderr
    path = Workspace(tmp_path).engines / "small.fp32.plain.onnx"
    assert run("inspect", path).exit_code == 0
    with load_engine(path) as engine:
        tile = np.full((1, 3, engine.tile, engine.tile), 90, np.uint8)
        assert segment_tiles(engine, tile).shape == (1, engine.tile, engine.tile)
    assert_answer(run("build", small_graph, "--runtime", "plain", "--fp16", "-w", tmp_path), 9, "needs TensorRT")
