"""The real nginx in front of servers that fail on demand: what clients see, and what servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import urllib3

from .edges import RunningEdge, ScriptedServer, edge, error_of, scripted
from .servers import (
    ROOT,
    end_all,
    end_group,
    environment,
    free_port,
    of_state,
    run_mambamic,
    wait_for,
)

PREDICT = "/predictions/mambamic"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[RunningEdge, ScriptedServer, ScriptedServer]]:
    """An edge in front of two servers."""
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        scripted() as one,
        scripted() as two,
        edge(Path(folder), "--timeout", "1", ports=[one.port, two.port]) as running,
    ):
        yield running, one, two


@pytest.fixture
def front(
    shared: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> tuple[RunningEdge, ScriptedServer, ScriptedServer]:
    """The same, with servers that answer and have forgotten what they were asked."""
    running, one, two = shared
    for server in (one, two):
        server.answer = 200
        server.seen.clear()
    return running, one, two


def tries(*servers: ScriptedServer) -> int:
    return sum(len(server.seen) for server in servers)


@pytest.mark.parametrize("failure", [507, 503, "reset"])
def test_what_a_lost_worker_leaves_is_answered_by_the_other_server(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer], failure: int | str
) -> None:
    running, one, two = front
    body = bytes(range(256)) * 8000  # too large for nginx to hold in memory
    for broken, sound in ((one, two), (two, one)):
        broken.answer, sound.answer = failure, 200
        for _ in range(6):
            asked = tries(one, two)
            answer = running.body(body)
            assert answer.status == 200, answer.body
            assert answer.json == {"from": str(sound.port)}
            assert tries(one, two) - asked <= 2
        assert len(broken.seen) > 0
        assert {len(seen.body) for seen in sound.seen} == {len(body)}
        assert sound.seen[-1].body == body
        one.seen.clear()
        two.seen.clear()


def test_a_server_that_is_not_there_costs_nothing(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer], state: Path
) -> None:
    _, one, _ = front
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with edge(state, ports=[port, one.port]) as running:
            assert [running.body(b"x").status for _ in range(8)] == [200] * 8
            assert running.ask("GET", "/ping").status == 200
        with edge(state, ports=[port]) as running:
            answer = running.ask("POST", PREDICT, body=b"x")
            assert answer.status == 503
            assert error_of(answer) == "unavailable"
            assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(507, 502, "worker_lost"), ("reset", 502, "worker_lost"), (503, 503, "unavailable")],
)
def test_it_is_tried_twice_and_no_more(
    state: Path, failure: int | str, status: int, code: str
) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted(failure)) for _ in range(3)]
        running = stack.enter_context(edge(state, ports=[server.port for server in servers]))
        for turn in range(1, 7):
            answer = running.body(b"image")
            assert (answer.status, error_of(answer)) == (status, code)
            assert tries(*servers) == 2 * turn
        assert max(len(server.seen) for server in servers) <= 6, "one server twice for one request"


def test_neither_an_error_of_the_model_nor_a_time_out_is_tried_again(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, one, two = front
    one.answer = two.answer = 500
    answer = running.body(b"image")
    assert (answer.status, tries(one, two)) == (500, 1)
    assert answer.json in ({"from": str(one.port)}, {"from": str(two.port)})  # as it was given

    release = threading.Event()

    def hang() -> int:
        release.wait(30)
        return 200

    one.answer = two.answer = hang
    answer = running.body(b"image")
    release.set()
    assert (answer.status, error_of(answer)) == (504, "timeout")
    assert tries(one, two) == 2

    # Nor has the time-out taken a server out of use.
    one.answer = two.answer = 200
    for _ in range(4):
        assert running.body(b"image").status == 200
    assert min(len(one.seen), len(two.seen)) >= 2


def test_a_single_server_is_not_asked_twice(state: Path) -> None:
    with scripted(507) as one, edge(state, ports=[one.port]) as running:
        answer = running.body(b"image")
        assert (answer.status, error_of(answer)) == (502, "worker_lost")
        assert len(one.seen) == 1


def test_what_is_more_than_the_servers_can_take_gets_429_at_once(state: Path) -> None:
    release = threading.Event()

    def hold() -> int:
        release.wait(30)
        return 200

    with (
        scripted(hold) as one,
        scripted(hold) as two,
        edge(state, "--in-flight", "3", ports=[one.port, two.port]) as running,
        ThreadPoolExecutor(20) as pool,
    ):
        taken = [pool.submit(running.body, b"x") for _ in range(6)]
        assert wait_for(lambda: tries(one, two) == 6, 10)
        refused = [running.ask("POST", PREDICT, body=b"x") for _ in range(8)]
        assert [answer.status for answer in refused] == [429] * 8
        assert {error_of(answer) for answer in refused} == {"overloaded"}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert (len(one.seen), len(two.seen)) == (3, 3)
        # Whether it runs is told meanwhile.
        release.set()
        assert running.ask("GET", "/ping").status == 200
        assert [answer.result().status for answer in taken] == [200] * 6
        assert running.body(b"x").status == 200


def test_the_second_try_respects_the_limit_too(state: Path) -> None:
    release = threading.Event()

    def hold() -> int:
        release.wait(30)
        return 200

    with (
        scripted(507) as broken,
        scripted(hold) as sound,
        edge(state, "--in-flight", "2", ports=[broken.port, sound.port]) as running,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = [pool.submit(running.body, b"x") for _ in range(8)]
        assert wait_for(lambda: sum(answer.done() for answer in answers) >= 4, 10)
        assert len(sound.seen) <= 4
        release.set()
        statuses = sorted(answer.result().status for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 2


def test_one_address_cannot_have_everything(state: Path) -> None:
    with (
        scripted() as server,
        edge(state, "--client-rate", "10", ports=[server.port]) as running,
    ):
        answers = [running.ask("POST", PREDICT, body=b"x") for _ in range(30)]
        refused = [answer for answer in answers if answer.status != 200]
        assert 5 < len(refused) < 25
        assert {(answer.status, error_of(answer)) for answer in refused} == {(429, "rate_limited")}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}

        running.change(*running.arguments, "--client-rate", "1000", "--client-connections", "2")
        server.answer = lambda: time.sleep(1) or 200  # type: ignore[func-returns-value]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: running.ask("POST", PREDICT, body=b"x"), range(6)))
        assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 4
        assert {error_of(answer) for answer in answers if answer.status == 429} == {"rate_limited"}


def test_ids_and_the_time_reach_the_server_and_the_log(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, one, two = front
    one.answer = 507
    began = time.time()
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
    lines = [json.loads(line) for line in running.access_log.splitlines()[-len(asked) :]]
    assert [line["id"] for line in lines] == list(asked.values())
    assert {line["status"] for line in lines} == {200}


def test_only_what_is_needed_travels_on(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
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


def test_no_other_path_reaches_a_server(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
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


CELL = b"POST /predictions/mambamic HTTP/1.1\r\nHost: x\r\n"


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
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer], request_bytes: bytes
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


def test_a_chunked_body_arrives_whole_and_with_its_length(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, one, two = front
    reply = running.ask("POST", PREDICT, body=iter([b"one", b"two"]))
    assert reply.status == 200
    (seen,) = one.seen + two.seen
    assert (seen.body, seen.headers["content-length"]) == (b"onetwo", "6")


def test_what_a_server_says_of_a_bad_image_arrives_as_it_was_said(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, one, two = front
    for status in (400, 413, 415, 500):
        one.answer = two.answer = status
        reply = running.ask("POST", PREDICT, body=b"x")
        assert (reply.status, list(reply.json())) == (status, ["from"])
    one.answer = two.answer = 404  # TorchServe's, for a model that is not there
    reply = running.ask("POST", PREDICT, body=b"x")
    assert (reply.status, error_of(reply)) == (404, "not_found")


def test_a_body_that_is_too_large(state: Path) -> None:
    with scripted() as server, edge(state, "--max-body", "1", ports=[server.port]) as running:
        for size, status in ((2**20, 200), (2**20 + 1, 413)):
            reply = running.ask("POST", PREDICT, body=b"x" * size)
            assert reply.status == status
        assert error_of(reply) == "too_large"
        assert "1 MiB" in reply.json()["error"]["message"]
        chunks = iter([b"x" * 2**19] * 3)
        reply = running.ask("POST", PREDICT, body=chunks)
        assert (reply.status, error_of(reply)) == (413, "too_large")
        assert len(server.seen) == 1


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

        # Another file, without a restart.
        tokens.write_text("a-token-that-came-later\n", encoding="utf-8")
        running.change(*running.arguments)
        assert status(PREDICT, f"Bearer {good}") == 401
        assert status(PREDICT, "Bearer a-token-that-came-later") == 200


def test_ready_asks_for_a_prediction(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, one, two = front
    assert running.ask("GET", "/ready").status == 200
    (seen,) = one.seen + two.seen
    assert (seen.method, seen.path, seen.body) == ("POST", PREDICT, b"")
    assert seen.headers["x-mambamic-probe"] == "1"
    one.answer = two.answer = 507
    reply = running.ask("GET", "/ready")
    assert (reply.status, error_of(reply)) == (502, "worker_lost")
    assert running.ask("POST", "/ready").status == 405


def test_the_page_and_the_interface_are_served(
    front: tuple[RunningEdge, ScriptedServer, ScriptedServer],
) -> None:
    running, *servers = front
    for path, kind, begins in (
        ("/", "text/html", b"<!doctype html>"),
        ("/openapi.yaml", "application/yaml", b"openapi: 3"),
    ):
        reply = running.ask("GET", path)
        assert (reply.status, reply.headers["Content-Type"].split(";")[0]) == (200, kind)
        assert reply.data.lower().startswith(begins)
    assert tries(*servers) == 0


def test_a_sender_that_stops_gets_no_server(state: Path) -> None:
    with scripted() as server, edge(state, ports=[server.port]) as running:
        conf = running.root / "nginx.conf"
        said = conf.read_text(encoding="utf-8")
        assert "client_body_timeout 15s;" in said
        conf.write_text(said.replace("client_body_timeout 15s;", "client_body_timeout 2s;"))
        os.kill(int((running.root / "nginx.pid").read_text()), signal.SIGHUP)
        time.sleep(1)
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as line:
            line.sendall(CELL + b"Content-Length: 100\r\n\r\nhalf")
            # Others are served meanwhile, and no server waits for the rest.
            assert running.body(b"x").status == 200
            assert line.recv(65536) == b""
        assert len(server.seen) == 1
        assert '"status":408' in running.access_log


def test_tls(state: Path) -> None:
    key, certificate = state / "key.pem", state / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)),
            *("-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    pair = ("--certificate", str(certificate), "--key", str(key))
    with scripted() as server, edge(state, *pair, ports=[server.port]) as running:
        url = f"https://127.0.0.1:{running.port}{PREDICT}"
        with urllib3.PoolManager(ca_certs=str(certificate), retries=False) as pool:
            reply = pool.request("POST", url, body=b"x")
            assert reply.status == 200
            assert reply.headers["Strict-Transport-Security"] == "max-age=31536000"
        old = ssl.create_default_context(cafile=str(certificate))
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", running.port), timeout=10) as line,
            old.wrap_socket(line, server_hostname="127.0.0.1") as wrapped,
        ):
            assert wrapped.version() == "TLSv1.3"
        plain = running.ask("POST", PREDICT, body=b"x")
        assert (plain.status, error_of(plain)) == (400, "bad_request")


def test_an_edge_that_refuses_new_settings_keeps_the_old(state: Path) -> None:
    broken = state / "broken.pem"
    broken.write_text("not a certificate\n", encoding="utf-8")
    with scripted() as server, edge(state, ports=[server.port]) as running:
        done = run_mambamic(
            *(state, "edge", "--port", str(running.port), "--certificate", str(broken)),
            *("--key", str(broken), *running.arguments),
        )
        assert done.returncode == 1
        assert "nginx refuses" in done.stderr
        assert running.body(b"x").status == 200
        running.change(*running.arguments)
        assert running.body(b"x").status == 200
    again = run_mambamic(state, "edge", "--stop", "--port", str(running.port))
    assert (again.returncode, again.stdout) == (0, f"no edge on port {running.port}\n")


def test_in_the_foreground_it_ends_gently(state: Path) -> None:
    port = free_port()
    release = threading.Event()

    def hold() -> int:
        release.wait(30)
        return 200

    with scripted(hold) as server, (state / "console").open("wb") as console:
        command = ["edge", "--foreground", "--port", str(port)]
        process = subprocess.Popen(
            [sys.executable, "-m", "mambamic", *command, "--upstream", f"127.0.0.1:{server.port}"],
            stdout=console,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(state),
            start_new_session=True,
        )
        running = RunningEdge(port, state, "")
        try:
            with ThreadPoolExecutor(4) as pool:
                assert wait_for(lambda: is_up(port), 30)
                waiting = [pool.submit(running.body, b"x") for _ in range(4)]
                assert wait_for(lambda: len(server.seen) >= 4, 10)
                process.terminate()
                assert wait_for(lambda: not is_up(port), 10)
                release.set()
                assert [answer.result().status for answer in waiting] == [200] * 4
            assert process.wait(30) == 0
            assert wait_for(lambda: of_state(state) == [], 10)
            assert '"status":200' in (state / "console").read_text(encoding="utf-8")
        finally:
            release.set()
            end_group(process)
            end_all(state)


def is_up(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
