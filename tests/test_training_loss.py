"""Weights of classes: what they are, and what they do to the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambamic.training.loss import accuracy, class_weights, criterion

LABELS = torch.tensor([0] * 6 + [1] * 3 + [2])


def test_several_labels_are_scored_one_by_one() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, -0.5]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]])
    assert accuracy(logits, labels).item() == pytest.approx(4 / 6)
    probability = torch.sigmoid(logits)
    right = torch.where(labels > 0, probability, 1 - probability).log()
    wrong = torch.where(labels > 0, 1 - probability, probability).log()
    assert criterion(logits, labels).item() == pytest.approx(-right.mean().item())
    smoothed = -(0.95 * right + 0.05 * wrong).mean()
    assert criterion(logits, labels, 0.1).item() == pytest.approx(smoothed.item())


@pytest.mark.parametrize("several", [False, True])
def test_shares_are_what_a_label_is_for(several: bool) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, -0.5]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]]) if several else torch.tensor([0, 2])
    first, second = (criterion(logits[i : i + 1], labels[i : i + 1], 0.1) for i in (0, 1))
    shared = criterion(logits, labels, 0.1, None, torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(shared, (0.75 * first + 0.5 * second) / 2)


def test_none_is_none() -> None:
    assert class_weights(LABELS, 3, "none") is None


def test_balanced_classes_count_alike() -> None:
    weights = class_weights(LABELS, 3, "balanced")
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert (weights * torch.bincount(LABELS)).tolist() == pytest.approx([10 / 3] * 3)


def test_the_effective_number_levels_off() -> None:
    labels = torch.cat([torch.zeros(100_000), torch.ones(10_000), torch.full((10,), 2.0)]).long()
    weights = class_weights(labels, 3, "effective")
    assert weights is not None
    assert (weights * torch.bincount(labels)).sum().item() == pytest.approx(len(labels), rel=1e-5)
    assert (weights[1] / weights[0]).item() == pytest.approx(1, rel=1e-3)  # both are plenty
    few = (1 - 0.999) / (1 - 0.999**10)
    assert (weights[2] / weights[0]).item() == pytest.approx(few / 1e-3, rel=1e-4)


def test_a_class_without_images_breaks_nothing() -> None:
    for weighting in ("balanced", "effective"):
        weights = class_weights(LABELS, 4, weighting)
        assert weights is not None
        assert weights.isfinite().all()


def test_presence_is_weighed_against_absence() -> None:
    labels = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 1]])
    weights = class_weights(labels, 2, "balanced")
    assert weights is not None
    assert weights.tolist() == pytest.approx([1 / 4, 3])


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    """As it must be where several devices share a batch: weights are not divided out per part."""
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    weights = class_weights(LABELS, 3, "balanced")

    def loss(part: slice) -> Tensor:
        return criterion(logits[part], LABELS[part], 0.1, weights)

    parts = (loss(slice(0, 5)) + loss(slice(5, 10))) / 2
    torch.testing.assert_close(loss(slice(0, 10)), parts)
    plain = criterion(logits, LABELS)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, LABELS))
