"""The written graph: its form, which TensorRT decides over, and what it computes. None of it needs torch."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from reference import reference_labels, reference_logits
from variants import VARIANTS, head_options

from cdkd_edge.core.errors import GraphError, ManifestError
from cdkd_edge.core.manifest import GraphManifest, read_manifest
from cdkd_edge.graph.build import DEFAULT_OPSET, OPSETS, build_graph
from cdkd_edge.graph.cpu import fuse_attention
from cdkd_edge.graph.files import load_graph, read_graph, sizes_of
from cdkd_edge.graph.layers import compare_classes, scores_of, search_classes
from cdkd_edge.model.config import NetworkConfig

TENSORRT_10_3 = {
    "Add", "ArgMax", "AveragePool", "Cast", "Concat", "Conv", "DepthToSpace", "Div", "Erf", "Gelu",
    "LayerNormalization", "MatMul", "MaxPool", "Mul", "Neg", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice",
    "Softmax", "Split", "Transpose",
}  # fmt: skip
"""What may occur, each in github.com/onnx/onnx-tensorrt/blob/release/10.3-GA/docs/operators.md. No Gather."""


def run(model, image, *outputs):
    for name in outputs:
        if name not in [output.name for output in model.graph.output]:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["labels", *outputs], {"image": image})


def form(value):
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [dim.dim_value or dim.dim_param for dim in tensor.shape.dim]


@pytest.fixture(scope="module", params=OPSETS)
def graph(request, small_weights, small_config):
    """The small network at every opset, and the opset."""
    return build_graph(small_weights, small_config, opset=request.param), request.param


def test_opsets_are_those_of_the_boards():
    assert list(OPSETS) == [17, 18, 19, 20]
    assert DEFAULT_OPSET in OPSETS


def test_it_is_valid_onnx(graph):
    model, opset = graph
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version <= 9  # what TensorRT 10.3's parser and ONNX Runtime 1.20 read


def test_only_operators_that_tensorrt_10_3_knows(graph, small_config):
    model, opset = graph
    ops = Counter(node.op_type for node in model.graph.node)
    assert set(ops) <= TENSORRT_10_3
    assert all(node.domain == "" for node in model.graph.node)
    assert ops["LayerNormalization"] == 2 * small_config.depth
    assert ops["Softmax"] == small_config.depth
    assert ops["Gelu"] == (small_config.depth if opset == 20 else 0)
    assert ops["Erf"] == (0 if opset == 20 else small_config.depth)


def test_input_and_output_are_the_contract(graph, small_config):
    model, _ = graph
    tile, uint8 = small_config.tile, onnx.TensorProto.UINT8
    assert [form(value) for value in model.graph.input] == [("image", uint8, [1, 3, tile, tile])]
    assert [form(value) for value in model.graph.output] == [("labels", uint8, [1, tile, tile])]
    assert model.graph.node[-1].op_type == "Cast"


def test_every_shape_is_static(graph):
    inferred = onnx.shape_inference.infer_shapes(graph[0], strict_mode=True, data_prop=True)
    forms = [form(value) for value in inferred.graph.value_info]
    assert len(forms) >= len(inferred.graph.node) - 1
    assert all(isinstance(size, int) and size > 0 for _, _, sizes in forms for size in sizes)


def test_every_value_is_named_once_and_used(graph):
    model, _ = graph
    made = [output for node in model.graph.node for output in node.output]
    constants = [item.name for item in model.graph.initializer]
    used = {name for node in model.graph.node for name in node.input}
    assert len(set(made)) == len(made)
    assert len(set(constants)) == len(constants)
    assert set(constants) <= used
    assert set(made) - used == {"labels"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_weights_are_fp32(graph):
    types = {item.data_type for item in graph[0].graph.initializer}
    assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_tokens_keep_three_dimensions(graph):
    """Rank-2 tokens met an internal error of TensorRT in FP16."""
    inferred = onnx.shape_inference.infer_shapes(graph[0], data_prop=True)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred.graph.value_info}
    products = [node for node in inferred.graph.node if node.op_type == "MatMul"]
    assert {ranks[node.output[0]] for node in products} == {3, 4}


def test_it_computes_the_reference(graph, small_weights, small_config, small_tiles):
    model, _ = graph
    for tile in small_tiles:
        labels, logits = run(model, tile[None], "logits")
        expected = reference_logits(small_weights, tile[None], heads=1, eps=small_config.layer_norm_eps)
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
        truth = reference_labels(expected, small_config.tile)
        assert labels.dtype == np.uint8
        assert (labels == truth).mean() > 0.999
        assert len(np.unique(truth)) > 2


@pytest.mark.parametrize(("opset", "batch"), [(17, 1), (20, 3)])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_compute_the_reference(make_weights, config, opset, batch):
    weights = make_weights(config, seed=2)
    tiles = np.random.default_rng(1).integers(0, 256, (batch, 3, config.tile, config.tile), np.uint8)
    model = build_graph(weights, config, batch=batch, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= TENSORRT_10_3
    labels, logits = run(model, tiles, "logits")
    options = head_options(config)
    expected = reference_logits(weights, tiles, **options)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert fuse_attention(model) == (config.depth, config.depth)
    fused = run(model, tiles, "logits")[1]
    assert np.abs(fused - expected).max() < 1e-4 * np.abs(expected).max()
    for option, without in {"attention": (), "rotary_base": 0, "final_norm": "none"}.items():
        if options[option] != without:
            plain = reference_logits(weights, tiles, **{**options, option: without})
            assert np.abs(logits - plain).max() > 100 * np.abs(logits - expected).max(), option
    assert (labels == reference_labels(expected, config.tile, config.logits_align)).mean() > 0.999
    if batch > 1:
        assert np.abs(expected[0] - expected[1]).max() > 0.01  # the tiles are told apart


def test_large_biases_of_queries_keys_and_values_fold_exactly(small_weights, small_config, small_tiles):
    """As DINOv2 has them, and larger."""
    rng = np.random.default_rng(3)
    large = {
        key: value + rng.normal(0, 10, value.shape).astype(np.float32) if key.endswith("attn.qkv.bias") else value
        for key, value in small_weights.items()
    }
    _, logits = run(build_graph(large, small_config), small_tiles[:1], "logits")
    expected = reference_logits(large, small_tiles[:1], heads=1, eps=small_config.layer_norm_eps)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    before = reference_logits(small_weights, small_tiles[:1], heads=1, eps=small_config.layer_norm_eps)
    assert np.abs(expected - before).max() > 0.1 * np.abs(before).max()


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
def test_comparisons_find_the_class_that_argmax_finds(make_weights, classes):
    """The first of equal scores, too: two classes have the same weights, and a white tile gives equal logits."""
    config = dataclasses.replace(VARIANTS["windows"], classes=classes)
    weights = make_weights(config)
    for part in ("weight", "bias"):
        weights[f"head.classifier.{part}"][-1] = weights[f"head.classifier.{part}"][0]
    model = build_graph(weights, config, batch=2)
    tiles = np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64), np.uint8)
    tiles[1] = 255
    expected = run(onnx.ModelProto.FromString(model.SerializeToString()), tiles)[0]
    before = Counter(node.op_type for node in model.graph.node)
    compare_classes(model)
    added = Counter(node.op_type for node in model.graph.node)
    assert added["Greater"] == classes - 1
    assert set(added) <= TENSORRT_10_3 | {"Greater", "Max", "Squeeze", "Where"}  # all known to TensorRT 10.3
    for item in model.graph.initializer:  # class numbers are for FP16
        if item.name.startswith("class_"):
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, tiles)[0], expected)
    assert scores_of(model) == "scores"
    search_classes(model)
    after = Counter(node.op_type for node in model.graph.node)
    assert before - after == ({} if classes == 1 else {"Cast": 1}), "class numbers need no floats on a CPU"
    assert not after - before
    np.testing.assert_array_equal(run(model, tiles)[0], expected)


def test_a_batch_is_its_tiles(small_weights, small_config, small_tiles):
    one, two = (build_graph(small_weights, small_config, batch=batch) for batch in (1, 2))
    assert form(two.graph.input[0])[2][0] == form(two.graph.output[0])[2][0] == 2
    labels, logits = run(two, small_tiles[:2], "logits")
    for index in range(2):
        alone = run(one, small_tiles[index : index + 1], "logits")
        np.testing.assert_allclose(logits[index], alone[1][0], rtol=1e-4, atol=1e-4)
        assert (labels[index] == alone[0][0]).mean() > 0.999


def test_bytes_are_not_reinterpreted(small_weights, small_config):
    """Values above 127 are as bright as they say."""
    tiles = np.zeros((2, 3, 64, 64), np.uint8)
    tiles[0], tiles[1] = 127, 255
    _, logits = run(build_graph(small_weights, small_config, batch=2), tiles, "logits")
    expected = reference_logits(small_weights, tiles, heads=1, eps=1e-5)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("opset", [16, 21, 0, -1])
def test_other_opsets_are_refused(small_weights, small_config, opset):
    with pytest.raises(GraphError, match=f"opset {opset} is not supported; use 17 to 20"):
        build_graph(small_weights, small_config, opset=opset)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_without_tiles_is_refused(small_weights, small_config, batch):
    with pytest.raises(GraphError, match=f"got {batch}"):
        build_graph(small_weights, small_config, batch=batch)


def test_writing_leaves_the_weights_alone(small_weights, small_config):
    before = {key: value.copy() for key, value in small_weights.items()}
    build_graph(small_weights, small_config)
    assert all(np.array_equal(small_weights[key], before[key]) for key in before)


def test_the_same_weights_give_the_same_file(small_weights, small_config):
    first, second = (build_graph(small_weights, small_config).SerializeToString(deterministic=True) for _ in "ab")
    assert first == second


def test_the_paper_network_has_few_nodes(make_weights):
    """The number of nodes depends on depth, taps and scales, not on widths."""
    narrow = dataclasses.replace(NetworkConfig(), tile=128, embed_dim=24, mlp_dim=48, head_channels=8)
    weights = make_weights(narrow)
    counts = {opset: len(build_graph(weights, narrow, opset=opset).graph.node) for opset in (17, 20)}
    assert counts[20] == 364  # a traced export has 782
    assert counts[17] - counts[20] == 4 * 12  # GELU in five nodes


# --- graphs of others, and damaged ones -----------------------------------------------------------

TRUE = numpy_helper.from_array(np.array(True), "true")
END = helper.make_node("Identity", ["plain"], ["labels"])


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)


def numbers(name, value, dtype=np.int64):
    return numpy_helper.from_array(np.array(value, dtype), name)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def foreign(nodes, constants=(), image=(1, 3, 64, 64), labels=(1, 64, 64), kind=TensorProto.UINT8):
    """Labels of images by ArgMax over the channels, and whatever else is to be added."""
    first = [node("ArgMax", ["image"], "best", axis=1, keepdims=0), node("Cast", ["best"], "plain", to=kind)]
    inputs, outputs = [value("image", TensorProto.UINT8, image)], [value("labels", kind, labels)]
    graph = helper.make_graph([*first, *nodes], "foreign", inputs, outputs, initializer=list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def with_value(nodes, constants=()):
    """A graph that adds the maximum of ``big`` to its labels."""
    last = [node("ReduceMax", ["big"], "m", keepdims=0), node("Cast", ["m"], "c", to=TensorProto.UINT8)]
    return foreign([*nodes, *last, node("Add", ["plain", "c"], "labels")], constants)


def endless():
    kinds = [("i", TensorProto.INT64, []), ("on", TensorProto.BOOL, []), ("x", TensorProto.UINT8, [1, 64, 64])]
    body = helper.make_graph(
        [node("Identity", ["on"], "still"), node("Identity", ["x"], "y")],
        "body",
        [value(*each) for each in kinds],
        [value("still", TensorProto.BOOL, []), value("y", TensorProto.UINT8, [1, 64, 64])],
    )
    return foreign([node("Loop", ["", "true", "plain"], "labels", body=body)], [TRUE])


def doubling(count):
    return with_value(
        [node("Concat", [f"x{i}"] * 2, f"x{i + 1}" if i < count - 1 else "big", axis=0) for i in range(count)],
        [numbers("x0", [1])],
    )


GIANTS = {
    "constant": with_value([node("ConstantOfShape", ["s"], "big")], [numbers("s", [10**12])]),
    "2 GB": with_value([node("ConstantOfShape", ["s"], "big")], [numbers("s", [5 * 10**8])]),
    "computed sizes": with_value(
        [node("Mul", ["s", "s"], "n"), node("ConstantOfShape", ["n"], "big")], [numbers("s", [10**5])]
    ),
    "expand": with_value([node("Expand", ["o", "s"], "big")], [numbers("o", [1]), numbers("s", [10**6, 10**6])]),
    "tile": with_value([node("Tile", ["plain", "s"], "big")], [numbers("s", [10**4, 10**4, 10**4])]),
    "range": with_value(
        [node("Range", ["z", "s", "o"], "big")], [numbers("z", 0), numbers("s", 10**12), numbers("o", 1)]
    ),
    "outer": with_value(
        [node("Add", ["u", "v"], "big")], [numbers("u", np.ones((30000, 1))), numbers("v", np.ones((1, 30000)))]
    ),
    "doubling": doubling(60),
    "a long list": doubling(24),
}


@pytest.mark.parametrize("name", GIANTS)
def test_values_out_of_all_proportion_are_refused(name):
    with pytest.raises(GraphError, match=r"makes \S+ numbers"):
        sizes_of(GIANTS[name], "it")


def test_sizes_that_only_running_tells_are_refused(small_graph, tmp_path):
    """Of a value that becomes as large as a constant says, by way of floats that shape inference does not follow."""
    hidden = [node("Exp", ["s"], "e"), node("Cast", ["e"], "n", to=TensorProto.INT64)]
    model = with_value([*hidden, node("ConstantOfShape", ["n"], "big")], [numbers("s", [20], np.float32)])
    with pytest.raises(GraphError, match="the size of 'big'"):
        sizes_of(model, "it")


def test_a_graph_that_may_run_without_end_is_refused():
    with pytest.raises(GraphError, match="a graph inside a node"):
        sizes_of(endless(), "it")


def external(model):
    item = model.graph.initializer[0]
    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    item.external_data.add(key="location", value="../../etc/passwd")


def sparse(model):
    model.graph.sparse_initializer.add(dims=[10**12]).values.name = "few"


def text(model):
    item = model.graph.initializer[0]
    item.CopyFrom(helper.make_tensor(item.name, TensorProto.STRING, [1], [b"a"]))


def negative(model):
    model.graph.initializer[0].dims[0] = -5


def huge(model):
    model.graph.initializer[0].dims[0] = 10**12


def unknown(model):
    model.graph.node[5].domain = "com.somebody"


def cycle(model):
    model.graph.node[2].input[0] = model.graph.node[40].output[0]


def nothing(model):
    del model.graph.initializer[:]


def future(model):
    model.opset_import[0].version = 999


@pytest.mark.parametrize("damage", [external, sparse, text, negative, huge, unknown, cycle, nothing, future])
def test_damaged_graphs_are_refused(small_weights, small_config, damage):
    model = build_graph(small_weights, small_config)
    damage(model)
    with pytest.raises(GraphError, match=r"^it"):
        sizes_of(model, "it")


@pytest.mark.parametrize(
    ("model", "error", "pattern"),
    [
        (foreign([END]), ManifestError, "gives 3 classes; its manifest names 5"),
        (foreign([END], kind=TensorProto.INT64), GraphError, r"labels int64 \[1,64,64\]; it must have image"),
        (foreign([END], labels=(1, 64, 32)), GraphError, "not valid ONNX|it must have image"),
        (foreign([END], image=(1, 3, 64, 32), labels=(1, 64, 32)), GraphError, "it must have image"),
        (foreign([END], image=(2, 3, 32, 32), labels=(2, 32, 32)), ManifestError, "its manifest says"),
        (foreign([END], image=("N", 3, 64, 64), labels=("N", 64, 64)), GraphError, "it must have image"),
    ],
)
def test_only_graphs_that_keep_the_contract_and_their_manifest_are_read(tmp_path, small_graph, model, error, pattern):
    path = tmp_path / "a.onnx"
    onnx.save(model, path)
    with pytest.raises(error, match=pattern):
        read_graph(path, read_manifest(small_graph, GraphManifest))


@pytest.mark.parametrize("content", [b"", b"some text", bytes(1000), b"\x89PNG\r\n", b"\x08\x07garbage"], ids=repr)
def test_what_is_no_graph(tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"a\.onnx is (not an ONNX graph|an ONNX file without nodes)"):
        load_graph(path)
