"""Kernels from the layers that TensorRT made of a graph (``NAME.PRECISION.layers.json``), without the graph.

Bytes are those of a layer's inputs, outputs and constants. Operations are counted from shapes where matrices meet: the
list names the operators of each layer, but some of them in two layers. All other operations are left out; they take
less time than what they read and write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import permutations, product

from cdkd_edge.benchmark.roofline.kernels import FUSED, UNFUSED, Kernel
from cdkd_edge.core.errors import EngineError
from cdkd_edge.engines.tensorrt.layers import EngineLayers, Layer, LayerTensor

_PRODUCT_TYPE = re.compile(r"gemm|matmul|matrixmultiply|correlation|conv", re.IGNORECASE)
_PRODUCT_NAME = re.compile(r"^__myl_\w*?(Fc|Gemm|Corr)[A-Z_]")  # of other types, such as ``__myl_FcAddRelu_myl0_99``

Shape = tuple[int, ...]


def kernels_of_layers(compiled: EngineLayers) -> tuple[Kernel, ...]:
    """A kernel for each layer, in the order of computation; none for a layer that moves no data, such as a wait.

    Raises:
        EngineError: the shapes of a product, or of an attention, do not tell how many operations it takes.
    """
    kernels = map(_kernel, compiled.layers)
    return tuple(kernel for kernel in kernels if kernel.product_flop or kernel.traffic_bytes)


def batch_of_layers(compiled: EngineLayers) -> int:
    """Tiles per batch: the first size of the input ``image``; 1 if no layer reads one."""
    inputs = (tensor for layer in compiled.layers for tensor in layer.inputs)
    return next((max(1, tensor.shape[0]) for tensor in inputs if tensor.name == "image" and tensor.shape), 1)


def attention_of_layers(compiled: EngineLayers) -> str:
    """How the engine's attention runs: ``fused``, ``unfused``, ``8 of 12 fused``, or ``none``."""
    fused, blocks = compiled.fused_attention, max(compiled.fused_attention, len(compiled.attention_nodes))
    return "none" if not blocks else FUSED if fused == blocks else f"{fused} of {blocks} fused" if fused else UNFUSED


def precision_of_layers(compiled: EngineLayers) -> str:
    """``int8`` if the engine multiplies in INT8, ``fp16`` if in no wider type than that, else ``fp32``."""
    precisions = {kernel.precision for kernel in kernels_of_layers(compiled) if kernel.product_flop}
    return next((name for name in ("int8", "fp32") if name in precisions), "fp16" if precisions else "fp32")


def _kernel(layer: Layer) -> Kernel:
    flop, attention = 0, layer.is_fused_attention
    if attention or _PRODUCT_TYPE.search(layer.type) or _PRODUCT_NAME.match(layer.name):
        flop = _attention_flop(layer) if attention else _product_flop(layer)
        if not flop:
            raise EngineError(
                f"the shapes of layer {layer.name!r} do not tell how many operations it takes",
                hint="model the graph that the engine was built from",
            )
    return Kernel(
        name=layer.name, attention=attention, precision=_precision(layer) if flop else "fp32",
        operators=layer.nodes or (layer.name,), product_flop=flop, vector_flop=0,
        read_bytes=sum(tensor.bytes for tensor in layer.inputs),
        written_bytes=sum(tensor.bytes for tensor in layer.outputs),
        constant_bytes=sum(tensor.bytes for tensor in layer.constants),
    )  # fmt: skip


def _precision(layer: Layer) -> str:
    """Of a product: ``int8`` if both factors are; INT8 weights of a product of floats are converted first."""

    def has(dtypes: tuple[str, ...], tensors: Sequence[LayerTensor]) -> bool:
        return any(tensor.dtype in dtypes and len(_proper(tensor.shape)) > 1 for tensor in tensors)

    if has(("int8",), layer.inputs) and has(("int8",), layer.constants or layer.inputs):
        return "int8"
    return "fp16" if has(("fp16", "bf16"), layer.inputs) else "fp32"


def _attention_flop(layer: Layer) -> int:
    """Both products of softmax(q k) v: four operations for each pair of tokens and channel.

    q and the result are ``[..., L, d]``; k and v hold S tokens, fewer than L where keys are pooled.
    """
    inputs, results = _shapes(layer.inputs), _shapes(layer.outputs)
    if len(inputs) < 3 or not results:
        return 0
    return 4 * min(map(math.prod, inputs)) * results[0][-2]  # (... S d) x L


def _product_flop(layer: Layer) -> int:
    """Two operations for each multiply-accumulate of a product of matrices or a convolution; 0 if no shapes fit."""
    inputs, outputs = _shapes(layer.inputs), _shapes(layer.outputs)
    with_constant = _most(product(inputs, _shapes(layer.constants)), outputs)
    return 2 * (with_constant or _most(permutations(inputs, 2), outputs))


def _shapes(tensors: Sequence[LayerTensor]) -> list[Shape]:
    return [tensor.shape for tensor in tensors if len(tensor.shape) > 1 and min(tensor.shape) > 0]


def _proper(shape: Shape) -> Shape:
    return tuple(size for size in shape if size > 1)


def _most(pairs: Iterable[tuple[Shape, Shape]], outputs: Sequence[Shape]) -> int:
    """Multiply-accumulates of the pair that takes most of them."""
    return max((max(_convolution(*pair, outputs), _matrices(*pair)) for pair in pairs), default=0)


def _convolution(image: Shape, weight: Shape, outputs: Sequence[Shape]) -> int:
    """Multiply-accumulates of ``[N, C, H, W]`` with ``[M, C / groups, kh, kw]``; 0 if they do not fit."""
    if len(weight) != 4 or len(image) != 4 or image[1] % weight[1]:
        return 0
    results = [math.prod(one) for one in outputs if len(one) == 4 and one[1] == weight[0] > 1]
    return max(results, default=0) * math.prod(weight[1:])


def _matrices(first: Shape, second: Shape) -> int:
    """Multiply-accumulates of ``[..., M, K]`` with ``[..., K, N]``, in either order; 0 if they do not fit."""
    for left, right in ((first, second), (second, first)):
        if left[-1] == right[-2] > 1:
            return max(math.prod(left[:-2]), math.prod(right[:-2])) * left[-2] * left[-1] * right[-1]
    return 0
