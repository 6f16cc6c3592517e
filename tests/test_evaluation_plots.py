"""The plots: they are drawn for every kind, and what is drawn depends on the predictions."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mambamic.evaluation.metrics import measure
from mambamic.evaluation.plots import confusion_plot, reliability_plot, roc_plot
from mambamic.evaluation.predictions import Predictions

from .random_predictions import random_predictions


def plots(predictions: Predictions) -> list[bytes]:
    return [
        confusion_plot(predictions),
        roc_plot(predictions, measure(predictions).by_class["auc"]),
        reliability_plot([("", predictions)]),
    ]


@pytest.mark.parametrize(
    "predictions",
    [
        pytest.param(random_predictions("multi-class", absent=(1,)), id="absent"),
        pytest.param(random_predictions("binary"), id="binary"),
        pytest.param(random_predictions("multi-label"), id="multi-label"),
        pytest.param(random_predictions("multi-class", classes=40), id="many"),
    ],
)
def test_every_kind_is_drawn(predictions: Predictions) -> None:
    for data in plots(predictions):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        assert image.format == "PNG"
        assert 400 < image.width < 2200
        assert 300 < image.height < 2200
    assert plots(predictions) == plots(predictions)


def test_other_predictions_are_another_picture() -> None:
    first = plots(random_predictions("multi-class"))
    second = plots(random_predictions("multi-class", seed=1))
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_names_are_drawn_as_they_are() -> None:
    """Neither a formula nor a script that the font lacks is an error."""
    predictions = random_predictions("multi-class", classes=3)
    odd = replace(predictions, classes=(r"$\frac{$", "嗜酸性粒细胞", "x" * 300))
    assert all(len(data) > 1000 for data in plots(odd))


def test_curves_in_the_corner_are_shown_larger() -> None:
    truth = np.eye(2, dtype=bool)[[0, 1] * 20]
    right = Predictions(("a", "b"), truth, np.where(truth, 0.9, 0.1))
    wrong = Predictions(("a", "b"), truth, np.where(truth, 0.1, 0.9))
    wide, narrow = (
        Image.open(io.BytesIO(roc_plot(each, measure(each).by_class["auc"]))).width
        for each in (right, wrong)
    )
    assert wide > narrow


def test_a_single_class_has_no_curve() -> None:
    truth = np.ones((4, 1), bool)
    predictions = Predictions(("a",), truth, np.full((4, 1), 0.7), True)
    assert all(len(data) > 1000 for data in plots(predictions))
