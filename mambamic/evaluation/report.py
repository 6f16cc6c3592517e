"""The HTML page of an evaluation: one file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from mambamic.evaluation.predictions import Predictions
from mambamic.evaluation.summary import worst_mistakes
from mambamic.preprocess import Pixels

_GALLERY = 24  # mistakes
_TILE = 160  # pixels
_TITLES = {
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "precision": "Precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "auc": "AUC",
    "calibration_error": "Calibration error",
    "brier": "Brier score",
    "nll": "Negative log likelihood",
}
_MEANINGS = {
    "accuracy": "share of the images, or labels, that are right",
    "exact_match": "share of the images with every label right",
    "precision": "of what was called a class, the share that is; mean over the classes",
    "sensitivity": "of a class, the share that was found (recall); mean over the classes",
    "specificity": "of all else, the share that was not called it; mean over the classes",
    "f1": "harmonic mean of precision and sensitivity; mean over the classes",
    "auc": "area under the ROC curve, one class against the rest; mean over the classes",
    "calibration_error": "how far probabilities are from the share that is right, in 15 bins",
    "brier": "mean squared error of the probabilities; lower is better",
    "nll": "mean -log of the probability of what is true, in nats; lower is better",
}
_DECIMALS = {"auc": 5, "brier": 4, "nll": 4}  # the others are shares, in per cent


def render(
    results: Mapping[str, Any],
    plots: Mapping[str, bytes],
    predictions: Predictions,
    names: Sequence[str],
    pixels: Pixels,
) -> str:
    """Return the page.

    Args:
        results: What ``metrics.json`` holds.
        plots: PNG files by name.
        predictions: N images.
        names: N names.
        pixels: (N, S, S, 3).
    """
    environment = Environment(
        loader=PackageLoader("mambamic.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric"] = _formatted
    return environment.get_template("report.html").render(
        results,
        titles=_TITLES,
        meanings=_MEANINGS,
        plots={name.partition(".")[0]: _uri("png", data) for name, data in plots.items()},
        gallery=[
            (mistake, names[mistake.index], _tile(pixels[mistake.index]))
            for mistake in worst_mistakes(predictions, _GALLERY)
        ],
        wrong=int((~predictions.correct).sum()),
    )


def _formatted(metric: Mapping[str, float | None], name: str) -> tuple[str, str]:
    """Return a metric and its interval as text."""
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "–", ""
    if name in _DECIMALS:
        digits = _DECIMALS[name]
        return f"{value:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{100 * value:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"


def _tile(pixels: Pixels) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_TILE, _TILE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
