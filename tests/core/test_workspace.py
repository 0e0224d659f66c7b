"""The workspace: the only candidate is taken, anything else is an error that says what to type."""

from __future__ import annotations

import os
import re

import pytest

from cdkd_edge.core.errors import WorkspaceError
from cdkd_edge.core.workspace import Workspace


@pytest.fixture
def space(tmp_path):
    """A workspace in an empty directory."""
    return Workspace(tmp_path)


def put(folder, *names):
    """Artefacts with a manifest each."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in names]
    for path in paths:
        path.touch()
        path.with_suffix(".json").touch()
    return paths


def test_the_three_folders(space, tmp_path):
    assert (space.graphs, space.engines, space.benchmarks) == (
        tmp_path / "export",
        tmp_path / "engines",
        tmp_path / "benchmarks",
    )
    assert list(tmp_path.iterdir()) == []


def test_the_only_candidate_is_taken(space):
    (graph,) = put(space.graphs, "a.onnx")
    (engine,) = put(space.engines, "a.fp32.cpu.onnx")
    assert space.only_graph() == graph
    assert space.only_engine("cdkd-edge bench") == engine


def test_a_tensorrt_engine_is_an_engine_and_no_graph(space):
    (engine,) = put(space.engines, "a.fp16.engine")
    assert space.only_engine("cdkd-edge bench") == engine
    put(space.graphs, "a.engine")
    with pytest.raises(WorkspaceError, match="no exported graph"):
        space.only_graph()


def test_an_empty_workspace_names_the_command_that_fills_it(space):
    for made in (False, True):
        if made:
            space.graphs.mkdir()
            space.engines.mkdir()
        with pytest.raises(WorkspaceError, match="there is no exported graph in ") as caught:
            space.only_graph()
        assert caught.value.hint == "make one: cdkd-edge export CKPT"
        with pytest.raises(WorkspaceError, match="there is no engine in ") as caught:
            space.only_engine("cdkd-edge bench")
        assert caught.value.hint == "make one: cdkd-edge export CKPT && cdkd-edge build"
        assert caught.value.exit_code == 5


def test_what_is_no_whole_artefact_is_passed_over(space):
    (graph,) = put(space.graphs, "a.onnx")
    (space.graphs / "README.md").touch()
    (space.graphs / "without_manifest.onnx").touch()
    put(space.graphs, ".b.1f2e3d4c.part.onnx")  # a write that was cut off
    put(space.graphs, "a.onnx.bak")
    assert space.only_graph() == graph


def test_a_folder_is_no_artefact(space):
    (graph,) = put(space.graphs, "a.onnx")
    (space.graphs / "b.onnx").mkdir()
    (space.graphs / "b.json").touch()
    assert space.only_graph() == graph


def test_several_are_listed_with_the_command_for_each(space):
    paths = put(space.engines, "b.onnx", "a.onnx", "c.engine")
    with pytest.raises(WorkspaceError) as caught:
        space.only_engine("cdkd-edge segment SCENE --engine")
    assert "3 candidates" in caught.value.message
    assert "a.onnx, b.onnx, c.engine" in caught.value.message
    for path in paths:
        assert f"cdkd-edge segment SCENE --engine {path}" in caught.value.hint

    paths = put(space.graphs, "a.onnx", "b.onnx")
    with pytest.raises(WorkspaceError, match=r"a\.onnx, b\.onnx") as caught:
        space.only_graph()
    for path in paths:
        assert f"cdkd-edge build {path}" in caught.value.hint


def test_the_command_can_be_pasted_whatever_the_name(space):
    put(space.graphs, "my graph.onnx", "b.onnx")
    with pytest.raises(WorkspaceError) as caught:
        space.only_graph()
    assert f"cdkd-edge build '{space.graphs / 'my graph.onnx'}'" in caught.value.hint


def test_runs_get_folders_of_their_own(space):
    paths = []
    for _ in range(3):
        path = space.new_run("tiny")
        assert not path.exists()
        path.mkdir(parents=True)
        paths.append(path)
    for path in paths:
        assert path.parent == space.benchmarks
        assert re.fullmatch(r"\d{8}T\d{6}Z-tiny(-\d)?", path.name)


@pytest.mark.parametrize("label", ["../../elsewhere", "a/b", "/abs", "..", "a\nb", ""])
def test_a_label_cannot_lead_out_of_the_workspace(space, label):
    """It comes from a manifest, and manifests travel."""
    path = space.new_run(label)
    assert path.parent == space.benchmarks
    assert path.resolve().parent == space.benchmarks.resolve()
    assert path.name.isprintable()


def test_graphs_are_told_apart_by_precision(space):
    plain, half, unknown = put(space.graphs, "a.onnx", "a.fp16.onnx", "b.onnx")
    plain.with_suffix(".json").write_text('{"precision": "fp32"}')
    half.with_suffix(".json").write_text('{"precision": "fp16"}')
    unknown.with_suffix(".json").write_text("[")
    assert space.graphs_of("fp16") == [half, unknown]
    unknown.unlink()
    assert (space.only_graph(), space.only_graph("fp16")) == (plain, half)
    with pytest.raises(WorkspaceError, match="no int8 graph"):
        space.only_graph("int8")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make what belongs to somebody else")
def test_what_root_makes_belongs_to_the_owner_of_the_workspace(tmp_path):
    space = Workspace(tmp_path)
    folder = space.new_run("tiny")
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    space.hand_over(folder)
    assert folder.stat().st_uid == 0
    os.chown(tmp_path, 65534, 65534)
    space.hand_over(folder)
    for path in (space.benchmarks, folder, folder / "summary.json"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
