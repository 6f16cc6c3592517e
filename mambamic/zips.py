"""Several tiles in one request: a ZIP archive, read within limits."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import TYPE_CHECKING

from mambamic.errors import DecodeError, RequestError, TooLargeError

if TYPE_CHECKING:
    from mambamic.images import BytesLike

MAX_TILES = 256
MAX_BYTES = 512 * 2**20
_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_NOT_TILES = (".DS_Store", "Thumbs.db", "desktop.ini")
# Folders, and what operating systems add to each file, are entries as well.
_ENTRIES_PER_TILE = 8


def is_zip(data: BytesLike) -> bool:
    """Tell whether bytes start like a ZIP archive."""
    return bytes(data[:4]) in _MAGIC


def read_zip(
    data: BytesLike, *, max_tiles: int = MAX_TILES, max_bytes: int = MAX_BYTES
) -> list[tuple[str, bytes]]:
    """Read the files of a ZIP archive in their order.

    Folders and what operating systems add (``__MACOSX/``, ``.DS_Store`` ...) are passed over.

    Args:
        data: The archive.
        max_tiles: Most files.
        max_bytes: Most bytes of all files together, expanded.

    Returns:
        Name and content of each file.

    Raises:
        TooLargeError: More than the limits; nothing was expanded.
        RequestError: The archive is encrypted, holds no file, or two of the same name.
        DecodeError: Not a ZIP archive, a damaged one, or one that understates its sizes.
    """
    try:
        source = _Bounded(data, max_tiles * _ENTRIES_PER_TILE)
        with zipfile.ZipFile(source) as archive:
            source.most_entries = None
            members = [info for info in archive.infolist() if _is_tile(info)]
            _check(members, max_tiles, max_bytes)
            return [(info.filename, _expand(archive, info)) for info in members]
    # zipfile raises NotImplementedError for features it lacks and ValueError, IndexError and
    # others for headers that contradict themselves.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        OverflowError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise DecodeError(
            f"a damaged ZIP archive ({error or type(error).__name__})",
            "a complete archive, stored or deflated",
            "pack it again",
        ) from error


class _Bounded(io.BytesIO):
    """An archive whose directory is refused before ``zipfile`` makes an object of each entry.

    What the archive itself says of their number is the sender's word; so the entries are counted,
    by the signature that each of them begins with, in what ``zipfile`` reads to list them.
    """

    def __init__(self, data: BytesLike, most_entries: int) -> None:
        super().__init__(data)
        self.most_entries: int | None = most_entries

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        if self.most_entries is not None:
            entries = found.count(b"PK\x01\x02")
            if entries > self.most_entries:
                raise TooLargeError(
                    f"a ZIP archive of {entries} entries",
                    f"at most {self.most_entries}, folders and hidden files included",
                    "send several",
                )
        return found


def _is_tile(info: zipfile.ZipInfo) -> bool:
    *folders, name = info.filename.split("/")
    return not (info.is_dir() or "__MACOSX" in folders or name in _NOT_TILES)


def _check(members: list[zipfile.ZipInfo], max_tiles: int, max_bytes: int) -> None:
    if not members:
        raise RequestError("a ZIP archive without files", "at least one image", "add one")
    if len(members) > max_tiles:
        raise TooLargeError(
            f"a ZIP archive of {len(members)} files", f"at most {max_tiles}", "send several"
        )
    total = sum(info.file_size for info in members)
    if total > max_bytes:
        raise TooLargeError(
            f"a ZIP archive that expands to {total / 2**20:.0f} MiB",
            f"at most {max_bytes / 2**20:g} MiB",
            "send several smaller ones",
        )
    names = [info.filename for info in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(
            f"{twice!r} is in the ZIP archive more than once", "distinct names", "rename one"
        )
    for info in members:
        if info.flag_bits & _ENCRYPTED:
            raise RequestError(
                f"{info.filename!r} in the ZIP archive is encrypted",
                "files without a password",
                "pack them without one",
            )
        if info.compress_type not in _READABLE:
            raise DecodeError(
                f"{info.filename!r} in the ZIP archive has compression method {info.compress_type}",
                "stored or deflated",
                "pack it again",
            )


def _expand(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # Declared sizes were checked, but are the sender's word. With a length to read, zipfile
    # expands no further than that, and an archive that understates fails its checksum.
    with archive.open(info) as member:
        return member.read(info.file_size + 1)
