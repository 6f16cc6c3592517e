"""Tests run in several processes (pytest-xdist); a measurement under load has the machine alone."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The number of this process among those of a run; one process alone is number 0.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))


def _lock(name: str) -> int:
    path = Path(tempfile.gettempdir(), f"mambamic-tests-{_RUN}-{name}")
    # All processes of a run have opened it long before the first of them ends.
    atexit.register(path.unlink, missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


# Who holds the gate keeps other tests from beginning; who has begun holds the floor.
_gate, _floor = _lock("gate"), _lock("floor")


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Run one test beside those of other processes."""
    fcntl.flock(_gate, fcntl.LOCK_EX)
    fcntl.flock(_floor, fcntl.LOCK_SH)
    fcntl.flock(_gate, fcntl.LOCK_UN)
    try:
        yield
    finally:
        fcntl.flock(_floor, fcntl.LOCK_UN)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside a test or its fixtures: wait for the tests of other processes, and let none begin."""
    # Another test that waits here must not be waited for.
    fcntl.flock(_floor, fcntl.LOCK_UN)
    fcntl.flock(_gate, fcntl.LOCK_EX)
    fcntl.flock(_floor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(_floor, fcntl.LOCK_SH)
        fcntl.flock(_gate, fcntl.LOCK_UN)
