"""A search for answers that are not as documented, for ``test_openapi.py``.

It is run in a process of its own: schemathesis takes seconds to import, and what it tests has to be
known when tests are collected, which all processes of a run do.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mambamic.launcher.probe import draw_cell

from .test_openapi import SERVER, document

UNREADABLE = b"ErrorDataDecoderException"


def serves(context: Any, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
    """No failure of the server, but for forms that TorchServe's frontend cannot read."""
    STATUSES.add(response.status_code)
    if response.status_code != 500 or UNREADABLE not in response.content:
        not_a_server_error(context, response, case)


CHECKS = [
    serves,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CELL = draw_cell()
STATUSES: set[int] = set()


def packed(*contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, content in enumerate(contents):
            archive.writestr(f"{number}.png", content)
    return buffer.getvalue()


FILES = st.one_of(
    st.sampled_from([CELL, CELL[:500], packed(CELL), packed(CELL, b"junk"), packed(b"junk")]),
    st.binary(max_size=50),
)


def interface() -> Any:
    """The interface of one server: its model, and bodies that are often images."""
    loaded = document()
    paths = loaded["paths"]
    loaded["paths"] = {name: item for name, item in paths.items() if "x-edge" not in item}
    # One value of each, so that requests get further than "no such model".
    parameters = loaded["components"]["parameters"]
    parameters["model"]["schema"] = {"enum": ["mambamic"]}
    parameters["version"]["schema"] = {"enum": ["1.0", "2"]}
    parameters["accept"]["schema"] = {"enum": ["application/json", "*/*"]}
    schemathesis.openapi.format("binary", FILES)
    for media_type in ("image/*", "application/zip", "application/octet-stream"):
        schemathesis.openapi.media_type(media_type, FILES)
    return schemathesis.openapi.from_dict(loaded)


# One test for each operation.
per_operation: Callable[[Callable[..., None]], Callable[..., None]] = interface().parametrize()


@per_operation
@settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_documented(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(base_url=os.environ[SERVER], checks=CHECKS, timeout=60)


# The last.
def test_the_search_got_beyond_what_is_refused() -> None:
    assert {200, 400} <= STATUSES
