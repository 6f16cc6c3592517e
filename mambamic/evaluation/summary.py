"""What was measured, in the forms in which it leaves: JSON, CSV, a list of mistakes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambamic.evaluation.bootstrap import Interval, intervals, resample
from mambamic.evaluation.metrics import Values, confusion_counts, measure
from mambamic.evaluation.predictions import THRESHOLD, Bools, Floats, Predictions

SEPARATOR = "|"  # between the labels of one image


@dataclass(frozen=True)
class Measured:
    """Predictions, their metrics and the intervals of these."""

    predictions: Predictions
    values: Values
    overall: dict[str, Interval]
    by_class: dict[str, Interval]

    @classmethod
    def of(cls, predictions: Predictions, resamples: int, seed: int) -> Measured:
        """Measure predictions; ``resamples`` and ``seed`` are the bootstrap's."""
        values = measure(predictions)
        return cls(predictions, values, *intervals(values, resample(predictions, resamples, seed)))

    def overall_json(self) -> dict[str, dict[str, float | None]]:
        """Return each overall metric as an object of value, low and high."""
        return {
            name: _metric(value, self.overall[name].low, self.overall[name].high)
            for name, value in self.values.overall.items()
        }

    def classes_json(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of each class, and how many images it has."""
        counts = self.predictions.truth.sum(0).tolist()
        result: dict[str, dict[str, Any]] = {}
        for place, name in enumerate(self.predictions.classes):
            result[name] = {"images": counts[place]}
            for metric, values in self.values.by_class.items():
                ends = self.by_class[metric]
                result[name][metric] = _metric(values[place], ends.low[place], ends.high[place])
        return result

    def confusion_json(self) -> dict[str, Any]:
        """Return the confusion matrix, or the four outcomes of each label, as counts."""
        counts = confusion_counts(self.predictions)
        if self.predictions.multi_label:
            columns = ["true_positive", "false_negative", "false_positive", "true_negative"]
        else:
            columns = list(self.predictions.classes)
        return {"rows": list(self.predictions.classes), "columns": columns, "counts": counts}

    def notes(self) -> list[str]:
        """Say in sentences what a reader of the numbers has to know."""
        predictions = self.predictions
        found = []
        there = np.asarray(predictions.truth.any(0))
        absent = _named(predictions, ~there)
        if absent:
            found.append(
                f"No image of {absent} is in this split: precision, sensitivity, F1 and AUC "
                "have no value there, and averages over the classes leave them out."
            )
        everywhere = _named(predictions, np.asarray(predictions.truth.all(0)))
        if everywhere:
            found.append(
                f"Every image is one of {everywhere}: specificity and AUC have no value there."
            )
        never = _named(predictions, there & ~predictions.decided.any(0))
        if never:
            found.append(f"{never}: never predicted, the precision is counted as 0.")
        if any((values == 1).any() for values in self.values.by_class.values()):
            found.append(
                "Where nothing is wrong, neither is it in any resample: an interval from 100 to "
                "100 % says that there was no mistake among so many images, not that there is none."
            )
        if predictions.kind == "binary":
            found.append(
                "Two classes: in the row of a class, that class is the positive one; "
                "the averages are over both."
            )
        if predictions.multi_label:
            found.append(
                f"A label is predicted where its probability is above {THRESHOLD}. Accuracy is "
                "the mean over the labels; exact match is the share of images with every label "
                "right. Calibration is that of all labels together."
            )
        return found


@dataclass(frozen=True)
class Mistake:
    """A prediction that is wrong.

    Args:
        index: Of the image.
        true: The class, or whether the label is there.
        predicted: Likewise.
        probability: Of what was predicted.
        of_true: Probability of what is true.
    """

    index: int
    true: str
    predicted: str
    probability: float
    of_true: float


def worst_mistakes(predictions: Predictions, limit: int) -> list[Mistake]:
    """Return the mistakes with the highest probability, the highest first."""
    mistakes = _wrong_labels(predictions) if predictions.multi_label else _wrong(predictions)
    return sorted(mistakes, key=lambda mistake: -mistake.probability)[:limit]


def predictions_csv(predictions: Predictions, names: Sequence[str]) -> str:
    """Return a table of every image: name, true, predicted, the probability of each class.

    Args:
        predictions: N images.
        names: N names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"probability_{name}" for name in predictions.classes]
    writer.writerow(["image", "true", "predicted", *columns])
    for name, truth, decided, row in zip(
        names, predictions.truth, predictions.decided, predictions.probabilities, strict=True
    ):
        writer.writerow(
            [
                name,
                _joined(predictions.classes, truth),
                _joined(predictions.classes, decided),
                # Nine digits hold any float32, which is what the network gives.
                *(f"{probability:.9g}" for probability in row),
            ]
        )
    return text.getvalue()


def _wrong(predictions: Predictions) -> list[Mistake]:
    found = []
    for index in np.flatnonzero(~predictions.correct).tolist():
        true, row = int(predictions.labels[index]), predictions.probabilities[index]
        top = int(row.argmax())
        found.append(
            Mistake(
                index, predictions.classes[true], predictions.classes[top],
                float(row[top]), float(row[true]),
            )
        )  # fmt: skip
    return found


def _wrong_labels(predictions: Predictions) -> list[Mistake]:
    found = []
    for index, place in np.argwhere(predictions.truth != predictions.decided).tolist():
        name, p = predictions.classes[place], float(predictions.probabilities[index, place])
        there, absent = name, f"not {name}"
        if predictions.decided[index, place]:
            found.append(Mistake(index, absent, there, p, 1 - p))
        else:
            found.append(Mistake(index, there, absent, 1 - p, p))
    return found


def _joined(classes: Sequence[str], which: Bools) -> str:
    return SEPARATOR.join(classes[place] for place in np.flatnonzero(which).tolist())


def _named(predictions: Predictions, which: Bools) -> str:
    return ", ".join(predictions.classes[place] for place in np.flatnonzero(which).tolist())


def _metric(value: Floats, low: Floats, high: Floats) -> dict[str, float | None]:
    return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _number(value: Floats) -> float | None:
    # torchmetrics divides in float32: more digits than these are noise.
    return None if np.isnan(value) else round(float(value), 7)
