"""INT8 on a CPU whose products saturate is refused, not wrong."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from cdkd_edge.engines import integers
from cdkd_edge.errors import EngineError


@pytest.fixture(autouse=True)
def asked_anew():
    integers.integers_are_exact.cache_clear()
    yield
    integers.integers_are_exact.cache_clear()


def test_the_answer_comes_from_the_runtime(monkeypatch):
    class Saturating(onnxruntime.InferenceSession):
        def run(self, names, feed):
            (product,) = super().run(names, feed)
            return [np.minimum(product, 32 * 32767)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert not integers.integers_are_exact()
    with pytest.raises(EngineError, match="saturate") as caught:
        integers.require_exact_integers()
    assert "FP32 engine" in caught.value.hint


def test_exact_products_pass(monkeypatch):
    class Exact(onnxruntime.InferenceSession):
        def run(self, names, feed):
            return [np.full((64, 64), 64 * 255 * 127, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Exact)
    integers.require_exact_integers()
