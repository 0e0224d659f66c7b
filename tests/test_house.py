"""The rules of the house: who may import whom, what runs without which package, how fast help comes."""

from __future__ import annotations

import ast
import contextlib
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scene_helpers import noise, write_raster

import cdkd_edge

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PACKAGE = Path(cdkd_edge.__file__).parent
ROOT = PACKAGE.parent
REPOSITORY = Path(__file__).resolve().parents[1]

with (REPOSITORY / "docs" / "rooms.toml").open("rb") as file:
    ROOMS = (*tomllib.load(file), "api", "__main__")
"""From the ground up; a module imports from its own and lower rooms."""
FLOOR = {name: level for level, name in enumerate(ROOMS)}

NEEDS_TORCH = (
    "cdkd_edge.model.network",
    "cdkd_edge.model.complete",
    "cdkd_edge.model.infer",
    "cdkd_edge.model.resample",
    "cdkd_edge.model.checkpoint",
    "cdkd_edge.model.container",
    "cdkd_edge.model.sam",
    "cdkd_edge.model.sam_files",
    "cdkd_edge.model.device",
    "cdkd_edge.model.sparsity",
    "cdkd_edge.model.unwrap",
    "cdkd_edge.graph.export",
    "cdkd_edge.quality.network",
    "cdkd_edge.training",
    "cdkd_edge.distillation",
)
"""Modules, and packages with all their modules, that are not used on a board."""
EXTRAS = (
    "dask", "distributed", "onnxsim", "onnxscript", "safetensors", "shapely", "pyogrio", "jtop", "pycuda", "pynvml",
    "cuda", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs", "onnxruntime_ep_nv_tensorrt_rtx",
)  # fmt: skip


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def needs_torch(module):
    return any(module == name or module.startswith(f"{name}.") for name in NEEDS_TORCH)


def executed(tree):
    """All nodes below one, but for what stands under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from executed(other)
        else:
            yield node
            yield from executed(node)


def imported(path, module, nodes=ast.walk):
    """Everything of this package that a module imports anywhere, and the line it does so."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "cdkd_edge":
                yield name, node.lineno


def floor_of(name):
    """The floor of a dotted name; None for what belongs to the package itself, such as its version."""
    parts = name.split(".")
    return FLOOR.get(parts[1]) if len(parts) > 1 else None


def test_every_module_has_its_floor():
    tops = {module.split(".")[1] for module in MODULES if "." in module}
    assert tops <= set(FLOOR)
    assert {"cdkd_edge.core.errors", "cdkd_edge.engines.onnxruntime", "cdkd_edge.cli"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_down(module):
    own = floor_of(module)
    top = module.split(".")[1] if "." in module else None
    for name, line in imported(MODULES[module], module):
        other = floor_of(name)
        if other is None or (module == "cdkd_edge" and name.startswith("cdkd_edge.api")):
            assert name.startswith(("cdkd_edge.__version__", "cdkd_edge.api")), f"{MODULES[module].name}:{line}: {name}"
            continue
        assert own is not None, f"the package itself imports {name}, so that every module would"
        inside = name.split(".")[1] == top
        assert other < own or inside, f"{MODULES[module].name}:{line} imports {name} from above"


def imports_between(modules):
    """By module: the other modules that it imports, in functions too. (The package itself only lends its version.)"""
    found = {}
    for module, path in modules.items():
        found[module] = set()
        for name, _ in imported(path, module, executed):
            while name not in modules:  # a name of a module
                name = name.rpartition(".")[0]
            found[module] |= {name} - {module, "cdkd_edge"}
    return found


def test_no_imports_run_in_a_circle():
    graphlib.TopologicalSorter(imports_between(MODULES)).prepare()


@pytest.mark.parametrize(
    ("first", "circle"),
    [("def f():\n    from cdkd_edge import b", True), ("if TYPE_CHECKING:\n    from cdkd_edge.b import B", False)],
)
def test_a_circle_is_seen(tmp_path, first, circle):
    modules = {name: tmp_path / f"{name}.py" for name in ("cdkd_edge", "cdkd_edge.a", "cdkd_edge.b")}
    for path, text in zip(modules.values(), ("", first, "import cdkd_edge.a"), strict=True):
        path.write_text(text)
    with pytest.raises(graphlib.CycleError) if circle else contextlib.nullcontext():
        graphlib.TopologicalSorter(imports_between(modules)).prepare()


def test_a_class_has_a_name_of_its_own():
    places = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(module)
    assert len(places) > 150
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


PROBE = """
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked, modules = json.loads(sys.argv[1])
sys.meta_path.insert(0, Absent())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failed[module] = str(error)
print(json.dumps({"failed": failed, "loaded": sorted(name for name in sys.modules if "." not in name)}))
"""


def probe(blocked, modules):
    """Import modules in a process of their own in which packages are absent."""
    answer = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([blocked, modules])],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(answer.stdout)


def test_a_board_needs_no_torch_and_no_extra():
    modules = [module for module in MODULES if not needs_torch(module)]
    assert len(modules) > 30
    assert probe(["torch", *EXTRAS], modules)["failed"] == {}


def test_what_needs_torch_needs_no_other_extra():
    pytest.importorskip("torch")
    modules = [module for module in MODULES if needs_torch(module)]
    for name in NEEDS_TORCH:
        assert any(module == name or module.startswith(f"{name}.") for module in modules), f"{name} is gone"
    assert probe(EXTRAS, modules)["failed"] == {}


def test_the_command_line_imports_nothing_heavy():
    loaded = probe([], ["cdkd_edge.cli"])["loaded"]
    assert "cdkd_edge" in loaded
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "rasterio", "PIL", "msgspec", "matplotlib", "jtop"}
    assert not heavy & set(loaded)


def test_the_probe_sees_a_missing_package():
    """So that the tests above can fail."""
    assert "cdkd_edge.engines.onnxruntime" in probe(["onnxruntime"], ["cdkd_edge.engines.onnxruntime"])["failed"]


@pytest.mark.skipif("CDKD_EDGE_SKIP_TIMING" in os.environ, reason="CDKD_EDGE_SKIP_TIMING is set")
def test_help_answers_at_once():
    """In processor time, which a busy machine does not stretch; the best of five."""
    seconds = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "cdkd_edge", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        process.stderr.close()
        assert process.returncode == 0
        assert b"bench" in output
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5


def test_what_is_shown_goes_through_one_place():
    """Text from files must not steer the terminal: cli.report has the console and say."""
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if module != "cdkd_edge.cli.report":
            assert not re.search(r"rich\.console|rich import print|add_row\((?!cell)", text), module
        if module not in ("cdkd_edge.cli.report", "cdkd_edge.cli.app"):
            assert not re.search(r"typer\.s?echo|click\.echo", text), module


def test_no_file_names_somebodys_home():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(rb"(?<![\w.~}/-])/(?:" + b"|".join((b"root", b"home", b"work")) + rb")/\w")
    found = []
    for name in listing.stdout.decode().split("\0"):
        path = REPOSITORY / name
        if not name or not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{name}:{content[: hit.start()].count(10) + 1}" for hit in pattern.finditer(content)]
    assert found == []


CALLS = ("connect", "sendto", "sendmsg", "sendmmsg", "bind", "openat", "mkdir", "rename", "unlink", "symlink")
"""By which a process reaches the network or changes files."""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Runs a command under strace, with a home and workspace of its own, and judges its calls and what it left."""
    if shutil.which("strace") is None or subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("needs strace, and a system that lets it trace")
    place = tmp_path_factory.mktemp("traced")
    for name in ("home", "tmp", "work"):
        (place / name).mkdir()
    hidden = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "ORT_DISABLE_TELEMETRY", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    traced = ",".join(f"?{call}" for call in CALLS)
    tracing = (
        f"strace -f -qq --seccomp-bpf -s 4096 -e trace={traced} -o {place / 'calls'} {sys.executable} -m cdkd_edge"
    )

    def run(*arguments):
        command = [*tracing.split(), *map(str, arguments)]
        done = subprocess.run(command, cwd=place / "work", env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 16), (arguments, done.stderr)  # 16: no source of power here
        calls = (place / "calls").read_text(errors="replace").splitlines()
        assert len(calls) > 10
        assert [call for call in calls if leaves(call, place)] == [], arguments
        assert not [path for path in (place / "tmp").rglob("*") if path.is_file()], arguments
        left = {path.relative_to(place / "home").parts[:2] for path in (place / "home").rglob("*") if path.is_file()}
        assert left <= {(".cache", "cdkd-edge")}, arguments

    run.place = place
    return run


def leaves(call, place):
    """Whether a traced call reaches beyond this machine, or writes outside ``place``."""
    if "AF_INET" in call:
        return not re.search(r'"(127\.|::1"|::ffff:127\.)', call)
    writes = re.search(r"O_WRONLY|O_RDWR|O_CREAT|mkdir|rename|unlink|symlink", call) and " = -1 " not in call
    paths = [path for path in re.findall(r'"([^"]*)"', call) if path.startswith("/")]
    return bool(writes) and not all(path.startswith((str(place), "/dev/", "/proc/")) for path in paths)


def test_no_command_of_a_board_reaches_the_network_or_writes_elsewhere(traced, small_graph):
    """ONNX Runtime leaves a device id at once, and looks up its host after nine seconds."""
    work = traced.place / "work"
    (work / "export").mkdir()
    for path in (small_graph, small_graph.with_suffix(".json")):
        shutil.copy(path, work / "export")
    for name in ("a", "b"):
        write_raster(work / f"{name}.tif", noise(150, 200))
    traced("build")
    traced("segment", "a.tif", "b.tif", "--workers", "2", "--preview", "--stac", "--report", "report.json")
    traced("bench", "--duration", "12", "--max-warm-up", "0")
    (measured,) = (work / "benchmarks").iterdir()
    traced("compare", measured, measured, "--force", "-o", "compared")
    traced("sweep", "export/small.onnx", "--precision", "fp32", "--duration", "0.1", "--max-warm-up", "0")
    traced("calibrate", "a.tif", "--count", "2", "--check", "0")
    for command in ("inspect", "doctor", "power", "roofline"):
        traced(command)


@pytest.mark.needs_torch
def test_no_command_with_torch_does(traced):
    pytest.importorskip("torch")
    traced("export", PACKAGE / "demo" / "tiny.safetensors", "--schema", "dubai", "-w", "desk", "--tile", "64")


def test_who_imports_onnxruntime_first_is_told(tmp_path):
    """Its telemetry begins with the import, and nothing that comes later ends it."""
    import onnxruntime

    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "0"}
    script = "import {}, {}, os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    told = []
    for order in (("onnxruntime", "cdkd_edge"), ("cdkd_edge", "onnxruntime")):
        done = subprocess.run(
            [sys.executable, "-c", script.format(*order)], capture_output=True, text=True, check=True, env=environment
        )
        told.append("RuntimeWarning: onnxruntime was imported before cdkd_edge" in done.stderr)
    has_telemetry = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 29)
    assert told == [has_telemetry, False]
