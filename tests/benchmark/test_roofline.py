"""The roofline: costs counted from shapes, devices from data sheets, and the paper model's known figures."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import assert_answer, assert_wrong_usage, run
from onnx import TensorProto, helper, numpy_helper
from tensorrt_helpers import half_graph, int8_variant, needs_compiler

from cdkd_edge.benchmark.roofline.devices import default_device, device_names, find_device, load_device
from cdkd_edge.benchmark.roofline.kernels import FUSED, UNFUSED, UNFUSED_FP32, attention_modes, kernels_of
from cdkd_edge.benchmark.roofline.model import (
    PEAK,
    REALISTIC,
    Efficiencies,
    Roofline,
    estimate,
    kernel_times,
    roofline,
)
from cdkd_edge.benchmark.roofline.operators import GraphCost, read_operators
from cdkd_edge.core.errors import GraphError, UsageError
from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
from cdkd_edge.engines.tensorrt.options import TensorRTOptions
from cdkd_edge.graph.files import load_graph
from cdkd_edge.model.config import NetworkConfig, attention_of

ORIN = load_device("orin-nx-16gb")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, small_graph: Path) -> Path:
    """A copy of the small graph, beside which others may be written."""
    folder = tmp_path_factory.mktemp("graphs")
    for path in (small_graph, small_graph.with_suffix(".json")):
        shutil.copy(path, folder)
    return folder / small_graph.name


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], output: str, **constants: np.ndarray
) -> onnx.ModelProto:
    """A small FP32 graph."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in inputs.items()]
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values, [out], initializer=stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def by_name(cost: GraphCost) -> dict[str, Any]:
    return {operator.name: operator for operator in cost.operators}


# --- operators ------------------------------------------------------------------------------------


def test_a_product_with_bias_and_gelu_is_one_kernel() -> None:
    weight, bias = np.zeros((8, 5), np.float32), np.zeros(5, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="p"),
        helper.make_node("Add", ["p", "b"], ["s"], name="s"),
        helper.make_node("Gelu", ["s"], ["y"], name="y"),
    ]
    cost = read_operators(model_of(nodes, {"x": [2, 3, 8]}, "y", w=weight, b=bias))
    assert by_name(cost)["p"].product_flop == 2 * (2 * 3 * 5) * 8
    assert by_name(cost)["s"].read_bytes == 4 * (30 + 5)
    assert cost.batch == 2
    (kernel,) = kernels_of(cost, "none")
    assert kernel.operators == ("p", "s", "y")
    assert (kernel.read_bytes, kernel.constant_bytes, kernel.written_bytes) == (4 * 48, 4 * (40 + 5), 4 * 30)


@pytest.mark.parametrize(("groups", "macs"), [(1, 6 * 5 * 5 * 4 * 2 * 2), (2, 6 * 5 * 5 * 2 * 2 * 2)])
def test_transposed_convolutions(groups: int, macs: int) -> None:
    weight = np.zeros((6, 4 // groups, 2, 2), np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=groups, strides=[2, 2])
    found = read_operators(model_of([node], {"x": [1, 6, 5, 5]}, "y", w=weight))
    assert found.product_flop == 2 * macs
    assert found.unknown == ()


def test_convolutions_count_groups() -> None:
    kernel = np.zeros((6, 2, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", group=2, pads=[1, 1, 1, 1])
    cost = read_operators(model_of([node], {"x": [1, 4, 10, 12]}, "y", w=kernel))
    assert cost.product_flop == 2 * (6 * 10 * 12) * (2 * 9)


def test_a_value_that_others_read_too_is_written_and_read() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="p"),
        helper.make_node("Softmax", ["p"], ["r"], name="r"),
        helper.make_node("Add", ["p", "r"], ["y"], name="y"),
    ]
    cost = read_operators(model_of(nodes, {"x": [3, 4]}, "y", w=np.zeros((4, 4), np.float32)))
    first, second = kernels_of(cost, "none")
    assert first.operators == ("p",)
    assert (second.read_bytes, second.written_bytes) == (4 * 12, 4 * 12)


def test_branches_that_meet_again_stay_in_the_kernel_of_their_product() -> None:
    """As in GELU of elementary nodes: x erf(x)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="p"),
        helper.make_node("Erf", ["p"], ["e"], name="e"),
        helper.make_node("Mul", ["p", "e"], ["y"], name="y"),
    ]
    (kernel,) = kernels_of(read_operators(model_of(nodes, {"x": [3, 4]}, "y", w=np.zeros((4, 4), np.float32))), "none")
    assert (kernel.read_bytes, kernel.written_bytes) == (4 * 12, 4 * 12)


def test_the_small_networks_products(graph: Path, small_config: NetworkConfig) -> None:
    """Attention and patch embedding by hand; what is left of the total is linear layers and the decoder."""
    cost = read_operators(load_graph(graph))
    tokens, dim = small_config.grid**2, small_config.embed_dim
    names = by_name(cost)
    for product in ("scores", "mixed"):
        assert names[f"blocks.0.attn.{product}/MatMul"].product_flop == 2 * tokens * tokens * dim
    assert names["patch_embed.product/MatMul"].product_flop == 2 * tokens * dim * 3 * small_config.patch**2
    assert names["blocks.3.mlp.fc1.product/MatMul"].product_flop == 2 * tokens * dim * small_config.mlp_dim
    assert cost.precision == "fp32"
    assert cost.unknown == ()
    assert attention_modes(cost) == (UNFUSED,)


def test_precisions_of_the_small_network(graph: Path) -> None:
    """An FP32 graph is modelled as what `export` and `build --int8` write: the same figures as from those files."""
    found = roofline(graph, ORIN, mode="MAXN")
    assert [cost.precision for cost in found.graphs] == ["fp32", "fp16", "int8"]
    for variant, cost in zip((half_graph, int8_variant), found.graphs[1:], strict=True):
        alone = roofline(variant(graph), ORIN, mode="MAXN")
        assert [one.operators for one in alone.graphs] == [cost.operators]
    assert len({cost.product_flop for cost in found.graphs}) == 1
    eight_bit = [operator for operator in found.graphs[2].operators if operator.precision == "int8"]
    assert sum("blocks" in operator.name and operator.product_flop > 0 for operator in eight_bit) == 12
    assert found.graphs[2].product_flop > sum(operator.product_flop for operator in eight_bit) > 0


def test_fused_attention_writes_no_scores(graph: Path, small_config: NetworkConfig) -> None:
    cost = read_operators(load_graph(half_graph(graph)))
    assert attention_modes(cost) == (FUSED, UNFUSED, UNFUSED_FP32)
    traffic = {mode: sum(kernel.traffic_bytes for kernel in kernels_of(cost, mode)) for mode in attention_modes(cost)}
    scores = small_config.heads * small_config.grid**4
    tokens = small_config.grid**2 * small_config.embed_dim
    # Written by one product, read by the other, read and written by softmax; the heads are joined in one more kernel.
    assert traffic[UNFUSED] - traffic[FUSED] == small_config.depth * 2 * (4 * scores + 2 * tokens)
    # FP32 scores in and out of softmax and of both casts, instead of FP16 ones in and out of softmax.
    assert traffic[UNFUSED_FP32] - traffic[UNFUSED] == small_config.depth * (4 * 4 + 2 * 2 - 2 * 2) * scores
    assert sum(kernel.attention for kernel in kernels_of(cost, FUSED)) == small_config.depth


def test_kernels_run_in_an_order_that_is_possible(graph: Path) -> None:
    """No kernel reads what a later one writes, and no operator is lost."""
    for path in (half_graph(graph), int8_variant(graph)):
        cost = read_operators(load_graph(path))
        operators = by_name(cost)
        for mode in attention_modes(cost):
            kernels = kernels_of(cost, mode)
            place = {name: number for number, kernel in enumerate(kernels) for name in kernel.operators}
            makers = {name: operator.name for operator in cost.operators for name in operator.outputs}
            for name, number in place.items():
                for value in operators[name].inputs:
                    assert place.get(makers.get(value, ""), -1) <= number
            working = {operator.name for operator in cost.operators if operator.product_flop}
            assert working <= set(place)
            assert sum(kernel.product_flop for kernel in kernels) == cost.product_flop


# --- kernels: rules of TensorRT-RTX ----------------------------------------------------------------


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node named after its first output."""
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attributes)


def kernels(nodes: list[onnx.NodeProto], output: str, x: list[int], way: str = "none", **constants: np.ndarray) -> Any:
    """The kernels of a small FP32 graph: their operators, bytes read, and bytes written."""
    cost = read_operators(model_of(nodes, {"x": x}, output, **constants))
    return [(" ".join(one.operators), one.read_bytes, one.written_bytes) for one in kernels_of(cost, way)]


def attention_on(queries: list[onnx.NodeProto]) -> Any:
    """The kernels around an attention of 2 heads on ``x`` ``[1, 6, 8]``, given the nodes that make its ``q``."""
    split, heads = np.array([1, 6, 2, 4], np.int64), [0, 2, 1, 3]
    nodes = [*queries, node("MatMul", "x wk", "k"), node("MatMul", "x wv", "v")]
    for name in "qkv":
        nodes += [node("Reshape", f"{name} split", f"{name}s"), node("Transpose", f"{name}s", f"{name}h", perm=heads)]
    nodes += [
        node("Transpose", "kh", "kt", perm=[0, 1, 3, 2]), node("MatMul", "qh kt", "scores"),
        node("Softmax", "scores", "share"), node("MatMul", "share vh", "mixed"),
        node("Transpose", "mixed", "y", perm=heads),
    ]  # fmt: skip
    weights = {f"w{name}": np.zeros((8, 8), np.float32) for name in "qkv"}
    return kernels(nodes, "y", [1, 6, 8], FUSED, split=split, b=np.zeros(8, np.float32), **weights)


TOKENS = 4 * 6 * 8  # bytes of [1, 6, 8]


def test_queries_keys_and_values_are_one_kernel_that_attention_reads_directly() -> None:
    found = attention_on([node("MatMul", "x wq", "q")])
    assert found == [("q k v", TOKENS, 3 * TOKENS), ("scores share mixed y", 3 * TOKENS, TOKENS)]


def test_a_bias_is_a_kernel_and_a_copy_of_its_own() -> None:
    found = attention_on([node("MatMul", "x wq", "p"), node("Add", "p b", "q")])
    assert sorted(found) == [
        ("k v", TOKENS, 2 * TOKENS), ("p q", TOKENS, TOKENS), ("qh", TOKENS, TOKENS),
        ("scores share mixed y", 3 * TOKENS, TOKENS),
    ]  # fmt: skip


def test_products_of_other_inputs_or_shapes_are_kernels_of_their_own() -> None:
    nodes = [node("MatMul", "x a", "p"), node("MatMul", "x b", "q"), node("Relu", "x", "r"), node("MatMul", "r a", "s")]
    nodes += [node("Concat", "p q s", "y", axis=1)]
    found = kernels(nodes, "y", [2, 3], a=np.zeros((3, 3), np.float32), b=np.zeros((3, 4), np.float32))
    assert sorted(found) == [("p", 24, 24), ("q", 24, 32), ("r", 24, 24), ("s", 24, 24)]


def test_what_is_concatenated_is_written_in_place_unless_others_read_it_too() -> None:
    nodes = [node("Conv", "x a", "p"), node("Conv", "x a", "q"), node("Concat", "p q", "c", axis=1)]
    weights = {"a": np.zeros((2, 2, 1, 1), np.float32), "b": np.zeros((1, 4, 1, 1), np.float32)}
    last = [node("Conv", "c b", "y")]
    half = 4 * 2 * 9
    assert kernels([*nodes, *last], "y", [1, 2, 3, 3], **weights) == [
        ("p", half, half), ("q", half, half), ("y", 2 * half, half // 2)
    ]  # fmt: skip
    last = [node("Conv", "c b", "z"), node("Conv", "q a", "s"), node("Add", "s z", "y")]
    assert ("c", half, half) in kernels([*nodes, *last], "y", [1, 2, 3, 3], **weights)


def test_branches_without_products_meet_in_one_kernel() -> None:
    nodes = [node("Relu", "x", "a"), node("Transpose", "x", "t", perm=[1, 0]), node("Add", "a t", "y")]
    assert kernels(nodes, "y", [3, 3]) == [("a t y", 36, 36)]


def test_a_product_between_two_kernels_keeps_them_apart() -> None:
    nodes = [node("Relu", "x", "a"), node("MatMul", "a w", "p"), node("Transpose", "p", "t", perm=[1, 0])]
    nodes += [node("Add", "a t", "y")]
    found = kernels(nodes, "y", [3, 3], w=np.zeros((3, 3), np.float32))
    assert found == [("a", 36, 36), ("p", 36, 36), ("t y", 72, 36)]


def test_the_largest_of_resized_scores_is_found_in_one_kernel() -> None:
    nodes = [
        node("Resize", "x roi scales", "r", mode="linear"), node("Split", "r", "a b", axis=1, num_outputs=2),
        node("Greater", "b a", "g"), node("Where", "g one zero", "w"), node("Cast", "w", "y", to=TensorProto.UINT8),
    ]  # fmt: skip
    constants = {"scales": np.array([1, 1, 4, 4], np.float32), "roi": np.zeros(0, np.float32)}
    constants |= {"one": np.ones((1, 1, 1, 1), np.float32), "zero": np.zeros((1, 1, 1, 1), np.float32)}
    model = model_of(nodes, {"x": [1, 2, 3, 3]}, "y", **constants)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    ((kernel),) = kernels_of(read_operators(model), "none")
    assert (kernel.read_bytes, kernel.written_bytes) == (4 * 2 * 9, 144)


def test_int8_attention_joins_its_heads_in_another_kernel(graph: Path, small_config: NetworkConfig) -> None:
    found = kernels_of(read_operators(load_graph(int8_variant(graph))), FUSED)
    joining = [kernel for kernel in found if kernel.name.endswith(": heads joined")]
    tokens = small_config.grid**2 * small_config.embed_dim
    assert [(one.read_bytes, one.written_bytes) for one in joining] == [(tokens, tokens)] * small_config.depth
    assert {kernel.written_bytes for kernel in found if kernel.attention} == {tokens}


def test_int8_convolutions_write_fp32(graph: Path, small_config: NetworkConfig) -> None:
    cost = read_operators(load_graph(int8_variant(graph)))
    written = by_name(cost)["smooth.0.conv/Conv"].written_bytes
    assert written == 4 * small_config.grid**2 * small_config.head_channels


# --- graphs that are not ours -----------------------------------------------------------------------


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Softplus", ["x"], ["a"], name="a"), helper.make_node("Softmax", ["a"], ["y"], name="y")]
    path = tmp_path / "g.onnx"
    onnx.save(model_of(nodes, {"x": [3, 4]}, "y"), path)
    found = roofline(path, ORIN)
    assert any("Softplus" in note for note in found.notes)
    assert {one.attention for one in found.estimates} == {"none"}
    assert all(math.isinf(one.arithmetic_bound_fps) for one in found.estimates)


def test_a_graph_that_computes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    onnx.save(model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": [3, 4]}, "y"), path)
    with pytest.raises(GraphError, match="computes nothing"):
        roofline(path, ORIN)


def test_an_input_without_fixed_shape() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(GraphError, match="no fixed shape"):
        read_operators(model_of([node], {"x": ["batch", 3]}, "y"))


def test_an_empty_input() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(GraphError, match=r"input 'x' is empty: its shape is \[0, 3\]"):
        read_operators(model_of([node], {"x": [0, 3]}, "y"))


def test_shapes_that_contradict_each_other() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(GraphError):
        read_operators(model_of([node], {"x": [3, 5]}, "y", w=np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x09"])
def test_files_that_are_no_graphs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "größe.onnx"
    path.write_bytes(content)
    assert_answer(run("roofline", path), 7, "größe.onnx is")


def test_a_truncated_graph(tmp_path: Path, graph: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(graph.read_bytes()[:-1000])
    assert_answer(run("roofline", path), 7, "not an ONNX graph")


def test_a_cpu_engine_is_not_a_graph_for_a_gpu(small_engine_path: Path) -> None:
    assert_answer(run("roofline", small_engine_path), 7, "is not known — .*export/")


# --- devices ----------------------------------------------------------------------------------------


def test_every_device_loads_and_names_its_sources() -> None:
    folder = Path(__file__).parents[2] / "cdkd_edge" / "benchmark" / "roofline" / "devices"
    assert set(device_names()) == {path.stem for path in folder.glob("*.toml")}
    assert len(device_names()) == 9
    help_text = " ".join(run("roofline", "--help").stdout.replace("│", " ").split())
    for name in device_names():
        device = load_device(name)
        assert all(device.peak(mode, "int8") == 2 * device.peak(mode, "fp16") for mode in device.modes.values())
        lines = (folder / f"{name}.toml").read_text().splitlines()
        assert any(line.startswith("#") and "NVIDIA" in line for line in lines)
        assert all("#" in line for line in lines if line.startswith("[modes"))
        assert name in help_text


@pytest.mark.parametrize(
    ("mode", "tera"), [("10W", 5.0), ("15W", 5.0), ("25W", 6.7), ("MAXN", 15.0), ("40W", 19.2), ("MAXN_SUPER", 19.2)]
)
def test_orin_nx_modes(mode: str, tera: float) -> None:
    assert ORIN.peak(ORIN.mode(mode), "fp16") / 1e12 == pytest.approx(tera, abs=0.05)


@pytest.mark.parametrize(
    ("device", "mode", "precision", "tera"),
    [
        ("agx-orin-64gb", "MAXN", "int8", 170 / 2),  # technical brief: 170 TOP/s sparse
        ("agx-orin-32gb", "MAXN", "int8", 108 / 2),
        ("orin-nx-16gb", "MAXN", "int8", 60 / 2),
        ("orin-nx-8gb", "MAXN", "int8", 50 / 2),
        ("orin-nano-8gb", "15W", "int8", 41 / 2),
        ("orin-nano-8gb", "MAXN_SUPER", "int8", 67 / 2),
        ("orin-nano-4gb", "MAXN_SUPER", "int8", 34 / 2),
        ("rtx-3060-12gb", "default", "fp32", 12.7),
        ("rtx-4090", "default", "fp16", 330.3),
        ("h200", "default", "fp32", 67),
    ],
)
def test_peaks_are_those_of_the_data_sheets(device: str, mode: str, precision: str, tera: float) -> None:
    """Advertised figures that the device files do not hold."""
    loaded = load_device(device)
    assert loaded.peak(loaded.mode(mode), precision) / 1e12 == pytest.approx(tera, rel=0.02)


def test_a_machine_is_recognised() -> None:
    found = find_device(part="nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0nvidia,tegra234\0", gpu="Orin")
    assert found is not None
    assert found.name == "orin-nx-16gb"
    assert find_device(gpu="NVIDIA GeForce RTX 4090") == load_device("rtx-4090")
    assert find_device(gpu="Orin") is None
    assert find_device() is None


def test_the_default_is_the_board_that_it_runs_on(tmp_path: Path) -> None:
    assert default_device(tmp_path) == ORIN
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    compatible = tmp_path / "proc/device-tree/compatible"
    compatible.write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    assert default_device(tmp_path).name == "orin-nano-8gb"
    compatible.write_bytes(b"\xff\0raspberrypi,5")
    assert default_device(tmp_path) == ORIN


@pytest.mark.parametrize(
    "change",
    [
        ("clock_mhz = 918", "clock_mhz = -1"),
        ("clock_mhz = 918", "clock_mhz = nan"),
        ("clock_mhz = 918", 'clock_mhz = "fast"'),
        ("clock_mhz = 918", "clock_mhz = true"),
        ("clock_mhz = 918", ""),
        ('title = "', 'titel = "'),
        ("[modes.MAXN]", "[modes"),
        ("rates = {", "rates = 3 #"),
        ("multiprocessors = 8", "multiprocessors = 0.5"),
        ("clock_mhz = 918", "clock_mhz = 1e308"),
        ("parts = [", "parts = 3 #"),
        ("rates = {", f"deep = {'[' * 100_000}\nrates = {{"),
        ("[modes.MAXN]", "\n".join(f"[modes.m{n}]" for n in range(200)) + "\n[modes.MAXN]"),
        ("rates = {", "#" + "x" * (2 << 20) + "\nrates = {"),
        ("int8 = 4096,", ""),
    ],
)
def test_broken_device_files(tmp_path: Path, graph: Path, change: tuple[str, str]) -> None:
    source = Path(__file__).parents[2] / "cdkd_edge/benchmark/roofline/devices/orin-nx-16gb.toml"
    text = source.read_text()
    assert change[0] in text
    path = tmp_path / "board.toml"
    path.write_text(text)
    assert load_device(str(path)).modes == ORIN.modes
    path.write_text(text.replace(change[0], change[1]))
    assert_answer(run("roofline", graph, "--device", path), 2, r"board\.toml is not a device file")


# --- the model --------------------------------------------------------------------------------------


def test_a_kernel_takes_as_long_as_its_slower_half(graph: Path) -> None:
    cost = read_operators(load_graph(half_graph(graph)))
    mode = ORIN.mode("MAXN")
    kernels = kernels_of(cost, FUSED)
    for time in kernel_times(kernels, ORIN, mode, PEAK):
        least = max(time.kernel.product_flop / 15.04e12, time.kernel.traffic_bytes / 102.4e9)
        assert time.seconds >= least * 0.999
    found = estimate(cost, ORIN, mode, FUSED)
    assert found.arithmetic_bound_fps >= found.bound_fps > found.high_fps > found.fps > found.low_fps > 0


def test_a_batch_counts_its_tiles(
    tmp_path: Path, small_weights: Any, small_config: NetworkConfig, make_graph: Callable[..., Path]
) -> None:
    one = roofline(make_graph(tmp_path / "1", small_weights, small_config), ORIN, mode="MAXN", precision="fp16")
    four = roofline(
        make_graph(tmp_path / "4", small_weights, small_config, batch=4), ORIN, mode="MAXN", precision="fp16"
    )
    assert four.graphs[0].product_flop == pytest.approx(4 * one.graphs[0].product_flop, rel=0.02)
    assert 1 < four.estimates[0].fps / one.estimates[0].fps < 4  # launch times are shared


def test_shares_of_a_range_stay_shares() -> None:
    assert Efficiencies(gemm=0.95).shifted(0.1).gemm == 1.0
    assert REALISTIC.shifted(-0.1).dram == pytest.approx(0.65)


# --- the paper's network ----------------------------------------------------------------------------

MakePaper = Callable[[str], Path]


@pytest.fixture(scope="module")
def make_paper(
    tmp_path_factory: pytest.TempPathFactory, make_graph: Callable[..., Path], make_weights: Callable[..., object]
) -> MakePaper:
    """The paper's network in FP32, with attention as in a text; random weights, which are not looked at.

    ``DINOv3`` is one with the encoder's other parts: class token, registers, rotary positions, final norm. ``neck`` has
    a neck of transposed convolutions.
    """
    plain, made = NetworkConfig(classes=5), dict[str, Path]()
    others = {
        "DINOv3": dataclasses.replace(plain, class_token=True, registers=4, rotary_base=100.0, final_norm="taps"),
        "neck": dataclasses.replace(plain, neck=(192, 96, 192)),
    }

    def make(attention: str) -> Path:
        if attention not in made:
            config = others.get(attention, plain)
            if attention not in others:
                config = dataclasses.replace(plain, attention=attention_of(attention, plain.depth, plain.taps))
            made[attention] = make_graph(tmp_path_factory.mktemp("paper"), make_weights(config), config)
        return made[attention]

    return make


@pytest.fixture(scope="module")
def paper(make_paper: MakePaper) -> Roofline:
    return roofline(make_paper("global"), ORIN)


def speed_of(found: Roofline, mode: str, precision: str, attention: str) -> Any:
    return next(
        one for one in found.estimates if (one.mode.name, one.precision, one.attention) == (mode, precision, attention)
    )


@pytest.mark.slow
def test_the_paper_models_speeds_at_maxn(paper: Roofline) -> None:
    """By hand: 2.4 tiles/s with scores in memory (the paper measured 2.5), 13.2 (10.5 to 15.9) fused, 13.7 in INT8."""
    unfused = speed_of(paper, "MAXN", "fp16", UNFUSED_FP32)
    assert unfused.traffic_bytes / 1e9 == pytest.approx(30.2, rel=0.01)
    assert unfused.fps == pytest.approx(2.4, rel=0.02)
    fused = speed_of(paper, "MAXN", "fp16", FUSED)
    known = [pytest.approx(value, abs=0.1) for value in (10.5, 13.2, 15.9)]
    assert [fused.low_fps, fused.fps, fused.high_fps] == known
    assert speed_of(paper, "MAXN", "int8", FUSED).fps == pytest.approx(13.7, abs=0.1)


@pytest.mark.slow
def test_the_bottleneck_is_folded(paper: Roofline) -> None:
    """The graph does 9.1 G of the paper's 274.2 G multiply-accumulates less."""
    half = next(cost for cost in paper.graphs if cost.precision == "fp16")
    assert (119.60e9 + 154.62e9) - half.product_flop / 2 == pytest.approx(9.1e9, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "giga", "fps"),
    [("window16/global", 169, 20.5), ("pooled2", 138, 23.9), ("window16/pooled2", 126, 27.0)],
)
def test_cheaper_attention(make_paper: MakePaper, attention: str, giga: float, fps: float) -> None:
    """Against a prototype, whose graphs moved 0.1 to 0.2 GB more."""
    found = roofline(make_paper(attention), ORIN, mode="MAXN", precision="fp16")
    assert found.graphs[0].product_flop / 2e9 == pytest.approx(giga, abs=0.6)
    assert speed_of(found, "MAXN", "fp16", FUSED).fps == pytest.approx(fps, rel=0.08)


@pytest.mark.slow
def test_a_neck_of_four_times_the_grid(make_paper: MakePaper) -> None:
    found = roofline(make_paper("neck"), ORIN, mode="MAXN", precision="fp16")
    assert found.graphs[0].product_flop / 2 == pytest.approx(1.67 * 274.2e9, rel=0.03)
    assert speed_of(found, "MAXN", "fp16", FUSED).fps == pytest.approx(7.8, abs=0.1)


@pytest.mark.slow
def test_more_watts_on_the_label_may_be_slower(paper: Roofline) -> None:
    speed = {mode: speed_of(paper, mode, "fp16", FUSED).fps for mode in ORIN.modes}
    assert speed["25W"] < speed["MAXN"] / 2
    assert speed["10W"] < speed["15W"] < speed["25W"] < speed["MAXN"] < speed["40W"] == speed["MAXN_SUPER"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("attention", "variant"),
    [
        *(
            (attention, variant)
            for attention in ("global", "window16/global", "pooled2", "window16/pooled2", "DINOv3")
            for variant in (half_graph, int8_variant)
        ),
        ("neck", half_graph),  # in INT8 the rules count 8 % more traffic
    ],
)
def test_kernels_are_what_a_compiler_makes(
    make_paper: MakePaper, attention: str, variant: Callable[[Path], Path], tmp_path: Path
) -> None:
    """TensorRT-RTX's layers for SM 8.6. A transposition of the pyramid's map has no rule: a kernel and 4 MB less.

    Nor has the DINOv3 network's last norm, which the compiler splits in two in INT8: 13 MB.
    """
    path, engine = variant(make_paper(attention)), tmp_path / "paper.engine"
    build_tensorrt_engine(path, engine, TensorRTOptions(targets=("8.6",)))
    (by_layers,) = roofline(engine, ORIN, mode="MAXN").estimates
    by_rules = speed_of(roofline(path, ORIN, mode="MAXN"), "MAXN", by_layers.precision, FUSED)
    assert by_layers.attention == FUSED
    assert by_rules.kernels == pytest.approx(by_layers.kernels, abs=2)
    for figure in ("traffic_bytes", "product_flop", "fps", "low_fps", "high_fps", "bound_fps"):
        rel = 0.012 if attention == "DINOv3" else 0.01
        assert getattr(by_rules, figure) == pytest.approx(getattr(by_layers, figure), rel=rel), figure


# --- the command ------------------------------------------------------------------------------------


def keys_of(data: Any) -> set[str]:
    if isinstance(data, dict):
        return set(data).union(*map(keys_of, data.values()))
    return set().union(*map(keys_of, data)) if isinstance(data, list) else set()


def test_the_table_says_that_it_is_modelled(graph: Path) -> None:
    result = run("roofline", graph)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("MODELLED, not measured:")
    for mode in ORIN.modes:
        assert mode in result.stdout
    assert "bound by" not in result.stdout
    detailed = run("roofline", graph, "--mode", "maxn", "--precision", "fp16").stdout
    assert "MODELLED kernels: fp16, attention fused, MAXN" in detailed
    assert "more (--all)" in detailed
    assert "more (--all)" not in run("roofline", graph, "--mode", "maxn", "--all").stdout


def test_json_has_no_field_that_a_measurement_has(graph: Path) -> None:
    result = run("roofline", graph, "--device", "rtx-4090", "--mode", "default", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["kind"] == "modelled"
    measured = {"fps", "tiles_per_second", "latency_ms", "seconds", "watts"}
    assert not measured & keys_of(data)
    assert {one["precision"] for one in data["estimates"]} == {"fp32", "fp16", "int8"}
    for one in data["estimates"]:
        low, high = one["modelled_fps_range"]
        assert low < one["modelled_fps"] < high < one["modelled_bound_fps"] <= one["modelled_arithmetic_bound_fps"]
        total = sum(kernel["modelled_seconds"] for kernel in one["kernels"])
        assert 1 / total == pytest.approx(one["modelled_fps"])


def test_a_graph_without_products_is_still_json(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    onnx.save(model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [3, 4]}, "y"), path)
    data = json.loads(run("roofline", path, "--json").stdout)
    assert data["estimates"][0]["modelled_arithmetic_bound_fps"] is None


def test_the_workspace_has_the_graph(graph: Path, tmp_path: Path, make_graph: Any) -> None:
    assert_answer(run("roofline", "-w", tmp_path), 5, "no exported graph")
    (tmp_path / "export").mkdir()
    for path in (graph, graph.with_suffix(".json")):
        (tmp_path / "export" / path.name).write_bytes(path.read_bytes())
    assert "small.onnx" in run("roofline", "-w", tmp_path).stdout


def test_mistakes(graph: Path, tmp_path: Path) -> None:
    assert_answer(run("roofline", tmp_path / "none.onnx"), 7, "does not exist")
    assert_answer(run("roofline", tmp_path), 7, "is not a file")
    assert_answer(run("roofline", graph, "--device", "orin"), 2, "no device 'orin' — one of agx-orin-32gb")
    assert_answer(run("roofline", graph, "--device", tmp_path / "no.toml"), 2, "No such file")
    assert_answer(run("roofline", graph, "--mode", "99W"), 2, "no power mode '99W' — it has 10W")
    assert_wrong_usage(run("roofline", graph, "--precision", "int4"), "one of fp32")
    assert_answer(run("roofline", half_graph(graph), "--precision", "int8"), 2, "cannot be modelled in int8")
    with pytest.raises(UsageError):
        load_device("")
