"""The network as an ONNX graph, written node by node from its weights. Needs no torch.

Writing the graph instead of tracing it keeps it small and the same whatever the version of torch:
every node below is one that TensorRT 10.3 knows, attention is left in the shape that its fused
kernel (and ONNX Runtime's) is found by, and whatever is constant is folded (:mod:`.fold`). That the
graph and the PyTorch network are the same function is checked at every export (:mod:`.check`).

    image uint8 [N,3,T,T] --> labels uint8 [N,T,T]

Tokens stay ``[N, L, D]``, which is the channels-last layout tensor cores want; maps are
``[N, C, G, G]``. An intermediate value ``logits`` ``[N, K, G, G]`` is named for the check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cdkd_edge import __version__
from cdkd_edge.errors import GraphError, ManifestError
from cdkd_edge.export import fold
from cdkd_edge.manifest import EngineManifest, GraphManifest
from cdkd_edge.model.config import PIXEL_MEAN, PIXEL_STD, NetworkConfig
from cdkd_edge.output_kinds import LABELS

OPSETS = range(17, 21)
"""17 brought LayerNormalization; TensorRT 10.3's parser documents operators up to 20."""
DEFAULT_OPSET = 20
LOGITS = "logits"

Sizes = Mapping[str, tuple[int, tuple[int, ...]]]
"""ONNX type and sizes of values by name."""

_MAX_NODES = 20_000
"""Ours have some hundreds."""
_MAX_COMPUTED = 1 << 24
"""Elements that a graph may compute from its constants alone, which ONNX Runtime does when it loads the graph."""
_MAX_LIST = 1 << 20
"""The same of lists (one dimension); ONNX's shape inference with values takes 100 bytes an element."""
_MAX_GROWTH = 1000
"""Elements of a value for each one of the image. Attention over patches of 8 px at 1024 px makes 512."""
_SIZED_BY_VALUES = {"ConstantOfShape": 0, "Range": 0, "Expand": 1, "Tile": 1, "OneHot": 1, "Pad": 1, "Resize": 1}
"""Operators whose outputs are as large as the numbers in their inputs say, and the first of these inputs."""
_SMALL = 4096
"""Bytes up to which a constant stays when shapes are inferred: shapes and axes are small, weights would be copied."""
_MODEL_FIELDS = (0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72)
"""Bytes that an ONNX file can begin with: the tags of ModelProto's fields 1 to 8 and 14."""


class GraphWriter:
    """Collects nodes and initialisers; every value is named after the module that makes it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, name: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Append a node; its (first) output is called ``name`` unless ``outputs`` says otherwise."""
        outputs = list(outputs) or [name]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=f"{name}/{op}", **attributes))
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        """An initialiser; the same name is stored once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def shape(self, *sizes: int) -> str:
        """An int64 shape for Reshape, shared by all nodes that need it."""
        return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def linear(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """``x W^T + b`` with ``weight`` in PyTorch's ``[out, in]``."""
        product = self.add("MatMul", f"{name}.product", x, self.constant(f"{name}.weight", weight.T))
        return self.add("Add", name, product, self.constant(f"{name}.bias", bias))

    def conv(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray, *, relu: bool = True) -> str:
        """Same-size convolution, with ReLU unless it is told not to."""
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
        GraphError: ``batch`` or ``opset`` out of range.
    """
    if opset not in OPSETS:
        raise GraphError(f"opset {opset} is not supported; use {OPSETS.start} to {OPSETS.stop - 1}")
    if batch < 1:
        raise GraphError(f"a batch of {batch} tiles makes no graph")
    writer = GraphWriter()
    taps = _encoder(writer, weights, config, batch, opset)
    logits = _head(writer, weights, config, batch, taps)
    _labels(writer, logits, config)

    tile = config.tile
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 3, tile, tile])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, [batch, tile, tile])
    graph = helper.make_graph(
        writer.nodes, "cdkd_edge", [image], [labels], initializer=list(writer.initializers.values())
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="cdkd-edge",
        producer_version=__version__,
    )


def _encoder(writer: GraphWriter, weights: fold.Weights, config: NetworkConfig, batch: int, opset: int) -> list[str]:
    """Tokens after each tapped block, ``[N, G*G, D]``."""
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
    writer: GraphWriter,
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
        # The fused operator, not its elementary steps: those overflow in FP16.
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


def _gelu(writer: GraphWriter, name: str, x: str, opset: int) -> str:
    """Exact GELU: the operator where it exists, else the five nodes that compilers recognise."""
    if opset >= 20:
        return writer.add("Gelu", name, x)
    root, one, half = (
        writer.constant(label, np.array(value, np.float32))
        for label, value in (("sqrt_2", np.sqrt(2.0)), ("one", 1.0), ("half", 0.5))
    )
    erf = writer.add("Erf", f"{name}.erf", writer.add("Div", f"{name}.scaled", x, root))
    gate = writer.add("Mul", f"{name}.gated", x, writer.add("Add", f"{name}.gate", erf, one))
    return writer.add("Mul", name, gate, half)


def _without_class_token(writer: GraphWriter, tokens: str, index: int) -> str:
    ends = [
        writer.constant(f"slice_{label}", np.array([value], np.int64))
        for label, value in (("first", 1), ("end", np.iinfo(np.int64).max), ("axis", 1))
    ]
    return writer.add("Slice", f"blocks.{index}.patches", tokens, *ends)


def _head(writer: GraphWriter, weights: fold.Weights, config: NetworkConfig, batch: int, taps: list[str]) -> str:
    """UPerNet; logits ``[N, K, G, G]``."""
    *shallow, deep = taps
    grid, scales, channels = config.grid, config.pool_scales, config.head_channels

    def as_map(name: str, tokens: str, channels: int) -> str:
        rows = writer.add("Transpose", f"{name}.rows", tokens, perm=[0, 2, 1])
        return writer.add("Reshape", f"{name}.map", rows, writer.shape(batch, channels, grid, grid))

    # Pyramid pooling on tokens: pool to all scales at once, project, keep each scale's own cells. What
    # the 3x3 bottleneck makes of up-sampled cells is a linear map of 50 cells; computed as one, it costs
    # a twentieth of convolving the up-sampled maps, which are then never made.
    folded = [fold.fold_batch_norm(weights, f"head.pooled.{i}") for i in range(len(scales))]
    pooled = writer.add("MatMul", "pool.cells", writer.constant("pool.matrix", fold.pooling_matrix(grid, scales)), deep)
    mask = fold.scale_mask(scales, channels)
    pooled = writer.linear(
        "pool.projected",
        pooled,
        np.concatenate([weight[:, :, 0, 0] for weight, _ in folded]),
        # What is not a cell's own scale gets a bias that ReLU makes zero of: no operation to mask it out.
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

    # Top-down: all maps have one size, so the addition needs no resizing.
    smoothed: list[str] = []
    above = top
    for index in reversed(range(len(shallow))):
        # A 1x1 convolution is a linear map of tokens; there it costs no change of layout.
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


def _labels(writer: GraphWriter, logits: str, config: NetworkConfig) -> None:
    """Bilinear up-sampling to pixels and argmax."""
    scales = writer.constant("upsampling", np.array([1, 1, config.patch, config.patch], np.float32))
    scores = writer.add(
        "Resize",
        "scores",
        logits,
        "",
        scales,
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    best = writer.add("ArgMax", "best", scores, axis=1, keepdims=0)
    writer.add("Cast", "labels", best, to=TensorProto.UINT8)


# --- reading -----------------------------------------------------------------------------------------


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file as it is: nothing but its format is checked, and weights in other files are not read.

    Raises:
        GraphError: it is no ONNX file, or one without nodes.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise GraphError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    with open(path, "rb") as file:  # large files of something else are not read in whole
        first = file.read(1)
    if not first or first[0] not in _MODEL_FIELDS or path.stat().st_size >= 1 << 31:
        raise GraphError(f"{path} is not an ONNX graph", hint=_AGAIN)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's own types
        raise GraphError(f"{path} is not an ONNX graph: {_one_line(error)}", hint=_AGAIN) from None
    if not model.graph.node:
        raise GraphError(f"{path} is an ONNX file without nodes", hint=_AGAIN)
    return model


def read_graph(path: Path, manifest: GraphManifest | EngineManifest) -> onnx.ModelProto:
    """A graph or a CPU engine that may be run or rewritten: valid, bounded, and what its manifest says.

    Everything that runs or rewrites an ONNX file reads it here, so that a damaged or foreign one is refused before it
    takes time or memory.

    Raises:
        GraphError: it is no such graph; see :func:`sizes_of`. Or its input and outputs are not uint8 images and labels.
        ManifestError: the manifest says other sizes, outputs or classes.
        OSError: it cannot be read.
    """
    model = load_graph(path)
    sizes = sizes_of(model, str(path))
    _require_contract(path, model, manifest, sizes)
    return model


def sizes_of(model: onnx.ModelProto, name: str) -> Sizes:
    """Type and sizes of every value whose sizes are fixed; only of a valid and bounded graph.

    What could run without end or compute without bound is refused: graphs inside nodes (Loop, If, Scan), functions, and
    values that are far larger than the image. So are weights outside the file and constants whose data are not there.

    Args:
        model: the graph; left as it is.
        name: for messages.

    Raises:
        GraphError: it is not valid ONNX, or not bounded.
    """
    graph = model.graph
    if len(graph.node) > _MAX_NODES:
        raise GraphError(f"{name} has {len(graph.node)} nodes; {_MAX_NODES} are the most", hint=_AGAIN)
    if model.functions or graph.sparse_initializer:
        raise GraphError(f"{name} holds functions or sparse weights, which no graph of cdkd-edge does", hint=_AGAIN)
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not min(OPSETS) <= entry.version <= newest:
            known = f"{min(OPSETS)} to {newest} are known here"
            raise GraphError(f"{name} is written in opset {entry.version}; {known}", hint=_AGAIN)
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise GraphError(
                    f"{name} holds a graph inside a node ({node.op_type} {node.name!r}): how long it runs and what it "
                    "takes cannot be told",
                    hint=_AGAIN,
                )
            tensors += [attribute.t] if attribute.HasField("t") else attribute.tensors
    for tensor in tensors:
        _require_data(tensor, name)
    bare = _without_weights(model)
    try:
        onnx.checker.check_model(bare)
        found: Sizes = {}
        for follow in (False, True):  # the values of lists only when their lengths are known to be bounded
            found = _known_sizes(onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=follow))
            _require_bounded(model, found, name, final=follow)
    except GraphError:
        raise
    except Exception as error:  # onnx's own types, and bad_alloc
        raise GraphError(f"{name} is not valid ONNX: {_one_line(error)}", hint=_AGAIN) from None
    return found


def _require_data(tensor: onnx.TensorProto, name: str) -> None:
    """Make sure that a constant's data are in the file, numbers, and as many as its sizes say."""
    what = f"{name}: constant {tensor.name!r}"
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise GraphError(f"{what} lies outside the file", hint=_AGAIN)
    try:
        item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except Exception:  # KeyError, TypeError: by release
        item = 0
    if not item or tensor.data_type == TensorProto.STRING or min(tensor.dims, default=0) < 0:
        raise GraphError(f"{what} holds no numbers, or has negative sizes", hint=_AGAIN)
    elements = math.prod(tensor.dims)
    if tensor.HasField("raw_data") and tensor.data_type <= TensorProto.BFLOAT16:
        there = len(tensor.raw_data) == elements * item
    else:  # complex numbers take two; what is stored as integers, several per element
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        there = elements <= 2 * sum(map(len, fields)) + 2 * len(tensor.raw_data)
    if not there:
        raise GraphError(f"{what} is of {elements} elements, and its data are not there", hint=_AGAIN)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """What shapes follow from: the graph with its large constants as inputs."""
    graph = model.graph
    small: list[onnx.TensorProto] = []
    large: list[onnx.TensorProto] = []
    for item in graph.initializer:
        size = math.prod(item.dims) * helper.tensor_dtype_to_np_dtype(item.data_type).itemsize
        (small if size <= _SMALL else large).append(item)
    given = {item.name for item in graph.input}
    inputs = [helper.make_tensor_value_info(x.name, x.data_type, list(x.dims)) for x in large if x.name not in given]
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = "graph"
    bare.graph.node.extend(graph.node)
    bare.graph.input.extend([*graph.input, *inputs])
    for field in ("output", "value_info"):  # one without a shape says nothing, and is no valid ONNX
        told = (item for item in getattr(graph, field) if item.type.tensor_type.HasField("shape"))
        getattr(bare.graph, field).extend(told)
    bare.graph.initializer.extend(small)
    return bare


def _known_sizes(inferred: onnx.ModelProto) -> Sizes:
    """Type and sizes by name, of what has fixed sizes."""
    found = {item.name: (item.data_type, tuple(item.dims)) for item in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        kind = info.type.tensor_type
        sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
        if kind.HasField("shape") and min(sizes, default=0) >= 0:
            found[info.name] = (kind.elem_type, sizes)
    return found


def _require_bounded(model: onnx.ModelProto, sizes: Sizes, name: str, *, final: bool) -> None:
    """Make sure that no node makes far more than the image is, and that constants make little."""
    given = {"", *(item.name for item in model.graph.initializer)}
    constant = set(given)
    image = max((math.prod(sizes[item.name][1]) for item in model.graph.input if item.name in sizes), default=0)
    for node in model.graph.node:
        computed = constant.issuperset(node.input)
        for output in node.output:
            sizing = node.input[_SIZED_BY_VALUES.get(node.op_type, len(node.input)) :]
            if final and output not in sizes and not given.issuperset(sizing):
                raise GraphError(f"{name}: how large {output!r} is ({node.op_type}) is not known", hint=_AGAIN)
            shape = sizes.get(output, (0, ()))[1]
            most = _MAX_COMPUTED if computed else _MAX_GROWTH * image + _MAX_COMPUTED
            if (made := math.prod(shape)) > (_MAX_LIST if computed and len(shape) == 1 else most):
                raise GraphError(f"{name}: {node.op_type} {node.name!r} makes {made:.3g} numbers", hint=_AGAIN)
        if computed:
            constant.update(node.output)


def _require_contract(
    path: Path, model: onnx.ModelProto, manifest: GraphManifest | EngineManifest, sizes: Sizes
) -> None:
    """Make sure that a graph turns uint8 images into uint8 labels, of the sizes that its manifest says."""
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    found = {
        item.name: sizes.get(item.name, (item.type.tensor_type.elem_type, ()))
        for item in (*graph.input, *graph.output)
        if item.name not in constants
    }
    told = ", ".join(f"{name} {_told(*each)}" for name, each in list(found.items())[:4])
    image = found.get("image", (0, ()))[1]
    if [*found][:2] != ["image", LABELS] or {kind for kind, _ in found.values()} != {TensorProto.UINT8}:
        image = ()
    if len(image) != 4 or 0 in image or found[LABELS][1] != (image[0], image[2], image[2]):
        raise GraphError(
            f"{path} has {told}; what makes labels of images has image uint8 [N,3,T,T] and labels uint8 [N,T,T]",
            hint=_AGAIN,
        )
    expected = {"image": (manifest.batch, 3, manifest.tile, manifest.tile), **manifest.outputs}
    if {name: shape for name, (_, shape) in found.items()} != expected:
        wanted = ", ".join(f"{name} {_told(TensorProto.UINT8, shape)}" for name, shape in expected.items())
        raise ManifestError(f"{path} has {told}; its manifest says {wanted}", hint=_BOTH)
    best = next((node for node in graph.node if node.op_type == "ArgMax" and node.input[0] in sizes), None)
    if best is not None and (shape := sizes[best.input[0]][1])[1:2] != (len(manifest.schema),):
        raise ManifestError(f"{path} gives {shape[1]} classes; its manifest names {len(manifest.schema)}", hint=_BOTH)


def _told(kind: int, sizes: tuple[int, ...]) -> str:
    known = kind in TensorProto.DataType.values()
    return f"{TensorProto.DataType.Name(kind).lower() if known else kind} [{','.join(map(str, sizes))}]"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_AGAIN = "name a graph that `cdkd-edge export` or `build` wrote, or make it again"
_BOTH = "copy the file and its .json again, or make them again"
