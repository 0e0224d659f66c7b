"""Heads of other projects: their names for a UPerNet, how their arithmetic differs, and which heads are none.

Sources of the names: ``uper_head.py``, ``multilevel_neck.py``, ``featurepyramid.py`` and the other decode heads of
OpenMMLab mmsegmentation 1.2; Hugging Face transformers 5.24 ``modeling_upernet.py``, ``modeling_dpt.py`` and
``modeling_segformer.py``; TerraTorch 1.2 ``upernet_decoder.py``, ``segmentation_head.py``, ``necks.py`` and its other
decoders; segmentation-models-pytorch 0.6 ``decoders/*/decoder.py`` and ``base/modules.py``. All four give BatchNorm an
epsilon of 1e-5 and use ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cdkd_edge.core.errors import CheckpointError
from cdkd_edge.model.layouts import OPENMMLAB, STUDENT, TIMM, Dropped, Layout, Rules, translate
from cdkd_edge.model.layouts import recognise as recognise_encoder

if TYPE_CHECKING:
    from torch import Tensor

_TRAINED_BESIDE = (r"(?:auxiliary_head|aux_heads|classification_head)\..*", "auxiliary head, used only in training")
_NORM = r"(weight|bias|running_mean|running_var)"


def _units(*modules: tuple[str, str]) -> Rules:
    """Rules for units of convolution and norm, which projects call ``bn``, ``batch_norm`` or ``norm``."""
    return tuple(
        rule
        for module, target in modules
        for rule in (
            (rf"{module}\.conv\.(weight|bias)", rf"head.{target}.conv.\g<{module.count('(') + 1}>"),
            (rf"{module}\.(?:bn|batch_norm|norm)\.{_NORM}", rf"head.{target}.bn.\g<{module.count('(') + 1}>"),
        )
    )


def _sequences(*modules: tuple[str, str]) -> Rules:
    """The same where convolution and norm are members 0 and 1 of a sequence."""
    return tuple(
        rule
        for module, target in modules
        for rule in (
            (rf"{module}\.0\.(weight|bias)", rf"head.{target}.conv.\g<{module.count('(') + 1}>"),
            (rf"{module}\.1\.{_NORM}", rf"head.{target}.bn.\g<{module.count('(') + 1}>"),
        )
    )


def _of_openmmlab(part: str) -> Rules:
    return _units(
        (rf"{part}\.psp_modules\.(\d+)\.1", r"pooled.\1"),
        (rf"{part}\.bottleneck", "bottleneck"),
        (rf"{part}\.lateral_convs\.(\d+)", r"laterals.\1"),
        (rf"{part}\.fpn_convs\.(\d+)", r"smooth.\1"),
        (rf"{part}\.fpn_bottleneck", "fuse"),
    )


def _of_smp(part: str) -> Rules:
    """The deepest lateral comes first; ``norms`` are LayerNorms of the maps, the shallowest first."""
    return (
        *_sequences(
            (rf"{part}\.psp\.blocks\.(\d+)\.1", r"pooled.\1"),
            (rf"{part}\.psp\.out_conv", "bottleneck"),
            (rf"{part}\.fpn_lateral_blocks\.(\d+)\.conv_norm_relu", r"deep_laterals.\1"),
            (rf"{part}\.fpn_conv_blocks\.(\d+)", r"deep_smooth.\1"),
            (rf"{part}\.fusion_block", "fuse"),
        ),
        (rf"{part}\.feature_norms\.(\d+)\.(weight|bias)", r"head.norms.\1.\2"),
    )


def _neck(four: str, two: str) -> Rules:
    """Rules for a neck of transposed convolutions; the other two maps need no weights."""
    return (
        (rf"{four}\.0\.(weight|bias)", r"head.neck.first.\1"),
        (rf"{four}\.1\.{_NORM}", r"head.neck.bn.\1"),
        (rf"{four}\.3\.(weight|bias)", r"head.neck.first_again.\1"),
        (rf"{two}\.0\.(weight|bias)", r"head.neck.second.\1"),
    )


@dataclass(frozen=True)
class Head(Layout):
    """The naming of a head, beside an encoder under ``encoder.`` or ``backbone.``; see :class:`.layouts.Layout`."""

    pattern: str = ""  # a key of this head begins with it, and with no pattern of a head before
    implied: Mapping[str, Any] = field(default_factory=dict)  # fields of :class:`NetworkConfig` that no tensor shows
    usable: bool = True  # False: no UPerNet of this network; its tensors are dropped


_TERRATORCH_CLASSIFIER = (r"head\.head\.2\.(weight|bias)", r"head.classifier.\1")
TRANSFORMERS_HEAD = Head(
    "Hugging Face UPerNet",
    "Hugging Face transformers",
    "`decode_head.psp_modules.`, `decode_head.classifier.`",
    "`UperNetForSemanticSegmentation` with a DINOv2 or DINOv3 backbone",
    (*_of_openmmlab("decode_head"), (r"decode_head\.classifier\.(weight|bias)", r"head.classifier.\1")),
    (_TRAINED_BESIDE,),
    pattern=r"decode_head\.(?:lateral_convs|fpn_convs|fpn_bottleneck)\..*batch_norm\.",
)
OPENMMLAB_HEAD = Head(
    "OpenMMLab UPerHead",
    "OpenMMLab",
    "`decode_head.psp_modules.`, `decode_head.conv_seg.`",
    "mmsegmentation's `UPerHead`",
    (
        *_of_openmmlab("decode_head"),
        *_neck(r"neck\.upsample_4x", r"neck\.upsample_2x"),
        (r"decode_head\.conv_seg\.(weight|bias)", r"head.classifier.\1"),
    ),
    (_TRAINED_BESIDE,),
    pattern=r"decode_head\.(?:lateral_convs|fpn_convs|fpn_bottleneck)\.",
)
TERRATORCH_HEAD = Head(
    "TerraTorch UperNetDecoder",
    "TerraTorch, segmentation-models-pytorch",
    "`decoder.psp_modules.`, `head.head.2.`",
    "Lightning checkpoints with `UperNetDecoder`",
    (
        *_of_openmmlab("decoder"),
        *_neck(r"(?:neck\.\d+|decoder)\.fpn1", r"(?:neck\.\d+|decoder)\.fpn2"),
        _TERRATORCH_CLASSIFIER,
    ),
    (_TRAINED_BESIDE,),
    pattern=r"decoder\.(?:lateral_convs|fpn_convs|fpn_bottleneck)\.",
    implied={"align_corners": "pools"},  # PixelWiseModel up-samples the logits without
)
TERRATORCH_SMP_HEAD = Head(
    "TerraTorch with segmentation-models-pytorch's UPerNet",
    "TerraTorch, segmentation-models-pytorch",
    "`decoder._smp_decoder.psp.`, `head.head.2.`",
    "Lightning checkpoints with `smp_UPerNet`",
    (*_of_smp(r"decoder\._smp_decoder"), _TERRATORCH_CLASSIFIER),
    (_TRAINED_BESIDE,),
    pattern=r"decoder\._smp_decoder\.(?:psp|fpn_lateral_blocks|fpn_conv_blocks|fusion_block|feature_norms)\.",
)
SMP_HEAD = Head(
    "segmentation-models-pytorch UPerNet",
    "TerraTorch, segmentation-models-pytorch",
    "`decoder.psp.out_conv.`, `segmentation_head.0.`",
    "`smp.UPerNet` around a ViT of your own",
    (*_of_smp("decoder"), (r"segmentation_head\.0\.(weight|bias)", r"head.classifier.\1")),
    (_TRAINED_BESIDE,),
    pattern=r"decoder\.(?:psp\.out_conv|fpn_lateral_blocks|fpn_conv_blocks|fusion_block|feature_norms)\.",
    implied={"align_corners": "logits"},  # base/heads.py, SegmentationHead
)
HEADS = (
    TRANSFORMERS_HEAD, OPENMMLAB_HEAD, TERRATORCH_HEAD, TERRATORCH_SMP_HEAD, SMP_HEAD,
)  # fmt: skip

_LEARNED_NECK = r"neck\.(?:upsample_[24]x|\d+\.fpn[12])\."
_OTHER_NETWORKS = (
    (r"neck\.convs\.", "OpenMMLab's MultiLevelNeck, which makes maps of several strides"),
    (r"neck\.\d+\.fpn\.", "TerraTorch's FeaturePyramidNetworkNeck"),
    (r"(?:neck|decoder)\.reassemble_(?:stage|blocks)\.|decoder\.projection_blocks\.", "a DPT head"),
    (rf"(?!{_LEARNED_NECK})neck\.", "a neck between encoder and head"),
    (r"decoder\.decoder\.(?:psp_modules|fpn_bottleneck|conv_seg)\.", "OpenMMLab's decoder in TerraTorch"),
    (r"head\.head\.0\.", "TerraTorch's SegmentationHead with channel_list, which convolves before it classifies"),
    (r"(?:decode_head|decoder)\.(?:.*\.)?(?:gn|in|ln)\.", "a UPerNet with another norm than BatchNorm"),
)
"""Parts that make another network even of a UPerNet, by the beginning of a key."""
_OTHERS = (
    (r"decode_head\.(?:fusion_conv|linear_fuse|linear_c|linear_projections)\.|decoder\.(?:mlp_stage|fuse_stage)\.",
     "a SegFormer head"),
    (r"decode_head\.(?:cls_emb|dec_proj)", "a Segmenter head"),
    (r"decode_head\.reassemble_blocks\.", "a DPT head"),
    (r"decode_head\.up_convs\.", "a SETR head"),
    (r"decode_head\.(?:aspp_modules|image_pool)\.|decoder\.aspp\.", "a DeepLab (ASPP) head"),
    (r"decode_head\.(?:pixel_decoder|transformer_decoder)\.", "a Mask2Former head"),
    (r"decode_head\.scale_heads\.|decoder\.(?:p5|seg_blocks)\.", "a feature pyramid (FPN) head"),
    (r"decode_head\.psp_modules\.|decoder\.psp\.", "a PSPNet head"),
    (r"(?:decode_head|decoder)\.convs\.", "a fully convolutional (FCN) head"),
    (r"decoder\.(?:decoder\.|_smp_decoder\.)?(?:blocks|center)\.", "a U-Net decoder"),
    (r"decoder\.conv\.|decoder\.hidden_layer\.", "a linear head"),
    (r"decode_head\.(?:conv_seg|classifier|bn)\.|head\.head\.", "a linear head"),
    (r"", "a head of another kind"),
)  # fmt: skip
_PARTS = re.compile(
    r"(?:decode_head|decoder|segmentation_head|neck|aux_heads|auxiliary_head|classification_head|head)\."
)
_OWN_HEAD = re.compile(r"head\.(?!head\.)")


def recognise(keys: list[str]) -> tuple[Layout, Head | None, str]:
    """The layout of the encoder, the head beside it and the prefix of the encoder's keys; raises a CheckpointError.

    The head is None if there is none, or if it is this package's own and belongs to the layout.
    """
    head, prefix = _split(keys)
    inside = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    layout = recognise_encoder(inside)
    if layout is STUDENT and prefix:  # whoever took the class token away, it was not Mask-CDKD
        layout = OPENMMLAB if prefix == "backbone." else TIMM
    return layout, head, prefix


def translate_parts(
    tensors: Mapping[str, Tensor], layout: Layout, head: Head | None, prefix: str
) -> tuple[dict[str, Tensor], tuple[Dropped, ...]]:
    """The weights of encoder and head under this package's names; see :func:`.layouts.translate`."""
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state, dropped = translate(inside, layout)
    if head:
        beside = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        of_head, also_dropped = translate(beside, head)
        state, dropped = {**state, **of_head}, (*dropped, *also_dropped)
    return state, dropped


def _split(keys: list[str]) -> tuple[Head | None, str]:
    """The head beside an encoder, None if there is none or it is this package's, and the prefix of the encoder's keys.

    A head that this network does not have is one with ``usable`` False.

    Raises:
        CheckpointError: the encoder is a ViT-Adapter, whose blocks are no plain ViT's.
    """
    roots = (match[0] for key in keys if (match := re.match(r"(?:encoder|backbone)\.(?=.*patch_embed)", key)))
    if not (root := next(roots, "")):
        return None, ""
    inside = [key for key in keys if key.startswith(root)]
    if adapter := next((key for key in inside if re.search(r"\.(?:spm|interactions)\.", key)), None):
        raise CheckpointError(
            f"the encoder is a ViT-Adapter ({adapter}), which changes the tokens between its blocks; only a plain ViT "
            "can be read"
        )
    beside = [key for key in keys if _PARTS.match(key)]
    own = root == "encoder." and any(key.startswith("encoder.blocks.") for key in inside)
    if own and all(_OWN_HEAD.match(key) for key in beside):
        return None, ""
    if not beside and len(inside) < len(keys):  # such as DINOv2's heads of self-supervised training
        return None, ""
    paths = [key.split(".")[:-1] for key in inside]
    depth = min(map(len, paths))
    shared = next((i for i in range(depth) if any(path[i] != paths[0][i] for path in paths)), depth)
    return _head_of(beside) if beside else None, ".".join([*paths[0][:shared], ""])


def _head_of(keys: list[str]) -> Head:
    for pattern, name in _OTHER_NETWORKS:
        if found := [key for key in keys if re.match(pattern, key)]:
            return _other(name, found[0])
    for head in HEADS:
        if any(re.match(head.pattern, key) for key in keys):
            neck = next((key for key in keys if re.match(_LEARNED_NECK, key)), None)
            if neck and head not in (OPENMMLAB_HEAD, TERRATORCH_HEAD):
                return _other(f"a neck before {head.name}", neck)
            return head
    pattern, name = next((p, n) for p, n in _OTHERS if any(re.match(p, key) for key in keys))
    return _other(name, next(key for key in keys if re.match(pattern, key)))


def _other(name: str, key: str) -> Head:
    dropped = (r".*", f"{name}, which this network does not have")
    return Head(f"{name} ({key})", "", "", "", (), (dropped,), usable=False)


def refused_names() -> str:
    """The heads that are none of this network's, for the documents."""
    return "; ".join(dict.fromkeys(name for _, name in (*_OTHER_NETWORKS, *_OTHERS)))
