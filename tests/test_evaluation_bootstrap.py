"""Intervals: the quick way to many resamples against measuring each."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from mambamic.evaluation.bootstrap import intervals, resample, weighted
from mambamic.evaluation.metrics import measure
from mambamic.evaluation.predictions import Predictions

from .random_predictions import random_predictions

CASES = [
    pytest.param(random_predictions(kind, absent=absent, ties=ties), id=f"{kind}-{ties=}-{absent}")
    for kind in ("multi-class", "multi-label")
    for absent in ((), (2,))
    for ties in (False, True)
] + [pytest.param(random_predictions("binary", ties=True), id="binary")]


@pytest.mark.parametrize("predictions", CASES)
def test_a_resample_is_what_measuring_it_gives(predictions: Predictions) -> None:
    generator = np.random.default_rng(3)
    drawn = generator.integers(0, len(predictions), (3, len(predictions)))
    counts = np.stack([np.bincount(row, minlength=len(predictions)) for row in drawn]).astype(float)
    found = weighted(predictions, counts)
    for place, row in enumerate(drawn):
        expected = measure(
            replace(
                predictions,
                truth=predictions.truth[row],
                probabilities=predictions.probabilities[row],
            )
        )
        assert found.overall.keys() == expected.overall.keys()
        for name, value in expected.overall.items():
            assert found.overall[name][place] == pytest.approx(float(value), abs=1e-6), name
        assert found.by_class.keys() == expected.by_class.keys()
        for name, values in expected.by_class.items():
            np.testing.assert_allclose(found.by_class[name][place], values, atol=1e-6, rtol=0)


def test_resamples_are_those_of_their_seed() -> None:
    predictions = random_predictions("multi-class", 50)
    first, again, other = (resample(predictions, 20, seed) for seed in (1, 1, 2))
    assert first.overall["nll"].tolist() == again.overall["nll"].tolist()
    assert first.overall["nll"].tolist() != other.overall["nll"].tolist()
    assert first.overall["nll"].shape == (20,)
    assert first.by_class["auc"].shape == (20, 5)


def test_more_counts_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions("multi-class", 50)
    whole = resample(predictions, 20, 1)
    monkeypatch.setattr("mambamic.evaluation.bootstrap._AT_ONCE", 150)
    parts = resample(predictions, 20, 1)
    np.testing.assert_allclose(parts.overall["nll"], whole.overall["nll"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["multi-class", "binary", "multi-label"])
def test_intervals_hold_the_measurement(kind: str) -> None:
    predictions = random_predictions(kind, absent=(), ties=True)
    values = measure(predictions)
    overall, by_class = intervals(values, resample(predictions, 300, 0))
    for name, value in values.overall.items():
        assert overall[name].low < value < overall[name].high, name
    for name, row in values.by_class.items():
        assert (by_class[name].low < row).all(), name
        assert (row < by_class[name].high).all(), name


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    predictions = random_predictions("multi-class", 2000)
    values = measure(predictions)
    interval = intervals(values, resample(predictions, 1000, 0))[0]["accuracy"]
    share = float(values.overall["accuracy"])
    half = 1.96 * np.sqrt(share * (1 - share) / 2000)
    assert float(interval.low) == pytest.approx(share - half, abs=half / 10)
    assert float(interval.high) == pytest.approx(share + half, abs=half / 10)


def test_what_has_no_value_has_no_interval() -> None:
    predictions = random_predictions("multi-class", absent=(1,))
    _, by_class = intervals(measure(predictions), resample(predictions, 50, 0))
    assert np.isnan(by_class["auc"].low).tolist() == [False, True, False, False, False]
    assert not np.isnan(by_class["specificity"].high).any()


def test_calibration_error_is_not_taken_for_larger_than_measured() -> None:
    """Resamples of well-calibrated predictions miss more than these do; the interval does not."""
    generator = np.random.default_rng(0)
    first = generator.uniform(0.5, 1, 1000)
    truth = np.where(generator.random(1000) < first, 0, 1)[:, None] == np.arange(2)
    predictions = Predictions(("a", "b"), truth, np.stack([first, 1 - first], axis=1))
    values, resampled = measure(predictions), resample(predictions, 400, 0)
    value = float(values.overall["calibration_error"])
    assert resampled.overall["calibration_error"].mean() > value * 1.1
    interval = intervals(values, resampled)[0]["calibration_error"]
    assert 0 <= interval.low < value < interval.high


def test_a_thousand_resamples_of_2000_images_take_seconds() -> None:
    predictions = random_predictions("multi-class", 2000, classes=8)
    start = time.perf_counter()
    resample(predictions, 1000, 0)
    # 0.8 s on two cores of a server.
    assert time.perf_counter() - start < 15
