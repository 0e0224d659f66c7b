"""An INT8 graph as a whole: judged on what no range was set with, written only if it passes, and what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from quantization_helpers import CONFIG, centred, nodes_of, session_of, tiles_of, write_set

from cdkd_edge.core.errors import DatasetError, GraphError, ManifestError, NumericalCheckError, SchemaError, UsageError
from cdkd_edge.core.labels import load_schema
from cdkd_edge.core.manifest import GraphManifest, manifest_path, read_manifest
from cdkd_edge.engines.onnxruntime import OnnxLabeller
from cdkd_edge.graph import files
from cdkd_edge.graph.cpu import cpu_session, cpu_twin, fuse_attention
from cdkd_edge.graph.files import derived_path
from cdkd_edge.graph.fp16 import write_fp16
from cdkd_edge.graph.int8 import CalibrationOptions
from cdkd_edge.precision import int8
from cdkd_edge.precision.int8 import Int8Options, write_int8
from cdkd_edge.precision.int8_gate import Int8Gate, Judgement, LabelledData, worst_layers
from cdkd_edge.quality.datasets import find_dataset
from cdkd_edge.quality.evaluate import evaluate

LENIENT = Int8Gate(0.8, 100)
LOOSE = Int8Gate(0.5, 100)
NOISY = "blocks.1.mlp.fc2"


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def weights(make_weights):
    """A network that is fairly sure of its labels."""
    return make_weights(CONFIG, seed=2)


@pytest.fixture(scope="module")
def noisy_weights(make_weights):
    """One hidden channel of an MLP is always 400 and weighs next to nothing: its layer loses all others in INT8."""
    noisy = make_weights(CONFIG, seed=3)
    noisy["encoder.blocks.1.mlp.fc1.bias"][0] = 400
    noisy["encoder.blocks.1.mlp.fc1.weight"][0] = 0
    noisy["encoder.blocks.1.mlp.fc2.weight"] *= 3
    noisy["encoder.blocks.1.mlp.fc2.weight"][:, 0] = 1e-4
    return centred(noisy, CONFIG)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A calibration set of six tiles, and three others to check on."""
    return write_set(tmp_path_factory.mktemp("sets") / "mission", tiles_of(6, seed=1), tiles_of(3, seed=2))


@pytest.fixture
def graph(tmp_path, make_graph, weights):
    return make_graph(tmp_path / "export", weights, CONFIG)


@pytest.fixture(scope="module")
def written(tmp_path_factory, make_graph, weights, tiles):
    """What `write_int8` returns and told. Not to be changed."""
    graph = make_graph(tmp_path_factory.mktemp("written"), weights, CONFIG)
    told = []
    return write_int8(graph, target(graph), tiles, Int8Options(gate=LENIENT), note=told.append), graph, told


@pytest.fixture
def copied(tmp_path, written):
    """The FP32 graph, with the INT8 graph of ``written`` beside it."""
    return Path(shutil.copytree(written[1].parent, tmp_path / "copied")) / written[1].name


def target(graph):
    return graph.with_name("small.int8.onnx")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(error, graph, *arguments, match=None, **options):
    """Nothing was written, nothing was changed."""
    before = {path.name: path.read_bytes() for path in graph.parent.iterdir()}
    with pytest.raises(error, match=match) as caught:
        write_int8(graph, target(graph), *arguments, **options)
    assert {path.name: path.read_bytes() for path in graph.parent.iterdir()} == before
    return caught.value


def labels_on(model, images):
    """As the judgement computes them: attention fused, and ONNX Runtime's own optimisations."""
    fuse_attention(model)
    session = cpu_session(model)
    return np.concatenate([session.run(["labels"], {"image": image[None]})[0] for image in images])


# --- what is written ------------------------------------------------------------------------------


def test_graph_manifest_and_report(written):
    result, graph, told = written
    assert names(graph.parent) == ["small.int8.json", "small.int8.md", "small.int8.onnx", "small.json", "small.onnx"]
    source, stored = read_manifest(graph, GraphManifest), read_manifest(result.path, GraphManifest)
    assert stored.quantization == json.loads(json.dumps(result.manifest.quantization, allow_nan=False))
    assert (stored.precision, stored.name, stored.parent) == ("int8", "small", source.artefact)
    assert (stored.labels, stored.tile, stored.batch, stored.opset) == (source.labels, 48, 1, 20)
    assert (stored.checkpoint, stored.training, stored.check) == (source.checkpoint, source.training, source.check)
    assert stored.nodes == len(onnx.load(result.path).graph.node)
    assert stored.conversion.tiles == 3
    assert stored.conversion.imagery == "mission"
    assert {"onnx", "onnxruntime", "numpy", "python"} == set(stored.libraries)
    steps = " ".join(told)
    for step in ("channel maxima: tile 6 of 6", "ranges: tile 6 of 6", "noise of every layer", "judging INT8"):
        assert step in steps


def test_the_record_of_quantisation(written, tiles):
    record = written[0].manifest.quantization
    assert record["calibration_set"] == {"name": "mission", "sha256": tiles.sha256}
    assert (record["calibration_tiles"], record["check_tiles"]) == (6, 3)
    assert (record["calibrator"], record["percentile"], record["smoothquant_alpha"]) == ("percentile", 99.999, 0.5)
    assert record["smoothed_layers"] == 8
    assert record["gate"] == {"agreement": 0.8, "loss": 100}
    assert record["kept_in_fp16"] == []
    assert len(record["attempts"]) == 1
    assert record["attempts"][0]["failures"] == []
    layers = record["layers"]
    assert len(layers) == 17
    assert {layer["precision"] for layer in layers} == {"int8"}
    assert all(5 < layer["snr_db"] < 70 and layer["input_scale"] > 0 and layer["macs"] > 0 for layer in layers)
    assert record["size_over_fp32"] == pytest.approx(
        written[0].path.stat().st_size / written[1].stat().st_size, rel=1e-6
    )
    assert record["judgement"]["mean_iou"] is None


def test_the_judgement_is_that_of_the_twin_on_the_check_tiles(written, tiles):
    result, graph, _ = written
    images = list(tiles.tiles("check"))
    # The same order of additions: before a quantiser another one can move a value by a step, and a rare class shows it.
    exact, found = (labels_on(model, images) for model in (onnx.load(graph), cpu_twin(onnx.load(result.path))))
    per_tile = (exact == found).mean(axis=(1, 2))
    assert 0.8 < per_tile.mean() < 1, "the network is too easy for this test"
    judgement = result.attempts[-1].judgement
    assert judgement.agreement == pytest.approx(per_tile.mean(), abs=2e-3)
    assert judgement.worst_tile == pytest.approx(per_tile.min(), abs=4e-3)
    counts = np.zeros((5, 5))
    np.add.at(counts, (exact.ravel(), found.ravel()), 1)
    union = counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
    ious = counts.diagonal()[union > 0] / union[union > 0]
    assert judgement.mean_iou_to_fp32 == pytest.approx(ious.mean(), abs=1e-2)
    assert min(judgement.seconds, judgement.fp32_seconds) > 0
    assert judgement.speed_up == judgement.fp32_seconds / judgement.seconds


def test_ranges_come_from_the_calibration_tiles_alone(tmp_path, graph, written):
    """Other check tiles, same graph; other calibration tiles, another."""
    contents = [written[0].path.read_bytes()]
    for seeds in ((1, 5), (4, 2)):
        own = write_set(tmp_path / f"set{seeds}", tiles_of(6, seed=seeds[0]), tiles_of(3, seed=seeds[1]))
        write_int8(graph, target(graph), own, Int8Options(gate=Int8Gate(0.5, 100)))
        contents.append(target(graph).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_the_report(written):
    result = written[0]
    text = result.report.read_text(encoding="utf-8")
    assert result.report.name == "small.int8.md"
    assert text.startswith("# small.int8.onnx\n")
    assert "INT8 graph of `small.onnx`: 17 of 17 quantisable layers in INT8" in text
    assert "On 3 check tiles of `mission`" in text
    assert "Gate: agreement at least 80.00%. mIoU was not measured" in text
    assert "SmoothQuant, alpha 0.5, on 8 layers." in text
    assert "Ranges: percentile 99.999 over 6 tiles." in text
    assert "Attempts" not in text
    rows = [line.split("|") for line in text.split("## Layers")[1].splitlines() if line.startswith("| ")][1:]
    decibels = [float(row[3]) for row in rows]
    assert len(rows) == 17
    assert decibels == sorted(decibels)
    assert sum(float(row[5].strip(" %")) for row in rows) == pytest.approx(100, abs=2)
    for line in text.splitlines():
        assert "None" not in line
        assert "nan" not in line


def test_a_batch_graph(tmp_path, make_graph, weights, tiles, written):
    graph = make_graph(tmp_path / "export", weights, CONFIG, batch=2)
    result = write_int8(graph, target(graph), tiles, Int8Options(gate=LENIENT))
    assert result.manifest.batch == 2
    assert result.manifest.conversion.tiles == 3
    alone = written[0]
    assert result.attempts[0].judgement.agreement == pytest.approx(alone.attempts[0].judgement.agreement, abs=5e-3)


@pytest.mark.parametrize("calibrator", ["max", "mse"])
def test_other_calibrators(graph, tiles, calibrator):
    options = Int8Options(CalibrationOptions(calibrator, alpha=None), Int8Gate(0.5, 100))
    result = write_int8(graph, target(graph), tiles, options)
    record = result.manifest.quantization
    assert (record["calibrator"], record["percentile"], record["smoothquant_alpha"]) == (calibrator, None, None)
    assert record["smoothed_layers"] == 0
    text = result.report.read_text()
    assert f"Ranges: {calibrator} over 6 tiles." in text
    assert "SmoothQuant" not in text


def test_a_graph_made_again_replaces_all_of_it(copied, tiles, written):
    graph, report = copied, written[0].report.read_text()
    again = write_int8(graph, target(graph), tiles, Int8Options(gate=LENIENT, keep=("fuse",)))
    assert len(names(graph.parent)) == 5
    assert read_manifest(target(graph), GraphManifest).quantization["kept_in_fp16"] == ["fuse"]
    assert again.report.read_text() != report


# --- the gate -------------------------------------------------------------------------------------


def test_a_missed_gate_leaves_nothing(graph, tiles):
    error = refused(
        NumericalCheckError, graph, tiles, Int8Options(gate=Int8Gate(1.0, 0)), match=r"misses its gate: \d+\.\d+% of"
    )
    assert "--auto" in error.hint


def test_a_missed_gate_leaves_what_was_there(copied, tiles):
    refused(NumericalCheckError, copied, tiles, Int8Options(gate=Int8Gate(1.0, 0)))
    read_manifest(target(copied), GraphManifest)


def test_auto_keeps_the_noisiest_layer(tmp_path, make_graph, noisy_weights, tiles):
    graph = make_graph(tmp_path / "export", noisy_weights, CONFIG)
    bad = refused(NumericalCheckError, graph, tiles, Int8Options(gate=Int8Gate(0.85, 100)))
    assert "misses its gate" in bad.message
    result = write_int8(graph, target(graph), tiles, Int8Options(gate=Int8Gate(0.85, 100), auto=True))
    first, second = result.attempts
    assert (first.kept, second.kept) == ((), (NOISY,))
    assert first.judgement.agreement < 0.85 <= second.judgement.agreement
    assert first.failures
    assert not second.failures
    record = result.manifest.quantization
    assert record["kept_in_fp16"] == [NOISY]
    assert [item["kept_in_fp16"] for item in record["attempts"]] == [[], [NOISY]]
    assert [layer["name"] for layer in record["layers"] if layer["precision"] == "fp16"] == [NOISY]
    assert worst_layers(record, 1)[0]["name"] == NOISY
    assert len(nodes_of(onnx.load(result.path), "QuantizeLinear")) == 16
    text = result.report.read_text()
    assert "16 of 17 quantisable layers in INT8" in text
    assert f"| {NOISY} | " in text.split("## Attempts")[1]
    assert "| none | " in text.split("## Attempts")[1]


def test_keeping_it_by_name_does_the_same(tmp_path, make_graph, noisy_weights, tiles):
    graph = make_graph(tmp_path / "export", noisy_weights, CONFIG)
    options = Int8Options(gate=Int8Gate(0.85, 100), keep=(NOISY, NOISY))
    result = write_int8(graph, target(graph), tiles, options)
    assert result.manifest.quantization["kept_in_fp16"] == [NOISY]
    assert len(result.attempts) == 1


def test_auto_goes_on_with_ever_more_of_the_noisiest(graph, tiles, monkeypatch):
    """A judge that is never content: 1, 2, 4, ... layers, the noisiest first, and in the end nothing is written."""
    seen = []

    class Stern(int8.Judge):
        def __call__(self, twin):
            seen.append(len(nodes_of(twin, "MatMulIntegerToFloat")))
            return Judgement(0.5, 0.5, 0.5, 1.0, 1.0)

    noise = {}
    monkeypatch.setattr(int8, "Judge", Stern)
    measure = int8.signal_to_noise
    monkeypatch.setattr(int8, "signal_to_noise", lambda *given: noise.setdefault("all", measure(*given)))
    attempts = []
    make = int8.Attempt
    monkeypatch.setattr(int8, "Attempt", lambda *given: attempts.append(make(*given)) or attempts[-1])
    error = refused(NumericalCheckError, graph, tiles, Int8Options(auto=True, keep=("fuse",)))
    assert "build the network in FP16" in error.hint
    worst = [name for name in sorted(noise["all"], key=noise["all"].get) if name != "fuse"]
    assert [attempt.kept for attempt in attempts] == [("fuse", *worst[:count]) for count in (0, 1, 2, 4, 8)]
    assert seen == [16, 15, 14, 12, 8]


@pytest.mark.parametrize(
    ("agreement", "loss"),
    [
        (0.0, 0.5),
        (0.0098, 0.5),
        (1.01, 0.5),
        (98, 0.5),
        (float("nan"), 0.5),
        (0.98, -1),
        (0.98, 101),
        (0.98, float("nan")),
    ],
)
def test_senseless_gates(agreement, loss):
    with pytest.raises(UsageError):
        Int8Gate(agreement, loss)


def test_what_a_gate_says():
    good = Judgement(0.98, 1, 1, 1, 1, mean_iou=0.5, fp32_mean_iou=0.505)
    assert good.loss == pytest.approx(0.5)
    assert Int8Gate(0.98, 0.51).failures(good) == []
    assert Int8Gate(0.98, 0.49).failures(good) == ["mIoU falls by 0.50 points; at most 0.49 are allowed"]
    assert len(Int8Gate(0.981, 0.49).failures(good)) == 2
    gained = dataclasses.replace(good, mean_iou=0.6)
    assert Int8Gate(0.98, 0).failures(gained) == []
    assert Int8Gate(0.98, 0).failures(dataclasses.replace(good, mean_iou=None)) == []
    for broken in (
        dataclasses.replace(good, mean_iou=float("nan")),
        dataclasses.replace(good, agreement=float("nan"), mean_iou=None),
    ):
        assert len(Int8Gate(0.98, 100).failures(broken)) == 1


# --- what does not fit ----------------------------------------------------------------------------


def test_layers_that_are_not_there(graph, tiles, monkeypatch):
    monkeypatch.setattr(int8, "calibrate", lambda *_: pytest.fail("this is known without calibration"))
    error = refused(GraphError, graph, tiles, Int8Options(keep=("blocks.9.mlp.fc1",)), match=r"no layer 'blocks\.9")
    assert "blocks.0.attn.proj" in error.hint


def test_with_everything_kept_nothing_is_left(graph, tiles, written):
    every = tuple(layer["name"] for layer in written[0].manifest.quantization["layers"])
    refused(UsageError, graph, tiles, Int8Options(keep=every), match="all 17 layers kept")


def test_sets_that_do_not_fit(tmp_path, graph):
    wide = write_set(tmp_path / "wide", tiles_of(2, 64), tiles_of(1, 64), side=64)
    error = refused(UsageError, graph, wide, match=r"tiles of wide are 64 px wide, those of small\.onnx 48 px")
    assert "--tile 48" in error.hint
    refused(UsageError, graph, write_set(tmp_path / "a", tiles_of(2), []), match="a has no check tiles")


@pytest.mark.parametrize("role", ["calibration", "check"])
def test_a_tile_that_was_changed(tmp_path, graph, role):
    own = write_set(tmp_path / "set", tiles_of(2), tiles_of(2, seed=3))
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(own.folder / role / "0001.png")
    refused(ManifestError, graph, own, Int8Options(gate=LENIENT), match=r"0001\.png")


def test_graphs_of_other_precisions(graph, tiles):
    write_fp16(graph, derived_path(graph, "fp16"))
    with pytest.raises(GraphError, match="INT8 is made from the FP32 graph"):
        write_int8(derived_path(graph, "fp16"), target(graph), tiles)
    with open(graph, "ab") as file:
        file.write(b"x")
    refused(ManifestError, graph, tiles, match="SHA-256 differs")


def test_an_opset_without_fp16_scales(tmp_path, make_graph, weights, tiles):
    graph = make_graph(tmp_path / "export", weights, CONFIG, opset=18)
    assert "--opset 20" in refused(GraphError, graph, tiles, match="opset 19").hint


@pytest.mark.parametrize("name", ["small.int8.onnx", "small.int8.json", "small.int8.md"])
@pytest.mark.parametrize("content", [b"mine", b"\xff\xfe\x00"])
def test_what_is_not_ours_stays(graph, tiles, name, content):
    (graph.parent / name).write_bytes(content)
    refused(ManifestError, graph, tiles, match="not cdkd-edge's to replace")


def test_a_destination_that_cannot_be(graph, tiles):
    (graph.parent / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_int8(graph, graph.parent / "file" / "x.int8.onnx", tiles, Int8Options(gate=LENIENT))
    assert names(graph.parent) == ["file", "small.json", "small.onnx"]


@pytest.mark.parametrize("where", ["calibrate", "signal_to_noise", "cpu_twin", "check_fp16", "write_manifest"])
def test_an_interruption_leaves_nothing(graph, tiles, monkeypatch, where, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(files if where == "write_manifest" else int8, where, interrupt)
    refused(KeyboardInterrupt, graph, tiles, Int8Options(gate=LENIENT))
    assert names(scratch) == []


def test_an_overflow_behind_the_quantisers_is_refused(tmp_path, make_graph, weights, tiles):
    """The twin computes in FP32 and agrees; an engine would not."""
    loud = dict(weights)
    for layer, factor in (("fc1", 6e4), ("fc2", 1e-5)):
        name = f"encoder.blocks.1.mlp.{layer}.weight"
        loud[name] = (weights[name] * factor).astype(np.float32)
    graph = make_graph(tmp_path / "export", loud, CONFIG)
    refused(NumericalCheckError, graph, tiles, Int8Options(gate=LOOSE), match=r"mlp\.fc1 leaves FP16's range")


# --- labelled data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory, written):
    """Images whose masks are what the FP32 graph says, with noise: it scores well, INT8 a little less."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(5)
    for number, image in enumerate(tiles_of(3, seed=40)):
        mask = labels_on(onnx.load(written[1]), [image])[0]
        mask = np.where(generator.random(mask.shape) < 0.1, generator.integers(0, 5, mask.shape), mask)
        for part, pixels in (("images", image.transpose(1, 2, 0)), ("masks", mask.astype(np.uint8))):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(pixels.copy()).save(folder / part / f"t{number}_0.png")
    return LabelledData(find_dataset(folder), load_schema("dubai"))


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_the_loss_is_that_of_evaluate(tmp_path, graph, tiles, data):
    result = write_int8(graph, target(graph), tiles, Int8Options(gate=LENIENT), data)
    judgement = result.attempts[-1].judgement
    source = read_manifest(graph, GraphManifest)
    scores = []
    for number, model in enumerate((onnx.load(graph), cpu_twin(onnx.load(result.path)))):
        path = tmp_path / f"{number}.onnx"
        onnx.save(model, path)
        scores.append(evaluate(OnnxLabeller(path, source), data.dataset, data.schema).matrix.mean_iou)
    assert judgement.fp32_mean_iou == pytest.approx(scores[0], abs=1e-3)
    assert judgement.mean_iou == pytest.approx(scores[1], abs=5e-3)
    assert judgement.loss == pytest.approx(100 * (judgement.fp32_mean_iou - judgement.mean_iou))
    stored = read_manifest(target(graph), GraphManifest).quantization["judgement"]
    assert stored["mean_iou_loss_points"] == judgement.loss
    assert stored["scores"]["fp32"]["mean_iou"] == judgement.fp32_mean_iou
    assert len(stored["scores"]["int8"]["classes"]) == 5
    text = result.report.read_text()
    assert f"| mIoU on labelled images | {judgement.mean_iou:.2%} | {judgement.fp32_mean_iou:.2%} |" in text
    assert "mIoU loss at most 100 points; loss " in text


def test_the_loss_is_part_of_the_gate(tmp_path, make_graph, noisy_weights, tiles, data):
    graph = make_graph(tmp_path / "export", noisy_weights, CONFIG)
    session = session_of(onnx.load(graph))
    folder = tmp_path / "data"
    for number, image in enumerate(tiles_of(2, seed=41)):
        mask = session.run(["labels"], {"image": image[None]})[0][0]
        for part, pixels in (("images", image.transpose(1, 2, 0)), ("masks", mask)):
            (folder / part).mkdir(exist_ok=True, parents=True)
            Image.fromarray(pixels.copy()).save(folder / part / f"t{number}_0.png")
    own = LabelledData(find_dataset(folder), data.schema)
    refused(
        NumericalCheckError,
        graph,
        tiles,
        Int8Options(gate=Int8Gate(0.02, 1)),
        own,
        match=r"mIoU falls by \d+\.\d\d points",
    )


def test_data_of_other_classes_is_known_at_once(graph, tiles, data, monkeypatch):
    monkeypatch.setattr(int8, "calibrate", lambda *_: pytest.fail("this is known without calibration"))
    refused(SchemaError, graph, tiles, Int8Options(), dataclasses.replace(data, schema=load_schema("loveda")))


def test_data_that_cannot_be_read_is_known_at_once(tmp_path, graph, tiles, data, monkeypatch):
    folder = tmp_path / "data"
    for part, size in (("images", 48), ("masks", 47)):
        (folder / part).mkdir(parents=True)
        Image.fromarray(np.zeros((size, 48), np.uint8)).convert("RGB").save(folder / part / "a_1.png")
    monkeypatch.setattr(int8, "calibrate", lambda *_: pytest.fail("this is known without calibration"))
    refused(DatasetError, graph, tiles, Int8Options(), LabelledData(find_dataset(folder), data.schema))


def test_the_judge_scores_fp32_once(tmp_path, make_graph, noisy_weights, tiles, data, monkeypatch):
    graph = make_graph(tmp_path / "export", noisy_weights, CONFIG)
    told = []
    write_int8(graph, target(graph), tiles, Int8Options(gate=Int8Gate(0.85, 100), auto=True), data, told.append)
    counted = {step: len(list(same)) for step, same in itertools.groupby(sorted(told))}
    assert counted["scores of the FP32 graph"] == 1
    assert counted["scores of the INT8 graph"] == 2


def test_a_manifest_does_not_describe_another_file(written):
    """So that the pair can be carried to a board."""
    document = json.loads(manifest_path(written[0].path).read_text())
    assert document["artefact"]["file"] == "small.int8.onnx"
    assert document["kind"] == "graph"
