"""The confusion matrix against counting by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cdkd_edge.quality.metrics import CLASS_METRICS, METRICS, ConfusionMatrix, Metric


def labels(*values: int) -> npt.NDArray[np.uint8]:
    return np.array(values, np.uint8)


def test_scores_of_a_case_counted_by_hand() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(labels(0, 0, 0, 0, 1, 1, 2, 2), labels(0, 0, 0, 1, 1, 2, 2, 0))
    assert matrix.counts.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]]
    assert matrix.counts.dtype == np.int64
    assert matrix.class_scores("iou").tolist() == [3 / 5, 1 / 3, 1 / 3]
    assert matrix.class_scores("f1").tolist() == [6 / 8, 2 / 4, 2 / 4]
    assert matrix.mean_iou == pytest.approx((3 / 5 + 2 / 3) / 3)
    assert matrix.score("mean_f1") == pytest.approx((6 / 8 + 1) / 3)
    assert matrix.score("overall_accuracy") == 5 / 8
    assert matrix.pixels == 8


def test_pixels_without_truth_are_left_out() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(labels(255, 255, 0, 1), labels(0, 255, 0, 1))
    assert matrix.pixels == 2
    assert matrix.score("overall_accuracy") == 1.0
    assert matrix.class_scores("iou").tolist() == [1.0, 1.0]


def test_a_missing_prediction_is_a_miss_but_no_false_alarm() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(labels(0, 0, 1, 1), labels(0, 255, 1, 1))
    assert matrix.class_scores("iou").tolist() == [0.5, 1.0]
    assert matrix.class_scores("f1").tolist() == [2 / 3, 1.0]
    assert matrix.score("overall_accuracy") == 0.75


def test_a_class_that_never_occurs_has_no_score_and_is_left_out_of_means() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(labels(0, 0, 1), labels(0, 1, 1))
    assert np.isnan(matrix.class_scores("iou")[2])
    assert np.isnan(matrix.class_scores("f1")[2])
    assert matrix.mean_iou == 0.5
    matrix.update(labels(0), labels(2))  # predicted once, never true: it counts now, as zero
    assert matrix.class_scores("iou")[2] == 0.0


def test_an_empty_matrix_has_no_scores() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8))
    assert np.isnan(
        [matrix.mean_iou, matrix.score("mean_f1"), matrix.score("overall_accuracy"), *matrix.class_scores("iou")]
    ).all()


def test_agrees_with_counting_pixel_by_pixel_in_pieces_or_merged() -> None:
    rng = np.random.default_rng(0)
    values = np.array([0, 1, 2, 3, 255], np.uint8)
    truth, prediction = rng.choice(values, (2, 37, 53))
    expected = np.zeros((4, 5), np.int64)
    for true, predicted in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if true != 255:
            expected[true, min(predicted, 4)] += 1
    whole, left, right = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(truth, prediction)
    left.update(truth[:, :20], prediction[:, :20])  # views, not contiguous
    right.update(truth[:, 20:], prediction[:, 20:])
    left += right
    assert (whole.counts == expected).all()
    assert (left.counts == expected).all()
    for label in range(4):
        true, found = (truth == label), (prediction == label) & (truth != 255)
        assert whole.class_scores("iou")[label] == (true & found).sum() / (true | found).sum()


def test_all_255_classes_are_possible() -> None:
    every = np.arange(255, dtype=np.uint8)
    matrix = ConfusionMatrix(255)
    matrix.update(every, every)
    assert matrix.mean_iou == 1.0


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        (labels(0, 1), labels(0), "shape"),
        (labels(0, 2), labels(0, 1), "truth holds the label 2"),
        (labels(0, 1), labels(0, 254), "prediction holds the label 254"),
        (labels(255, 1), labels(7, 1), "prediction holds the label 7"),
        (np.array([0, 1]), labels(0, 1), "int64"),
    ],
)
def test_bad_pieces_are_refused_and_change_nothing(
    truth: npt.NDArray[np.uint8], prediction: npt.NDArray[np.uint8], message: str
) -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=message):
        matrix.update(truth, prediction)
    assert matrix.pixels == 0


def test_matrices_of_other_sizes_do_not_add_up() -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="3 classes"):
        matrix += ConfusionMatrix(3)
    for classes in (0, 256):
        with pytest.raises(ValueError, match="classes"):
            ConfusionMatrix(classes)


def test_a_new_metric_shows_in_every_score_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric("worst_iou", "worst IoU", lambda counts: np.nanmin(CLASS_METRICS["iou"].score(counts), axis=-1))
    monkeypatch.setitem(METRICS, metric.name, metric)
    matrix = ConfusionMatrix(2)
    matrix.update(labels(0, 0, 1), labels(0, 1, 1))
    assert matrix.scores()["worst_iou"] == 0.5
