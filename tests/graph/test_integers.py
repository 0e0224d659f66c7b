"""INT8 on every CPU: products are exact, and the graph does not depend on the CPU that makes it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from quantization_helpers import CONFIG, constants, nodes_of, session_of, tiles_of, values
from test_int8_graph import one_layer

from cdkd_edge.engines import onnxruntime as cpu
from cdkd_edge.graph import cpu as session
from cdkd_edge.graph import int8 as calibration
from cdkd_edge.graph.build import build_graph
from cdkd_edge.graph.cpu import cpu_twin
from cdkd_edge.graph.fp16_simulation import fp16_on_cpu
from cdkd_edge.graph.int8 import int8_graph


@pytest.fixture
def asked_anew():
    session.signed_weights_are_exact.cache_clear()
    yield
    session.signed_weights_are_exact.cache_clear()


@pytest.mark.parametrize(("op", "weight"), [("MatMul", (1536, 8)), ("Conv", (8, 48, 3, 3))])
def test_the_largest_integers_are_multiplied_exactly(op, weight):
    """Pairs of products that 16 bits cannot hold, of either sign, in whatever this CPU multiplies with."""
    signs = np.where(np.arange(8) % 2, 1, -1).astype(np.float32)
    signs = signs if op == "MatMul" else signs.reshape(-1, 1, 1, 1)
    shape = (1, 9, weight[0]) if op == "MatMul" else (1, weight[1], 6, 6)
    model, _ = one_layer(op, np.full(weight, 127, np.float32) * signs, None, shape, 1.0)
    for image in (np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8), tiles_of(1, 48)[:, :1].repeat(99, 1)):
        image = np.resize(image, shape)
        (exact,) = session_of(model).run(["y"], {"image": image})
        for found in (session_of(cpu_twin(model)), session.cpu_session(cpu_twin(model))):
            np.testing.assert_array_equal(found.run(["y"], {"image": image})[0], exact)


def test_the_graph_for_tensorrt_is_rehearsed_without_saturating(make_weights):
    """Its Q and DQ are INT8 on both sides; ONNX Runtime may make integer products of them by itself."""
    found = calibration.calibrate(build_graph(make_weights(CONFIG), CONFIG), tiles_of(2))
    graph = int8_graph(found.model, found.layers, found.scales)
    names = ["blocks.0.attn.proj"]
    model = fp16_on_cpu(graph)
    exact = values(model, names, tiles_of(1))[names[0]]
    model.graph.output.append(onnx.helper.make_tensor_value_info(names[0], onnx.TensorProto.FLOAT, None))
    (optimised,) = session.cpu_session(model).run(names, {"image": tiles_of(1)})
    assert np.abs(optimised - exact).max() < 2e-3 * np.abs(exact).max()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("saturates", [True, False])
def test_one_product_tells_whether_weights_are_stored_unsigned(monkeypatch, saturates):
    class Runtime(onnxruntime.InferenceSession):
        def run(self, names, feed):
            return [np.full((64, 64), 64 * (32767 / 2 if saturates else 255 * 127), np.float32)]

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Runtime)
        assert session.signed_weights_are_exact() is not saturates
    model, _ = one_layer("MatMul", np.eye(16, dtype=np.float32), None, (1, 4, 16), 1.0)
    twin = cpu_twin(model)
    (product,) = nodes_of(twin, "MatMulIntegerToFloat")
    stored = constants(twin)
    assert stored[product.input[1]].dtype == (np.uint8 if saturates else np.int8)
    zero = int(stored[product.input[5]]) if saturates else 0
    assert zero == (128 if saturates else 0)
    np.testing.assert_array_equal(stored[product.input[1]].astype(int) - zero, 127 * np.eye(16))
    if saturates:  # exact on every CPU
        image = tiles_of(1, 48)[:, :1].reshape(1, -1)[:, :64].reshape(1, 4, 16)
        (found,), (exact,) = (session_of(each).run(["y"], {"image": image}) for each in (twin, model))
        np.testing.assert_array_equal(found, exact)


def test_an_engine_of_a_cpu_with_vnni_is_exact_on_one_without(tmp_path, monkeypatch):
    """What such a CPU stores is signed; this one may saturate."""
    monkeypatch.setattr("cdkd_edge.graph.cpu.signed_weights_are_exact", lambda: True)
    weight = np.full((256, 5), 127, np.float32) * [1, -1, 1, -1, 1]
    model, _ = one_layer("MatMul", weight.astype(np.float32), None, (1, 9, 256), 1.0)
    twin = cpu_twin(model)
    assert constants(twin)[nodes_of(twin, "MatMulIntegerToFloat")[0].input[1]].dtype == np.int8
    options = cpu.engine_options("int8")
    image = np.full((1, 9, 256), 255, np.uint8)
    found = onnxruntime.InferenceSession(twin.SerializeToString(), options).run(["y"], {"image": image})[0]
    np.testing.assert_array_equal(found, session_of(model).run(["y"], {"image": image})[0])


def test_values_that_differ_in_their_last_digits_give_the_same_graph(make_weights, monkeypatch):
    """As they do between CPUs: another order of additions."""
    plain, observe = build_graph(make_weights(CONFIG), CONFIG), calibration.observe
    generator = np.random.default_rng(0)

    def on_another_cpu(*arguments):
        seen = observe(*arguments)
        return {
            name: dataclasses.replace(
                each, channel_max=each.channel_max * generator.uniform(1 - 3e-6, 1 + 3e-6, each.channel_max.shape)
            )
            for name, each in seen.items()
        }

    def graph(calibrator):
        found = calibration.calibrate(plain, tiles_of(3), calibration.CalibrationOptions(calibrator))
        return int8_graph(found.model, found.layers, found.scales).SerializeToString()

    here = {calibrator: graph(calibrator) for calibrator in ("max", "percentile", "mse")}
    monkeypatch.setattr(calibration, "observe", on_another_cpu)
    assert {calibrator: graph(calibrator) for calibrator in here} == here


def test_every_cpu_makes_the_same_graph(make_weights):
    """The first CPU that `make test-cpus` runs this on lays the graphs down, the others compare theirs."""
    if "CDKD_EDGE_GRAPHS" not in os.environ:
        pytest.skip("compares CPUs: make test-cpus")
    for seed in range(3):
        found = calibration.calibrate(build_graph(make_weights(CONFIG, seed), CONFIG), tiles_of(2, seed=seed))
        graph = int8_graph(found.model, found.layers, found.scales).SerializeToString()
        first = Path(os.environ["CDKD_EDGE_GRAPHS"]) / f"{seed}.onnx"
        if not first.exists():
            first.write_bytes(graph)
        assert first.read_bytes() == graph
