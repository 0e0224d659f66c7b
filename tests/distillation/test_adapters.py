"""Adapters and gate: what the description says, in numbers; and a teacher that starts as it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distillation_reference import reference_adapter, reference_gate, reference_mixture  # noqa: E402
from sam_reference import official_file, sam_weights  # noqa: E402
from training_helpers import CONFIG  # noqa: E402

from cdkd_edge.distillation.adapters import FAR, NEAR, Adapter, Gate, Mixture  # noqa: E402
from cdkd_edge.distillation.masks import visible_patches  # noqa: E402
from cdkd_edge.distillation.networks import AdaptedTeacher, kept  # noqa: E402
from cdkd_edge.model.network import Encoder  # noqa: E402
from cdkd_edge.model.sam_files import load_sam  # noqa: E402

pytestmark = pytest.mark.needs_torch


def shaken(module, seed=0, size=0.3):
    """The module with random values everywhere, in FP64, so that the comparison is sharp."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.double()


def arrays(module, prefix=""):
    return {prefix + name: value.detach().double().numpy() for name, value in module.named_parameters()}


def tokens_of(length, dim, seed=1):
    return np.random.default_rng(seed).standard_normal((2, length, dim))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("dilations", [NEAR, FAR])
@pytest.mark.parametrize("side", [4, 8, 13])  # of a packed map of 256 px, of one of 512 px, and a larger one
def test_an_adapter_computes_what_is_described(side, dilations):
    adapter = shaken(Adapter(64, dilations))
    tokens = tokens_of(side**2, 64)
    expected = reference_adapter(arrays(adapter, "a."), "a", tokens, dilations)
    with torch.no_grad():
        found = adapter(torch.from_numpy(tokens)).numpy()
    assert np.abs(expected).std() > 0.05  # values differ, so the comparison means something
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_gate_computes_what_is_described(factor):
    gate = shaken(Gate(16, factor))
    tokens = tokens_of(9, 16)
    expected = factor * reference_gate(arrays(gate, "g."), "g", tokens)
    with torch.no_grad():
        found = gate(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)  # it computes in FP32
    np.testing.assert_allclose(found.sum(-1), factor, rtol=1e-6)
    assert expected.std(axis=(0, 1)).min() > 0.01


@pytest.mark.parametrize(("kind", "factor"), [("identity", 3.0), ("convex", 1.0)])
def test_a_mixture_weighs_mlp_near_and_far(kind, factor):
    mixture = shaken(Mixture(32, kind))
    tokens, known = tokens_of(16, 32), tokens_of(16, 32, seed=2)
    expected = reference_mixture(arrays(mixture, "m."), "m", tokens, known, factor)
    with torch.no_grad():
        found = mixture(torch.from_numpy(tokens), torch.from_numpy(known)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_identity_gate_starts_at_the_mlp_alone_and_a_convex_one_far_from_it():
    tokens, known = (torch.from_numpy(tokens_of(16, 32, seed)).float() for seed in (1, 2))
    with torch.no_grad():
        assert torch.equal(Mixture(32, "identity")(tokens, known), known)
        assert (Mixture(32, "convex")(tokens, known) - known).abs().mean() > 0.3 * known.abs().mean()


def test_counts_of_parameters_are_the_published_ones():
    with torch.device("meta"):
        assert parameters(Adapter(1024, NEAR)) == parameters(Adapter(1024, FAR)) == 1_067_264
        assert parameters(Gate(1024, 3.0)) == 9_216
        assert 24 * parameters(Mixture(1024)) == 51_449_856
        assert round(12 * parameters(Mixture(768)) / 1e6, 2) == 14.54  # beside vit_b
        assert round(32 * parameters(Mixture(1280)) / 1e6, 2) == 106.89  # beside vit_h


# --- beside a teacher -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in official_file(sam_weights()).items()}, path)
    return path


def plain_encoder(make_weights, *, class_token):
    config = dataclasses.replace(CONFIG, class_token=class_token)
    encoder = Encoder(config)
    weights = {key[8:]: torch.from_numpy(value) for key, value in make_weights(config).items() if key[:8] == "encoder."}
    encoder.load_state_dict(weights)
    return encoder


@pytest.fixture(params=["sam", "plain", "class token"])
def teacher(request, make_weights, sam_file):
    if request.param == "sam":
        return load_sam(sam_file, tile=32)[0]
    return plain_encoder(make_weights, class_token=request.param == "class token")


def tokens_seen(teacher, masked):
    """Tokens of two tiles; with a mask, those of every fourth patch."""
    config = teacher.config
    rng = np.random.default_rng(3)
    tiles = torch.from_numpy(rng.integers(0, 256, (2, 3, config.tile, config.tile), np.uint8))
    visible = None
    if masked:
        visible = torch.from_numpy(np.stack([visible_patches("cells", config.grid, 2, [seed]) for seed in (1, 2)]))
    with torch.no_grad():
        return kept(teacher.embed(tiles), visible, int(config.extra_tokens))


@pytest.mark.parametrize("masked", [False, True])
def test_an_adapted_teacher_starts_as_it_is(teacher, masked):
    tokens, every = tokens_seen(teacher, masked), range(len(teacher.blocks))
    with torch.no_grad():
        plain = teacher.run(tokens, every)
        adapted = AdaptedTeacher(teacher, "identity").run(tokens, every)
        published = AdaptedTeacher(teacher, "convex").run(tokens, every)
    assert len(plain) == len(adapted) == len(teacher.blocks)
    for one, other in zip(adapted, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (published[-1] - plain[-1]).abs().max() > 0.1


def test_values_and_last_layers_learn_from_the_first_step_on(teacher):
    adapted = AdaptedTeacher(teacher, "identity")
    adapted.run(tokens_seen(teacher, True), {len(teacher.blocks) - 1})[0].square().mean().backward()
    for mixture in adapted.mixtures:
        for layer in (mixture.gate.value, mixture.near.up, mixture.far.up):
            assert layer.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_adapters_leave_a_class_token_to_the_blocks_own_mlp(make_weights):
    """Were it a token of the map, the map would be no square; and what it sees would not be a neighbour."""
    teacher = plain_encoder(make_weights, class_token=True)
    adapted = AdaptedTeacher(teacher, "identity")
    for seed, mixture in enumerate(adapted.mixtures):
        shaken(mixture, seed).float()
    tokens = tokens_seen(teacher, False)
    with torch.no_grad():
        plain, found = teacher.run(tokens, {0})[0], adapted.run(tokens, {0})[0]
    torch.testing.assert_close(found[:, :1], plain[:, :1])
    assert (found[:, 1:] - plain[:, 1:]).abs().mean() > 0.01


def test_blocks_that_are_computed_again_give_the_same_gradients(teacher):
    tokens, last = tokens_seen(teacher, True), {len(teacher.blocks) - 1}
    gradients = []
    for recompute in (False, True):
        adapted = AdaptedTeacher(teacher, "convex", recompute=recompute)
        for seed, mixture in enumerate(adapted.mixtures):
            shaken(mixture, seed, 0.1).float()
        adapted.run(tokens, last)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in adapted.mixtures.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_blocks_that_are_computed_again_keep_no_activations(teacher):
    tokens, last, kept_bytes = tokens_seen(teacher, False), {len(teacher.blocks) - 1}, []

    def count(tensor):
        kept_bytes[-1] += tensor.nbytes
        return tensor

    for recompute in (False, True):
        adapted = AdaptedTeacher(teacher, "identity", recompute=recompute)
        kept_bytes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            adapted.run(tokens, last)
    assert kept_bytes[1] < 0.1 * kept_bytes[0]
