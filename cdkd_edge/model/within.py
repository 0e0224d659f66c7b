"""Reads what a file of weights says about its network beside the tensors: Lightning's and OpenMMLab's configurations.

Names as in TerraTorch 1.2 ``encoder_decoder_factory.py``, ``necks.py`` and ``segmentation_tasks.py``, whose arguments
Lightning keeps under ``hyper_parameters``; in timm ``_features.py``; in mmsegmentation 1.2 ``vit.py`` and
``decode_head.py``, whose configuration mmengine keeps as text under ``meta``, ``cfg``, and mmcv under ``config``.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cdkd_edge.core.errors import CheckpointError, SchemaError
from cdkd_edge.core.labels import LabelSchema, schema_of_lists
from cdkd_edge.model.config import shown
from cdkd_edge.model.heads import OPENMMLAB_HEAD, TERRATORCH_SMP_HEAD, TRANSFORMERS_HEAD, Head
from cdkd_edge.model.layouts import OPENMMLAB, Layout

FOUND_SCHEMA = "the file's own"  # name of a schema made from another project's class names; ``--schema`` overrides it
_MAX_TEXT = 1 << 20  # of a configuration, characters
_LEARNED_NECK = "LearnedInterpolateToPyramidal"  # read from its tensors
_NECKS = {"SelectIndices", "ReshapeTokensToImage", "PermuteDims", _LEARNED_NECK}  # the others leave a map as it is
_DINOV3_WRAPPER = "encoder.dinov3."
_SHIFTED = (
    "maps of TerraTorch's DINOv3 wrapper with its class token (backbone_return_cls_token is not false), which comes "
    "last while the first patch is taken for it"
)
_TIMM_MAPS = 3  # timm's features_only gives those of the last three blocks of a ViT


@dataclass(frozen=True)
class Within:
    """What a file says of its network."""

    stated: Mapping[str, Any] = field(default_factory=dict)  # fields of :class:`NetworkConfig`
    notes: tuple[str, ...] = ()
    other_head: str = ""  # a head, or a neck before it, that this network does not have
    class_names: object = None
    palette: object = None  # colours of the classes


def read_within(
    document: Mapping[str, Any], layout: Layout, head: Head | None, prefix: str, depth: int, normed: bool
) -> Within:
    """What the file says, and what its projects always do.

    Args:
        document: the top level of the file.
        layout: of the encoder; its keys began with ``prefix``.
        head: beside it.
        depth: blocks of the encoder.
        normed: whether it has a final norm.

    Raises:
        CheckpointError: the file describes an encoder that this package does not have.
    """
    stated: dict[str, Any] = dict(head.implied) if head else {}
    if normed and (prefix == _DINOV3_WRAPPER or (head is TRANSFORMERS_HEAD and layout.model_type)):
        # TerraTorch's DinoV3Wrapper and Hugging Face's backbones norm all maps, unless a config.json says otherwise.
        stated["final_norm"] = "taps"
    if normed and layout is OPENMMLAB:
        stated["final_norm"] = "last"
    meta, arguments = document.get("meta"), document.get("hyper_parameters")
    if isinstance(meta, Mapping):
        names, palette = _classes_of(meta)
        config = meta.get("cfg", meta.get("config"))
        said = _of_openmmlab(config, layout) if head is OPENMMLAB_HEAD and isinstance(config, str) else {}
        notes = (f"the file's meta gives {', '.join(said)}",) if said else ()
        return Within({**stated, **said}, notes, class_names=names, palette=palette)
    if isinstance(arguments, Mapping) and prefix.startswith("encoder."):
        said, other = _of_terratorch(arguments.get("model_args"), head, prefix, depth)
        notes = (f"the file's hyper_parameters give {', '.join(said)}",) if said else ()
        return Within({**stated, **said}, notes, other, class_names=arguments.get("class_names"))
    return Within(stated, other_head=_SHIFTED if head and prefix == _DINOV3_WRAPPER else "")


def _of_terratorch(arguments: object, head: Head | None, prefix: str, depth: int) -> tuple[dict[str, Any], str]:
    if not isinstance(arguments, Mapping):
        return {}, _SHIFTED if head and prefix == _DINOV3_WRAPPER else ""

    def get(part: str, name: str) -> Any:
        """``decoder_channels``, or ``channels`` in ``decoder_kwargs``."""
        kwargs = arguments.get(f"{part}_kwargs")
        return kwargs.get(name) if isinstance(kwargs, Mapping) and kwargs else arguments.get(f"{part}_{name}")

    said: dict[str, Any] = {}
    if head and prefix == _DINOV3_WRAPPER and get("backbone", "return_cls_token") is not False:
        return said, _SHIFTED
    if (align := get("decoder", "align_corners")) is not None and head:
        said["align_corners"] = head.implied.get("align_corners", "pools") if align else "none"
    if scales := _whole_numbers(get("decoder", "pool_scales")):
        said["pool_scales"] = scales
    blocks = _blocks(get("backbone", "out_indices"), prefix == "encoder.model.", depth)
    necks = arguments.get("necks")
    for neck in necks if isinstance(necks, (list, tuple)) else ():
        name = neck.get("name") if isinstance(neck, Mapping) else None
        if name not in _NECKS or neck.get("effective_time_dim", 1) != 1:
            return said, f"the neck {name} of hyper_parameters"
        if name == "SelectIndices" and blocks:
            chosen = _whole_numbers(neck.get("indices"))
            if not all(-len(blocks) <= one < len(blocks) for one in chosen):
                raise CheckpointError(f"SelectIndices of hyper_parameters takes {shown(chosen)} of {len(blocks)} maps")
            blocks = tuple(blocks[one] for one in chosen)
    if head is TERRATORCH_SMP_HEAD:
        blocks = blocks[2:]
    if blocks and head and head.usable:
        said["tapped"] = blocks
    return said, ""


def _blocks(indices: object, of_timm: bool, depth: int) -> tuple[int, ...]:
    """The blocks whose maps an encoder of TerraTorch gives; timm's has no blocks after the last of them."""
    if not of_timm:
        return tuple(range(depth))
    indices = _TIMM_MAPS if indices is None else indices
    if type(indices) is int:
        return tuple(range(max(0, depth - indices), depth))
    numbers = _whole_numbers(indices)
    whole = depth - 1 - max(numbers) if numbers and max(numbers) < 0 else depth
    return tuple(one % whole for one in numbers)


def _of_openmmlab(text: str, layout: Layout) -> dict[str, Any]:
    """Fields of the network in the text of a configuration: Python with ``dict(...)``, which is read and never run."""
    model = _assigned(text).get("model")
    if not isinstance(model, Mapping):
        return {}
    backbone, head, pixels = (model.get(name) or {} for name in ("backbone", "decode_head", "data_preprocessor"))
    if not (isinstance(backbone, Mapping) and isinstance(head, Mapping) and isinstance(pixels, Mapping)):
        return {}
    if layout is OPENMMLAB and backbone.get("with_cls_token") is False:
        raise CheckpointError("the file's encoder has a class token and does not use it (with_cls_token=False)")
    if isinstance(activation := head.get("act_cfg"), Mapping) and activation.get("type") != "ReLU":
        raise CheckpointError(f"the file's UPerHead uses {activation.get('type')} instead of ReLU")
    said: dict[str, Any] = {}
    if blocks := _whole_numbers(backbone.get("out_indices")):
        chosen = _whole_numbers(head.get("in_index")) or tuple(range(len(blocks)))
        if all(one < len(blocks) for one in chosen):
            said["tapped"] = tuple(blocks[one] for one in chosen)
    if scales := _whole_numbers(head.get("pool_scales")):
        said["pool_scales"] = scales
    if type(head.get("align_corners")) is bool:
        said["align_corners"] = "all" if head["align_corners"] else "none"
    if type(backbone.get("num_heads")) is int:
        said["heads"] = backbone["num_heads"]
    norm = backbone.get("norm_cfg")
    if isinstance(norm, Mapping) and type(norm.get("eps")) is float:
        said["layer_norm_eps"] = norm["eps"]
    mean, std = (_three_numbers(pixels.get(name)) for name in ("mean", "std"))
    if mean and std and pixels.get("bgr_to_rgb"):
        said |= {"pixel_mean": mean, "pixel_std": std}
    return said


def _assigned(text: str) -> dict[str, Any]:
    """What a text of Python assigns to its names, as far as it is plain data; nothing is run."""
    try:
        lines = ast.parse(text[: _MAX_TEXT + 1]).body if len(text) <= _MAX_TEXT else []
        names: dict[str, Any] = {}
        for line in lines:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                names[line.targets[0].id] = _value(line.value, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression; None for one that is more than data."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return [_value(part, names) for part in node.elts]
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {part.arg: _value(part.value, names) for part in node.keywords if part.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _value(value, names) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        positive = _value(node.operand, names)
        return -positive if isinstance(positive, (int, float)) else None
    return None


def _whole_numbers(value: object) -> tuple[int, ...]:
    """A list of whole numbers; empty if it is anything else."""
    if isinstance(value, (list, tuple)) and all(type(one) is int for one in value):
        return tuple(value)
    return ()


def _three_numbers(value: object) -> tuple[float, ...]:
    """A list of three numbers; empty if it is anything else."""
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(type(one) in (int, float) for one in value):
        return tuple(value)
    return ()


def _classes_of(meta: Mapping[Any, Any]) -> tuple[object, object]:
    """Names and colours of the classes, as mmcv and mmengine store them."""
    found: dict[str, object] = {}
    for table in (meta, meta.get("dataset_meta")):
        if isinstance(table, Mapping):
            found |= {key.lower(): part for key, part in table.items() if isinstance(key, str) and part is not None}
    return found.get("classes"), found.get("palette")


def schema_within(names: object, palette: object, classes: int, notes: list[str]) -> LabelSchema | None:
    """A schema of class names and colours that another project wrote; None if they cannot be used.

    Args:
        names: a list of names, or None.
        palette: a list of RGB colours, or None.
        classes: how many the classifier has.
        notes: what was used, or why not, is appended here.
    """
    if names is None:
        return None
    for colors in [palette, None] if palette is not None else [None]:
        try:
            schema = schema_of_lists(FOUND_SCHEMA, names, colors, classes)
        except SchemaError as error:
            notes.append(f"{'colours' if colors is not None else 'class names'} in the file not used: {error}")
        else:
            what = "class names" if colors is None else "class names and colours"
            notes.append(f"{what} are taken from the file, unless --schema is given")
            return schema
    return None
