"""How other projects name and shape the same weights, and the translation to this package's network.

A layout is a list of renaming rules and a list of parts that a deployment drops, each with its reason. A key
that no rule knows is an error: ignoring a tensor would give wrong maps.

Sources of the names: Mask-CDKD ``student_vit_mae.py`` (github.com/whujader/mask_cdkd); timm
``vision_transformer.py``, ``vision_transformer_sam.py`` and ``eva.py``; ``vision_transformer.py`` of
github.com/facebookresearch/dinov2 and dinov3; OpenMMLab mmsegmentation ``vit.py``; SAM
``image_encoder.py`` (github.com/facebookresearch/segment-anything); Hugging Face transformers ``modeling_sam.py``,
``modeling_dinov2.py``, ``modeling_dinov2_with_registers.py`` and ``modeling_dinov3_vit.py`` of releases 4.5x, and of
5.x, which names other tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Rules = tuple[tuple[str, str], ...]

# Queries, keys and values under q, k, v, and gate and value of SwiGLU are stacked by infer.complete_blocks.
_VIT: Rules = (
    (r"(patch_embed\.proj\.(?:weight|bias)|pos_embed|cls_token)", r"encoder.\1"),
    (r"(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))", r"encoder.\1"),
    (r"(blocks\.\d+)\.(?:ls1\.gamma|gamma_1)", r"encoder.\1.scale1"),
    (r"(blocks\.\d+)\.(?:ls2\.gamma|gamma_2)", r"encoder.\1.scale2"),
)
_TIMM: Rules = (
    *_VIT,
    (r"reg_token", r"encoder.registers"),
    (r"(blocks\.\d+\.attn\.[qk]_norm\.(?:weight|bias))", r"encoder.\1"),
    (r"(blocks\.\d+\.mlp)\.fc1_g\.(weight|bias)", r"encoder.\1.gate.\2"),
    (r"(blocks\.\d+\.mlp)\.fc1_x\.(weight|bias)", r"encoder.\1.value.\2"),
    (r"(norm\.(?:weight|bias))", r"encoder.\1"),
)
_TIMM_DINOV3: Rules = (
    *_TIMM,
    (r"(blocks\.\d+\.attn)\.([qv])_bias", r"encoder.\1.\2.bias"),
    (r"(blocks\.\d+\.attn)\.([qkv])_proj\.(weight|bias)", r"encoder.\1.\2.\3"),
)
_DINO_PART = r"(?:backbone\.)?"
_DINO_BLOCK = rf"{_DINO_PART}blocks\.(?:\d+\.)?(\d+)"  # files of a sharded training have chunks of blocks: blocks.0.5
_DINO: Rules = (
    (rf"{_DINO_PART}(patch_embed\.proj\.(?:weight|bias)|pos_embed|cls_token|norm\.(?:weight|bias))", r"encoder.\1"),
    (rf"{_DINO_PART}(?:register_tokens|storage_tokens)", r"encoder.registers"),
    (rf"{_DINO_PART}rope_embed\.periods", r"encoder.periods"),
    (
        rf"{_DINO_BLOCK}\.((?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))",
        r"encoder.blocks.\1.\2",
    ),
    (rf"{_DINO_BLOCK}\.attn\.qkv\.bias_mask", r"encoder.blocks.\1.attn.qkv.bias_mask"),
    (rf"{_DINO_BLOCK}\.ls([12])\.gamma", r"encoder.blocks.\1.scale\2"),
    (rf"{_DINO_BLOCK}\.mlp\.w12\.(weight|bias)", r"encoder.blocks.\1.mlp.fc1.\2"),
    (rf"{_DINO_BLOCK}\.mlp\.w1\.(weight|bias)", r"encoder.blocks.\1.mlp.gate.\2"),
    (rf"{_DINO_BLOCK}\.mlp\.w2\.(weight|bias)", r"encoder.blocks.\1.mlp.value.\2"),
    (rf"{_DINO_BLOCK}\.mlp\.w3\.(weight|bias)", r"encoder.blocks.\1.mlp.fc2.\2"),
)
_HF_PART = r"(?:\w+\.)*"  # of the model that holds the encoder: dinov2., backbone., model.
_HF_BLOCK = rf"{_HF_PART}layer\.(\d+)"
_HF: Rules = (
    (rf"{_HF_PART}embeddings\.(cls_token)", r"encoder.\1"),
    (rf"{_HF_PART}embeddings\.position_embeddings", r"encoder.pos_embed"),
    (rf"{_HF_PART}embeddings\.register_tokens", r"encoder.registers"),
    (rf"{_HF_PART}embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"encoder.patch_embed.proj.\1"),
    (rf"{_HF_BLOCK}\.(norm[12]\.(?:weight|bias))", r"encoder.blocks.\1.\2"),
    (rf"{_HF_BLOCK}\.attention\.attention\.([qkv])(?:uery|ey|alue)\.(weight|bias)", r"encoder.blocks.\1.attn.\2.\3"),
    (rf"{_HF_BLOCK}\.attention\.([qkv])_proj\.(weight|bias)", r"encoder.blocks.\1.attn.\2.\3"),
    (rf"{_HF_BLOCK}\.attention\.(?:output\.dense|o_proj)\.(weight|bias)", r"encoder.blocks.\1.attn.proj.\2"),
    (rf"{_HF_BLOCK}\.layer_scale([12])\.lambda1", r"encoder.blocks.\1.scale\2"),
    (rf"{_HF_BLOCK}\.mlp\.(?:fc1|weights_in)\.(weight|bias)", r"encoder.blocks.\1.mlp.fc1.\2"),
    (rf"{_HF_BLOCK}\.mlp\.gate_proj\.(weight|bias)", r"encoder.blocks.\1.mlp.gate.\2"),
    (rf"{_HF_BLOCK}\.mlp\.up_proj\.(weight|bias)", r"encoder.blocks.\1.mlp.value.\2"),
    (rf"{_HF_BLOCK}\.mlp\.(?:fc2|weights_out|down_proj)\.(weight|bias)", r"encoder.blocks.\1.mlp.fc2.\2"),
    (rf"{_HF_PART}(?:layer)?(norm\.(?:weight|bias))", r"encoder.\1"),
)
_MM_VIT: Rules = (
    (r"patch_embed\.projection\.(weight|bias)", r"encoder.patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(weight|bias)", r"encoder.blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)", r"encoder.blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(weight|bias)", r"encoder.blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"encoder.blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"encoder.blocks.\1.mlp.fc2.\2"),
    (r"ln1\.(weight|bias)", r"encoder.norm.\1"),
)
_AUTOENCODER = (r"decoder_.*|mask_token|pos_embed_decoder|decoder\..*", "masked-autoencoder branch")
_CLASSIFIER = (r"(?:head|fc_norm|classifier|linear_head)\.(?:weight|bias)", "classifier, after the last block")
_MASK_TOKEN = (rf"{_HF_PART}mask_token", "token of masked patches, used only in training")
FINAL_NORM = "final norm, after the last block"


@dataclass(frozen=True)
class Layout:
    """A naming convention: ``rules`` rename tensors, ``drops`` name parts that a deployment leaves out.

    What no tensor shows is as in the project behind the layout, unless the file or a ``config.json`` says it.
    """

    name: str
    project: str  # whose files have it; this and the next two are for the documents (docs/families.py)
    known_by: str  # the tensors by which it is recognised
    example: str
    rules: Rules
    drops: Rules = ()
    layer_norm_eps: float = 1e-5
    rotary_base: float = 0.0  # 0: positions are learned
    model_type: str = ""  # in the config.json of Hugging Face's models
    # How the project resamples learned positions to another tile: torch's bicubic interpolation, with these settings.
    antialias: bool = False
    offset: float = 0.0  # added to the new side before the scale is computed


OURS = Layout(
    "cdkd-edge",
    "cdkd-edge",
    "`encoder.blocks.`",
    "written by `finetune`, `distill`",
    ((r"((?:encoder|head)\..*)", r"\1"),),
)
STUDENT = Layout(
    "Mask-CDKD student",
    "Mask-CDKD",
    "`blocks.`, no `cls_token`",
    "Mask-CDKD's published encoder",
    _VIT,
    (_AUTOENCODER,),
)
TIMM = Layout(
    "timm ViT",
    "timm",
    "`blocks.` and `cls_token`, `reg_token` or `norm.`",
    "`vit_small_patch16_224`, `vit_base_patch14_reg4_dinov2`; MAE, DeiT",
    _TIMM,
    (_AUTOENCODER, _CLASSIFIER),
    layer_norm_eps=1e-6,
    antialias=True,
)
TIMM_DINOV3 = Layout(
    "timm DINOv3",
    "timm",
    "`cls_token`, `reg_token`, no `pos_embed`",
    "`vit_small_patch16_dinov3`, `vit_small_plus_patch16_dinov3_qkvb`",
    _TIMM_DINOV3,
    (_CLASSIFIER,),
    rotary_base=100.0,
)
_DINO_DROPS = (
    _MASK_TOKEN,
    (rf"{_DINO_PART}(?:dino_head|ibot_head)\..*", "heads of self-supervised training"),
    (rf"{_DINO_PART}(?:local_)?cls_norm\..*", "norm of class tokens, after the last block"),
    _CLASSIFIER,
)
DINOV2 = Layout(
    "DINOv2",
    "facebookresearch",
    "`blocks.`, `mask_token`, `pos_embed`",
    "`dinov2_vits14_pretrain.pth`",
    _DINO,
    _DINO_DROPS,
    layer_norm_eps=1e-6,
    offset=0.1,
)
DINOV2_REGISTERS = Layout(
    "DINOv2 with registers",
    "facebookresearch",
    "the same and `register_tokens`",
    "`dinov2_vits14_reg4_pretrain.pth`",
    _DINO,
    _DINO_DROPS,
    layer_norm_eps=1e-6,
    antialias=True,
)
DINOV3 = Layout(
    "DINOv3",
    "facebookresearch",
    "`storage_tokens` or `rope_embed.periods`",
    "`dinov3_vits16_pretrain_lvd1689m.pth`",
    _DINO,
    _DINO_DROPS,
    rotary_base=100.0,
)
_HF_DROPS = (_MASK_TOKEN, _CLASSIFIER)
HF_DINOV2 = Layout(
    "Hugging Face DINOv2",
    "Hugging Face transformers",
    "`embeddings.position_embeddings`, `layer_scale1.lambda1`",
    "`facebook/dinov2-small`",
    _HF,
    _HF_DROPS,
    layer_norm_eps=1e-6,
    model_type="dinov2",
)
HF_DINOV2_REGISTERS = Layout(
    "Hugging Face DINOv2 with registers",
    "Hugging Face transformers",
    "the same and `embeddings.register_tokens`",
    "`facebook/dinov2-with-registers-small`",
    _HF,
    _HF_DROPS,
    layer_norm_eps=1e-6,
    model_type="dinov2_with_registers",
    antialias=True,
)
HF_DINOV3 = Layout(
    "Hugging Face DINOv3",
    "Hugging Face transformers",
    "`embeddings.patch_embeddings.weight`, `layer_scale1.lambda1`",
    "`facebook/dinov3-vits16-pretrain-lvd1689m`",
    _HF,
    _HF_DROPS,
    rotary_base=100.0,
    model_type="dinov3_vit",
)
OPENMMLAB = Layout(
    "OpenMMLab ViT",
    "OpenMMLab",
    "`backbone.layers.0.ln1.`",
    "mmsegmentation's `VisionTransformer`",
    (*_VIT, *_MM_VIT),
    # mmsegmentation's ViT+UPerNet configurations all set norm_cfg=dict(type="LN", eps=1e-6).
    layer_norm_eps=1e-6,
)

_SAM_PART = r"(?:(?:image|vision)_encoder\.)?"  # timm has none, nor have files of the image encoder alone
_SAM_BLOCK = rf"{_SAM_PART}(?:blocks|layers)\.(\d+)"
SAM = Layout(
    "SAM",
    "Segment Anything",
    "`rel_pos_h`",
    "`sam_vit_l_0b3195.pth`, as a teacher; Hugging Face's and timm's",
    (
        (rf"{_SAM_PART}pos_embed", r"encoder.pos_embed"),
        (rf"{_SAM_PART}patch_embed\.proj(?:ection)?\.(weight|bias)", r"encoder.patch_embed.proj.\1"),
        (rf"{_SAM_BLOCK}\.(?:layer_)?norm([12])\.(weight|bias)", r"encoder.blocks.\1.norm\2.\3"),
        (rf"{_SAM_BLOCK}\.attn\.((?:qkv|proj)\.(?:weight|bias)|rel_pos_[hw])", r"encoder.blocks.\1.attn.\2"),
        (rf"{_SAM_BLOCK}\.mlp\.(?:lin|fc)([12])\.(weight|bias)", r"encoder.blocks.\1.mlp.fc\2.\3"),
    ),
    (
        (rf"{_SAM_PART}(?:neck|head)\..*", "neck and head, after the last block"),
        (r"(?:prompt_encoder|shared_image_embedding)\..*", "prompt encoder"),
        (r"mask_decoder\..*", "mask decoder"),
    ),
    layer_norm_eps=1e-6,
)
LAYOUTS = (
    OURS, STUDENT, TIMM, TIMM_DINOV3, DINOV2, DINOV2_REGISTERS, DINOV3, HF_DINOV2, HF_DINOV2_REGISTERS, HF_DINOV3,
    OPENMMLAB, SAM,
)  # fmt: skip

_RELATIVES = (
    (r"(?:^|\.)patch_embed\.seq\.", "MobileSAM (TinyViT), whose image encoder is no plain ViT"),
    (r"(?:^|image_encoder\.)features\.0\.0\.c\.", "EdgeSAM (RepViT), whose image encoder is no plain ViT"),
    (r"(?:^|\.)(?:trunk|backbone)\..*pos_embed_window", "SAM 2 (Hiera), whose image encoder is no plain ViT"),
    (r"(?:^|\.)embeddings\.patch_embeddings\.projection\.", "a network of Hugging Face other than DINOv2 and DINOv3"),
    (
        r"(?:^|\.)(?:stages\.\d+\.layers|downsample_layers|stages\.\d+\.downsample)\.",
        "a network in stages, such as ConvNeXt",
    ),
)
"""Networks that are not read, by a key that only they have: mobile_sam/modeling/tiny_vit_sam.py,
edge_sam/modeling/rep_vit.py, sam2/modeling/backbones/hieradet.py, transformers' modeling_vit.py and
modeling_dinov3_convnext.py."""


@dataclass(frozen=True)
class Dropped:
    """A part of the checkpoint that the deployed network does not have."""

    what: str
    tensors: int  # how many
    example: str  # name of the first


def dropped_parts(keys_by_part: Mapping[str, list[str]]) -> tuple[Dropped, ...]:
    """The parts of the checkpoint that were dropped, from the keys of their tensors."""
    return tuple(Dropped(what, len(keys), keys[0]) for what, keys in keys_by_part.items())


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first of many names, and their number."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def recognise(keys: list[str]) -> Layout:
    """The layout of a set of keys; raises a CheckpointError if it is not known."""

    def any_starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    def any_is(pattern: str) -> bool:
        return any(re.fullmatch(pattern, key) for key in keys)

    if any_starts("encoder.blocks."):
        return OURS
    if any_is(rf"{_HF_BLOCK}\.layer_scale1\.lambda1"):
        if not any_is(rf"{_HF_PART}embeddings\.position_embeddings"):
            return HF_DINOV3
        return HF_DINOV2_REGISTERS if any_is(rf"{_HF_PART}embeddings\.register_tokens") else HF_DINOV2
    autoencoder = any_starts("decoder_embed.", "pos_embed_decoder")
    if any_is(rf"{_DINO_BLOCK}\..*") and not autoencoder:
        if any_is(rf"{_DINO_PART}(?:storage_tokens|rope_embed\.periods)"):
            return DINOV3
        if any_is(rf"{_DINO_PART}register_tokens"):
            return DINOV2_REGISTERS
        if any_is(rf"{_DINO_PART}(?:mask_token|blocks\.\d+\.\d+\..*)"):
            return DINOV2
    if any_is(r"layers\.\d+\.(?:ln[12]|attn\.attn|ffn)\..*"):
        return OPENMMLAB
    if any_starts("image_encoder.blocks.") or any(key.endswith(".attn.rel_pos_h") for key in keys):
        return SAM
    if any_starts("blocks."):
        if any_starts("reg_token") and any_starts("cls_token") and not any_starts("pos_embed"):
            return TIMM_DINOV3
        of_timm = any_starts("cls_token", "reg_token") or (any_starts("norm.", "fc_norm.") and not autoencoder)
        return TIMM if of_timm else STUDENT
    for pattern, name in _RELATIVES:
        if any(re.search(pattern, key) for key in keys):
            raise CheckpointError(
                f"the checkpoint is of {name}; only plain ViT blocks can be read or distilled from",
                hint="SAM's own vit_b, vit_l and vit_h can be teachers" if "SAM" in name else None,
            )
    raise CheckpointError(
        f"the checkpoint's layout is not known; it holds {len(keys)} tensors: {listed(keys, 6)}",
        hint=f"known layouts: {', '.join(layout.name for layout in LAYOUTS)}",
    )


def translate(state: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], tuple[Dropped, ...]]:
    """Rename a state dict to this package's names; returns it and what was dropped on purpose.

    Raises:
        CheckpointError: the layout does not know a key; the first dozen is listed.
    """
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        if target := _first_match(key, layout.rules):
            if target in renamed:
                raise CheckpointError(f"two tensors of the checkpoint both mean {target}; one is {key}")
            renamed[target] = tensor
        elif reason := _first_match(key, layout.drops):
            dropped.setdefault(reason, []).append(key)
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{layout.name} layout: {len(unknown)} unexpected tensors: {listed(unknown)}",
            hint="ignoring them would change the result; remove them only if the network was trained without them",
        )
    return renamed, dropped_parts(dropped)


def _first_match(key: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    return next((match.expand(text) for pattern, text in rules if (match := re.fullmatch(pattern, key))), None)
