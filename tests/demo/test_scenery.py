"""Drawn scenes: repeatable, of any size, labelled exactly, without torch."""

from __future__ import annotations

import numpy as np
import pytest
from ground import value_noise
from scenery import draw_scene

from cdkd_edge.core.labels import load_schema


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 7), (5, 1), (33, 17), (255, 129), (256, 256), (700, 90)])
def test_any_size(width: int, height: int) -> None:
    scene = draw_scene(width, height, seed=3)
    assert scene.image.shape == (height, width, 3)
    assert scene.labels.shape == (height, width)
    assert scene.image.dtype == scene.labels.dtype == np.uint8
    assert scene.labels.max() < len(load_schema("dubai"))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_scene_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        draw_scene(*size)


def test_the_same_seed_draws_the_same_scene_and_another_seed_another() -> None:
    first, again, other = draw_scene(300, 200, seed=5), draw_scene(300, 200, seed=5), draw_scene(300, 200, seed=6)
    assert (first.image == again.image).all()
    assert (first.labels == again.labels).all()
    assert (first.image != other.image).any()
    assert (first.labels != other.labels).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_scene_shows_every_class_in_its_colors(seed: int) -> None:
    scene = draw_scene(1024, 1024, seed=seed)
    share = np.bincount(scene.labels.ravel(), minlength=5) / scene.labels.size
    assert share.size == 5
    assert share.min() > 0.003
    building, land, road, vegetation, water = (scene.image[scene.labels == label].mean(axis=0) for label in range(5))
    assert vegetation[1] > vegetation[0]
    assert vegetation[1] > vegetation[2]
    assert land.mean() > road.mean() > water.mean()
    assert building.std() < 40
    assert 60 < building.mean() < 235


def test_small_changes_of_seed_leave_no_class_without_texture() -> None:
    scene = draw_scene(512, 512, seed=1)
    for label in range(5):
        pixels = scene.image[scene.labels == label]
        assert not len(pixels) or pixels.std(axis=0).min() > 2


def test_noise_has_the_strength_and_smoothness_it_promises() -> None:
    rng = np.random.default_rng(0)
    smooth, rough = value_noise(rng, 300, 400, 64, 64), value_noise(rng, 300, 400, 64, 2, 0.9)
    assert smooth.shape == rough.shape == (300, 400)
    assert 0.6 < smooth.std() < 1.5
    assert 0.6 < rough.std() < 1.5
    assert np.abs(np.diff(smooth)).mean() < 0.3 * np.abs(np.diff(rough)).mean()
