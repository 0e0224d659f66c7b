"""Scores: those of scikit-learn, those of the label maps, and the same for checkpoint, graph and engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from commands import assert_answer, run
from PIL import Image
from rasterio.transform import Affine
from scene_helpers import SCHEMA, FakeEngine, names_in, noise, read_labels, red_labels, write_raster

from cdkd_edge.core.errors import DatasetError, EngineError, SchemaError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema, Palette, load_schema, numbered_schema
from cdkd_edge.quality.artefacts import open_artefact
from cdkd_edge.quality.baselines import score_color_rules
from cdkd_edge.quality.datasets import Dataset, find_dataset
from cdkd_edge.quality.evaluate import data_schema, evaluate
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.raster.read import Stretch
from cdkd_edge.segmentation.options import SegmentOptions

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

UInt8Array = npt.NDArray[np.uint8]

SIZES = {"t1_a": (150, 200), "t1_b": (64, 64), "t2_a": (65, 17), "t3_a": (1, 300)}
"""Heights and widths: larger than a tile, a tile, smaller, and a line."""


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is the default workspace; it must not be the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: None)


def add(folder: Path, name: str, image: UInt8Array, labels: UInt8Array) -> None:
    """An image ``[3, H, W]`` and its mask, in colours for every other image."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0).copy()).save(folder / "images" / f"{name}.png")
    palette = SCHEMA.in_palette(Palette.DATASET).palette()
    in_colors = len(list((folder / "masks").iterdir())) % 2
    Image.fromarray(palette[labels] if in_colors else labels).save(folder / "masks" / f"{name}.png")


def build_data(folder: Path, truth: Callable[[UInt8Array], UInt8Array]) -> Dataset:
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        image = noise(height, width, seed=seed)
        add(folder, name, image, truth(image))
    return find_dataset(folder)


def partly_right(image: UInt8Array) -> UInt8Array:
    """Labels that agree with :func:`red_labels` where green is low, and are missing where blue is high."""
    labels = np.where(image[1] < 150, image[0] // 64, image[1] % 5).astype(np.uint8)
    labels[image[2] > 220] = NO_LABEL
    return labels


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return build_data(tmp_path / "data", partly_right)


def pixels(dataset: Dataset) -> tuple[UInt8Array, UInt8Array]:
    """Truth and red labels of all pixels that have a label, read without this package."""
    truth, predicted = [], []
    for pair in dataset:
        image = np.asarray(Image.open(pair.image)).transpose(2, 0, 1)
        truth.append(partly_right(image).ravel())
        predicted.append(red_labels(image[None]).ravel())
    known = np.concatenate(truth) != NO_LABEL
    return np.concatenate(truth)[known], np.concatenate(predicted)[known]


def counted(truth: UInt8Array, predicted: UInt8Array) -> list[list[int]]:
    """The confusion matrix, one cell after the other."""
    return [[int(((truth == t) & (predicted == p)).sum()) for p in (*range(5), NO_LABEL)] for t in range(5)]


def in_red(labels: UInt8Array) -> UInt8Array:
    """The image ``[H, W, 3]`` in which :func:`red_labels` finds these labels, also after JPEG."""
    return np.stack([labels * 64 + 32, np.full_like(labels, 90), np.full_like(labels, 90)], axis=-1).astype(np.uint8)


def placed_pair(folder: Path, shift: float = 0.0, **mask: Any) -> Dataset:
    """An image and its mask as GeoTIFFs of 1 m; the mask's grid lies ``shift`` m to the east, or is another one."""
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (6, 8)), np.ones((16, 16))).astype(np.uint8)
    place = {"crs": "EPSG:32631", "transform": Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    shifted = {"transform": Affine(1, 0, 500_000 + shift, 0, -1, 4_000_000)}
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    write_raster(folder / "images/a.tif", in_red(labels).transpose(2, 0, 1), photometric="RGB", **place)
    write_raster(folder / "masks/a.tif", labels[None], **{**place, **shifted, **mask})
    return find_dataset(folder)


# --- against others -------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn(data: Dataset) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = pixels(data)
    result = evaluate(FakeEngine(), data, SCHEMA)
    document = result.document()
    everything = list(range(5))
    assert (result.matrix.counts[:, :5] == metrics.confusion_matrix(truth, predicted, labels=everything)).all()
    assert [row["iou"] for row in document["classes"]] == pytest.approx(
        metrics.jaccard_score(truth, predicted, labels=everything, average=None)
    )
    assert [row["f1"] for row in document["classes"]] == pytest.approx(
        metrics.f1_score(truth, predicted, labels=everything, average=None)
    )
    assert document["mean_iou"] == pytest.approx(
        metrics.jaccard_score(truth, predicted, labels=everything, average="macro")
    )
    assert document["mean_f1"] == pytest.approx(metrics.f1_score(truth, predicted, labels=everything, average="macro"))
    assert document["overall_accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert 0.2 < document["mean_iou"] < 0.8, "scores at the ends would show little"


@pytest.mark.needs_torch
def test_scores_are_those_of_torchmetrics(data: Dataset) -> None:
    torch = pytest.importorskip("torch")
    others = pytest.importorskip("torchmetrics.classification")
    truth, predicted = (torch.from_numpy(labels.astype(np.int64)) for labels in pixels(data))
    document = evaluate(FakeEngine(), data, SCHEMA).document()
    each = others.MulticlassJaccardIndex(5, average=None)(predicted, truth).tolist()
    assert [row["iou"] for row in document["classes"]] == pytest.approx(each, abs=1e-6)
    for name, metric in (
        ("mean_iou", others.MulticlassJaccardIndex(5, average="macro")),
        ("mean_f1", others.MulticlassF1Score(5, average="macro")),
        ("overall_accuracy", others.MulticlassAccuracy(5, average="micro")),
    ):
        assert document[name] == pytest.approx(metric(predicted, truth).item(), abs=1e-6)


def test_scores_are_those_of_the_label_maps(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    result = run("evaluate", small_engine_path, "--data", data.folder, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    total = np.zeros((5, 6), np.int64)
    for pair in data:
        made = run("segment", pair.image, "--engine", small_engine_path, "-o", tmp_path / f"{pair.name}.tif")
        assert made.exit_code == 0, made.stderr
        truth = partly_right(np.asarray(Image.open(pair.image)).transpose(2, 0, 1))
        total += counted(truth, read_labels(tmp_path / f"{pair.name}.tif"))
    assert document["confusion"] == total.tolist()
    hit, union = np.diag(total), total.sum(axis=1) + total[:, :5].sum(axis=0) - np.diag(total)
    assert document["mean_iou"] == pytest.approx((hit / union).mean())
    assert document["labelled_pixels"] == total.sum()
    assert (total[:, :5].sum(axis=0) > 0).sum() >= 3, "a network of one answer would show little"
    assert [row["truth_pixels"] for row in document["classes"]] == total.sum(axis=1).tolist()
    assert document["subject"]["kind"] == "engine"
    assert not (tmp_path / "benchmarks").exists(), "nothing is written that was not asked for"


def test_graph_and_engine_agree(data: Dataset, small_graph: Path, small_engine_path: Path) -> None:
    graph, engine = (
        json.loads(run("evaluate", path, "--data", data.folder, "--json").stdout)
        for path in (small_graph, small_engine_path)
    )
    assert (graph["subject"]["kind"], engine["subject"]["kind"]) == ("graph", "engine")
    assert graph["labelled_pixels"] == engine["labelled_pixels"]
    assert np.abs(np.subtract(graph["confusion"], engine["confusion"])).sum() <= 0.002 * graph["labelled_pixels"]
    assert graph["mean_iou"] == pytest.approx(engine["mean_iou"], abs=2e-3)


# --- the way images are read ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [None, 0, 40])
def test_images_are_tiled_whatever_their_size_and_never_resized(tmp_path: Path, overlap: int | None) -> None:
    data = build_data(tmp_path / "data", lambda image: red_labels(image[None])[0])
    result = evaluate(FakeEngine(batch=3), data, SCHEMA, options=SegmentOptions(overlap=overlap))
    assert result.matrix.score("overall_accuracy") == 1.0, "noise that was resized would be other noise"
    assert result.matrix.pixels == sum(height * width for height, width in SIZES.values())
    used = default_overlap(64) if overlap is None else overlap
    assert result.tiles == sum(len(TileGrid.over(height, width, 64, used)) for height, width in SIZES.values())
    assert [(image.name, image.height, image.width) for image in result.images] == [
        (name, *size) for name, size in SIZES.items()
    ]


def test_every_image_has_a_score_of_its_own(data: Dataset) -> None:
    result = evaluate(FakeEngine(), data, SCHEMA)
    for pair, image in zip(data, result.images, strict=True):
        alone = evaluate(FakeEngine(), Dataset(data.folder, data.layout, (pair,)), SCHEMA)
        assert image.labelled_pixels == alone.matrix.pixels > 0
        assert image.mean_iou == alone.matrix.mean_iou
    assert result.matrix.pixels == sum(image.labelled_pixels for image in result.images)


def test_progress_runs_once_over_everything(data: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(FakeEngine(), data, SCHEMA, progress=lambda *now: seen.append(now))
    assert [done for done, _ in seen] == list(range(1, result.tiles + 1))
    assert {total for _, total in seen} == {result.tiles}


def test_pixels_without_data_are_missing_predictions(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    image = np.maximum(noise(100, 120), 1)
    image[:, 20:50, 30:60] = 0
    labels = red_labels(image[None])[0]
    add(folder, "t1_a", image, labels)
    (folder / "images/t1_a.png").unlink()
    write_raster(folder / "images/t1_a.tif", image, nodata=0, photometric="RGB")
    document = evaluate(FakeEngine(), find_dataset(folder), SCHEMA).document()
    assert document["pixels_without_prediction"] == 900
    assert document["labelled_pixels"] == 12000
    assert document["overall_accuracy"] == pytest.approx(1 - 900 / 12000)
    assert document["classes"][0]["iou"] < 1, "black would have been right: its red is of class 0"
    assert [row["iou"] for row in document["classes"][1:4]] == [1.0] * 3


def test_sixteen_bit_images_are_stretched_as_scenes_are(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    image = noise(70, 70)
    add(folder, "t1_a", image, red_labels(image[None])[0])
    (folder / "images/t1_a.png").unlink()
    write_raster(folder / "images/t1_a.tif", image.astype(np.uint16) * 4, photometric="RGB")
    with pytest.raises(DatasetError, match=r"t1_a\.tif.*uint16") as raised:
        evaluate(FakeEngine(), find_dataset(folder), SCHEMA)
    assert "--stretch" in (raised.value.hint or "")
    options = SegmentOptions(stretch=Stretch(0, 1020, percentiles=False))
    assert evaluate(FakeEngine(), find_dataset(folder), SCHEMA, options=options).matrix.score("overall_accuracy") == 1.0


def test_a_mask_of_another_size_is_found_before_anything_is_computed(data: Dataset) -> None:
    Image.fromarray(np.zeros((18, 64), np.uint8)).save(data.pairs[-1].mask)
    engine = FakeEngine()
    with pytest.raises(DatasetError, match=r"t3_a\.png is 300 x 1 px, its mask t3_a\.png 64 x 18$") as raised:
        evaluate(engine, data, SCHEMA)
    assert "never resized" in (raised.value.hint or "")
    assert engine.launches == 0


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("turned", ["image", "image and mask"])
def test_an_upright_mask_fits_an_image_that_is_stored_turned(tmp_path: Path, orientation: int, turned: str) -> None:
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (8, 8)), np.ones((16, 16))).astype(np.uint8)
    stored = np.rot90(labels, 2 if orientation == 3 else 1)
    exif = Image.Exif()
    exif[274] = orientation
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    Image.fromarray(in_red(stored)).save(tmp_path / "images/a.jpg", quality=95, subsampling=0, exif=exif)
    of_mask: dict[str, Any] = {"exif": exif} if "mask" in turned else {}
    Image.fromarray(stored if of_mask else labels).save(tmp_path / "masks/a.png", **of_mask)
    result = evaluate(FakeEngine(), find_dataset(tmp_path), SCHEMA)
    assert result.matrix.score("overall_accuracy") == 1
    assert any(f"a: turned upright, as its EXIF orientation ({orientation})" in note for note in result.notes)
    assert any("its mask was turned" in note for note in result.notes) == bool(of_mask)


def test_a_mask_that_lies_as_the_turned_image_is_stored_is_told_so(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    add(tmp_path, "a", noise(40, 64), np.zeros((40, 64), np.uint8))
    Image.fromarray(noise(40, 64).transpose(1, 2, 0).copy()).save(tmp_path / "images/a.png", exif=exif)
    with pytest.raises(DatasetError, match=r"is 40 x 64 px, its mask a\.png 64 x 40") as raised:
        evaluate(FakeEngine(), find_dataset(tmp_path), SCHEMA)
    assert "exiftool -Orientation=" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ({"shift": 30}, "30 px to the right"),
        ({"transform": Affine(1, 0, 500_000, 0, -1, 4_000_002)}, "2 px up"),
        ({"transform": Affine(2, 0, 500_000, 0, -2, 4_000_000)}, "a corner is 160 px off"),
        ({"transform": Affine(1, 0, 500_000, 0, 1, 3_999_904)}, "a corner is 96 px off"),
        ({"crs": "EPSG:32632"}, "a corner is"),
        ({"crs": "EPSG:4326"}, "in EPSG:4326, and its image in EPSG:32631"),
        ({"shift": 30, "crs": None}, "30 px to the right"),
    ],
)
def test_a_mask_of_another_place_is_refused(tmp_path: Path, mask: dict[str, Any], problem: str) -> None:
    engine, dataset = FakeEngine(), placed_pair(tmp_path, **mask)
    for judge in (lambda: evaluate(engine, dataset, SCHEMA), lambda: score_color_rules(dataset, dataset, SCHEMA)):
        with pytest.raises(DatasetError, match=rf"masks/a\.tif is not where its image is: .*{problem}") as raised:
            judge()
        assert "rio warp MASK" in (raised.value.hint or "")
    assert engine.launches == 0


@pytest.mark.parametrize(
    "mask",
    [{}, {"shift": 0.3}, {"crs": None}, {"crs": None, "transform": None}, {"crs": "+proj=utm +zone=31 +type=crs"}],
)
def test_a_mask_of_the_same_place_is_taken(tmp_path: Path, mask: dict[str, Any]) -> None:
    assert evaluate(FakeEngine(), placed_pair(tmp_path, **mask), SCHEMA).matrix.score("overall_accuracy") == 1


def test_what_the_advice_on_a_misplaced_mask_types_works(tmp_path: Path) -> None:
    from rasterio.rio.main import main_group as rio

    dataset = placed_pair(tmp_path, shift=30)
    (pair,) = dataset
    fitted = tmp_path / "fitted.tif"
    like, nodata = ("--like", str(pair.image)), ("--src-nodata", "255", "--dst-nodata", "255")
    rio(["warp", str(pair.mask), str(fitted), *like, *nodata], standalone_mode=False)
    result = evaluate(FakeEngine(), Dataset(tmp_path, "", (replace(pair, mask=fitted),)), SCHEMA)
    assert result.ignored_pixels == 96 * 30
    rio(["edit-info", str(pair.mask), *like, "--crs", "like", "--transform", "like"], standalone_mode=False)
    assert evaluate(FakeEngine(), dataset, SCHEMA).matrix.score("overall_accuracy") == 1


def test_pixels_that_nodata_takes_from_a_class_are_counted(tmp_path: Path) -> None:
    dataset = placed_pair(tmp_path, nodata=0)
    with rasterio.open(dataset.pairs[0].mask) as mask:
        lost = int((mask.read(1) == 0).sum())
    result = evaluate(FakeEngine(), dataset, SCHEMA)
    assert result.ignored_pixels == lost
    assert any(f"nodata value 0 of 1 mask takes the label from {lost} pixels of building" in n for n in result.notes)
    alone = LabelSchema("one", SCHEMA.classes[:1], ignore_values=(1, 2, 3))
    engine = FakeEngine(function=lambda tiles: 0 * red_labels(tiles))
    engine.schema = alone
    with pytest.raises(DatasetError, match="no pixel of the 1 masks") as raised:
        evaluate(engine, dataset, alone)
    assert f"{lost} pixels of building" in (raised.value.hint or "")


def test_a_label_that_is_no_class_is_the_engines_fault(data: Dataset) -> None:
    with pytest.raises(EngineError, match="gave the label 9; there are 5 classes"):
        evaluate(FakeEngine(function=lambda tiles: 0 * red_labels(tiles) + 9), data, SCHEMA)


@pytest.mark.parametrize("share", [0.01, 0.6])
def test_a_damaged_image_is_the_datas_fault(data: Dataset, share: float, small_engine_path: Path) -> None:
    path = data.pairs[0].image
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DatasetError, match=r"t1_a\.png"):
        evaluate(FakeEngine(), data, SCHEMA)
    assert_answer(run("evaluate", small_engine_path, "--data", data.folder, "--json"), 13, r"t1_a\.png")
    with pytest.raises(DatasetError, match=r"t1_a\.png"):
        score_color_rules(data, data, SCHEMA)


# --- classes --------------------------------------------------------------------------------------


def reordered(schema: LabelSchema) -> LabelSchema:
    return LabelSchema("other-order", tuple(reversed(schema.classes)), schema.ignore_colors, schema.ignore_values)


def test_other_classes_or_another_order_are_refused(data: Dataset) -> None:
    with pytest.raises(SchemaError, match=r"the network has 5 classes .*'loveda' has 7"):
        evaluate(FakeEngine(), data, load_schema("loveda"))
    engine = FakeEngine()
    with pytest.raises(SchemaError, match=r"building, land, .*'other-order' has water, vegetation") as raised:
        evaluate(engine, data, reordered(SCHEMA))
    assert "same order" in (raised.value.hint or "")
    assert engine.launches == 0


def test_numbered_classes_take_the_names_of_the_data(data: Dataset) -> None:
    engine = FakeEngine()
    engine.schema = numbered_schema(5)
    result = evaluate(engine, data, SCHEMA)
    assert [row["name"] for row in result.document()["classes"]] == list(SCHEMA.class_names)


def test_who_says_how_masks_are_read(data: Dataset, tmp_path: Path) -> None:
    assert data_schema(data, "deepglobe", SCHEMA).name == "deepglobe"
    assert data_schema(data, None, SCHEMA) is SCHEMA
    for nobody in (None, numbered_schema(5)):
        with pytest.raises(SchemaError, match="nothing says how the masks") as raised:
            data_schema(data, None, nobody)
        assert "--schema deepglobe, loveda, dubai" in (raised.value.hint or "")
    (data.folder / "schema.toml").write_text('[[classes]]\nname = "all"\ncolor = [1, 2, 3]\n')
    assert data_schema(data, None, SCHEMA).class_names == ("all",), "the data knows better than the network"
    assert data_schema(data, "dubai", None) == SCHEMA


def test_a_class_that_the_truth_never_shows_is_pointed_out(data: Dataset) -> None:
    result = evaluate(FakeEngine(), data.of_scenes(["t1"]), SCHEMA)
    assert result.notes == ()
    for pair in data:
        labels = partly_right(np.asarray(Image.open(pair.image)).transpose(2, 0, 1))
        labels[(labels == 3) | (labels == 4)] = 0
        Image.fromarray(labels).save(pair.mask)
    document = evaluate(FakeEngine(), data, SCHEMA).document()
    assert len(document["notes"]) == 1
    assert document["notes"][0].startswith("no pixel of the truth is vegetation, water:")
    vegetation, water = document["classes"][3:]
    assert vegetation["iou"] == 0.0, "predicted, never true"
    assert vegetation["predicted_pixels"] > 0
    assert (water["iou"], water["f1"], water["predicted_pixels"]) == (None, None, 0)
    ious = [row["iou"] for row in document["classes"] if row["iou"] is not None]
    assert document["mean_iou"] == pytest.approx(np.mean(ious))
    json.dumps(document, allow_nan=False)


def test_pixels_without_label_count_nowhere(data: Dataset) -> None:
    image = np.asarray(Image.open(data.pairs[0].image)).transpose(2, 0, 1)
    Image.fromarray(np.full(image.shape[1:], NO_LABEL, np.uint8)).save(data.pairs[0].mask)
    result = evaluate(FakeEngine(), data, SCHEMA)
    rest = evaluate(FakeEngine(), Dataset(data.folder, data.layout, data.pairs[1:]), SCHEMA)
    assert (result.matrix.counts == rest.matrix.counts).all()
    assert result.ignored_pixels == rest.ignored_pixels + 150 * 200
    assert (result.images[0].labelled_pixels, result.images[0].mean_iou) == (0, None)
    json.dumps(result.document(), allow_nan=False)


def test_masks_without_any_label_leave_nothing_to_judge_on(data: Dataset, small_engine_path: Path) -> None:
    for pair in data:
        height, width = SIZES[pair.name]
        Image.fromarray(np.full((height, width), NO_LABEL, np.uint8)).save(pair.mask)
    with pytest.raises(DatasetError, match="no pixel of the 4 masks"):
        evaluate(FakeEngine(), data, SCHEMA)
    assert_answer(run("evaluate", small_engine_path, "--data", data.folder), 13, "no pixel of the 4 masks")


def test_images_of_the_training_are_pointed_out(data: Dataset) -> None:
    record = {"training_images": ["t1_a", "t3_a", "elsewhere"]}
    result = evaluate(FakeEngine(), data, SCHEMA, trained_on=record)
    assert [note for note in result.notes if "trained on" in note] == [
        "2 of the 4 images have the names of images that the network was trained on (t1_a, ...)"
    ]
    for moved in (["train/t1_a"], ["img_dir/train/t1_a"]):
        result = evaluate(FakeEngine(), data, SCHEMA, trained_on={"training_images": moved})
        assert any("1 of the 4 images" in note for note in result.notes), "other folders, the same images"
    for harmless in ({"training_images": ["elsewhere", "t1_a/b", 5]}, {"training_images": 7}, {"data": "t1_a"}, None):
        assert evaluate(FakeEngine(), data, SCHEMA, trained_on=harmless).notes == ()


# --- maps and pictures ----------------------------------------------------------------------------


def test_maps_and_pictures_are_what_was_judged(data: Dataset, tmp_path: Path) -> None:
    evaluate(FakeEngine(), data, SCHEMA, maps=tmp_path / "maps")
    expected = [f"{name}_labels.{suffix}" for name in SIZES for suffix in ("png", "tif", "tif.aux.xml")]
    assert names_in(tmp_path / "maps") == sorted(expected)
    for pair in data:
        image = np.asarray(Image.open(pair.image)).transpose(2, 0, 1)
        assert (read_labels(tmp_path / "maps" / f"{pair.name}_labels.tif") == red_labels(image[None])[0]).all()


def test_maps_of_subfolders_lie_in_subfolders(tmp_path: Path) -> None:
    for place in ("Train/Urban", "Val/Rural"):
        for part in ("images_png", "masks_png"):
            (tmp_path / "data" / place / part).mkdir(parents=True)
        Image.fromarray(noise(20, 20).transpose(1, 2, 0)).save(tmp_path / "data" / place / "images_png/7.v2.png")
        Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "data" / place / "masks_png/7.v2.png")
    engine = FakeEngine()
    engine.schema = load_schema("loveda")
    evaluate(engine, find_dataset(tmp_path / "data"), engine.schema, maps=tmp_path / "maps")
    made = [name for name in names_in(tmp_path / "maps") if "." in name]
    assert made == [
        f"{place}/7.v2_labels.{suffix}"
        for place in ("Train/Urban", "Val/Rural")
        for suffix in ("png", "tif", "tif.aux.xml")
    ]


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (530, 519), (541, 601)])
def test_the_picture_of_a_perfect_map_shows_no_error(tmp_path: Path, size: tuple[int, int]) -> None:
    """Truth and prediction are made smaller in the same way, or borders between classes turn red."""
    image = noise(*size)
    add(tmp_path / "data", "t1_a", image, red_labels(image[None])[0])
    evaluate(FakeEngine(tile=256), find_dataset(tmp_path / "data"), SCHEMA, maps=tmp_path / "maps")
    picture = np.asarray(Image.open(tmp_path / "maps/t1_a_labels.png"))
    width = (picture.shape[1] - 5 * 16) // 4 + 16
    errors = picture[16 + 25 : 16 + 25 + 520, 3 * width + 16 : -16]
    assert not (errors == (200, 40, 40)).all(axis=-1).any()


def test_errors_are_red_in_the_picture(data: Dataset, tmp_path: Path) -> None:
    evaluate(FakeEngine(), data, SCHEMA, maps=tmp_path / "maps")
    picture = np.asarray(Image.open(tmp_path / "maps/t1_a_labels.png"))
    truth = partly_right(np.asarray(Image.open(data.pairs[0].image)).transpose(2, 0, 1))
    predicted = read_labels(tmp_path / "maps/t1_a_labels.tif")
    wrong = (truth != NO_LABEL) & (truth != predicted)
    assert (picture == (200, 40, 40)).all(axis=-1).sum() == wrong.sum()


# --- the command ----------------------------------------------------------------------------------


def images_of(document: dict[str, Any]) -> list[str]:
    return [image["name"] for image in document["images"]]


def test_the_table_shows_every_class_and_the_means(data: Dataset, small_engine_path: Path) -> None:
    result = run("evaluate", small_engine_path, "--data", data.folder)
    assert result.exit_code == 0, result.stderr
    for word in (*SCHEMA.class_names, "mIoU", "OA", "mF1", "folder pair", "IoU"):
        assert word in result.stdout


def test_scenes_and_lists_choose_images(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    command = ("evaluate", small_engine_path, "--data", data.folder, "--json")
    assert images_of(json.loads(run(*command, "--scenes", "t1, t3").stdout)) == ["t1_a", "t1_b", "t3_a"]
    (tmp_path / "val.txt").write_text("t2_a.png\n")
    assert images_of(json.loads(run(*command, "--list", "val.txt").stdout)) == ["t2_a"]
    assert_answer(run(*command, "--scenes", "t1", "--list", "val.txt"), 2, "choose scenes or a list")
    assert_answer(run(*command, "--scenes", "t9"), 13, r"no scene t9 — its scenes are t1, t2, t3")
    assert_answer(run(*command, "--scenes", ","), 13, "no image to judge on")
    assert_answer(run(*command, "--list", "nowhere.txt"), 13, r"nowhere\.txt cannot be read")


def test_maps_and_scores_are_saved_in_a_new_run(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    command = ("evaluate", small_engine_path, "--data", data.folder, "--scenes", "t2", "--save-maps", "--json")
    documents = [json.loads(run(*command, "-w", tmp_path / "here").stdout) for _ in range(2)]
    runs = sorted((tmp_path / "here" / "benchmarks").iterdir())
    assert len(runs) == 2
    assert {document["folder"] for document in documents} == set(map(str, runs))
    for folder in runs:
        assert folder.name.partition("-")[2].startswith("small.fp32.cpu-accuracy")
        assert [name for name in names_in(folder) if name != "maps"] == [
            "accuracy.json",
            "maps/t2_a_labels.png",
            "maps/t2_a_labels.tif",
            "maps/t2_a_labels.tif.aux.xml",
        ]
    assert json.loads((Path(documents[0]["folder"]) / "accuracy.json").read_text()) == documents[0]


def test_an_output_without_maps_holds_the_scores_alone(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    command = ("evaluate", small_engine_path, "--data", data.folder)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new/deep"):
        assert run(*command, "-o", folder).exit_code == 0
        assert names_in(tmp_path / folder) == ["accuracy.json"]
    assert not (tmp_path / "benchmarks").exists()


def test_an_output_with_something_in_it_is_left_alone(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    command = ("evaluate", small_engine_path, "--data", data.folder, "--save-maps")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert_answer(run(*command, "-o", "mine"), 2, "mine is not empty")
    assert names_in(tmp_path / "mine") == ["notes.txt"]
    result = run(*command, "-o", "mine/notes.txt")
    assert_answer(result, 2, "not a folder")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_failure_leaves_no_scores(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(data.folder / "masks/t1_b.png")
    command = ("evaluate", small_engine_path, "--data", data.folder, "--save-maps", "-o", "out")
    assert_answer(run(*command), 4, r"t1_b\.png holds the value 99")
    assert not (tmp_path / "out").exists()
    assert not [name for name in names_in(tmp_path) if ".part" in name]


def test_results_take_the_place_of_an_empty_folder(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("evaluate", small_engine_path, "--data", data.folder, "-o", "out").exit_code == 0
    assert names_in(tmp_path / "out") == ["accuracy.json"]


def test_answers_have_the_documented_codes(data: Dataset, small_engine_path: Path, tmp_path: Path) -> None:
    at = ("--data", data.folder)
    assert_answer(run("evaluate", small_engine_path, "--data", "nowhere"), 13, "dataset nowhere does not exist")
    assert_answer(run("evaluate", small_engine_path, "--data", data.folder / "images"), 13, "no labelled images")
    assert_answer(run("evaluate", small_engine_path, *at, "--schema", "atlantis"), 4, "unknown label schema 'atlantis'")
    assert_answer(run("evaluate", small_engine_path, *at, "--schema", "loveda"), 4, "'loveda' has 7")
    assert_answer(run("evaluate", "nowhere.onnx", *at), 6, r"nowhere\.")
    assert_answer(run("evaluate", small_engine_path, *at, "--overlap", "64"), 2, "overlap")
    assert_answer(run("evaluate", small_engine_path, *at, "--bands", "1,2,9"), 13, "bands")
    assert_answer(run("evaluate", small_engine_path, *at, "--precision", "bf16"), 2, "its own tile, precision")
    assert_answer(run("evaluate", small_engine_path, *at, "--device", "cuda"), 2, "its own tile, precision and device")
    assert_answer(run("evaluate", small_engine_path), 2, "--data")
    (data.folder / "masks/t1_b.png").unlink()
    assert_answer(run("evaluate", small_engine_path, *at), 13, "1 of 4 images .* have no mask")


def test_a_graph_of_numbered_classes_needs_a_schema(data: Dataset, small_graph: Path, tmp_path: Path) -> None:
    for path in (small_graph, small_graph.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    manifest = json.loads((tmp_path / "small.json").read_text())
    manifest["labels"] = numbered_schema(5).to_document()
    (tmp_path / "small.json").write_text(json.dumps(manifest))
    command = ("evaluate", tmp_path / "small.onnx", "--data", data.folder)
    assert_answer(run(*command), 4, "nothing says how the masks .* --schema deepglobe")
    assert run(*command, "--schema", "dubai").exit_code == 0


def test_a_checkpoint_without_torch_says_what_to_install(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cdkd_edge.quality.network", None)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "ckpt.pt").touch()
    result = run("evaluate", "ckpt.pt", "--data", data.folder)
    assert_answer(result, 11, r"judging a checkpoint needs torch, .*pip install 'cdkd-edge\[export\]'")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, small_config: Any, small_weights: Any) -> Path:
    """A folder with a checkpoint that knows its classes and its training, and one that knows neither."""
    torch = pytest.importorskip("torch")
    from cdkd_edge.model.checkpoint import save_checkpoint
    from cdkd_edge.model.network import SegmentationNetwork

    folder = tmp_path_factory.mktemp("checkpoints")
    network = SegmentationNetwork(small_config)
    network.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in small_weights.items()}, strict=False)
    save_checkpoint(network.eval(), folder / "known.pt", schema=SCHEMA, training={"training_images": ["t2_a"]})
    save_checkpoint(network.eval(), folder / "unknown.pt")
    return folder


@pytest.mark.needs_torch
def test_checkpoint_and_graph_agree(data: Dataset, checkpoints: Path, small_graph: Path) -> None:
    network, graph = (
        json.loads(run("evaluate", path, "--data", data.folder, "--json").stdout)
        for path in (checkpoints / "known.pt", small_graph)
    )
    assert network["subject"]["kind"] == "checkpoint"
    assert network["subject"]["runtime"].startswith("torch ")
    assert network["labelled_pixels"] == graph["labelled_pixels"]
    assert np.abs(np.subtract(network["confusion"], graph["confusion"])).sum() <= 0.002 * graph["labelled_pixels"]
    assert network["mean_iou"] == pytest.approx(graph["mean_iou"], abs=2e-3)
    assert network["notes"] == [
        "1 of the 4 images have the names of images that the network was trained on (t2_a, ...)"
    ]


@pytest.mark.needs_torch
def test_a_checkpoint_without_names_needs_a_schema(data: Dataset, checkpoints: Path) -> None:
    command = ("evaluate", checkpoints / "unknown.pt", "--data", data.folder)
    assert_answer(run(*command), 4, "nothing says how the masks .* --schema deepglobe, loveda, dubai")
    result = run(*command, "--schema", "dubai", "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["name"] for row in json.loads(result.stdout)["classes"]] == list(SCHEMA.class_names)
    assert_answer(run(*command, "--schema", "loveda"), 4, "'loveda' has 7 classes")


@pytest.mark.needs_torch
def test_half_precision_is_close(data: Dataset, checkpoints: Path) -> None:
    command = ("evaluate", checkpoints / "known.pt", "--data", data.folder, "--device", "cpu", "--json")
    whole, half = (json.loads(run(*command, "--precision", name).stdout) for name in ("fp32", "bf16"))
    assert (whole["subject"]["precision"], half["subject"]["precision"]) == ("fp32", "bf16")
    assert half["mean_iou"] == pytest.approx(whole["mean_iou"], abs=0.03)


@pytest.mark.needs_torch
def test_a_device_or_precision_that_is_not_there_is_wrong_usage(data: Dataset, checkpoints: Path) -> None:
    import torch

    command = ("evaluate", checkpoints / "known.pt", "--data", data.folder)
    if not torch.cuda.is_available():
        assert_answer(run(*command, "--device", "cuda"), 2, "device 'cuda' cannot be used")
    assert_answer(run(*command, "--device", "abacus"), 2, "device 'abacus' cannot be used")
    assert_answer(run(*command, "--precision", "fp8"), 2, "precision 'fp8'.* fp32, bf16")


@pytest.mark.needs_torch
def test_a_checkpoint_that_cannot_be_used(data: Dataset, checkpoints: Path, tmp_path: Path) -> None:
    assert_answer(run("evaluate", "nowhere.pt", "--data", data.folder), 3, r"nowhere\.pt does not exist")
    (tmp_path / "text.pt").write_text("hello")
    assert_answer(run("evaluate", "text.pt", "--data", data.folder), 3, r"text\.pt")


def test_subjects_know_what_they_are(small_graph: Path, small_engine_path: Path) -> None:
    for path, kind, runtime in (
        (small_graph, "graph", "onnxruntime-cpu"),
        (small_engine_path, "engine", "onnxruntime"),
    ):
        subject = open_artefact(path)
        assert (subject.kind, subject.precision, subject.path) == (kind, "fp32", path)
        assert subject.runtime.startswith(runtime)
        assert subject.labeller.schema.class_names == SCHEMA.class_names
        assert subject.labeller.tile == 64
        subject.labeller.close()


# --- colour rules ---------------------------------------------------------------------------------

TONES = np.array([(200, 40, 40), (160, 140, 90), (124, 116, 104), (40, 120, 40), (20, 40, 160)], np.uint8)


def toned(folder: Path, *scenes: str, order: tuple[int, ...] = (0, 1, 2, 3, 4), size: int = 90) -> Dataset:
    """Scenes whose classes differ by colour and nothing else."""
    for seed, scene in enumerate(scenes):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 5, (size, size)).astype(np.uint8)
        image = TONES[np.array(order)[labels]].astype(int) + rng.integers(-6, 7, (size, size, 3))
        add(folder, f"{scene}_a", image.astype(np.uint8).transpose(2, 0, 1), labels)
    return find_dataset(folder)


def test_colour_rules_tell_apart_what_differs_by_colour(tmp_path: Path) -> None:
    data = toned(tmp_path / "data", "t1", "t2", size=600)  # larger than the rules' tiles
    scores = score_color_rules(data.of_scenes(["t1"]), data.of_scenes(["t2"]), SCHEMA)
    assert set(scores) == {"nearest mean", "colour histogram"}
    for result in scores.values():
        assert result.mean_iou > 0.99


def test_colour_rules_learn_from_the_training_images_alone(tmp_path: Path) -> None:
    training = toned(tmp_path / "training", "t1")
    validation = toned(tmp_path / "validation", "t1", order=(1, 2, 3, 4, 0))
    for result in score_color_rules(training, validation, SCHEMA).values():
        assert result.score("overall_accuracy") < 0.01, "the same colours mean other classes there"


def test_a_class_without_training_pixels_is_never_predicted(tmp_path: Path) -> None:
    training, validation = toned(tmp_path / "training", "t1"), toned(tmp_path / "validation", "t2")
    labels = np.asarray(Image.open(training.pairs[0].mask)).copy()
    labels[labels == 3] = NO_LABEL
    Image.fromarray(labels).save(training.pairs[0].mask)
    dark = np.asarray(Image.open(validation.pairs[0].image)).copy()
    dark[:20] = 0  # a class never seen has no mean colour, not black
    Image.fromarray(dark).save(validation.pairs[0].image)
    for result in score_color_rules(training, validation, SCHEMA).values():
        assert result.counts[:, 3].sum() == 0
        assert result.class_scores("iou")[3] == 0.0


def test_a_class_of_two_colours_needs_the_histogram(tmp_path: Path) -> None:
    """Building is red or cyan, land grey: the mean of the first is the colour of the second."""
    for seed, scene in enumerate(("t1", "t2")):
        labels = np.random.default_rng(seed).integers(0, 3, (60, 60))
        image = np.array([(228, 28, 28), (28, 228, 228), (132, 132, 132)], np.uint8)[labels]
        add(tmp_path / "data", f"{scene}_a", image.transpose(2, 0, 1), (labels == 2).astype(np.uint8))
    data = find_dataset(tmp_path / "data")
    scores = score_color_rules(data.of_scenes(["t1"]), data.of_scenes(["t2"]), SCHEMA)
    assert scores["colour histogram"].score("overall_accuracy") == 1.0
    assert scores["nearest mean"].score("overall_accuracy") < 0.9


def test_colour_rules_learn_nothing_from_pixels_without_data(tmp_path: Path) -> None:
    """Filled with the network's mean colour, they would teach that grey is the first class."""
    training, validation = toned(tmp_path / "training", "t1"), toned(tmp_path / "validation", "t2")
    image = np.asarray(Image.open(training.pairs[0].image)).transpose(2, 0, 1).copy()
    labels = np.asarray(Image.open(training.pairs[0].mask)).copy()
    image[:, :60], labels[:60] = 0, 0
    Image.fromarray(labels).save(training.pairs[0].mask)
    training.pairs[0].image.unlink()
    write_raster(training.pairs[0].image.with_suffix(".tif"), image, nodata=0, photometric="RGB")
    for result in score_color_rules(find_dataset(training.folder), validation, SCHEMA).values():
        assert result.mean_iou > 0.99


def test_what_is_odd_about_images_is_said(data: Dataset) -> None:
    """Damage that the decoder survives, and bands that nobody tagged."""
    for pair in data.pairs[:2]:
        scene = np.asarray(Image.open(pair.image)).transpose(2, 0, 1)
        pair.image.unlink()
        write_raster(pair.image, scene, photometric="MINISBLACK")
    notes = evaluate(FakeEngine(), data, SCHEMA).notes
    assert f"{data.pairs[0].name}, {data.pairs[1].name}: bands 1,2,3 without color tags" in notes[0]
