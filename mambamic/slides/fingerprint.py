"""What a slide's content is, in 64 digits: whether work was done on this very slide."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 2**20
_BLOCKS = 64


def file_digest(path: Path) -> str:
    """Hash a whole file, for masks and other small ones."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def slide_fingerprint(path: Path, quickhash: str | None = None) -> str:
    """Hash the size of a slide and up to 64 blocks of a mebibyte, evenly spaced, first and last.

    Up to 64 MiB that is all of it. Of a larger one every scan differs in size and everywhere in its
    compressed data, and reading all of a terabyte of slides to find nothing to do takes hours.

    Args:
        path: The file. Of MIRAX, the files in the folder of its name are hashed with it.
        quickhash: OpenSlide's own hash, which covers all files of a slide.
    """
    digest = hashlib.sha256((quickhash or "").encode())
    files = [path]
    if path.suffix.lower() == ".mrxs":
        files += sorted(file for file in path.with_suffix("").glob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file != path else ''} {size}\n".encode())
        with file.open("rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    last = size - _BLOCK
    return [last * n // (_BLOCKS - 1) for n in range(_BLOCKS)]
