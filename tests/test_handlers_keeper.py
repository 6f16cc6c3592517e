from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys

from mambamic.handlers.keeper import keep_connection

WORKER = """
import sys, time
from mambamic.handlers.keeper import keep_connection
assert keep_connection() is not None
print("ready", flush=True)
time.sleep(60)
"""


def test_a_connection_outlives_its_killed_worker() -> None:
    ours, theirs = socket.socketpair()
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], pass_fds=[theirs.fileno()], stdout=subprocess.PIPE
    )
    theirs.close()
    assert worker.stdout is not None
    with ours, worker.stdout:
        assert worker.stdout.readline() == b"ready\n"
        os.kill(worker.pid, signal.SIGKILL)
        # When the process has been reaped, the connection is still there ...
        assert worker.wait(30) == -signal.SIGKILL
        assert select.select([ours], [], [], 0)[0] == []
        # ... and then it ends.
        ours.settimeout(30)
        assert ours.recv(1) == b""


def test_without_a_connection_there_is_nothing_to_keep() -> None:
    code = "from mambamic.handlers.keeper import keep_connection; print(keep_connection())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_it_ends_when_it_is_let_go() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        keeper = keep_connection()
        assert keeper is not None
        keeper.communicate(timeout=30)
        assert keeper.returncode == 0
