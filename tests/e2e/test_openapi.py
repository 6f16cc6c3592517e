"""A real server against the document of its interface, docs/openapi.yaml."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mambamic.errors import MambamicError
from mambamic.launcher.probe import draw_cell

from .servers import ROOT, RunningServer, serve

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


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def running(quick_checkpoint: Path) -> Iterator[RunningServer]:
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), str(quick_checkpoint), "--device", "cpu", "--decoders", "1") as server,
    ):
        STATUSES.clear()
        yield server
        # The search got beyond what is refused.
        assert {200, 400} <= STATUSES


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
def test_answers_are_as_documented(case: schemathesis.Case[Any], running: RunningServer) -> None:
    address = f"http://127.0.0.1:{running.port}"
    case.call_and_validate(base_url=address, checks=CHECKS, timeout=60)


def test_the_document_is_valid() -> None:
    validate(document())


def test_every_error_code_is_documented() -> None:
    codes = set(document()["components"]["schemas"]["ErrorBody"]["properties"]["code"]["enum"])
    # What no request meets: errors of the command line, of a start and of a client.
    elsewhere = {"error", "bad_shape", "bad_checkpoint", "backend_unavailable", "bad_data"}
    elsewhere |= {"server_failed", "training_failed", "bad_answer", "bad_slide"}
    ours = {kind.code for kind in MambamicError.__subclasses__()} | {"error"}
    assert ours - elsewhere <= codes
    edge = {"unauthorized", "not_found", "method_not_allowed", "rate_limited", "edge_error"}
    edge |= {"worker_lost", "timeout"}
    assert codes - edge == ours - elsewhere - edge
