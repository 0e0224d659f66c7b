"""A small network with random weights, as a graph and as an engine. None of it needs torch.

Session fixtures hand out paths and arrays that all tests share: copy before changing anything.
"""

from __future__ import annotations

import os

# Before NumPy and torch are imported: for matrices this small, threads do little but wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported; tests take nothing from the network

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from cdkd_edge.core import signals as interrupts
from cdkd_edge.core.labels import load_schema
from cdkd_edge.core.machine import library_versions
from cdkd_edge.core.manifest import (
    FileRecord,
    GraphCheck,
    GraphManifest,
    Preprocessing,
    write_manifest,
)
from cdkd_edge.engines import runtimes
from cdkd_edge.engines.onnxruntime import build_cpu_engine
from cdkd_edge.engines.tensorrt.find import NoGpu
from cdkd_edge.graph.build import build_graph
from cdkd_edge.model.config import NetworkConfig

# A suite that was started in the background ignores Ctrl-C, and so would every process that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's: 0.7 s for one of a few milliseconds, under an emulator or beside others.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]


def shape_table(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network and its shape, written down from the paper and not from the code."""
    dim, patch, channels, scales = config.embed_dim, config.patch, config.head_channels, len(config.pool_scales)
    tokens = (config.tile // patch) ** 2 + config.class_token
    shallow = len(config.tapped or range(4)) - 1
    table: dict[str, tuple[int, ...]] = {
        "encoder.patch_embed.proj.weight": (dim, 3, patch, patch),
        "encoder.patch_embed.proj.bias": (dim,),
    }
    if not config.rotary_base:
        table["encoder.pos_embed"] = (1, tokens, dim)
    if config.class_token:
        table["encoder.cls_token"] = (1, 1, dim)
    if config.registers:
        table["encoder.registers"] = (1, config.registers, dim)
    if config.final_norm != "none":
        table["encoder.norm.weight"] = table["encoder.norm.bias"] = (dim,)
    for index in range(config.depth):
        block = f"encoder.blocks.{index}"
        for norm in ("norm1", "norm2"):
            table[f"{block}.{norm}.weight"] = table[f"{block}.{norm}.bias"] = (dim,)
        for layer, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", config.mlp_dim * (2 if config.mlp == "swiglu" else 1), dim),
            ("mlp.fc2", dim, config.mlp_dim),
        ):
            table[f"{block}.{layer}.weight"] = (rows, columns)
            table[f"{block}.{layer}.bias"] = (rows,)
        if config.query_key_norm != "none":
            for part in ("weight", "bias") if config.query_key_norm == "layer" else ("weight",):
                table[f"{block}.attn.q_norm.{part}"] = table[f"{block}.attn.k_norm.{part}"] = (dim // config.heads,)
    units = {f"head.pooled.{i}": (dim, 1) for i in range(scales)}
    units["head.bottleneck"] = (dim + scales * channels, 3)
    lateral = dict.fromkeys(range(shallow), dim)
    if config.neck:
        inner, *enlarged = config.neck
        lateral |= enumerate(enlarged)
        for layer, inputs, outputs in (
            ("first", dim, inner),
            ("first_again", inner, enlarged[0]),
            ("second", dim, enlarged[1]),
        ):
            table[f"head.neck.{layer}.weight"], table[f"head.neck.{layer}.bias"] = (inputs, outputs, 2, 2), (outputs,)
        for part in ("weight", "bias", "running_mean", "running_var"):
            table[f"head.neck.bn.{part}"] = (inner,)
    units |= {f"head.laterals.{i}": (inputs, 1) for i, inputs in lateral.items()}
    units |= {f"head.smooth.{i}": (channels, 3) for i in range(shallow)}
    units["head.fuse"] = ((shallow + 1) * channels, 3)
    for unit, (inputs, kernel) in units.items():
        table[f"{unit}.conv.weight"] = (channels, inputs, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            table[f"{unit}.bn.{part}"] = (channels,)
    table["head.classifier.weight"] = (config.classes, channels, 1, 1)
    table["head.classifier.bias"] = (config.classes,)
    return table


def random_weights(config: NetworkConfig, seed: int = 0) -> Weights:
    """Random weights under which every part of the network matters: no zero, no identity, no uniform attention."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for key, shape in shape_table(config).items():
        value = rng.standard_normal(shape)
        if key.endswith("running_var"):
            value = rng.uniform(0.5, 2.0, shape)
        elif key.endswith("weight") and ("norm" in key or ".bn." in key):
            value = 1 + 0.2 * value
        elif key.endswith(("bias", "running_mean")):
            value *= 0.1
        elif key.endswith(("pos_embed", "cls_token", "registers", "classifier.weight")):
            value *= 0.5
        else:
            fan_in = np.prod(shape[1:])
            value *= (1.5 if "qkv" in key or "conv" in key else 1.0) / np.sqrt(fan_in)
        weights[key] = value.astype(np.float32)
    return weights


def store_graph(folder: Path, weights: Mapping[str, Array], config: NetworkConfig, **options: int) -> Path:
    """``folder``/small.onnx and its manifest, as `cdkd-edge export` leaves them; ``options`` as in build_graph."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.onnx"
    model = build_graph(weights, config, **options)
    onnx.save(model, path)
    schema = load_schema("dubai")
    assert len(schema) == config.classes
    manifest = GraphManifest(
        name="small",
        precision="fp32",
        artefact=FileRecord.of(path),
        checkpoint=FileRecord("small.pt", "0" * 64, 1),
        layout="random",
        labels=schema.to_document(),
        preprocessing=Preprocessing("RGB", config.pixel_mean, config.pixel_std),
        tile=config.tile,
        batch=options.get("batch", 1),
        opset=options.get("opset", 20),
        network=dataclasses.asdict(config),
        nodes=len(model.graph.node),
        check=GraphCheck(0, 0.0, 1.0, "none", f"onnxruntime {onnxruntime.__version__}"),
        libraries=library_versions(("onnx", "onnxruntime", "numpy")),
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture(autouse=True, scope="session")
def one_runtime_by_default() -> Iterator[None]:
    """So that `build` means ONNX Runtime, as the tests expect, also where there is a GPU with TensorRT, or OpenVINO.

    For the whole session: fixtures that modules share build engines before the first test starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "find_spec", lambda name: None)
        patch.setattr(runtimes, "find_gpu", lambda: NoGpu("the tests look for no GPU"))
        yield


@pytest.fixture(autouse=True)
def no_signal_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests send signals to their own process; the next test is a program that got none."""
    monkeypatch.setattr(interrupts, "_first", None)
    monkeypatch.setattr(interrupts, "_pending", None)


@pytest.fixture(scope="session")
def small_config() -> NetworkConfig:
    """64 px tiles, 8 x 8 tokens, one 64-wide head, the five classes of ``dubai``."""
    return NetworkConfig(tile=64, patch=8, embed_dim=64, depth=4, heads=1, mlp_dim=128, classes=5, head_channels=16)


@pytest.fixture(scope="session")
def small_weights(small_config: NetworkConfig, small_tiles: npt.NDArray[np.uint8]) -> Weights:
    """A state dict of the small network as FP32 arrays; its classifier is centred so that all classes occur."""
    weights = random_weights(small_config)
    model = build_graph(weights, small_config, batch=len(small_tiles))
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": small_tiles})
    weights["head.classifier.bias"] -= logits.mean(axis=(0, 2, 3))
    return weights


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Weights]:
    """``make_weights(config, seed=0)``: random weights of any network."""
    return random_weights


@pytest.fixture(scope="session")
def make_graph() -> Callable[..., Path]:
    """``make_graph(folder, weights, config, batch=..., opset=...)``: a graph file with its manifest."""
    return store_graph


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory, small_config: NetworkConfig, small_weights: Weights) -> Path:
    """An exported graph of the small network with its manifest beside it."""
    return store_graph(tmp_path_factory.mktemp("export"), small_weights, small_config)


@pytest.fixture(scope="session")
def small_engine_path(tmp_path_factory: pytest.TempPathFactory, small_graph: Path) -> Path:
    """A CPU engine of the small network with its manifest beside it."""
    path = tmp_path_factory.mktemp("engines") / "small.fp32.cpu.onnx"
    build_cpu_engine(small_graph, path)
    return path


@pytest.fixture(scope="session")
def small_tiles(small_config: NetworkConfig) -> npt.NDArray[np.uint8]:
    """Four tiles of smooth colour fields with noise, uint8 ``[4, 3, 64, 64]``; no two alike."""
    rng = np.random.default_rng(42)
    side = small_config.tile
    coarse = rng.uniform(0, 255, (4, 3, 5, 5))
    axis = np.linspace(0, 4, side)
    low = np.minimum(axis.astype(int), 3)
    part = axis - low
    rows = coarse[:, :, low] * (1 - part)[:, None] + coarse[:, :, low + 1] * part[:, None]
    smooth = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    noisy = smooth + rng.normal(0, 12, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
