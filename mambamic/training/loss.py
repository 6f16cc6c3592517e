"""The loss, the weights that classes have in it, and the accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# How far images of one class repeat one another (Cui and others 2019, their beta): a thousand of
# them count as about 630, and no class as more than a thousand.
_REPEATING = 0.999


def criterion(
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Return the mean loss of (B, C) logits: cross-entropy, per class where labels are several.

    Args:
        logits: (B, C).
        labels: (B,) indices, or (B, C) of 0 and 1.
        smoothing: How much of a label is spread over what it is not.
        weights: (C,), of classes; where labels are several, of their presence.
        shares: (B,), what of an image the label is for; None for all of it.
    """
    if labels.ndim == 1:
        losses = F.cross_entropy(
            logits, labels, weights, label_smoothing=smoothing, reduction="none"
        )
    else:
        target = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=weights, reduction="none"
        ).mean(-1)
    # Over the images, not over their weights: a batch is the mean of its parts.
    return (losses if shares is None else losses * shares).mean()


def distillation(logits: Tensor, chances: Tensor, *, several: bool) -> Tensor:
    """Return the mean cross-entropy of (B, C) logits to the probabilities of teachers.

    Args:
        logits: (B, C).
        chances: (B, C).
        several: Whether an image may have several labels.
    """
    if several:
        return F.binary_cross_entropy_with_logits(logits, chances)
    return F.cross_entropy(logits, chances)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right labels; shapes as in ``criterion``."""
    right = logits.argmax(-1) == labels if labels.ndim == 1 else (logits > 0) == (labels > 0)
    return right.float().mean()


def class_weights(labels: Tensor, classes: int, weighting: str) -> Tensor | None:
    """Return what classes weigh in the loss.

    Where an image has one label, the weights' mean over the images is 1: the loss, and with it the
    learning rate, keeps its scale.

    Args:
        labels: (N,) indices, or (N, C) of 0 and 1, of the training split.
        classes: How many there are.
        weighting: ``balanced``, inversely to their number; ``effective``, inversely to the
            effective number of Cui and others (2019); or ``none``.

    Returns:
        (C,) float32 as ``criterion`` takes it, or None for ``none``.
    """
    if weighting == "none":
        return None
    if labels.ndim == 2:
        present = labels.sum(0)
        return (_number(len(labels) - present, weighting) / _number(present, weighting)).float()
    counts = torch.bincount(labels, minlength=classes)
    weights = 1 / _number(counts, weighting)
    return (weights * len(labels) / (weights * counts).sum()).float()


def _number(counts: Tensor, weighting: str) -> Tensor:
    counts = counts.double().clamp(min=1)
    return (1 - _REPEATING**counts) / (1 - _REPEATING) if weighting == "effective" else counts
