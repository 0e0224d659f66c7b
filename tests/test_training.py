"""Training: crops fit their labels, no scene leaks, a run is repeatable and learns, its file is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from PIL import Image

from cdkd_edge.errors import SceneError, SchemaError
from cdkd_edge.labels import load_schema
from cdkd_edge.model.checkpoint import load_checkpoint
from cdkd_edge.model.config import NetworkConfig
from cdkd_edge.training import judge, tiny
from cdkd_edge.training.crops import CropSampler, LabelledImage, drawn_pairs, read_pairs, scene_of, scenes_in

DUBAI = load_schema("dubai")
SMALL = NetworkConfig(
    tile=64, patch=8, embed_dim=32, depth=4, heads=2, mlp_dim=64, classes=5, head_channels=16, pool_scales=(1, 2)
)
RECIPE = tiny.Recipe(steps=30, batch=4, learning_rate=3e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four scenes of two parts, 96 x 80 px; a class is told by its colour. Some masks have a palette."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    tones = np.array([(220, 60, 60), (200, 190, 170), (90, 90, 95), (60, 140, 60), (20, 40, 90)])
    for scene in (1, 2, 4, 5):
        for part in (1, 2):
            labels = np.kron(rng.integers(0, 5, (5, 6)), np.ones((16, 16), int))
            image = np.clip(tones[labels] + rng.normal(0, 8, (80, 96, 3)), 0, 255).astype(np.uint8)
            mask = Image.fromarray(DUBAI.palette()[labels])
            name = f"tile{scene}_00{part}"
            Image.fromarray(image).save(tmp_path / "images" / f"{name}.jpg", quality=95)
            (mask.quantize(5) if part == 2 else mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def weights() -> torch.Tensor:
    return torch.ones(SMALL.classes)


def test_pairs_are_read_by_whole_scenes(folder: Path) -> None:
    assert scenes_in(folder) == ("tile1", "tile2", "tile4", "tile5")
    pairs = read_pairs(folder, DUBAI, {"tile2", "tile5"})
    assert [p.name for p in pairs] == ["tile2_001.jpg", "tile2_002.jpg", "tile5_001.jpg", "tile5_002.jpg"]
    assert {p.scene for p in pairs} == {"tile2", "tile5"}
    assert all(p.image.shape == (80, 96, 3) and p.labels.shape == (80, 96) for p in pairs)
    assert all(p.labels.max() <= 4 for p in pairs)
    assert scene_of("tile5_003.jpg") == "tile5" != scene_of("tile50_003.jpg")


def test_bad_folders_are_named(folder: Path) -> None:
    with pytest.raises(SceneError, match="images/"):
        read_pairs(folder / "masks", DUBAI)
    with pytest.raises(SceneError, match="tile9"):
        read_pairs(folder, DUBAI, {"tile9"})
    with pytest.raises(SchemaError, match="tile1_001"):
        read_pairs(folder, load_schema("loveda"))
    mask = folder / "masks" / "tile1_001.png"
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(SceneError, match="cannot be read"):
        read_pairs(folder, DUBAI)
    Image.new("RGB", (9, 9)).save(mask)
    with pytest.raises(SceneError, match="its mask is not"):
        read_pairs(folder, DUBAI)
    mask.unlink()
    with pytest.raises(SceneError, match="no mask"):
        read_pairs(folder, DUBAI)


def test_crops_keep_image_and_labels_together() -> None:
    # Label = column // 16 and red = 50 * label, so a crop that were turned without its mask would show.
    labels = np.broadcast_to(np.arange(80, dtype=np.uint8) // 16, (48, 80)).copy()
    image = np.stack([labels * 50, labels * 0, labels * 0], axis=-1).astype(np.uint8)
    sampler = CropSampler([(1.0, [LabelledImage("a_1", image, labels)])], tile=32, seed=0)
    images, truth = sampler.batch(40)
    assert images.shape == (40, 3, 32, 32)
    assert truth.shape == (40, 32, 32)
    assert images.dtype == truth.dtype == np.uint8
    for picture, labelled in zip(images[:, 0].astype(float), truth, strict=True):
        present = np.unique(labelled)
        levels = [np.median(picture[labelled == label]) for label in present]
        assert levels == sorted(levels)
        assert len(set(levels)) == len(levels)
    assert {0, 1, 2, 3, 4} == set(np.unique(truth).tolist())


def test_small_images_are_enlarged_and_shares_are_kept() -> None:
    dark, bright = (
        LabelledImage(f"{name}_1", np.full((20, 12, 3), tone, np.uint8), np.full((20, 12), label, np.uint8))
        for name, tone, label in (("dark", 30, 0), ("bright", 200, 1))
    )
    _, truth = CropSampler([(3.0, [dark]), (1.0, [bright])], tile=16, seed=1).batch(400)
    assert 0.68 < (truth[:, 0, 0] == 0).mean() < 0.82
    with pytest.raises(ValueError, match="sampler"):
        CropSampler([(1.0, [])], tile=16, seed=1)


def test_a_few_steps_reduce_the_loss(folder: Path) -> None:
    sampler = CropSampler([(1.0, read_pairs(folder, DUBAI))], SMALL.tile, seed=0)
    training = tiny.Training(SMALL, sampler, weights(), RECIPE)
    losses = [training.step() for _ in range(RECIPE.steps)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_two_runs_with_one_seed_agree_and_with_another_differ(folder: Path) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        recipe = tiny.Recipe(steps=4, batch=2, seed=seed)
        sampler = CropSampler([(1.0, read_pairs(folder, DUBAI))], SMALL.tile, seed=seed)
        training = tiny.Training(SMALL, sampler, weights(), recipe)
        for _ in range(recipe.steps):
            training.step()
        return training.mean.state_dict()

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_learning_rate_rises_and_falls() -> None:
    blank = LabelledImage("b", np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))
    training = tiny.Training(SMALL, CropSampler([(1.0, [blank])], 64, 0), weights(), tiny.Recipe(steps=1000))
    rates = []
    for training.done in range(1000):
        rates.append(training._learning_rate())
    assert max(rates) == training.recipe.learning_rate == rates[99]
    assert rates[0] < rates[50] < rates[99] > rates[500] > rates[999] > 0
    assert rates[999] < 0.02 * max(rates)


def test_rare_classes_weigh_more() -> None:
    labels = np.zeros((10, 10), np.uint8)
    labels[0, 0], labels[1] = 1, 255
    result = tiny.class_weights([LabelledImage("a", np.zeros((10, 10, 3), np.uint8), labels)], 3, rarity=0.5)
    assert result[1] > result[0]
    assert torch.isfinite(result).all()
    assert float(result.mean()) == pytest.approx(1.0)


def test_trains_without_the_held_out_scene_and_judges_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: set[str] = set()

    class Spy(CropSampler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            seen.update(item.name for item in self._images)

    monkeypatch.setattr(tiny, "CropSampler", Spy)
    monkeypatch.setattr(tiny, "PRESETS", {"tiny": SMALL})
    monkeypatch.setattr(tiny, "DRAWN_SIDE", 128)
    monkeypatch.setattr(tiny, "DRAWN_TRAINING_SEEDS", range(1000, 1002))
    monkeypatch.setattr(tiny, "DRAWN_HELD_OUT_SEEDS", range(100, 101))
    output = tmp_path / "out" / "small.pt"
    arguments = ["--data", str(folder), "--precision", "fp32"]
    assert tiny.main([*arguments, "--output", str(output), "--steps", "3", "--stop-at", "2"]) == 0
    assert seen == {f"tile{s}_00{p}.jpg" for s in (1, 2, 4) for p in (1, 2)} | {"drawn1000", "drawn1001"}
    network, report = load_checkpoint(output)
    assert network.config == SMALL
    assert report.schema == DUBAI
    assert report.training["held_out_scene"] == "tile5"
    assert report.training["recipe"]["steps"] == 3
    assert report.training["stopped_at"] == 2
    assert str(folder) not in str(report.training)
    timed = tmp_path / "timed.pt"
    assert tiny.main([*arguments, "--output", str(timed), "--minutes", "0.005"]) == 0
    assert load_checkpoint(timed)[1].training["recipe"]["steps"] >= 1
    capsys.readouterr()
    assert tiny.main([*arguments, "--evaluate", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| tiny |") == printed.count("| colour histogram |") == 2
    assert tiny.main(["--data", str(tmp_path / "nowhere"), "--output", str(output)]) != 0


def test_held_out_seeds_are_never_trained_on() -> None:
    assert not set(tiny.DRAWN_TRAINING_SEEDS) & set(tiny.DRAWN_HELD_OUT_SEEDS)
    assert min(tiny.DRAWN_TRAINING_SEEDS) >= 1000


def test_whole_images_are_judged_pixel_by_pixel() -> None:
    network = tiny.SegmentationNetwork(SMALL).eval()
    for height, width in ((64, 64), (70, 130), (10, 7)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        labels = judge.segment_image(network, image)
        assert labels.shape == (height, width)
        assert labels.dtype == np.uint8
    whole = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    tile = torch.from_numpy(whole[64:, :64].transpose(2, 0, 1)[None].copy())
    assert (judge.segment_image(network, whole)[64:, :64] == network.segment(tile)[0].numpy()).all()


def test_colour_alone_solves_a_case_where_colour_is_all(folder: Path) -> None:
    training, held_out = read_pairs(folder, DUBAI, {"tile1"}), read_pairs(folder, DUBAI, {"tile5"})
    scores = judge.judge_colors(training, held_out, 5)
    assert min(matrix.overall_accuracy for matrix in scores.values()) > 0.95


def test_drawn_pairs_are_labelled() -> None:
    pairs = drawn_pairs([7], 64)
    assert pairs[0].image.shape == (64, 64, 3)
    assert pairs[0].labels.shape == (64, 64)
