from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambamic.launcher import server, stopping
from mambamic.launcher.folders import Record, ServerFolder


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))


def test_stopping_where_nothing_runs(tmp_path: Path) -> None:
    assert server.running(8080) is None
    assert not stopping.stop(8080)
    folder = ServerFolder.of_port(8080)
    folder.create()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # A server that has died: what it left is tidied away.
    folder.write(Record(2**22 - 1, 0, "127.0.0.1", 8080, str(scratch), "logs", []))
    assert server.running(8080) is None
    assert not stopping.stop(8080)
    assert folder.read() is None
    assert not scratch.exists()


def test_workers_that_outlived_their_java_are_ended(tmp_path: Path) -> None:
    # One that does not listen to SIGTERM, as a worker deep in a computation may not.
    spawn = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen(['sleep', '600']); print('ready', flush=True)"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    java = subprocess.Popen(
        [sys.executable, "-c", spawn],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
    )
    with java:
        assert java.stdout is not None
        assert java.stdout.readline() == b"ready\n"
        java.wait(10)
        folder = ServerFolder.of_port(8080)
        folder.create()
        record = Record(java.pid, 0, "127.0.0.1", 8080, str(scratch), "logs", [])
        folder.write(record)
        assert len(stopping._orphans(record)) == 1
        assert not stopping.stop(8080)
        assert stopping._orphans(record) == []
        # The pipe ends with the last process that holds it.
        assert java.stdout.read() == b""


def test_a_server_started_since_is_not_forgotten(tmp_path: Path) -> None:
    folder = ServerFolder.of_port(8080)
    folder.create()
    winner = Record(1, 0, "127.0.0.1", 8080, str(tmp_path / "winner"), "logs", [])
    loser = Record(2, 0, "127.0.0.1", 8080, str(tmp_path / "loser"), "logs", [])
    folder.write(winner)
    stopping.tidy(folder, loser)
    assert folder.read() == winner
