"""A temperature that makes probabilities as large as they are right.

Guo et al., On Calibration of Modern Neural Networks, 2017: one number divides the logits. It
changes no prediction of a softmax head, only how sure it is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mambamic.checkpoint import CONFIG_FILE, Checkpoint, write_file
from mambamic.errors import DataError
from mambamic.evaluation.metrics import nll_of_each
from mambamic.evaluation.predictions import Predictions

_LOWEST, _HIGHEST = 0.02, 50.0
_STEPS = 80  # each leaves 0.618 of the range: 16 digits
_GOLDEN = (math.sqrt(5) - 1) / 2


def tempered(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with their logits divided by a temperature.

    Args:
        predictions: From logits as they are, of temperature 1.
        temperature: Above 0.
    """
    # Probabilities are float32: beyond these they are 0 or 1, and their logits infinite.
    floor = float(np.finfo(np.float32).tiny)
    p = predictions.probabilities
    if predictions.multi_label:
        ceiling = 1 - float(np.finfo(np.float32).epsneg)
        inside = p.clip(floor, ceiling)
        logits = (np.log(inside) - np.log1p(-inside)) / temperature
        # Of the two forms of the sigmoid, the one that cannot overflow.
        small = np.exp(-np.abs(logits))
        fresh = np.where(logits >= 0, 1, small) / (1 + small)
    else:
        logits = np.log(p.clip(floor, 1)) / temperature
        raised = np.exp(logits - logits.max(1, keepdims=True))
        fresh = raised / raised.sum(1, keepdims=True)
    return replace(predictions, probabilities=fresh.clip(0, 1))


def fit_temperature(predictions: Predictions) -> float:
    """Find the temperature of the lowest negative log likelihood, by golden section search.

    The likelihood has one optimum, because it is convex in the inverse of the temperature. The
    result is the same each time.

    Args:
        predictions: Of the validation images, of temperature 1.

    Returns:
        Six significant digits.

    Raises:
        DataError: The likelihood has no optimum in the range that makes sense: the images are too
            few, or none of them is mistaken.
    """
    low, high = math.log(_LOWEST), math.log(_HIGHEST)

    def nll(logarithm: float) -> float:
        return float(nll_of_each(tempered(predictions, math.exp(logarithm))).mean())

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = nll(left), nll(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = nll(right)
    temperature = math.exp((low + high) / 2)
    if not _LOWEST * 1.01 < temperature < _HIGHEST / 1.01:
        mistakes = int((~predictions.correct).sum())
        raise DataError(
            f"no temperature fits {len(predictions)} validation images with {mistakes} mistakes "
            f"(the search ends at {temperature:.3g})",
            "some images that are right and some that are not",
            "calibrate on more images, which the model was not trained on",
        )
    return float(f"{temperature:.6g}")


def store_temperature(checkpoint: Checkpoint, temperature: float) -> Checkpoint:
    """Write a temperature into a checkpoint's ``config.json``; the weights are not touched.

    Returns:
        The checkpoint as it is now.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    config = replace(checkpoint.config, temperature=temperature)
    write_file(checkpoint, CONFIG_FILE, config.to_json().encode())
    return Checkpoint(checkpoint.path, config)
