from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from mambamic.launcher import processes

# A leader with a child that ignores SIGTERM, as a worker deep in a computation may seem to.
LEADER = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("ready", flush=True)
time.sleep(600)
"""


def start() -> tuple[subprocess.Popen[bytes], psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process, psutil.Process(process.pid)


def test_nothing_of_the_session_is_left() -> None:
    process, leader = start()
    with process:
        members = processes.of_session(leader)
        assert len(members) == 2
        assert processes.end(leader) == []
        assert processes.of_session(leader) == []
        assert not any(member.is_running() for member in members if member != leader)


def test_workers_are_found_after_their_leader_has_died() -> None:
    process, leader = start()
    with process:
        leader.kill()
        process.wait(10)
        (orphan,) = processes.of_session(leader)
        began = time.monotonic()
        processes.end(leader)
        assert time.monotonic() - began < 10
        assert not orphan.is_running()


@pytest.fixture
def _terminated() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_terminated")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_they_are_released(number: signal.Signals) -> None:
    done = []
    with processes.signals_held() as release:
        signal.raise_signal(number)
        done.append("held")
        with pytest.raises(KeyboardInterrupt):
            release()
        done.append("released")
    assert done == ["held", "released"]
    with pytest.raises(KeyboardInterrupt), processes.signals_held():
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
