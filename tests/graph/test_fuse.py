"""Attention is fused where it has exactly the known form, and left alone wherever it deviates."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import fuse_attention
from cdkd_edge.graph.nodes import CONTRIB_DOMAIN
from cdkd_edge.model.config import NetworkConfig

CONFIG = NetworkConfig(tile=48, patch=8, embed_dim=32, depth=4, heads=4, mlp_dim=64, classes=3, head_channels=8)
WINDOWS = dataclasses.replace(CONFIG, attention=("window 3", "global", "pooled 3", "window 3"))
BLOCK = "blocks.2.attn"
"""The block that tests tamper with."""


@pytest.fixture
def model(make_weights):
    """A graph with four attention blocks of four heads."""
    return build_graph(make_weights(CONFIG), CONFIG)


@pytest.fixture
def tile():
    return np.random.default_rng(0).integers(0, 256, (1, 3, CONFIG.tile, CONFIG.tile), np.uint8)


def ops(model):
    return Counter(node.op_type for node in model.graph.node)


def logits(model, tile):
    clone = onnx.ModelProto.FromString(model.SerializeToString())
    clone.graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(clone.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": tile})[0]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        NetworkConfig(tile=64, patch=8, embed_dim=64, depth=5, heads=1, mlp_dim=64, classes=2, head_channels=8),
        NetworkConfig(
            tile=48, patch=8, embed_dim=48, depth=4, heads=3, mlp_dim=64, classes=2, head_channels=8, class_token=True
        ),
        WINDOWS,
    ],
    ids=["four heads", "one head", "class token", "windows"],
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("opset", [17, 20])
def test_every_attention_is_fused_and_computes_the_same(make_weights, config, batch, opset):
    model = build_graph(make_weights(config), config, batch=batch, opset=opset)
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 3, config.tile, config.tile), np.uint8)
    expected, before = logits(model, tiles), ops(model)
    assert fuse_attention(model) == (config.depth, config.depth)
    after = ops(model)
    assert after["MultiHeadAttention"] == config.depth
    assert "Softmax" not in after
    assert after["MatMul"] == before["MatMul"] - 2 * config.depth
    assert after["Transpose"] == before["Transpose"] - 5 * config.depth  # q, k, v by head, k transposed, by token
    assert (CONTRIB_DOMAIN, 1) in [(entry.domain, entry.version) for entry in model.opset_import]
    scale = np.abs(expected).max()
    assert np.abs(logits(model, tiles) - expected).max() < 1e-5 * scale


def test_the_nodes_stay_in_order(model):
    fuse_attention(model)
    known = {"image", ""} | {item.name for item in model.graph.initializer}
    for node in model.graph.node:
        assert known >= set(node.input), node.name
        known |= set(node.output)


def test_a_graph_without_attention_is_not_touched():
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Softmax", ["x"], ["y"])], "g", [x], [y]))
    before = model.SerializeToString(deterministic=True)
    assert fuse_attention(model) == (0, 1)
    assert model.SerializeToString(deterministic=True) == before


# --- deviations -----------------------------------------------------------------------------------


def node_of(model, name):
    """The node of the tampered block that makes the value ``BLOCK.name``."""
    return next(node for node in model.graph.node if f"{BLOCK}.{name}" in node.output)


def set_attribute(node, name, value):
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))


def use_also(model, name):
    """A second user of a value."""
    model.graph.node.append(helper.make_node("Identity", [f"{BLOCK}.{name}"], ["copy"], name="copy"))
    model.graph.output.append(helper.make_tensor_value_info("copy", onnx.TensorProto.FLOAT, None))


def output_also(model, name):
    """A value that is an output of the graph."""
    model.graph.output.append(helper.make_tensor_value_info(f"{BLOCK}.{name}", onnx.TensorProto.FLOAT, None))


def insert_after(model, name, op, *inputs):
    """An operator between a value and its users."""
    node = node_of(model, name)
    made = f"{BLOCK}.{name}"
    node.output[list(node.output).index(made)] = f"{made}.before"
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index + 1, helper.make_node(op, [f"{made}.before", *inputs], [made], name="inserted"))


def constant(model, name, value):
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def softmax_over_queries(model):
    set_attribute(node_of(model, "share"), "axis", 2)


def scaled_scores(model):
    insert_after(model, "scores", "Mul", constant(model, "half", np.float32(0.5)))


def masked_scores(model):
    mask = np.triu(np.full((36, 36), -1e9, np.float32), 1)
    insert_after(model, "scores", "Add", constant(model, "mask", mask))


def normalised_queries(model):
    insert_after(model, "q.by_head", "Mul", constant(model, "twice", np.float32(2)))


def gated_values(model):
    insert_after(model, "v.by_head", "Relu")


def gated_heads(model):
    insert_after(model, "mixed", "Relu")


def one_key_for_all_heads(model):
    """The key of every head is the first head's; the products broadcast."""
    weight = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    node_of(model, "k").input[1] = constant(model, "one_key", weight)
    node_of(model, "k.heads").input[1] = constant(model, "one_head", np.array([1, 36, 1, 8], np.int64))


def keys_of_other_heads(model):
    """Two heads of 16 see keys of four heads of 8, read as two of 16, in another order."""
    set_attribute(node_of(model, "k.by_head"), "perm", [0, 2, 3, 1])
    node_of(model, "k_transposed").attribute[0].ints[:] = [0, 1, 2, 3]
    order = constant(model, "backwards", np.arange(7, -1, -1))
    insert_after(model, "k_transposed", "Gather", order)
    set_attribute(next(node for node in model.graph.node if node.name == "inserted"), "axis", 2)


def heads_from_a_wildcard(model):
    wildcard = constant(model, "wildcard", np.array([1, 36, -1, 8], np.int64))
    node_of(model, "q.heads").input[1] = wildcard


def heads_from_a_computed_shape(model):
    shape = node_of(model, "q.heads").input[1]
    model.graph.node.insert(0, helper.make_node("Identity", [shape], ["computed"], name="computed"))
    node_of(model, "q.heads").input[1] = "computed"


def tokens_joined_otherwise(model):
    """[1, 36, 32] read as [1, 18, 64] and back."""
    node_of(model, "joined").input[1] = constant(model, "pairs", np.array([1, 18, 64], np.int64))
    insert_after(model, "joined", "Reshape", constant(model, "apart", np.array([1, 36, 32], np.int64)))


def heads_not_interleaved(model):
    """No transpose by head: tokens and heads change places."""
    set_attribute(node_of(model, "by_token"), "perm", [0, 1, 2, 3])


DEVIATIONS = [
    softmax_over_queries,
    masked_scores,
    normalised_queries,
    gated_values,
    gated_heads,
    one_key_for_all_heads,
    keys_of_other_heads,
    heads_from_a_computed_shape,
    tokens_joined_otherwise,
    heads_not_interleaved,
]


@pytest.mark.parametrize("deviate", DEVIATIONS, ids=lambda f: f.__name__)
def test_a_deviating_attention_is_left_alone(model, tile, deviate):
    plain = logits(model, tile)
    deviate(model)
    expected = logits(model, tile)
    assert fuse_attention(model) == (CONFIG.depth - 1, CONFIG.depth)
    assert ops(model)["Softmax"] == 1
    assert np.abs(logits(model, tile) - expected).max() < 1e-5 * np.abs(expected).max()
    if deviate not in (tokens_joined_otherwise, heads_from_a_computed_shape):  # other words, the same function
        assert np.abs(expected - plain).max() > 1e-3


@pytest.mark.parametrize("observe", [use_also, output_also])
@pytest.mark.parametrize(
    "name",
    [
        *(f"{part}.{step}" for part in "qkv" for step in ("heads", "by_head")),
        *("k_transposed", "scores", "share", "mixed", "by_token"),
    ],
)
def test_an_attention_with_another_user_inside_is_left_alone(model, tile, name, observe):
    observe(model, name)
    expected = logits(model, tile)
    assert fuse_attention(model) == (CONFIG.depth - 1, CONFIG.depth)
    assert np.abs(logits(model, tile) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("observe", [use_also, output_also])
@pytest.mark.parametrize("name", ["q", "k", "v", "joined"])
def test_what_goes_in_and_out_of_attention_may_be_used_elsewhere(model, tile, name, observe):
    observe(model, name)
    expected = logits(model, tile)
    assert fuse_attention(model) == (CONFIG.depth, CONFIG.depth)
    assert np.abs(logits(model, tile) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("rewrite", [heads_from_a_wildcard, scaled_scores])
def test_another_way_to_say_the_same_stays_right(model, tile, rewrite):
    rewrite(model)
    expected = logits(model, tile)
    fuse_attention(model)
    assert np.abs(logits(model, tile) - expected).max() < 1e-5 * np.abs(expected).max()
