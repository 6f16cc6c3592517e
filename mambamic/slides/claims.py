"""Who works on what, where several processes share a folder.

A claim is a lock of the operating system on a file, which falls when its process ends, however it
ends: a killed process leaves nothing that another would wait for. On a network's file system the
server must pass locks on (NFS 4 and Lustre with ``flock`` do). Should locks have no effect there,
work may be done twice, but parts are still written whole and under the same names.
"""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mambamic.slides.files import LOCKS


def claim(folder: Path, what: str, *, wait: bool = False) -> BaseFileLock | None:
    """Claim a piece of a slide's work; ``release`` the answer when it is done.

    Args:
        folder: Of the slide.
        what: Name of the piece.
        wait: Wait while another process has it.

    Returns:
        The claim, None where another process has it.
    """
    path = folder / LOCKS
    path.mkdir(parents=True, exist_ok=True)
    # It is taken in one thread and given back in another.
    lock = FileLock(path / what, thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    return lock
