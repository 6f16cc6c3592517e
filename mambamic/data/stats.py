"""Mean and standard deviation of a split's pixels, for a recipe or a ``config.json``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mambamic.data.source import Stored, open_split, refuse_unreadable
from mambamic.errors import DataError, MambamicError
from mambamic.preprocess import Preprocess, Triple


@dataclass(frozen=True)
class Statistics:
    """What the pixels of a split are like, per channel, on the scale from 0 to 1.

    Args:
        mean: Of all pixels.
        std: Of all pixels, about the mean of all of them.
        images: How many.
        pixels: How many.
    """

    mean: Triple
    std: Triple
    images: int
    pixels: int

    def as_json(self) -> dict[str, Any]:
        """Return it as an object that JSON can hold, with four decimals."""
        return {
            "mean": [round(value, 4) for value in self.mean],
            "std": [round(value, 4) for value in self.std],
            "images": self.images,
            "pixels": self.pixels,
        }


def statistics(
    data: Path,
    split: str = "train",
    preprocess: Preprocess | None = None,
    *,
    progress: bool = True,
) -> Statistics:
    """Sum up the pixels of a split, exactly.

    Args:
        data: As of ``open_split``.
        split: Of the data set. That of the training split is what a model should be told.
        preprocess: Brings every image to the model's size first; None takes them as they are
            stored, so that a larger image counts for more.
        progress: Whether to show a bar where it takes long and standard error is a terminal.

    Raises:
        DataError: There is no such split, it is empty, or images cannot be read.
    """

    def histogram(stored: Stored) -> list[int]:
        if preprocess is None:
            return stored.image.histogram()
        return Image.fromarray(preprocess.pixels(stored.image)).histogram()

    total = np.zeros((3, 256), np.int64)
    failures = []
    with ExitStack() as stack:
        source = open_split(data, split, stack)
        disable = None if progress else True  # None: no bar where standard error is no terminal
        found = tqdm(
            source.map(histogram), f"reading {split}", len(source),
            unit="image", delay=2, disable=disable, leave=False,
        )  # fmt: skip
        for name, result in zip(source.names, found, strict=True):
            if isinstance(result, MambamicError):
                failures.append((name, result))
            else:
                total += np.reshape(result, (3, 256))
        refuse_unreadable(failures, source)
    if len(source) == 0:
        raise DataError(f"{data} has no images in split {split!r}", "some", "check the path")
    values = np.arange(256) / 255
    pixels = int(total[0].sum())
    means = total @ values / pixels
    deviations = [
        np.sqrt(row @ (values - mean) ** 2 / pixels) for row, mean in zip(total, means, strict=True)
    ]
    return Statistics(_triple(means), _triple(deviations), len(source), pixels)


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
