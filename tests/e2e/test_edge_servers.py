"""The edge in front of real servers: killed workers, overload, stopping, replacing a model."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..turns import alone
from .edges import RunningEdge, edge, error_of
from .servers import (
    Answer,
    Load,
    RunningServer,
    run_mambamic,
    serve,
    wait_for,
)

IN_FLIGHT = 40


@dataclass
class Site:
    """Two servers and an edge in front of them."""

    edge: RunningEdge
    servers: tuple[RunningServer, RunningServer]


@pytest.fixture(scope="module")
def site(quick_checkpoint: Path) -> Iterator[Site]:
    """One for the tests that leave it as it was."""
    model = str(quick_checkpoint)
    with (
        tempfile.TemporaryDirectory(prefix="mambamic-test-") as folder,
        serve(Path(folder), model, "--device", "cpu") as one,
        serve(Path(folder), model, "--device", "cpu") as two,
        edge(Path(folder), ports=[one.port, two.port]) as running,
    ):
        yield Site(running, (one, two))


def kill_worker(server: RunningServer, held: float = 0) -> None:
    """Kill a worker, as the kernel does when memory runs out.

    Args:
        server: Whose.
        held: Seconds for which it is stopped before, so that it surely holds requests.
    """
    (victim,) = server.worker_pids()
    if held:
        os.kill(victim, signal.SIGSTOP)
        time.sleep(held)
    os.kill(victim, signal.SIGKILL)


def kill_in_turn(site: Site, load: Load, kills: int, pause: float) -> Counter[int]:
    """Kill one server's worker after the other's, and count what clients saw."""
    with load:
        for number in range(kills):
            time.sleep(pause / 2)
            server = site.servers[number % 2]
            assert wait_for(lambda server=server: len(server.worker_pids()) == 1, 60)  # type: ignore[misc]
            kill_worker(server, held=0.2)
            time.sleep(pause / 2)
    return Counter(answer.status for _, _, answer in load.answers)


def test_killed_workers_cost_no_request(site: Site, cell: bytes) -> None:
    before = len(site.edge.access_log.splitlines())
    load = Load(site.edge, [cell], clients=8, requests=100_000, pause=0.05)
    statuses = kill_in_turn(site, load, kills=3, pause=3)
    print(statuses)
    assert statuses[200] >= 0.999 * statuses.total()
    lines = [json.loads(line) for line in site.edge.access_log.splitlines()[before:]]
    again = [line for line in lines if line["server_statuses"].startswith("507")]
    assert len(again) >= 3, "no kill met a request"
    assert {line["status"] for line in lines} == {200}, "a killed worker taken for one that failed"
    for line in again:
        first, second = line["servers"].split(" : ")
        assert first != second
        assert line["server_statuses"] == "507 : 200"
    labels = {answer.json["label"] for _, _, answer in load.answers if answer.status == 200}
    assert len(labels) == 1


@pytest.mark.soak
def test_a_kill_every_ten_seconds_for_two_minutes(site: Site, cell: bytes) -> None:
    load = Load(site.edge, [cell], clients=8, requests=1_000_000)
    statuses = kill_in_turn(site, load, kills=12, pause=10)
    record = {"kills": 12, "requests": statuses.total(), "statuses": dict(statuses)}
    print(json.dumps(record))
    assert statuses[200] >= 0.999 * statuses.total()


def in_logs(site: Site, text: str) -> int:
    """Count the servers whose log holds a text; TorchServe writes it after the answer is out."""
    return sum(text in (server.logs / "model_log.log").read_text() for server in site.servers)


def test_ready_is_a_prediction_and_its_id_is_in_the_servers_log(site: Site) -> None:
    # What the server's management API says of its workers sets the limit.
    assert site.edge.printed.count("(up to 6)") == 2
    reply = site.edge.ask("GET", "/ready", headers={"X-Request-ID": "ready-check-1"})
    assert reply.status == 200
    answer = reply.json()
    assert answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())
    assert wait_for(lambda: in_logs(site, "ready-check-1=200") == 1, timeout=10)
    bad = site.edge.body(b"not an image", headers={"X-Request-ID": "bad-image-1"})
    assert (bad.status, error_of(bad)) == (400, "decode_failed")
    assert wait_for(lambda: in_logs(site, "bad-image-1=400") == 1, timeout=10)


def test_an_explanation_and_a_form_go_through(site: Site, cell: bytes) -> None:
    fields = {"image": ("patient-4711.png", cell, "image/png")}
    reply = site.edge.ask("POST", "/explanations/mambamic", fields=fields)
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "image/png"
    assert reply.data.startswith(b"\x89PNG")
    assert site.edge.form(("image", cell, "image/png")).json["label"]
    assert "patient" not in site.edge.access_log


def open_loop(server: RunningServer, image: bytes, rate: float, seconds: float) -> list[Answer]:
    """Send at a rate of its own, whatever is answered, as a crowd of clients does."""
    gaps = random.Random(4711)
    with ThreadPoolExecutor(96) as pool:
        answers = []
        moment = time.monotonic()
        end = moment + seconds
        while moment < end:
            time.sleep(max(0.0, moment - time.monotonic()))
            answers.append(pool.submit(server.body, image))
            moment += gaps.expovariate(rate)
        return [answer.result() for answer in answers]


def p99(answers: list[Answer]) -> float:
    seconds = sorted(answer.seconds for answer in answers if answer.status == 200)
    return seconds[int(0.99 * (len(seconds) - 1))]


def overload(running: RunningServer, cell: bytes, seconds: float) -> tuple[float, float]:
    """Return the p99 at half of what is sustained, and that of what is accepted at twice it."""
    with Load(running, [cell], clients=4, requests=100_000) as load:
        time.sleep(seconds)
        load.stop()
    sustained = len(load.answers) / seconds
    half = open_loop(running, cell, sustained / 2, seconds)
    assert Counter(answer.status for answer in half)[200] >= 0.9 * len(half)
    twice = open_loop(running, cell, sustained * 2, seconds)
    statuses = Counter(answer.status for answer in twice)
    print(
        f"{sustained:.0f}/s sustained; p99 {p99(half):.3f} s at half of it, {p99(twice):.3f} s of",
        end=" ",
    )
    print(f"what is accepted at twice: {dict(statuses)}")
    assert set(statuses) == {200, 429}
    assert {error_of(answer) for answer in twice if answer.status == 429} == {"overloaded"}
    # As much is answered as without the crowd, within what other work on the machine does.
    assert statuses[200] > 0.4 * sustained * seconds
    return p99(half), p99(twice)


@pytest.fixture
def lone(site: Site) -> Iterator[RunningEdge]:
    """The edge in front of one of the servers: two would share the processor that they fill."""
    site.edge.change(site.edge.arguments[0])
    yield site.edge
    site.edge.change(*site.edge.arguments)


def test_twice_the_load_leaves_accepted_requests_as_quick(lone: RunningEdge, cell: bytes) -> None:
    # A test machine has other work: one quiet round of four is enough.
    with alone():
        rounds = (overload(lone, cell, 3) for _ in range(4))
        assert any(twice < 3 * half for half, twice in rounds)


@pytest.mark.soak
def test_twice_the_load_for_minutes(lone: RunningEdge, cell: bytes) -> None:
    half, twice = overload(lone, cell, 60)
    assert twice < 3 * half


@pytest.fixture(scope="module")
def later() -> Iterator[ExitStack]:
    """What a test starts and the next one goes on with."""
    with ExitStack() as stack:
        yield stack


# The last two: afterwards a newer model is in the place of the first, and then nothing.
def test_a_model_is_replaced_under_load(
    site: Site, quick_checkpoint: Path, cell: bytes, later: ExitStack
) -> None:
    running, old = site.edge, site.servers[0]
    running.change(site.edge.arguments[0])
    with Load(running, [cell], clients=2, requests=100_000, pause=0.1) as load:
        folder = Path(later.enter_context(tempfile.TemporaryDirectory(prefix="mambamic-test-")))
        model = f"{quick_checkpoint}=mambamic:2.0"
        new = later.enter_context(serve(folder, model, "--device", "cpu"))
        both = [f"--upstream=127.0.0.1:{server.port}" for server in (old, new)]
        running.change(*both)
        assert wait_for(lambda: "2.0" in versions(load, last=8), 30)
        assert "still being answered" not in running.change(both[1])
        stopped = run_mambamic(old.state, "serve", "--stop", "--port", str(old.port))
        assert stopped.returncode == 0
        seen = len(load.answers)
        assert wait_for(lambda: len(load.answers) >= seen + 30, 30)
        load.stop()
        statuses = Counter(answer.status for _, _, answer in load.answers)
        print(statuses)
        assert set(statuses) == {200}, statuses
        assert versions(load, last=20) == {"2.0"}
    site.servers = new, site.servers[1]
    running.arguments = both[1], running.arguments[1]


def versions(load: Load, last: int) -> set[str]:
    """The versions of the model that have answered lately."""
    return {answer.json["version"] for _, _, answer in load.answers[-last:] if answer.status == 200}


def test_one_of_two_servers_is_stopped_without_a_word_to_the_edge(site: Site, cell: bytes) -> None:
    site.edge.change(*site.edge.arguments, "--in-flight", "16")
    with Load(site.edge, [cell], clients=8, requests=100_000, pause=0.05) as load:
        assert wait_for(lambda: len(load.answers) >= 50, 30)
        one = site.servers[0]
        stopped = run_mambamic(one.state, "serve", "--stop", "--port", str(one.port))
        assert stopped.returncode == 0
        seen = len(load.answers)
        assert wait_for(lambda: len(load.answers) >= seen + 100, 30)
        load.stop()
    statuses = Counter(answer.status for _, _, answer in load.answers)
    print(statuses)
    assert set(statuses) == {200}, statuses
