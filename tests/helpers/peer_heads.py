"""Segmentation networks of other projects, in small, with their own code; writes ``heads.json``.

    python tests/helpers/peer_heads.py DINOV3

DINOV3 is a clone of github.com/facebookresearch/dinov3, which TerraTorch would download. timm, transformers,
segmentation-models-pytorch, mmsegmentation, mmengine, mmcv-lite and terratorch have to be installed; the last four may
be without what they need (``pip install --no-deps``), because packages that the arithmetic does not use are replaced by
empty ones.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoder_files import samples
from head_files import RECORDED, TILE
from peer_encoders import filled, import_peers, pixels, saved_by_transformers, small_dinov3

UNUSED = (
    "albumentations", "box", "fiona", "gdown", "geopandas", "granitewxc", "h5py", "jsonargparse", "kornia", "lightning",
    "mmcv.ops", "peft", "rasterio", "rioxarray", "terratorch.datamodules", "terratorch.datasets", "terratorch.tasks",
    "tifffile", "torchgeo", "torchmetrics", "wandb", "xarray",
)  # fmt: skip


class _Anything(type):
    """Classes whose attributes are such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {"__init__": lambda self, *_, **__: None, "__call__": lambda self, one: one})
        setattr(cls, name, made)
        return made

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *_, **__: None})


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty packages in place of :data:`UNUSED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        found = any(name == unused or name.startswith(f"{unused}.") for unused in UNUSED)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: Any) -> Any:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None: ...


VIT = {"img_size": TILE, "embed_dim": 128, "depth": 6, "num_heads": 2, "mlp_ratio": 2.0}
WIDTH = 16  # channels of the heads


def of_transformers(hf: Any) -> dict[str, Callable[[], Any]]:
    """``UperNetForSemanticSegmentation`` by name."""
    shape = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "patch_size": 16, "image_size": TILE}
    head = {"hidden_size": WIDTH, "auxiliary_in_channels": 128, "auxiliary_channels": 8}
    names = {"id2label": {0: "water", 1: "field", 2: "road"}, "label2id": {"water": 0, "field": 1, "road": 2}}

    def make(backbone: Any, **options: Any) -> Callable[[], Any]:
        return lambda: hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **head, **options))

    two = hf.Dinov2WithRegistersConfig(**shape, mlp_ratio=2, num_register_tokens=4, out_indices=[2, 4, 6])
    three = hf.DINOv3ViTConfig(**shape, intermediate_size=256, num_register_tokens=4, out_indices=[1, 2, 4, 6])
    plain = hf.Dinov2Config(**shape, mlp_ratio=2, out_indices=[3, 6], apply_layernorm=False)
    return {
        "three taps, DINOv2 with registers": make(two, pool_scales=[1, 2, 4], **names),
        "DINOv3": make(three, num_labels=5),
        "two taps without norm, DINOv2": make(plain, num_labels=2, use_auxiliary_head=False),
    }


def recorded(found: torch.Tensor) -> list[float]:
    return [round(float(value), 5) for value in samples(found.numpy())]


def shapes_of(network: torch.nn.Module) -> dict[str, list[int]]:
    state = network.state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def filled_head(network: torch.nn.Module) -> torch.nn.Module:
    """The network with the weights of ``weights_of``, statistics of BatchNorm included."""
    counts = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    filled(network)
    network.load_state_dict(counts, strict=False)
    return network


@torch.inference_mode()
def of_hf(hf: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for name, make in of_transformers(hf).items():
        with tempfile.TemporaryDirectory() as folder:
            shapes, config, network = saved_by_transformers(make, Path(folder))
        shapes = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
        logits = recorded(network(pixels(TILE)).logits)
        found[f"transformers, {name}"] = {"tensors": shapes, "config": config, "logits": logits}
    return found


@torch.inference_mode()
def of_smp(smp: Any, timm: Any) -> dict[str, dict[str, Any]]:
    """``smp.UPerNet`` around a timm ViT, which its own encoders cannot be: they refuse maps of one stride."""

    class Encoder(torch.nn.Module):
        output_stride, out_channels = 16, [3, 0, 128, 128, 128, 128]

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.model = timm.create_model(
                "vit_small_patch16_224", features_only=True, out_indices=(1, 2, 4, 5), **VIT
            ).model

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = self.model.forward_intermediates(x, indices=(1, 2, 4, 5), intermediates_only=True)
            return [x, x[:, :0], *maps]

        def set_in_channels(self, *_: Any, **__: Any) -> None: ...

    found = {}
    smp.encoders.encoders["own"] = {"encoder": Encoder, "params": {}, "pretrained_settings": {}}
    for name, options in {"": {}, ", no norm": {"decoder_use_norm": False}}.items():
        options = {"encoder_weights": None, "decoder_channels": WIDTH, "classes": 3, "upsampling": 16, **options}
        network = filled_head(smp.UPerNet("own", **options))
        found[f"smp{name}"] = {"tensors": shapes_of(network), "logits": recorded(network(pixels(TILE)))}
    return found


@torch.inference_mode()
def of_openmmlab() -> dict[str, dict[str, Any]]:
    """``VisionTransformer`` and ``UPerHead`` as an ``EncoderDecoder``, with the text of their configuration."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.models.backbones.vit import VisionTransformer  # noqa: F401 -- registers itself
    from mmseg.models.data_preprocessor import SegDataPreProcessor  # noqa: F401
    from mmseg.models.decode_heads.fcn_head import FCNHead  # noqa: F401
    from mmseg.models.decode_heads.uper_head import UPerHead  # noqa: F401
    from mmseg.models.necks.featurepyramid import Feature2Pyramid  # noqa: F401
    from mmseg.models.segmentors.encoder_decoder import EncoderDecoder

    DefaultScope.get_instance("peers", scope_name="mmseg")
    backbone = {
        "type": "VisionTransformer", "img_size": (TILE, TILE), "patch_size": 16, "embed_dims": 128, "num_layers": 6,
        "num_heads": 2, "mlp_ratio": 2, "norm_cfg": {"type": "LN", "eps": 1e-6},
    }  # fmt: skip
    norm = {"type": "BN", "requires_grad": True}
    head = {"type": "UPerHead", "channels": WIDTH, "num_classes": 3, "norm_cfg": norm, "dropout_ratio": 0.1}
    pixel = {
        "type": "SegDataPreProcessor", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True,
    }  # fmt: skip
    cases = {
        "four taps": ({"out_indices": (2, 3, 4, 5)}, {"in_channels": [128] * 4, "in_index": [0, 1, 2, 3]}),
        "three taps, corners aligned, final norm": (
            {"out_indices": (0, 1, 3, 5), "final_norm": True},
            {"in_channels": [128] * 3, "in_index": [0, 2, 3], "align_corners": True, "pool_scales": (1, 3)},
        ),
        "no norm in the head": (
            {"out_indices": (1, 5)},
            {"in_channels": [128] * 2, "in_index": [0, 1], "norm_cfg": None},
        ),
        "neck": (
            {"out_indices": (1, 2, 4, 5)},
            {"in_channels": [128] * 4, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2, 3)},
            {"type": "Feature2Pyramid", "embed_dim": 128, "norm_cfg": norm},
        ),
    }
    found = {}
    for name, (of_backbone, of_head, *neck) in cases.items():
        model = {
            "type": "EncoderDecoder", "data_preprocessor": pixel, "backbone": {**backbone, **of_backbone},
            "decode_head": {**head, "align_corners": False, **of_head}, "test_cfg": {"mode": "whole"},
        }  # fmt: skip
        model |= {"neck": neck[0]} if neck else {}
        config = Config({"model": model})
        arguments = {key: value for key, value in config.model.to_dict().items() if key != "type"}
        network = filled_head(EncoderDecoder(**arguments))
        shape = {"img_shape": (TILE, TILE)}
        logits = recorded(network.encode_decode(pixels(TILE), [shape]))
        document = {"meta": {"cfg": config.pretty_text, "dataset_meta": {"classes": ["water", "field", "road"]}}}
        found[f"openmmlab, {name}"] = {"tensors": shapes_of(network), "document": document, "logits": logits}
    return found


@torch.inference_mode()
def of_terratorch(dinov3: Path) -> dict[str, dict[str, Any]]:
    """What ``EncoderDecoderFactory`` makes of timm's ViTs and facebookresearch's DINOv3, as Lightning saves it."""
    from terratorch.models.encoder_decoder_factory import EncoderDecoderFactory

    vit = {"backbone": "vit_small_patch16_224", "backbone_pretrained": False}
    vit |= {f"backbone_{name}": value for name, value in VIT.items()}
    vit |= {"decoder": "UperNetDecoder", "decoder_channels": WIDTH, "num_classes": 3, "head_dropout": 0.1}
    select = [{"name": "SelectIndices", "indices": [0, 1, 3]}]
    torch.hub.load = lambda *_, **__: small_dinov3(dinov3)
    tokens = [{"name": "SelectIndices", "indices": [1, 3]}, {"name": "ReshapeTokensToImage"}]
    smp = {"decoder": "smp_UPerNet", "backbone_out_indices": [0, 1, 2, 4, 5]}
    cases = {
        "timm's last three blocks": {},
        "selected": {"backbone_out_indices": [0, 2, 3, 5], "necks": select, "decoder_pool_scales": [1, 2]},
        "in kwargs, corners not aligned": {
            "backbone_kwargs": {"pretrained": False, **VIT, "out_indices": [-5, -3, -2]},
            "decoder_kwargs": {"channels": WIDTH, "align_corners": False, "pool_scales": [1, 2, 4, 6]},
        },
        "neck": {
            "backbone_out_indices": [1, 2, 4, 5],
            "necks": [{"name": "LearnedInterpolateToPyramidal"}],
            "decoder_pool_scales": [1, 2, 3],
        },
        "neck, corners not aligned": {
            "backbone_out_indices": [0, 2, 3, 4, 5],
            "necks": [{"name": "SelectIndices", "indices": [0, 1, 3, 4]}, {"name": "LearnedInterpolateToPyramidal"}],
            "decoder_pool_scales": [1, 3],
            "decoder_align_corners": False,
        },
        "smp": {**smp},
        "DINOv3 of facebookresearch": {"backbone": "dinov3_vits16", "necks": tokens},
        "DINOv3": {"backbone": "vit_small_patch16_dinov3", "backbone_out_indices": [1, 2, 4, 5]},
    }
    found = {}
    for name, changes in cases.items():
        arguments = {**vit, **changes}
        if "backbone_kwargs" in changes:
            plain = {key: value for key, value in vit.items() if not key.startswith(("backbone_", "decoder_"))}
            arguments = {**plain, **changes}
        if "dinov3_vits16" in arguments["backbone"]:
            arguments = {key: value for key, value in arguments.items() if not key.startswith("backbone_")}
            arguments |= {"backbone_ckpt_path": None, "backbone_return_cls_token": False}
        if name == "smp":
            arguments["decoder_decoder_channels"] = arguments.pop("decoder_channels")
        network = filled_head(EncoderDecoderFactory().build_model("segmentation", **json.loads(json.dumps(arguments))))
        hyper = {"model_factory": "EncoderDecoderFactory", "model_args": arguments, "class_names": ["a", "b", "c"]}
        tensors = {f"model.{key}": shape for key, shape in shapes_of(network).items()}
        logits = recorded(network(pixels(TILE)).output)
        found[f"terratorch, {name}"] = {"tensors": tensors, "document": {"hyper_parameters": hyper}, "logits": logits}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.meta_path.insert(0, _Empty())
    timm, hf = import_peers()
    import segmentation_models_pytorch as smp

    heads = {**of_hf(hf), **of_smp(smp, timm), **of_openmmlab(), **of_terratorch(Path(sys.argv[1]))}
    lines = [f"{json.dumps(name)}: {json.dumps(head, separators=(',', ':'))}" for name, head in heads.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
