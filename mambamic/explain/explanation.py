"""One explanation: which method, of which class, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mambamic.classifier import Classifier
from mambamic.errors import UsageError
from mambamic.explain.methods import Heat, grad_cam, integrated_gradients, occlusion
from mambamic.prediction import Prediction
from mambamic.preprocess import Pixels

METHODS = ("occlusion", "integrated-gradients", "grad-cam")
_BY_GRADIENTS = METHODS[1:]
STAGES = (1, 2, 3, 4)
_MIXES = "mambamic"  # architectures whose feature maps exchange height and width


@dataclass(frozen=True)
class Explanation:
    """Where the evidence for a class lies.

    Args:
        prediction: For the image.
        label: The class that is explained.
        method: One of ``METHODS``.
        heat: (S, S) float32, at least 0, over the model's input.
    """

    prediction: Prediction
    label: str
    method: str
    heat: Heat

    def as_json(self) -> dict[str, Any]:
        """Return everything but the heat map as an object that JSON can hold."""
        return {**self.prediction.as_json(), "explained": self.label, "method": self.method}


@dataclass(frozen=True)
class Question:
    """What is asked about images, checked against the model that is asked.

    Args:
        classifier: The model.
        method: One of ``METHODS``, or ``auto``: Grad-CAM for a MedMamba on torch, else occlusion.
        label: The class to explain, or None for the most probable one.
        stage: Of Grad-CAM, from 1 to 4, or None for the last.

    Raises:
        UsageError: There is no such method, class or stage, or the method does not suit the model.
    """

    classifier: Classifier
    method: str = "auto"
    label: str | None = None
    stage: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no answer."""
        if self.method not in ("auto", *METHODS):
            raise UsageError(
                f"method {self.method!r}", "auto, " + ", ".join(METHODS), "choose one of these"
            )
        classes = self.classifier.config.classes
        if self.label is not None and self.label not in classes:
            raise UsageError(
                f"class {self.label!r}", "one of " + ", ".join(classes), "choose one of these"
            )
        if self.method == "grad-cam" and self._mixes:
            raise UsageError(
                "method 'grad-cam' for a MambaMIC, whose feature maps mix each place with its "
                "mirror image across the diagonal",
                "occlusion or integrated-gradients",
                "choose one of these",
            )
        if self.method in _BY_GRADIENTS and not self._has_gradients:
            raise UsageError(
                f"method {self.method!r} for an ONNX file, which has no gradients",
                "occlusion",
                "choose that, or ask the checkpoint that the file was made from",
            )
        if self.stage is not None and (self._chosen != "grad-cam" or self.stage not in STAGES):
            raise UsageError(
                f"stage {self.stage} with method {self._chosen}",
                "1, 2, 3 or 4, with grad-cam",
                "leave the stage out, or choose one of these",
            )

    def explain(self, pixels: Pixels) -> Explanation:
        """Explain the prediction for one image.

        Args:
            pixels: (S, S, 3) uint8, as ``Preprocess.pixels`` gives them.

        Raises:
            ShapeError: An array of another shape or type.
        """
        classifier = self.classifier
        (prediction,) = classifier.predictions(*classifier.outputs(pixels[np.newaxis]))
        label = prediction.label if self.label is None else self.label
        methods: dict[str, Callable[[Classifier, Pixels, int], Heat]] = {
            "occlusion": occlusion,
            "integrated-gradients": integrated_gradients,
            "grad-cam": partial(grad_cam, stage=self.stage or STAGES[-1]),
        }
        target = classifier.config.classes.index(label)
        heat = methods[self._chosen](classifier, pixels, target)
        return Explanation(prediction, label, self._chosen, heat)

    @property
    def _mixes(self) -> bool:
        return self.classifier.config.architecture.startswith(_MIXES)

    @property
    def _chosen(self) -> str:
        if self.method != "auto":
            return self.method
        return "grad-cam" if self._has_gradients and not self._mixes else "occlusion"

    @property
    def _has_gradients(self) -> bool:
        return self.classifier.backend != "onnxruntime"
