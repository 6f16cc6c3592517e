"""ZIP archives: the files as they were packed, or one of the project's own errors."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

from hypothesis import given, settings
from hypothesis import strategies as st

from mambamic.errors import DecodeError, MambamicError, RequestError, TooLargeError
from mambamic.zips import is_zip, read_zip

from .files import mutated

MAX_TILES = 5
MAX_BYTES = 50_000
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/\\"), min_size=1, max_size=12)
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])


def packed(files: dict[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ORIGINALS = [
    packed(files, method)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for files in (
        {"a.png": b"1" * 300},
        {"a.png": bytes(20_000), "b/c.png": b"2", "b/": b""},
        {f"{number}": b"x" * number for number in range(5)},
        {"__MACOSX/._a": b"x", "a": b"y" * 40},
    )
]


def outcome(data: bytes) -> list[tuple[str, bytes]] | MambamicError:
    try:
        return read_zip(data, max_tiles=MAX_TILES, max_bytes=MAX_BYTES)
    except MambamicError as error:
        return error


def check(data: bytes) -> None:
    files = outcome(data)
    if isinstance(files, MambamicError):
        assert type(files) in (DecodeError, RequestError, TooLargeError)
        assert files.status in (400, 413)
        return
    assert 0 < len(files) <= MAX_TILES
    assert len({name for name, _ in files}) == len(files)
    assert sum(len(content) for _, content in files) <= MAX_BYTES


@given(st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06"]), st.binary(max_size=500))
def test_arbitrary_bytes(magic: bytes, data: bytes) -> None:
    check(magic + data)


@given(mutated(ORIGINALS))
@settings(max_examples=1500)
def test_mutated_archives(data: bytes) -> None:
    check(data)


@given(st.dictionaries(NAMES, st.binary(max_size=300), min_size=1, max_size=MAX_TILES), METHODS)
def test_what_is_packed_comes_out(files: dict[str, bytes], method: int) -> None:
    data = packed(files, method)
    assert is_zip(data)
    hidden = {".DS_Store", "Thumbs.db", "desktop.ini"}
    wanted = [(name, content) for name, content in files.items() if name not in hidden]
    if wanted:
        assert read_zip(data, max_tiles=MAX_TILES, max_bytes=MAX_BYTES) == wanted


@given(st.integers(1, 2**32 - 1), st.integers(1, 64))
@settings(max_examples=60)
def test_a_bomb_that_lies_is_expanded_no_further_than_it_says(stated: int, mebibytes: int) -> None:
    data = bytearray(packed({"bomb": bytes(mebibytes << 20)}, zipfile.ZIP_DEFLATED))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(signature) + offset
        data[start : start + 4] = stated.to_bytes(4, "little")
    tracemalloc.start()
    try:
        check(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
