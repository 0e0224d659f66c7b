"""The network as an ONNX graph, written node by node from its weights. Needs no torch.

Written, not traced, it is small and the same with every torch. TensorRT 10.3 knows every operator; attention has the
form for which TensorRT and ONNX Runtime have fused kernels; constants are folded (:mod:`.fold`). :mod:`.export` checks
the graph against PyTorch; :mod:`.layers` finds the layers again: change both together. Tokens stay ``[N, L, D]``, the
channels-last layout that tensor cores want; maps are ``[N, C, G, G]``, L = G^2 without the class token.
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


def build_graph(
    weights: fold.Weights, config: NetworkConfig, *, batch: int = 1, opset: int = DEFAULT_OPSET
) -> onnx.ModelProto:
    """Write the FP32 graph: ``image`` uint8 ``[N, 3, T, T]`` to ``labels`` uint8 ``[N, T, T]``.

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
    writer = _NetworkWriter(weights, config, batch, opset)
    writer.labels(writer.head(writer.encoder()))
    tile = config.tile
    image = {"image": (TensorProto.UINT8, (batch, 3, tile, tile))}
    labels = {"labels": (TensorProto.UINT8, (batch, tile, tile))}
    model = writer.model("cdkd_edge", image, labels, opset)
    model.producer_name, model.producer_version = "cdkd-edge", __version__
    return model


class _NetworkWriter(NodeWriter):
    """Writes the network's parts; every value is named after the module that makes it."""

    def __init__(self, weights: fold.Weights, config: NetworkConfig, batch: int, opset: int) -> None:
        super().__init__()
        self.weights, self.config, self.batch, self.opset = weights, config, batch, opset

    def reshape(self, name: str, x: str, *sizes: int) -> str:
        """``x`` as ``[N, *sizes]``; nodes share their shapes."""
        sizes = (self.batch, *sizes)
        shape = self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))
        return self.add("Reshape", name, x, shape)

    def linear(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """``x W^T + b`` with ``weight`` in PyTorch's ``[out, in]``."""
        product = self.add("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T))
        return self.add("Add", name, product, self.constant(f"{name}.bias", bias))

    def conv(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray, *, relu: bool = True) -> str:
        """A convolution that keeps the map's size, followed by ReLU unless ``relu`` is False."""
        kernel = weight.shape[-1]
        inputs = (x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias))
        attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4}
        convolved = self.add("Conv", f"{name}.conv" if relu else name, *inputs, **attributes)
        return self.add("Relu", name, convolved) if relu else convolved

    def encoder(self) -> list[str]:
        """The ViT; returns the tokens after each tapped block, ``[N, G*G, D]``."""
        config, weights = self.config, self.weights
        pixels = self.add("Cast", "pixels", "image", to=TensorProto.FLOAT)
        kernel, bias = fold.fold_normalisation(
            weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"], PIXEL_MEAN, PIXEL_STD
        )
        inputs = (pixels, self.constant("patch_embed.weight", kernel), self.constant("patch_embed.bias", bias))
        sides = [config.patch] * 2
        patches = self.add("Conv", "patch_embed", *inputs, kernel_shape=sides, strides=sides)
        rows = self.reshape("patch_rows", patches, config.embed_dim, config.grid**2)
        tokens = self.add("Transpose", "patch_tokens", rows, perm=[0, 2, 1])
        if config.class_token:
            token = np.broadcast_to(weights["encoder.cls_token"], (self.batch, 1, config.embed_dim))
            tokens = self.add("Concat", "all_tokens", self.constant("cls_token", token), tokens, axis=1)
        tokens = self.add("Add", "tokens", tokens, self.constant("pos_embed", weights["encoder.pos_embed"]))
        taps = []
        for index in range(config.depth):
            tokens = self.block(index, tokens)
            if index in config.taps:
                taps.append(self.without_class_token(index, tokens) if config.class_token else tokens)
        return taps

    def block(self, index: int, tokens: str) -> str:
        """One pre-norm transformer block."""
        name, dim, heads = f"blocks.{index}", self.config.embed_dim, self.config.heads
        length, epsilon = self.config.grid**2 + self.config.class_token, self.config.layer_norm_eps

        def weights_of(part: str) -> tuple[fold.Array, fold.Array]:
            source = f"encoder.{name}.{part}"
            return self.weights[f"{source}.weight"], self.weights[f"{source}.bias"]

        def layer_norm(part: str, x: str) -> str:
            weight, bias = weights_of(part)
            constants = (self.constant(f"{name}.{part}.weight", weight), self.constant(f"{name}.{part}.bias", bias))
            # The fused operator, because its elementary steps overflow in FP16.
            return self.add("LayerNormalization", f"{name}.{part}", x, *constants, axis=-1, epsilon=epsilon)

        def linear(part: str, x: str) -> str:
            return self.linear(f"{name}.{part}", x, *weights_of(part))

        # Attention. One projection, one reshape and one transpose for q, k and v together.
        attn = f"{name}.attn"
        scaled = fold.fold_query_scale(*weights_of("attn.qkv"), heads)
        qkv = self.linear(f"{attn}.qkv", layer_norm("norm1", tokens), *scaled)
        parts = self.reshape(f"{attn}.heads", qkv, length, 3 * heads, dim // heads)
        parts = self.add("Transpose", f"{attn}.by_head", parts, perm=[0, 2, 1, 3])  # [N, 3 H, L, d]
        q, k, v = (f"{attn}.{part}" for part in "qkv")
        sizes = self.constant(f"split_{heads}", np.array([heads] * 3, np.int64))
        self.add("Split", f"{attn}.split", parts, sizes, outputs=[q, k, v], axis=1)  # each [N, H, L, d]
        keys = self.add("Transpose", f"{attn}.k_transposed", k, perm=[0, 1, 3, 2])
        scores = self.add("MatMul", f"{attn}.scores", q, keys)  # [N, H, L, L]
        share = self.add("Softmax", f"{attn}.share", scores, axis=-1)
        mixed = self.add("MatMul", f"{attn}.mixed", share, v)
        mixed = self.add("Transpose", f"{attn}.by_token", mixed, perm=[0, 2, 1, 3])
        mixed = self.reshape(f"{attn}.joined", mixed, length, dim)
        tokens = self.add("Add", f"{name}.after_attn", tokens, linear("attn.proj", mixed))

        hidden = linear("mlp.fc1", layer_norm("norm2", tokens))
        hidden = self.gelu(f"{name}.mlp.gelu", hidden)
        return self.add("Add", f"{name}.out", tokens, linear("mlp.fc2", hidden))

    def gelu(self, name: str, x: str) -> str:
        """Exact GELU: one operator from opset 20 on, before it the five nodes that compilers recognise."""
        if self.opset >= 20:
            return self.add("Gelu", name, x)
        values = {"sqrt_2": np.sqrt(2.0), "one": 1.0, "half": 0.5}
        root, one, half = (self.constant(label, np.array(value, np.float32)) for label, value in values.items())
        erf = self.add("Erf", f"{name}.erf", self.add("Div", f"{name}.scaled", x, root))
        gate = self.add("Mul", f"{name}.gated", x, self.add("Add", f"{name}.gate", erf, one))
        return self.add("Mul", name, gate, half)

    def without_class_token(self, index: int, tokens: str) -> str:
        """The tokens of patches alone."""
        values = {"first": 1, "end": np.iinfo(np.int64).max, "axis": 1}
        ends = [self.constant(f"slice_{label}", np.array([value], np.int64)) for label, value in values.items()]
        return self.add("Slice", f"blocks.{index}.patches", tokens, *ends)

    def head(self, taps: list[str]) -> str:
        """UPerNet; returns the logits ``[N, K, G, G]``."""
        *shallow, deep = taps
        weights, config = self.weights, self.config
        grid, scales, channels = config.grid, config.pool_scales, config.head_channels

        def as_map(name: str, tokens: str, channels: int) -> str:
            rows = self.add("Transpose", f"{name}.rows", tokens, perm=[0, 2, 1])
            return self.reshape(f"{name}.map", rows, channels, grid, grid)

        # Pyramid pooling on tokens: pool to all scales at once, project, keep each scale's own cells. Up-sampling the
        # cells and convolving them (the 3x3 bottleneck) is one linear map of 50 cells: it costs a twentieth of the
        # convolution, and the up-sampled maps are never stored.
        folded = [fold.fold_batch_norm(weights, f"head.pooled.{i}") for i in range(len(scales))]
        pooled = self.add("MatMul", "pool.cells", self.constant("pool.matrix", fold.pooling_matrix(grid, scales)), deep)
        mask = fold.scale_mask(scales, channels)
        projection = np.concatenate([weight[:, :, 0, 0] for weight, _ in folded])
        # Columns of other scales than the cell's own get a bias that ReLU turns into zero: no masking is needed.
        shift = np.where(mask > 0, np.concatenate([bias for _, bias in folded]), fold.OFF)
        pooled = self.add("Relu", "pool.active", self.linear("pool.projected", pooled, projection, shift))
        kernel, bias = fold.fold_batch_norm(weights, "head.bottleneck")
        on_deep, on_cells = kernel[:, : config.embed_dim], kernel[:, config.embed_dim :]
        taps_weight = self.constant("context.weight", fold.kernel_taps(on_cells))
        shares = self.add("MatMul", "context.taps", pooled, taps_weight)  # [N, cells, 9 C]
        shares = self.reshape("context.shares", shares, 9 * len(mask), channels)
        shares = self.add("Transpose", "context.rows", shares, perm=[0, 2, 1])  # small; the map would be large
        spread = self.constant("context.spread", fold.spreading_matrix(grid, scales).T)
        context = self.add("MatMul", "context", shares, spread)  # [N, C, L]
        context = self.reshape("context.map", context, channels, grid, grid)
        deep_map = as_map("deep", deep, config.embed_dim)
        convolved = self.conv("bottleneck.conv", deep_map, on_deep, bias, relu=False)
        top = self.add("Relu", "bottleneck", self.add("Add", "bottleneck.sum", convolved, context))

        # Top-down path: all maps have one size, so they are added without resizing.
        smoothed: list[str] = []
        above = top
        for index in reversed(range(len(shallow))):
            # A 1x1 convolution is a linear map of tokens; computed on tokens, it needs no change of layout.
            kernel, bias = fold.fold_batch_norm(weights, f"head.laterals.{index}")
            lateral = self.linear(f"lateral.{index}.projected", shallow[index], kernel[:, :, 0, 0], bias)
            lateral = as_map(f"lateral.{index}", self.add("Relu", f"lateral.{index}", lateral), channels)
            above = self.add("Add", f"level.{index}", lateral, above)
            smooth = fold.fold_batch_norm(weights, f"head.smooth.{index}")
            smoothed.insert(0, self.conv(f"smooth.{index}", above, *smooth))
        joined = self.add("Concat", "levels", *smoothed, top, axis=1)
        fused = self.conv("fuse", joined, *fold.fold_batch_norm(weights, "head.fuse"))
        classifier = (weights["head.classifier.weight"], weights["head.classifier.bias"])
        return self.conv(LOGITS, fused, *classifier, relu=False)

    def labels(self, logits: str) -> None:
        """Bilinear up-sampling to pixels and argmax."""
        patch = self.config.patch
        scales = self.constant("upsampling", np.array([1, 1, patch, patch], np.float32))
        options = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        scores = self.add("Resize", "scores", logits, "", scales, **options)
        best = self.add("ArgMax", "best", scores, axis=1, keepdims=0)
        self.add("Cast", "labels", best, to=TensorProto.UINT8)
