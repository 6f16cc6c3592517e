from __future__ import annotations

import io
import zipfile

import pytest
from PIL import Image

from mambamic.errors import MambamicError, MediaTypeError, RequestError, TooLargeError
from mambamic.handlers.parts import Part
from mambamic.handlers.requests import MAX_PIXELS, read_request


def png(width: int = 4, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def packed(*names: str, content: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, png() if content is None else content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["image", "body", "anything"])
@pytest.mark.parametrize("content_type", ["image/png", "", "application/octet-stream"])
def test_one_image_is_answered_with_one_object(name: str, content_type: str) -> None:
    request = read_request([Part(name, content_type, bytearray(png()))])
    assert request.single
    assert [(tile.name, tile.content) for tile in request.tiles] == [(name, png())]


def test_distinct_fields_keep_their_order() -> None:
    names = ["z", "a", "m"]
    request = read_request([Part(name, "image/png", png()) for name in names])
    assert not request.single
    assert [tile.name for tile in request.tiles] == names


@pytest.mark.parametrize("content_type", ["application/zip", "application/octet-stream", ""])
@pytest.mark.parametrize("names", [("one.png",), ("b.png", "a/b.png")])
def test_a_zip_is_a_list_even_of_one_tile(content_type: str, names: tuple[str, ...]) -> None:
    request = read_request([Part("image", content_type, packed(*names))])
    assert not request.single
    assert [tile.name for tile in request.tiles] == list(names)


@pytest.mark.parametrize(
    "parts", [[], [Part("body", "", b"")], [Part("image", "", b""), Part("other", "", b"")]]
)
def test_no_image_says_which_fields_are_read(parts: list[Part]) -> None:
    with pytest.raises(RequestError, match=r"-F image=@cell.png.*ZIP") as caught:
        read_request(parts)
    assert caught.value.status == 400


def test_a_repeated_field_is_named_with_the_zip_form() -> None:
    parts = [Part("slide", "image/png", png()), Part("cell", "", png()), Part("cell", "", png())]
    with pytest.raises(RequestError, match=r"'cell'.*3 fields sent, 2 distinct.*ZIP") as caught:
        read_request(parts)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("content_type", "value"),
    [
        ("text/plain", b"hello"),
        ("text/plain; charset=utf-8", "hello"),
        ("application/json", {"image": "..."}),
        ("application/json", b"{}"),
        ("video/mp4", b"...."),
    ],
)
def test_other_content_types_are_refused(content_type: str, value: object) -> None:
    with pytest.raises(MediaTypeError, match=content_type.split(";")[0]) as caught:
        read_request([Part("body", content_type, value)])
    assert caught.value.status == 415


def test_an_image_sent_as_a_urlencoded_form_is_refused() -> None:
    with pytest.raises(MediaTypeError, match="Content-Type: image/png"):
        read_request([Part("\ufffdPNG", "", b"")], "application/x-www-form-urlencoded")


def test_a_bad_field_among_others_is_an_error_for_that_one() -> None:
    parts = [
        Part("a", "image/png", png()),
        Part("b", "text/plain", b"hello"),
        Part("c", "application/zip", packed("x.png")),
    ]
    contents = [tile.content for tile in read_request(parts).tiles]
    assert contents[0] == png()
    errors = [content for content in contents if isinstance(content, MambamicError)]
    assert [error.status for error in errors] == [415, 400]
    assert "alone" in str(errors[1])


def test_an_empty_field_among_others_is_an_error_for_that_one() -> None:
    request = read_request([Part("a", "image/png", png()), Part("b", "image/png", b"")])
    assert not request.single
    first, second = request.tiles
    assert first.content == png()
    assert isinstance(second.content, RequestError)
    assert "'b' is empty" in str(second.content)


def test_too_many_fields() -> None:
    with pytest.raises(TooLargeError, match="257 images"):
        read_request([Part(f"tile{i}", "image/png", png()) for i in range(257)])


def test_too_many_pixels_in_all_are_counted_from_headers() -> None:
    side = 8000  # 64 megapixels each, a few kB as 1-bit PNG
    parts = [Part(f"tile{i}", "image/png", png(side, side)) for i in range(4)]
    assert len(read_request(parts).tiles) == 4
    assert 4 * side * side == MAX_PIXELS
    with pytest.raises(TooLargeError, match="megapixels") as caught:
        read_request([*parts, Part("last", "image/png", png(1000, 1000))])
    assert caught.value.status == 413


def test_a_damaged_tile_does_not_stop_the_count() -> None:
    parts = [Part("bad", "image/png", b"not an image"), Part("good", "image/png", png())]
    assert [tile.name for tile in read_request(parts).tiles] == ["bad", "good"]


def test_settings_are_taken_out_of_the_parts() -> None:
    parts = [Part("embedding", "", b" TRUE "), Part("image", "image/png", png())]
    request = read_request(parts, "", ("embedding",))
    assert request.single
    assert request.settings == {"embedding": "TRUE"}
    assert request.switch("embedding")
    assert not request.switch("other")
    assert [tile.name for tile in request.tiles] == ["image"]


def test_an_unknown_name_is_a_tile_and_a_file_is_no_setting() -> None:
    parts = [Part("embedding", "image/png", png()), Part("class", "", png())]
    request = read_request(parts, "", ("embedding",))
    assert [tile.name for tile in request.tiles] == ["embedding", "class"]
    assert request.settings == {}


def test_a_setting_alone_is_no_image() -> None:
    with pytest.raises(RequestError, match="no image"):
        read_request([Part("embedding", "", b"1")], "", ("embedding",))
    with pytest.raises(RequestError, match="more than once"):
        read_request([Part("embedding", "", b"1")] * 2, "", ("embedding",))
