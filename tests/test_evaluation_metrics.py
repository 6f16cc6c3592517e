"""The metrics, held against scikit-learn's on the same predictions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from mambamic.evaluation.metrics import (
    confusion_counts,
    mean_of_defined,
    measure,
    names_by_class,
    nll_of_each,
)
from mambamic.evaluation.predictions import Predictions

from .random_predictions import random_predictions

KINDS = ("multi-class", "binary", "multi-label")
SIMILAR = 1e-6
CASES = [
    pytest.param(random_predictions(kind, ties=ties, seed=seed), id=f"{kind}-{ties=}-{seed}")
    for kind in KINDS
    for ties in (False, True)
    for seed in range(3)
]
ABSENT = [
    pytest.param(random_predictions(kind, absent=(1, 3), ties=True), id=kind)
    for kind in ("multi-class", "multi-label")
]


def expected_by_class(predictions: Predictions) -> dict[str, list[float]]:
    """Each class against the rest, by scikit-learn; only for classes that are there."""
    rows: dict[str, list[float]] = {name: [] for name in names_by_class(True)}
    for place in range(len(predictions.classes)):
        truth, decided = predictions.truth[:, place], predictions.decided[:, place]
        rows["accuracy"].append(sk.accuracy_score(truth, decided))
        rows["precision"].append(sk.precision_score(truth, decided, zero_division=0))
        rows["sensitivity"].append(sk.recall_score(truth, decided))
        rows["specificity"].append(sk.recall_score(~truth, ~decided))
        rows["f1"].append(sk.f1_score(truth, decided))
        rows["auc"].append(sk.roc_auc_score(truth, predictions.probabilities[:, place]))
    return rows


@pytest.mark.parametrize("predictions", CASES)
def test_each_class_agrees_with_scikit_learn(predictions: Predictions) -> None:
    values = measure(predictions)
    expected = expected_by_class(predictions)
    assert tuple(values.by_class) == names_by_class(predictions.multi_label)
    for name, found in values.by_class.items():
        assert found.tolist() == pytest.approx(expected[name], abs=SIMILAR, rel=0), name
        if name != "accuracy":
            mean = float(np.mean(expected[name]))
            assert float(values.overall[name]) == pytest.approx(mean, abs=SIMILAR, rel=0), name


@pytest.mark.parametrize("predictions", CASES)
def test_overall_agrees_with_scikit_learn(predictions: Predictions) -> None:
    values = {name: float(value) for name, value in measure(predictions).overall.items()}
    truth, probabilities = predictions.truth, predictions.probabilities
    if predictions.multi_label:
        columns = range(len(predictions.classes))
        expected = {
            "accuracy": 1 - sk.hamming_loss(truth, predictions.decided),
            "exact_match": sk.accuracy_score(truth, predictions.decided),
            "precision": sk.precision_score(truth, predictions.decided, average="macro"),
            "sensitivity": sk.recall_score(truth, predictions.decided, average="macro"),
            "f1": sk.f1_score(truth, predictions.decided, average="macro"),
            "auc": sk.roc_auc_score(truth, probabilities, average="macro"),
            "brier": np.mean(
                [sk.brier_score_loss(truth[:, k], probabilities[:, k]) for k in columns]
            ),
            "nll": np.mean([sk.log_loss(truth[:, k], probabilities[:, k]) for k in columns]),
        }
    else:
        labels, top = predictions.labels, predictions.decided.argmax(1)
        binary = predictions.kind == "binary"
        scores = probabilities[:, 1] if binary else probabilities
        # Rows of float32 sum to 1 but for their last digit, which scikit-learn will not have.
        rows = probabilities / probabilities.sum(1, keepdims=True)
        expected = {
            "accuracy": sk.accuracy_score(labels, top),
            "precision": sk.precision_score(labels, top, average="macro"),
            "sensitivity": sk.balanced_accuracy_score(labels, top),
            "f1": sk.f1_score(labels, top, average="macro"),
            "auc": sk.roc_auc_score(labels, scores if binary else rows, multi_class="ovr"),
            "brier": sk.brier_score_loss(labels, scores if binary else rows),
            "nll": sk.log_loss(labels, rows),
        }
    assert expected.keys() == values.keys() - {"specificity", "calibration_error"}
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), abs=SIMILAR, rel=0), name


@pytest.mark.parametrize("predictions", CASES)
def test_confusion_agrees_with_scikit_learn(predictions: Predictions) -> None:
    found = confusion_counts(predictions)
    if predictions.multi_label:
        tables = sk.multilabel_confusion_matrix(predictions.truth, predictions.decided)
        assert found == [[table[1, 1], table[1, 0], table[0, 1], table[0, 0]] for table in tables]
    else:
        expected = sk.confusion_matrix(predictions.labels, predictions.decided.argmax(1))
        assert found == expected.tolist()


@pytest.mark.parametrize("predictions", ABSENT)
def test_absent_classes_have_a_specificity_and_no_more(predictions: Predictions) -> None:
    values = measure(predictions)
    there = predictions.truth.any(0)
    assert there.tolist() == [True, False, True, False, True]
    for name in ("precision", "sensitivity", "f1", "auc"):
        assert np.isnan(values.by_class[name][~there]).all()
        assert float(values.overall[name]) == values.by_class[name][there].mean()
    for place in np.flatnonzero(~there):
        decided = predictions.decided[:, place]
        assert decided.any()
        expected = sk.recall_score(np.ones(len(predictions)), ~decided)
        assert values.by_class["specificity"][place] == pytest.approx(expected, abs=SIMILAR, rel=0)
    f1 = sk.f1_score(
        predictions.truth,
        predictions.decided,
        labels=np.flatnonzero(there),
        average="macro",
    )
    assert float(values.overall["f1"]) == pytest.approx(f1, abs=SIMILAR, rel=0)


def test_a_class_that_is_never_predicted_has_precision_0() -> None:
    truth = np.eye(3, dtype=bool)[[0, 1, 2, 2]]
    probabilities = np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.2, 0.7]])
    values = measure(Predictions(("a", "b", "c"), truth, probabilities))
    assert values.by_class["precision"].tolist() == [0.5, 0, 1]
    assert values.by_class["auc"][1] == pytest.approx(5 / 6)


def test_a_single_label() -> None:
    truth = np.array([[True], [False], [True]])
    values = measure(Predictions(("a",), truth, np.array([[0.9], [0.2], [0.4]]), multi_label=True))
    assert float(values.overall["accuracy"]) == pytest.approx(2 / 3)
    assert float(values.overall["auc"]) == 1


def test_a_label_that_every_image_carries() -> None:
    truth = np.array([[True, True], [True, False]])
    probabilities = np.array([[0.9, 0.6], [0.8, 0.5]])
    values = measure(Predictions(("a", "b"), truth, probabilities, multi_label=True))
    assert np.isnan(values.by_class["specificity"]).tolist() == [True, False]
    assert np.isnan(values.by_class["auc"]).tolist() == [True, False]
    # 0.5 is not above the threshold.
    assert values.by_class["accuracy"].tolist() == [1, 1]


def test_certain_mistakes_have_a_finite_likelihood() -> None:
    predictions = Predictions(("a", "b"), np.array([[True, False]]), np.array([[0.0, 1.0]]))
    (nll,) = nll_of_each(predictions)
    assert nll == pytest.approx(-np.log(np.finfo(float).eps))


def test_the_mean_of_nothing() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    means = mean_of_defined(values)
    assert means[0] == 2
    assert np.isnan(means[1])
