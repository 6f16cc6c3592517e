from __future__ import annotations

import importlib.util
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambamic.errors import ServerError
from mambamic.launcher import server
from mambamic.launcher.archives import ModelSpec
from mambamic.launcher.folders import Record, ServerFolder
from mambamic.launcher.settings import Settings

from .e2e.servers import free_port


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path))


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_port_in_use_is_named_with_the_remedy(offset: int) -> None:
    taken = free_port() + offset
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", taken))
        occupied.listen()
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


def test_only_logs_of_our_own_are_set_aside(tmp_path: Path) -> None:
    for name in ("model_log.log", "console.log", "other.log"):
        (tmp_path / name).write_text(name)
    server._clear_logs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_log.log.old",
        "console.log.old",
        "other.log",
    }


def test_a_second_start_does_not_harm_the_first(tmp_path: Path) -> None:
    folder = ServerFolder.of_port(8080)
    record = Record(1, 0, "127.0.0.1", 8080, str(tmp_path / "scratch"), "logs", [])
    with folder.claim():
        folder.write(record)
        with (
            pytest.raises(ServerError, match="another mambamic serve is starting"),
            server.starting([], Settings(port=8080)),
        ):
            raise AssertionError("the start was let through")
        assert folder.read() == record


def test_a_signal_in_the_midst_of_a_start_leaves_no_process(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ServerFolder.write
    written: list[Record] = []

    def interrupted(folder: ServerFolder, record: Record) -> None:
        written.append(record)
        signal.raise_signal(signal.SIGINT)
        write(folder, record)

    monkeypatch.setattr(ServerFolder, "write", interrupted)
    port = free_port()
    entered = False
    with (
        pytest.raises(KeyboardInterrupt),
        server.starting([ModelSpec(random_checkpoint)], Settings(port=port, device="cpu")),
    ):
        entered = True
    assert not entered
    (record,) = written
    assert record.process() is None
    assert not Path(record.scratch).exists()
    assert ServerFolder.of_port(port).read() is None
