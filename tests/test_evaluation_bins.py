"""Calibration error by bins, held against torchmetrics and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from mambamic.evaluation.bins import BINS, bin_of, curve
from mambamic.evaluation.metrics import measure
from mambamic.evaluation.predictions import Predictions

from .random_predictions import random_predictions


@pytest.mark.parametrize("kind", ["multi-class", "binary", "multi-label"])
def test_calibration_error_agrees_with_torchmetrics(kind: str) -> None:
    predictions = random_predictions(kind, 1000, seed=4)
    scores = torch.from_numpy(predictions.probabilities)
    if kind == "multi-label":
        target = torch.from_numpy(predictions.truth).long().flatten()
        expected = tm.binary_calibration_error(scores.flatten(), target, n_bins=15)
    else:
        target = torch.from_numpy(predictions.labels)
        expected = tm.multiclass_calibration_error(scores, target, scores.shape[1], n_bins=15)
    found = float(measure(predictions).overall["calibration_error"])
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_edges_belong_to_the_bin_above_but_for_1() -> None:
    values = np.array([0, 1 / 15 - 1e-9, 1 / 15, 0.999, 1.0])
    assert bin_of(values).tolist() == [0, 0, 1, 14, 14]


def test_probabilities_of_1_are_not_a_bin_of_their_own() -> None:
    # One bin: 0.95 is promised on average and one of two is right.
    truth = np.eye(2, dtype=bool)[[0, 1]]
    predictions = Predictions(("a", "b"), truth, np.array([[1.0, 0.0], [0.95, 0.05]]))
    found = float(measure(predictions).overall["calibration_error"])
    assert found == pytest.approx(0.975 - 0.5)


def test_the_curve_is_what_the_error_sums() -> None:
    predictions = random_predictions("multi-class", seed=1)
    mean, share, count = curve(predictions)
    assert count.sum() == len(predictions)
    assert mean.shape == (BINS,)
    assert np.isnan(mean[count == 0]).all()
    error = np.nansum(np.abs(mean - share) * count) / len(predictions)
    assert float(measure(predictions).overall["calibration_error"]) == pytest.approx(error)
