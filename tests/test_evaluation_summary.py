"""What leaves an evaluation: JSON without nan, a table of predictions, mistakes, notes."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from mambamic.evaluation.predictions import Predictions
from mambamic.evaluation.summary import Measured, predictions_csv, worst_mistakes

from .random_predictions import random_predictions

KINDS = pytest.mark.parametrize("kind", ["multi-class", "binary", "multi-label"])


@KINDS
def test_json_holds_the_metrics_and_never_nan(kind: str) -> None:
    absent = () if kind == "binary" else (1,)
    predictions = random_predictions(kind, 80, absent=absent)
    measured = Measured.of(predictions, 20, 0)
    everything = [measured.overall_json(), measured.classes_json(), measured.confusion_json()]
    assert json.loads(json.dumps(everything, allow_nan=False)) == everything
    for name, metric in measured.overall_json().items():
        assert metric["value"] == pytest.approx(float(measured.values.overall[name]), abs=1e-7)
    rows = measured.classes_json()
    assert tuple(rows) == predictions.classes
    assert [row["images"] for row in rows.values()] == predictions.truth.sum(0).tolist()
    if absent:
        nothing = {"value": None, "low": None, "high": None}
        assert rows["class 1"]["auc"] == rows["class 1"]["precision"] == nothing
        assert rows["class 1"]["specificity"]["low"] > 0
        assert any("No image of class 1 is in this split" in note for note in measured.notes())
    else:
        assert not any("No image of" in note for note in measured.notes())


def test_notes() -> None:
    truth = np.eye(3, dtype=bool)[[0, 0, 2]]
    probabilities = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.6, 0.2, 0.2]])
    notes = Measured.of(Predictions(("a", "b", "c"), truth, probabilities), 5, 0).notes()
    assert notes[0].startswith("No image of b ")
    assert notes[1].startswith("c: never predicted")
    assert notes[2].startswith("Where nothing is wrong")
    assert Measured.of(random_predictions("binary"), 5, 0).notes()[0].startswith("Two classes")
    every = np.array([[True, True], [True, False]])
    labels = Predictions(("a", "b"), every, np.array([[0.6, 0.7], [0.8, 0.1]]), multi_label=True)
    notes = Measured.of(labels, 5, 0).notes()
    assert notes[0].startswith("Every image is one of a:")
    assert "above 0.5" in notes[-1]


@KINDS
def test_the_table_gives_back_the_predictions(kind: str) -> None:
    predictions = random_predictions(kind, 30)
    names = [f'odd, "name" {index}.png' for index in range(30)]
    rows = list(csv.DictReader(io.StringIO(predictions_csv(predictions, names))))
    assert [row["image"] for row in rows] == names
    for key, expected in (("true", predictions.truth), ("predicted", predictions.decided)):
        found = [set(row[key].split("|")) - {""} for row in rows]
        assert found == [
            {predictions.classes[place] for place in np.flatnonzero(row)} for row in expected
        ]
    values = [[float(row[f"probability_{name}"]) for name in predictions.classes] for row in rows]
    assert np.array_equal(
        np.array(values, np.float32), predictions.probabilities.astype(np.float32)
    )


def test_the_most_confident_mistakes_come_first() -> None:
    predictions = random_predictions("multi-class")
    mistakes = worst_mistakes(predictions, 1000)
    assert {mistake.index for mistake in mistakes} == set(np.flatnonzero(~predictions.correct))
    ordered = [mistake.probability for mistake in mistakes]
    assert ordered == sorted(ordered, reverse=True)
    assert worst_mistakes(predictions, 3) == mistakes[:3]
    first = mistakes[0]
    row = dict(zip(predictions.classes, predictions.probabilities[first.index], strict=True))
    assert first.true == predictions.classes[predictions.labels[first.index]]
    assert (first.probability, first.of_true) == (row[first.predicted], row[first.true])
    assert first.probability == max(row.values())


def test_mistaken_labels() -> None:
    truth = np.array([[True, False], [False, False]])
    predictions = Predictions(("a", "b"), truth, np.array([[0.1, 0.8], [0.3, 0.2]]), True)
    missed, wrong = worst_mistakes(predictions, 5)
    assert (missed.true, missed.predicted, missed.probability) == ("a", "not a", 0.9)
    assert (wrong.true, wrong.predicted, wrong.probability) == ("not b", "b", 0.8)
