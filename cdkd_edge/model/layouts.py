"""How other projects name and shape the same weights, and the translation to this package's network.

A layout is a list of renaming rules and a list of parts that a deployment drops, each with its reason. A key
that no rule knows is an error: ignoring a tensor would give wrong maps.

Sources of the names: Mask-CDKD ``student_vit_mae.py`` (github.com/whujader/mask_cdkd); timm
``vision_transformer.py`` and ``vision_transformer_sam.py``; OpenMMLab mmsegmentation ``vit.py`` and
``uper_head.py``; SAM ``image_encoder.py`` (github.com/facebookresearch/segment-anything); Hugging Face transformers
``modeling_sam.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_VIT = (
    (r"(patch_embed\.proj\.(?:weight|bias)|pos_embed|cls_token)", r"encoder.\1"),
    (r"(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))", r"encoder.\1"),
    (r"(blocks\.\d+)\.(?:ls1\.gamma|gamma_1)", r"encoder.\1.scale1"),
    (r"(blocks\.\d+)\.(?:ls2\.gamma|gamma_2)", r"encoder.\1.scale2"),
)
_MM_VIT = (
    (r"patch_embed\.projection\.(weight|bias)", r"encoder.patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(weight|bias)", r"encoder.blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)", r"encoder.blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(weight|bias)", r"encoder.blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"encoder.blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"encoder.blocks.\1.mlp.fc2.\2"),
)
_UNIT = r"(conv\.weight|bn\.(?:weight|bias|running_mean|running_var))"
_MM_HEAD = (
    (rf"decode_head\.psp_modules\.(\d+)\.1\.{_UNIT}", r"head.pooled.\1.\2"),
    (rf"decode_head\.bottleneck\.{_UNIT}", r"head.bottleneck.\1"),
    (rf"decode_head\.lateral_convs\.(\d+)\.{_UNIT}", r"head.laterals.\1.\2"),
    (rf"decode_head\.fpn_convs\.(\d+)\.{_UNIT}", r"head.smooth.\1.\2"),
    (rf"decode_head\.fpn_bottleneck\.{_UNIT}", r"head.fuse.\1"),
    (r"decode_head\.conv_seg\.(weight|bias)", r"head.classifier.\1"),
)
_AUTOENCODER = (r"decoder_.*|mask_token|pos_embed_decoder|decoder\..*", "masked-autoencoder branch")
_CLASSIFIER = (r"(?:head|fc_norm|norm)\..*", "final norm and classifier, after the last tapped block")


@dataclass(frozen=True)
class Layout:
    """A naming convention: ``rules`` rename tensors, ``drops`` name parts that a deployment leaves out."""

    name: str
    rules: tuple[tuple[str, str], ...]
    drops: tuple[tuple[str, str], ...] = ()
    layer_norm_eps: float = 1e-5  # layerNorm's epsilon in the project behind the layout; no checkpoint stores it


OURS = Layout("cdkd-edge", ((r"((?:encoder|head)\..*)", r"\1"),))
STUDENT = Layout("Mask-CDKD student", _VIT, (_AUTOENCODER,))
TIMM = Layout("timm ViT", _VIT, (_AUTOENCODER, _CLASSIFIER), layer_norm_eps=1e-6)
OPENMMLAB = Layout(
    "OpenMMLab",
    (*((rf"backbone\.{pattern}", name) for pattern, name in (*_VIT, *_MM_VIT)), *_MM_HEAD),
    ((r"auxiliary_head\..*", "auxiliary head, used only in training"),),
    # mmsegmentation's ViT+UPerNet configurations all set norm_cfg=dict(type="LN", eps=1e-6).
    layer_norm_eps=1e-6,
)

_SAM_PART = r"(?:(?:image|vision)_encoder\.)?"  # timm has none, nor have files of the image encoder alone
_SAM_BLOCK = rf"{_SAM_PART}(?:blocks|layers)\.(\d+)"
SAM = Layout(
    "SAM",
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
_SAM_RELATIVES = (
    (r"(?:^|\.)patch_embed\.seq\.", "MobileSAM (TinyViT)"),  # mobile_sam/modeling/tiny_vit_sam.py
    (r"(?:^|image_encoder\.)features\.0\.0\.c\.", "EdgeSAM (RepViT)"),  # edge_sam/modeling/rep_vit.py
    (r"(?:^|\.)(?:trunk|backbone)\..*pos_embed_window", "SAM 2 (Hiera)"),  # sam2/modeling/backbones/hieradet.py
)
"""Networks that are called SAM but have no plain ViT blocks, by a key that only they have."""


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

    if any_starts("encoder.blocks."):
        return OURS
    if any_starts("backbone.blocks.", "backbone.layers."):
        return OPENMMLAB
    if any_starts("image_encoder.blocks.") or any(key.endswith(".attn.rel_pos_h") for key in keys):
        return SAM
    if any_starts("blocks."):
        autoencoder = any_starts("decoder_embed.", "pos_embed_decoder")
        return TIMM if any_starts("cls_token") or (any_starts("norm.", "fc_norm.") and not autoencoder) else STUDENT
    for pattern, name in _SAM_RELATIVES:
        if any(re.search(pattern, key) for key in keys):
            raise CheckpointError(
                f"the checkpoint is of {name}, whose image encoder is no plain ViT: it has no blocks to distil from",
                hint="SAM's own vit_b, vit_l and vit_h can be teachers",
            )
    raise CheckpointError(
        f"the checkpoint's layout is not known; it holds {len(keys)} tensors: {listed(keys, 6)}",
        hint="known layouts: cdkd-edge, Mask-CDKD student, timm ViT names, OpenMMLab backbone. + decode_head., SAM",
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
