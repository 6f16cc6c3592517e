"""Requests that no client library sends: each gets an answer, and costs nobody else one."""

from __future__ import annotations

import contextlib
import http.client
import socket

import pytest

from .servers import RunningServer

FORM = b"Content-Type: multipart/form-data; boundary=B\r\n"
IMAGE = b"Content-Type: image/png\r\n"


def field(disposition: bytes, headers: bytes = IMAGE) -> bytes:
    """The head of a form's only field."""
    return b"--B\r\nContent-Disposition: form-data; " + disposition + b"\r\n" + headers + b"\r\n"


# Headers of the request, and what comes before the image in its body; 500 is what TorchServe's
# frontend answers to a form that it cannot read, before any worker sees it.
HOSTILE = {
    "header value that is not UTF-8": (IMAGE + b"X-A: \x80\xff\r\n", b"", 200),
    "header name that is not ASCII": (IMAGE + b"X-\x80: a\r\n", b"", 400),
    "content type that is not UTF-8": (b"Content-Type: image/\x80png\r\n", b"", 200),
    "field name that is not UTF-8": (FORM, field(b'name="\x80\xff"; filename="a"'), 200),
    "field name with a line break": (FORM, field(b'name="a%0d%0ab"; filename="a"'), 200),
    "field name with a null": (FORM, field(b'name="a\0b"; filename="a"'), 200),
    "field name of 70 kB": (FORM, field(b'name="' + b"n" * 70_000 + b'"; filename="a"'), 200),
    "field without a name": (FORM, field(b'filename="a"'), 500),
    "field with an empty name": (FORM, field(b'name=""; filename="a"'), 500),
    "file name that is not UTF-8": (FORM, field(b'name="a"; filename="\x80"'), 200),
    "field type that is not UTF-8": (
        FORM,
        field(b'name="a"; filename="a"', b"Content-Type: image/\x80\r\n"),
        200,
    ),
    "character set that does not exist": (
        FORM,
        field(b'name="a"', b"Content-Type: text/plain; charset=bogus\r\n"),
        500,
    ),
    "transfer encoding that does not exist": (
        FORM,
        field(b'name="a"; filename="a"', IMAGE + b"Content-Transfer-Encoding: x\r\n"),
        500,
    ),
    "form in a form": (
        FORM,
        field(b'name="a"; filename="a"', b"Content-Type: multipart/mixed; boundary=C\r\n"),
        400,
    ),
    "form without a boundary": (b"Content-Type: multipart/form-data\r\n", b"", 415),
}


def send(server: RunningServer, headers: bytes, body: bytes) -> tuple[int, bytes]:
    """Send a request as it stands, and return the status and the body of the answer."""
    path = f"/predictions/{server.model}".encode()
    length = f"Content-Length: {len(body)}\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + headers + length)
        # The frontend may answer, and hang up, before it has read all.
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"\r\n" + body)
        with http.client.HTTPResponse(connection) as answer:
            answer.begin()
            return answer.status, answer.read()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_request(server: RunningServer, cell: bytes, case: str) -> None:
    headers, before, status = HOSTILE[case]
    workers = server.worker_pids()
    body = before + cell + (b"\r\n--B--\r\n" if before else b"")
    answered, answer = send(server, headers, body)
    assert answered == status, answer
    assert server.body(cell).status == 200
    assert server.worker_pids() == workers


def test_a_form_that_ends_too_soon(server: RunningServer, cell: bytes) -> None:
    status, answer = send(server, FORM, field(b'name="a"; filename="a"') + cell[:-100])
    assert (status, b"bad_request" in answer) == (400, True)
