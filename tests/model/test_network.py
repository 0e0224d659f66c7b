"""The PyTorch network: the paper's size, and what it computes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from reference import reference_features, reference_labels, reference_logits  # noqa: E402
from variants import VARIANTS, encoder_options, head_options  # noqa: E402

from cdkd_edge.model.config import NetworkConfig  # noqa: E402
from cdkd_edge.model.device import network_cost  # noqa: E402
from cdkd_edge.model.network import Encoder, SegmentationNetwork  # noqa: E402

pytestmark = pytest.mark.needs_torch


def network_of(config, weights):
    network = SegmentationNetwork(config)
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    left_over = network.load_state_dict(state, strict=False)
    assert left_over.unexpected_keys == []
    assert all(key.endswith("num_batches_tracked") for key in left_over.missing_keys)
    return network.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def case(request, make_weights):
    """A configuration, its random weights, and two noisy tiles."""
    config = request.param
    tiles = np.random.default_rng(3).integers(0, 256, (2, 3, config.tile, config.tile), np.uint8)
    return config, make_weights(config), tiles


def test_features_and_logits_are_the_reference(case):
    config, weights, tiles = case
    network = network_of(config, weights).double()
    network.encoder.mean = torch.tensor(config.pixel_mean, dtype=torch.float64).view(1, 3, 1, 1)
    network.encoder.std = torch.tensor(config.pixel_std, dtype=torch.float64).view(1, 3, 1, 1)
    if config.rotary_base:
        network.encoder.turns = torch.from_numpy(config.rotary_turns())
    with torch.inference_mode():
        maps = network.encoder(torch.from_numpy(tiles))
        logits = network(torch.from_numpy(tiles))
    expected_maps = reference_features(weights, tiles, **encoder_options(config))
    for found, expected in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    expected = reference_logits(weights, tiles, **head_options(config))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-9, atol=1e-9)
    side = (4 if config.neck else 1) * config.grid
    assert logits.shape == (2, config.classes, side, side)
    # The comparison means something: logits differ from place to place and from tile to tile.
    assert expected.std(axis=(2, 3)).min() > 0.1
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_labels_are_the_reference_up_to_ties(case):
    config, weights, tiles = case
    network = network_of(config, weights)
    labels = network.segment(torch.from_numpy(tiles))
    assert labels.dtype == torch.uint8
    assert labels.shape == (2, config.tile, config.tile)
    logits = reference_logits(weights, tiles, **head_options(config))
    expected = reference_labels(logits, config.tile, config.logits_align)
    assert (labels.numpy() == expected).mean() > 0.999
    assert len(np.unique(expected)) >= min(2, config.classes)


def test_normalisation_is_inside_and_takes_any_dtype(case):
    config, weights, tiles = case
    network = network_of(config, weights)
    with torch.inference_mode():
        from_bytes = network(torch.from_numpy(tiles))
        from_floats = network(torch.from_numpy(tiles).float())
        from_halves = network(torch.from_numpy(tiles).half())  # 0..255 are exact in FP16
    assert torch.equal(from_bytes, from_floats)
    assert torch.equal(from_bytes, from_halves)
    seen = []
    network.encoder.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.inference_mode():
        network(torch.from_numpy(tiles))
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (config.pixel_mean, config.pixel_std))
    np.testing.assert_allclose(seen[0].numpy(), (tiles - mean) / std, atol=1e-5)


def test_taps_are_the_ends_of_the_quarters():
    assert NetworkConfig().taps == (2, 5, 8, 11)
    assert NetworkConfig(depth=24).taps == (5, 11, 17, 23)
    assert NetworkConfig(depth=4).taps == (0, 1, 2, 3)
    assert NetworkConfig(depth=6).taps == (0, 2, 3, 5)


def test_the_state_dict_is_the_written_down_one(case):
    config, weights, _ = case
    found = {k: tuple(v.shape) for k, v in SegmentationNetwork(config).state_dict().items() if "num_batches" not in k}
    assert found == {key: value.shape for key, value in weights.items()}


def test_the_paper_network_has_the_papers_size():
    with torch.device("meta"):
        network = SegmentationNetwork(NetworkConfig(classes=7))
    cost = network_cost(network)
    assert cost.position_parameters == 4096 * 384
    assert round((cost.parameters - cost.position_parameters) / 1e6, 3) == 29.658
    assert round(cost.parameters / 1e6, 3) == 31.231
    assert round(cost.conv_linear_macs / 1e9, 2) == 119.60
    assert round(cost.attention_macs / 1e9, 1) == 154.6
    assert round(2 * cost.total_macs / 1e9) == 548


def test_cost_of_a_case_counted_by_hand():
    config = NetworkConfig(
        tile=12, patch=2, embed_dim=4, depth=4, heads=2, mlp_dim=8, classes=3, head_channels=5, pool_scales=(1, 6)
    )
    cells = 36
    encoder = cells * 3 * 4 * 4 + 4 * cells * (4 * 12 + 4 * 4 + 4 * 8 + 8 * 4)
    pyramid = (1 + 36) * 4 * 5 + cells * 9 * (4 + 2 * 5) * 5
    rest = 3 * cells * 4 * 5 + 3 * cells * 9 * 5 * 5 + cells * 9 * 20 * 5 + cells * 5 * 3
    cost = network_cost(SegmentationNetwork(config))
    assert cost.conv_linear_macs == encoder + pyramid + rest
    assert cost.attention_macs == 4 * 2 * cells * cells * 4
    assert network_cost(Encoder(config)).conv_linear_macs == encoder


def test_counting_leaves_the_network_as_it_was():
    config = VARIANTS["class token"]
    network = SegmentationNetwork(config)
    network_cost(network)
    assert network.training
    assert all(p.device.type == "cpu" for p in network.parameters())
    assert all(not module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    "sizes",
    [
        {"tile": 1000},  # not a multiple of the patch
        {"heads": 5},  # does not divide the width
        {"depth": 3},  # four blocks are tapped
        {"classes": 256},  # 255 means no label
        {"classes": 0},
        {"tile": 64},  # 4 x 4 patches cannot be pooled to 6 x 6
        {"layer_norm_eps": 0.0},
        {"embed_dim": -384},
        {"pool_scales": ()},
        {"pool_scales": (0, 1)},
        {"attention": ("global",)},  # twelve blocks
        {"attention": ("window 12",) * 12},  # 64 x 64 tokens
        {"attention": ("window 16", "window 8", "pooled 2") * 4},  # three sizes of squares
        {"attention": ("window 16", "pooled 3") * 6},  # a window is no multiple of 3 x 3
        {"attention": ("window16",) * 12},
        {"attention": ("pooled 0",) * 12},
        {"attention": ("window 16",) * 12, "class_token": True},
    ],
    ids=str,
)
def test_sizes_that_are_no_network_are_refused(sizes):
    from cdkd_edge.core.errors import CheckpointError

    with pytest.raises(CheckpointError):
        NetworkConfig(**sizes)
