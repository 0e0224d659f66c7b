"""The numbers that define the network. Needs no torch, so that graphs can be built without it."""

from __future__ import annotations

from dataclasses import dataclass

from cdkd_edge.core.errors import CheckpointError

HEAD_DIM = 64  # width of an attention head unless given (ViT-S/B/L and the paper's student)

MAX_GRID = 512  # most patches along a side: attention over more is out of reach, and a typing error likely

MIN_DEPTH, MAX_DEPTH = 4, 256
"""Transformer blocks: UPerNet taps four; the deepest ViT has 48, and a block takes milliseconds to set up."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)  # RGB statistics on 0..255 that SAM and the Mask-CDKD student are trained with


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a ViT encoder with a UPerNet head.

    Defaults are the Mask-CDKD paper's student (ISPRS 2026): ViT-S/16 at 1024x1024 px without class
    token or final norm, UPerNet with 256 channels.

    Raises:
        CheckpointError: the numbers do not describe a network; names the field.
    """

    tile: int = 1024  # side of a square input, px
    patch: int = 16  # side of a patch, px; also the stride of the logits
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int = 1536
    classes: int = 7
    head_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    layer_norm_eps: float = 1e-5
    class_token: bool = False  # timm and OpenMMLab encoders carry one; the paper's student does not

    def __post_init__(self) -> None:
        for name in ("tile", "patch", "embed_dim", "heads", "mlp_dim", "classes", "head_channels"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.layer_norm_eps < 1:
            raise CheckpointError(f"layer_norm_eps must be between 0 and 1, not {self.layer_norm_eps:g}")
        if self.tile % self.patch:
            raise CheckpointError(f"tile {self.tile} is not divisible by patch {self.patch}")
        if self.grid > MAX_GRID:
            raise CheckpointError(f"tile {self.tile} is larger than {MAX_GRID} patches of {self.patch} px")
        if self.embed_dim % self.heads:
            raise CheckpointError(f"embed_dim {self.embed_dim} is not divisible by heads {self.heads}")
        if not MIN_DEPTH <= self.depth <= MAX_DEPTH:
            raise CheckpointError(f"depth {self.depth} is not {MIN_DEPTH} to {MAX_DEPTH} blocks")
        if self.classes > 255:
            raise CheckpointError(f"classes {self.classes} do not fit uint8 labels, where 255 is 'no label'")
        if not self.pool_scales or min(self.pool_scales) < 1 or max(self.pool_scales) > self.grid:
            raise CheckpointError(f"pool_scales {self.pool_scales} must be 1 to {self.grid}: a tile's side in patches")

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def taps(self) -> tuple[int, int, int, int]:
        """0-based blocks whose outputs feed the head: four, evenly spaced, the last block included."""
        first, second, third, fourth = (self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
        return first, second, third, fourth


PRESETS: dict[str, NetworkConfig] = {
    "paper": NetworkConfig(),
    "tiny": NetworkConfig(tile=256, patch=8, embed_dim=128, depth=6, heads=2, mlp_dim=512, classes=5, head_channels=64),
}
