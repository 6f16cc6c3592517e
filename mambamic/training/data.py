"""Image folders, as directories or zips, decoded once and kept as uint8."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mambamic.decoding import DecodePool
from mambamic.errors import DataError, MambamicError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.training.recipe import epoch_seed

_AT_ONCE = 256  # images decoded between two steps of the progress bar
_LAYOUT = "SPLIT/CLASS/IMAGE, as folders or in SPLIT.zip"


@dataclass(frozen=True)
class Split:
    """The images of one split and what they show.

    Args:
        pixels: (N, S, S, 3) uint8.
        labels: (N,) int64, indices into ``classes``.
        classes: Names in alphabetical order.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Split:
        """Move images and labels to a device."""
        return Split(self.pixels.to(device), self.labels.to(device), self.classes)

    def __len__(self) -> int:
        return self.labels.shape[0]


def load_split(data: Path, split: str, preprocess: Preprocess, *, progress: bool = False) -> Split:
    """Read one split of a data set.

    Args:
        data: A folder that holds ``split`` as a folder or as ``split.zip``.
        split: Usually ``train``, ``val`` or ``test``.
        preprocess: Brings every image to one size.
        progress: Whether to show a progress bar.

    Raises:
        DataError: There is no such split, it has fewer than two classes, or images cannot be
            read; up to five of these are named.
    """
    with ExitStack() as stack:
        files = _open(data, split, stack)
        classes = tuple(sorted({PurePosixPath(name).parent.name for name, _ in files}))
        if len(classes) < 2:
            raise DataError(
                f"{data} has {len(files)} images of {len(classes)} classes in split {split!r}",
                f"images of at least two classes, as {_LAYOUT}",
                "check the path and the layout",
            )
        index = {name: number for number, name in enumerate(classes)}
        pool = stack.enter_context(DecodePool(preprocess))
        bar = stack.enter_context(
            tqdm(total=len(files), desc=f"reading {split}", unit="image", disable=not progress)
        )
        size = preprocess.input_size
        pixels = np.empty((len(files), size, size, 3), np.uint8)
        failures: list[tuple[str, MambamicError]] = []
        start = 0
        names = iter(files)
        while chunk := list(islice(names, _AT_ONCE)):
            decoded = _decode(pool, [file for _, file in chunk])
            for offset, (result, (name, _)) in enumerate(zip(decoded, chunk, strict=True)):
                if isinstance(result, MambamicError):
                    failures.append((name, result))
                else:
                    pixels[start + offset] = result
            start += len(chunk)
            bar.update(len(chunk))
    if failures:
        first = "; ".join(f"{name}: {error.problem}" for name, error in failures[:5])
        raise DataError(
            f"{len(failures)} of {len(files)} images of split {split!r} cannot be read ({first})",
            "readable images",
            "remove or mend these files",
        )
    labels = [index[PurePosixPath(name).parent.name] for name, _ in files]
    return Split(torch.from_numpy(pixels), torch.tensor(labels), classes)


class _File:
    """Something that can be read later, so that a split is never in memory as files."""

    def __init__(self, source: Path | zipfile.ZipFile, name: str) -> None:
        self._source, self._name = source, name

    def read(self) -> bytes | DataError:
        try:
            if isinstance(self._source, Path):
                return (self._source / self._name).read_bytes()
            return self._source.read(self._name)
        # A RuntimeError is what zipfile raises for encryption and for methods that it lacks.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            return DataError(f"it cannot be read ({error})", "a readable file", "check the file")


def _decode(pool: DecodePool, files: list[_File]) -> list[Pixels | MambamicError]:
    contents = [file.read() for file in files]
    decoded = iter(pool.map([content for content in contents if isinstance(content, bytes)]))
    return [next(decoded) if isinstance(content, bytes) else content for content in contents]


def _open(data: Path, split: str, stack: ExitStack) -> list[tuple[str, _File]]:
    folder, archive = data / split, data / f"{split}.zip"
    source: Path | zipfile.ZipFile
    if folder.is_dir():
        source = data
        names: Iterator[str] = (
            str(path.relative_to(data).as_posix()) for path in folder.glob("*/*") if path.is_file()
        )
    elif archive.is_file():
        try:
            source = stack.enter_context(zipfile.ZipFile(archive))
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{archive} ({error})", "a readable zip", "get it again") from error
        names = (info.filename for info in source.infolist() if not info.is_dir())
    else:
        raise DataError(
            f"{data} has neither {folder.name}/ nor {archive.name}", _LAYOUT, "check the path"
        )
    kept = sorted(
        name
        for name in names
        if PurePosixPath(name).parts[-3:-2] == (split,)
        and not any(part.startswith(".") for part in PurePosixPath(name).parts[-2:])
    )
    return [(name, _File(source, name)) for name in kept]


class Batches:
    """Batches of a split that already lies on the device, reshuffled at every pass.

    Args:
        split: The images.
        batch_size: Images per batch.
        seed: Of the order; None keeps the order and the last, smaller batch.
    """

    def __init__(self, split: Split, batch_size: int, seed: int | None) -> None:
        self._split, self._batch_size, self._seed = split, min(batch_size, len(split)), seed
        self.epoch = 0  # set by the training loop, so that a resumed run goes on as it would have

    def __len__(self) -> int:
        whole, rest = divmod(len(self._split), self._batch_size)
        return whole + (self._seed is None and rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._seed is None:
            order = torch.arange(len(self._split))
        else:
            generator = torch.Generator().manual_seed(epoch_seed(self._seed, self.epoch))
            order = torch.randperm(len(self._split), generator=generator)
        order = order.to(self._split.labels.device)
        for indices in islice(order.split(self._batch_size), len(self)):
            yield self._split.pixels[indices], self._split.labels[indices]
