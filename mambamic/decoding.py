"""Batches of image files decoded beside the model: in threads, or in processes of their own.

The interpreter lock lets one process decode a few thousand images a second, however many threads
it has. Beyond that the work has to go to other processes. These are plain children on a socket,
not a ``ProcessPoolExecutor``: children of that one outlive a parent that is killed, import the
parent's main module (in a server, torch), and when one dies all are lost with their work and none
is to blame. Here a child that loses its parent reads the end of its socket and leaves; one that
dies takes a single image with it, which is known, and is replaced. Pixels come back through a page
of shared memory, because pickling copies them several times in the one process that all wait for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mambamic.errors import DecodeError, MambamicError, ServerError
from mambamic.images import MAX_PIXELS, open_image, to_pixels
from mambamic.machine import usable_cpus
from mambamic.preprocess import Preprocess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import TypeAlias

    from mambamic.images import BytesLike
    from mambamic.preprocess import Pixels

    Decoded: TypeAlias = Pixels | MambamicError

_ATTEMPTS = 2
# In threads, at most so many pixels are decoded at a time, of some twelve bytes each: two of the
# largest images, or some hundred of the usual ones.
PIXELS_AT_ONCE = 2 * MAX_PIXELS


class Timed(NamedTuple):
    """A decoded image and the seconds that its two steps took, 0 for a step not come to an end."""

    result: Decoded
    decode_s: float = 0.0
    preprocess_s: float = 0.0


def decode_pixels(
    preprocess: Preprocess, blob: BytesLike, *, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Decode one image file and bring it to the model's size; an error is returned, not raised.

    Returns:
        (input_size, input_size, 3) uint8, or why there is none.
    """
    return _decode_timed(preprocess, blob, max_pixels, _Room()).result


class _Room:
    """The pixels that several threads may decode at a time."""

    def __init__(self) -> None:
        self._taken = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[float]:
        """Take room for an image inside the block; one that is larger than all room goes alone.

        Yields:
            How many seconds that had to be waited for.
        """
        began = time.perf_counter()
        with self._freed:
            self._freed.wait_for(lambda: not self._taken or self._taken + pixels <= PIXELS_AT_ONCE)
            self._taken += pixels
        try:
            yield time.perf_counter() - began
        finally:
            with self._freed:
                self._taken -= pixels
                self._freed.notify_all()


def _decode_timed(preprocess: Preprocess, blob: BytesLike, max_pixels: int, room: _Room) -> Timed:
    began = time.perf_counter()
    try:
        image = open_image(blob, max_pixels)
        with room.of(image.width * image.height) as waited:
            rgb = to_pixels(image)
            decoded = time.perf_counter()
            pixels = preprocess.pixels(rgb)
    except MambamicError as error:
        return Timed(error)
    return Timed(pixels, decoded - began - waited, time.perf_counter() - decoded)


class DecodePool:
    """Decode batches of image files, each batch in its order.

    Use it as a context manager, or call ``close``.

    Args:
        preprocess: What to do to each image.
        processes: Decoder processes; 0 decodes in threads of this process.
        threads: Threads where there are no processes; by default one per usable core, at most 8.
        max_pixels: Images of more pixels are refused by their header.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        processes: int = 0,
        threads: int | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._processes = processes
        self._closed = False
        self._decoders: list[_Decoder] = []
        self._start_decoders()
        workers = threads or min(8, usable_cpus())
        self._room = _Room()
        self._threads = None if processes else ThreadPoolExecutor(workers, "decode")

    def __enter__(self) -> DecodePool:
        """Return the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the threads or processes."""
        self.close()

    def close(self) -> None:
        """Stop the threads or processes; calling it twice does no harm."""
        if self._threads is not None:
            self._threads.shutdown()
        with self._lock:
            self._closed = True
            self._stop_decoders()

    def map(self, blobs: Sequence[BytesLike]) -> list[Decoded]:
        """Decode a batch.

        Args:
            blobs: The bytes of the image files.

        Returns:
            Per file, in order, (input_size, input_size, 3) uint8 or the error that it made.

        Raises:
            ServerError: A decoder process cannot be started.
        """
        return [timed.result for timed in self.timed(blobs)]

    def timed(self, blobs: Sequence[BytesLike]) -> list[Timed]:
        """Decode a batch as ``map`` does, and say how long each image took, without waiting.

        Args:
            blobs: The bytes of the image files.

        Raises:
            ServerError: A decoder process cannot be started.
        """
        if self._threads is not None:
            # One image is decoded sooner than a thread wakes up for it.
            over = map if len(blobs) == 1 else self._threads.map
            return list(over(self._decode_here, blobs))
        # One batch at a time: each batch alone keeps all decoders busy.
        with self._lock:
            assert not self._closed, "the pool is closed"
            self._start_decoders()
            try:
                return self._decode_there(blobs)
            except BaseException:
                # Answers are under way that the next batch would take for its own.
                self._stop_decoders()
                raise

    def _start_decoders(self) -> None:
        fresh = [
            _Decoder(self._preprocess, self._max_pixels)
            for _ in range(self._processes - len(self._decoders))
        ]
        self._decoders += fresh
        try:
            for decoder in fresh:
                decoder.wait_until_ready()
        except ServerError:
            self._stop_decoders()
            raise

    def _stop_decoders(self) -> None:
        for decoder in self._decoders:
            decoder.stop()
        self._decoders = []

    def _decode_here(self, blob: BytesLike) -> Timed:
        return _decode_timed(self._preprocess, blob, self._max_pixels, self._room)

    def _decode_there(self, blobs: Sequence[BytesLike]) -> list[Timed]:
        results: list[Timed | None] = [None] * len(blobs)
        attempts = [0] * len(blobs)
        waiting = deque(range(len(blobs)))
        idle = deque(range(len(self._decoders)))
        busy: dict[Connection, tuple[int, int]] = {}  # connection: (decoder, image)
        while waiting or busy:
            while waiting and idle:
                slot, index = idle.popleft(), waiting.popleft()
                attempts[index] += 1
                decoder = self._decoders[slot]
                # Where the decoder has died the answer, an end of file, is dealt with below.
                with contextlib.suppress(OSError):
                    decoder.connection.send_bytes(blobs[index])
                busy[decoder.connection] = (slot, index)
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                slot, index = busy.pop(connection)
                try:
                    results[index] = self._decoders[slot].receive()
                except (EOFError, OSError):
                    self._decoders[slot].stop()
                    self._decoders[slot] = _Decoder(self._preprocess, self._max_pixels)
                    self._decoders[slot].wait_until_ready()
                    if attempts[index] < _ATTEMPTS:
                        waiting.append(index)
                    else:
                        results[index] = Timed(_killer(blobs[index]))
                idle.append(slot)
        return [result for result in results if result is not None]


class _Decoder:
    """One child process and the connection to it."""

    def __init__(self, preprocess: Preprocess, max_pixels: int) -> None:
        self.connection, theirs = Pipe()
        page = os.memfd_create("mambamic-pixels")
        self.pixels = _map_pixels(page, preprocess.input_size)
        # The child imports what this process imports, from wherever that came.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mambamic.decoding", str(theirs.fileno()), str(page)],
            pass_fds=[theirs.fileno(), page],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        os.close(page)
        with contextlib.suppress(OSError):
            self.connection.send((preprocess, max_pixels))

    def wait_until_ready(self) -> None:
        """Return once the process has imported what it needs, or raise ``ServerError``."""
        try:
            self.connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise ServerError(
                f"a decoder process left with exit status {self.process.returncode}",
                "one that starts and waits for images",
                "read what it wrote above; mambamic must be importable by " + sys.executable,
            ) from error

    def receive(self) -> Timed:
        """Return the answer to the image that was sent last."""
        answer: MambamicError | tuple[float, float] = self.connection.recv()
        return Timed(self.pixels.copy(), *answer) if isinstance(answer, tuple) else Timed(answer)

    def stop(self) -> None:
        """Close the connection, on which the process leaves, and wait until it has."""
        self.connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _killer(blob: BytesLike) -> DecodeError:
    return DecodeError(
        f"{len(blob)} bytes on which the decoder died twice",
        "an image that can be decoded within the memory there is",
        "save it again in another format",
    )


def _map_pixels(page: int, size: int) -> Pixels:
    os.ftruncate(page, size * size * 3)
    return np.frombuffer(mmap.mmap(page, 0), np.uint8).reshape(size, size, 3)


def serve(connection: Connection, page: int) -> None:
    """Answer requests to decode, one by one, until the other side is gone.

    Args:
        connection: Blobs come in; two times go out where the pixels are ready, or an error.
        page: File descriptor of the memory for the pixels.
    """
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        preprocess, max_pixels = connection.recv()
        pixels = _map_pixels(page, preprocess.input_size)
        connection.send("ready")
        room = _Room()
        while True:
            blob = connection.recv_bytes()
            timed = _decode_timed(preprocess, blob, max_pixels, room)
            if isinstance(timed.result, MambamicError):
                connection.send(timed.result)
            else:
                pixels[...] = timed.result
                connection.send(timed[1:])


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
