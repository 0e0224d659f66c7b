"""The network as an ONNX graph, written node by node from its weights. Needs no torch.

Writing the graph instead of tracing it keeps it small and independent of the version of torch. Every operator is one
that TensorRT 10.3 knows, attention has the form by which TensorRT and ONNX Runtime find their fused kernels, and
constants are folded (:mod:`.fold`). Every export checks that the graph computes what the PyTorch network computes
(:mod:`.export`). :mod:`.layers` finds the layers again: change both together.

    image uint8 [N,3,T,T] --> labels uint8 [N,T,T]

Tokens stay ``[N, L, D]``, the channels-last layout that tensor cores want; maps are ``[N, C, G, G]``. The intermediate
value ``logits`` ``[N, K, G, G]`` has a name for the check.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from cdkd_edge import __version__
from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph import fold
from cdkd_edge.graph.nodes import NodeWriter
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD, NetworkConfig

OPSETS = range(17, 21)  # 17 introduced LayerNormalization; TensorRT 10.3's parser documents operators up to 20
DEFAULT_OPSET = 20
LOGITS = "logits"


class _NetworkWriter(NodeWriter):
    """Writes layers; every value is named after the module that makes it."""

    def shape(self, *sizes: int) -> str:
        """An int64 shape for Reshape, shared by all nodes that need it."""
        return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def linear(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """``x W^T + b`` with ``weight`` in PyTorch's ``[out, in]``."""
        product = self.add("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T))
        return self.add("Add", name, product, self.constant(f"{name}.bias", bias))

    def conv(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray, *, relu: bool = True) -> str:
        """A convolution that keeps the map's size, followed by ReLU unless ``relu`` is False."""
        kernel = weight.shape[-1]
        inputs = (x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias))
        pads = [kernel // 2] * 4
        if not relu:
            return self.add("Conv", name, *inputs, kernel_shape=[kernel] * 2, pads=pads)
        return self.add("Relu", name, self.add("Conv", f"{name}.conv", *inputs, kernel_shape=[kernel] * 2, pads=pads))


def build_graph(
    weights: fold.Weights, config: NetworkConfig, *, batch: int = 1, opset: int = DEFAULT_OPSET
) -> onnx.ModelProto:
    """Write the FP32 graph.

    Args:
        weights: the network's state dict as FP32 arrays, in this package's names.
        config: the network's shape.
        batch: N, static.
        opset: one of :data:`OPSETS`. Below 20, GELU is written as its five elementary nodes.

    Raises:
        GraphError: ``batch`` or ``opset`` is out of range.
    """
    if opset not in OPSETS:
        raise GraphError(f"opset {opset} is not supported; use {OPSETS.start} to {OPSETS.stop - 1}")
    if batch < 1:
        raise GraphError(f"the batch must be at least 1 tile, got {batch}")
    writer = _NetworkWriter()
    taps = _encoder(writer, weights, config, batch, opset)
    logits = _head(writer, weights, config, batch, taps)
    _labels(writer, logits, config)

    tile = config.tile
    image = {"image": (TensorProto.UINT8, (batch, 3, tile, tile))}
    labels = {"labels": (TensorProto.UINT8, (batch, tile, tile))}
    model = writer.model("cdkd_edge", image, labels, opset)
    model.producer_name, model.producer_version = "cdkd-edge", __version__
    return model


def _encoder(writer: _NetworkWriter, weights: fold.Weights, config: NetworkConfig, batch: int, opset: int) -> list[str]:
    """The ViT; returns the tokens after each tapped block, ``[N, G*G, D]``."""
    dim, cells = config.embed_dim, config.grid**2
    pixels = writer.add("Cast", "pixels", "image", to=TensorProto.FLOAT)
    kernel, bias = fold.fold_normalisation(
        weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"], PIXEL_MEAN, PIXEL_STD
    )
    patches = writer.add(
        "Conv",
        "patch_embed",
        pixels,
        writer.constant("patch_embed.weight", kernel),
        writer.constant("patch_embed.bias", bias),
        kernel_shape=[config.patch] * 2,
        strides=[config.patch] * 2,
    )
    rows = writer.add("Reshape", "patch_rows", patches, writer.shape(batch, dim, cells))
    tokens = writer.add("Transpose", "patch_tokens", rows, perm=[0, 2, 1])
    if config.class_token:
        token = np.broadcast_to(weights["encoder.cls_token"], (batch, 1, dim))
        tokens = writer.add("Concat", "all_tokens", writer.constant("cls_token", token), tokens, axis=1)
    tokens = writer.add("Add", "tokens", tokens, writer.constant("pos_embed", weights["encoder.pos_embed"]))

    taps = []
    for index in range(config.depth):
        tokens = _block(writer, weights, config, batch, opset, index, tokens)
        if index in config.taps:
            taps.append(_without_class_token(writer, tokens, index) if config.class_token else tokens)
    return taps


def _block(
    writer: _NetworkWriter,
    weights: fold.Weights,
    config: NetworkConfig,
    batch: int,
    opset: int,
    index: int,
    tokens: str,
) -> str:
    """One pre-norm transformer block."""
    source, name = f"encoder.blocks.{index}", f"blocks.{index}"
    dim, heads = config.embed_dim, config.heads
    length = config.grid**2 + config.class_token

    def layer_norm(which: str, x: str) -> str:
        scale = writer.constant(f"{name}.{which}.weight", weights[f"{source}.{which}.weight"])
        shift = writer.constant(f"{name}.{which}.bias", weights[f"{source}.{which}.bias"])
        # The fused operator, because its elementary steps overflow in FP16.
        return writer.add(
            "LayerNormalization", f"{name}.{which}", x, scale, shift, axis=-1, epsilon=config.layer_norm_eps
        )

    def linear(which: str, x: str) -> str:
        return writer.linear(
            f"{name}.{which}", x, weights[f"{source}.{which}.weight"], weights[f"{source}.{which}.bias"]
        )

    # Attention. One projection, one reshape and one transpose for q, k and v together.
    qkv = writer.linear(
        f"{name}.attn.qkv",
        layer_norm("norm1", tokens),
        *fold.fold_query_scale(weights[f"{source}.attn.qkv.weight"], weights[f"{source}.attn.qkv.bias"], heads),
    )
    parts = writer.add("Reshape", f"{name}.attn.heads", qkv, writer.shape(batch, length, 3 * heads, dim // heads))
    parts = writer.add("Transpose", f"{name}.attn.by_head", parts, perm=[0, 2, 1, 3])  # [N, 3 H, L, d]
    q, k, v = (f"{name}.attn.{part}" for part in "qkv")
    sizes = writer.constant(f"split_{heads}", np.array([heads] * 3, np.int64))
    writer.add("Split", f"{name}.attn.split", parts, sizes, outputs=[q, k, v], axis=1)  # each [N, H, L, d]
    keys = writer.add("Transpose", f"{name}.attn.k_transposed", k, perm=[0, 1, 3, 2])
    scores = writer.add("MatMul", f"{name}.attn.scores", q, keys)  # [N, H, L, L]
    share = writer.add("Softmax", f"{name}.attn.share", scores, axis=-1)
    mixed = writer.add("MatMul", f"{name}.attn.mixed", share, v)
    mixed = writer.add("Transpose", f"{name}.attn.by_token", mixed, perm=[0, 2, 1, 3])
    mixed = writer.add("Reshape", f"{name}.attn.joined", mixed, writer.shape(batch, length, dim))
    tokens = writer.add("Add", f"{name}.after_attn", tokens, linear("attn.proj", mixed))

    hidden = linear("mlp.fc1", layer_norm("norm2", tokens))
    hidden = _gelu(writer, f"{name}.mlp.gelu", hidden, opset)
    return writer.add("Add", f"{name}.out", tokens, linear("mlp.fc2", hidden))


def _gelu(writer: _NetworkWriter, name: str, x: str, opset: int) -> str:
    """Exact GELU: one operator from opset 20 on, before it the five nodes that compilers recognise."""
    if opset >= 20:
        return writer.add("Gelu", name, x)
    root, one, half = (
        writer.constant(label, np.array(value, np.float32))
        for label, value in (("sqrt_2", np.sqrt(2.0)), ("one", 1.0), ("half", 0.5))
    )
    erf = writer.add("Erf", f"{name}.erf", writer.add("Div", f"{name}.scaled", x, root))
    gate = writer.add("Mul", f"{name}.gated", x, writer.add("Add", f"{name}.gate", erf, one))
    return writer.add("Mul", name, gate, half)


def _without_class_token(writer: _NetworkWriter, tokens: str, index: int) -> str:
    ends = [
        writer.constant(f"slice_{label}", np.array([value], np.int64))
        for label, value in (("first", 1), ("end", np.iinfo(np.int64).max), ("axis", 1))
    ]
    return writer.add("Slice", f"blocks.{index}.patches", tokens, *ends)


def _head(writer: _NetworkWriter, weights: fold.Weights, config: NetworkConfig, batch: int, taps: list[str]) -> str:
    """UPerNet; returns the logits ``[N, K, G, G]``."""
    *shallow, deep = taps
    grid, scales, channels = config.grid, config.pool_scales, config.head_channels

    def as_map(name: str, tokens: str, channels: int) -> str:
        rows = writer.add("Transpose", f"{name}.rows", tokens, perm=[0, 2, 1])
        return writer.add("Reshape", f"{name}.map", rows, writer.shape(batch, channels, grid, grid))

    # Pyramid pooling on tokens: pool to all scales at once, project, keep each scale's own cells. Up-sampling the
    # cells and convolving them (the 3x3 bottleneck) is one linear map of 50 cells: it costs a twentieth of the
    # convolution, and the up-sampled maps are never stored.
    folded = [fold.fold_batch_norm(weights, f"head.pooled.{i}") for i in range(len(scales))]
    pooled = writer.add("MatMul", "pool.cells", writer.constant("pool.matrix", fold.pooling_matrix(grid, scales)), deep)
    mask = fold.scale_mask(scales, channels)
    pooled = writer.linear(
        "pool.projected",
        pooled,
        np.concatenate([weight[:, :, 0, 0] for weight, _ in folded]),
        # Columns of other scales than the cell's own get a bias that ReLU turns into zero: no masking is needed.
        np.where(mask > 0, np.concatenate([bias for _, bias in folded]), fold.OFF),
    )
    pooled = writer.add("Relu", "pool.active", pooled)
    kernel, bias = fold.fold_batch_norm(weights, "head.bottleneck")
    on_deep, on_cells = kernel[:, : config.embed_dim], kernel[:, config.embed_dim :]
    taps_weight = writer.constant("context.weight", fold.kernel_taps(on_cells))
    shares = writer.add("MatMul", "context.taps", pooled, taps_weight)  # [N, cells, 9 C]
    shares = writer.add("Reshape", "context.shares", shares, writer.shape(batch, 9 * len(mask), channels))
    shares = writer.add("Transpose", "context.rows", shares, perm=[0, 2, 1])  # small; the map would be large
    spread = writer.constant("context.spread", fold.spreading_matrix(grid, scales).T)
    context = writer.add("MatMul", "context", shares, spread)  # [N, C, L]
    context = writer.add("Reshape", "context.map", context, writer.shape(batch, channels, grid, grid))
    convolved = writer.conv("bottleneck.conv", as_map("deep", deep, config.embed_dim), on_deep, bias, relu=False)
    both = writer.add("Add", "bottleneck.sum", convolved, context)
    top = writer.add("Relu", "bottleneck", both)

    # Top-down path: all maps have one size, so they are added without resizing.
    smoothed: list[str] = []
    above = top
    for index in reversed(range(len(shallow))):
        # A 1x1 convolution is a linear map of tokens; computed on tokens, it needs no change of layout.
        kernel, bias = fold.fold_batch_norm(weights, f"head.laterals.{index}")
        lateral = writer.linear(f"lateral.{index}.projected", shallow[index], kernel[:, :, 0, 0], bias)
        lateral = writer.add("Relu", f"lateral.{index}", lateral)
        above = writer.add("Add", f"level.{index}", as_map(f"lateral.{index}", lateral, channels), above)
        smoothed.insert(
            0, writer.conv(f"smooth.{index}", above, *fold.fold_batch_norm(weights, f"head.smooth.{index}"))
        )
    joined = writer.add("Concat", "levels", *smoothed, top, axis=1)
    fused = writer.conv("fuse", joined, *fold.fold_batch_norm(weights, "head.fuse"))
    return writer.conv(LOGITS, fused, weights["head.classifier.weight"], weights["head.classifier.bias"], relu=False)


def _labels(writer: _NetworkWriter, logits: str, config: NetworkConfig) -> None:
    """Bilinear up-sampling to pixels and argmax."""
    scales = writer.constant("upsampling", np.array([1, 1, config.patch, config.patch], np.float32))
    scores = writer.add(
        "Resize", "scores", logits, "", scales, mode="linear", coordinate_transformation_mode="half_pixel"
    )
    best = writer.add("ArgMax", "best", scores, axis=1, keepdims=0)
    writer.add("Cast", "labels", best, to=TensorProto.UINT8)
