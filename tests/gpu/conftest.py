"""Tests on a real GPU: ``make test-gpu``. Elsewhere, and in the ordinary run, all of them are skipped and say why.

Environment, all optional: DATA, a labelled folder (default: drawn scenes); SCHEMA, how its masks encode classes;
CHECKPOINT, a trained network (default: the bundled one); GRAPHS, a folder with its graphs (default: they are made).
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest
from gpu_helpers import draw_labelled_set, no_gpu, tiles_of

_TIMINGS = pytest.StashKey()


def _why_not():
    if os.environ.get("CDKD_EDGE_TEST_GPU") != "1":
        return "on a machine with an NVIDIA GPU: make test-gpu"
    return no_gpu()


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if ours and (reason := _why_not()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cuda-python", "pycuda"])
def gpu(request):
    """The GPU through each binding that is installed."""
    from cdkd_edge.core.errors import MissingExtraError
    from cdkd_edge.engines.cuda.gpu import open_gpu

    try:
        return open_gpu(request.param)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def torch_cuda():
    """PyTorch with CUDA."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """CHECKPOINT, or the bundled one."""
    if path := os.environ.get("CHECKPOINT"):
        return Path(path)
    copy = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    copy.write_bytes((resources.files("cdkd_edge.demo") / "tiny.safetensors").read_bytes())
    return copy


@pytest.fixture(scope="session")
def network(torch_cuda, checkpoint):
    """The checkpoint in FP32 on the GPU, without TF32: the reference."""
    from cdkd_edge.quality.network import load_network

    torch_cuda.backends.cudnn.allow_tf32 = False
    torch_cuda.backends.cuda.matmul.allow_tf32 = False
    labeller, _ = load_network(checkpoint, device="cuda", schema=None if os.environ.get("DATA") else "dubai")
    return labeller


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, network):
    """DATA, or drawn scenes of four tiles each."""
    from cdkd_edge.quality.datasets import find_dataset

    folder = os.environ.get("DATA")
    return find_dataset(
        Path(folder) if folder else draw_labelled_set(tmp_path_factory.mktemp("drawn") / "set", 2 * network.tile)
    )


@pytest.fixture(scope="session")
def tiles(dataset, network):
    """uint8 ``[M, 3, T, T]``."""
    return tiles_of(dataset.folder, dataset, network.tile)


@pytest.fixture(scope="session")
def mean_iou(dataset):
    """``mean_iou(labeller)`` on the dataset, through the path of ``cdkd-edge evaluate``, 0..1."""
    from cdkd_edge.quality.evaluate import data_schema, evaluate

    def judge(labeller):
        schema = data_schema(dataset, os.environ.get("SCHEMA") or None, labeller.schema)
        return evaluate(labeller, dataset, schema).matrix.mean_iou

    return judge


@pytest.fixture(scope="session")
def timings(request):
    """Append :class:`gpu_helpers.Timing`; a table of them ends the run."""
    return request.config.stash.setdefault(_TIMINGS, [])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_TIMINGS, [])
    if not rows:
        return
    terminalreporter.section("tiles from host to labels on host")
    terminalreporter.line(f"{'':44} {'tiles/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
    for row in rows:
        numbers = (row.tiles_per_second, row.p50, row.p95, row.p99)
        terminalreporter.line(f"{row.what:44} " + " ".join(f"{number:9.2f}" for number in numbers))
