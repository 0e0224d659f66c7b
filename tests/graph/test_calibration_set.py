"""Calibration sets on disk: what was stored is what is read, and nothing else passes for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_helpers import TILE, archive, crop, make
from PIL import Image

from cdkd_edge.core.errors import ManifestError
from cdkd_edge.graph.tiles import CalibrationSet, is_calibration_set, pixels_sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with its scenes beside it. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    make(archive(folder / "scenes"), folder / "set")
    return folder / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit(folder: Path, change: Any) -> None:
    path = folder / "set.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_tiles_are_those_of_the_scenes(made: Path) -> None:
    opened = CalibrationSet.load(made)
    assert (opened.name, opened.tile, len(opened.manifest.tiles)) == ("set", TILE, 10)
    assert (len(opened.tiles()), len(opened.tiles("check"))) == (8, 2)
    for role in ("calibration", "check"):
        records = opened.manifest.of_role(role)
        tiles = list(opened.tiles(role))
        assert len(tiles) == len(records) > 0
        for tile, record in zip(tiles, records, strict=True):
            assert (tile.dtype, tile.shape, tile.flags.c_contiguous) == (np.uint8, (3, TILE, TILE), True)
            assert (tile == crop(record.scene, record)).all()
            assert record.sha256 == pixels_sha256(tile)


def test_the_digest_stands_for_the_whole_set(made: Path, copy: Path) -> None:
    assert CalibrationSet.load(made).sha256 == CalibrationSet.load(copy).sha256
    edit(copy, lambda document: document.update(seed=5))
    assert CalibrationSet.load(made).sha256 != CalibrationSet.load(copy).sha256


def test_tiles_are_read_one_at_a_time(copy: Path) -> None:
    (copy / "calibration" / "0003.png").write_bytes(b"")
    tiles = iter(CalibrationSet.load(copy).tiles())
    for _ in range(3):
        next(tiles)
    with pytest.raises(ManifestError, match=r"0003\.png"):
        next(tiles)


def retouched(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[5, 6, 1] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (retouched, "not the tile that its set describes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path: path.write_bytes(b"no picture"), "cannot be read"),
        (lambda path: Image.open(path).convert("L").save(path), "L, 64 x 64 px"),
        (lambda path: Image.open(path).resize((32, 32)).save(path), "RGB, 32 x 32 px"),
        (lambda path: Image.open(path).save(path, format="JPEG"), "cannot be read"),
    ],
)
def test_a_tampered_tile_is_found(copy: Path, damage: Any, message: str) -> None:
    damage(copy / "calibration" / "0000.png")
    with pytest.raises(ManifestError, match=message):
        list(CalibrationSet.load(copy).tiles())


def test_swapped_tiles_are_found(copy: Path) -> None:
    first, second = copy / "calibration" / "0000.png", copy / "calibration" / "0001.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ManifestError, match="SHA-256"):
        list(CalibrationSet.load(copy).tiles())


def test_a_missing_tile_is_found_at_once(copy: Path) -> None:
    (copy / "check" / "0001.png").unlink()
    with pytest.raises(ManifestError, match=r"lacks 1 of 10 tiles, e\.g\. check/0001\.png"):
        CalibrationSet.load(copy)


def first(document: Any, **change: Any) -> None:
    document["tiles"][0].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(set_version=0), "has version 0; this release reads 1"),
        (lambda document: document.update(set_version=2), "has version 2; this release reads 1"),
        (lambda document: document.pop("set_version"), "has version None"),
        (lambda document: document.update(kind="graph"), "not the manifest of a calibration set"),
        (lambda document: document.pop("tiles"), "damaged"),
        (lambda document: document.update(tiles=[]), "no tile for calibration"),
        (lambda document: document.update(tile=0), "damaged"),
        (lambda document: first(document, file="../../etc/0000.png"), "not the name of a calibration tile"),
        (lambda document: first(document, file="check/0000.png"), "not the name of a calibration tile"),
        (lambda document: first(document, file="calibration/0001.png"), "twice"),
        (lambda document: first(document, role="training"), "damaged"),
        (lambda document: first(document, x="left"), "damaged"),
        (lambda document: first(document, width=32), "32 x 64 px"),
        (lambda document: first(document, scene="elsewhere.tif"), "is not listed"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(copy: Path, change: Any, message: str) -> None:
    edit(copy, change)
    with pytest.raises(ManifestError, match=message):
        CalibrationSet.load(copy)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_document_is_refused(copy: Path, text: bytes) -> None:
    (copy / "set.json").write_bytes(text)
    with pytest.raises(ManifestError):
        CalibrationSet.load(copy)
    assert not is_calibration_set(copy)


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, message in (("nowhere", "does not exist"), (".", r"has no set\.json"), ("file", "is not a folder")):
        with pytest.raises(ManifestError, match=message) as caught:
            CalibrationSet.load(tmp_path / place)
        assert "cdkd-edge calibrate" in str(caught.value.hint)
