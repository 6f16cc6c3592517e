"""Whether an ONNX file says what torch says: the same images through both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from mambamic.checkpoint import Checkpoint
from mambamic.engine import read_model
from mambamic.kernels import resolve
from mambamic.preprocess import Pixels

BATCHES = (1, 2, 3, 8)
TOLERANCE = 1e-5  # of probabilities


@dataclass(frozen=True)
class Agreement:
    """How far two ways of computing are apart.

    Args:
        batch: Images at a time.
        images: In all.
        largest: Difference of a probability.
        labels: Images whose most probable class is another.
    """

    batch: int
    images: int
    largest: float
    labels: int

    @property
    def holds(self) -> bool:
        """Whether that is within the tolerance."""
        return self.largest < TOLERANCE and not self.labels


def verify(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    pixels: Pixels,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Agreement]:
    """Compare a file with the plain module under torch, in float32, batch size by batch size.

    Args:
        checkpoint: That the file was made from.
        path: The file, with either kind of input.
        pixels: (N, S, S, 3), of the model's size; of a larger batch size than N there is one,
            filled with the images again.
        batches: How many go through the file at a time.

    Yields:
        One comparison per batch size.
    """
    expected = _with_torch(checkpoint, pixels)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # see graph.onnx
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    given = session.get_inputs()[0].name
    images = pixels if given == "pixels" else checkpoint.config.preprocess.normalise(pixels)
    for batch in batches:
        places = np.arange(-(-len(pixels) // batch) * batch) % len(pixels)
        found = np.concatenate(
            [
                session.run(["probabilities"], {given: images[places[start : start + batch]]})[0]
                for start in range(0, len(places), batch)
            ]
        )
        difference = float(np.abs(found - expected[places]).max())
        labels = int((found.argmax(1) != expected[places].argmax(1)).sum())
        yield Agreement(batch, len(places), difference, labels)


def random_pixels(count: int, size: int) -> Pixels:
    """Return images of noise, coarse and fine, the same each time: (count, size, size, 3)."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, -(-size // 16), -(-size // 16), 3))
    smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :size, :size]
    noisy = smooth + random.normal(0, 20, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _with_torch(checkpoint: Checkpoint, pixels: Pixels) -> NDArray[np.float32]:
    config = checkpoint.config
    model = read_model(checkpoint, resolve("auto", torch.device("cpu")))
    rows = []
    with torch.inference_mode():
        for start in range(0, len(pixels), max(BATCHES)):
            part = config.preprocess.normalise(pixels[start : start + max(BATCHES)])
            logits = model(torch.from_numpy(part)) / (config.temperature or 1.0)
            rows.append(logits.softmax(1) if config.head == "softmax" else logits.sigmoid())
    probabilities: NDArray[np.float32] = torch.cat(rows).numpy()
    return probabilities
