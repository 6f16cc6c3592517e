"""A killed worker is told from one that failed: its connection outlives it by a moment.

The frontend answers 507 to the requests of a worker that was killed, which may be sent again, and
500 to those of one that ended otherwise. It looks for the exit status when the worker's connection
closes; but the kernel closes that before the process has been reaped, and often enough the status
is not there yet. So a process of the worker's own holds the connection a little longer.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

# Java reaps within milliseconds, on a busy machine within tens of them.
MOMENT_S = 0.2
_OWN_FDS = Path("/proc/self/fd")


def keep_connection() -> subprocess.Popen[bytes] | None:
    """Hold this process's connections to the frontend for a moment longer than it lives.

    Returns:
        The process that does; it ends after this one, or when its standard input is closed. None
        where there is no such connection, or no way to find it.
    """
    connections = _connections()
    if not connections:
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", f"read -r nothing; exec sleep {MOMENT_S}"],
        # Nobody writes to it: it ends with the only process that could.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=connections,
    )


def _connections() -> list[int]:
    """Return the descriptors of connected Unix sockets."""
    listed = [int(entry.name) for entry in _OWN_FDS.iterdir()] if _OWN_FDS.is_dir() else []
    return [descriptor for descriptor in listed if _is_connection(descriptor)]


def _is_connection(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            duplicate.getpeername()
            return duplicate.family == socket.AF_UNIX
    except OSError:
        # No socket, not connected, or the descriptor by which the folder was listed.
        return False
