"""How servers end, and go on when one of two workers does: what was asked before is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest
import urllib3

from mambamic import metrics
from mambamic.launcher import stopping

from .counts import total
from .servers import (
    ROOT,
    Answer,
    Load,
    RunningServer,
    end_all,
    end_group,
    environment,
    free_port,
    of_state,
    serve,
    wait_for,
)

IN_FLIGHT = 40


@pytest.fixture(scope="module")
def two_workers(
    quick_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    state = tmp_path_factory.mktemp("two")
    model = str(quick_checkpoint)
    with serve(state, model, "--device", "cpu", "--workers", "2") as running:
        assert wait_for(lambda: len(running.worker_pids()) == 2, 60)
        yield running


def test_of_two_workers_one_answers_while_the_other_comes_back(
    two_workers: RunningServer, cell: bytes
) -> None:
    server = two_workers
    with Load(server, [cell], clients=8, requests=400, pause=0.05) as load:
        assert wait_for(lambda: len(load.answers) >= 50, 30)
        victim, survivor = server.worker_pids()
        os.kill(victim, signal.SIGSTOP)  # so that it holds requests when it dies
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert wait_for(lambda: len(load.answers) >= 400, 60)
    lost = [answer for _, _, answer in load.answers if answer.status != 200]
    assert len(lost) <= 8, "more than was in flight"
    after = sorted(end for _, end, answer in load.answers if answer.status == 200 and end > killed)
    gap = max(later - earlier for earlier, later in zip([killed, *after], after, strict=False))
    print(f"the longest time without an answer after the kill: {gap:.2f} s")
    assert gap < 10
    assert survivor in server.worker_pids()


# The last with this server: it stops it.
def test_what_a_worker_has_not_begun_is_answered_before_the_stop(
    two_workers: RunningServer, cell: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = two_workers
    monkeypatch.setenv("MAMBAMIC_STATE", str(server.state))
    with ThreadPoolExecutor(2) as pool:
        assert wait_for(lambda: len(server.worker_pids()) == 2, 60)
        # What the frontend hands to this one lies in its socket, and nobody is busy with it.
        held = server.worker_pids()[0]
        os.kill(held, signal.SIGSTOP)
        try:
            waiting = pool.submit(server.body, cell)
            while not wait([waiting], timeout=2).not_done:
                waiting = pool.submit(server.body, cell)
            stopped = pool.submit(stopping.stop, server.port)
            time.sleep(1.5)
            assert not stopped.done()
        finally:
            os.kill(held, signal.SIGCONT)
        assert waiting.result(60).status == 200
        assert stopped.result(60)
        assert of_state(server.state) == []


def hold_in_flight(
    server: RunningServer, pool: ThreadPoolExecutor, cell: bytes
) -> tuple[int, list[Future[Answer]]]:
    """Have requests wait for a worker that stands still, some with it and some in the queue."""
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    first = [pool.submit(server.body, cell) for _ in range(IN_FLIGHT // 4)]
    time.sleep(0.3)
    waiting = first + [pool.submit(server.body, cell) for _ in range(IN_FLIGHT - len(first))]
    record = server.folder.read()
    assert record is not None
    java = psutil.Process(record.pid)

    def arrived() -> bool:
        # Both ends of a connection are on this machine; Java's have its port on their side.
        lines = java.net_connections(kind="tcp")
        mine = [line for line in lines if line.laddr.port == server.port and line.raddr]
        return len(mine) >= IN_FLIGHT

    assert wait_for(arrived, 30)
    return worker, waiting


def keeps_its_exporter(server: RunningServer) -> None:
    """Kill the exporter of a server that counts one prediction, and see it come back."""

    def back() -> bool:
        try:
            return total(server.port + 3, metrics.PREDICTIONS) == 1
        except urllib3.exceptions.HTTPError:
            return False

    running = of_state(server.state)
    (victim,) = (one.pid for one in running if "mambamic.launcher.exporter" in one.cmdline())
    os.kill(victim, signal.SIGKILL)
    assert wait_for(back, 30)


def test_in_the_foreground_it_stays_until_a_signal_and_answers_forty_requests_in_flight(
    quick_checkpoint: Path, state: Path, cell: bytes
) -> None:
    port = free_port()
    log = state / "console.txt"
    command = ["serve", "--foreground", "--port", str(port), "--model", str(quick_checkpoint)]
    with log.open("wb") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "mambamic", *command, "--device", "cpu", "--batch-size", "8"],
            stdout=console,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(state),
            start_new_session=True,
        )
    server = RunningServer(port, state, "")
    try:
        assert wait_for(lambda: b"first answer after" in log.read_bytes(), 120), log.read_text()
        keeps_its_exporter(server)
        assert process.poll() is None
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            worker, waiting = hold_in_flight(server, pool, cell)
            process.terminate()
            time.sleep(1)
            process.terminate()  # somebody is impatient
            os.kill(worker, signal.SIGCONT)
            assert Counter(answer.result().status for answer in waiting) == {200: IN_FLIGHT}
        assert process.wait(timeout=60) == 0
        said = log.read_text(encoding="utf-8")
        assert f"server on port {port} stopped" in said
        assert "Torch worker started" in said  # the logs came to the console
        assert wait_for(lambda: of_state(state) == [], 5)
    finally:
        end_group(process)
        end_all(state)
