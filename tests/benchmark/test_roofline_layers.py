"""The roofline of a compiler's list of layers: bytes and operations counted by hand from the shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_answer, run
from run_helpers import engine_manifest
from tensorrt_helpers import half_graph, needs_compiler

from cdkd_edge.benchmark.roofline.compiled import kernels_of_layers
from cdkd_edge.benchmark.roofline.devices import load_device
from cdkd_edge.benchmark.roofline.model import model_engine, roofline
from cdkd_edge.core.errors import EngineError, UsageError
from cdkd_edge.core.manifest import FileRecord, write_manifest
from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
from cdkd_edge.engines.tensorrt.layers import EngineLayers, Layer, LayerTensor, write_layers
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.model.config import PRESETS

ORIN = load_device("orin-nx-16gb")


def tensors(text: str) -> tuple[LayerTensor, ...]:
    """``fp16 1x4096x384`` and others, between commas."""
    split = (one.split() for one in text.split(",") if one.strip())
    return tuple(LayerTensor(f"t{kind}", kind, tuple(map(int, sizes.split("x")))) for kind, sizes in split)


def layer(name: str, type_: str, inputs: str, outputs: str, constants: str = "") -> Layer:
    return Layer(name, type_, tensors(inputs), tensors(outputs), tensors(constants))


LINEAR = layer(  # its first input is the sum that the result is added to
    "__myl_FcAddAdd_myl0_9",
    "runtime_fusion",
    "fp16 1x4096x384, fp16 1x4096x1536",
    "fp16 1x4096x384",
    "fp16 1x1x384, fp16 1x1536x384",
)
ATTENTION = layer("_gemm_mha_v2_5", "kgen", "fp16 6x4096x64, fp16 6x64x4096, fp16 6x4096x64", "fp16 6x4096x64")
WINDOWS = layer("_gemm_mha_v2_5", "kgen", "fp16 96x256x64, fp16 96x64x256, fp16 96x256x64", "fp16 96x256x64")
POOLED = layer("_gemm_mha_v2_5", "kgen", "fp16 6x1024x64, fp16 6x64x1024, fp16 6x4096x64", "fp16 6x4096x64")
SCORES = layer("scores", "gemm", "fp16 6x4096x64, fp16 6x64x4096", "fp16 6x4096x4096")
POOLING = layer("cells", "gemm", "fp16 1x4096x384", "fp16 1x50x384", "fp16 1x50x4096, fp32 1")
TABLE = layer("__myl_FcAddRelu_9", "f", "fp16 1x50x384", "fp16 1x50x99", "fp16 1x50x99, fp16 1x384x99")
CONVOLUTION = layer("c", "correlation", "int8 1x32x64x64", "fp32 1x8x64x64", "int8 8x32x3x3, fp32 1x8x1x1")
GROUPS = layer("c", "correlation", "fp16 1x32x9x9", "fp16 1x8x9x9", "fp16 8x16x3x3, fp16 1x8x1x1")
INT8_WEIGHTS = layer("__myl_CastMulCastFc_1", "f", "fp16 1x50x64", "fp16 1x50x9", "int8 1x64x9")
NORM = layer("__myl_CastMeanSub_myl0_7", "kgen", "fp16 1x64x64", "fp16 1x64x64", "fp16 1x64x64")


@pytest.mark.parametrize(
    ("made", "macs", "precision"),
    [
        (LINEAR, 4096 * 384 * 1536, "fp16"),
        (ATTENTION, 2 * 6 * 4096**2 * 64, "fp16"),
        (WINDOWS, 2 * 96 * 256**2 * 64, "fp16"),
        (POOLED, 2 * 6 * 4096 * 1024 * 64, "fp16"),
        (SCORES, 6 * 4096**2 * 64, "fp16"),
        (POOLING, 50 * 4096 * 384, "fp16"),  # the constant is the left factor
        (TABLE, 50 * 384 * 99, "fp16"),  # a bias for every row is no factor
        (CONVOLUTION, 8 * 64 * 64 * 32 * 9, "int8"),
        (GROUPS, 8 * 81 * 16 * 9, "fp16"),
        (INT8_WEIGHTS, 50 * 64 * 9, "fp16"),  # converted before the product
        (NORM, 0, "fp32"),
    ],
)
def test_operations_are_counted_from_shapes(made: Layer, macs: int, precision: str) -> None:
    (kernel,) = kernels_of_layers(EngineLayers((made,)))
    assert (kernel.product_flop, kernel.precision) == (2 * macs, precision)
    assert kernel.attention == made.is_fused_attention


@pytest.mark.parametrize("made", [LINEAR, TABLE, CONVOLUTION, GROUPS])
def test_weights_may_be_listed_among_the_inputs(made: Layer) -> None:
    moved = dataclasses.replace(made, inputs=(*made.inputs, *made.constants), constants=())
    one, other = (kernels_of_layers(EngineLayers((some,)))[0] for some in (made, moved))
    assert (other.product_flop, other.precision) == (one.product_flop, one.precision)
    assert other.traffic_bytes == one.traffic_bytes


def test_a_layer_moves_inputs_outputs_and_constants() -> None:
    (kernel,) = kernels_of_layers(EngineLayers((LINEAR,)))
    tokens = 4096 * 384 * 2
    assert (kernel.read_bytes, kernel.written_bytes) == (5 * tokens, tokens)
    assert kernel.constant_bytes == 2 * (384 + 1536 * 384)


@pytest.mark.parametrize(
    "made",
    [
        dataclasses.replace(LINEAR, constants=()),
        layer("__myl_FcAdd_myl0_9", "f", "fp16 -1x384", "fp16 -1x384", "fp16 384x384"),
        dataclasses.replace(ATTENTION, inputs=ATTENTION.inputs[:1]),
        dataclasses.replace(ATTENTION, outputs=tensors("fp16 -1x4096x64")),
        dataclasses.replace(ATTENTION, inputs=tensors("fp16 -1x4096x64, fp16 6x64x9, fp16 6x9x64")),
        dataclasses.replace(GROUPS, constants=()),
    ],
)
def test_a_product_whose_operations_cannot_be_told_is_an_error(made: Layer) -> None:
    with pytest.raises(EngineError, match="do not tell how many operations"):
        kernels_of_layers(EngineLayers((made,)))


def test_an_engine_is_the_sum_of_its_layers() -> None:
    """By hand, in MAXN: 15.04 TFLOP/s FP16 and 102.4 GB/s, 45 % of it in attention, 55 % in GEMM, 75 % of memory."""
    compiled = EngineLayers((ATTENTION, LINEAR), attention_nodes=("softmax",))
    every = {one.mode.name: one for one in model_engine(compiled, ORIN)}
    assert list(every) == list(ORIN.modes)
    peak = 2048 * 8 * 918e6
    attention, linear = 4 * 6 * 4096**2 * 64 / (0.45 * peak), 2 * 4096 * 384 * 1536 / (0.55 * peak)
    maxn = every["MAXN"]
    assert 1 / maxn.fps == pytest.approx(attention + linear + 2 * 5e-6)
    assert maxn.low_fps < maxn.fps < maxn.high_fps < maxn.bound_fps
    assert (maxn.precision, maxn.attention, maxn.kernels) == ("fp16", "fused", 2)
    assert every["25W"].fps < maxn.fps < every["MAXN_SUPER"].fps
    assert model_engine(compiled, ORIN, mode="maxn") == (maxn,)


def test_a_layer_without_data_is_no_kernel() -> None:
    wait = layer("__mye52043_myl0_76", "wait", "", "")
    dynamic = layer("shuffle", "kgen", "fp16 -1x4096x64", "fp16 -1x4096x64")
    assert kernels_of_layers(EngineLayers((LINEAR, wait, dynamic))) == kernels_of_layers(EngineLayers((LINEAR,)))


def test_a_batch_is_that_of_the_input() -> None:
    image = layer("__myl_Cast_myl0_0", "kgen", "uint8 4x3x1024x1024", "fp16 4x3x1024x1024")
    named = dataclasses.replace(image, inputs=(dataclasses.replace(image.inputs[0], name="image"),))
    one, four = (model_engine(EngineLayers((first,)), ORIN, mode="MAXN")[0] for first in (image, named))
    assert four.fps == pytest.approx(4 * one.fps)
    assert one.attention == "none"


def test_attention_that_is_partly_fused() -> None:
    compiled = EngineLayers((ATTENTION, LINEAR), attention_nodes=("a", "b", "c"))
    assert model_engine(compiled, ORIN, mode="MAXN")[0].attention == "1 of 3 fused"


def test_nothing_to_model() -> None:
    for none in ((), (layer("wait", "wait", "", ""),)):
        with pytest.raises(EngineError, match="did not list"):
            model_engine(EngineLayers(none), ORIN)
    with pytest.raises(UsageError, match="no power mode '99W'"):
        model_engine(EngineLayers((LINEAR,)), ORIN, mode="99W")


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Something that is called an engine, with its manifest and two layers beside it."""
    path = tmp_path / "ckpt.fp16.engine"
    path.write_bytes(b"engine")
    record = FileRecord.of(path)
    write_manifest(path, dataclasses.replace(engine_manifest(1024), artefact=record, device="compiled for SM 8.6"))
    write_layers(path, record.sha256, EngineLayers((ATTENTION, LINEAR), attention_nodes=("softmax",)))
    return path


@pytest.mark.parametrize("suffix", [".engine", ".layers.json"])
def test_an_engine_is_modelled_from_its_layers(engine: Path, suffix: str) -> None:
    path = engine.with_suffix(suffix)
    shown = run("roofline", path, "--device", "orin-nx-16gb").stdout
    assert shown.startswith("MODELLED, not measured:")
    assert "the 2 layers that TensorRT made" in shown
    assert ("the layers are those for SM 8.6" in shown) == (suffix == ".engine")
    data = json.loads(run("roofline", path, "--device", "orin-nx-16gb", "--mode", "maxn", "--json").stdout)
    assert (data["modelled_from"], data["graphs"]) == ("layers", [])
    (estimate,) = data["estimates"]
    known = model_engine(EngineLayers((ATTENTION, LINEAR), attention_nodes=("softmax",)), ORIN, mode="MAXN")[0]
    assert estimate["modelled_fps_range"] == pytest.approx([known.low_fps, known.high_fps])
    assert [kernel["name"] for kernel in estimate["kernels"]] == [ATTENTION.name, LINEAR.name]


def test_engines_that_cannot_be_modelled(engine: Path) -> None:
    layers = engine.with_suffix(".layers.json")
    assert_answer(
        run("roofline", engine, "--precision", "int8"), 2, "cannot be modelled in int8 — it is an engine in fp16"
    )
    assert_answer(run("roofline", engine.with_name("x.layers.json")), 6, "does not exist")
    text = layers.read_text()
    layers.write_text(text.replace("1x1536x384", "").replace("[1, 1536, 384]", "[1536]"))
    assert_answer(run("roofline", engine), 9, "'__myl_FcAddAdd_myl0_9' do not tell how many .* — model the graph")
    layers.write_text(text[:-9])
    assert_answer(run("roofline", layers), 6, "is damaged — build the engine again")
    layers.unlink()
    assert_answer(run("roofline", engine), 6, "are not recorded beside it .* — build it again, or model its graph")


@needs_compiler
def test_layers_and_graph_are_modelled_alike(
    make_graph: Callable[..., Path], make_weights: Callable[..., object], tmp_path: Path
) -> None:
    half = half_graph(make_graph(tmp_path, make_weights(PRESETS["tiny"]), PRESETS["tiny"]))
    built = tmp_path / "engines" / "small.fp16.engine"
    build_tensorrt_engine(half, built, TensorRTOptions(targets=("8.6",)))
    by_layers, by_rules = (roofline(path, ORIN, mode="MAXN").estimates[0] for path in (built, half))
    assert (by_layers.precision, by_layers.attention) == (by_rules.precision, by_rules.attention) == ("fp16", "fused")
    assert by_layers.product_flop == pytest.approx(by_rules.product_flop, rel=0.02)
    assert by_layers.kernels == pytest.approx(by_rules.kernels, rel=0.05)
    assert by_layers.fps == pytest.approx(by_rules.fps, rel=0.05)
