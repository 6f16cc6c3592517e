"""Intervals: every metric on many resamples of the images, computed side by side.

torchmetrics takes one set of predictions at a time; a thousand resamples of it take minutes.
Here a resample is a row of counts, how often each image was drawn, and each metric is a product of
these rows with something that is computed once. With all counts 1 this gives torchmetrics' values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mambamic.evaluation.bins import excess
from mambamic.evaluation.metrics import (
    BY_CLASS,
    Values,
    brier_of_each,
    mean_of_defined,
    names_by_class,
    nll_of_each,
)
from mambamic.evaluation.predictions import Bools, Floats, Predictions

_AT_ONCE = 2_000_000  # counts in memory


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of a metric's resamples; nan where it has no value.

    Args:
        low: Lower ends, of the measurement's shape.
        high: Upper ends.
    """

    low: Floats
    high: Floats


def resample(predictions: Predictions, resamples: int, seed: int) -> Values:
    """Draw images with replacement and compute every metric of each draw.

    Args:
        predictions: N images.
        resamples: How many times N images are drawn.
        seed: Of the draws.
    """
    parts = [weighted(predictions, counts) for counts in _draws(len(predictions), resamples, seed)]
    return Values(
        {name: np.concatenate([p.overall[name] for p in parts]) for name in parts[0].overall},
        {name: np.concatenate([p.by_class[name] for p in parts]) for name in parts[0].by_class},
    )


def intervals(measured: Values, resampled: Values) -> tuple[dict[str, Interval], ...]:
    """Return the 95 % intervals, overall and by class."""
    overall = {}
    for name, values in resampled.overall.items():
        # Chance makes every bin miss a little, and drawing from a draw does so once more: the
        # calibration error of resamples is too large by that, and is moved back.
        shift = measured.overall[name] - values.mean() if name == "calibration_error" else 0.0
        overall[name] = _middle((values + shift).clip(0, None))
    return overall, {name: _middle(values) for name, values in resampled.by_class.items()}


def weighted(predictions: Predictions, counts: Floats) -> Values:
    """Compute every metric of images that count several times, or not at all.

    Args:
        predictions: N images.
        counts: (R, N), for R sets of images.
    """
    drawn = counts.sum(1)
    by_class = _by_class(predictions, counts, drawn)
    exact = counts @ predictions.correct / drawn
    probabilities = predictions.confidence.size / len(predictions)
    overall = {
        "accuracy": mean_of_defined(by_class["accuracy"]) if predictions.multi_label else exact,
        **({"exact_match": exact} if predictions.multi_label else {}),
        **{name: mean_of_defined(by_class[name]) for name in BY_CLASS},
        "calibration_error": np.abs(counts @ excess(predictions)).sum(1) / (drawn * probabilities),
        "brier": counts @ brier_of_each(predictions) / drawn,
        "nll": counts @ nll_of_each(predictions) / drawn,
    }
    return Values(overall, by_class)


def _draws(images: int, resamples: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // images)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(0, images, (rows, images))
        flat = np.bincount(
            (drawn + np.arange(rows)[:, None] * images).ravel(), minlength=rows * images
        )
        yield flat.reshape(rows, images).astype(float)


def _by_class(predictions: Predictions, counts: Floats, drawn: Floats) -> dict[str, Floats]:
    """Return (R, K) of each metric of a class against the rest."""
    truth, decided = predictions.truth, predictions.decided
    positive = counts @ truth
    predicted = counts @ decided
    both = counts @ (truth & decided)
    total = drawn[:, None]
    neither = total - positive - predicted + both
    there = positive > 0
    values = {
        "accuracy": (both + neither) / total,
        "precision": np.where(there, both / np.maximum(predicted, 1), np.nan),
        "sensitivity": _ratio(both, positive),
        "specificity": _ratio(neither, total - positive),
        "f1": np.where(there, 2 * both / np.maximum(positive + predicted, 1), np.nan),
        "auc": np.stack(
            [
                _auc(truth[:, place], predictions.probabilities[:, place], counts)
                for place in range(len(predictions.classes))
            ],
            axis=1,
        ),
    }
    return {name: values[name] for name in names_by_class(predictions.multi_label)}


def _auc(truth: Bools, probabilities: Floats, counts: Floats) -> Floats:
    """Return (R,): how often a positive image has a higher probability than a negative one.

    Equal probabilities count one half.
    """
    order = np.argsort(probabilities, kind="stable")
    negative, positive = order[~truth[order]], order[truth[order]]
    of_negative, of_positive = probabilities[negative], probabilities[positive]
    below = np.zeros((len(counts), len(negative) + 1))
    np.cumsum(np.take(counts, negative, axis=1), axis=1, out=below[:, 1:])
    lower = np.searchsorted(of_negative, of_positive, side="left")
    lower_or_equal = np.searchsorted(of_negative, of_positive, side="right")
    won = (np.take(below, lower, axis=1) + np.take(below, lower_or_equal, axis=1)) / 2
    drawn = np.take(counts, positive, axis=1)
    return _ratio(np.einsum("rn,rn->r", drawn, won), below[:, -1] * drawn.sum(1))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _middle(values: Floats) -> Interval:
    """Return the middle 95 % along the first axis, of those resamples that have a value."""
    columns = values.reshape(len(values), -1)
    ends = np.full((2, columns.shape[1]), np.nan)
    for place, column in enumerate(columns.T):
        defined = column[~np.isnan(column)]
        if len(defined):
            ends[:, place] = np.percentile(defined, (2.5, 97.5))
    low, high = ends.reshape(2, *values.shape[1:])
    return Interval(low, high)
