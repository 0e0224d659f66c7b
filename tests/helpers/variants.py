"""Networks of every form, small enough for loops in Python, and what the reference has to be told about them."""

from __future__ import annotations

from typing import Any

from cdkd_edge.model.config import NetworkConfig

_SMALL: dict[str, Any] = {"tile": 64, "patch": 8, "embed_dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64}
_SMALL |= {"classes": 3, "head_channels": 8}

VARIANTS = {
    "one head": NetworkConfig(
        tile=64, patch=8, embed_dim=64, depth=4, heads=1, mlp_dim=128, classes=5, head_channels=16
    ),
    "class token": NetworkConfig(
        tile=96, patch=16, embed_dim=32, depth=4, heads=2, mlp_dim=64, classes=2, head_channels=8, class_token=True
    ),
    "heads, odd grid, eight blocks, eps": NetworkConfig(
        tile=56, patch=8, embed_dim=48, depth=8, heads=3, mlp_dim=96, classes=3, head_channels=8, layer_norm_eps=1e-2
    ),
    "other pyramid": NetworkConfig(**{**_SMALL, "classes": 4}, pool_scales=(1, 5, 8)),
    "windows": NetworkConfig(**_SMALL, attention=("window 4", "global", "window 2", "window 4")),
    "pooled keys": NetworkConfig(
        **{**_SMALL, "depth": 5}, attention=("pooled 2", "global", "pooled 4", "pooled 2", "pooled 2")
    ),
    "windows and pooled keys": NetworkConfig(
        **{**_SMALL, "tile": 96}, attention=("window 6", "pooled 3", "window 6", "pooled 3")
    ),
    "registers": NetworkConfig(**_SMALL, registers=3),
    "class token and registers": NetworkConfig(**_SMALL, class_token=True, registers=2),
    "rotary": NetworkConfig(**_SMALL, rotary_base=100.0),
    "DINOv3": NetworkConfig(**_SMALL, class_token=True, registers=4, rotary_base=100.0, final_norm="taps"),
    "rotary in windows": NetworkConfig(
        **_SMALL, rotary_base=20.0, attention=("window 4", "global", "window 2", "global")
    ),
    "layer norm of queries and keys": NetworkConfig(**_SMALL, query_key_norm="layer"),
    "RMS norm of queries and keys": NetworkConfig(**_SMALL, query_key_norm="rms", registers=1),
    "rotary, norms of queries and keys": NetworkConfig(**_SMALL, rotary_base=50.0, query_key_norm="layer"),
    "rotary in windows, RMS norm of queries and keys": NetworkConfig(
        **_SMALL, rotary_base=50.0, query_key_norm="rms", attention=("window 4", "window 4", "global", "window 4")
    ),
    "norms of queries and pooled keys": NetworkConfig(
        **_SMALL, query_key_norm="layer", attention=("window 4", "pooled 2", "window 4", "global")
    ),
    "SwiGLU": NetworkConfig(**_SMALL, mlp="swiglu"),
    "final norm of the last tap": NetworkConfig(**_SMALL, final_norm="last"),
    "final norm, extra tokens": NetworkConfig(**_SMALL, final_norm="last", class_token=True, registers=1),
    "three taps": NetworkConfig(**_SMALL, tapped=(0, 2, 3)),
    "two taps before the end, final norm": NetworkConfig(**_SMALL, tapped=(1, 2), final_norm="taps"),
    "three taps, corners aligned": NetworkConfig(
        **{**_SMALL, "tile": 56, "depth": 6}, tapped=(0, 3, 5), pool_scales=(1, 2, 4), align_corners="all"
    ),
    "neck": NetworkConfig(**_SMALL, neck=(24, 12, 16), pool_scales=(1, 2, 4), class_token=True),
    "neck, odd patches, corners aligned": NetworkConfig(
        **{**_SMALL, "tile": 84, "patch": 14, "depth": 6},
        neck=(32, 32, 32),
        pool_scales=(1, 3),
        align_corners="pools",
        tapped=(1, 2, 4, 5),
        final_norm="taps",
    ),
    "neck and windows": NetworkConfig(
        **_SMALL, neck=(16, 8, 16), pool_scales=(1, 2, 4), attention=("window 4", "pooled 2", "window 4", "global")
    ),
    "own pixel statistics": NetworkConfig(**_SMALL, pixel_mean=(10.0, 120.0, 200.0), pixel_std=(40.0, 50.0, 90.0)),
    "one class, five blocks": NetworkConfig(
        tile=48, patch=8, embed_dim=32, depth=5, heads=4, mlp_dim=40, classes=1, head_channels=4
    ),
}


def head_options(config: NetworkConfig) -> dict[str, Any]:
    """What :func:`reference.reference_logits` cannot read from the weights, besides the encoder's."""
    return {"scales": config.pool_scales, "align": config.pools_align, **encoder_options(config)}


def encoder_options(config: NetworkConfig) -> dict[str, Any]:
    """What :func:`reference.reference_features` cannot read from the weights."""
    return {
        "heads": config.heads, "eps": config.layer_norm_eps, "attention": config.attention,
        "rotary_base": config.rotary_base, "tapped": config.tapped, "final_norm": config.final_norm,
        "mean": config.pixel_mean, "std": config.pixel_std,
    }  # fmt: skip
