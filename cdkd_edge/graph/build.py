"""The network as an ONNX graph, written node by node from its weights. Needs no torch.

Written, not traced, it is small and the same with every torch. TensorRT 10.3 knows every operator; attention has the
form for which TensorRT and ONNX Runtime have fused kernels; constants are folded (:mod:`.fold`). :mod:`.encoder` writes
the encoder. :mod:`.export` checks the graph against PyTorch; :mod:`.layers` finds the layers again: change both
together.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from cdkd_edge import __version__
from cdkd_edge.core.errors import GraphError
from cdkd_edge.graph import fold
from cdkd_edge.graph.encoder import EncoderWriter
from cdkd_edge.model.config import NetworkConfig

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


class _NetworkWriter(EncoderWriter):
    """Writes the head behind the encoder."""

    def head(self, taps: list[str]) -> str:
        """UPerNet; returns the logits ``[N, K, G, G]``."""
        *shallow, deep = taps
        weights, config = self.weights, self.config
        sides, scales, channels = config.map_sides, config.pool_scales, config.head_channels
        grid = sides[-1]
        pooling = fold.pooling_matrix(grid, scales)
        if config.neck:
            deep_map = self.as_map("deep", deep, config.embed_dim)
            deep_map = self.add("MaxPool", "deep.halved", deep_map, kernel_shape=[2, 2], strides=[2, 2])
            columns = self.reshape("deep.columns", deep_map, config.embed_dim, grid**2)
            deep = self.add("Transpose", "deep.cells", columns, perm=[0, 2, 1])
        else:
            pooling = pooling[:, config.token_order()]

        # Pyramid pooling on tokens: pool to all scales at once, project, keep each scale's own cells. Up-sampling the
        # cells and convolving them (the 3x3 bottleneck) is one linear map of 50 cells: it costs a twentieth of the
        # convolution, and the up-sampled maps are never stored.
        folded = [fold.fold_batch_norm(weights, f"head.pooled.{i}") for i in range(len(scales))]
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
        spread = self.constant("context.spread", fold.spreading_matrix(grid, scales, config.pools_align).T)
        context = self.add("MatMul", "context", shares, spread)  # [N, C, L]
        context = self.reshape("context.map", context, channels, grid, grid)
        if not config.neck:
            deep_map = self.as_map("deep", deep, config.embed_dim)
        convolved = self.conv("bottleneck.conv", deep_map, on_deep, bias, relu=False)
        top = self.add("Relu", "bottleneck", self.add("Add", "bottleneck.sum", convolved, context))

        # Top-down path: without a neck all maps have one size and are added without resizing.
        smoothed: list[str] = []
        above = top
        for index in reversed(range(len(shallow))):
            write = self.enlarged_lateral if sides[index] > config.grid else self.lateral
            lateral = write(index, shallow[index])
            above = self.resized(f"level.{index}.above", above, sides[index] // sides[index + 1])
            above = self.add("Add", f"level.{index}", lateral, above)
            smooth = self.conv(f"smooth.{index}", above, *fold.fold_batch_norm(weights, f"head.smooth.{index}"))
            smoothed.insert(0, self.resized(f"levels.{index}", smooth, sides[0] // sides[index]))
        joined = self.add("Concat", "levels", *smoothed, self.resized("levels.top", top, sides[0] // grid), axis=1)
        fused = self.conv("fuse", joined, *fold.fold_batch_norm(weights, "head.fuse"))
        classifier = (weights["head.classifier.weight"], weights["head.classifier.bias"])
        return self.conv(LOGITS, fused, *classifier, relu=False)

    def lateral(self, index: int, tokens: str) -> str:
        """A shallower level before the levels above are added, ``[N, C, G, G]``.

        A 1x1 convolution is a linear map of tokens; computed on tokens, it needs no change of layout.
        """
        name = f"lateral.{index}"
        kernel, bias = fold.fold_batch_norm(self.weights, f"head.laterals.{index}")
        active = self.add("Relu", name, self.linear(f"{name}.projected", tokens, kernel[:, :, 0, 0], bias))
        return self.as_map(name, self.patches_alone(name, active), self.config.head_channels)

    def enlarged_lateral(self, index: int, tokens: str) -> str:
        """The same behind the neck's up-sampling, two or four times the grid.

        A transposed convolution of 2 x 2 is a linear map of each cell to four, and one with the 1x1 convolution after
        it; so is the ReLU computed before the cells become a map.
        """
        name, weights = f"lateral.{index}", self.weights
        tokens = self.patches_alone(name, tokens)
        kernel, shift = fold.fold_batch_norm(weights, f"head.laterals.{index}")
        kernel = kernel[:, :, 0, 0]
        if index == 1:
            folded = fold.fold_transposed(weights, "head.neck.second", kernel, shift)
            active = self.add("Relu", name, self.linear(f"{name}.projected", tokens, *folded))
            return self.enlarged(name, self.as_map(name, active, 4 * self.config.head_channels))
        gain, offset = fold.batch_norm(weights, "head.neck.bn")
        folded = fold.fold_transposed(weights, "head.neck.first", np.diag(gain), offset)
        hidden = self.gelu(f"{name}.gelu", self.linear(f"{name}.first", tokens, *folded))
        hidden = self.enlarged(f"{name}.hidden", self.as_map(f"{name}.hidden", hidden, 4 * self.config.neck[0]))
        weight, bias = fold.fold_transposed(weights, "head.neck.first_again", kernel, shift)
        return self.enlarged(name, self.conv(f"{name}.projected", hidden, weight[:, :, None, None], bias))

    def enlarged(self, name: str, x: str) -> str:
        """Channels as the four places of a square: a quarter of the channels, twice the side."""
        return self.add("DepthToSpace", f"{name}.enlarged", x, blocksize=2, mode="DCR")

    def resized(self, name: str, x: str, times: int) -> str:
        """A map of the head up-sampled bilinearly."""
        return x if times == 1 else self.upsampled(f"{name}.resized", x, times, align=self.config.pools_align)

    def upsampled(self, name: str, x: str, times: float, *, align: bool) -> str:
        """A map of ``times`` the side, bilinear."""
        scales = self.constant(f"upsampling_{times:g}", np.array([1, 1, times, times], np.float32))
        place = "align_corners" if align else "half_pixel"
        return self.add("Resize", name, x, "", scales, mode="linear", coordinate_transformation_mode=place)

    def labels(self, logits: str) -> None:
        """Bilinear up-sampling to pixels and argmax."""
        config = self.config
        scores = self.upsampled("scores", logits, config.logit_stride, align=config.logits_align)
        best = self.add("ArgMax", "best", scores, axis=1, keepdims=0)
        # By way of floats, which hold class numbers exactly: TensorRT's header promises no other cast to uint8.
        self.add("Cast", "labels", self.add("Cast", "best.float", best, to=TensorProto.FLOAT), to=TensorProto.UINT8)
