"""The decoder: an RGB image within the limits, or one of the project's own errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mambamic.decoding import DecodePool, decode_pixels
from mambamic.errors import DecodeError, MambamicError, RequestError, TooLargeError
from mambamic.images import FORMATS, decode, pixel_count
from mambamic.preprocess import Preprocess

from .files import drawn, mutated, real

DRAWN = drawn()
MAX_PIXELS = 100_000
MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"BM"]
MAGIC += [b"GIF89a", b"\0\0\0\x0cjP  \r\n\x87\n", b"P6 ", b"\0\0\0 ftypavif"]
PREPROCESS = Preprocess(input_size=32)


def outcome(data: bytes) -> Image.Image | MambamicError:
    try:
        return decode(data, max_pixels=MAX_PIXELS)
    except MambamicError as error:
        return error


def check(data: bytes) -> None:
    """Whatever the bytes, decoding ends in one of two ways, and twice in the same one."""
    image = outcome(data)
    again = decode_pixels(PREPROCESS, data, max_pixels=MAX_PIXELS)
    if isinstance(image, MambamicError):
        assert type(image) in (DecodeError, RequestError, TooLargeError)
        assert image.status in (400, 413)
        assert all((image.problem, image.expected, image.remedy))
        assert isinstance(again, MambamicError)
        assert str(again) == str(image)
        return
    assert image.mode == "RGB"
    assert not image.info
    width, height = image.size
    assert 0 < width * height <= MAX_PIXELS
    # What a request is counted by is what is decoded.
    assert pixel_count(data, max_pixels=MAX_PIXELS) == width * height
    assert isinstance(again, np.ndarray)
    assert again.shape == (32, 32, 3)
    assert again.dtype == np.uint8
    assert (again == PREPROCESS.pixels(image)).all()


def test_what_is_drawn_is_read() -> None:
    for data in DRAWN:
        assert decode(data, max_pixels=MAX_PIXELS).size == (37, 23)
    assert len(FORMATS) >= 8


@given(st.sampled_from(MAGIC), st.binary(max_size=2000))
def test_arbitrary_bytes(magic: bytes, data: bytes) -> None:
    check(magic + data)


@given(mutated(DRAWN))
@settings(max_examples=600)
def test_mutated_drawings(data: bytes) -> None:
    check(data)


@pytest.fixture(scope="module")
def originals(data_dir: Path) -> list[bytes]:
    return real(data_dir / "odd_images")


@given(st.data())
@settings(max_examples=300)
def test_mutated_real_files(originals: list[bytes], data: st.DataObject) -> None:
    check(data.draw(mutated(originals)))


@given(st.lists(mutated(DRAWN), max_size=6))
@settings(max_examples=40)
def test_a_batch_is_decoded_as_its_files_are(blobs: list[bytes]) -> None:
    with DecodePool(PREPROCESS, threads=2, max_pixels=MAX_PIXELS) as pool:
        results = pool.map(blobs)
    assert len(results) == len(blobs)
    for blob, result in zip(blobs, results, strict=True):
        alone = decode_pixels(PREPROCESS, blob, max_pixels=MAX_PIXELS)
        if isinstance(alone, MambamicError):
            assert str(result) == str(alone)
        else:
            assert isinstance(result, np.ndarray)
            assert (result == alone).all()
