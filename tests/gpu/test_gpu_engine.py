"""TensorRT engines on a GPU: as the network labels, over both bindings, without growth, beside PyTorch."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_helpers import resident_bytes, timed_labeller

PRECISIONS = ("fp32", "fp16", "int8")
AGREEMENT = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
LOSS = {"fp32": 0.0002, "fp16": 0.0002, "int8": 0.005}
"""Of mIoU, 0..1: the tolerances of ``cdkd-edge parity``."""


def command(*arguments, cwd=None):
    """Run ``cdkd-edge`` as a user would."""
    line = [sys.executable, "-m", "cdkd_edge", *map(str, arguments)]
    answer = subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)
    assert answer.returncode == 0, f"{' '.join(line)}\n{answer.stdout}\n{answer.stderr}"


@pytest.fixture(scope="session")
def tensorrt():
    """The TensorRT that is installed."""
    from cdkd_edge.core.errors import EngineError
    from cdkd_edge.engines.tensorrt.find import find_tensorrt

    try:
        return find_tensorrt()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def build(tensorrt, checkpoint, dataset, tmp_path_factory):
    """``build(precision)``: path of an engine, from GRAPHS or through every stage from the checkpoint."""
    workspace, built = tmp_path_factory.mktemp("workspace"), {}
    given = os.environ.get("GRAPHS")

    def from_graphs(precision):
        from cdkd_edge.core.manifest import output_of, precision_of
        from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine

        graphs = [path for path in sorted(Path(given).glob("*.onnx")) if output_of(path) == "labels"]
        found = [path for path in graphs if precision_of(path) == precision]
        if not found:
            pytest.skip(f"GRAPHS={given} holds no {precision} graph")
        destination = workspace / "engines" / f"{found[0].name.split('.')[0]}.{precision}.engine"
        build_tensorrt_engine(found[0], destination)
        return destination

    def from_checkpoint(precision):
        if not built:
            command("export", checkpoint.absolute(), "-w", workspace)
        if precision == "int8":
            images = [pair.image.absolute() for pair in dataset]
            command("calibrate", *images, "-w", workspace)
        command("build", f"--{precision}", "--runtime", "tensorrt", "-w", workspace)
        (path,) = (workspace / "engines").glob(f"*.{precision}.engine")
        return path

    def engine_of(precision):
        if precision not in built:
            built[precision] = (from_graphs if given else from_checkpoint)(precision)
        return built[precision]

    return engine_of


@pytest.fixture
def load(build, gpu):
    """``load(precision, **options)``: an engine over the binding under test; closed afterwards."""
    from cdkd_edge.core.manifest import EngineManifest, read_manifest
    from cdkd_edge.engines.tensorrt.runner import TensorRTEngine

    engines = []

    def make(precision="fp16", **options):
        path = build(precision)
        engines.append(TensorRTEngine(path, read_manifest(path, EngineManifest), gpu=gpu, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def labels_of(labeller, tiles):
    from cdkd_edge.engines.protocol import segment_tiles

    return segment_tiles(labeller, tiles)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_engine_labels_as_the_network(load, precision, network, tiles, mean_iou, capsys):
    engine = load(precision)
    agreement = float((labels_of(engine, tiles) == labels_of(network, tiles)).mean())
    reference, scored = mean_iou(network), mean_iou(engine)
    with capsys.disabled():
        print(f"\n{precision}: agreement {agreement:.4%}, mIoU {scored:.4%} (network {reference:.4%})")
    assert agreement >= AGREEMENT[precision]
    assert reference - scored <= LOSS[precision]


@pytest.mark.parametrize("kind", ["confidence", "probabilities"])
def test_confidence_is_that_of_the_network(build, load, gpu, network, tiles, tmp_path, kind):
    """An FP16 engine with one output more: the plain engine's labels, and softmax within FP16's rounding of logits."""
    import torch

    from cdkd_edge.engines.tensorrt.build import build_tensorrt_engine
    from cdkd_edge.engines.tensorrt.runner import TensorRTEngine
    from cdkd_edge.graph.outputs import write_variant

    plain = load("fp16")
    folder = Path(os.environ["GRAPHS"]) if os.environ.get("GRAPHS") else build("fp16").parents[1] / "export"
    graph = tmp_path / "variant.onnx"
    write_variant(folder / plain.manifest.graph.file, graph, kind)
    path = tmp_path / "engines" / "variant.engine"
    engine = TensorRTEngine(path, build_tensorrt_engine(graph, path), gpu=gpu)
    try:
        for tile in tiles[:4]:
            for labeller in (plain, engine):
                labeller.input(0)[...] = tile
                labeller.launch(0)
                labeller.wait(0)
            with torch.inference_mode():
                pixels = torch.from_numpy(tile[None]).to(network.device)
                share = network.network.upsample(network.network(pixels).float()).softmax(dim=1).amax(dim=1)
            assert (engine.output(0) == plain.output(0)).mean() > 0.9999
            assert abs(engine.confidence(0) - 100 * share.cpu().numpy()).mean() < 1.0
    finally:
        engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_and_without_a_cuda_graph(load, precision, tiles):
    replayed, plain = load(precision), load(precision, cuda_graph=False)
    if replayed.no_graph:
        pytest.skip(replayed.no_graph)
    assert (labels_of(replayed, tiles) == labels_of(plain, tiles)).all()


def test_slots_in_flight_together(load, tiles):
    engine = load()
    expected = labels_of(engine, tiles[: engine.slots])
    for slot in range(engine.slots):
        engine.input(slot)[...] = tiles[slot]
        engine.launch(slot)
    for slot in reversed(range(engine.slots)):
        engine.wait(slot)
        assert (engine.output(slot)[0] == expected[slot]).all()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_thousand_tiles_do_not_grow(load, gpu, tiles, cuda_graph):
    engine = load(cuda_graph=cuda_graph)
    first = labels_of(engine, tiles[:1])

    def run(count):
        for index in range(count):
            slot = index % engine.slots
            engine.input(slot)[...] = tiles[index % len(tiles)]
            engine.launch(slot)
            engine.wait(slot)

    run(50)
    gc.collect()
    free, resident = gpu.memory()[0], resident_bytes()
    run(1000)
    gc.collect()
    if not gpu.info.integrated:  # there, free memory is everybody's
        assert gpu.memory()[0] >= free - (8 << 20)
    assert resident_bytes() <= resident + (16 << 20)
    assert (labels_of(engine, tiles[:1]) == first).all()


def test_an_interrupted_run_shows_255(load, tiles, monkeypatch):
    engine = load()
    held = engine.output(0)
    labels_of(engine, tiles[:1])
    assert not (held == 255).any()

    def interrupted(stream):
        raise KeyboardInterrupt

    engine.launch(0)
    assert (engine.output(0) == 255).all()
    with monkeypatch.context() as patch:
        patch.setattr("cdkd_edge.engines.cuda.memory.CudaStream.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.wait(0)
    assert (engine.output(0) == 255).all()
    assert (held == 255).all()
    assert not (labels_of(engine, tiles[:1]) == 255).any()


def test_engines_are_given_back(load, gpu, tiles):
    load().close()
    gc.collect()
    free = gpu.memory()[0]
    for _ in range(5):
        engine = load()
        labels_of(engine, tiles[:1])
        engine.close()
    gc.collect()
    if not gpu.info.integrated:
        assert gpu.memory()[0] >= free - (32 << 20)


ORDERS = """
import sys
from pathlib import Path
import numpy as np

path, first, binding = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def torch_sum():
    import torch
    a = torch.full((256, 256), 2.0, device="cuda")
    assert float((a @ a).sum()) == 256 * 256 * 256 * 4

def load():
    from cdkd_edge.engines.cuda.gpu import open_gpu
    from cdkd_edge.engines.tensorrt.runner import TensorRTEngine
    from cdkd_edge.core.manifest import EngineManifest, read_manifest
    return TensorRTEngine(path, read_manifest(path, EngineManifest), gpu=open_gpu(binding))

def label(engine):
    from cdkd_edge.engines.protocol import segment_tiles
    tile = np.random.default_rng(0).integers(0, 256, (1, 3, engine.tile, engine.tile), np.uint8)
    return segment_tiles(engine, tile)

if first == "torch":
    torch_sum()
engine = load()
before = label(engine)
torch_sum()
assert (label(engine) == before).all()
engine.close()
torch_sum()
engine = load()
assert (label(engine) == before).all()
engine.close()
print("fine")
"""


@pytest.mark.parametrize("first", ["torch", "engine"])
def test_beside_torch_in_both_orders(build, gpu, torch_cuda, first):
    """In a process of its own, where nothing has been initialised."""
    line = [sys.executable, "-c", ORDERS, str(build("fp16")), first, gpu.binding]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert answer.stdout.strip().endswith("fine"), answer.stderr


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_speed_of_the_engine(load, precision, tiles, timings, tensorrt):
    for cuda_graph in (True, False):
        engine = load(precision, cuda_graph=cuda_graph)
        if cuda_graph and engine.no_graph:
            continue
        graph = "CUDA graph" if cuda_graph else "no graph"
        what = f"{tensorrt.name} {precision.upper()}, {engine.gpu.binding}, {graph}"
        timings.append(timed_labeller(what, engine, tiles))


def test_a_damaged_engine_is_refused(build, gpu, tmp_path):
    """Its hash would have told; here TensorRT itself is asked."""
    from cdkd_edge.core.errors import EngineError
    from cdkd_edge.core.manifest import EngineManifest, read_manifest
    from cdkd_edge.engines.tensorrt.runner import TensorRTEngine

    path = build("fp16")
    manifest = read_manifest(path, EngineManifest)
    content = path.read_bytes()
    for name, damaged in (("empty", b""), ("half", content[: len(content) // 2]), ("noise", b"x" * 1000)):
        broken = tmp_path / f"{name}.engine"
        broken.write_bytes(damaged)
        with pytest.raises(EngineError, match=r"cannot load"):
            TensorRTEngine(broken, manifest, gpu=gpu)
