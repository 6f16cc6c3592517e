from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambamic.handlers.gate import VARIABLE, Gate

HOLD = """
import sys, time
from pathlib import Path
from mambamic.handlers.gate import Gate
with Gate(Path(sys.argv[1])).busy():
    print("busy", flush=True)
    time.sleep(60)
"""


def test_idle_when_nobody_is_busy(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    assert gate.wait_idle(0)
    with gate.busy():
        assert not gate.wait_idle(0)
    assert gate.wait_idle(0)


def test_several_workers_are_busy_at_once(tmp_path: Path) -> None:
    with Gate(tmp_path).busy(), Gate(tmp_path).busy():
        pass


def test_a_killed_worker_is_not_busy(tmp_path: Path, root: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"busy\n"
        began = time.monotonic()
        assert not Gate(tmp_path).wait_idle(0.2)
        assert time.monotonic() - began >= 0.2
    finally:
        worker.kill()
        worker.communicate()
    assert Gate(tmp_path).wait_idle(5)


def test_closing_and_opening(tmp_path: Path) -> None:
    launcher, worker = Gate(tmp_path), Gate(tmp_path)
    assert not worker.closed
    launcher.close()
    assert worker.closed
    with worker.busy() as closed:
        assert closed
    launcher.open()
    with worker.busy() as closed:
        assert not closed


def test_each_worker_is_heard_once_it_begins_a_batch(tmp_path: Path) -> None:
    launcher, worker = Gate(tmp_path), Gate(tmp_path)
    assert launcher.unheard() == []
    worker.register()
    with worker.busy():
        launcher.announce()
    # That batch was begun before: another may be on its way to the worker.
    assert launcher.unheard() == [os.getpid()]
    with worker.busy():
        assert launcher.unheard() == []
        # It is told on a full disk, too.
        assert (tmp_path / f"worker-{os.getpid()}").stat().st_blocks == 0
        launcher.close()
        assert not launcher.wait_idle(0)
    assert launcher.unheard() == []
    worker.unregister()
    launcher.open()
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]


def test_a_worker_that_has_died_is_not_waited_for(tmp_path: Path) -> None:
    worker = Gate(tmp_path)
    worker.register()
    assert Gate(tmp_path).unheard() == [os.getpid()]
    worker.unregister()
    assert Gate(tmp_path).unheard() == []


def test_there_is_none_under_plain_torchserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Gate.from_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert Gate.from_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert Gate.from_environment() is not None
