"""Microscopy image classification with vision state-space models: from pixels to probabilities."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mambamic._version import __version__

if TYPE_CHECKING:
    from mambamic.classifier import Classifier
    from mambamic.models import create_model, from_upstream
    from mambamic.prediction import Prediction

__all__ = ["Classifier", "Prediction", "__version__", "create_model", "from_upstream"]

_HOME = {
    "Classifier": "mambamic.classifier",
    "Prediction": "mambamic.prediction",
    "create_model": "mambamic.models",
    "from_upstream": "mambamic.models",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that a torch-free installation can import the package."""
    if name not in _HOME:
        raise AttributeError(f"module 'mambamic' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
