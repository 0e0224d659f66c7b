"""Encoders of timm, transformers and facebookresearch compute here what they compute there, at any tile.

What they compute was recorded (``helpers/peer_encoders.py``), so that neither package is needed; where they are
installed, the record is compared with them (``make test-encoders``).
"""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from encoder_files import BLOCKS, FAMILIES, image_of, samples, weights_of, write_encoder  # noqa: E402

from cdkd_edge.model.checkpoint import load_encoder  # noqa: E402

pytestmark = pytest.mark.needs_torch

TIMM = {"timm vit": "timm ViT", "timm dinov3": "timm DINOv3"}
CASES = [(name, int(tile)) for name, family in FAMILIES.items() for tile in family["features"]]


@pytest.mark.parametrize(("family", "tile"), CASES, ids=lambda value: str(value))
def test_features_are_those_of_the_project(tmp_path, family, tile):
    path = write_encoder(tmp_path, family)
    encoder, report = load_encoder(path, tile=tile)
    with torch.inference_mode():
        maps = encoder(torch.from_numpy(image_of(tile)))
    for block, expected in zip(BLOCKS, FAMILIES[family]["features"][str(tile)], strict=True):
        found = samples(maps[block].numpy())
        np.testing.assert_allclose(found, expected, atol=1e-4)
