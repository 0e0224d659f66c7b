"""Heads of other projects compute here what they compute there, and those that are no UPerNet are refused by name.

What they compute was recorded (``helpers/peer_heads.py``), so that no project's package is needed; where they are
installed, the record is compared with them (``make test-encoders``).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from commands import loading_refused, run  # noqa: E402
from encoder_files import image_of, samples  # noqa: E402
from head_files import NETWORKS, TILE, tensors_of, write_network  # noqa: E402

from cdkd_edge.core.errors import EncoderOnlyError  # noqa: E402
from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint  # noqa: E402
from cdkd_edge.training.recipe import NetworkSettings, starting_network  # noqa: E402

pytestmark = pytest.mark.needs_torch

UNSAID = {"smp": "1,2,4,5", "smp, no norm": "1,2,4,5"}  # taps that nothing in such a file says
TERRATORCH, TERRATORCH_SMP, SMP = "terratorch, selected", "terratorch, smp", "smp"
TERRATORCH_NECK, TERRATORCH_NECK_NOT_ALIGNED = "terratorch, neck", "terratorch, neck, corners not aligned"
MMSEG_NECK = "openmmlab, neck"
MMSEG, MMSEG_ALIGNED = "openmmlab, four taps", "openmmlab, three taps, corners aligned, final norm"
HUGGING_FACE = "transformers, three taps, DINOv2 with registers"


def logits_of(network):
    with torch.inference_mode():
        return samples(network.upsample(network(torch.from_numpy(image_of(TILE)))).numpy())


def assert_computes(network, name):
    expected = np.array(NETWORKS[name]["logits"])
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits_of(network), expected, atol=1e-4)


def changed(tmp_path, name, change, **document):
    """The file of a network whose tensors were changed, without its configuration unless ``document`` has one."""
    state = {key.removeprefix("model."): tensor for key, tensor in tensors_of(name).items()}
    torch.save({"state_dict": change(state), **document}, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def hyper(name, **changes):
    """What Lightning writes beside a network, with other arguments of the model."""
    said = NETWORKS[name]["document"]["hyper_parameters"]
    return {"hyper_parameters": {**said, "model_args": {**said["model_args"], **changes}}}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_project(tmp_path, name):
    network, _ = load_checkpoint(write_network(tmp_path, name), tile=TILE, taps=UNSAID.get(name))
    assert_computes(network, name)


SAID = {
    HUGGING_FACE: ((1, 3, 5), (1, 2, 4), "none", "taps", ("water", "field", "road")),
    "transformers, DINOv3": ((0, 1, 3, 5), (1, 2, 3, 6), "none", "taps", None),
    "transformers, two taps without norm, DINOv2": ((2, 5), (1, 2, 3, 6), "none", "none", None),
    MMSEG: ((2, 3, 4, 5), (1, 2, 3, 6), "none", "none", ("water", "field", "road")),
    MMSEG_ALIGNED: ((0, 3, 5), (1, 3), "all", "last", ("water", "field", "road")),
    TERRATORCH: ((0, 2, 5), (1, 2), "pools", "none", ("a", "b", "c")),
    "terratorch, timm's last three blocks": ((3, 4, 5), (1, 2, 3, 6), "pools", "none", ("a", "b", "c")),
    "terratorch, in kwargs, corners not aligned": ((1, 3, 4), (1, 2, 4, 6), "none", "none", ("a", "b", "c")),
    "terratorch, DINOv3 of facebookresearch": ((1, 3), (1, 2, 3, 6), "pools", "taps", ("a", "b", "c")),
    TERRATORCH_SMP: ((2, 4, 5), (1, 2, 3, 6), "none", "taps", ("a", "b", "c")),
    MMSEG_NECK: ((1, 2, 4, 5), (1, 2, 3), "none", "none", ("water", "field", "road")),
    TERRATORCH_NECK: ((1, 2, 4, 5), (1, 2, 3), "pools", "none", ("a", "b", "c")),
    TERRATORCH_NECK_NOT_ALIGNED: ((0, 2, 4, 5), (1, 3), "none", "none", ("a", "b", "c")),
}


@pytest.mark.parametrize(
    ("name", "channels"), [(MMSEG_NECK, (128, 128, 128)), (TERRATORCH_NECK, (64, 32, 64)), (TERRATORCH, ())]
)
def test_a_neck_of_transposed_convolutions_is_part_of_the_network(tmp_path, name, channels):
    assert load_checkpoint(write_network(tmp_path, name))[1].config.neck == channels


def test_finetune_keeps_a_neck_and_makes_heads_without(tmp_path):
    path, settings = write_network(tmp_path, TERRATORCH_NECK), NetworkSettings(heads=2)
    schema = load_checkpoint(path)[1].schema
    assert starting_network(path, schema, settings, seed=0).network.config.neck
    settings = dataclasses.replace(settings, new_head=True)
    assert starting_network(path, schema, settings, seed=0).network.config.neck == ()


def test_a_neck_in_the_decoder_is_the_same(tmp_path):
    """TerraTorch before 1.0: ``scale_modules`` of ``UperNetDecoder``."""

    def moved(state):
        return {name.replace("neck.0.", "decoder."): tensor for name, tensor in state.items()}

    path = changed(tmp_path, TERRATORCH_NECK, moved, **hyper(TERRATORCH_NECK, necks=[]))
    assert_computes(load_checkpoint(path)[0], TERRATORCH_NECK)


@pytest.mark.parametrize("name", SAID)
def test_what_no_tensor_shows_is_what_the_file_says(tmp_path, name):
    config, schema = (lambda r: (r.config, r.schema))(load_checkpoint(write_network(tmp_path, name))[1])
    found = (config.taps, config.pool_scales, config.align_corners, config.final_norm)
    assert (*found, schema and schema.class_names) == SAID[name]


@pytest.mark.parametrize("name", [HUGGING_FACE, MMSEG_ALIGNED, TERRATORCH, TERRATORCH_SMP, SMP, TERRATORCH_NECK])
def test_a_network_goes_on_as_a_checkpoint_of_ours(tmp_path, name):
    network, report = load_checkpoint(write_network(tmp_path, name), tile=TILE, taps=UNSAID.get(name))
    save_checkpoint(network, tmp_path / "own.pt", schema=report.schema)
    again, own = load_checkpoint(tmp_path / "own.pt")
    assert own.config == report.config
    assert own.notes == ()
    assert_computes(again, name)


@pytest.mark.parametrize("name", [TERRATORCH, MMSEG_ALIGNED, HUGGING_FACE, TERRATORCH_NECK, MMSEG_NECK])
def test_its_graph_and_labels_are_its_own(tmp_path, name):
    """The export compares logits and labels with the network."""
    source = write_network(tmp_path, name)
    result = run("export", source, "--tile", TILE, "-o", tmp_path / "graph.onnx", "--json")
    assert result.exit_code == 0, result.stderr
    check = json.loads(result.stdout)["manifest"]["check"]
    assert check["label_agreement"] >= 0.9999
    assert check["max_logit_error"] < 1e-4


# --- what is not said -----------------------------------------------------------------------------


def test_taps_that_nothing_says_are_assumed_and_said_or_given(tmp_path):
    path = changed(tmp_path, "terratorch, timm's last three blocks", dict)
    network, report = load_checkpoint(path, tile=TILE)
    assert report.config.taps == (1, 3, 5)
    assert any("fed by the outputs of blocks 1, 3, 5 assumed" in note for note in report.notes)
    assert np.abs(logits_of(network) - NETWORKS["terratorch, timm's last three blocks"]["logits"]).max() > 0.01
    network, report = load_checkpoint(path, tile=TILE, taps="3,4,5")
    assert not any("fed by" in note for note in report.notes)
    assert_computes(network, "terratorch, timm's last three blocks")


def test_sizes_that_nothing_says_are_asked_for(tmp_path):
    path = changed(tmp_path, TERRATORCH, dict)
    error = loading_refused(load_checkpoint, path)
    assert "pools to 2 sizes, and nothing says to which" in error.message
    assert "--pool-scales" in error.hint
    network, _ = load_checkpoint(path, tile=TILE, pool_scales="1,2", taps="0, 2, 5")
    assert_computes(network, TERRATORCH)


GIVEN = {
    "too few taps": ({"taps": "2,5"}, "fed by 3 blocks, as its tensors show, not by 2"),
    "a block that is not there": ({"taps": "0,2,6"}, "names a block that the network lacks"),
    "not in order": ({"taps": "5,2,0"}, "ascending"),
    "text": ({"taps": "all"}, "--taps 'all' is no list of whole numbers"),
    "negative": ({"taps": "0,2,-1"}, "no list of whole numbers"),
    "empty": ({"pool_scales": ""}, "--pool-scales '' is no list"),
    "too many sizes": ({"pool_scales": "1,2,3"}, "pools to 2 sizes, as its tensors show, not to 3"),
    "a size of nothing": ({"pool_scales": "0,2"}, "pool_scales"),
}


@pytest.mark.parametrize(("given", "words"), GIVEN.values(), ids=GIVEN)
def test_options_that_do_not_fit_are_refused(tmp_path, given, words):
    assert words in loading_refused(load_checkpoint, write_network(tmp_path, TERRATORCH), **given).message


def test_an_option_wins_over_the_file_and_that_is_said(tmp_path):
    _, report = load_checkpoint(write_network(tmp_path, TERRATORCH), taps="1,2,3")
    assert report.config.taps == (1, 2, 3)
    assert any("tapped 1,2,3 taken, as asked; the file says 0,2,5" in note for note in report.notes)


def test_our_own_checkpoint_is_not_told_otherwise(tmp_path):
    network, _ = load_checkpoint(write_network(tmp_path, TERRATORCH), tile=TILE)
    save_checkpoint(network, tmp_path / "own.pt")
    error = loading_refused(load_checkpoint, tmp_path / "own.pt", taps="1,2,3")
    assert "states 0,2,5 as the blocks that feed the head itself, not 1,2,3" in error.message


def test_our_own_checkpoint_has_no_head_of_others(tmp_path):
    save_checkpoint(load_checkpoint(write_network(tmp_path, TERRATORCH))[0], tmp_path / "own.pt")
    document = torch.load(tmp_path / "own.pt", weights_only=True)
    document["state_dict"]["decoder.gate.weight"] = torch.ones(2)
    torch.save(document, tmp_path / "own.pt")
    assert "unexpected tensors: decoder.gate.weight" in loading_refused(load_encoder, tmp_path / "own.pt").message


def test_convert_writes_what_a_file_does_not_say(tmp_path):
    source = write_network(tmp_path, SMP)
    answer = run("convert", source, "--taps", UNSAID[SMP], "--tile", TILE, "-o", tmp_path / "own.pt", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert_computes(load_checkpoint(tmp_path / "own.pt")[0], SMP)


def test_info_names_encoder_and_head(tmp_path):
    answer = json.loads(run("info", write_network(tmp_path, TERRATORCH), "--json").stdout)
    assert answer["layout"] == "timm ViT, TerraTorch UperNetDecoder"
    assert answer["config"]["tapped"] == [0, 2, 5]
    assert "3 taps, pooled to 1, 2 cells, corners aligned (pools)" in run("info", tmp_path / "network.ckpt").stdout


# --- other heads ----------------------------------------------------------------------------------


def without_head(state):
    return {key: value for key, value in state.items() if key.startswith(("encoder.", "backbone."))}


def replaced(*keys):
    return lambda state: {**without_head(state), **{key: torch.ones(2, 2) for key in keys}}


def beside(*keys):
    return lambda state: {**state, **{key: torch.ones(2, 2) for key in keys}}


OTHERS = {
    "MultiLevelNeck": (MMSEG, beside("neck.lateral_convs.0.conv.weight", "neck.convs.0.conv.weight")),
    "a neck before TerraTorch with segmentation-models-pytorch's UPerNet": (
        TERRATORCH_SMP,
        beside("neck.1.fpn1.0.weight"),
    ),
    "FeaturePyramidNetworkNeck": (TERRATORCH, beside("neck.1.fpn.inner_blocks.0.0.weight")),
    "a neck between encoder and head": (TERRATORCH, beside("neck.0.bottleneck.weight")),
    "channel_list": (TERRATORCH, beside("head.head.0.0.0.weight")),
    "another norm than BatchNorm": (MMSEG, beside("decode_head.bottleneck.gn.weight")),
    "OpenMMLab's decoder in TerraTorch": (TERRATORCH, replaced("decoder.decoder.fpn_bottleneck.conv.weight")),
    "SegFormer": (MMSEG, replaced("decode_head.convs.0.conv.weight", "decode_head.fusion_conv.conv.weight")),
    "Segmenter": (MMSEG, replaced("decode_head.cls_emb", "decode_head.layers.0.ln1.weight")),
    "DPT": (MMSEG, replaced("decode_head.reassemble_blocks.projects.0.conv.weight", "decode_head.conv_seg.weight")),
    "a DPT head": (HUGGING_FACE, replaced("neck.reassemble_stage.layers.0.projection.weight", "head.head.0.weight")),
    "SETR": (MMSEG, replaced("decode_head.up_convs.0.0.conv.weight", "decode_head.norm.weight")),
    "DeepLab (ASPP)": (MMSEG, replaced("decode_head.aspp_modules.0.conv.weight")),
    "Mask2Former": (MMSEG, replaced("decode_head.pixel_decoder.input_convs.0.conv.weight")),
    "PSPNet": (MMSEG, replaced("decode_head.psp_modules.0.1.conv.weight", "decode_head.bottleneck.conv.weight")),
    "(FCN)": (MMSEG, replaced("decode_head.convs.0.conv.weight", "decode_head.conv_seg.weight")),
    "fully convolutional (FCN)": (TERRATORCH, replaced("decoder.convs.0.0.weight", "head.head.2.weight")),
    "a linear head (decode_head": (MMSEG, replaced("decode_head.bn.weight", "decode_head.conv_seg.weight")),
    "a linear head (decoder.conv": (TERRATORCH, replaced("decoder.conv.weight")),
    "a linear head (head.head": (TERRATORCH, replaced("head.head.2.weight", "head.head.2.bias")),
    "U-Net": (TERRATORCH, replaced("decoder.decoder.blocks.0.conv1.0.weight", "head.head.2.weight")),
    "feature pyramid (FPN)": (
        SMP,
        replaced("decoder.seg_blocks.0.block.0.block.0.weight", "segmentation_head.0.weight"),
    ),
    "a SegFormer head": (SMP, replaced("decoder.mlp_stage.0.linear.weight", "decoder.fuse_stage.0.weight")),
    "a head of another kind": (MMSEG, replaced("decode_head.something.weight")),
}


@pytest.mark.parametrize(("words", "name", "change"), [(w, *case) for w, case in OTHERS.items()], ids=OTHERS)
def test_another_head_is_refused_by_name_and_its_encoder_is_read(tmp_path, words, name, change):
    path = changed(tmp_path, name, change)
    error = loading_refused(load_checkpoint, path)
    assert isinstance(error, EncoderOnlyError)
    assert words in error.message
    assert re.search(r"\((neck|decode_head|decoder|head)\.[\w.]+\) instead of a UPerNet", error.message)
    assert "finetune" in error.hint
    encoder, report = load_encoder(path, tile=TILE)
    assert not report.has_head
    assert words in report.other_head
    whole = load_encoder(write_network(tmp_path, name), tile=TILE)[0] if name != HUGGING_FACE else None
    for key, tensor in encoder.state_dict().items() if whole else ():
        torch.testing.assert_close(whole.state_dict()[key], tensor)


@pytest.mark.parametrize("neck", ["InterpolateToPyramidal", "MaxpoolToPyramidal", None])
def test_a_neck_without_weights_is_known_by_the_configuration(tmp_path, neck):
    path = changed(tmp_path, TERRATORCH, dict, **hyper(TERRATORCH, necks=[{"name": neck}]))
    error = loading_refused(load_checkpoint, path)
    assert f"the neck {neck} of hyper_parameters instead of a UPerNet" in error.message
    _, report = load_encoder(path)
    assert report.config.taps == (0, 2, 3, 5)
    assert any(part.what.startswith("head behind the neck") for part in report.dropped)


@pytest.mark.parametrize("arguments", [{"backbone_return_cls_token": True}, {"backbone_return_cls_token": None}, None])
def test_maps_that_are_shifted_by_a_class_token_are_refused_by_name(tmp_path, arguments):
    """``DinoV3Wrapper`` puts the class token behind the patches; ``ReshapeTokensToImage`` takes the first one away."""
    name = "terratorch, DINOv3 of facebookresearch"
    document = {} if arguments is None else hyper(name, **arguments)
    path = changed(tmp_path, name, dict, **document)
    assert "backbone_return_cls_token is not false" in loading_refused(load_checkpoint, path).message
    load_encoder(path)


def test_several_frames_in_one_map_are_no_single_image(tmp_path):
    necks = [{"name": "ReshapeTokensToImage", "effective_time_dim": 3}]
    path = changed(tmp_path, TERRATORCH, dict, **hyper(TERRATORCH, necks=necks))
    assert "ReshapeTokensToImage" in loading_refused(load_checkpoint, path).message


def test_a_vit_adapter_is_refused_by_name(tmp_path):
    path = changed(tmp_path, MMSEG, beside("backbone.interactions.0.injector.gamma", "backbone.spm.fc1.weight"))
    assert "ViT-Adapter" in loading_refused(load_encoder, path).message


def test_an_encoder_without_its_head_is_read_under_any_prefix(tmp_path):
    path = changed(tmp_path, TERRATORCH, without_head)
    encoder, report = load_encoder(path, tile=TILE)
    assert (report.layout, report.other_head) == ("timm ViT", "")
    whole = load_encoder(write_network(tmp_path, TERRATORCH), tile=TILE)[0]
    torch.testing.assert_close(encoder.state_dict(), whole.state_dict())


# --- what is damaged or contradicts itself --------------------------------------------------------


def less(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def other(key, change):
    return lambda state: {**state, key: change(state[key])}


DAMAGED = {
    "no classifier": (TERRATORCH, less("head.head.2.weight"), "lacks head.classifier.weight"),
    "half a neck": (MMSEG_NECK, less("neck.upsample_4x.0.weight"), "lacks head.neck.first.weight"),
    "no convolution": (TERRATORCH, less("decoder.fpn_bottleneck.conv.weight"), "missing: head.fuse.conv.weight"),
    "a lateral less": (MMSEG, less("decode_head.lateral_convs.1.conv.weight"), "missing: head.laterals.1.conv.weight"),
    "another tensor": (TERRATORCH, beside("decoder.gate.weight"), "unexpected tensors: decoder.gate.weight"),
    "another width": (
        HUGGING_FACE,
        other("decode_head.lateral_convs.0.conv.weight", lambda w: w[:, :64]),
        "head.laterals.0.conv.weight is (16, 64, 1, 1)",
    ),
    "one output": (TERRATORCH, other("head.head.2.weight", lambda w: w[:1]), "one output, for two classes"),
    "a lateral that convolves": (
        MMSEG,
        other("decode_head.lateral_convs.0.conv.weight", lambda w: w.expand(-1, -1, 3, 3).clone()),
        "head.laterals.0.conv.weight is (16, 128, 3, 3) instead of (16, 128, 1, 1)",
    ),
    "a scale of nothing": (
        SMP,
        other("decoder.feature_norms.3.weight", lambda w: torch.zeros_like(w)),
        "scales a channel by almost zero",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_head_is_named(tmp_path, name, change, words):
    options = {"pool_scales": "1,2"} if name == TERRATORCH else {"pool_scales": "1,2,4"} if name == HUGGING_FACE else {}
    assert words in loading_refused(load_checkpoint, changed(tmp_path, name, change), **options).message


def test_norms_of_maps_with_another_epsilon_are_refused(tmp_path):
    error = loading_refused(load_checkpoint, write_network(tmp_path, SMP), layer_norm_eps=1e-5)
    assert "epsilon of 1e-06 and the encoder's 1e-05" in error.message
    assert load_encoder(write_network(tmp_path, SMP))[1].config.final_norm == "taps"


MODEL_ARGUMENTS = {
    "other taps": ({"backbone_out_indices": [0, 1, 2, 3, 5], "necks": []}, "fed by 3 blocks, as its tensors show, not"),
    "a map that is not there": ({"necks": [{"name": "SelectIndices", "indices": [0, 1, 7]}]}, "takes 0,1,7 of 4 maps"),
    "other sizes": ({"decoder_pool_scales": [1, 2, 3]}, "pools to 2 sizes, as its tensors show, not to 3"),
}


@pytest.mark.parametrize(("arguments", "words"), MODEL_ARGUMENTS.values(), ids=MODEL_ARGUMENTS)
def test_a_configuration_that_contradicts_the_weights_is_refused(tmp_path, arguments, words):
    path = changed(tmp_path, TERRATORCH, dict, **hyper(TERRATORCH, **arguments))
    assert words in loading_refused(load_checkpoint, path).message


ODD = {
    "text": {"hyper_parameters": "none"},
    "no arguments": {"hyper_parameters": {"lr": 0.1}},
    "other arguments": {"hyper_parameters": {"model_args": ["a"], "class_names": {"a": 1}}},
    "arguments of other kinds": hyper(
        TERRATORCH, necks="none", backbone_out_indices="all", decoder_pool_scales=[1.0, 2]
    ),
    "endless": {"hyper_parameters": {"model_args": {"necks": [[]] * 99}}},
}


@pytest.mark.parametrize("document", ODD.values(), ids=ODD)
def test_a_configuration_of_another_kind_says_nothing(tmp_path, document):
    path = changed(tmp_path, "terratorch, timm's last three blocks", dict, **document)
    if "endless" in str(document) or document is ODD["endless"]:
        assert "the neck None" in loading_refused(load_checkpoint, path).message
    else:
        assert load_checkpoint(path)[1].config.pool_scales == (1, 2, 3, 6)


def test_bands_and_auxiliary_heads_of_terratorch_are_not_read(tmp_path, monkeypatch):
    class HLSBands(enum.Enum):
        RED = "RED"

    class AuxiliaryHead:
        def __init__(self):
            self.name = "fcn"

    for where, kind in {"terratorch.datasets.utils": HLSBands, "terratorch.models.model": AuxiliaryHead}.items():
        kind.__module__, kind.__qualname__ = where, kind.__name__
        module = types.ModuleType(where)
        setattr(module, kind.__name__, kind)
        for name in ("terratorch", where.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, where, module)
    document = hyper(TERRATORCH, backbone_bands=[HLSBands.RED])
    document["hyper_parameters"]["aux_heads"] = [AuxiliaryHead()]
    path = changed(tmp_path, TERRATORCH, dict, **document)
    monkeypatch.undo()
    assert_computes(load_checkpoint(path, tile=TILE)[0], TERRATORCH)


def mmseg_text(**changes):
    text = NETWORKS[MMSEG]["document"]["meta"]["cfg"]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return {"meta": {"cfg": text}}


TEXTS = {
    "a class token that is not used": (mmseg_text(img_size="with_cls_token=False, img_size"), "with_cls_token=False"),
    "another activation": (mmseg_text(channels="act_cfg=dict(type='GELU'), channels"), "GELU instead of ReLU"),
}


@pytest.mark.parametrize(("document", "words"), TEXTS.values(), ids=TEXTS)
def test_a_configuration_of_openmmlab_that_we_do_not_have_is_refused(tmp_path, document, words):
    assert words in loading_refused(load_checkpoint, changed(tmp_path, MMSEG, dict, **document)).message


UNREAD = {
    "truncated": lambda text: text[: len(text) // 2],
    "deep": lambda text: "(" * 10_000,
    "long": lambda text: "a = 1\n" * 300_000,
    "not Python": lambda text: "\0 <html>",
    "code": lambda text: f"model = __import__('os').system('touch {{marker}}')\n{text}".replace(
        "model = dict", "x = dict"
    ),
    "other kinds": lambda text: "model = dict(backbone=3, decode_head=[1])",
    "other values": lambda text: (
        "model = dict(backbone=dict(out_indices=-1, norm_cfg=1), decode_head=dict(in_index=5))"
    ),
}


@pytest.mark.parametrize("change", UNREAD.values(), ids=UNREAD)
def test_a_text_that_is_no_configuration_says_nothing_and_is_not_run(tmp_path, change):
    text = change(NETWORKS[MMSEG]["document"]["meta"]["cfg"]).replace("{marker}", str(tmp_path / "ran"))
    _, report = load_checkpoint(changed(tmp_path, MMSEG, dict, meta={"cfg": text}))
    assert any("fed by the outputs of blocks 0, 2, 3, 5 assumed" in note for note in report.notes)
    assert not (tmp_path / "ran").exists()


LABELS = {
    "made up": ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, None),
    "named": ({"0": "a", "1": "b", "2": "c"}, ("a", "b", "c")),
    "another count": ({"0": "a", "1": "b"}, None),
    "a gap": ({"0": "a", "2": "b", "3": "c"}, None),
}


@pytest.mark.parametrize(("labels", "names"), LABELS.values(), ids=LABELS)
def test_class_names_of_transformers_are_used_where_they_fit(tmp_path, labels, names):
    _, report = load_checkpoint(write_network(tmp_path, HUGGING_FACE, id2label=labels))
    assert (report.schema and report.schema.class_names) == names


@pytest.mark.parametrize("changes", [{"backbone_config": None}, {"pool_scales": [1, "2"]}, {"id2label": 3}], ids=str)
def test_a_damaged_config_of_a_upernet_is_refused(tmp_path, changes):
    assert "config.json" in loading_refused(load_checkpoint, write_network(tmp_path, HUGGING_FACE, **changes)).message


# --- the projects themselves ----------------------------------------------------------------------


def test_the_record_is_what_the_projects_compute_today():
    peer_heads = pytest.importorskip("peer_heads")
    try:
        timm, hf = peer_heads.import_peers()
        import segmentation_models_pytorch as smp
    except ImportError as error:
        pytest.skip(f"{error}; make test-encoders installs them")
    for name, today in {**peer_heads.of_hf(hf), **peer_heads.of_smp(smp, timm)}.items():
        assert today["tensors"] == NETWORKS[name]["tensors"], name
        np.testing.assert_allclose(today["logits"], NETWORKS[name]["logits"], atol=1e-4, err_msg=name)
