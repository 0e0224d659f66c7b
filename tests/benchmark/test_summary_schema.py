"""The published JSON Schema: that of the record, true of runs, false of what is no run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from run_helpers import make_run

from cdkd_edge.benchmark.folder import read_summary, write_summary
from cdkd_edge.benchmark.record import summary_schema
from cdkd_edge.core.errors import BenchError

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "summary-2.json"


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="validating needs jsonschema, of the extra [test]")
    jsonschema.Draft202012Validator.check_schema(summary_schema())
    return jsonschema.Draft202012Validator(summary_schema())


def document(path: Path, **options: Any) -> Any:
    make_run(path, **options)
    return json.loads((path / "summary.json").read_text())


@pytest.mark.skipif(not PUBLISHED.parent.exists(), reason="not a checkout: docs/ is not here")
def test_the_published_file_is_the_records():
    text = json.dumps(summary_schema(), indent=2, ensure_ascii=False) + "\n"
    assert text == PUBLISHED.read_text(encoding="utf-8"), (
        "python -m cdkd_edge.benchmark.record > docs/schemas/summary-2.json"
    )


def test_fields_carry_their_descriptions():
    schema = summary_schema()
    rail = schema["$defs"]["RailRepeat"]["properties"]
    assert rail["covered"]["description"].startswith("Share of a phase")
    assert rail["idle_watts"]["description"].startswith("Mean of idle_before_watts and")
    assert schema["$defs"]["EngineManifest"]["properties"]["runtime"]["description"].startswith("onnxruntime-cpu")
    text = json.dumps(schema)
    assert "``" not in text
    assert ":attr:" not in text
    assert "None" not in text, "in JSON that is null"
    assert schema["$id"].startswith("urn:")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeats": 3, "spread": 0.02},
        {"power": False, "mode": None},
        {"figures": None, "end_to_end": None, "roofline": None, "roofline_reason": "none"},
    ],
)
def test_runs_are_valid(validator, tmp_path, options):
    validator.validate(document(tmp_path / "run", **options))


def without(*path: str) -> Any:
    def damage(tree: Any) -> None:
        for name in path[:-1]:
            tree = tree[name]
        del tree[path[-1]]

    return damage


def with_value(value: Any, *path: Any) -> Any:
    def damage(tree: Any) -> None:
        for name in path[:-1]:
            tree = tree[name]
        tree[path[-1]] = value

    return damage


DAMAGES = [
    without("verdict"),
    without("summary_version"),
    without("figures", "power", "scope"),
    without("engine", "artefact", "sha256"),
    with_value(3, "summary_version"),
    with_value("2", "summary_version"),
    with_value("fine", "verdict", "status"),
    with_value("2.5", "figures", "tiles_per_second", "mean"),
    with_value(None, "figures", "tiles_per_second", "mean"),
    with_value([1, "a"], "figures", "tiles_per_second", "values"),
    with_value("cooling", "phases", 0, "name"),
    with_value([1.0], "roofline", "expected_tiles_per_second"),
    with_value({"low": 1.0}, "figures", "tiles_per_second", "interval"),
    with_value(1.5, "repeats", 0, "tiles"),
    with_value([], "board"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_and_the_reader_agrees(validator, tmp_path, damage):
    good = document(tmp_path / "run")
    bad = copy.deepcopy(good)
    damage(bad)
    assert not validator.is_valid(bad)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(bad))
    with pytest.raises(BenchError):
        read_summary(tmp_path / "run")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_neither_written_nor_read(tmp_path, number):
    summary = make_run(tmp_path / "run")
    summary.conditions["temperatures"]["tj-thermal"]["mean"] = number
    with pytest.raises(ValueError, match=r"summary\.conditions\.temperatures\.tj-thermal\.mean is"):
        write_summary(tmp_path / "run", summary)
    tree = json.loads((tmp_path / "run" / "summary.json").read_text())
    tree["peak_memory_bytes"] = 0
    tree["figures"]["tiles_per_second"]["mean"] = number
    (tmp_path / "run" / "summary.json").write_text(json.dumps(tree))
    with pytest.raises(BenchError, match="cannot be read"):
        read_summary(tmp_path / "run")


def test_a_number_too_large_is_not_read(tmp_path):
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    path.write_text(path.read_text().replace('"mean": 2.5,', '"mean": 1e999,', 1))
    assert "1e999" in path.read_text()
    with pytest.raises(BenchError, match="cannot be read"):
        read_summary(tmp_path / "run")
