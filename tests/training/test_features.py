"""An encoder that remembers says what it would have said, whatever happens to its memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scene_helpers import names_in  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.model.network import Encoder  # noqa: E402
from cdkd_edge.training.features import FeatureCache  # noqa: E402

pytestmark = pytest.mark.needs_torch

PLENTY = 1 << 30


@pytest.fixture
def encoder(make_weights):
    return encoder_of(make_weights(CONFIG))


def encoder_of(weights):
    encoder = Encoder(CONFIG)
    encoder.load_state_dict(
        {
            k.removeprefix("encoder."): torch.from_numpy(np.array(v))
            for k, v in weights.items()
            if k.startswith("encoder.")
        }
    )
    return encoder


@pytest.fixture(scope="module")
def tiles():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8))


def same(one, other):
    return len(one) == len(other) == 4 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_remembered_is_what_was_computed(tmp_path, encoder, tiles):
    first = FeatureCache(encoder, tmp_path, limit=PLENTY)
    computed = first(tiles)
    assert (first.hits, first.misses) == (0, 3)
    again = first(tiles)
    assert (first.hits, first.misses) == (3, 3)
    other_run = FeatureCache(encoder, tmp_path)
    assert same(other_run(tiles.flip(0)), [maps.flip(0) for maps in computed])
    assert (other_run.hits, other_run.misses) == (3, 0)
    assert same(computed, again)
    assert {maps.dtype for maps in computed} == {torch.float32}
    assert [path.stat().st_size for path in files(tmp_path)] == [first.bytes_per_tile] * 3


def test_features_are_those_of_the_encoder(tmp_path, encoder, tiles):
    with torch.no_grad():
        expected = encoder(tiles)
    assert same(FeatureCache(encoder, None)(tiles), expected)
    for maps, exact in zip(FeatureCache(encoder, tmp_path, limit=PLENTY)(tiles), expected, strict=True):
        assert torch.equal(maps, exact.half().float())
        assert not maps.requires_grad


def test_only_what_is_missing_is_computed(tmp_path, encoder, tiles):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    middle = cache(tiles[1:2])
    seen = []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = cache(tiles)
    assert seen == [2]
    assert (cache.hits, cache.misses) == (1, 3)
    assert same([maps[1:2] for maps in found], middle)
    assert same(cache(tiles[[2, 0]]), [maps[[2, 0]] for maps in found])


def test_a_tile_twice_in_a_batch_is_given_twice(tmp_path, encoder, tiles):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    for _ in range(2):
        for maps in cache(tiles[[0, 0, 1]]):
            assert torch.equal(maps[0], maps[1])
            assert not torch.equal(maps[0], maps[2])


def test_one_changed_pixel_is_another_tile(tmp_path, encoder, tiles):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    cache(tiles)
    changed = tiles.clone()
    changed[0, 2, 63, 63] ^= 1
    cache(changed)
    assert (cache.hits, cache.misses) == (2, 4)


def test_views_of_an_array_are_known_by_their_pixels(tmp_path, encoder, tiles):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    cache(tiles.transpose(2, 3))
    cache(tiles.transpose(2, 3).contiguous())
    assert (cache.hits, cache.misses) == (3, 3)


def test_other_weights_and_other_precision_share_nothing(tmp_path, encoder, tiles, make_weights):
    FeatureCache(encoder, tmp_path, limit=PLENTY)(tiles)
    weights = make_weights(CONFIG)
    weights["encoder.blocks.3.mlp.fc2.bias"] = weights["encoder.blocks.3.mlp.fc2.bias"] + np.float32(1e-6)
    for cache in (
        FeatureCache(encoder_of(weights), tmp_path, limit=PLENTY),
        FeatureCache(encoder, tmp_path, precision="bf16", limit=PLENTY),
    ):
        cache(tiles)
        assert (cache.hits, cache.misses) == (0, 3)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_same_weights_in_another_object_share(tmp_path, encoder, tiles, make_weights):
    FeatureCache(encoder, tmp_path, limit=PLENTY)(tiles)
    again = FeatureCache(encoder_of(make_weights(CONFIG)), tmp_path)
    again(tiles)
    assert again.hits == 3


@pytest.mark.parametrize("size", [0, 1, 1000, -1], ids=["empty", "a byte", "half", "a byte short"])
def test_a_file_cut_short_is_computed_and_written_again(tmp_path, encoder, tiles, size):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    expected = cache(tiles)
    for path in files(tmp_path):
        os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    again = FeatureCache(encoder, tmp_path, limit=PLENTY)
    assert same(again(tiles), expected)
    assert again.misses == 3
    assert same(again(tiles), expected)
    assert again.hits == 3


def test_no_more_is_added_than_the_limit(tmp_path, encoder, tiles):
    size = FeatureCache(encoder, None).bytes_per_tile
    assert size == 2 * 4 * 32 * 8 * 8
    cache = FeatureCache(encoder, tmp_path, limit=2 * size + size // 2)
    first = cache(tiles)
    assert len(files(tmp_path)) == 2
    assert same(cache(tiles), first)  # also what is not remembered is rounded the same
    assert (cache.hits, cache.misses) == (2, 4)
    assert len(files(tmp_path)) == 2


def test_a_full_disk_stops_remembering_and_nothing_else(tmp_path, encoder, tiles, monkeypatch):
    expected = FeatureCache(encoder, tmp_path / "elsewhere", limit=PLENTY)(tiles)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "features"
    cache = FeatureCache(encoder, folder, limit=PLENTY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert same(cache(tiles), expected)
    assert files(folder) == []  # no half file either
    assert same(cache(tiles), expected)
    assert files(folder) == []  # and it is not tried again and again


def test_a_disk_too_full_for_a_folder_stops_remembering_too(tmp_path, encoder, tiles, monkeypatch):
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    before = names_in(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    assert len(cache(tiles)) == 4
    assert names_in(tmp_path) == before


def test_values_beyond_float16_are_given_but_not_remembered(tmp_path, tiles, make_weights):
    weights = make_weights(CONFIG)
    weights["encoder.blocks.3.mlp.fc2.bias"] = np.full(32, 1e5, np.float32)
    encoder = encoder_of(weights)
    with torch.no_grad():
        expected = encoder(tiles)
    cache = FeatureCache(encoder, tmp_path, limit=PLENTY)
    for _ in range(2):
        found = cache(tiles)
        assert all(torch.isfinite(maps).all() for maps in found)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert files(tmp_path) == []
    assert (cache.hits, cache.misses) == (0, 6)


def test_without_a_folder_nothing_is_remembered(tmp_path, encoder, tiles, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache(encoder, None, limit=PLENTY)
    assert same(cache(tiles), cache(tiles))
    assert (cache.hits, cache.misses) == (0, 6)
    assert names_in(tmp_path) == []


def test_the_encoder_is_frozen(tmp_path, encoder):
    encoder.train()
    FeatureCache(encoder, tmp_path)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
