"""The linear probe: what it scores depends on the encoder's features and on the labelled pixels alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_helpers import COLORS, CONFIG, SCHEMA, blocks, painted, write_pair  # noqa: E402

from cdkd_edge.core.labels import NO_LABEL  # noqa: E402
from cdkd_edge.distillation import probe as module  # noqa: E402
from cdkd_edge.distillation.probe import LinearProbe  # noqa: E402
from cdkd_edge.model.network import Encoder  # noqa: E402
from cdkd_edge.quality.datasets import find_dataset, split_dataset  # noqa: E402
from cdkd_edge.segmentation.options import SegmentOptions  # noqa: E402

pytestmark = [pytest.mark.needs_torch, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

CPU = torch.device("cpu")


class Colours:
    """An encoder whose features are the mean colours of the patches."""

    config = CONFIG

    def __init__(self, factor=1.0):
        self.factor, self.calls = factor, 0

    def __call__(self, image):
        self.calls += 1
        maps = torch.nn.functional.avg_pool2d(image.float(), CONFIG.patch)
        return [self.factor * maps / 100 + index for index in range(4)]


def probe_of(folder, validation=("b",)):
    return LinearProbe(
        split_dataset(find_dataset(folder), validation_scenes=validation), SCHEMA, CONFIG.tile, SegmentOptions()
    )


def score(probe, encoder):
    return probe.score(encoder, CPU, "fp32")


def one_class(label):
    return np.full((64, 64), label, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiles of class 0, 1, 2, 3, 4 and 2 again to learn on; the same to be scored on, and one more of class 4."""
    folder = tmp_path_factory.mktemp("data")
    for index, label in enumerate([0, 1, 2, 3, 4, 2]):
        for scene in "ab":
            write_pair(folder, f"{scene}_{index}", one_class(label))
    write_pair(folder, "b_6", one_class(4))
    return folder


def test_features_that_tell_the_classes_score_one(folder):
    found = score(probe_of(folder), Colours())
    assert found["mean_iou"] == 1
    assert set(found["iou"].values()) == {1}


def test_constant_features_score_the_most_frequent_class(folder):
    """That of the tiles to learn on, by its share in those to score."""
    found = score(probe_of(folder), Colours(factor=0))
    assert [found["iou"][name] for name in SCHEMA.class_names] == pytest.approx([0, 0, 2 / 7, 0, 0])
    assert found["mean_iou"] == pytest.approx(2 / 7 / 5)


def test_edges_within_a_tile_are_found(tmp_path):
    for seed, name in enumerate(["a_0", "a_1", "b_0"]):
        write_pair(tmp_path, name, blocks(128, 128, seed))
    found = score(probe_of(tmp_path), Colours())
    assert 0.8 < found["mean_iou"] < 1  # between two patches, by what is drawn between their logits


def test_only_pixels_with_labels_count(tmp_path):
    """Half of each tile has the colours of other classes, and no label."""
    for index, label in enumerate([0, 1, 2, 3, 4, 2]):
        for scene in "ab":
            shown, labels = one_class(label), one_class(label)
            shown[36:] = (label + 1) % 5  # through the middle of a row of patches
            labels[36:] = NO_LABEL
            labels[32:36] = NO_LABEL if scene == "b" else label  # where colours mix
            write_pair(tmp_path, f"{scene}_{index}", labels, painted(shown))
    assert score(probe_of(tmp_path), Colours())["mean_iou"] == pytest.approx(1, abs=0.03)
    assert score(probe_of(tmp_path), Colours(0))["mean_iou"] == pytest.approx(2 / 6 / 5)


def test_a_single_labelled_patch_is_enough(tmp_path):
    labels = one_class(NO_LABEL)
    labels[:4, :4] = 3
    write_pair(tmp_path, "a_0", labels)
    write_pair(tmp_path, "b_0", one_class(3))
    assert score(probe_of(tmp_path), Colours())["mean_iou"] == 1


def test_the_score_depends_on_the_encoder_alone(tmp_path):
    for seed, name in enumerate(["a_0", "b_0"]):
        write_pair(tmp_path, name, blocks(128, 128, seed))
    torch.manual_seed(0)
    encoder, probe = Encoder(CONFIG), probe_of(tmp_path)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first = score(probe, encoder)
    torch.manual_seed(5)
    assert score(probe, encoder) == first == score(probe_of(tmp_path), encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_layer_is_the_one_that_another_library_finds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    features = rng.standard_normal((200, 4)) + COLORS[labels, :1] / 200
    shares = np.eye(3)[labels]
    layer = module._trained_layer(torch.from_numpy(features).float(), torch.from_numpy(shares).float())
    # There, half of the squared weights is added to C times the sum of the losses.
    other = linear_model.LogisticRegression(C=1 / (2 * module._DECAY * 200), tol=1e-8, max_iter=1000)
    expected = other.fit(features, labels).predict_proba(features)
    with torch.no_grad():
        found = layer(torch.from_numpy(features).float()).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_tiles_are_a_few_spread_over_all(folder, monkeypatch):
    monkeypatch.setattr(module, "TILES", 4)
    encoder, probe = Colours(), probe_of(folder)
    score(probe, encoder)
    assert encoder.calls == 8  # of thirteen
    seen = [int(labels[0, 0]) for _, labels in module._seen(probe._training, encoder, CPU, "fp32")]
    assert seen == [0, 2, 3, 2]


def test_few_patches_of_each_tile_are_enough(folder, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", 18)
    probe = probe_of(folder)
    features, shares = probe._training_cells(Colours(), CPU, "fp32")
    assert (features.shape, shares.shape) == ((18, 12), (18, 5))
    assert shares.sum(0).tolist() == [3, 3, 6, 3, 3]
    assert score(probe, Colours())["mean_iou"] == 1
