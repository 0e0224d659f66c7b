"""Every encoder that can be loaded can be a teacher; before the first step it gives the features of its project."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from encoder_files import BLOCKS, FAMILIES, image_of, samples, write_encoder  # noqa: E402

from cdkd_edge.distillation.networks import AdaptedTeacher  # noqa: E402
from cdkd_edge.distillation.teacher import load_teacher  # noqa: E402

pytestmark = pytest.mark.needs_torch


@pytest.mark.parametrize("family", [name for name in FAMILIES if "5.x" not in name])
def test_an_adapted_teacher_starts_as_its_encoder(tmp_path, family):
    side, maps = next(iter(FAMILIES[family]["features"].items()))
    teacher, _ = load_teacher(write_encoder(tmp_path, family), int(side))
    adapted = AdaptedTeacher(teacher, "identity")
    with torch.inference_mode():
        tokens = teacher.embed(torch.from_numpy(image_of(int(side))))
        after = adapted.run(tokens, BLOCKS, teacher.turn())
    for found, expected in zip(after, maps, strict=True):
        patches = found[:, teacher.config.extra_tokens :].transpose(1, 2)
        np.testing.assert_allclose(samples(patches.numpy()), expected, atol=1e-4)
