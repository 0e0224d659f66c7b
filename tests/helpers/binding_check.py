"""Runs in a process of its own against simulated_libcuda.c: an installed binding makes its real calls.

    python binding_check.py BINDING LIBCUDA

Prints one line, "ok", or leaves with a traceback.
"""

import ctypes
import gc
import os
import sys
import threading

import numpy as np


def main(binding, library):
    simulated = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 now gets this one
    if binding == "pycuda":
        sys.setdlopenflags(os.RTLD_LAZY)  # it is linked to hundreds of functions; the library has those in use

    from cdkd_edge.engines.cuda.gpu import CudaError, open_gpu
    from cdkd_edge.engines.cuda.memory import Buffer, CudaStream

    gpu = open_gpu(binding)
    assert gpu is open_gpu(binding)
    info = gpu.info
    assert (info.name, info.integrated) == ("Simulated", False), info
    assert gpu.memory() == (4 << 30, 8 << 30)
    base = simulated.simulated_live()

    def round_trip(mapped):
        buffer, stream = Buffer(gpu, (2, 3, 50), mapped=mapped), CudaStream(gpu)
        assert all(type(number) is int and number > 0 for number in (stream.handle, buffer.pointer))
        content = np.random.default_rng(0).integers(0, 255, buffer.array.shape, np.uint8)
        with gpu.current():
            buffer.array[...] = content
            buffer.upload(stream)
            if not mapped:
                buffer.array.fill(0)
            buffer.download(stream)
            stream.mark()
            stream.wait()
            assert (buffer.array == content).all()
            buffer.clear(255, stream)
            buffer.download(stream)
            stream.drain()
            assert mapped or (buffer.array == 255).all()
            if gpu.no_graphs is None and not mapped:
                stream.capture(lambda: (buffer.clear(7, stream), buffer.download(stream)))
                assert (buffer.array == 255).all()
                stream.replay()
                stream.drain()
                assert (buffer.array == 7).all()
        held = buffer.array[0]
        expected = held.copy()
        stream.close()
        buffer.close()
        assert (held == expected).all()

    for mapped in (False, True):
        round_trip(mapped)
        thread = threading.Thread(target=round_trip, args=(mapped,))
        thread.start()
        thread.join()
    gc.collect()
    assert simulated.simulated_live() == base, simulated.simulated_live()
    assert simulated.simulated_depth() == 0
    assert simulated.simulated_retained() == 1

    def failing(function, code, use):
        simulated.simulated_fail(function.encode(), code)
        try:
            use()
        except CudaError as error:
            return error.name, str(error)
        raise AssertionError(f"{function} did not fail")

    name, text = failing("cuMemHostAlloc", 2, lambda: Buffer(gpu, (100,)))
    assert name == "CUDA_ERROR_OUT_OF_MEMORY", name
    assert text == "allocating 100 bytes of page-locked memory failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)", text
    name, _ = failing("cuMemAlloc", 1, lambda: Buffer(gpu, (100,)))  # PyCUDA tries again if it is for lack of memory
    assert name == "CUDA_ERROR_INVALID_VALUE"
    name, _ = failing("cuStreamCreate", 400, lambda: CudaStream(gpu))
    assert name == "CUDA_ERROR_INVALID_HANDLE"
    name, _ = failing("cuEventCreate", 1, lambda: CudaStream(gpu))
    assert name == "CUDA_ERROR_INVALID_VALUE"
    stream = CudaStream(gpu)
    with gpu.current():
        for function, use in (("cuEventSynchronize", stream.wait), ("cuStreamSynchronize", stream.drain)):
            assert failing(function, 400, use)[0] == "CUDA_ERROR_INVALID_HANDLE"
    stream.close()
    gc.collect()
    assert simulated.simulated_live() == base
    assert simulated.simulated_depth() == 0
    print("ok", gpu.info)


if __name__ == "__main__":
    main(*sys.argv[1:])
