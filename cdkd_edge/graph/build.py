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

    def reshape(self, name: str, x: str, *sizes: int, images: int = 1) -> str:
        """``x`` as ``[N images, *sizes]``; nodes share their shapes."""
        sizes = (self.batch * images, *sizes)
        shape = self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))
        return self.add("Reshape", name, x, shape)

    def layer_norm(self, name: str, x: str, constants: str, scale: np.ndarray, shift: np.ndarray) -> str:
        """The fused operator, because its elementary steps overflow in FP16."""
        inputs = (x, self.constant(f"{constants}.weight", scale), self.constant(f"{constants}.bias", shift))
        return self.add("LayerNormalization", name, *inputs, axis=-1, epsilon=self.config.layer_norm_eps)

    def means(self, name: str, tokens: str, count: int) -> str:
        """Means of ``count`` successive parts of the tokens, ``[N, L, D]`` to ``[N, L/count, D]``.

        As an image of ``count`` rows: compilers keep this apart from the LayerNorm before it, which they would
        otherwise split in two.
        """
        length, dim = self.config.grid**2 // count, self.config.embed_dim
        rows = self.reshape(f"{name}.rows", tokens, 1, count, length * dim)
        pooled = self.add("AveragePool", f"{name}.pooled", rows, kernel_shape=[count, 1])
        return self.reshape(name, pooled, length, dim)

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
        tokens = self.linear("patch_embed", self.patches(pixels), fold.patch_matrix(kernel), bias)
        tokens = self.in_token_order(tokens)
        positions = weights["encoder.pos_embed"]
        if config.class_token:
            token = np.broadcast_to(weights["encoder.cls_token"], (self.batch, 1, config.embed_dim))
            tokens = self.add("Concat", "all_tokens", self.constant("cls_token", token), tokens, axis=1)
        else:
            positions = positions[:, config.token_order()]
        tokens = self.add("Add", "tokens", tokens, self.constant("pos_embed", positions))
        taps = []
        for index in range(config.depth):
            tokens = self.block(index, tokens)
            if index in config.taps:
                taps.append(self.without_class_token(index, tokens) if config.class_token else tokens)
        return taps

    def patches(self, pixels: str) -> str:
        """Pixels ``[N, 3, T, T]`` as patches in token order, ``[N, G*G, 3 P P]``, but for the smallest squares.

        Sorting by all squares at once would take ten axes; compilers stop at eight.
        """
        config = self.config
        counts = config.token_counts
        if len(counts) == 3:
            counts = (counts[0], counts[1] * counts[2])
        parts = (*counts, config.patch)
        split = self.reshape("patch_grid", pixels, 3, *parts, *parts)  # [N, 3, y1, (y2,) P, x1, (x2,) P]
        rows, columns = range(2, 2 + len(parts)), range(2 + len(parts), 2 + 2 * len(parts))
        levels = list(zip(rows, columns, strict=True))
        perm = [0, *(axis for level in reversed(levels[:-1]) for axis in level), 1, *levels[-1]]
        sorted_ = self.add("Transpose", "patch_pixels", split, perm=perm)  # [N, (y2, x2,) y1, x1, 3, P, P]
        return self.reshape("patches", sorted_, config.grid**2, 3 * config.patch**2)

    def in_token_order(self, tokens: str) -> str:
        """Tokens of :meth:`patches`, sorted by the smallest squares as well."""
        config = self.config
        if len(config.token_counts) < 3:
            return tokens
        first, count, side = config.token_counts
        split = self.reshape("squares.split", tokens, count, side, count, side, first**2, config.embed_dim)
        sorted_ = self.add("Transpose", "squares.sorted", split, perm=[0, 2, 4, 1, 3, 5, 6])
        return self.reshape("squares", sorted_, config.grid**2, config.embed_dim)

    def as_map(self, name: str, tokens: str, channels: int) -> str:
        """Tokens ``[N, G*G, C]`` as a map ``[N, C, G, G]``."""
        config = self.config
        counts = config.token_counts
        if len(counts) == 1:
            rows = self.add("Transpose", f"{name}.rows", tokens, perm=[0, 2, 1])
        else:
            sizes = [count for count in reversed(counts) for _ in "yx"]
            split = self.reshape(f"{name}.squares", tokens, *sizes, channels)  # [N, (y3, x3,) y2, x2, y1, x1, C]
            last = len(sizes) + 1
            perm = [0, last, *range(last - 2, 0, -2), *range(last - 1, 1, -2)]
            rows = self.add("Transpose", f"{name}.rows", split, perm=perm)  # [N, C, y1, y2, (y3,) x1, x2, (x3)]
        return self.reshape(f"{name}.map", rows, channels, config.grid, config.grid)

    def block(self, index: int, tokens: str) -> str:
        """One pre-norm transformer block."""
        name = f"blocks.{index}"
        tokens = self.add("Add", f"{name}.after_attn", tokens, self.attention(index, tokens))
        scale, shift, *mlp = (
            self.weights[f"encoder.{name}.{layer}.{part}"]
            for layer in ("norm2", "mlp.fc1", "mlp.fc2")
            for part in ("weight", "bias")
        )
        normed = self.layer_norm(f"{name}.norm2", tokens, f"{name}.norm2", scale, shift)
        hidden = self.gelu(f"{name}.mlp.gelu", self.linear(f"{name}.mlp.fc1", normed, *mlp[:2]))
        return self.add("Add", f"{name}.out", tokens, self.linear(f"{name}.mlp.fc2", hidden, *mlp[2:]))

    def attention(self, index: int, tokens: str) -> str:
        """A block's attention behind its LayerNorm, without the residual sum.

        The LayerNorm has no scale, and q, k and v no bias, because a bias costs a pass over memory.
        """
        config, attn = self.config, f"blocks.{index}.attn"
        dim, heads, length = config.embed_dim, config.heads, config.grid**2 + config.class_token
        pool, windows = config.pooling(index) ** 2, config.windows(index)
        folded = fold.fold_attention(self.weights, f"encoder.blocks.{index}", heads)
        ones, shift = np.ones(dim, np.float32), np.full(dim, fold.SHIFT, np.float32)
        normed = self.layer_norm(f"blocks.{index}.norm1", tokens, "norm1", ones, shift)
        means = normed if pool == 1 else self.means(f"{attn}.means", normed, pool)

        def by_head(part: str, x: str, weight: fold.Array, length: int) -> str:
            """A projection as ``[N W, H, L/W, d]``; see :meth:`NetworkConfig.token_order`."""
            part = f"{attn}.{part}"
            product = self.add("MatMul", part, x, self.constant(f"{part}.weight", weight.T))
            if windows == 1:
                split = self.reshape(f"{part}.heads", product, length, heads, dim // heads)
                return self.add("Transpose", f"{part}.by_head", split, perm=[0, 2, 1, 3])
            # With windows and heads as one axis here and in the product, TensorRT would copy q, k and v.
            split = self.reshape(f"{part}.heads", product, length // windows, windows, heads, dim // heads)
            split = self.add("Transpose", f"{part}.by_window", split, perm=[0, 2, 3, 1, 4])
            return self.reshape(f"{part}.by_head", split, heads, length // windows, dim // heads, images=windows)

        q = by_head("q", normed, folded.query, length)
        k = by_head("k", means, folded.key, length // pool)
        v = by_head("v", means, folded.value, length // pool)
        keys = self.add("Transpose", f"{attn}.k_transposed", k, perm=[0, 1, 3, 2])
        scores = self.add("MatMul", f"{attn}.scores", q, keys)  # [N W, H, L/W, L/W or L/pool]
        share = self.add("Softmax", f"{attn}.share", scores, axis=-1)
        mixed = self.add("MatMul", f"{attn}.mixed", share, v)
        if windows > 1:
            mixed = self.reshape(f"{attn}.mixed.by_window", mixed, windows, heads, length // windows, dim // heads)
        perm = [0, 2, 1, 3] if windows == 1 else [0, 3, 1, 2, 4]
        mixed = self.add("Transpose", f"{attn}.by_token", mixed, perm=perm)
        mixed = self.reshape(f"{attn}.joined", mixed, length, dim)
        return self.linear(f"{attn}.proj", mixed, folded.proj, folded.proj_bias)

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

        # Pyramid pooling on tokens: pool to all scales at once, project, keep each scale's own cells. Up-sampling the
        # cells and convolving them (the 3x3 bottleneck) is one linear map of 50 cells: it costs a twentieth of the
        # convolution, and the up-sampled maps are never stored.
        folded = [fold.fold_batch_norm(weights, f"head.pooled.{i}") for i in range(len(scales))]
        pooling = fold.pooling_matrix(grid, scales)[:, config.token_order()]
        pooled = self.add("MatMul", "pool.cells", self.constant("pool.matrix", pooling), deep)
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
        deep_map = self.as_map("deep", deep, config.embed_dim)
        convolved = self.conv("bottleneck.conv", deep_map, on_deep, bias, relu=False)
        top = self.add("Relu", "bottleneck", self.add("Add", "bottleneck.sum", convolved, context))

        # Top-down path: all maps have one size, so they are added without resizing.
        smoothed: list[str] = []
        above = top
        for index in reversed(range(len(shallow))):
            # A 1x1 convolution is a linear map of tokens; computed on tokens, it needs no change of layout.
            kernel, bias = fold.fold_batch_norm(weights, f"head.laterals.{index}")
            lateral = self.linear(f"lateral.{index}.projected", shallow[index], kernel[:, :, 0, 0], bias)
            lateral = self.as_map(f"lateral.{index}", self.add("Relu", f"lateral.{index}", lateral), channels)
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
        # By way of floats, which hold class numbers exactly: TensorRT's header promises no other cast to uint8.
        self.add("Cast", "labels", self.add("Cast", "best.float", best, to=TensorProto.FLOAT), to=TensorProto.UINT8)
