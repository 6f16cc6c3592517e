"""Several tiles in one ZIP archive, within limits."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import pytest

from mambamic.errors import DecodeError, RequestError, TooLargeError
from mambamic.zips import is_zip, read_zip


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_in_their_order(method: int) -> None:
    files = {"b.png": b"2" * 500, "a/c.png": b"1", "a.png": b""}
    assert read_zip(packed(files, method)) == list(files.items())


def test_what_operating_systems_add_is_passed_over() -> None:
    files = {"cells/": b"", "__MACOSX/._a.png": b"x", "cells/.DS_Store": b"x", "cells/a.png": b"1"}
    assert read_zip(packed(files)) == [("cells/a.png", b"1")]


def test_is_zip() -> None:
    assert is_zip(packed({"a": b""}))
    assert is_zip(packed({}))
    assert not is_zip(b"\x89PNG")
    assert not is_zip(b"")


def test_no_file() -> None:
    with pytest.raises(RequestError, match="without files"):
        read_zip(packed({"folder/": b""}))


def test_too_many_files() -> None:
    files = {f"{index}.png": b"1" for index in range(257)}
    with pytest.raises(TooLargeError, match="257 files"):
        read_zip(packed(files))
    assert len(read_zip(packed(files), max_tiles=257)) == 257


@pytest.mark.parametrize("stated", [40_000, 1])
def test_too_many_entries_are_not_even_listed(stated: int) -> None:
    data = bytearray(packed({f"{index}/": b"" for index in range(40_000)}, zipfile.ZIP_STORED))
    # What the archive says of itself is not to be relied upon.
    struct.pack_into("<HH", data, data.rindex(b"PK\x05\x06") + 8, stated, stated)
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="40000 entries"):
        read_zip(bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data)  # an object for each would be 20 MB


def test_a_nested_archive_is_a_tile() -> None:
    nested = packed({f"{index}/": b"" for index in range(3000)})
    assert read_zip(packed({"nested.zip": nested}, zipfile.ZIP_STORED)) == [("nested.zip", nested)]


def test_bomb_is_refused_before_it_expands() -> None:
    data = packed({f"{index}": bytes(50_000_000) for index in range(3)})
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="expands to 143 MiB; expected at most 100 MiB"):
        read_zip(data, max_bytes=100 * 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_understated_size_does_not_expand() -> None:
    data = bytearray(packed({"a": bytes(50_000_000)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 100)
    tracemalloc.start()
    with pytest.raises(DecodeError, match="damaged ZIP"):
        read_zip(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_same_name_twice() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", b"2")
    with pytest.raises(RequestError, match="is in the ZIP archive more than once"):
        read_zip(buffer.getvalue())


def test_encrypted() -> None:
    data = bytearray(packed({"a.png": b"1"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    with pytest.raises(RequestError, match="encrypted"):
        read_zip(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression(method: int) -> None:
    with pytest.raises(DecodeError, match="compression method"):
        read_zip(packed({"a.png": b"1"}, method))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"no archive at all"])
def test_not_an_archive(data: bytes) -> None:
    with pytest.raises(DecodeError, match="damaged ZIP"):
        read_zip(data)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated(part: float) -> None:
    data = packed({"a.png": bytes(range(256)) * 20})
    with pytest.raises(DecodeError, match="damaged ZIP"):
        read_zip(data[: int(len(data) * part)])


def test_every_damaged_byte_is_survived() -> None:
    data = packed({"a.png": b"12345", "b.png": b"123456"})
    refused = 0
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 0xFF
        try:
            read_zip(damaged)
        except (DecodeError, RequestError, TooLargeError):
            refused += 1
    assert refused > len(data) // 4
