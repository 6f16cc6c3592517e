"""Processes that read tiles into memory which the model's process shares.

A batch is a stretch of that memory. Its tiles are given out in pieces to whichever reader is idle,
so that large batches, which a GPU wants, do not need large memory per reader, and readers stay busy
across the ends of batches and slides. Each has its next piece at hand, and does not wait for the
model's process, which is busy too. A reader that dies, which a damaged file can bring about in
native code, is replaced; the tiles that it was reading are read again one by one, and the one that
kills a reader again is reported as such.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from mambamic.errors import ServerError
from mambamic.preprocess import Pixels
from mambamic.slides.read import DIED, Failure, Place, Report, Source, as_pixels

_ASKED = 2  # pieces of a reader: the one that it reads, and the next


@dataclass
class Batch:
    """Tiles of one slide that go through the model together.

    Args:
        source: Their slide.
        places: Where they lie; ``at`` of each is its place in the batch.
        note: Whatever the caller wants to have back with it.
    """

    source: Source
    places: Sequence[Place]
    note: Any = None
    report: Report = field(default_factory=Report)
    slot: int = -1
    unread: int = 0


@dataclass
class _Piece:
    batch: Batch
    places: Sequence[Place]
    retried: bool = False


class ReaderPool:
    """Reads batches; use it as a context manager.

    Args:
        readers: Processes.
        batch: Most tiles in a batch.
        input_size: Side of the model's input in pixels.
        in_model: Batches that are scored at a time.

    Raises:
        ServerError: A reader cannot be started.
    """

    def __init__(self, readers: int, batch: int, input_size: int, in_model: int = 1) -> None:
        self._piece = max(1, min(64, batch // 2))
        self._batch = batch
        self._input_size = input_size
        self._slot_bytes = batch * input_size * input_size * 3
        # All that readers have, the model's, one batch ready for it, and one that holds its memory
        # while its last piece is awaited: pieces take unlike times, and come back out of order.
        slots = -(-readers * _ASKED * self._piece // batch) + in_model + 2
        self._size = slots * self._slot_bytes
        self._memory = os.memfd_create("mambamic-tiles")
        os.ftruncate(self._memory, self._size)
        self._shared = memoryview(mmap.mmap(self._memory, self._size))
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._waiting: deque[_Piece] = deque()
        self._lock = threading.Lock()
        self._wake_us, self._wake = Pipe(duplex=False)
        self._closed = False
        # Not a SimpleQueue: where several wait for one with a timeout, CPython 3.11's may wait for
        # ever, once another has taken what it was woken for at the moment when its time was up.
        self.ready: queue.Queue[Batch] = queue.Queue()
        self.failure: BaseException | None = None
        self._readers = [_Reader(self._memory, self._size) for _ in range(readers)]
        for reader in self._readers:
            reader.wait_until_ready()
        self._thread = threading.Thread(target=self._run, name="readers", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReaderPool:
        """Return the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the readers."""
        self.close()

    @property
    def memory_bytes(self) -> int:
        """Size of the shared memory."""
        return self._size

    def submit(self, batch: Batch, timeout: float) -> bool:
        """Have a batch read, once there is memory for it; it comes back through ``ready``.

        Args:
            batch: At most as many tiles as the pool was made for.
            timeout: Seconds to wait for memory.

        Returns:
            Whether it was accepted within that time.
        """
        try:
            batch.slot = self._free.get(timeout=timeout)
        except queue.Empty:
            return False
        batch.unread = len(batch.places)
        step = self._piece
        pieces = [
            _Piece(batch, batch.places[start : start + step])
            for start in range(0, len(batch.places), step)
        ]
        with self._lock:
            self._waiting.extend(pieces)
        self._wake.send_bytes(b"!")
        return True

    def pixels(self, batch: Batch) -> Pixels:
        """Return the pixels of a batch that is ready: a view, good until it is released."""
        start = batch.slot * self._slot_bytes
        return as_pixels(self._shared[start:], len(batch.places), self._input_size)

    def release(self, batch: Batch) -> None:
        """Give the memory of a batch back."""
        self._free.put(batch.slot)

    def close(self) -> None:
        """Stop the readers; calling it twice does no harm."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._wake.send_bytes(b"!")
        self._thread.join()
        for reader in self._readers:
            reader.stop()
        os.close(self._memory)
        self._wake.close()
        self._wake_us.close()

    def _run(self) -> None:
        try:
            self._give_out()
        # Whoever waits for a batch is told; nobody waits for this thread.
        except BaseException as error:
            self.failure = error

    def _give_out(self) -> None:
        while not self._closed:
            self._ask()
            busy = {reader.connection: reader for reader in self._readers if reader.asked}
            for connection in wait([*busy, self._wake_us]):
                assert isinstance(connection, Connection)
                if connection is self._wake_us:
                    self._wake_us.recv_bytes()
                    continue
                reader = busy[connection]
                try:
                    report = connection.recv()
                except (EOFError, OSError):
                    self._replace(reader)
                else:
                    self._done(reader.asked.popleft(), report)

    def _ask(self) -> None:
        """Give pieces to readers that have none, then to those that have no next one."""
        for asked in range(_ASKED):
            for reader in self._readers:
                if self._waiting and len(reader.asked) == asked:
                    with self._lock:
                        piece = self._waiting.popleft()
                    reader.ask(piece, piece.batch.slot * self._slot_bytes)

    def _replace(self, dead: _Reader) -> None:
        dead.stop()
        fresh = _Reader(self._memory, self._size)
        self._readers[self._readers.index(dead)] = fresh
        fresh.wait_until_ready()
        # It answers in the order in which it was asked: the others are not to blame.
        piece, *others = dead.asked
        with self._lock:
            self._waiting.extendleft(reversed(others))
        self._after_death(piece)

    def _after_death(self, piece: _Piece) -> None:
        if piece.retried:
            (place,) = piece.places
            report = Report([Failure(place.at, DIED, "the process that read it died, twice")])
            self._done(piece, report)
            return
        alone = [_Piece(piece.batch, [place], retried=True) for place in piece.places]
        with self._lock:
            self._waiting.extendleft(reversed(alone))

    def _done(self, piece: _Piece, report: Report) -> None:
        batch = piece.batch
        batch.report.failures += report.failures
        batch.report.files |= report.files
        batch.report.read_s += report.read_s
        batch.report.preprocess_s += report.preprocess_s
        batch.unread -= len(piece.places)
        if not batch.unread:
            self.ready.put(batch)


class _Reader:
    """One child process, the connection to it, and the pieces that it was asked for."""

    def __init__(self, memory: int, size: int) -> None:
        self.asked: deque[_Piece] = deque()
        self.connection, theirs = Pipe()
        # The child imports what this process imports, from wherever that came.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        module = "mambamic.slides.reader_process"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (theirs.fileno(), memory, size))],
            pass_fds=[theirs.fileno(), memory],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()

    def ask(self, piece: _Piece, offset: int) -> None:
        self.asked.append(piece)
        # Where the reader has died the answer is an end of file, which is dealt with there.
        with contextlib.suppress(OSError):
            message = (piece.batch.source, piece.places, offset, len(piece.batch.places))
            self.connection.send(message)

    def wait_until_ready(self) -> None:
        try:
            self.connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise ServerError(
                f"a reader process left with exit status {self.process.returncode}",
                "one that starts and waits for tiles",
                "read what it wrote above; mambamic must be importable by " + sys.executable,
            ) from error

    def stop(self) -> None:
        self.connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
