from __future__ import annotations

import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mambamic.launcher.folders import Record, ServerFolder, find_process, state_root
from mambamic.launcher.processes import started

RECORD = Record(1, 25, "127.0.0.1", 8080, "/tmp/x", "logs", ["mambamic/1.0"])


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAMBAMIC_STATE", str(tmp_path / "chosen"))
    assert state_root() == tmp_path / "chosen"
    assert ServerFolder.of_port(8080).root == tmp_path / "chosen" / "serve-8080"
    monkeypatch.delenv("MAMBAMIC_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_root() == tmp_path / "mambamic"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_root() == Path.home() / ".local" / "state" / "mambamic"


def test_a_record_survives(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "serve")
    assert folder.read() is None
    folder.create()
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700
    folder.write(RECORD)
    assert folder.read() == RECORD
    folder.forget(replace(RECORD, pid=2))
    assert folder.read() == RECORD
    folder.forget(RECORD)
    assert folder.read() is None
    (folder.root / "server.json").write_text("{}")
    assert folder.read() is None


def test_only_one_start_at_a_time_has_the_folder(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "serve")
    with folder.claim() as first, folder.claim() as second:
        assert first
        assert not second
        # Who has the folder makes parts of it anew: another one that tries must not come between.
        folder.store.rmdir()
        with folder.claim() as third:
            assert not third
        assert not folder.store.exists()
    with folder.claim() as again:
        assert again


def test_another_process_with_the_pid_is_not_the_server() -> None:
    own = started(os.getpid())
    # Neither by when it began nor by what it runs is this process a server.
    assert replace(RECORD, pid=os.getpid(), begun=own).process() is None
    assert replace(RECORD, pid=os.getpid(), begun=own - 1).process() is None


def test_a_process_is_known_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set moves what psutil calls a process's time of creation."""
    own = os.getpid()
    begun, argument = started(own), psutil.Process().cmdline()[0]
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: time.time())
    found = find_process(own, begun, argument)
    assert found is not None
    assert found.pid == own
    assert find_process(own, begun + 1, argument) is None
    with pytest.raises(psutil.NoSuchProcess):
        started(2**22 - 1)
