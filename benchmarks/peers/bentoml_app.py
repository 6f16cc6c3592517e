"""BentoML with our ``Classifier``: an adaptive batch of images that it has opened.

As its documents have it: a batchable API that takes a list of Pillow images, and a service whose
concurrency is the size of a batch.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from mambamic import Classifier
from mambamic.images import to_rgb


@bentoml.service(workers=1, traffic={"timeout": 120, "concurrency": 32})
class Cells:
    """Cells in, classes out."""

    def __init__(self) -> None:
        self.classifier = Classifier.load(os.environ["CHECKPOINT"], device="cpu")
        self.classifier.warm_up()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def predict(self, image: list[Image]) -> list[dict[str, Any]]:
        """Classify a batch."""
        pixels = np.stack([self.classifier.preprocess.pixels(to_rgb(one)) for one in image])
        rows = self.classifier.outputs(pixels)
        return [prediction.as_json() for prediction in self.classifier.predictions(*rows)]
