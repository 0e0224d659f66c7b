"""Encoders of timm, transformers and facebookresearch compute here what they compute there, at any tile.

What they compute was recorded (``helpers/peer_encoders.py``), so that neither package is needed; where they are
installed, the record is compared with them (``make test-encoders``).
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from commands import loading_refused  # noqa: E402
from encoder_files import BLOCKS, FAMILIES, image_of, samples, weights_of, write_encoder  # noqa: E402

from cdkd_edge.model.checkpoint import load_encoder, save_checkpoint  # noqa: E402
from cdkd_edge.model.config import PIXEL_MEAN, NetworkConfig  # noqa: E402
from cdkd_edge.model.infer import inferred_config  # noqa: E402
from cdkd_edge.model.layouts import DINOV3  # noqa: E402

pytestmark = pytest.mark.needs_torch

CASES = [(name, int(tile)) for name, family in FAMILIES.items() for tile in family["features"]]
LAYOUTS = {
    r"timm dinov3.*": "timm DINOv3",
    r"timm.*": "timm ViT",
    r"transformers dinov2 registers.*": "Hugging Face DINOv2 with registers",
    r"transformers dinov2.*": "Hugging Face DINOv2",
    r"transformers dinov3.*": "Hugging Face DINOv3",
    r"facebook dinov2 registers": "DINOv2 with registers",
    r"facebook dinov2.*": "DINOv2",
    r"facebook dinov3.*": "DINOv3",
}


def layout_name(family):
    return next(name for pattern, name in LAYOUTS.items() if re.fullmatch(pattern, family))


def tensors_of(family):
    return {name: torch.from_numpy(np.array(value)) for name, value in weights_of(FAMILIES[family]["tensors"]).items()}


def saved(path, state):
    torch.save(state, path)
    return path


def assert_computes(encoder, family, tile):
    with torch.inference_mode():
        maps = encoder(torch.from_numpy(image_of(tile)))
    for block, expected in zip(BLOCKS, FAMILIES[family]["features"][str(tile)], strict=True):
        np.testing.assert_allclose(samples(maps[block].numpy()), expected, atol=1e-4)


def test_all_families_are_recorded():
    assert {layout_name(family) for family in FAMILIES} == set(LAYOUTS.values())
    assert len(CASES) == 3 * len(FAMILIES)


@pytest.mark.parametrize(("family", "tile"), CASES, ids=str)
def test_features_are_those_of_the_project(tmp_path, family, tile):
    encoder, report = load_encoder(write_encoder(tmp_path, family), tile=tile)
    assert report.layout == layout_name(family)
    assert_computes(encoder, family, tile)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_what_the_tensors_and_the_file_show(tmp_path, family):
    path = write_encoder(tmp_path, family)
    _, report = load_encoder(path)
    config = report.config
    rotary, registers = "dinov3" in family, re.search("dinov3|reg", family)
    assert (config.rotary_base, config.registers) == (100.0 if rotary else 0, 4 if registers else 0)
    assert config.mlp == ("swiglu" if re.search("giant|plus|swiglu", family) else "gelu")
    assert config.query_key_norm == ("layer" if "norm" in family else "none")
    assert config.class_token == ("gap" not in family)
    assert (config.heads, config.depth, config.embed_dim) == (2, 4, 128)
    assert config.layer_norm_eps == (1e-5 if rotary else 1e-6)
    said, stated = " ".join(report.notes), FAMILIES[family]["config"] is not None
    # Periods and the norms of queries show how wide heads are; config.json says how many there are.
    assert ("2 attention heads assumed" in said) == (not stated and not re.search("facebook dinov3|qk norm", family))
    assert ("LayerNorm eps" in said) == (not stated)
    assert ("base 100 assumed" in said) == (rotary and family.startswith("timm"))
    assert config.tile == (1024 if rotary and not stated else 112 if config.patch == 14 else 128)
    assert ("1024 px unless others are asked for" in said) == (config.tile == 1024)
    assert "input normalisation assumed" in said
    dropped = {part.what: part.tensors for part in report.dropped}
    assert ("final norm, after the last block" in dropped) == (family != "timm vit gap")  # which norms the mean alone
    assert ("token of masked patches, used only in training" in dropped) == (not family.startswith("timm"))


@pytest.mark.parametrize(
    "family", ["timm dinov3 plus", "transformers dinov2 registers", "facebook dinov2 giant", "timm qk norm"]
)
def test_an_encoder_saved_here_is_read_as_it_was(tmp_path, family):
    encoder, report = load_encoder(write_encoder(tmp_path, family))
    save_checkpoint(encoder, tmp_path / "own.pt")
    again, own = load_encoder(tmp_path / "own.pt")
    assert own.config == report.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())


# --- wrappers -------------------------------------------------------------------------------------

WRAPPED = {
    "a classifier of transformers": (
        "transformers dinov2",
        lambda s: {f"dinov2.{k}": v for k, v in s.items()} | {"classifier.weight": torch.ones(3, 256)},
    ),
    "a wrapper around a backbone": (
        "transformers dinov3, names of 5.x",
        lambda s: {"state_dict": {f"net.backbone.{k}": v for k, v in s.items()}},
    ),
    "a model": ("transformers dinov3", lambda s: {f"model.{k}": v for k, v in s.items()}),
    "the teacher of a training": (
        "facebook dinov2 sharded",
        lambda s: {
            "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"dino_head.mlp.0.weight": torch.ones(8, 128)}
        },
    ),
    "DataParallel": ("facebook dinov3", lambda s: {f"module.{k}": v for k, v in s.items()}),
    "features of timm": ("timm reg4 dinov2", lambda s: {f"model.{k}": v for k, v in s.items()}),
    "half precision": ("facebook dinov2 registers", lambda s: {k: v.half() for k, v in s.items()}),
}


@pytest.mark.parametrize(("family", "wrap"), WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_taken_off(tmp_path, family, wrap):
    _, report = load_encoder(saved(tmp_path / "x.pth", wrap(tensors_of(family))))
    assert report.layout == layout_name(family)
    assert report.config.depth == 4


def test_a_masked_bias_is_multiplied_by_its_mask(tmp_path):
    state = tensors_of("facebook dinov3")
    encoder, _ = load_encoder(saved(tmp_path / "x.pth", state), tile=128)
    assert state["blocks.2.attn.qkv.bias"][128:256].abs().min() > 0
    assert (encoder.blocks[2].attn.qkv.bias[128:256] == 0).all()
    state["blocks.2.attn.qkv.bias_mask"] = torch.full((384,), torch.nan)  # as its constructor leaves it
    assert "bias_mask" in loading_refused(load_encoder, saved(tmp_path / "x.pth", state)).message


# --- rotary positions -----------------------------------------------------------------------------


def with_periods(tmp_path, periods):
    return saved(tmp_path / "x.pth", {**tensors_of("facebook dinov3"), "rope_embed.periods": periods})


@pytest.mark.parametrize(("base", "dtype"), [(100, torch.bfloat16), (100, torch.float32), (123.456, torch.float32)])
def test_the_base_of_rotary_positions_is_that_of_the_stored_periods(tmp_path, base, dtype):
    periods = (base ** (torch.arange(16) / 16)).to(dtype)
    encoder, report = load_encoder(with_periods(tmp_path, periods), tile=128)
    assert report.config.rotary_base == pytest.approx(base, rel=1e-5)
    assert any("stored in bfloat16; base 100" in note for note in report.notes) == (dtype == torch.bfloat16)
    if base == 100:
        assert_computes(encoder, "facebook dinov3", 128)


@pytest.mark.parametrize(
    "periods", [torch.logspace(-1, 1, 16), torch.linspace(1, 90, 16), -torch.ones(16), torch.zeros(16)]
)
def test_other_periods_are_refused_by_name(tmp_path, periods):
    error = loading_refused(load_encoder, with_periods(tmp_path, periods))
    assert "rope_embed.periods are no powers b^(i/16)" in error.message


@pytest.mark.parametrize("count", [0, 5])
def test_periods_say_how_wide_heads_are(tmp_path, count):
    path = with_periods(tmp_path, torch.ones(count))
    assert f"heads {4 * count} wide" in loading_refused(load_encoder, path).message
    error = loading_refused(load_encoder, saved(tmp_path / "x.pth", tensors_of("facebook dinov3")), heads=4)
    assert "2 attention heads, as its tensors show, not 4" in error.message


def test_positions_of_registers_go_to_the_registers():
    state = {"encoder." + name: tensor for name, tensor in tensors_of("timm reg4").items() if name == "pos_embed"}
    positions = state["encoder.pos_embed"]
    state |= {"encoder.cls_token": torch.zeros(1, 1, 128), "encoder.registers": torch.ones(1, 4, 128)}
    state |= {"encoder.patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}
    for block in range(4):
        state |= {f"encoder.blocks.{block}.mlp.fc{n}.weight": torch.zeros(128, 128) for n in (1, 2)}
    assert inferred_config(state, DINOV3, {"rotary_base": 50.0}, []).registers == 4
    torch.testing.assert_close(state["encoder.registers"], 1 + positions[:, 1:5])
    torch.testing.assert_close(state["encoder.pos_embed"], torch.cat([positions[:, :1], positions[:, 5:]], dim=1))


# --- what lies beside the weights -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_is_as_good_as_its_file(tmp_path, name):
    folder = write_encoder(tmp_path / "hub", "transformers dinov3")
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(tensors_of("transformers dinov3"), folder / name)
    _, report = load_encoder(folder)
    assert report.path == folder / name
    assert load_encoder(folder / name)[1] == report
    assert any(
        "config.json beside the weights gives heads, layer_norm_eps, rotary_base, tile" in n for n in report.notes
    )


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "without model.safetensors or pytorch_model.bin" in loading_refused(load_encoder, tmp_path).message
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "one part of a checkpoint in several files" in loading_refused(load_encoder, tmp_path).message


PREPROCESSORS = {
    "DINOv3 of satellites": (
        {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143], "rescale_factor": 0.00392156862745098},
        (109.65, 104.805, 75.48),
        (54.315, 39.78, 36.465),
    ),
    "without rescaling": (
        {"image_mean": [120, 110, 100], "image_std": [50, 60, 70], "do_rescale": False}, (120, 110, 100), (50, 60, 70),
    ),
    "without normalisation": ({"do_normalize": False}, (0, 0, 0), (255, 255, 255)),
}  # fmt: skip


@pytest.mark.parametrize(("document", "mean", "std"), PREPROCESSORS.values(), ids=PREPROCESSORS)
@pytest.mark.parametrize("family", ["transformers dinov3", "facebook dinov3"])
def test_a_preprocessor_config_gives_mean_and_deviation(tmp_path, family, document, mean, std):
    path = write_encoder(tmp_path, family)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(document))
    encoder, report = load_encoder(path)
    assert report.config.pixel_mean == pytest.approx(mean)
    assert report.config.pixel_std == pytest.approx(std)
    assert encoder.mean.flatten().tolist() == pytest.approx(mean)
    assert not any("normalisation assumed" in note for note in report.notes)


def timm_config(path, **changes):
    document = {
        "architecture": "vit_large_patch16_dinov3", "num_classes": 0, "model_args": {},
        "pretrained_cfg": {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143], "input_size": [3, 256, 256]},
    }  # fmt: skip
    path.with_name("config.json").write_text(json.dumps({**document, **changes}))


def test_the_config_of_timm_is_read(tmp_path):
    path = write_encoder(tmp_path, "timm dinov3")
    timm_config(path, model_args={"num_heads": 4})
    _, report = load_encoder(path)
    assert report.config.pixel_mean == (109.65, 104.805, 75.48)
    assert (report.config.heads, report.config.tile) == (4, 256)


def test_another_rotary_network_of_timm_is_refused_by_its_config(tmp_path):
    path = write_encoder(tmp_path, "timm vit")
    timm_config(path, architecture="vit_small_patch16_rope_ape_224")
    assert "vit_small_patch16_rope_ape_224" in loading_refused(load_encoder, path).message


def test_a_config_of_something_else_is_not_read(tmp_path):
    path = write_encoder(tmp_path, "timm vit")
    (tmp_path / "config.json").write_text('{"learning_rate": 0.1}')
    assert load_encoder(path)[1].config.pixel_mean == PIXEL_MEAN
    path = write_encoder(tmp_path, "facebook dinov2")
    (tmp_path / "config.json").write_text("no JSON")
    load_encoder(path)


DAMAGED = {
    "truncated": (lambda text: text[: len(text) // 2], "config.json is damaged"),
    "empty": (lambda text: "", "config.json is damaged"),
    "a list": (lambda text: "[1, 2]", "is no JSON object"),
    "deep": (lambda text: "[" * 100_000, "config.json is damaged"),
    "large": (lambda text: text + " " * (2 << 20), "is no JSON object"),
    "bytes": (lambda text: "\udcff", "config.json is damaged"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_refused(tmp_path, change, words):
    folder = write_encoder(tmp_path, "transformers dinov3")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(change(text), errors="surrogateescape")
    error = loading_refused(load_encoder, folder)
    assert words in error.message
    assert "get it again" in error.hint


CONTRADICTIONS = {
    "depth": ({"num_hidden_layers": 12}, "num_hidden_layers makes depth 12, the weights have 4"),
    "width": ({"hidden_size": 384}, "hidden_size makes embed_dim 384, the weights have 128"),
    "registers": ({"num_register_tokens": 0}, "num_register_tokens makes registers 0"),
    "patch": ({"patch_size": 14}, "patch_size makes patch 14"),
    "MLP": ({"intermediate_size": 512}, "intermediate_size makes mlp_dim 512"),
    "gate": ({"use_gated_mlp": True, "hidden_act": "silu"}, "use_gated_mlp makes mlp swiglu"),
    "type": ({"model_type": "dinov2"}, "'dinov3_vit'"),
    "no type": ({"model_type": None}, "model_type is null"),
    "another activation": ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    "text": ({"num_attention_heads": "2"}, 'num_attention_heads is "2"'),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "uneven heads": ({"num_attention_heads": 3}, "heads 3; config.json beside the weights gives heads,"),
    "flag": ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    "not a number": ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    "a base of nothing": ({"rope_theta": -1}, "rotary_base must be"),
    "an oblong tile": ({"image_size": [224, 448]}, "image_size is [224, 448]"),
}


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, changes, words):
    error = loading_refused(load_encoder, write_encoder(tmp_path, "transformers dinov3", **changes))
    assert words in error.message


def test_the_tile_of_learned_positions_is_compared(tmp_path):
    error = loading_refused(load_encoder, write_encoder(tmp_path, "transformers dinov2", image_size=518))
    assert "image_size makes tile 518, the weights have 112" in error.message


def test_what_a_config_lacks_is_assumed_and_said(tmp_path):
    changes = dict.fromkeys(("num_attention_heads", "layer_norm_eps", "rope_theta", "image_size"))
    _, report = load_encoder(write_encoder(tmp_path, "transformers dinov3", **changes))
    assert report.config.tile == NetworkConfig.tile
    for words in ("2 attention heads assumed", "eps 1e-05 assumed", "base 100 assumed", "1024 px unless"):
        assert any(words in note for note in report.notes), words


def test_heads_that_a_config_states_are_not_overruled(tmp_path):
    folder = write_encoder(tmp_path, "transformers dinov3")
    assert "states 2 attention heads itself, not 4" in loading_refused(load_encoder, folder, heads=4).message
    assert load_encoder(folder, heads=2)[1].config.heads == 2


NORMS = {
    "a model": (["Dinov2Model"], "dinov2", True, "none"),
    "a backbone": (["Dinov2Backbone"], "dinov2", True, "taps"),
    "a backbone without norm": (["Dinov2Backbone"], "dinov2", False, "none"),
    "DINOv3's": (["DINOv3ViTBackbone"], "dinov3", True, "taps"),
    "DINOv3's, which norms its last map": (["DINOv3ViTBackbone"], "dinov3", False, "last"),
}


@pytest.mark.parametrize(("classes", "family", "normed", "expected"), NORMS.values(), ids=NORMS)
def test_backbones_have_their_final_norm_and_taps(tmp_path, classes, family, normed, expected):
    folder = write_encoder(
        tmp_path,
        f"transformers {family}",
        architectures=classes,
        apply_layernorm=normed,
        out_features=["stage2", "stage4"],
    )
    encoder, report = load_encoder(folder)
    assert report.config.final_norm == expected
    assert report.config.taps == ((1, 3) if classes[0].endswith("Backbone") else (0, 1, 2, 3))
    assert hasattr(encoder, "norm") == (expected != "none")
    assert any(part.what.startswith("final norm") for part in report.dropped) == (expected == "none")


@pytest.mark.parametrize("stages", [["stem", "stage4"], ["stage0"], [5], "stage4"], ids=str)
def test_taps_that_are_no_blocks_are_refused(tmp_path, stages):
    folder = write_encoder(tmp_path, "transformers dinov2", architectures=["Dinov2Backbone"], out_features=stages)
    assert "out_features" in loading_refused(load_encoder, folder).message


# --- tensors that are missing, wrong or of something else -----------------------------------------

MISSING = {
    "embeddings.cls_token": "",
    "embeddings.patch_embeddings.weight": "encoder.patch_embed.proj.weight",
    "layer.2.attention.k_proj.weight": "encoder.blocks.2.attn.k.weight, which other blocks have",
    "layer.1.attention.q_proj.bias": "encoder.blocks.1.attn.q.bias, which other blocks have",
    "layer.1.attention.o_proj.bias": "encoder.blocks.1.attn.proj.bias, which other blocks have",
    "layer.3.mlp.up_proj.weight": "encoder.blocks.3.mlp.value.weight, which other blocks have",
    "layer.0.mlp.gate_proj.bias": "encoder.blocks.0.mlp.gate.bias, which other blocks have",
    "layer.0.mlp.down_proj.weight": "encoder.blocks.0.mlp.fc2.weight",
    "layer.2.norm2.weight": "missing: blocks.2.norm2.weight",
    "embeddings.register_tokens": "num_register_tokens",
}


@pytest.mark.parametrize(("name", "words"), MISSING.items(), ids=MISSING)
def test_a_missing_tensor_is_named(tmp_path, name, words):
    folder = write_encoder(tmp_path, "transformers dinov3 plus")
    state = safetensors_torch.load_file(folder / "model.safetensors")
    del state[name]
    safetensors_torch.save_file(state, folder / "model.safetensors")
    if name == "embeddings.cls_token":
        assert not load_encoder(folder)[1].config.class_token
    else:
        assert words in loading_refused(load_encoder, folder).message


def test_a_missing_layer_of_all_blocks_is_named(tmp_path):
    state = {name: value for name, value in tensors_of("transformers dinov2").items() if ".attention.key." not in name}
    error = loading_refused(load_encoder, saved(tmp_path / "x.pth", state))
    assert "lacks attn.k.weight of all blocks, though it has attn.q.weight" in error.message


WRONG = {
    "a key of something else": ("facebook dinov3", {"blocks.0.attn.gate.weight": torch.ones(2, 2)}, "attn.gate"),
    "windows": ("transformers dinov2", {"encoder.layer.0.window.bias": torch.ones(2)}, "encoder.layer.0.window.bias"),
    "a neck": ("transformers dinov2", {"neck.convs.0.weight": torch.ones(2, 2, 3, 3)}, "neck.convs.0.weight"),
    "EVA-02's norm": ("timm dinov3 plus", {"blocks.1.mlp.norm.weight": torch.ones(344)}, "blocks.1.mlp.norm.weight"),
    "a rotation that is learned": ("timm vit", {"rope.freqs": torch.ones(2, 4, 64)}, "rope.freqs"),
    "a shape": ("transformers dinov3", {"layer.1.attention.k_proj.weight": torch.ones(64, 128)}, "(64, 128)"),
    "a bias's shape": ("transformers dinov3", {"layer.1.attention.q_proj.bias": torch.ones(64)}, "attn.q.bias has 64"),
    "a mask's shape": ("facebook dinov3", {"blocks.0.attn.qkv.bias_mask": torch.ones(3)}, "bias_mask is (3,)"),
    "two of one": ("facebook dinov2 sharded", {"blocks.0.norm1.weight": torch.ones(128)}, "two tensors"),
    "channels": (
        "transformers dinov2",
        {"embeddings.patch_embeddings.projection.weight": torch.ones(128, 4, 14, 14)},
        "RGB",
    ),
}


@pytest.mark.parametrize(("family", "changes", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_tensor_is_named(tmp_path, family, changes, words):
    error = loading_refused(load_encoder, saved(tmp_path / "x.pth", {**tensors_of(family), **changes}))
    assert words in error.message


OTHERS = {
    "EVA-02": (lambda s: {**s, "pos_embed": torch.ones(1, 65, 128)}, "timm dinov3 qkvb", "q_bias"),
    "timm's other rotary networks": (
        lambda s: {k: v for k, v in s.items() if k not in ("pos_embed", "reg_token")}, "timm reg4", "pos_embed",
    ),
    "a ViT of transformers": (
        lambda s: {k: v for k, v in s.items() if "layer_scale" not in k}, "transformers dinov2", "Hugging Face other",
    ),
    "ConvNeXt": (
        lambda s: {f"stages.{i}.downsample_layers.0.weight": torch.ones(2, 3, 4, 4) for i in (0, 1)},
        "timm vit",
        "such as ConvNeXt",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "family", "words"), OTHERS.values(), ids=OTHERS)
def test_other_networks_are_refused_by_name(tmp_path, change, family, words):
    error = loading_refused(load_encoder, saved(tmp_path / "x.pth", change(tensors_of(family))))
    assert words in error.message


# --- the projects themselves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers():
    peer_encoders = pytest.importorskip("peer_encoders")
    try:
        return peer_encoders, *peer_encoders.import_peers()
    except ImportError as error:
        pytest.skip(f"{error}; make test-encoders installs them")


def test_the_record_is_what_timm_and_transformers_compute_today(peers):
    peer_encoders, timm, hf = peers
    for name, today in peer_encoders.all_families(timm, hf).items():
        recorded = FAMILIES[name]
        assert today["tensors"] == recorded["tensors"], name
        for tile, maps in recorded["features"].items():
            np.testing.assert_allclose(today["features"][tile], maps, atol=1e-4, err_msg=f"{name}, {tile} px")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("facebook dinov2", "vit_small_patch14_dinov2"),
        ("facebook dinov2 registers", "vit_small_patch14_reg4_dinov2"),
        ("facebook dinov3", "vit_small_patch16_dinov3_qkvb"),
    ],
)
def test_timm_reads_the_original_files_as_we_do(peers, family, name):
    peer_encoders, timm, _ = peers
    patch = 14 if "14" in name else 16
    network = timm.create_model(name, pretrained=False, img_size=8 * patch, **peer_encoders.SMALL).eval()
    module = timm.models.vision_transformer if patch == 14 else timm.models.eva
    network.load_state_dict(module.checkpoint_filter_fn(tensors_of(family), network))
    maps = peer_encoders.features(network, 8 * patch, patch)
    for block, expected in zip(BLOCKS, FAMILIES[family]["features"][str(8 * patch)], strict=True):
        np.testing.assert_allclose(samples(maps[block]), expected, atol=1e-4)
