"""The FP16 graph, and the check that sees on a CPU what FP16 does to a network."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from quantization_helpers import (
    CLASS_TOKEN,
    CONFIG,
    NECK,
    NORMED,
    ROTARY,
    WINDOWS,
    casts,
    centred,
    constants,
    nodes_of,
    session_of,
    set_constant,
    tiles_of,
    values,
)
from reference import reference_logits

from cdkd_edge.core.errors import GraphError, ManifestError, NumericalCheckError
from cdkd_edge.core.manifest import GraphManifest, read_manifest
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.files import derived_path, load_graph
from cdkd_edge.graph.fp16 import check_fp16, logit_tolerance, to_fp16, write_fp16
from cdkd_edge.graph.fp16_simulation import extreme_tiles, fp16_on_cpu, longest_rounding, rounded_values
from cdkd_edge.graph.int8 import calibrate, int8_graph
from cdkd_edge.graph.layers import search_classes
from cdkd_edge.model.config import NetworkConfig

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def weights(make_weights):
    return centred(make_weights(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def plain(weights):
    """An FP32 graph. Not to be changed."""
    return build_graph(weights, CONFIG)


@pytest.fixture
def store(tmp_path):
    """Writes a graph where `check_fp16` reads it."""

    def write(model):
        path = tmp_path / "plain.onnx"
        onnx.save(model, path)
        return path

    return write


# --- the graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 18, 19, 20])
@pytest.mark.parametrize(("config", "batch"), [(CONFIG, 1), (WINDOWS, 2), (ROTARY, 2), (NORMED, 1), (NECK, 2)])
def test_every_weight_and_value_is_fp16(make_weights, config, batch, opset):
    half = to_fp16(build_graph(make_weights(config), config, batch=batch, opset=opset))
    onnx.checker.check_model(half, full_check=True)
    scales = {resize.input[2] for resize in nodes_of(half, "Resize")}
    kinds = {item.name: item.data_type for item in half.graph.initializer}
    assert [name for name, kind in kinds.items() if kind == FLOAT] == sorted(scales)
    assert set(kinds.values()) == {FLOAT, HALF, TensorProto.INT64}
    inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True, data_prop=True).graph.value_info
    found = Counter(item.type.tensor_type.elem_type for item in inferred)
    assert set(found) == {HALF, TensorProto.BOOL}  # of the comparisons of classes
    assert found[TensorProto.BOOL] == config.classes - 1
    for item, shape in ((half.graph.input[0], [batch, 3, 48, 48]), (half.graph.output[0], [batch, 48, 48])):
        assert item.type.tensor_type.elem_type == TensorProto.UINT8
        assert [size.dim_value for size in item.type.tensor_type.shape.dim] == shape


@pytest.mark.parametrize("opset", [17, 20])
def test_two_casts_remain_at_the_ends(plain, weights, opset):
    half = to_fp16(build_graph(weights, CONFIG, opset=opset))
    assert casts(half) == {"FLOAT16": 1, "UINT8": 1}
    first, last = nodes_of(half, "Cast")
    assert list(first.input) == ["image"]
    assert list(last.output) == ["labels"]
    assert nodes_of(half, "Squeeze")[0].output[0] == last.input[0]
    assert casts(plain) == {"FLOAT": 2, "UINT8": 1}, "pixels, and class numbers on their way to uint8"


def test_nothing_but_types_changes(plain):
    before = plain.SerializeToString()
    half = to_fp16(plain)
    assert plain.SerializeToString() == before
    search_classes(half)  # FP16 graphs compare classes in place of ArgMax
    kept = [node for node in plain.graph.node if node.output[0] != "best.float"]  # a CPU casts class numbers at once
    assert [node.op_type for node in half.graph.node] == [node.op_type for node in kept]
    assert [list(node.input) for node in half.graph.node] == [list(node.input) for node in kept]
    exact, rounded = constants(plain), constants(half)
    assert set(exact) == set(rounded)
    for name, value in rounded.items():
        expected = exact[name].astype(np.float16) if value.dtype == np.float16 else exact[name]
        np.testing.assert_array_equal(value, expected)


def test_rotary_tables_in_fp16_move_scores_no_more_than_rounded_queries_and_keys_do(make_weights):
    """At 1024 px: 4096 tokens, angles of almost 2 pi, which the tables do not hold."""
    config = NetworkConfig(depth=4, embed_dim=64, heads=1, mlp_dim=8, head_channels=4, rotary_base=100.0)
    half = constants(to_fp16(build_graph(make_weights(config), config)))
    tables = [half[f"rotary.{name}.1"].astype(np.float64)[0, 0, :, :32] for name in ("cosine", "sine")]
    angles = config.rotary_angles()
    assert 6 < angles.max() < 2 * np.pi
    scale = 64**-0.25
    assert np.abs(np.array(tables) / scale - [np.cos(angles), np.sin(angles)]).max() < 4e-4
    q, k = np.random.default_rng(0).standard_normal((2, 4096, 64))

    def scores(q, k, cosine, sine):
        first, second = (
            (part[:, :32] * cosine - part[:, 32:] * sine, part[:, 32:] * cosine + part[:, :32] * sine)
            for part in (q, k)
        )
        return np.concatenate(first, axis=1) @ np.concatenate(second, axis=1).T

    exact = scores(q, k, scale * np.cos(angles), scale * np.sin(angles))
    rounded = (x.astype(np.float16).astype(np.float64) for x in (q, k))
    by_rounding = scores(*rounded, scale * np.cos(angles), scale * np.sin(angles)) - exact
    by_tables = scores(q, k, *tables) - exact
    assert 0.5 * by_rounding.std() < by_tables.std() < 1.2 * by_rounding.std() < 1e-3 * exact.std()


@pytest.mark.parametrize("value", [65505.0, -1e6, np.inf, np.nan])
def test_a_weight_beyond_fp16_is_named(weights, value):
    broken = {**weights, "encoder.blocks.2.mlp.fc1.weight": weights["encoder.blocks.2.mlp.fc1.weight"].copy()}
    broken["encoder.blocks.2.mlp.fc1.weight"][3, 4] = value
    with pytest.raises(GraphError, match=r"blocks\.2\.mlp\.fc1\.weight holds .*FP16 ends at 65504"):
        to_fp16(build_graph(broken, CONFIG))


def test_the_largest_weight_of_fp16_is_taken(weights):
    model = build_graph(weights, CONFIG)
    value = constants(model)["blocks.2.mlp.fc1.weight"].copy()
    value[0, 0] = -65504
    set_constant(model, "blocks.2.mlp.fc1.weight", value)
    assert constants(to_fp16(model))["blocks.2.mlp.fc1.weight"][0, 0] == -65504


def test_only_an_exported_fp32_graph_is_taken(plain):
    with_logits = onnx.ModelProto.FromString(plain.SerializeToString())
    with_logits.graph.output.append(helper.make_tensor_value_info("logits", FLOAT, None))
    with pytest.raises(GraphError, match="uint8 tiles and labels"):
        to_fp16(with_logits)
    found = calibrate(plain, tiles_of(2))
    with pytest.raises(GraphError, match="quantised already"):
        to_fp16(int8_graph(found.model, found.layers, found.scales))


# --- what a CPU makes of it -----------------------------------------------------------------------


def node_by_hand(node, inputs, heads):
    """A node's result in FP64, and how far a value may be from it (beside being rounded)."""
    arrays = [None if item is None else item.astype(np.float64) for item in inputs]
    x, *rest = arrays
    if node.op_type == "MatMul":
        return x @ rest[0]
    if node.op_type == "Add":
        return x + rest[0]
    if node.op_type == "Relu":
        return np.maximum(x, 0)
    if node.op_type == "Gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if node.op_type == "LayerNormalization":
        centre = x - x.mean(axis=-1, keepdims=True)
        eps = next(item.f for item in node.attribute if item.name == "epsilon")
        return centre / np.sqrt((centre**2).mean(axis=-1, keepdims=True) + eps) * rest[0] + rest[1]
    if node.op_type == "MultiHeadAttention":
        q, k, v = (item.reshape(*item.shape[:2], heads, -1).transpose(0, 2, 1, 3) for item in arrays)
        share = np.exp(q @ k.transpose(0, 1, 3, 2))
        return (share / share.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(arrays[0].shape)
    return None


@pytest.mark.parametrize(("config", "batch"), [(CONFIG, 1), (CLASS_TOKEN, 2)])
def test_every_stored_value_is_the_exact_one_rounded(make_weights, config, batch):
    """Each node is computed again from its own inputs in FP64; what is stored is that, rounded to FP16."""
    rehearsal = fp16_on_cpu(to_fp16(build_graph(make_weights(config), config, batch=batch)))
    stored = constants(rehearsal)
    names = {name for node in rehearsal.graph.node for name in (*node.input, *node.output)}
    names -= {*stored, "image", ""}
    found = {**stored, **values(rehearsal, sorted(names), tiles_of(batch))}
    rounded = set(rounded_values(rehearsal))
    checked = Counter()
    for node in rehearsal.graph.node:
        name = node.output[0].removesuffix(".exact")
        expected = node_by_hand(node, [found.get(item) for item in node.input], config.heads)
        if expected is None:
            continue
        checked[node.op_type] += 1
        if name in rounded:
            assert node.output[0] == f"{name}.exact"
            np.testing.assert_array_equal(found[name], found[f"{name}.exact"].astype(np.float16).astype(np.float32))
        size = np.abs(expected).max()
        np.testing.assert_allclose(found[node.output[0]], expected, rtol=1e-4, atol=2e-5 * size)
    assert checked["MultiHeadAttention"] == checked["Gelu"] == config.depth
    assert checked["LayerNormalization"] == 2 * config.depth
    assert checked["MatMul"] >= 4 * config.depth


def test_what_is_rounded_is_what_an_engine_stores(plain):
    rehearsal = fp16_on_cpu(to_fp16(plain))
    rounded = rounded_values(rehearsal)
    for index in range(CONFIG.depth):
        block = f"blocks.{index}"
        for name in (
            "norm1",
            "attn.q",
            "attn.k",
            "attn.v",
            "attn.joined",
            "attn.proj",
            "after_attn",
            "mlp.fc1",
            "mlp.gelu",
            "out",
        ):
            assert f"{block}.{name}" in rounded
        assert f"{block}.attn.proj.product" not in rounded  # kept in FP32 until the bias is added
    assert {"tokens", "pool.cells", "bottleneck.sum", "fuse.conv", "logits", "scores"} <= set(rounded)
    assert len(set(rounded)) == len(rounded)
    assert casts(rehearsal)["FLOAT16"] == len(rounded)


def test_the_rounded_network_is_near_the_reference_and_no_nearer_than_fp16(weights, plain):
    image = tiles_of(1, seed=3)
    exact = reference_logits(weights, image, heads=CONFIG.heads, eps=CONFIG.layer_norm_eps)
    scale = np.abs(exact).max()
    in_fp32 = np.abs(values(plain, ["logits"], image)["logits"] - exact).max() / scale
    in_fp16 = np.abs(values(fp16_on_cpu(to_fp16(plain)), ["logits"], image)["logits"] - exact).max() / scale
    assert in_fp32 < 1e-5
    assert 1e-4 < in_fp16 < 2e-2


def test_large_query_biases_survive_fp16(weights, store):
    """They are part of the weights of q; FP16 rounds them no worse than before."""
    large = dict(weights)
    rng = np.random.default_rng(3)
    for index in range(CONFIG.depth):
        name = f"encoder.blocks.{index}.attn.qkv.bias"
        large[name] = weights[name] + rng.normal(0, 10, weights[name].shape).astype(np.float32)
    model, image = build_graph(large, CONFIG), tiles_of(1, seed=3)
    exact = reference_logits(large, image, heads=CONFIG.heads, eps=CONFIG.layer_norm_eps)
    error = np.abs(values(fp16_on_cpu(to_fp16(model)), ["logits"], image)["logits"] - exact).max()
    assert 1e-4 < error / np.abs(exact).max() < 2e-2
    check = check_fp16(store(model), to_fp16(model), image, "sample")
    assert check.max_logit_error < check.logit_tolerance


@pytest.mark.parametrize("opset", [17, 19])
def test_gelu_of_five_nodes_is_rounded_as_well(weights, opset):
    rehearsal = fp16_on_cpu(to_fp16(build_graph(weights, CONFIG, opset=opset)))
    image = tiles_of(1)
    exact = reference_logits(weights, image, heads=CONFIG.heads, eps=CONFIG.layer_norm_eps)
    error = np.abs(values(rehearsal, ["logits"], image)["logits"] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2


# --- overflow -------------------------------------------------------------------------------------


def scaled(weights, **factors):
    """Weights times factors; in names ``__`` is a dot."""
    result = dict(weights)
    for key, factor in factors.items():
        name = key.replace("__", ".")
        result[name] = (weights[name] * factor).astype(np.float32)
    return result


LOUD = {"encoder__blocks__1__mlp__fc2__weight": 6e4}
"""Makes the second block write values beyond 65504; FP32 carries them, and LayerNorm brings them back."""
HIDDEN = {"encoder__blocks__1__mlp__fc1__weight": 6e4, "encoder__blocks__1__mlp__fc2__weight": 1e-5}
"""The same inside an MLP, whose second layer makes them small again."""


@pytest.mark.parametrize("opset", [17, 20])
def test_an_overflow_is_found_that_onnx_runtime_hides(weights, store, opset):
    model = build_graph(scaled(weights, **HIDDEN), CONFIG, opset=opset)
    half, tile = to_fp16(model), tiles_of(1)
    assert np.abs(values(model, ["blocks.1.mlp.fc1"], tile)["blocks.1.mlp.fc1"]).max() > 70000

    naive = onnx.ModelProto.FromString(half.SerializeToString())
    naive.graph.output.append(helper.make_tensor_value_info("logits", HALF, None))
    session = onnxruntime.InferenceSession(naive.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": tile})
    assert np.isfinite(logits).all(), "the trap is gone: this ONNX Runtime rounds as an engine does"

    with pytest.raises(NumericalCheckError, match=r"on the imagery blocks\.1\.mlp\.fc1 leaves FP16's range") as caught:
        check_fp16(store(model), half, tile, "sample", least=0)
    assert "FP32" in caught.value.hint


def test_an_overflow_behind_quantisers_is_found(weights, store):
    """Quantisers make 127 of infinity and -128 of NaN, so that logits are finite."""
    model = build_graph(scaled(weights, **HIDDEN), CONFIG)
    found = calibrate(model, tiles_of(3))
    half = int8_graph(found.model, found.layers, found.scales)
    rehearsal = fp16_on_cpu(half)
    inside = values(rehearsal, ["blocks.1.mlp.fc1", "logits"], tiles_of(1))
    assert not np.isfinite(inside["blocks.1.mlp.fc1"]).all()
    assert np.isfinite(inside["logits"]).all()
    with pytest.raises(NumericalCheckError, match=r"blocks\.1\.mlp\.fc1 leaves FP16's range"):
        check_fp16(store(model), half, tiles_of(1), "sample", least=0)


def test_values_that_relu_cuts_off_are_no_overflow(weights, store):
    """-infinity becomes 0 there, in an engine as in FP32."""
    low = dict(weights)
    low["head.laterals.1.bn.bias"] = np.full_like(weights["head.laterals.1.bn.bias"], -60000)
    low["head.laterals.1.bn.weight"] = weights["head.laterals.1.bn.weight"] * 8000
    model = build_graph(low, CONFIG)
    inside = values(fp16_on_cpu(to_fp16(model)), ["lateral.1.projected", "lateral.1"], tiles_of(1))
    assert np.isneginf(inside["lateral.1.projected"]).any()
    assert np.isfinite(inside["lateral.1"]).all()
    assert check_fp16(store(model), to_fp16(model), tiles_of(1), "sample", least=0).finite


def test_extreme_tiles_are_tried(make_weights, store):
    """A network that only leaves the range where pixels are much brighter than its mean."""
    weights = make_weights(CONFIG)
    weights["encoder.patch_embed.proj.weight"][0] = 150.0
    model, grey = build_graph(weights, CONFIG), np.full((1, 3, 48, 48), 124, np.uint8)
    assert np.abs(values(model, ["tokens"], grey)["tokens"]).max() < 60000
    with pytest.raises(NumericalCheckError, match=r"on a white tile tokens leaves FP16's range"):
        check_fp16(store(model), to_fp16(model), grey, "grey", least=0)


def test_the_extreme_tiles():
    found = extreme_tiles(6)
    assert all(tile.shape == (3, 6, 6) and tile.dtype == np.uint8 for tile in found.values())
    assert (found["a black tile"] == 0).all()
    assert (found["a white tile"] == 255).all()
    board = found["a checkerboard"]
    assert set(np.unique(board)) == {0, 255}
    assert (board[:, 1:] != board[:, :-1]).all()
    assert (board[:, :, 1:] != board[:, :, :-1]).all()


# --- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (2, 3), (4, 2)])
def test_agreement_is_that_of_the_tiles_and_of_nothing_else(weights, make_weights, store, batch, count):
    """Another network's FP16 graph agrees in part; a tile that fills up a batch counts nowhere."""
    other = centred(make_weights(CONFIG, seed=1), CONFIG)
    model, strange = (build_graph(each, CONFIG, batch=batch) for each in (weights, other))
    tiles = tiles_of(count, seed=5)
    labels = []
    for graph in (model, fp16_on_cpu(to_fp16(strange))):
        session = session_of(graph)
        labels.append([session.run(["labels"], {"image": np.repeat(t[None], batch, axis=0)})[0][0] for t in tiles])
    expected = float(np.mean(np.array(labels[0]) == np.array(labels[1])))
    assert 0.05 < expected < 0.9
    found = check_fp16(store(model), to_fp16(strange), tiles, "odd", least=0)
    assert (found.tiles, found.imagery) == (count, "odd")
    assert found.label_agreement == pytest.approx(expected, abs=2e-3)
    assert "rounded to FP16" in found.runtime


def test_a_network_that_loses_labels_is_refused(weights, make_weights, store):
    other = build_graph(centred(make_weights(CONFIG, seed=1), CONFIG), CONFIG)
    graph = store(build_graph(weights, CONFIG))
    with pytest.raises(NumericalCheckError, match=r"another label on \d+\.\d+% .*of odd tiles .*at most 0\.1%"):
        check_fp16(graph, to_fp16(other), tiles_of(2), "odd", least=0.999)
    with pytest.raises(NumericalCheckError, match=r"logits of odd tiles differ by up to .*rounding explains"):
        check_fp16(graph, to_fp16(other), tiles_of(2), "odd")


@pytest.fixture
def undecided(weights):
    """A network whose classes 0 and 1 are as good as the same on every pixel, which rounding decides."""
    even = dict(weights)
    for name in ("head.classifier.weight", "head.classifier.bias"):
        even[name] = weights[name].copy()
        even[name][1] = even[name][0] * np.float32(1 + 2e-5)
    even["head.classifier.bias"][:2] += 3  # ahead of all others
    return even


def test_ties_are_counted_and_no_fault(undecided, store):
    model = build_graph(undecided, CONFIG)
    found = check_fp16(store(model), to_fp16(model), tiles_of(2), "sample")
    assert found.label_agreement < 0.99
    assert 0 < found.max_logit_error < found.logit_tolerance
    with pytest.raises(NumericalCheckError, match=r"another label on"):
        check_fp16(store(model), to_fp16(model), tiles_of(2), "sample", least=0.999)


def test_the_tolerance_is_five_spreads_of_the_roundings_in_a_row(plain):
    roundings = longest_rounding(fp16_on_cpu(to_fp16(plain)))
    # Ten in each of 4 blocks, and the tokens before them; eleven from there to the logits, and the scores.
    assert roundings == 10 * 4 + 1 + 12
    assert logit_tolerance(roundings, 3.0) == pytest.approx(5 * 2**-11 * math.sqrt(roundings / 3) * 3)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "blocks.3.attn.q.weight", "fuse.weight"])
def test_a_weight_that_became_another_is_found(plain, store, name):
    half = to_fp16(plain)
    set_constant(half, name, constants(half)[name] * np.float16(1.25))
    with pytest.raises(NumericalCheckError, match="logits of sample tiles differ"):
        check_fp16(store(plain), half, tiles_of(1), "sample")


def test_a_wrong_cast_is_found(plain, store):
    """Of a value on the way, and of the labels themselves, which logits do not show."""
    half = to_fp16(plain)
    node = next(node for node in half.graph.node if node.output[0] == "blocks.2.out")
    node.output[0] = "wide"
    at = list(half.graph.node).index(node) + 1
    half.graph.node.insert(at, helper.make_node("Cast", ["wide"], ["whole"], to=TensorProto.INT8))
    half.graph.node.insert(at + 1, helper.make_node("Cast", ["whole"], ["blocks.2.out"], to=HALF))
    with pytest.raises(NumericalCheckError, match="logits of sample tiles differ"):
        check_fp16(store(plain), half, tiles_of(1), "sample")

    half = to_fp16(plain)
    resize = next(node for node in half.graph.node if node.op_type == "Resize")
    mode = next(item for item in resize.attribute if item.name == "mode")
    mode.s = b"nearest"
    with pytest.raises(NumericalCheckError, match=r"\d+ pixels of sample tiles have another label, though"):
        check_fp16(store(plain), half, tiles_of(1), "sample")


def test_without_a_tile_nothing_was_checked(plain, store):
    with pytest.raises(ValueError, match="no tile"):
        check_fp16(store(plain), to_fp16(plain), [], "none")


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture
def graph(tmp_path, make_graph, make_weights):
    """A graph with its manifest; of a network that is surer of its labels than the one above."""
    return make_graph(tmp_path / "export", make_weights(CONFIG, seed=2), CONFIG)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_and_what_it_says(graph):
    path = derived_path(graph, "fp16")
    assert path.name == "small.fp16.onnx"
    told = []
    made = write_fp16(graph, path, tiles=tiles_of(2), imagery="mine", note=told.append)
    assert names(path.parent) == ["small.fp16.json", "small.fp16.onnx", "small.json", "small.onnx"]
    source, stored = read_manifest(graph, GraphManifest), read_manifest(path, GraphManifest)
    assert stored.artefact == made.artefact
    assert (stored.precision, stored.name, stored.parent) == ("fp16", "small", source.artefact)
    assert stored.conversion.imagery == "mine"
    assert (stored.conversion.tiles, stored.conversion.finite) == (2, True)
    assert stored.conversion.label_agreement > 0.98
    assert (stored.labels, stored.tile, stored.checkpoint) == (source.labels, source.tile, source.checkpoint)
    assert stored.nodes == len(onnx.load(path).graph.node)
    assert path.stat().st_size < 0.6 * graph.stat().st_size
    assert told


def test_sample_tiles_unless_there_are_others(graph):
    made = write_fp16(graph, derived_path(graph, "fp16"))
    assert (made.conversion.imagery, made.conversion.tiles) == ("sample", 2)


def test_a_refused_graph_leaves_nothing(tmp_path, make_graph, weights):
    graph = make_graph(tmp_path / "export", scaled(weights, **LOUD), CONFIG)
    with pytest.raises(NumericalCheckError):
        write_fp16(graph, derived_path(graph, "fp16"))
    assert names(graph.parent) == ["small.json", "small.onnx"]


def test_an_interruption_leaves_nothing(graph, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdkd_edge.graph.files.write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_fp16(graph, derived_path(graph, "fp16"))
    assert names(graph.parent) == ["small.json", "small.onnx"]


def test_what_is_not_ours_stays(graph):
    path = derived_path(graph, "fp16")
    path.write_text("mine")
    with pytest.raises(ManifestError, match="not cdkd-edge's to replace"):
        write_fp16(graph, path)
    assert path.read_text() == "mine"


def test_made_from_the_fp32_graph_only(graph):
    path = derived_path(graph, "fp16")
    write_fp16(graph, path)
    with pytest.raises(GraphError, match="is an fp16 graph"):
        write_fp16(path, graph.with_name("again.onnx"))
    with open(graph, "ab") as file:
        file.write(b"x")
    with pytest.raises(ManifestError, match="SHA-256 differs"):
        write_fp16(graph, path)


def test_a_file_that_is_no_graph(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(GraphError, match=r"broken\.onnx is not an ONNX graph"):
        load_graph(path)
