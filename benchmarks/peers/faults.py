"""What becomes of requests when something goes wrong, counted by the client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.running import Running, ours, peer, post, wait_until_it_predicts

GOOD = 32
IN_FLIGHT = 40
CROWD = 300
TIMEOUT_S = 60.0

Start = Callable[[], AbstractContextManager[Running]]
Row = dict[str, Any]


def measure(
    checkpoint: Path, pythons: Mapping[str, Path], image: bytes, port: int
) -> dict[str, list[Row]]:
    """Return, for each fault, a row for each server."""
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        state = Path(name)
        starts: dict[str, Start] = {"mambamic": lambda: ours(checkpoint, port, state)}
        for number, (peer_name, python) in enumerate(pythons.items(), 1):
            starts[peer_name] = lambda n=peer_name, p=python, i=number: peer(  # type: ignore[misc]
                n, p, checkpoint, port + 10 * i
            )
        single = {"mambamic": starts["mambamic"]} | starts
        edged = {"mambamic, edge": lambda: behind_edge(checkpoint, port, state, 1)}
        paired = {"mambamic, edge, two servers": lambda: behind_edge(checkpoint, port, state, 2)}
        cases: dict[str, tuple[Callable[[Running, bytes], Row], dict[str, Start]]] = {
            "a bad image among 32 good ones": (bad_image, single),
            "300 requests at once": (overload, edged | single),
            "a killed worker, 40 in flight": (killed, paired | single),
            "SIGTERM with 40 in flight": (stopped, single),
        }
        found: dict[str, list[Row]] = {}
        for title, (case, servers) in cases.items():
            for server, start in servers.items():
                with start() as running:
                    if not wait_until_it_predicts(running, image):
                        raise SystemExit(f"{server} does not predict")
                    row = {"server": server, **case(running, image)}
                print(title, json.dumps(row), file=sys.stderr, flush=True)
                found.setdefault(title, []).append(row)
        return found


@contextmanager
def behind_edge(checkpoint: Path, port: int, state: Path, servers: int) -> Iterator[Running]:
    """Run the edge, and as many servers, and hand out the edge's address."""
    call = [sys.executable, "-m", "mambamic", "edge", "--port", str(port + 50)]
    variables = {**os.environ, "MAMBAMIC_STATE": str(state)}
    with ExitStack() as stack:
        one = [
            stack.enter_context(ours(checkpoint, port + 5 * number, state))
            for number in range(servers)
        ]
        upstreams = [f"--upstream=127.0.0.1:{running.port}" for running in one]
        subprocess.run([*call, *upstreams], env=variables, check=True, stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port + 50}/predictions/mambamic"
            # The first server is the one whose worker will be killed.
            yield Running("edge", url, one[0].process, port + 50, state)
        finally:
            subprocess.run([*call, "--stop"], env=variables, check=True, stdout=subprocess.DEVNULL)


def bad_image(running: Running, image: bytes) -> Row:
    """Send a truncated image together with good ones, three times."""
    lost, told = [], Counter[int]()
    for _ in range(3):
        contents = [image] * GOOD
        contents.insert(GOOD // 2, image[: len(image) // 2])
        statuses = [answer[0] for answer in _at_once(running, contents)]
        told[statuses.pop(GOOD // 2)] += 1
        lost.append(sum(status != 200 for status in statuses))
    return {"good ones lost": lost, "statuses of the bad one": _plain(told)}


def overload(running: Running, image: bytes) -> Row:
    """Send far more at once than is soon answered."""
    answers = _at_once(running, [image] * CROWD)
    good = [seconds for status, seconds in answers if status == 200]
    return {
        "statuses": _plain(Counter(status for status, _ in answers)),
        "slowest good answer, s": round(max(good, default=0), 1),
        "slowest answer, s": round(max(seconds for _, seconds in answers), 1),
    }


def killed(running: Running, image: bytes) -> Row:
    """Kill the process that holds the model while requests are with it."""
    victims = running.workers()
    with _InFlight(running, [image] * IN_FLIGHT) as sent:
        time.sleep(0.25)
        began = time.monotonic()
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        answers = sent.answers()
    back = wait_until_it_predicts(running, image, TIMEOUT_S)
    return {
        "statuses": _plain(Counter(status for status, _ in answers)),
        "slowest answer, s": round(max(seconds for _, seconds in answers), 1),
        "predicts again, s": round(time.monotonic() - began, 1) if back else None,
    }


def stopped(running: Running, image: bytes) -> Row:
    """Send SIGTERM while requests are in flight, and look at what is left."""
    family = running.family()
    with _InFlight(running, [image] * IN_FLIGHT) as sent:
        time.sleep(0.25)
        began = time.monotonic()
        running.process.terminate()
        answers = sent.answers()
    _, left = psutil.wait_procs(family, timeout=max(0.0, began + TIMEOUT_S - time.monotonic()))
    for process in left:  # they would be in the way of what is measured next
        with suppress(psutil.Error):
            process.kill()
    return {
        "statuses": _plain(Counter(status for status, _ in answers)),
        "processes left": len(left),
        "gone after, s": None if left else round(time.monotonic() - began, 1),
    }


def _plain(statuses: Counter[int]) -> dict[str, int]:
    """Return counts by status; 0 is a connection without an answer."""
    return {str(status or "no answer"): number for status, number in sorted(statuses.items())}


class _InFlight:
    """Requests that were all sent at one moment, each from a thread of its own."""

    def __init__(self, running: Running, images: list[bytes]) -> None:
        self._pool = ThreadPoolExecutor(len(images))
        barrier = threading.Barrier(len(images))
        self._futures: list[Future[tuple[int, float]]] = [
            self._pool.submit(self._one, barrier, running.url, image) for image in images
        ]

    @staticmethod
    def _one(barrier: threading.Barrier, url: str, image: bytes) -> tuple[int, float]:
        barrier.wait()
        began = time.monotonic()
        return post(url, image, TIMEOUT_S), time.monotonic() - began

    def answers(self) -> list[tuple[int, float]]:
        """Wait for all of them: status and seconds of each."""
        return [future.result() for future in self._futures]

    def __enter__(self) -> _InFlight:
        return self

    def __exit__(self, *ignored: object) -> None:
        self._pool.shutdown()


def _at_once(running: Running, images: list[bytes]) -> list[tuple[int, float]]:
    with _InFlight(running, images) as sent:
        return sent.answers()
