"""The processes of one server: Java leads a session, and every worker is in it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

import psutil


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


def end(java: psutil.Process, patience: float = 8) -> None:
    """End a server: Java first, then whatever of its session is left, by force if need be.

    Args:
        java: The session's leader, checked to be the server's.
        patience: Seconds that Java has to end by itself.
    """
    # Java first: it would start a worker anew that ends before it.
    _send([java], signal.SIGTERM)
    psutil.wait_procs([java], timeout=patience)
    _send([java], signal.SIGKILL)
    psutil.wait_procs([java], timeout=patience)
    # A worker leaves by itself when its connection closes; one that computes, or still loads,
    # has to be told.
    psutil.wait_procs(of_session(java), timeout=0.5)
    for number, seconds in ((signal.SIGTERM, 1.5), (signal.SIGKILL, 5), (signal.SIGKILL, 5)):
        left = of_session(java)
        _send(left, number)
        psutil.wait_procs(left, timeout=seconds)


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
