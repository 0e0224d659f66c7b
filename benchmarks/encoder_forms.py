"""Whether FP16 and INT8 hold for other forms of a trained encoder: registers, rotary positions, large biases.

    python benchmarks/encoder_forms.py out/dubai.pt TILE.jpg ...

The checkpoint is a trained network with learned positions. Each row changes its encoder, whose weights and outliers
stay, and compares labels with those of FP32 on the upper left corner of each image, as `export` and `build --int8` do:
values rounded to FP16; INT8 calibrated on the same corners. Changed networks label worse than the trained one, and so
have more pixels that are almost ties; what counts is that nothing leaves FP16's range, that logits move no further than
rounding explains, and that INT8 loses no more than for the network as it was. At 512 px a row takes two minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import rasterio
from rasterio.windows import Window

from cdkd_edge.core.errors import NumericalCheckError
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.fp16 import check_fp16, to_fp16
from cdkd_edge.graph.int8 import calibrate, int8_graph
from cdkd_edge.model.checkpoint import load_checkpoint
from cdkd_edge.model.config import NetworkConfig

Weights = dict[str, npt.NDArray[np.float32]]


def with_registers(config: NetworkConfig, weights: Weights, count: int = 4) -> tuple[NetworkConfig, Weights]:
    """Registers like class tokens: of the same mean and spread."""
    token = weights["encoder.cls_token"]
    noise = np.random.default_rng(0).standard_normal((1, count, config.embed_dim))
    registers = (token.mean() + token.std() * noise).astype(np.float32)
    return dataclasses.replace(config, registers=count), {**weights, "encoder.registers": registers}


def with_rotary(config: NetworkConfig, weights: Weights) -> tuple[NetworkConfig, Weights]:
    """Rotary positions in place of the learned ones, whose mean stays."""
    changed = dict(weights)
    learned = changed.pop("encoder.pos_embed")
    bias = "encoder.patch_embed.proj.bias"
    changed[bias] = weights[bias] + learned[0, int(config.class_token) :].mean(axis=0)
    return dataclasses.replace(config, rotary_base=100.0), changed


def with_large_biases(config: NetworkConfig, weights: Weights, factor: float = 5.0) -> tuple[NetworkConfig, Weights]:
    """Biases of queries and keys that are ``factor`` times as large."""
    changed = dict(weights)
    for name in weights:
        if name.endswith("attn.qkv.bias"):
            changed[name] = weights[name].copy()
            changed[name][: 2 * config.embed_dim] *= np.float32(factor)
    return config, changed


def main() -> None:
    """Parse, compute, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tiles", type=Path, nargs="+")
    arguments = parser.parse_args()
    network, _ = load_checkpoint(arguments.checkpoint)
    config, weights = network.config, {key: value.numpy() for key, value in network.state_dict().items()}
    tiles = []
    for path in arguments.tiles:
        with rasterio.open(path) as image:
            tiles.append(image.read([1, 2, 3], window=Window(0, 0, config.tile, config.tile)))
    trained = (config, weights)
    forms = {
        "as trained": trained,
        "4 registers": with_registers(*trained),
        "rotary": with_rotary(*trained),
        "rotary, 4 registers": with_rotary(*with_registers(*trained)),
        "large biases": with_large_biases(*trained),
        "rotary, large biases": with_rotary(*with_large_biases(*trained)),
    }
    biases = [np.abs(value[: 2 * config.embed_dim]).max() for key, value in weights.items() if key.endswith("qkv.bias")]
    print(f"largest bias of queries and keys as trained: {max(biases):.3g}")
    titles = f"{'FP16 labels':>11} {'logits off':>10} {'allowed':>8} {'attention':>9} {'INT8 labels':>11}"
    print(f"{'form':22} {titles}   changes")
    for name, form in forms.items():
        print(f"{name:22} {row(*form, tiles)}", flush=True)


def row(config: NetworkConfig, weights: Weights, tiles: list[npt.NDArray[np.uint8]]) -> str:
    """What is found of one network."""
    plain = build_graph(weights, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.onnx"
        onnx.save(plain, path)
        try:
            half = check_fp16(path, to_fp16(plain), tiles, "tiles")
        except NumericalCheckError as error:
            return f"refused: {error.message}"
        found = calibrate(plain, tiles)  # type: ignore[arg-type]  # which counts and repeats them
        int8 = check_fp16(path, int8_graph(found.model, found.layers, found.scales), tiles, "tiles", least=0)
    changed = ", ".join(map(str, half.attention)) or "none"
    return (
        f"{half.label_agreement:11.3%} {half.max_logit_error:10.3g} {half.logit_tolerance:8.3g} "
        f"{half.attention_error:9.2%} {int8.label_agreement:11.2%}   {changed}"
    )


if __name__ == "__main__":
    main()
