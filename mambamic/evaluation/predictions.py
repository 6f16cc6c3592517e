"""What a checkpoint says about every image of a split, beside what is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mambamic.classifier import Classifier
from mambamic.config import Config
from mambamic.errors import DataError
from mambamic.preprocess import Pixels

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
THRESHOLD = 0.5  # a label of a sigmoid head is predicted above it


@dataclass(frozen=True)
class Predictions:
    """The truth and the probabilities of N images and K classes.

    Args:
        classes: K names.
        truth: (N, K), whether the image is of the class or carries the label.
        probabilities: (N, K), from 0 to 1.
        multi_label: Whether each label is decided on its own (a sigmoid head).
    """

    classes: tuple[str, ...]
    truth: Bools
    probabilities: Floats
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def kind(self) -> str:
        """``binary`` or ``multi-class`` (one class per image), or ``multi-label``."""
        if self.multi_label:
            return "multi-label"
        return "binary" if len(self.classes) == 2 else "multi-class"

    @cached_property
    def labels(self) -> NDArray[np.intp]:
        """(N,), the class of each image; only where an image has one class."""
        return np.asarray(self.truth.argmax(1))

    @cached_property
    def decided(self) -> Bools:
        """(N, K), the predicted classes: the most probable, or all above the threshold."""
        if self.multi_label:
            return self.probabilities > THRESHOLD
        decided = np.zeros(self.truth.shape, np.bool_)
        decided[np.arange(len(self)), self.probabilities.argmax(1)] = True
        return decided

    @cached_property
    def correct(self) -> Bools:
        """(N,), whether everything that was predicted for the image is true."""
        equal: Bools = (self.truth == self.decided).all(1)
        return equal

    @cached_property
    def confidence(self) -> Floats:
        """What is held against the truth in bins: (N,), the top probability; or all, (N, K)."""
        return self.probabilities if self.multi_label else self.probabilities.max(1)

    @cached_property
    def outcome(self) -> Bools:
        """Whether what ``confidence`` is the probability of came true, of the same shape."""
        return self.truth if self.multi_label else self.correct


def truth_of(labels: Tensor, config: Config) -> Bools:
    """Bring the labels of a split to the form of the truth.

    Args:
        labels: (N,) indices into the checkpoint's classes, or (N, K) of 0 and 1.
        config: Of the checkpoint.

    Returns:
        (N, K).

    Raises:
        DataError: Images with several labels meet a checkpoint that gives each image one class.
    """
    if labels.ndim == 2 and config.head != "sigmoid":
        raise DataError(
            f"the data has several labels per image, the checkpoint's head is {config.head}",
            "a checkpoint with a sigmoid head",
            "train one on this data set",
        )
    values = labels.cpu().numpy()
    if labels.ndim == 2:
        return np.asarray(values > 0)
    return np.asarray(values[:, None] == np.arange(len(config.classes)))


def predict(classifier: Classifier, pixels: Pixels, *, progress: bool = False) -> Floats:
    """Classify images of the model's size, a few at a time.

    Args:
        classifier: The loaded checkpoint.
        pixels: (N, S, S, 3).
        progress: Whether to show a progress bar.

    Returns:
        (N, classes).

    Raises:
        DataError: Probabilities are not numbers.
    """
    result = in_chunks(classifier.probabilities, pixels, classifier.max_batch, progress=progress)
    bad = int((~np.isfinite(result)).any(1).sum())
    if bad:
        raise DataError(
            f"the model gives no probabilities for {bad} of {len(pixels)} images (not a number)",
            "finite values",
            "try --dtype float32; if that does not help, the weights are damaged",
        )
    return result.astype(np.float64)


def in_chunks(
    network: Callable[[Pixels], NDArray[np.float32]],
    pixels: Pixels,
    size: int,
    *,
    title: str = "classifying",
    progress: bool = False,
) -> NDArray[np.float32]:
    """Give a network images a few at a time, behind a progress bar.

    Args:
        network: Returns a row for each image.
        pixels: (N, S, S, 3), N at least 1.
        size: Images at a time, at most.
        title: Of the bar.
        progress: Whether to show it.

    Returns:
        (N, ...), the rows in order.
    """
    rows = []
    with tqdm(total=len(pixels), desc=title, unit="image", disable=not progress) as bar:
        for start in range(0, len(pixels), size):
            chunk = pixels[start : start + size]
            rows.append(network(chunk))
            bar.update(len(chunk))
    return np.concatenate(rows)
