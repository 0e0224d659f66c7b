"""The TensorRT engine on a simulated device, over both CUDA bindings: the protocol, failures, leaks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import tracemalloc

import cuda_fakes
import numpy as np
import pytest
from cuda_fakes import SHAPES, CUresult, FakeTensorRT, World, gpu_over

from cdkd_edge.core.errors import EngineError, ManifestError
from cdkd_edge.core.labels import NO_LABEL, load_schema
from cdkd_edge.core.manifest import EngineManifest, FileRecord, GraphCheck, Preprocessing, write_manifest
from cdkd_edge.engines.cuda import gpu as cuda_gpu
from cdkd_edge.engines.cuda.memory import CudaStream
from cdkd_edge.engines.protocol import PROFILE_WARM_UP, segment_tiles
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.engines.tensorrt import find
from cdkd_edge.engines.tensorrt.layers import EngineLayers, Layer, write_layers
from cdkd_edge.engines.tensorrt.runner import SLOTS, TensorRTEngine, affordable_slots

SIDE = 8


def manifest_of(path, *, batch=1, precision="fp16"):
    return EngineManifest(
        name="small",
        runtime="tensorrt",
        precision=precision,
        artefact=FileRecord.of(path),
        graph=FileRecord("small.fp16.onnx", "0" * 64, 1),
        labels=load_schema("dubai").to_document(),
        preprocessing=Preprocessing("RGB", (0, 0, 0), (1, 1, 1)),
        tile=SIDE,
        batch=batch,
        device="Simulated",
        attention_blocks=1,
        attention_fused=1,
        build_seconds=1.0,
        graph_check=GraphCheck(0, 0.0, 1.0, "none", "none"),
        libraries={},
    )


class Bench:
    """A device, a TensorRT and an engine file."""

    def __init__(self, folder, shape, **world):
        self.world = World(**world)
        self.shape = shape
        self.gpu = gpu_over(self.world, shape)
        self.trt = FakeTensorRT(self.world)
        self.path = folder / "small.fp16.engine"
        self.path.write_bytes(b"an engine")

    def load(self, *, batch=1, **options):
        self.trt.batch = batch
        return TensorRTEngine(
            self.path, manifest_of(self.path, batch=batch), gpu=self.gpu, tensorrt=self.trt, **options
        )

    def assert_clean(self):
        gc.collect()
        assert not any(self.world.live().values()), self.world.live()
        assert not self.trt.live
        assert not self.trt.unordered
        assert not self.world.leaks
        assert not self.world.stack()


KINDS = [(shape, integrated) for shape in SHAPES for integrated in (False, True)]


@pytest.fixture(params=KINDS, ids=[f"{shape}-{'integrated' if own else 'discrete'}" for shape, own in KINDS])
def bench(request, tmp_path):
    shape, integrated = request.param
    return Bench(tmp_path, shape, integrated=integrated)


@pytest.fixture
def discrete(tmp_path):
    return Bench(tmp_path, "cuda-python")


@pytest.fixture
def engine(bench):
    engine = bench.load()
    yield engine
    engine.close()


def tiles_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, 3, SIDE, SIDE), np.uint8)


def run(engine, slot, tiles):
    engine.input(slot)[...] = tiles
    engine.launch(slot)
    engine.wait(slot)
    return engine.output(slot)


def blank(engine):
    return all((engine.output(slot) == NO_LABEL).all() for slot in range(engine.slots))


# --- the protocol ---------------------------------------------------------------------------------


def test_tiles_become_labels(bench, engine):
    tiles = tiles_of(7)
    assert (segment_tiles(engine, tiles) == FakeTensorRT.labels_of(tiles)).all()
    assert (engine.tile, engine.batch, engine.slots) == (SIDE, 1, SLOTS)
    assert engine.schema.class_names == load_schema("dubai").class_names
    assert engine.artefact == engine.manifest.artefact


def test_a_batch(bench):
    engine = bench.load(batch=3)
    tiles = tiles_of(5)
    assert (segment_tiles(engine, tiles) == FakeTensorRT.labels_of(tiles)).all()
    engine.close()
    bench.assert_clean()


def test_slots_are_independent_and_may_be_waited_for_in_any_order(engine):
    tiles = tiles_of(SLOTS)
    for slot in range(SLOTS):
        engine.input(slot)[...] = tiles[slot]
        engine.launch(slot)
    for slot in reversed(range(SLOTS)):
        engine.wait(slot)
        assert (engine.output(slot) == FakeTensorRT.labels_of(tiles[slot : slot + 1])).all()


def test_labels_are_255_before_the_first_run(engine):
    assert blank(engine)
    assert engine.input(0).shape == (1, 3, SIDE, SIDE)
    assert engine.output(0).shape == (1, SIDE, SIDE)


@pytest.mark.parametrize("eager", [False, True])
def test_labels_show_only_after_waiting(tmp_path, eager):
    bench = Bench(tmp_path, "cuda-python", eager=eager, integrated=eager)
    engine = bench.load()
    run(engine, 0, tiles_of(1))
    engine.input(0)[...] = tiles_of(1, seed=1)
    engine.launch(0)
    assert (engine.output(0) == NO_LABEL).all()
    with pytest.raises(ValueError, match="read-only"):
        engine.output(0)[...] = 0
    engine.wait(0)
    assert (engine.output(0) == FakeTensorRT.labels_of(tiles_of(1, seed=1))).all()
    engine.close()


def test_waiting_for_nothing_returns(engine):
    engine.wait(0)
    labels = run(engine, 0, tiles_of(1)).copy()
    engine.wait(0)
    assert (engine.output(0) == labels).all()


def test_launching_twice_is_the_second_run(engine):
    engine.input(0)[...] = tiles_of(1)
    engine.launch(0)
    labels = run(engine, 0, tiles_of(1, seed=5))
    assert (labels == FakeTensorRT.labels_of(tiles_of(1, seed=5))).all()


def test_one_thread_launches_and_others_fill_and_read(bench, engine):
    """As the pipeline does; only the launching thread ever needs the context."""
    tiles, seen = tiles_of(30), []
    free, ready, done = (
        threading.Semaphore(SLOTS),
        [threading.Event() for _ in tiles],
        [threading.Event() for _ in tiles],
    )

    def read():
        for index, tile in enumerate(tiles):
            free.acquire()
            engine.input(index % SLOTS)[...] = tile
            ready[index].set()

    def write():
        for index in range(len(tiles)):
            done[index].wait(5)
            seen.append(engine.output(index % SLOTS)[0].copy())
            free.release()

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for index in range(len(tiles)):
        assert ready[index].wait(5)
        engine.launch(index % SLOTS)
        engine.wait(index % SLOTS)
        done[index].set()
    for thread in threads:
        thread.join()
    assert (np.stack(seen) == FakeTensorRT.labels_of(tiles)).all()


# --- what the device is asked to do ---------------------------------------------------------------


def test_the_order_of_a_run(bench, engine):
    bench.world.done.clear()
    run(engine, 0, tiles_of(1))
    if bench.world.integrated:
        assert bench.world.done == ["compute", "mark"]
    else:
        assert bench.world.done == ["fill", "in", "compute", "out", "mark"]


def test_nothing_is_allocated_per_tile(bench, engine):
    run(engine, 0, tiles_of(1))
    before, live = len(bench.world.calls), bench.world.live()
    for index in range(30):
        run(engine, index % SLOTS, tiles_of(1, seed=index))
    assert bench.world.live() == live
    used = set(bench.world.calls[before:])
    assert not {name for name in used if "Alloc" in name or "Create" in name or "Instantiate" in name}
    if engine.no_graph is None:
        assert used == {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"}


def test_a_thousand_tiles_do_not_grow(bench, engine):
    tile = tiles_of(1)
    for _ in range(50):
        run(engine, 0, tile)
    bench.world.calls.clear()
    bench.world.done.clear()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(1000):
        run(engine, index % SLOTS, tile)
        if not index % 50:  # the simulation's own records
            bench.world.calls.clear()
            bench.world.done.clear()
    bench.world.calls.clear()
    bench.world.done.clear()
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert growth < 40_000  # an object per tile would be more


@pytest.mark.parametrize("asked", [True, False])
def test_cuda_graphs_where_there_are_any(bench, asked):
    engine = bench.load(cuda_graph=asked)
    tiles = tiles_of(6)
    assert (segment_tiles(engine, tiles) == FakeTensorRT.labels_of(tiles)).all()
    if asked and bench.shape == "cuda-python":
        assert engine.no_graph is None
        assert "cuGraphLaunch" in bench.world.calls
        assert len(bench.world.graphs) == SLOTS
    else:
        assert engine.no_graph == ("PyCUDA has no CUDA graphs" if asked else "not asked for")
        assert "cuGraphLaunch" not in bench.world.calls
    engine.close()
    bench.assert_clean()


@pytest.mark.parametrize("skip", [0, 1])
def test_without_a_graph_where_it_cannot_be_recorded(discrete, skip):
    discrete.world.fail("cuGraphInstantiate", CUresult.CUDA_ERROR_INVALID_VALUE, skip)
    engine = discrete.load()
    assert "CUDA_ERROR_INVALID_VALUE" in engine.no_graph
    tiles = tiles_of(4)
    assert (segment_tiles(engine, tiles) == FakeTensorRT.labels_of(tiles)).all()
    assert "cuGraphLaunch" not in discrete.world.calls
    engine.close()
    discrete.assert_clean()


def test_a_first_run_comes_before_recording(discrete):
    """TensorRT asks for one: it settles what was left for the first run, which cannot be recorded."""
    discrete.load()
    calls = discrete.world.calls
    assert calls.index("cuEventSynchronize") < calls.index("cuStreamBeginCapture")
    assert discrete.world.done.count("compute") == SLOTS


# --- the profiler ---------------------------------------------------------------------------------


def test_layers_are_timed_in_a_context_of_their_own(bench, engine):
    """The slots keep their CUDA graphs, and their contexts never meet the profiler, which could not be taken off."""
    tiles = tiles_of(1)
    run(engine, 0, tiles)
    contexts = [id(slot.context) for slot in engine._slots]
    before = bench.world.live()
    bench.world.calls.clear()
    times = engine.kernel_times(5)
    assert (times.runs, times.average) == (5, "median")
    assert [(one.name, one.seconds) for one in times.kernels] == [("image", 0.25e-3), ("fuse", 1.5e-3)]
    assert min(times.plain_seconds, times.profiled_seconds) > 0
    assert [id(slot.context) for slot in engine._slots] == contexts
    assert all(slot.context.profiler is None for slot in engine._slots)
    launches = bench.world.calls.count("cuGraphLaunch")
    assert launches == (5 + PROFILE_WARM_UP if bench.shape == "cuda-python" else 0)  # the plain runs in between
    assert bench.world.live() == before
    assert (run(engine, 0, tiles) == FakeTensorRT.labels_of(tiles)).all()
    engine.close()
    bench.assert_clean()


def test_medians_leave_out_the_first_runs_and_add_up_what_has_one_name(discrete):
    engine = discrete.load()
    profiled = iter([90, 80, 1, 5, 3])

    class Changing:
        def __iter__(self):
            slow = next(profiled)
            return iter([("a", slow), ("copy", 1), ("copy", 1)])

    discrete.trt.layer_times = Changing()
    assert PROFILE_WARM_UP == 2
    times = engine.kernel_times(3)
    assert [(one.name, round(one.seconds * 1e3)) for one in times.kernels] == [("a", 3), ("copy", 2)]
    engine.close()


def test_layers_are_named_by_the_list_beside_the_engine(discrete):
    engine = discrete.load()
    norm = "__myl_CastMeanSub_myl0_2"
    discrete.trt.layer_times = ((norm, 1.0), ("smooth.0.conv/Conv + smooth.0/Relu", 2.0), ("__myl_Move_myl0_9", 0.1))
    assert [one.nodes for one in engine.kernel_times(1).kernels] == [
        (), ("smooth.0.conv/Conv", "smooth.0/Relu"), (),
    ]  # fmt: skip
    layers = EngineLayers((Layer(norm, "kgen", (), (), nodes=("blocks.0.norm1/LayerNormalization",)),))
    write_layers(discrete.path, engine.artefact.sha256, layers)
    assert engine.kernel_times(1).kernels[0].nodes == ("blocks.0.norm1/LayerNormalization",)
    write_layers(discrete.path, "of another engine", layers)
    with pytest.raises(ManifestError, match="another engine"):
        engine.kernel_times(1)
    engine.close()
    discrete.assert_clean()


@pytest.mark.parametrize("failing", ["times", "context", "run", "nothing"])
def test_a_profiler_that_fails_leaves_nothing(bench, engine, failing):
    before = bench.world.live()
    said = {
        "times": "does not tell the times of layers", "context": "cannot prepare", "run": "failed on a tile",
        "nothing": "told no times",
    }  # fmt: skip
    if failing == "times":
        bench.trt.tells_times = False
    elif failing == "context":
        bench.trt.contexts_left = 0
    elif failing == "run":
        bench.trt.refuse = lambda stream: bench.trt.world.streams[int(stream)].recording is not None
    else:
        bench.trt.layer_times = ()
    with pytest.raises(EngineError, match=said[failing]) as caught:
        engine.kernel_times(2)
    del caught
    bench.trt.refuse = None
    assert bench.world.live() == before
    assert not (run(engine, 0, tiles_of(1)) == NO_LABEL).any()
    engine.close()
    bench.assert_clean()


def test_ctrl_c_during_a_profiled_run_waits_for_the_device(discrete, monkeypatch):
    engine = discrete.load()
    slots = [slot.stream for slot in engine._slots]
    before = discrete.world.live()
    wait = CudaStream.wait

    def interrupted(stream):
        if stream not in slots:
            raise KeyboardInterrupt
        wait(stream)

    with monkeypatch.context() as patch:
        patch.setattr(CudaStream, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.kernel_times(2)
    assert discrete.world.live() == before
    engine.close()
    discrete.assert_clean()


# --- failures -------------------------------------------------------------------------------------


PLAIN = ["cuEventRecord", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD8Async", "cuCtxPushCurrent"]
REPLAYED = ["cuEventRecord", "cuGraphLaunch", "cuCtxPushCurrent"]


@pytest.mark.parametrize(
    ("function", "cuda_graph"), [*((name, False) for name in PLAIN), *((name, True) for name in REPLAYED)]
)
def test_a_launch_that_fails_leaves_255(discrete, function, cuda_graph):
    engine = discrete.load(cuda_graph=cuda_graph)
    run(engine, 0, tiles_of(1))
    discrete.world.fail(function, CUresult.CUDA_ERROR_INVALID_VALUE)
    engine.input(0)[...] = tiles_of(1, seed=1)
    before = engine.output(0).copy()
    with pytest.raises(EngineError, match=r"CUDA_ERROR_INVALID_VALUE"):
        engine.launch(0)
    if function == "cuCtxPushCurrent":  # nothing was started: the last run's labels still stand
        assert (engine.output(0) == before).all()
    else:
        assert blank(engine)
    engine.wait(0)
    assert (run(engine, 0, tiles_of(1, seed=2)) == FakeTensorRT.labels_of(tiles_of(1, seed=2))).all()
    engine.close()
    discrete.assert_clean()


def test_a_run_that_tensorrt_refuses_leaves_255(bench):
    engine = bench.load(cuda_graph=False)
    run(engine, 0, tiles_of(1))
    bench.trt.refuse = lambda stream: False
    with pytest.raises(EngineError, match=r"TensorRT failed on a tile"):
        engine.launch(0)
    assert blank(engine)
    bench.trt.refuse = None
    assert not (run(engine, 0, tiles_of(1)) == NO_LABEL).any()
    engine.close()
    bench.assert_clean()


def test_a_run_that_fails_on_the_device_leaves_255(bench):
    engine = bench.load(cuda_graph=False)
    arrays = [engine.output(slot) for slot in range(SLOTS)]
    run(engine, 0, tiles_of(1))
    run(engine, 1, tiles_of(1, seed=1))

    def crash(stream):
        bench.world.put(stream, "kernel", lambda: bench.world.view(1, 1))
        return True

    bench.trt.refuse = crash
    engine.launch(0)
    with pytest.raises(EngineError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        engine.wait(0)
    assert "start it again" in caught.value.hint
    assert (engine.output(0) == NO_LABEL).all()
    assert (arrays[0] == NO_LABEL).all()
    assert (engine.output(1) == FakeTensorRT.labels_of(tiles_of(1, seed=1))).all()
    with pytest.raises(EngineError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS"):
        engine.launch(1)
    assert (engine.output(1) == NO_LABEL).all()
    engine.close()
    engine.close()
    assert not bench.trt.live
    assert not bench.world.stack()


def test_a_run_that_computes_nothing_leaves_255(bench):
    """Labels of the run before must not come out again: the device's side is cleared as well."""
    engine = bench.load(cuda_graph=False)
    run(engine, 0, tiles_of(1))
    bench.trt.refuse = lambda stream: True
    assert (run(engine, 0, tiles_of(1)) == NO_LABEL).all()
    engine.close()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_interrupted_wait_leaves_255(tmp_path, monkeypatch, shape, eager):
    bench = Bench(tmp_path, shape, eager=eager)
    engine = bench.load()
    held = engine.output(0)
    run(engine, 0, tiles_of(1))
    assert not (held == NO_LABEL).any()

    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CudaStream, "wait", interrupted)
        engine.launch(0)
        with pytest.raises(KeyboardInterrupt):
            engine.wait(0)
    assert blank(engine)
    assert (held == NO_LABEL).all()
    engine.close()
    assert (held == NO_LABEL).all()
    del held
    bench.assert_clean()


def test_an_interruption_between_launch_and_wait_leaves_255(bench, engine):
    run(engine, 0, tiles_of(1))
    with contextlib.suppress(KeyboardInterrupt):
        engine.launch(0)
        raise KeyboardInterrupt
    assert blank(engine)
    assert (run(engine, 0, tiles_of(1)) == FakeTensorRT.labels_of(tiles_of(1))).all()


@pytest.mark.parametrize("drained", [True, False])
def test_an_interrupted_launch_leaves_255(discrete, monkeypatch, drained):
    """Also if Ctrl-C is pressed a second time, while the device is waited for."""
    engine = discrete.load()
    run(engine, 0, tiles_of(1))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CudaStream, "mark", interrupted)
        if not drained:
            patch.setattr(CudaStream, "drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.launch(0)
    assert blank(engine)
    assert (run(engine, 0, tiles_of(1)) == FakeTensorRT.labels_of(tiles_of(1))).all()
    engine.close()
    discrete.assert_clean()


# --- loading and closing --------------------------------------------------------------------------


def test_closing_frees_everything_in_order(bench):
    engine = bench.load()
    run(engine, 0, tiles_of(1))
    engine.launch(1)  # and is not waited for
    engine.close()
    bench.assert_clean()
    engine.close()
    for use in (engine.input, engine.output, engine.launch, engine.wait):
        with pytest.raises(EngineError, match=r"closed"):
            use(0)


def test_an_engine_that_is_dropped_is_closed(bench):
    engine = bench.load()
    engine.launch(0)
    del engine
    bench.assert_clean()


def test_arrays_outlive_the_engine(bench):
    engine = bench.load()
    tiles = engine.input(0)
    labels = run(engine, 0, tiles_of(1))
    expected = labels.copy()
    engine.close()
    del engine
    gc.collect()
    assert (labels == expected).all()
    assert (tiles == tiles_of(1)).all()
    del labels, tiles
    bench.assert_clean()


def test_it_can_be_closed_in_another_thread(bench):
    engines = [bench.load()]
    thread = threading.Thread(target=lambda: engines.pop().close())
    thread.start()
    thread.join()
    bench.assert_clean()


def test_engines_can_follow_each_other(bench):
    for _ in range(20):
        engine = bench.load()
        run(engine, 0, tiles_of(1))
        engine.close()
    assert bench.world.retained == 1
    bench.assert_clean()


@pytest.mark.parametrize("content", [b"", b"an engin", b"an engine" * 2, bytes(1000)])
def test_a_file_that_tensorrt_refuses(bench, content):
    bench.path.write_bytes(content)
    with pytest.raises(EngineError, match=r"TensorRT 0.0 cannot load .*small\.fp16\.engine") as caught:
        bench.load()
    assert "cdkd-edge build --fp16" in caught.value.hint
    assert "small.fp16.onnx" in caught.value.hint
    del caught
    bench.assert_clean()


@pytest.mark.parametrize(
    ("change", "said"), [({"tile": 16}, "labels 1x16x16"), ({"dtype": "half"}, "not uint8: labels, image")]
)
def test_an_engine_with_other_tensors(bench, change, said):
    for name, value in change.items():
        setattr(bench.trt, name, value)
    with pytest.raises(EngineError, match=said) as caught:
        bench.load()
    del caught
    bench.assert_clean()


LOADING = ["cuMemHostAlloc", "cuMemAlloc", "cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuEventSynchronize"]


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("function", LOADING)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_load_leaves_nothing(tmp_path, shape, function, skip):
    bench = Bench(tmp_path, shape)
    bench.world.fail(function, CUresult.CUDA_ERROR_OUT_OF_MEMORY, skip)
    with pytest.raises(EngineError, match=r"CUDA_ERROR_OUT_OF_MEMORY") as caught:
        bench.load()
    del caught
    bench.assert_clean()


@pytest.mark.parametrize("contexts", [0, 1])
def test_a_context_that_cannot_be_made(bench, contexts):
    bench.trt.contexts_left = contexts
    with pytest.raises(EngineError, match=r"cannot prepare .*scratch memory") as caught:
        bench.load()
    assert "too little free GPU memory" in caught.value.hint
    del caught
    bench.assert_clean()


def test_a_first_run_that_fails_is_known_at_loading(bench):
    bench.trt.refuse = lambda stream: False
    with pytest.raises(EngineError, match=r"TensorRT failed on a tile") as caught:
        bench.load()
    del caught
    bench.assert_clean()


@pytest.mark.parametrize(
    ("wanted", "scratch", "free", "slots"),
    [(3, 0, 0, 3), (3, 44, 1000, 3), (3, 200, 1000, 2), (3, 400, 1000, 1), (3, 4000, 1000, 1), (0, 44, 1000, 1)],
)
def test_scratch_memory_limits_the_slots(wanted, scratch, free, slots):
    assert affordable_slots(wanted, scratch, free) == slots


def test_fewer_slots_where_memory_is_short(tmp_path):
    bench = Bench(tmp_path, "cuda-python", free=5000)
    bench.trt.scratch = 1200
    engine = bench.load()
    assert engine.slots == 2
    engine.close()
    bench.assert_clean()


# --- through load_engine --------------------------------------------------------------------------


@pytest.fixture
def installed(discrete, monkeypatch):
    """A TensorRT and a CUDA binding that are 'installed'; what the check before loading was given."""
    asked = []
    monkeypatch.setattr(find, "find_tensorrt", lambda: discrete.trt)
    monkeypatch.setattr(find, "find_gpu", lambda: "this GPU")
    monkeypatch.setattr(find, "require_loadable", lambda *arguments: asked.append(arguments) or "other multiprocessors")
    monkeypatch.setattr(cuda_gpu, "BINDINGS", {"cuda-python": lambda ordinal: discrete.gpu})
    monkeypatch.setattr(cuda_gpu, "_open", {})
    monkeypatch.delenv(cuda_gpu.VARIABLE, raising=False)
    return asked


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_load_engine_finds_the_runner(discrete, installed, runtime):
    manifest = dataclasses.replace(manifest_of(discrete.path), runtime=runtime)
    write_manifest(discrete.path, manifest)
    engine = load_engine(discrete.path)
    assert isinstance(engine, TensorRTEngine)
    assert installed == [(manifest, discrete.trt, "this GPU")]
    assert engine.warning == "other multiprocessors"
    assert (segment_tiles(engine, tiles_of(4)) == FakeTensorRT.labels_of(tiles_of(4))).all()
    engine.close()
    discrete.assert_clean()


def test_a_foreign_engine_never_reaches_tensorrt(discrete, installed, monkeypatch):
    write_manifest(discrete.path, manifest_of(discrete.path))

    def refuse(*_):
        raise EngineError("it was built by another TensorRT")

    monkeypatch.setattr(find, "require_loadable", refuse)
    with pytest.raises(EngineError, match="another TensorRT"):
        load_engine(discrete.path)
    assert "cuMemHostAlloc" not in discrete.world.calls
    discrete.assert_clean()


def test_a_damaged_file_is_found_by_its_hash(discrete, installed):
    write_manifest(discrete.path, manifest_of(discrete.path))
    discrete.path.write_bytes(b"an engine, damaged")
    with pytest.raises(ManifestError, match="SHA-256"):
        load_engine(discrete.path)
    assert not installed


def test_what_tensorrt_logs_becomes_the_message(discrete, installed):
    write_manifest(discrete.path, manifest_of(discrete.path))
    engine = load_engine(discrete.path)
    said = [("warning", "slow"), ("error", "IExecutionContext::enqueueV3:\n Error Code 1: Cask"), ("verbose", "x")]

    def refuse(stream):
        for line in said:
            find._sink(*line)
        return False

    discrete.trt.refuse = refuse
    with engine.gpu.current():
        engine._slots[0].stream.forget()
    with pytest.raises(EngineError) as caught:
        engine.launch(0)
    assert str(caught.value) == "TensorRT failed on a tile: IExecutionContext::enqueueV3: Error Code 1: Cask"
    assert find._sink is None
    engine.close()


def test_an_engine_that_cannot_be_captured_runs_without(discrete, monkeypatch):
    monkeypatch.setattr(cuda_fakes._Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    engine = discrete.load()
    assert "cannot be captured" in engine.no_graph
    assert "cuStreamBeginCapture" not in discrete.world.calls
    assert (segment_tiles(engine, tiles_of(4)) == FakeTensorRT.labels_of(tiles_of(4))).all()
    engine.close()


# --- TensorRT-RTX ---------------------------------------------------------------------------------


class Config:
    def __init__(self):
        self.cache = object()
        self.used = None

    def create_runtime_cache(self):
        return self.cache

    def set_runtime_cache(self, cache):
        self.used = cache
        return True


def test_the_slots_share_what_tensorrt_rtx_compiled(discrete):
    discrete.trt.has_runtime_config, discrete.trt.config = True, Config()
    discrete.load().close()
    assert discrete.trt.config.used is discrete.trt.config.cache


def test_a_runtime_config_without_cache_is_not_used(discrete):
    discrete.trt.has_runtime_config, discrete.trt.config = True, object()
    with pytest.raises(AssertionError):  # the simulation asks for the config; TensorRT is given none
        discrete.load()
