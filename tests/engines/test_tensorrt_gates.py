"""What NVIDIA's compiler makes of the paper's network, without a GPU: the figures the speed on the board rests on.

TensorRT-RTX parses and compiles the graphs for SM 8.6 (it has no SM 8.7, Orin's); nothing is run.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from tensorrt_helpers import (
    LayerLimits,
    break_attention,
    exceeded,
    half_graph,
    int8_variant,
    needs_compiler,
    store_variant,
)

from cdkd_edge.core.manifest import AttentionChange, EngineManifest, EngineTensor
from cdkd_edge.engines.inspect import inspect_artefact
from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
from cdkd_edge.engines.tensorrt.layers import EngineLayers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.graph.files import derived_path
from cdkd_edge.graph.fp16_attention import change_attention
from cdkd_edge.graph.layers import parts_of
from cdkd_edge.graph.outputs import write_variant
from cdkd_edge.model.config import NetworkConfig, attention_of

pytestmark = [pytest.mark.slow, needs_compiler]

FP16_LIMITS = LayerLimits(attention_blocks=12, layers=105, traffic_bytes=1.10e9, scratch_bytes=64e6)
INT8_LIMITS = LayerLimits(attention_blocks=12, layers=131, traffic_bytes=1.32e9, scratch_bytes=64e6)
INT8_SIZE = 0.33
"""Of the FP32 graph's file."""
SM86 = TensorRTOptions(targets=("8.6",))
TILES_AND_LABELS = (
    EngineTensor("image", "uint8", (1, 3, 1024, 1024)),
    EngineTensor("labels", "uint8", (1, 1024, 1024)),
)


def compiled(graph: Path) -> tuple[EngineManifest, EngineLayers]:
    """A graph built for SM 8.6: manifest, and layers as they were written beside the engine."""
    engine = graph.parent / "engines" / f"{graph.stem}.engine"
    manifest = build_tensorrt_engine(graph, engine, SM86)
    layers = inspect_artefact(engine).contents
    assert isinstance(layers, EngineLayers)
    return manifest, layers


@pytest.fixture(scope="module")
def paper_graph(
    tmp_path_factory: pytest.TempPathFactory, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> Path:
    """The paper's network in FP32; random weights, which do not change what the compiler does."""
    config = NetworkConfig(classes=5)
    return make_graph(tmp_path_factory.mktemp("paper"), make_weights(config), config)


@pytest.fixture(scope="module")
def shallow_graph(
    tmp_path_factory: pytest.TempPathFactory, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> Path:
    """The same with four of its twelve blocks, where their number does not matter."""
    config = NetworkConfig(classes=5, depth=4)
    return make_graph(tmp_path_factory.mktemp("shallow"), make_weights(config), config)


@pytest.fixture(scope="module")
def half(paper_graph: Path) -> Path:
    return half_graph(paper_graph)


def test_fp16_keeps_the_limits(half: Path) -> None:
    manifest, layers = compiled(half)
    assert exceeded(layers, FP16_LIMITS) == []
    assert layers.unfused_attention == ()
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.tensors == TILES_AND_LABELS
    assert manifest.tensorrt.strongly_typed
    assert layers.precisions["fp16"] == len(layers.layers)
    assert sum(layer.traffic_bytes > 30e6 for layer in layers.layers) == 0, "no scores in memory"


def test_fewer_taps_and_aligned_corners_cost_no_layer(
    tmp_path: Path, shallow_graph: Path, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> None:
    config = NetworkConfig(classes=5, depth=4, tapped=(0, 2, 3), pool_scales=(1, 3), align_corners="all")
    manifest, layers = compiled(half_graph(make_graph(tmp_path, make_weights(config), config)))
    assert (manifest.attention_fused, manifest.attention_blocks) == (4, 4)
    assert len(layers.layers) < len(compiled(half_graph(shallow_graph))[1].layers)


def test_a_neck_moves_little_but_its_large_maps(
    tmp_path: Path, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> None:
    """A map of 256 channels on four times the grid is 34 MB in FP16."""
    config = NetworkConfig(classes=5, depth=4, neck=(192, 96, 192))
    manifest, layers = compiled(half_graph(make_graph(tmp_path, make_weights(config), config)))
    assert (manifest.attention_fused, manifest.attention_blocks) == (4, 4)
    assert exceeded(layers, LayerLimits(attention_blocks=4, layers=85, traffic_bytes=1.26e9, scratch_bytes=320e6)) == []


VARIANTS = {
    # Windows cost one layer for the whole network; pooled keys cost two in each block that has them.
    "window16/global": LayerLimits(attention_blocks=12, layers=106, traffic_bytes=1.11e9, scratch_bytes=64e6),
    "pooled2": LayerLimits(attention_blocks=12, layers=130, traffic_bytes=1.05e9, scratch_bytes=64e6),
    "window16/pooled2": LayerLimits(attention_blocks=12, layers=114, traffic_bytes=1.09e9, scratch_bytes=64e6),
}


@pytest.mark.parametrize("text", VARIANTS)
def test_windows_and_pooled_keys_are_fused_without_copies(
    tmp_path: Path, make_graph: Callable[..., Path], make_weights: Callable[..., object], text: str
) -> None:
    config = NetworkConfig(classes=5)
    config = dataclasses.replace(config, attention=attention_of(text, config.depth, config.taps))
    manifest, layers = compiled(half_graph(make_graph(tmp_path, make_weights(config), config)))
    assert exceeded(layers, VARIANTS[text]) == []
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)


DINOV3 = NetworkConfig(classes=5, class_token=True, registers=4, rotary_base=100.0, final_norm="taps")
FORMS = {
    "class token, registers": (
        NetworkConfig(classes=5, class_token=True, registers=4),
        LayerLimits(attention_blocks=12, layers=104, traffic_bytes=1.10e9, scratch_bytes=64e6),
    ),
    # One kernel a block turns queries and keys; the deepest map has a norm of its own.
    "DINOv3": (DINOV3, LayerLimits(attention_blocks=12, layers=116, traffic_bytes=1.33e9, scratch_bytes=64e6)),
    "rotary in windows": (
        NetworkConfig(
            classes=5, rotary_base=100.0, attention=attention_of("window16/global", 12, NetworkConfig().taps)
        ),
        LayerLimits(attention_blocks=12, layers=116, traffic_bytes=1.33e9, scratch_bytes=64e6),
    ),
    "norms of queries and keys": (
        NetworkConfig(classes=5, query_key_norm="layer"),
        LayerLimits(attention_blocks=12, layers=151, traffic_bytes=1.55e9, scratch_bytes=64e6),
    ),
    "SwiGLU": (
        NetworkConfig(classes=5, mlp="swiglu", mlp_dim=1024),
        LayerLimits(attention_blocks=12, layers=115, traffic_bytes=1.39e9, scratch_bytes=64e6),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_encoders_are_fused_as_well(
    tmp_path: Path, make_graph: Callable[..., Path], make_weights: Callable[..., object], form: str
) -> None:
    config, limits = FORMS[form]
    manifest, layers = compiled(half_graph(make_graph(tmp_path, make_weights(config), config)))
    assert exceeded(layers, limits) == []
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)


def test_int8_of_dinov3_keeps_its_limits(
    tmp_path: Path, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> None:
    manifest, layers = compiled(int8_variant(make_graph(tmp_path, make_weights(DINOV3), DINOV3)))
    limits = LayerLimits(attention_blocks=12, layers=142, traffic_bytes=1.56e9, scratch_bytes=64e6)
    assert exceeded(layers, limits) == []
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)
    assert layers.precisions["int8"] >= 41


@pytest.mark.parametrize("kind", ["confidence", "probabilities"])
def test_confidence_costs_two_layers(half: Path, kind: str) -> None:
    graph = derived_path(half, kind)
    write_variant(half, graph, kind)
    manifest, layers = compiled(graph)
    # The bytes of the sum over the classes are counted once per class, although it is read once.
    limits = LayerLimits(attention_blocks=12, layers=107, traffic_bytes=1.3e9, scratch_bytes=64e6)
    assert exceeded(layers, limits) == []
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)
    assert manifest.tensorrt is not None
    assert [tensor.name for tensor in manifest.tensorrt.tensors] == ["image", "labels", kind]
    assert {tensor.dtype for tensor in manifest.tensorrt.tensors} == {"uint8"}


def test_int8_keeps_the_limits(paper_graph: Path) -> None:
    graph = int8_variant(paper_graph)
    manifest, layers = compiled(graph)
    assert exceeded(layers, INT8_LIMITS) == []
    assert (manifest.attention_fused, manifest.attention_blocks) == (12, 12)
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.tensors == TILES_AND_LABELS
    assert layers.precisions["int8"] >= 41, "proj, fc1, fc2 and the 3x3 convolutions"
    assert graph.stat().st_size <= INT8_SIZE * paper_graph.stat().st_size


def test_int8_with_broken_attention_fails_the_same_check(shallow_graph: Path) -> None:
    _, layers = compiled(break_attention(int8_variant(shallow_graph)))
    findings = exceeded(layers, INT8_LIMITS)
    assert any("0 of 12 attention blocks" in finding for finding in findings), findings


def sums_of(engine: Path) -> Counter[tuple[str, str]]:
    """How fused attentions add up scores and values; engines of TensorRT-RTX hold their kernels' source."""
    found = re.findall(rb"fmha::Ampere_hmma_(\w+)_traits,\s+fmha::Ampere_hmma_(\w+)_traits", engine.read_bytes())
    return Counter((scores.decode(), values.decode()) for scores, values in found)


def test_attention_adds_in_fp16_and_scores_in_fp32_cost_no_layer(shallow_graph: Path) -> None:
    """What :mod:`cdkd_edge.graph.fp16_attention` rehearses, and what it changes in a block."""
    graph = half_graph(shallow_graph)
    _, plain = compiled(graph)
    assert sums_of(graph.parent / "engines" / f"{graph.stem}.engine") == {("fp16", "fp16"): 4}
    model = onnx.load(graph)
    change_attention(model, [AttentionChange("blocks.1.attn", "it is a test", 8, True, 4)])
    changed = store_variant(graph, model, "changed")
    manifest, layers = compiled(changed)
    assert sums_of(changed.parent / "engines" / f"{changed.stem}.engine") == {("fp16", "fp16"): 3, ("fp32", "fp16"): 1}
    assert (manifest.attention_fused, manifest.attention_blocks) == (4, 4)
    assert len(layers.layers) == len(plain.layers)
    assert layers.traffic_bytes == plain.traffic_bytes


def test_fp32_parses_and_builds(shallow_graph: Path) -> None:
    manifest, layers = compiled(shallow_graph)
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.tensors == TILES_AND_LABELS
    assert manifest.attention_blocks == 4
    assert "fp16" not in layers.precisions
    assert not any(tensor.dtype == "int64" for layer in layers.layers for tensor in (*layer.inputs, *layer.outputs))


def test_broken_attention_fails_the_same_check(shallow_graph: Path) -> None:
    manifest, layers = compiled(break_attention(half_graph(shallow_graph)))
    findings = exceeded(layers, FP16_LIMITS)
    assert any("0 of 12 attention blocks" in finding for finding in findings), findings
    assert any("layer traffic" in finding for finding in findings)
    assert any("scratch" in finding for finding in findings)
    assert manifest.attention_fused == 0
    assert len(layers.unfused_attention) == 4


PROFILE = """
from cdkd_edge.engines.tensorrt.find import find_tensorrt
from cdkd_edge.engines.tensorrt.runner import _profiler
trt, reported = find_tensorrt().module, [[]]
profiler = _profiler(trt, reported)
assert isinstance(profiler, trt.IProfiler)
profiler.report_layer_time("fuse", 1.5)
assert reported == [[("fuse", 0.0015)]]
assert {"profiler", "enqueue_emits_profile", "report_to_profiler"} <= set(dir(trt.IExecutionContext))
"""


def test_the_profiler_is_one_of_tensorrts() -> None:
    """In a child, because importing TensorRT loads the compiler."""
    done = subprocess.run([sys.executable, "-c", PROFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_kernel_computes_two_layers(half: Path) -> None:
    """So that the times of kernels add up to times of layers; copies alone name no node."""
    _, layers = compiled(half)
    for layer in layers.layers:
        parts = {parts_of([[node]])[0] for node in layer.nodes}
        assert len(parts) <= 1, layer
        assert parts or layer.type == "kgen", layer
