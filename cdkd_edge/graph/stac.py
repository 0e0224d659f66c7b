"""The STAC item of an exported network, and the fields that every STAC item of this package shares.

STAC 1.1 (https://github.com/radiantearth/stac-spec/blob/v1.1.0/item-spec/item-spec.md) with the Machine Learning Model
extension 1.5.2 (https://github.com/stac-extensions/mlm) and the file, classification and processing extensions that it
recommends. The item has no geometry, because nobody says where the network was trained; its datetime is that of export.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cdkd_edge import __version__
from cdkd_edge.core.files import require_own, write_text
from cdkd_edge.core.manifest import FileRecord, GraphManifest, manifest_path
from cdkd_edge.graph.outputs import QgisGraph

STAC_VERSION = "1.1.0"
MULTIHASH_SHA256 = "1220"  # function code and length of a SHA-256 digest (https://github.com/multiformats/multihash)

_ONNX = "application/octet-stream; framework=onnx"
_GENERATOR = "cdkd-edge"
_COLORS = ["red", "green", "blue"]
_BANDS = [{"name": color, "description": f"{color}, 8 bits"} for color in _COLORS]


def extension(name: str) -> str:
    """The schema of a STAC extension, e.g. ``file/v2.1.0``."""
    return f"https://stac-extensions.github.io/{name}/schema.json"


MLM, FILE = extension("mlm/v1.5.2"), extension("file/v2.1.0")
CLASSIFICATION, PROCESSING = extension("classification/v2.0.0"), extension("processing/v1.1.0")


def href(relative: str) -> str:
    """A link to a file, relative to the item's folder."""
    quoted = quote(relative)
    return quoted if quoted.startswith("../") else f"./{quoted}"


def file_fields(file: FileRecord) -> dict[str, Any]:
    """Size and checksum (a multihash), as the file extension writes them."""
    return {"file:size": file.bytes, "file:checksum": MULTIHASH_SHA256 + file.sha256}


def utc_text(moment: datetime) -> str:
    """A moment as RFC 3339 with ``Z``; UTC if it has no offset."""
    moment = moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def class_names(names: Sequence[str]) -> list[str]:
    """Names of classes for programs, each once: letters, digits, ``-`` and ``_``."""
    found: list[str] = []
    for label, name in enumerate(names):
        short = re.sub(r"[^A-Za-z0-9]+", "-", _ascii(name)).strip("-").lower()
        found.append(short if short and short not in found else f"{short or 'class'}-{label}")
    return found


def stac_path(graph: Path) -> Path:
    """The path of a graph's item: ``ckpt.onnx`` has ``ckpt.stac.json`` beside it."""
    return graph.with_name(f"{graph.stem}.stac.json")


def stac_item(
    graph: GraphManifest,
    parameters: int,
    half: GraphManifest | None = None,
    qgis: QgisGraph | None = None,
    gsd: float | None = None,
) -> dict[str, Any]:
    """The item of an exported FP32 graph and the files beside it; ``gsd`` is metres per pixel of training imagery."""
    name = model_name(graph.name)
    schema = graph.schema
    shorts = class_names(schema.class_names)
    created = utc_text(datetime.fromisoformat(graph.created))
    properties: dict[str, Any] = {
        "title": f"Land-cover segmentation: {graph.name}",
        "description": f"ViT encoder with a UPerNet head, {len(schema)} classes ({', '.join(schema.class_names)}). "
        "Normalisation, up-sampling and argmax are inside the graph.",
        "datetime": created,
        "created": created,
        "processing:software": {_GENERATOR: __version__},
        "bands": _BANDS,
        "mlm:name": name,
        "mlm:architecture": "Vision Transformer, UPerNet",
        "mlm:tasks": ["semantic-segmentation"],
        "mlm:framework": "PyTorch",
        "mlm:total_parameters": parameters,
        "mlm:batch_size_suggestion": graph.batch,
        "mlm:input": [
            {
                "name": "image",
                "description": "RGB tiles, 8 bits, as they are: normalisation is the graph's first step.",
                "bands": _COLORS,
                "input": _array([graph.batch, 3, graph.tile, graph.tile], "batch", "bands", "height", "width"),
                "value_scaling": None,
                "resize_type": None,
                "pre_processing_function": None,
            }
        ],
        "mlm:output": [
            {
                "name": "labels",
                "tasks": ["semantic-segmentation"],
                "result": _array([graph.batch, graph.tile, graph.tile], "batch", "height", "width"),
                "classification:classes": [
                    {
                        "value": label,
                        "name": short,
                        "description": cls.name,  # stac-model, the extension's own package, refuses a title
                        "color_hint": "".join(f"{part:02X}" for part in cls.shown),
                    }
                    for label, (short, cls) in enumerate(zip(shorts, schema.classes, strict=True))
                ],
                "post_processing_function": None,
            }
        ],
        "mlm:hyperparameters": dict(graph.network),
    }
    if gsd is not None:
        properties["gsd"] = gsd
    manifest = manifest_path(Path(graph.artefact.file)).name
    assets = {
        "model": _model("ONNX graph in FP32", graph),
        "manifest": _asset(manifest, "application/json", "Manifest of the graph", "metadata"),
    }
    if half is not None:
        assets["model-fp16"] = {**_model("ONNX graph in FP16, for TensorRT", half), "mlm:accelerator": "cuda"}
    if qgis is not None:
        # It takes and gives floats, so it is not what mlm:input and mlm:output describe.
        asset = _asset(qgis.artefact.file, _ONNX, "ONNX graph for the QGIS plugin Deepness", "data")
        assets["qgis"] = asset | file_fields(qgis.artefact)
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [MLM, FILE, CLASSIFICATION, PROCESSING],
        "id": re.sub(r"\s+", "-", name),
        "geometry": None,
        "properties": properties,
        "links": [],
        "assets": assets,
    }


def write_stac(item: dict[str, Any], destination: Path) -> None:
    """Write an item in place of nothing or an earlier one (:func:`require_own_stac`)."""
    require_own_stac(destination)
    write_text(destination, json.dumps(item, indent=2, ensure_ascii=False) + "\n")


def require_own_stac(path: Path) -> None:
    """Make sure that an item replaces nothing but an earlier one; ManifestError if it would."""

    def is_own(path: Path) -> bool:
        return _GENERATOR in json.loads(path.read_text(encoding="utf-8"))["properties"]["processing:software"]

    require_own(path, is_own)


def model_name(name: str) -> str:
    """A name that the extension allows: letters, digits, blanks, ``._-``; a letter first, a letter or digit last."""
    allowed = re.sub(r"[^A-Za-z0-9_. -]+", "-", _ascii(name)).strip("-._ ")
    if not allowed or not allowed[0].isalpha():
        allowed = f"model-{allowed}".strip("-")
    return allowed if len(allowed) > 2 else f"{allowed}-model"


def _ascii(text: str) -> str:
    """Letters without their accents; others stay."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _array(shape: list[int], *order: str) -> dict[str, Any]:
    return {"shape": shape, "dim_order": list(order), "data_type": "uint8"}


def _asset(file: str, media: str, title: str, *roles: str, **more: Any) -> dict[str, Any]:
    return {"href": href(file), "type": media, "title": title, **more, "roles": list(roles)}


def _model(title: str, graph: GraphManifest) -> dict[str, Any]:
    text = f"opset {graph.opset}; runs in ONNX Runtime, and is what `cdkd-edge build` makes engines from"
    roles = ("mlm:model", "mlm:weights", "data")
    return {
        **_asset(graph.artefact.file, _ONNX, title, *roles, description=text),
        "bands": _BANDS,  # MLM wants them in the properties, where STAC allows them only if an asset has them
        "mlm:artifact_type": "onnx",
        "mlm:framework": "ONNX",
        **file_fields(graph.artefact),
    }
