"""Reading graphs, which may be anybody's: damaged, foreign, or made to harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from cdkd_edge.core.errors import GraphError, ManifestError
from cdkd_edge.core.manifest import EngineManifest, GraphManifest
from cdkd_edge.core.output_kinds import LABELS
from cdkd_edge.graph.build import OPSETS

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
