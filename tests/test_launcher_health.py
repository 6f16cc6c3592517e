"""Without a server; what a real one answers is in tests/e2e/test_health.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mambamic.errors import ServerError
from mambamic.launcher.folders import MAIN_CLASS, Record, ServerFolder
from mambamic.launcher.health import check_live, check_ready
from mambamic.launcher.processes import started

CHECKS = pytest.mark.parametrize("check", [check_ready, check_live])
Check = Callable[[int, float], list[str]]


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))


@pytest.fixture
def mute() -> Iterator[int]:
    """The port of a server whose process is there and which never answers."""
    # Whoever connects waits in the backlog.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        code = "import time; print('there', flush=True); time.sleep(600)"
        sleep = [sys.executable, "-c", code, MAIN_CLASS]
        with subprocess.Popen(sleep, stdout=subprocess.PIPE) as process:
            # For a moment after its start a process has no command line yet.
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            folder = ServerFolder.of_port(port)
            folder.create()
            begun = started(process.pid)
            folder.write(Record(process.pid, begun, "0.0.0.0", port, "scratch", "logs", ["m/1"]))
            yield port
            process.kill()


@CHECKS
def test_no_server(check: Check, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=rf"no server runs on port 8080.*{tmp_path}"):
        check(8080, 1)
    folder = ServerFolder.of_port(8080)
    folder.create()
    folder.write(Record(2**22 - 1, 0, "127.0.0.1", 8080, "scratch", "logs", ["m/1.0"]))
    with pytest.raises(ServerError, match="no server runs on port 8080"):
        check(8080, 1)


@CHECKS
def test_a_server_that_does_not_answer(check: Check, mute: int) -> None:
    with pytest.raises(ServerError, match=rf"no answer to \w+ \S+ on port {mute} \(timed out\)"):
        check(mute, 0.3)
