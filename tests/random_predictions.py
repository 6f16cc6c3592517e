"""Random predictions, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mambamic.evaluation.predictions import Floats, Predictions


def softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def random_predictions(
    kind: str,
    images: int = 400,
    *,
    classes: int = 5,
    absent: Sequence[int] = (),
    ties: bool = False,
    seed: int = 0,
) -> Predictions:
    """Predictions that are right more often than not.

    Args:
        kind: ``multi-class``, ``binary`` or ``multi-label``.
        images: How many.
        classes: How many, but for ``binary``.
        absent: Classes that no image shows.
        ties: Whether many probabilities are equal.
        seed: Of all of it.
    """
    generator = np.random.default_rng(seed)
    count = 2 if kind == "binary" else classes
    logits = generator.normal(size=(images, count))
    if ties:
        logits = np.round(logits * 2) / 2
    multi_label = kind == "multi-label"
    if multi_label:
        truth = generator.random(logits.shape) < 1 / (1 + np.exp(1 - 2 * logits))
        truth[:, list(absent)] = False
        probabilities = 1 / (1 + np.exp(-logits))
    else:
        noisy = 1.5 * logits + generator.gumbel(size=logits.shape)
        noisy[:, list(absent)] = -np.inf
        truth = noisy.argmax(1)[:, None] == np.arange(count)
        probabilities = softmax(logits)
    names = tuple(f"class {place}" for place in range(count))
    # As the classifier gives them.
    probabilities = probabilities.astype(np.float32).astype(float)
    return Predictions(names, truth, probabilities, multi_label)
