from __future__ import annotations

from typing import Any

import pytest

from mambamic.errors import (
    DecodeError,
    InferenceError,
    MambamicError,
    MediaTypeError,
    TooLargeError,
)
from mambamic.handlers.responses import Answer, error_answer, list_answer

GOOD: dict[str, Any] = {"label": "neutrophil"}
BROKEN = DecodeError("broken", "an image", "send one")
LARGE = TooLargeError("large", "small", "cut it")
FAILED = InferenceError("failed", "an answer", "again")


def test_an_error_answers_with_its_status_and_object() -> None:
    answer = error_answer(MediaTypeError("text", "an image", "send one"))
    assert (answer.status, answer.phrase) == (415, "Unsupported Media Type")
    assert answer.body == {
        "error": {
            "code": "unsupported_media_type",
            "message": "text; expected an image; send one",
        }
    }


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([GOOD, GOOD], 200),
        ([GOOD, BROKEN], 200),
        ([FAILED, GOOD], 200),
        ([BROKEN, BROKEN], 400),
        ([LARGE, LARGE], 413),
        ([BROKEN, LARGE], 400),
        ([BROKEN, FAILED], 500),
    ],
)
def test_a_list_fails_only_if_every_tile_did(
    results: list[dict[str, Any] | MambamicError], status: int
) -> None:
    answer = list_answer(["a", "b"], results)
    assert answer.status == status
    assert [entry["name"] for entry in answer.body] == ["a", "b"]
    assert ["error" in entry for entry in answer.body] == [
        isinstance(result, MambamicError) for result in results
    ]


def test_a_picture_is_sent_as_it_is() -> None:
    picture = Answer(b"\x89PNG")
    assert (picture.content_type, picture.encoded()) == ("image/png", b"\x89PNG")
    told = Answer({"label": "\u00b5"})
    assert (told.content_type, told.encoded()) == (
        "application/json",
        '{"label": "\u00b5"}'.encode(),
    )
