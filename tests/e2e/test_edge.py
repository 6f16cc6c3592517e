"""The real nginx before servers that fail on demand: second tries, starting, changing, ending."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import urllib3

from .edges import PREDICT, Front, RunningEdge, edge, error_of, scripted, tries
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


@pytest.mark.parametrize("failure", [507, 503, "reset"])
def test_what_a_lost_worker_leaves_is_answered_by_the_other_server(
    front: Front, failure: int | str
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


def test_a_server_that_is_not_there_costs_nothing(front: Front, state: Path) -> None:
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


@pytest.mark.parametrize("failure", [507, "reset"])
def test_no_port_and_no_length_is_taken_for_a_status(state: Path, failure: int | str) -> None:
    """503 in an address, or at the end of the number of bytes that were sent."""
    with ExitStack() as stack:
        one = stack.enter_context(scripted(failure, _free_port_with_503()))
        for behind in ([], [stack.enter_context(scripted(failure)).port]):
            with edge(state, ports=[one.port, *behind]) as running:
                for length in range(300, 340):  # with its headers, around 503
                    assert running.body(b"x" * length).status == 502, length


def _free_port_with_503() -> int:
    for port in (5030, 5031, 5032, 8503, 15030, 15031, 15032, 25030, 25031):
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise OSError("each of these ports is taken")


def test_neither_an_error_of_the_model_nor_a_time_out_is_tried_again(front: Front) -> None:
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
                assert wait_for(lambda: answers(running), 30)
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


def answers(running: RunningEdge) -> bool:
    """Whether nginx serves; an open port says less, as nginx opens it while it tries settings."""
    try:
        return running.ask("GET", "/settings.json").status == 200
    except urllib3.exceptions.HTTPError:
        return False
