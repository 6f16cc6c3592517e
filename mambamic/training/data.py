"""One split of a data set, decoded once and kept as uint8, and the batches made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mambamic.data.source import LAYOUT, Source, open_split, refuse_unreadable
from mambamic.errors import DataError, MambamicError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.training.recipe import epoch_seed
from mambamic.training.share import Share


@dataclass(frozen=True)
class Split:
    """The images of one split and what they show.

    Args:
        pixels: (N, S, S, 3) uint8.
        labels: (N,) int64, indices into ``classes``; or, where an image may show several, (N,
            classes) int64 of 0 and 1.
        classes: Names; in alphabetical order unless others were given.
        names: Of the images: their files, or their places in an array.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, or none."""
        return self.labels.ndim == 2

    def to(self, device: torch.device) -> Split:
        """Move images and labels to a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        return self.labels.shape[0]


def load_split(
    data: Path,
    split: str,
    preprocess: Preprocess,
    *,
    classes: tuple[str, ...] | None = None,
    progress: bool = False,
) -> Split:
    """Read one split of a data set.

    Args:
        data: A folder that holds ``split`` as a folder or as ``split.zip``; a zip of such a folder;
            or a MedMNIST ``.npz``.
        split: Usually ``train``, ``val`` or ``test``.
        preprocess: Brings every image to one size.
        classes: Names in the order that the labels shall have; by default the folders in
            alphabetical order, and for an ``.npz`` its own order, by the names in
            ``NAME.classes.txt`` beside it or else ``0``, ``1`` and so on.
        progress: Whether to show a progress bar.

    Raises:
        DataError: There is no such split, it has fewer than two classes, or images cannot be
            read; up to five of these are named.
    """
    with ExitStack() as stack:
        source = open_split(data, split, stack, classes)
        if len(source.classes) < 2 or len(source) == 0:
            raise DataError(
                f"{data} has {len(source)} images of {len(source.classes)} classes "
                f"in split {split!r}",
                f"images of at least two classes, as {LAYOUT}",
                "check the path and the layout",
            )
        pixels = _decode(source, preprocess, progress=progress)
    labels = torch.from_numpy(source.labels)
    return Split(torch.from_numpy(pixels), labels, source.classes, source.names)


def _decode(source: Source, preprocess: Preprocess, *, progress: bool) -> Pixels:
    """Bring all images to one size; (N, S, S, 3) uint8, the only copy that is held."""
    size = preprocess.input_size
    pixels = np.empty((len(source), size, size, 3), np.uint8)
    failures = []
    decoded = source.map(lambda stored: preprocess.pixels(stored.image))
    title = f"reading {source.split}"
    disable = None if progress else True  # None: no bar where standard error is not a terminal
    bar = tqdm(decoded, title, len(source), unit="image", disable=disable)
    for index, result in enumerate(bar):
        if isinstance(result, MambamicError):
            failures.append((source.names[index], result))
        else:
            pixels[index] = result
    refuse_unreadable(failures, source)
    return pixels


class Batches:
    """Batches of a split that already lies on the device, reshuffled at every pass.

    Args:
        split: The images.
        batch_size: Images per batch, over all processes.
        seed: Of the order; None keeps the order and the last, smaller batch.
        share: Which part of them is this process's: of each batch where they are shuffled, and of
            the split where they are not.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int | None, share: Share | None = None
    ) -> None:
        self._split, self._seed, self._share = split, seed, share or Share()
        ranks = self._share.ranks
        self._batch_size = min(batch_size, len(split)) // ranks * ranks
        self.epoch = 0  # set by the training loop, so that a resumed run goes on as it would have

    def __len__(self) -> int:
        whole, rest = divmod(len(self._split), self._batch_size)
        return whole + (self._seed is None and rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self._indices():
            yield self._split.pixels[indices], self._split.labels[indices]

    def _indices(self) -> Iterator[Tensor]:
        device, share = self._split.labels.device, self._share
        if self._seed is None:
            order = torch.arange(share.rank, len(self._split), share.ranks, device=device)
            yield from order.split(self._batch_size // share.ranks)
            return
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, self.epoch))
        order = torch.randperm(len(self._split), generator=generator).to(device)
        yield from map(share.of, islice(order.split(self._batch_size), len(self)))
