"""Probabilities in equal-width bins, for calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mambamic.evaluation.predictions import Floats, Predictions

BINS = 15


def bin_of(confidence: Floats) -> NDArray[np.intp]:
    """Return the bin of each probability: closed below, the last one closed above as well."""
    edges = np.linspace(0, 1, BINS + 1)
    return np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, BINS - 1)


def excess(predictions: Predictions) -> Floats:
    """Return (N, BINS): by image and bin, the sum of (probability - whether it came true).

    The calibration error is the sum over the bins of the absolute sum over the images, divided
    by the number of probabilities. It is linear up to the absolute value, which is what lets
    resamples be one matrix product.
    """
    gap = predictions.confidence - predictions.outcome
    if gap.ndim == 1:
        gap = gap[:, None]
    place = bin_of(predictions.confidence).reshape(gap.shape)
    rows = np.arange(len(gap))[:, None] * BINS
    flat = np.bincount((rows + place).ravel(), gap.ravel(), minlength=len(gap) * BINS)
    return np.asarray(flat.reshape(len(gap), BINS), np.float64)


def curve(predictions: Predictions) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Return the mean probability, the share that came true and the count of each bin.

    Returns:
        Three arrays of (BINS,); the first two are nan where the bin is empty.
    """
    place = bin_of(predictions.confidence).ravel()
    count = np.bincount(place, minlength=BINS)
    filled = np.where(count, count, np.nan)
    mean = np.bincount(place, predictions.confidence.ravel(), minlength=BINS) / filled
    share = np.bincount(place, predictions.outcome.ravel(), minlength=BINS) / filled
    return mean, share, count
