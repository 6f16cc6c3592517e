"""How a stopping launcher and the workers agree: who is busy, and when to refuse.

TorchServe has no graceful stop. The launcher gives the workers a folder through the
environment. A worker holds a shared lock on one file there while it works on a batch, which the
kernel lets go of when the process dies, and answers 503 once the other file exists.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

VARIABLE = "MAMBAMIC_GATE"


class Gate:
    """The folder that a launcher and its workers share.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = folder / "busy"
        self._stopping = folder / "stopping"

    @classmethod
    def from_environment(cls) -> Gate | None:
        """Return the gate that a launcher named, or None under plain TorchServe."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder and Path(folder).is_dir() else None

    @property
    def closed(self) -> bool:
        """Whether new requests are to be refused."""
        return self._stopping.exists()

    def close(self) -> None:
        """Let the workers refuse what comes from now on."""
        self._stopping.touch()

    def open(self) -> None:
        """Undo `close`, before a start."""
        self._stopping.unlink(missing_ok=True)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count as busy inside the block; several workers may at once."""
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no worker is busy.

        Args:
            timeout: Seconds.

        Returns:
            Whether that came about in time.
        """
        deadline = time.monotonic() + timeout
        with self._lock.open("a") as lock:
            while not _grab(lock):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
        return True


def _grab(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
