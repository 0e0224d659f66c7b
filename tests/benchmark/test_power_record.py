"""``power.json``: its published schema, and records that fit it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from board import make_tree

from cdkd_edge.benchmark.power_record import power_schema, record_of_command, write_record
from cdkd_edge.board.power.window import open_window

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "power-1.json"


@pytest.mark.skipif(not PUBLISHED.parent.exists(), reason="not a checkout: docs/ is not here")
def test_the_published_schema_is_that_of_the_record():
    text = json.dumps(power_schema(), indent=2, ensure_ascii=False) + "\n"
    command = "python -m cdkd_edge.benchmark.power_record > docs/schemas/power-1.json"
    assert text == PUBLISHED.read_text(encoding="utf-8"), command
    assert "None" not in text, "in JSON that is null"


@pytest.mark.parametrize("short", [True, False])
def test_a_record_fits_the_schema(tmp_path, short):
    jsonschema = pytest.importorskip("jsonschema", reason="validating needs jsonschema, of the extra [test]")
    tree = make_tree(tmp_path / "sys")
    with open_window(source="ina3221", interval=0.08, sys_root=tree) as window:
        while not short and window.seconds < 0.3:
            pass
    odd = os.fsdecode(b"./caf\xe9")
    write_record(tmp_path, record_of_command((odd, "-x"), 0, window), window.trace, window.span, window.idle)
    document = json.loads((tmp_path / "power.json").read_text())
    jsonschema.Draft202012Validator(power_schema()).validate(document)
    assert document["command"] == ["./caf\\udce9", "-x"]
    assert (document["rails"]["VDD_IN"]["joules"] is None) == short
