from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import urllib3

from mambamic.launcher import exporter
from mambamic.launcher.folders import EXPORTER_LOG, MAIN_CLASS, Record, ServerFolder
from mambamic.launcher.processes import started

from .e2e.servers import free_port, wait_for


@pytest.fixture
def java() -> Iterator[psutil.Popen]:
    """A process that looks like TorchServe's frontend to those who watch it."""
    process = psutil.Popen([sys.executable, "-c", "input()", MAIN_CLASS], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    made = ServerFolder(tmp_path)
    made.create()
    return made


def answers(port: int) -> bool:
    try:
        address = f"http://127.0.0.1:{port}/metrics"
        return urllib3.request("GET", address, retries=False, timeout=5).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def test_it_ends_when_java_does(java: psutil.Popen, folder: ServerFolder, tmp_path: Path) -> None:
    port = free_port()
    process = exporter.start(folder, port, java, tmp_path)
    assert wait_for(lambda: answers(port), 30)
    assert [at.laddr for at in process.net_connections("inet")][:1] == [("127.0.0.1", port)]
    java.kill()
    assert process.wait(30) == 0


def test_it_is_ended_by_its_record_and_nobody_else_is(
    java: psutil.Popen, folder: ServerFolder, tmp_path: Path
) -> None:
    port = free_port()
    process = exporter.start(folder, port, java, tmp_path)
    assert wait_for(lambda: answers(port), 30)
    begun = started(process.pid)

    def end(pid: int, since: int) -> None:
        record = Record(java.pid, 0, "127.0.0.1", 1, "", "", [])
        exporter.end(replace(record, exporter=pid, exporter_begun=since))

    end(java.pid, started(java.pid))
    end(process.pid, begun + 1)
    assert (java.poll(), process.poll()) == (None, None)
    end(process.pid, begun)
    assert process.poll() is not None
    assert not answers(port)


def test_a_port_that_is_taken_ends_it_with_a_word_in_its_log(
    java: psutil.Popen, folder: ServerFolder, tmp_path: Path
) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        process = exporter.start(folder, occupied.getsockname()[1], java, tmp_path)
        assert process.wait(30) != 0
    assert "Address already in use" in (tmp_path / EXPORTER_LOG).read_text(encoding="utf-8")
