"""The real nginx: which requests and which parts of them reach a server, and what comes back."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import pytest
import yaml

from .edges import CELL, PREDICT, Front, edge, error_of, scripted, tries
from .servers import free_port


def test_ids_and_the_time_reach_the_server_and_the_log(front: Front) -> None:
    running, one, two = front
    one.answer = 507
    began, before = time.time(), len(running.access_log.splitlines())
    asked: dict[str, str] = {}
    for given in ("mine-1.x_Y", "x" * 64, "bad id", "x" * 65, 'a"b', ""):
        headers = {"X-Request-ID": given, "Content-Type": "image/png"}
        reply = running.ask("POST", PREDICT, body=b"image", headers=headers)
        assert reply.status == 200
        asked[given] = reply.headers["X-Request-ID"]
    assert asked["mine-1.x_Y"] == "mine-1.x_Y"
    assert asked["x" * 64] == "x" * 64
    own = [found for given, found in asked.items() if found != given]
    assert len(set(own)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", found) for found in own)

    starts: dict[str, set[str]] = {}
    for seen in one.seen + two.seen:
        starts.setdefault(seen.headers["x-request-id"], set()).add(seen.headers["x-request-start"])
    assert set(starts) == set(asked.values())
    # The second try states the same moment as the first.
    assert len(one.seen) > 0
    for (stated,) in starts.values():
        assert re.fullmatch(r"t=\d+\.\d{3}", stated)
        assert began - 1 < float(stated[2:]) < time.time() + 1
    lines = running.log_lines(len(asked), before)
    assert [line["id"] for line in lines] == list(asked.values())
    assert {line["status"] for line in lines} == {200}


def test_only_what_is_needed_travels_on(front: Front) -> None:
    running, one, two = front
    reply = running.ask(
        "POST",
        f"{PREDICT}/1.0?name=patient-4711",
        body=b"image",
        headers={
            "Cookie": "a=b",
            "Authorization": "Bearer of-somebody-else",
            "Explain": "True",
            "Describe": "True",
            "X-Mambamic-Probe": "1",
            "X-Request-Start": "t=1",
            "Accept": "application/json",
            "User-Agent": "patient-4711",
            "Referer": "http://patient-4711/",
        },
    )
    assert reply.status == 200
    (seen,) = one.seen + two.seen
    assert (seen.method, seen.path) == ("POST", "/predictions/mambamic/1.0")
    assert set(seen.headers) <= {
        *("host", "content-type", "content-length", "accept"),
        *("x-request-id", "x-request-start"),
    }
    assert seen.headers["content-type"] == "application/octet-stream"
    assert seen.headers["x-request-start"] != "t=1"
    assert "torchserve" not in str(reply.headers)
    assert reply.headers["Server"] == "nginx"
    # An address may say whose image it is, as curl -T cell.png URL/ does.
    running.ask("PUT", f"{PREDICT}/patient-4711.png", body=b"x")
    running.ask("GET", "/patient-4711.png?patient-4711")
    one.answer = two.answer = 507
    assert running.ask("POST", f"{PREDICT}?patient-4711", body=b"x").status == 502
    for log in (running.root / "logs").iterdir():
        assert "patient" not in log.read_text(encoding="utf-8")


def test_no_other_path_reaches_a_server(front: Front) -> None:
    running, one, two = front
    paths = [
        *("/models", "/models/mambamic", "/metrics", "/workflows", "/wfpredict/x", "/token"),
        *("/v2/models/mambamic/infer", "/v2/health/ready", "/api-description", "/v1/models/m"),
        *("/predictions", "/predictions/", "/predictions/../models", "/predictions/%2e%2e/models"),
        *("/predictions/mambamic/%2e%2e/%2e%2e/models", "/predictions/%252e%252e/models"),
        *("/predictions/mambamic/1.0/more", "/predictions/..;/models", "/predictions/a%00b"),
        *("/predictions/a%0d%0ab", "//models", "/predictions//../models", "/Predictions/mambamic"),
        *("/explanations/../models", "/.error", "/nginx.conf", "/../nginx.conf", "/tokens.conf"),
    ]
    for path in paths:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
                line.sendall(
                    f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                answer = b"".join(iter(lambda: line.recv(65536), b"")).decode()
            head, _, body = answer.partition("\r\n\r\n")
            status = int(head.split()[1])
            assert status in (400, 404, 405), (method, path, answer)
            assert error_of_text(body) in ("bad_request", "not_found", "method_not_allowed")
    for path in (PREDICT, "/explanations/mambamic"):
        reply = running.ask("GET", path)
        assert (reply.status, error_of(reply)) == (405, "method_not_allowed")
        assert reply.headers["Allow"] == "POST, PUT"
    assert tries(one, two) == 0


def error_of_text(body: str) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


@pytest.mark.parametrize(
    "request_bytes",
    [
        CELL + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CELL + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        CELL + b"Content-Length: +4\r\n\r\nabcd",
        CELL + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        CELL + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /predictions/mambamic HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 0\r\n\r\n",
        b"POST /predictions/mambamic HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        CELL + b"X: " + b"y" * 20000 + b"\r\n\r\n",
        b"GET /" + b"y" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    ],
)
def test_requests_that_could_be_read_in_two_ways_are_refused(
    front: Front, request_bytes: bytes
) -> None:
    running, one, two = front
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
        line.sendall(request_bytes)
        answer = b"".join(iter(lambda: line.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert int(head.split()[1]) in (400, 414, 431, 501), answer
    assert error_of_text(body)
    assert re.search(r"^server: nginx\r?$", head, re.IGNORECASE | re.MULTILINE)
    assert tries(one, two) == 0


def test_a_chunked_body_arrives_whole_and_with_its_length(front: Front) -> None:
    running, one, two = front
    reply = running.ask("POST", PREDICT, body=iter([b"one", b"two"]))
    assert reply.status == 200
    (seen,) = one.seen + two.seen
    assert (seen.body, seen.headers["content-length"]) == (b"onetwo", "6")


def test_what_a_server_says_of_a_bad_image_arrives_as_it_was_said(front: Front) -> None:
    running, one, two = front
    for status in (400, 413, 415, 500):
        one.answer = two.answer = status
        reply = running.ask("POST", PREDICT, body=b"x")
        assert (reply.status, list(reply.json())) == (status, ["from"])
    one.answer = two.answer = 404  # TorchServe's, for a model that is not there
    reply = running.ask("POST", PREDICT, body=b"x")
    assert (reply.status, error_of(reply)) == (404, "not_found")


def test_an_image_as_a_form_is_refused_before_torchserve_fails_on_it(front: Front) -> None:
    running, one, two = front
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = running.ask("POST", PREDICT, body=b"%~%zz", headers=headers)
    assert (reply.status, error_of(reply)) == (415, "unsupported_media_type")
    assert "curl -F image=@cell.png" in reply.json()["error"]["message"]
    assert not one.seen + two.seen


def test_a_server_that_is_not_there_and_tokens_that_are_left_out_are_told(front: Front) -> None:
    running, one, _ = front
    behind = f"127.0.0.1:{one.port}"
    nowhere = f"127.0.0.1:{free_port()}"
    try:
        said = running.change(f"--upstream={behind}", f"--upstream={nowhere}")
    finally:
        running.change(*running.arguments)
    assert f"nobody answers at {nowhere} now" in said
    assert f"nobody answers at {behind}" not in said
    assert "no token is asked for" in said


def test_tokens(state: Path) -> None:
    tokens = state / "tokens"
    good = "Abcdefghijklmnop-1"
    tokens.write_text(f"# of the lab\n{good}\n\nsecond-token-of-some-length\n", encoding="utf-8")
    with (
        scripted() as server,
        edge(state, "--tokens", str(tokens), ports=[server.port]) as running,
    ):

        def status(path: str, authorization: str | None, method: str = "POST") -> int:
            headers = {} if authorization is None else {"Authorization": authorization}
            return running.ask(method, path, headers=headers).status

        for path in (PREDICT, "/explanations/mambamic"):
            reply = running.ask("POST", path, body=b"x")
            assert (reply.status, error_of(reply)) == (401, "unauthorized")
            assert reply.headers["WWW-Authenticate"].startswith("Bearer ")
            for wrong in (
                *("", "Bearer", "Bearer ", f"Basic {good}", good, f"Bearer {good.lower()}"),
                *(f"Bearer {good}x", f"Bearer {good[:-1]}", f"Bearer {good} x", "Bearer \\n"),
                *("Bearer default", "default", "Bearer include"),
            ):
                assert status(path, wrong) == 401, wrong
            assert len(server.seen) == 0
            assert status(path, f"Bearer {good}") == 200
            assert status(path, "bearer  second-token-of-some-length") == 200
            assert "authorization" not in server.seen[-1].headers
            server.seen.clear()
        for path in ("/ping", "/ready", "/settings.json", "/"):
            assert status(path, None, "GET") == 200
        assert good not in running.access_log
        assert (running.root / "tokens.conf").stat().st_mode & 0o077 == 0

        # Another file, without a restart. One is as the documentation makes them, one the longest.
        later = ["0123456789abcdef" * 4, "t" * 512]
        tokens.write_text("\n".join(later), encoding="utf-8")
        running.change(*running.arguments)
        assert status(PREDICT, f"Bearer {good}") == 401
        assert [status(PREDICT, f"Bearer {token}") for token in later] == [200, 200]


def test_ready_asks_for_a_prediction(front: Front) -> None:
    running, one, two = front
    assert running.ask("GET", "/ready").status == 200
    (seen,) = one.seen + two.seen
    assert (seen.method, seen.path, seen.body) == ("POST", PREDICT, b"")
    assert seen.headers["x-mambamic-probe"] == "1"
    one.answer = two.answer = 507
    reply = running.ask("GET", "/ready")
    assert (reply.status, error_of(reply)) == (502, "worker_lost")
    assert running.ask("POST", "/ready").status == 405
    one.answer = two.answer = 503
    refused = [running.ask("GET", "/ready") for _ in range(20)]
    assert {answer.status for answer in refused} == {429, 503}
    assert {answer.headers["Retry-After"] for answer in refused} == {"1", "5"}
    document = yaml.safe_load(running.ask("GET", "/openapi.yaml").data)
    documented = document["paths"]["/ready"]["get"]["responses"]
    assert {"200", "429", "502", "503", "504"} == set(documented)


def test_the_page_and_the_interface_are_served(front: Front) -> None:
    running, *servers = front
    for path, kind, begins in (
        ("/", "text/html", b"<!doctype html>"),
        ("/openapi.yaml", "application/yaml", b"openapi: 3"),
    ):
        reply = running.ask("GET", path)
        assert (reply.status, reply.headers["Content-Type"].split(";")[0]) == (200, kind)
        assert reply.data.lower().startswith(begins)
    assert tries(*servers) == 0
