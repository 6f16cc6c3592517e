"""The real nginx: what is too much, too large or too slow, and what it is told."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from .edges import CELL, PREDICT, edge, error_of, scripted, tries
from .servers import wait_for


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


def test_who_hangs_up_keeps_the_place_that_the_server_still_works_on(state: Path) -> None:
    release = threading.Event()

    def hold() -> int:
        release.wait(30)
        return 200

    with scripted(hold) as server, edge(state, "--in-flight", "2", ports=[server.port]) as running:
        for turn in range(1, 3):
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
                line.sendall(CELL + b"Content-Length: 5\r\n\r\nimage")
                assert wait_for(lambda turn=turn: len(server.seen) == turn, 10)  # type: ignore[misc]
        time.sleep(0.5)
        answer = running.ask("POST", PREDICT, body=b"x")
        assert (answer.status, error_of(answer), len(server.seen)) == (429, "overloaded", 2)
        release.set()
        assert wait_for(lambda: running.body(b"x").status == 200, 10)


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


def test_what_is_refused_counts_towards_the_rate(state: Path) -> None:
    tokens = state / "tokens"
    tokens.write_text("0123456789abcdef\n", encoding="utf-8")
    limits = ("--client-rate", "10", "--tokens", str(tokens))
    with scripted() as server, edge(state, *limits, ports=[server.port]) as running:
        for method, token, status in (("POST", "wrong", 401), ("GET", "0123456789abcdef", 405)):
            time.sleep(1.5)  # until the rate allows ten again
            headers = {"Authorization": f"Bearer {token}"}
            answers = [running.ask(method, PREDICT, headers=headers).status for _ in range(40)]
            assert answers[0] == status
            assert set(answers) == {status, 429}
            assert answers.count(429) > 5
        assert server.seen == []


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


@pytest.mark.parametrize(
    "stated", [b"Content-Length: 10000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1\r\n"]
)
def test_large_bodies_cannot_fill_the_disk(state: Path, stated: bytes) -> None:
    with scripted() as server, edge(state, ports=[server.port]) as running, ExitStack() as stack:
        lines = []
        for _ in range(12):
            line = socket.create_connection(("127.0.0.1", running.port), timeout=10)
            lines.append(stack.enter_context(line))
            line.sendall(CELL + stated)
        assert wait_for(lambda: running.access_log.count('"status":429') == 4, 10)
        answered = select.select(lines, [], [], 0)[0]
        assert len(answered) == 4
        head, _, body = answered[0].recv(65536).decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 429 ")
        assert "Retry-After: 1" in head
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert "large bodies" in body
        # Others have their place meanwhile, and these when one is done.
        assert running.body(b"x" * 9_999_999).status == 200
        for line in set(lines) - set(answered):
            line.close()
        assert wait_for(lambda: running.body(b"x" * 10_000_000).status == 200, 10)


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
        assert wait_for(lambda: '"status":408' in running.access_log, 10)
