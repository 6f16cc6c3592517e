"""Where the images of a data set are, opened split by split: folders, zips, MedMNIST files."""

from __future__ import annotations

import io
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from mambamic.errors import DataError, MambamicError
from mambamic.images import FORMATS, decode
from mambamic.machine import usable_cpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
SPLITS = ("train", "val", "test")
LAYOUT = "SPLIT/CLASS/IMAGE, as folders or in SPLIT.zip, or a MedMNIST .npz"
_NO_SPLITS = (
    f"check the path; or rename what is there to {', '.join(SPLITS)}; or, where there are no "
    "splits yet, let examples/arrange.py make them (docs/datasets.md)"
)
AT_ONCE = 256  # images between two steps of a progress bar
# A RuntimeError is what zipfile raises for encryption and for methods that it lacks.
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Stored:
    """An image, and what it was decoded from.

    Args:
        image: Mode RGB, as large as it was stored.
        data: The bytes of its file; None where it was stored as an array.
        channels: Of the array, 1 or 3.
    """

    image: Image.Image
    data: bytes | None = None
    channels: int = 3

    def kind(self) -> str:
        """Return the format and the mode of the file, by its header, such as ``PNG RGB``."""
        if self.data is None:
            return "array L" if self.channels == 1 else "array RGB"
        with Image.open(io.BytesIO(self.data), formats=FORMATS) as header:
            return f"{header.format} {header.mode}"


class Source(ABC):
    """One split of a data set: labels at once, images one after the other.

    Args:
        split: Its name.
        classes: Names, in the order of the labels.
        labels: (N,) int64 indices into ``classes``, or (N, classes) of 0 and 1.
        names: Of the images.
        passed_over: Files that lie where no image is looked for.
    """

    def __init__(
        self,
        split: str,
        classes: tuple[str, ...],
        labels: NDArray[np.int64],
        names: Sequence[str],
        passed_over: Sequence[str] = (),
    ) -> None:
        self.split, self.classes, self.labels = split, classes, labels
        self.names, self.passed_over = tuple(names), tuple(passed_over)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, or none."""
        return self.labels.ndim == 2

    @abstractmethod
    def map(self, work: Callable[[Stored], T]) -> Iterator[T | MambamicError]:
        """Do something with each image, in threads.

        Args:
            work: Called with one image at a time; only what it returns is kept.

        Returns:
            Its results in the order of the images, or why an image cannot be read.
        """


class FileSource(Source):
    """Image files in folders, or in a zip."""

    def __init__(
        self, split: str, root: Path | zipfile.ZipFile, classes: tuple[str, ...] | None
    ) -> None:
        self._root = root
        self._reading = threading.Lock()  # a ZipFile counts its readers, and not atomically
        kept, passed_over = _images(_files(root, split), split)
        folders = [PurePosixPath(name).parent.name for name in kept]
        known = tuple(sorted(set(folders))) if classes is None else classes
        index = {name: number for number, name in enumerate(known)}
        unknown = sorted(set(folders) - index.keys())
        if unknown:
            raise DataError(
                f"split {split!r} has the classes {', '.join(unknown)}",
                "none but " + ", ".join(known),
                "rename or remove these folders; or train with --classes that name them all, "
                "apart by spaces",
            )
        labels = np.array([index[name] for name in folders], np.int64)
        super().__init__(split, known, labels, kept, passed_over)

    def map(self, work: Callable[[Stored], T]) -> Iterator[T | MambamicError]:
        """Read, decode and work on each file in a thread."""

        def one(name: str) -> T | MambamicError:
            try:
                data = self._read(name)
                return work(Stored(decode(data), data))
            except MambamicError as error:
                return error

        with threads() as pool:
            for start in range(0, len(self), AT_ONCE):
                yield from pool.map(one, self.names[start : start + AT_ONCE])

    def _read(self, name: str) -> bytes:
        try:
            if isinstance(self._root, Path):
                return (self._root / name).read_bytes()
            with self._reading:
                return self._root.read(name)
        except UNREADABLE as error:
            raise DataError(
                f"it cannot be read ({error})", "a readable file", "check the file"
            ) from error


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Provide one thread per usable core, at most 8: the interpreter lock keeps more waiting."""
    with ThreadPoolExecutor(min(8, usable_cpus()), "decode") as pool:
        yield pool


def open_split(
    data: Path, split: str, stack: ExitStack, classes: tuple[str, ...] | None = None
) -> Source:
    """Open one split of a data set.

    Args:
        data: A folder that holds ``split`` as a folder or as ``split.zip``; a zip of such a folder;
            or a MedMNIST ``.npz``.
        split: Usually ``train``, ``val`` or ``test``.
        stack: What is opened is closed with it.
        classes: Names in the order that the labels shall have; by default the folders in
            alphabetical order, and for an ``.npz`` its own order, by the names in
            ``NAME.classes.txt`` beside it or else ``0``, ``1`` and so on.

    Raises:
        DataError: There is no such split, or it is not laid out as it should be.
    """
    if data.suffix == ".npz":
        from mambamic.data.npz import ArraySource

        return ArraySource(data, split, open_zip(data, stack), classes)
    root: Path | zipfile.ZipFile
    if data.is_file():
        root = open_zip(data, stack)
        if split not in _splits_in(root):
            raise DataError(f"{data} has no folder {split}/", LAYOUT, "check what it holds")
    elif (data / split).is_dir():
        root = data
    elif (data / f"{split}.zip").is_file():
        root = open_zip(data / f"{split}.zip", stack)
    else:
        raise DataError(_nothing(data, split), LAYOUT, _remedy(data))
    return FileSource(split, root, classes)


def find_splits(data: Path) -> tuple[str, ...]:
    """Return which of ``SPLITS`` a data set has.

    Raises:
        DataError: None of them.
    """
    with ExitStack() as stack:
        if data.suffix == ".npz":
            keys = open_zip(data, stack).namelist()
            found = {split for split in SPLITS if f"{split}_images.npy" in keys}
        elif data.is_file():
            found = _splits_in(open_zip(data, stack))
        else:
            found = {s for s in SPLITS if (data / s).is_dir() or (data / f"{s}.zip").is_file()}
    if not found:
        here = sorted(path.name for path in data.iterdir())[:8] if data.is_dir() else []
        raise DataError(
            f"{data} has none of {', '.join(SPLITS)}" + (f" but {', '.join(here)}" * bool(here)),
            LAYOUT,
            _remedy(data),
        )
    return tuple(split for split in SPLITS if split in found)


def open_zip(path: Path, stack: ExitStack) -> zipfile.ZipFile:
    """Open a zip, or an ``.npz``, which is one.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return stack.enter_context(zipfile.ZipFile(path))
    except (OSError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        kind = "npz" if path.suffix == ".npz" else "zip"
        raise DataError(f"{path} ({reason})", f"a readable {kind}", "get it again") from error


def refuse_unreadable(failures: Sequence[tuple[str, MambamicError]], source: Source) -> None:
    """Refuse a split some of whose images cannot be read.

    Raises:
        DataError: Naming up to five of them, with the reason.
    """
    if failures:
        first = "; ".join(f"{name}: {error.problem}" for name, error in failures[:5])
        raise DataError(
            f"{len(failures)} of {len(source)} images of split {source.split!r} "
            f"cannot be read ({first})",
            "readable images",
            "remove or mend these files",
        )


def _nothing(data: Path, split: str) -> str:
    if not data.exists():
        return f"{data} does not exist, and so has neither {split}/ nor {split}.zip"
    return f"{data} has neither {split}/ nor {split}.zip"


def _remedy(data: Path) -> str:
    """Return what to do about a split that a data set lacks."""
    filled = data.is_dir() and any(data.iterdir())
    if filled and not any((data / s).exists() or (data / f"{s}.zip").exists() for s in SPLITS):
        return _NO_SPLITS
    return "check the path and the name of the split"


def _splits_in(archive: zipfile.ZipFile) -> set[str]:
    folders = {PurePosixPath(name).parts[-3:-2] for name in archive.namelist()}
    return {split for split in SPLITS if (split,) in folders}


def _files(root: Path | zipfile.ZipFile, split: str) -> list[str]:
    if isinstance(root, Path):
        # The first follows links to folders, which the second does not.
        found = {*(root / split).glob("*/*"), *(root / split).rglob("*")}
        return [path.relative_to(root).as_posix() for path in found if path.is_file()]
    return [info.filename for info in root.infolist() if not info.is_dir()]


def _images(files: Sequence[str], split: str) -> tuple[list[str], list[str]]:
    """Return what lies at SPLIT/CLASS/IMAGE, and what else lies under SPLIT; neither is hidden."""
    kept: list[str] = []
    passed_over: list[str] = []
    for name in sorted(files):
        parts = PurePosixPath(name).parts
        if split not in parts[:-1]:
            continue
        below = parts[parts.index(split) :]
        if any(part.startswith(".") for part in below) or "__MACOSX" in parts:
            continue
        (kept if parts[-3:-2] == (split,) else passed_over).append(name)
    return kept, passed_over
