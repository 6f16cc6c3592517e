"""MedMNIST files: the arrays of an ``.npz``, read as a stream and never unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from mambamic.data.source import AT_ONCE, SPLITS, UNREADABLE, Source, Stored, threads
from mambamic.errors import DataError, MambamicError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

T = TypeVar("T")
_IMAGES = "(N, S, S) or (N, S, S, 3) uint8"
_LABELS = "(N, 1) whole numbers from 0, or (N, classes) of 0 and 1"
_AS_MEDMNIST = "arrange it as MedMNIST does, see docs/datasets.md"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True)
class _Array:
    """An array that was not read yet, and where."""

    archive: zipfile.ZipFile
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def what(self) -> str:
        return f"{self.key!r} of shape {self.shape} and type {self.dtype}"

    def read(self) -> NDArray[Any]:
        """Read all of it."""
        with self.archive.open(f"{self.key}.npy") as file:
            try:
                array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
            except (*UNREADABLE, ValueError) as error:
                raise _damaged(self.key, error) from error
        return array

    def chunks(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Read bytes as (``count`` or fewer, ...) parts, one after the other."""
        size = int(np.prod(self.shape[1:]))
        with self.archive.open(f"{self.key}.npy") as file:
            try:
                _header(file)
                for start in range(0, self.shape[0], count):
                    wanted = min(count, self.shape[0] - start) * size
                    data = file.read(wanted)
                    if len(data) < wanted:
                        raise EOFError("it ends too early")
                    yield np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
            except UNREADABLE as error:
                raise _damaged(self.key, error) from error


class ArraySource(Source):
    """One split of a MedMNIST file."""

    def __init__(
        self,
        path: Path,
        split: str,
        archive: zipfile.ZipFile,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self._images = _open_images(archive, split, path)
        labels = _read_labels(archive, split, path)
        beside = names_beside(path)
        named = beside or classes or _numbered(path, labels)
        mine = labels[split]
        _check_labels(mine, named, split, path)
        if self._images.shape[0] != len(mine):
            raise DataError(
                f"{path} has {self._images.shape[0]} {split}_images and {len(mine)} {split}_labels",
                "as many of one as of the other",
                _AS_MEDMNIST,
            )
        if beside is not None and classes is not None:
            mine, named = _reordered(mine, beside, classes, path), classes
        super().__init__(split, named, mine, [f"{split}[{index}]" for index in range(len(mine))])

    def map(self, work: Callable[[Stored], T]) -> Iterator[T | MambamicError]:
        """Work on each image in a thread; the file itself is expanded in the caller's."""
        channels = 3 if len(self._images.shape) == 4 else 1

        def one(pixels: NDArray[np.uint8]) -> T | MambamicError:
            try:
                return work(Stored(Image.fromarray(pixels).convert("RGB"), None, channels))
            except MambamicError as error:
                return error

        with threads() as pool:
            for chunk in self._images.chunks(AT_ONCE):
                yield from pool.map(one, chunk)


def names_beside(path: Path) -> tuple[str, ...] | None:
    """Return the names in ``NAME.classes.txt`` beside a MedMNIST file, None where there is none.

    Raises:
        DataError: As of ``read_class_names``.
    """
    beside = path.with_suffix(".classes.txt")
    return read_class_names(beside) if beside.is_file() else None


def _numbered(path: Path, labels: Mapping[str, NDArray[np.int64]]) -> tuple[str, ...]:
    """Return ``0``, ``1`` and so on, as far as the labels of all splits go."""
    first = next(iter(labels.values()))
    if first.ndim == 2:
        return tuple(map(str, range(first.shape[1])))
    used = np.unique(np.concatenate(list(labels.values())))
    used = used[used >= 0]  # a negative one is refused later, by its split
    if len(used) and used[-1] + 1 != len(used):
        absent = next(number for number, label in enumerate(used.tolist()) if number != label)
        beside = path.with_suffix(".classes.txt")
        raise DataError(
            f"{path} has labels up to {used[-1]} but none that is {absent}",
            "every label from 0 to the last",
            f"correct the labels, or name the classes in {beside.name}, one per line",
        )
    return tuple(map(str, used.tolist()))


def _reordered(
    labels: NDArray[np.int64], named: tuple[str, ...], classes: tuple[str, ...], path: Path
) -> NDArray[np.int64]:
    """Return labels that count classes in one order as labels that count them in another."""
    unknown = sorted(set(named) - set(classes))
    if unknown or (labels.ndim == 2 and len(named) < len(classes)):
        raise DataError(
            f"{path} has the classes {', '.join(named)}, by the file beside it",
            ("none but " if labels.ndim == 1 else "") + ", ".join(classes),
            f"correct {path.with_suffix('.classes.txt').name}, or use other data",
        )
    place = np.array([classes.index(name) for name in named], np.int64)
    return place[labels] if labels.ndim == 1 else labels[:, np.argsort(place)]


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read names of classes from a text file, one per line, in the order of the labels.

    Raises:
        DataError: The file cannot be read, or has fewer than two names, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} ({error})", "a text file", "check the path") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"{path} has {len(names)} names, {len(set(names))} of them distinct",
            "at least two distinct names, one per line, in the order of the labels",
            "correct it",
        )
    return names


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise EOFError(f"npy format {version}")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = _HEADERS[version](file)
    return header


def _find(archive: zipfile.ZipFile, key: str, path: Path) -> _Array:
    keys = [name.removesuffix(".npy") for name in archive.namelist()]
    if key not in keys:
        raise DataError(
            f"{path} has no {key!r} but {', '.join(keys) or 'nothing'}",
            "SPLIT_images and SPLIT_labels, with SPLIT one of " + ", ".join(SPLITS),
            _AS_MEDMNIST,
        )
    try:
        with archive.open(f"{key}.npy") as file:
            shape, fortran, dtype = _header(file)
    except (*UNREADABLE, ValueError) as error:
        raise _damaged(key, error) from error
    array = _Array(archive, key, shape, dtype)
    if dtype.hasobject:
        raise DataError(
            f"{key!r} in {path} is a pickled object array",
            "numbers: what is pickled can run code, and is never loaded",
            "save it again as an array of numbers, of equally large images",
        )
    if fortran and len(shape) > 1:
        raise DataError(
            f"{array.what} in {path} is in Fortran order",
            "C order",
            "save numpy.ascontiguousarray of it",
        )
    return array


def _open_images(archive: zipfile.ZipFile, split: str, path: Path) -> _Array:
    images = _find(archive, f"{split}_images", path)
    shape = images.shape
    colour = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    if images.dtype != np.uint8 or not colour or shape[1] != shape[2] or 0 in shape[1:]:
        volumes = " (volumes are not read)" if len(shape) == 4 and len(set(shape[1:])) == 1 else ""
        raise DataError(f"{path}: {images.what}{volumes}", _IMAGES, _AS_MEDMNIST)
    if shape[0] == 0:
        raise DataError(
            f"{path} has no images in split {split!r}", "at least one", "get the file again"
        )
    return images


def _read_labels(archive: zipfile.ZipFile, split: str, path: Path) -> dict[str, NDArray[np.int64]]:
    """Read the labels of all splits: one alone may not have the last class."""
    keys = archive.namelist()
    others = [name for name in SPLITS if name != split and f"{name}_labels.npy" in keys]
    found = {}
    for name in (split, *others):
        labels = _find(archive, f"{name}_labels", path)
        if (
            labels.dtype.kind not in "iub"
            or len(labels.shape) not in (1, 2)
            or 0 in labels.shape[1:]
        ):
            raise DataError(f"{path}: {labels.what}", _LABELS, _AS_MEDMNIST)
        values = labels.read().astype(np.int64)
        found[name] = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if len({labels.shape[1:] for labels in found.values()}) > 1:
        raise DataError(
            f"{path} has labels of different shapes in {', '.join(found)}", _LABELS, _AS_MEDMNIST
        )
    return found


def _check_labels(
    labels: NDArray[np.int64], classes: tuple[str, ...], split: str, path: Path
) -> None:
    columns = labels.shape[1] if labels.ndim == 2 else len(classes)
    if columns != len(classes):
        raise DataError(
            f"{split}_labels in {path} has {columns} columns for {len(classes)} classes",
            "a column per class",
            "name as many classes",
        )
    last = 1 if labels.ndim == 2 else len(classes) - 1
    wrong = labels[(labels < 0) | (labels > last)]
    if len(wrong):
        raise DataError(
            f"{split}_labels in {path} has the label {wrong[0]}",
            f"0 to {last}" + (", as there are several columns" if labels.ndim == 2 else ""),
            "correct the labels, or name all classes",
        )


def _damaged(key: str, error: Exception) -> DataError:
    return DataError(f"{key!r} cannot be read ({error})", "a complete npz", "get the file again")
