"""The encoder's part of the graph; see :mod:`.build`.

Tokens stay ``[N, L, D]``, the channels-last layout that tensor cores want; maps are ``[N, C, G, G]``, L = G^2 without
class token and registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from cdkd_edge.graph import fold
from cdkd_edge.graph.nodes import NodeWriter
from cdkd_edge.model.config import NO_NORM, SWIGLU, NetworkConfig


class EncoderWriter(NodeWriter):
    """Writes the encoder, and parts of any network; every value is named after the module that makes it."""

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
        """The ViT; returns the tokens after each tapped block, ``[N, L+E, D]``, the deepest ones ``[N, L, D]``."""
        config, weights = self.config, self.weights
        pixels = self.add("Cast", "pixels", "image", to=TensorProto.FLOAT)
        kernel, bias = fold.fold_normalisation(
            weights["encoder.patch_embed.proj.weight"],
            weights["encoder.patch_embed.proj.bias"],
            config.pixel_mean,
            config.pixel_std,
        )
        patches = self.patches(pixels)
        if config.extra_tokens:  # as rows of zeros, to which the positions below add the tokens themselves
            ends = self.constant("extra_tokens", np.array([0, 0, 0, 0, config.extra_tokens, 0], np.int64))
            patches = self.add("Pad", "patches.all", patches, ends)
        tokens = self.add(
            "MatMul", "patch_embed.product", patches, self.constant("patch_embed.weight", fold.patch_matrix(kernel).T)
        )
        tokens = self.in_token_order(tokens)
        tokens = self.add("Add", "tokens", tokens, self.constant("positions", fold.positions(weights, config, bias)))
        taps = []
        for index in range(config.depth):
            tokens = self.block(index, tokens)
            if index in config.taps:
                # The deepest tokens lose the extra ones before their norm, in one kernel with it; the shallower ones
                # after their projection to fewer channels.
                tap = self.patches_alone("deep", tokens) if index == config.taps[-1] else tokens
                taps.append(self.final_norm(index, tap) if index in config.normed_taps else tap)
        return taps

    def final_norm(self, index: int, tokens: str) -> str:
        """The encoder's last LayerNorm, of the tokens after a block."""
        scale, shift = self.weights["encoder.norm.weight"], self.weights["encoder.norm.bias"]
        return self.layer_norm(f"blocks.{index}.normed", tokens, "norm", scale, shift)

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

    def patches_alone(self, name: str, tokens: str) -> str:
        """The tokens without the extra ones at their end."""
        config = self.config
        if not config.extra_tokens:
            return tokens
        values = {"first": 0, "end": config.grid**2, "axis": 1}
        ends = [self.constant(f"slice_{label}", np.array([value], np.int64)) for label, value in values.items()]
        return self.add("Slice", f"{name}.patches", tokens, *ends)

    def as_map(self, name: str, tokens: str, channels: int) -> str:
        """The tokens of patches, ``[N, G*G, C]``, as a map ``[N, C, G, G]``."""
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
        hidden = self.linear(f"{name}.mlp.fc1", normed, *mlp[:2])
        hidden = (self.swiglu if self.config.mlp == SWIGLU else self.gelu)(f"{name}.mlp.{self.config.mlp}", hidden)
        return self.add("Add", f"{name}.out", tokens, self.linear(f"{name}.mlp.fc2", hidden, *mlp[2:]))

    def attention(self, index: int, tokens: str) -> str:
        """A block's attention behind its LayerNorm, without the residual sum.

        The LayerNorm has no scale, and q, k and v no bias, because a bias costs a pass over memory.
        """
        config, attn = self.config, f"blocks.{index}.attn"
        dim, heads, length = config.embed_dim, config.heads, config.grid**2 + config.extra_tokens
        pool, windows = config.pooling(index) ** 2, config.windows(index)
        after = bool(config.rotary_base) or config.query_key_norm != NO_NORM
        folded = fold.fold_attention(self.weights, f"encoder.blocks.{index}", heads, after=after)
        ones, shift = np.ones(dim, np.float32), np.full(dim, fold.SHIFT, np.float32)
        normed = self.layer_norm(f"blocks.{index}.norm1", tokens, "norm1", ones, shift)
        means = normed if pool == 1 else self.means(f"{attn}.means", normed, pool)

        def by_head(part: str, product: str, length: int, count: int = 1) -> str:
            """``count`` projections as ``[count N W, H, L/W, d]``; see :meth:`NetworkConfig.token_order`."""
            part = f"{attn}.{part}"
            if windows == 1:
                split = self.reshape(f"{part}.heads", product, length, heads, dim // heads, images=count)
                return self.add("Transpose", f"{part}.by_head", split, perm=[0, 2, 1, 3])
            # With windows and heads as one axis here and in the product, TensorRT would copy q, k and v.
            split = self.reshape(
                f"{part}.heads", product, length // windows, windows, heads, dim // heads, images=count
            )
            split = self.add("Transpose", f"{part}.by_window", split, perm=[0, 2, 3, 1, 4])
            sizes = (heads, length // windows, dim // heads)
            return self.reshape(f"{part}.by_head", split, *sizes, images=count * windows)

        if config.rotary_base:
            q, k, v = self.rotated(index, normed, folded, by_head)
        else:
            products = [
                self.add("MatMul", f"{attn}.{part}", x, self.constant(f"{attn}.{part}.weight", weight.T))
                for part, x, weight in (
                    ("q", normed, folded.query),
                    ("k", means, folded.key),
                    ("v", means, folded.value),
                )
            ]
            q = by_head("q", products[0], length)
            k, v = by_head("k", products[1], length // pool), by_head("v", products[2], length // pool)
            if after:
                q, k = self.head_norm(index, "q", q), self.head_norm(index, "k", k)
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

    def rotated(
        self, index: int, normed: str, folded: fold.AttentionWeights, by_head: Callable[..., str]
    ) -> tuple[str, str, str]:
        """Queries, keys and values ``[N W, H, L/W, d]``, the first two turned by their positions.

        One product makes all three, so that compilers turn queries and keys in one kernel before the fused attention.
        """
        config, attn = self.config, f"blocks.{index}.attn"
        dim, length = config.embed_dim, config.grid**2 + config.extra_tokens
        images = self.batch * config.windows(index)
        stacked = np.stack([folded.query.T, folded.key.T, folded.value.T])[:, None]  # [3, 1, D, D]
        shape = self.constant(f"shape_1x{self.batch}x{length}x{dim}", np.array([1, self.batch, length, dim], np.int64))
        product = self.add("Reshape", f"{attn}.input", normed, shape)
        product = self.add("MatMul", f"{attn}.qkv", product, self.constant(f"{attn}.qkv.weight", stacked))
        heads = by_head("qkv", product, length, 3)  # [3 N W, H, L/W, d]
        sizes = self.constant(f"sizes_{2 * images}_{images}", np.array([2 * images, images], np.int64))
        both, v = self.split(f"{attn}.qk", heads, sizes, f"{attn}.v", axis=0)
        if config.query_key_norm != NO_NORM:
            sizes = self.constant(f"sizes_{images}_{images}", np.array([images, images], np.int64))
            parts = self.split(f"{attn}.q.plain", both, sizes, f"{attn}.k.plain", axis=0)
            normal = [self.head_norm(index, part, x) for part, x in zip("qk", parts, strict=True)]
            both = self.add("Concat", f"{attn}.qk.normed", *normal, axis=0)
        cosine, sine = self.turn_tables(config.windows(index))
        halves = self.constant(f"halves_{dim // config.heads}", np.array([dim // config.heads // 2] * 2, np.int64))
        first, second = self.split(f"{attn}.qk.first", both, halves, f"{attn}.qk.second", axis=3)
        swapped = self.add("Concat", f"{attn}.qk.swapped", self.add("Neg", f"{attn}.qk.negated", second), first, axis=3)
        straight = self.add("Mul", f"{attn}.qk.cosine", both, cosine)
        both = self.add("Add", f"{attn}.qk.rotated", straight, self.add("Mul", f"{attn}.qk.sine", swapped, sine))
        sizes = self.constant(f"sizes_{images}_{images}", np.array([images, images], np.int64))
        q, k = self.split(f"{attn}.q.turned", both, sizes, f"{attn}.k.turned", axis=0)
        return q, k, v

    def turn_tables(self, windows: int) -> tuple[str, str]:
        """Cosines and sines of the rotary positions, for queries and keys ``[2 N W, H, L/W, d]``.

        Scores are divided by sqrt(d); here queries and keys both are, by its root, as they are turned together.
        """
        config = self.config
        width = config.embed_dim // config.heads
        scale = 1.0 if config.query_key_norm != NO_NORM else width**-0.25
        names = []
        for name, table in zip(("cosine", "sine"), fold.turns(config), strict=True):
            both = np.tile(table * np.float32(scale), 2)  # [L, d]
            by_window = both.reshape(-1, windows, width).transpose(1, 0, 2)[:, None]  # [W, 1, L/W, d]
            tiled = by_window if windows == 1 else np.tile(by_window, (2 * self.batch, 1, 1, 1))
            names.append(self.constant(f"rotary.{name}.{windows}", tiled))
        return names[0], names[1]

    def head_norm(self, index: int, part: str, x: str) -> str:
        """The norm of each head's queries or keys, ``[..., d]``; queries are divided by sqrt(d) as well.

        An RMS norm of x is half of the LayerNorm of x and -x together, whose mean is 0: safe in FP16, where squares
        overflow.
        """
        config, name = self.config, f"blocks.{index}.attn.{part}"
        width = config.embed_dim // config.heads
        divisor = math.sqrt(width) if part == "q" else 1.0
        scale = self.weights[f"encoder.blocks.{index}.attn.{part}_norm.weight"] / np.float32(divisor)
        if config.query_key_norm == "layer":
            shift = self.weights[f"encoder.blocks.{index}.attn.{part}_norm.bias"] / np.float32(divisor)
            return self.layer_norm(f"{name}.normed", x, f"{name}.norm", scale, shift)
        both = self.add("Concat", f"{name}.both_signs", x, self.add("Neg", f"{name}.negated", x), axis=3)
        scale = np.concatenate([scale, scale])
        both = self.layer_norm(f"{name}.both_normed", both, f"{name}.norm", scale, np.zeros_like(scale))
        halves = self.constant(f"halves_{2 * width}", np.array([width, width], np.int64))
        return self.split(f"{name}.normed", both, halves, f"{name}.negative", axis=3)[0]

    def split(self, first: str, x: str, sizes: str, second: str, *, axis: int) -> list[str]:
        """Two parts of ``x``."""
        self.add("Split", first, x, sizes, outputs=[first, second], axis=axis)
        return [first, second]

    def swiglu(self, name: str, x: str) -> str:
        """silu(gate) times value, the two halves of ``x``."""
        halves = self.constant("shape_mlp_halves", np.array([self.config.mlp_dim] * 2, np.int64))
        gate, value = self.split(f"{name}.gate", x, halves, f"{name}.value", axis=2)
        silu = self.add("Mul", f"{name}.silu", gate, self.add("Sigmoid", f"{name}.sigmoid", gate))
        return self.add("Mul", name, silu, value)

    def gelu(self, name: str, x: str) -> str:
        """Exact GELU: one operator from opset 20 on, before it the five nodes that compilers recognise."""
        if self.opset >= 20:
            return self.add("Gelu", name, x)
        values = {"sqrt_2": np.sqrt(2.0), "one": 1.0, "half": 0.5}
        root, one, half = (self.constant(label, np.array(value, np.float32)) for label, value in values.items())
        erf = self.add("Erf", f"{name}.erf", self.add("Div", f"{name}.scaled", x, root))
        gate = self.add("Mul", f"{name}.gated", x, self.add("Add", f"{name}.gate", erf, one))
        return self.add("Mul", name, gate, half)
