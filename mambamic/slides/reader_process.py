"""A process that reads tiles: the child's half of ``pool``.

It is started as ``python -m mambamic.slides.reader_process SOCKET MEMORY BYTES`` and imports
neither torch nor pyarrow. It leaves when the other side of its socket is gone, however that came
about.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
from multiprocessing.connection import Connection

from mambamic.slides.read import TileReader, as_pixels


def serve(connection: Connection, memory: int, size: int) -> None:
    """Answer requests to read tiles, one by one, until the other side is gone.

    Args:
        connection: A source, places and an offset come in; a report goes out.
        memory: File descriptor of the memory for pixels.
        size: Of that memory in bytes.
    """
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shared = memoryview(mmap.mmap(memory, size))
    reader = TileReader()
    with contextlib.suppress(EOFError, OSError):
        connection.send("ready")
        while True:
            source, places, offset, count = connection.recv()
            pixels = None
            if not source.encode:
                pixels = as_pixels(shared[offset:], count, source.preprocess.input_size)
            connection.send(reader.read(source, places, pixels))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
