"""The few numbers that define the network. Needs no torch, so that graphs can be built without it."""

from __future__ import annotations

from dataclasses import dataclass

from cdkd_edge.core.errors import CheckpointError

HEAD_DIM = 64
"""Width of an attention head where nothing else is said (ViT-S/B/L and the paper's student)."""

MAX_GRID = 512
"""Patches along a side beyond which attention over all of them is out of reach, and a typing error likely."""

MAX_DEPTH = 256
"""Blocks beyond which a file is no network: the deepest ViT has 48, and a block takes milliseconds to set up."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""RGB statistics on 0..255 that SAM and the Mask-CDKD student are trained with."""


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a ViT encoder with a UPerNet head.

    Defaults are the Mask-CDKD paper's student (ISPRS 2026): ViT-S/16 at 1024x1024 px without class
    token or final norm, UPerNet with 256 channels.

    Raises:
        CheckpointError: the numbers do not describe a network (a tile that is not a multiple of the
            patch, a width that the heads do not divide, fewer than four blocks).
    """

    tile: int = 1024
    """Side of a square input, px."""
    patch: int = 16
    """Side of a patch, px; also the stride of the logits."""
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int = 1536
    classes: int = 7
    head_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    layer_norm_eps: float = 1e-5
    class_token: bool = False
    """timm and OpenMMLab encoders carry one; the paper's student does not."""

    def __post_init__(self) -> None:
        for size in ("tile", "patch", "embed_dim", "heads", "mlp_dim", "classes", "head_channels"):
            if getattr(self, size) < 1:
                raise CheckpointError(f"{size} of a network is at least 1, not {getattr(self, size)}")
        if not 0 < self.layer_norm_eps < 1:
            raise CheckpointError(f"LayerNorm's epsilon lies between 0 and 1; {self.layer_norm_eps:g} does not")
        if self.tile % self.patch:
            raise CheckpointError(f"a tile of {self.tile} px is not a multiple of the {self.patch} px patch")
        if self.grid > MAX_GRID:
            raise CheckpointError(f"a tile of {self.tile} px has {self.grid**2} patches; {MAX_GRID**2} are possible")
        if self.embed_dim % self.heads:
            raise CheckpointError(f"{self.heads} attention heads do not divide a width of {self.embed_dim}")
        if self.depth < 4:
            raise CheckpointError(f"UPerNet taps four blocks; the encoder has {self.depth}")
        if self.depth > MAX_DEPTH:
            raise CheckpointError(f"{self.depth} transformer blocks are more than any ViT's; {MAX_DEPTH} are possible")
        if self.classes > 255:
            raise CheckpointError(f"{self.classes} classes do not fit uint8 labels with 255 as 'no label'")
        if not self.pool_scales or min(self.pool_scales) < 1 or max(self.pool_scales) > self.grid:
            raise CheckpointError(
                f"pyramid pooling to {self.pool_scales} cells needs a larger tile than {self.tile} px "
                f"({self.grid} x {self.grid} patches)"
            )

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
