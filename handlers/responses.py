"""From predictions and errors to what a client reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from mambamic.errors import InferenceError, MambamicError, OverloadedError


@dataclass(frozen=True)
class Answer:
    """The body of one response, a JSON value or the bytes of a PNG file, and its HTTP status."""

    body: Any
    status: int = 200

    @property
    def content_type(self) -> str:
        """The media type of the body."""
        return "image/png" if isinstance(self.body, bytes) else "application/json"

    def encoded(self) -> bytes:
        """Return the body as it is sent."""
        if isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body, ensure_ascii=False).encode()

    @property
    def phrase(self) -> str:
        """The reason phrase that goes with the status."""
        return HTTPStatus(self.status).phrase


def failure(error: Exception) -> InferenceError:
    """Return what a client is told of an error that nobody foresaw."""
    return InferenceError(
        f"the server failed on this request ({type(error).__name__})",
        "an answer",
        "send it again; if it fails once more, see the server's log",
    )


def overloaded() -> OverloadedError:
    """Return what a client is told of a request for which no time is left."""
    return OverloadedError(
        "the server is busy with larger requests that came together with this one",
        "time to answer it",
        "send it again later, or send fewer tiles at once",
    )


def error_answer(error: MambamicError) -> Answer:
    """Return the answer to a request that failed as a whole."""
    return Answer(error.as_json(), error.status)


def list_answer(names: Sequence[str], results: Sequence[dict[str, Any] | MambamicError]) -> Answer:
    """Return the answer to a request of several tiles.

    The status is 200 as long as one tile succeeded; else it is the one that all errors share, or,
    where they differ, 500 if any of them is the server's and 400 if none is.

    Args:
        names: One per tile, in request order.
        results: One per tile: the prediction's fields, or the error.
    """
    body = [
        {"name": name, **(result.as_json() if isinstance(result, MambamicError) else result)}
        for name, result in zip(names, results, strict=True)
    ]
    failures = {result.status for result in results if isinstance(result, MambamicError)}
    if any(not isinstance(result, MambamicError) for result in results):
        return Answer(body)
    if len(failures) == 1:
        return Answer(body, failures.pop())
    return Answer(body, 500 if max(failures) >= 500 else 400)
