"""The losses of a step, their gradients, and what is trained, against an independent computation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distillation_reference import (  # noqa: E402
    reference_patches,
    reference_reconstruction,
    reference_run,
    tent,
)
from reference import reference_features, reference_logits  # noqa: E402
from sam_reference import official_file, sam_weights  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.core.errors import CheckpointError, UsageError  # noqa: E402
from cdkd_edge.distillation.masks import visible_patches  # noqa: E402
from cdkd_edge.distillation.networks import LOSSES, AdaptedTeacher, Distillation, class_divergence, kept  # noqa: E402
from cdkd_edge.distillation.recipe import DistillRecipe  # noqa: E402
from cdkd_edge.model.network import Encoder, SegmentationNetwork  # noqa: E402
from cdkd_edge.model.sam_files import load_sam  # noqa: E402

pytestmark = pytest.mark.needs_torch

TEACHER = dataclasses.replace(CONFIG, embed_dim=48, depth=8, heads=3)
WITH_CLASS_TOKEN = dataclasses.replace(TEACHER, class_token=True)
KINDS = ("window 4", "pooled 2", "window 4", "pooled 2")
WINDOWS = dataclasses.replace(CONFIG, attention=KINDS)


def recipe_of(**options):
    return DistillRecipe(**{"precision": "fp32", "decoder_width": 16, "decoder_depth": 2, **options})


def network_of(weights, config=CONFIG):
    network = SegmentationNetwork(config)
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=False)
    return network.eval()


def tiles_of(*seeds, side=64):
    return np.stack([np.random.default_rng(seed).integers(0, 256, (3, side, side), np.uint8) for seed in seeds])


def masks_of(*seeds):
    return np.stack([visible_patches("cells", CONFIG.grid, 2, [seed]) for seed in seeds])


def batch_of(*seeds):
    """Two tiles, unless other seeds are given, and their masks."""
    seeds = seeds or (1, 2)
    return torch.from_numpy(tiles_of(*seeds)), torch.from_numpy(masks_of(*seeds))


def arrays(module):
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def shake(module, size):
    """Add noise, so that no part is at its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def build(make_weights):
    """``build(recipe, teacher config, student config)``: the networks, and NumPy weights of teacher and student.

    A fixed seed makes what is random in the networks the same for each recipe.
    """

    def build(recipe, teacher=TEACHER, student=CONFIG, *, heads=False, **options):
        torch.manual_seed(0)
        theirs, ours = make_weights(teacher, seed=1), make_weights(student, seed=2)
        guide, network = network_of(theirs, teacher), network_of(ours, student)
        if not heads:
            guide, network = guide.encoder, network.encoder
        networks = Distillation(network, None if recipe.method == "mae" else guide, recipe, **options)
        return networks, *({name: np.asarray(w, np.float64) for name, w in one.items()} for one in (theirs, ours))

    return build


def statistics(features):
    """Mean and standard deviation of the channels of tokens ``[N, V, D]``."""
    return features.mean(axis=(0, 1)), features.std(axis=(0, 1))


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["standardized", "raw"])
@pytest.mark.parametrize("teacher", [TEACHER, WITH_CLASS_TOKEN], ids=["plain", "class token"])
def test_the_losses_of_a_masked_step_are_what_is_described(build, target, teacher):
    networks, theirs, ours = build(recipe_of(target=target, pixels="patch"), teacher)
    assert networks.pairs == ((2, 1), (4, 2), (6, 3))
    networks.measure_teacher([batch_of(7), batch_of(8), batch_of(9)])
    shake(networks.teacher.mixtures, 0.1)
    with torch.no_grad():
        found = networks(*batch_of())

    plain = reference_run(theirs, tiles_of(7, 8, 9), masks_of(7, 8, 9), heads=3)
    mixtures = arrays(networks.teacher.mixtures)
    adapted = reference_run(theirs, tiles_of(1, 2), masks_of(1, 2), heads=3, mixtures=mixtures)
    student = reference_run(ours, tiles_of(1, 2), masks_of(1, 2), heads=2)
    missed, spread = [], []
    for (guide, block), layer in zip(networks.pairs, networks.projections, strict=True):
        mean, std = statistics(plain[guide - 1])
        goal = adapted[guide - 1] if target == "raw" else (adapted[guide - 1] - mean) / std
        told = student[block - 1] @ layer.weight.detach().double().numpy().T
        missed.append(np.mean((told - goal) ** 2))
        spread.append(np.mean(adapted[guide - 1].reshape(-1, 48).std(axis=0, ddof=1) / std))
    values = reference_patches(tiles_of(1, 2).astype(float), 8, "patch")
    hidden = np.stack([np.delete(one, places, axis=0) for one, places in zip(values, masks_of(1, 2), strict=True)])
    errors = [
        np.mean((reference_reconstruction(arrays(decoder), tokens[-1], masks_of(1, 2), 2) - hidden) ** 2)
        for decoder, tokens in ((networks.teacher_decoder, adapted), (networks.student_decoder, student))
    ]
    np.testing.assert_allclose(found.parts, [np.mean(missed), *errors, 0.0], rtol=1e-4)
    np.testing.assert_allclose(found.missed, missed, rtol=1e-4)
    np.testing.assert_allclose(found.spread, spread, rtol=1e-4)
    assert min(missed) < 0.9 * max(missed)  # the pairs differ


def test_a_masked_autoencoder_has_the_students_pixels_alone(build):
    networks, _, ours = build(recipe_of(method="mae", pixels="raw"))
    with torch.no_grad():
        found = networks(*batch_of())
    student = reference_run(ours, tiles_of(1, 2), masks_of(1, 2), heads=2)
    values = reference_patches(tiles_of(1, 2).astype(float), 8, "raw")
    hidden = np.stack([np.delete(one, places, axis=0) for one, places in zip(values, masks_of(1, 2), strict=True)])
    told = reference_reconstruction(arrays(networks.student_decoder), student[-1], masks_of(1, 2), 2)
    np.testing.assert_allclose(found.parts, [0, 0, np.mean((told - hidden) ** 2), 0], rtol=1e-4)
    assert (networks.teacher, networks.teacher_decoder, len(found.missed), len(found.spread)) == (None, None, 0, 0)


def test_without_adapters_the_teacher_reconstructs_nothing(build):
    with_adapters, without = (build(recipe_of(adapters=one))[0] for one in (True, False))
    without.projections.load_state_dict(with_adapters.projections.state_dict())
    assert (without.teacher.mixtures, without.teacher_decoder) == (None, None)
    with torch.no_grad():
        one, other = with_adapters(*batch_of()), without(*batch_of())
    assert other.parts[LOSSES.index("teacher_pixels")] == 0
    torch.testing.assert_close(other.missed, one.missed)  # adapters have not learned anything yet


def test_features_and_classes_of_converted_networks_are_compared_as_described(build):
    """The student has windows and pooled keys, whose tokens have another order; the head of each is its own."""
    recipe = recipe_of(method="features", projection="none", logits=2.0)
    networks, theirs, ours = build(recipe, CONFIG, WINDOWS, heads=True)
    assert networks.pairs == ((1, 1), (2, 2), (3, 3), (4, 4))
    shown = tiles_of(7, 8, 9)
    networks.measure_teacher([(torch.from_numpy(tile[None]), None) for tile in shown])
    kinds = {"heads": 2, "eps": CONFIG.layer_norm_eps}
    variance = [maps.var(axis=(0, 2, 3))[:, None, None] for maps in reference_features(theirs, shown, **kinds)]
    tiles = tiles_of(1, 2)
    truth, told = (
        reference_features(weights, tiles, **kinds, attention=attention)
        for weights, attention in ((theirs, ()), (ours, KINDS))
    )
    missed = [np.mean((a - b) ** 2 / v) for a, b, v in zip(told, truth, variance, strict=True)]
    one, two = (
        np.exp(reference_logits(weights, tiles, **kinds, attention=attention))
        for weights, attention in ((ours, KINDS), (theirs, ()))
    )
    one, two = one / one.sum(1, keepdims=True), two / two.sum(1, keepdims=True)
    divergence = np.sum(two * np.log(two / one), axis=1).mean()
    with torch.no_grad():
        found = networks(torch.from_numpy(tiles))
    np.testing.assert_allclose(found.missed, missed, rtol=1e-3)
    np.testing.assert_allclose(found.parts, [np.mean(missed), 0, 0, divergence], rtol=1e-3)
    assert float(found.agreement) == pytest.approx(np.mean(one.argmax(1) == two.argmax(1)))
    assert 0 < float(found.agreement) < 1


@pytest.mark.parametrize("patch", [4, 16])
def test_maps_of_other_patches_are_resampled(build, patch):
    """To the teacher's grid; logits too."""
    teacher = dataclasses.replace(TEACHER, patch=patch, pool_scales=(1, 2, 3, 4))
    networks, theirs, ours = build(recipe_of(method="features", target="raw"), teacher, CONFIG, heads=True)
    tiles, kinds = tiles_of(1, 2), {"eps": CONFIG.layer_norm_eps}
    truth, told = reference_features(theirs, tiles, heads=3, **kinds), reference_features(ours, tiles, heads=2, **kinds)
    missed = []
    for goal, maps, layer in zip(truth, told, networks.projections, strict=True):
        seen = np.einsum("dc,nchw->ndhw", layer.weight.detach().double().numpy(), maps)
        missed.append(np.mean((tent(seen, 64 // patch) - goal) ** 2))
    one = tent(reference_logits(ours, tiles, heads=2, **kinds), 64 // patch)
    two = reference_logits(theirs, tiles, heads=3, scales=(1, 2, 3, 4), **kinds)
    with torch.no_grad():
        found = networks(torch.from_numpy(tiles))
    np.testing.assert_allclose(found.missed, missed, rtol=1e-3)
    expected = float(class_divergence(torch.from_numpy(one), torch.from_numpy(two)))
    assert float(found.parts[3]) == pytest.approx(expected, rel=1e-3)
    assert float(found.agreement) == pytest.approx(np.mean(one.argmax(1) == two.argmax(1)), abs=1e-3)


def test_a_student_like_its_teacher_has_nothing_to_learn(make_weights):
    weights = make_weights(CONFIG)
    recipe = recipe_of(method="features", projection="none")
    networks = Distillation(network_of(weights), network_of(weights), recipe)
    networks.measure_teacher([(batch_of(3)[0], None)])
    with torch.no_grad():
        found = networks(batch_of()[0])
    assert found.parts.abs().max() < 1e-8
    assert found.agreement == 1


def test_the_divergence_is_that_of_the_classes_of_each_cell():
    logits, truth = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    truth[0, 0, 0, 0] = math.log(3)  # probabilities 3/4 and 1/4 against a half each; the other cell agrees
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert float(class_divergence(logits, truth)) == pytest.approx(expected)
    assert float(class_divergence(logits + 5, truth - 3)) == pytest.approx(expected)


def test_a_channel_that_hardly_varies_does_not_rule_the_loss(build):
    networks, *_ = build(recipe_of())
    constant = networks.teacher.encoder.blocks[1].mlp.fc2  # before the features of the first pair
    networks.measure_teacher([batch_of(7)])
    usual = networks.std[0].square().mean()
    with torch.no_grad():
        networks.teacher.encoder.blocks[1].attn.proj.weight[5] = networks.teacher.encoder.blocks[0].mlp.fc2.weight[
            5
        ] = 0
        networks.teacher.encoder.blocks[0].attn.proj.weight[5] = constant.weight[5] = 0
        networks.teacher.encoder.pos_embed[..., 5] = 0
        networks.teacher.encoder.patch_embed.proj.weight[5] = 0
    networks.measure_teacher([batch_of(7)])
    assert networks.std[0, 5].square() == pytest.approx(float(usual) * 1e-4, rel=0.1)
    assert networks.std[0].min() == networks.std[0, 5]


def test_half_precision_gives_about_the_same_losses_in_fp32(build):
    one, two = (build(recipe_of(precision=precision))[0](*batch_of()).parts for precision in ("fp32", "bf16"))
    assert two.dtype == torch.float32
    torch.testing.assert_close(two, one, rtol=0.05, atol=0)
    assert not torch.equal(one, two)


def test_the_teacher_is_measured_without_its_adapters(build):
    """Random adapters at two thirds of the sum would say nothing about the teacher."""
    first, second = (build(recipe_of(gate=gate))[0] for gate in ("identity", "convex"))
    for networks in (first, second):
        networks.measure_teacher([batch_of(7), batch_of(8)])
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.std, second.std)
    with torch.no_grad():
        np.testing.assert_allclose(first(*batch_of(7, 8)).spread, 1, atol=0.02)  # n - 1 against n
        assert (second(*batch_of(7, 8)).spread - 1).abs().min() > 0.03


def test_sam_teaches_a_plain_student(tmp_path, make_weights):
    state = {key: torch.from_numpy(np.array(value)) for key, value in official_file(sam_weights()).items()}
    torch.save(state, tmp_path / "sam.pth")
    losses = []
    for adapters in (True, False):
        sam, _ = load_sam(tmp_path / "sam.pth", tile=64, patch=8)
        torch.manual_seed(0)
        student = network_of(make_weights(CONFIG)).encoder
        networks = Distillation(student, sam, recipe_of(adapters=adapters, projection="linear"))
        torch.manual_seed(1)
        for layer in networks.projections:
            layer.reset_parameters()
        networks.measure_teacher([batch_of(7)])
        with torch.no_grad():
            losses.append(networks(*batch_of()))
    assert networks.pairs == ((1, 1), (2, 2), (3, 3))
    torch.testing.assert_close(losses[0].missed, losses[1].missed, rtol=1e-5, atol=1e-5)
    assert 0.5 < losses[0].parts[0] < 5


def test_visible_tokens_stay_behind_a_class_token():
    tokens, visible = torch.arange(10.0).reshape(1, 5, 2), torch.tensor([[3, 0]])
    assert kept(tokens, visible, 1).tolist() == [[[0, 1], [8, 9], [2, 3]]]
    assert kept(tokens, visible, 0).tolist() == [[[6, 7], [0, 1]]]
    assert kept(tokens, None, 1) is tokens


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["both", "student"])
def test_distillation_trains_the_adapters_if_feedback_says_so(build, feedback):
    networks, *_ = build(recipe_of(feedback=feedback))
    networks(*batch_of()).parts[0].backward()
    reached = [bool(mixture.near.up.weight.grad.any()) for mixture in networks.teacher.mixtures]
    assert reached == [feedback == "both" and block < 6 for block in range(8)]  # the last pair ends at block 6
    assert all(layer.weight.grad.abs().max() > 0 for layer in networks.projections)
    assert networks.student.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("part", ["teacher_pixels", "student_pixels"])
def test_pixels_train_their_own_network_alone(build, part):
    networks, *_ = build(recipe_of())
    networks(*batch_of()).parts[LOSSES.index(part)].backward()
    reached = {
        name
        for name, module in networks.trained().items()
        if any(one.grad is not None and one.grad.any() for one in module.parameters())
    }
    own = {"teacher_pixels": {"mixtures", "teacher_decoder"}, "student_pixels": {"student", "student_decoder"}}
    assert reached == own[part]


CASES = {
    "masked": {},
    "student": {"feedback": "student"},
    "convex": {"gate": "convex", "mask": "grid"},
    "no adapters": {"adapters": False},
    "mae": {"method": "mae"},
    "features": {"method": "features"},
    "few pairs": {"method": "features", "pairs": ((8, 2), (3, 1))},
}


@pytest.mark.parametrize(
    "student", [CONFIG, dataclasses.replace(CONFIG, class_token=True)], ids=["plain", "class token"]
)
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_all_that_is_trained_gets_a_gradient_and_nothing_else_does(build, case, position, student):
    """DistributedDataParallel waits for each of them."""
    recipe = recipe_of(**CASES[case])
    networks, *_ = build(recipe, WITH_CLASS_TOKEN, student, position=position)
    tiles, visible = batch_of()
    networks(tiles, visible if recipe.masked else None).parts.sum().backward()
    for name, parameter in networks.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in networks.named_parameters() if not parameter.requires_grad}
    expected = {name for name, _ in networks.named_parameters() if name.startswith("teacher.encoder.")}
    if not position:
        expected |= {"student.pos_embed", *(["student.cls_token"] if student.class_token else [])}
    if case == "few pairs":
        expected |= {
            name for name, _ in networks.named_parameters() if name.startswith(("student.blocks.2", "student.blocks.3"))
        }
    assert frozen == expected


def test_the_state_of_a_run_has_all_that_is_trained_and_nothing_of_the_teacher(build):
    networks, *_ = build(recipe_of())
    trained = networks.trained()
    assert set(trained) == {"student", "mixtures", "projections", "student_decoder", "teacher_decoder"}
    inside = {id(parameter) for parameter in trained.parameters()}
    assert {id(one) for one in networks.parameters() if one.requires_grad} <= inside
    assert not inside & {id(one) for one in networks.teacher.encoder.parameters()}


def test_heads_are_neither_trained_nor_a_part_of_the_state(build):
    networks, *_ = build(recipe_of(method="features"), heads=True)
    networks(batch_of()[0]).parts.sum().backward()
    heads = [*networks.student.head.parameters(), *networks._heads[0].head.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in heads)
    assert not {id(one) for one in heads} & {id(one) for one in networks.trained().parameters()}
    assert all(parameter.requires_grad for parameter in networks.student.encoder.parameters())


# --- what cannot be compared ----------------------------------------------------------------------


def refusal(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        Distillation(*arguments, **options)
    return f"{caught.value.message} | {caught.value.hint}"


def test_masks_need_tokens_that_attend_to_all_others():
    plain, windows = Encoder(CONFIG), Encoder(WINDOWS)
    assert "global attention in the student | distill first" in refusal(UsageError, windows, plain, recipe_of())
    assert "global attention in the student" in refusal(UsageError, windows, None, recipe_of(method="mae"))
    for adapters in (True, False):
        found = refusal(UsageError, plain, windows, recipe_of(adapters=adapters))
        assert "global attention in the teacher, or SAM's windows | --method features" in found
    Distillation(windows, windows, recipe_of(method="features"))


def test_cells_have_to_fit_the_tile():
    found = refusal(UsageError, Encoder(CONFIG), Encoder(TEACHER), recipe_of(cell=3))
    assert found.startswith("cells of 3 x 3 patches do not fit a tile of 8 x 8 | --cell with a divisor of 8")
    Distillation(Encoder(CONFIG), Encoder(TEACHER), recipe_of(cell=4))


def test_masks_need_the_same_patches_in_both_networks():
    other = Encoder(dataclasses.replace(TEACHER, patch=16, pool_scales=(1,)))
    found = refusal(CheckpointError, Encoder(CONFIG), other, recipe_of())
    assert found.startswith("a tile has 4 x 4 patches for the teacher and 8 x 8 for the student; masks need the same")
    assert found.endswith("leave out --teacher-patch; or --method features, which resamples the student's features")
    Distillation(Encoder(CONFIG), other, recipe_of(method="features"))


def test_features_of_other_width_need_a_projection():
    found = refusal(CheckpointError, Encoder(CONFIG), Encoder(TEACHER), recipe_of(projection="none"))
    assert found.startswith("the student's features are 32 wide, the teacher's 48 | --projection linear")
    networks = Distillation(Encoder(CONFIG), Encoder(TEACHER), recipe_of())
    assert [tuple(layer.weight.shape) for layer in networks.projections] == [(48, 32)] * 3
    assert all(layer.bias is None for layer in networks.projections)


@pytest.mark.parametrize(
    ("pair", "text"), [((9, 1), "block 9 of the teacher, which has 8"), ((1, 5), "block 5 of the student, which has 4")]
)
def test_pairs_name_blocks_that_exist(pair, text):
    assert f"--pairs names {text}" in refusal(UsageError, Encoder(CONFIG), Encoder(TEACHER), recipe_of(pairs=(pair,)))
    networks = Distillation(Encoder(CONFIG), Encoder(TEACHER), recipe_of(pairs=((8, 4), (1, 2))))
    assert networks.pairs == ((8, 4), (1, 2))


def test_heads_of_other_classes_are_refused():
    student = SegmentationNetwork(CONFIG)
    teacher = SegmentationNetwork(dataclasses.replace(TEACHER, classes=3))
    recipe = recipe_of(method="features")
    found = refusal(UsageError, student, teacher, recipe)
    assert found == "the student's head knows 5 classes, the teacher's 3 | align features alone: --logits 0"
    assert not Distillation(student, teacher, dataclasses.replace(recipe, logits=0.0)).with_classes


def test_the_teacher_is_frozen_whatever_it_was():
    adapted = AdaptedTeacher(Encoder(TEACHER).train(), "identity")
    assert not adapted.encoder.training
    assert not any(parameter.requires_grad for parameter in adapted.encoder.parameters())
