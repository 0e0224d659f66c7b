"""The training loop learns, repeats itself exactly, and goes on from where it was as if nothing had happened."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_helpers import CONFIG, SCHEMA, write_dataset  # noqa: E402

from cdkd_edge.core.errors import NumericalCheckError, UsageError  # noqa: E402
from cdkd_edge.core.labels import NO_LABEL  # noqa: E402
from cdkd_edge.core.manifest import FileRecord  # noqa: E402
from cdkd_edge.model.network import SegmentationNetwork  # noqa: E402
from cdkd_edge.quality.datasets import find_dataset  # noqa: E402
from cdkd_edge.quality.evaluate import evaluate  # noqa: E402
from cdkd_edge.quality.network import NetworkLabeller  # noqa: E402
from cdkd_edge.training.features import FeatureCache  # noqa: E402
from cdkd_edge.training.recipe import Recipe, class_weights  # noqa: E402
from cdkd_edge.training.trainer import Trainer  # noqa: E402
from cdkd_edge.training.views import ORIENTATIONS, Augmentation, TrainingTiles, View  # noqa: E402

pytestmark = [
    pytest.mark.needs_torch,
    pytest.mark.filterwarnings("error::UserWarning"),  # it would be a line on a user's screen
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
]

QUICK = Recipe(epochs=2, batch=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Seven places: two full batches of three and a last one of one."""
    return find_dataset(write_dataset(tmp_path_factory.mktemp("data"), {"a_0": (128, 192), "a_1": (50, 60)}))


@pytest.fixture
def tiles(dataset):
    return TrainingTiles(dataset, SCHEMA, CONFIG.tile)


@pytest.fixture
def make_network(make_weights):
    def make():
        network = SegmentationNetwork(CONFIG)
        arrays = {key: torch.from_numpy(np.array(value)) for key, value in make_weights(CONFIG).items()}
        network.load_state_dict(arrays, strict=False)
        return network

    return make


def copied(module):
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def changed(module, before):
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


def trained(network, tiles, recipe, **options):
    """Weights as they would be used after a whole run, and the losses of its epochs."""
    trainer = Trainer(network, tiles, recipe, **options)
    losses = [trainer.run_epoch() for _ in range(recipe.epochs)]
    return copied(trainer.trained_network()), losses


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- learning -------------------------------------------------------------------------------------


def test_classes_that_a_color_tells_are_learned(make_network, tiles, dataset):
    trainer = Trainer(make_network(), tiles, dataclasses.replace(QUICK, epochs=16, schedule="cosine"))
    losses = [trainer.run_epoch() for _ in range(16)]
    assert losses[-1] < 0.5 * losses[0]
    labeller = NetworkLabeller(trainer.trained_network(), SCHEMA, FileRecord("", "", 0))
    assert evaluate(labeller, dataset, SCHEMA).matrix.mean_iou > 0.7
    assert trainer.progress.step == trainer.steps == 48
    assert trainer.progress.epoch == 16
    assert trainer.progress.seconds > 0


def test_a_frozen_encoder_stays_as_it_is_and_the_head_does_not(make_network, tiles):
    network = make_network()
    encoder, head = copied(network.encoder), copied(network.head)
    trained(network, tiles, QUICK)
    assert changed(network.encoder, encoder) == set()
    assert changed(network.head, head) == set(head)  # statistics and counters of batch norm included
    assert not any(parameter.requires_grad for parameter in network.encoder.parameters())


def test_an_encoder_with_a_learning_rate_changes(make_network, tiles):
    network = make_network()
    encoder, head = copied(network.encoder), copied(network.head)
    trained(network, tiles, dataclasses.replace(QUICK, encoder_learning_rate=1e-3))
    assert changed(network.encoder, encoder) == set(encoder)
    assert changed(network.head, head) == set(head)


def test_both_learning_rates_are_heeded(make_network, tiles):
    def moved(recipe, part):
        network = make_network()
        before = copied(getattr(network, part))
        trained(network, tiles, dataclasses.replace(recipe, epochs=1, batch=8))
        after = getattr(network, part).state_dict()
        return max(float((after[key] - before[key]).abs().max()) for key in after if key.endswith(".weight"))

    # AdamW's first step is the learning rate, whatever the gradient.
    recipe = dataclasses.replace(QUICK, learning_rate=1e-3, encoder_learning_rate=1e-5, weight_decay=0)
    assert moved(recipe, "head") == pytest.approx(1e-3, rel=0.01)
    assert moved(recipe, "encoder") == pytest.approx(1e-5, rel=0.1)  # rounding of weights near 1


def test_remembered_features_train_the_same_head(make_network, tiles, tmp_path):
    recipe = dataclasses.replace(QUICK, views=1)
    network, other = make_network(), make_network()
    cache = FeatureCache(network.encoder, tmp_path, limit=1 << 30)
    remembered, _ = trained(network, tiles, recipe, encode=cache)
    assert cache.misses == 8  # seven places; the lonely one is seen twice
    rounded = FeatureCache(other.encoder, tmp_path / "other", limit=1 << 30)
    again, _ = trained(other, tiles, recipe, encode=rounded)
    assert identical(remembered, again)


@pytest.mark.parametrize("encoder_rate", [0.0, 1e-3], ids=["frozen", "unfrozen"])
def test_bfloat16_trains_on_a_cpu(make_network, tiles, encoder_rate):
    recipe = dataclasses.replace(QUICK, precision="bf16", encoder_learning_rate=encoder_rate)
    weights, losses = trained(make_network(), tiles, recipe)
    assert losses[1] < losses[0]
    assert {value.dtype for key, value in weights.items() if "num_batches" not in key} == {torch.float32}


def test_a_limit_on_the_gradient_is_heeded(make_network, tiles, monkeypatch):
    norms = []
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        real(parameters, limit)
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    trained(make_network(), tiles, dataclasses.replace(QUICK, epochs=1, clip_norm=0.01))
    assert len(norms) == 3
    assert max(norms) <= 0.01 * 1.001


# --- repeatability --------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [8, 0], ids=["fixed views", "fresh views"])
def test_a_seed_repeats_a_run_and_another_does_not(make_network, tiles, views):
    recipe = dataclasses.replace(QUICK, views=views)
    first, losses = trained(make_network(), tiles, recipe)
    again, losses_again = trained(make_network(), tiles, recipe)
    other, _ = trained(make_network(), tiles, dataclasses.replace(recipe, seed=1))
    assert identical(first, again)
    assert losses == losses_again
    assert not identical(first, other)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"encoder_learning_rate": 1e-4},
        {"mean_decay": 0.9},
        {"mean_decay": 0.9, "encoder_learning_rate": 1e-4},
        {"views": 0, "schedule": "poly", "warm_up": 3, "clip_norm": 1.0, "class_weights": "sqrt"},
    ],
    ids=["frozen", "unfrozen", "mean", "unfrozen mean", "the rest"],
)
@pytest.mark.parametrize("cut", [1, 2, 3, 5], ids="after batch {}".format)
def test_a_run_that_was_cut_off_ends_as_it_would_have(make_network, tiles, extra, cut):
    """Also where it was cut after the last batch of an epoch, before the epoch was over."""
    recipe = dataclasses.replace(QUICK, **extra)
    stored = io.BytesIO()
    whole = Trainer(make_network(), tiles, recipe)

    def store():
        if whole.progress.step == cut:
            torch.save(whole.state(), stored)

    losses = [whole.run_epoch(store) for _ in range(2)]
    stored.seek(0)
    resumed = Trainer(make_network(), tiles, recipe)
    resumed.restore(torch.load(stored, weights_only=True))
    assert resumed.progress.step == cut
    again = []
    while resumed.progress.epoch < 2:
        again.append(resumed.run_epoch())
    assert again == losses[-len(again) :]
    assert identical(copied(whole.trained_network()), copied(resumed.trained_network()))
    assert resumed.progress.step == resumed.steps


def test_using_the_network_between_epochs_does_not_disturb_training(make_network, tiles, dataset):
    for extra in ({}, {"encoder_learning_rate": 1e-4}, {"mean_decay": 0.9}):
        recipe = dataclasses.replace(QUICK, **extra)
        expected, _ = trained(make_network(), tiles, recipe)
        trainer = Trainer(make_network(), tiles, recipe)
        for _ in range(2):
            trainer.run_epoch()
            evaluate(NetworkLabeller(trainer.trained_network(), SCHEMA, FileRecord("", "", 0)), dataset, SCHEMA)
        assert identical(copied(trainer.trained_network()), expected)


@pytest.mark.parametrize(
    "extra",
    [{}, {"encoder_learning_rate": 1e-3}, {"mean_decay": 0.5}, {"mean_decay": 0.5, "encoder_learning_rate": 1e-3}],
    ids=["frozen", "unfrozen", "mean", "unfrozen mean"],
)
def test_the_trained_network_shares_nothing_that_training_changes(make_network, tiles, extra):
    trainer = Trainer(make_network(), tiles, dataclasses.replace(QUICK, **extra))
    trainer.run_epoch()
    network = trainer.trained_network()
    assert not network.training
    assert not any(module.training for module in network.modules())
    before = copied(network)
    trainer.run_epoch()
    assert changed(network, before) == set()
    assert not any(module.training for module in network.modules())
    assert changed(trainer.trained_network(), before)


# --- running mean ---------------------------------------------------------------------------------


def test_the_running_mean_lies_behind_the_weights(make_network, tiles):
    recipe = dataclasses.replace(QUICK, epochs=1, batch=8, mean_decay=0.99)
    network = make_network()
    start = copied(network.head)
    trainer = Trainer(network, tiles, recipe)
    trainer.run_epoch()
    now, mean = copied(network.head), copied(trainer.trained_network().head)
    # After one step nine tenths of it are new: the first steps are soon forgotten.
    for key, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, start[key] * 0.1 + now[key] * 0.9)
        else:
            assert torch.equal(value, now[key])


def test_a_running_mean_is_smoother_than_what_it_is_of(make_network, tiles):
    recipe = dataclasses.replace(QUICK, epochs=3, mean_decay=0.9)
    with_mean, losses = trained(make_network(), tiles, recipe)
    without, losses_without = trained(make_network(), tiles, dataclasses.replace(recipe, mean_decay=0.0))
    assert losses == losses_without  # it is looked at, not trained
    assert not identical(with_mean, without)


# --- places and views -----------------------------------------------------------------------------


@pytest.fixture
def watched(tiles, monkeypatch):
    """What is read: place and view, in order."""
    seen = []
    real = tiles.read
    monkeypatch.setattr(tiles, "read", lambda place, view: (seen.append((place, view)), real(place, view))[1])
    return seen


def test_an_epoch_looks_at_every_place_once_in_another_order(make_network, tiles, watched):
    trainer = Trainer(make_network(), tiles, QUICK)
    orders = []
    for _ in range(2):
        watched.clear()
        trainer.run_epoch()
        assert sorted(map(str, (place for place, _ in watched))) == sorted(map(str, tiles.places))
        orders.append([place for place, _ in watched])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("views", [1, 3, 8])
def test_fixed_views_take_turns(make_network, tiles, watched, views):
    trainer = Trainer(make_network(), tiles, dataclasses.replace(QUICK, views=views, epochs=2 * views, batch=8))
    turns = []
    for _ in range(2):
        watched.clear()
        for _ in range(views):
            trainer.run_epoch()
        turns.append(Counter(watched))
        assert set(turns[-1].values()) == {1}  # each view of each place once
        assert len(turns[-1]) == views * len(tiles)
        assert sum(view == View() for _, view in watched) == len(tiles)
    assert turns[0] == turns[1]  # the same ones again
    if views == ORIENTATIONS:
        for place in tiles.places:
            assert len({(view.quarters, view.mirrored) for there, view in turns[0] if there == place}) == 8


def test_places_do_not_all_show_the_same_view_in_an_epoch(make_network, tiles, watched):
    Trainer(make_network(), tiles, QUICK).run_epoch()
    assert len({(view.quarters, view.mirrored) for _, view in watched}) > 2
    assert len({view.shift for _, view in watched}) > 2


def test_fresh_views_never_come_again(make_network, dataset):
    augmentation = Augmentation(True, (0.5, 2), 0.3)
    tiles = TrainingTiles(dataset, SCHEMA, CONFIG.tile, augmentation)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = tiles.read
        patch.setattr(tiles, "read", lambda place, view: (seen.append(view), real(place, view))[1])
        recipe = dataclasses.replace(QUICK, views=0, epochs=4, augmentation=augmentation)
        trained(make_network(), tiles, recipe)
    assert len(set(seen)) == len(seen) == 4 * 7


def test_a_last_batch_of_one_is_trained_on(make_network, tiles):
    trainer = Trainer(make_network(), tiles, QUICK)
    sizes = []
    trainer.network.head.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0][0])))
    assert math.isfinite(trainer.run_epoch())
    assert trainer.batches == 3
    assert sizes == [3, 3, 2]  # twice the same, for batch norm


def test_a_single_place_is_enough(make_network, tmp_path):
    write_dataset(tmp_path, {"a_0": (64, 64)})
    tiles = TrainingTiles(find_dataset(tmp_path), SCHEMA, CONFIG.tile)
    _, losses = trained(make_network(), tiles, dataclasses.replace(QUICK, epochs=4, views=1))
    assert losses[-1] < losses[0]


def test_a_batch_without_any_label_teaches_nothing(make_network, tiles, monkeypatch):
    monkeypatch.setattr(
        tiles, "read", lambda *_: (np.zeros((3, 64, 64), np.uint8), np.full((64, 64), NO_LABEL, np.uint8))
    )
    network = make_network()
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    _, losses = trained(network, tiles, QUICK)
    assert losses == [0.0, 0.0]
    assert all(torch.equal(value, before[key]) for key, value in network.named_parameters())


def test_pixels_without_a_label_do_not_count(make_network, tiles, monkeypatch):
    def loss(fill):
        def read(place, view):
            image, truth = TrainingTiles.read(tiles, place, view)
            truth[:32] = fill(truth[:32])
            return image, truth

        with monkeypatch.context() as patch:
            patch.setattr(tiles, "read", read)
            trainer = Trainer(make_network(), tiles, dataclasses.replace(QUICK, batch=8, views=1))
            return trainer.run_epoch()

    network, read = make_network(), [tiles.read(place, View()) for place in tiles.places]
    network.encoder.eval()
    with torch.no_grad():
        logits = network.upsample(network(torch.from_numpy(np.stack([image for image, _ in read]))))
    lower = torch.from_numpy(np.stack([truth for _, truth in read])).long()[:, 32:]
    expected = torch.nn.functional.cross_entropy(logits[:, :, 32:], lower, ignore_index=NO_LABEL)
    assert loss(lambda half: NO_LABEL) == pytest.approx(float(expected), rel=1e-4)
    assert loss(lambda half: half) != pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(make_network, tiles, value):
    network = make_network()
    with torch.no_grad():
        network.head.classifier.bias[0] = value
    head = copied(network.head.classifier)
    with pytest.raises(NumericalCheckError, match=r"the loss is (nan|inf) at step 0") as caught:
        Trainer(network, tiles, QUICK).run_epoch()
    assert caught.value.hint == "lower the learning rate"
    assert torch.equal(network.head.classifier.weight, head["weight"])  # nothing was learned from it


def test_an_image_that_became_unreadable_ends_the_run_with_its_error(make_network, tiles, monkeypatch):
    def fail(*_):
        raise UsageError("gone")

    monkeypatch.setattr(tiles, "read", fail)
    with pytest.raises(UsageError, match="gone"):
        Trainer(make_network(), tiles, QUICK).run_epoch()


# --- numbers of the recipe ------------------------------------------------------------------------


def rates(steps, **options):
    recipe = Recipe(**options)
    return [recipe.rate_factor(step, steps) for step in range(steps)]


def test_schedules_against_hand_numbers():
    assert rates(4) == [1, 1, 1, 1]
    assert rates(4, schedule="cosine") == pytest.approx([1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4])
    assert rates(4, schedule="poly") == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0.25**0.9])


def test_warm_up_rises_to_the_schedule_and_delays_it():
    assert rates(6, warm_up=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(6, warm_up=2, schedule="cosine") == pytest.approx([0.5, 1, *rates(4, schedule="cosine")])
    assert rates(3, warm_up=10) == pytest.approx([0.1, 0.2, 0.3])  # a run may be shorter than its warm-up
    assert rates(3, warm_up=3, schedule="poly") == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
@pytest.mark.parametrize("warm_up", [0, 1, 7, 100])
def test_no_rate_is_beyond_0_and_1(schedule, warm_up):
    for step, rate in enumerate(rates(50, schedule=schedule, warm_up=warm_up)):
        assert 0 < rate <= 1, step


def test_the_optimizer_follows_the_schedule(make_network, tiles):
    recipe = dataclasses.replace(QUICK, schedule="poly", warm_up=2, encoder_learning_rate=1e-3)
    trainer = Trainer(make_network(), tiles, recipe)
    seen = []
    for _ in range(2):
        trainer.run_epoch(lambda: seen.append([group["lr"] for group in trainer._optimizer.param_groups]))
    expected = [recipe.rate_factor(step, 6) for step in range(6)]
    assert np.allclose(seen, [[1e-2 * rate, 1e-3 * rate] for rate in expected])


def test_class_weights_against_hand_numbers():
    pixels = np.array([100, 400, 25, 0, 475])
    assert class_weights("none", pixels) is None
    # Shares 0.1, 0.4, 0.025, 0.475; their median is 0.25.
    assert class_weights("balanced", pixels) == pytest.approx([2.5, 0.625, 10, 1, 0.25 / 0.475])
    assert class_weights("sqrt", pixels) == pytest.approx(np.sqrt([2.5, 0.625, 10, 1, 0.25 / 0.475]))
    assert class_weights("balanced", np.array([7, 0])) == pytest.approx([1, 1])
    assert class_weights("1,2.5, 3,4,1e-3", pixels) == pytest.approx([1, 2.5, 3, 4, 1e-3])
    assert class_weights("balanced", pixels).dtype == np.float32


@pytest.mark.parametrize(
    "rule", ["", "1,2", "1,2,3,4,5,6", "1,2,3,4,0", "1,2,3,4,-1", "1,2,3,4,nan", "1,2,3,4,inf", "x"]
)
def test_class_weights_that_make_no_sense_are_refused(rule):
    with pytest.raises(UsageError, match="nor 5 positive numbers"):
        class_weights(rule, np.ones(5, np.int64))


def test_class_weights_change_what_is_learned(make_network, tiles):
    plain, _ = trained(make_network(), tiles, QUICK)
    ones, _ = trained(make_network(), tiles, dataclasses.replace(QUICK, class_weights="1,1,1,1,1"))
    others, _ = trained(make_network(), tiles, dataclasses.replace(QUICK, class_weights="1,1,1,1,9"))
    for key, value in plain.items():
        torch.testing.assert_close(value, ones[key], rtol=1e-3, atol=1e-3)
    assert not identical(plain, others)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"batch": 1}, "--batch"),
        ({"learning_rate": 0.0}, "--lr"),
        ({"learning_rate": -1e-4}, "--lr"),
        ({"learning_rate": math.nan}, "--lr"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"encoder_learning_rate": -1e-5}, "--encoder-lr"),
        ({"encoder_learning_rate": math.nan}, "--encoder-lr"),
        ({"schedule": "linear"}, "--schedule"),
        ({"warm_up": -1}, "--warm-up"),
        ({"clip_norm": math.inf}, "--clip-norm"),
        ({"mean_decay": 1.0}, "--mean-decay"),
        ({"views": -1}, "--views"),
        ({"precision": "int8"}, "--precision"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1 << 70}, "--seed"),
    ],
    ids=str,
)
def test_numbers_that_cannot_train_anything_are_refused_by_name(wrong, name):
    with pytest.raises(UsageError, match=rf"^{name} "):
        Recipe(**wrong)
