"""The parts of the network that kernels belong to, by the names of their nodes."""

from __future__ import annotations

import pytest

from cdkd_edge.benchmark.roofline.model import _as_int8
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import cpu_twin, fuse_attention
from cdkd_edge.graph.fp16 import to_fp16
from cdkd_edge.graph.layers import NetworkPart, parts_of
from cdkd_edge.graph.outputs import with_output
from cdkd_edge.model.config import NetworkConfig

OF_BLOCKS = {"LayerNorm", "queries, keys, values", "attention", "attention output", "MLP fc1, activation", "MLP fc2"}
OTHERS = {"patch embedding", "pyramid pooling", "laterals", "smoothing", "fuse", "classifier, up-sampling"}
SMALL = {"embed_dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64, "classes": 3, "head_channels": 8}
CONFIGS = {
    "DINOv3": NetworkConfig(
        tile=64, patch=8, class_token=True, registers=4, rotary_base=100, final_norm="taps", **SMALL
    ),
    "rotary in windows, norms of heads, SwiGLU": NetworkConfig(
        tile=64,
        patch=8,
        rotary_base=100,
        query_key_norm="rms",
        mlp="swiglu",
        final_norm="last",
        attention=("window 4", "global", "window 4", "global"),
        **SMALL,
    ),
    "global, class token": NetworkConfig(tile=64, patch=8, class_token=True, **SMALL),
    "windows, pooled keys": NetworkConfig(
        tile=96, patch=8, attention=("window 6", "pooled 3", "window 6", "global"), **SMALL
    ),
    "neck": NetworkConfig(tile=64, patch=8, neck=(24, 12, 16), pool_scales=(1, 2, 4), **SMALL),
    "two sizes of windows": NetworkConfig(
        tile=64, patch=8, attention=("window 4", "global", "window 2", "window 4"), **SMALL
    ),
}


def fused(model):
    fuse_attention(model)
    return model


FORMS = {
    "fp32": lambda model: model,
    "fused for the CPU": fused,
    "fp16": to_fp16,
    "int8": _as_int8,
    "int8 for the CPU": lambda model: fused(cpu_twin(_as_int8(model))),
    "confidence": lambda model: with_output(model, "confidence", 3),
    "probabilities": lambda model: with_output(model, "probabilities", 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_node_names_its_part(make_weights, config, form):
    model = FORMS[form](build_graph(make_weights(config), config))
    names = [node.name for node in model.graph.node]
    alone = {name: parts_of([[name]])[0] for name in names}
    assert NetworkPart("others") not in alone.values()
    assert set(alone.values()) >= {NetworkPart(name, block) for name in OF_BLOCKS for block in range(4)}
    assert {part.name for part in alone.values() if part.block is None} >= OTHERS
    for name, part in alone.items():
        assert part.block is None or name.startswith(f"blocks.{part.block}."), name
        assert name.startswith("blocks.") == (part.block is not None) or ".patches/" in name, name


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["blocks.0.attn.v/MatMul", "blocks.0.attn.k/MatMul"], NetworkPart("queries, keys, values", 0)),
        (["blocks.11.attn.k.by_head/Transpose"], NetworkPart("attention", 11)),
        (["blocks.4.attn.qkv/MatMul"], NetworkPart("queries, keys, values", 4)),
        (["blocks.4.attn.q.turned/Split", "blocks.4.attn.qk.cosine/Mul"], NetworkPart("attention", 4)),
        (["blocks.3.attn.joined/MultiHeadAttention"], NetworkPart("attention", 3)),
        (["blocks.1.after_attn/Add", "blocks.1.attn.proj.product/MatMul"], NetworkPart("attention output", 1)),
        (
            ["blocks.2.mlp.fc2.input_int8/QuantizeLinear", "blocks.2.mlp.gelu/Gelu"],
            NetworkPart("MLP fc1, activation", 2),
        ),
        (
            ["blocks.2.norm2/LayerNormalization", "blocks.2.mlp.fc1.input_int8/QuantizeLinear"],
            NetworkPart("LayerNorm", 2),
        ),
        (["blocks.2.mlp.fc1/Add", "blocks.2.mlp.gelu/Gelu"], NetworkPart("MLP fc1, activation", 2)),
        (["fuse_nchwc"], NetworkPart("fuse")),
        (["Reformatting CopyNode for Input Tensor 0 to smooth.1.conv/Conv + smooth.1/Relu"], NetworkPart("smoothing")),
        (["{ForeignNode[blocks.0.norm1/LayerNormalization...labels/Cast]}"], NetworkPart("several at once")),
    ],
)
def test_the_part_of_a_fused_kernel(names, part):
    assert parts_of([names]) == [part]


def test_a_kernel_that_names_no_node_serves_the_next_one():
    kernels = [["gemm_input_reshape"], ["blocks.0.mlp.fc1/Gemm"], ["Reorder", "copy"], ["Reorder"], ["fuse"], [], ["x"]]
    names = ["MLP fc1, activation", "MLP fc1, activation", "fuse", "fuse", "fuse", "others", "others"]
    assert [part.name for part in parts_of(kernels)] == names
