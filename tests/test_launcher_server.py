from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambamic.errors import ServerError
from mambamic.launcher import server
from mambamic.launcher.folders import Record, ServerFolder
from mambamic.launcher.settings import Settings


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_port_in_use_is_named_with_the_remedy(offset: int) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        taken = occupied.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {taken} on 127\.0\.0\.1.*--port"):
            server.check_ports(Settings(port=taken - offset))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    server.check_packages()
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "yaml" else find(name)
    )
    with pytest.raises(ServerError, match=r"pyyaml.*mambamic\[serve\]"):
        server.check_packages()


def test_stopping_where_nothing_runs(tmp_path: Path) -> None:
    assert server.running(8080) is None
    assert not server.stop(8080)
    folder = ServerFolder.of_port(8080)
    folder.create()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # A server that has died: what it left is tidied away.
    folder.write(Record(2**22 - 1, 0.0, "127.0.0.1", 8080, str(scratch), "logs", []))
    assert server.running(8080) is None
    assert not server.stop(8080)
    assert folder.read() is None
    assert not scratch.exists()


def test_workers_that_outlived_their_java_are_ended(tmp_path: Path) -> None:
    spawn = "import subprocess; subprocess.Popen(['sleep', '600']); print('ready', flush=True)"
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
        folder.write(Record(java.pid, 0.0, "127.0.0.1", 8080, str(scratch), "logs", []))
        assert not server.stop(8080)
        # The pipe ends with the last process that holds it.
        assert java.stdout.read() == b""
