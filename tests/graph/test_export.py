"""Checkpoint to graph: what is written, what it says about itself, and that nothing wrong is ever written."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
onnxsim = pytest.importorskip("onnxsim")

from reference import reference_labels, reference_logits  # noqa: E402

from cdkd_edge.core.errors import (  # noqa: E402
    CheckpointError,
    EncoderOnlyError,
    GraphError,
    ManifestError,
    MissingExtraError,
    NumericalCheckError,
    SchemaError,
)
from cdkd_edge.core.files import sha256_of  # noqa: E402
from cdkd_edge.core.labels import load_schema  # noqa: E402
from cdkd_edge.core.manifest import GraphManifest, read_manifest  # noqa: E402
from cdkd_edge.core.sample import sample_tiles  # noqa: E402
from cdkd_edge.engines.onnxruntime import build_cpu_engine  # noqa: E402
from cdkd_edge.graph import export as pipeline  # noqa: E402
from cdkd_edge.graph import fold  # noqa: E402
from cdkd_edge.graph.build import build_graph  # noqa: E402
from cdkd_edge.graph.export import (  # noqa: E402
    ExportOptions,
    export_checkpoint,
)
from cdkd_edge.graph.nodes import simplify_graph  # noqa: E402
from cdkd_edge.model.checkpoint import save_checkpoint  # noqa: E402
from cdkd_edge.model.config import NetworkConfig  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402
from cdkd_edge.model.resample import resample_position  # noqa: E402

pytestmark = pytest.mark.needs_torch


def network_of(config, weights):
    network = SegmentationNetwork(config)
    network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()}, strict=False)
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config, small_weights):
    """A checkpoint that knows its classes and its training."""
    path = tmp_path_factory.mktemp("ckpt") / "city.pt"
    network = network_of(small_config, small_weights)
    save_checkpoint(network, path, schema=load_schema("dubai"), training={"steps": 7})
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    """What an export returns, and the steps it told."""
    steps = []
    path = tmp_path_factory.mktemp("space") / "export" / "city.onnx"
    return export_checkpoint(checkpoint, path, note=steps.append), steps


def run(path, tiles):
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["labels", "logits"], {"image": tiles})


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what is written ------------------------------------------------------------------------------


def test_a_graph_and_its_manifest_are_written(exported):
    result, steps = exported
    assert files(result.path.parent) == ["city.json", "city.onnx"]
    stored = dataclasses.asdict(read_manifest(result.path, GraphManifest))
    assert stored == json.loads(json.dumps(dataclasses.asdict(result.manifest))) | {
        "preprocessing": stored["preprocessing"]
    }
    assert steps == ["loading the checkpoint", "writing the graph", "simplifying", "checking against PyTorch"]
    assert result.seconds > 0


def test_the_manifest_tells_where_the_graph_comes_from(exported, checkpoint, small_config):
    manifest = exported[0].manifest
    assert manifest.name == "city"
    assert manifest.precision == "fp32"
    assert manifest.checkpoint.file == "city.pt"
    assert manifest.checkpoint.sha256 == sha256_of(checkpoint)
    assert manifest.layout == "cdkd-edge"
    assert manifest.labels == load_schema("dubai").to_document()
    assert manifest.preprocessing.channels == "RGB"
    assert manifest.preprocessing.mean == (123.675, 116.28, 103.53)
    assert manifest.preprocessing.std == (58.395, 57.12, 57.375)
    assert (manifest.tile, manifest.batch, manifest.opset) == (64, 1, 20)
    assert NetworkConfig(**{**manifest.network, "pool_scales": tuple(manifest.network["pool_scales"])}) == small_config
    assert manifest.nodes == len(onnx.load(exported[0].path).graph.node)
    assert manifest.training == {"steps": 7}
    assert {"python", "torch", "onnx", "onnxsim", "onnxruntime", "numpy"} <= set(manifest.libraries)
    assert manifest.check.tiles == 2
    assert manifest.check.label_agreement >= 0.9999
    assert 0 < manifest.check.max_logit_error < 1e-4
    assert torch.__version__ in manifest.check.network_runtime
    assert onnxruntime.__version__ in manifest.check.graph_runtime


def test_the_graph_computes_the_reference(exported, small_weights, small_config, small_tiles):
    labels, logits = run(exported[0].path, small_tiles[:1])
    expected = reference_logits(small_weights, small_tiles[:1], heads=1, eps=small_config.layer_norm_eps)
    assert np.abs(logits - expected).max() < 1e-4
    assert (labels == reference_labels(expected, 64)).mean() > 0.999


def test_the_graph_describes_itself(exported):
    model = onnx.load(exported[0].path)
    assert "uint8" in model.doc_string
    assert model.producer_name == "cdkd-edge"
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "classes": "building, land, road, vegetation, water"
    }


def test_its_engine_has_all_attention_fused(exported, tmp_path, small_config):
    manifest = build_cpu_engine(exported[0].path, tmp_path / "e.onnx")
    assert (manifest.attention_fused, manifest.attention_blocks) == (small_config.depth, small_config.depth)


@pytest.mark.parametrize("opset", [17, 18, 19])
def test_engines_of_older_opsets_have_all_attention_fused(checkpoint, tmp_path, opset, small_config):
    result = export_checkpoint(checkpoint, tmp_path / "g.onnx", ExportOptions(opset=opset))
    assert result.manifest.opset == opset
    assert onnx.load(result.path).opset_import[0].version == opset
    assert build_cpu_engine(result.path, tmp_path / "e.onnx").attention_fused == small_config.depth


def test_a_batch(checkpoint, tmp_path, small_tiles, exported):
    result = export_checkpoint(checkpoint, tmp_path / "g.onnx", ExportOptions(batch=2))
    assert result.manifest.batch == 2
    assert result.manifest.check.tiles == 4
    labels, _ = run(result.path, small_tiles[:2])
    alone = [run(exported[0].path, small_tiles[i : i + 1])[0][0] for i in range(2)]
    assert (labels == np.stack(alone)).mean() > 0.999


def test_another_tile_resamples_the_positions(checkpoint, tmp_path, small_weights):
    result = export_checkpoint(checkpoint, tmp_path / "g.onnx", ExportOptions(tile=96))
    assert result.manifest.tile == result.manifest.network["tile"] == 96
    position = resample_position(torch.from_numpy(small_weights["encoder.pos_embed"]), 12, False)
    weights = {**small_weights, "encoder.pos_embed": position.numpy()}
    tile = np.random.default_rng(0).integers(0, 256, (1, 3, 96, 96), np.uint8)
    _, logits = run(result.path, tile)
    assert np.abs(logits - reference_logits(weights, tile, heads=1, eps=1e-5)).max() < 1e-4


def test_heads_and_epsilon_that_the_checkpoint_does_not_store(tmp_path, make_weights):
    config = NetworkConfig(
        tile=48, patch=8, embed_dim=48, depth=4, heads=3, mlp_dim=48, classes=2, head_channels=8, layer_norm_eps=0.01
    )
    weights = make_weights(config)
    torch.save({key: torch.from_numpy(value) for key, value in weights.items()}, tmp_path / "bare.pth")
    result = export_checkpoint(tmp_path / "bare.pth", tmp_path / "g.onnx", ExportOptions(heads=3, layer_norm_eps=0.01))
    tile = np.random.default_rng(0).integers(0, 256, (1, 3, 48, 48), np.uint8)
    expected = reference_logits(weights, tile, heads=3, eps=0.01)
    assert np.abs(run(result.path, tile)[1] - expected).max() < 1e-4 * np.abs(expected).max()
    assert [c["name"] for c in result.manifest.labels["classes"]] == ["class_0", "class_1"]


def test_a_new_export_replaces_the_old_one(checkpoint, tmp_path):
    for opset in (18, 20):
        result = export_checkpoint(checkpoint, tmp_path / "g.onnx", ExportOptions(opset=opset))
    assert read_manifest(result.path, GraphManifest).opset == 20
    assert files(tmp_path) == ["g.json", "g.onnx"]


def test_sample_tiles_are_pictures_and_always_the_same():
    tiles = sample_tiles(48, 3)
    assert tiles.shape == (3, 3, 48, 48)
    assert tiles.dtype == np.uint8
    assert np.array_equal(tiles, sample_tiles(48, 3))
    assert tiles.std(axis=(1, 2, 3)).min() > 5
    assert not np.array_equal(tiles[0], tiles[1])


# --- what is refused ------------------------------------------------------------------------------


OLD = '{"kind": "graph"}'
"""Just enough of an earlier manifest for the pair to count as ours."""


def assert_not_exported(error, checkpoint, folder, options=ExportOptions()):
    """The export fails and leaves an older graph as it was."""
    older = folder / "older"
    older.mkdir()
    for name in ("g.onnx", "g.json"):
        (older / name).write_text(OLD)
    fresh = folder / "fresh" / "g.onnx"
    for destination in (fresh, older / "g.onnx"):
        with pytest.raises(error) as caught:
            export_checkpoint(checkpoint, destination, options)
        assert "\n" not in str(caught.value)
    assert not [name for name in files(folder) if name.startswith("fresh/")]
    assert files(older) == ["g.json", "g.onnx"]
    assert (older / "g.onnx").read_text() == (older / "g.json").read_text() == OLD
    return caught.value


FOLD_ATTENTION = fold.fold_attention


def without_biases(weights, block, heads, **options):
    return FOLD_ATTENTION({**weights, f"{block}.attn.qkv.bias": np.zeros(1, np.float32)}, block, heads, **options)


def without_mean(weight, bias, mean, std):
    return weight / np.asarray(std, np.float32).reshape(1, 3, 1, 1), bias


def corner_aligned(grid, scales, align=False):
    columns = []
    for scale in scales:
        axis = np.zeros((grid, scale))
        for cell in range(grid):
            source = cell * (scale - 1) / (grid - 1)
            low = min(int(source), max(scale - 2, 0))
            axis[cell, low] += 1 - (source - low)
            axis[cell, min(low + 1, scale - 1)] += source - low
        columns.append(np.kron(axis, axis))
    return np.concatenate(columns, axis=1).astype(np.float32)


def not_a_number(grid, scales):
    return np.full((sum(s * s for s in scales), grid * grid), np.nan, np.float32)


BREAKS = {
    "fold_attention": without_biases,
    "fold_normalisation": without_mean,
    "upsampling_matrix": corner_aligned,
    "pooling_matrix": not_a_number,
}


@pytest.mark.parametrize(("function", "broken"), BREAKS.items(), ids=BREAKS.keys())
def test_a_graph_that_computes_something_else_is_not_written(tmp_path, checkpoint, monkeypatch, function, broken):
    monkeypatch.setattr(fold, function, broken)
    error = assert_not_exported(NumericalCheckError, checkpoint, tmp_path)
    assert error.exit_code == 8
    assert error.hint


@pytest.mark.parametrize("function", ["fold_normalisation", "pooling_matrix"])
def test_a_wrong_graph_is_noticed_where_all_labels_agree(tmp_path, small_config, small_weights, monkeypatch, function):
    """A network that sees one class everywhere must not pass for that reason."""
    bias = small_weights["head.classifier.bias"] + np.array([1000, 0, 0, 0, 0], np.float32)
    network = network_of(small_config, {**small_weights, "head.classifier.bias": bias})
    save_checkpoint(network, tmp_path / "one.pt")
    assert export_checkpoint(tmp_path / "one.pt", tmp_path / "right.onnx").manifest.check.label_agreement == 1
    monkeypatch.setattr(fold, function, BREAKS[function])
    with pytest.raises(NumericalCheckError):
        export_checkpoint(tmp_path / "one.pt", tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize("schema", ["deepglobe", "loveda"])
def test_a_schema_of_another_size_is_refused(tmp_path, checkpoint, schema):
    error = assert_not_exported(SchemaError, checkpoint, tmp_path, ExportOptions(schema=schema))
    assert f"{len(load_schema(schema))} classes, the network 5" in error.message
    assert "--schema" in error.hint


def test_a_stated_schema_wins(tmp_path, checkpoint):
    (tmp_path / "own.toml").write_text("".join(f'[[classes]]\nname="k{i}"\ncolor=[{i},0,0]\n' for i in range(5)))
    options = ExportOptions(schema=str(tmp_path / "own.toml"))
    manifest = export_checkpoint(checkpoint, tmp_path / "g.onnx", options).manifest
    assert [c["name"] for c in manifest.labels["classes"]] == ["k0", "k1", "k2", "k3", "k4"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (ExportOptions(opset=16), GraphError),
        (ExportOptions(batch=0), GraphError),
        (ExportOptions(tile=50), CheckpointError),
        (ExportOptions(tile=32), CheckpointError),
        (ExportOptions(heads=2), CheckpointError),
        (ExportOptions(schema="no-such"), SchemaError),
    ],
    ids=["opset", "batch", "tile", "small tile", "heads", "schema"],
)
def test_impossible_options_leave_nothing(tmp_path, checkpoint, options, error):
    assert_not_exported(error, checkpoint, tmp_path, options)


def test_an_encoder_alone_leaves_nothing(tmp_path, small_weights):
    state = {key: torch.from_numpy(value) for key, value in small_weights.items() if key.startswith("encoder.")}
    torch.save(state, tmp_path / "encoder.pt")
    assert_not_exported(EncoderOnlyError, tmp_path / "encoder.pt", tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, checkpoint):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):  # noqa: PT011 - the system's own error; the command line words it
        export_checkpoint(checkpoint, tmp_path / "file" / "export" / "g.onnx")
    assert files(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


# --- simplification -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 20])
def test_simplifying_keeps_what_tensorrt_and_the_fused_kernels_need(small_weights, small_config, opset, monkeypatch):
    raw = []
    simplify = onnxsim.simplify

    def spy(*args, **options):
        raw.append(simplify(*args, **options))
        return raw[0]

    monkeypatch.setattr(onnxsim, "simplify", spy)
    written = build_graph(small_weights, small_config, opset=opset)
    before = Counter(node.op_type for node in written.graph.node)
    simplified = simplify_graph(written)
    after = Counter(node.op_type for node in simplified.graph.node)
    # Not only because a larger graph was put aside: the passes that make Gemms must be off.
    assert "Gemm" not in [node.op_type for node in raw[0][0].graph.node]
    assert sum(after.values()) <= sum(before.values())
    assert after["MatMul"] == before["MatMul"]
    assert after["LayerNormalization"] == before["LayerNormalization"]
    assert after["Softmax"] == before["Softmax"]
    assert not {"Gemm", "Gather", "Constant", "Identity"} & set(after)
    assert "logits" in {output for node in simplified.graph.node for output in node.output}
    assert simplified.opset_import == written.opset_import
    assert [output.type for output in simplified.graph.output] == [output.type for output in written.graph.output]
    assert not simplified.metadata_props


def test_simplifying_never_grows_a_graph(small_weights, small_config, monkeypatch):
    written = build_graph(small_weights, small_config)
    larger = onnx.ModelProto.FromString(written.SerializeToString())
    larger.graph.node[-1].output[0] = "almost"
    larger.graph.node.append(onnx.helper.make_node("Identity", ["almost"], ["labels"]))
    monkeypatch.setattr(onnxsim, "simplify", lambda *_, **__: (larger, True))
    assert len(simplify_graph(written).graph.node) == len(written.graph.node)


def test_what_the_simplifier_cannot_vouch_for_is_refused(small_weights, small_config, monkeypatch):
    written = build_graph(small_weights, small_config)
    monkeypatch.setattr(onnxsim, "simplify", lambda *_, **__: (written, False))
    with pytest.raises(GraphError):
        simplify_graph(written)
    broken = onnx.ModelProto.FromString(written.SerializeToString())
    broken.graph.node[3].input[0] = "nowhere"
    monkeypatch.setattr(onnxsim, "simplify", lambda *_, **__: (broken, True))
    with pytest.raises(GraphError, match="not valid ONNX"):
        simplify_graph(written)


def test_without_onnxsim_the_extra_is_named(small_weights, small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    with pytest.raises(MissingExtraError, match="onnxsim") as caught:
        simplify_graph(build_graph(small_weights, small_config))
    assert "cdkd-edge[export]" in caught.value.hint


@pytest.mark.parametrize("mine", ["net.onnx", "net.json"])
def test_files_of_others_are_not_replaced(tmp_path, checkpoint, mine):
    (tmp_path / mine).write_text('{"mine": 1}')
    with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
        export_checkpoint(checkpoint, tmp_path / "net.onnx")
    assert [name for name in files(tmp_path) if "net." in name] == [mine]
    assert (tmp_path / mine).read_text() == '{"mine": 1}'


def test_no_graph_without_its_manifest(tmp_path, checkpoint, monkeypatch):
    def full(artefact, manifest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "write_manifest", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_checkpoint(checkpoint, tmp_path / "out" / "net.onnx")
    assert caught.value.filename == str(tmp_path / "out" / "net.onnx")
    assert files(tmp_path / "out") == []
