"""The metrics of a set of predictions, overall and of each class against the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional import classification as tm

from mambamic.evaluation.bins import excess
from mambamic.evaluation.predictions import Bools, Floats, Predictions

BY_CLASS = ("precision", "sensitivity", "specificity", "f1", "auc")


@dataclass(frozen=True)
class Values:
    """Metrics by name; nan where a metric has no value.

    Args:
        overall: Arrays of one shape: () of a measurement, (R,) of R resamples.
        by_class: Arrays of that shape and one more axis, for the K classes.
    """

    overall: dict[str, Floats]
    by_class: dict[str, Floats]


def names_by_class(multi_label: bool) -> tuple[str, ...]:
    """Return the metrics that each class has."""
    # With one class per image, accuracy against the rest is near 1 for every small class: it says
    # nothing, and others call the sensitivity by this name.
    return ("accuracy", *BY_CLASS) if multi_label else BY_CLASS


def measure(predictions: Predictions) -> Values:
    """Compute every metric.

    A class that is absent from the images has a specificity, and no other metric. One that is
    there and never predicted has a precision of 0. Averages over the classes ("macro") are over
    those that have a value.
    """
    by_class = _by_class(predictions)
    overall = {
        "accuracy": _accuracy(predictions, by_class),
        **({"exact_match": predictions.correct.mean()} if predictions.multi_label else {}),
        **{name: mean_of_defined(by_class[name]) for name in BY_CLASS},
        # Not torchmetrics': there a probability of exactly 1 is in a bin of its own, a 16th.
        "calibration_error": np.abs(excess(predictions).sum(0)).sum() / predictions.confidence.size,
        "brier": brier_of_each(predictions).mean(),
        "nll": nll_of_each(predictions).mean(),
    }
    return Values({name: np.asarray(value, float) for name, value in overall.items()}, by_class)


def brier_of_each(predictions: Predictions) -> Floats:
    """Return (N,): the squared error of the probabilities of each image.

    Summed over the classes (Brier 1950); with two classes that of one of them; with several
    labels per image the mean over the labels.
    """
    squared = (predictions.probabilities - predictions.truth) ** 2
    if predictions.kind == "multi-class":
        return np.asarray(squared.sum(1))
    return np.asarray(squared.mean(1))


def nll_of_each(predictions: Predictions) -> Floats:
    """Return (N,): the negative log likelihood (nats) of what is true, of labels the mean."""
    smallest = np.finfo(float).eps  # else one confident mistake would make it infinite
    clipped = predictions.probabilities.clip(smallest, 1 - smallest)
    if predictions.multi_label:
        return np.asarray(-np.log(np.where(predictions.truth, clipped, 1 - clipped)).mean(1))
    return np.asarray(-np.log(clipped[predictions.truth]))


def confusion_counts(predictions: Predictions) -> list[list[int]]:
    """Return (K, K) counts, true by predicted class; of labels (K, 4): TP, FN, FP, TN."""
    truth, decided = predictions.truth.astype(int), predictions.decided.astype(int)
    if predictions.multi_label:
        both, missed = (truth * decided).sum(0), (truth * (1 - decided)).sum(0)
        wrong, neither = ((1 - truth) * decided).sum(0), ((1 - truth) * (1 - decided)).sum(0)
        table: list[list[int]] = np.stack([both, missed, wrong, neither], axis=1).tolist()
        return table
    matrix: list[list[int]] = (truth.T @ decided).tolist()
    return matrix


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the last axis of what is not nan; nan where nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(-1)
    total = np.where(defined, values, 0).sum(-1)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def _accuracy(predictions: Predictions, by_class: dict[str, Floats]) -> Floats:
    if predictions.multi_label:
        return mean_of_defined(by_class["accuracy"])
    decided = torch.from_numpy(predictions.decided.argmax(1))
    labels = torch.from_numpy(predictions.labels)
    value = tm.multiclass_accuracy(
        decided, labels, num_classes=len(predictions.classes), average="micro"
    )
    return np.asarray(value.double())


def _by_class(predictions: Predictions) -> dict[str, Floats]:
    values = {
        name: np.full(len(predictions.classes), np.nan)
        for name in names_by_class(predictions.multi_label)
    }
    for place in range(len(predictions.classes)):
        one = _one_class(
            predictions.truth[:, place],
            predictions.decided[:, place],
            predictions.probabilities[:, place],
        )
        for name in values.keys() & one.keys():
            values[name][place] = one[name]
    return values


def _one_class(truth: Bools, decided: Bools, probabilities: Floats) -> dict[str, float]:
    """Return those metrics of a class against the rest that have a value."""
    target, hard = torch.from_numpy(truth).long(), torch.from_numpy(decided).long()
    # Unchecked: that there is nothing but 0 and 1 takes longer to find out than all the rest.
    found = {"accuracy": tm.binary_accuracy(hard, target, validate_args=False)}
    if not truth.all():
        found["specificity"] = tm.binary_specificity(hard, target, validate_args=False)
    if truth.any():
        found["precision"] = tm.binary_precision(hard, target, validate_args=False)
        found["sensitivity"] = tm.binary_recall(hard, target, validate_args=False)
        found["f1"] = tm.binary_f1_score(hard, target, validate_args=False)
        if not truth.all():
            scores = torch.from_numpy(probabilities)
            found["auc"] = tm.binary_auroc(scores, target, validate_args=False)
    return {name: float(value) for name, value in found.items()}
