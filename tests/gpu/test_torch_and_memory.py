"""What a GPU can prove without TensorRT: device memory over both bindings, and the network in FP16."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from gpu_helpers import resident_bytes, timed, timed_labeller

BYTES = 1024 * 1024 + 13


@pytest.fixture(params=[False, True], ids=["copied", "mapped"])
def pair(gpu, request):
    """A buffer of either kind and a stream."""
    from cdkd_edge.engines.cuda.memory import Buffer, CudaStream

    buffer, stream = Buffer(gpu, (BYTES,), mapped=request.param), CudaStream(gpu)
    yield buffer, stream
    stream.close()
    buffer.close()


# --- device memory --------------------------------------------------------------------------------


def test_the_device_describes_itself(gpu, capsys):
    with capsys.disabled():
        print(f"\n{gpu.binding}: {gpu.info}")
    assert gpu.info.name
    free, total = gpu.memory()
    assert 0 < free <= total


def test_bytes_go_in_and_out(gpu, pair):
    buffer, stream = pair
    content = np.random.default_rng(0).integers(0, 256, BYTES, np.uint8)
    buffer.array[...] = content
    with gpu.current():
        buffer.upload(stream)
        stream.drain()
        if not buffer.mapped:
            buffer.array.fill(0)
        buffer.download(stream)
        stream.mark()
        stream.wait()
    assert (buffer.array == content).all()


def test_the_device_writes(gpu, pair):
    """memset by the device, into its own memory and through a mapping."""
    buffer, stream = pair
    buffer.array.fill(1)
    with gpu.current():
        gpu.call("filling", "cuMemsetD8Async", buffer.pointer, 255, BYTES, stream.raw)
        buffer.download(stream)
        stream.mark()
        stream.wait()
    assert (buffer.array == 255).all()


def test_a_graph_of_copies(gpu):
    from cdkd_edge.engines.cuda.memory import Buffer, CudaStream

    if gpu.no_graphs:
        pytest.skip(gpu.no_graphs)
    buffer, stream = Buffer(gpu, (BYTES,), mapped=False), CudaStream(gpu)
    with gpu.current():
        stream.capture(lambda: (buffer.upload(stream), buffer.download(stream)))
        for value in range(5):
            buffer.array.fill(value)
            stream.replay()
            stream.mark()
            stream.wait()
            assert (buffer.array == value).all()
        stream.capture(lambda: (buffer.clear(9, stream), buffer.download(stream)))
        stream.replay()
        stream.drain()
        assert (buffer.array == 9).all()
    stream.close()
    buffer.close()


def test_other_threads(gpu, pair):
    failures = []

    def use():
        try:
            test_bytes_go_in_and_out(gpu, pair)
        except BaseException as error:
            failures.append(error)

    for _ in range(4):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert not failures


def test_an_impossible_allocation_is_an_answer(gpu):
    from cdkd_edge.engines.cuda.gpu import CudaError

    before = gpu.memory()[0]
    with gpu.current(), pytest.raises(CudaError, match=r"CUDA_ERROR_OUT_OF_MEMORY"):
        gpu.call("allocating", "cuMemAlloc", 1 << 50)
    assert gpu.memory()[0] >= before - (64 << 20)


def test_memory_is_given_back(gpu):
    from cdkd_edge.engines.cuda.memory import Buffer, CudaStream

    def once():
        buffer, stream = Buffer(gpu, (64 << 20,), mapped=False), CudaStream(gpu)
        with gpu.current():
            buffer.upload(stream)
            stream.drain()
        stream.close()
        buffer.close()

    once()
    gc.collect()
    free, resident = gpu.memory()[0], resident_bytes()
    for _ in range(50):
        once()
    assert gpu.memory()[0] >= free - (64 << 20)
    assert resident_bytes() <= resident + (64 << 20)


ORDERS = """
import sys
import numpy as np

def ours():
    from cdkd_edge.engines.cuda.gpu import open_gpu
    from cdkd_edge.engines.cuda.memory import Buffer, CudaStream
    gpu = open_gpu(sys.argv[2])
    buffer, stream = Buffer(gpu, (1000,), mapped=False), CudaStream(gpu)
    buffer.array.fill(3)
    with gpu.current():
        buffer.upload(stream)
        stream.drain()
        buffer.array.fill(0)
        buffer.download(stream)
        stream.drain()
    assert (buffer.array == 3).all()
    return lambda: (stream.close(), buffer.close())

def theirs():
    import torch
    a = torch.full((256, 256), 2.0, device="cuda")
    assert float((a @ a).sum()) == 256 * 256 * 256 * 4
    torch.cuda.synchronize()

first, second = (ours, theirs) if sys.argv[1] == "ours" else (theirs, ours)
closes = [first(), second(), ours(), theirs()]
for close in closes:
    if close:
        close()
theirs()
print("fine")
"""


@pytest.mark.parametrize("first", ["ours", "torch"])
def test_beside_torch_in_both_orders(gpu, torch_cuda, first):
    """In a process of its own, where nothing has been initialised."""
    command = [sys.executable, "-c", ORDERS, first, gpu.binding]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.stdout.strip() == "fine", answer.stderr


# --- the network in FP16 --------------------------------------------------------------------------


def labels_of(labeller, tiles):
    from cdkd_edge.engines.protocol import segment_tiles

    return segment_tiles(labeller, tiles)


@pytest.fixture(scope="session", params=["half", "autocast"])
def fp16_network(request, torch_cuda, checkpoint, network):
    """Eager FP16: every tensor in FP16, or autocast."""
    from cdkd_edge.model.checkpoint import load_checkpoint
    from cdkd_edge.quality.network import NetworkLabeller

    own, _ = load_checkpoint(checkpoint)
    own.cuda().eval()
    half = request.param == "half"
    labeller = NetworkLabeller(
        own.half() if half else own, network.schema, network.artefact, precision="fp32" if half else "fp16"
    )
    labeller.name = f"PyTorch eager FP16 ({request.param})"
    return labeller


def test_fp16_in_torch_labels_as_fp32(fp16_network, network, tiles, mean_iou, capsys):
    agreement = float((labels_of(fp16_network, tiles) == labels_of(network, tiles)).mean())
    reference, scored = mean_iou(network), mean_iou(fp16_network)
    with capsys.disabled():
        print(f"\n{fp16_network.name}: agreement {agreement:.4%}, mIoU {scored:.4%} (FP32 {reference:.4%})")
    assert agreement >= 0.999
    assert abs(scored - reference) <= 0.0002  # the paper's loss: at most 0.02 points


def test_the_speed_of_torch(network, fp16_network, tiles, timings):
    if not any(row.what.endswith("FP32") for row in timings):
        timings.append(timed_labeller("PyTorch eager FP32", network, tiles))
    timings.append(timed_labeller(fp16_network.name, fp16_network, tiles))


def test_the_speed_of_compiled_torch(torch_cuda, checkpoint, tiles, network, timings):
    from cdkd_edge.model.checkpoint import load_checkpoint

    own, _ = load_checkpoint(checkpoint)
    own.cuda().half().eval()
    compiled = torch_cuda.compile(own)

    def run(index):
        with torch_cuda.inference_mode():
            image = torch_cuda.from_numpy(tiles[index % len(tiles)][None]).cuda()
            return own.upsample(compiled(image).float()).argmax(dim=1).to(torch_cuda.uint8).cpu().numpy()

    try:
        labels = run(0)
    except Exception as error:  # the compiler's own types; it needs Triton and a C compiler
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0][:200]}")
    assert (labels == labels_of(network, tiles[:1])).mean() >= 0.999
    timings.append(timed("PyTorch torch.compile FP16", run))
