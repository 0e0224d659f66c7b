"""How other projects name the same weights, and the translation to ours.

Every layout is a list of renaming rules and a list of parts that a deployment drops, each with its
reason. A key that no rule knows is reported, never skipped: a silently ignored tensor is a wrong map.

Sources of the names: Mask-CDKD ``student_vit_mae.py`` (github.com/whujader/mask_cdkd); timm
``vision_transformer.py``; OpenMMLab mmsegmentation ``vit.py`` and ``uper_head.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from cdkd_edge.core.errors import CheckpointError

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
    """A naming convention: ``rules`` rename, ``drops`` name what a deployment leaves behind."""

    name: str
    rules: tuple[tuple[str, str], ...]
    drops: tuple[tuple[str, str], ...] = ()
    layer_norm_eps: float = 1e-5
    """What the project behind the layout builds its LayerNorm with; no checkpoint stores it."""


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


@dataclass(frozen=True)
class Dropped:
    """A part of the checkpoint that the deployed network does not have."""

    what: str
    tensors: int
    example: str


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first names of many, and how many there are."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


def recognise(keys: list[str]) -> Layout:
    """The layout that a set of keys is written in.

    Raises:
        CheckpointError: none of the known ones.
    """

    def any_starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if any_starts("encoder.blocks."):
        return OURS
    if any_starts("backbone.blocks.", "backbone.layers."):
        return OPENMMLAB
    if any_starts("blocks."):
        if any_starts("decoder_embed.", "pos_embed_decoder") and not any_starts("cls_token"):
            return STUDENT
        return TIMM if any_starts("cls_token", "norm.", "fc_norm.") else STUDENT
    raise CheckpointError(
        f"the checkpoint's layout is not known; it holds {len(keys)} tensors: {listed(keys, 6)}",
        hint="known layouts: cdkd-edge, Mask-CDKD student, timm ViT names, OpenMMLab backbone. + decode_head.",
    )


def translate(state: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], tuple[Dropped, ...]]:
    """Rename a state dict to our names.

    Returns:
        The renamed tensors, and what was dropped on purpose.

    Raises:
        CheckpointError: keys that the layout does not explain; the first dozen is listed.
    """
    renamed: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        target = _first_match(key, layout.rules)
        if target is not None:
            if target in renamed:
                raise CheckpointError(f"two tensors of the checkpoint both mean {target}; one is {key}")
            renamed[target] = tensor
        elif reason := next((why for pattern, why in layout.drops if re.fullmatch(pattern, key)), None):
            dropped.setdefault(reason, []).append(key)
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{layout.name} layout: {len(unknown)} unexpected tensors: {listed(unknown)}",
            hint="these would change the result, so they are not ignored; remove them only if the network "
            "was trained without them",
        )
    return renamed, tuple(Dropped(why, len(keys), keys[0]) for why, keys in dropped.items())


def _first_match(key: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None
