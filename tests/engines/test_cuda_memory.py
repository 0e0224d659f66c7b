"""Device memory over both bindings: the same tests, on a simulated driver in the shape of each."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from cuda_fakes import SHAPES, CUresult, World, gpu_over

from cdkd_edge.core.errors import EngineError, MissingExtraError, UsageError
from cdkd_edge.engines.cuda import gpu as cuda_gpu
from cdkd_edge.engines.cuda.gpu import CudaError
from cdkd_edge.engines.cuda.memory import Buffer, CudaStream


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
def world():
    """A discrete device."""
    return World()


@pytest.fixture
def gpu(world, shape):
    return gpu_over(world, shape)


def over(shape, **world):
    world = World(**world)
    return world, gpu_over(world, shape)


def assert_clean(world):
    gc.collect()
    assert not any(world.live().values()), world.live()
    assert not world.leaks
    assert not world.stack()


# --- the device -----------------------------------------------------------------------------------


def test_what_a_device_says_of_itself(gpu, shape):
    assert (gpu.info.name, gpu.info.integrated, gpu.info.runtime_version) == ("Simulated", False, "12.6")
    assert gpu.memory() == (4 << 30, 8 << 30)
    assert gpu.binding == shape


def test_the_primary_context_is_retained_once_and_only_then(world, gpu):
    for _ in range(3):
        Buffer(gpu, (4,)).close()
    assert world.retained == 1
    assert_clean(world)


def test_what_was_current_is_current_again(world, gpu):
    other = object()
    world.stack().append(other)  # as PyTorch leaves it
    with gpu.current(), gpu.current():
        assert world.stack()[-1] is world.context
    assert world.stack() == [other]
    with pytest.raises(ZeroDivisionError), gpu.current():
        _ = 1 / 0
    assert world.stack() == [other]


def test_every_thread_may_use_it(world, gpu):
    buffer, stream, results = Buffer(gpu, (8,)), CudaStream(gpu), []

    def use(value):
        with gpu.current():
            buffer.array.fill(value)
            buffer.upload(stream)
            buffer.array.fill(0)
            stream.drain()  # the simulated copy takes place now: what it reads is the array as it is
            buffer.download(stream)
            stream.drain()
        results.append(world.stack())

    threads = [threading.Thread(target=use, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    assert results == [[]] * 4
    stream.close()
    buffer.close()
    assert_clean(world)


# --- buffers --------------------------------------------------------------------------------------


def test_bytes_go_in_and_out(world, gpu):
    buffer, stream = Buffer(gpu, (2, 3, 4)), CudaStream(gpu)
    content = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    buffer.array[...] = content
    with gpu.current():
        buffer.upload(stream)
        stream.drain()
        assert (world.view(buffer.pointer, 24) == content.ravel()).all()
        buffer.clear(255, stream)
        buffer.download(stream)
        assert (buffer.array == content).all()  # nothing has been waited for
        stream.drain()
    assert (buffer.array == 255).all()
    assert world.done == ["in", "fill", "out"]
    assert not buffer.mapped
    stream.close()
    buffer.close()
    assert_clean(world)


def test_on_an_integrated_device_nothing_is_copied(shape):
    world, gpu = over(shape, integrated=True)
    buffer, stream = Buffer(gpu, (16,)), CudaStream(gpu)
    assert buffer.mapped
    buffer.array[...] = range(16)
    assert (world.view(buffer.pointer, 16) == np.arange(16)).all()
    world.view(buffer.pointer, 16)[...] = 7
    assert (buffer.array == 7).all()
    with gpu.current():
        buffer.upload(stream)
        buffer.clear(255, stream)
        buffer.download(stream)
        stream.drain()
    assert (buffer.array == 7).all()
    assert world.done == []
    assert not world.device
    stream.close()
    buffer.close()
    assert_clean(world)


def test_mapping_can_be_chosen(world, gpu):
    assert Buffer(gpu, (4,), mapped=True).mapped
    assert not world.device
    assert_clean(world)


def test_an_array_outlives_its_buffer(world, gpu):
    buffer = Buffer(gpu, (4,))
    rows = buffer.array[1:]
    rows.fill(9)
    buffer.close()
    buffer.close()
    del buffer
    gc.collect()
    assert (rows == 9).all()
    assert world.live()["host"] == 1
    del rows
    assert_clean(world)


@pytest.mark.parametrize("function", ["cuMemHostAlloc", "cuMemAlloc", "cuMemHostGetDevicePointer"])
def test_what_cannot_be_allocated_leaves_nothing(shape, function):
    world, gpu = over(shape, integrated=function == "cuMemHostGetDevicePointer")
    world.fail(function)
    with pytest.raises(CudaError) as caught:
        Buffer(gpu, (64,))
    assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    assert "64 bytes" in caught.value.message or "mapping" in caught.value.message
    assert "free -h" in caught.value.hint
    del caught
    assert_clean(world)


# --- streams and graphs ---------------------------------------------------------------------------


def test_waiting_is_for_the_mark_and_not_for_what_came_later(world, gpu):
    stream, done = CudaStream(gpu), []
    with gpu.current():
        world.put(stream.handle, "first", lambda: done.append(1))
        stream.mark()
        world.put(stream.handle, "second", lambda: done.append(2))
        assert done == []
        stream.wait()
        assert done == [1]
        stream.drain()
        assert done == [1, 2]
    stream.close()
    stream.close()
    assert_clean(world)


@pytest.mark.parametrize("function", ["cuStreamCreate", "cuEventCreate"])
def test_a_stream_that_cannot_be_made_leaves_nothing(world, gpu, function):
    world.fail(function)
    with pytest.raises(CudaError):
        CudaStream(gpu)
    assert_clean(world)


def test_a_recorded_graph_runs_as_often_as_it_is_replayed():
    world, gpu = over("cuda-python")
    buffer, stream = Buffer(gpu, (4,)), CudaStream(gpu)
    with gpu.current():
        stream.capture(lambda: (buffer.upload(stream), buffer.clear(5, stream), buffer.download(stream)))
        assert stream.captured
        assert world.done == []
        for _ in range(3):
            buffer.array.fill(1)
            stream.replay()
            stream.mark()
            stream.wait()
            assert (buffer.array == 5).all()
        assert world.done == ["in", "fill", "out", "mark"] * 3
        assert world.live()["graphs"] == 1
        stream.capture(lambda: buffer.upload(stream))  # in place of the first
        assert world.live()["graphs"] == 1
    stream.close()
    buffer.close()
    assert_clean(world)


def test_work_that_cannot_be_recorded_leaves_the_stream_usable():
    world, gpu = over("cuda-python")
    buffer, stream = Buffer(gpu, (4,)), CudaStream(gpu)
    with gpu.current():
        with pytest.raises(CudaError, match=r"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            stream.capture(stream.drain)
        with pytest.raises(KeyError):
            stream.capture(lambda: {}["nothing"])
        world.fail("cuGraphInstantiate")
        with pytest.raises(CudaError, match=r"instantiating"):
            stream.capture(lambda: buffer.upload(stream))
        assert not stream.captured
        buffer.upload(stream)
        stream.drain()
    assert world.done == ["in"]
    stream.close()
    buffer.close()
    assert_clean(world)


def test_pycuda_says_that_it_has_no_graphs():
    _, gpu = over("pycuda")
    stream = CudaStream(gpu)
    assert gpu.no_graphs
    with gpu.current(), pytest.raises(CudaError, match=r"no CUDA graphs"):
        stream.capture(lambda: None)
    stream.close()


@pytest.mark.parametrize("function", ["cuEventDestroy", "cuStreamDestroy"])
def test_closing_goes_on_after_an_error(world, function):
    gpu = gpu_over(world, "cuda-python")
    stream = CudaStream(gpu)
    world.fail(function, CUresult.CUDA_ERROR_INVALID_HANDLE)
    with pytest.raises(CudaError, match=r"CUDA_ERROR_INVALID_HANDLE"):
        stream.close()
    assert sum(world.live().values()) == 1
    stream.close()
    assert not world.stack()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("cuMemcpyHtoDAsync", lambda buffer, stream: buffer.upload(stream)),
        ("cuMemcpyDtoHAsync", lambda buffer, stream: buffer.download(stream)),
        ("cuMemsetD8Async", lambda buffer, stream: buffer.clear(0, stream)),
        ("cuEventRecord", lambda buffer, stream: stream.mark()),
        ("cuEventSynchronize", lambda buffer, stream: stream.wait()),
        ("cuStreamSynchronize", lambda buffer, stream: stream.drain()),
        ("cuMemGetInfo", lambda buffer, stream: stream._gpu.memory()),
        ("cuMemFree", lambda buffer, stream: buffer.close()),
        ("cuCtxPushCurrent", lambda buffer, stream: stream._gpu.memory()),
    ],
)
def test_every_error_has_cudas_name_and_what_was_being_done(world, gpu, function, use):
    buffer, stream = Buffer(gpu, (4,)), CudaStream(gpu)
    world.fail(function, CUresult.CUDA_ERROR_INVALID_VALUE)
    with (
        gpu.current() if function != "cuCtxPushCurrent" else pytest.MonkeyPatch.context(),
        pytest.raises(EngineError, match=r"^\w.* failed: CUDA_ERROR_INVALID_VALUE \(invalid argument\)$") as caught,
    ):
        use(buffer, stream)
    assert caught.value.exit_code == 9
    assert not world.stack()


def test_a_lost_context_says_so(world, gpu):
    stream = CudaStream(gpu)
    with gpu.current():
        world.put(stream.handle, "kernel", lambda: world.view(0, 1))
        stream.mark()
        with pytest.raises(CudaError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
            stream.wait()
        assert "start it again" in caught.value.hint
        with pytest.raises(CudaError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS"):
            stream.drain()


def test_no_such_device(world, shape):
    with pytest.raises(CudaError, match=r"finding GPU 3 failed: CUDA_ERROR_INVALID_DEVICE"):
        gpu_over(world, shape, 3)
    world.fail("cuInit", CUresult.CUDA_ERROR_NO_DEVICE)
    with pytest.raises(CudaError, match=r"CUDA_ERROR_NO_DEVICE") as caught:
        gpu_over(world, shape)
    assert "--gpus all" in caught.value.hint


def test_a_missing_driver_library_is_an_answer():
    """As cuda-python says it: RuntimeError at the first call, of whatever class."""
    from cuda_fakes import CudaPythonShape

    from cdkd_edge.engines.cuda.gpu import CudaPythonGpu

    module = CudaPythonShape(World())
    module.cuInit = lambda flags: (_ for _ in ()).throw(RuntimeError("Failed to dlopen libcuda.so.1"))
    with pytest.raises(EngineError, match=r"starting CUDA failed: no CUDA driver .*dlopen"):
        CudaPythonGpu(module=module)


def test_pycudas_texts_get_their_names_even_with_details():
    from cuda_fakes import PyCudaShape

    from cdkd_edge.engines.cuda.gpu import PyCudaGpu

    driver = PyCudaGpu(module=PyCudaShape(World()), error_names={"out of memory": "CUDA_ERROR_OUT_OF_MEMORY"})
    for message in ("cuMemAlloc failed: out of memory", "cuMemAlloc failed: out of memory - it was\n all used"):
        assert driver._error(message, "x").name == "CUDA_ERROR_OUT_OF_MEMORY"
    assert str(driver._error("something else", "x")) == "x failed: CUDA error (something else)"


# --- which binding --------------------------------------------------------------------------------


@pytest.fixture
def bindings(monkeypatch):
    """Both bindings 'installed' over one simulated device; entries can be replaced."""
    world = World()
    table = {name: lambda ordinal, name=name: gpu_over(world, name) for name in SHAPES}
    monkeypatch.setattr(cuda_gpu, "BINDINGS", table)
    monkeypatch.setattr(cuda_gpu, "_open", {})
    monkeypatch.delenv(cuda_gpu.VARIABLE, raising=False)
    return table


def test_cuda_python_is_preferred_and_either_can_be_forced(bindings, monkeypatch):
    assert cuda_gpu.open_gpu().binding == "cuda-python"
    assert cuda_gpu.open_gpu("pycuda").binding == "pycuda"
    monkeypatch.setenv(cuda_gpu.VARIABLE, "pycuda")
    assert cuda_gpu.open_gpu().binding == "pycuda"
    assert cuda_gpu.open_gpu("cuda-python").binding == "cuda-python"
    assert cuda_gpu.open_gpu() is cuda_gpu.open_gpu()


def absent(error):
    def make(ordinal):
        raise error

    return make


def test_the_other_is_taken_where_one_is_missing(bindings):
    bindings["cuda-python"] = absent(ModuleNotFoundError("No module named 'cuda'"))
    assert cuda_gpu.open_gpu().binding == "pycuda"
    bindings["pycuda"] = absent(ModuleNotFoundError("No module named 'pycuda'"))
    cuda_gpu._open.clear()
    with pytest.raises(MissingExtraError, match=r"cuda-python or pycuda") as caught:
        cuda_gpu.open_gpu()
    assert "cdkd-edge[gpu]" in caught.value.hint
    with pytest.raises(MissingExtraError) as caught:
        cuda_gpu.open_gpu("pycuda")
    assert "cdkd-edge[pycuda]" in caught.value.hint


def test_a_broken_installation_is_named(bindings):
    bindings["cuda-python"] = absent(ImportError("libnvrtc.so.12: cannot open\nshared object file"))
    assert cuda_gpu.open_gpu().binding == "pycuda"
    with pytest.raises(EngineError, match=r"cuda-python cannot be imported: libnvrtc.so.12: cannot open shared"):
        cuda_gpu.open_gpu("cuda-python")


def test_no_driver_is_not_a_reason_to_try_the_other(bindings):
    bindings["cuda-python"] = absent(CudaError("CUDA_ERROR_NO_DEVICE", "", "starting CUDA"))
    with pytest.raises(CudaError):
        cuda_gpu.open_gpu()


def test_an_unknown_binding_is_wrong_usage(bindings, monkeypatch):
    with pytest.raises(UsageError, match=r"'cupy'; there are cuda-python and pycuda"):
        cuda_gpu.open_gpu("cupy")
    monkeypatch.setenv(cuda_gpu.VARIABLE, "cupy")
    with pytest.raises(UsageError, match=cuda_gpu.VARIABLE):
        cuda_gpu.open_gpu()


# --- threads --------------------------------------------------------------------------------------


def test_it_can_be_closed_in_another_thread(world, gpu):
    """PyCUDA refuses to destroy what its own thread did not make, unless the context is current."""
    parts = [CudaStream(gpu), Buffer(gpu, (4,)), Buffer(gpu, (4,), mapped=True)]
    thread = threading.Thread(target=lambda: [parts.pop().close() for _ in range(3)])
    thread.start()
    thread.join()
    assert not parts
    assert_clean(world)
