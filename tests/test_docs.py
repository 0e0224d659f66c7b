"""Documents say what is so: commands parse, paths and links lead somewhere, tables are complete."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer.main
from labelled_images import build_data
from scene_helpers import noise, write_raster

from cdkd_edge import cli
from cdkd_edge.core import errors

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
    if path.name not in ("CHANGELOG.md",)
)
COMMANDS = typer.main.get_command(cli.app).commands


def blocks(text):
    """Fenced blocks as (language, content), and the prose between them as (None, content)."""
    for index, part in enumerate(re.split(r"(?m)^```", text)):
        language, _, content = part.partition("\n")
        yield (language, content) if index % 2 else (None, part)


def command_lines(page):
    """Every line that somebody could type: of shell blocks, and inline."""
    for language, content in blocks(page.read_text(encoding="utf-8")):
        if language in ("", "bash"):
            yield from content.replace("\\\n", " ").splitlines()
        elif language is None:
            yield from re.findall(r"`((?:cdkd-edge|make|pytest|python) [^`]+)`", content)


def commands(program):
    found = []
    for page in PAGES:
        for line in command_lines(page):
            if match := re.match(rf"(?:sudo |\S*/)?(?:{program}|\$\(command -v {program}\))(?: (.*))?$", line.strip()):
                found.append((page, shlex.split(match[1] or "", comments=True)))
    return [pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:120]) for page, words in found]


@pytest.mark.parametrize("words", commands("cdkd-edge"))
def test_a_command_parses(words):
    if len(words) < 2 or words[-1] == "--help":  # a name, in a sentence
        return
    words = [word for word in words if word not in ("--debug", "...")]
    command = COMMANDS[words[0]]
    context = type(command.make_context(words[0], [], resilient_parsing=True))(command)
    values, rest, _ = command.make_parser(context).parse_args(list(words[1:]))
    assert not rest
    for parameter in command.params:
        if parameter.name in values and not re.search("path|file|dir", str(parameter.display_type)):
            parameter.process_value(context, values[parameter.name])


def test_commands_are_found_in_the_documents():
    """So that the test above can fail, and no command is without a word."""
    named = {parameter.values[0][0] for parameter in commands("cdkd-edge") if parameter.values[0]}
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("words", commands("make"))
def test_a_target_exists(words):
    targets = re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [word for word in words if "=" not in word and not word.startswith("-")][0] in targets  # noqa: RUF015


@pytest.mark.parametrize("program", ["python", "pytest"])
def test_named_scripts_and_tests_exist(program):
    found = commands(program)
    assert len(found) > 2
    for (words,) in (parameter.values for parameter in found):
        for word in words:
            if re.match(r"(tests|benchmarks|docs)/", word):
                assert (ROOT / word.split("::")[0]).exists(), words
        if "-k" in words and program == "pytest":
            file = next(ROOT / word for word in words if word.startswith("tests/"))
            assert re.search(words[words.index("-k") + 1].split()[0], file.read_text(encoding="utf-8")), words


def anchors(page):
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = "".join(content for language, content in blocks(page.read_text(encoding="utf-8")) if language is None)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(page):
    for name in re.findall(
        r"`((?:cdkd_edge|tests|benchmarks|docker|docs)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


def test_the_map_of_the_architecture_leads_to_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"(?m)`([a-z_]+/[a-z_/]+\.py)`.*\|$", text)
    assert len(names) > 8
    assert [name for name in names if not (ROOT / "cdkd_edge" / name).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_exit_code_is_explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert codes - {1} <= {int(code) for row in re.findall(r"(?m)^\| ([\d, ]+) \|", text) for code in row.split(",")}


def test_every_dependency_has_its_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=!~; ]", text, maxsplit=1)[0] for text in wanted} - {project["name"]}
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert {name for name in names if not re.search(rf"(^|[ :]){re.escape(name)}[ ,.\n]", text, re.M)} == set()


def test_the_rooms_are_drawn_as_they_are():
    """`python docs/rooms.py` writes them."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    for path, text in rooms.texts().items():
        assert path.suffix == ".svg" or rooms.table() in text
        assert path.read_text(encoding="utf-8") == text, path
    packages = {path.parent.name for path in (ROOT / "cdkd_edge").glob("*/__init__.py")}
    assert packages == set(rooms.ROOMS)


def test_the_tables_of_checkpoints_are_those_of_the_code():
    """`python docs/families.py` writes them."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    for path, text in families.texts().items():
        assert path.read_text(encoding="utf-8") == text, path


@pytest.mark.needs_torch
def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    """In one go, from a checkpoint to a measurement, in a folder with a scene and labelled images."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "cdkd_edge" / "demo" / "tiny.safetensors", "ckpt.safetensors")
    write_raster(Path("scene.tif"), noise(90, 120))
    build_data(Path("data"), {"t1_a": (100, 120)})
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    examples = [content for language, content in blocks(text) if language == "python"]
    assert len(examples) > 8
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples += [content for language, content in blocks(readme) if language == "python"]
    names = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "passes" in printed
    assert names["labels"].shape == (90, 120)  # of the README, which comes last


@pytest.mark.needs_torch
def test_the_notebook_runs_and_its_pictures_are_of_today(tmp_path, monkeypatch, capsys):
    """Cell by cell, as Jupyter does, in an empty folder; what it prints is what is stored, but for last digits."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "docs/quickstart.ipynb", "exec"), names)
            stored = [line for output in cell["outputs"] for line in output.get("text", [])]
            number = r"\d+\.\d+"
            printed, wanted = capsys.readouterr().out, "".join(stored)
            assert re.sub(number, "#", printed) == re.sub(number, "#", wanted)
            assert [*map(float, re.findall(number, printed))] == pytest.approx(
                [*map(float, re.findall(number, wanted))], abs=0.02
            )
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
