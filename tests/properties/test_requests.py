"""Requests: tiles in request order within the limits, or one of the project's own errors."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mambamic.errors import (
    DecodeError,
    MambamicError,
    MediaTypeError,
    RequestError,
    TooLargeError,
)
from mambamic.handlers.parts import Part, keep_parts
from mambamic.handlers.requests import (
    EXPLAIN_SETTINGS,
    PREDICT_SETTINGS,
    TileRequest,
    read_request,
)
from mambamic.zips import MAX_TILES

from .files import drawn, mutated

IMAGES = drawn()
TYPES = st.sampled_from(
    ["", "image/png", "IMAGE/JPEG; x=y", "application/octet-stream", "application/zip"]
) | st.text(max_size=20)
NAMES = st.sampled_from(["image", "body", "class", "method", "stage", "embedding", "a", "b"])


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(draw(st.integers(0, 4))):
            archive.writestr(f"{number}.png", draw(st.sampled_from(IMAGES)))
    return buffer.getvalue()


CONTENTS = st.one_of(
    st.binary(max_size=60).map(bytearray),
    st.sampled_from(IMAGES).map(bytearray),
    mutated(IMAGES).map(bytearray),
    archives().map(bytearray),
    # What a worker hands over that decodes text and JSON itself.
    st.text(max_size=10),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
PARTS = st.builds(Part, NAMES | st.text(max_size=8), TYPES, CONTENTS)
OURS = (DecodeError, MediaTypeError, RequestError, TooLargeError)


def outcome(
    parts: list[Part], content_type: str, known: tuple[str, ...]
) -> TileRequest | MambamicError:
    try:
        request = read_request(parts, content_type, known)
        request.switch("embedding")
        return request
    except MambamicError as error:
        return error


@given(st.lists(PARTS, max_size=5), TYPES, st.sampled_from([PREDICT_SETTINGS, EXPLAIN_SETTINGS]))
@settings(max_examples=800)
def test_any_parts(parts: list[Part], content_type: str, known: tuple[str, ...]) -> None:
    names = [part.name for part in parts]
    request = outcome(parts, content_type, known)
    if isinstance(request, MambamicError):
        assert type(request) in OURS
        assert request.status in (400, 413, 415)
        # A client's own text comes back cut short.
        assert len(str(request)) < 1500
        return
    assert len(set(names)) == len(names)
    assert 0 < len(request.tiles) <= MAX_TILES
    assert not request.single or len(request.tiles) == 1
    assert set(request.settings) <= set(known) & set(names)
    for tile in request.tiles:
        if isinstance(tile.content, MambamicError):
            assert type(tile.content) in OURS
        else:
            assert type(tile.content) is bytes
    images = [name for name in names if name not in request.settings]
    if len(images) > 1:
        assert [tile.name for tile in request.tiles] == images


def item(name: str, content_type: str | None, value: bytes) -> dict[str, Any]:
    return {"name": name, "contentType": content_type, "value": value}


@given(
    st.lists(
        st.lists(
            st.tuples(NAMES, st.none() | st.sampled_from(["image/png", "text/plain"]), st.binary()),
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    ),
    # The frontend passes on UTF-8, whatever it was sent (tests/e2e/test_hostile_requests.py).
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=3),
)
def test_parts_arrive_as_they_were_sent(
    batch: list[list[tuple[str, str | None, bytes]]], headers: list[tuple[str, str]]
) -> None:
    """Through TorchServe's own function, which keeps of two fields of one name the last."""
    from ts.service import Service

    keep_parts()
    sent = [
        {
            "requestId": f"{number}".encode(),
            "parameters": [item(*part) for part in parts],
            "headers": [
                {"name": name.encode(), "value": value.encode()} for name, value in headers
            ],
        }
        for number, parts in enumerate(batch)
    ]
    processors, inputs, ids = Service.retrieve_data_for_inference(sent)
    assert len(processors) == len(inputs) == len(ids) == len(batch)
    for processor, parts in zip(processors, batch, strict=True):
        assert processor.parts == [(name, kind or "", value) for name, kind, value in parts]
        assert processor.headers == {name.lower(): value for name, value in headers}
