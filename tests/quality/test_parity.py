"""Parity: known differences are found, to the pixel; verdicts, exit codes, and what is left behind."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from commands import assert_answer, run
from labelled_images import SIZES, build_data, truth_of
from PIL import Image
from scene_helpers import SCHEMA, FakeEngine, names_in, pipeline_threads, read_labels, red_labels, write_raster

from cdkd_edge.core.errors import DatasetError, EngineError, SchemaError, UsageError
from cdkd_edge.core.labels import NO_LABEL, load_schema, numbered_schema
from cdkd_edge.engines.onnxruntime import build_cpu_engine
from cdkd_edge.quality import artefacts
from cdkd_edge.quality.artefacts import LoadedArtefact
from cdkd_edge.quality.datasets import Dataset, find_dataset
from cdkd_edge.quality.evaluate import evaluate
from cdkd_edge.quality.parity import ComparedScore, Parity, ParityGate, measure_parity

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

UInt8Array = npt.NDArray[np.uint8]

LAX = ParityGate(100.0, 0.0)


def both(score: ComparedScore) -> tuple[float | None, float | None]:
    return score.reference, score.candidate


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is the default workspace; it must not be the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


def flipped(tiles: UInt8Array, low: int = 25, high: int = 256) -> UInt8Array:
    """Red labels, but the next class where green is ``low`` or less, or ``high`` or more.

    Which pixels these are is decided by content, so any tiling gives the same. Where green is low, red labels are
    right: by default the perturbation loses accuracy.
    """
    labels = red_labels(tiles)
    return np.where((tiles[:, 1] <= low) | (tiles[:, 1] >= high), (labels + 1) % 5, labels).astype(np.uint8)


def perturbed(**options: Any) -> FakeEngine:
    return FakeEngine(function=flipped, **options)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return build_data(tmp_path / "data")


def images_of(dataset: Dataset) -> list[UInt8Array]:
    return [np.asarray(Image.open(pair.image)).transpose(2, 0, 1) for pair in dataset]


def all_pixels(dataset: Dataset) -> tuple[UInt8Array, UInt8Array, UInt8Array]:
    """Truth, red labels and flipped labels of every pixel, without this package's readers or tiles."""
    images = images_of(dataset)
    return (
        np.concatenate([truth_of(image).ravel() for image in images]),
        np.concatenate([red_labels(image[None]).ravel() for image in images]),
        np.concatenate([flipped(image[None]).ravel() for image in images]),
    )


# --- numbers --------------------------------------------------------------------------------------


def test_identical_labellers_differ_nowhere(data: Dataset) -> None:
    result = measure_parity(FakeEngine(), FakeEngine(), data, SCHEMA, ParityGate(0.0, 1.0))
    assert result.verdict == "pass"
    assert result.agreement == result.labelled_agreement == 1.0
    for score in (*result.scores.values(), *result.class_iou):
        assert score.delta == 0.0
        assert score.interval
        assert (score.interval.low, score.interval.high) == (0.0, 0.0)
    assert result.interval_position == "within"
    assert result.differences() == []
    assert 0.2 < (result.scores["mean_iou"].reference or 0) < 0.9, "perfect scores would show little"


def test_a_known_perturbation_is_measured_to_the_pixel(data: Dataset) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    truth, red, other = all_pixels(data)
    known = truth != NO_LABEL
    assert result.agreement == pytest.approx((red == other).mean(), abs=1e-12)
    assert result.labelled_agreement == pytest.approx((red == other)[known].mean(), abs=1e-12)
    everything = list(range(5))
    for name, score in (
        ("mean_iou", lambda labels: metrics.jaccard_score(truth[known], labels, labels=everything, average="macro")),
        ("mean_f1", lambda labels: metrics.f1_score(truth[known], labels, labels=everything, average="macro")),
        ("overall_accuracy", lambda labels: metrics.accuracy_score(truth[known], labels)),
    ):
        before, after = score(red[known]), score(other[known])
        assert both(result.scores[name]) == pytest.approx((before, after))
        assert result.scores[name].delta == pytest.approx(100 * (after - before))
        assert abs(after - before) > 1e-3
    each = [
        metrics.jaccard_score(truth[known], labels[known], labels=everything, average=None) for labels in (red, other)
    ]
    assert list(zip(*map(both, result.class_iou), strict=True)) == [pytest.approx(tuple(one)) for one in each]
    assert [score.delta for score in result.class_iou] == pytest.approx(list(100 * (each[1] - each[0])))
    assert result.confusion[:5, :5].tolist() == metrics.confusion_matrix(red, other, labels=everything).tolist()
    assert result.confusion[5].sum() == result.confusion[:, 5].sum() == 0
    document = result.document()
    assert document["pixels"] == len(truth)
    assert document["labelled_pixels"] == known.sum()
    assert document["ignored_pixels"] == (~known).sum()
    changed = result.differences()
    assert sum(count for _, _, count in changed) == (red != other).sum()
    assert [count for _, _, count in changed] == sorted((count for _, _, count in changed), reverse=True)
    names = SCHEMA.class_names
    assert {(before, after) for before, after, _ in changed} == {
        (names[label], names[(label + 1) % 5]) for label in range(4)
    }


def test_scores_are_those_of_evaluate(data: Dataset) -> None:
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    for side, engine in enumerate((FakeEngine(), perturbed())):
        alone = evaluate(engine, data, SCHEMA)
        assert (result.matrices[side].counts == alone.matrix.counts).all()
        assert both(result.scores["mean_iou"])[side] == pytest.approx(alone.matrix.mean_iou)
        per_image = [(image.reference_mean_iou, image.candidate_mean_iou)[side] for image in result.images]
        assert per_image == pytest.approx([image.mean_iou for image in alone.images])


def test_intervals_hold_the_differences_and_depend_on_the_seed(data: Dataset) -> None:
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    assert both(result.class_iou[4]) == (0.0, 0.0), "neither ever hits water"
    for score in (*result.scores.values(), *result.class_iou[:4]):
        assert score.interval
        assert score.delta is not None
        assert score.interval.low < score.delta < score.interval.high
    assert result.agreement_interval
    assert result.agreement_interval.low < result.agreement < result.agreement_interval.high
    again = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX, seed=1)
    assert again.scores["mean_iou"].delta == result.scores["mean_iou"].delta
    assert again.scores["mean_iou"].interval != result.scores["mean_iou"].interval


def test_a_piece_is_what_a_tile_contributes(data: Dataset) -> None:
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    assert result.tiles == sum(image.tiles for image in result.images)
    assert result.tiles > len(data)
    assert result.confusion.sum() == sum(height * width for height, width in SIZES.values()), "each pixel counts once"


def strip_time(result: Parity) -> dict[str, Any]:
    return {**result.document(), "seconds": 0, "images": sorted(map(str, result.document()["images"]))}


def test_the_order_of_images_does_not_matter(data: Dataset) -> None:
    turned = Dataset(data.folder, data.layout, tuple(reversed(data.pairs)))
    first, second = (strip_time(measure_parity(FakeEngine(), perturbed(), one, SCHEMA, LAX)) for one in (data, turned))
    assert first == second


def test_batches_may_differ(data: Dataset) -> None:
    first, second = (
        strip_time(measure_parity(FakeEngine(), perturbed(batch=batch), data, SCHEMA, LAX)) for batch in (1, 3)
    )
    assert first == second


def test_every_tile_is_labelled_once_by_each(data: Dataset) -> None:
    ours, theirs = FakeEngine(), perturbed()
    seen: list[tuple[int, int]] = []
    result = measure_parity(ours, theirs, data, SCHEMA, LAX, progress=lambda *now: seen.append(now))
    tiles = sum(image.tiles for image in result.images)
    assert (ours.launches, theirs.launches) == (tiles, tiles)
    assert [done for done, _ in seen] == list(range(1, 2 * tiles + 1))
    assert {total for _, total in seen} == {2 * tiles}


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """One image more costs its name and its tiles' counts, a fraction of its pixels."""
    data = build_data(tmp_path / "data", {f"t{number:02}_a": (130, 130) for number in range(24)})
    measure_parity(FakeEngine(), perturbed(), Dataset(data.folder, data.layout, data.pairs[:2]), SCHEMA, LAX)
    peaks = []
    for count in (6, 24):
        tracemalloc.start()
        measure_parity(
            FakeEngine(), perturbed(), Dataset(data.folder, data.layout, data.pairs[:count]), SCHEMA, LAX, resamples=10
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 18 * 130 * 130


# --- pixels that count nowhere, or only in part ---------------------------------------------------


def test_unlabelled_images_count_for_the_agreement_alone(data: Dataset) -> None:
    Image.fromarray(np.full(SIZES["t1_a"], NO_LABEL, np.uint8)).save(data.pairs[0].mask)
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    rest = measure_parity(FakeEngine(), perturbed(), Dataset(data.folder, data.layout, data.pairs[1:]), SCHEMA, LAX)
    assert {name: both(one) for name, one in result.scores.items()} == {
        name: both(one) for name, one in rest.scores.items()
    }
    assert result.labelled_agreement == rest.labelled_agreement
    assert result.confusion.sum() == rest.confusion.sum() + 150 * 200
    assert result.ignored_pixels == rest.ignored_pixels + 150 * 200
    assert (result.tiles, result.labelled_tiles) == (rest.tiles + result.images[0].tiles, rest.labelled_tiles)
    image = result.images[0]
    assert (image.reference_mean_iou, image.candidate_mean_iou) == (None, None)
    assert image.agreement is not None
    json.dumps(result.document(), allow_nan=False)


def test_pixels_without_data_are_no_agreement(data: Dataset) -> None:
    pair = data.pairs[0]
    image = np.maximum(images_of(data)[0], 1)
    image[:, :100, :120] = 0
    pair.image.unlink()
    write_raster(pair.image.with_suffix(".tif"), image, nodata=0, photometric="RGB")
    result = measure_parity(FakeEngine(), perturbed(), find_dataset(data.folder).of_scenes(["t1"]), SCHEMA, LAX)
    valid = np.concatenate([(image != 0).all(axis=0).ravel(), np.ones(64 * 64, bool)])
    pixels = [image, images_of(Dataset(data.folder, data.layout, data.pairs[1:2]))[0]]
    red, other = (np.concatenate([f(one[None]).ravel() for one in pixels]) for f in (red_labels, flipped))
    assert result.confusion.sum() == valid.sum()
    assert result.agreement == pytest.approx((red == other)[valid].mean(), abs=1e-12)
    assert result.tiles < sum(image.tiles for image in result.images), "a tile without data is not resampled"


def test_a_label_missing_on_one_side_is_a_difference(data: Dataset) -> None:
    def holes(tiles: UInt8Array) -> UInt8Array:
        return np.where(tiles[:, 1] >= 250, NO_LABEL, red_labels(tiles)).astype(np.uint8)

    result = measure_parity(FakeEngine(), FakeEngine(function=holes), data, SCHEMA, LAX)
    missing = sum(int((image[1] >= 250).sum()) for image in images_of(data))
    assert result.confusion[:, 5].sum() == missing > 0
    assert result.agreement == pytest.approx(1 - missing / result.confusion.sum())
    assert {after for _, after, _ in result.differences()} == {"no label"}


def test_a_class_without_truth_does_not_decide(data: Dataset) -> None:
    """Four classes in the truth; the candidate gives a fifth to a few pixels."""
    for pair, image in zip(data, images_of(data), strict=True):
        Image.fromarray(red_labels(image[None])[0]).save(pair.mask)

    def strange(tiles: UInt8Array) -> UInt8Array:
        rare = (tiles[:, 1] == 255) & (tiles[:, 2] > 250)
        return np.where(rare, 4, red_labels(tiles)).astype(np.uint8)

    result = measure_parity(FakeEngine(), FakeEngine(function=strange), data, SCHEMA, LAX)
    assert 0 < result.loss < 0.5
    assert result.class_iou[4].delta is None
    assert both(result.class_iou[4]) == (None, None)
    assert any(note.startswith("no pixel of the truth is water") for note in result.notes)
    json.dumps(result.document(), allow_nan=False)


def test_few_tiles_have_no_interval_and_say_so(data: Dataset) -> None:
    result = measure_parity(FakeEngine(), perturbed(), Dataset(data.folder, data.layout, data.pairs[1:2]), SCHEMA, LAX)
    assert result.tiles == 1
    assert {score.interval for score in (*result.scores.values(), *result.class_iou)} == {None}
    assert result.agreement_interval is None
    assert result.interval_position is None
    assert "1 labelled tiles are too few for an interval" in result.notes
    more = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX)
    assert f"{more.labelled_tiles} labelled tiles are few: the true intervals may be wider" in more.notes


def test_no_label_at_all_leaves_nothing_to_compare_on(data: Dataset) -> None:
    for pair in data:
        Image.fromarray(np.full(SIZES[pair.name], NO_LABEL, np.uint8)).save(pair.mask)
    with pytest.raises(DatasetError, match="no pixel of the 4 masks"):
        measure_parity(FakeEngine(), FakeEngine(), data, SCHEMA, LAX)
    with pytest.raises(DatasetError, match="no image to compare on"):
        measure_parity(FakeEngine(), FakeEngine(), Dataset(data.folder, data.layout, ()), SCHEMA, LAX)


# --- verdicts -------------------------------------------------------------------------------------


def test_the_gate_follows_the_candidates_precision() -> None:
    assert ParityGate.of("fp32") == ParityGate.of("fp16") == ParityGate(0.02, 0.999)
    assert ParityGate.of("int8") == ParityGate(0.5, 0.98)
    assert ParityGate.of("int8", tolerance=0.0) == ParityGate(0.0, 0.98)
    assert ParityGate.of("fp16", min_agreement=0.5) == ParityGate(0.02, 0.5)


def test_a_loss_at_the_tolerance_passes_and_beyond_it_fails(data: Dataset) -> None:
    loss = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX).loss
    assert loss > 0.1
    for tolerance, verdict in ((loss, "pass"), (loss + 0.01, "pass"), (loss - 0.01, "fail"), (0.0, "fail")):
        assert measure_parity(FakeEngine(), perturbed(), data, SCHEMA, ParityGate(tolerance, 0.0)).verdict == verdict


def test_a_gain_is_no_loss(data: Dataset) -> None:
    result = measure_parity(perturbed(), FakeEngine(), data, SCHEMA, ParityGate(0.0, 0.0))
    assert result.loss < 0
    assert result.verdict == "pass"


def test_agreement_can_fail_alone(data: Dataset) -> None:
    result = measure_parity(perturbed(), FakeEngine(), data, SCHEMA, ParityGate(0.02, 0.98))
    assert result.verdict == "fail"
    assert len(result.failures) == 1
    assert "fewer than 98 %" in result.failures[0]


def test_where_the_interval_lies(data: Dataset) -> None:
    span = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX).scores["mean_iou"].interval
    assert span
    for limit, position in (
        (span.low - 0.1, "within"),
        ((span.low + span.high) / 2, "across"),
        (span.high + 0.1, "beyond"),
    ):
        assert (
            measure_parity(FakeEngine(), perturbed(), data, SCHEMA, ParityGate(-limit, 0.0)).interval_position
            == position
        )


# --- what cannot be compared ----------------------------------------------------------------------


def test_other_tiles_are_refused(data: Dataset) -> None:
    ours, theirs = FakeEngine(tile=64), FakeEngine(tile=32)
    with pytest.raises(UsageError, match=r"tiles of 64 px, .* of 32 px") as raised:
        measure_parity(ours, theirs, data, SCHEMA, LAX)
    assert "export again with --tile" in (raised.value.hint or "")
    assert ours.launches == theirs.launches == 0


@pytest.mark.parametrize("side", [0, 1])
def test_other_classes_are_refused(data: Dataset, side: int) -> None:
    pair = [FakeEngine(), FakeEngine()]
    pair[side].schema = load_schema("loveda")
    with pytest.raises(SchemaError, match="the network has 7 classes"):
        measure_parity(pair[0], pair[1], data, SCHEMA, LAX)
    assert pair[0].launches == pair[1].launches == 0
    pair[side].schema = numbered_schema(5)
    assert measure_parity(pair[0], pair[1], data, SCHEMA, LAX).schema is SCHEMA


def test_labels_that_are_none_are_the_engines_fault(data: Dataset) -> None:
    broken = FakeEngine(function=lambda tiles: np.where(tiles[:, 0] == 7, 5, red_labels(tiles)).astype(np.uint8))
    with pytest.raises(EngineError, match="gave the label 5; there are 5 classes"):
        measure_parity(FakeEngine(), broken, data, SCHEMA, LAX)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("error", [EngineError("the device is gone"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(data: Dataset, tmp_path: Path, side: int, error: BaseException) -> None:
    pair = [FakeEngine(), FakeEngine()]
    pair[side] = FakeEngine(fail_at=14, error=error)
    with pytest.raises(type(error)):
        measure_parity(pair[0], pair[1], data, SCHEMA, LAX, maps=tmp_path / "maps")
    assert pipeline_threads() == []
    assert not [name for name in names_in(tmp_path) if ".part" in name], "no half label map"


# --- maps -----------------------------------------------------------------------------------------


def test_maps_are_what_was_compared(data: Dataset, tmp_path: Path) -> None:
    result = measure_parity(FakeEngine(), perturbed(), data, SCHEMA, LAX, maps=tmp_path / "maps")
    kinds = ("candidate.tif", "candidate.tif.aux.xml", "difference.png", "reference.tif", "reference.tif.aux.xml")
    assert names_in(tmp_path / "maps") == [f"{name}_{kind}" for name in SIZES for kind in kinds]
    differing = 0
    for pair, image in zip(data, images_of(data), strict=True):
        ours, theirs = (
            read_labels(tmp_path / "maps" / f"{pair.name}_{side}.tif") for side in ("reference", "candidate")
        )
        assert (ours == red_labels(image[None])[0]).all()
        assert (theirs == flipped(image[None])[0]).all()
        differing += int((ours != theirs).sum())
    assert differing == sum(count for _, _, count in result.differences())


def count_colors(path: Path) -> dict[str, int]:
    picture = np.asarray(Image.open(path))
    width = (picture.shape[1] - 5 * 16) // 4 + 16
    last = picture[41:, 3 * width + 16 : -16].reshape(-1, 3)
    colors = {"lost": (200, 40, 40), "gained": (40, 90, 200), "other": (90, 98, 110)}
    return {name: int((last == color).all(axis=1).sum()) for name, color in colors.items()}


def test_the_picture_shows_who_was_right(data: Dataset, tmp_path: Path) -> None:
    candidate = FakeEngine(function=lambda tiles: flipped(tiles, high=230))
    measure_parity(FakeEngine(), candidate, data, SCHEMA, LAX, maps=tmp_path / "maps")
    image = images_of(data)[0]
    truth, red, other = truth_of(image), red_labels(image[None])[0], flipped(image[None], high=230)[0]
    differ = red != other
    shown = count_colors(tmp_path / "maps/t1_a_difference.png")
    assert shown["lost"] == (differ & (red == truth)).sum() > 0
    assert shown["gained"] == (differ & (other == truth)).sum() > 0
    assert shown["other"] >= (differ & (red != truth) & (other != truth)).sum() > 0


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (301, 801)])
def test_one_pixel_is_seen_in_the_picture_of_a_large_image(tmp_path: Path, size: tuple[int, int]) -> None:
    data = build_data(tmp_path / "data", {"t1_a": size})
    image = images_of(data)[0].copy()
    image[:, -1, -1] = (10, 255, 10)
    image[1, :-1], image[1, -1, :-1] = np.minimum(image[1, :-1], 254), np.minimum(image[1, -1, :-1], 254)
    Image.fromarray(image.transpose(1, 2, 0)).save(data.pairs[0].image)
    Image.fromarray(red_labels(image[None])[0]).save(data.pairs[0].mask)
    candidate = FakeEngine(tile=512, function=lambda tiles: flipped(tiles, low=-1, high=255))
    measure_parity(FakeEngine(tile=512), candidate, data, SCHEMA, LAX, maps=tmp_path / "maps")
    assert count_colors(tmp_path / "maps/t1_a_difference.png") == {"lost": 1, "gained": 0, "other": 0}


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, FakeEngine]]:
    """Lets the command find engines that are not files, by name."""

    def install(**engines: FakeEngine | tuple[FakeEngine, str]) -> dict[str, FakeEngine]:
        def open_one(path: Path, **_: Any) -> LoadedArtefact:
            found = engines[path.stem]
            engine, precision = found if isinstance(found, tuple) else (found, "fp16")
            return LoadedArtefact(path, "engine", "fake", precision, engine)

        monkeypatch.setattr(artefacts, "open_artefact", open_one)
        return {name: one[0] if isinstance(one, tuple) else one for name, one in engines.items()}

    return install


def test_exit_codes_tell_verdicts_from_errors(data: Dataset, fakes: Callable[..., Any]) -> None:
    engines = fakes(
        ours=FakeEngine(), same=FakeEngine(), other=perturbed(), dead=FakeEngine(fail_at=3, error=EngineError("gone"))
    )
    at = ("--data", data.folder)
    good = run("parity", "ours.x", "same.x", *at)
    assert good.exit_code == 0, good.stderr
    for word in (*SCHEMA.class_names, "mIoU", "OA", "mF1", "same label", "verdict", "pass"):
        assert word in good.stdout
    bad = run("parity", "ours.x", "other.x", *at)
    assert bad.exit_code == 14
    assert "fail; it loses" in bad.stdout, "the numbers are shown before the verdict"
    assert bad.stderr.startswith("error: other.x does not keep to ours.x: it loses ")
    assert isinstance(bad.exception, SystemExit)
    assert_answer(run("parity", "ours.x", "dead.x", *at), 9, "gone")
    assert all(engine.closed for engine in engines.values())


def test_the_gate_is_an_option(data: Dataset, fakes: Callable[..., Any]) -> None:
    fakes(ours=FakeEngine(), other=perturbed(), small=(perturbed(), "int8"))
    command = ("parity", "ours.x", "other.x", "--data", data.folder, "--json")
    document = json.loads(run(*command, "--tolerance", "50", "--min-agreement", "60").stdout)
    assert document["verdict"] == "pass"
    assert document["gate"] == {"tolerance_points": 50.0, "min_agreement": 0.6}
    assert json.loads(run(*command).stdout)["gate"] == {"tolerance_points": 0.02, "min_agreement": 0.999}
    assert json.loads(run("parity", "ours.x", "small.x", *command[3:]).stdout)["gate"]["tolerance_points"] == 0.5
    assert_answer(run(*command, "--min-agreement", "0.98"), 2, "per cent, e.g. 98")
    assert_answer(run(*command, "--tolerance", "-1"), 2, "--tolerance")
    assert_answer(run(*command, "--tolerance", "nan"), 2, "--tolerance")


def test_json_and_the_file_are_the_same(data: Dataset, fakes: Callable[..., Any], tmp_path: Path) -> None:
    fakes(ours=FakeEngine(), other=perturbed())
    result = run(
        "parity", "ours.x", "other.x", "--data", data.folder, "--scenes", "t1", "-o", "out", "--save-maps", "--json"
    )
    assert result.exit_code == 14
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "out/parity.json").read_text()), "a failed comparison is kept as well"
    assert document["parity_version"] == 1
    assert document["verdict"] == "fail"
    assert [image["name"] for image in document["images"]] == ["t1_a", "t1_b"]
    assert document["reference"]["sha256"] == document["candidate"]["sha256"] == "ab" * 32
    assert document["bootstrap"]["unit"] == "tile"
    assert document["delta_points"]["mean_iou"]["low"] < document["delta_points"]["mean_iou"]["high"]
    assert (tmp_path / "out/maps/t1_a_difference.png").is_file()


def test_nothing_is_written_unasked(data: Dataset, fakes: Callable[..., Any], tmp_path: Path) -> None:
    fakes(ours=FakeEngine(), same=FakeEngine())
    run("parity", "ours.x", "same.x", "--data", data.folder)
    assert names_in(tmp_path) == ["data", *(f"data/{name}" for name in names_in(tmp_path / "data"))]
    assert run("parity", "ours.x", "same.x", "--data", data.folder, "--save-maps", "-w", "ws").exit_code == 0
    (made,) = (tmp_path / "ws/benchmarks").iterdir()
    assert "same-parity" in made.name
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert_answer(run("parity", "ours.x", "same.x", "--data", data.folder, "-o", "mine"), 2, "mine is not empty")


def test_a_failure_leaves_no_folder(data: Dataset, fakes: Callable[..., Any], tmp_path: Path) -> None:
    fakes(ours=FakeEngine(), dead=FakeEngine(fail_at=13, error=EngineError("the device is gone")))
    command = ("parity", "ours.x", "dead.x", "--data", data.folder, "--save-maps", "-o", "größe")
    assert_answer(run(*command), 9, "the device is gone")
    assert not [name for name in names_in(tmp_path) if name.startswith(("größe", "."))]


# --- real artefacts -------------------------------------------------------------------------------


def test_graph_and_cpu_engine_keep_the_papers_tolerance(
    data: Dataset, small_graph: Path, small_engine_path: Path
) -> None:
    """Random weights on noise: agreement here, accuracy on a trained network in test_parity_of_the_bundled_network."""
    result = run("parity", small_graph, small_engine_path, "--data", data.folder, "--min-agreement", "99.9", "--json")
    document = json.loads(result.stdout)
    assert (document["reference"]["kind"], document["candidate"]["kind"]) == ("graph", "engine")
    assert document["agreement"]["with_data"] >= 0.999
    assert document["delta_points"]["mean_iou"]["value"] == pytest.approx(0, abs=0.02)
    assert result.exit_code == 0, result.stderr


def test_real_artefacts_that_do_not_belong_together(
    data: Dataset, small_graph: Path, small_weights: Any, small_config: Any, make_graph: Any, tmp_path: Path
) -> None:
    weights = dict(small_weights)
    weights["head.classifier.bias"] = weights["head.classifier.bias"][::-1].copy()
    graph = make_graph(tmp_path / "export", weights, small_config)
    build_cpu_engine(graph, tmp_path / "other.fp32.cpu.onnx")
    result = run("parity", small_graph, tmp_path / "other.fp32.cpu.onnx", "--data", data.folder, "--json")
    assert result.exit_code == 14
    assert json.loads(result.stdout)["agreement"]["with_data"] < 0.9
    for nothing in ("nowhere.onnx", ".", "", "/"):
        assert_answer(run("parity", small_graph, nothing, "--data", data.folder), 6, "does not exist|is a folder")
    assert_answer(run("parity", small_graph, graph, "--data", data.folder, "--device", "cuda"), 2, "only a checkpoint")
    (tmp_path / "broken.onnx").write_bytes(graph.read_bytes()[:1000])
    assert_answer(run("parity", small_graph, "broken.onnx", "--data", data.folder), 6, r"broken\.onnx has no manifest")
    (tmp_path / "broken.json").write_bytes(graph.with_suffix(".json").read_bytes())
    assert_answer(run("parity", "broken.onnx", graph, "--data", data.folder), 6, "not the file its manifest describes")


@pytest.fixture
def checkpoint(tmp_path: Path, small_config: Any, small_weights: Any) -> Path:
    torch = pytest.importorskip("torch")
    from cdkd_edge.model.checkpoint import save_checkpoint
    from cdkd_edge.model.network import SegmentationNetwork

    network = SegmentationNetwork(small_config)
    network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in small_weights.items()}, strict=False)
    save_checkpoint(network.eval(), tmp_path / "known.pt", schema=SCHEMA, training={"training_images": ["t2_a"]})
    return tmp_path / "known.pt"


@pytest.mark.needs_torch
def test_network_and_engine_either_way_round(data: Dataset, checkpoint: Path, small_engine_path: Path) -> None:
    at = ("--data", data.folder, "--device", "cpu", "--json")
    first = run("parity", checkpoint, small_engine_path, *at)
    assert first.exit_code == 0, first.stderr
    document, turned = json.loads(first.stdout), json.loads(run("parity", small_engine_path, checkpoint, *at).stdout)
    assert [document[side]["kind"] for side in ("reference", "candidate")] == ["checkpoint", "engine"]
    assert [turned[side]["kind"] for side in ("reference", "candidate")] == ["engine", "checkpoint"]
    assert turned["delta_points"]["mean_iou"]["value"] == pytest.approx(-document["delta_points"]["mean_iou"]["value"])
    assert "1 of the 4 images have the names of images that the network was trained on (t2_a, ...)" in document["notes"]


@pytest.mark.needs_torch
def test_a_checkpoint_takes_the_engines_tile(data: Dataset, checkpoint: Path, tmp_path: Path) -> None:
    """Exported with another tile than the checkpoint's, as `export --tile` does."""
    from cdkd_edge.graph.export import ExportOptions, export_checkpoint

    path = tmp_path / "wide.onnx"
    export_checkpoint(checkpoint, path, ExportOptions(tile=96))
    result = run("parity", checkpoint, path, "--data", data.folder, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["reference"]["tile"] == document["candidate"]["tile"] == 96


DUBAI = Path(__file__).resolve().parents[3] / "shared" / "data" / "dubai"


@pytest.mark.needs_torch
@pytest.mark.slow
@pytest.mark.skipif(not DUBAI.is_dir(), reason="needs the Dubai imagery in ../shared/data/dubai")
def test_parity_of_the_bundled_network(tmp_path: Path) -> None:
    """A trained network on imagery it was not trained on: the paper's 0.02 points hold for the CPU engine."""
    pytest.importorskip("torch")
    import cdkd_edge

    tiny = Path(cdkd_edge.__file__).parent / "demo/tiny.safetensors"
    assert run("export", tiny, "--schema", "dubai", "--no-fp16").exit_code == 0
    assert run("build").exit_code == 0
    for part, suffix in (("images", "jpg"), ("masks", "png")):
        (tmp_path / "data" / part).mkdir(parents=True)
        with Image.open(DUBAI / part / f"tile5_005.{suffix}") as whole:
            whole.crop((0, 0, 512, 512)).save(tmp_path / "data" / part / "tile5_005.png")
    at = ("--data", "data", "--schema", "dubai", "--device", "cpu", "--json")
    result = run("parity", tiny, "engines/tiny.fp32.cpu.onnx", *at)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert math.isclose(document["delta_points"]["mean_iou"]["value"], 0, abs_tol=0.02)
    assert document["scores"]["mean_iou"]["reference"] > 0.48  # 0.493 measured
    assert document["interval_position"] == "within"
