"""LitServe with our ``Classifier``: decoding, a batch, an answer for each request.

Batching as its documents have it: ``max_batch_size`` and ``batch_timeout`` of the API.
"""

import os
from typing import Any

import litserve
import numpy as np
from fastapi import Request

from mambamic import Classifier
from mambamic.images import decode
from mambamic.preprocess import Pixels


class Cells(litserve.LitAPI):  # type: ignore[misc]
    """Cells in, classes out."""

    def setup(self, device: str) -> None:
        """Load the model into a worker."""
        del device
        self.classifier = Classifier.load(os.environ["CHECKPOINT"], device="cpu")
        self.classifier.warm_up()

    def decode_request(self, request: Request) -> Pixels:
        """Return the pixels of one request; of a form LitServe hands over the fields."""
        form: Any = request
        image = decode(form["image"].file.read())
        return self.classifier.preprocess.pixels(image)

    def predict(self, x: Pixels) -> list[dict[str, Any]]:
        """Classify a batch."""
        rows = self.classifier.outputs(np.asarray(x))
        return [prediction.as_json() for prediction in self.classifier.predictions(*rows)]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return what becomes JSON."""
        return output


if __name__ == "__main__":
    api = Cells(max_batch_size=32, batch_timeout=0.001, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        generate_client_file=False,
        log_level="warning",
    )
