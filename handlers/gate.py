"""How a stopping launcher and the workers agree: who is busy, and when to refuse.

TorchServe has no graceful stop. The launcher gives the workers a folder through the
environment. A worker holds a shared lock on one file there while it works on a batch, which the
kernel lets go of when the process dies, and answers 503 once another file says that the server
stops.

A batch may have left the frontend without the worker having begun it. So the launcher first
announces the end, and closes the gate when every worker has begun a batch since: workers take
batches one by one, and whatever a worker had been handed before, it has then at least begun.
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
        self._folder = folder
        self._lock = folder / "busy"
        self._announced = folder / "announced"
        self._stopping = folder / "stopping"
        self._own: IO[str] | None = None

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
        """Undo `announce` and `close`, before a start."""
        for path in (self._stopping, self._announced, *self._workers()):
            path.unlink(missing_ok=True)

    def register(self) -> None:
        """Count this process, from now to its end, among the workers that take batches."""
        self._own = (self._folder / f"worker-{os.getpid()}").open("w", encoding="utf-8")
        fcntl.flock(self._own, fcntl.LOCK_EX)

    def unregister(self) -> None:
        """Undo `register`."""
        if self._own is not None:
            self._own.close()
            self._own = None

    @contextmanager
    def busy(self) -> Iterator[bool]:
        """Count as busy inside the block; several workers may at once.

        Yields:
            Whether the gate is closed.
        """
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            closed = self.closed
            # Last: once every worker has said so the launcher closes the gate, and waits.
            if self._own is not None and self._announced.exists():
                # A length without content: it takes no space, of which there may be none.
                self._own.truncate(1)
            yield closed

    def announce(self) -> None:
        """Ask each worker to tell when it begins a batch."""
        self._announced.touch()

    def unheard(self) -> list[int]:
        """Return the process ids of living workers that have begun no batch since `announce`."""
        pids = []
        for path in self._workers():
            with path.open(encoding="utf-8") as own:
                if not _grab(own) and not os.fstat(own.fileno()).st_size:
                    pids.append(int(path.name.partition("-")[2]))
        return pids

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

    def _workers(self) -> list[Path]:
        return list(self._folder.glob("worker-*"))


def _grab(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
