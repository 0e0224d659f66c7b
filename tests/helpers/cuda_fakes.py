"""A CUDA driver of host memory, in the shape of cuda-python and in that of PyCUDA, and a TensorRT upon it.

For tests of what can be separated from a device: order of calls, balance of allocations, contexts per thread, errors.
Work put into a stream is done when somebody waits for it, as late as a real device may (or at once: ``eager``).
Nothing in the package knows of it; tests hand it over.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import threading
from types import SimpleNamespace

import numpy as np

ALIAS = 1 << 44
"""A mapped host address as the device sees it is another number, so that mixing them up is found."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


TEXTS = {
    CUresult.CUDA_ERROR_INVALID_VALUE: "invalid argument",
    CUresult.CUDA_ERROR_OUT_OF_MEMORY: "out of memory",
    CUresult.CUDA_ERROR_NO_DEVICE: "no CUDA-capable device is detected",
    CUresult.CUDA_ERROR_INVALID_DEVICE: "invalid device ordinal",
    CUresult.CUDA_ERROR_INVALID_CONTEXT: "invalid device context",
    CUresult.CUDA_ERROR_INVALID_HANDLE: "invalid resource handle",
    CUresult.CUDA_ERROR_ILLEGAL_ADDRESS: "an illegal memory access was encountered",
    CUresult.CUDA_ERROR_LAUNCH_FAILED: "unspecified launch failure",
    CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: "operation failed due to a previous error during capture",
}
ERROR_NAMES = {text: code.name for code, text in TEXTS.items()}


class DriverError(Exception):
    def __init__(self, code):
        super().__init__(code.name)
        self.code = code


def primitive(method=None, *, context=True):
    """A driver function: counted, made to fail when asked, refused without a context or after a lost one."""
    if method is None:
        return functools.partial(primitive, context=context)
    name = method.__name__

    @functools.wraps(method)
    def call(self, *arguments):
        self.calls.append(name)
        if name in self._failures:
            skip, code = self._failures.pop(name)
            if not skip:
                raise DriverError(code)
            self._failures[name] = (skip - 1, code)
        if context:
            if not self.stack():
                raise DriverError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
            if self.lost:
                raise DriverError(self.lost)
        return method(self, *arguments)

    return call


class Stream:
    def __init__(self):
        self.queue = []
        self.recording = None
        self.broken = False


class World:
    """One device. Methods named as the driver's functions are what the two shapes call."""

    def __init__(self, *, integrated=False, free=4 << 30, eager=False):
        self.integrated = integrated
        self.total = 8 << 30
        self.budget = free
        self.eager = eager
        self.calls = []
        self.done = []
        """What the device did, in order."""
        self.lost = None
        self.context = SimpleNamespace(name="primary")
        self.retained = 0
        self.host, self.device, self.streams, self.events, self.graphs = {}, {}, {}, {}, {}
        self.leaks = 0
        """Objects dropped where PyCUDA could not have destroyed them."""
        self._graves = []
        self._stacks = {}
        self._failures = {}
        self._next = 0x1000

    # --- for tests ---

    def fail(self, function, code=CUresult.CUDA_ERROR_OUT_OF_MEMORY, skip=0):
        """Let the next call of a function fail, or one after ``skip`` more."""
        self._failures[function] = (skip, code)

    def live(self):
        """Everything that is allocated."""
        return {name: len(getattr(self, name)) for name in ("host", "device", "streams", "events", "graphs")}

    def stack(self):
        return self._stacks.setdefault(threading.get_ident(), [])

    def view(self, address, size):
        """The bytes at an address as the device sees it."""
        for base, (array, flags) in self.host.items():
            if flags & 2 and base + ALIAS <= address and address + size <= base + ALIAS + array.nbytes:
                return array[address - base - ALIAS :][:size]
        for base, array in self.device.items():
            if base <= address and address + size <= base + array.nbytes:
                return array[address - base :][:size]
        raise DriverError(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def pinned(self, address, size):
        for base, (array, _) in self.host.items():
            if base <= address and address + size <= base + array.nbytes:
                return array[address - base :][:size]
        raise AssertionError("an asynchronous copy of memory that is not page-locked")

    def put(self, stream, name, work):
        """Put work into a stream, or into what it records."""
        stream = self._stream(stream)
        if stream.recording is not None:
            stream.recording.append((name, work))
        else:
            stream.queue.append((name, work))
            if self.eager:
                self._run(stream)

    def _stream(self, stream):
        if int(stream) not in self.streams:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return self.streams[int(stream)]

    def _run(self, stream, until=None):
        while stream.queue and not self.lost:
            name, work = stream.queue.pop(0)
            self.done.append(name)
            try:
                work()
            except DriverError as failure:
                self.lost = failure.code
            if until is not None and work is until:
                return

    def _handle(self, table, value):
        self._next += 16
        table[self._next] = value
        return self._next

    # --- the driver ---

    @primitive(context=False)
    def cuInit(self, flags):  # noqa: N802
        assert flags == 0

    @primitive(context=False)
    def cuDriverGetVersion(self):  # noqa: N802
        return 12060

    @primitive(context=False)
    def cuDeviceGet(self, ordinal):  # noqa: N802
        if ordinal != 0:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return 0

    @primitive(context=False)
    def cuDeviceGetName(self, length, device):  # noqa: N802
        return b"Simulated".ljust(length, b"\0")

    @primitive(context=False)
    def cuDeviceGetAttribute(self, attribute, device):  # noqa: N802
        return {75: 8, 76: 7, 18: int(self.integrated)}[int(attribute)]

    @primitive(context=False)
    def cuDeviceTotalMem(self, device):  # noqa: N802
        return self.total

    @primitive(context=False)
    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        self.retained += 1
        return self.context

    @primitive(context=False)
    def cuCtxPushCurrent(self, context):  # noqa: N802
        self.stack().append(context)

    @primitive(context=False)
    def cuCtxPopCurrent(self):  # noqa: N802
        if not self.stack():
            raise DriverError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self.stack().pop()

    @primitive
    def cuMemGetInfo(self):  # noqa: N802
        used = sum(array.nbytes for array in self.device.values())
        return self.budget - used, self.total

    @primitive
    def cuMemHostAlloc(self, size, flags):  # noqa: N802
        array = np.full(size, 0xCD, np.uint8)
        self.host[array.ctypes.data] = (array, flags)
        return array.ctypes.data

    @primitive
    def cuMemHostGetDevicePointer(self, address, flags):  # noqa: N802
        if address not in self.host or not self.host[address][1] & 2:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_VALUE)
        return address + ALIAS

    @primitive
    def cuMemFreeHost(self, address):  # noqa: N802
        array, _ = self.host.pop(address)
        array.fill(0xDD)
        self._graves.append(array)  # so that a test that reads it sees what it did

    @primitive
    def cuMemAlloc(self, size):  # noqa: N802
        if size > self.budget - sum(array.nbytes for array in self.device.values()):
            raise DriverError(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        array = np.full(size, 0xCD, np.uint8)
        self.device[array.ctypes.data] = array
        return array.ctypes.data

    @primitive
    def cuMemFree(self, pointer):  # noqa: N802
        if int(pointer) not in self.device:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_VALUE)
        del self.device[int(pointer)]

    @primitive
    def cuStreamCreate(self, flags):  # noqa: N802
        assert flags == 1, "a stream that would wait for the default stream"
        return self._handle(self.streams, Stream())

    @primitive
    def cuStreamSynchronize(self, stream):  # noqa: N802
        stream = self._stream(stream)
        if stream.recording is not None:
            stream.broken = True
            raise DriverError(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        self._run(stream)
        if self.lost:
            raise DriverError(self.lost)

    @primitive
    def cuStreamDestroy(self, stream):  # noqa: N802
        self._stream(stream)
        del self.streams[int(stream)]

    @primitive
    def cuEventCreate(self, flags):  # noqa: N802
        assert flags == 3, "an event that spins or takes the time"
        return self._handle(self.events, None)

    @primitive
    def cuEventRecord(self, event, stream):  # noqa: N802
        def mark():
            pass

        assert int(event) in self.events
        self.events[int(event)] = (self._stream(stream), mark)
        self.put(stream, "mark", mark)

    @primitive
    def cuEventSynchronize(self, event):  # noqa: N802
        if self.events[int(event)] is not None:
            stream, mark = self.events[int(event)]
            if any(work is mark for _, work in stream.queue):
                self._run(stream, until=mark)
        if self.lost:
            raise DriverError(self.lost)

    @primitive
    def cuEventDestroy(self, event):  # noqa: N802
        del self.events[int(event)]

    @primitive
    def cuMemcpyHtoDAsync(self, pointer, address, size, stream):  # noqa: N802
        source = self.pinned(address, size)
        self.put(stream, "in", lambda: self.view(int(pointer), size).__setitem__(slice(None), source))

    @primitive
    def cuMemcpyDtoHAsync(self, address, pointer, size, stream):  # noqa: N802
        target = self.pinned(address, size)
        self.put(stream, "out", lambda: target.__setitem__(slice(None), self.view(int(pointer), size)))

    @primitive
    def cuMemsetD8Async(self, pointer, value, size, stream):  # noqa: N802
        self.put(stream, "fill", lambda: self.view(int(pointer), size).fill(value))

    @primitive
    def cuStreamBeginCapture(self, stream, mode):  # noqa: N802
        assert int(mode) == 1, "not the thread-local mode"
        stream = self._stream(stream)
        assert not stream.queue, "capture of a stream that is at work"
        stream.recording, stream.broken = [], False

    @primitive
    def cuStreamEndCapture(self, stream):  # noqa: N802
        stream = self._stream(stream)
        recorded, stream.recording = stream.recording, None
        if stream.broken:
            raise DriverError(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self._handle(self.graphs, recorded)

    @primitive
    def cuGraphInstantiate(self, graph, flags):  # noqa: N802
        assert flags == 0
        return self._handle(self.graphs, list(self.graphs[int(graph)]))

    @primitive
    def cuGraphDestroy(self, graph):  # noqa: N802
        del self.graphs[int(graph)]

    @primitive
    def cuGraphExecDestroy(self, graph):  # noqa: N802
        del self.graphs[int(graph)]

    @primitive
    def cuGraphLaunch(self, graph, stream):  # noqa: N802
        for name, work in self.graphs[int(graph)]:
            self.put(stream, name, work)


class CudaPythonShape:
    """As ``cuda.bindings.driver``: every function returns a tuple that begins with the result."""

    CUresult = CUresult
    CUDA_VERSION = 12060
    CU_MEMHOSTALLOC_PORTABLE = 1
    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CUstream_flags = enum.IntEnum("CUstream_flags", {"CU_STREAM_NON_BLOCKING": 1})
    CUevent_flags = enum.IntEnum("CUevent_flags", {"CU_EVENT_BLOCKING_SYNC": 1, "CU_EVENT_DISABLE_TIMING": 2})
    CUstreamCaptureMode = enum.IntEnum("CUstreamCaptureMode", {"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1})
    CUdevice_attribute = enum.IntEnum(
        "CUdevice_attribute",
        {
            "CU_DEVICE_ATTRIBUTE_INTEGRATED": 18,
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 75,
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 76,
        },
    )

    def __init__(self, world):
        self._world = world

    def cuGetErrorString(self, code):  # noqa: N802
        return CUresult.CUDA_SUCCESS, TEXTS[code].encode()

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(self._world, name)

        def call(*arguments):
            try:
                value = function(*arguments)
            except DriverError as failure:
                return failure.code, *([None] * (name in ("cuMemAlloc", "cuStreamCreate")))
            if value is None:
                return (CUresult.CUDA_SUCCESS,)
            return (CUresult.CUDA_SUCCESS, *value) if isinstance(value, tuple) else (CUresult.CUDA_SUCCESS, value)

        return call


class PyCudaShape:
    """As ``pycuda.driver``, with its own context stack per thread, to which every object is tied."""

    host_alloc_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2)
    event_flags = SimpleNamespace(BLOCKING_SYNC=1, DISABLE_TIMING=2)
    device_attribute = SimpleNamespace(INTEGRATED=18)

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self, world):
        self._world = world
        self._contexts = threading.local()
        self.thread = threading.get_ident()
        shape = self

        class Tied:
            """Destroyed with its last reference, which needs its context."""

            def __init__(self, handle, destroy):
                shape.require_context()
                self.handle, self._destroy = handle, destroy

            def __del__(self):
                if not hasattr(self, "handle"):
                    return
                if shape.stack():
                    with contextlib.suppress(shape.Error):
                        shape.call(self._destroy, self.handle)
                elif threading.get_ident() == shape.thread:
                    shape.context.push()
                    with contextlib.suppress(shape.Error):
                        shape.call(self._destroy, self.handle)
                    shape.context.pop()
                else:
                    world.leaks += 1

        class Stream(Tied):
            def __init__(self, flags=0):
                super().__init__(shape.call("cuStreamCreate", flags), "cuStreamDestroy")

            def synchronize(self):
                shape.call("cuStreamSynchronize", self.handle)

        class Event(Tied):
            def __init__(self, flags=0):
                super().__init__(shape.call("cuEventCreate", flags), "cuEventDestroy")

            def record(self, stream):
                shape.call("cuEventRecord", self.handle, stream.handle)

            def synchronize(self):
                shape.call("cuEventSynchronize", self.handle)

        class Allocation:
            def __init__(self, pointer):
                shape.require_context()
                self._pointer = pointer

            def __int__(self):
                return self._pointer

            def free(self):
                shape.call("cuMemFree", self._pointer)

        class HostAllocation(Tied):
            def __init__(self, extent, flags):
                super().__init__(shape.call("cuMemHostAlloc", int(np.prod(extent)), flags), "cuMemFreeHost")
                data = (self.handle, False)
                self.__array_interface__ = {"shape": extent, "typestr": "|u1", "data": data, "version": 3}

            def get_device_pointer(self):
                return shape.call("cuMemHostGetDevicePointer", self.handle, 0)

        class Context:
            def push(self):
                shape.call("cuCtxPushCurrent", world.context)
                shape.stack().append(self)

            @staticmethod
            def pop():
                shape.call("cuCtxPopCurrent")
                shape.stack().pop()

        class Device:
            def __init__(self, ordinal):
                self._device = shape.call("cuDeviceGet", ordinal)

            def retain_primary_context(self):
                shape.call("cuDevicePrimaryCtxRetain", self._device)
                return shape.context

            def name(self):
                return "Simulated"

            def compute_capability(self):
                return (8, 7)

            def get_attribute(self, attribute):
                return shape.call("cuDeviceGetAttribute", attribute, self._device)

            def total_memory(self):
                return world.total

        self.context = Context()
        self.Stream, self.Event, self.Device = Stream, Event, Device
        self._allocation, self._host_allocation = Allocation, HostAllocation

    def stack(self):
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def require_context(self):
        if not self.stack():
            raise self.Error("explicit_context_dependent failed: invalid device context - no currently active context?")

    def call(self, name, *arguments):
        try:
            return getattr(self._world, name)(*arguments)
        except DriverError as failure:
            kind = self.MemoryError if failure.code == CUresult.CUDA_ERROR_OUT_OF_MEMORY else self.Error
            raise kind(f"{name} failed: {TEXTS[failure.code]}") from None

    def init(self):
        self.call("cuInit", 0)

    def get_version(self):
        return (12, 6, 0)

    def get_driver_version(self):
        return self.call("cuDriverGetVersion")

    def mem_get_info(self):
        return self.call("cuMemGetInfo")

    def mem_alloc(self, size):
        return self._allocation(self.call("cuMemAlloc", size))

    def pagelocked_empty(self, shape, dtype, order="C", mem_flags=0):
        assert order == "C"
        memory = self._host_allocation(tuple(shape), mem_flags)
        array = np.asarray(memory, dtype)
        assert array.base is memory
        return array

    def memcpy_htod_async(self, dest, src, stream):
        self.call("cuMemcpyHtoDAsync", dest, src.ctypes.data, src.nbytes, stream.handle)

    def memcpy_dtoh_async(self, dest, src, stream):
        self.call("cuMemcpyDtoHAsync", dest.ctypes.data, src, dest.nbytes, stream.handle)

    def memset_d8_async(self, dest, data, size, stream):
        self.call("cuMemsetD8Async", dest, data, size, stream.handle)


class FakeTensorRT:
    """As ``find_tensorrt()`` returns it: runs a function of the image on a simulated device."""

    name = "TensorRT 0.0"
    kind = "tensorrt"
    logger = "the process's logger"

    def __init__(self, world, tile=8, batch=1, scratch=1000, output="labels", classes=5):
        self.world = world
        self.tile, self.batch, self.scratch = tile, batch, scratch
        self.output, self.classes = output, classes
        self.live = []
        """Runtimes, engines and contexts that exist, by kind."""
        self.unordered = []
        """What was destroyed before what it needs not outlive."""
        self.contexts_left = 99
        self.refuse = None
        """What execute_async_v3 does instead: a function."""
        self.dtype = "uint8"
        self.has_runtime_config = False
        self.layer_times = (("image", 0.25), ("fuse", 1.5))
        """Names and milliseconds that the profiler of a context is told after a run."""
        self.tells_times = True
        self.module = SimpleNamespace(
            Runtime=functools.partial(_Runtime, self),
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
            DataType=SimpleNamespace(UINT8="uint8"),
            IProfiler=_ProfilerBase,
        )

    @staticmethod
    def labels_of(image):
        """The 'network'."""
        return image[:, 0] % 5

    @staticmethod
    def confidence_of(image):
        return image[:, 1] % 101

    @staticmethod
    def probabilities_of(image):
        return np.stack([image[:, 2] // (number + 1) for number in range(5)], axis=1)

    def shapes(self):
        """Of inputs and outputs, in no order to rely on."""
        n, side = self.batch, self.tile
        shapes = {"labels": (n, side, side), "image": (n, 3, side, side)}
        if self.output == "confidence":
            shapes["confidence"] = (n, side, side)
        if self.output == "probabilities":
            shapes["probabilities"] = (n, self.classes, side, side)
        return shapes


class _ProfilerBase:
    """As pybind11's: of no use until its own ``__init__`` was called."""

    def __init__(self):
        self.made = True


class _Living:
    """Destroyed in the right order and in the device's context, or it is noted."""

    def __init__(self, trt, needed_by):
        assert trt.world.stack(), "made outside the context"
        self.trt, self._needed_by = trt, needed_by
        trt.live.append(type(self).__name__)

    def __del__(self):
        trt = self.trt
        trt.live.remove(type(self).__name__)
        if self._needed_by in trt.live or not trt.world.stack():
            trt.unordered.append(type(self).__name__)


class _Runtime(_Living):
    def __init__(self, trt, logger):
        assert logger == FakeTensorRT.logger
        super().__init__(trt, "_Engine")

    def deserialize_cuda_engine(self, serialised):
        return _Engine(self.trt) if serialised == b"an engine" else None


class _Engine(_Living):
    def __init__(self, trt):
        super().__init__(trt, "_Context")
        self.num_io_tensors = len(trt.shapes())
        self.device_memory_size_v2 = trt.scratch
        if trt.has_runtime_config:
            self.create_runtime_config = lambda: trt.config

    def get_tensor_name(self, index):
        return list(self.trt.shapes())[index]

    def get_tensor_mode(self, name):
        return "in" if name == "image" else "out"

    def get_tensor_shape(self, name):
        return list(self.trt.shapes()[name])

    def get_tensor_dtype(self, name):
        return self.trt.dtype

    def create_execution_context(self, *config):
        assert self.trt.world.stack()
        if self.trt.has_runtime_config:
            assert config == (self.trt.config,)
        if not self.trt.contexts_left:
            return None
        self.trt.contexts_left -= 1
        return _Context(self.trt)


class _Context(_Living):
    def __init__(self, trt):
        super().__init__(trt, None)
        self._addresses = {}
        self._stream = None
        self._profiler = None
        self._ran = False  # since the profiler was told last
        self.enqueue_emits_profile = True

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, profiler):
        """A context never lets go of its profiler: null is refused with a line in the log."""
        assert profiler is not None, "API Usage Error (Parameter check failed, condition: (profiler) != nullptr)"
        assert profiler.made
        self._profiler = profiler

    def report_to_profiler(self):
        assert self._profiler is not None
        assert not self.enqueue_emits_profile
        assert self._ran, "no run to report"
        assert not self.trt.world.streams[int(self._stream)].queue, "reported before the run was done"
        self._ran = False
        if self.trt.tells_times:
            for name, milliseconds in self.trt.layer_times:
                self._profiler.report_layer_time(name, milliseconds)
        return self.trt.tells_times

    def set_tensor_address(self, name, address):
        assert name in self.trt.shapes()
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        trt, world = self.trt, self.trt.world
        assert world.stack(), "run outside the context"
        assert self._stream in (None, stream), "one context in two streams"
        self._stream = stream
        if self._profiler is not None:
            assert world.streams[int(stream)].recording is None, "a profiler during a capture"
            self._ran = True
        if trt.refuse is not None:
            return trt.refuse(stream)
        n, side = trt.batch, trt.tile

        def compute():
            image = world.view(self._addresses["image"], n * 3 * side * side).reshape(n, 3, side, side)
            for name, shape in trt.shapes().items():
                if name != "image":
                    values = getattr(trt, f"{name}_of")(image)
                    world.view(self._addresses[name], int(np.prod(shape)))[:] = values.ravel()

        world.put(stream, "compute", compute)
        return True


SHAPES = ("cuda-python", "pycuda")


def gpu_over(world, shape, ordinal=0):
    """The package's GPU over a simulated device."""
    from cdkd_edge.engines.cuda.gpu import CudaPythonGpu, PyCudaGpu

    if shape == "cuda-python":
        return CudaPythonGpu(ordinal, CudaPythonShape(world))
    return PyCudaGpu(ordinal, PyCudaShape(world), ERROR_NAMES)
