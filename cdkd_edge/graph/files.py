"""Graph files: read and check them, which may be damaged, foreign or malicious; write graphs made from another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from cdkd_edge.core.errors import GraphError, ManifestError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.manifest import LABELS, EngineManifest, FileRecord, GraphManifest, read_manifest, write_manifest
from cdkd_edge.graph.build import OPSETS
from cdkd_edge.graph.nodes import Sizes

_MAX_NODES = 20_000  # exported graphs have some hundreds
_MAX_COMPUTED = 1 << 24  # elements that a graph may compute from constants alone, as ONNX Runtime does on loading it
_MAX_LIST = 1 << 20  # the same for one dimension: ONNX's shape inference with values takes 100 bytes per element
_MAX_GROWTH = 1000  # elements of a value per element of the image. Attention over patches of 8 px at 1024 px makes 512.
# Operators whose output size depends on the values of inputs, and the first of these inputs
_SIZED_BY_VALUES = {"ConstantOfShape": 0, "Range": 0, "Expand": 1, "Tile": 1, "OneHot": 1, "Pad": 1, "Resize": 1}
_SMALL = 4096  # bytes up to which a constant (a shape, axes) takes part in shape inference; weights would be copied
# Bytes that an ONNX file can begin with: the tags of ModelProto's fields 1 to 8 and 14
_MODEL_FIELDS = (0x08, 0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72)
_AGAIN = "name a graph that `cdkd-edge export` or `build` wrote, or make it again"
_BOTH = "copy the file and its .json again, or make them again"


def derived_path(graph: Path, kind: str) -> Path:
    """Where a graph made from another one lies: ``ckpt.onnx`` has ``ckpt.fp16.onnx`` beside it."""
    return graph.with_name(f"{graph.stem}.{kind}.onnx")


def is_derived_from(graph: Path, source: Path, output: str = LABELS) -> bool:
    """Whether a graph is whole, gives ``output`` and was made from another one as that is now."""
    try:
        made, parent = read_manifest(graph, GraphManifest), read_manifest(source, GraphManifest)
    except ManifestError:
        return False
    return made.output == output and made.parent is not None and made.parent.sha256 == parent.artefact.sha256


def save_derived(
    model: onnx.ModelProto,
    destination: Path,
    source: GraphManifest,
    before: Callable[[GraphManifest], None] = lambda manifest: None,
    **changes: Any,
) -> GraphManifest:
    """Write a graph made from another one, and its manifest: ``source`` with ``changes``.

    ``before`` is called with the manifest before the graph appears under its name.
    """
    with whole_file(destination) as temporary:
        onnx.save(model, temporary)
        manifest = source.derived(FileRecord.of(temporary, destination.name), len(model.graph.node), **changes)
        write_manifest(destination, manifest)  # before the graph gets its name: no graph without a manifest
        before(manifest)
    return manifest


def load_graph(path: Path) -> onnx.ModelProto:
    """Load an ONNX file, or raise GraphError. Only its format is checked; weights in other files are not read."""
    if not path.is_file():
        raise GraphError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    with open(path, "rb") as file:  # so that a large file of another kind is not read in full
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
    """Read a graph or a CPU engine that will be run or rewritten: it is valid, bounded, and what its manifest says.

    Every function that runs or rewrites an ONNX file reads it here, so that a damaged or foreign file is refused before
    it takes time or memory.

    Raises:
        GraphError: see :func:`load_graph` and :func:`sizes_of`; or it does not turn uint8 images into uint8 labels.
        ManifestError: the manifest gives other sizes, outputs or classes.
    """
    model = load_graph(path)
    _require_contract(path, model, manifest, sizes_of(model, str(path)))
    return model


def sizes_of(model: onnx.ModelProto, name: str) -> Sizes:
    """Check that a graph is valid and bounded; returns type and sizes of every value whose sizes are fixed.

    Refused are graphs that could run endlessly or take unlimited memory: graphs inside nodes (Loop, If, Scan),
    functions, and values far larger than the image; also weights outside the file and constants without data.

    Raises:
        GraphError: it is not valid ONNX, or not bounded; the message calls it ``name``.
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
                what = f"a graph inside a node ({node.op_type} {node.name!r}), whose run time and memory are not known"
                raise GraphError(f"{name} holds {what}", hint=_AGAIN)
            tensors += [attribute.t] if attribute.HasField("t") else attribute.tensors
    for tensor in tensors:
        _require_data(tensor, name)
    bare = _without_weights(model)
    try:
        onnx.checker.check_model(bare)
        found: Sizes = {}
        for follow in (False, True):  # follow values only after lengths are known to be bounded
            found = _known_sizes(onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=follow))
            _require_bounded(model, found, name, final=follow)
    except GraphError:
        raise
    except Exception as error:  # onnx's own types, and bad_alloc
        raise GraphError(f"{name} is not valid ONNX: {_one_line(error)}", hint=_AGAIN) from None
    return found


def _require_data(tensor: onnx.TensorProto, name: str) -> None:
    """Make sure that a constant's data are numbers, in the file, and as many as its sizes say."""
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
        raise GraphError(f"{what} has {elements} elements, and the file holds fewer", hint=_AGAIN)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph for shape inference: large constants become inputs."""
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
    for field in ("output", "value_info"):  # an entry without a shape is not valid ONNX
        shaped = (item for item in getattr(graph, field) if item.type.tensor_type.HasField("shape"))
        getattr(bare.graph, field).extend(shaped)
    bare.graph.initializer.extend(small)
    return bare


def inferred_sizes(model: onnx.ModelProto) -> Sizes:
    """Type and sizes of every value whose sizes are fixed and follow from operators that ONNX knows."""
    return _known_sizes(onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True))


def _known_sizes(inferred: onnx.ModelProto) -> Sizes:
    """Type and sizes by name, of values with fixed sizes."""
    found = {item.name: (item.data_type, tuple(item.dims)) for item in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        kind = info.type.tensor_type
        sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
        if kind.HasField("shape") and min(sizes, default=0) >= 0:
            found[info.name] = (kind.elem_type, sizes)
    return found


def _require_bounded(model: onnx.ModelProto, sizes: Sizes, name: str, *, final: bool) -> None:
    """Make sure that no value is far larger than the image, and that little is computed from constants."""
    given = {"", *(item.name for item in model.graph.initializer)}
    constant = set(given)
    image = max((math.prod(sizes[item.name][1]) for item in model.graph.input if item.name in sizes), default=0)
    for node in model.graph.node:
        computed = constant.issuperset(node.input)
        for output in node.output:
            sizing = node.input[_SIZED_BY_VALUES.get(node.op_type, len(node.input)) :]
            if final and output not in sizes and not given.issuperset(sizing):
                raise GraphError(f"{name}: the size of {output!r} ({node.op_type}) is not known", hint=_AGAIN)
            shape = sizes.get(output, (0, ()))[1]
            most = _MAX_COMPUTED if computed else _MAX_GROWTH * image + _MAX_COMPUTED
            if (made := math.prod(shape)) > (_MAX_LIST if computed and len(shape) == 1 else most):
                raise GraphError(f"{name}: {node.op_type} {node.name!r} makes {made:.3g} numbers", hint=_AGAIN)
        if computed:
            constant.update(node.output)


def _require_contract(
    path: Path, model: onnx.ModelProto, manifest: GraphManifest | EngineManifest, sizes: Sizes
) -> None:
    """Make sure that a graph turns uint8 images into uint8 labels, of the sizes that its manifest gives."""
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    found = {
        item.name: sizes.get(item.name, (item.type.tensor_type.elem_type, ()))
        for item in (*graph.input, *graph.output)
        if item.name not in constants
    }
    actual = ", ".join(f"{name} {_written(*each)}" for name, each in list(found.items())[:4])
    image = found.get("image", (0, ()))[1]
    if [*found][:2] != ["image", LABELS] or {kind for kind, _ in found.values()} != {TensorProto.UINT8}:
        image = ()
    if len(image) != 4 or 0 in image or found[LABELS][1] != (image[0], image[2], image[2]):
        wanted = "image uint8 [N,3,T,T] and labels uint8 [N,T,T]"
        raise GraphError(f"{path} has {actual}; it must have {wanted}", hint=_AGAIN)
    expected = {"image": (manifest.batch, 3, manifest.tile, manifest.tile), **manifest.outputs}
    if {name: shape for name, (_, shape) in found.items()} != expected:
        wanted = ", ".join(f"{name} {_written(TensorProto.UINT8, shape)}" for name, shape in expected.items())
        raise ManifestError(f"{path} has {actual}; its manifest says {wanted}", hint=_BOTH)
    best = next((node for node in graph.node if node.op_type == "ArgMax" and node.input[0] in sizes), None)
    if best is not None and (shape := sizes[best.input[0]][1])[1:2] != (len(manifest.schema),):
        raise ManifestError(f"{path} gives {shape[1]} classes; its manifest names {len(manifest.schema)}", hint=_BOTH)


def _written(kind: int, sizes: tuple[int, ...]) -> str:
    known = kind in TensorProto.DataType.values()
    return f"{TensorProto.DataType.Name(kind).lower() if known else kind} [{','.join(map(str, sizes))}]"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
