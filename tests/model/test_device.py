"""Where and how precisely PyTorch computes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from cdkd_edge.model import device as module  # noqa: E402
from cdkd_edge.model.device import chosen_precision  # noqa: E402

pytestmark = pytest.mark.needs_torch


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", "bf16"),
        ("Features : fp asimd bf16 i8mm", "bf16"),
        ("flags : fpu avx2 avx512f avx512_vnni", "fp32"),
        (None, "fp32"),
    ],
)
def test_bf16_is_chosen_where_the_cpu_has_it(flags, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(module, "_CPU_FLAGS", path)
    assert chosen_precision("auto", torch.device("cpu")) == expected
    assert chosen_precision("auto", torch.device("mps")) == "fp32"
    assert chosen_precision("fp16", torch.device("cpu")) == "fp16"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_chosen_where_the_gpu_has_it(has_bf16, monkeypatch):
    """Older GPUs emulate it, slowly."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    assert chosen_precision("auto", torch.device("cuda")) == ("bf16" if has_bf16 else "fp32")
