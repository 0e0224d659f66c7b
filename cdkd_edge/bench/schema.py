"""The JSON Schema of ``summary.json``, made from :mod:`cdkd_edge.bench.record`.

``python -m cdkd_edge.bench.schema > docs/schemas/summary-2.json`` writes the published file.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

from cdkd_edge.bench import record, statistics
from cdkd_edge.core import machine, manifest

DIALECT = "https://json-schema.org/draft/2020-12/schema"
IDENTIFIER = f"urn:cdkd-edge:summary-{record.SUMMARY_VERSION}"

_MODULES: tuple[ModuleType, ...] = (record, statistics, manifest, machine)
"""Where the classes of a record are written down."""


def summary_schema() -> dict[str, Any]:
    """The schema: draft 2020-12, with the docstrings of classes and fields as descriptions."""
    import msgspec

    (root,), definitions = msgspec.json.schema_components([record.BenchSummary], ref_template="#/$defs/{name}")
    descriptions = _field_descriptions()
    for name, definition in definitions.items():
        properties = definition["properties"]
        definition["description"] = _plain(definition["description"])
        for field, text in descriptions[name].items():
            properties[field]["description"] = text  # beside a reference as well, which 2020-12 allows
        for field in properties.values():
            field.pop("default", None)  # what is written has every field; a default would only name this release
    summary = definitions[record.BenchSummary.__name__]
    summary["required"].append("summary_version")
    return {
        "$schema": DIALECT,
        "$id": IDENTIFIER,
        "title": "Benchmark run of cdkd-edge",
        **root,
        "$defs": definitions,
    }


def _field_descriptions() -> dict[str, dict[str, str]]:
    """Per class the text below each field that has one. Python keeps no docstrings of fields; the source has them."""
    found: dict[str, dict[str, str]] = {}
    for module in _MODULES:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef) and is_dataclass(getattr(module, node.name)):
                found[node.name] = dict(_documented(node))
    return found


def _documented(node: ast.ClassDef) -> list[tuple[str, str]]:
    pairs = []
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            pairs.append((field.target.id, _plain(below.value.value)))
    return pairs


def _plain(text: str) -> str:
    """A docstring without its markup and line ends, in the words of JSON."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", inspect.cleandoc(text)).replace("``", "")
    return " ".join(re.sub(r"\bNone\b", "null", text).split())


def main() -> None:
    """Print the schema."""
    import json

    sys.stdout.write(json.dumps(summary_schema(), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
