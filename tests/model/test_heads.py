"""Heads of other projects compute here what they compute there, and those that are no UPerNet are refused by name.

What they compute was recorded (``helpers/peer_heads.py``), so that no project's package is needed; where they are
installed, the record is compared with them (``make test-encoders``).
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from encoder_files import image_of, samples  # noqa: E402
from head_files import NETWORKS, TILE, write_network  # noqa: E402

from cdkd_edge.model.checkpoint import load_checkpoint  # noqa: E402

pytestmark = pytest.mark.needs_torch


def logits_of(network):
    with torch.inference_mode():
        return network.upsample(network(torch.from_numpy(image_of(TILE)))).numpy()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_project(tmp_path, name):
    taps = "1,2,4,5" if name.startswith("smp") else None  # nothing in such a file says it
    network, report = load_checkpoint(write_network(tmp_path, name), tile=TILE, taps=taps)
    found, expected = samples(logits_of(network)), np.array(NETWORKS[name]["logits"])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=str(report.notes))
