"""Parts of the TensorRT engines that need neither TensorRT nor a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_helpers import ORIN, LayerLimits, exceeded

from cdkd_edge.core import machine
from cdkd_edge.core.errors import EngineError, ManifestError, UsageError
from cdkd_edge.core.manifest import EngineManifest, FileRecord, GraphCheck, Preprocessing, TensorRTBuild
from cdkd_edge.engines.tensorrt import find, options
from cdkd_edge.engines.tensorrt.advice import OPSETS, SINCE, UNSUPPORTED, ParserComplaint, advice, explain
from cdkd_edge.engines.tensorrt.find import (
    NoGpu,
    TensorRT,
    TensorRTMissingError,
    find_gpu,
    find_tensorrt,
    free_gpu_memory,
    require_loadable,
    tensorrt_is_installed,
)
from cdkd_edge.engines.tensorrt.layers import (
    EngineLayers,
    Layer,
    LayerTensor,
    layers_of_inspector,
    layers_of_log,
    layers_path,
    read_layers,
    write_layers,
)
from cdkd_edge.engines.tensorrt.options import (
    MINIMUM,
    TensorRTOptions,
    available_memory,
    default_workspace,
    parse_size,
    parse_target,
    workspace_within,
)

# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("2G", 2 << 30), ("1.5GiB", 3 << 29), ("64 mb", 64 << 20), ("2048K", 2 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "G", "-1G", "1e3M", "2T", "1,5G", "nan", "9" * 400 + "G", "２G2G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "target"),
    [("sm86", "8.6"), ("SM_86", "8.6"), ("86", "8.6"), ("8.6", "8.6"), ("sm120", "12.0"), ("12.1", "12.1")],
)
def test_targets(text: str, target: str) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "sm", "8", "sm8.6.1", "orin", "sm86a", "1234"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match="is not a compute capability"):
        parse_target(text)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 6},
        {"optimization_level": -1},
        {"workspace_bytes": 100},
        {"portable": True, "targets": ("8.6",)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TensorRTOptions(**options)


# --- memory ---------------------------------------------------------------------------------------


def test_the_workspace_leaves_a_reserve() -> None:
    graph = 126 << 20
    assert workspace_within(10 << 30, graph, integrated=True) == (9 << 30) - 4 * graph
    assert workspace_within(10 << 30, graph, integrated=False) == (19 << 29) - 4 * graph
    assert workspace_within(1 << 30, graph, integrated=True) == MINIMUM


@given(free=st.integers(0, 1 << 38), graph=st.integers(0, 1 << 31), integrated=st.booleans())
def test_the_workspace_is_less_than_free_or_the_minimum(free: int, graph: int, integrated: bool) -> None:
    size = workspace_within(free, graph, integrated=integrated)
    assert size == MINIMUM or MINIMUM < size < free


def test_memory_of_the_system(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       15642188 kB\nMemFree:          318000 kB\nMemAvailable:    9400000 kB\n")
    assert available_memory(info) == 9400000 * 1024
    info.write_text("MemTotal: 5 kB\n")
    assert available_memory(info) is None
    assert available_memory(tmp_path / "none") is None
    assert available_memory()


def test_shared_memory_is_the_systems_and_own_memory_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "available_memory", lambda: 6 << 30)
    monkeypatch.setattr(options, "free_gpu_memory", lambda: 12 << 30)
    assert default_workspace(ORIN, 0) == 5 << 30
    assert default_workspace(dataclasses.replace(ORIN, integrated=False), 0) == 23 << 29
    monkeypatch.setattr(options, "free_gpu_memory", lambda: None)
    assert default_workspace(dataclasses.replace(ORIN, integrated=False), 0) is None


# --- the GPU --------------------------------------------------------------------------------------


class Driver:
    """CUDA's driver for one GPU: a function writes its answer to where its first argument points."""

    def __init__(self, init: int = 0, count: int = 1, name: bytes = b"Orin") -> None:
        self.init, self.retained, self.name = init, 0, name
        self.attributes = {75: 8, 76: 7, 18: 1, 16: 8}
        self.answers = {
            "cuDeviceGetCount": count, "cuDeviceTotalMem_v2": 16 << 30, "cuDriverGetVersion": 12060,
            "cuMemGetInfo_v2": 3 << 30,
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self.call(name, *arguments)

    def call(self, name: str, target: Any, *arguments: Any) -> int:
        if name == "cuInit":
            return self.init
        self.retained += {"cuDevicePrimaryCtxRetain": 1, "cuDevicePrimaryCtxRelease_v2": -1}.get(name, 0)
        if name == "cuDeviceGetName":
            target.value = self.name
        elif name == "cuDeviceGetAttribute":
            target._obj.value = self.attributes.get(arguments[0], 0)
            return int(arguments[0] not in self.attributes)
        elif name in self.answers:
            target._obj.value = self.answers[name]
        return 0


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu() == ORIN
    assert free_gpu_memory() == 3 << 30
    assert driver.retained == 0


def test_reasons_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpu() == NoGpu("there is no CUDA driver")
    assert free_gpu_memory() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(init=999))
    assert find_gpu() == NoGpu("the CUDA driver does not start (cuInit: 999)")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(init=100))
    assert find_gpu() == NoGpu("the CUDA driver sees no GPU")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(count=0))
    assert find_gpu() == NoGpu("the CUDA driver sees no GPU")
    driver = Driver()
    driver.attributes = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu() == NoGpu("the CUDA driver does not describe its GPU")


# --- which TensorRT -------------------------------------------------------------------------------


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Packages that can be found, by name; none at first."""
    there: dict[str, Any] = {}
    monkeypatch.setattr(find, "find_spec", lambda name: there.get(name))

    def give(name: str) -> ModuleType:
        if isinstance(there[name].module, Exception):
            raise there[name].module
        return there[name].module  # type: ignore[no-any-return]

    monkeypatch.setattr(find, "import_module", give)
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode=0: loaded.append(Path(path).name))
    loaded: list[str] = []
    there["loaded"] = loaded
    return there


def package(version: str = "1", origin: str | None = "x/__init__.py", **content: Any) -> SimpleNamespace:
    return SimpleNamespace(origin=origin, module=SimpleNamespace(__version__=version, Builder=object, **content))


def test_no_tensorrt_at_all(no_tensorrt: dict[str, Any]) -> None:
    assert not tensorrt_is_installed()
    with pytest.raises(TensorRTMissingError, match="not installed in this Python") as caught:
        find_tensorrt()
    assert "--system-site-packages" in str(caught.value.hint)


def test_tensorrt_comes_before_tensorrt_rtx(no_tensorrt: dict[str, Any]) -> None:
    no_tensorrt |= {"tensorrt_rtx": package("1.2"), "tensorrt": package("10.3.0")}
    assert tensorrt_is_installed()
    assert (find_tensorrt().kind, find_tensorrt().name) == ("tensorrt", "TensorRT 10.3.0")


def test_stubs_are_no_tensorrt(no_tensorrt: dict[str, Any]) -> None:
    no_tensorrt["tensorrt"] = package(origin=None)
    assert not tensorrt_is_installed()
    no_tensorrt["tensorrt"] = SimpleNamespace(origin="x", module=SimpleNamespace(__version__="10"))
    with pytest.raises(TensorRTMissingError, match="not installed"):
        find_tensorrt()


def test_a_tensorrt_that_does_not_load(no_tensorrt: dict[str, Any]) -> None:
    no_tensorrt["tensorrt"] = SimpleNamespace(origin="x", module=ImportError("libnvinfer.so.10:\n cannot open"))
    with pytest.raises(TensorRTMissingError, match=r"cannot be imported \(tensorrt: libnvinfer\.so\.10: cannot open\)"):
        find_tensorrt()
    no_tensorrt["tensorrt_rtx"] = package("1.7")
    assert find_tensorrt().name == "TensorRT-RTX 1.7"


def test_libraries_beside_the_bindings(no_tensorrt: dict[str, Any], tmp_path: Path) -> None:
    no_tensorrt["tensorrt_rtx_bindings"] = package("1.9")
    assert not tensorrt_is_installed(), "bindings without libraries"
    for name in ("libtensorrt_rtx.so.1.9.0", "libtensorrt_rtx.so.1.10.0", "libtensorrt_onnxparser_rtx.so.1.10.0"):
        (tmp_path / name).touch()
    no_tensorrt["onnxruntime_ep_nv_tensorrt_rtx"] = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    assert tensorrt_is_installed()
    assert find_tensorrt().kind == "tensorrt-rtx"
    assert no_tensorrt["loaded"] == ["libtensorrt_rtx.so.1.10.0", "libtensorrt_onnxparser_rtx.so.1.10.0"]
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(TensorRTMissingError, match=r"no libtensorrt_rtx\.so in"):
        find_tensorrt()


def test_one_logger_and_many_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    class ILogger:
        Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    monkeypatch.setattr(find, "_logger", None)
    found = TensorRT(SimpleNamespace(ILogger=ILogger), "tensorrt", "10")
    heard: list[tuple[str, ...]] = []
    with find.log_to(lambda *line: heard.append(line)):
        found.logger.log(1, "one")
        with find.log_to(lambda *line: heard.append(("inner", *line))):
            found.logger.log(4, "two")
        found.logger.log(0, "three")
    found.logger.log(1, "nobody listens")
    assert heard == [("error", "one"), ("inner", "verbose", "two"), ("error", "three")]
    assert found.logger is found.logger


# --- timing cache ---------------------------------------------------------------------------------


def test_where_timings_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = dataclasses.replace(ORIN, name="NVIDIA / Orin ü (nvgpu)")
    path = options.cache_path("tensorrt", "10.3.0", gpu)
    assert path == tmp_path / "cdkd-edge" / "timing" / "tensorrt-10.3.0-NVIDIA_Orin_ü_nvgpu_-sm87-8sm.cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert options.cache_folder() == tmp_path / "me" / ".cache" / "cdkd-edge"


def test_different_devices_and_releases_have_different_files() -> None:
    other = dataclasses.replace(ORIN, compute_capability="8.6")
    in_15w = dataclasses.replace(ORIN, multiprocessors=4)
    paths = {
        options.cache_path(kind, version, gpu)
        for kind in ("tensorrt", "tensorrt-rtx")
        for version in ("10.3.0", "10.16.0")
        for gpu in (ORIN, other, in_15w)
    }
    assert len(paths) == 12


def test_processes_that_update_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.cache"
    code = (
        "import sys, time; from pathlib import Path; from cdkd_edge.engines.tensorrt.options import update_cache\n"
        "for index in range(20):\n"
        "    line = f'{sys.argv[2]}{index}\\n'.encode()\n"
        "    update_cache(Path(sys.argv[1]), lambda now: (time.sleep(0.002), now + line)[1])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = options.read_cache(path).decode().split()
    assert sorted(lines) == sorted(f"{name}{index}" for name in "ab" for index in range(20))
    assert [item.name for item in path.parent.iterdir() if "part" in item.name] == []


def test_a_merge_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        options.update_cache(path, lambda now: bytes(1 // 0))
    options.update_cache(path, lambda now: now + b"+")  # the lock was released
    assert path.read_bytes() == b"old+"


class Timings:
    """``ITimingCache``: JSON stands in for what TensorRT serialises."""

    def __init__(self, content: bytes) -> None:
        self.items = set(json.loads(content or b"[]"))

    def combine(self, other: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.items |= other.items
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.items)).encode()


class TimingConfig:
    def __init__(self) -> None:
        self.cache: Timings | None = None

    def create_timing_cache(self, content: bytes) -> Timings:
        return Timings(content)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "foreign" in cache.items:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Timings | None:
        return self.cache


@pytest.fixture
def orin_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = options.cache_path("tensorrt", "10.3.0", ORIN)
    path.parent.mkdir(parents=True)
    return path


def timing_cache(config: Any, gpu: Any = ORIN, kind: str = "tensorrt") -> options.TimingCache:
    return options.TimingCache(TensorRT(None, kind, "10.3.0"), config, gpu)


def test_timings_of_builds_at_the_same_time_are_merged(orin_cache: Path) -> None:
    orin_cache.write_bytes(b'["conv"]')
    one, two = TimingConfig(), TimingConfig()
    caches = [timing_cache(one), timing_cache(two)]
    assert one.cache is not None
    assert two.cache is not None
    one.cache.items.add("gemm")
    two.cache.items.add("mha")
    for cache in caches:
        cache.keep()
        assert (cache.used, cache.notes) == (True, [])
    assert json.loads(orin_cache.read_bytes()) == ["conv", "gemm", "mha"]


@pytest.mark.parametrize("content", [b"\xff\x00", b'["foreign"]'])
def test_a_damaged_or_foreign_cache_is_replaced_with_a_note(content: bytes, orin_cache: Path) -> None:
    orin_cache.write_bytes(content)
    config = TimingConfig()
    cache = timing_cache(config)
    assert config.cache is not None
    config.cache.items.add("gemm")
    assert "damaged or of another device" in cache.notes[0]
    if content == b"\xff\x00":
        cache.keep()
        assert json.loads(orin_cache.read_bytes()) == ["gemm"]


def test_a_cache_folder_that_cannot_be_written_is_a_note(orin_cache: Path) -> None:
    cache = timing_cache(TimingConfig())
    orin_cache.parent.rmdir()
    orin_cache.parent.write_text("a file")
    cache.keep()
    assert cache.notes[0].startswith("timings were not kept: ")
    assert timing_cache(TimingConfig()).notes[0].startswith("timings were not read: ")


def test_no_cache_without_a_gpu_or_for_tensorrt_rtx(orin_cache: Path) -> None:
    for cache in (timing_cache(None, NoGpu("none")), timing_cache(None, ORIN, "tensorrt-rtx")):
        cache.keep()
        assert not cache.used
    assert list(orin_cache.parent.iterdir()) == []


# --- what the parser says -------------------------------------------------------------------------


def complaint(operator: str, domain: str = "", opset: int = 20, text: str = "false") -> ParserComplaint:
    return ParserComplaint("blocks.0/x", operator, domain, opset, text)


def test_an_operator_that_came_later() -> None:
    message, hint = explain(complaint("Attention", opset=23), "TensorRT 10.3.0")
    assert message.startswith("TensorRT 10.3.0 does not take node 'blocks.0/x', an ONNX Attention")
    assert "since 10.14" in message
    assert "--opset" in hint


def test_quantised_nodes_that_are_for_the_cpu() -> None:
    said = "Invalid Node - dql\nITensor::getDimensions: Error Code 4: (dql: input has type Int32 but must have Int8)"
    message, hint = explain(complaint("DequantizeLinear", text=said), "TensorRT 10.3.0")
    assert "input has type Int32" in message
    assert "\n" not in message
    assert ".int8.onnx" in hint


def test_what_is_not_known_is_said() -> None:
    message, hint = explain(complaint("Frobnicate", opset=25), "TensorRT 11.0")
    assert "not known since which release" in message
    assert "opset 25" in hint
    assert "10.15: 24" in hint
    assert explain(ParserComplaint("", "", "", 0, "no"), "X")[0] == "X cannot read the graph: no"
    assert "a node without a name" in explain(ParserComplaint("", "Det", "", 0, "no"), "X")[0]


@pytest.mark.parametrize(
    ("line", "helps"),
    [
        (
            "Error Code 9: API Usage Error (Target GPU SM 87 is not supported by this TensorRT release.)",
            "On JetPack 7.2 that is 10.16",
        ),
        (
            "Error Code 9: API Usage Error (Target GPU SM 120 is not supported by this TensorRT release.)",
            "newer release",
        ),
        (
            "createInferBuilder: Error Code 6: API Usage Error (Unable to load library: "
            "libnvinfer_builder_resource_sm86.so.10.16.2: cannot open shared object file)",
            "installed in part",
        ),
    ],
)
def test_what_helps_against_errors_of_the_builder(line: str, helps: str) -> None:
    assert helps in str(advice(["something else", line]))
    assert advice([]) is None
    assert advice(["Error Code 9: unsupported"]) is None


def test_the_tables_do_not_contradict_each_other() -> None:
    assert not set(SINCE) & UNSUPPORTED
    assert list(OPSETS.values()) == sorted(OPSETS.values())


# --- layers ---------------------------------------------------------------------------------------

LINE = (
    "Name: {name}, LayerType: gemm, Inputs: [ {{ Name: a, Dimensions: [1,2,3], Strides: [6,3,1], Datatype: Half, "
    "Format: (Linear) Row major }}, {{ Name: b, Dimensions: [3], Datatype: Float, Format: x }}], "
    "Constants: [ {{ Name: w, Dimensions: [9,9], Datatype: Int8, Format: x }}], "
    "Outputs: [ {{ Name: y, Dimensions: [], Datatype: Int32, Format: x }}], "
    "TacticName: , StreamId: 0, Metadata: [ONNX Layer: p/MatMul][ONNX Layer: p/Add]"
)


def test_layers_of_a_log() -> None:
    found = layers_of_log(
        [
            "Layers:\n" + LINE.format(name="one") + "\n" + LINE.format(name="_gemm_mha_v2_myl0_5") + "\n\nI/O Tensors:",
            "Max Scratch Memory: 44000000 bytes",
            "Total Weights Memory: 99 bytes",
            "Name: no layer",
        ]
    )
    assert [layer.name for layer in found.layers] == ["one", "_gemm_mha_v2_myl0_5"]
    layer = found.layers[0]
    assert layer.type == "gemm"
    assert layer.inputs == (LayerTensor("a", "fp16", (1, 2, 3)), LayerTensor("b", "fp32", (3,)))
    assert layer.constants == (LayerTensor("w", "int8", (9, 9)),)
    assert layer.outputs == (LayerTensor("y", "int32", ()),)
    assert layer.traffic_bytes == 12 + 12 + 4
    assert layer.nodes == ("p/MatMul", "p/Add")
    assert layer.precision == "int8"
    assert (found.scratch_bytes, found.weights_bytes, found.fused_attention) == (44000000, 99, 1)
    assert layers_of_log([]) == EngineLayers(())


def test_layers_of_the_inspector() -> None:
    """Both spellings of its type: that of TensorRT 10.3 and the newer one."""
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "a",
                    "LayerType": "kgen",
                    "Inputs": [
                        {"Name": "x", "Dimensions": [2, 4], "Format/Datatype": "Row major linear FP16 format"},
                        {"Name": "z", "Dimensions": [-1, 4], "Format/Datatype": "Half"},
                    ],
                    "Outputs": [{"Name": "y", "Dimensions": [2], "Datatype": "Float"}],
                    "Metadata": "[ONNX Layer: n]\u001f[ONNX Layer: m]",
                },
                "only a name",
            ],
            "Bindings": ["image"],
        }
    )
    (layer,) = layers_of_inspector(text)
    assert layer.inputs == (LayerTensor("x", "fp16", (2, 4)), LayerTensor("z", "fp16", (-1, 4)))
    assert layer.traffic_bytes == 16 + 8
    assert layer.precision == "fp32"
    assert layer.nodes == ("n", "m")
    closed = json.dumps({"Layers": [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin"}]})
    for nonsense in ("", "[]", "null", '{"Layers": []}', "{", closed):
        assert layers_of_inspector(nonsense) == ()


def attention(name: str, node: str) -> Layer:
    scores = LayerTensor("s", "fp16", (6, 4096, 4096))
    return Layer(name, "kgen", (scores,), (scores,), (), (node,))


def test_limits_and_the_sentences_about_them() -> None:
    good = EngineLayers((attention("_gemm_mha_v2_myl0_1", "a"),), 40_000_000, 1, ("a",))
    limits = LayerLimits(attention_blocks=1, layers=1, traffic_bytes=1e9, scratch_bytes=64e6)
    assert exceeded(good, limits) == []
    bad = EngineLayers((attention("gemm", "a"), attention("_gemm_mha_v2", "b"), *good.layers * 3), 65_000_000, 1)
    assert exceeded(bad, dataclasses.replace(limits, attention_blocks=5, layers=4)) == [
        "4 of 5 attention blocks are fused",
        "5 layers, at most 4",
        "2.01 GB layer traffic, at most 1.00",
        "65 MB scratch, at most 64",
    ]
    assert exceeded(dataclasses.replace(good, scratch_bytes=None), limits) == [
        "the compiler did not tell its scratch memory"
    ]


def test_which_attention_is_not_fused() -> None:
    layers = (attention("_gemm_mha_v2_myl0_1", "a"), attention("softmax", "b"))
    assert EngineLayers(layers, attention_nodes=("a", "b")).unfused_attention == ("b",)
    nameless = tuple(dataclasses.replace(layer, nodes=()) for layer in layers)
    assert EngineLayers(nameless, attention_nodes=("a", "b")).unfused_attention == ()


def test_layers_are_stored_as_they_are(tmp_path: Path) -> None:
    engine = tmp_path / "ckpt.fp16.engine"
    layers = layers_of_log([LINE.format(name="ü"), LINE.format(name="two")]).layers
    compiled = EngineLayers(layers, None, 7, ("p/Softmax",))
    write_layers(engine, "abc", compiled)
    assert layers_path(engine) == tmp_path / "ckpt.fp16.layers.json"
    assert read_layers(engine, "abc") == compiled
    lines = layers_path(engine).read_text().splitlines()
    assert sum(line.startswith('{"name": ') for line in lines) == 2, "a line to a layer"
    assert read_layers(tmp_path / "other.engine", "abc") is None
    with pytest.raises(ManifestError, match="about another engine"):
        read_layers(engine, "def")
    write_layers(engine, "abc", EngineLayers(()))
    assert read_layers(engine, "abc") == EngineLayers(())


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"engine_sha256": "abc", "layers": [1]}', b"[" * 99999]
)
def test_damaged_layers(content: bytes, tmp_path: Path) -> None:
    layers_path(tmp_path / "e.engine").write_bytes(content)
    with pytest.raises(ManifestError, match=r"e\.layers\.json is damaged"):
        read_layers(tmp_path / "e.engine", "abc")


@given(st.text())
def test_any_text_is_read_as_some_layers(text: str) -> None:
    layers_of_inspector(text)
    for layer in layers_of_log([text, "Name: " + text + ", LayerType: " + text]).layers:
        assert layer.traffic_bytes >= 0


# --- what may be loaded here ----------------------------------------------------------------------

BUILD = TensorRTBuild(
    version="10.3.0", gpu="Orin", compute_capability="8.7", targets=(), cuda="12.6", l4t="R36.4.0", strongly_typed=True,
    flags=(), workspace_bytes=None, optimization_level=3, timing_cache=True, tensors=(), scratch_bytes=None,
    weights_bytes=None, layers=0, traffic_bytes=0, layer_precisions={},
)  # fmt: skip
HERE = TensorRT(None, "tensorrt", "10.3.0")


def engine_manifest(build: TensorRTBuild | None = BUILD, runtime: str = "tensorrt") -> EngineManifest:
    record = FileRecord("ckpt.fp16.engine", "0" * 64, 1)
    return EngineManifest(
        name="ckpt", runtime=runtime, precision="fp16", artefact=record, labels={}, tile=64, batch=1, device="Orin",
        graph=FileRecord("ckpt.fp16.onnx", "1" * 64, 1), preprocessing=Preprocessing("RGB", (0, 0, 0), (1, 1, 1)),
        attention_blocks=0, attention_fused=0, build_seconds=math.pi, graph_check=GraphCheck(0, 0, 1, "", ""),
        libraries={}, tensorrt=build,
    )  # fmt: skip


def test_an_engine_at_home() -> None:
    require_loadable(engine_manifest(), HERE, ORIN)
    compiled = dataclasses.replace(BUILD, gpu=None, compute_capability=None, targets=("8.6", "8.9"), version="1.7")
    rtx = TensorRT(None, "tensorrt-rtx", "1.7")
    require_loadable(
        engine_manifest(compiled, "tensorrt-rtx"),
        rtx,
        dataclasses.replace(ORIN, name="RTX 4090", compute_capability="8.9"),
    )


@pytest.mark.parametrize(
    ("changes", "runtime", "here", "message"),
    [
        ({}, "tensorrt", ("tensorrt", "10.16.0"), "built by TensorRT 10.3.0, here is TensorRT 10.16.0"),
        ({}, "tensorrt", ("tensorrt-rtx", "10.3.0"), "built by TensorRT 10.3.0, here is TensorRT-RTX 10.3.0"),
        ({}, "tensorrt-rtx", ("tensorrt", "10.3.0"), "built by TensorRT-RTX 10.3.0, here is TensorRT 10.3.0"),
        (
            {"gpu": "A100", "compute_capability": "8.0"},
            "tensorrt",
            ("tensorrt", "10.3.0"),
            r"built on A100 \(compute capability 8\.0\), here is Orin \(8\.7\)",
        ),
        ({"gpu": "Xavier"}, "tensorrt", ("tensorrt", "10.3.0"), "built on Xavier"),
        (
            {"gpu": None, "compute_capability": None, "targets": ("8.6", "8.9")},
            "tensorrt-rtx",
            ("tensorrt-rtx", "10.3.0"),
            r"compiled for compute capability 8\.6, 8\.9, the Orin here has 8\.7",
        ),
        (
            {"version": "11", "gpu": "B200"},
            "tensorrt",
            ("tensorrt", "10.3.0"),
            "built by TensorRT 11, .*; it was built on B200",
        ),
    ],
)
def test_foreign_engines(changes: dict[str, Any], runtime: str, here: tuple[str, str], message: str) -> None:
    manifest = engine_manifest(dataclasses.replace(BUILD, **changes), runtime)
    with pytest.raises(EngineError, match=message) as caught:
        require_loadable(manifest, TensorRT(None, *here), ORIN)
    assert caught.value.hint == "build it again here from ckpt.fp16.onnx: cdkd-edge build --fp16 --runtime tensorrt"


NX = dataclasses.replace(ORIN, module="p3767-0000")
ON_NX = dataclasses.replace(BUILD, multiprocessors=8, module="p3767-0000", board="Orin NX", power_mode="MAXN")
ON_AGX = dataclasses.replace(ON_NX, multiprocessors=16, module="p3701-0005", board="NVIDIA Jetson AGX Orin")


def test_an_engine_of_another_module_with_the_same_gpu_name_is_refused() -> None:
    assert require_loadable(engine_manifest(ON_NX), HERE, NX) is None
    with pytest.raises(
        EngineError, match=r"module p3701-0005 \(NVIDIA Jetson AGX Orin\), here is p3767-0000"
    ) as caught:
        require_loadable(engine_manifest(ON_AGX), HERE, NX)
    hint = str(caught.value.hint)
    assert hint.startswith("build it again here from ckpt.fp16.onnx: cdkd-edge build --fp16")
    assert "--portable" in hint
    with pytest.raises(EngineError, match=r"module p3767-0001 .*, here is p3767-0000"):
        require_loadable(engine_manifest(dataclasses.replace(ON_NX, module="p3767-0001")), HERE, NX)


def test_where_the_module_is_not_known_the_multiprocessors_decide() -> None:
    """In a container without the device tree, and for engines built in one."""
    assert require_loadable(engine_manifest(ON_NX), HERE, ORIN) is None
    for build, device in ((ON_AGX, ORIN), (dataclasses.replace(ON_AGX, module=None), NX)):
        with pytest.raises(EngineError, match=r"built for 16 multiprocessors, here are 8, and whether .* is not known"):
            require_loadable(engine_manifest(build), HERE, device)


def test_the_same_module_in_another_power_mode_is_a_warning() -> None:
    in_15w = dataclasses.replace(NX, multiprocessors=4)
    warning = str(require_loadable(engine_manifest(ON_NX), HERE, in_15w))
    assert "built with 8 multiprocessors (power mode MAXN), and 4 are on now" in warning
    assert "build it again in this mode" in warning


def test_a_manifest_of_an_earlier_release_still_loads_and_says_what_is_not_known() -> None:
    assert "does not say for which module" in str(require_loadable(engine_manifest(), HERE, NX))


def test_a_portable_engine_runs_on_every_module_of_its_compute_capability() -> None:
    portable = dataclasses.replace(ON_AGX, portable=True)
    assert require_loadable(engine_manifest(portable), HERE, dataclasses.replace(NX, multiprocessors=4)) is None
    assert require_loadable(engine_manifest(portable), HERE, dataclasses.replace(NX, name="another")) is None
    for device in (
        dataclasses.replace(NX, compute_capability="8.6"),
        dataclasses.replace(NX, compute_capability="11.0"),
    ):
        with pytest.raises(EngineError, match=r"built on Orin \(compute capability 8\.7\)"):
            require_loadable(engine_manifest(portable), HERE, device)
    with pytest.raises(EngineError, match=r"built by TensorRT 10\.3\.0, here is TensorRT 10\.16\.0"):
        require_loadable(engine_manifest(portable), TensorRT(None, "tensorrt", "10.16.0"), NX)


@pytest.mark.parametrize(
    ("compatible", "module"),
    [
        ("nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0nvidia,tegra234\0", "p3767-0000"),
        ("nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0", "p3767-0005"),
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", "p3701-0005"),
        ("somebody,carrier\0nvidia,p3767-0001\0nvidia,tegra234\0", "p3767-0001"),
        ("raspberrypi,5-model-b\0brcm,bcm2712\0", None),
        (None, None),
    ],
)
def test_the_module_by_its_part_number(
    compatible: str | None, module: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: compatible if path.endswith("/compatible") else None)
    assert machine.jetson_module() == module


def test_the_gpu_knows_its_module_and_the_name_that_cuda_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(name=b"Orin (nvgpu)"))
    monkeypatch.setattr(find, "jetson_module", lambda: "p3767-0000")
    assert find_gpu() == NX


def test_no_gpu_to_load_on() -> None:
    with pytest.raises(EngineError, match="a TensorRT engine and there is no CUDA driver") as caught:
        require_loadable(engine_manifest(), HERE, NoGpu("there is no CUDA driver"))
    assert "--runtime cpu" in str(caught.value.hint)


def test_a_manifest_that_does_not_say() -> None:
    with pytest.raises(ManifestError, match="does not say which TensorRT"):
        require_loadable(engine_manifest(None), HERE, ORIN)
