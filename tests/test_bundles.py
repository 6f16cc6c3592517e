"""Images of a client, cut into requests and put back in order."""

from __future__ import annotations

import io
import zipfile

import pytest
from PIL import Image

from mambamic.bundles import Bundle, Limits, bundles
from mambamic.errors import DecodeError, MambamicError, UsageError
from mambamic.zips import read_zip

BAD = DecodeError("it cannot be read", "an image file", "check the path")


def png(width: int, height: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "png")
    return buffer.getvalue()


def cut(row: list[bytes | MambamicError], **limits: int) -> list[int]:
    found = list(bundles(row, Limits(**limits)))
    assert [tile for bundle in found for tile in bundle.tiles] == row
    return [len(bundle.tiles) for bundle in found]


def test_by_number() -> None:
    assert cut([b"x"] * 7, tiles=3) == [3, 3, 1]
    assert cut([]) == []


def test_by_size_a_large_one_goes_alone() -> None:
    assert cut([b"x" * 4] * 5, size=10) == [2, 2, 1]
    assert cut([b"x", b"x" * 50, b"x"], size=10) == [1, 1, 1]


def test_by_pixels() -> None:
    assert cut([png(60), png(30), png(20), png(100)], pixels=100) == [2, 1, 1]
    assert cut([png(60), png(30), b"no image", BAD, png(10)], pixels=100) == [5]


def test_one_image_is_the_body_and_several_are_a_zip() -> None:
    assert Bundle((BAD, b"one")).encoded(False) == (b"one", "application/octet-stream")
    body, kind = Bundle((b"one", BAD, b"two")).encoded(False)
    assert kind == "application/zip"
    assert [content for _, content in read_zip(body)] == [b"one", b"two"]


def test_a_zip_is_sent_as_an_image_which_it_is_not() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"one")
    body, kind = Bundle((buffer.getvalue(),)).encoded(False)
    assert kind == "application/zip"
    assert [content for _, content in read_zip(body)] == [buffer.getvalue()]


def test_embeddings_are_asked_for_in_a_form() -> None:
    body, kind = Bundle((b"one",)).encoded(True)
    assert kind.startswith("multipart/form-data; boundary=")
    assert b'name="embedding"\r\n\r\n1\r\n' in body
    assert b"\r\n\r\none\r\n" in body


@pytest.mark.parametrize("limits", [{"tiles": 0}, {"tiles": 257}, {"size": 0}, {"pixels": 0}])
def test_limits_that_make_no_sense(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="1 to 256 images"):
        Limits(**limits)
