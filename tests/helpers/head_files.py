"""Small segmentation networks of other projects: their tensors' names, and the logits that the projects compute.

``heads.json`` holds, for each network, the tensors of a file by name and shape, what else is in the file or in its
``config.json``, and samples of the logits at pixels. ``peer_heads.py`` recorded them with the projects' own code. The
weights are made from the names, as in ``encoder_files.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from encoder_files import weights_of

RECORDED = Path(__file__).with_name("heads.json")
NETWORKS: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
TILE = 96


def tensors_of(network: str) -> dict[str, Any]:
    """The weights; in a file of Lightning, their names begin with ``model.``, which they are not made from."""
    import torch

    shapes = NETWORKS[network]["tensors"]
    plain = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    made = weights_of(plain)
    return {name: torch.from_numpy(np.array(made[name.removeprefix("model.")])) for name in shapes}


def write_network(folder: Path, network: str, **changes: Any) -> Path:
    """Write the file of a network, and its ``config.json`` if it has one; returns the file, or the folder.

    ``changes`` are made to what is beside the weights, in the file or in the ``config.json``.
    """
    import torch
    from safetensors.torch import save_file

    recorded, state = NETWORKS[network], tensors_of(network)
    folder.mkdir(parents=True, exist_ok=True)
    if "config" in recorded:
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**recorded["config"], **changes}))
        return folder
    torch.save({"state_dict": state, **recorded.get("document", {}), **changes}, folder / "network.ckpt")
    return folder / "network.ckpt"
