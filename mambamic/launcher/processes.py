"""The processes of one server: Java leads a session, and every worker is in it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil


def started(pid: int) -> int:
    """Return when a process began, in clock ticks since the machine did.

    Not psutil's time of creation, which is of the calendar, and moves when the clock is set or a
    virtual machine was held.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    # The second field is a name in brackets, with whatever in it; this one is the 22nd.
    return int(stat.rpartition(b")")[2].split()[19])


def of_session(java: psutil.Process) -> list[psutil.Process]:
    """Return the living processes of a server, Java included.

    A worker whose Java has died has another parent, but still its session.

    Args:
        java: The session's leader, running or ended.
    """
    found = [process for process in psutil.process_iter() if _is_in(java.pid, process)]
    # The number of a session whose processes have all ended can be given to another one, whose
    # leader then has the pid that Java had.
    if any(process.pid == java.pid and process != java for process in found):
        return []
    return found


def end(java: psutil.Process, patience: float = 8) -> list[psutil.Process]:
    """End a server: Java first, then whatever of its session is left, by force if need be.

    Args:
        java: The session's leader, checked to be the server's.
        patience: Seconds that Java has to end by itself.

    Returns:
        What could not be ended.
    """
    # Java first: it would start a worker anew that ends before it.
    _send([java], signal.SIGTERM)
    psutil.wait_procs([java], timeout=patience)
    _send([java], signal.SIGKILL)
    psutil.wait_procs([java], timeout=patience)
    # A worker leaves by itself when its connection closes; one that computes, or still loads,
    # has to be told.
    psutil.wait_procs(of_session(java), timeout=0.5)
    return end_found(lambda: of_session(java))


def end_found(find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """End processes, by force if need be, and wait until they have.

    Args:
        find: Returns those that are left; it is asked again, as they may start others.

    Returns:
        What could not be ended.
    """
    for number, seconds in ((signal.SIGTERM, 1.5), (signal.SIGKILL, 5), (signal.SIGKILL, 5)):
        left = find()
        _send(left, number)
        psutil.wait_procs(left, timeout=seconds)
    return find()


@contextlib.contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Put SIGINT and SIGTERM off, so that a process which is being started is not lost track of.

    Yields:
        What to call when its end is provided for: signals that came are dealt with then, else at
        the end of the block.
    """
    # Python handles signals in the main thread alone.
    ours = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if ours else ()
    came: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)

    before = {number: signal.signal(number, keep) for number in numbers}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()
        while came:
            signal.raise_signal(came.pop())

    try:
        yield release
    finally:
        release()


def _is_in(session: int, process: psutil.Process) -> bool:
    try:
        same = os.getsid(process.pid) == session
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        # psutil refuses by itself where the pid belongs to another process by now.
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
