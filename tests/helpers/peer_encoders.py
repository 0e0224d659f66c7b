"""Encoders of timm, transformers and facebookresearch, in small, with their own code; writes ``encoders.json``.

    python tests/helpers/peer_encoders.py DINOV2 DINOV3

DINOV2 and DINOV3 are clones of github.com/facebookresearch/dinov2 and dinov3, whose code is run and not copied. timm,
transformers and torch have to be installed (``make test-encoders``).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_files import BLOCKS, MEAN, RECORDED, STD, image_of, samples, weights_of

Maps = list[np.ndarray]


def import_peers() -> tuple[Any, Any]:
    """timm and transformers; raises an ImportError if they, or what they need, cannot be imported.

    Both import torchvision, whose compiled operators cannot be loaded beside another build of torch. They are declared
    for it, so that it can be imported; no encoder calls them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # it is there
            continue
    KEPT.append(library)
    try:
        import timm
        import transformers

        transformers.Dinov2Model, transformers.DINOv3ViTModel  # noqa: B018 -- imported on use
    except (RuntimeError, ImportError, AttributeError) as error:
        raise ImportError(f"timm and transformers cannot be imported: {str(error)[:200]}") from None
    transformers.utils.logging.disable_progress_bar()
    return timm, transformers


KEPT: list[Any] = []  # declarations end with their library


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """The network with the weights of :func:`weights_of`."""
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights_of(shapes).items()})
    return network.eval()


def pixels(tile: int) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(image_of(tile)) - mean) / std


def square(tokens: torch.Tensor, grid: int) -> np.ndarray:
    """Tokens ``[1, E+L, D]`` as a map ``[1, D, G, G]``."""
    return tokens[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid)).numpy()


@torch.inference_mode()
def features(network: torch.nn.Module, tile: int, patch: int) -> Maps:
    """Maps ``[1, D, G, G]`` after each of four blocks, before any norm after them."""
    found = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given, output: found.__setitem__(name, output[0] if isinstance(output, list) else output)

    pattern = r"(?:.*\.)?(?:blocks(?:\.\d+)?|layer)\.(\d+)"
    blocks = {
        match[1]: part
        for name, part in network.named_modules()
        if (match := re.fullmatch(pattern, name)) and hasattr(part, "norm1")
    }
    hooks = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    network(pixels(tile))
    for hook in hooks:
        hook.remove()
    assert sorted(found) == ["0", "1", "2", "3"]
    return [square(found[name], tile // patch) for name in sorted(found)]


SMALL = {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0}


def of_timm(timm: Any) -> dict[str, Callable[[], torch.nn.Module]]:
    """Networks of timm by family."""

    def make(name: str, side: int, **options: Any) -> Callable[[], torch.nn.Module]:
        given = {"img_size": side, "dynamic_img_size": True, **SMALL, **options}
        return lambda: filled(timm.create_model(name, pretrained=False, **given))

    return {
        "timm vit": make("vit_small_patch16_224", 128, num_classes=3),
        "timm vit gap": make("vit_small_patch16_224", 128, num_classes=3, class_token=False, global_pool="avg"),
        "timm dinov2": make("vit_small_patch14_dinov2", 112),
        "timm dinov2 giant": make("vit_giant_patch14_dinov2", 112, mlp_ratio=2.5),
        "timm reg4 dinov2": make("vit_small_patch14_reg4_dinov2", 112),
        "timm reg4": make("vit_small_patch16_224", 128, reg_tokens=4, num_classes=0),
        "timm qk norm": make("vit_small_patch16_224", 128, qk_norm=True, num_classes=0),
        "timm swiglu": make("vit_small_patch16_224", 128, mlp_layer=timm.layers.SwiGLU, act_layer=torch.nn.SiLU),
        "timm dinov3": make("vit_small_patch16_dinov3", 128),
        "timm dinov3 qkvb": make("vit_small_patch16_dinov3_qkvb", 128),
        "timm dinov3 plus": make("vit_small_plus_patch16_dinov3_qkvb", 128),
    }


SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}


def of_transformers(hf: Any) -> dict[str, Callable[[], torch.nn.Module]]:
    """Networks of transformers by family, without weights."""
    v2, v2_registers = {**SHAPE, "patch_size": 14, "image_size": 112, "mlp_ratio": 2}, {"num_register_tokens": 4}
    v3 = {**SHAPE, "patch_size": 16, "image_size": 128, "intermediate_size": 256, "num_register_tokens": 4}
    gated = {"use_gated_mlp": True, "hidden_act": "silu"}
    return {
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**v2)),
        "dinov2 giant": lambda: hf.Dinov2Model(hf.Dinov2Config(**v2, use_swiglu_ffn=True)),
        "dinov2 registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**v2, **v2_registers)),
        "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**v3)),
        "dinov3 plus": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**v3, **gated)),
    }


def small_dinov3(clone: Path, **options: Any) -> torch.nn.Module:
    """A DINOv3 of facebookresearch, from a clone of its repository; settings of its ``hub``."""
    sys.path.insert(0, str(clone))
    from dinov3.models.vision_transformer import DinoVisionTransformer

    settings = {k: v for k, v in SMALL.items() if k != "mlp_ratio"} | {
        "patch_size": 16, "ffn_ratio": 2, "pos_embed_rope_dtype": "fp32", "layerscale_init": 1e-5,
        "norm_layer": "layernormbf16", "n_storage_tokens": 4, "mask_k_bias": True,
    }  # fmt: skip
    return DinoVisionTransformer(**settings, **options)


def of_facebook(dinov2: Path, dinov3: Path) -> dict[str, Callable[[], torch.nn.Module]]:
    """Networks of facebookresearch by family, from clones of their repositories; settings of their ``hub``."""
    sys.path.insert(0, str(dinov2))
    from dinov2.models.vision_transformer import DinoVisionTransformer as Dinov2

    two = {**SMALL, "img_size": 112, "patch_size": 14, "init_values": 1.0, "block_chunks": 0}
    registers = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return {
        "dinov2": lambda: filled(Dinov2(**two)),
        "dinov2 giant": lambda: filled(Dinov2(**two, ffn_layer="swiglufused")),
        "dinov2 registers": lambda: filled(Dinov2(**two, **registers)),
        "dinov2 sharded": lambda: filled(Dinov2(**{**two, "block_chunks": 2})),
        "dinov3": lambda: filled(small_dinov3(dinov3)),
        "dinov3 plus": lambda: filled(small_dinov3(dinov3, ffn_layer="swiglu")),
        "dinov3 satellite": lambda: filled(small_dinov3(dinov3, untie_global_and_local_cls_norm=True)),
    }


def saved_by_transformers(make: Callable[[], Any], folder: Path) -> tuple[dict[str, list[int]], dict[str, Any], Any]:
    """The tensors and the configuration that transformers writes, and the network that it reads from such a file."""
    from safetensors.torch import load_file, save_file

    network = make()
    network.save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    save_file(
        {name: torch.from_numpy(np.array(value)) for name, value in weights_of(shapes).items()}, file, {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    return shapes, config, type(network).from_pretrained(folder).eval()


def record(
    network: torch.nn.Module, shapes: dict[str, list[int]] | None, config: dict[str, Any] | None
) -> dict[str, Any]:
    shapes = shapes or {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    patch = next(shape[-1] for name, shape in shapes.items() if "patch_embed" in name and len(shape) == 4)
    found = {}
    for grid in (8, 12, 6):
        maps = features(network, grid * patch, patch)
        found[str(grid * patch)] = [[round(float(value), 5) for value in samples(maps[block])] for block in BLOCKS]
    return {"tensors": shapes, "config": config, "features": found}


def all_families(timm: Any, hf: Any) -> dict[str, dict[str, Any]]:
    """What ``encoders.json`` holds of the packages."""
    found = {name: record(make(), None, None) for name, make in of_timm(timm).items()}
    for name, make in of_transformers(hf).items():
        with tempfile.TemporaryDirectory() as folder:
            shapes, config, network = saved_by_transformers(make, Path(folder))
        found[f"transformers {name}"] = record(network, shapes, config)
        found[f"transformers {name}, names of 5.x"] = record(filled(network), None, config)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    families = all_families(*import_peers())
    families |= {
        f"facebook {name}": record(make(), None, None) for name, make in of_facebook(*map(Path, sys.argv[1:3])).items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(family, separators=(',', ':'))}" for name, family in families.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
