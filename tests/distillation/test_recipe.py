"""The recipe of a distillation: the paper's defaults, and values that are refused."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

from cdkd_edge.core.errors import UsageError
from cdkd_edge.distillation.recipe import DistillRecipe

pytestmark = pytest.mark.needs_torch


def test_defaults_are_the_papers():
    recipe = DistillRecipe()
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch, recipe.epochs) == (1e-5, 0.01, 4, 120)
    assert (recipe.clip_norm, recipe.schedule, recipe.warm_up) == (1.0, "constant", 0)
    assert (recipe.method, recipe.gate, recipe.mask, recipe.cell) == ("masked", "identity", "cells", 2)
    assert (recipe.feedback, recipe.target, recipe.pixels) == ("both", "standardized", "normalized")
    assert (recipe.pairs, recipe.loss_weights) == ((), ())  # by the depths, and by the schedule


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"method": "masks"}, "--method must be one of masked, features, mae, got masks"),
        ({"gate": "open"}, "--gate must be one of identity, convex, got open"),
        ({"feedback": "teacher"}, "--feedback must be one of both, student, got teacher"),
        ({"mask": "random"}, "--mask must be one of cells, grid, got random"),
        ({"cell": 1}, "--cell must be 2 to 8, got 1"),
        ({"projection": "shared"}, "--projection must be one of auto, linear, none, got shared"),
        ({"target": "norm"}, "--target must be one of standardized, raw, got norm"),
        ({"pixels": "grey"}, "--pixels must be one of normalized, patch, raw, got grey"),
        ({"pairs": ((3, 0),)}, "--pairs must be blocks from 1 on, got ((3, 0),)"),
        ({"decoder_depth": 0}, "--decoder-depth must be 1 to 48, got 0"),
        ({"loss_weights": (0.6, 0.2)}, "--loss-weights must be three numbers, not all 0"),
        ({"method": "mae", "loss_weights": (0.6, 0.2, 0.2)}, "--loss-weights must be left out: only method masked"),
        ({"loss_weights": (0.0, 0.0, 0.0)}, "--loss-weights must be three numbers, not all 0"),
        ({"loss_weights": (0.6, -0.2, 0.6)}, "--loss-weights must be three numbers, not all 0"),
        ({"loss_weights": (0.6, float("nan"), 0.6)}, "--loss-weights must be three numbers, not all 0"),
        ({"logits": -1.0}, "--logits must be 0 or more, got -1.0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused(value, text):
    with pytest.raises(UsageError, match="^" + re.escape(text)):
        DistillRecipe(**value)


@pytest.mark.parametrize(
    ("method", "adapters", "masked", "gate"),
    [
        ("masked", True, True, "convex"),
        ("masked", False, True, None),
        ("features", True, False, None),
        ("mae", True, True, None),
    ],
)
def test_methods_differ_in_masks_and_adapters(method, adapters, masked, gate):
    recipe = DistillRecipe(method=method, adapters=adapters, gate="convex")
    assert (recipe.masked, recipe.gate_used) == (masked, gate)
