"""The page: every name is text on it, and the gallery shows the mistakes that matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from mambamic.evaluation.predictions import Predictions
from mambamic.evaluation.report import render
from mambamic.evaluation.summary import Measured

from .random_predictions import random_predictions


def page(predictions: Predictions, **changes: Any) -> str:
    measured = Measured.of(predictions, 10, 0)
    versions = {"mambamic": "1", "torch": "2"}
    inference = {"architecture": "mambamic_t", "device": "cpu", "device_name": "a processor",
                 "dtype": "float32", "backend": "cpu", "versions": versions}  # fmt: skip
    results = {
        "kind": predictions.kind,
        "split": "val",
        "images": len(predictions),
        "overall": measured.overall_json(),
        "classes": measured.classes_json(),
        "calibration": None,
        "notes": measured.notes(),
        "intervals": {"level": 0.95, "resamples": 10, "seed": 0},
        "run": {"command": "mambamic evaluate", "date": "today", "checkpoint": "model",
                "weights_sha256": "0" * 64, "temperature": None, "data": "cells",
                "inference": inference, "metrics_by": {"torchmetrics": "3"}},
    }  # fmt: skip
    plots = {f"{name}.png": b"png" for name in ("confusion_matrix", "roc", "reliability")}
    names = [f"image <{index}> & 'more'.png" for index in range(len(predictions))]
    pixels = np.zeros((len(predictions), 16, 16, 3), np.uint8)
    return render(results | changes, plots, predictions, names, pixels)


def test_names_are_escaped() -> None:
    predictions = random_predictions("multi-class")
    text = page(predictions, split="<script>alert(1)</script>", notes=["a < b & c"])
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a &lt; b &amp; c" in text
    assert "image <" not in text
    assert "image &lt;" in text
    assert 'alt="image &lt;' in text


def test_the_gallery_is_limited() -> None:
    predictions = random_predictions("multi-class")
    wrong = int((~predictions.correct).sum())
    assert wrong > 24
    text = page(predictions)
    assert text.count("<figure>") == 24
    assert f"{wrong} of 400 images have something wrong" in text


def test_no_mistakes() -> None:
    truth = np.eye(2, dtype=bool)[[0, 1]]
    text = page(Predictions(("a", "b"), truth, np.where(truth, 0.9, 0.1)))
    assert "There are none." in text
    assert "<figure>" not in text
    assert "100.00 %<br><small>100.00 to 100.00</small>" in text


def test_what_has_no_value_is_a_dash() -> None:
    text = page(random_predictions("multi-class", absent=(1,)))
    assert text.count('<td class="metric">–<br><small></small></td>') == 4


def test_before_and_after_calibration() -> None:
    predictions = random_predictions("multi-class")
    before = Measured.of(predictions, 10, 0).overall_json()
    before["nll"] = {"value": 9.25, "low": 9.0, "high": 9.5}
    calibration = {"temperature": 0.5, "temperature_before": 1.0, "fitted_on": "val",
                   "images": 1234, "before": before}  # fmt: skip
    text = page(predictions, calibration=calibration)
    assert "9.2500<br><small>9.0000 to 9.5000" in text
    assert "Temperature 0.5, fitted on 1,234" in text
    assert "before calibration" in text
    assert "before calibration" not in page(predictions)
